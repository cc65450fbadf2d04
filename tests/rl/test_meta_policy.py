"""The meta-objective and the outer rules: clipped epochs and the trust region."""

import chex
import enumerated_mdp as mdp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import (
    Episode,
    first_order,
    init_meta_state,
    make_train_loop,
    maml,
    mixed_mode,
    models,
    parallel,
    pmap_meta_step,
    rl,
)
from maml_jax.meta_gradient import meta_gradient
from maml_jax.tasks.navigation import navigation

ENVIRONMENT = navigation()
POLICY = rl.normal_policy(models.mlp(features=(5, 2), activation=jnp.tanh), action_size=2)
SETTINGS = {"num_trajectories": 6, "horizon": 8}
NUM_TASKS = 4


def learner_of(num_steps, inner_grad=mixed_mode, rate=0.2):
    return maml(
        POLICY, rl.policy_gradient, inner_optimizer=optax.sgd(rate), num_inner_steps=num_steps, inner_grad=inner_grad,
        data_per_step=True,
    )  # fmt: skip


LEARNER = rl.meta_policy(learner_of(1))
SAMPLER = rl.make_sampler(learner_of, ENVIRONMENT, num_updates=1, **SETTINGS)
PARAMS = LEARNER.init(jax.random.key(0), jnp.zeros((1, 2)))
EPISODES = jax.jit(jax.vmap(SAMPLER, (0, None)))(jax.random.split(jax.random.key(1), NUM_TASKS), PARAMS)


@jax.jit
def gradient_fn(params, episodes):
    return meta_gradient(LEARNER, params, episodes, chunk_size=1)


def update(rule, params=PARAMS, episodes=EPISODES):
    """One outer update, compiled."""
    return jax.jit(lambda *args: rule.update(gradient_fn, *args))(params, episodes, rule.init(params))


def test_the_objective_reports_returns_and_divergence():
    episode = jax.tree.map(lambda x: x[0], EPISODES)
    loss, info = LEARNER.objective(PARAMS, episode)
    adapted, inner = learner_of(1).adapt(PARAMS, episode.support)
    outputs = POLICY.apply(adapted, episode.query.inputs)
    np.testing.assert_allclose(loss, rl.ratio_surrogate(outputs, episode.query.targets), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(info.returns, rl.returns_of(episode.support, episode.query), rtol=1e-6)
    np.testing.assert_allclose(info.kl, 0.0, atol=1e-6)  # the adapted policy is that which acted
    np.testing.assert_allclose(info.entropy, outputs.entropy().mean(), rtol=1e-5)
    np.testing.assert_array_equal(info.support_loss, inner.support_loss)
    moved = jax.tree.map(lambda x: x + 0.1, PARAMS)
    outputs = POLICY.apply(learner_of(1).adapt(moved, episode.support)[0], episode.query.inputs)
    expected = episode.query.targets.policy.kl(outputs).mean()
    np.testing.assert_allclose(LEARNER.objective(moved, episode)[1].kl, expected, rtol=1e-4)
    assert expected > 1e-3


def test_what_stands_after_the_end_of_a_trajectory_changes_nothing():
    """The first two trajectories end after three steps, in the support and in the query set."""

    def ended(batch, value, axis):
        # Leaves are [T, (updates,) H, N, ...].
        mask = np.ones(batch.targets.mask.shape, bool)
        mask[(slice(None),) * axis + (slice(3, None), slice(None, 2))] = False

        def after(leaf):
            shape = mask.shape + (1,) * (leaf.ndim - mask.ndim)
            return jnp.where(mask.reshape(shape), leaf, value)

        return jax.tree.map(after, batch)._replace(
            targets=jax.tree.map(after, batch.targets)._replace(mask=jnp.asarray(mask, jnp.float32))
        )

    found = []
    for value in (0.0, 0.7):
        episodes = Episode(ended(EPISODES.support, value, 2), ended(EPISODES.query, value, 1), EPISODES.key)
        new, _, info = update(rl.trust_region(LEARNER), episodes=episodes)
        _, objective = jax.vmap(LEARNER.objective, (None, 0))(jax.tree.map(lambda x: x + 0.1, PARAMS), episodes)
        found.append((new, info.loss, objective.kl, objective.entropy))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_the_meta_gradient_has_the_differences_of_the_objective(num_updates, x64):
    """With common random numbers: the data stay those of θ, and the objective moves."""
    policy = rl.normal_policy(models.mlp(features=(3, 2), activation=jnp.tanh, param_dtype=jnp.float64), action_size=2)

    def of_steps(num_steps):
        return maml(
            policy, rl.ratio_surrogate, inner_optimizer=optax.sgd(0.2), num_inner_steps=num_steps, data_per_step=True
        )

    learner = rl.meta_policy(of_steps(num_updates))
    params = in_float64(learner.init(jax.random.key(0), jnp.zeros((1, 2))))
    sample = rl.make_sampler(of_steps, ENVIRONMENT, num_updates=num_updates, num_trajectories=4, horizon=5)
    episode = in_float64(jax.jit(sample)(jax.random.key(1), params))
    grads = jax.jit(jax.grad(learner.objective, has_aux=True))(params, episode)[0]
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), params)
    objective = jax.jit(learner.objective)
    ahead, behind = (
        objective(optax.tree.add_scale(params, sign * 1e-5, direction), episode)[0] for sign in (1.0, -1.0)
    )
    np.testing.assert_allclose((ahead - behind) / 2e-5, optax.tree.vdot(grads, direction), rtol=1e-6)
    first = rl.meta_policy(of_steps(num_updates)._replace(adapt=_first_order_adapt(policy, num_updates)))
    other = jax.jit(jax.grad(first.objective, has_aux=True))(params, episode)[0]
    assert optax.tree.norm(optax.tree.sub(other, grads)) > 1e-4 * optax.tree.norm(grads)


def _first_order_adapt(policy, num_steps):
    return maml(
        policy, rl.ratio_surrogate, inner_optimizer=optax.sgd(0.2), num_inner_steps=num_steps, inner_grad=first_order,
        data_per_step=True,
    ).adapt  # fmt: skip


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def test_the_step_is_the_natural_gradient_of_the_whole_fisher_matrix(x64):
    """Against the Fisher matrix written out, column by column, in forward mode through the inner step.

    In the first task the trajectories of the query set end early, and yet it counts as much as another.
    """
    params, episodes = in_float64(PARAMS), in_float64(EPISODES)
    targets = episodes.query.targets
    targets = targets._replace(mask=targets.mask.at[0, 3:].set(0.0))
    episodes = episodes._replace(query=episodes.query._replace(targets=targets))
    learner = learner_of(1, inner_grad=jax.value_and_grad)
    rule = rl.trust_region(LEARNER, max_kl=1e-3, num_cg_steps=60, damping=0.1, metric_stride=2)
    new, _, info = update(rule, params, episodes)
    vector, unravel = jax.flatten_util.ravel_pytree(params)

    def outputs_of(vector, episode):
        adapted, _ = learner.adapt(unravel(vector), jax.tree.map(lambda x: x[:, ::2], episode.support))
        return learner.predict(adapted, episode.query.inputs[::2])

    fisher, slopes_of = np.zeros((len(vector), len(vector))), jax.jit(jax.jacfwd(outputs_of))
    for index in range(NUM_TASKS):
        episode = jax.tree.map(lambda x, i=index: x[i], episodes)
        outputs = outputs_of(vector, episode)
        slopes = slopes_of(vector, episode)  # leaves [H, N, A, P]
        # The Fisher information of a normal: 1/σ² for each mean, 2 for each log σ.
        weight = jnp.exp(-2.0 * outputs.log_std)[..., None]
        mask = targets.mask[index, ::2, :, None, None]
        mean, log_std = ((mask * x).reshape(-1, len(vector)) for x in (slopes.mean * jnp.sqrt(weight), slopes.log_std))
        fisher += np.asarray(mean.T @ mean + 2.0 * log_std.T @ log_std) / mask.sum() / NUM_TASKS
    gradient = np.asarray(flat(gradient_fn(params, episodes)[1]))
    direction = np.linalg.solve(fisher + 0.1 * np.eye(len(vector)), gradient)
    full = -np.sqrt(2e-3 / (direction @ fisher @ direction)) * direction
    moved = np.asarray(flat(new) - vector)
    length = np.linalg.norm(moved) / np.linalg.norm(full)
    np.testing.assert_allclose(moved, length * full, rtol=1e-6, atol=1e-9)
    exponent = np.log(length) / np.log(0.8)
    np.testing.assert_allclose(exponent, round(exponent), atol=1e-6)
    assert 0.0 < info.objective.kl <= 1e-3


def test_more_conjugate_gradients_than_numbers_do_no_harm():
    rule = rl.trust_region(LEARNER, num_cg_steps=200, damping=0.1)
    new, _, info = update(rule)
    assert info.objective.kl > 0.0
    chex.assert_tree_all_finite(new)


@jax.jit
def measure(params, episodes=EPISODES):
    losses, info = jax.vmap(LEARNER.objective, (None, 0))(params, episodes)
    return losses.mean(), info.kl.mean()


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 1.0])
def test_the_divergence_stays_within_its_bound_and_the_objective_falls(max_kl):
    rule = rl.trust_region(LEARNER, max_kl=max_kl)
    new, _, info = update(rule)
    loss, kl = measure(new)
    assert loss < measure(PARAMS)[0]
    assert 0.01 * max_kl < kl <= max_kl * 1.001
    np.testing.assert_allclose(info.objective.kl, kl, rtol=1e-3)
    assert info.finite


def test_as_many_lengths_are_tried_as_were_asked_for():
    # For a far bound the first lengths are too long. Twice half the length is once a quarter.
    def refused_and_length(backtrack, most):
        moved = []
        for num_backtracks in range(1, most + 1):
            rule = rl.trust_region(LEARNER, max_kl=1.0, num_backtracks=num_backtracks, backtrack=backtrack)
            new, _, info = update(rule)
            moved.append(float(optax.tree.norm(optax.tree.sub(new, PARAMS))))
            assert (moved[-1] > 0) == bool(info.objective.kl > 0)
        refused = moved.count(0.0)
        np.testing.assert_allclose(moved[refused:], moved[-1], rtol=1e-6)
        return refused, moved[-1]

    refused, length = refused_and_length(0.25, most=2)
    assert refused == 1
    assert refused_and_length(0.5, most=4) == (2, pytest.approx(length, rel=1e-5))


def test_the_norm_of_gradients_in_half_precision_does_not_overflow():
    params = {"w": jnp.zeros(4, jnp.float16)}
    rule = rl.clipped_epochs(optax.sgd(1e-3), num_epochs=1)
    info = rule.update(lambda *_: ((jnp.float32(0.0), {}), {"w": jnp.full(4, 300.0, jnp.float16)}), params, EPISODES,
                       rule.init(params))[2]  # fmt: skip
    assert info.finite
    assert info.grad_norm == 600.0


def test_the_trust_region_leaves_the_dtypes_of_the_parameters(x64):
    # Powers of a number of Python are float64 there.
    mixed = PARAMS | {"network": jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS["network"])}
    for params in (PARAMS, mixed):
        new, _, info = update(rl.trust_region(LEARNER), params)
        chex.assert_trees_all_equal_dtypes(new, params)
        assert info.finite
        assert info.objective.kl > 0.0


def test_where_nothing_can_be_gained_the_parameters_stay():
    targets = EPISODES.query.targets
    equal = targets._replace(advantage=jnp.zeros_like(targets.advantage))
    rule = rl.trust_region(LEARNER)
    flat_episodes = EPISODES._replace(query=EPISODES.query._replace(targets=equal))
    new, _, info = update(rule, PARAMS, flat_episodes)
    chex.assert_trees_all_equal(new, PARAMS)
    assert info.objective.kl == 0.0
    assert info.finite


def test_the_inner_gradient_may_be_differentiated_either_way(x64):
    params, episodes, found = in_float64(PARAMS), in_float64(EPISODES), []
    for inner_grad in (mixed_mode, jax.value_and_grad):
        rule = rl.trust_region(rl.meta_policy(learner_of(1, inner_grad=inner_grad)), damping=0.01, num_cg_steps=40)
        found.append(update(rule, params, episodes)[0])
    assert np.any(flat(found[0]) != flat(params))
    chex.assert_trees_all_close(*found, rtol=1e-8)


def rules(mesh):
    return {
        "trust region": rl.trust_region(LEARNER, metric_stride=2, damping=0.01, mesh=mesh),
        "clipped epochs": rl.clipped_epochs(optax.adam(1e-3), num_epochs=3, max_kl=0.5),
        "minibatches": rl.clipped_epochs(optax.adam(1e-3), num_epochs=2, num_minibatches=2),
    }


@pytest.mark.parametrize(
    "name", ["trust region", *(pytest.param(n, marks=pytest.mark.slow) for n in ("clipped epochs", "minibatches"))]
)
def test_one_device_and_several_take_the_same_path(name):
    found = []
    for mesh in (None, parallel.task_mesh(jax.devices()[:2])):
        rule = rules(mesh)[name]
        state = init_meta_state(LEARNER, rule, jax.random.key(0), jnp.zeros((1, 2)))
        loop = make_train_loop(LEARNER, rule, SAMPLER, meta_batch_size=NUM_TASKS, num_steps=2, mesh=mesh)
        state, info = loop(state, jax.random.key(5))
        found.append((state.params, info.loss, info.objective.kl))
    start = LEARNER.init(jax.random.key(0), jnp.zeros((1, 2)))
    scale = float(np.abs(flat(found[0][0]) - flat(start)).max())
    assert scale > 1e-4
    chex.assert_trees_all_close(*found, rtol=2e-2, atol=2e-2 * scale)


def test_an_epoch_is_an_optax_step_and_a_bound_stops_them():
    optimizer = optax.adam(3e-2)
    params, state = PARAMS, optimizer.init(PARAMS)
    divergences = []
    for _ in range(4):
        (_, info), grads = gradient_fn(params, EPISODES)
        divergences.append(float(info.kl))
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)

    def after(num_epochs, max_kl=None):
        rule = rl.clipped_epochs(optimizer, num_epochs=num_epochs, max_kl=max_kl)
        return update(rule)

    chex.assert_trees_all_close(after(4)[0], params, rtol=1e-4, atol=1e-6)
    assert divergences == sorted(divergences)
    # After two steps the divergence passes the bound, so the third and fourth are not taken.
    bound = 0.5 * (divergences[1] + divergences[2])
    bounded, twice = after(4, bound), after(2)
    chex.assert_trees_all_close(bounded[0], twice[0], rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(bounded[1]["optimizer"], twice[1]["optimizer"], rtol=1e-5, atol=1e-7)
    info = after(4)[2]
    np.testing.assert_allclose(info.objective.kl, divergences[-1], rtol=1e-3)
    assert info.finite


def test_a_later_step_that_is_not_finite_shows_in_the_norm():
    def breaks_later(params, episodes):
        value, grads = gradient_fn(params, episodes)
        moved = jnp.any(params["log_std"] != PARAMS["log_std"])
        return value, jax.tree.map(lambda g: jnp.where(moved, jnp.nan, g), grads)

    rule = rl.clipped_epochs(optax.sgd(0.1), num_epochs=2)
    *_, info = rule.update(breaks_later, PARAMS, EPISODES, rule.init(PARAMS))
    assert jnp.isnan(info.grad_norm)
    assert not info.finite


def test_the_optimiser_counts_the_steps_whose_divergence_is_not_finite():
    def breaks(params, episodes):
        (loss, info), grads = gradient_fn(params, episodes)
        return (loss, info._replace(kl=jnp.full_like(info.kl, jnp.nan))), jax.tree.map(lambda g: g * jnp.nan, grads)

    rule = rl.clipped_epochs(optax.apply_if_finite(optax.sgd(0.1), 9), num_epochs=2, max_kl=1.0)
    params, state, info = rule.update(breaks, PARAMS, EPISODES, rule.init(PARAMS))
    assert state["optimizer"].total_notfinite == 2
    chex.assert_trees_all_equal(params, PARAMS)
    assert not info.finite


@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(0.5), optax.contrib.reduce_on_plateau(patience=1)])
def test_the_optimiser_gets_the_value_of_its_batch(optimizer):
    new, state, _ = update(rl.clipped_epochs(optimizer, num_epochs=1))
    (loss, _), grads = gradient_fn(PARAMS, EPISODES)
    updates, expected = optimizer.update(grads, optimizer.init(PARAMS), PARAMS, value=loss)
    chex.assert_trees_all_close(new, optax.apply_updates(PARAMS, updates), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state["optimizer"], expected, rtol=1e-4, atol=1e-6)


def test_minibatches_go_through_all_tasks():
    # One step of plain descent on each half, in a random order; with a rate near 0 their sum is that of a whole step.
    rule = rl.clipped_epochs(optax.sgd(1e-3), num_epochs=1, num_minibatches=2)
    new, state, _ = update(rule)
    whole = gradient_fn(PARAMS, EPISODES)[1]
    np.testing.assert_allclose(flat(new) - flat(PARAMS), -2e-3 * flat(whole), rtol=0.05, atol=1e-7)
    again, *_ = update(rule)
    chex.assert_trees_all_equal(new, again)
    assert np.any(state["key"] != rule.init(PARAMS)["key"])
    with pytest.raises(ValueError, match="num_minibatches=3 does not divide the 4 tasks of a meta-batch"):
        rl.clipped_epochs(optax.sgd(1.0), num_epochs=1, num_minibatches=3).update(
            gradient_fn, PARAMS, EPISODES, rule.init(PARAMS)
        )


def test_every_epoch_has_an_order_of_its_own_and_the_info_is_that_of_the_first_step():
    def write_down(params, batch):
        # A step of descent at the rate 1 appends the number of the task, as a digit to the base 4.
        return (params, {"first": batch[0]}), -(3.0 * params + batch[0])

    rule = rl.clipped_epochs(optax.sgd(1.0), num_epochs=2, num_minibatches=4)
    state, orders = rule.init(jnp.float32(0.0)), []
    for start in (0.0, 0.0, 0.0, 1.0):
        written, state, info = rule.update(write_down, jnp.float32(start), jnp.arange(4.0), state)
        digits = int(written) // 4 ** np.arange(7, -1, -1) % 4
        orders += [tuple(digits[:4].tolist()), tuple(digits[4:].tolist())]
        assert info.loss == start
        assert info.objective["first"] == digits[0]
        assert info.grad_norm == 3.0 * start + digits[0]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert any(orders[n] != orders[n + 1] for n in (0, 2, 4, 6))
    assert len(set(orders)) > 3


def test_what_prepares_the_episodes_comes_first():
    def doubled(episodes):
        targets = episodes.query.targets
        targets = targets._replace(advantage=2.0 * targets.advantage)
        return Episode(episodes.support, episodes.query._replace(targets=targets))

    plain, prepared = (rl.clipped_epochs(optax.sgd(1e-3), num_epochs=1, prepare=prepare) for prepare in (None, doubled))
    steps = [flat(update(rule)[0]) - flat(PARAMS) for rule in (plain, prepared)]
    np.testing.assert_allclose(2.0 * steps[0], steps[1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_kl": 0.0}, r"max_kl=0\.0 must be a positive number"),
        ({"max_kl": float("inf")}, "max_kl=inf must be a positive number"),
        ({"backtrack": 1.0}, r"backtrack=1\.0 must be below 1"),
        ({"num_cg_steps": 0}, "num_cg_steps must be an integer of at least 1, got 0"),
        ({"metric_stride": 0}, "metric_stride must be an integer of at least 1, got 0"),
        ({"damping": 0.0}, r"damping=0\.0 must be a positive number"),
        ({"num_backtracks": 0}, "num_backtracks must be an integer of at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rl.trust_region(LEARNER, **settings)


def test_epochs_and_bounds_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_epochs must be an integer of at least 1, got 0"):
        rl.clipped_epochs(optax.sgd(1.0), num_epochs=0)
    with pytest.raises(ValueError, match="num_minibatches must be an integer of at least 1, got 0"):
        rl.clipped_epochs(optax.sgd(1.0), num_epochs=1, num_minibatches=0)
    with pytest.raises(ValueError, match=r"max_kl=-1\.0 must be a positive number"):
        rl.clipped_epochs(optax.sgd(1.0), num_epochs=1, max_kl=-1.0)
    with pytest.raises(ValueError, match="optimizer must be an optax transformation"):
        rl.clipped_epochs(1e-3, num_epochs=1)


@pytest.mark.parametrize("build", [rl.meta_policy, rl.trust_region])
def test_what_is_no_learner_is_refused(build):
    with pytest.raises(ValueError, match="the learner must be a MetaLearner, got function"):
        build(learner_of)


def test_a_learner_that_reports_no_divergence_is_refused():
    plain = learner_of(1)
    rule = rl.trust_region(plain)
    message = r"the objective reports InnerInfo, which has no kl; wrap the learner in rl\.meta_policy"
    with pytest.raises(ValueError, match=message):
        update(rule)

    def of_plain(params, episodes):
        return meta_gradient(plain, params, episodes, chunk_size=1)

    rule = rl.clipped_epochs(optax.sgd(1.0), num_epochs=1, max_kl=0.1)
    with pytest.raises(ValueError, match=message):
        rule.update(of_plain, PARAMS, EPISODES, rule.init(PARAMS))


def test_rules_that_look_at_the_episodes_are_refused_by_pmap():
    for rule in (
        rl.trust_region(LEARNER),
        rl.clipped_epochs(optax.sgd(1.0), num_epochs=1, prepare=lambda episodes: episodes),
    ):
        with pytest.raises(ValueError, match="this outer rule looks at the episodes itself"):
            pmap_meta_step(LEARNER, rule)
    pmap_meta_step(LEARNER, rl.clipped_epochs(optax.sgd(1.0), num_epochs=1))


def test_a_policy_that_is_not_finite_is_reported():
    broken = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    for rule in (rl.trust_region(LEARNER), rl.clipped_epochs(optax.sgd(1.0), num_epochs=1)):
        *_, info = update(rule, broken, EPISODES)
        assert not info.finite


def test_the_fisher_matrix_of_a_table_is_that_of_the_process(x64):
    """Categorical outputs: the bound holds for the KL that the trajectories of the process have."""
    batch = mdp.batch(mdp.THETA)
    episodes = jax.tree.map(lambda x: x[None], Episode(jax.tree.map(lambda x: x[None][:0], batch), batch))
    learner = rl.meta_policy(
        maml(mdp.POLICY, rl.policy_gradient, inner_optimizer=optax.sgd(0.1), num_inner_steps=0, data_per_step=True)
    )
    rule = rl.trust_region(learner, max_kl=1e-3)
    new, _, info = rule.update(
        lambda params, episodes: meta_gradient(learner, params, episodes), jnp.asarray(mdp.THETA), episodes, ()
    )
    assert mdp.expected_return(new) > mdp.expected_return(mdp.THETA)
    assert 1e-4 < info.objective.kl <= 1e-3


def test_episodes_are_prepared_once_and_all_together():
    def add_up(params, batch):
        return (params, {}), -jnp.sum(jnp.abs(batch))

    rule = rl.clipped_epochs(
        optax.sgd(1.0), num_epochs=2, num_minibatches=4, prepare=lambda tasks: 2.0 * (tasks - jnp.mean(tasks))
    )
    params, *_ = rule.update(add_up, jnp.float32(0.0), jnp.arange(4.0), rule.init(jnp.float32(0.0)))
    assert params == 2 * (3.0 + 1.0 + 1.0 + 3.0)
