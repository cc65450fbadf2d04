"""What a training shows while it runs."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from experiments.runs import console, device_name

LINE_SECONDS = 60.0
"""Without a terminal a line is printed at every validation, and when none was for so long."""


@contextlib.contextmanager
def progress_bar(num_steps: int) -> Iterator[Callable[[dict], None]]:
    """A bar with speed, time left, loss, validation and memory. Without a terminal, a line for each validation."""
    bar = Progress(  # on a narrow terminal the bar shrinks, and no number is cut
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[speed]:.1f}/s"),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[val]}"),
        TextColumn("{task.fields[memory]}"),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )
    latest = {"val": "", "time": time.monotonic()}

    def show(record: dict) -> None:
        if "val" in record:
            latest["val"] = f"validation {record['val']:.4f}"
            if "train" in record:
                latest["val"] += f" (training {record['train']:.4f})"
        fields = {"loss": record["loss"], "speed": record["steps_per_second"], "val": latest["val"]}
        fields["memory"] = memory_in_use()
        bar.update(task, completed=record["step"], **fields)
        is_due = "val" in record or record["step"] == num_steps or time.monotonic() > latest["time"] + LINE_SECONDS
        if is_due and not console.is_terminal:
            latest["time"] = time.monotonic()
            left = (num_steps - record["step"]) / record["steps_per_second"] / 60
            console.print(
                f"step {record['step']}/{num_steps}  loss {record['loss']:.4f}  {latest['val']}  "
                f"{record['steps_per_second']:.1f} meta-steps/s  {left:.0f} min left  {memory_in_use()}"
            )

    if console.is_terminal:
        console.print(f"meta-steps on {device_name()}")
    with bar:
        task = bar.add_task("", total=num_steps, speed=0.0, loss=math.nan, val="", memory="")
        yield show


def memory_in_use() -> str:
    """The largest memory so far: of a device if it says so, else of this process."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / 1e9:.1f} GB"
