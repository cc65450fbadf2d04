"""What the benchmarks share: timing, result files, tables and figures.

A time is measured after compilation and one warm-up call, and includes waiting for the results. It is reported as
the median and the quartiles of its repetitions. Compilation is timed separately.

Only `main` needs tyro, and only `figure` matplotlib.
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
import rich.table
from rich.console import Console

from experiments.runs import RunError, device_name, flag, num_cores, versions, write_json
from maml_jax import parallel
from maml_jax.types import Batch, Episode, MetaState, check_integer

ConfigT = TypeVar("ConfigT")
LOAD_BEFORE = os.getloadavg()[0]
"""The load of the machine when the benchmark begins: above a few tenths, something else is running."""
console = Console(width=None if sys.stdout.isatty() else 150)


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the results of a benchmark go."""

    short: bool = False
    """Replace the defaults of the other flags by a small sweep that takes a few minutes."""
    results_dir: Path = Path("benchmarks/results")
    """The directory of NAME.json and NAME.png. With --short they are written to its subdirectory "short"."""


@dataclasses.dataclass(frozen=True)
class Settings(Output):
    """The settings of every benchmark that measures times."""

    max_repetitions: int = 30
    """Repetitions of each timed program, after one warm-up call."""
    max_seconds: float = 20.0
    """Seconds after which a timed program is not repeated any more. It is timed at least once."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything is measured, for limits that leave nothing to measure."""
        check_integer("--max-repetitions", self.max_repetitions, at_least=1)


def check_not_empty(config: Any, *names: str) -> None:
    """Raises ValueError if one of these settings has no value."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{flag(name)} needs at least one value")


class Timing(NamedTuple):
    """Seconds of one call: median and quartiles over `repetitions`."""

    median: float
    lower: float
    upper: float
    repetitions: int

    def __str__(self) -> str:
        """Median and quartiles in milliseconds."""
        median, lower, upper = (f"{ms:.4g}" if ms < 1000 else f"{ms:.0f}" for ms in (1e3 * x for x in self[:3]))
        return f"{median} ({lower}-{upper})"


def times(ratio: Timing) -> str:
    """A ratio of times as a cell: median and quartiles, or the only one."""
    if ratio.repetitions == 1:
        return f"{ratio.median:.0f}, one call"
    return f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})"


class Table(NamedTuple):
    """A table of a benchmark, as it is printed and as it appears in README.md.

    Attributes:
      title: what was measured.
      columns: the headings of the columns.
      rows: cells, converted by `str`.
      note: text below the table, one paragraph per line.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


def summarise(values: Sequence[float]) -> Timing:
    """Median and quartiles of one or more values."""
    values = list(values)
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds from the start of one call until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(call: Callable[[], Any], settings: Settings) -> Timing:
    """Times a call in its steady state.

    Args:
      call: takes no argument and returns the arrays to wait for. It is called once before the clock starts.
      settings: the limits on repetitions and on seconds.
    """
    jax.block_until_ready(call())
    seconds = [seconds_of(call)]
    while len(seconds) < settings.max_repetitions and sum(seconds) < settings.max_seconds:
        seconds.append(seconds_of(call))
    return summarise(seconds)


def measure_alternately(calls: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, list[float]]:
    """Times several calls in rounds. Each runs once per round, so a disturbance of the machine affects all of them.

    Every second round has the reverse order, so that no call always has the same one before it.

    Args:
      calls: as for `measure`, by name. A call that takes more than a quarter of `max_seconds` only runs in the first
        round.
      settings: the limit on rounds, and the number of seconds after which no further round begins. Slow calls do not
        count towards the seconds.

    Returns:
      Seconds of each call, one number per round.
    """
    slow = {name for name, call in calls.items() if seconds_of(call) > settings.max_seconds / 4}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(settings.max_repetitions):
        for name in list(calls)[:: -1 if repetition % 2 else 1]:
            if repetition == 0 or name not in slow:
                seconds[name].append(seconds_of(calls[name]))
        if sum(sum(values) for name, values in seconds.items() if name not in slow) > settings.max_seconds:
            break
    return seconds


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> Timing:
    """The times of a call relative to those of another one, in each round; of a call that ran once, to their median."""
    if len(seconds) == 1:
        return summarise([seconds[0] / statistics.median(reference)])
    return summarise([a / b for a, b in zip(seconds, reference, strict=False)])


def compile_of(function: Callable, *args: Any) -> tuple[Any, float]:
    """Compiles a function, jitted or not, for `args`. Returns the program and the seconds of compilation."""
    start = time.perf_counter()
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - start


def stepping(step: Callable, state: Any, *args: Any) -> Callable[[], Any]:
    """A call that runs `state, info = step(state, *args)`, each time on the state of the call before.

    It starts from a copy of `state`, because `step` may donate its buffers.
    """
    state = jax.tree.map(jnp.copy, state)

    def call():
        nonlocal state
        state, info = step(state, *args)
        return state, info

    return call


def random_episodes(
    *, num_tasks: int, way: int, shot: int, query_shot: int, shape: Sequence[int] = (28, 28, 1), seed: int = 0
) -> Episode:
    """Classification episodes [T, ...] whose images are binary noise with a tenth of the pixels set."""

    def batch(key, per_class):
        inputs = jax.random.bernoulli(key, 0.1, (num_tasks, way * per_class, *shape)).astype(jnp.float32)
        return Batch(inputs, jnp.tile(jnp.repeat(jnp.arange(way), per_class), (num_tasks, 1)))

    support_key, query_key = jax.random.split(jax.random.key(seed))
    return Episode(batch(support_key, shot), batch(query_key, query_shot))


def place(state: MetaState, episodes: Episode, mesh: jax.sharding.Mesh | None) -> tuple[MetaState, Episode]:
    """Copies the state to every device of a mesh and divides the episodes over the devices, as in a training run."""
    if mesh is None:
        return state, episodes
    divided = jax.sharding.NamedSharding(mesh, jax.P(parallel.AXIS))
    return parallel.replicate(state, mesh), jax.device_put(episodes, divided)


def main(
    config_type: type[ConfigT],
    run: Callable[[ConfigT], Any],
    description: str,
    short: ConfigT,
    *,
    has_one_file: bool = True,
) -> None:
    """Parses the command line, sets up JAX and runs a benchmark.

    There is no compilation cache, so every compilation is timed in full. A CPU has one virtual device per core, as in
    the experiments.

    Args:
      config_type: a frozen dataclass that extends `Output`.
      run: the benchmark.
      description: the text of --help.
      short: the defaults with --short.
      has_one_file: whether all results are in NAME.json. If not, the benchmark calls `check_not_replaced` itself.
    """
    import tyro

    from experiments.cli import wrapped

    default = short if "--short" in sys.argv[1:] else config_type()
    prog = f"python -m benchmarks.{Path(sys.argv[0]).stem}"
    config = tyro.cli(config_type, default=default, description=wrapped(description), prog=prog)
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", num_cores())
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        results_folder(config)  # a directory that cannot be written is noticed before anything is measured
        if has_one_file:
            check_not_replaced(Path(sys.argv[0]).stem, config)
        run(config)
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def check_not_replaced(name: str, settings: Output, *, suffix: str = "") -> None:
    """Raises RunError if the results of other settings would be lost; see `write_results` for the arguments."""
    file = results_folder(settings) / f"{name}{suffix}.json"
    if settings.short or not file.exists():
        return
    wanted, stored = json.loads(json.dumps(_stored(settings), default=str)), read_results(file)["config"]
    limits = ("max_repetitions", "max_seconds", "short")
    differing = [
        f"{key} is {stored[key]} there and {value} here"
        for key, value in wanted.items()
        if key not in limits and key in stored and stored[key] != value
    ]
    if differing:
        raise RunError(
            f"{file} has results of other settings: {'; '.join(differing)}. Choose another --results-dir, or delete "
            "the file"
        )


def _stored(settings: Output) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(settings).items() if key != "results_dir"}


def write_results(name: str, settings: Output, content: dict[str, Any], *, suffix: str = "") -> Path:
    """Writes NAME.json: the content, the configuration, versions of packages, and the device.

    Args:
      name: the name of the benchmark.
      settings: its configuration, stored without `results_dir`.
      content: values that JSON can represent. A `Timing` is stored with its field names.
      suffix: comes after the name of the benchmark in the name of the file, where one benchmark writes several.

    Returns:
      The path of the file.
    """
    config = _stored(settings)
    flags = shlex.join(sys.argv[1:]) if Path(sys.argv[0]).stem == name else ""
    file = results_folder(settings) / f"{name}{suffix}.json"
    header = {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} {flags}".strip(),
        "config": json.loads(json.dumps(config, default=str)),
        "versions": versions("torch", "torchopt", "higher"),
        "device": device_name(),
        "load_average_before": LOAD_BEFORE,
    }
    write_json(file, header | _as_json(content))
    console.print(f"wrote {file}")
    return file


def results_folder(settings: Output) -> Path:
    """The directory of the results, which is made if it does not exist."""
    folder = settings.results_dir.expanduser()
    folder = folder / "short" if settings.short else folder
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
def figure(name: str, settings: Output, *, columns: int = 1, width: float = 4.5, rows: int = 1) -> Iterator[Any]:
    """Yields a list of `rows` times `columns` axes, each `width` inches wide, then writes NAME.png and NAME.pdf."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(1 + width * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    yield list(drawing.subplots(rows, columns, squeeze=False).ravel())
    for suffix, metadata in ((".png", None), (".pdf", {"CreationDate": None})):
        file = results_folder(settings) / f"{name}{suffix}"
        drawing.savefig(file, dpi=120, metadata=metadata)
        console.print(f"wrote {file}")


def draw_bars(axes: Any, values: dict[str, float], label: str) -> None:
    """Draws a horizontal bar with its value for each name, the first on top."""
    bars = axes.barh(list(values)[::-1], list(values.values())[::-1])
    axes.bar_label(bars, [_short(value) for value in values.values()][::-1])
    axes.set(xlabel=label)
    axes.margins(x=0.15)


def draw_points(axes: Any, values: dict[str, float], label: str) -> None:
    """Draws a point with its value for each name, the first on top. The axis is logarithmic, so a bar has no length."""
    from matplotlib.ticker import LogLocator, NullLocator

    places = range(len(values))[::-1]
    axes.hlines(places, min(values.values()), list(values.values()), color="0.85", zorder=1)
    axes.plot(list(values.values()), places, "o", zorder=2)
    for place, value in zip(places, values.values(), strict=True):
        axes.annotate(_short(value), (value, place), (7, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, list(values))
    axes.set(xlabel=label, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.2)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def read_results(file: Path) -> dict[str, Any]:
    """Reads a file of `write_results`, and converts what was a `Timing` back to one."""
    return json.loads(
        file.read_text(), object_hook=lambda found: Timing(**found) if found.keys() == set(Timing._fields) else found
    )


def show(tables: Sequence[Table]) -> None:
    """Prints tables with their notes."""
    for table in tables:
        print_table(table.title, table.columns, table.rows)
        console.print(f"{table.note}\n", highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table. The first column is aligned to the left, the others to the right."""
    table = rich.table.Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
