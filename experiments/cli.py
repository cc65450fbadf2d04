"""The command line: settings that experiments share, one subcommand for each method of the catalogue."""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import tyro
from rich.console import Console
from rich.markup import escape

from experiments.common import set_up_jax
from experiments.runs import PROCESS_TIMEOUT_SECONDS, RunError, console, read_json
from maml_jax import CATALOGUE, processes
from maml_jax.types import check_integer, check_positive

ConfigT = TypeVar("ConfigT")
Precision = Literal["float32", "tensorfloat32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every experiment."""

    algorithm: Annotated[str, tyro.conf.Suppress]
    hyperparameters: Any
    shot: int
    """Support examples per class, or support points of a training task."""
    query_shot: int | None = None
    """The same of the query set in training; by default as many as --shot."""
    meta_batch_size: int | None = None
    """Tasks per meta-step; by default the published number."""
    num_meta_steps: int
    """Outer updates. A run may be continued with a larger number."""
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    """Optimiser of the meta-parameters."""
    outer_lr: float = 1e-3
    """Rate of the outer optimiser."""
    outer_schedule: Literal["constant", "linear", "cosine", "halved"] = "constant"
    """How the outer rate falls: to --outer-lr-end over --num-meta-steps, or by half every --outer-half-life steps. A
    finished linear or cosine run cannot be continued with more steps."""
    outer_lr_end: float = 0.0
    """The outer rate at the end of a linear or cosine schedule."""
    outer_half_life: int = 2000
    """Meta-steps after which the rate is halved, with --outer-schedule halved."""
    outer_clip: float | None = None
    """Every entry of the meta-gradient is bounded by this number before the outer optimiser; by default it is not."""
    eval_episodes: int
    """Episodes in each validation and in the test."""
    val_every: int
    """Meta-steps between checkpoints, and between validations if there are any."""
    log_every: int
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""
    chunk_size: int | None = None
    """Tasks of a device that are vmapped together; by default chosen for the device."""
    precision: Precision = "float32"
    """Of matrix products, on devices that have a choice."""
    seed: int = 0
    """Seed of initial parameters, tasks and evaluation."""
    run_dir: Path | None = None
    """Where the run is kept, and resumed from; by default a directory in runs/ named after the settings."""
    distributed: str = "auto"
    """Processes. "auto" joins those that SLURM, Open MPI, Kubernetes or a TPU pod started, if any. HOST:PORT is the
    address of process 0, with $JAX_NUM_PROCESSES and $JAX_PROCESS_ID. "off" is one process."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a number that cannot be."""
        least = {
            "shot": 1,
            "query_shot": 1,
            "meta_batch_size": 1,
            "num_meta_steps": 0,
            "eval_episodes": 2,
            "val_every": 1,
            "log_every": 1,
            "chunk_size": 1,
            "outer_half_life": 1,
            "seed": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) is not None:
                check_integer(flag(name), getattr(self, name), at_least=smallest)
        if self.seed >= 2**32:
            raise ValueError(f"--seed {self.seed} does not fit into 32 bits; choose a smaller one")
        if not (self.outer_lr > 0 and math.isfinite(self.outer_lr)):
            raise ValueError(f"--outer-lr {self.outer_lr} must be a positive number")
        if self.outer_clip is not None:
            check_positive("--outer-clip", self.outer_clip)
        if not 0 <= self.outer_lr_end <= self.outer_lr:
            raise ValueError(
                f"--outer-lr-end {self.outer_lr_end} must be between 0 and --outer-lr {self.outer_lr}; the schedules "
                "only lower the rate"
            )
        if self.val_every % self.log_every:
            raise ValueError(
                f"--log-every {self.log_every} does not divide --val-every {self.val_every}; validations happen "
                "between compiled calls of --log-every meta-steps"
            )


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def methods(experiment: str, config_type: type[ConfigT]) -> dict[str, ConfigT]:
    """The settings of every algorithm of the catalogue that fits an experiment, at the published hyperparameters."""
    return {
        name: config_type(algorithm=name, hyperparameters=entry.settings[experiment])
        for name, entry in CATALOGUE.items()
        if experiment in entry.settings
    }


def with_defaults(config: ConfigT, defaults: Mapping[str, Any]) -> ConfigT:
    """Fills in settings and hyperparameters that are None."""

    def filled(record: Any, **changes: Any) -> Any:
        unset = {name: value for name, value in defaults.items() if getattr(record, name, value) is None}
        return dataclasses.replace(record, **unset, **changes)

    return filled(config, hyperparameters=filled(config.hyperparameters))


def stored_config(configs: Mapping[str, ConfigT], run_dir: Path) -> ConfigT:
    """The settings that a run directory was made with.

    Args:
      configs: the default of each method of the experiment.
      run_dir: the directory of the run.

    Raises:
      RunError: if it holds no settings of this experiment.
    """
    file = run_dir / "config.json"
    if not file.exists():
        raise RunError(f"{run_dir} is no run directory: it holds no config.json")
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in read_json(file).items()}
    if stored.get("algorithm") not in configs:
        raise RunError(f"{file} belongs to another experiment")
    config = configs[stored["algorithm"]]
    hyperparameters = replace_known(config.hyperparameters, **stored)
    return replace_known(config, **stored | {"run_dir": run_dir, "hyperparameters": hyperparameters})


def replace_known(record: Any, **values: Any) -> Any:
    """`dataclasses.replace` with those of `values` that are fields of the record."""
    known = {field.name for field in dataclasses.fields(record)}
    return dataclasses.replace(record, **{name: value for name, value in values.items() if name in known})


def parse(
    configs: type[ConfigT] | Mapping[str, ConfigT],
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    about: Mapping[str, str] | None = None,
    program: str | None = None,
) -> ConfigT:
    """Parses a command line.

    Args:
      configs: a dataclass; or one default for each method, which is a subcommand.
      description: shown by --help.
      arguments: by default those of the program. `--algorithm NAME` is the same as the subcommand NAME, and without
        either the first method is chosen.
      about: a line on each method, shown by --help.
      program: the name of the program in messages.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(configs, Mapping):
        arguments = _with_method(arguments, list(configs))
        configs = tyro.extras.subcommand_type_from_defaults(
            dict(configs), dict(about or {}), prefix_names=False, sort_subcommands=False
        )
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    return tyro.cli(configs, prog=program, description=description, args=arguments, config=style)


def _with_method(arguments: list[str], names: list[str]) -> list[str]:
    """The arguments with the method in front."""
    for index, argument in enumerate(arguments):
        if argument == "--algorithm" or argument.startswith("--algorithm="):
            chosen, rest = argument.partition("=")[2:], arguments[index + 1 :]
            name, *rest = [*filter(None, chosen), *rest] or [""]
            arguments = [name, *arguments[:index], *rest]
            break
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [names[0], *arguments]
    if arguments[0] not in (*names, "-h", "--help"):
        raise ValueError(f"there is no method {arguments[0]!r} here; choose one of {', '.join(names)}")
    return arguments


def main(
    configs: type[ConfigT] | Mapping[str, ConfigT],
    run: Callable[[ConfigT], Any],
    description: str,
    *,
    about: Mapping[str, str] | None = None,
) -> None:
    """Parses the command line and runs.

    Mistakes end in one paragraph and exit code 2; with MAML_JAX_TRACEBACK=1 in the environment, in a traceback.
    """
    program = f"python -m {sys.modules['__main__'].__spec__.name}"
    with processes.exit_on_error():
        try:
            config = parse(configs, description, about=about, program=program)
            set_up_jax(config.precision)
            if hasattr(config, "distributed"):
                processes.initialize(config.distributed, timeout_seconds=PROCESS_TIMEOUT_SECONDS)
                console.quiet = jax.process_index() > 0
            run(config)
        except (RunError, ValueError, OSError, processes.ProcessError) as error:
            if os.environ.get("MAML_JAX_TRACEBACK"):
                raise
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
            sys.exit(2)
