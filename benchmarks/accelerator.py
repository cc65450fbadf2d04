"""Accelerators in one command: measures, within its minutes, what the library's defaults should be on this device.

Three parts run on the first device that JAX finds, a GPU, a TPU or a CPU:

  sweep     The meta-step of MAML on the shapes of Omniglot (32 tasks, on a CPU 4) and of miniImageNet (4 tasks) with
            other convolutions, chunk sizes and precisions: speed, peak memory, and how far the meta-gradient is from
            that in float32.
  peers     The same meta-step as it is usually written in JAX, without this library, in turns with the library's.
  training  MAML on Omniglot, 5-way 1-shot, as far as the time allows, with its test accuracy. It needs --data.

Each part has its share of the minutes and leaves to the next what it does not use. What is not expected to fit, by the
times measured so far, is left out and named at the end; a first call of unknown length may overrun the minutes. Results
are written to accelerator_PART_DEVICE.json whenever a comparison or a test is finished. SIGTERM and Ctrl-C stop after
the running compilation or compiled call.

The file for --data is made where tensorflow-datasets is installed: python -m maml_jax.tasks.omniglot_builder --npz FILE
This command itself needs what the library needs, and none of the packages of the experiments.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks import common
from benchmarks.advice import STAGES, advice
from benchmarks.budget import NO_TIME, Bench, Clock, Program, Stopped, deviation
from experiments.published import OMNIGLOT as PUBLISHED
from experiments.runs import device_name
from maml_jax import (
    CATALOGUE,
    MetaLearner,
    MetaState,
    Problem,
    evaluate,
    init_meta_state,
    losses,
    make_meta_step,
    make_train_loop,
    maml,
    models,
)
from maml_jax.meta_gradient import default_chunk_size, forward_bytes
from maml_jax.models.layers import conv_lax, conv_matmul
from maml_jax.tasks import few_shot, omniglot
from maml_jax.types import Episode

PARTS = {"sweep": 5, "peers": 2, "training": 4}
"""The parts, in their order, with their shares of the minutes."""
MAKE_DATA = "python -m maml_jax.tasks.omniglot_builder --npz FILE"


def conv_patches(inputs: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """The convolution of `layers.conv_lax`, with XLA's own patches and one matrix product."""
    patches = lax.conv_general_dilated_patches(
        inputs, kernel.shape[:2], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # The patches are ordered by channel, then by position.
    return patches @ kernel.transpose(2, 0, 1, 3).reshape(patches.shape[-1], -1)


DEFAULT_CONVOLUTION, DEFAULT_PRECISION = "conv_matmul", "float32"
CONVOLUTIONS = {DEFAULT_CONVOLUTION: conv_matmul, "conv_lax": conv_lax, "conv_patches": conv_patches}
PRECISIONS = (DEFAULT_PRECISION, "tensorfloat32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The command line."""

    max_repetitions: int = 10
    max_seconds: float = 8.0
    minutes: float = 9.0
    data: Path | None = None
    parts: tuple[str, ...] = tuple(PARTS)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One exact meta-step of MAML with Adam on noise of the right shape. All parameters adapt."""

    title: str
    tasks: int
    shape: tuple[int, int, int]
    filters: int
    pooling: bool
    inner_steps: int
    inner_lr: float
    way: int = 5
    shot: int = 1
    query_shot: int = 15


OMNIGLOT = Workload("Omniglot", 32, (28, 28, 1), filters=64, pooling=False, inner_steps=1, inner_lr=0.4)
IMAGES = Workload("miniImageNet", 4, (84, 84, 3), filters=32, pooling=True, inner_steps=5, inner_lr=0.01)
"""The network and the meta-batch of the MAML paper."""


def workloads(short: bool) -> tuple[Workload, ...]:
    """Omniglot and miniImageNet; with --short a small Omniglot."""
    if short:
        return (dataclasses.replace(OMNIGLOT, filters=4, tasks=2, query_shot=1),)
    if jax.default_backend() == "cpu":  # XLA's grouped convolution of 32 tasks takes half a minute to minutes there
        return dataclasses.replace(OMNIGLOT, tasks=4), IMAGES
    return OMNIGLOT, IMAGES


@dataclasses.dataclass(frozen=True)
class Case:
    """One program of the sweep."""

    workload: Workload
    convolution: str = DEFAULT_CONVOLUTION
    chunk_size: int = 1
    precision: str = DEFAULT_PRECISION

    def describe(self, stage: str, reference: "Case") -> str:
        """What a stage varies: the value, with the chunk size beside a convolution if it is not the reference's."""
        if stage != "convolution":
            return str(self.chunk_size if stage == "chunk size" else self.precision)
        return self.convolution + (f", chunk {self.chunk_size}" if self.chunk_size != reference.chunk_size else "")


# The sweep


def learner_of(workload: Workload, convolution: str) -> MetaLearner:
    """MAML with the library's default derivative."""
    return maml(
        models.conv4(
            way=workload.way,
            features=workload.filters,
            pooling=workload.pooling,
            conv_fn=CONVOLUTIONS[convolution],
        ),
        losses.cross_entropy,
        inner_optimizer=optax.sgd(workload.inner_lr),
        num_inner_steps=workload.inner_steps,
    )


class Start(NamedTuple):
    """What every implementation of a workload starts from."""

    optimizer: optax.GradientTransformation
    state: MetaState
    episodes: Episode


def start_of(workload: Workload) -> Start:
    """The outer optimiser, the initial state and the episodes. They do not depend on the number of inner steps."""
    return _start_of(dataclasses.replace(workload, inner_steps=1))


@functools.cache
def _start_of(workload: Workload) -> Start:
    def make(key):
        episodes = common.random_episodes(
            num_tasks=workload.tasks,
            way=workload.way,
            shot=workload.shot,
            query_shot=workload.query_shot,
            shape=workload.shape,
        )
        inputs = episodes.support.inputs[0]
        return init_meta_state(learner_of(workload, DEFAULT_CONVOLUTION), optimizer, key, inputs), episodes

    optimizer = optax.adam(1e-3)
    # Compiled as one program: on an accelerator every operation outside of one is compiled by itself.
    return Start(optimizer, *jax.jit(make)(jax.random.key(0)))


def make_case(case: Case) -> tuple:
    """The library's meta-step, for `Bench.program`."""
    optimizer, state, episodes = start_of(case.workload)
    step = make_meta_step(learner_of(case.workload, case.convolution), optimizer, chunk_size=case.chunk_size)
    return step.jitted, state, episodes, case.precision


@functools.cache
def default_case(workload: Workload, convolution: str = DEFAULT_CONVOLUTION) -> Case:
    """The library's defaults, with any convolution."""
    _, state, episodes = start_of(workload)
    return Case(workload, convolution, default_chunk_size(learner_of(workload, convolution), state.params, episodes))


def task_bytes(case: Case) -> int:
    """What `default_chunk_size` counts for one task: its data and all results of its forward pass."""
    _, state, episodes = start_of(case.workload)
    return sum(forward_bytes(learner_of(case.workload, case.convolution), state.params, episodes))


def cases_of(stage: str, best: Case) -> list[Case]:
    """What a stage compares, its reference first.

    Args:
      stage: one of `STAGES`.
      best: the fastest so far; at the start the library's default.
    """
    if stage == "convolution":
        # One task at a time, the grouped convolution is a plain one.
        others = [default_case(best.workload, name) for name in CONVOLUTIONS if name != best.convolution]
        found = [best, *others, Case(best.workload, "conv_lax", 1)]
    elif stage == "chunk size":
        tasks, default = best.workload.tasks, default_case(best.workload, best.convolution)
        sizes = (default.chunk_size, tasks, max(1, tasks // 4), 1)
        found = [dataclasses.replace(best, chunk_size=size) for size in sizes]
    else:
        found = [dataclasses.replace(best, precision=precision) for precision in PRECISIONS]
    return list(dict.fromkeys(found))


def sweep(bench: Bench, share: float, save: Callable[[dict], None]) -> None:
    """Runs the stages for both workloads, and saves after each."""
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {"rows": rows, "memory": []}
    best: dict[Workload, Case] = {}
    for stage, workload in itertools.product(STAGES, workloads(bench.config.short)):
        if bench.clock.left(share) <= 0:
            bench.leave_out(f"{workload.title}, {stage}", NO_TIME)
            continue
        cases = cases_of(stage, best.setdefault(workload, default_case(workload)))
        names = {case: f"{workload.title}, {stage} {case.describe(stage, cases[0])}" for case in cases}
        if not bench.program(cases[0], names[cases[0]], share, functools.partial(make_case, cases[0])):
            continue  # nothing to compare the others with
        programs = {
            case: program
            for case in cases
            if (program := bench.program(case, names[case], share, functools.partial(make_case, case)))
        }
        if len(programs) == 1 and stage != STAGES[0]:
            continue  # there is no time for an alternative, and a stage before has measured what there is
        seconds = bench.seconds_of({names[case]: program for case, program in programs.items()}, share)
        exact = bench.programs[default_case(workload)].gradient
        found = {}
        for case, program in programs.items():
            taken = seconds[names[case]]
            found[case] = {
                "workload": workload.title,
                "stage": stage,
                "value": case.describe(stage, cases[0]),
                "convolution": case.convolution,
                "chunk_size": case.chunk_size,
                "precision": case.precision,
                "seconds": common.summarise(taken),
                "steps_per_second": 1 / statistics.median(taken),
                "times_reference": ratios(taken, seconds[names[cases[0]]]),
                "compile_seconds": program.compile_seconds,
                "peak_bytes": program.peak_bytes,
                "deviation": deviation(program.gradient, exact),
            }
        rows += found.values()
        if stage != "precision":
            best[workload] = min(found, key=lambda case: found[case]["seconds"].median)
        if stage == "chunk size":
            largest = max(programs, key=lambda case: case.chunk_size)
            content["memory"].append(memory_of(largest, programs[largest], best[workload].chunk_size))
        content |= {"fastest": {each.title: _settings(case) for each, case in best.items()}, "missing": bench.missing}
        save(content | {"advice": advice(content)})


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> common.Timing:
    """Quotients of the times of the same rounds."""
    return common.summarise([a / b for a, b in zip(seconds, reference, strict=False)])


def _settings(case: Case) -> dict[str, Any]:
    return {"convolution": case.convolution, "chunk_size": case.chunk_size}


def memory_of(case: Case, program: Program, best_chunk: int) -> dict[str, Any]:
    """The memory of a task, as measured and as `default_chunk_size` counts it."""
    return {
        "workload": case.workload.title,
        "tasks": case.workload.tasks,
        "best_chunk": best_chunk,
        "forward_bytes": task_bytes(case),
        "peak_bytes": program.peak_bytes / case.chunk_size,
        "bytes_limit": (jax.devices()[0].memory_stats() or {}).get("bytes_limit"),
        "backend": jax.default_backend(),
    }


# The meta-step without the library


def plain_meta_step(workload: Workload, optimizer: optax.GradientTransformation) -> Callable:
    """MAML on Omniglot's network as it is usually written in JAX.

    The convolutions are `lax.conv_general_dilated`, the inner steps a Python loop, the derivative reverse over reverse,
    and the tasks one `vmap`.

    Returns:
      `(state, episodes) -> (state, loss)` on a `MetaState` of the library.
    """

    def network(params, images):
        hidden = images
        for index in range(4):
            conv, offset = params[f"conv_{index}"], params[f"norm_{index}"]["offset"]
            hidden = lax.conv_general_dilated(
                hidden, conv["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            hidden += conv["bias"].reshape(1, 1, 1, -1)
            mean, variance = hidden.mean((0, 1, 2), keepdims=True), hidden.var((0, 1, 2), keepdims=True)
            hidden = jax.nn.relu((hidden - mean) * lax.rsqrt(variance + 1e-3) + offset.reshape(1, 1, 1, -1))
        return hidden.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, -1)

    def loss_of(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(network(params, batch.inputs), batch.targets).mean()

    def task_loss(params, episode):
        for _ in range(workload.inner_steps):
            gradient = jax.grad(loss_of)(params, episode.support)
            params = jax.tree.map(lambda p, g: p - workload.inner_lr * g, params, gradient)
        return loss_of(params, episode.query)

    def step(state, episodes):
        def mean_loss(params):
            return jax.vmap(task_loss, (None, 0))(params, episodes).mean()

        loss, gradient = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return MetaState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), loss

    return step


def make_plain(workload: Workload) -> tuple:
    """The meta-step without the library, for `Bench.program`."""
    optimizer, state, episodes = start_of(workload)
    step = jax.jit(plain_meta_step(workload, optimizer), donate_argnums=0)
    return step, state, episodes, DEFAULT_PRECISION


OURS, PLAIN = "maml_jax, its defaults", "plain JAX, one vmap over lax.conv"


def peers(bench: Bench, share: float, save: Callable[[dict], None], fastest: dict[str, Any] | None) -> None:
    """Compares the library with plain JAX, in float32, for one and for several inner steps; saves after each.

    Args:
      bench: the programs.
      share: of the minutes, until which it may run.
      save: called with the content.
      fastest: convolution and chunk size of the fastest program of the sweep, if there was one.
    """
    rows: list[dict[str, Any]] = []
    base = workloads(bench.config.short)[0]
    for inner_steps in (1, 2 if bench.config.short else 5):
        workload = dataclasses.replace(base, inner_steps=inner_steps)
        default = default_case(workload)
        makers = {OURS: (default, functools.partial(make_case, default))}
        chosen = default if fastest is None else dataclasses.replace(default, **fastest)
        if chosen != default:
            name = f"maml_jax, {chosen.convolution}, chunk {chosen.chunk_size}"
            makers[name] = (chosen, functools.partial(make_case, chosen))
        makers[PLAIN] = (("plain", workload), functools.partial(make_plain, workload))
        if not bench.program(default, f"{OURS}, inner steps: {inner_steps}", share, makers[OURS][1]):
            continue
        programs = {
            name: program
            for name, (key, make) in makers.items()
            if (program := bench.program(key, f"{name}, inner steps: {inner_steps}", share, make))
        }
        seconds = bench.seconds_of(programs, share)
        rows += [
            {
                "inner_steps": inner_steps,
                "implementation": name,
                "seconds": common.summarise(seconds[name]),
                "steps_per_second": 1 / statistics.median(seconds[name]),
                "times_ours": ratios(seconds[name], seconds[OURS]),
                "compile_seconds": program.compile_seconds,
                "peak_bytes": program.peak_bytes,
                "deviation": deviation(program.gradient, programs[OURS].gradient),
            }
            for name, program in programs.items()
        ]
        save({"tasks": workload.tasks, "rows": rows, "missing": bench.missing})


# The training


def training(bench: Bench, images: dict[str, np.ndarray], save: Callable[[dict], None]) -> None:
    """Trains MAML with the paper's settings and the library's defaults until the time is over, and tests it.

    Tests are also made on the way, each after twice as many meta-steps, and saved. The state that is tested is always
    the present one: nothing is selected.

    Args:
      bench: gives the time and the settings.
      images: splits "train" and "test", uint8 [C, n, 28, 28, 1].
      save: called with the content after every test.
    """
    clock, short = bench.clock, bench.config.short
    if not bench.fits("the training", 1.0, 2 * bench.expected_seconds()):
        return
    filters, tasks, goal, num_test = (4, 4, 300, 20) if short else (64, 32, 60_000, 600)
    entry = CATALOGUE["maml"]
    model = models.conv4(way=5, features=filters)
    problem = Problem(model, losses.cross_entropy, where=lambda name: "norm" not in name)
    learner, tester = (
        entry.build(problem, dataclasses.replace(entry.settings["omniglot"], num_inner_steps=steps)) for steps in (1, 3)
    )
    samplers = {
        split: few_shot.make_sampler(found, way=5, shot=1, query_shot=1, rotations=True)
        for split, found in images.items()
    }
    optimizer = optax.adam(1e-3)
    init_key, train_key, test_key = jax.random.split(jax.random.key(0), 3)
    state = init_meta_state(learner, optimizer, init_key, jnp.zeros((5, 28, 28, 1)))
    # A call takes about a second, going by the meta-steps that were measured.
    known = min((program.first_seconds for program in bench.programs.values()), default=0.1)
    fitting = [count for count in (500, 200, 100, 50, 20, 10) if goal % count == 0 and count * known < 1]
    num_steps = fitting[0] if fitting else 10
    loop = make_train_loop(learner, optimizer, samplers["train"], meta_batch_size=tasks, num_steps=num_steps)
    compiled, compile_seconds = common.compile_of(loop.jitted, state, train_key, *loop.data)
    clock.say(f"training: compiled in {compile_seconds:.1f} s")
    seconds, trained, tests = {"compile": compile_seconds, "train": 0.0, "eval": 0.0}, 0, []
    call_seconds, test_seconds, since_test = 0.0, bench.expected_seconds(), 0.0

    def test() -> None:
        nonlocal test_seconds, since_test
        start = time.perf_counter()
        found = evaluate(
            tester, state.params, samplers["test"], test_key, metric_fn=losses.accuracy, num_episodes=num_test
        )
        mean, ci95 = (np.asarray(leaf).tolist() for leaf in (found.mean, found.ci95))
        test_seconds, since_test = time.perf_counter() - start, 0.0
        seconds["eval"] += test_seconds
        tests.append({"meta_steps": trained, "accuracy": {"mean": mean, "ci95": ci95}})
        clock.say(f"after {trained} of {goal} meta-steps: test accuracy {_percent(tests[-1])}")
        save(
            {
                "protocol": {
                    "way": 5,
                    "shot": 1,
                    "query_shot": 1,
                    "episodes": num_test,
                    "split": "test",
                    "normalisation": "transductive",
                    "selection": "none, the state after the last meta-step",
                },
                "tasks": tasks,
                "filters": filters,
                "precision": DEFAULT_PRECISION,
                "published": PUBLISHED["maml", "conv4", 5, 1],
                "goal": goal,
                "meta_steps": trained,
                "steps_per_second": trained / seconds["train"],
                "seconds": seconds,
                "tests": tests,
                "missing": bench.missing,
            }
        )

    while trained < goal and clock.left() > call_seconds + test_seconds:
        clock.check()
        start = time.perf_counter()
        state, info = jax.block_until_ready(compiled(state, train_key, *loop.data))
        call_seconds = time.perf_counter() - start
        seconds["train"] += call_seconds
        since_test += call_seconds
        trained += len(info.loss)
        if not np.all(info.finite):
            bench.leave_out("the rest of the training", f"it is not finite after {trained} meta-steps")
            break
        if not tests or (trained >= 2 * tests[-1]["meta_steps"] and since_test > 4 * test_seconds):
            clock.check()
            test()
    if trained and (not tests or tests[-1]["meta_steps"] < trained):
        clock.check()
        test()
    if not trained:
        bench.leave_out("the training", NO_TIME)


def _percent(tested: dict[str, Any]) -> str:
    mean, ci95 = (100 * tested["accuracy"][name][-1] for name in ("mean", "ci95"))
    return f"{mean:.2f} ± {ci95:.2f} %"


# Output


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table in plain text."""
    cells = [list(map(str, row)) for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    print("", title, lines[0], "  ".join("-" * width for width in widths), *lines[1:], sep="\n")


def _cost_cells(row: dict[str, Any], times: common.Timing) -> list[str]:
    return [
        str(row["seconds"]),
        str(row["seconds"].repetitions),
        f"{row['steps_per_second']:.4g}",
        f"{times.median:.2f}",
        f"{row['compile_seconds']:.1f}",
        f"{row['peak_bytes'] / 1e6:.4g}",
        f"{row['deviation']:.1e}",
    ]


def show(contents: dict[str, dict[str, Any]], missing: Sequence[dict[str, str]]) -> None:
    """Prints what was measured, and at the end what to change and what was left out."""
    costs = ["ms (quartiles)", "rounds", "meta-steps/s", "times {}", "compile s", "peak MB", "deviation"]
    if "sweep" in contents:
        rows = contents["sweep"]["rows"]
        for workload in dict.fromkeys(row["workload"] for row in rows):
            print_table(
                f"{workload}: one meta-step. The first line of a comparison is what the others are compared with.",
                ["compared", "convolution", "chunk", "precision", *(name.format("first") for name in costs)],
                [
                    [
                        row["stage"],
                        row["convolution"],
                        row["chunk_size"],
                        row["precision"],
                        *_cost_cells(row, row["times_reference"]),
                    ]
                    for row in rows
                    if row["workload"] == workload
                ],
            )
        print("The deviation is the largest difference from the meta-gradient of the defaults in float32, relative to")
        print("its largest number. A single round means one call, without a repetition.")
    if "peers" in contents:
        print_table(
            f"The same meta-step without the library, {contents['peers']['tasks']} tasks of Omniglot's shape, float32",
            ["implementation", "inner steps", *(name.format("ours") for name in costs)],
            [
                [row["implementation"], row["inner_steps"], *_cost_cells(row, row["times_ours"])]
                for row in contents["peers"]["rows"]
            ],
        )
    if "training" in contents:
        found = contents["training"]
        minutes = found["goal"] / found["steps_per_second"] / 60
        print_table(
            f"MAML on Omniglot, 5-way 1-shot, {found['protocol']['episodes']} test episodes",
            ["meta-steps", "test accuracy"],
            [[tested["meta_steps"], _percent(tested)] for tested in found["tests"]],
        )
        print(
            f"{found['steps_per_second']:.4g} meta-steps/s; all {found['goal']:,} take {minutes:.3g} minutes. "
            f"Published after 60,000: {found['published']} %."
        )
    if "sweep" in contents:
        print_table(
            "WHAT TO CHANGE",
            ["setting", "workload", "now", "best", "advice"],
            [list(row.values()) for row in contents["sweep"]["advice"]],
        )
    reasons = dict.fromkeys(row["reason"] for row in missing)
    if reasons:
        print("", "LEFT OUT", sep="\n")
    for reason in reasons:
        print(f"{reason}: {'; '.join(row['what'] for row in missing if row['reason'] == reason)}")


# The command


def parse(arguments: Sequence[str] | None) -> tuple[Config, dict[str, np.ndarray]]:
    """The command line and the images of --data. Bad input ends the program with a message."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=Config.minutes,
        help="how long all parts may take together, from when the program is loaded; by default %(default)g",
    )
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="Omniglot; without it there is no training")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run, in the order above"
    )
    parser.add_argument(
        "--results-dir",
        type=Path,
        default=common.Settings.results_dir,
        help="where results are written; by default %(default)s",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="small sizes, to see that everything works; the numbers mean nothing and are written to RESULTS_DIR/short",
    )
    found = parser.parse_args(arguments)
    if not (math.isfinite(found.minutes) and found.minutes > 0):
        parser.error(f"--minutes {found.minutes:g}: give a number above 0")
    images = {}
    if found.data is not None:
        try:
            file = omniglot.npz_path(found.data)
            images = {split: omniglot.load(split, file) for split in ("train", "test")}
        except (OSError, ValueError) as error:
            parser.error(f"--data: {error}")
    elif found.parts == ["training"]:
        parser.error(f"--parts training needs --data FILE.npz; make it with `{MAKE_DATA}`")
    parts = tuple(part for part in PARTS if part in found.parts)
    repetitions = {"max_repetitions": 3, "max_seconds": 1.0} if found.short else {}
    config = Config(
        found.short,
        **repetitions,
        results_dir=found.results_dir.expanduser(),
        minutes=found.minutes,
        data=found.data,
        parts=parts,
    )
    try:
        common.results_folder(config)
    except OSError as error:
        parser.error(f"--results-dir {found.results_dir}: {error}")
    return config, images


def shares(parts: Sequence[str]) -> dict[str, float]:
    """For each part, the share of the minutes after which it ends. The last one ends with them."""
    ends = np.cumsum([PARTS[part] for part in parts])
    return {part: float(end / ends[-1]) for part, end in zip(parts, ends, strict=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts, prints the tables and returns the exit status: 128 plus the number of a signal that came."""
    began = time.perf_counter()
    config, images = parse(arguments)
    clock = Clock(60 * config.minutes - (time.perf_counter() - began))
    bench = Bench(config, clock)
    contents: dict[str, dict[str, Any]] = {}
    device = re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower()).strip("_")
    if jax.default_backend() == "cpu":
        device = re.sub(r"[^a-z0-9]+", "_", device_name().lower()).strip("_")
        print("JAX found no accelerator, so this measures the CPU. For a GPU: pip install 'jax[cuda13]'")
    print(f"{device_name()}: {', '.join(config.parts)} in {config.minutes:g} minutes, on one device")

    def save(part: str, content: dict[str, Any]) -> None:
        contents[part] = content
        about = {"part": part, "platform": jax.devices()[0].client.platform_version}
        common.write_results("accelerator", config, about | content, suffix=f"_{part}_{device}")

    parts = [part for part in config.parts if part != "training" or images]
    if len(parts) < len(config.parts):
        bench.leave_out("the training", f"there is no --data FILE.npz; make it with `{MAKE_DATA}`")
    ends = shares(parts)
    try:
        with clock.listening():
            for part in parts:
                saved = functools.partial(save, part)
                if part == "sweep":
                    sweep(bench, ends[part], saved)
                elif part == "peers":
                    fastest = contents.get("sweep", {}).get("fastest", {}).get(OMNIGLOT.title)
                    peers(bench, ends[part], saved, fastest)
                else:
                    with jax.default_matmul_precision(DEFAULT_PRECISION):
                        training(bench, images, saved)
    except (Stopped, KeyboardInterrupt):
        clock.signal = clock.signal or signal.SIGINT
    show(contents, bench.missing)
    print("", f"{clock.elapsed():.0f} s of {clock.seconds:.0f} s", sep="\n")
    if clock.signal is not None:
        print(f"stopped by {signal.Signals(clock.signal).name}; the files hold what was finished")
        return 128 + clock.signal
    if not contents:
        print("nothing was measured; give more --minutes")
    return 0 if contents else 1


if __name__ == "__main__":
    sys.exit(main())
