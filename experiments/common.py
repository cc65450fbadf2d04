"""What the experiments share: run directories, the training loop with its progress bar, result files."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from maml_jax import checkpoint, parallel
from maml_jax.outer import init_meta_state, make_train_loop
from maml_jax.types import ArrayTree, Evaluation, MetaLearner, SampleEpisodeFn

ConfigT = TypeVar("ConfigT")
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
console = Console(soft_wrap=True)


class RunError(Exception):
    """A mistake in how an experiment was called, told to the user in one paragraph."""


def main(config_type: type[ConfigT], run: Callable[[ConfigT], Any], description: str) -> None:
    """Parses the command line into `config_type` and runs; mistakes end in one paragraph and exit code 2."""
    config = tyro.cli(config_type, description=description)
    set_up_jax(config.precision)
    try:
        run(config)
    except (RunError, ValueError, FileNotFoundError) as error:
        if os.environ.get("MAML_JAX_TRACEBACK"):
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)


def set_up_jax(precision: str) -> None:
    """Matrix precision, the compilation cache, and on a CPU one virtual device per core."""
    jax.config.update("jax_default_matmul_precision", precision)
    if not jax.config.jax_compilation_cache_dir:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache_home / "maml_jax" / "programs"))
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def mesh_for(*counts: int) -> jax.sharding.Mesh | None:
    """A mesh of as many devices as divide every one of `counts`; None if that is one."""
    devices = jax.devices()
    usable = max(n for n in range(1, len(devices) + 1) if math.gcd(*counts) % n == 0)
    return parallel.task_mesh(devices[:usable]) if usable > 1 else None


# Run directories


def write_json(file: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, file)


def as_json(config: Any) -> dict[str, Any]:
    """A configuration as it is stored: without `run_dir`, which is where and not what."""
    content = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    del content["run_dir"]
    return content


@contextlib.contextmanager
def open_run(run_dir: Path, config: Any) -> Iterator[Path]:
    """Claims a run directory for this process and this configuration.

    Args:
      run_dir: made if it does not exist.
      config: a dataclass, stored as `config.json`.

    Raises:
      RunError: if a live process holds the directory, or it belongs to another configuration.
    """
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
        yield run_dir


# Training


@dataclasses.dataclass
class Trained:
    """What training ends with: parameters to be tested, the step they are of, and seconds spent."""

    params: ArrayTree
    best_step: int
    seconds: dict[str, float]


def train(
    run_dir: Path,
    config: Any,
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sample_episode: SampleEpisodeFn,
    *,
    validate: Callable[[ArrayTree], float] | None = None,
) -> Trained:
    """Trains for `config.num_meta_steps`, or goes on from the newest checkpoint in `run_dir`.

    Every `config.val_every` steps the state is validated and checkpointed; with `validate` the parameters
    that scored highest are returned, else the last. The result does not depend on interruptions.

    Args:
      run_dir: claimed by `open_run`.
      config: has num_meta_steps, meta_batch_size, chunk_size, val_every, log_every and seed.
      learner: the algorithm.
      optimizer: the outer optax optimiser.
      sample_episode: the task distribution.
      validate: `(params) -> score`, larger is better.

    Raises:
      RunError: if the loss ceases to be finite. The last checkpoint stays.
    """
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    inputs = jax.eval_shape(sample_episode, init_key).support.inputs
    inputs = np.zeros(inputs.shape, inputs.dtype)
    mesh = mesh_for(config.meta_batch_size)
    state = jax.jit(lambda key: init_meta_state(learner, optimizer, key, inputs))(init_key)
    saved = {
        "state": state,
        "best": {"params": state.params, "score": np.float32(-np.inf), "step": np.int32(0)},
        "train_seconds": np.float32(0.0),
    }
    checkpoints = run_dir / "checkpoints"
    if (newest := checkpoint.latest(checkpoints)) is not None:
        saved = checkpoint.restore(checkpoints, newest, saved)
        console.print(f"resuming {run_dir} from step {newest}")
    best, seconds = saved["best"], {"compile": 0.0, "train": float(saved["train_seconds"])}
    state = jax.device_put(saved["state"], jax.sharding.NamedSharding(mesh, jax.P()) if mesh else None)

    loops: dict[int, Callable] = {}

    def loop_of(num_steps: int) -> Callable:
        if num_steps not in loops:
            start = time.perf_counter()
            loop = make_train_loop(
                learner,
                optimizer,
                sample_episode,
                meta_batch_size=config.meta_batch_size,
                num_steps=num_steps,
                chunk_size=config.chunk_size,
                mesh=mesh,
            )
            loops[num_steps] = loop.lower(state, train_key).compile()
            seconds["compile"] += time.perf_counter() - start
        return loops[num_steps]

    step = int(state.step)
    with metrics_log(run_dir / "metrics.jsonl", step) as log, progress_bar(config.num_meta_steps) as show:
        while step < config.num_meta_steps:
            boundary = min(config.num_meta_steps, (step // config.val_every + 1) * config.val_every)
            loop = loop_of(min(config.log_every, boundary - step))
            start = time.perf_counter()
            state, info = loop(state, train_key)
            loss = np.asarray(info.loss)
            elapsed = time.perf_counter() - start
            seconds["train"] += elapsed
            step += len(loss)
            if not np.isfinite(loss).all():
                raise RunError(
                    f"the training loss is not finite from step {step - len(loss) + int(np.argmin(np.isfinite(loss)))} "
                    "on; lower --outer-lr or --inner-lr and choose another --run-dir"
                )
            record = {
                "step": step,
                "loss": float(loss.mean()),
                "grad_norm": float(np.mean(info.grad_norm)),
                "steps_per_second": len(loss) / elapsed,
            }
            if step == boundary:
                if validate is None:
                    best = {"params": state.params, "score": np.float32(0.0), "step": np.int32(step)}
                else:
                    record["val"] = validate(state.params)
                    if record["val"] > float(best["score"]):
                        params = jax.tree.map(np.asarray, state.params)  # the state's buffers are donated
                        best = {"params": params, "score": np.float32(record["val"]), "step": np.int32(step)}
                seconds_so_far = np.float32(seconds["train"])
                checkpoint.save(checkpoints, step, {"state": state, "best": best, "train_seconds": seconds_so_far})
            log(record)
            show(record)
    return Trained(jax.tree.map(np.asarray, best["params"]), int(best["step"]), seconds)


@contextlib.contextmanager
def metrics_log(file: Path, step: int) -> Iterator[Callable[[dict], None]]:
    """Appends records to a `.jsonl` file, dropping those after `step` that an interrupted run left."""
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


@contextlib.contextmanager
def progress_bar(num_steps: int) -> Iterator[Callable[[dict], None]]:
    """A bar with speed, time left, loss and validation; without a terminal, a line per validation."""
    bar = Progress(
        TextColumn("meta-steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.1f}/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[val]}"),
        console=console,
        disable=not console.is_terminal,
    )
    latest = {"val": ""}

    def show(record: dict) -> None:
        if "val" in record:
            latest["val"] = f"validation {record['val']:.4f}"
        fields = {"loss": record["loss"], "speed": record["steps_per_second"], "val": latest["val"]}
        bar.update(task, completed=record["step"], **fields)
        if "val" in record and not console.is_terminal:
            console.print(
                f"step {record['step']}/{num_steps}  loss {record['loss']:.4f}  {latest['val']}  "
                f"{record['steps_per_second']:.1f} meta-steps/s"
            )

    with bar:
        task = bar.add_task("", total=num_steps, speed=0.0, loss=math.nan, val="")
        yield show


# Results


def as_metric(evaluation: Evaluation) -> dict[str, list[float]]:
    """The mean and 95 % interval of an evaluation, lists of K+1 numbers."""
    return {"mean": np.asarray(evaluation.mean).tolist(), "ci95": np.asarray(evaluation.ci95).tolist()}


def provenance() -> dict[str, Any]:
    """Versions of Python and the packages that matter, and the device."""
    packages = ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "numpy")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    return {"versions": versions, "device": device_name()}


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
