"""Turns a finished run of experiments.omniglot into one small file that `maml_jax.load_learner` reads.

The file holds the selected parameters and all that builds the learner again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments import omniglot
from experiments.cli import Precision, flag, main, stored_config
from experiments.runs import LOCATION, RunError, console, read_json
from maml_jax import CATALOGUE
from maml_jax.portable import LearnerConfig, save_learner
from maml_jax.types import ArrayTree


@dataclasses.dataclass(frozen=True)
class Config:
    """What is written where."""

    run_dir: tyro.conf.Positional[Path]
    """The directory of a finished run of experiments.omniglot."""
    file: tyro.conf.Positional[Path]
    """The file to write; its name ends in .npz."""
    overwrite: bool = False
    """Whether an existing file is replaced."""
    precision: Precision = "float32"
    """Of matrix products, on devices that have a choice."""


def run(config: Config) -> Path:
    """Writes the file and returns its name."""
    learner_config = config_of_run(config.run_dir)
    if not (config.run_dir / "results.json").is_file():
        raise RunError(
            f"{config.run_dir} is not finished: it holds no results.json. Run the command that started it again, and "
            "it goes on where it was"
        )
    save_learner(config.file, params_of_run(config.run_dir), learner_config, overwrite=config.overwrite)
    console.print(f"{config.file}: {config.file.stat().st_size / 1e3:.0f} kB, {learner_config.made_by}")
    return config.file


def config_of_run(run_dir: Path) -> LearnerConfig:
    """The configuration of the learner of a run's test.

    Raises:
      RunError: if the directory holds no run of experiments.omniglot, or one that does not fit into one file.
    """
    config = stored_config(omniglot.METHODS, run_dir)
    if config.network != "conv4":
        raise RunError(f"{run_dir} trained the network {config.network!r}; only a run with --network conv4 can be used")
    if config.ensemble > 1:
        raise RunError(
            f"{run_dir} holds an ensemble of {config.ensemble} states; only a run with --ensemble 1 can be used"
        )
    return LearnerConfig(
        algorithm=config.algorithm,
        hyperparameters=dataclasses.asdict(config.hyperparameters),
        way=config.way,
        inner_steps=config.eval_inner_steps if hasattr(config.hyperparameters, "num_inner_steps") else None,
        features=config.filters,
        pooling=config.pooling,
        flatten=config.pooling or config.flatten or CATALOGUE[config.algorithm].classifies,
        norm="population" if config.population else "batch",
        norm_scale=config.norm_scale,
        adapt_norm=config.adapt_norm,
        made_by=made_by(run_dir, config),
    )


def params_of_run(run_dir: Path) -> ArrayTree:
    """The parameters that a run has selected. With --population their statistics are computed again, from Omniglot.

    Raises:
      FileNotFoundError: if Omniglot is needed and not where the run has found it.
      RunError: if the run has no checkpoint.
    """
    return omniglot.load(run_dir)[1]


def made_by(run_dir: Path, config: Any) -> str:
    """The command of a run, without where it was kept, and its test accuracy if it is finished."""
    command = f"python -m experiments.omniglot {config.algorithm}"
    default = omniglot.METHODS[config.algorithm]
    for record, usual in ((config, default), (config.hyperparameters, default.hyperparameters)):
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if field.name not in (*LOCATION, "data_dir", "hyperparameters") and value != getattr(usual, field.name):
                command += " " + as_flag(field.name, value)
    results = run_dir / "results.json"
    if not results.is_file():
        return command
    accuracy = read_json(results)["metrics"]["accuracy"]["mean"][-1]
    return f"{command} (test accuracy {100 * accuracy:.1f} %)"


def as_flag(name: str, value: Any) -> str:
    """A setting as it is given on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"


if __name__ == "__main__":
    main(Config, run, __doc__)
