"""One device and several give the same meta-gradient, with one all-reduce a meta-step."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import (
    Model,
    checkpoint,
    evaluate,
    init_meta_state,
    losses,
    make_meta_step,
    make_train_loop,
    maml,
    mixed_mode,
    models,
    parallel,
    pmap_meta_step,
)
from maml_jax.meta_gradient import meta_gradient
from maml_jax.tasks import sinusoid

NUM_TASKS = 8
MODEL = models.mlp(features=(6, 1), activation=jnp.tanh)
SAMPLER = sinusoid.make_sampler(shot=4, query_shot=4)
OPTIMIZER = optax.adam(1e-2)


def build(inner_grad=mixed_mode, rule=None, where=None):
    rule = optax.sgd(0.02) if rule is None else rule
    return maml(
        MODEL,
        losses.mean_squared_error,
        inner_optimizer=rule,
        num_inner_steps=2,
        where=where,
        inner_grad=inner_grad,
    )


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
    "gradient descent": {"rule": optax.sgd(0.02)},
    "adam on the last layer": {"rule": optax.adam(0.02, eps_root=1e-8), "where": lambda name: "dense_1" in name},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_the_meta_gradient_over_a_mesh(episodes, rule, inner_grad):
    # With the parameters left replicated, the inner gradient would be summed over the devices.
    learner, params, mesh = (
        build(inner_grad, **RULES[rule]),
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


def test_a_restored_state_and_parameters_of_other_devices_go_to_a_mesh(tmp_path):
    mesh = parallel.task_mesh(jax.devices()[:2])
    checkpoint.save(tmp_path, 0, initial_state())
    restored = checkpoint.restore(tmp_path, 0, like=initial_state())
    loop = make_train_loop(LEARNER, OPTIMIZER, SAMPLER, meta_batch_size=4, num_steps=1, mesh=mesh)
    state, _ = loop(restored, jax.random.key(1))
    expected, _ = loop(initial_state(), jax.random.key(1))
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
    on_other = jax.device_put(state.params, jax.devices()[3])
    found = [
        evaluate(
            LEARNER,
            params,
            SAMPLER,
            jax.random.key(2),
            metric_fn=losses.mean_squared_error,
            num_episodes=4,
            mesh=parallel.task_mesh(jax.devices()[:number]),
        ).mean
        for params, number in ((state.params, 1), (state.params, 4), (on_other, 2))
    ]
    chex.assert_trees_all_close(found[0], found[1], found[2], rtol=1e-5)


def test_what_is_on_every_device_or_traced_is_not_copied():
    mesh = parallel.task_mesh(jax.devices()[:2])
    tree = {"here": jnp.ones(3), "host": np.ones(2), "key": jax.random.key(0)}
    everywhere = parallel.replicate(tree, mesh)
    chex.assert_trees_all_equal(everywhere["here"], tree["here"])
    assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(everywhere))
    assert parallel.replicate(everywhere, mesh) is everywhere
    assert not tree["here"].is_deleted()
    parallel.replicate(tree, mesh, donate=True)
    assert tree["here"].is_deleted()
    assert "copy" not in str(jax.make_jaxpr(lambda x: parallel.replicate(x, mesh))(jnp.ones(3)))


def test_each_task_gathers_its_results_on_every_device():
    mesh = parallel.task_mesh(jax.devices()[:4])
    doubled = parallel.each_task(lambda factor, tasks: {"out": factor * tasks}, mesh)(2.0, jnp.arange(8.0))["out"]
    np.testing.assert_array_equal(doubled, 2 * np.arange(8.0))
    assert doubled.sharding.device_set == set(jax.devices()[:4])
    assert doubled.is_fully_replicated


class Recurrent(nn.Module):
    """A GRU over the coordinates of the input, whose state starts as a constant."""

    @nn.compact
    def __call__(self, inputs):
        states = nn.RNN(nn.GRUCell(features=3))(jnp.stack([inputs, jnp.sin(inputs)], axis=1))
        return nn.Dense(1)(states[:, -1])


def solve_by_cholesky(params, inputs):
    """A ridge regression on learned features; `assume_a="pos"` is a custom linear solve."""
    features = jnp.tanh(inputs @ params["in"])
    gram = features.T @ features + jnp.eye(4)
    weights = jax.scipy.linalg.solve(gram, features.T @ jnp.sin(inputs), assume_a="pos")
    return features @ weights * params["out"]


CONSTANT_STARTS = {
    "recurrent network": models.from_linen(Recurrent()),
    "linear solve": Model(
        lambda key, inputs: {"in": jax.random.normal(key, (1, 4)), "out": jnp.ones(())}, solve_by_cholesky
    ),
}


@pytest.mark.parametrize("name", CONSTANT_STARTS)
def test_models_whose_scans_start_from_constants_train_and_evaluate_on_a_mesh(name):
    learner = maml(CONSTANT_STARTS[name], losses.mean_squared_error, inner_optimizer=optax.sgd(0.02), num_inner_steps=2)

    def results(mesh):
        loop = make_train_loop(learner, OPTIMIZER, SAMPLER, meta_batch_size=4, num_steps=3, mesh=mesh)
        state, info = loop(init_meta_state(learner, OPTIMIZER, jax.random.key(0), jnp.zeros((4, 1))), jax.random.key(2))
        kwargs = {"metric_fn": losses.mean_squared_error, "num_episodes": 4, "mesh": mesh}
        return jax.device_get((state, info, evaluate(learner, state.params, SAMPLER, jax.random.key(3), **kwargs)))

    chex.assert_trees_all_close(results(parallel.task_mesh(jax.devices()[:2])), results(None), rtol=1e-3, atol=1e-4)


META_BATCHES = [jax.vmap(SAMPLER)(jax.random.split(key, NUM_TASKS)) for key in jax.random.split(jax.random.key(1), 3)]


def trajectory(step, num_steps=3):
    """The states and infos of a few meta-steps, and the first meta-gradient, which is ten times Adam's first mean."""
    state, found = initial_state(), []
    for episodes in META_BATCHES[:num_steps]:
        state, info = step(state, episodes)
        found.append(jax.tree.map(np.asarray, (state, info)))
    return found, jax.tree.map(lambda mean: 10 * mean, found[0][0].opt_state[0].mu)


@pytest.fixture(scope="module")
def expected():
    """What one device finds."""
    return trajectory(make_meta_step(LEARNER, OPTIMIZER))


def assert_same(found, expected, atol):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_pmap_takes_the_steps_of_one_device(expected, num_devices):
    devices = jax.devices()[:num_devices]
    # All eight are the default.
    step = pmap_meta_step(LEARNER, OPTIMIZER, devices=None if num_devices == 8 else devices)
    assert_same(trajectory(step), expected, 1e-5)
    assert step(initial_state(), META_BATCHES[0])[0].step.devices() == set(devices)


def test_pmap_does_not_sum_inner_gradients_over_devices(expected):
    # An all-reduce that crept into the inner gradients would adapt to the tasks of all devices.
    step = pmap_meta_step(build(jax.value_and_grad), OPTIMIZER, chunk_size=2, devices=jax.devices()[:4])
    assert_same(trajectory(step, 1)[1], expected[1], 1e-5)


def test_pmap_refuses_tasks_that_do_not_divide():
    step = pmap_meta_step(LEARNER, OPTIMIZER, devices=jax.devices()[:3])
    with pytest.raises(ValueError, match="meta_batch_size=8 does not divide over the 3 devices"):
        step(initial_state(), META_BATCHES[0])


@pytest.mark.parametrize("make", [make_meta_step, pmap_meta_step, make_train_loop])
def test_the_program_of_an_initial_state_is_that_of_its_results(caplog, make):
    devices = jax.devices()[:2]
    mesh = parallel.task_mesh(devices)
    if make is make_train_loop:
        program = make(LEARNER, OPTIMIZER, SAMPLER, meta_batch_size=NUM_TASKS, num_steps=2, mesh=mesh)
        argument = jax.random.key(1)
    else:
        program = make(LEARNER, OPTIMIZER, **({"devices": devices} if make is pmap_meta_step else {"mesh": mesh}))
        argument = META_BATCHES[0]
    state, _ = program(initial_state(), argument)
    for leaf in jax.tree.leaves(state):
        assert leaf.is_fully_replicated
    with jax.log_compiles(), caplog.at_level("WARNING"):
        program(state, argument)
    assert "Finished XLA compilation" not in caplog.text


def test_pmap_leaves_the_state_usable_and_returns_it_on_every_device():
    state = initial_state()
    step = pmap_meta_step(LEARNER, OPTIMIZER, devices=jax.devices()[:2])
    once, again = step(state, META_BATCHES[0])[0], step(state, META_BATCHES[0])[0]
    assert_same(once, again, 0)
    for leaf in jax.tree.leaves(once):
        assert leaf.sharding.device_set == set(jax.devices()[:2])
        assert leaf.is_fully_replicated
