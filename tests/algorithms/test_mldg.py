import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.test_util import check_grads
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episodes

from maml_jax import (
    Batch,
    Episode,
    Model,
    first_order,
    init_meta_state,
    losses,
    make_meta_step,
    make_train_loop,
    mixed_mode,
    models,
    parallel,
)
from maml_jax.algorithms.mldg import DomainSplits, erm, mldg
from maml_jax.tasks import domains

NUM_DOMAINS, BETA = 4, 0.7
THETA = (0.5, -1.0, 2.0, 0.1)


def make_episode(seed, **kwargs):
    """An episode of four domains; each is a linear regression of its own."""
    support = make_episodes(jax.random.key(seed), NUM_DOMAINS, **kwargs).support
    return Episode(support, jax.tree.map(lambda x: x[:0], support), jax.random.key(100 + seed))


def build(alpha=ALPHA, beta=BETA, model=linear_model, loss_fn=half_mse, **kwargs):
    return mldg(model, loss_fn, inner_optimizer=optax.sgd(alpha), beta=beta, **kwargs)


def meta_gradient(learner, params, episode):
    return jax.jit(jax.grad(learner.objective, has_aux=True))(params, episode)[0]


def mean_loss(support, members):
    """The mean loss of some domains, as a quadratic function."""
    quadratics = [Quadratic.of(jax.tree.map(lambda x, d=d: x[d], support)) for d in members]
    return Quadratic(*(sum(parts) / len(parts) for parts in zip(*quadratics, strict=True)))


def gradient_by_hand(support, held_out, theta, *, alpha=ALPHA, beta=BETA, exact=True):
    """∇F + β (I − αH_F) ∇G(θ − α∇F), or without αH_F."""
    f = mean_loss(support, [d for d in range(NUM_DOMAINS) if d not in held_out])
    g = mean_loss(support, held_out)
    of_test = g.gradient(f.descend_once(theta, alpha))
    return f.gradient(theta) + beta * (f.contraction(alpha, 1) @ of_test if exact else of_test)


def splits_that_explain(gradient, support, num_held_out, theta, **kwargs):
    """All choices of meta-test domains whose gradient is this one."""
    return [
        held_out
        for held_out in itertools.combinations(range(NUM_DOMAINS), num_held_out)
        if np.allclose(gradient, gradient_by_hand(support, held_out, theta, **kwargs), rtol=1e-12, atol=1e-12)
    ]


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
@pytest.mark.parametrize("num_held_out", [1, 2, 3])
def test_meta_gradient_on_linear_regression(x64, num_held_out, inner_grad):
    # The gradient is that of one split of the domains into two parts, and of no other.
    theta = jnp.array(THETA)
    learner = build(num_held_out=num_held_out, inner_grad=inner_grad)
    for seed in range(3):
        episode = make_episode(seed)
        found = splits_that_explain(meta_gradient(learner, theta, episode), episode.support, num_held_out, theta)
        assert len(found) == 1


def test_the_objective_is_the_loss_before_plus_the_weighted_loss_after_the_step(x64):
    theta, episode = jnp.array(THETA), make_episode(0)
    value, info = build().objective(theta, episode)
    ((held_out,),) = splits_that_explain(meta_gradient(build(), theta, episode), episode.support, 1, theta)
    of_train = jax.tree.map(lambda x: jnp.delete(x, held_out, 0), episode.support)
    of_test = jax.tree.map(lambda x: x[held_out], episode.support)

    def f(theta):
        return half_mse(of_train.inputs @ theta, of_train.targets)  # all domains have the same number of examples

    stepped = theta - ALPHA * jax.grad(f)(theta)
    chex.assert_trees_all_close(info.support_loss, f(theta)[None], rtol=1e-12)
    chex.assert_trees_all_close(
        value, f(theta) + BETA * half_mse(of_test.inputs @ stepped, of_test.targets), rtol=1e-12
    )


def test_first_order_leaves_out_the_second_derivatives_and_nothing_else(x64):
    theta, episode = jnp.array(THETA), make_episode(0)
    first = meta_gradient(build(inner_grad=first_order), theta, episode)
    exact = meta_gradient(build(), theta, episode)
    split = splits_that_explain(first, episode.support, 1, theta, exact=False)
    assert split == splits_that_explain(exact, episode.support, 1, theta)
    assert len(split) == 1
    assert jnp.linalg.norm(first - exact) > 0.1 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(("alpha", "beta"), [(ALPHA, 0.0), (0.0, BETA), (0.0, 0.0)])
def test_without_a_weight_or_without_a_step_it_is_plain_training(x64, alpha, beta):
    # β = 0 leaves ∇F, and α = 0 leaves ∇F + β∇G at the same θ.
    theta, episode = jnp.array(THETA), make_episode(1)
    gradient = meta_gradient(build(alpha, beta), theta, episode)
    ((held_out,),) = splits_that_explain(meta_gradient(build(), theta, episode), episode.support, 1, theta)
    f = mean_loss(episode.support, [d for d in range(NUM_DOMAINS) if d != held_out])
    g = mean_loss(episode.support, [held_out])
    chex.assert_trees_all_close(gradient, f.gradient(theta) + beta * g.gradient(theta), rtol=1e-12)


def test_only_chosen_parameters_take_the_step(x64):
    # Two domains of the same examples: F = G whatever the split is. The bias keeps its value in the step.
    def loss(params, batch):
        return half_mse(batch.inputs @ params["weight"] + params["bias"], batch.targets)

    batch = jax.tree.map(lambda x: x[0], make_episode(4).support)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    model = Model(lambda key, inputs: None, lambda params, inputs: inputs @ params["weight"] + params["bias"])
    learner = build(model=model, where=lambda name: name == "weight")
    params = {"weight": jnp.array(THETA), "bias": jnp.array(0.3)}

    def by_hand(params):
        stepped = params["weight"] - ALPHA * jax.grad(loss)(params, batch)["weight"]
        return loss(params, batch) + BETA * loss({**params, "weight": stepped}, batch)

    gradient = meta_gradient(learner, params, Episode(twice, twice, jax.random.key(0)))
    chex.assert_trees_all_close(gradient, jax.grad(by_hand)(params), rtol=1e-12)


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_meta_gradient_of_a_network_agrees_with_finite_differences(x64, inner_grad):
    model = models.mlp(features=(5, 1), activation=jnp.tanh)
    episode = make_episode(2, dim=2)
    episode = episode._replace(support=jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), episode.support))
    learner = build(0.5, BETA, model, losses.mean_squared_error, num_held_out=2, inner_grad=inner_grad)
    params = jax.tree.map(jnp.float64, learner.init(jax.random.key(5), episode.support.inputs))
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


def told_splits(num_held_out, num_keys):
    """The meta-test domains of each key, as a boolean array [keys, D]."""
    # No example depends on the parameters, and the loss of domain d is 10^d: the digits of the sum over the
    # meta-train domains tell which these are.
    inputs = jnp.zeros((NUM_DOMAINS, 2, 1))
    targets = jnp.broadcast_to(10.0 ** jnp.arange(NUM_DOMAINS)[:, None], (NUM_DOMAINS, 2))
    model = Model(lambda key, inputs: jnp.ones(1), lambda params, inputs: inputs @ params)
    learner = build(
        beta=0.0, model=model, loss_fn=lambda outputs, targets: jnp.mean(targets - outputs), num_held_out=num_held_out
    )
    keys = jax.random.split(jax.random.key(0), num_keys)
    support = Batch(inputs, targets)
    values = jax.vmap(lambda key: learner.objective(jnp.ones(1), Episode(support, support, key))[0])(keys)
    sums = np.rint(np.asarray(values) * (NUM_DOMAINS - num_held_out)).astype(int)
    return sums[:, None] // 10 ** np.arange(NUM_DOMAINS) % 10 == 0


@pytest.mark.parametrize("num_held_out", [1, 2, 3])
def test_every_split_has_the_same_probability(num_held_out):
    splits = told_splits(num_held_out, 3000)
    np.testing.assert_array_equal(splits.sum(1), num_held_out)
    _, counts = np.unique(splits, axis=0, return_counts=True)
    possible = len(list(itertools.combinations(range(NUM_DOMAINS), num_held_out)))
    assert len(counts) == possible
    # Each count is binomial: within five standard deviations.
    mean = 3000 / possible
    assert np.abs(counts - mean).max() < 5 * np.sqrt(mean * (1 - 1 / possible))


def test_an_episode_of_numpy_may_be_a_constant_of_the_program():
    episode, theta = make_episode(0), jnp.array(THETA)
    of_numpy = episode._replace(support=jax.tree.map(np.asarray, episode.support))
    found = jax.jit(lambda theta: build().objective(theta, of_numpy)[0])(theta)
    chex.assert_trees_all_close(found, build().objective(theta, episode)[0], rtol=1e-6)


def test_an_episode_without_a_key_is_refused():
    with pytest.raises(ValueError, match=r"key of the episode, which is None; set it with episode\._replace\(key="):
        build().objective(jnp.array(THETA), make_episode(0)._replace(key=None))


@pytest.mark.parametrize("num_devices", [2, 4])
def test_one_device_and_several_give_the_same_meta_gradient(num_devices):
    episodes = jax.tree.map(lambda *x: jnp.stack(x), *map(make_episode, range(4)))
    theta, learner = jnp.array(THETA), build(num_held_out=2)

    def stepped(mesh):
        optimizer = optax.sgd(1.0)
        state = init_meta_state(
            learner._replace(init=lambda key, inputs: theta), optimizer, jax.random.key(0), episodes.support.inputs
        )
        return make_meta_step(learner, optimizer, mesh=mesh)(state, episodes)[0].params

    one_by_one = [meta_gradient(learner, theta, jax.tree.map(lambda x, i=i: x[i], episodes)) for i in range(4)]
    expected = theta - sum(one_by_one) / 4
    chex.assert_trees_all_close(stepped(None), expected, rtol=1e-5, atol=1e-6)
    mesh = parallel.task_mesh(jax.devices()[:num_devices])
    chex.assert_trees_all_close(jax.device_get(stepped(mesh)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_key", [False, True])
def test_empirical_risk_minimisation_is_the_mean_over_all_domains(x64, has_key):
    theta, episode = jnp.array(THETA), make_episode(3)
    episode = episode if has_key else episode._replace(key=None)
    learner = erm(linear_model, half_mse)
    expected = mean_loss(episode.support, range(NUM_DOMAINS)).gradient(theta)
    chex.assert_trees_all_close(meta_gradient(learner, theta, episode), expected, rtol=1e-12)
    chex.assert_shape(learner.objective(theta, episode)[1].support_loss, (0,))


@pytest.mark.parametrize("learner", [build(), erm(linear_model, half_mse)], ids=["mldg", "erm"])
def test_what_is_deployed_is_what_was_trained(learner):
    theta, episode = jnp.array(THETA), make_episode(0)
    one_domain = jax.tree.map(lambda x: x[0], episode.support)
    adapted, info = learner.adapt(theta, one_domain, observe_fn=jnp.sum)
    chex.assert_trees_all_equal(adapted, theta)
    chex.assert_trees_all_equal(info.observed, jnp.sum(theta)[None])
    assert learner.adapt(theta, one_domain)[1].observed is None
    chex.assert_trees_all_equal(learner.predict(theta, one_domain.inputs), linear_model.apply(theta, one_domain.inputs))
    chex.assert_shape(learner.init(jax.random.key(0), episode.support.inputs), (len(THETA),))


@pytest.mark.parametrize("name", ["mldg", "erm"])
def test_every_domain_of_a_stochastic_model_draws_noise_of_its_own(name):
    # All domains are the same, and the loss is the noise of the model: without independent draws its variance over
    # episodes would be that of one draw, 1, and not that of the mean over four domains, 1/4. With β = 1 and no
    # gradient, MLDG is the mean of three draws plus one more: 1/3 + 1.
    def apply(params, inputs, *, key=None):
        return inputs @ params + (0.0 if key is None else jax.random.normal(key))

    model = Model(linear_model.init, apply, stochastic=True)

    def loss_fn(outputs, targets):
        return jnp.mean(outputs - targets)

    learner = build(beta=1.0, model=model, loss_fn=loss_fn) if name == "mldg" else erm(model, loss_fn)
    support = Batch(jnp.zeros((NUM_DOMAINS, 2, 1)), jnp.zeros((NUM_DOMAINS, 2)))
    keys = jax.random.split(jax.random.key(0), 4000)
    values = jax.vmap(lambda key: learner.objective(jnp.ones(1), Episode(support, support, key))[0])(keys)
    expected = {"mldg": 1 / 3 + 1, "erm": 1 / 4}[name]
    # The variance of a normal sample has relative standard error sqrt(2 / 4000) = 0.022.
    np.testing.assert_allclose(np.var(values), expected, rtol=0.12)


@pytest.mark.parametrize("name", ["mldg", "erm"])
def test_it_learns_what_the_domains_have_in_common(name):
    # The class is the sign of the first feature. Every domain shifts the second one; the unseen domain shifts it
    # three times as far.
    def domain(shift, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 200)
        inputs = rng.normal(size=(200, 2)) * 0.3 + np.stack([2.0 * labels - 1, np.full(200, shift)], 1)
        return Batch(inputs.astype(np.float32), labels.astype(np.int32))

    sampler = domains.make_sampler([domain(shift, i) for i, shift in enumerate((-1.0, 0.0, 1.0))], batch_size=20)
    model = models.mlp(features=(8, 2), activation=jnp.tanh)
    learner = {
        "mldg": build(0.1, 1.0, model, losses.cross_entropy),
        "erm": erm(model, losses.cross_entropy),
    }[name]
    optimizer = optax.adam(1e-2)
    state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((3, 20, 2)))
    loop = make_train_loop(learner, optimizer, sampler, meta_batch_size=2, num_steps=200)
    state, info = loop(state, jax.random.key(1))
    assert info.finite.all()
    unseen = domain(3.0, 9)
    assert losses.accuracy(learner.predict(state.params, unseen.inputs), unseen.targets) > 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_held_out": 0}, r"num_held_out must be an integer of at least 1, got 0"),
        ({"beta": -1.0}, r"beta=-1\.0 must be a number of at least 0"),
        ({"beta": float("nan")}, r"beta=nan must be a number"),
        ({"model": nn.Dense(1)}, r"must be a maml_jax\.Model, got Dense; wrap a flax module"),
    ],
)
def test_mistakes_are_refused_when_the_learner_is_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_what_is_no_optimiser_or_no_model_is_refused():
    with pytest.raises(ValueError, match=r"inner_optimizer must be an optax transformation .* got 0\.5"):
        mldg(linear_model, half_mse, inner_optimizer=0.5)
    with pytest.raises(ValueError, match=r"must be a maml_jax\.Model, got Dense"):
        erm(nn.Dense(1), half_mse)


def test_episodes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"num_held_out=4 leaves none of the 4 domains of the episode for meta-train"):
        build(num_held_out=4).objective(jnp.array(THETA), make_episode(0))
    episode = make_episode(0)
    one_domain = episode._replace(support=jax.tree.map(lambda x: x[0], episode.support))
    for learner in (build(), erm(linear_model, half_mse)):
        with pytest.raises(ValueError, match=r"\[D, B, \.\.\.\], got shapes \(6, 4\), \(6,\); draw episodes with"):
            learner.objective(jnp.array(THETA), one_domain)
    for learner in (
        build(loss_fn=lambda outputs, targets: outputs - targets),
        erm(linear_model, lambda outputs, targets: outputs - targets),
    ):
        with pytest.raises((ValueError, TypeError), match=r"scalar"):
            meta_gradient(learner, jnp.array(THETA), make_episode(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_lr": 0.0}, r"inner_lr=0\.0 must be a positive number"),
        ({"beta": -0.5}, r"beta=-0\.5 must be a number of at least 0"),
        ({"num_held_out": 0}, r"num_held_out must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DomainSplits(**settings)


def test_hyperparameters_name_the_step_and_its_derivative():
    assert DomainSplits().inner_grad is mixed_mode
    assert DomainSplits(first_order=True).inner_grad is first_order
    rule = DomainSplits(inner_lr=0.25).rule()
    chex.assert_trees_all_equal(rule.update(jnp.ones(2), rule.init(jnp.ones(2)))[0], jnp.full(2, -0.25))


def spread(outputs, targets):
    """A loss of several domains together: how far apart the means of their outputs are."""
    means = jnp.mean(outputs, (1, *range(2, outputs.ndim)))
    return jnp.mean(jnp.square(means - jnp.mean(means)))


def shift(outputs, targets, train_outputs, train_targets):
    """A loss of the meta-test domains in view of the others."""
    return jnp.square(jnp.mean(outputs) - jnp.mean(train_outputs)) + 0.1 * jnp.mean(targets) * jnp.mean(train_targets)


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_losses_of_several_domains_are_added_to_both_parts(x64, inner_grad):
    theta, found = jnp.array(THETA), 0
    learner = build(across_fn=spread, held_out_fn=shift, inner_grad=inner_grad)
    for seed in range(4):
        episode = make_episode(seed)
        value, gradient = jax.value_and_grad(lambda p, e=episode: learner.objective(p, e)[0])(theta)

        def by_hand(theta, held_out, support=episode.support):
            test = jax.tree.map(lambda x: x[np.array([held_out])], support)
            train = jax.tree.map(lambda x: x[np.delete(np.arange(NUM_DOMAINS), held_out)], support)

            def outputs(params, part):
                return jax.vmap(lambda x: linear_model.apply(params, x))(part.inputs)

            def f(params):
                predicted = outputs(params, train)
                return jnp.mean(jax.vmap(half_mse)(predicted, train.targets)) + spread(predicted, train.targets)

            stepped = theta - ALPHA * jax.grad(f)(theta)
            predicted = outputs(stepped, test)
            g = jnp.mean(jax.vmap(half_mse)(predicted, test.targets))
            g += shift(predicted, test.targets, outputs(stepped, train), train.targets)
            return f(theta) + BETA * g

        for held_out in range(NUM_DOMAINS):
            expected, expected_gradient = jax.value_and_grad(by_hand)(theta, held_out)
            if np.allclose(expected, value, rtol=1e-12):
                np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10)
                found += 1
    assert found == 4
    check_grads(lambda p: learner.objective(p, make_episode(0))[0], (theta,), order=1, modes=["rev"], rtol=1e-6)


def test_erm_adds_the_loss_of_all_domains(x64):
    theta, episode = jnp.array(THETA), make_episode(0)
    plain, joint = (erm(linear_model, half_mse, across_fn=fn) for fn in (None, spread))
    outputs = jax.vmap(lambda x: linear_model.apply(theta, x))(episode.support.inputs)
    difference = joint.objective(theta, episode)[0] - plain.objective(theta, episode)[0]
    np.testing.assert_allclose(difference, spread(outputs, episode.support.targets), rtol=1e-12)


def test_the_meta_train_domains_have_the_noise_of_the_step_where_others_are_seen_in_view_of_them():
    model = Model(
        lambda key, inputs: jnp.ones(1),
        lambda params, x, *, key=None: x @ params + jax.random.normal(key, (len(x),)),
        stochastic=True,
    )
    learner = mldg(
        model,
        lambda outputs, targets: 0.0 * jnp.sum(outputs),
        inner_optimizer=optax.sgd(0.0),
        across_fn=lambda outputs, targets: jnp.mean(outputs),
        held_out_fn=lambda outputs, targets, others, other_targets: -jnp.mean(others),
    )
    support = Batch(jnp.zeros((4, 2, 1)), jnp.zeros((4, 2)))
    value, _ = learner.objective(jnp.ones(1), Episode(support, support, jax.random.key(0)))
    np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_defaults_of_the_builder_are_those_of_the_hyperparameters():
    recorded, defaults = DomainSplits(), mldg.__kwdefaults__
    assert (defaults["beta"], defaults["num_held_out"]) == (recorded.beta, recorded.num_held_out)
