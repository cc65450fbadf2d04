import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode, make_episodes

from maml_jax import MetaState, make_meta_step, reptile


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
