import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import benchmarks
from benchmarks import (
    breakdown,
    common,
    devices,
    memory,
    meta_step,
    methods,
    navigation,
    orders,
    peers,
    report,
    sinusoid,
    surrogates,
)
from experiments.runs import RunError
from maml_jax import Batch, Episode, models
from maml_jax.cost import count_flops
from maml_jax.models.layers import Conv

# What the benchmarks do


def test_summary_is_median_and_quartiles():
    assert common.summarise([4.0, 1.0, 2.0, 3.0, 5.0]) == common.Timing(3.0, 2.0, 4.0, 5)
    assert common.summarise([0.25]) == common.Timing(0.25, 0.25, 0.25, 1)
    assert str(common.Timing(0.0125, 0.01, 0.02, 9)) == "12.5 (10-20)"


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    return now


def test_measure_warms_up_and_stops(clock):
    durations = iter([100.0, 1.0, 2.0, 3.0, 50.0])

    def call():
        clock[0] += next(durations)

    assert common.measure(call, common.Settings(max_repetitions=3, max_seconds=99)) == common.Timing(2.0, 1.5, 2.5, 3)
    durations = iter([100.0, 4.0, 4.0, 4.0])
    assert common.measure(call, common.Settings(max_repetitions=9, max_seconds=8.0)).repetitions == 2
    durations = iter([100.0, 30.0])
    assert common.measure(call, common.Settings(max_repetitions=9, max_seconds=8.0)).repetitions == 1


def test_alternation_takes_turns_and_spares_the_slow(clock):
    order = []

    def call_of(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds

        return call

    calls = {"a": call_of("a", 1.0), "slow": call_of("slow", 40.0), "b": call_of("b", 2.0)}
    seconds = common.measure_alternately(calls, common.Settings(max_repetitions=3, max_seconds=30.0))
    assert seconds == {"a": [1.0] * 3, "slow": [40.0], "b": [2.0] * 3}
    assert "".join(order[3:]) == "aslowb" + "ba" + "ab"  # every second round is reversed


def test_results_of_other_settings_are_not_replaced(tmp_path):
    config = devices.Config(results_dir=tmp_path, width=64)
    common.check_not_replaced("devices", config)
    common.write_results("devices", config, {})
    common.check_not_replaced("devices", dataclasses.replace(config, max_seconds=1.0, max_repetitions=2))
    common.check_not_replaced("devices", dataclasses.replace(config, width=32, short=True))
    with pytest.raises(RunError, match=r"devices\.json has results of other settings: width is 64 there and 32 here"):
        common.check_not_replaced("devices", dataclasses.replace(config, width=32))


RECORDED = {
    file.stem: json.loads(file.read_text())["command"]
    for file in Path(benchmarks.__file__).parent.joinpath("results").glob("*.json")
    if not file.stem.startswith("accelerator")
}


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_command_measures_anew(name):
    module, *flags = RECORDED[name].split()[2:]
    module = importlib.import_module(module)
    config = tyro.cli(module.Config, args=flags, default=module.Config())
    stem = module.__name__.rpartition(".")[2]
    common.check_not_replaced(stem, config, suffix=name.removeprefix(stem))


def test_a_ratio_is_one_of_rounds_or_of_a_single_call_to_the_median():
    assert common.ratios([2.0, 6.0, 8.0], [1.0, 2.0, 2.0]) == common.Timing(3.0, 2.5, 3.5, 3)
    assert common.ratios([30.0], [1.0, 2.0, 9.0]) == common.Timing(15.0, 15.0, 15.0, 1)


def test_stepping_leaves_the_state_it_was_given():
    step = jax.jit(lambda state, x: (state + x, state), donate_argnums=0)
    state = jnp.zeros(3)
    call = common.stepping(step, state, jnp.ones(3))
    call()
    np.testing.assert_array_equal(call()[0], 2.0)
    np.testing.assert_array_equal(state, 0.0)


def test_operations_of_a_compiled_program():
    # Seven times a product and a fusion after it.
    def loop(a):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ a) * 2, None), a, length=7)[0]

    def ops(function):
        return sinusoid.count_ops(jax.jit(function).lower(jnp.ones((4, 4))).compile().as_text())

    once = ops(lambda a: jnp.tanh(a @ a) * 2)
    assert once == 2
    assert 7 * once <= ops(loop) <= 7 * (once + 2)  # the loop also counts its iterations and copies its arguments
    with pytest.raises(ValueError, match="unknown length"):
        ops(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c + a, a))


def test_sweep_varies_each_setting_alone():
    config = meta_step.Config()
    cases = list(meta_step.cases(config, 2))
    assert len(cases) == len(set(cases))
    names = ("derivative", "inner_steps", "meta_batch_size", "shot", "convolution", "chunk_size")
    # What differs from the first values: one setting, or two that are thought to interact.
    changed = [{name for name in names if getattr(case, name) != getattr(config, name)[0]} for case in cases]
    interacting = {"derivative", "inner_steps"}, {"convolution", "chunk_size"}
    assert all(len(changes) <= 1 or changes in interacting for changes in changed)
    for name in names:
        alone = [case for case, changes in zip(cases, changed, strict=True) if changes <= {name}]
        assert {getattr(case, name) for case in alone} == set(getattr(config, name))
    # A device has 16 of 32 tasks, or 4 of 8. Chunks need not divide them, and larger chunks are the same program.
    crossed = list(meta_step.cases(dataclasses.replace(config, cross=True, chunk_size=(1, 2, 3, 8, 16)), 2))
    assert len(crossed) == 3 * 3 * (5 + 3) * 2 * 2
    assert {case.chunk_size for case in crossed if case.meta_batch_size == 8} == {1, 2, 3}


def test_chunks_are_at_most_the_tasks_of_a_device():
    # Of 12 devices 32 tasks use 8, with 4 tasks each.
    config = dataclasses.replace(meta_step.Config(), chunk_size=(1, 4, 8), meta_batch_size=(32,))
    assert {case.chunk_size for case in meta_step.cases(config, 12)} == {1, 4}
    with pytest.raises(RunError, match="--chunk-size 8 is more tasks than one of 12 devices has"):
        list(meta_step.cases(dataclasses.replace(config, chunk_size=(8,)), 12))


def test_gradient_distance():
    reference = {"a": np.array([3.0]), "b": np.array([[0.0, 4.0]])}
    assert peers.distance(reference, reference) == 0.0
    assert peers.distance({"b": np.array([[0.0, 4.0]]), "a": np.array([4.0])}, reference) == pytest.approx(0.2)


def test_the_model_of_devices_divides_the_computation_over_what_there_is():
    first = {"devices": 1, "seconds": common.Timing(0.4, 0.4, 0.4, 1), "all_reduce_seconds": None}
    eighth = {"devices": 8, "all_reduce_seconds": common.Timing(0.01, 0.01, 0.01, 1)}
    assert devices.model_seconds(first, first, processors=2) == 0.4
    assert devices.model_seconds(eighth, first, processors=2) == pytest.approx(0.4 / 2 + 0.01)
    assert devices.model_seconds(eighth, first, processors=16) == pytest.approx(0.4 / 8 + 0.01)


def test_unequal_gradients_end_the_comparison():
    peers.check({"a": 0.0, "b": 1e-5}, 1e-4)
    with pytest.raises(peers.RunError, match=r"further than 0.0001 .* \{'b': 0.001, 'c': nan\}"):
        peers.check({"a": 0.0, "b": 1e-3, "c": float("nan")}, 1e-4)


def test_peers_on_a_cpu_are_not_compared_with_jax_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(peers.RunError, match="the peers run on the CPU and JAX on gpu; set JAX_PLATFORMS=cpu"):
        peers.installed_peers()
    assert sinusoid.torch_loop(sinusoid.Config()) is None
    assert navigation.in_torch(None) is None


def test_the_home_directory_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.results_folder(common.Settings(results_dir=Path("~/found"))) == tmp_path / "found"


# Each runs, at its smallest


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Settings of one repetition. Programs are compiled without optimisation of the machine code."""

    def compile_of(function, *args):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        return jitted.lower(*args).compile({"xla_backend_optimization_level": 0}), 0.5

    monkeypatch.setattr(common, "compile_of", compile_of)
    return {"max_repetitions": 1, "max_seconds": 5.0, "results_dir": tmp_path}


def result_of(name, folder):
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"]
    assert found["config"].get("max_repetitions", 1) == 1
    return common.read_results(folder / f"{name}.json")


@pytest.mark.slow
def test_a_language_model_needs_less_with_mixed_mode_and_less_still_with_remat(quick, monkeypatch):
    monkeypatch.setattr(memory, "LANGUAGE_MODEL", memory.GPT(vocabulary=16, context=32, width=8, depth=2, heads=2))
    derivatives = {name: memory.DERIVATIVES[name] for name in ("reverse_over_reverse", "mixed_mode")}
    monkeypatch.setattr(memory, "DERIVATIVES", derivatives)
    rows = memory.run_language_model(memory.Config(**quick, language_model_sequences=4, depth_inner_steps=3))
    (reverse, mixed), (reverse_remat, mixed_remat) = (
        [row["temporary_bytes"] for row in rows if row["remat"] is remat] for remat in (False, True)
    )
    assert 2 * mixed < reverse
    assert 2 * mixed_remat < reverse_remat < reverse
    assert mixed_remat < mixed


def test_the_language_model_does_not_see_later_tokens():
    model = models.from_linen(memory.GPT(vocabulary=9, context=6, width=4, depth=2, heads=2))
    tokens = jnp.array([[1, 2, 3, 4, 5, 6]])
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    apply = jax.jit(model.apply)
    changed = apply(params, tokens.at[0, 4].set(0)) - apply(params, tokens)
    np.testing.assert_array_equal(changed[:, :4], 0.0)
    assert np.all(np.any(changed[0, 4:] != 0, axis=-1))


def test_mixed_mode_and_remat_do_not_change_the_meta_gradient_of_the_language_model(x64):
    module = memory.GPT(vocabulary=9, context=6, width=4, depth=2, heads=2)
    texts = jnp.array([[1, 2, 3, 4, 5, 6], [6, 8, 1, 0, 2, 7]])
    episode = Episode(*(Batch(text[None], jnp.roll(text, -1)[None]) for text in texts))
    params = models.from_linen(module).init(jax.random.key(0), texts[:1])
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    plain, ours = (
        jax.jit(memory.gradient_of(models.from_linen(module.clone(remat=remat)), 2, derivative))(params, episode)[0]
        for remat, derivative in ((False, "reverse_over_reverse"), (True, "mixed_mode"))
    )
    chex.assert_trees_all_close(ours, plain, rtol=1e-9, atol=1e-12)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(plain))


class OneBlock(nn.Module):
    """The first of the four blocks of conv4, and its head. It compiles in a fraction of the time."""

    way: int
    features: int
    conv_fn: object = meta_step.conv_matmul

    @nn.compact
    def __call__(self, inputs):
        hidden = Conv(self.features, strides=(2, 2), conv_fn=self.conv_fn, name="conv_0")(inputs)
        hidden = nn.relu(models.BatchStatNorm(name="norm_0")(hidden))
        return nn.Dense(self.way, name="head")(hidden.mean((1, 2)))


@pytest.fixture
def small_network(monkeypatch):
    monkeypatch.setattr(meta_step.models, "conv4", lambda **settings: models.from_linen(OneBlock(**settings)))


def test_meta_step_runs(quick, tmp_path, small_network):
    config = meta_step.Config(
        **quick,
        filters=2,
        query_shot=1,
        derivative=("mixed_mode", "first_order"),
        inner_steps=(1,),
        meta_batch_size=(2,),
        shot=(1,),
        convolution=("conv_matmul",),
        chunk_size=(1,),
        precision=("float32", "bfloat16"),
        matmul_size=32,
    )
    meta_step.run(config)
    found = result_of("meta_step", tmp_path)
    exact, first_order = found["rows"]
    assert exact["times_reference"].median == exact["seconds"].median / first_order["seconds"].median
    assert exact["flops"] > first_order["flops"]
    on_mesh, ours, one_vmap = found["headline"].values()
    assert (ours["devices"], on_mesh["devices"]) == (1, 2)
    assert found["speed_up"] == one_vmap["seconds"].median / on_mesh["seconds"].median
    assert [row["gradient_distance"] < 0.1 for row in found["precisions"]] == [True, True]
    # The convolution as a matrix product also multiplies the padding.
    assert one_vmap["flops"] < ours["flops"] < 1.5 * one_vmap["flops"]


def test_memory_runs(quick, tmp_path, monkeypatch):
    monkeypatch.setitem(memory.NETWORKS, "mlp", dataclasses.replace(memory.NETWORKS["mlp"], depth=1, depths=(1, 2)))
    config = memory.Config(
        **quick, networks=("mlp",), inner_steps=(9,), depth_inner_steps=9, shot=40, language_model_sequences=0
    )
    memory.run(config)
    found = result_of("memory", tmp_path)
    bytes_of = {(row["depth"], row["inner_steps"], row["derivative"]): row["temporary_bytes"] for row in found["rows"]}
    assert len(bytes_of) == len(found["rows"]) == 4 * 2  # depth 1 is in both sweeps
    for depth in (1, 2):
        reverse, checkpointed, mixed, first = (bytes_of[depth, 9, derivative] for derivative in memory.DERIVATIVES)
        # With 200 examples the activations outweigh the parameters, and only reverse over reverse keeps them.
        assert first < mixed < reverse
        assert checkpointed < reverse


def test_orders_run(quick, tmp_path):
    config = orders.Config(
        **quick,
        workload=("sinusoid",),
        inner_steps=(2,),
        sinusoid_inner_lr=(0.01,),
        omniglot_inner_lr=(0.4,),
        sinusoid_steps=4,
        sinusoid_seeds=2,
        sinusoid_tasks=3,
        sinusoid_compared_tasks=3,
        parts=2,
        eval_episodes=3,
        curve_episodes=2,
        features=(3, 1),
    )
    orders.run(config)
    assert {file.name for file in tmp_path.glob("*.json")} == {"orders.json"}
    (row,) = result_of("orders", tmp_path)["workloads"]["sinusoid"]["rows"]
    exact, first = (row["orders"][order] for order in orders.ORDERS)
    assert exact["flops"] > 1.5 * first["flops"]
    assert exact["temporary_bytes"] > first["temporary_bytes"]
    assert first["times_first_order"] == common.Timing(1.0, 1.0, 1.0, 4)
    assert len({training["scores"][order]["mean"] for training in row["trainings"] for order in orders.ORDERS}) == 4
    for training in row["trainings"]:
        assert training["meta_steps"] == [0, 2, 4]
        assert len(set(training["cosine"])) == len(set(training["noise_cosine"])) == 3
        exact, first = ([score["mean"] for score in training["curves"][order]] for order in orders.ORDERS)
        assert exact[0] == first[0], "both orders start from the same parameters"
        assert len({*exact, *first}) == 5
        assert max(map(abs, training["cosine"] + training["noise_cosine"])) <= 1


def test_an_interrupted_comparison_keeps_what_is_finished_and_the_earlier_results(quick, tmp_path, monkeypatch):
    def one_row(work, inner_steps, inner_lr, config):
        if inner_steps == 5:
            raise KeyboardInterrupt
        return {"inner_steps": inner_steps}

    monkeypatch.setattr(orders, "train_in_turns", one_row)
    (tmp_path / "orders.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        orders.run(
            orders.Config(**quick, workload=("sinusoid",), inner_steps=(1, 5), sinusoid_inner_lr=(0.01, 0.01),
                          omniglot_inner_lr=(0.4, 0.4))
        )  # fmt: skip
    assert (tmp_path / "orders.json").read_text() == "{}"
    partial = json.loads((tmp_path / "orders_partial.json").read_text())
    assert partial["workloads"]["sinusoid"]["rows"] == [{"inner_steps": 1}]


@pytest.mark.parametrize("module", [devices, memory, orders])
def test_the_help_of_a_benchmark_fits_the_terminal(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        common.main(module.Config, module.run, module.__doc__, module.SHORT)
    assert stopped.value.code == 0
    about = capsys.readouterr().out.partition("options")[0]
    assert module.__doc__.split()[0] in about
    assert max(map(len, about.splitlines())) <= 80


def test_a_directory_that_cannot_be_written_is_noticed_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.setattr(sys, "argv", ["orders", "--results-dir", str(tmp_path / "file" / "results")])
    with pytest.raises(SystemExit, match=r"error: .*Not a directory: .*results"):
        common.main(orders.Config, lambda config: pytest.fail("it was measured"), "", orders.Config())


def test_alignment_of_the_two_orders_in_closed_form(x64):
    # For w·x and one step on half the squared error, the exact meta-gradient is P g and the first-order one g, with
    # P = I − α x xᵀ and g the gradient of the query loss after the step.
    model = models.mlp(features=(1,), param_dtype=jnp.float64)
    half_mse = lambda outputs, targets: 0.5 * jnp.mean((outputs - targets) ** 2)  # noqa: E731
    work = orders.Workload(model, half_mse, half_mse, "", {}, (0.3,), 1, 1, 1, 1)
    learners = {order: orders.learner_of(work, 1, 0.3, order) for order in orders.ORDERS}
    x, q = np.array([1.0, 2.0, 1.0]), np.array([0.5, -1.0, 1.0])  # the last number is that of the bias
    episodes = jax.tree.map(
        lambda x: x[None], Episode(*(Batch(jnp.asarray(a[None, :2]), jnp.ones((1, 1))) for a in (x, q)))
    )
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), jnp.ones((1, 2))))
    adapted = 0.3 * x
    first = (adapted @ q - 1.0) * q
    exact = first - 0.3 * x * (x @ first)
    found = orders.alignment_fn(learners, None)(params, episodes, episodes)
    norms = np.linalg.norm(first), np.linalg.norm(exact)
    np.testing.assert_allclose(found.cosine, first @ exact / (norms[0] * norms[1]), rtol=1e-12)
    np.testing.assert_allclose(found.norm_ratio, norms[0] / norms[1], rtol=1e-12)
    np.testing.assert_allclose(found.noise_cosine, 1.0, rtol=1e-12)


def test_tasks_that_are_not_finite_are_counted_in_the_table_of_the_orders():
    cell = orders._score_cell({"mean": None, "ci95": None, "num_nonfinite": 3, "finite_median": 0.25}, num_episodes=600)
    assert cell == "3 of 600 not finite (median of the others 0.250)"
    cell = orders._score_cell({"mean": 0.5, "ci95": 0.125, "num_nonfinite": 0, "finite_median": 0.25}, 600)
    assert cell == "0.500 ± 0.125"


def test_orders_name_what_does_not_fit():
    with pytest.raises(ValueError, match="--sinusoid-inner-lr has 3 rates and --inner-steps 2 numbers; give one rate"):
        orders.Config(inner_steps=(1, 5))
    with pytest.raises(ValueError, match="--omniglot-steps 30 is no multiple of --parts 20"):
        orders.Config(omniglot_steps=30)
    with pytest.raises(ValueError, match="--curve-episodes must be an integer of at least 2, got 1"):
        orders.Config(curve_episodes=1)


def test_orders_without_omniglot_say_how_to_go_on(monkeypatch):
    def missing(split):
        raise FileNotFoundError("there is no Omniglot")

    monkeypatch.setattr(orders.omniglot, "load", missing)
    with pytest.raises(orders.RunError, match="--workload sinusoid"):
        orders.workload("omniglot", orders.Config())


def test_methods_run(quick, tmp_path):
    methods.run(methods.Config(**quick, shot=2, methods=("maml", "anil"), num_tasks=1))
    rows = {row["method"]: row for row in result_of("methods_5-way_2-shot", tmp_path)["rows"]}
    assert list(rows) == ["fomaml", "maml", "anil"]
    assert rows["fomaml"]["times_fomaml"].median == rows["fomaml"]["flops_times_fomaml"] == 1
    # A step of the last layer alone has no backward pass through the convolutions in its inner loop.
    assert rows["fomaml"]["flops"] < rows["anil"]["flops"] < rows["maml"]["flops"]
    methods.run(methods.Config(**quick, workload="sinusoid", methods=("meta-sgd",), num_tasks=1))
    rows = {row["method"]: row for row in result_of("methods_sinusoid", tmp_path)["rows"]}
    assert list(rows) == ["fomaml", "meta-sgd"]
    assert 1.5 < rows["meta-sgd"]["flops_times_fomaml"] < 3  # second derivatives through one step


def test_a_method_that_is_not_measured_is_named():
    with pytest.raises(ValueError, match="--methods imaml is none of sinusoid; choose among maml, fomaml"):
        methods.methods_of(methods.Config(workload="sinusoid", methods=("maml", "imaml")))


def test_kinds_of_operations():
    def function(x, y):
        return jnp.concatenate([x, y]) @ jnp.tanh(y).T + jnp.sum(x)

    kinds = breakdown.kinds_of(jax.jit(function).lower(jnp.ones((2, 8)), jnp.ones((2, 8))).compile().as_text())
    assert {"dot", "reduce"} <= set(kinds.values()) <= set(breakdown.KINDS)


@pytest.mark.slow
def test_breakdown_runs(quick, tmp_path):
    # The profile names operations only with a flag of XLA that is set before it starts.
    command = [sys.executable, "-m", "benchmarks.breakdown", "--max-repetitions", "1", "--max-seconds", "1"]
    command += ["--meta-batch-size", "2", "--filters", "4", "--matmul-size", "64", "--sinusoid-steps", "4"]
    command += ["--results-dir", str(tmp_path)]
    # Without optimisation of the machine code, which takes most of the time to compile.
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    found = result_of("breakdown", tmp_path)
    assert len(found["programs"]) == 2
    for program in found["programs"].values():
        assert 0 < program["by_kind"]["dot"] < sum(program["by_kind"].values())


def test_devices_run(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "ROUNDS", 1)  # every number of devices has a process in every round
    # `run` asks for as many devices as the tests have.
    config = devices.Config(
        **quick,
        devices=(1, 8),
        workload=("sinusoid",),
        sinusoid_steps=2,
        all_reduces=2,
        meshes=((1, 1), (2, 2)),
        width=64,
    )
    devices.run(config)
    found = result_of("devices", tmp_path)
    one_device, divided = found["meshes"]
    assert one_device["distance"] == 0.0
    assert 0 < divided["distance"] < 1e-5
    assert divided["argument_bytes"] < 0.6 * one_device["argument_bytes"]
    assert divided["output_bytes"] < 0.6 * one_device["output_bytes"]
    assert divided["temporary_bytes"] < 0.6 * one_device["temporary_bytes"]
    assert one_device["all_reduces"] == 0 < divided["all_reduces"]
    one, eight = found["workloads"]["sinusoid"]["rows"]
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["all_reduce_seconds"] is None
    assert eight["all_reduce_seconds"].median > 0
    assert one["times_first"] == (1.0, 1.0, 1.0, devices.ROUNDS)
    assert eight["times_first"].repetitions == devices.ROUNDS
    assert 0 < eight["times_first"].lower <= eight["times_first"].median


@pytest.mark.parametrize(
    ("name", "gigaflops", "num_parameters"), [("sinusoid", 0.00045, 1_761), ("omniglot", 1.50, 112_005)]
)
def test_tasks_of_the_devices_are_those_of_the_model(name, gigaflops, num_parameters):
    # F and P of the table in SCALING.md. F also includes the share of a task in the outer update.
    learner, sample, _ = devices.workload(name, devices.Config())
    episode = jax.eval_shape(sample, jax.random.key(0))
    params = jax.eval_shape(learner.init, jax.random.key(0), episode.support.inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_parameters
    flops = count_flops(jax.grad(learner.objective, has_aux=True), params, episode)
    assert flops == pytest.approx(1e9 * gigaflops, rel=0.01)


def test_sinusoid_runs(quick, tmp_path):
    config = sinusoid.Config(
        **quick, meta_batch_size=2, shot=2, features=(3, 1), steps_per_call=3, python_steps=2, chunk_size=()
    )
    sinusoid.run(config)
    rows = result_of("sinusoid", tmp_path)["rows"]
    assert len(rows) == (4 if importlib.util.find_spec("torch") else 3)
    assert rows[sinusoid.OURS]["ops_per_step"] > 10


@pytest.mark.slow
def test_navigation_runs(quick, tmp_path):
    sizes = {"meta_batch_size": 2, "num_trajectories": 3, "horizon": 6, "metric_stride": 2}
    navigation.run(navigation.Config(**quick, **sizes))
    found = result_of("navigation", tmp_path)
    with_torch = importlib.util.find_spec("torch") is not None
    assert len(found["rows"]) == (4 if with_torch else 3)
    assert found["environment_steps"] == 2 * 2 * 3 * 6
    by_name = {row["implementation"]: row for row in found["rows"]}
    one = by_name[f"{navigation.OURS}, one device"]
    expected = found["environment_steps"] / one["collection_seconds"].median
    assert one["environment_steps_per_second"] == pytest.approx(expected)
    assert by_name[navigation.OURS]["times_ours"].median == 1.0
    if with_torch:
        assert all(distance < 1e-10 for distance in found["distances"].values())


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("adapt", lambda right: lambda w, s, c: right(w, s, c._replace(inner_lr=0.4)), "meta-gradient"),
        ("advantages", lambda right: lambda *args: -right(*args), "advantages"),
        (
            "conjugate_gradients",
            lambda right: lambda p, g, c: right(p, g, c._replace(num_cg_steps=2)),
            "trust-region step",
        ),
        ("divergence", lambda right: lambda old, new: 3.0 * right(old, new), "trust-region step"),
    ],
)
def test_what_is_wrong_in_pytorch_is_found(monkeypatch, name, wrong, found):
    torch_navigation = pytest.importorskip("benchmarks.torch_navigation", reason="torch is not installed")
    settings = navigation.settings_of(navigation.Config(meta_batch_size=2, num_trajectories=3, horizon=6))
    monkeypatch.setattr(torch_navigation, name, wrong(getattr(torch_navigation, name)))
    assert navigation.distances(torch_navigation, settings)[found] > 1e-3


@pytest.mark.slow
def test_surrogates_runs(tmp_path):
    sizes = {"horizon": (6,), "num_states": 3, "num_actions": 3, "hidden_size": 4, "num_estimates": 4000}
    surrogates.run(surrogates.Config(results_dir=tmp_path, num_processes=1, **sizes))
    rows = result_of("surrogates", tmp_path)["rows"]
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        unbiased = row["derivative"] == "gradient" or row["surrogate"] == "loaded_dice"
        # In expectation the bias of an estimate without bias is that of the noise.
        assert (row["bias"] < 2 * row["bias_of_noise"]) == unbiased


def test_bias_and_spread_are_those_of_made_up_estimates():
    drawn = np.random.default_rng(0).normal(size=(5000, 2)) * [3.0, 4.0] + [0.0, 12.0]
    found = surrogates.errors(jnp.asarray(drawn), np.array([0.0, 10.0]))
    assert found["spread"] == pytest.approx(0.5, rel=0.03)  # the root of 9 + 16, over 10
    assert found["bias"] == pytest.approx(0.2, abs=0.03)
    assert found["bias_of_noise"] == pytest.approx(0.5 / 5000**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": ()}, "--horizon needs at least one number"),
        ({"horizon": (0,)}, "--horizon must be an integer of at least 1, got 0"),
        ({"num_estimates": 1}, "--num-estimates must be an integer of at least 2, got 1"),
    ],
)
def test_surrogates_refuse_what_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        surrogates.Config(**settings)


def test_the_exact_return_is_that_of_the_trajectories():
    mdp = surrogates.random_mdps(3, 2).sample_task(jax.random.key(0))
    policy = surrogates.rl.categorical_policy(models.mlp(features=(2,)))
    params = policy.init(jax.random.key(1), jnp.zeros((1, 3)))
    exact, values = surrogates.expected_return(policy, params, mdp, 4)
    drawn = surrogates.rl.rollout(
        surrogates.random_mdps(3, 2),
        lambda observation: policy.apply(params, observation),
        mdp,
        jax.random.key(2),
        num_trajectories=20_000,
        horizon=4,
    )
    returns = drawn.reward.sum(0)
    assert abs(float(returns.mean() - exact)) < 4 * float(returns.std()) / 20_000**0.5
    assert values[0, 0] == exact
    assert abs(float(drawn.reward[-1].mean() - jnp.mean(drawn.observation[-1] @ values[-1]))) < 0.05


def test_peers_agree_and_run(quick, tmp_path):
    for package in ("torch", "higher", "torchopt"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install -e '.[peers]'")
    peers.run(peers.Config(**quick, filters=2, query_shot=1, meta_batch_size=2, inner_steps=(2,)))
    rows = result_of("peers", tmp_path)["rows"]
    assert len(rows) == 7
    assert all(row["distance_float64"] <= 1e-12 for row in rows)
    assert all(row["distance_float32"] <= 1e-4 for row in rows)


def test_peers_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.torch_peers", None)
    monkeypatch.delattr(benchmarks, "torch_peers", raising=False)
    episodes = common.random_episodes(num_tasks=1, way=2, shot=1, query_shot=1)
    with pytest.raises(peers.RunError, match=r"pip install -e '\.\[peers\]'"):
        peers.in_torch(1, episodes, peers.Config())
    monkeypatch.setattr(peers, "compare", None)  # before anything is compiled
    with pytest.raises(peers.RunError, match=r"pip install -e '\.\[peers\]'"):
        peers.run(peers.Config())


# The report


def test_report_fills_in_what_was_measured(tmp_path):
    timing = common.Timing(0.002, 0.001, 0.003, 5)
    row = {
        "steps_per_second": 500.0,
        "seconds_per_step": timing,
        "compile_seconds": 1.0,
        "ops_per_step": 100,
    }
    settings = common.Settings(results_dir=tmp_path)
    rows = {sinusoid.OURS: row | {"flops_per_step": 1e6}, sinusoid.SAMPLING: row}
    common.write_results("sinusoid", settings, {"rows": rows})
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- sinusoid -->old<!-- end -->\nafter <!-- other -->kept<!-- end -->\n")
    report.write(readme, None, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- sinusoid -->\n")
    assert text.endswith("<!-- end -->\nafter <!-- other -->kept<!-- end -->\n")
    assert f"| {sinusoid.OURS} | 500 | 1.0 | 2 (1-3) | 1.0 |" in text
    assert "1.00 MFLOP and 100 XLA instructions a meta-step, 0.5 GFLOP/s" in text
    assert "Sampling is 100 of the operations and 100% of the time" in text
    assert "old" not in text
    report.write(readme, None, tmp_path)
    assert readme.read_text() == text
    readme.write_text("nowhere")
    with pytest.raises(ValueError, match="0 places for sinusoid"):
        report.write(readme, None, tmp_path)


def test_the_numbers_in_the_readme_are_those_of_the_result_files(tmp_path):
    files = (report.HERE / "README.md", report.HERE.parent / "README.md")
    copies = [tmp_path / str(number) for number in range(2)]
    for file, copy in zip(files, copies, strict=True):
        copy.write_text(file.read_text())
    report.write(*copies, report.HERE / "results")
    assert [copy.read_text() for copy in copies] == [file.read_text() for file in files]
