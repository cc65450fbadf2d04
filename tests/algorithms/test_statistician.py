import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from maml_jax import Batch, Episode, Model, evaluate, init_meta_state, losses, make_train_loop
from maml_jax.algorithms.statistician import (
    Evidence,
    Gaussian,
    SetStatistics,
    infer_contexts,
    kl_divergence,
    neural_statistician,
)

FLAT = Model(lambda key, inputs: {}, lambda params, inputs: inputs.reshape(len(inputs), -1))
TINY = {"num_context": 1, "num_latent": 1, "num_hidden": 2}
SMALL = {"num_context": 3, "num_latent": 2, "num_hidden": 4}


def make_episode(targets=(0, 1, 1, 0), shape=(1,), seed=0, key=7):
    """Binary images, so that drawing their pixels changes nothing."""
    rng = np.random.default_rng(seed)
    targets = jnp.asarray(targets)

    def batch():
        return Batch(jnp.asarray(rng.integers(0, 2, (len(targets), *shape)), float), targets)

    return Episode(batch(), batch(), None if key is None else jax.random.key(key))


def random_params(learner, episode, seed=3, scale=0.7):
    leaves, treedef = jax.tree.flatten(jax.eval_shape(learner.init, jax.random.key(0), episode.support.inputs))
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(scale=scale, size=leaf.shape)) for leaf in leaves])


def mlp(layers, x):
    """Dense layers with an ELU between two, on the last axis of numpy arrays."""
    for index, layer in enumerate(layers):
        x = np.where(x > 0, x, np.expm1(np.minimum(x, 0))) if index else x
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    return x


def halves(x):
    """Mean and variance."""
    return x[..., :1], np.exp(x[..., 1:])


def test_kl_against_quadrature(x64):
    x = np.linspace(-40, 40, 400_001)

    def log_density(mean, variance):
        return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))

    cases = [((0.0, 1.0), (0.0, 1.0)), ((1.0, 0.5), (-1.0, 2.0)), ((-2.0, 3.0), (0.5, 0.3))]
    expected = []
    for first, second in cases:
        p, q = log_density(*first), log_density(*second)
        expected.append(np.trapezoid(np.exp(p) * (p - q), x))
    first, second = (
        Gaussian(jnp.array([[case[n][0]] for case in cases]), jnp.log(jnp.array([[case[n][1]] for case in cases])))
        for n in (0, 1)
    )
    np.testing.assert_allclose(kl_divergence(first, second), expected, rtol=1e-9, atol=1e-12)
    # Entries are independent: divergences add.
    together = kl_divergence(*(Gaussian(g.mean.reshape(1, 3), g.log_variance.reshape(1, 3)) for g in (first, second)))
    np.testing.assert_allclose(together, [sum(expected)], rtol=1e-9)


def quadrature(params, batch, num_points=40):
    """Evidence and bound in nats per image for one context and latent variable, and the parts of the bound."""
    points, weights = np.polynomial.hermite_e.hermegauss(num_points)
    weights = weights / weights.sum()
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)

    def log_likelihood(x, z, c):
        """[points of c, points of z]."""
        logits = mlp(params["decoder"], np.stack([z, np.broadcast_to(c, z.shape)], -1))[..., 0]
        return -np.logaddexp(0, -logits) if x == 1 else -np.logaddexp(0, logits)

    def latents(parameters):
        mean, variance = halves(parameters)
        return mean + np.sqrt(variance) * points, mean[:, 0], variance[:, 0]

    evidence = reconstruction = context_divergence = latent_divergence = 0.0
    for label in np.unique(targets):
        own = inputs[targets == label]
        # The evidence: c and then every z by quadrature under their priors.
        c = points[:, None]
        z, _, _ = latents(mlp(params["prior"], c))
        of_images = [np.log(np.exp(log_likelihood(x[0], z, c)) @ weights) for x in own]
        evidence += np.log(np.exp(sum(of_images)) @ weights)
        # The bound: the same under the approximate posteriors.
        hidden = mlp(params["pooled"], own)
        mean = np.where(hidden > 0, hidden, np.expm1(hidden)).mean(0)
        centre, variance = halves(mlp(params["statistic"], np.append(mean, len(own))))
        context_divergence += 0.5 * np.sum(centre**2 + variance - np.log(variance) - 1)
        c = centre + np.sqrt(variance) * points[:, None]
        _, prior_mean, prior_variance = latents(mlp(params["prior"], c))
        for x in own:
            z, m, v = latents(mlp(params["inference"], np.concatenate([np.broadcast_to(x, c.shape), c], -1)))
            reconstruction += weights @ log_likelihood(x[0], z, c) @ weights
            ratio = v / prior_variance
            distance = (m - prior_mean) ** 2 / prior_variance
            latent_divergence += weights @ (0.5 * (ratio - np.log(ratio) - 1 + distance))
    parts = np.array([reconstruction, context_divergence, latent_divergence]) / len(inputs)
    return evidence / len(inputs), parts


@pytest.mark.parametrize("seed", [3, 4])
def test_the_objective_is_a_lower_bound_of_the_evidence(x64, seed):
    # One pixel, one context variable, one latent: sets of three and one images of two classes.
    episode = make_episode(targets=(0, 1, 0, 0))
    learner = neural_statistician(FLAT, way=2, **TINY)
    params = random_params(learner, episode, seed=seed)
    evidence, parts = quadrature(params, episode.support)
    bound = parts[0] - parts[1] - parts[2]
    assert bound < evidence < 0

    @jax.jit
    def sample(key):
        return jax.vmap(lambda key: learner.objective(params, episode._replace(key=key)))(jax.random.split(key, 4000))

    values, info = sample(jax.random.key(0))
    errors = [4 * np.std(value) / np.sqrt(len(value)) + 1e-12 for value in (*info, values)]
    for value, expected, error in zip((*info, values), (*parts, -bound), errors, strict=True):
        assert abs(np.mean(value) - expected) < error
    chex.assert_trees_all_close(values, -info.bound, rtol=1e-12)
    assert max(errors) < 0.05


@pytest.mark.parametrize("alpha", [0.0, 1.0, jnp.float32(0.25)])
def test_alpha_weighs_the_two_parts(x64, alpha):
    episode = make_episode(shape=(2, 2))
    learner = neural_statistician(FLAT, way=2, alpha=alpha, **SMALL)
    params = random_params(learner, episode)
    value, parts = jax.jit(learner.objective)(params, episode)
    divergence = parts.context_divergence + parts.latent_divergence
    chex.assert_trees_all_close(value, divergence / (1 + alpha) - (1 + alpha) * parts.reconstruction, rtol=1e-6)
    assert value.dtype == jnp.float64


def test_alpha_is_halved_by_the_half_life():
    settings = SetStatistics(initial_alpha=2.0, alpha_half_life=10)
    steps = jnp.array([0, 9, 10, 19, 20, 35])
    np.testing.assert_allclose(jax.jit(settings.alpha)(steps), [2, 2, 1, 1, 0.5, 0.25])
    # 41 times the float32 nearest to 1/41 is below one.
    multiples = jnp.arange(60)
    chex.assert_trees_all_equal(
        jax.jit(jax.vmap(SetStatistics(alpha_half_life=41).alpha))(41 * multiples), jnp.float32(0.5) ** multiples
    )


def test_finite_differences_of_the_objective(x64):
    episode = make_episode(shape=(2,), targets=(0, 1, 1, 0, 0, 1))
    learner = neural_statistician(FLAT, way=2, alpha=0.5, sample_dropout=0.5, **SMALL)
    params = random_params(learner, episode)
    check_grads(jax.jit(lambda p: learner.objective(p, episode)[0]), (params,), order=1, modes=["rev"], rtol=1e-5)


def test_contexts_and_outputs_by_hand(x64):
    # Gray pixels are used as they are; a query is a set of one.
    inputs = jnp.asarray(np.random.default_rng(2).uniform(size=(5, 2, 2)))
    targets = np.array([1, 0, 1, 2, 1])
    learner = neural_statistician(FLAT, way=3, **SMALL)
    params = random_params(learner, Episode(Batch(inputs, targets), None))
    task_params, info = learner.adapt(
        params, Batch(inputs, jnp.asarray(targets)), key=jax.random.key(0), observe_fn=lambda task_params: 1.0
    )
    assert info.support_loss.shape == (0,)
    assert info.observed.shape == (1,)

    def context(images):
        hidden = mlp(params["pooled"], np.asarray(images).reshape(len(images), -1))
        mean = np.where(hidden > 0, hidden, np.expm1(hidden)).mean(0)
        return np.split(mlp(params["statistic"], np.append(mean, len(images))), 2)

    expected = [context(inputs[targets == label]) for label in range(3)]
    np.testing.assert_allclose(task_params["contexts"].mean, [mean for mean, _ in expected], rtol=1e-12)
    np.testing.assert_allclose(task_params["contexts"].log_variance, [log for _, log in expected], rtol=1e-12)
    outputs = learner.predict(task_params, inputs[:2])
    for image, row in zip(inputs[:2], outputs, strict=True):
        m, v = context(image[None])
        for (mean, log), output in zip(expected, row, strict=True):
            divergence = 0.5 * np.sum(v - log + (np.exp(log) + (m - mean) ** 2) / np.exp(v) - 1)
            np.testing.assert_allclose(output, -divergence, rtol=1e-10)
    # An image that is the only one of its class has that class's context.
    assert learner.predict(task_params, inputs[3:4])[0, 2] == 0


def test_the_order_of_the_support_set_does_not_matter(x64):
    episode, order = make_episode(shape=(3,), targets=(0, 1, 2, 0, 1, 2)), np.array([4, 0, 3, 5, 1, 2])
    learner = neural_statistician(FLAT, way=3, **SMALL)
    params = random_params(learner, episode)
    permuted = jax.tree.map(lambda x: x[order], episode.support)
    chex.assert_trees_all_close(learner.adapt(params, permuted), learner.adapt(params, episode.support), rtol=1e-12)


def test_many_episodes_give_what_one_gives(x64):
    episodes = [make_episode(seed=seed, key=seed) for seed in range(3)]
    learner = neural_statistician(FLAT, way=2, sample_dropout=0.5, **SMALL)
    params = random_params(learner, episodes[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *episodes)
    at_once = jax.jit(jax.vmap(learner.objective, in_axes=(None, 0)))(params, stacked)
    objective = jax.jit(learner.objective)
    one_by_one = [objective(params, episode) for episode in episodes]
    chex.assert_trees_all_close(at_once, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), rtol=1e-10)
    assert isinstance(at_once[1], Evidence)


def test_pixels_are_drawn_with_their_probabilities():
    # A decoder whose logits are constant, without latents that differ from their priors: the reconstruction counts
    # the ones, R = 2 · (number of ones) − 3 softplus(2).
    decoder = Model(lambda key, codes: {}, lambda params, codes: jnp.full((len(codes), 3, 1), 2.0))
    learner = neural_statistician(FLAT, decoder, way=1, **SMALL)
    inputs = jnp.tile(jnp.array([[[0.0], [1.0], [0.25]]]), (2, 1, 1))
    episode = Episode(Batch(inputs, jnp.zeros(2, int)), None)
    params = learner.init(jax.random.key(0), inputs)

    @jax.jit
    @jax.vmap
    def reconstructions(key):
        return learner.objective(params, episode._replace(key=key))[1].reconstruction

    ones = (reconstructions(jax.random.split(jax.random.key(1), 1000)) + 3 * jax.nn.softplus(2.0)) / 2 - 1
    np.testing.assert_allclose(np.unique(np.round(ones, 4)), [0, 0.5, 1])
    np.testing.assert_allclose(jnp.mean(ones), 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 2000))


def test_pixels_of_half_precision_are_drawn_with_their_probabilities():
    # Uniform numbers of bfloat16 are multiples of 1/128: pixels of 1/256 would be ones as often as those of 1/128.
    numbers = []

    def embed(params, images):
        jax.debug.callback(lambda ones: numbers.append(float(ones)), jnp.sum(images.astype(jnp.float32)))
        return images.reshape(len(images), -1)[:, :4]

    learner = neural_statistician(Model(lambda key, images: {}, embed), way=1, **SMALL)
    inputs = jnp.full((2, 100, 100), 1 / 256, jnp.bfloat16)
    params = learner.init(jax.random.key(0), inputs)
    learner.objective(params, Episode(Batch(inputs, jnp.zeros(2, int)), None, jax.random.key(1)))
    jax.effects_barrier()
    expected = 20_000 / 256
    assert abs(numbers[-1] - expected) < 4 * np.sqrt(expected)


def test_an_empty_set_leaves_the_others_finite():
    episode = make_episode(targets=(0, 0, 2, 2))
    learner = neural_statistician(FLAT, way=3, **SMALL)
    params = random_params(learner, episode)
    _, evidence = jax.jit(learner.objective)(params, episode)  # traced labels are not checked
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(evidence))


def test_a_stochastic_decoder_gets_a_key():
    def apply(params, codes, *, key=None):
        logits = jnp.zeros((len(codes), 3, 1))
        return logits if key is None else logits + jax.random.uniform(key)

    decoder = Model(lambda key, codes: {}, apply, stochastic=True)
    learner = neural_statistician(FLAT, decoder, way=1, **SMALL)
    episode = Episode(Batch(jnp.ones((2, 3, 1)), jnp.zeros(2, int)), None)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    found = [
        float(learner.objective(params, episode._replace(key=jax.random.key(seed)))[1].reconstruction)
        for seed in (0, 0, 1)
    ]
    # All pixels are one, and the logits are no less than zero.
    assert found[0] == found[1] != found[2]
    assert min(found) > -3 * np.log(2)


def test_examples_that_are_left_out_do_not_enter_the_mean(x64):
    # With almost all left out, one of every set stays. The divergence of the contexts shows which.
    episode = make_episode(targets=(0, 0, 0, 1), shape=(2, 2))
    learner = neural_statistician(FLAT, way=2, sample_dropout=0.999, **SMALL)
    params = random_params(learner, episode)
    embedded = episode.support.inputs.reshape(4, 4)

    def divergence(rows):
        members = jnp.zeros((4, 2)).at[jnp.array(rows), 0].set(1.0).at[3, 1].set(1.0)
        contexts = infer_contexts(params, embedded, members)
        return float(jnp.sum(kl_divergence(contexts, jax.tree.map(jnp.zeros_like, contexts))) / 4)

    def drawn(learner, num=64):
        keys = jax.random.split(jax.random.key(0), num)
        objective = jax.jit(jax.vmap(lambda key: learner.objective(params, episode._replace(key=key))))
        values = objective(keys)[1].context_divergence
        return np.unique(np.round(values, 9))

    singles = sorted({round(divergence([row]), 9) for row in range(3)})
    np.testing.assert_allclose(drawn(learner), singles, atol=2e-9)
    subsets = [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    half = drawn(neural_statistician(FLAT, way=2, sample_dropout=0.5, **SMALL))
    np.testing.assert_allclose(half, sorted({round(divergence(rows), 9) for rows in subsets}), atol=2e-9)
    np.testing.assert_allclose(drawn(neural_statistician(FLAT, way=2, **SMALL)), [divergence([0, 1, 2])], atol=2e-9)


def test_keys_belong_to_the_objective():
    learner, episode = neural_statistician(FLAT, way=2, **SMALL), make_episode(shape=(3,))
    params = jax.jit(learner.init)(jax.random.key(0), episode.support.inputs)

    @jax.jit
    def objective(key):
        return learner.objective(params, episode._replace(key=key))[0]

    first, again, other = (objective(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again != other
    adapted = [learner.adapt(params, episode.support, key=key) for key in (None, jax.random.key(0))]
    chex.assert_trees_all_equal(*adapted)


def test_parameters_serve_any_number_of_classes():
    episode = make_episode(targets=(0, 1, 2, 3), shape=(3,))
    trained = neural_statistician(FLAT, way=2, **SMALL)
    params = jax.jit(trained.init)(jax.random.key(0), episode.support.inputs)
    learner = neural_statistician(FLAT, way=4, **SMALL)
    task_params, _ = jax.eval_shape(learner.adapt, params, episode.support)
    assert jax.eval_shape(learner.predict, task_params, episode.query.inputs).shape == (4, 4)
    assert jnp.isfinite(jax.jit(learner.objective)(params, episode)[0])


def test_parameters_have_the_type_of_the_embeddings(x64):
    for dtype in (jnp.float32, jnp.float64):
        learner, episode = neural_statistician(FLAT, way=2, **SMALL), make_episode(shape=(3,))
        support = Batch(episode.support.inputs.astype(dtype), episode.support.targets)
        params = jax.eval_shape(learner.init, jax.random.key(0), support.inputs)
        objective = jax.grad(learner.objective, has_aux=True)
        grads, evidence = jax.eval_shape(objective, params, Episode(support, None, episode.key))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, grads, evidence))} == {jnp.dtype(dtype)}


def test_an_objective_without_a_key_is_refused():
    learner, episode = neural_statistician(FLAT, way=2, **SMALL), make_episode(key=None)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    with pytest.raises(ValueError, match=r"draws samples; give the episode a key"):
        learner.objective(params, episode)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_context": 0}, "num_context must be an integer of at least 1, got 0"),
        ({"num_latent": -1}, "num_latent must be an integer of at least 1, got -1"),
        ({"num_hidden": 1.5}, r"num_hidden must be an integer of at least 1, got 1\.5"),
        ({"sample_dropout": 1.0}, r"sample_dropout=1\.0 must be at least 0 and below 1"),
        ({"sample_dropout": -0.1}, r"sample_dropout=-0\.1 must be at least 0 and below 1"),
    ],
)
def test_a_wrong_number_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        SetStatistics(**keywords)
    with pytest.raises(ValueError, match=message):
        neural_statistician(FLAT, way=2, **keywords)


def test_a_wrong_weight_is_refused():
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"^alpha={alpha} must be a number of at least 0"):
            neural_statistician(FLAT, way=2, alpha=alpha)
        with pytest.raises(ValueError, match=rf"initial_alpha={alpha} must be a number of at least 0"):
            SetStatistics(initial_alpha=alpha)
    with pytest.raises(ValueError, match="alpha_half_life must be an integer of at least 1, got 0"):
        SetStatistics(alpha_half_life=0)


def test_what_does_not_fit_is_refused():
    episode = make_episode(shape=(3,))
    inputs, targets = episode.support
    learner = neural_statistician(FLAT, way=2, **SMALL)
    params = learner.init(jax.random.key(0), inputs)
    with pytest.raises(ValueError, match="way must be an integer of at least 1, got 0"):
        neural_statistician(FLAT, way=0)
    for networks in ((lambda x: x,), (FLAT, lambda x: x)):
        with pytest.raises(ValueError, match=r"model must be a maml_jax.Model"):
            neural_statistician(*networks, way=2)
    for wrong, shown in (
        (inputs.astype(jnp.uint8), r"uint8 \(4, 3\)"),
        (inputs[:, 0], r"float32 \(4,\)"),
        ({}, "dict"),
    ):
        for use in (lambda x: learner.init(jax.random.key(0), x), lambda x: learner.adapt(params, Batch(x, targets))):
            with pytest.raises(ValueError, match=rf"one floating array \[S, ...\] of pixels in \[0, 1\], got {shown}"):
                use(wrong)
    with pytest.raises(ValueError, match="has no example of class 2 of way=3"):
        neural_statistician(FLAT, way=3, **SMALL).adapt(params, episode.support)
    short = Model(lambda key, codes: {}, lambda params, codes: codes[:, :2])
    learner = neural_statistician(FLAT, short, way=2, **SMALL)
    with pytest.raises(ValueError, match="a logit for each of the 3 entries of an image, got 2"):
        learner.objective(learner.init(jax.random.key(0), inputs), episode)


def test_it_learns_which_images_belong_together():
    # Images of 16 pixels: every class lights a random half of 8 blocks of two pixels, with a tenth of noise.
    def sample_episode(key):
        class_key, pixel_key, episode_key = jax.random.split(key, 3)
        blocks = jax.random.bernoulli(class_key, 0.5, (3, 8))
        targets = jnp.tile(jnp.arange(3), 6)
        probabilities = jnp.where(jnp.repeat(blocks, 2, 1), 0.9, 0.1)[targets]
        inputs = jax.random.bernoulli(pixel_key, probabilities).astype(jnp.float32).reshape(-1, 4, 4)
        return Episode(Batch(inputs[:12], targets[:12]), Batch(inputs[12:], targets[12:]), episode_key)

    learner = neural_statistician(FLAT, way=3, num_context=8, num_latent=1, num_hidden=16, sample_dropout=0.5)
    optimizer = optax.adam(1e-2)
    train = make_train_loop(learner, optimizer, sample_episode, meta_batch_size=8, num_steps=200, chunk_size=8)
    state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((12, 4, 4)))

    def accuracy(params):
        return evaluate(
            learner, params, sample_episode, jax.random.key(2), metric_fn=losses.accuracy, num_episodes=200
        ).mean[0]

    before = accuracy(state.params)
    state, info = train(state, jax.random.key(1))
    after = accuracy(state.params)
    bounds = info.objective.bound
    # 16 pixels of one fair bit each cost 16 log 2 = 11.1 nats; with half of the images' information known, fewer.
    assert bounds[-20:].mean() > -10 > bounds[0]
    assert after > max(0.85, before + 0.1)
