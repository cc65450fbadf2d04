import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import accelerator, budget, common
from benchmarks.advice import ACCELERATOR_MEMORY_SHARE, judge, judge_share
from maml_jax import MetaState, make_meta_step
from maml_jax.models.layers import conv_lax
from maml_jax.tasks import omniglot

# Flax brings rich itself.
BLOCKED = ("tyro", "matplotlib", "tensorflow_datasets", "tensorflow", "torch", "PIL")
TINY = dataclasses.replace(accelerator.workloads(short=True)[0], tasks=2, filters=3)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    return now


def bench_of(seconds, **settings):
    return budget.Bench(accelerator.Config(**settings), budget.Clock(seconds))


# What is compared


def test_patches_are_the_same_convolution(x64):
    inputs, kernel = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(0)), ((2, 7, 6, 3), (3, 3, 3, 5)), strict=True)
    )
    for strides in ((1, 1), (2, 2)):

        def value_and_gradients(conv_fn, strides=strides):
            return jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(conv_fn(x, k, strides))), (0, 1))(inputs, kernel)

        found, expected = value_and_gradients(accelerator.conv_patches), value_and_gradients(conv_lax)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


def test_the_plain_meta_step_is_that_of_the_library(x64):
    workload = dataclasses.replace(TINY, inner_steps=2)
    optimizer, state, episodes = accelerator.start_of(workload)
    params, episodes = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, (state.params, episodes)
    )
    state = MetaState(params, optimizer.init(params), state.step)
    ours = make_meta_step(accelerator.learner_of(workload, "conv_matmul"), optimizer, donate=False)(state, episodes)
    plain = jax.jit(accelerator.plain_meta_step(workload, optimizer))(state, episodes)
    gradients = [optax.tree.get(found[0].opt_state, "mu") for found in (plain, ours)]
    assert budget.deviation(*gradients) < 1e-12
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1e-3
    np.testing.assert_allclose(plain[1], ours[1].loss, rtol=1e-12)


def test_the_images_of_the_sweep_have_the_network_of_the_paper():
    # 32 filters: kernels of 3, 32, 32 and 32 channels, as many biases and offsets, and 800 features of five classes.
    workload = dataclasses.replace(accelerator.IMAGES, tasks=1, query_shot=1)
    step, state, episodes, precision = accelerator.make_case(accelerator.default_case(workload))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 9 * 32 * (3 + 3 * 32) + 8 * 32 + 5 * 801
    assert episodes.support.inputs.shape == (1, 5, 84, 84, 3)
    assert jax.tree.map(jnp.shape, jax.eval_shape(step, state, episodes)[0]) == jax.tree.map(jnp.shape, state)
    assert precision == "float32"


def test_deviation_is_relative_to_the_largest_number():
    reference = {"a": np.array([3.0]), "b": np.array([[0.0, -4.0]])}
    assert budget.deviation({"a": np.array([3.0]), "b": np.array([[1.0, -4.0]])}, reference) == 0.25
    assert budget.deviation(reference, reference) == 0.0


def test_stages_vary_one_setting_and_start_from_the_best():
    default = accelerator.Case(accelerator.OMNIGLOT, chunk_size=1)
    first = accelerator.cases_of("convolution", default)
    assert first[0] == default
    assert {case.convolution for case in first} == set(accelerator.CONVOLUTIONS)
    assert accelerator.Case(accelerator.OMNIGLOT, "conv_lax", 1) in first
    best = dataclasses.replace(default, convolution="conv_patches", chunk_size=8)
    own_default = accelerator.default_case(accelerator.OMNIGLOT, "conv_patches")
    sizes = accelerator.cases_of("chunk size", best)
    assert sizes[0] == own_default
    assert {case.chunk_size for case in sizes} == {own_default.chunk_size, 1, 8, 32}
    assert {case.convolution for case in sizes} == {"conv_patches"}
    precisions = accelerator.cases_of("precision", best)
    assert [case.precision for case in precisions] == ["float32", "tensorfloat32", "bfloat16"]
    assert {dataclasses.replace(case, precision="float32") for case in precisions} == {best}


# What it advises


def row(value, milliseconds, factor=1.0, spread=0.01, repetitions=10, deviation=0.0):
    times = common.Timing(factor, factor * (1 - spread), factor * (1 + spread), repetitions)
    timing = common.Timing(milliseconds, milliseconds, milliseconds, repetitions)
    return {"value": value, "seconds": timing, "times_reference": times, "deviation": deviation}


@pytest.mark.parametrize(
    ("stage", "rows", "advice"),
    [
        ("chunk size", [row("32", 10.0)], "not decided: there was no time for an alternative"),
        ("chunk size", [row("32", 10.0), row("8", 20.0, 2.0)], "keep 32: the fastest of 2"),
        ("chunk size", [row("32", 10.0), row("8", 9.9, 0.99)], "keep 32: within 2% of the best"),
        ("chunk size", [row("32", 10.0), row("8", 8.0, 0.8, 0.3)], "keep 32: 8 is not clearly faster, 1.25 times"),
        ("chunk size", [row("32", 10.0), row("8", 8.0, 0.8, repetitions=1)], "not decided: 8 looks 1.25 times faster"),
        ("chunk size", [row("32", 10.0), row("8", 8.0, 0.8, repetitions=2)], "not decided: 8 looks 1.25 times faster"),
        ("precision", [row("float32", 10.0), row("bfloat16", 5.0, 0.5)], "keep float32: bfloat16 computes the same"),
        ("convolution", [row("a", 10.0), row("b", 8.0, 0.8)], "set it to b: 1.25 times faster (1.24-1.26); conv_fn"),
        (
            "precision",
            [row("float32", 10.0), row("bfloat16", 5.0, 0.5, deviation=0.0123)],
            "a choice: bfloat16 is 2.00 times faster (1.98-2.02), and its meta-gradient deviates by 1e-02",
        ),
    ],
)
def test_advice_on_a_comparison(stage, rows, advice):
    assert judge(stage, rows)["advice"].startswith(advice)


def test_the_best_of_a_comparison_has_the_lowest_median():
    lucky = row("8", 9.0, 0.9) | {"seconds": common.Timing(9.0, 1.0, 9.5, 10)}
    found = judge("chunk size", [row("32", 10.0), lucky, row("4", 8.0, 0.8)])
    assert (found["now"], found["best"]) == ("32", "4")


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        # 1000 bytes of forward results a task, 2000 in truth, of 100,000: at most 45 tasks fit into 0.9 of the memory.
        ({}, "keep 0.25: it allows 25 tasks, the fastest chunk has 20"),
        ({"best_chunk": 40}, "set it to 0.4: 0.25 allows 25 tasks, 40 are the fastest"),
        ({"peak_bytes": 4000}, "set it to 0.22: with 0.25 a chunk may take 100% of the memory"),
        ({"bytes_limit": None}, "not used: this device does not report its memory"),
        ({"backend": "cpu"}, "not used on a CPU"),
    ],
)
def test_advice_on_the_share_of_the_memory(changes, advice):
    assert ACCELERATOR_MEMORY_SHARE == 0.25
    memory = {
        "workload": "",
        "tasks": 40,
        "best_chunk": 20,
        "forward_bytes": 1000,
        "peak_bytes": 2000,
        "bytes_limit": 100_000,
        "backend": "gpu",
    }
    assert judge_share(memory | changes)["advice"] == advice


# How it plans


def test_every_part_ends_after_its_share():
    assert accelerator.shares(["sweep", "peers", "training"]) == pytest.approx(
        {"sweep": 5 / 11, "peers": 7 / 11, "training": 1.0}
    )
    assert accelerator.shares(["peers"]) == {"peers": 1.0}


@pytest.fixture
def slow_compiler(monkeypatch, clock):
    """Compilations take ten seconds, and every call one."""

    class Compiled:
        def __call__(self, state, episodes):
            clock[0] += 1.0
            return state, None

        def memory_analysis(self):
            return jax.jit(jnp.sin).lower(1.0).compile().memory_analysis()

    def compile_of(function, *args):
        clock[0] += 10.0
        return Compiled(), 10.0

    monkeypatch.setattr(common, "compile_of", compile_of)
    params = {"w": jnp.ones(2)}
    state = MetaState(params, optax.adam(1.0).init(params), jnp.zeros((), jnp.int32))
    return lambda: (None, state, None, "float32")


def test_programs_that_do_not_fit_are_left_out(clock, slow_compiler):
    bench = bench_of(60.0)
    found = [bench.program(name, name, 0.5, slow_compiler) for name in "abcd"]
    # Two programs take 22 of 30 seconds, and a third would take 11.
    assert [program is not None for program in found] == [True, True, False, False]
    assert clock[0] == 22.0
    assert bench.missing == [{"what": name, "reason": "no time"} for name in "cd"]
    assert bench.program("a", "a", 0.5, slow_compiler) is found[0]
    assert bench.program("e", "e", 1.0, slow_compiler) is not None


def test_a_compilation_that_takes_all_the_time_is_the_last_thing_done(clock, slow_compiler):
    bench = bench_of(5.0)
    assert bench.program("a", "a", 1.0, slow_compiler) is None
    assert clock[0] == 10.0
    assert bench.missing == [{"what": "a", "reason": "no time"}]


def test_a_program_that_fails_leaves_the_others_alone(clock, slow_compiler):
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: 99 GiB\ndetails")

    bench = bench_of(60.0)
    assert bench.program("a", "a", 1.0, fail) is None
    assert bench.program("b", "b", 1.0, slow_compiler) is not None
    assert bench.missing == [{"what": "a", "reason": "failed, RuntimeError: RESOURCE_EXHAUSTED: 99 GiB"}]


def test_rounds_spare_the_slow_and_end_with_the_time(clock):
    def program(seconds):
        def call():
            clock[0] += seconds

        return budget.Program(call, 0.0, seconds, 0, {})

    programs = {"a": program(1.0), "slow": program(50.0), "b": program(2.0)}
    seconds = bench_of(1000.0, max_repetitions=3, max_seconds=100.0).seconds_of(programs, 1.0)
    assert seconds == {"a": [1.0] * 3, "slow": [50.0], "b": [2.0] * 3}
    # Seven seconds of the share: one call each takes 3, and a round another 3.
    clock[0] = 0.0
    seconds = bench_of(14.0, max_repetitions=9, max_seconds=100.0).seconds_of(programs, 0.5)
    assert seconds == {"a": [1.0, 1.0], "slow": [50.0], "b": [2.0]}
    assert clock[0] == 7.0


def test_fast_calls_are_timed_in_bursts(clock):
    calls = [0]

    def call():
        calls[0] += 1
        clock[0] += 0.01

    program = budget.Program(call, 0.0, 0.01, 0, {})
    (found,) = bench_of(9.0, max_repetitions=2).seconds_of({"a": program}, 1.0).values()
    assert found == pytest.approx([0.01, 0.01])
    assert calls[0] == 1 + 2 * 5


def test_a_signal_ends_it_between_two_calls(clock, slow_compiler):
    bench = bench_of(60.0)
    bench.clock.signal = signal.SIGTERM
    with pytest.raises(budget.Stopped):
        bench.program("a", "a", 1.0, slow_compiler)
    assert clock[0] == 0.0


# The training


@pytest.mark.slow
def test_training_is_tested_on_the_way():
    # Every class has one image, so the task is to tell images apart.
    rng = np.random.default_rng(0)
    images = {
        split: np.repeat(rng.integers(0, 2, (12, 1, 28, 28, 1)).astype(np.uint8) * 255, 4, 1)
        for split in ("train", "test")
    }
    saved = []
    bench = bench_of(600.0, short=True)
    accelerator.training(bench, images, lambda content: saved.append(json.loads(json.dumps(content))))
    assert bench.missing == []
    steps = [tested["meta_steps"] for tested in saved[-1]["tests"]]
    assert steps[-1] == saved[-1]["meta_steps"] == saved[-1]["goal"] == 300
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(steps[:-1]))
    assert len(saved) == len(steps) >= 2
    for number, content in enumerate(saved):
        assert content["tests"] == saved[-1]["tests"][: number + 1]
    accuracies = [tested["accuracy"]["mean"] for tested in saved[-1]["tests"]]
    assert len(accuracies[0]) == 4
    assert accuracies[-1][0] < 0.5 < 0.7 < accuracies[-1][-1]
    assert math.isfinite(saved[-1]["steps_per_second"])


def test_training_without_time_is_left_out():
    saved = []
    bench = bench_of(-1.0, short=True)
    accelerator.training(bench, {}, saved.append)
    assert saved == []
    assert bench.missing == [{"what": "the training", "reason": "no time"}]


# The command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes 0: give a number above 0"),
        (["--minutes", "nan"], "--minutes nan: give a number above 0"),
        (["--data", "nowhere.npz"], "there is no file nowhere.npz; write it with `python -m maml_jax.tasks.omniglot_b"),
        (["--data", "omniglot.zip"], "omniglot.zip must end in .npz"),
        (["--parts", "training"], "--parts training needs --data FILE.npz; make it with"),
        (["--parts", "all"], "invalid choice: 'all'"),
        (["--results-dir", "setup.cfg"], "--results-dir setup.cfg"),
    ],
)
def test_bad_input_ends_it_at_once(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(accelerator.__file__).parents[1])
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device was touched"))
    with pytest.raises(SystemExit) as error:
        accelerator.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def start(folder, *flags):
    """The command in a process of its own, without the packages that only the experiments need."""
    code = f"""
import runpy, sys
for name in {BLOCKED}:
    sys.modules[name] = None
sys.argv = ["accelerator.py", *{(*flags, "--short", "--results-dir", str(folder))}]
runpy.run_module("benchmarks.accelerator", run_name="__main__")
"""
    root = Path(accelerator.__file__).parents[1]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=os.environ, stdout=subprocess.PIPE, text=True)


def files_of(folder):
    found = {file.name.split("_")[1]: file for file in (folder / "short").glob("accelerator_*.json")}
    return {part: json.loads(file.read_text()) for part, file in found.items()}


@pytest.fixture
def data(tmp_path):
    """The flags of the real drawings, if they are there."""
    try:
        images = omniglot.load_all()
    except FileNotFoundError:
        return []
    np.savez(tmp_path / "omniglot.npz", images=images)
    return ["--data", str(tmp_path / "omniglot.npz")]


@pytest.mark.slow
def test_a_minute_is_enough_without_the_packages_of_the_experiments(tmp_path, data):
    # On a busy machine not everything fits into it. What does not is named.
    process = start(tmp_path, "--minutes", "1", *data)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    left_out = printed.partition("LEFT OUT")[2]
    found = files_of(tmp_path)
    assert "sweep" in found, printed
    for content in found.values():
        assert content["device"]
        assert content["command"].startswith("python -m benchmarks.accelerator --minutes 1")
    rows = found["sweep"]["rows"]
    for name in accelerator.CONVOLUTIONS:
        assert name in {row["convolution"] for row in rows} or f"Omniglot, convolution {name}" in left_out
    for stage in accelerator.STAGES:
        assert stage in {row["stage"] for row in rows} or f"Omniglot, {stage}" in left_out
    assert all(row["seconds"]["repetitions"] >= 1 and row["peak_bytes"] > 1e4 for row in rows)
    # On a CPU the precisions are one program; convolutions and chunks only differ by rounding.
    assert max(row["deviation"] for row in rows) < 1e-3
    peers = found["peers"]["rows"] if "peers" in found else []
    plain = {row["inner_steps"]: row["deviation"] for row in peers if row["implementation"] == accelerator.PLAIN}
    for inner_steps in (1, 2):
        assert plain.get(inner_steps, 1.0) < 1e-3 or f"inner steps: {inner_steps}" in left_out
    advice = printed.partition("WHAT TO CHANGE")[2]
    assert all(advised["advice"] in advice for advised in found["sweep"]["advice"])
    if data and "training" in found:
        trained = found["training"]["meta_steps"]
        assert trained == found["training"]["tests"][-1]["meta_steps"] > 0
    else:
        assert "the training" in left_out


@pytest.mark.slow
def test_sigterm_keeps_what_was_finished(tmp_path):
    process = start(tmp_path, "--minutes", "30", "--parts", "sweep", "peers")
    while not files_of(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in printed
    (part, content), *others = files_of(tmp_path).items()
    assert (part, others) == ("sweep", [])
    assert {row["convolution"] for row in content["rows"]} == set(accelerator.CONVOLUTIONS)
    assert content["rows"][-1]["stage"] != "precision"
    assert "keep" in printed.partition("WHAT TO CHANGE")[2] or "set it" in printed or "not decided" in printed
    assert not list(tmp_path.rglob("*.partial"))
