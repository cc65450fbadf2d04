import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode

from maml_jax import Batch, Episode, first_order, losses, maml, meta_curvature, mixed_mode, models
from maml_jax.algorithms.meta_curvature import transformed

THETA = jnp.array([0.5, -1.0, 2.0, 0.1])


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad, first_order])
def test_meta_gradient_on_linear_regression(x64, inner_grad):
    # φ = θ − α M ∇L_S(θ): ∂L_Q/∂θ = (I − α A Mᵀ) ∇L_Q(φ) and ∂L_Q/∂M = −α ∇L_Q(φ) ∇L_S(θ)ᵀ. In first order A is
    # left out, and the matrix learns all the same.
    episode = make_episode(jax.random.key(0))
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    matrix = jnp.eye(4) + 0.1 * jax.random.normal(jax.random.key(1), (4, 4))
    learner = meta_curvature(linear_model, half_mse, inner_lr=ALPHA, inner_grad=inner_grad)
    theta = THETA.astype(jnp.float64)
    grads, _ = jax.grad(learner.objective, has_aux=True)({"params": theta, "curvature": [matrix]}, episode)
    outer = query.gradient(theta - ALPHA * matrix @ support.gradient(theta))
    expected = {
        "params": outer - ALPHA * (inner_grad is not first_order) * support.hessian @ matrix.T @ outer,
        "curvature": [-ALPHA * jnp.outer(outer, support.gradient(theta))],
    }
    chex.assert_trees_all_close(grads, expected, rtol=1e-12)


def test_with_identities_it_is_maml(x64):
    model = models.conv4(way=3, features=4, param_dtype=jnp.float64)
    batch_key, label_key = jax.random.split(jax.random.key(0))
    images = jax.random.normal(batch_key, (6, 8, 8, 1))
    batch = Batch(images, jax.random.randint(label_key, (6,), 0, 3))
    learner = meta_curvature(model, losses.cross_entropy, inner_lr=0.5, num_inner_steps=2)
    plain = maml(model, losses.cross_entropy, inner_optimizer=optax.sgd(0.5), num_inner_steps=2)
    meta_params = learner.init(jax.random.key(1), images)
    shapes = jax.tree.map(jnp.shape, meta_params["curvature"], is_leaf=lambda x: isinstance(x, jax.Array))
    assert shapes["conv_1"] == {"bias": [(4, 4)], "kernel": [(9, 9), (4, 4), (4, 4)]}
    assert shapes["head"] == {"bias": [(3, 3)], "kernel": [(4, 4), (3, 3)]}
    expected, _ = plain.adapt(meta_params["params"], batch)
    chex.assert_trees_all_close(learner.adapt(meta_params, batch)[0], expected, rtol=1e-9, atol=1e-12)
    episode = Episode(batch, batch._replace(inputs=images[::-1]))
    found, _ = jax.jit(jax.grad(learner.objective, has_aux=True))(meta_params, episode)
    expected, _ = jax.jit(jax.grad(plain.objective, has_aux=True))(meta_params["params"], episode)
    chex.assert_trees_all_close(found["params"], expected, rtol=1e-9, atol=1e-12)


def test_a_kernel_is_multiplied_along_each_axis(x64):
    keys = jax.random.split(jax.random.key(0), 4)
    kernel = jax.random.normal(keys[0], (2, 3, 4, 5))
    matrices = [jax.random.normal(key, (size, size)) for key, size in zip(keys[1:], (6, 4, 5), strict=True)]
    updates, _ = transformed({"kernel": matrices}).update({"kernel": kernel}, optax.EmptyState(), None)
    expected = jnp.einsum("ap,bi,co,pio->abc", *matrices, kernel.reshape(6, 4, 5)).reshape(kernel.shape)
    chex.assert_trees_all_close(updates["kernel"], expected, rtol=1e-12)


def test_finite_differences(x64):
    episode = make_episode(jax.random.key(2))
    learner = meta_curvature(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3)
    meta_params = jax.tree.map(jnp.float64, learner.init(jax.random.key(0), episode.support.inputs))
    check_grads(lambda p: learner.objective(p, episode)[0], (meta_params,), order=1, modes=["rev"])
