"""What the benchmarks share: timing, result files, tables and figures.

A time here is that of a program already compiled and warm, with its results waited for. It is reported as
the median and the quartiles of its repetitions, and the seconds of compilation beside it.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from experiments.common import provenance, write_json

ConfigT = TypeVar("ConfigT")
console = Console(soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every benchmark can be told."""

    short: bool = False
    """Change the defaults of the other flags to a small sweep that takes a minute or two."""
    max_repetitions: int = 30
    """Repetitions of each timed program, after one call to warm up."""
    max_seconds: float = 20.0
    """Seconds after which a timed program is not repeated again; it is timed once at least."""
    results_dir: Path = Path("benchmarks/results")
    """Where NAME.json and NAME.png are written; a run with --short writes to its folder "short"."""


class Timing(NamedTuple):
    """Seconds of one call: median and quartiles over `repetitions`."""

    median: float
    lower: float
    upper: float
    repetitions: int

    def __str__(self) -> str:
        """Median and quartiles in milliseconds."""
        return f"{1e3 * self.median:.4g} ({1e3 * self.lower:.4g}-{1e3 * self.upper:.4g})"


def summarise(values: Sequence[float]) -> Timing:
    """Median and quartiles of one or more values."""
    values = list(values)
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call whose results are waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(call: Callable[[], Any], settings: Settings) -> Timing:
    """Times a call in its steady state.

    Args:
      call: takes no argument and returns the arrays to wait for. It is called once before the clock starts.
      settings: how often, and for how long at most.
    """
    jax.block_until_ready(call())
    seconds = [seconds_of(call)]
    while len(seconds) < settings.max_repetitions and sum(seconds) < settings.max_seconds:
        seconds.append(seconds_of(call))
    return summarise(seconds)


def measure_alternately(calls: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, list[float]]:
    """Times several calls in rounds, each once a round, so that a disturbance meets all of them.

    Args:
      calls: as for `measure`, by name.
      settings: rounds at most, and seconds at most for all calls together.

    Returns:
      Seconds [rounds] of each call. The ratio of two calls is that of a round, summarised over the rounds.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for _ in range(settings.max_repetitions):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
        if time.perf_counter() - start > settings.max_seconds:
            break
    return seconds


def compile_of(function: Callable, *args: Any) -> tuple[Any, float]:
    """Compiles a jitted function (or one to be jitted) for `args`; returns the program and the seconds it took."""
    start = time.perf_counter()
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - start


def stepping(step: Callable, state: Any, *args: Any) -> Callable[[], Any]:
    """A call that runs `state, info = step(state, *args)` and carries the state, whose buffers are donated."""
    state = jax.tree.map(jnp.copy, state)

    def call():
        nonlocal state
        state, info = step(state, *args)
        return state, info

    return call


def main(config_type: type[ConfigT], run: Callable[[ConfigT], Any], description: str, short: ConfigT) -> None:
    """Parses the command line, sets up JAX and runs.

    There is no compilation cache, so that seconds of compilation are what they say, and on a CPU there is one
    virtual device per core, as in the experiments.

    Args:
      config_type: a frozen dataclass extending `Settings`.
      run: the benchmark.
      description: for --help.
      short: the defaults that --short stands for.
    """
    default = short if "--short" in sys.argv[1:] else config_type()
    config = tyro.cli(config_type, default=default, description=description)
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    jax.config.update("jax_default_matmul_precision", "float32")
    run(config)


def write_results(name: str, settings: Settings, content: dict[str, Any]) -> Path:
    """Writes NAME.json: the content, and what it was measured with and on.

    Args:
      name: of the benchmark.
      settings: its configuration, stored whole but for `results_dir`.
      content: anything that JSON can hold; a `Timing` is stored with its field names.

    Returns:
      The file.
    """
    config = {key: value for key, value in dataclasses.asdict(settings).items() if key != "results_dir"}
    flags = shlex.join(sys.argv[1:]) if Path(sys.argv[0]).stem == name else ""
    file = _folder(settings) / f"{name}.json"
    header = {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} {flags}".strip(),
        "config": json.loads(json.dumps(config, default=str)),
        **provenance(),
        "load_average": os.getloadavg()[0],
    }
    write_json(file, header | _as_json(content))
    console.print(f"wrote {file}")
    return file


def _folder(settings: Settings) -> Path:
    folder = settings.results_dir / "short" if settings.short else settings.results_dir
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_json(content: Any) -> Any:
    if isinstance(content, Timing):
        return content._asdict()
    if isinstance(content, dict):
        return {key: _as_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_as_json(value) for value in content]
    return content


@contextlib.contextmanager
def figure(name: str, settings: Settings, *, columns: int = 1) -> Iterator[Any]:
    """Yields `columns` axes side by side (a list) and writes them to NAME.png; no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(1 + 4.5 * columns, 4), layout="constrained")
    FigureCanvasAgg(drawing)
    yield list(drawing.subplots(1, columns, squeeze=False)[0])
    file = _folder(settings) / f"{name}.png"
    drawing.savefig(file, dpi=120)
    console.print(f"wrote {file}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table, the first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
