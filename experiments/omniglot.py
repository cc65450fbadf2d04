"""Few-shot classification of handwritten characters (MAML paper, table 1, Omniglot).

Trains one of the algorithms, keeps the state with the best validation accuracy and tests it. Without
flags this is MAML, 5-way 1-shot, with the paper's settings; the method, --way and --shot choose others.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.table import Table

from experiments import common, figures, published, runs
from experiments.cli import RunConfig, flag, main, methods, replace_known, stored_config, with_defaults
from experiments.runs import RunError, console
from maml_jax import CATALOGUE, Problem, ensemble, evaluate, losses, models
from maml_jax.tasks import few_shot, omniglot
from maml_jax.types import (
    ArrayTree,
    Evaluation,
    LearnerOrSchedule,
    MetaLearner,
    SampleEpisodeFn,
    check_integer,
    learner_at,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The settings of one run. Rates are for losses that are means over the batch."""

    way: int = 5
    """Classes of an episode."""
    shot: int = 1
    """Support examples per class."""
    train_shot: int | None = None
    """Support examples per class in training; by default as many as --shot."""
    query_shot: int | None = None
    """Query examples per class; by default as many as --shot, as in the paper."""
    meta_batch_size: int | None = None
    """Episodes per meta-step; by default the paper's, 32, or 16 with more than 5 classes."""
    num_meta_steps: int = 60_000
    """Outer updates. A run may be continued with a larger number."""
    eval_inner_steps: int | None = None
    """Inner steps in validation and test; by default the paper's, 3, or 5 with more than 5 classes."""
    network: Literal["conv4", "mlp"] = "conv4"
    """Four convolutions, or the fully connected network of the paper's "no conv" rows."""
    adapt_norm: bool = False
    """Whether the inner loop also adapts the offsets and scales of the normalisation."""
    norm_scale: bool = False
    """Whether the normalisation has a scale beside its offset."""
    flatten: bool = False
    """Whether the last layer of conv4 sees all four positions, and not their mean."""
    inductive: bool = False
    """Whether the test classifies one query at a time, with only the support set beside it. By default the queries of
    an episode are normalised together, which is transductive."""
    rotations: bool = True
    """Turn every class of every episode by a random multiple of 90 degrees."""
    rotated_classes: bool = False
    """In training, make the four rotations of a character four classes, and do not turn the characters of validation
    and test, as Reptile does. It replaces --rotations."""
    ensemble: int = 1
    """States with the best validation accuracy whose outputs are averaged in the test; MAML++ publishes 5."""
    eval_episodes: int = 600
    """Episodes in each validation and in the test."""
    val_every: int = 1000
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 50
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""
    data_dir: Path | None = None
    """The tensorflow-datasets directory that holds omniglot/3.0.0, or the .npz made from it; by default
    $TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_integer("--way", self.way, at_least=2)
        check_integer("--ensemble", self.ensemble, at_least=1)
        if self.train_shot is not None:
            check_integer(flag("train_shot"), self.train_shot, at_least=1)
        if self.eval_inner_steps is not None:
            check_integer(flag("eval_inner_steps"), self.eval_inner_steps, at_least=0)


METHODS = methods("omniglot", Config)
# What is peculiar to the recipes of their papers.
METHODS["reptile"] = dataclasses.replace(
    METHODS["reptile"],
    train_shot=10,
    meta_batch_size=5,
    num_meta_steps=100_000,
    outer_optimizer="sgd",
    outer_lr=1.0,
    outer_schedule="linear",
    eval_inner_steps=50,
    adapt_norm=True,
    norm_scale=True,
    flatten=True,
    rotated_classes=True,
)
METHODS["maml++"] = dataclasses.replace(
    METHODS["maml++"],
    meta_batch_size=8,
    num_meta_steps=50_000,
    outer_schedule="cosine",
    outer_lr_end=1e-5,
    eval_inner_steps=5,
    norm_scale=True,
    ensemble=5,
)
METHODS["imaml"] = dataclasses.replace(METHODS["imaml"], num_meta_steps=20_000, eval_inner_steps=16)
METHODS["cavia"] = dataclasses.replace(METHODS["cavia"], eval_inner_steps=5)


def about() -> dict[str, str]:
    """A line on each method for --help, with its published accuracies."""
    lines = {}
    for name in METHODS:
        numbers = [
            f"{way}-way {shot}-shot {accuracy}"
            for (algorithm, network, way, shot), accuracy in published.OMNIGLOT.items()
            if (algorithm, network) == (name, "conv4")
        ]
        entry = CATALOGUE[name]
        title = f"{entry.title} ({entry.reference})."
        lines[name] = f"{title} Published accuracy, %: {', '.join(numbers)}." if numbers else title
    return lines


def with_paper_defaults(config: Config) -> Config:
    """Fills in what was left to the paper's settings, which depend on the number of classes."""
    many = config.way > 5
    return with_defaults(
        config,
        {
            "train_shot": config.shot,
            "query_shot": config.shot,
            "meta_batch_size": 16 if many else 32,
            "num_inner_steps": (10 if many else 5) if config.algorithm == "reptile" else (5 if many else 1),
            "eval_inner_steps": 5 if many else 3,
            "run_dir": Path(f"runs/omniglot-{config.algorithm}-{config.way}w{config.shot}s-{config.seed}"),
        },
    )


def make_learner(config: Config, **hyperparameters: int) -> LearnerOrSchedule:
    """The algorithm on the paper's network, with some hyperparameters replaced."""
    norm = functools.partial(models.BatchStatNorm, scale=True) if config.norm_scale else models.BatchStatNorm
    if config.network == "mlp":
        model = models.omniglot_mlp(way=config.way, norm=norm)
    else:
        model = models.conv4(way=config.way, flatten=config.flatten, norm=norm)
    problem = Problem(
        model,
        losses.cross_entropy,
        where=None if config.adapt_norm else lambda name: "norm" not in name,
        head=lambda name: name.startswith("head" if config.network == "conv4" else "dense_4"),
        norm=lambda name: "norm" in name,
    )
    return CATALOGUE[config.algorithm].build(problem, replace_known(config.hyperparameters, **hyperparameters))


def make_tester(config: Config) -> MetaLearner:
    """The learner of validation and test, which does not depend on the meta-step."""
    return learner_at(make_learner(config, num_inner_steps=config.eval_inner_steps), config.num_meta_steps)


def make_samplers(config: Config) -> dict[str, SampleEpisodeFn]:
    """The task distribution of each split."""
    samplers = {}
    for split in ("train", "val", "test"):
        try:
            samplers[split] = few_shot.make_sampler(
                omniglot.load(split, config.data_dir),
                way=config.way,
                shot=config.train_shot if split == "train" else config.shot,
                query_shot=config.query_shot,
                rotations=config.rotations and not config.rotated_classes,
                rotated_classes=config.rotated_classes and split == "train",
            )
        except ValueError as error:
            raise RunError(f"split {split!r} of Omniglot: {error}") from error
    return samplers


def run(config: Config) -> dict:
    """Trains, tests the state with the best validation accuracy, and returns the content of results.json."""
    config = with_paper_defaults(config)
    learner = make_learner(config)
    tester = make_tester(config)
    samplers = make_samplers(config)
    keys = runs.streams(config.seed)
    mesh = common.mesh_for(config.eval_episodes)

    def score(params: ArrayTree, split: str, learner: MetaLearner) -> Evaluation:
        return evaluate(
            learner,
            params,
            samplers[split],
            getattr(keys, split),
            metric_fn=losses.accuracy,
            num_episodes=config.eval_episodes,
            mesh=mesh,
            one_query_at_a_time=config.inductive,
        )

    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(
            run_dir,
            config,
            learner,
            samplers["train"],
            validate=lambda params: float(score(params, "val", tester).mean[-1]),
            num_best=config.ensemble,
        )
        members = ensemble(tester) if config.ensemble > 1 else tester
        protocol = {
            "way": config.way,
            "shot": config.shot,
            "query_shot": config.query_shot,
            "episodes": config.eval_episodes,
            "split": "test",
            "selection": "highest validation accuracy on split val",
            "selected_step": trained.best_step,
            "ensemble": config.ensemble if config.ensemble == 1 else len(jax.tree.leaves(trained.params)[0]),
            "normalisation": "each query with the support set" if config.inductive else "transductive",
        }
        results = runs.finish(
            run_dir,
            "omniglot",
            config,
            trained,
            protocol,
            lambda: {"metrics": {"accuracy": runs.as_metric(score(trained.params, "test", members))}},
        )
        if jax.process_index() == 0:
            figures.learning_curves(run_dir / "figures" / "learning_curve.png", {config.algorithm: run_dir})
    show(results)
    return results


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner of the test protocol and the selected parameters of a run; an ensemble if the run has one."""
    config = stored_config(METHODS, Path(run_dir))
    learner = make_tester(config)
    inputs = np.zeros((config.way * config.shot, 28, 28, 1), np.float32)
    params = common.load_params(config.run_dir, config, make_learner(config), inputs)
    return ensemble(learner) if config.ensemble > 1 else learner, params


def show(results: dict) -> None:
    """Prints the test accuracy after every inner step."""
    protocol, accuracy = results["protocol"], results["metrics"]["accuracy"]
    table = Table(
        title=f"{results['algorithm']}, Omniglot {protocol['way']}-way {protocol['shot']}-shot: accuracy in % on "
        f"{protocol['episodes']} test episodes, queries per class: {protocol['query_shot']}"
    )
    table.add_column("inner steps", justify="right")
    table.add_column("accuracy", justify="right")
    last = len(accuracy["mean"]) - 1
    for step in sorted({step for step in (0, 1, 2, 3, 4, 5, 10, 20) if step < last} | {last}):
        table.add_row(str(step), runs.format_mean(accuracy["mean"][step], accuracy["ci95"][step], scale=100))
    console.print(table)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
