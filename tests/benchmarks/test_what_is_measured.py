"""Benchmarks measure what their results say: the parts that no table would show to be exchanged."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import common, devices, memory, meta_step, methods, orders, sinusoid
from experiments.runs import streams
from maml_jax import Model, losses, models
from maml_jax import tasks as distributions
from maml_jax.cost import Cost
from maml_jax.types import Batch, Evaluation, task_keys


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    return now


def test_a_time_includes_waiting_for_the_results(clock, monkeypatch):
    def wait(result):
        clock[0] += 5.0

    monkeypatch.setattr(jax, "block_until_ready", wait)
    assert common.seconds_of(lambda: None) == 5.0


# First and second order

SMALL = {
    "sinusoid_steps": 4, "sinusoid_seeds": 2, "sinusoid_tasks": 3, "sinusoid_compared_tasks": 4, "parts": 2,
    "eval_episodes": 5, "curve_episodes": 6, "features": (3, 1),
}  # fmt: skip


def test_both_orders_train_and_are_tested_on_the_same_tasks_and_compared_on_fresh_ones_where_maml_is(
    clock, monkeypatch
):
    config, called, tested, compared, compiled = orders.Config(**SMALL), [], [], [], []

    def compile_of(function, *args):
        # A call adds 1 to the parameters in place of the second order, 2 in place of the first, and takes 8 or 16 s.
        number = len(compiled) + 1
        compiled.append(number)

        def program(state, key, *data):
            called.append((number, key))
            clock[0] += 8.0 * number
            return state._replace(params=jax.tree.map(lambda x: x + number, state.params)), None

        return program, 0.5

    def score(work, learner, params, key, num_episodes):
        tested.append((params, key, num_episodes))
        return {"mean": 0.0}

    def compare(params, *episodes):
        compared.append((params, episodes))
        return orders.Alignment(0.5, 0.5, 0.5)

    monkeypatch.setattr(common, "compile_of", compile_of)
    monkeypatch.setattr(orders, "score", score)
    monkeypatch.setattr(orders, "alignment_fn", lambda learners, mesh: compare)
    monkeypatch.setattr(orders, "cost_on_one_device", lambda work, learner: Cost(1.0, 1))
    monkeypatch.setattr(orders, "mesh_for", lambda num_tasks: None)
    work = orders.workload("sinusoid", config)
    row = orders.train_in_turns(work, 1, 0.001, config)

    def same(a, b):
        return np.array_equal(*map(jax.random.key_data, (a, b)))

    assert [number for number, _ in called] == [1, 2] * 4
    tested, compared = iter(tested), iter(compared)
    draw = jax.jit(lambda key: jax.vmap(work.samplers["train"])(task_keys(key, 4)))
    for seed in range(2):
        keys = streams(seed)
        assert all(same(key, keys.train) for _, key in called[4 * seed : 4 * seed + 4])
        for part in range(3):
            curve = [next(tested) for _ in orders.ORDERS]
            assert all(same(key, keys.tune) and count == 6 for _, key, count in curve)
            (of_maml, _, _), (of_fomaml, _, _) = curve
            if part == 0:
                start = of_maml
            for params, number in ((of_maml, 1), (of_fomaml, 2)):
                chex.assert_trees_all_close(params, jax.tree.map(lambda x, n=number * part: x + n, start), rtol=1e-5)
            params, episodes = next(compared)
            chex.assert_trees_all_equal(params, of_maml)
            for fresh, key in zip(episodes, jax.random.split(jax.random.fold_in(keys.val, part)), strict=True):
                np.testing.assert_array_equal(fresh.support.inputs, draw(key).support.inputs)
        for last in (of_maml, of_fomaml):
            params, key, count = next(tested)
            chex.assert_trees_all_equal(params, last)
            assert same(key, keys.test)
            assert count == 5
    # A call has two meta-steps.
    assert row["orders"]["second order"]["seconds"] == common.Timing(4.0, 4.0, 4.0, 8 // 2)
    assert row["orders"]["second order"]["times_first_order"].median == 0.5
    assert row["orders"]["first order"]["seconds"].median == 8.0


def test_a_score_of_an_order_is_that_after_the_last_inner_step(monkeypatch):
    found = Evaluation(*(np.array([9.0, 8.0, number]) for number in (1.0, 2.0, 0.0, 3.0, 4.0, 5.0)))
    monkeypatch.setattr(orders, "evaluate", lambda *_, **__: found)
    work = orders.workload("sinusoid", orders.Config(**SMALL))
    assert orders.score(work, None, {}, None, 4) == {"mean": 1.0, "ci95": 2.0, "num_nonfinite": 3, "finite_median": 5.0}


def test_the_lines_of_the_orders_are_those_of_their_names():
    def of_order(number):
        cost = {"seconds": common.Timing(number, number, number, 1), "temporary_bytes": 1e6 * number}
        score = {"mean": 10 * number, "ci95": 0.5, "finite_median": 20 * number}
        return cost, score, [score, score]

    (exact, exact_score, exact_curve), (first, first_score, first_curve) = of_order(1.0), of_order(2.0)
    training = {
        "scores": {"second order": exact_score, "first order": first_score},
        "curves": {"second order": exact_curve, "first order": first_curve},
        "meta_steps": [0, 4], "cosine": [0.9, 0.8], "noise_cosine": [0.7, 0.6],
    }  # fmt: skip
    row = {"inner_steps": 5, "trainings": [training], "orders": {"second order": exact, "first order": first}}
    content = {"metric": "mean squared error", "meta_steps": 4, "tasks": 3, "rows": [row]}
    column = Figure().subplots(5, 1)
    orders._draw_column(column, "sinusoid", content)
    scores, curves, seconds, memory_axes, cosine = column
    values = {name: float(line.get_ydata()[0]) for line, name in zip(*scores.get_legend_handles_labels(), strict=True)}
    assert values == {"second order (MAML)": 10.0, "first order (FOMAML)": 20.0}
    assert [float(container.lines[0].get_ydata()[0]) for container in seconds.containers] == [1000.0, 2000.0]
    assert [line.get_ydata()[0] for line in memory_axes.get_lines()] == [1.0, 2.0]
    # A task with a huge error would hide the others in a mean, so the curve is that of medians.
    dashes = {"-": 0, "--": 1, ":": 1}
    for axes, expected in ((curves, [[20.0, 20.0], [40.0, 40.0]]), (cosine, [[0.9, 0.8], [0.7, 0.6]])):
        for line in axes.get_lines()[:2]:
            assert list(line.get_xdata()) == [0, 4]
            assert list(line.get_ydata()) == expected[dashes[line.get_linestyle()]]


def test_orders_train_and_test_on_characters_of_their_own_split(monkeypatch):
    monkeypatch.setattr(orders.omniglot, "load", lambda split: split)
    monkeypatch.setattr(orders.few_shot, "make_sampler", lambda images, **settings: (images, settings))
    work = orders.workload("omniglot", orders.Config(omniglot_query_shot=3))
    sizes = {"way": 5, "shot": 1, "query_shot": 3}
    assert work.samplers == {split: (split, sizes | {"rotations": split == "train"}) for split in ("train", "test")}


def test_offsets_of_the_normalisation_do_not_adapt_in_the_comparison_of_orders():
    model = Model(
        lambda key, inputs: {"norm_0": jnp.zeros(()), "head": jnp.zeros(())},
        lambda params, inputs: params["head"] * inputs + params["norm_0"],
    )
    work = orders.Workload(model, losses.mean_squared_error, losses.mean_squared_error, "", {}, (0.3,), 1, 1, 1, 1)
    support = Batch(jnp.ones((2, 1)), jnp.full((2, 1), 3.0))
    for order in orders.ORDERS:
        learner = orders.learner_of(work, 1, 0.3, order)
        adapted, _ = learner.adapt(learner.init(jax.random.key(0), support.inputs), support)
        assert adapted["norm_0"] == 0.0 != adapted["head"]


def test_the_cost_of_an_order_is_that_of_the_tasks_of_a_meta_step(monkeypatch):
    monkeypatch.setattr(orders, "cost_of", lambda function, params, episodes: episodes)
    work = orders.workload("sinusoid", orders.Config(**SMALL))
    episodes = orders.cost_on_one_device(work, orders.learner_of(work, 1, 0.001, "first order"))
    assert episodes.support.inputs.shape == (3, 10, 1)


# Methods


def test_times_of_methods_are_those_of_one_meta_step_and_costs_are_relative_to_fomaml(monkeypatch):
    counted = {"fomaml": {"flops": 10.0, "temporary_bytes": 4}, "maml": {"flops": 30.0, "temporary_bytes": 2}}
    seconds = {"fomaml": [2.0, 4.0, 6.0], "maml": [6.0, 8.0, 10.0]}
    monkeypatch.setattr(methods, "prepare", lambda name, config: (name, dict(counted[name])))
    monkeypatch.setattr(common, "measure_alternately", lambda calls, config: seconds)
    _, row = methods.measure(methods.Config(workload="sinusoid", methods=("maml",), sinusoid_steps=4))
    assert row["seconds"] == common.summarise([1.5, 2.0, 2.5])
    assert row["times_fomaml"] == common.summarise([3.0, 2.0, 10 / 6])
    assert (row["flops_times_fomaml"], row["temporary_bytes_times_fomaml"]) == (3.0, 0.5)


def test_a_call_of_a_method_on_sinusoids_has_the_meta_steps_that_its_time_is_divided_by(monkeypatch):
    monkeypatch.setattr(methods, "count_flops", lambda *args: 1.0)
    monkeypatch.setattr(methods, "temporary_bytes", lambda *args: 1)
    config = methods.Config(workload="sinusoid", num_tasks=1, sinusoid_steps=3)
    call, _ = methods.prepare("fomaml", config)
    assert methods.steps_of_call(config) == int(call()[0].step) == 3


def test_the_figure_of_methods_has_times_beside_operations(monkeypatch, tmp_path):
    drawn, time = {}, common.Timing(3.0, 2.0, 4.0, 5)
    row = {
        "method": "maml",
        "inner_steps": 1,
        "seconds": time,
        "times_fomaml": time,
        "flops": 1e9,
        "temporary_bytes": 1,
    }
    row |= {"flops_times_fomaml": 2.5, "temporary_bytes_times_fomaml": 1.5}
    monkeypatch.setattr(methods, "measure", lambda config: [row])
    monkeypatch.setattr(common, "draw_points", lambda axes, values, label: drawn.update({label: values}))
    methods.run(methods.Config(results_dir=tmp_path))
    assert drawn == {
        "time of a meta-step, relative to FOMAML": {"MAML": 3.0},
        "FLOPs of a meta-step, relative to FOMAML": {"MAML": 2.5},
    }


# Meta-steps


def test_rates_of_operations_are_those_of_the_median_beside_a_product_of_matrices(monkeypatch):
    prepared = meta_step.Prepared(lambda: None, {"flops": 6.0, "devices": 2}, "")
    seconds = {"a": [1.0, 2.0, 9.0], "b": [2.0, 6.0, 9.0], meta_step.PEAK: [0.5, 0.25, 0.125]}
    monkeypatch.setattr(meta_step, "prepare", lambda case: prepared)
    monkeypatch.setattr(common, "measure_alternately", lambda calls, config: seconds)
    config = meta_step.Config(matmul_size=4)
    rows = meta_step.run_cases({"a": meta_step.Case(), "b": meta_step.Case()}, "a", config)
    assert [row["flops_per_second"] for row in rows.values()] == [3.0, 1.0]
    assert rows["b"]["times_reference"] == common.summarise([2.0, 3.0, 1.0])
    # 4 x 4 numbers, each a sum of four products: 2 · 4³ operations.
    assert [row["matmul_flops_per_second"] for row in rows.values()] == [128 / 0.25] * 2


def test_the_distance_of_a_precision_is_relative_to_the_gradient_in_the_first(monkeypatch):
    gradients = {"float32": {"w": jnp.array([3.0, 4.0])}, "bfloat16": {"w": jnp.array([3.0, 5.0])}}
    monkeypatch.setattr(meta_step, "run_cases", lambda named, *args: {name: {} for name in named})
    monkeypatch.setattr(meta_step, "first_gradient", lambda case: gradients[case.precision])
    rows = meta_step.precisions(meta_step.Config(precision=("float32", "bfloat16")))
    assert [row["gradient_distance"] for row in rows] == pytest.approx([0.0, 0.2])


def test_the_other_program_of_the_headline_computes_all_tasks_in_one_vmap(monkeypatch):
    monkeypatch.setattr(meta_step, "run_cases", lambda named, reference, config: (named, reference))
    named, reference = meta_step.headline(meta_step.Config(meta_batch_size=(12,)))
    assert reference == meta_step.OURS
    assert named[reference] == meta_step.Case(meta_batch_size=12)
    assert named[meta_step.ONE_VMAP] == meta_step.Case(
        meta_batch_size=12, convolution="conv_lax", chunk_size=12, on_mesh=False
    )


@pytest.mark.parametrize("precision", ["float32", "tensorfloat32", "bfloat16"])
def test_a_program_is_compiled_in_the_precision_of_its_case(monkeypatch, precision):
    given = []

    def compile_of(function, *args):
        given.append(str(jax.config.jax_default_matmul_precision))
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=7), as_text=str), 0.5

    monkeypatch.setattr(meta_step.models, "conv4", lambda **_: models.mlp(features=(5,)))
    monkeypatch.setattr(meta_step, "count_flops", lambda *_: 1.0)
    monkeypatch.setattr(common, "compile_of", compile_of)
    meta_step.prepare(meta_step.Case(meta_batch_size=1, query_shot=1, on_mesh=False, precision=precision))
    assert given == [str(meta_step.matmul_algorithm(precision))]


# Sinusoids


def test_times_and_counts_of_a_loop_are_those_of_one_meta_step(monkeypatch):
    class Program:
        def as_text(self):
            return ""

    monkeypatch.setattr(common, "measure", lambda call, config: common.Timing(8.0, 4.0, 12.0, 5))
    monkeypatch.setattr(common, "compile_of", lambda *args: (Program(), 0.5))
    monkeypatch.setattr(sinusoid, "count_ops", lambda program: 20)
    monkeypatch.setattr(sinusoid, "count_flops", lambda *args: 12.0)
    row = sinusoid.compiled_loop(sinusoid.Config(features=(3, 1), steps_per_call=4), None)
    assert row["seconds_per_step"] == common.Timing(2.0, 1.0, 3.0, 5)
    assert (row["steps_per_second"], row["ops_per_step"], row["flops_per_step"]) == (0.5, 5.0, 3.0)


def test_tasks_of_the_host_are_sinusoids_of_the_experiment():
    tasks = sinusoid.sample_on_host(np.random.default_rng(0), sinusoid.Config(meta_batch_size=50))
    for task in range(50):
        (x, y), (query_x, query_y) = (
            (np.asarray(part.inputs[task, :, 0], float), part.targets[task, :, 0])
            for part in (tasks.support, tasks.query)
        )
        # A sin(x - p) is A cos(p) sin(x) - A sin(p) cos(x), and both sets of a task have one A and one p.
        found, *_ = np.linalg.lstsq(np.stack([np.sin(x), np.cos(x)], 1), y, rcond=None)
        np.testing.assert_allclose(np.stack([np.sin(query_x), np.cos(query_x)], 1) @ found, query_y, atol=1e-4)
        low, high = distributions.sinusoid.AMPLITUDES
        assert low <= np.hypot(*found) + 1e-4 <= high + 2e-4
        phase = np.arctan2(-found[1], found[0])
        low, high = distributions.sinusoid.PHASES
        assert low - 1e-3 <= phase <= high + 1e-3


def test_a_loop_in_python_takes_the_meta_steps_that_its_time_is_divided_by(monkeypatch):
    taken = []

    def compiled(state, episodes):
        taken.append(episodes.support.inputs.shape)
        return state, None

    monkeypatch.setattr(common, "compile_of", lambda *args: (compiled, 0.5))
    monkeypatch.setattr(sinusoid, "timed", lambda call, num_steps, config: {"call": call(), "num_steps": num_steps})
    row = sinusoid.jitted_steps(sinusoid.Config(meta_batch_size=2, shot=4, features=(3, 1), python_steps=6))
    assert row["num_steps"] == 6
    assert taken == [(2, 4, 1)] * 6


def test_the_sampling_alone_draws_the_tasks_of_all_meta_steps(monkeypatch):
    monkeypatch.setattr(sinusoid, "timed", lambda call, num_steps, config: {"total": call(), "num_steps": num_steps})
    config = sinusoid.Config(meta_batch_size=2, shot=4, steps_per_call=3, python_steps=5)
    row = sinusoid.sampling_alone(config)
    sampler, total = distributions.sinusoid.make_sampler(shot=4, query_shot=4), 0.0
    for step in range(3):
        episodes = jax.vmap(sampler)(task_keys(jax.random.fold_in(jax.random.key(0), step), 2))
        total += sum(float(leaf.sum()) for leaf in jax.tree.leaves((episodes.support, episodes.query)))
    assert row["num_steps"] == 3
    assert float(row["total"]) == pytest.approx(total, rel=1e-4)


# Devices


def test_the_speed_of_devices_is_relative_to_the_first_number_of_the_same_round(monkeypatch):
    rounds = iter([[8.0, 8.0], [2.0, 6.0], [4.0, 4.0], [5.0, 5.0]])  # one device, two, and both again

    def in_own_process(count, config):
        found = {"compile_seconds": 1.0, "flops": 1.0, "parameters": 1, "seconds": next(rounds)}
        return {"sinusoid": found | {"all_reduce_seconds": None if count == 1 else 0.25}}

    monkeypatch.setattr(devices, "ROUNDS", 2)
    monkeypatch.setattr(devices, "in_own_process", in_own_process)
    found = devices.run_workloads(devices.Config(workload=("sinusoid",), devices=(1, 2)))["sinusoid"]
    one, two = found["rows"]
    assert one["times_first"] == common.summarise([1.0, 1.0])
    assert two["times_first"] == common.summarise([2.0, 0.8])
    assert two["seconds"] == common.summarise([2.0, 6.0, 5.0, 5.0])
    assert two["steps_per_second"] == common.summarise([1 / 2, 1 / 6, 1 / 5, 1 / 5])
    assert two["all_reduce_seconds"] == common.summarise([0.25, 0.25])


def test_times_on_devices_are_those_of_one_meta_step_whose_tasks_are_vmapped_together(monkeypatch):
    made, make_train_loop = {}, devices.make_train_loop

    def record(*args, **settings):
        made.update(settings)
        return make_train_loop(*args, **settings)

    monkeypatch.setattr(devices, "mesh_of", lambda count: None)
    monkeypatch.setattr(devices, "all_reduce", lambda *args: None)
    monkeypatch.setattr(devices, "count_flops", lambda *args: 1.0)
    monkeypatch.setattr(devices, "make_train_loop", record)
    monkeypatch.setattr(common, "compile_of", lambda *args: (None, 0.5))
    monkeypatch.setattr(common, "measure_alternately", lambda calls, config: {name: [8.0, 4.0] for name in calls})
    found = devices.time_on(4, devices.Config(workload=("sinusoid",), sinusoid_steps=4))["sinusoid"]
    assert found["seconds"] == [2.0, 1.0]
    assert (made["meta_batch_size"], made["num_steps"], made["chunk_size"]) == (32, 4, 8)


def test_the_time_of_an_all_reduce_is_that_of_one_of_the_size_of_the_gradient(monkeypatch):
    given = []
    monkeypatch.setattr(common, "compile_of", lambda function, *args: given.append(args) or (None, 0.5))
    monkeypatch.setattr(common, "measure", lambda call, config: common.Timing(6.0, 5.0, 7.0, 3))
    assert devices.all_reduce(5, 2, devices.Config(all_reduces=12)) == 0.5
    assert given[0][1].addressable_shards[0].data.shape == (5,)


# Memory


def test_derivatives_are_timed_with_the_inner_steps_of_the_settings(monkeypatch):
    given = []

    def meta_gradient_of(name, depth, inner_steps, derivative):
        given.append((inner_steps, derivative))
        return Model(lambda key, inputs: {}, None), derivative

    def measure(calls, config):
        return {name: [float(call() == name)] for name, call in calls.items()}

    monkeypatch.setattr(memory, "meta_gradient_of", meta_gradient_of)
    monkeypatch.setattr(common, "compile_of", lambda function, *args: (lambda *args: function, 0.5))
    monkeypatch.setattr(common, "measure_alternately", measure)
    row = memory.time_derivatives("mlp", memory.Config(inner_steps=(1, 2), depth_inner_steps=7))
    assert given == [(7, derivative) for derivative in memory.DERIVATIVES]
    assert row["inner_steps"] == 7
    assert {timing.median for timing in row["seconds"].values()} == {1.0}, "each derivative has its own program"


# Mistakes


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (common.Settings, {"max_repetitions": 0}, "--max-repetitions must be an integer of at least 1, got 0"),
        (orders.Config, {"workload": ()}, "--workload needs at least one value"),
        (orders.Config, {"inner_steps": ()}, "--inner-steps needs at least one value"),
        (orders.Config, {"omniglot_tasks": 0}, "--omniglot-tasks must be an integer of at least 1, got 0"),
        (meta_step.Config, {"chunk_size": ()}, "--chunk-size needs at least one value"),
        (memory.Config, {"networks": ()}, "--networks needs at least one value"),
        (devices.Config, {"devices": ()}, "--devices needs at least one value"),
        (methods.Config, {"max_repetitions": 0}, "--max-repetitions must be"),
    ],
)
def test_settings_that_leave_nothing_to_measure_are_refused_before_anything_is_compiled(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
