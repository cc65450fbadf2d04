import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from maml_jax import CATALOGUE, Batch, Episode, Model, Problem, evaluate, init_meta_state, losses, make_train_loop
from maml_jax.algorithms.leo import Gaussian, LatentDescent, dropout, encode, kl_to_standard, leo, orthogonality_penalty

WAY, FEATURES, LATENT = 3, 5, 2
IDENTITY = Model(lambda key, inputs: {}, lambda params, inputs: inputs)
LINEAR = Model(
    lambda key, inputs: {"w": jax.random.normal(key, (inputs.shape[-1], FEATURES))},
    lambda params, inputs: inputs @ params["w"],
)
NO_PENALTY = {"kl_weight": 0.0, "encoder_penalty_weight": 0.0, "l2_weight": 0.0, "orthogonality_weight": 0.0}
PENALTIES = {"kl_weight": 0.3, "encoder_penalty_weight": 0.2, "l2_weight": 0.05, "orthogonality_weight": 0.7}


def build(embedding=IDENTITY, way=WAY, **keywords):
    settings = {"num_latent": LATENT, "num_latent_steps": 2, "num_finetuning_steps": 2, **keywords}
    return leo(embedding, losses.cross_entropy, way=way, **settings)


def make_episode(seed=0, way=WAY, shot=2, key=7):
    """Features around a centre of every class; the support set is not ordered by class."""
    rng = np.random.default_rng(seed)
    centres, targets = rng.normal(size=(way, FEATURES)), np.arange(way * shot) % way

    def batch():
        noise = 0.3 * rng.normal(size=(way * shot, FEATURES))
        return Batch(jnp.asarray(centres[targets] + noise), jnp.asarray(targets))

    return Episode(batch(), batch(), None if key is None else jax.random.key(key))


def random_params(learner, episode, seed=5):
    """Weights for which codes, deviations and rates are all of order one, and no deviation is near its floor."""
    shapes = jax.eval_shape(learner.init, jax.random.key(0), episode.support.inputs)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    params = treedef.unflatten([jnp.asarray(rng.uniform(0.1, 0.6, leaf.shape)) for leaf in leaves])
    sign = jnp.asarray(rng.choice([-1.0, 1.0], (FEATURES, LATENT)))
    return {**params, "encoder": params["encoder"] * sign}


def softmax_gradient(weights, features, targets):
    """∇_W of the mean cross-entropy of the scores features Wᵀ."""
    scores = np.exp(features @ weights.T)
    probabilities = scores / scores.sum(1, keepdims=True)
    return (probabilities - np.eye(len(weights))[targets]).T @ features / len(features)


@pytest.mark.parametrize(("num_latent_steps", "num_finetuning_steps"), [(0, 0), (1, 0), (0, 1), (3, 2)])
def test_adaptation_by_hand(x64, num_latent_steps, num_finetuning_steps):
    # W = z G for the means, so the gradient in z is that in W times Gᵀ.
    episode = make_episode()
    learner = build(num_latent_steps=num_latent_steps, num_finetuning_steps=num_finetuning_steps)
    params = random_params(learner, episode)
    features, targets = map(np.asarray, episode.support)
    decoder = np.asarray(params["decoder"])[:, :FEATURES]
    z = np.asarray(encode(params, episode.support.inputs, episode.support.targets, WAY).mean)
    path = [z @ decoder]
    for _ in range(num_latent_steps):
        z = z - np.asarray(params["latent_rates"]) * (softmax_gradient(z @ decoder, features, targets) @ decoder.T)
        path.append(z @ decoder)
    for _ in range(num_finetuning_steps):
        step = np.asarray(params["weight_rates"]) * softmax_gradient(path[-1], features, targets)
        path.append(path[-1] - step)
    task_params, info = learner.adapt(
        params, episode.support, key=jax.random.key(3), observe_fn=lambda task_params: task_params["weights"]
    )
    np.testing.assert_allclose(task_params["weights"], path[-1], rtol=1e-12)
    np.testing.assert_allclose(info.observed, path, rtol=1e-12)
    by_hand = [losses.cross_entropy(features @ weights.T, episode.support.targets) for weights in path[:-1]]
    np.testing.assert_allclose(info.support_loss, np.reshape(by_hand, len(path) - 1), rtol=1e-12)
    outputs = learner.predict(task_params, episode.query.inputs)
    np.testing.assert_allclose(outputs, episode.query.inputs @ path[-1].T, rtol=1e-12)


def test_the_codes_are_means_over_pairs_and_classes(x64):
    # The relation network written out, pair by pair. Its weights have both signs, so that each ReLU is needed.
    episode = make_episode()
    params = random_params(build(), episode)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (2, 2 * LATENT, 2 * LATENT))
    params["relation"] = [kernel * sign for kernel, sign in zip(params["relation"], [*signs, 1.0], strict=True)]
    codes = np.asarray(episode.support.inputs @ params["encoder"])
    first, second, third = map(np.asarray, params["relation"])
    total = np.zeros((WAY, 2 * LATENT))
    for left, target in zip(codes, np.asarray(episode.support.targets), strict=True):
        for right in codes:
            hidden = np.maximum(np.concatenate([left, right]) @ first, 0)
            total[target] += np.maximum(hidden @ second, 0) @ third / (2 * len(codes))
    code = encode(params, episode.support.inputs, episode.support.targets, WAY)
    np.testing.assert_allclose(code.mean, total[:, :LATENT], rtol=1e-12)
    np.testing.assert_allclose(code.deviation, np.exp(total[:, LATENT:]) - 1, rtol=1e-12)
    # Below zero the deviation of a code is the floor.
    negative = {**params, "relation": [*params["relation"][:2], -params["relation"][2]]}
    floor = encode(negative, episode.support.inputs, episode.support.targets, WAY).deviation
    np.testing.assert_array_equal(floor, 1e-10)


def test_the_objective_by_hand(x64):
    # Without inner steps and dropout: the code is drawn, weights are drawn from what it decodes to, and each of the
    # penalties is added with its weight.
    episode = make_episode()
    learner = build(num_latent_steps=0, num_finetuning_steps=0, **NO_PENALTY)
    params = random_params(learner, episode)
    classify_key = jax.random.split(episode.key, 4)[2]
    _, latent_key, decoder_key, *_ = jax.random.split(classify_key, 5)
    code = encode(params, episode.support.inputs, episode.support.targets, WAY)
    z = code.mean + code.deviation * jax.random.normal(latent_key, (WAY, LATENT))
    mean, logarithm = jnp.split(z @ params["decoder"], 2, 1)
    deviation = jnp.exp(logarithm) - 1 + np.sqrt(2 / (WAY + FEATURES))
    weights = mean + deviation * jax.random.normal(decoder_key, (WAY, FEATURES))
    loss = losses.cross_entropy(episode.query.inputs @ weights.T, episode.query.targets)
    chex.assert_trees_all_close(learner.objective(params, episode)[0], loss, rtol=1e-12)

    def with_weight(name):
        learner = build(num_latent_steps=0, num_finetuning_steps=0, **{**NO_PENALTY, name: 2.0})
        return learner.objective(params, episode)[0] - loss

    chex.assert_trees_all_close(with_weight("kl_weight"), 2 * kl_to_standard(code), rtol=1e-10)
    penalty = orthogonality_penalty(params["decoder"])
    chex.assert_trees_all_close(with_weight("orthogonality_weight"), 2 * penalty, rtol=1e-10)
    kernels = [params["encoder"], *params["relation"], params["decoder"]]
    squares = sum(float(jnp.sum(kernel**2)) for kernel in kernels)
    chex.assert_trees_all_close(with_weight("l2_weight"), squares, rtol=1e-10)
    assert with_weight("encoder_penalty_weight") == 0  # no steps, no distance


def test_the_encoder_penalty_pulls_the_first_code_to_the_adapted_one(x64):
    # After one step of rate α from z the penalty is the mean of (α ∘ ∇_z L)².
    episode = make_episode()
    settings = {"num_latent_steps": 1, "num_finetuning_steps": 0}
    weighted, plain = (
        build(**settings, **{**NO_PENALTY, "encoder_penalty_weight": 1.0}),
        build(**settings, **NO_PENALTY),
    )
    params = random_params(weighted, episode)

    def penalty(params):
        return weighted.objective(params, episode)[0] - plain.objective(params, episode)[0]

    _, latent_key, _, latents_key, _ = jax.random.split(jax.random.split(episode.key, 4)[2], 5)
    code = encode(params, episode.support.inputs, episode.support.targets, WAY)
    step_key = jax.random.split(jax.random.fold_in(latents_key, 0))[0]

    def loss(z):
        mean, logarithm = jnp.split(z @ params["decoder"], 2, 1)
        deviation = jnp.exp(logarithm) - 1 + np.sqrt(2 / (WAY + FEATURES))
        weights = mean + deviation * jax.random.normal(step_key, (WAY, FEATURES))
        return losses.cross_entropy(episode.support.inputs @ weights.T, episode.support.targets)

    gradient = jax.grad(loss)(code.mean + code.deviation * jax.random.normal(latent_key, (WAY, LATENT)))
    value, grads = jax.jit(jax.value_and_grad(penalty))(params)
    chex.assert_trees_all_close(value, jnp.mean((params["latent_rates"][None] * gradient) ** 2), rtol=1e-6)
    # z' is a constant: the rates have no gradient, and the codes have one.
    np.testing.assert_allclose(grads["latent_rates"], 0, atol=1e-12)
    assert jnp.linalg.norm(grads["encoder"]) > 1e-4


def test_kl_is_that_of_gaussians(x64):
    code = Gaussian(jnp.array([[0.0, 1.0], [-2.0, 0.5]]), jnp.array([[1.0, 2.0], [0.5, 1e-10]]))
    x = np.linspace(-30, 30, 200_001)

    def numerical(mean, deviation):
        log_q = -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation)
        log_p = -0.5 * x**2
        return np.trapezoid(np.exp(log_q) / np.sqrt(2 * np.pi) * (log_q - log_p), x)

    wide = [numerical(0, 1), numerical(1, 2), numerical(-2, 0.5)]
    narrow = -np.log(1e-10) + 0.5 * (0.25 - 1)  # in the limit, with m² and without s²
    np.testing.assert_allclose(kl_to_standard(code), (sum(wide) + narrow) / 4, rtol=1e-8)


def test_orthogonal_rows_are_not_penalised(x64):
    rows = jnp.array([[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, -2.0, 0.0]])
    np.testing.assert_allclose(orthogonality_penalty(rows), 0, atol=1e-12)
    # A cosine of 0.6 fills two of four entries.
    tilted = jnp.array([[3.0, 0.0], [6.0, 8.0]])
    np.testing.assert_allclose(orthogonality_penalty(tilted), 2 * 0.36 / 4, rtol=1e-10)


def test_finite_differences_of_the_objective(x64):
    # The adapted code is stopped in the encoder's penalty, so that one is left out.
    penalties = {**PENALTIES, "encoder_penalty_weight": 0.0}
    episode = make_episode()
    learner = build(LINEAR, dropout_rate=0.4, train_embedding=True, **penalties)
    params = random_params(learner, episode)
    check_grads(jax.jit(lambda p: learner.objective(p, episode)[0]), (params,), order=1, modes=["rev"], rtol=1e-5)


def test_inner_gradients_are_exact(x64):
    episode = make_episode()
    learner = build(LINEAR, train_embedding=True, dropout_rate=0.2, **PENALTIES)
    reference = build(LINEAR, train_embedding=True, dropout_rate=0.2, inner_grad=jax.value_and_grad, **PENALTIES)
    params = random_params(learner, episode)
    values = [
        jax.jit(jax.value_and_grad(each.objective, has_aux=True))(params, episode) for each in (learner, reference)
    ]
    chex.assert_trees_all_close(*values, rtol=1e-10, atol=1e-14)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(values[0][1]))


def test_the_embedding_learns_only_if_asked(x64):
    episode = make_episode()
    frozen, trained = build(LINEAR), build(LINEAR, train_embedding=True)
    params = random_params(frozen, episode)
    (value, _), grads = jax.jit(jax.value_and_grad(frozen.objective, has_aux=True))(params, episode)
    (same, _), other = jax.jit(jax.value_and_grad(trained.objective, has_aux=True))(params, episode)
    chex.assert_trees_all_close(value, same)
    assert jnp.all(grads.pop("embedding")["w"] == 0)
    assert jnp.any(other.pop("embedding")["w"] != 0)
    chex.assert_trees_all_close(grads, other, rtol=1e-10)


def test_the_order_of_the_support_set_does_not_matter(x64):
    episode, order = make_episode(), np.array([4, 0, 3, 5, 1, 2])
    learner = build()
    params = random_params(learner, episode)
    permuted = jax.tree.map(lambda x: x[order], episode.support)
    chex.assert_trees_all_close(learner.adapt(params, permuted), learner.adapt(params, episode.support), rtol=1e-10)


def test_relabelled_classes_permute_the_weights(x64):
    episode, names = make_episode(), np.array([2, 0, 1])
    learner = build()
    params = random_params(learner, episode)
    weights = learner.adapt(params, episode.support)[0]["weights"]
    relabelled = episode.support._replace(targets=jnp.asarray(names)[episode.support.targets])
    again = learner.adapt(params, relabelled)[0]["weights"]
    chex.assert_trees_all_close(again[names], weights, rtol=1e-10)


def test_parameters_serve_any_number_of_classes():
    params = jax.jit(build(way=3).init)(jax.random.key(0), make_episode(way=3).support.inputs)
    learner, episode = build(way=5), make_episode(way=5)
    task_params, _ = jax.eval_shape(learner.adapt, params, episode.support)
    assert jax.eval_shape(learner.predict, task_params, episode.query.inputs).shape == (10, 5)
    assert jnp.isfinite(jax.jit(learner.objective)(params, episode)[0])


def test_many_episodes_give_what_one_gives(x64):
    episodes = [make_episode(seed, key=seed) for seed in range(3)]
    learner = build(dropout_rate=0.2)
    params = random_params(learner, episodes[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *episodes)
    at_once, info = jax.jit(jax.vmap(learner.objective, in_axes=(None, 0)))(params, stacked)
    objective = jax.jit(learner.objective)
    one_by_one = jnp.stack([objective(params, episode)[0] for episode in episodes])
    chex.assert_trees_all_close(at_once, one_by_one, rtol=1e-10)
    assert info.support_loss.shape == (3, 4)


def test_samples_and_dropout_belong_to_the_objective(x64):
    learner = build(dropout_rate=0.5, num_latent_steps=1)
    episode = make_episode()
    params = random_params(learner, episode)

    @jax.jit
    def objective(key):
        return learner.objective(params, episode._replace(key=key))[0]

    first, again, other = (objective(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again != other
    # adapt is the same with any key, and without.
    adapted = [learner.adapt(params, episode.support, key=key) for key in (None, jax.random.key(0), jax.random.key(1))]
    chex.assert_trees_all_equal(*adapted)


def test_dropout_is_applied_to_every_use_of_the_embeddings(x64):
    # Codes below zero, whose deviations are floored, and weights with floored deviations: only dropout is left to
    # chance.
    learner, episode = build(dropout_rate=0.5, num_latent_steps=0, num_finetuning_steps=1, **NO_PENALTY), make_episode()
    params = random_params(learner, episode)
    params["relation"][2] *= -1
    params = {
        **params,
        "decoder": params["decoder"].at[:, FEATURES:].set(50.0),
        "weight_rates": jnp.full(FEATURES, 1e-12),
    }
    *_, classify_key, query_key = jax.random.split(episode.key, 4)
    encoder_key, *_, weights_key = jax.random.split(classify_key, 5)
    features, targets = episode.support
    code = encode(params, dropout(encoder_key, features, 0.5), targets, WAY)
    weights = code.mean @ params["decoder"][:, :FEATURES]
    value, info = learner.objective(params, episode)
    queries = dropout(query_key, episode.query.inputs, 0.5)
    chex.assert_trees_all_close(value, losses.cross_entropy(queries @ weights.T, episode.query.targets), rtol=1e-8)
    features = dropout(jax.random.fold_in(weights_key, 0), features, 0.5)
    support_loss = losses.cross_entropy(features @ weights.T, targets)
    chex.assert_trees_all_close(info.support_loss, support_loss[None], rtol=1e-8)


def test_dropout_keeps_the_mean():
    features = jnp.tile(jnp.array([1.0, -3.0]), (5000, 1))
    dropped = dropout(jax.random.key(0), features, 0.2)
    np.testing.assert_allclose(np.unique(dropped), [-3.75, 0.0, 1.25])
    np.testing.assert_allclose(jnp.mean(dropped == 0), 0.2, atol=4 * np.sqrt(0.2 * 0.8 / 10_000))
    chex.assert_trees_all_equal(dropout(None, features, 0.2), features)


def test_a_stochastic_embedding_draws_from_the_key():
    def apply(params, inputs, *, key=None):
        return inputs * (1.0 if key is None else 1.0 + jax.random.normal(key))

    learner = build(Model(lambda key, inputs: {}, apply, stochastic=True))
    episode = jax.tree.map(jnp.float32, make_episode(key=None))
    support = episode.support._replace(targets=make_episode().support.targets)
    params = learner.init(jax.random.key(0), support.inputs)
    first, second, without = (
        learner.adapt(params, support, key=key)[1].support_loss[0]
        for key in (jax.random.key(0), jax.random.key(1), None)
    )
    assert len({float(first), float(second), float(without)}) == 3


def test_parameters_have_the_type_of_the_embeddings(x64):
    for dtype in (jnp.float32, jnp.float64):
        learner, episode = build(), make_episode()
        cast = [Batch(batch.inputs.astype(dtype), batch.targets) for batch in episode[:2]]
        params = jax.eval_shape(learner.init, jax.random.key(0), cast[0].inputs)
        grads, _ = jax.eval_shape(jax.grad(learner.objective, has_aux=True), params, Episode(*cast, episode.key))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype(dtype)}


def test_initial_rates_and_shapes():
    learner = build(latent_lr=0.7, finetuning_lr=0.02)
    params = learner.init(jax.random.key(0), make_episode().support.inputs)
    chex.assert_trees_all_close(params["latent_rates"], jnp.full(LATENT, 0.7))
    chex.assert_trees_all_close(params["weight_rates"], jnp.full(FEATURES, 0.02))
    shapes = jax.tree.map(jnp.shape, {k: params[k] for k in ("encoder", "relation", "decoder")})
    assert shapes["encoder"] == (FEATURES, LATENT)
    assert shapes["relation"] == [(2 * LATENT, 2 * LATENT)] * 3
    assert shapes["decoder"] == (LATENT, 2 * FEATURES)


def test_an_objective_without_a_key_is_refused():
    learner, episode = build(), make_episode(key=None)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    with pytest.raises(ValueError, match=r"draws samples; give the episode a key"):
        learner.objective(params, episode)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_latent": 0}, "num_latent must be an integer of at least 1, got 0"),
        ({"num_latent_steps": -1}, "num_latent_steps must be an integer of at least 0, got -1"),
        ({"num_finetuning_steps": 1.5}, r"num_finetuning_steps must be an integer of at least 0, got 1\.5"),
        ({"latent_lr": 0.0}, r"latent_lr=0\.0 must be a positive number"),
        ({"finetuning_lr": float("nan")}, "finetuning_lr=nan must be a positive number"),
        ({"kl_weight": -1.0}, r"kl_weight=-1\.0 must be a number of at least 0"),
        ({"encoder_penalty_weight": float("inf")}, "encoder_penalty_weight=inf must be a number of at least 0"),
        ({"l2_weight": -1.0}, "l2_weight=-1.0 must be"),
        ({"orthogonality_weight": -1.0}, "orthogonality_weight=-1.0 must be"),
        ({"dropout_rate": 1.0}, r"dropout_rate=1\.0 must be at least 0 and below 1"),
        ({"dropout_rate": None}, "dropout_rate=None must be at least 0 and below 1"),
    ],
)
def test_a_wrong_number_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        LatentDescent(**keywords)
    with pytest.raises(ValueError, match=message):
        build(**keywords)


def test_what_does_not_fit_is_refused():
    support = make_episode().support
    with pytest.raises(ValueError, match="way must be an integer of at least 1, got 0"):
        build(way=0)
    with pytest.raises(ValueError, match=r"model must be a maml_jax.Model"):
        build(lambda params, inputs: inputs)
    images = Model(lambda key, inputs: {}, lambda params, inputs: inputs[..., None])
    with pytest.raises(ValueError, match=r"the embedding must return \[S, D\]"):
        build(images).init(jax.random.key(0), support.inputs)
    params = build().init(jax.random.key(0), support.inputs)
    with pytest.raises(ValueError, match="has no example of class 3 of way=4"):
        build(way=4).adapt(params, support)
    with pytest.raises(ValueError, match="the query set of the episode is empty"):
        build().objective(params, make_episode()._replace(query=jax.tree.map(lambda x: x[:0], support)))


def test_defaults_of_the_builder_are_those_of_the_hyperparameters():
    # Apart from dropout, which the builder leaves out.
    defaults = dataclasses.asdict(LatentDescent())
    assert leo.__kwdefaults__ == {**leo.__kwdefaults__, **defaults, "dropout_rate": 0.0}


def test_it_learns_to_separate_classes():
    # Directions of the first half of the features tell the classes of an episode apart, the other half is noise. A
    # classifier by chance has a third right.
    def sample_episode(key):
        centre_key, noise_key, episode_key = jax.random.split(key, 3)
        centres = jnp.pad(jax.random.normal(centre_key, (WAY, 4)), ((0, 0), (0, 4)))
        targets = jnp.tile(jnp.arange(WAY), 5)
        inputs = (
            centres[targets] + jax.random.normal(noise_key, (5 * WAY, 8)) * jnp.repeat(jnp.array([0.3, 1.0]), 4)[None]
        )
        return Episode(Batch(inputs[:WAY], targets[:WAY]), Batch(inputs[WAY:], targets[WAY:]), episode_key)

    learner = leo(IDENTITY, losses.cross_entropy, way=WAY, num_latent=8, kl_weight=0.01, latent_lr=0.5)
    optimizer = optax.adam(3e-3)
    train = make_train_loop(learner, optimizer, sample_episode, meta_batch_size=8, num_steps=200, chunk_size=8)
    state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((WAY, 8)))

    def accuracies(params):
        return evaluate(
            learner, params, sample_episode, jax.random.key(2), metric_fn=losses.accuracy, num_episodes=200
        ).mean

    before = accuracies(state.params)
    state, info = train(state, jax.random.key(1))
    after = accuracies(state.params)
    assert jnp.all(info.finite)
    assert after[-1] > before[-1] + 0.1
    assert after[-1] > 0.8


def test_dropout_is_applied_in_every_step_on_the_codes(x64):
    # As above, with steps on the codes whose rates are tiny.
    learner, episode = build(dropout_rate=0.5, num_finetuning_steps=0, **NO_PENALTY), make_episode()
    params = random_params(learner, episode)
    params["relation"][2] *= -1
    decoder = params["decoder"].at[:, FEATURES:].set(50.0)
    params = {**params, "decoder": decoder, "latent_rates": jnp.full(LATENT, 1e-12)}
    encoder_key, _, _, latents_key, _ = jax.random.split(jax.random.split(episode.key, 4)[2], 5)
    features, targets = episode.support
    weights = encode(params, dropout(encoder_key, features, 0.5), targets, WAY).mean @ decoder[:, :FEATURES]
    _, info = jax.jit(learner.objective)(params, episode)
    for step in range(2):
        key = jax.random.split(jax.random.fold_in(latents_key, step))[1]
        expected = losses.cross_entropy(dropout(key, features, 0.5) @ weights.T, targets)
        chex.assert_trees_all_close(info.support_loss[step], expected, rtol=1e-8)


def test_the_catalogue_gives_embeddings_unit_length():
    problem = Problem(IDENTITY, losses.cross_entropy, embedding=IDENTITY, way=WAY)
    learner = CATALOGUE["leo"].build(problem, LatentDescent(num_latent=LATENT))
    episode = make_episode()
    params = learner.init(jax.random.key(0), episode.support.inputs)
    long = episode._replace(
        support=episode.support._replace(inputs=100 * episode.support.inputs),
        query=episode.query._replace(inputs=100 * episode.query.inputs),
    )

    def outputs(episode):
        return learner.predict(learner.adapt(params, episode.support)[0], episode.query.inputs)

    chex.assert_trees_all_close(outputs(long), outputs(episode), rtol=1e-4, atol=1e-5)
    assert np.isfinite(learner.objective(params, long)[0])


def test_both_inner_gradients_are_the_ones_asked_for():
    taken = []

    def recorded(fun, *args, **kwargs):
        taken.append(fun.__name__)
        return jax.value_and_grad(fun, *args, **kwargs)

    learner, episode = build(inner_grad=recorded), make_episode()
    params = learner.init(jax.random.key(0), episode.support.inputs)
    jax.eval_shape(lambda params: learner.adapt(params, episode.support), params)
    assert len(taken) == 2
