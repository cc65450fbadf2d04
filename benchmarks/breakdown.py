"""Where an exact meta-step spends its time: profiles of compiled programs on one core of a CPU, in one thread."""

import collections
import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, meta_step, sinusoid
from experiments.runs import RunError


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The profiled programs: the library's default on one device, for the shapes of Omniglot and for sinusoids."""

    max_repetitions: int = 5
    """Profiled calls of each program. A time in the profile is a mean over them."""
    meta_batch_size: int = 32
    """Tasks of a meta-step on Omniglot. Sinusoids have 25."""
    sinusoid_steps: int = 200
    """Meta-steps in one compiled call of the sinusoids."""
    inner_steps: int = 1
    """Inner steps."""
    filters: int = 64
    """Filters of each convolution."""
    matmul_size: int = 2048
    """Size of the square float32 matrices whose product measures the peak of the core."""


SHORT = Config(short=True, max_repetitions=2, max_seconds=3.0, meta_batch_size=8)
OMNIGLOT, SINUSOID = "Omniglot", "sinusoids"

KINDS = {
    "dot": "matrix products",
    "reduce": "sums: statistics, gradients of biases and offsets",
    "pad": "padding, and adding overlapping patches",
    "slice": "slices",
    "concatenate": "concatenations",
    "copy": "copies into another layout",
    "other": "elementwise: normalisation, ReLU, updates, random numbers",
}
"""Titles of the kinds of operation. The kind of a fusion is the first of these that it contains."""

_COMPUTATION = re.compile(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$", re.MULTILINE)


def kinds_of(program: str) -> dict[str, str]:
    """The kind of every instruction of an optimised HLO text, by the name of the instruction; see `KINDS`."""
    bodies = dict(_COMPUTATION.findall(program))
    kinds = {}
    for name, definition in _INSTRUCTION.findall(program):
        if re.search(r" (while|call|conditional)\(", definition):  # the operations inside are counted themselves
            continue
        called = re.search(r"calls=%([\w.\-]+)", definition)
        text = bodies.get(called[1], "") if called else f" {definition}"
        found = [kind for kind in ("dot", "reduce", "pad", "slice", "concatenate") if f" {kind}(" in text]
        is_copy = "copy" in name or " copy(" in text or " transpose(" in text
        kinds[name] = found[0] if found else "copy" if is_copy else "other"
    return kinds


def profile(call: Any, kinds: dict[str, str], repetitions: int) -> dict[str, float]:
    """Measures the seconds of one call by kind of operation, with `jax.profiler`.

    Args:
      call: takes no argument and returns the arrays to wait for.
      kinds: from `kinds_of`.
      repetitions: calls that are profiled.

    Returns:
      The mean seconds per call, by kind.

    Raises:
      RunError: if the trace contains no operation of the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repetitions):
                jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        trace = jax.profiler.ProfileData.from_file(str(file))
    seconds: dict[str, float] = collections.Counter()
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in kinds:
                    seconds[kinds[event.name]] += event.duration_ns / 1e9 / repetitions
    if not seconds:
        raise RunError("the profile names no operation of the program; this needs XLA's CPU backend")
    return dict(seconds)


def run(config: Config) -> dict[str, Any]:
    """Profiles, prints, writes breakdown.json and breakdown.png, and returns the content."""
    content = {"programs": {OMNIGLOT: profile_omniglot(config), SINUSOID: profile_sinusoid(config)}}
    common.show(tables(content))
    common.write_results("breakdown", config, content)
    draw(config, content)
    return content


def profile_omniglot(config: Config) -> dict[str, Any]:
    """Profiles the meta-step of `benchmarks.meta_step`, and times it without the profiler."""
    case = meta_step.Case(
        filters=config.filters, meta_batch_size=config.meta_batch_size, inner_steps=config.inner_steps, on_mesh=False
    )
    row = meta_step.run_cases({meta_step.OURS: case}, "", config)[meta_step.OURS]
    prepared = meta_step.prepare(case)
    prepared.call()
    return {
        "tasks": case.meta_batch_size,
        "seconds": row["seconds"].median,
        "flops": row["flops"],
        "matmul_flops_per_second": row["matmul_flops_per_second"],
        "by_kind": profile(prepared.call, kinds_of(prepared.program), config.max_repetitions),
    }


def profile_sinusoid(config: Config) -> dict[str, Any]:
    """Profiles the training loop of `benchmarks.sinusoid`, sampling included. All numbers are per meta-step."""
    settings = sinusoid.Config(
        max_repetitions=config.max_repetitions, max_seconds=config.max_seconds, steps_per_call=config.sinusoid_steps
    )
    loop = sinusoid.prepare_loop(settings, None)
    timing = common.measure(loop.call, config)
    by_kind = profile(loop.call, kinds_of(loop.program), config.max_repetitions)
    return {
        "tasks": settings.meta_batch_size,
        "seconds": timing.median / config.sinusoid_steps,
        "flops": loop.flops,
        "matmul_flops_per_second": matmul_peak(config),
        "by_kind": {kind: value / config.sinusoid_steps for kind, value in by_kind.items()},
    }


def matmul_peak(config: Config) -> float:
    """Operations per second of a large matrix product."""
    matrix = jnp.ones((config.matmul_size, config.matmul_size))
    product, _ = common.compile_of(jnp.matmul, matrix, matrix)
    return 2 * config.matmul_size**3 / common.measure(lambda: product(matrix, matrix), config).median


def tables(content: dict[str, Any]) -> list[common.Table]:
    """One table per program: milliseconds by kind of operation, and the time at the peak of the core."""
    found = []
    for name, program in content["programs"].items():
        total = sum(program["by_kind"].values())
        peak = program["matmul_flops_per_second"]
        ordered = sorted(program["by_kind"].items(), key=lambda item: -item[1])
        found.append(
            common.Table(
                f"{name}: one exact meta-step of {program['tasks']} tasks on one core",
                ["", "ms", "share"],
                [[KINDS[kind], f"{1e3 * value:.3g}", f"{value / total:.0%}"] for kind, value in ordered]
                + [["all of them", f"{1e3 * total:.3g}", "100%"]],
                f"Without the profiler a meta-step takes {1e3 * program['seconds']:.3g} ms. "
                f"Its {program['flops'] / 1e9:.3g} GFLOP would take {1e3 * program['flops'] / peak:.3g} ms at the peak "
                f"of the core, {peak / 1e9:.0f} GFLOP/s: the floor.",
            )
        )
    return found


def draw(config: Config, content: dict[str, Any]) -> None:
    """Draws a bar for each kind of operation, and a panel for each program."""
    programs = content["programs"]
    with common.figure("breakdown", config, columns=len(programs), width=7) as drawn:
        for axes, (name, program) in zip(drawn, programs.items(), strict=True):
            ordered = sorted(program["by_kind"].items(), key=lambda item: -item[1])
            values = {KINDS[kind].partition(":")[0]: 1e3 * value for kind, value in ordered}
            common.draw_bars(axes, values, "milliseconds of a meta-step on one core")
            axes.set(title=name)


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false --xla_cpu_enable_xprof_traceme=true"
    )
    jax.config.update("jax_platforms", "cpu")
    if not hasattr(os, "sched_setaffinity"):
        sys.exit("error: this system cannot bind a process to one core; run the benchmark on Linux")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    common.main(Config, run, __doc__, SHORT)
