import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads
from linear_regression import Quadratic, half_mse, linear_model, make_episode

from maml_jax import imaml, inner_loop, losses, models
from maml_jax.tasks import sinusoid

STRENGTH = 0.7


def test_meta_gradient_on_linear_regression(x64):
    # φ* = (A + λI)⁻¹ (b + λθ), so the meta-gradient is (I + A/λ)⁻¹ ∇L_Q(φ*).
    episode, theta = make_episode(jax.random.key(0)), jnp.array([0.5, -1.0, 2.0, 0.1], jnp.float64)
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    learner = imaml(
        linear_model,
        half_mse,
        inner_optimizer=optax.sgd(0.3),
        num_inner_steps=1000,
        strength=STRENGTH,
        num_cg_steps=4,
    )
    phi = jnp.linalg.solve(support.hessian + STRENGTH * jnp.eye(4), support.offset + STRENGTH * theta)
    grad, _ = jax.grad(learner.objective, has_aux=True)(theta, episode)
    expected = jnp.linalg.solve(jnp.eye(4) + support.hessian / STRENGTH, query.gradient(phi))
    chex.assert_trees_all_close(grad, expected, rtol=1e-8)


@pytest.mark.parametrize("penalty_last", [False, True])
def test_the_settings_of_the_authors_code_on_linear_regression(x64, penalty_last):
    # With `penalty_last` three steps on L_S and one on the proximal term; damped, (I + A/(λ + δ))⁻¹ ∇L_Q(φ).
    episode, theta = make_episode(jax.random.key(0)), jnp.array([0.5, -1.0, 2.0, 0.1], jnp.float64)
    support, query, rate, damping = Quadratic.of(episode.support), Quadratic.of(episode.query), 0.3, 2.5
    learner = imaml(
        linear_model,
        half_mse,
        inner_optimizer=optax.sgd(rate),
        num_inner_steps=3,
        strength=STRENGTH,
        num_cg_steps=4,
        damping=damping,
        penalty_last=penalty_last,
    )
    phi = theta
    for _ in range(3):
        phi = phi - rate * (support.gradient(phi) + (0.0 if penalty_last else STRENGTH * (phi - theta)))
    if penalty_last:
        phi = phi - rate * STRENGTH * (phi - theta)
    chex.assert_trees_all_close(learner.adapt(theta, episode.support)[0], phi, rtol=1e-12)
    grad, _ = jax.grad(learner.objective, has_aux=True)(theta, episode)
    expected = jnp.linalg.solve(jnp.eye(4) + support.hessian / (STRENGTH + damping), query.gradient(phi))
    chex.assert_trees_all_close(grad, expected, rtol=1e-8)


def test_many_unrolled_steps_have_the_same_meta_gradient(x64):
    # MAML differentiates the steps on the proximal objective, in which θ is the start and the centre.
    episode, theta = make_episode(jax.random.key(3)), jnp.array([0.5, -1.0, 2.0, 0.1], jnp.float64)
    learner = imaml(
        linear_model, half_mse, inner_optimizer=optax.sgd(0.3), num_inner_steps=400, strength=STRENGTH, num_cg_steps=4
    )

    def unrolled(theta):
        def proximal(phi, support):
            return half_mse(support.inputs @ phi, support.targets) + STRENGTH / 2 * jnp.sum(jnp.square(phi - theta))

        phi, _ = inner_loop(proximal, optax.sgd(0.3), theta, episode.support, num_steps=400)
        return half_mse(episode.query.inputs @ phi, episode.query.targets)

    grad, _ = jax.grad(learner.objective, has_aux=True)(theta, episode)
    chex.assert_trees_all_close(grad, jax.grad(unrolled)(theta), rtol=1e-8)


def test_finite_differences_of_a_network_where_some_parameters_do_not_adapt(x64):
    model = models.mlp(features=(4, 1), activation=jnp.tanh, param_dtype=jnp.float64)
    episode = sinusoid.make_sampler(shot=5, query_shot=5)(jax.random.key(0))
    params = model.init(jax.random.key(1), episode.support.inputs)
    learner = imaml(
        model,
        losses.mean_squared_error,
        inner_optimizer=optax.sgd(0.1),
        num_inner_steps=3000,
        strength=1.0,
        num_cg_steps=13,
        where=lambda name: name != "dense_0/bias",
    )
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])
    chex.assert_trees_all_equal(learner.adapt(params, episode.support)[0]["dense_0"]["bias"], params["dense_0"]["bias"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": 0.0}, "without the proximal term"),
        ({"strength": jnp.zeros(())}, "without the proximal term"),
        ({"strength": jnp.array([1.0, jnp.nan])}, "without the proximal term"),
        ({"strength": -1.0}, "strength=-1.0 must be positive"),
        ({"strength": None}, "strength=None must be positive"),
        ({"damping": -1.0}, "damping=-1.0 must be a number of at least 0"),
        ({"num_cg_steps": 0}, "num_cg_steps must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    settings = {"inner_optimizer": optax.sgd(0.1), "num_inner_steps": 1, "strength": 1.0, "num_cg_steps": 1} | wrong
    with pytest.raises(ValueError, match=message):
        imaml(linear_model, half_mse, **settings)


def test_there_are_as_many_conjugate_gradient_steps_as_asked_for(x64):
    # One step from zero goes along v = ∇L_Q(φ_K): the meta-gradient is (vᵀv / vᵀBv) v with B = I + A/λ.
    episode, theta = make_episode(jax.random.key(0)), jnp.array([0.5, -1.0, 2.0, 0.1], jnp.float64)
    settings = {"inner_optimizer": optax.sgd(0.3), "num_inner_steps": 3, "strength": STRENGTH}
    learner = imaml(linear_model, half_mse, num_cg_steps=1, **settings)
    v = Quadratic.of(episode.query).gradient(learner.adapt(theta, episode.support)[0])
    matrix = jnp.eye(4) + Quadratic.of(episode.support).hessian / STRENGTH
    grad, _ = jax.grad(learner.objective, has_aux=True)(theta, episode)
    chex.assert_trees_all_close(grad, (v @ v) / (v @ matrix @ v) * v, rtol=1e-10)
