import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode

from maml_jax import Batch, fomaml, pretrained


def build(num_steps):
    return pretrained(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=num_steps)


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_meta_gradient_on_linear_regression(x64, num_steps):
    # The plain gradient on support and query together, however many steps are taken at test time.
    episode = make_episode(jax.random.key(0))
    theta = jnp.array([0.5, -1.0, 2.0, 0.1])
    both = Batch(*map(jnp.concatenate, zip(episode.support, episode.query, strict=True)))
    grad, _ = jax.grad(build(num_steps).objective, has_aux=True)(theta, episode)
    chex.assert_trees_all_close(grad, Quadratic.of(both).gradient(theta), rtol=1e-12, atol=1e-12)


def test_it_fine_tunes_as_the_others_adapt():
    episode = make_episode(jax.random.key(1))
    other = fomaml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=3)
    chex.assert_trees_all_equal(build(3).adapt(jnp.ones(4), episode.support), other.adapt(jnp.ones(4), episode.support))


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        build(-1)
