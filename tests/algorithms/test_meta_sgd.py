import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode

from maml_jax import CATALOGUE, DrawnRates, Problem, first_order, maml, meta_sgd, mixed_mode

THETA = jnp.array([0.5, -1.0, 2.0, 0.1])
RATES = jnp.array([0.1, 0.3, -0.2, 0.4])


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad, first_order])
def test_meta_gradient_on_linear_regression(x64, inner_grad):
    # φ = θ − r ∘ ∇L_S(θ): ∂L_Q/∂θ = (I − A diag r) ∇L_Q(φ) and ∂L_Q/∂r = −∇L_S(θ) ∘ ∇L_Q(φ).
    episode = make_episode(jax.random.key(0))
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    learner = meta_sgd(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=1, inner_grad=inner_grad)
    meta_params = {"params": THETA.astype(jnp.float64), "rates": RATES.astype(jnp.float64)}
    grads, _ = jax.grad(learner.objective, has_aux=True)(meta_params, episode)
    outer = query.gradient(THETA - RATES * support.gradient(THETA))
    second = 0.0 if inner_grad is first_order else support.hessian @ (RATES * outer)
    expected = {"params": outer - second, "rates": -support.gradient(THETA) * outer}
    chex.assert_trees_all_close(grads, expected, rtol=1e-12)


def test_with_equal_rates_it_is_maml(x64):
    episode = make_episode(jax.random.key(1))
    learner = meta_sgd(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3)
    plain = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=3)
    meta_params = learner.init(jax.random.key(0), episode.support.inputs)
    chex.assert_trees_all_equal(meta_params["rates"], jnp.full(4, ALPHA, meta_params["params"].dtype))
    (loss, _), grads = jax.value_and_grad(learner.objective, has_aux=True)(meta_params, episode)
    (expected_loss, _), expected = jax.value_and_grad(plain.objective, has_aux=True)(meta_params["params"], episode)
    chex.assert_trees_all_close((loss, grads["params"]), (expected_loss, expected), rtol=1e-12)


def test_finite_differences(x64):
    episode = make_episode(jax.random.key(2))
    learner = meta_sgd(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3)
    meta_params = {"params": THETA.astype(jnp.float64), "rates": RATES.astype(jnp.float64)}
    check_grads(lambda p: learner.objective(p, episode)[0], (meta_params,), order=1, modes=["fwd", "rev"])


def test_rates_are_drawn_from_an_interval():
    model = linear_model._replace(init=lambda key, inputs: {name: jnp.zeros(500) for name in ("a", "b", "still")})
    learner = meta_sgd(model, half_mse, inner_lr=(0.005, 0.1), where=lambda name: name != "still")
    rates = learner.init(jax.random.key(0), jnp.zeros((1, 4)))["rates"]
    assert rates["still"] is None
    for drawn in (rates["a"], rates["b"]):
        assert 0.005 <= drawn.min() < 0.007
        assert 0.098 < drawn.max() <= 0.1
        assert jnp.abs(drawn.mean() - 0.0525) < 0.005
    assert abs(jnp.corrcoef(rates["a"], rates["b"])[0, 1]) < 0.2
    for wrong in ((0.1, 0.005), (-0.1, 0.1), (0.1,)):
        with pytest.raises(ValueError, match="inner_lr="):
            meta_sgd(model, half_mse, inner_lr=wrong)


def test_the_rates_do_not_share_the_keys_of_the_model():
    def init(key, inputs):
        leaf_keys = jax.random.split(jax.random.split(key)[1])
        return {name: jax.random.uniform(leaf_key, (3,)) for name, leaf_key in zip("ab", leaf_keys, strict=True)}

    drawn = meta_sgd(linear_model._replace(init=init), half_mse, inner_lr=(0.0, 1.0)).init(jax.random.key(0), None)
    for rates in jax.tree.leaves(drawn["rates"]):
        assert not any(jnp.any(rates == weights) for weights in jax.tree.leaves(drawn["params"]))


def test_the_hyperparameters_hold_the_interval():
    inputs, learner_of = (
        jnp.zeros((1, 4)),
        functools.partial(CATALOGUE["meta-sgd"].build, Problem(linear_model, half_mse)),
    )
    expected = meta_sgd(linear_model, half_mse, inner_lr=(0.005, 0.1))
    learner = learner_of(DrawnRates(inner_lr=0.005, inner_lr_max=0.1))
    of = [built.init(jax.random.key(0), inputs)["rates"] for built in (learner, expected)]
    chex.assert_trees_all_equal(*of)
    assert DrawnRates(inner_lr=0.3).rates == 0.3
    traced = jax.jit(
        lambda rate: learner_of(DrawnRates(inner_lr=rate, inner_lr_max=0.1)).init(jax.random.key(0), inputs)
    )
    chex.assert_trees_all_close(traced(0.005)["rates"], of[1], rtol=1e-5)
    for wrong in (0.001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"inner_lr_max=.* must be finite and at least inner_lr=0\.005"):
            DrawnRates(inner_lr=0.005, inner_lr_max=wrong)


def test_parameters_that_do_not_adapt_have_no_rate():
    model = linear_model._replace(
        init=lambda key, inputs: {"w": jnp.ones(inputs.shape[1:]), "bias": jnp.zeros(())},
        apply=lambda params, inputs: inputs @ params["w"] + params["bias"],
    )
    episode = make_episode(jax.random.key(3))
    learner = meta_sgd(model, half_mse, inner_lr=ALPHA, where=lambda name: name == "w")
    meta_params = learner.init(jax.random.key(0), episode.support.inputs)
    assert meta_params["rates"]["bias"] is None
    task_params, _ = learner.adapt(meta_params, episode.support)
    assert task_params["bias"] == 0
    assert jnp.all(task_params["w"] != 1)
