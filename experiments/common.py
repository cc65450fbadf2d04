"""What the experiments share: the command line, the devices, the training loop with its progress bar."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.runs import PATIENCE, RunError, Trained, console, metrics_log
from maml_jax import checkpoint, parallel
from maml_jax.outer import default_chunk_size, init_meta_state, make_train_loop
from maml_jax.types import ArrayTree, MetaLearner, SampleEpisodeFn

ConfigT = TypeVar("ConfigT")
Precision = Literal["float32", "tensorfloat32", "bfloat16"]


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
    jax.config.update("jax_default_matmul_precision", matmul_algorithm(precision))
    if not jax.config.jax_compilation_cache_dir:
        cache_home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache_home / "maml_jax" / "programs"))
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def matmul_algorithm(precision: str) -> str:
    """What `--precision` stands for in `jax_default_matmul_precision`."""
    # The name "bfloat16" leaves the choice to the backend, and a GPU takes TF32; the algorithm says what is meant.
    return {"bfloat16": "BF16_BF16_F32"}.get(precision, precision)


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
    num_devices = 1 if mesh is None else mesh.size
    episodes = jax.eval_shape(
        jax.vmap(sample_episode), jax.random.split(init_key, config.meta_batch_size // num_devices)
    )
    chunk_size = default_chunk_size(state.params, episodes) if config.chunk_size is None else config.chunk_size
    execution = {"devices": num_devices, "chunk_size": chunk_size}
    return Trained(jax.tree.map(np.asarray, best["params"]), int(best["step"]), seconds, execution)


def best_of(params: ArrayTree, score: float, step: int) -> dict[str, Any]:
    """The best state so far, on the host: the buffers of the training state are donated."""
    return {
        "params": jax.tree.map(np.asarray, params),
        "score": np.asarray(score, np.float32),
        "step": np.asarray(step, np.int32),
    }


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
