"""One process of the tiny experiment that test_distributed.py starts on several processes.

WORKER_FAULT=ACTION:PROCESS makes that process do something terrible to itself: "kill", "stop" and "end" when
the second validation begins, "hang" when it first samples. "clock" makes its time run fast: each call is long ago.
"""

import dataclasses
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import optax

from experiments import cli, common, devices, runs
from maml_jax import evaluate, losses, maml
from maml_jax.models import mlp
from maml_jax.tasks import few_shot

ACTION, _, VICTIM = os.environ.get("WORKER_FAULT", "").partition(":")


@dataclasses.dataclass(frozen=True)
class Config:
    """As small as an experiment can be."""

    run_dir: Path
    distributed: str = "auto"
    algorithm: str = "maml"
    outer_optimizer: str = "adam"
    outer_lr: float = 1e-2
    outer_schedule: str = "constant"
    outer_lr_end: float = 0.0
    meta_batch_size: int = 8
    num_meta_steps: int = 12
    eval_episodes: int = 8
    val_every: int = 4
    log_every: int = 2
    chunk_size: int | None = None
    precision: str = "float32"
    seed: int = 0


def fault(action: str) -> None:
    """Does `action` if it is what this process was told to do."""
    if action != ACTION or jax.process_index() != int(VICTIM):
        return
    if action == "clock":
        common.SAVE_SECONDS = 0.0
        return
    if action == "hang":
        time.sleep(600)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "end": signal.SIGTERM}[action])


def run(config: Config) -> None:
    """Trains and tests; every process leaves its parameters in the run directory."""
    fault("clock")
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 4, 1), np.uint8)
    draw = few_shot.make_sampler(images, way=3, shot=1, query_shot=2)
    learner = maml(mlp(features=(8, 3)), losses.cross_entropy, inner_optimizer=optax.sgd(0.1), num_inner_steps=2)
    keys = runs.streams(config.seed)

    def sample(key):
        fault("hang")
        return draw(key)

    def score(params, key):
        return evaluate(
            learner,
            params,
            draw,
            key,
            metric_fn=losses.cross_entropy,
            num_episodes=config.eval_episodes,
            mesh=devices.mesh_for(config.eval_episodes),
        )

    validations = []

    def validate(params):
        validations.append(params)
        if len(validations) == 2:
            fault("kill")
            fault("stop")
            fault("end")
        return -float(score(params, keys.val).mean[-1])

    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(run_dir, config, common.Training(learner, sample, validate))

        def test():
            evaluation = score(trained.params, keys.test)
            return {"metrics": {"loss": runs.as_metric(evaluation)}, "per_episode": evaluation.per_episode.tolist()}

        runs.finish(run_dir, "worker", config, trained, {}, test)
        leaves = [np.int32(trained.best_step), *jax.tree.leaves(trained.params)]
        np.savez(run_dir / f"process-{jax.process_index()}-of-{jax.process_count()}.npz", *leaves)


if __name__ == "__main__":
    cli.main(Config, run, __doc__)
