"""Turns a finished run of experiments.omniglot or images into one small file that `maml_jax.load_learner` reads.

The file holds the selected parameters and all that builds the learner again.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from experiments import images, omniglot, runs
from experiments.classification import ClassificationConfig
from experiments.cli import Precision, main
from experiments.commands import changed_flags
from experiments.runs import RunError, console, read_json, read_results, stored_config
from maml_jax import CATALOGUE
from maml_jax.portable import INK, PHOTOGRAPH, LearnerConfig, save_learner

INPUT_VALUES = {omniglot: INK, images: PHOTOGRAPH}
"""What the numbers of an image mean, by the experiment."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is written where."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-DIRECTORY")]
    """The directory of a finished run of experiments.omniglot or experiments.images."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file to write; its name ends in .npz."""
    overwrite: bool = False
    """Whether an existing file is replaced."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""


def run(config: Config) -> Path:
    """Writes the file and returns its name."""
    learner_config = config_of_run(config.run_dir)
    if not (config.run_dir / "results.json").is_file():
        raise RunError(
            f"{config.run_dir} is not finished: it holds no results.json. Run the command that started it again, and "
            "it goes on where it was"
        )
    if config.file.expanduser().exists() and not config.overwrite:
        raise RunError(f"{config.file} already exists and is not overwritten; delete it, or give --overwrite")
    save_learner(config.file, runs.load(config.run_dir).params, learner_config, overwrite=config.overwrite)
    console.print(f"{config.file}: {config.file.stat().st_size / 1e3:.0f} kB, {learner_config.made_by}", markup=False)
    return config.file


def config_of_run(run_dir: Path) -> LearnerConfig:
    """The configuration of the learner of a run's test.

    Raises:
      RunError: if the directory holds no run of experiments.omniglot or experiments.images, or one that does not fit
        into one file.
    """
    module = runs.experiment_of(run_dir)
    if module not in INPUT_VALUES:
        raise RunError(
            f"{run_dir} is a run of {module.__name__}; only a run of experiments.omniglot or experiments.images can be "
            "used"
        )
    config = module.with_paper_defaults(stored_config(module.METHODS, run_dir))
    if config.network not in ("conv4", "multi-scale"):
        raise RunError(
            f"{run_dir} trained the network {config.network!r}; only a run with --network conv4 or multi-scale can be "
            "used"
        )
    if config.ensemble > 1:
        raise RunError(
            f"{run_dir} holds an ensemble of {config.ensemble} states; only a run with --ensemble 1 can be used"
        )
    hyperparameters = config.hyperparameters
    inner_steps = config.eval_inner_steps if hasattr(hyperparameters, "num_inner_steps") else None
    if config.algorithm == "pretrained-classifier":  # whose steps are those of the test
        hyperparameters = dataclasses.replace(hyperparameters, num_inner_steps=inner_steps)
        inner_steps = hyperparameters.num_head_steps
    return LearnerConfig(
        algorithm=config.algorithm,
        hyperparameters=dataclasses.asdict(hyperparameters),
        way=config.way,
        inner_steps=inner_steps,
        network=config.network,
        features=config.filters,
        pooling=config.pooling,
        flatten=config.pooling or config.flatten or CATALOGUE[config.algorithm].classifies,
        norm="population" if config.population else "batch",
        norm_scale=config.norm_scale,
        adapt_norm=config.adapt_norm,
        input_shape=module.DATA.input_shape(config),
        input_values=INPUT_VALUES[module],
        made_by=made_by(run_dir, config),
    )


def made_by(run_dir: Path, config: ClassificationConfig) -> str:
    """The command of a run, and its test accuracy and how it was measured, if it is finished."""
    stored = read_json(run_dir / "config.json")
    made = {"experiment": config.experiment, "algorithm": config.algorithm, "config": stored}
    line = " ".join([f"python -m experiments.{config.experiment}", config.algorithm, *changed_flags(made)])
    if (content := read_results(run_dir)) is None:
        return line
    mean = content["metrics"]["accuracy"]["mean"][-1]
    accuracy = "not finite" if mean is None else f"{100 * mean:.1f} %"
    return f"{line} (test accuracy {accuracy}; normalisation: {content['protocol']['normalisation']})"


if __name__ == "__main__":
    main(Config, run, __doc__)
