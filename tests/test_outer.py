import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from linear_regression import ALPHA, half_mse, linear_model, make_episode, make_episodes

from maml_jax import (
    Batch,
    Episode,
    MetaLearner,
    MetaState,
    Model,
    OuterRule,
    gradient_step,
    init_meta_state,
    make_meta_step,
    make_train_loop,
    maml,
    parallel,
    pmap_meta_step,
    reptile,
)
from maml_jax.meta_gradient import meta_gradient
from maml_jax.tasks import few_shot
from maml_jax.types import draw_episode, task_keys

LEARNER = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2)
THETA = jnp.array([0.5, -1.0, 2.0, 0.1])


@pytest.fixture(scope="module")
def episodes():
    return make_episodes(jax.random.key(0), 6)


def state_of(optimizer):
    return init_meta_state(LEARNER, optimizer, jax.random.key(1), jnp.zeros((6, 4)))


@pytest.mark.parametrize("chunk_size", [0, -1, True, 2.5, "all"])
def test_a_chunk_size_that_is_no_positive_integer_is_refused(chunk_size):
    for make in (
        lambda: make_meta_step(LEARNER, optax.sgd(0.1), chunk_size=chunk_size),
        lambda: make_train_loop(
            LEARNER, optax.sgd(0.1), make_episode, meta_batch_size=2, num_steps=1, chunk_size=chunk_size
        ),
    ):
        with pytest.raises(ValueError, match=f"chunk_size must be an integer of at least 1, got {chunk_size!r}"):
            make()


NOT_A_META_BATCH = {
    "a list of episodes": (lambda e: [e, e], r"got a list of 2 episodes; stack them into one Episode"),
    "one episode": (
        lambda e: jax.tree.map(lambda x: x[0], e),
        r"leading axis, .*\[T, S, \.\.\.\], got support\.inputs \[6, 4\].*query\.inputs \[5, 4\].*x\[None\]",
    ),
    "one episode with as many queries as support examples": (
        lambda e: jax.tree.map(lambda x: x[0], Episode(e.query, e.query)),
        r"targets are \[T, S, \.\.\.\], got support\.inputs \[5, 4\], support\.targets \[5\].*x\[None\]",
    ),
    "a scalar": (lambda e: e._replace(key=jax.random.key(0)), r"key \[\]"),
    "support and query of different T": (
        lambda e: e._replace(query=jax.tree.map(lambda x: x[:4], e.query)),
        r"support\.inputs \[6, 6, 4\].*query\.inputs \[4, 5, 4\]",
    ),
}


@pytest.mark.parametrize("case", NOT_A_META_BATCH)
def test_what_is_no_meta_batch_is_refused_at_the_door(episodes, case):
    change, message = NOT_A_META_BATCH[case]
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        make_meta_step(LEARNER, optimizer)(state_of(optimizer), change(episodes))
    pmap_step = pmap_meta_step(LEARNER, optimizer, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=message):
        pmap_step(state_of(optimizer), change(episodes))


def test_a_meta_step_is_the_optimiser_applied_to_the_meta_gradient(episodes):
    optimizer = optax.adam(0.1)
    (loss, _), grads = jax.jit(lambda episodes: meta_gradient(LEARNER, THETA, episodes))(episodes)
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


def test_a_program_may_be_part_of_another():
    optimizer = optax.adam(0.05)
    loop = make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=4, num_steps=3)
    chex.assert_trees_all_close(jax.jit(loop)(state_of(optimizer), jax.random.key(5)), train(3), rtol=1e-6)


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


def test_a_parameter_of_a_weak_type_is_compiled_once():
    scaled = Model(lambda key, inputs: {"scale": jnp.array(1.0)}, lambda params, inputs: params["scale"] * inputs[:, 0])
    learner = maml(scaled, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=1)
    optimizer = optax.sgd(0.1)
    state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((6, 4)))
    assert not state.params["scale"].weak_type
    loop = make_train_loop(learner, optimizer, make_episode, meta_batch_size=2, num_steps=2)
    for _ in range(2):
        state, _ = loop(state, jax.random.key(1))
    assert loop.jitted._cache_size() == 1


def test_a_query_set_may_be_empty(episodes):
    # Reptile adapts to the support set alone.
    learner = reptile(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2)
    optimizer = optax.sgd(1.0)
    empty = episodes._replace(query=jax.tree.map(lambda x: x[:, :0], episodes.query))
    state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((6, 4)))
    expected, _ = make_meta_step(learner, optimizer, donate=False)(state, empty)
    found, _ = pmap_meta_step(learner, optimizer, devices=jax.devices()[:2])(state, empty)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-6)


@pytest.mark.parametrize("name", ["meta_batch_size", "num_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_that_are_no_positive_integers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
        make_train_loop(LEARNER, optax.sgd(0.1), make_episode, **{"meta_batch_size": 4, "num_steps": 3, name: value})


def test_tasks_that_do_not_divide_over_a_mesh_are_refused(episodes):
    optimizer, mesh = optax.sgd(0.1), parallel.task_mesh(jax.devices()[:4])
    message = r"meta_batch_size=6 does not divide over the 4 devices .*; choose a multiple of 4"
    with pytest.raises(ValueError, match=message):
        make_meta_step(LEARNER, optimizer, mesh=mesh)(state_of(optimizer), episodes)
    with pytest.raises(ValueError, match=message):
        make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=6, num_steps=1, mesh=mesh)


@pytest.mark.parametrize(
    "mesh",
    [
        2,
        jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        jax.make_mesh((2,), (parallel.AXIS,), axis_types=(jax.sharding.AxisType.Explicit,)),
    ],
    ids=["a number", "another axis", "explicit"],
)
def test_what_is_no_mesh_of_tasks_is_refused(mesh, episodes):
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"must be made by parallel\.task_mesh"):
        make_meta_step(LEARNER, optimizer, mesh=mesh)(state_of(optimizer), episodes)
    with pytest.raises(ValueError, match=r"must be made by parallel\.task_mesh"):
        make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=6, num_steps=1, mesh=mesh)


def test_a_distribution_that_returns_no_episode_is_refused():
    loop = make_train_loop(
        LEARNER, optax.sgd(0.1), lambda key: make_episode(key).support, meta_batch_size=2, num_steps=1
    )
    with pytest.raises(ValueError, match=r"returned a Batch; return Episode\(support, query, key\)"):
        loop(state_of(optax.sgd(0.1)), jax.random.key(0))


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.5),
    "lamb": lambda: optax.lamb(0.1),
    "polyak": lambda: optax.polyak_sgd(0.5),
    "plateau": lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    "lbfgs": lambda: optax.lbfgs(),
    "dowg": lambda: optax.contrib.dowg(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outer_optimisers_get_the_parameters_the_value_and_the_function(name, x64):
    episodes = make_episodes(jax.random.key(0), 4)
    optimizer = OPTIMIZERS[name]()

    def mean_loss(theta):
        return jnp.mean(jax.vmap(lambda e: LEARNER.objective(theta, e)[0])(episodes))

    expected, opt_state = state_of(optimizer).params, optimizer.init(state_of(optimizer).params)
    state, step = state_of(optimizer), make_meta_step(LEARNER, optimizer)
    for _ in range(2):
        value, grads = jax.value_and_grad(mean_loss)(expected)
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, opt_state, expected, value=value, grad=grads, value_fn=mean_loss
        )
        expected = optax.apply_updates(expected, updates)
        state, _ = step(state, episodes)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-8)


def test_the_state_is_donated_and_says_so_when_it_is_used_again(episodes):
    optimizer = optax.adam(0.1)
    step = make_meta_step(LEARNER, optimizer)
    loop = make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=2, num_steps=1)
    for program, argument in ((step, episodes), (loop, jax.random.key(0))):
        state = state_of(optimizer)
        program(state, argument)
        assert state.params.is_deleted()
        with pytest.raises(ValueError, match=r"the state was donated to an earlier call .* use the state that"):
            program(state, argument)


def test_without_donation_a_state_may_be_used_again(episodes):
    optimizer = optax.adam(0.1)
    step = make_meta_step(LEARNER, optimizer, donate=False)
    loop = make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=2, num_steps=1, donate=False)
    state = state_of(optimizer)
    for program, argument in ((step, episodes), (loop, jax.random.key(0))):
        chex.assert_trees_all_equal(program(state, argument), program(state, argument))


def test_training_leaves_the_arrays_of_the_model_alone(episodes):
    pretrained = jnp.ones(4)
    model = Model(lambda key, inputs: {"a": pretrained, "b": pretrained}, lambda p, x: x @ (p["a"] * p["b"]))
    learner = maml(model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=1)
    for optimizer in (optax.adam(0.1), optax.lbfgs(), optax.contrib.dowg()):  # the last two hold the parameters
        state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((6, 4)))
        make_meta_step(learner, optimizer)(state, episodes)
        chex.assert_trees_all_equal(pretrained, jnp.ones(4))


def test_what_is_no_optimiser_is_refused():
    for make in (gradient_step, lambda optimizer: make_meta_step(LEARNER, optimizer)):
        with pytest.raises(ValueError, match=r"optimizer must be an optax transformation .* got 0\.1"):
            make(0.1)


class Seen(NamedTuple):
    """What a learner is given, reported through its info."""

    support: jax.Array
    key: jax.Array
    index: jax.Array


def probe(params, episode):
    """An objective that is linear in its one parameter and reports what it was given."""
    drawn = jax.random.uniform(episode.key)
    return params * episode.query.inputs, Seen(episode.support.inputs, drawn, jnp.int32(3))


PROBE = MetaLearner(lambda key, inputs: jnp.float32(2.0), None, None, probe)


def numbers(key):
    support, query = jax.random.normal(key, (2,))
    return Episode(Batch(support, support[None]), Batch(query, query[None]), jax.random.fold_in(key, 7))


@pytest.mark.parametrize("num_devices", [None, 2])
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_the_info_of_the_objective_is_averaged_over_the_tasks(num_devices, chunk_size):
    mesh = None if num_devices is None else parallel.task_mesh(jax.devices()[:num_devices])
    episodes = jax.vmap(numbers)(jax.random.split(jax.random.key(0), 6))
    optimizer = optax.sgd(0.1)
    state = init_meta_state(PROBE, optimizer, jax.random.key(0), None)
    state, info = make_meta_step(PROBE, optimizer, chunk_size=chunk_size, mesh=mesh)(state, episodes)
    expected = Seen(
        jnp.mean(episodes.support.inputs), jnp.mean(jax.vmap(jax.random.uniform)(episodes.key)), jnp.float32(3.0)
    )
    chex.assert_trees_all_close(jax.device_get(info.objective), expected, rtol=1e-6)
    chex.assert_trees_all_close(state.params, 2.0 - 0.1 * jnp.mean(episodes.query.inputs), rtol=1e-6)


BAD_STEPS = {
    "loss": lambda params, episode: (jnp.nan + 0.0 * params, ()),
    # The value is finite, its derivative is not: √x at zero.
    "gradient": lambda params, episode: (jnp.sqrt(params - params), ()),
    # Everything is finite but the parameters after the update.
    "parameters": lambda params, episode: (1e15 * params, ()),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_step_that_is_not_finite_is_found_on_the_device(what):
    # The bad objective is that of step 2 only.
    good, bad = PROBE, PROBE._replace(objective=BAD_STEPS[what])

    def learner(step):
        def objective(params, episode):
            return jax.lax.cond(step == 2, bad.objective, lambda p, e: (good.objective(p, e)[0], ()), params, episode)

        return good._replace(objective=objective)

    optimizer = optax.sgd(lambda step: jnp.where(step == 2, 1e30, 0.1))
    loop = make_train_loop(learner, optimizer, numbers, meta_batch_size=2, num_steps=4)
    _, info = loop(init_meta_state(learner, optimizer, jax.random.key(0), None), jax.random.key(1))
    assert info.finite.tolist()[:3] == [True, True, False]
    if what == "parameters":
        assert jnp.isfinite(info.loss[2])
        assert jnp.isfinite(info.grad_norm[2])


def test_the_learner_may_depend_on_the_meta_step():
    # An objective that is annealed: the loss of step i is weighted by 1 / (i + 1). One program, traced once.
    traces = []

    def annealed(step):
        traces.append(step)
        return PROBE._replace(objective=lambda params, episode: (params * episode.query.inputs / (step + 1), ()))

    optimizer = optax.sgd(0.1)
    state = init_meta_state(annealed, optimizer, jax.random.key(0), None)
    loop = make_train_loop(annealed, optimizer, numbers, meta_batch_size=4, num_steps=3)
    state, info = loop(state, jax.random.key(1))
    num_traces = len(traces)
    loop(state, jax.random.key(1))
    assert len(traces) == num_traces
    theta = 2.0
    for i in range(3):
        keys = task_keys(jax.random.fold_in(jax.random.key(1), i), 4)
        gradient = jnp.mean(jax.vmap(numbers)(keys).query.inputs) / (i + 1)
        chex.assert_trees_all_close(info.loss[i], theta * gradient, rtol=1e-5)
        theta = theta - 0.1 * gradient


@pytest.mark.parametrize("num_devices", [None, 2])
def test_tasks_may_depend_on_the_parameters_which_are_constants_to_the_gradient(num_devices):
    mesh = None if num_devices is None else parallel.task_mesh(jax.devices()[:num_devices])

    def on_policy(key, params):
        return numbers(key)._replace(query=Batch(params**2, params))

    optimizer = optax.sgd(0.1)
    loop = make_train_loop(PROBE, optimizer, on_policy, meta_batch_size=2, num_steps=2, mesh=mesh)
    state, info = loop(init_meta_state(PROBE, optimizer, jax.random.key(0), None), jax.random.key(1))
    # The objective is θ · stop(θ²): its derivative is θ², not 3 θ². From 2 the next parameter is 2 - 0.4 = 1.6.
    chex.assert_trees_all_close(jax.device_get(info.loss), jnp.array([8.0, 1.6**3]), rtol=1e-6)
    chex.assert_trees_all_close(jax.device_get(state.params), jnp.float32(1.6 - 0.1 * 1.6**2), rtol=1e-6)
    drawn = jax.grad(lambda params: draw_episode(on_policy, jax.random.key(0), params).query.targets)(2.0)
    assert drawn == 0.0


@pytest.mark.parametrize("num_devices", [None, 2])
def test_an_outer_rule_may_use_the_gradient_several_times(num_devices):
    # Two epochs of gradient descent on one meta-batch: the episodes of both are the same.
    mesh = None if num_devices is None else parallel.task_mesh(jax.devices()[:num_devices])

    def update(gradient_fn, params, episodes, count):
        losses = []
        for _ in range(2):
            (loss, info), grads = gradient_fn(params, episodes)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
            losses.append(loss)
        return params, count + 1, {"losses": jnp.stack(losses), "support": info.support}

    rule = OuterRule(lambda params: jnp.int32(0), update)
    state = init_meta_state(PROBE, rule, jax.random.key(0), None)
    loop = make_train_loop(PROBE, rule, numbers, meta_batch_size=4, num_steps=3, mesh=mesh)
    state, info = jax.device_get(loop(state, jax.random.key(1)))
    assert (state.opt_state, state.step) == (3, 3)
    theta = 2.0
    for i in range(3):
        episodes = jax.vmap(numbers)(task_keys(jax.random.fold_in(jax.random.key(1), i), 4))
        slope = jnp.mean(episodes.query.inputs)
        expected = [theta * slope, (theta - 0.1 * slope) * slope]
        chex.assert_trees_all_close(info["losses"][i], jnp.stack(expected), rtol=1e-5)
        chex.assert_trees_all_close(info["support"][i], jnp.mean(episodes.support.inputs), rtol=1e-5)
        theta = theta - 0.2 * slope


def test_an_outer_rule_returns_three_values():
    state = init_meta_state(PROBE, optax.sgd(0.1), jax.random.key(0), None)
    episodes = jax.vmap(numbers)(task_keys(jax.random.key(1), 4))
    for returned, found in (((2.0, ()), "2 values"), (jnp.ones(3), "a .*Array.*")):
        rule = OuterRule(lambda params: (), lambda gradient_fn, params, *_, returned=returned: returned)
        with pytest.raises(ValueError, match=rf"must return \(params, rule_state, info\), got {found}"):
            make_meta_step(PROBE, rule, donate=False)(state, episodes)


def test_images_are_arguments_of_the_compiled_program():
    images = jnp.zeros((40, 20, 32, 32, 1), jnp.uint8)  # 0.8 MB
    sampler = few_shot.make_sampler(images, way=2, shot=1, query_shot=1)
    model = Model(lambda key, inputs: jnp.zeros((1024, 2)), lambda params, x: x.reshape(len(x), -1) @ params)
    learner = maml(
        model, lambda y, t: jnp.mean(y * jax.nn.one_hot(t, 2)), inner_optimizer=optax.sgd(0.1), num_inner_steps=1
    )
    optimizer = optax.sgd(0.1)
    state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((2, 32, 32, 1)))
    for mesh in (None, parallel.task_mesh(jax.devices()[:2])):
        loop = make_train_loop(learner, optimizer, sampler, meta_batch_size=2, num_steps=1, mesh=mesh)
        lowered = loop.lower(state, jax.random.key(1))
        assert len(lowered.as_text()) < 200_000
        assert images.nbytes <= lowered.compile().memory_analysis().argument_size_in_bytes


def test_a_training_loop_may_be_vmapped_over_seeds():
    optimizer = optax.adam(0.05)
    loop = make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=2, num_steps=3, donate=False)

    def run(key):
        return loop(init_meta_state(LEARNER, optimizer, key, jnp.zeros((6, 4))), key)

    keys = jax.random.split(jax.random.key(0), 2)
    states, infos = jax.vmap(run)(keys)
    for i in range(2):
        alone = run(keys[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], (states, infos)), alone, rtol=1e-5, atol=1e-6)


def steps_of(learner, optimizer, **kwargs):
    """One meta-step on one device, over a mesh, and by pmap."""
    mesh = parallel.task_mesh(jax.devices()[:2])
    return {
        "one device": make_meta_step(learner, optimizer, **kwargs).jitted,
        "mesh": make_meta_step(learner, optimizer, mesh=mesh, **kwargs).jitted,
        "pmap": pmap_meta_step(learner, optimizer, devices=jax.devices()[:2], **kwargs),
    }


@pytest.mark.parametrize("where", ["one device", "mesh", "pmap"])
def test_a_meta_step_vmaps_as_many_tasks_as_asked_for(episodes, where):
    def batched_products(chunk_size):
        step = steps_of(LEARNER, optax.sgd(0.1), chunk_size=chunk_size)[where]
        program = str(jax.make_jaxpr(step)(state_of(optax.sgd(0.1)), episodes))
        return sum("0" in axes for axes in re.findall(r"dimension_numbers=\(\(.*?\), \((.*?)\)\)", program))

    assert batched_products(1) == 0
    assert batched_products(3) > 0


@pytest.mark.parametrize("where", ["one device", "mesh", "pmap"])
def test_the_learner_of_the_meta_step_is_used_everywhere(where):
    # The objective of step i is θ · query / (i + 1): from step 4 the gradient is a fifth of the mean query.
    def annealed(step):
        return PROBE._replace(objective=lambda params, episode: (params * episode.query.inputs / (step + 1), ()))

    episodes = jax.vmap(numbers)(jax.random.split(jax.random.key(0), 4))
    state = init_meta_state(annealed, optax.sgd(0.1), jax.random.key(0), None)._replace(step=jnp.int32(4))
    state, _ = steps_of(annealed, optax.sgd(0.1))[where](state, episodes)
    chex.assert_trees_all_close(
        jax.device_get(state.params), jax.device_get(2.0 - 0.1 * jnp.mean(episodes.query.inputs) / 5), rtol=1e-6
    )


def test_a_schedule_starts_at_step_zero():
    def at(step):
        return PROBE._replace(init=lambda key, inputs: jnp.float32(step))

    assert init_meta_state(at, optax.sgd(0.1), jax.random.key(0), None).params == 0.0


def test_a_gradient_that_is_not_finite_is_found_though_the_optimiser_leaves_it_out(episodes):
    learner = PROBE._replace(objective=lambda params, episode: (jnp.sqrt(params - params), ()))
    optimizer = optax.apply_if_finite(optax.sgd(0.1), 5)
    state, info = make_meta_step(learner, optimizer)(
        init_meta_state(learner, optimizer, jax.random.key(0), None), episodes
    )
    assert jnp.isfinite(state.params)
    assert jnp.isfinite(info.loss[()])
    assert not info.finite


def test_an_argument_with_a_default_is_not_the_parameters():
    episode = draw_episode(lambda key, dim=3: make_episode(key, dim=dim), jax.random.key(0), THETA)
    chex.assert_shape(episode.support.inputs, (6, 3))


def test_pmap_refuses_a_chunk_size_when_the_step_is_built():
    with pytest.raises(ValueError, match="chunk_size must be an integer of at least 1, got 0"):
        pmap_meta_step(LEARNER, optax.sgd(0.1), chunk_size=0)


@pytest.mark.parametrize("chunk_size", [1, 2, 6])
def test_an_objective_that_is_no_scalar_is_refused_in_chunks_of_any_size(episodes, chunk_size):
    # A vmap over its values would add them up over the query set.
    learner = maml(
        linear_model, half_mse, lambda y, t: jnp.square(y - t), inner_optimizer=optax.sgd(ALPHA), num_inner_steps=1
    )
    step = make_meta_step(learner, optax.sgd(0.1), chunk_size=chunk_size)
    with pytest.raises(ValueError, match=r"the objective must be a scalar, got shape \(5,\); take the mean"):
        step(state_of(optax.sgd(0.1)), episodes)


def test_what_is_no_learner_is_refused(episodes):
    optimizer = optax.sgd(0.1)
    for learner in ("maml", lambda step: "maml"):
        with pytest.raises(ValueError, match="the learner must be a MetaLearner, got str"):
            make_meta_step(learner, optimizer)(state_of(optimizer), episodes)


def test_the_norm_of_a_float16_gradient_does_not_overflow(episodes):
    learner = PROBE._replace(objective=lambda params, episode: (1e3 * params, ()))
    state = init_meta_state(learner, optax.sgd(1e-3), jax.random.key(0), None)
    state = state._replace(params=state.params.astype(jnp.float16))
    _, info = make_meta_step(learner, optax.sgd(1e-3))(state, episodes)
    chex.assert_trees_all_close(info.grad_norm, jnp.float32(1e3), rtol=1e-3)
    assert info.finite


@pytest.mark.parametrize("donate", [False, True])
def test_over_a_mesh_the_state_is_deleted_only_if_it_is_donated(episodes, donate):
    optimizer, mesh = optax.adam(0.1), parallel.task_mesh(jax.devices()[:2])
    step = make_meta_step(LEARNER, optimizer, mesh=mesh, donate=donate)
    loop = make_train_loop(LEARNER, optimizer, make_episode, meta_batch_size=2, num_steps=1, mesh=mesh, donate=donate)
    for program, argument in ((step, episodes), (loop, jax.random.key(0))):
        state = state_of(optimizer)
        program(state, argument)
        assert state.params.is_deleted() == donate
