"""Sinusoid regression (MAML paper, section 5.1 and table 2 of appendix C).

A network is trained on sine waves of random amplitude and phase with 10 support points a task, and
tested with 5 and with 10 after 0 to 10 gradient steps. Without flags this is MAML with the settings
behind the published table: rate 0.001, the default of the authors' code, where the text says 0.01.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.table import Table

from experiments import common, figures, runs
from experiments.runs import console
from maml_jax import CATALOGUE, evaluate, losses, models
from maml_jax.tasks import sinusoid
from maml_jax.types import ArrayTree, Evaluation, MetaLearner

DIVERGED = 100.0
"""A task has diverged when its squared error is not finite or above this; no target is beyond ±5."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run; the defaults are those behind the published table."""

    algorithm: Literal["maml", "fomaml", "reptile", "pretrained", "oracle"] = "maml"
    """The meta-learner; "pretrained" trains on all tasks at once and adapts at test only, "oracle" does so
    and is told amplitude and phase."""
    shot: int = 10
    """Support points of a training task."""
    query_shot: int | None = None
    """Query points of a training task; by default as many as --shot."""
    meta_batch_size: int = 25
    """Tasks per meta-step."""
    num_meta_steps: int = 70_000
    """Outer updates."""
    num_inner_steps: int = 1
    """Inner gradient steps in training."""
    inner_lr: float = 1e-3
    """Rate of the inner gradient descent on the mean squared error, in training and at test."""
    tune_inner_lr: bool | None = None
    """Whether the rate at test is the best of --inner-lr-grid on tasks drawn for that; by default for
    "pretrained" and "oracle" alone, whose training has no inner rate."""
    inner_lr_grid: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)
    """The rates to choose from."""
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    """Optimiser of the meta-parameters."""
    outer_lr: float = 1e-3
    """Rate of the outer optimiser."""
    eval_episodes: int = 2000
    """Test tasks."""
    eval_shots: tuple[int, ...] = (5, 10)
    """Support points of the test tasks; one evaluation each."""
    eval_query_shot: int = 100
    """Query points of a test task."""
    eval_inner_steps: int = 10
    """Inner gradient steps at test."""
    val_every: int = 10_000
    """Meta-steps between checkpoints."""
    log_every: int = 1000
    """Meta-steps in one compiled call, and between lines of metrics.jsonl."""
    chunk_size: int | None = None
    """Tasks of a device that are batched together; by default chosen for the device."""
    precision: common.Precision = "float32"
    """Of matrix products, on devices that have a choice."""
    seed: int = 0
    """Seed of initial parameters, tasks and evaluation."""
    run_dir: Path | None = None
    """Where the run is kept, and resumed from; by default runs/sinusoid-ALGORITHM-INNER_LR-SEED."""
    distributed: str = "auto"
    """Processes: "auto" joins those that SLURM, Open MPI, Kubernetes or a TPU pod started with this one, if any;
    HOST:PORT, where process 0 listens, with $JAX_NUM_PROCESSES and $JAX_PROCESS_ID; "off" is one process."""


def with_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    defaults = {
        "query_shot": config.shot,
        "tune_inner_lr": config.algorithm in ("pretrained", "oracle"),
        "run_dir": Path(f"runs/sinusoid-{config.algorithm}-{config.inner_lr:g}-{config.seed}"),
    }
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **unset)


def make_learner(config: Config, inner_lr: float, num_inner_steps: int) -> MetaLearner:
    """The algorithm on the paper's network 1-40-40-1, initialised as in the authors' code."""
    model = models.mlp(features=(40, 40, 1), kernel_init=nn.initializers.truncated_normal(0.01))
    build = CATALOGUE["pretrained" if config.algorithm == "oracle" else config.algorithm]
    rule = optax.sgd(inner_lr)
    return build(model, losses.mean_squared_error, inner_optimizer=rule, num_inner_steps=num_inner_steps)


def as_metric(evaluation: Evaluation) -> dict[str, list[float]]:
    """Mean, interval, median and the share of diverged tasks after 0..K inner steps."""
    per_episode = np.asarray(evaluation.per_episode)
    diverged = ~(per_episode < DIVERGED)
    return runs.as_metric(evaluation) | {
        "median": np.median(np.where(np.isnan(per_episode), np.inf, per_episode), axis=0).tolist(),
        "diverged": diverged.mean(axis=0).tolist(),
    }


def test(config: Config, params: ArrayTree, shot: int, key: jax.Array) -> dict:
    """Scores `params` on test tasks of `shot` support points; with `tune_inner_lr`, at the best test rate."""
    sample = sinusoid.make_sampler(shot=shot, query_shot=config.eval_query_shot, oracle=config.algorithm == "oracle")
    tune_key, test_key = jax.random.split(key)

    def score(inner_lr: float, key: jax.Array) -> Evaluation:
        return evaluate(
            make_learner(config, inner_lr, config.eval_inner_steps),
            params,
            sample,
            key,
            metric_fn=losses.mean_squared_error,
            num_episodes=config.eval_episodes,
            chunk_size=100,
        )

    inner_lr = config.inner_lr
    if config.tune_inner_lr:
        final = {rate: float(score(rate, tune_key).mean[-1]) for rate in config.inner_lr_grid}
        inner_lr = min(final, key=lambda rate: final[rate] if math.isfinite(final[rate]) else math.inf)
    return {"shot": shot, "inner_lr": inner_lr, "metrics": {"mse": as_metric(score(inner_lr, test_key))}}


def train_and_test(config: Config) -> tuple[dict, ArrayTree]:
    """Trains (or resumes, or finds finished) a run; returns the content of results.json and θ."""
    config = with_defaults(config)
    common.check_config(config)
    learner = make_learner(config, config.inner_lr, config.num_inner_steps)
    sample = sinusoid.make_sampler(shot=config.shot, query_shot=config.query_shot, oracle=config.algorithm == "oracle")
    test_key = jax.random.split(jax.random.key(config.seed), 3)[2]
    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(run_dir, config, learner, common.outer_optimizer(config), sample)

        def test_all() -> dict:
            evaluations = [test(config, trained.params, shot, test_key) for shot in config.eval_shots]
            return {"metrics": evaluations[0]["metrics"], "evaluations": evaluations}

        protocol = {
            "shot": config.eval_shots[0],
            "query_shot": config.eval_query_shot,
            "episodes": config.eval_episodes,
            "split": "test",
            "selection": "last state",
            "inner_lr": "best of the grid on other tasks" if config.tune_inner_lr else "as in training",
            "diverged_above": DIVERGED,
            "normalisation": "none",
        }
        results = runs.finish(run_dir, "sinusoid", config, trained, protocol, test_all)
        if jax.process_index() == 0:
            drawn = run_dir / "figures"
            figures.inner_curves(drawn / "inner_steps.png", {config.algorithm: results["evaluations"]})
            figures.learning_curves(drawn / "learning_curve.png", {config.algorithm: run_dir})
            if config.algorithm != "oracle":
                curves = predictions(config, trained.params, results["evaluations"][0]["inner_lr"])
                figures.predictions(drawn / "predictions.png", {config.algorithm: curves})
    return results, trained.params


def predictions(config: Config, params: ArrayTree, inner_lr: float, num_tasks: int = 3) -> list[dict]:
    """Curves of a few tasks for the figure: true values, support points, and predictions after 0, 1, 10 steps."""
    grid = jnp.linspace(*sinusoid.INPUTS, 200)[:, None]
    learner = make_learner(config, inner_lr, 10)
    curves = []
    for key in jax.random.split(jax.random.key(2017), num_tasks):
        episode = sinusoid.make_sampler(shot=5, query_shot=1, oracle=True)(key)
        amplitude, phase = episode.support.inputs[0, 1:]
        support = episode.support._replace(inputs=episode.support.inputs[:, :1])
        _, info = learner.adapt(params, support, observe_fn=lambda task_params: learner.predict(task_params, grid))
        curves.append(
            {
                "x": np.asarray(grid[:, 0]),
                "true": np.asarray(amplitude * jnp.sin(grid[:, 0] - phase)),
                "support": (np.asarray(support.inputs[:, 0]), np.asarray(support.targets[:, 0])),
                "predicted": {steps: np.asarray(info.observed[steps, :, 0]) for steps in (0, 1, 10)},
            }
        )
    return curves


def show(results: dict) -> None:
    """Prints the squared error after every inner step."""
    table = Table(
        title=f"{results['algorithm']}, sinusoids: mean squared error on {results['protocol']['episodes']} test tasks"
    )
    for heading in ("support points", "rate", "inner steps", "mean", "median", "diverged"):
        table.add_column(heading, justify="right")
    for evaluation in results["evaluations"]:
        mse = evaluation["metrics"]["mse"]
        for step in (0, 1, 5, 10):
            if step < len(mse["mean"]):
                table.add_row(
                    str(evaluation["shot"]),
                    f"{evaluation['inner_lr']:g}",
                    str(step),
                    f"{mse['mean'][step]:.3f} ± {mse['ci95'][step]:.3f}",
                    f"{mse['median'][step]:.3f}",
                    f"{mse['diverged'][step]:.2%}",
                )
    console.print(table)


def run(config: Config) -> dict:
    """Runs the experiment and prints its table; returns the content of results.json."""
    results, _ = train_and_test(config)
    show(results)
    return results


if __name__ == "__main__":
    common.main(Config, run, __doc__)
