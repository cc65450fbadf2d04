import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from linear_regression import ALPHA, half_mse, linear_model, make_episodes

from maml_jax import Model, maml
from maml_jax.meta_gradient import default_chunk_size, meta_gradient

LEARNER = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2)
THETA = jnp.array([0.5, -1.0, 2.0, 0.1])


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(jax.random.key(0), 6)


def gradient(episodes, chunk_size=None, theta=THETA):
    def gradient(episodes):
        (loss, _), grads = meta_gradient(LEARNER, theta, episodes, chunk_size=chunk_size)
        return loss, grads

    return jax.jit(gradient)(episodes)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 4, 5, 6, 7])
def test_the_meta_gradient_is_the_mean_over_tasks_in_chunks_of_any_size(x64, chunk_size):
    theta, episodes = THETA.astype(jnp.float64), make_episodes(jax.random.key(0), 6)
    of_one = jax.jit(jax.value_and_grad(lambda params, episode: LEARNER.objective(params, episode)[0]))
    each = [of_one(theta, jax.tree.map(lambda x, i=i: x[i], episodes)) for i in range(6)]
    expected = jax.tree.map(lambda *values: sum(values) / 6, *each)
    chex.assert_trees_all_close(gradient(episodes, chunk_size, theta), expected, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "gradient"), [(jnp.bfloat16, 1.0), (jnp.float16, 300.0)])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_sums_over_chunks_are_not_in_half_precision(dtype, gradient, chunk_size):
    # 256 + 1 is 256 in bfloat16, and 512 x 300 is beyond float16.
    learner = LEARNER._replace(objective=lambda params, episode: (gradient * params.sum(), {"twice": 2 * params.sum()}))
    episodes = make_episodes(jax.random.key(0), 512)
    (loss, info), grads = meta_gradient(learner, jnp.ones(1, dtype), episodes, chunk_size=chunk_size)
    assert grads.dtype == dtype
    chex.assert_trees_all_close((loss, info["twice"], grads.astype(float)[0]), (gradient, 2.0, gradient))


def test_a_meta_batch_has_a_task(episodes):
    with pytest.raises(ValueError, match="the meta-batch has no task; give it one or more"):
        gradient(jax.tree.map(lambda x: x[:0], episodes))


def test_the_products_of_a_chunk_of_one_task_are_plain_ones(episodes):
    def batched_products(chunk_size):
        jaxpr = jax.make_jaxpr(lambda e: meta_gradient(LEARNER, THETA, e, chunk_size=chunk_size))(episodes)
        products = re.findall(r"dimension_numbers=\(\(.*?\), \((.*?)\)\)", str(jaxpr))
        assert products
        return sum("0" in batch_axes for batch_axes in products)

    assert batched_products(1) == 0
    assert batched_products(2) > 0


def test_the_order_of_episodes_does_not_matter(episodes):
    shuffled = jax.tree.map(lambda x: x[jnp.array([3, 0, 5, 1, 4, 2])], episodes)
    chex.assert_trees_all_close(gradient(episodes, 2), gradient(shuffled, 2), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [0, -1, True, 2.5, "all"])
def test_a_chunk_size_that_is_no_positive_integer_is_refused(episodes, chunk_size):
    message = f"chunk_size must be an integer of at least 1, got {chunk_size!r}"
    with pytest.raises(ValueError, match=message):
        gradient(episodes, chunk_size)


def default_chunk(learner, dim, num_tasks=24):
    params = jax.ShapeDtypeStruct((dim,), jnp.float32)
    episodes = jax.eval_shape(lambda: make_episodes(jax.random.key(0), num_tasks, dim=dim))
    return default_chunk_size(learner, params, episodes)


@pytest.mark.parametrize(
    ("dim", "num_tasks", "expected"),
    # The largest results are the 11 inputs of a task, 44 bytes a dimension: 256 KiB hold 29 tasks of 200, 5 of 1,000.
    # 24 and 23 tasks make five chunks, 31 make seven, and six make two.
    [(200, 24, 24), (1_000, 24, 5), (1_000, 23, 5), (1_000, 31, 5), (1_000, 6, 3), (60_000, 24, 1)],
)
def test_the_default_chunk_fits_in_the_cache_of_a_core(dim, num_tasks, expected):
    assert default_chunk(LEARNER, dim, num_tasks) == expected


def test_the_default_chunk_counts_parameters_that_a_task_copies_and_no_others():
    # A table of 1 MB: adapted, every task has its own; looked up, all tasks share it.
    model = Model(lambda key, inputs: jnp.zeros(2**18), lambda params, inputs: params[: inputs.shape[1]] @ inputs.T)
    copied = maml(model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=1)
    shared = copied._replace(
        objective=lambda params, episode: (jnp.mean(model.apply(params, episode.query.inputs)), ())
    )
    params = jax.ShapeDtypeStruct((2**18,), jnp.float32)
    episodes = jax.eval_shape(lambda: make_episodes(jax.random.key(0), 24))
    assert default_chunk_size(copied, params, episodes) == 1
    assert default_chunk_size(shared, params, episodes) == 24


@pytest.mark.parametrize(("limit", "expected"), [(None, 6), (2**30, 6), (4096, 1)])
def test_the_default_chunk_of_an_accelerator_is_bounded_by_its_memory(monkeypatch, episodes, limit, expected):
    class Device:
        def memory_stats(self):
            return None if limit is None else {"bytes_limit": limit}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert default_chunk_size(LEARNER, THETA, episodes) == expected


def test_episodes_may_carry_keys(episodes):
    keyed = episodes._replace(key=jax.random.split(jax.random.key(0), 6))
    chex.assert_trees_all_equal(gradient(keyed, 2), gradient(episodes, 2))


def test_a_python_number_in_the_info_is_averaged_in_chunks_of_any_size(episodes):
    learner = LEARNER._replace(objective=lambda params, episode: (params.sum(), {"rate": 0.25, "steps": 3}))
    for chunk_size in (1, 2):
        (_, info), _ = meta_gradient(learner, THETA, episodes, chunk_size=chunk_size)
        chex.assert_trees_all_close(info, {"rate": 0.25, "steps": 3.0})


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda params, episode: params.sum(), r"must return \(scalar, info\), got .*; return \(loss, \(\)\)"),
        (lambda params, episode: ((params.sum(), 1.0), ()), "the objective must be a scalar, got a tuple"),
        (lambda params, episode: (params, ()), r"the objective must be a scalar, got shape \(4,\)"),
    ],
)
def test_what_is_no_objective_is_named(episodes, objective, message, chunk_size):
    with pytest.raises(ValueError, match=message):
        meta_gradient(LEARNER._replace(objective=objective), THETA, episodes, chunk_size=chunk_size)
