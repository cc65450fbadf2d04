import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads

from maml_jax import anil, boil, losses, maml, mixed_mode, models
from maml_jax.tasks import sinusoid

MODEL = models.mlp(features=(6, 1), activation=jnp.tanh, param_dtype=jnp.float64)
RULE = {"inner_optimizer": optax.sgd(0.1), "num_inner_steps": 3}


def is_head(name):
    return name.startswith("dense_1")


@pytest.fixture
def drawn(x64):
    episode = sinusoid.make_sampler(shot=5, query_shot=5)(jax.random.key(0))
    return MODEL.init(jax.random.key(1), episode.support.inputs), episode


def gradient(learner, params, episode):
    return jax.jit(jax.grad(learner.objective, has_aux=True))(params, episode)[0]


def test_it_is_the_complement_of_anil(drawn):
    ours = boil(MODEL, losses.mean_squared_error, head=is_head, **RULE)
    other = anil(MODEL, losses.mean_squared_error, head=lambda name: not is_head(name), **RULE)
    chex.assert_trees_all_equal(gradient(ours, *drawn), gradient(other, *drawn))
    params, episode = drawn
    task_params, _ = ours.adapt(params, episode.support)
    chex.assert_trees_all_equal(task_params["dense_1"], params["dense_1"])
    assert jnp.all(task_params["dense_0"]["kernel"] != params["dense_0"]["kernel"])


def test_without_a_head_it_is_maml(drawn):
    everything = boil(MODEL, losses.mean_squared_error, head=lambda name: False, **RULE)
    plain = maml(MODEL, losses.mean_squared_error, **RULE)
    chex.assert_trees_all_close(gradient(everything, *drawn), gradient(plain, *drawn), rtol=1e-12)


def test_other_parameters_may_be_frozen_too(drawn):
    params, episode = drawn
    learner = boil(MODEL, losses.mean_squared_error, head=is_head, where=lambda name: "bias" not in name, **RULE)
    task_params, _ = learner.adapt(params, episode.support)
    chex.assert_trees_all_equal(task_params["dense_0"]["bias"], params["dense_0"]["bias"])
    assert jnp.all(task_params["dense_0"]["kernel"] != params["dense_0"]["kernel"])


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_finite_differences(drawn, inner_grad):
    params, episode = drawn
    learner = boil(MODEL, losses.mean_squared_error, head=is_head, inner_grad=inner_grad, **RULE)
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])
