"""The command line: settings that experiments share, one subcommand for each method of the catalogue."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import jax
import tyro
from rich.console import Console
from rich.markup import escape

from experiments.devices import set_up_jax
from experiments.runs import PROCESS_TIMEOUT_SECONDS, RunError, console, discard, flag, typed
from experiments.tracking import Tracking
from maml_jax import CATALOGUE, processes
from maml_jax.types import check_integer, check_not_negative, check_positive

ConfigT = TypeVar("ConfigT")
GROUPS = {
    "task": (),
    "network": (
        "network", "filters", "features", "pooling", "flatten", "norm_scale", "adapt_norm", "pretrained_run",
        "start_run", "head_scale", "width", "depth", "lexical", "vector_size",
    ),
    "outer_loop": (
        "meta_batch_size", "num_meta_steps", "outer_optimizer", "outer_lr", "outer_schedule", "outer_lr_end",
        "outer_half_life", "outer_clip", "on_nonfinite", "outer_rule", "max_kl", "metric_stride", "clip", "epochs",
        "max_norm",
    ),
    "test": (
        "eval_episodes", "train_episodes", "eval_shots", "eval_query_shot", "eval_inner_steps", "inductive",
        "population", "ensemble", "tune_inner_lr", "inner_lr_grid", "val_every", "eval_shot", "later_lr", "sizes",
        "validation_pairs", "num_subsets", "dev_pairs", "finetune_lr", "finetune_steps", "finetune_batch", "beam",
    ),
    "run": (
        "seed", "seeds", "run_dir", "log_every", "chunk_size", "precision", "distributed",
    ),
}  # fmt: skip
"""The settings by the groups in which --help shows them. The others are about the tasks."""
_RECORDS = {"method": "hyperparameters", "tracking": "tracking"}
"""The settings that are records, by the name of their group."""
_OWN_GROUPS = ("algorithm", *_RECORDS.values())
_READ_WITH: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("outer_lr_end", "outer_schedule", ("linear", "cosine")),
    ("outer_half_life", "outer_schedule", ("halved",)),
    ("filters", "network", ("conv4", "multi-scale", "resnet12")),
    ("pooling", "network", ("conv4",)),
    ("flatten", "network", ("conv4",)),
    ("flatten", "pooling", (False,)),
    ("inductive", "network", ("conv4", "multi-scale", "resnet12", "mlp")),
    ("population", "network", ("conv4", "multi-scale", "resnet12", "mlp")),
    ("stream", "network", ("conv4", "multi-scale", "resnet12", "mlp", "pixels")),
    ("norm_scale", "network", ("conv4", "multi-scale", "mlp")),
    ("rotations", "network", ("conv4", "multi-scale", "mlp", "pixels")),
    ("rotations", "rotated_classes", (False,)),
    ("adapt_norm", "per_step_norm", (False,)),
    ("num_characters", "data", ("rotated-omniglot",)),
    ("rotated_test_classes", "rotated_classes", (True,)),
    ("carry_state", "inner_optimizer", ("adam",)),
    ("eps_root", "inner_optimizer", ("adam",)),
    ("augment", "network", ("conv4", "multi-scale", "resnet12")),
    ("train_embedding", "network", ("conv4", "multi-scale", "resnet12", "mlp")),
    ("depth", "network", ("transformer",)),
    ("vector_size", "lexical", (True,)),
    ("inner_lr_grid", "tune_inner_lr", (True,)),
    ("margin", "losses", ("cdt",)),
    ("positive_threshold", "losses", ("mfr",)),
    ("negative_threshold", "losses", ("mfr",)),
)
"""A setting, another one, and the values of that one with which the first has an effect."""
_OF_OUTER_UPDATES = (
    "outer_rule", "max_kl", "metric_stride", "clip", "epochs", "meta_batch_size", "outer_lr", "outer_schedule",
    "outer_lr_end", "outer_half_life", "outer_clip", "on_nonfinite",
)  # fmt: skip
_CLASSIFIERS = {name: entry.hyperparameters for name, entry in CATALOGUE.items() if entry.classifies}
_IGNORED_BY: dict[str, set[str]] = {
    "adapt_norm": {"anil", "cavia", *_CLASSIFIERS},
    "flatten": set(_CLASSIFIERS),
    "eval_inner_steps": {
        "navigation oracle",
        *(name for name, kind in _CLASSIFIERS.items() if not hasattr(kind, "num_inner_steps")),
    },
    # They take steps in the test only: --eval-inner-steps, and on sinusoids --inner-lr-grid.
    "num_inner_steps": {"pretrained-classifier", "pretrained", "oracle"},
    "inner_lr": {"pretrained", "oracle"},
    "surrogate": {"navigation oracle"},
    "later_lr": {"navigation oracle"},
    **{name: {"navigation random"} for name in _OF_OUTER_UPDATES},  # which is not trained
    "train_way": {"pretrained-classifier"},
    "train_shot": {"pretrained-classifier"},
    "query_shot": {"sinusoid reptile"},  # which is tested on --eval-query-shot
    "shot": {"translation pretrained"},  # nothing adapts in its training
}
"""By setting, the methods that do not read it, and so have no such flag; of one experiment where it is named."""
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
OUT_OF_MEMORY = (
    "the memory of the device does not suffice; compute fewer tasks together with a smaller --chunk-size, make tasks "
    "smaller, or leave the photographs on the host with --stream, where the experiment has these flags. A run goes on "
    "from its last checkpoint. JAX says: {}"
)
"""What is said about an allocation that failed."""
Precision = Literal["float32", "tensorfloat32", "bfloat16"]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
"""A file or directory whose text in --help says what is done without it."""


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
    """Precision of matrix products, on devices that have a choice."""
    seed: int = 0
    """Seed of initial parameters, tasks and evaluation."""
    seeds: int = 1
    """Seeds that are trained at once in one program: --seed and those after it. Each has a directory seed-N in the run
    directory. A multiple of the number of devices uses all of them."""
    run_dir: Path | None = None
    """Where the run is kept, and resumed from; by default a directory in runs/ named after the settings."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens when a meta-gradient is not finite: the run stops at its last checkpoint, or it goes on without that
    update and counts it."""
    tracking: Tracking = dataclasses.field(default_factory=Tracking)
    """Where metrics go besides RUN/metrics.jsonl."""
    distributed: str = "auto"
    """Processes. "auto" joins those that SLURM, Open MPI, Kubernetes or a TPU pod started, if any. HOST:PORT is the
    address of process 0, with $JAX_NUM_PROCESSES and $JAX_PROCESS_ID. "off" is one process."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a number that cannot be; "~" in a path is the home."""
        expand_home(self)
        check_run_dir(self.run_dir)
        positive = ("shot", "query_shot", "meta_batch_size", "val_every", "log_every", "chunk_size", "outer_half_life")
        check_counts(self, **dict.fromkeys((*positive, "seeds"), 1), num_meta_steps=0, eval_episodes=2)
        check_seed(self.seed)
        if not (self.outer_lr > 0 and math.isfinite(self.outer_lr)):
            raise ValueError(f"--outer-lr {self.outer_lr} must be a positive number")
        if self.outer_clip is not None:
            check_positive("--outer-clip", self.outer_clip)
        check_outer_lr_end(self.outer_lr_end, self.outer_lr, self.outer_schedule)
        if self.val_every % self.log_every:
            raise ValueError(
                f"--log-every {self.log_every} does not divide --val-every {self.val_every}; validations happen "
                "between compiled calls of --log-every meta-steps"
            )


def expand_home(config: Any) -> None:
    """Replaces "~" by the home directory in every setting of a new, frozen dataclass that is a path.

    Raises:
      ValueError: if there is no such home directory.
    """
    for field in dataclasses.fields(config):
        if isinstance(path := getattr(config, field.name), Path):
            try:
                object.__setattr__(config, field.name, path.expanduser())
            except RuntimeError as error:
                raise ValueError(f"{flag(field.name)} {path}: {error}; name the directory without ~") from error


def check_run_dir(run_dir: Path | None) -> None:
    """Raises ValueError for the current directory, which an empty shell variable names too."""
    if run_dir == Path():
        raise ValueError("--run-dir is empty or the current directory; name a directory of its own for the run")


def check_counts(config: Any, **least: int) -> None:
    """Raises ValueError for a setting that is neither None nor an integer of at least the number that is given."""
    for name, smallest in least.items():
        if getattr(config, name) is not None:
            check_integer(flag(name), getattr(config, name), at_least=smallest)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that `jax.random.key` would cut off."""
    check_integer("--seed", seed, at_least=0)
    if seed >= 2**32:
        raise ValueError(f"--seed {seed} does not fit into 32 bits; choose a smaller one")


def check_outer_lr_end(end: float, start: float, schedule: str) -> None:
    """Raises ValueError for no rate, or for one that a linear or cosine schedule would have to rise to."""
    check_not_negative("--outer-lr-end", end)
    if schedule in ("linear", "cosine") and end > start:
        raise ValueError(
            f"--outer-lr-end {end} must be between 0 and --outer-lr {start}; the schedules only lower the rate"
        )


def methods(experiment: str, config_type: type[ConfigT]) -> dict[str, ConfigT]:
    """The settings of every algorithm of the catalogue that fits an experiment, at the hyperparameters for it."""
    return {
        name: config_type(algorithm=name, hyperparameters=entry.settings[experiment])
        for name, entry in CATALOGUE.items()
        if experiment in entry.settings
    }


def recipe_of(config: RunConfig, recipes: Mapping[str, RunConfig]) -> dict[str, Any]:
    """The rate and the number of steps of the inner loop of a method's recipe, if they do not depend on the task."""
    recipe = recipes[config.algorithm].hyperparameters
    values = {name: getattr(recipe, name, None) for name in ("inner_lr", "num_inner_steps")}
    return {name: value for name, value in values.items() if value is not None}


def with_defaults(config: ConfigT, defaults: Mapping[str, Any]) -> ConfigT:
    """Fills in settings and hyperparameters that are None."""

    def filled(record: Any, **changes: Any) -> Any:
        unset = {name: value for name, value in defaults.items() if getattr(record, name, value) is None}
        return dataclasses.replace(record, **unset, **changes)

    return filled(config, hyperparameters=filled(config.hyperparameters))


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
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    if not isinstance(configs, Mapping):
        parsed = tyro.cli(configs, prog=program, description=wrapped(description), args=arguments, config=style)
        expand_home(parsed)
        return parsed
    first, *rest = _with_method(arguments, list(configs))
    about = dict(about or {})
    if first in configs:  # the parser of one method, because that of all takes seconds
        kind, description, arguments = type(_grouped(configs[first])), about.get(first, description), rest
        program = program and f"{program} {first}"
    else:
        kind = tyro.extras.subcommand_type_from_defaults(
            {name: _grouped(config) for name, config in configs.items()},
            about,
            prefix_names=False,
            sort_subcommands=False,
        )
    parsed = tyro.cli(kind, prog=program, description=wrapped(description), args=arguments, config=style)
    return _ungrouped(parsed, configs)


def has_flag(config: Any, name: str) -> bool:
    """Whether the command of these settings has a flag for the one of that name."""
    for record in (config, getattr(config, "hyperparameters", None)):
        hint = get_type_hints(type(record), include_extras=True).get(name)
        if hint is not None:
            return tyro.conf.Suppress not in getattr(hint, "__metadata__", ()) and not _is_ignored(config, name)
    return False


def _is_ignored(config: Any, name: str) -> bool:
    of_experiment = f"{getattr(config, 'experiment', '')} {config.algorithm}"
    return not _IGNORED_BY.get(name, set()).isdisjoint((config.algorithm, of_experiment))


def wrapped(text: str) -> str:
    """Text whose lines fit the terminal. Tyro joins the lines of a paragraph, but not those that begin with a space."""
    width = min(shutil.get_terminal_size().columns, 100) - 1
    paragraphs = (" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))  # None under python -OO
    return "\n\n".join(
        textwrap.indent(textwrap.fill(paragraph, width, break_on_hyphens=False), " ") for paragraph in paragraphs
    )


def _grouped(config: Any) -> Any:
    """The settings in groups, as --help shows them: a dataclass of dataclasses with the values of `config`."""
    of_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in (field.name for field in dataclasses.fields(config) if field.name not in _OWN_GROUPS):
        group = next((group for group, members in GROUPS.items() if name in members), "task")
        of_group[group].append(name)

    def described(record: Any, types: dict[str, Any], texts: dict[str, str], name: str) -> tuple[str, Any, Any]:
        value, hint = getattr(record, name), types[name]
        rest = [kind for kind in get_args(hint) if kind is not type(None)]
        settings: dict[str, Any] = {"help": " ".join(texts.get(name, "").split())}
        if value is None:  # the text says what that means
            settings |= {"help_behavior_hint": ""}
        if type(None) in get_args(hint) and len(rest) == 1 and rest[0] in _METAVARS:
            settings |= {"metavar": _METAVARS[rest[0]]}
        kept = Annotated[hint, tyro.conf.arg(**settings)]
        if _is_ignored(config, name):
            kept = Annotated[kept, tyro.conf.Suppress]
        return name, kept, dataclasses.field(default=value)

    def as_group(group: str, record: Any, members: list[str], text: str | None = None) -> tuple[str, type, Any]:
        hints = get_type_hints(type(record), include_extras=True), _field_texts(type(record))
        fields = [described(record, *hints, name) for name in members]
        kind = dataclasses.make_dataclass(group, fields, frozen=True, namespace={"__doc__": text})
        return group, kind, dataclasses.field(default=kind())

    task, *others = [as_group(group, config, members) for group, members in of_group.items() if members]
    # An experiment that is no algorithm of the catalogue may have neither record.
    method, tracking = (
        [as_group(name, record, [field.name for field in dataclasses.fields(record)], type(record).__doc__)]
        if dataclasses.is_dataclass(record := getattr(config, attribute, None))
        else []
        for name, attribute in _RECORDS.items()
    )
    algorithm = ("algorithm", Annotated[str, tyro.conf.Suppress], dataclasses.field(default=config.algorithm))
    return dataclasses.make_dataclass(config.algorithm, [algorithm, task, *method, *others, *tracking], frozen=True)()


def _ungrouped(parsed: Any, configs: Mapping[str, ConfigT]) -> ConfigT:
    """The inverse of `_grouped`.

    Raises:
      ValueError: for a setting that cannot be, by its flag.
    """
    config, values = configs[parsed.algorithm], {}
    for group in (field.name for field in dataclasses.fields(parsed) if field.name != "algorithm"):
        settings = vars(getattr(parsed, group))
        if group in _RECORDS:
            with _named_by_flags(settings):
                record = dataclasses.replace(getattr(config, _RECORDS[group]), **settings)
            settings = {_RECORDS[group]: record}
        values |= settings
    given = dataclasses.replace(config, **values)
    _check_read(given, config)
    return given


def _check_read(given: Any, default: Any) -> None:
    """Raises ValueError for a setting that nothing reads with another one, unless it is that of the method."""

    def values(config: Any) -> dict[str, Any]:
        hyperparameters = getattr(config, "hyperparameters", None)
        return vars(config) | (vars(hyperparameters) if hyperparameters else {})

    found, of_method = values(given), values(default)
    for name, other, read_with in _READ_WITH:
        is_changed = found.get(name) is not None and found[name] != of_method[name]
        if is_changed and other in found and found[other] not in read_with:
            record = given if hasattr(given, other) else given.hyperparameters
            offered = get_args(get_type_hints(type(record))[other]) or read_with
            remedies = [typed(other, value) for value in read_with if value in offered]
            raise ValueError(
                f"{typed(name, found[name])} has no effect with {typed(other, found[other])}; leave it at "
                f"{of_method[name]}, or choose {' or '.join(remedies)}"
            )


@contextlib.contextmanager
def _named_by_flags(settings: Mapping[str, Any]) -> Iterator[None]:
    """Names settings by their flags in the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name in settings:
            message = re.sub(rf"\b{name}\b", flag(name), message).replace(f"{flag(name)}=", f"{flag(name)} ")
        raise ValueError(message) from error


@functools.cache  # the source of a module is parsed for every class
def _field_texts(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and of those that it extends, by the name of the field."""
    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for statement, after in itertools.pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and is_text:
                texts[statement.target.id] = after.value.value
    return texts


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
    subcommand: str = "",
) -> None:
    """Parses the command line and runs.

    `subcommand` is what stands between the program and the arguments, for its --help.

    Mistakes end in one paragraph and exit code 2; with MAML_JAX_TRACEBACK=1 in the environment, in a traceback.
    """
    program = f"python -m {sys.modules['__main__'].__spec__.name} {subcommand}".rstrip()
    with _without_teardown(), processes.exit_on_error(), mistakes_in_one_paragraph():
        config = parse(configs, description, about=about, program=program)
        set_up_jax(config.precision)
        if hasattr(config, "distributed"):
            processes.initialize(config.distributed, timeout_seconds=PROCESS_TIMEOUT_SECONDS)
        check_devices()
        console.quiet = jax.process_index() > 0
        run(config)


@contextlib.contextmanager
def _without_teardown() -> Iterator[None]:
    """Ends a process that a signal has stopped at once: threads that still compile may crash while Python ends."""
    try:
        yield
    except SystemExit as ended:
        if ended.code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody may read it any more
                stream.flush()
        os._exit(ended.code)


def check_devices() -> None:
    """Raises RunError if JAX finds no device."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform of the list could be used
        wanted = jax.config.jax_platforms
        reason = f" ({error})" if str(error) else ""
        raise RunError(
            f"JAX finds no device of JAX_PLATFORMS={wanted}{reason}; install the jax of this platform, or leave the "
            "variable out"
        ) from error


@contextlib.contextmanager
def mistakes_in_one_paragraph() -> Iterator[None]:
    """Ends the process with a paragraph and the code 2 where a mistake was found; see `main`.

    After Ctrl-C the code is 130, and 141 where nobody reads the output any more.
    """
    try:
        with _interrupts():
            yield
    except KeyboardInterrupt:
        if os.environ.get("MAML_JAX_TRACEBACK"):
            raise
        Console(stderr=True).print("stopped; a training goes on from its last checkpoint with the same command")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # nobody reads the output any more, as behind `| head`
        if os.environ.get("MAML_JAX_TRACEBACK"):
            raise
        discard(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except (
        RunError,
        ValueError,
        OSError,
        ModuleNotFoundError,
        processes.ProcessError,
        jax.errors.JaxRuntimeError,
    ) as error:
        message = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError):
            message = OUT_OF_MEMORY.format(message) if "RESOURCE_EXHAUSTED" in message else None
        if message is None or os.environ.get("MAML_JAX_TRACEBACK"):
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
        sys.exit(2)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt again, also where Python would swallow it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see experiments/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = sys.unraisablehook

    def again(unraisable: Any) -> None:
        # A destructor or a callback of the garbage collector, such as JAX's, cannot raise. It is over in a moment.
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            # A signal to the thread also wakes it up where it waits, which `_thread.interrupt_main` does not.
            to_main = threading.main_thread().ident, signal.SIGINT
            threading.Timer(0.1, signal.pthread_kill, to_main).start()
        else:
            hook(unraisable)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
