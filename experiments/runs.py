"""Run directories and result files: who may write to one, what is in it, and what a finished run reports."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from maml_jax import parallel
from maml_jax.types import ArrayTree, Evaluation

console = Console(soft_wrap=True)
"""Where experiments print; silent in every process but the first."""
PATIENCE = float(os.environ.get("MAML_JAX_PATIENCE", 600))
"""Seconds that one process waits for the others, and for a compiled call of all to end, before it gives up."""


class RunError(Exception):
    """A mistake in how an experiment was called, told to the user in one paragraph."""


def write_json(file: Path, content: Any) -> None:
    """Writes a file whole or not at all, numbers that are not finite as null; process 0 does."""
    if jax.process_index() > 0:
        return
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    os.replace(partial, file)


def finite(content: Any) -> Any:
    """`content` with None for every number that is not finite, for which JSON has no word."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def as_json(config: Any) -> dict[str, Any]:
    """A configuration as it is stored: without `run_dir` and `distributed`, which are where and not what."""
    content = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {name: value for name, value in content.items() if name not in ("run_dir", "distributed")}


@contextlib.contextmanager
def open_run(run_dir: Path, config: Any) -> Iterator[Path]:
    """Claims a run directory for this job and this configuration; process 0 does, for all.

    Args:
      run_dir: made if it does not exist.
      config: a dataclass, stored as `config.json`.

    Raises:
      RunError: if a live process holds the directory, if it belongs to another configuration, or if the processes
        were not started with one configuration.
      ProcessError: in the others, if process 0 raises.
    """
    with contextlib.ExitStack() as held:
        with parallel.together("opening the run directory", PATIENCE):
            parallel.on_first(lambda: held.enter_context(_claim(run_dir, config)))
            others = parallel.differing(json.dumps(as_json(config)))
        if others:
            raise RunError(f"of the processes, {others} were started with other settings than process 0")
        yield run_dir


@contextlib.contextmanager
def _claim(run_dir: Path, config: Any) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system when the process ends
        except BlockingIOError:
            raise RunError(
                f"the run directory {run_dir} is in use by a running process; wait for it to end, or choose "
                "another --run-dir"
            ) from None
        wanted = as_json(config)
        config_file = run_dir / "config.json"
        if config_file.exists():
            found = json.loads(config_file.read_text())
            differing = [
                f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
                for name in sorted(found.keys() | wanted.keys())
                if found.get(name) != wanted.get(name)
            ]
            if differing:
                raise RunError(
                    f"the run directory {run_dir} belongs to another configuration: {'; '.join(differing)}. Choose "
                    "another --run-dir, or give the same flags to resume"
                )
        else:
            write_json(config_file, wanted)
        yield


@contextlib.contextmanager
def metrics_log(file: Path, step: int) -> Iterator[Callable[[dict], None]]:
    """Appends records to a `.jsonl` file, dropping those after `step` that an interrupted run left; process 0 does."""
    if jax.process_index() > 0:
        yield lambda record: None
        return
    kept = []
    if file.exists():
        for line in file.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the line that was being written when it was killed
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, file)
    with open(file, "a") as stream:
        yield lambda record: (stream.write(json.dumps(record) + "\n"), stream.flush())


@dataclasses.dataclass
class Trained:
    """What training ends with: parameters to be tested, the step they are of, seconds spent, and how it was run."""

    params: ArrayTree
    best_step: int
    seconds: dict[str, float]
    execution: dict[str, int]


def as_metric(evaluation: Evaluation) -> dict[str, list[float]]:
    """The mean and 95 % interval of an evaluation, lists of K+1 numbers."""
    return {"mean": np.asarray(evaluation.mean).tolist(), "ci95": np.asarray(evaluation.ci95).tolist()}


def finish(
    run_dir: Path, experiment: str, config: Any, trained: Trained, protocol: dict, test: Callable[[], dict]
) -> dict[str, Any]:
    """Tests what was trained and writes results.json; a run that has one is not tested again.

    Args:
      run_dir: claimed by `open_run`.
      experiment: its name.
      config: the settings, stored with the results.
      trained: from `train`.
      protocol: how the test is done, stored with the results.
      test: `() -> dict` with "metrics" and whatever else the experiment reports.

    Returns:
      The content of results.json.
    """
    file = run_dir / "results.json"
    with parallel.together("looking for results", PATIENCE):
        results = parallel.on_first(lambda: json.loads(file.read_text()) if file.exists() else None)
    if results is not None:
        console.print(f"{run_dir} is finished; these are its results")
        return results
    with parallel.together("the test", PATIENCE):
        start = time.perf_counter()
        tested = test()
    packages = ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "numpy")
    results = finite(
        {
            "experiment": experiment,
            "algorithm": config.algorithm,
            "config": as_json(config),
            "protocol": protocol | {"loss_reduction": "mean", "ensemble": 1},
            **tested,
            "execution": trained.execution,
            "seconds": trained.seconds | {"eval": time.perf_counter() - start},
            "meta_steps": config.num_meta_steps,
            "seed": config.seed,
            "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
            "device": device_name(),
        }
    )
    write_json(file, results)
    return results


def device_name() -> str:
    """The kind and number of devices; for a CPU the processor's name and its cores."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {kind}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                kind = line.partition(":")[2].strip()
    return f"{kind}, {len(os.sched_getaffinity(0))} cores"
