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
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from maml_jax import checkpoint, parallel
from maml_jax.outer import init_meta_state, make_train_loop
from maml_jax.types import ArrayTree, Evaluation, MetaLearner, SampleEpisodeFn

ConfigT = TypeVar("ConfigT")
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
console = Console(soft_wrap=True)
"""Where experiments print; silent in every process but the first."""
PATIENCE = float(os.environ.get("MAML_JAX_PATIENCE", 600))
"""Seconds that one process waits for the others, and for a compiled call of all to end, before it gives up."""


class RunError(Exception):
    """A mistake in how an experiment was called, told to the user in one paragraph."""


def main(config_type: type[ConfigT], run: Callable[[ConfigT], Any], description: str) -> None:
    """Parses the command line into `config_type` and runs.

    Mistakes end in one paragraph and exit code 2; with MAML_JAX_TRACEBACK=1 in the environment, in a traceback.
    """
    program = f"python -m {sys.modules['__main__'].__spec__.name}"
    config = tyro.cli(config_type, prog=program, description=description)
    if hasattr(config, "precision"):  # preparing data computes nothing
        set_up_jax(config.precision)
    with parallel.leaving_none_behind():
        try:
            if hasattr(config, "distributed"):
                parallel.initialize(config.distributed, timeout_seconds=PATIENCE)
                console.quiet = jax.process_index() > 0
            run(config)
        except (RunError, ValueError, OSError, parallel.ProcessError) as error:
            if os.environ.get("MAML_JAX_TRACEBACK"):
                raise
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
            sys.exit(2)


def set_up_jax(precision: str) -> None:
    """Matrix precision, the compilation cache, and on a CPU one virtual device per core."""
    # The name "bfloat16" leaves the choice to the backend, and a GPU takes TF32; the algorithm says what is meant.
    algorithm = {"bfloat16": "BF16_BF16_F32"}.get(precision, precision)
    jax.config.update("jax_default_matmul_precision", algorithm)
    if not jax.config.jax_compilation_cache_dir:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache_home / "maml_jax" / "programs"))
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def mesh_for(*counts: int) -> jax.sharding.Mesh | None:
    """A mesh of as many devices as divide every one of `counts`, as many of each process; None if that is one.

    Raises:
      RunError: if one of `counts` does not divide over the processes.
    """
    shared, processes = math.gcd(*counts), range(jax.process_count())
    if shared % len(processes):
        raise RunError(
            f"{' and '.join(map(str, counts))} episodes do not divide over {len(processes)} processes; change "
            "--meta-batch-size and --eval-episodes, or the number of processes"
        )
    local = [jax.local_devices(process_index=process) for process in processes]
    usable = max(n for n in range(1, min(map(len, local)) + 1) if shared % (n * len(local)) == 0)
    devices = [device for of_process in local for device in of_process[:usable]]
    return parallel.task_mesh(devices) if len(devices) > 1 else None


# Run directories


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


def check_config(config: Any) -> None:
    """Raises RunError, before anything expensive, if a count of `config` cannot be."""
    least = {
        "meta_batch_size": 1,
        "num_meta_steps": 0,
        "eval_episodes": 2,
        "eval_inner_steps": 0,
        "val_every": 1,
        "log_every": 1,
    }
    for name, smallest in least.items():
        if (value := getattr(config, name)) < smallest:
            raise RunError(f"--{name.replace('_', '-')} {value} is too small; give at least {smallest}")
    if config.val_every % config.log_every:
        raise RunError(
            f"--log-every {config.log_every} does not divide --val-every {config.val_every}; validations happen "
            "between compiled calls of --log-every meta-steps"
        )


def outer_optimizer(config: Any) -> optax.GradientTransformation:
    """The optimiser of the meta-parameters that `config.outer_optimizer` and `config.outer_lr` name."""
    return {"adam": optax.adam, "sgd": optax.sgd}[config.outer_optimizer](config.outer_lr)


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
    checkpoints = run_dir / "checkpoints"
    with parallel.together("the start of training", PATIENCE):
        if mesh is not None:
            state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.P()))
        saved = {
            "state": state,
            "best": best_of(state.params, -math.inf, 0),
            "train_seconds": np.asarray(0.0, np.float32),
        }
        if (newest := checkpoint.latest(checkpoints)) is not None:
            saved = checkpoint.restore(checkpoints, newest, saved)
    if newest is not None and newest < config.num_meta_steps:
        console.print(f"resuming {run_dir} from step {newest}")
    state, best = saved["state"], saved["best"]
    seconds = {"compile": 0.0, "train": float(saved["train_seconds"])}

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
            with parallel.together(f"the meta-steps after step {step}", PATIENCE):
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
                    best = best_of(state.params, 0.0, step)
                else:
                    with parallel.together(f"the validation after step {step}", PATIENCE):
                        record["val"] = validate(state.params)
                    if record["val"] > float(best["score"]):
                        best = best_of(state.params, record["val"], step)
                train_seconds = np.asarray(seconds["train"], np.float32)
                checkpoint.save(checkpoints, step, {"state": state, "best": best, "train_seconds": train_seconds})
            log(record)
            show(record)
    return Trained(jax.tree.map(np.asarray, best["params"]), int(best["step"]), seconds)


def best_of(params: ArrayTree, score: float, step: int) -> dict[str, Any]:
    """The best state so far, on the host: the buffers of the training state are donated."""
    return {
        "params": jax.tree.map(np.asarray, params),
        "score": np.asarray(score, np.float32),
        "step": np.asarray(step, np.int32),
    }


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
        disable=console.quiet or not console.is_terminal,
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
