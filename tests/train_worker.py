"""Tiny trainings that test_kill.py starts in processes of their own: `python train_worker.py RUN STEPS`.

With a number of bytes as a third argument no file may grow beyond it, as if the disk was full.
"""

import dataclasses
import resource
import signal
import sys
from pathlib import Path

import jax
import optax

from experiments import common, images, runs, sinusoid
from maml_jax import losses, maml, models
from maml_jax.tasks import sinusoid as tasks


def train(run_dir: Path, steps: int) -> None:
    """Takes meta-steps with a checkpoint after each, so that a process is often killed within one."""
    jax.config.update("jax_num_cpu_devices", 1)
    config = dataclasses.replace(
        sinusoid.METHODS["maml"], num_meta_steps=steps, meta_batch_size=2, query_shot=3, val_every=1, log_every=1,
        eval_episodes=2, chunk_size=2,
    )  # fmt: skip
    learner = maml(
        models.mlp(features=(64, 64, 1)), losses.mean_squared_error, inner_optimizer=optax.sgd(0.01), num_inner_steps=1
    )
    with runs.open_run(run_dir, config):
        common.train(run_dir, config, common.Training(learner, tasks.make_sampler(shot=3, query_shot=3)))


def train_seeds(run_dir: Path, steps: int) -> None:
    """Trains two seeds in one program, and tests them."""
    jax.config.update("jax_num_cpu_devices", 2)
    config = dataclasses.replace(
        sinusoid.METHODS["maml"], seeds=2, num_meta_steps=steps, meta_batch_size=2, query_shot=3, val_every=2,
        log_every=1, eval_episodes=2, eval_shots=(5,), eval_inner_steps=1, run_dir=run_dir,
    )  # fmt: skip
    sinusoid.run(config)


def train_streamed(run_dir: Path, steps: int) -> None:
    """Trains and validates on photographs that stay on the host, and tests; they lie beside the run directory."""
    jax.config.update("jax_num_cpu_devices", 1)
    config = dataclasses.replace(
        images.METHODS["maml"], stream=True, data_dir=run_dir.parent / "photographs", size=16, filters=2, way=2,
        query_shot=1, meta_batch_size=2, num_meta_steps=steps, val_every=2, log_every=1, eval_episodes=2,
        train_episodes=2, eval_inner_steps=1, run_dir=run_dir,
    )  # fmt: skip
    images.run(config)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    train(Path(sys.argv[1]), int(sys.argv[2]))
