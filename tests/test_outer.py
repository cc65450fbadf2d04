import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from linear_regression import ALPHA, half_mse, linear_model, make_episode, make_episodes

from maml_jax import MetaState, Model, init_meta_state, make_meta_step, make_train_loop, maml, parallel
from maml_jax.outer import default_chunk_size, meta_gradient, task_keys

LEARNER = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2)
THETA = jnp.array([0.5, -1.0, 2.0, 0.1])


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(jax.random.key(0), 6)


def state_of(optimizer):
    return init_meta_state(LEARNER, optimizer, jax.random.key(1), jnp.zeros((6, 4)))


def gradient(episodes, chunk_size=None, theta=THETA):
    return jax.jit(lambda episodes: meta_gradient(LEARNER, theta, episodes, chunk_size=chunk_size))(episodes)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 6])
def test_the_meta_gradient_is_the_mean_over_tasks_in_chunks_of_any_size(x64, chunk_size):
    theta, episodes = THETA.astype(jnp.float64), make_episodes(jax.random.key(0), 6)
    of_one = jax.jit(jax.value_and_grad(lambda params, episode: LEARNER.objective(params, episode)[0]))
    each = [of_one(theta, jax.tree.map(lambda x, i=i: x[i], episodes)) for i in range(6)]
    expected = jax.tree.map(lambda *values: sum(values) / 6, *each)
    chex.assert_trees_all_close(gradient(episodes, chunk_size, theta), expected, rtol=1e-12)


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


@pytest.mark.parametrize("chunk_size", [4, 0, -1, 7])
def test_a_chunk_size_that_does_not_divide_is_refused(episodes, chunk_size):
    message = rf"chunk_size={chunk_size} does not divide the meta-batch of 6 tasks; choose a divisor, or None"
    with pytest.raises(ValueError, match=message):
        gradient(episodes, chunk_size)
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        make_meta_step(LEARNER, optimizer, chunk_size=chunk_size)(state_of(optimizer), episodes)


@pytest.mark.parametrize(
    ("num_params", "expected"),
    [(100, 24), (4_000, 12), (60_000, 1), (1_000_000, 1)],  # 0.4, 16, 240 and 4000 kB; a task's examples are 0.24 kB
)
def test_the_default_chunk_holds_what_fits_in_the_cache_of_a_core(num_params, expected):
    params = jax.ShapeDtypeStruct((num_params,), jnp.float32)
    episodes = jax.eval_shape(lambda: make_episodes(jax.random.key(0), 24))
    assert default_chunk_size(params, episodes) == expected


def test_the_default_chunk_of_an_accelerator_is_all_tasks(monkeypatch, episodes):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert default_chunk_size(jax.ShapeDtypeStruct((1_000_000,), jnp.float32), episodes) == 6


def test_episodes_may_carry_keys(episodes):
    keyed = episodes._replace(key=jax.random.split(jax.random.key(0), 6))
    chex.assert_trees_all_equal(gradient(keyed, 2), gradient(episodes, 2))


def test_a_meta_step_is_the_optimiser_applied_to_the_meta_gradient(episodes):
    optimizer = optax.adam(0.1)
    loss, grads = gradient(episodes)
    updates, _ = optimizer.update(grads, optimizer.init(THETA), THETA)
    state, info = make_meta_step(LEARNER, optimizer)(
        MetaState(jnp.copy(THETA), optimizer.init(THETA), jnp.int32(7)), episodes
    )
    chex.assert_trees_all_close(state.params, THETA + updates, atol=1e-6)
    chex.assert_trees_all_close(info.loss, loss, rtol=1e-5)
    chex.assert_trees_all_close(info.grad_norm, jnp.linalg.norm(grads), rtol=1e-5)
    assert state.step == 8


def test_the_initial_state_holds_the_parameters_of_the_key():
    optimizer = optax.adam(0.1)
    state = state_of(optimizer)
    chex.assert_trees_all_equal(state.params, LEARNER.init(jax.random.key(1), jnp.zeros((6, 4))))
    chex.assert_trees_all_equal(state.opt_state, optimizer.init(state.params))
    assert state.step == 0


def test_integer_parameters_are_refused_by_name():
    model = Model(lambda key, inputs: {"table": jnp.arange(3)}, linear_model.apply)
    learner = maml(model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=1)
    with pytest.raises(ValueError, match=r"\['table'\] has dtype int32 .* use floating parameters"):
        init_meta_state(learner, optax.sgd(0.1), jax.random.key(0), jnp.zeros((6, 4)))


def train(num_steps, state=None, **kwargs):
    optimizer = optax.adam(0.05)
    state = state_of(optimizer) if state is None else state
    loop = make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=4, num_steps=num_steps, **kwargs)
    return loop(state, jax.random.key(5))


def test_a_resumed_run_is_the_run_that_was_not_stopped():
    whole, whole_info = train(6)
    half, first_info = train(3)
    resumed, second_info = train(3, half)
    chex.assert_trees_all_equal(resumed, whole)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first_info, second_info)
    chex.assert_trees_all_equal(joined, whole_info)
    chex.assert_tree_shape_prefix(whole_info, (6,))
    assert whole.step == 6


def test_the_loop_takes_the_meta_steps_that_its_keys_describe():
    optimizer = optax.adam(0.05)
    state, step = state_of(optimizer), make_meta_step(LEARNER, optimizer)
    for i in range(3):
        keys = task_keys(jax.random.fold_in(jax.random.key(5), i), 4)
        state, _ = step(state, jax.vmap(make_episode)(keys))
    chex.assert_trees_all_close(train(3)[0], state, rtol=1e-5)


def test_a_task_does_not_depend_on_the_size_of_its_meta_batch():
    key = jax.random.fold_in(jax.random.key(5), 11)
    few, many = (jax.vmap(make_episode)(task_keys(key, size)) for size in (3, 8))
    chex.assert_trees_all_equal(*(jax.random.key_data(task_keys(key, size)[:3]) for size in (3, 8)))
    # Equal keys draw equal numbers, but the last bit of a normal draw depends on how the loop is vectorised.
    chex.assert_trees_all_close(few, jax.tree.map(lambda x: x[:3], many), rtol=1e-6)
    assert len(jnp.unique(jax.random.key_data(task_keys(key, 8)), axis=0)) == 8


def test_a_loop_is_compiled_once():
    optimizer = optax.adam(0.05)
    chex.clear_trace_counter()
    sampler = chex.assert_max_traces(make_episode, n=1)
    loop = make_train_loop(LEARNER, optimizer, sampler, meta_batch_size=2, num_steps=2, chunk_size=2)
    state = state_of(optimizer)
    for seed in range(3):
        state, _ = loop(state, jax.random.key(seed))
    assert state.step == 6


@pytest.mark.parametrize("counts", [{"meta_batch_size": 0, "num_steps": 3}, {"meta_batch_size": 4, "num_steps": -1}])
def test_counts_that_are_not_positive_are_refused(counts):
    with pytest.raises(
        ValueError, match=f"must be positive, got {counts['meta_batch_size']} and {counts['num_steps']}"
    ):
        make_train_loop(LEARNER, optax.sgd(0.1), make_episode, **counts)


def test_tasks_that_do_not_divide_over_a_mesh_are_refused(episodes):
    optimizer, mesh = optax.sgd(0.1), parallel.task_mesh(jax.devices()[:4])
    message = r"meta_batch_size=6 does not divide over the 4 devices .*; choose a multiple of 4"
    with pytest.raises(ValueError, match=message):
        make_meta_step(LEARNER, optimizer, mesh=mesh)(state_of(optimizer), episodes)
    loop = make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=6, num_steps=1, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        loop(state_of(optimizer), jax.random.key(0))
