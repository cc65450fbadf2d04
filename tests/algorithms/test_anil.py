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


def test_with_everything_unfrozen_it_is_maml(drawn):
    everything = anil(MODEL, losses.mean_squared_error, head=lambda name: True, **RULE)
    plain = maml(MODEL, losses.mean_squared_error, **RULE)
    chex.assert_trees_all_close(gradient(everything, *drawn), gradient(plain, *drawn), rtol=1e-12)


def test_only_the_head_adapts_and_all_learn(drawn):
    learner = anil(MODEL, losses.mean_squared_error, head=is_head, **RULE)
    params, episode = drawn
    task_params, _ = learner.adapt(params, episode.support)
    chex.assert_trees_all_equal(task_params["dense_0"], params["dense_0"])
    assert jnp.all(task_params["dense_1"]["kernel"] != params["dense_1"]["kernel"])
    assert all(optax.tree.norm(leaf) > 0 for leaf in jax.tree.leaves(gradient(learner, *drawn)))


def test_one_step_of_the_head_by_hand(drawn):
    # With features h(x) the head is a linear regression: one step is w − α 2/n Hᵀ(Hw − y).
    params, episode = drawn
    learner = anil(MODEL, losses.mean_squared_error, head=is_head, inner_optimizer=optax.sgd(0.1), num_inner_steps=1)
    hidden = jnp.tanh(episode.support.inputs @ params["dense_0"]["kernel"])
    residual = hidden @ params["dense_1"]["kernel"] - episode.support.targets
    expected = params["dense_1"]["kernel"] - 0.1 * 2 / 5 * hidden.T @ residual
    task_params, _ = learner.adapt(params, episode.support)
    chex.assert_trees_all_close(task_params["dense_1"]["kernel"], expected, rtol=1e-12)


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_finite_differences(drawn, inner_grad):
    params, episode = drawn
    learner = anil(MODEL, losses.mean_squared_error, head=is_head, inner_grad=inner_grad, **RULE)
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


@pytest.mark.parametrize("builder", [anil, boil])
def test_a_head_that_is_no_function_is_an_error(builder):
    with pytest.raises(ValueError, match=r"head must be a function such as .*, got 'head'"):
        builder(MODEL, losses.mean_squared_error, head="head", **RULE)


def test_a_head_that_is_not_there_is_an_error(drawn):
    params, episode = drawn
    learner = anil(MODEL, losses.mean_squared_error, head=lambda name: name.startswith("haed"), **RULE)
    with pytest.raises(ValueError, match="selects none of the parameters"):
        learner.adapt(params, episode.support)
