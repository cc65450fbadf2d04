"""2D navigation against its definition and its optimum."""

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.tasks.navigation import HORIZON, navigation, optimal_return

ENVIRONMENT = navigation()
GOALS = np.random.RandomState(1).uniform(-0.5, 0.5, (40, 2)).astype(np.float32)


def test_a_step_is_the_one_written_out():
    goal, state = jnp.array([0.3, -0.2]), jnp.array([0.1, 0.0])
    after, observation, reward, done = ENVIRONMENT.step(goal, state, jnp.array([0.5, -7.0]), jax.random.key(0))
    np.testing.assert_allclose(after, [0.15, -0.1], rtol=1e-6)  # the second action is clipped
    np.testing.assert_array_equal(observation, after)
    np.testing.assert_allclose(reward, -np.hypot(0.15, 0.1), rtol=1e-6)
    assert not done


def test_it_ends_when_both_coordinates_are_near():
    goal = jnp.array([0.1, 0.05])
    for move, ends in (([1.0, 0.5], True), ([0.95, 0.45], True), ([0.85, 0.5], False), ([1.0, 0.65], False)):
        *_, done = ENVIRONMENT.step(goal, jnp.zeros(2), jnp.array(move), jax.random.key(0))
        assert bool(done) == ends


def test_goals_fill_the_square():
    goals = jax.vmap(ENVIRONMENT.sample_task)(jax.random.split(jax.random.key(0), 4000))
    assert jnp.all(jnp.abs(goals) <= 0.5)
    np.testing.assert_allclose(goals.mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose(goals.std(0), 1 / np.sqrt(12), rtol=0.03)


def test_greedy_moves_reach_the_optimum():
    def walk(goal):
        def act(position, _):
            action = (goal - position) / 0.1
            position, _, reward, _ = ENVIRONMENT.step(goal, position, action, jax.random.key(0))
            return position, reward

        return jax.lax.scan(act, jnp.zeros(2), length=HORIZON)[1].sum()

    found = jax.vmap(walk)(jnp.asarray(GOALS))
    np.testing.assert_allclose(found, optimal_return(jnp.asarray(GOALS)), atol=1e-4)
    np.testing.assert_allclose(found.mean(), -0.54, atol=0.01)  # on the goals of the published numbers
    # One step of 0.1 along each axis: 0.2 and 0.0 are left of a goal at (0.3, -0.1).
    np.testing.assert_allclose(optimal_return(jnp.array([0.3, -0.1]), horizon=1), -0.2, rtol=1e-5)
    many = jax.vmap(ENVIRONMENT.sample_task)(jax.random.split(jax.random.key(1), 20_000))
    np.testing.assert_allclose(optimal_return(many).mean(), -0.50, atol=0.01)
