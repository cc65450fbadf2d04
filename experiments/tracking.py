"""Where the metrics of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, and a profile of the program.

The packages are optional. Neither is imported unless it was asked for.
"""

import contextlib
import dataclasses
import importlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.runs import RunError, as_json, write_text


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Where else metrics go. These settings do not change the results."""

    tensorboard: bool = False
    """Write metrics for TensorBoard too, into RUN/tensorboard."""
    wandb: bool = False
    """Send metrics to Weights & Biases too; its project and mode are those of the environment, such as $WANDB_PROJECT
    and $WANDB_MODE."""
    profile: bool = False
    """Write a trace of the second compiled call, into RUN/profile. TensorBoard and Perfetto show it."""


OFF = Tracking()


def require(package: str, extra: str) -> Any:
    """Imports an optional package.

    Raises:
      RunError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise RunError(f"--{extra} needs the package {package}; install it with `pip install {package}`") from error


@contextlib.contextmanager
def trackers(run_dir: Path, config: Any, step: int) -> Iterator[Callable[[dict], None]]:
    """Gives `(record) -> None`, which passes a record of metrics.jsonl on. Only process 0 does.

    Args:
      run_dir: the directory of the run.
      config: its settings.
      step: where the run goes on. What an interrupted run has written after it is hidden or replaced.

    Raises:
      RunError: if a package is missing.
    """
    settings = getattr(config, "tracking", OFF)
    if jax.process_index() > 0:
        yield lambda record: None
        return
    with contextlib.ExitStack() as stack:
        writers = []
        if settings.tensorboard:
            writer = require("tensorboardX", "tensorboard").SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=step + 1
            )
            stack.callback(writer.close)

            def to_tensorboard(record: dict) -> None:
                for name, value in record.items():
                    if name != "step":
                        writer.add_scalar(name, value, record["step"])
                writer.flush()

            writers.append(to_tensorboard)
        if settings.wandb:
            run = require("wandb", "wandb").init(
                dir=str(run_dir), id=run_identity(run_dir), resume="allow", name=run_dir.name, config=as_json(config)
            )
            stack.callback(run.finish)
            writers.append(
                lambda record: run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
            )

        def write(record: dict) -> None:
            for writer in writers:
                writer(record)

        yield write


def run_identity(run_dir: Path) -> str:
    """A name of the run that stays the same when it is resumed, kept in RUN/wandb-id."""
    file = run_dir / "wandb-id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    return file.read_text()


@contextlib.contextmanager
def profiled(directory: Path, is_wanted: bool) -> Iterator[None]:
    """Traces what happens within, if it is wanted."""
    if not is_wanted:
        yield
        return
    with jax.profiler.trace(str(directory)):
        yield
