"""Sinusoid regression (MAML paper, section 5.1 and table 2 of appendix C).

A network is trained on sine waves of random amplitude and phase with 10 support points a task, and
tested with 5 and with 10 after 0 to 10 gradient steps. Without flags this is MAML with the settings
behind the published table: rate 0.001, the default of the authors' code, where the text says 0.01.
Its 70,000 meta-steps take less than a minute on one core of a CPU.
"""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.table import Table

from experiments import common, figures, intervals, published, runs, seeds
from experiments.cli import RunConfig, check_counts, main, methods, recipe_of, with_defaults
from experiments.common import Training
from experiments.runs import console, replace_known, stored_config
from maml_jax import CATALOGUE, LearnedRates, Problem, evaluate, losses, models
from maml_jax.tasks import sinusoid
from maml_jax.types import (
    ArrayTree,
    Evaluation,
    LearnerOrSchedule,
    MetaLearner,
    SampleEpisodeFn,
    learner_at,
)

EVAL_CHUNK_SIZE = 100
"""Test tasks that are vmapped together; they are small."""
DIVERGED = 100.0
"""A task has diverged when its squared error is not finite or above this; no target is beyond ±5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The settings of one run; the defaults are those behind the published table."""

    experiment: ClassVar[str] = "sinusoid"

    shot: int = 10
    """Support points of a training task."""
    query_shot: int | None = None
    """Query points of a training task; by default as many as --shot."""
    meta_batch_size: int = 25
    """Tasks per meta-step."""
    num_meta_steps: int = 70_000
    """Outer updates. A run may be continued with a larger number."""
    tune_inner_lr: bool = False
    """Whether the rate at test is the best of --inner-lr-grid on other tasks, as for "pretrained" and "oracle", whose
    training has no inner rate."""
    inner_lr_grid: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2)
    """The rates to choose from."""
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
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(self, eval_query_shot=1, eval_inner_steps=0)
        if not self.eval_shots or min(self.eval_shots) < 1:
            raise ValueError(f"--eval-shots needs positive numbers of support points, got {self.eval_shots}")
        if not self.inner_lr_grid or not all(rate > 0 and math.isfinite(rate) for rate in self.inner_lr_grid):
            raise ValueError(f"--inner-lr-grid needs positive rates, got {self.inner_lr_grid}")
        if self.tune_inner_lr and isinstance(self.hyperparameters, LearnedRates):
            raise ValueError(
                f"--tune-inner-lr has no effect with {self.algorithm}, whose rates are learned; leave it out"
            )


METHODS = methods("sinusoid", Config)
METHODS |= {
    name: dataclasses.replace(METHODS["pretrained"], algorithm=name, tune_inner_lr=True)
    for name in ("pretrained", "oracle")
}


def about() -> dict[str, str]:
    """A line on each method for --help, with its published errors."""
    lines = {}
    for name, config in METHODS.items():
        entry = CATALOGUE.get(name)
        title = f"{entry.title} ({entry.reference})." if entry else "Pretrained, with amplitude and phase as inputs."
        errors = published.SINUSOID.get((name, config.hyperparameters.inner_lr))
        numbers = f" Published error after 1 / 5 / 10 steps: {' / '.join(map(str, errors))}." if errors else ""
        lines[name] = title + numbers
    return lines


def with_paper_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    config = with_defaults(config, recipe_of(config, METHODS))
    rate = config.hyperparameters.inner_lr
    return with_defaults(
        config,
        {
            "query_shot": config.shot,
            "run_dir": Path(f"runs/sinusoid-{config.algorithm}-{rate:g}-{config.seed}"),
        },
    )


def make_learner(config: Config, inner_lr: float | jax.Array, num_inner_steps: int) -> LearnerOrSchedule:
    """The algorithm on the paper's network 1-40-40-1, initialised as in the authors' code."""
    model = models.mlp(features=(40, 40, 1), kernel_init=nn.initializers.truncated_normal(0.01))
    entry = CATALOGUE["pretrained" if config.algorithm == "oracle" else config.algorithm]
    hyperparameters = replace_known(config.hyperparameters, inner_lr=inner_lr, num_inner_steps=num_inner_steps)
    problem = Problem(model, losses.mean_squared_error, head=lambda name: name.startswith("dense_2"))
    return entry.build(problem, hyperparameters)


def make_tester(config: Config, inner_lr: float | jax.Array, num_inner_steps: int) -> MetaLearner:
    """The learner of the test, which does not depend on the meta-step."""
    return learner_at(make_learner(config, inner_lr, num_inner_steps), config.num_meta_steps)


def test_samplers(config: Config) -> dict[int, SampleEpisodeFn]:
    """The test tasks by their number of support points."""
    oracle = config.algorithm == "oracle"
    return {
        shot: sinusoid.make_sampler(shot=shot, query_shot=config.eval_query_shot, oracle=oracle)
        for shot in config.eval_shots
    }


def as_metric(evaluation: Evaluation) -> dict[str, list[float]]:
    """Mean, interval, median and the share of diverged tasks after 0..K inner steps."""
    per_episode = np.asarray(evaluation.per_episode)
    diverged = ~(per_episode < DIVERGED)
    return runs.as_metric(evaluation) | {
        "median": np.median(np.where(np.isnan(per_episode), np.inf, per_episode), axis=0).tolist(),
        "diverged": diverged.mean(axis=0).tolist(),
    }


def test(config: Config, params: ArrayTree, sample: SampleEpisodeFn) -> dict:
    """Scores `params` on test tasks; with `tune_inner_lr`, at the best rate of the grid on other tasks."""
    keys = runs.streams(config.seed)

    def learner_of(rate: jax.Array) -> MetaLearner:
        return make_tester(config, rate, config.eval_inner_steps)

    def score(rate: float, key: jax.Array) -> Evaluation:
        return evaluate(
            jax.tree_util.Partial(learner_of, jnp.float32(rate)),  # one program for all rates
            params,
            sample,
            key,
            metric_fn=losses.mean_squared_error,
            num_episodes=config.eval_episodes,
            chunk_size=EVAL_CHUNK_SIZE,
        )

    inner_lr = config.hyperparameters.inner_lr
    if config.tune_inner_lr:
        final = {rate: float(score(rate, keys.tune).mean[-1]) for rate in config.inner_lr_grid}
        inner_lr = min(final, key=lambda rate: final[rate] if math.isfinite(final[rate]) else math.inf)
    return {"inner_lr": inner_lr, "metrics": {"mse": as_metric(score(inner_lr, keys.test))}}


def training_of(config: Config) -> Training:
    """What is trained, at settings without gaps."""
    learner = make_learner(config, config.hyperparameters.inner_lr, config.hyperparameters.num_inner_steps)
    oracle = config.algorithm == "oracle"
    return Training(learner, sinusoid.make_sampler(shot=config.shot, query_shot=config.query_shot, oracle=oracle))


def train_and_test(config: Config) -> tuple[dict, ArrayTree]:
    """Trains (or resumes, or finds finished) a run; returns the content of results.json and θ."""
    config = with_paper_defaults(config)
    training, samplers = training_of(config), test_samplers(config)
    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(run_dir, config, training)

        def test_all() -> dict:
            evaluations = [{"shot": shot} | test(config, trained.params, of_shot) for shot, of_shot in samplers.items()]
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
            figures.learning_curves(drawn / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]})
            if config.algorithm != "oracle":
                curves = predictions(config, trained.params, results["evaluations"][0]["inner_lr"])
                figures.predictions(drawn / "predictions.png", {config.algorithm: curves})
    return results, trained.params


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner of the test protocol, at the rate of training, and the parameters of a run."""
    config = stored_config(METHODS, Path(run_dir))
    rate, num_inner_steps = config.hyperparameters.inner_lr, config.hyperparameters.num_inner_steps
    inputs = np.zeros((config.shot, 3 if config.algorithm == "oracle" else 1), np.float32)
    trained = make_learner(config, rate, num_inner_steps)
    params = common.load_params(config.run_dir, config, trained, inputs)
    return make_tester(config, rate, config.eval_inner_steps), params


def predictions(config: Config, params: ArrayTree, inner_lr: float, num_tasks: int = 3) -> list[dict]:
    """Curves of a few tasks for the figure: true values, support points, and predictions after 0, 1, 10 steps."""
    grid = jnp.linspace(*sinusoid.INPUTS, 200)[:, None]
    learner = make_tester(config, inner_lr, 10)
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
    """Prints the squared error after 0, 1, 5, 10 and all inner steps."""
    table = Table(
        title=f"{results['algorithm']}, sinusoids: mean squared error on {results['protocol']['episodes']} test tasks"
    )
    for heading in ("support points", "rate", "inner steps", "mean", "median", "diverged"):
        table.add_column(heading, justify="right")
    for evaluation in results["evaluations"]:
        mse = evaluation["metrics"]["mse"]
        last = len(mse["mean"]) - 1
        for step in sorted({0, 1, 5, 10, last}):
            if step <= last:
                table.add_row(
                    str(evaluation["shot"]),
                    f"{evaluation['inner_lr']:g}",
                    str(step),
                    intervals.format_mean(mse["mean"][step], mse["ci95"][step], digits=3),
                    intervals.format_mean(mse["median"][step], digits=3),
                    f"{mse['diverged'][step]:.2%}",
                )
    console.print(table)


def run(config: Config) -> dict:
    """Runs the experiment and prints its table; returns the content of results.json, or of seeds.json."""
    if config.seeds > 1:
        return seeds.run_seeds(run, training_of, with_paper_defaults(config))
    results, _ = train_and_test(config)
    show(results)
    return results


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
