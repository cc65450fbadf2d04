"""Where the time of one exact meta-step goes on a CPU: a profile of the compiled program, one thread on one core.

python -m benchmarks.breakdown
python -m benchmarks.breakdown --short
"""

import collections
import dataclasses
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from benchmarks import common, meta_step
from experiments.runs import RunError


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """What is profiled: the library's default on one device."""

    max_repetitions: int = 5
    """Meta-steps of the profile; a time is a mean over them."""
    meta_batch_size: int = 32
    """Tasks of a meta-step."""
    inner_steps: int = 1
    """Inner steps."""
    filters: int = 64
    """Filters of each convolution."""
    matmul_size: int = 2048
    """Side of the square float32 matrices whose product gives the peak of the core."""


SHORT = Config(short=True, max_repetitions=2, max_seconds=3.0, meta_batch_size=8)

KINDS = {
    "dot": "matrix products",
    "reduce": "sums: statistics, gradients of biases and offsets",
    "pad": "padding, and adding overlapping patches up",
    "slice": "slices for the patches",
    "concatenate": "patches put together",
    "copy": "copies into another layout",
    "other": "elementwise: normalisation, ReLU, updates",
}
"""By the first of these operations that a fusion holds."""

_COMPUTATION = re.compile(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$", re.MULTILINE)


def kinds_of(program: str) -> dict[str, str]:
    """The kind of every instruction of an optimised HLO text, by name; see `KINDS`."""
    bodies = dict(_COMPUTATION.findall(program))
    kinds = {}
    for name, definition in _INSTRUCTION.findall(program):
        if re.search(r" (while|call|conditional)\(", definition):  # their time is that of what they run
            continue
        called = re.search(r"calls=%([\w.\-]+)", definition)
        text = bodies.get(called[1], "") if called else f" {definition}"
        found = [kind for kind in ("dot", "reduce", "pad", "slice", "concatenate") if f" {kind}(" in text]
        is_copy = "copy" in name or " copy(" in text or " transpose(" in text
        kinds[name] = found[0] if found else "copy" if is_copy else "other"
    return kinds


def profile(call: Any, kinds: dict[str, str], repetitions: int) -> dict[str, float]:
    """Seconds of one call by kind of operation, from `jax.profiler`.

    Raises:
      RunError: if the trace holds no operation of the program.
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
    case = meta_step.Case(
        filters=config.filters,
        meta_batch_size=config.meta_batch_size,
        inner_steps=config.inner_steps,
        on_mesh=False,
    )
    compiled = meta_step.prepare(case)
    timed = meta_step.run_cases({meta_step.OURS: case}, "", config)[meta_step.OURS]
    compiled.call()
    seconds = profile(compiled.call, kinds_of(compiled.program), config.max_repetitions)
    content = {
        "config": dataclasses.asdict(config) | {"results_dir": None},
        "seconds": seconds,
        "step": timed,
    }
    common.show(tables(content))
    common.write_results("breakdown", config, {"seconds": seconds, "step": timed})
    draw(config, seconds)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """Milliseconds by kind of operation, and the floor."""
    seconds, step = content["seconds"], content["step"]
    total = sum(seconds.values())
    peak = step["matmul_flops_per_second"]
    floor = step["flops"] / peak
    return [
        common.Table(
            f"One exact meta-step on one core, {step['meta_batch_size']} tasks, inner steps: {step['inner_steps']}",
            ["", "ms", "share"],
            [
                [KINDS[kind], f"{1e3 * value:.0f}", f"{value / total:.0%}"]
                for kind, value in sorted(seconds.items(), key=lambda item: -item[1])
            ]
            + [["all of them", f"{1e3 * total:.0f}", "100%"]],
            f"Without the profiler a meta-step takes {1e3 * step['seconds'].median:.0f} ms. "
            f"Its {step['flops'] / 1e9:.1f} GFLOP would take {1e3 * floor:.0f} ms at the core's peak of "
            f"{peak / 1e9:.0f} GFLOP/s: the floor.",
        )
    ]


def draw(config: Config, seconds: dict[str, float]) -> None:
    """A bar for each kind of operation."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    with common.figure("breakdown", config, width=7) as (axes,):
        values = {KINDS[kind].partition(":")[0]: 1e3 * value for kind, value in ordered}
        common.draw_bars(axes, values, "milliseconds of a meta-step on one core")


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false --xla_cpu_enable_xprof_traceme=true"
    )
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    common.main(Config, run, __doc__, SHORT)
