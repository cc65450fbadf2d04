import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode

from maml_jax import Batch, Episode, Model, cavia, losses, maml, mixed_mode, models, with_context
from maml_jax.tasks import sinusoid

# A linear model whose context is added to the first weights: the inner problem is a regression on two inputs.
SHIFTED = Model(
    init=lambda key, pair: jax.random.normal(key, pair[0].shape[1:]),
    apply=lambda params, pair: pair[0] @ params + pair[0][:, :2] @ pair[1],
)


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_meta_gradient_on_linear_regression(x64, inner_grad):
    # c = −α E ∇L_S(θ) for E = [I 0], φ = θ + Eᵀc, so the meta-gradient is (I − α A EᵀE) ∇L_Q(φ).
    episode = make_episode(jax.random.key(0))
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    theta, first_two = jnp.array([0.5, -1.0, 2.0, 0.1]), jnp.diag(jnp.array([1.0, 1.0, 0.0, 0.0]))
    learner = cavia(
        SHIFTED, half_mse, num_context=2, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=1, inner_grad=inner_grad
    )
    phi = theta - ALPHA * first_two @ support.gradient(theta)
    task_params, _ = learner.adapt(theta, episode.support)
    chex.assert_trees_all_equal(task_params["params"], theta)
    chex.assert_trees_all_close(task_params["context"], (phi - theta)[:2], rtol=1e-12)
    grad, _ = jax.grad(learner.objective, has_aux=True)(theta, episode)
    expected = query.gradient(phi) - ALPHA * support.hessian @ first_two @ query.gradient(phi)
    chex.assert_trees_all_close(grad, expected, rtol=1e-12)


def test_a_context_as_wide_as_the_parameters_is_maml(x64):
    # With outputs X (θ + c) the context moves as the parameters would.
    added = Model(
        init=lambda key, pair: jax.random.normal(key, pair[0].shape[1:]),
        apply=lambda params, pair: pair[0] @ (params + pair[1]),
    )
    settings = {"inner_optimizer": optax.sgd(ALPHA), "num_inner_steps": 3}
    learner = cavia(added, half_mse, num_context=4, **settings)
    plain = maml(linear_model, half_mse, **settings)
    episode, theta = make_episode(jax.random.key(2)), jnp.array([0.5, -1.0, 2.0, 0.1])
    task_params, _ = learner.adapt(theta, episode.support)
    chex.assert_trees_all_close(theta + task_params["context"], plain.adapt(theta, episode.support)[0], rtol=1e-12)
    found, expected = (jax.grad(one.objective, has_aux=True)(theta, episode)[0] for one in (learner, plain))
    chex.assert_trees_all_close(found, expected, rtol=1e-12)


def test_finite_differences_of_a_network(x64):
    model = with_context(models.mlp(features=(6, 1), activation=jnp.tanh, param_dtype=jnp.float64))
    episode = sinusoid.make_sampler(shot=5, query_shot=5)(jax.random.key(0))
    learner = cavia(model, losses.mean_squared_error, num_context=3, inner_optimizer=optax.sgd(1.0), num_inner_steps=2)
    params = learner.init(jax.random.key(1), episode.support.inputs)
    assert params["dense_0"]["kernel"].shape == (1 + 3, 6)
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


def test_finite_differences_of_a_modulated_network_on_images(x64):
    model = models.conv4(way=2, features=3, context_block=2, param_dtype=jnp.float64)
    support, query = jax.random.normal(jax.random.key(0), (2, 4, 16, 16, 1))
    targets = jnp.array([0, 0, 1, 1])
    learner = cavia(model, losses.cross_entropy, num_context=3, inner_optimizer=optax.sgd(1.0), num_inner_steps=2)
    params = learner.init(jax.random.key(1), support)
    episode = Episode(Batch(support, targets), Batch(query, targets))
    adapted, info = learner.adapt(params, episode.support)
    assert jnp.any(adapted["context"] != 0)
    assert info.support_loss[1] < info.support_loss[0]
    # Steps this small hardly cross a kink of the ReLU.
    objective = jax.jit(lambda params: learner.objective(params, episode)[0])
    check_grads(objective, (params,), order=1, modes=["rev"], eps=1e-7)


def test_a_network_without_a_context_is_refused():
    for model in (models.mlp(features=(2,)), models.conv4(way=2)):
        learner = cavia(model, half_mse, num_context=2, inner_optimizer=optax.sgd(1.0), num_inner_steps=1)
        with pytest.raises(ValueError, match=r"fails on a pair of inputs and a context.*with_context\(model\)"):
            learner.init(jax.random.key(0), jnp.ones((3, 16, 16, 1)))


def test_a_context_becomes_further_inputs_and_channels():
    model = with_context(Model(lambda key, inputs: None, lambda params, inputs: inputs))
    vectors = model.apply(None, (jnp.ones((2, 1)), jnp.array([2.0, 3.0])))
    np.testing.assert_array_equal(vectors, [[1, 2, 3], [1, 2, 3]])
    images = model.apply(None, (jnp.ones((2, 4, 4, 1)), jnp.array([2.0, 3.0])))
    np.testing.assert_array_equal(images, jnp.broadcast_to(jnp.array([1.0, 2.0, 3.0]), (2, 4, 4, 3)))


@pytest.mark.parametrize("num_context", [0, 2.5])
def test_a_wrong_number_of_context_parameters_is_refused(num_context):
    with pytest.raises(ValueError, match=f"num_context must be an integer of at least 1, got {num_context}"):
        cavia(SHIFTED, half_mse, num_context=num_context, inner_optimizer=optax.sgd(1.0), num_inner_steps=1)


def test_integers_are_adapted_to_as_the_same_floating_numbers():
    learner = cavia(
        with_context(models.mlp(features=(1,))),
        losses.mean_squared_error,
        inner_optimizer=optax.sgd(0.1),
        num_inner_steps=3,
        num_context=2,
    )
    inputs, targets = jnp.arange(6).reshape(3, 2), jnp.ones((3, 1))
    params = learner.init(jax.random.key(0), inputs)
    adapted, _ = learner.adapt(params, Batch(inputs, targets))
    expected, _ = learner.adapt(params, Batch(inputs.astype(jnp.float32), targets))
    chex.assert_trees_all_equal(adapted, expected)
    assert jnp.any(adapted["context"] != 0)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="Model"):
        cavia(lambda x: x, losses.mean_squared_error, inner_optimizer=optax.sgd(0.1), num_inner_steps=1, num_context=1)
