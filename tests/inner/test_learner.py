import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from linear_regression import Quadratic, half_mse, linear_model, make_episode

from maml_jax import fomaml, gradient_based, inner_loop, maml

THETA = jnp.array([0.5, -1.0, 2.0, 0.1])


def test_start_rule_and_init_may_be_learned(x64):
    # Meta-SGD: φ_1 = θ − r ⊙ ∇L_S(θ), so ∂L_Q/∂r = −∇L_S(θ) ⊙ ∇L_Q(φ_1) and ∂L_Q/∂θ = (I − A diag r) ∇L_Q(φ_1).
    episode, theta, rates = make_episode(jax.random.key(0)), THETA.astype(jnp.float64), jnp.linspace(0.1, 0.4, 4)
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)

    def init(key, inputs):
        return {"start": linear_model.init(key, inputs), "rates": rates}

    def rule(meta_params):
        return optax.stateless(lambda grads, _: -meta_params["rates"] * grads)

    learner = gradient_based(
        linear_model, half_mse, rule=rule, num_inner_steps=1, init=init, start=lambda meta_params: meta_params["start"]
    )
    assert learner.init(jax.random.key(0), episode.support.inputs).keys() == {"start", "rates"}
    grads, _ = jax.grad(learner.objective, has_aux=True)({"start": theta, "rates": rates}, episode)
    phi = theta - rates * support.gradient(theta)
    expected = {
        "start": query.gradient(phi) - support.hessian @ (rates * query.gradient(phi)),
        "rates": -support.gradient(theta) * query.gradient(phi),
    }
    chex.assert_trees_all_close(grads, expected, rtol=1e-11)


@pytest.mark.parametrize("builder", [maml, fomaml])
def test_the_support_set_is_cut_into_the_microbatches_asked_for(builder):
    # A loss that is a sum tells: the mean over three parts is a third of the whole.
    episode = make_episode(jax.random.key(0))
    learner = builder(
        linear_model, lambda y, t: jnp.sum(y), inner_optimizer=optax.sgd(1.0), num_inner_steps=1, num_microbatches=3
    )
    params, _ = learner.adapt(jnp.zeros(4), episode.support)
    chex.assert_trees_all_close(params, -episode.support.inputs.sum(0) / 3, rtol=1e-5)


def test_complex_parameters_are_refused():
    # JAX's gradient of |z|² is 2 z*: a step against it would ascend in the imaginary part.
    with pytest.raises(ValueError, match=r"dtype complex64 .* split complex numbers into two parts"):
        inner_loop(lambda z, _: jnp.sum(jnp.abs(z) ** 2), optax.sgd(0.25), jnp.array([1.0 + 2.0j]), None, num_steps=1)


def test_counts_are_checked_when_the_learner_is_built():
    with pytest.raises(ValueError, match="num_microbatches must be an integer of at least 1, got 0"):
        maml(linear_model, half_mse, inner_optimizer=optax.sgd(1.0), num_inner_steps=1, num_microbatches=0)
