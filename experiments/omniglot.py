"""Few-shot classification of handwritten characters (MAML paper, table 1, Omniglot).

Trains one of the algorithms, keeps the state with the best validation accuracy and tests it. Without
flags this is MAML, 5-way 1-shot, with the paper's settings; --way, --shot and --algorithm choose others.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import optax
from rich.table import Table

from experiments import common, figures, runs
from experiments.runs import RunError, console
from maml_jax import CATALOGUE, adapt_only, evaluate, losses, models
from maml_jax.tasks import few_shot, omniglot
from maml_jax.types import ArrayTree, Evaluation, MetaLearner, SampleEpisodeFn


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run. Rates are for losses that are means over the batch."""

    algorithm: Literal["maml", "fomaml", "reptile", "pretrained"] = "maml"
    """The meta-learner. (Pretraining cannot work here: labels are shuffled in every episode.)"""
    way: int = 5
    """Classes of an episode."""
    shot: int = 1
    """Support examples per class."""
    query_shot: int | None = None
    """Query examples per class; by default as many as --shot, as in the paper."""
    meta_batch_size: int | None = None
    """Episodes per meta-step; by default the paper's, 32, or 16 with more than 5 classes."""
    num_meta_steps: int = 60_000
    """Outer updates."""
    num_inner_steps: int | None = None
    """Inner steps in training; by default the paper's, 1, or 5 with more than 5 classes."""
    eval_inner_steps: int | None = None
    """Inner steps in validation and test; by default the paper's, 3, or 5 with more than 5 classes."""
    inner_lr: float = 2.0
    """Rate of the inner gradient descent on the mean cross-entropy: the paper's 0.4 (0.1 with 20 classes)
    times the number of classes, because its code sums over classes."""
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    """Optimiser of the meta-parameters."""
    outer_lr: float = 1e-3
    """Rate of the outer optimiser."""
    network: Literal["conv4", "mlp"] = "conv4"
    """Four convolutions, or the fully connected network of the paper's "no conv" rows."""
    adapt_norm: bool = False
    """Whether the inner loop also adapts the offsets of the normalisation."""
    rotations: bool = True
    """Turn every class of every episode by a random multiple of 90 degrees."""
    eval_episodes: int = 600
    """Episodes in each validation and in the test."""
    val_every: int = 1000
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 50
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""
    chunk_size: int | None = None
    """Episodes of a device that are batched together; by default chosen for the device."""
    precision: common.Precision = "float32"
    """Of matrix products, on devices that have a choice."""
    seed: int = 0
    """Seed of initial parameters, episodes and evaluation."""
    data_dir: Path | None = None
    """The tensorflow-datasets directory that holds omniglot/3.0.0, or the .npz made from it; by default
    $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    run_dir: Path | None = None
    """Where the run is kept, and resumed from; by default runs/omniglot-ALGORITHM-WAYwSHOTs-SEED."""
    distributed: str = "auto"
    """Processes: "auto" joins those that SLURM, Open MPI, Kubernetes or a TPU pod started with this one, if any;
    HOST:PORT, where process 0 listens, with $JAX_NUM_PROCESSES and $JAX_PROCESS_ID; "off" is one process."""


def with_paper_defaults(config: Config) -> Config:
    """Fills in what was left to the paper's settings, which depend on the number of classes."""
    many = config.way > 5
    defaults = {
        "query_shot": config.shot,
        "meta_batch_size": 16 if many else 32,
        "num_inner_steps": 5 if many else 1,
        "eval_inner_steps": 5 if many else 3,
        "run_dir": Path(f"runs/omniglot-{config.algorithm}-{config.way}w{config.shot}s-{config.seed}"),
    }
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **unset)


def make_learner(config: Config, num_inner_steps: int) -> MetaLearner:
    """The algorithm on the paper's network, with some number of inner steps."""
    model = models.conv4(way=config.way) if config.network == "conv4" else models.omniglot_mlp(way=config.way)
    rule = optax.sgd(config.inner_lr)
    if not config.adapt_norm:
        rule = adapt_only(rule, lambda name: "norm" not in name)
    build = CATALOGUE[config.algorithm]
    return build(model, losses.cross_entropy, inner_optimizer=rule, num_inner_steps=num_inner_steps)


def make_samplers(config: Config) -> dict[str, SampleEpisodeFn]:
    """The task distribution of each split."""
    samplers = {}
    for split in ("train", "val", "test"):
        try:
            samplers[split] = few_shot.make_sampler(
                omniglot.load(split, config.data_dir),
                way=config.way,
                shot=config.shot,
                query_shot=config.query_shot,
                rotations=config.rotations,
            )
        except ValueError as error:
            raise RunError(f"split {split!r} of Omniglot: {error}") from error
    return samplers


def run(config: Config) -> dict:
    """Trains, tests the state with the best validation accuracy, and returns the content of results.json."""
    config = with_paper_defaults(config)
    common.check_config(config)
    learner = make_learner(config, config.num_inner_steps)
    tester = make_learner(config, config.eval_inner_steps)
    samplers = make_samplers(config)
    _, val_key, test_key = jax.random.split(jax.random.key(config.seed), 3)
    mesh = common.mesh_for(config.eval_episodes)

    def score(params: ArrayTree, split: str, key: jax.Array) -> Evaluation:
        return evaluate(
            tester,
            params,
            samplers[split],
            key,
            metric_fn=losses.accuracy,
            num_episodes=config.eval_episodes,
            mesh=mesh,
        )

    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(
            run_dir,
            config,
            learner,
            common.outer_optimizer(config),
            samplers["train"],
            validate=lambda params: float(score(params, "val", val_key).mean[-1]),
        )
        protocol = {
            "way": config.way,
            "shot": config.shot,
            "query_shot": config.query_shot,
            "episodes": config.eval_episodes,
            "split": "test",
            "selection": "highest validation accuracy on split val",
            "selected_step": trained.best_step,
            "normalisation": "transductive",
        }
        results = runs.finish(
            run_dir,
            "omniglot",
            config,
            trained,
            protocol,
            lambda: {"metrics": {"accuracy": runs.as_metric(score(trained.params, "test", test_key))}},
        )
        if jax.process_index() == 0:
            figures.learning_curves(run_dir / "figures" / "learning_curve.png", {config.algorithm: run_dir})
    show(results)
    return results


def show(results: dict) -> None:
    """Prints the test accuracy after every inner step."""
    protocol, accuracy = results["protocol"], results["metrics"]["accuracy"]
    table = Table(
        title=f"{results['algorithm']}, Omniglot {protocol['way']}-way {protocol['shot']}-shot: accuracy in % on "
        f"{protocol['episodes']} test episodes, queries per class: {protocol['query_shot']}"
    )
    table.add_column("inner steps")
    for step in range(len(accuracy["mean"])):
        table.add_column(str(step), justify="right")
    cells = [f"{100 * mean:.2f} ± {100 * ci:.2f}" for mean, ci in zip(accuracy["mean"], accuracy["ci95"], strict=True)]
    table.add_row("accuracy", *cells)
    console.print(table)


if __name__ == "__main__":
    common.main(Config, run, __doc__)
