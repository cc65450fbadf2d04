"""One device and several give the same meta-gradient, with one all-reduce a meta-step."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from maml_jax import (
    adapt_only,
    init_meta_state,
    losses,
    make_meta_step,
    make_train_loop,
    maml,
    mixed_mode,
    models,
    parallel,
)
from maml_jax.outer import meta_gradient
from maml_jax.tasks import sinusoid

NUM_TASKS = 8
MODEL = models.mlp(features=(6, 1), activation=jnp.tanh)
SAMPLER = sinusoid.make_sampler(shot=4, query_shot=4)
OPTIMIZER = optax.adam(1e-2)


def build(inner_grad=mixed_mode, rule=None):
    rule = optax.sgd(0.02) if rule is None else rule
    return maml(MODEL, losses.mean_squared_error, inner_optimizer=rule, num_inner_steps=2, inner_grad=inner_grad)


LEARNER = build()


def initial_state():
    return init_meta_state(LEARNER, OPTIMIZER, jax.random.key(0), jnp.zeros((4, 1)))


@pytest.fixture(scope="module")
def episodes():
    return jax.vmap(SAMPLER)(jax.random.split(jax.random.key(1), NUM_TASKS))


def train(num_devices, chunk_size, num_steps=10):
    mesh = None if num_devices is None else parallel.task_mesh(jax.devices()[:num_devices])
    loop = make_train_loop(
        LEARNER, OPTIMIZER, SAMPLER, meta_batch_size=NUM_TASKS, num_steps=num_steps, chunk_size=chunk_size, mesh=mesh
    )
    return jax.device_get(loop(initial_state(), jax.random.key(2)))


@pytest.fixture(scope="module")
def alone():
    """State and info after ten meta-steps without a mesh, all tasks in one vmap."""
    return train(None, NUM_TASKS)


@pytest.mark.parametrize(("num_devices", "chunk_size"), [(1, None), (2, 4), (2, 2), (4, 2), (4, 1), (8, 1)])
def test_training_takes_the_same_path_on_any_number_of_devices(alone, num_devices, chunk_size):
    chex.assert_trees_all_close(train(num_devices, chunk_size), alone, rtol=1e-4, atol=1e-5)


RULES = {
    "gradient descent": optax.sgd(0.02),
    "adam on the last layer": adapt_only(optax.adam(0.02, eps_root=1e-8), lambda name: "dense_1" in name),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_the_meta_gradient_over_a_mesh(episodes, rule, inner_grad):
    # With the parameters left replicated, the inner gradient would be summed over the devices.
    learner, params, mesh = (
        build(inner_grad, RULES[rule]),
        initial_state().params,
        parallel.task_mesh(jax.devices()[:4]),
    )

    def gradient(params, episodes):
        return meta_gradient(learner, params, episodes, chunk_size=2)

    over_mesh = jax.jit(parallel.mean_over_tasks(gradient, mesh))(params, episodes)
    chex.assert_trees_all_close(jax.device_get(over_mesh), jax.jit(gradient)(params, episodes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_meta_step_reduces_once(episodes, chunk_size):
    mesh = parallel.task_mesh(jax.devices()[:4])
    step = make_meta_step(LEARNER, OPTIMIZER, chunk_size=chunk_size, mesh=mesh)
    program = step.lower(initial_state(), episodes).compile().as_text()
    collectives = re.findall(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)", program)
    assert collectives == ["all-reduce"]


def test_a_training_loop_reduces_once_and_draws_its_tasks_where_they_are_used():
    mesh = parallel.task_mesh(jax.devices()[:4])
    loop = make_train_loop(LEARNER, OPTIMIZER, SAMPLER, meta_batch_size=NUM_TASKS, num_steps=3, mesh=mesh)
    program = loop.lower(initial_state(), jax.random.key(0)).compile().as_text()
    collectives = re.findall(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)", program)
    assert collectives == ["all-reduce"]


def test_a_mesh_of_every_device_has_one_axis():
    mesh = parallel.task_mesh()
    assert mesh.axis_names == ("tasks",)
    assert mesh.size == len(jax.devices()) == 8
