import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode, make_episodes

from maml_jax import MetaState, Model, ReptileDescent, init_meta_state, make_meta_step, replace_inner_state, reptile
from maml_jax.inner.steps import mini_batches


def build(num_steps):
    return reptile(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=num_steps)


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_meta_gradient_on_linear_regression(x64, num_steps):
    episode = make_episode(jax.random.key(0))
    theta = jnp.array([0.5, -1.0, 2.0, 0.1])
    grad, _ = jax.grad(build(num_steps).objective, has_aux=True)(theta, episode)
    expected = theta - Quadratic.of(episode.support).descend(theta, ALPHA, num_steps)
    chex.assert_trees_all_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_one_step_is_the_inner_gradient_scaled(x64):
    episode = make_episode(jax.random.key(1))
    theta = jnp.array([0.5, -1.0, 2.0, 0.1])
    grad, _ = jax.grad(build(1).objective, has_aux=True)(theta, episode)
    chex.assert_trees_all_close(grad, ALPHA * Quadratic.of(episode.support).gradient(theta), rtol=1e-12)


def test_the_query_set_is_not_used():
    episode = make_episode(jax.random.key(2))
    broken = episode._replace(query=jax.tree.map(lambda x: x * jnp.nan, episode.query))
    grads = [jax.grad(build(3).objective, has_aux=True)(jnp.ones(4), e)[0] for e in (episode, broken)]
    chex.assert_trees_all_equal(*grads)


def test_gradient_descent_on_it_moves_towards_the_mean_of_the_adapted_parameters(x64):
    # Algorithm 2 of the paper: θ ← θ + ε mean_i(φ_i − θ).
    episodes = make_episodes(jax.random.key(3), 3)
    theta, learner, optimizer = jnp.ones(4), build(4), optax.sgd(0.25)
    phi = jax.vmap(lambda support: learner.adapt(theta, support)[0])(episodes.support)
    expected = theta + 0.25 * (phi.mean(0) - theta)
    state = MetaState(theta, optimizer.init(theta), jnp.int32(0))
    state, _ = make_meta_step(learner, optimizer)(state, episodes)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-12)


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -2"):
        build(-2)


def test_each_inner_step_takes_its_mini_batch(x64):
    episode, theta = make_episode(jax.random.key(4)), jnp.array([0.5, -1.0, 2.0, 0.1], jnp.float64)
    learner = reptile(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=4, batch_size=2)
    key = jax.random.key(5)
    phi = theta
    for chosen in mini_batches(key, 6, num_steps=4, batch_size=2):
        phi = Quadratic.of(jax.tree.map(lambda x, c=chosen: x[c], episode.support)).descend_once(phi, ALPHA)
    chex.assert_trees_all_close(learner.adapt(theta, episode.support, key=key)[0], phi, rtol=1e-10)
    grad, _ = jax.grad(learner.objective, has_aux=True)(theta, episode._replace(key=key))
    chex.assert_trees_all_close(grad, theta - phi, rtol=1e-12)


def test_a_support_set_that_fits_into_a_mini_batch_needs_no_key():
    episode = make_episode(jax.random.key(6))
    build = {"inner_optimizer": optax.sgd(ALPHA), "num_inner_steps": 3}
    whole = reptile(linear_model, half_mse, **build).adapt(jnp.ones(4), episode.support)[0]
    for size in (6, 10):
        found = reptile(linear_model, half_mse, batch_size=size, **build).adapt(jnp.ones(4), episode.support)[0]
        chex.assert_trees_all_equal(found, whole)


def test_without_a_key_the_mini_batches_are_the_same_every_time():
    episode = make_episode(jax.random.key(6))
    learner = reptile(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=3, batch_size=5)
    found = learner.adapt(jnp.ones(4), episode.support)[0]
    chex.assert_trees_all_equal(found, learner.adapt(jnp.ones(4), episode.support, key=jax.random.key(0))[0])


def test_the_state_of_the_inner_optimiser_is_carried_from_task_to_task():
    # The serial version: one task a meta-step, one Adam through all of them.
    rule, step_size = optax.adam(0.1, b1=0.0), 0.5
    learner = reptile(linear_model, half_mse, inner_optimizer=rule, num_inner_steps=3, carry_state=True)
    optimizer = replace_inner_state(optax.sgd(step_size))
    episodes = [make_episode(jax.random.key(seed)) for seed in range(4)]
    state = init_meta_state(learner, optimizer, jax.random.key(9), episodes[0].support.inputs)
    theta = jnp.copy(state.params["params"])
    meta_step, opt_state = make_meta_step(learner, optimizer), rule.init(theta)
    for episode in episodes:
        state, _ = meta_step(state, jax.tree.map(lambda x: x[None], episode))
        phi = theta
        for _ in range(3):
            updates, opt_state = rule.update(Quadratic.of(episode.support).gradient(phi), opt_state)
            phi = phi + updates
        theta = theta + step_size * (phi - theta)
    chex.assert_trees_all_close(state.params["params"], theta, rtol=1e-4, atol=1e-5)
    assert opt_state[0].count == state.params["inner_state"][0].count == 12


def test_the_state_that_is_carried_is_that_of_the_parameters_that_adapt(x64):
    model = Model(
        lambda key, inputs: {"weight": jnp.ones(inputs.shape[-1:]), "offset": jnp.zeros(())},
        lambda params, inputs: inputs @ params["weight"] + params["offset"],
    )
    rule = optax.adam(0.1, b1=0.0)
    learner = reptile(
        model, half_mse, inner_optimizer=rule, num_inner_steps=2, carry_state=True, where=lambda name: name == "weight"
    )
    optimizer, episodes = replace_inner_state(optax.sgd(0.5)), make_episodes(jax.random.key(0), 1)
    state = init_meta_state(learner, optimizer, jax.random.key(9), episodes.support.inputs[0])
    meta_step, weight = make_meta_step(learner, optimizer), jnp.ones(4)
    adam, support = rule.init(weight), Quadratic.of(jax.tree.map(lambda x: x[0], episodes.support))
    for _ in range(2):
        state, _ = meta_step(state, episodes)
        phi = weight
        for _ in range(2):
            updates, adam = rule.update(support.gradient(phi), adam)
            phi = phi + updates
        weight = weight + 0.5 * (phi - weight)
    chex.assert_trees_all_close(state.params["params"], {"weight": weight, "offset": jnp.zeros(())}, rtol=1e-10)
    assert state.params["inner_state"][0].nu["offset"] is None


def test_with_several_tasks_the_next_state_is_the_mean_of_theirs(x64):
    rule = optax.adam(0.1, b1=0.0)
    learner = reptile(linear_model, half_mse, inner_optimizer=rule, num_inner_steps=1, carry_state=True)
    episodes = make_episodes(jax.random.key(0), 3)
    optimizer = replace_inner_state(optax.sgd(0.5))
    state = init_meta_state(learner, optimizer, jax.random.key(9), episodes.support.inputs[0])
    theta = jnp.copy(state.params["params"])
    state, _ = make_meta_step(learner, optimizer)(state, episodes)
    grads = jax.vmap(lambda support: Quadratic.of(support).gradient(theta))(episodes.support)
    chex.assert_trees_all_close(state.params["inner_state"][0].nu, (1 - 0.999) * jnp.mean(grads**2, 0), rtol=1e-6)


def test_a_counter_of_steps_survives_the_mean_over_tasks():
    # A compiled mean over 41 tasks multiplies by 1/41, and that of 41 times 8 is below 8.
    rule = optax.adam(0.1, b1=0.0)
    learner = reptile(linear_model, half_mse, inner_optimizer=rule, num_inner_steps=8, carry_state=True)
    optimizer, episodes = replace_inner_state(optax.sgd(0.5)), make_episodes(jax.random.key(0), 41)
    state = init_meta_state(learner, optimizer, jax.random.key(9), episodes.support.inputs[0])
    meta_step = make_meta_step(learner, optimizer)
    for _ in range(3):
        state, _ = meta_step(state, episodes)
    np.testing.assert_allclose(state.params["inner_state"][0].count, 24, rtol=1e-6)


def test_a_carried_state_keeps_its_precision(x64):
    learner = reptile(linear_model, half_mse, inner_optimizer=optax.adam(0.1), num_inner_steps=1, carry_state=True)
    state = learner.init(jax.random.key(0), jnp.ones((2, 4), jnp.float64))["inner_state"][0]
    assert state.mu.dtype == learner.init(jax.random.key(0), jnp.ones((2, 4), jnp.float64))["params"].dtype
    assert state.count.dtype == jnp.float32


def test_a_state_that_has_no_mean_is_not_carried():
    noisy = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(0.1))
    learner = reptile(linear_model, half_mse, inner_optimizer=noisy, num_inner_steps=1, carry_state=True)
    with pytest.raises(ValueError, match=r"carry_state=True cannot carry .*rng_key.* of the inner optimiser"):
        learner.init(jax.random.key(0), jnp.ones((2, 4)))
    counts = optax.GradientTransformation(
        lambda params: {"of_parameter": jnp.zeros(params.shape, int)}, lambda updates, state, params: (updates, state)
    )
    learner = reptile(linear_model, half_mse, inner_optimizer=counts, num_inner_steps=1, carry_state=True)
    with pytest.raises(ValueError, match=r"cannot carry \['of_parameter'\] of the inner optimiser, int32 \(4,\)"):
        learner.init(jax.random.key(0), jnp.ones((2, 4)))


def test_the_adam_of_the_recipe_has_no_momentum():
    ours, rule = ReptileDescent(inner_lr=0.1, inner_optimizer="adam").rule(), optax.adam(0.1, b1=0.0)
    params = jnp.ones(3)
    state, expected_state = ours.init(params), rule.init(params)
    for grads in (jnp.array([1.0, -2.0, 3.0]), jnp.array([-1.0, 0.5, 0.0])):
        updates, state = ours.update(grads, state)
        expected, expected_state = rule.update(grads, expected_state)
        chex.assert_trees_all_equal(updates, expected)
    assert updates[2] == 0.0  # momentum would still move it


def test_batches_and_a_stochastic_model_draw_with_different_keys():
    drawn = []

    def apply(params, inputs, *, key=None):
        jax.debug.callback(lambda data: drawn.append(tuple(np.asarray(data))), jax.random.key_data(key))
        return inputs @ params

    learner = reptile(
        linear_model._replace(apply=apply, stochastic=True),
        half_mse,
        inner_optimizer=optax.sgd(ALPHA),
        num_inner_steps=4,
        batch_size=2,
    )
    episode, key = make_episode(jax.random.key(0)), jax.random.key(1)
    params = learner.init(jax.random.key(2), episode.support.inputs)
    jax.block_until_ready(learner.adapt(params, episode.support, key=key))
    jax.effects_barrier()
    used_for_batches = set(map(tuple, np.asarray(jax.random.key_data(jax.random.split(key, 8)))))
    assert len(set(drawn)) == 4
    assert not used_for_batches & set(drawn)


def test_a_wrong_name_of_the_inner_optimiser_is_refused():
    with pytest.raises(ValueError, match="got 'SGD'"):
        ReptileDescent(inner_lr=0.1, num_inner_steps=1, inner_optimizer="SGD")


def test_a_long_way_is_finite_in_half_precision():
    episode = jax.tree.map(lambda x: x.astype(jnp.float16), make_episode(jax.random.key(0)))
    learner = reptile(linear_model, half_mse, inner_optimizer=optax.sgd(jnp.float16(300.0)), num_inner_steps=1)
    (value, _), grad = jax.value_and_grad(learner.objective, has_aux=True)(jnp.ones(4, jnp.float16), episode)
    assert grad.dtype == jnp.float16
    square = jnp.sum(jnp.square(grad.astype(jnp.float32)))
    assert square > jnp.finfo(jnp.float16).max
    chex.assert_trees_all_close(value, square / 2, rtol=1e-3)


def test_the_gradient_descent_of_the_recipe_has_no_momentum():
    rule, grads = ReptileDescent(inner_lr=0.25, inner_optimizer="sgd").rule(), jnp.array([1.0, -2.0])
    state = rule.init(grads)
    for _ in range(2):
        updates, state = rule.update(grads, state)
        chex.assert_trees_all_equal(updates, -0.25 * grads)
