"""Run directories and result files: who may write to one, what is in it, and what a finished run reports."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import math
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO, get_args, get_origin, get_type_hints

import jax
import numpy as np
from rich.console import Console

from maml_jax import checkpoint, processes
from maml_jax.types import ArrayTree, Batch, Evaluation, MetaLearner


def discard(stream: TextIO) -> None:
    """Sends to nowhere what is still written to a stream that nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Console(Console):
    """A console that a training outlives if nobody reads it any more, as behind `| head`."""

    def on_broken_pipe(self) -> None:
        """Goes on without printing."""
        self.quiet = True
        discard(sys.stderr if self.stderr else sys.stdout)
        with contextlib.suppress(OSError):  # nobody reads this one either, as behind `2>&1 | head`
            print("nobody reads the output any more; going on without printing", file=sys.stderr, flush=True)


console = _Console(soft_wrap=True)
"""Where experiments print; silent in every process but the first."""


def _seconds_of_environment(name: str, default: float) -> float:
    """A positive number of seconds from the environment; the default, with a warning, if it is none."""
    with contextlib.suppress(ValueError):
        if (seconds := float(os.environ.get(name, default))) > 0 and math.isfinite(seconds):
            return seconds
    print(f"{name}={os.environ[name]!r} is no positive number of seconds; {default:g} is taken", file=sys.stderr)
    return default


PROCESS_TIMEOUT_SECONDS = _seconds_of_environment("MAML_JAX_PROCESS_TIMEOUT_SECONDS", 600.0)
"""How long one process waits for the others, and for a compiled call of all of them, before it gives up."""
TEST_TIMEOUT_SECONDS = 20 * PROCESS_TIMEOUT_SECONDS
"""The same for a validation and for the test, which are many compiled calls."""
LOCATION = ("run_dir", "distributed", "tracking", "seeds")
"""Settings that say where a run is kept, made and watched, and beside which seeds. They are not stored."""
IRRELEVANT = ("data_dir", "packs_dir", "chunk_size", "stream", "train_episodes")
"""Stored settings that do not change the results, but for rounding. A run may be resumed with others."""
EXPERIMENTS = (
    "sinusoid",
    "omniglot",
    "images",
    "domains",
    "navigation",
    "bandits",
    "mdps",
    "mazes",
    "faces",
    "translation",
)
"""Experiments whose runs hold a learner that can be loaded."""
DATA_FILE = "data.json"
"""The file of a run directory with the checksum of its data."""
CONFIG_REMEDY = "restore it from a copy, because nothing else says what its checkpoints are of"
"""The remedy for a damaged config.json."""
MOST_VALIDATED = {"omniglot": math.inf, "images": math.inf, "bandits": 2000, "mdps": 2000, "mazes": 2000}
"""Experiments whose validations have --eval-episodes, up to this number of them."""
EXTENDABLE = ("num_meta_steps", "eval_episodes")
"""Settings that may grow when a run is resumed, and go back; see `_may_change`."""
_OF_SEED = re.compile(r"seed-\d+")
_SET_ASIDE = re.compile(r"results_\d+_(\d+|None)\.json")


class Streams(NamedTuple):
    """The independent random streams of an experiment, one key each."""

    init: jax.Array
    train: jax.Array
    test: jax.Array
    val: jax.Array
    tune: jax.Array


def streams(seed: int) -> Streams:
    """All random keys of an experiment. No other place derives keys from a seed."""
    return Streams(*jax.random.split(jax.random.key(seed), len(Streams._fields)))


class RunError(Exception):
    """A mistake in how an experiment was called, or a run that cannot go on; printed as one paragraph."""


def write_json(file: Path, content: Any) -> None:
    """`write_text` of a JSON file, with null for numbers that are not finite."""
    write_text(file, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a file atomically. Only process 0 writes.

    Raises:
      RunError: if it cannot be written.
    """
    if jax.process_index() > 0:
        return
    partial = file.with_name(file.name + ".partial")
    with _named_if_not_written(file):
        partial.write_text(text)
        os.replace(partial, file)


@contextlib.contextmanager
def messages_to_stderr(wanted: bool) -> Iterator[None]:
    """Sends what is printed meanwhile to the standard error, which leaves the standard output to JSON."""
    before, console.stderr = console.stderr, wanted or console.stderr
    try:
        yield
    finally:
        console.stderr = before


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def typed(name: str, value: Any) -> str:
    """A setting with its value as it is typed: "--filters 9", "--pooling", "--no-pooling"."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


@contextlib.contextmanager
def _named_if_not_written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); {'' if is_file else 'free some space, or '}choose "
            "another directory"
        ) from error


def read_json(file: Path, remedy: str = "delete it, or choose another --run-dir") -> Any:
    """Reads a JSON file.

    Raises:
      RunError: if it is damaged.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}); {remedy}") from error


def read_record(file: Path, remedy: str = "delete it, or choose another --run-dir") -> dict[str, Any]:
    """Reads a JSON file that holds names with values.

    Raises:
      RunError: if it is damaged, or holds something else.
    """
    content = read_json(file, remedy)
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged: it holds no names with values; {remedy}")
    return content


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The content of results.json of a run; None if there is none.

    Raises:
      RunError: if it is damaged.
    """
    file = run_dir / "results.json"
    if not file.is_file():
        return None
    found = read_record(file)
    wanted = {"experiment": str, "config": dict, "seed": int}
    if found.get("experiment") in EXPERIMENTS:
        wanted |= {"algorithm": str, "protocol": dict, "metrics": dict}
    if lacking := [name for name, kind in wanted.items() if not isinstance(found.get(name), kind)]:
        raise RunError(f"{file} is damaged: it lacks {', '.join(lacking)}; delete it and repeat the command of the run")
    return found


def finite(content: Any) -> Any:
    """Replaces NaN and ±inf by None, because JSON cannot represent them."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def as_json(config: Any) -> dict[str, Any]:
    """A configuration as it is stored: one flat record, without the settings in `LOCATION`."""
    content = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    content |= content.pop("hyperparameters", {})
    if experiment := getattr(config, "experiment", None):
        content = {"experiment": experiment} | content
    return {name: value for name, value in content.items() if name not in LOCATION}


class Loaded(NamedTuple):
    """What a run has trained.

    Attributes:
      learner: the algorithm, as it was tested. Where the test itself chooses the rates, as that of `navigation` and of
        the pretrained networks of `sinusoid`, it has those of the settings.
      params: the selected meta-parameters.
      config: the settings of the run.
    """

    learner: MetaLearner
    params: ArrayTree
    config: Any


def load(run_dir: str | Path) -> Loaded:
    """What a run has trained, to adapt it to tasks of your own or to evaluate it on other tasks.

    Args:
      run_dir: the directory of a run, finished or not. Its best validated state is loaded, else its last one.

    Raises:
      CheckpointError: if every checkpoint is damaged.
      RunError: if there is no such run, it has no checkpoint, or results of more meta-steps than its newest one; or it
        has --population or --network features, which need the images and the network of its training, and these are
        others.
    """
    run_dir = Path(run_dir).expanduser()
    module = experiment_of(run_dir)
    return Loaded(*module.load(run_dir), stored_config(module.METHODS, run_dir))


def seed_directories(run_dir: Path) -> list[str]:
    """The names of the runs in a directory of several seeds, which are seed-0, seed-1 and so on."""
    names = (config.parent.name for config in run_dir.glob("seed-*/config.json"))
    return sorted(name for name in names if _OF_SEED.fullmatch(name))


def check_is_run(run_dir: Path) -> None:
    """Raises RunError if a directory does not hold the settings of one run."""
    if (run_dir / "config.json").exists():
        return
    if several := seed_directories(run_dir):
        raise RunError(f"{run_dir} holds several seeds; name one of its directories {', '.join(several)}")
    raise RunError(f"{run_dir} is no run directory: it holds no config.json")


def experiment_of(run_dir: str | Path) -> Any:
    """The module of the experiment that made a run.

    Raises:
      RunError: if the directory holds no run, or one that cannot be loaded.
    """
    run_dir = Path(run_dir)
    check_is_run(run_dir)
    # Runs made before config.json named the experiment have it in their results.
    files = {"config.json": CONFIG_REMEDY, "results.json": "delete it"}
    records = (read_record(run_dir / name, remedy) for name, remedy in files.items() if (run_dir / name).exists())
    name = next(filter(None, (record.get("experiment") for record in records)), None)
    if str(name) not in EXPERIMENTS:
        raise RunError(f"{run_dir} is a run of {name}; only runs of {', '.join(EXPERIMENTS)} can be loaded")
    return importlib.import_module(f"experiments.{name}")


def stored_config(configs: Mapping[str, Any], run_dir: Path) -> Any:
    """The settings that a run directory was made with.

    Args:
      configs: the default of each method of the experiment.
      run_dir: the directory of the run.

    Raises:
      RunError: if it holds no settings of this experiment.
    """
    file = run_dir / "config.json"
    check_is_run(run_dir)
    settings = read_record(file, CONFIG_REMEDY)
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    wanted, found = getattr(next(iter(configs.values())), "experiment", None), stored.get("experiment")
    if found is not None and found != wanted:
        raise RunError(f"{run_dir} is a run of experiments.{found}; name one of experiments.{wanted}")
    if str(stored.get("algorithm")) not in configs:
        raise RunError(f"{file} belongs to another experiment")
    config = configs[str(stored["algorithm"])]
    try:
        for record in (config, config.hyperparameters):
            for name, hint in get_type_hints(type(record)).items():
                if get_origin(hint) is Literal and name in stored and stored[name] not in get_args(hint):
                    raise ValueError(f"{name} {stored[name]!r} is none of {', '.join(map(str, get_args(hint)))}")
        hyperparameters = replace_known(config.hyperparameters, **stored)
        return replace_known(config, **stored | {"run_dir": run_dir, "hyperparameters": hyperparameters})
    except (TypeError, ValueError) as error:
        raise RunError(f"{file} is damaged: it holds settings that cannot be ({error})") from error


def replace_known(record: Any, **values: Any) -> Any:
    """`dataclasses.replace` with those of `values` that are fields of the record."""
    known = {field.name for field in dataclasses.fields(record)}
    return dataclasses.replace(record, **{name: value for name, value in values.items() if name in known})


def read_npz(file: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` by name.

    Raises:
      ValueError: if the file is damaged or no `.npz`, or lacks one of `names`.
    """
    try:
        with open(file, "rb") as stream, np.load(stream) as archive:  # numpy does not close a damaged file
            found = {name: archive[name] for name in (*names, *optional) if name in archive.files}
    except Exception as error:  # zipfile, zlib and numpy share no class
        raise ValueError(f"{file} is damaged or no .npz ({type(error).__name__}: {error}); get it again") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{file} must hold the arrays {', '.join(names)}; it lacks {', '.join(missing)}")
    return found


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without lines that are no record of a step; none if there is no file.

    Such a line is being written, or was when the process was killed.
    """
    file, records = run_dir / "metrics.jsonl", []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def digest_of_batches(batches: Iterable[Batch]) -> str:
    """`digest` of splits or domains of labelled examples; it is also of all labels."""

    def classes(batch: Batch) -> Iterator[np.ndarray]:
        yield batch.targets[None]
        for label in np.unique(batch.targets):
            yield batch.inputs[batch.targets == label]

    return digest(map(classes, batches))


def digest(examples: Iterable[Iterable[np.ndarray]]) -> str:
    """A checksum of data that tells one data set from another without reading all of it.

    It is of the size and the first example of every class.

    Args:
      examples: for every split or domain, for every class, its examples [n, ...].
    """
    checksum = hashlib.sha256()
    for of_split in examples:
        for of_class in of_split:
            checksum.update(f"{of_class.dtype} {of_class.shape} ".encode())
            checksum.update(np.ascontiguousarray(of_class[:1]).tobytes())
        checksum.update(b"; ")
    return checksum.hexdigest()


@contextlib.contextmanager
def open_run(run_dir: Path, config: Any, data_digest: str | None = None) -> Iterator[Path]:
    """Claims a run directory for this job, this configuration and these data. Process 0 does it for all processes.

    Args:
      run_dir: made if it does not exist.
      config: a dataclass, stored as `config.json`.
      data_digest: a checksum of the data, stored in `data.json`; None if the configuration says everything.

    Raises:
      RunError: if a running process uses the directory, if it belongs to another configuration or other data, or if the
        processes were started with different ones.
      ProcessError: in the other processes, if process 0 raises.
    """
    with contextlib.ExitStack() as held:
        with processes.watchdog("opening the run directory", PROCESS_TIMEOUT_SECONDS):
            processes.on_process_zero(lambda: held.enter_context(_claim(run_dir, config, data_digest)))
            others = processes.processes_that_differ(json.dumps([as_json(config), data_digest]))
        if others:
            raise RunError(f"of the processes, {others} were started with other settings or data than process 0")
        yield run_dir


@contextlib.contextmanager
def _claim(run_dir: Path, config: Any, data_digest: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with _named_if_not_written(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(run_dir / "lock", "a"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends
        except BlockingIOError:
            raise RunError(
                f"the run directory {run_dir} is in use by a running process; wait for it to end, or choose "
                "another --run-dir"
            ) from None
        wanted = as_json(config)
        config_file = run_dir / "config.json"
        if (several := seed_directories(run_dir)) and not config_file.exists():
            raise RunError(
                f"{run_dir} holds several seeds ({', '.join(several)}); give --seeds to go on with them, or choose "
                "another --run-dir"
            )
        is_new = not config_file.exists()
        place = run_dir.resolve()
        if is_new and _OF_SEED.fullmatch(place.name) and (place.parent / "config.json").exists():
            raise RunError(
                f"{run_dir} has the name of a seed, and the directory around it is one run; choose another --run-dir"
            )
        of_others = [name for name in ("checkpoints", "metrics.jsonl", "results.json") if (run_dir / name).exists()]
        if of_others and not config_file.exists():
            raise RunError(
                f"{run_dir} holds {' and '.join(of_others)} but no config.json, so nothing says of which settings; "
                "choose another --run-dir"
            )
        if config_file.exists():
            found = {"experiment": wanted.get("experiment")} | read_record(config_file, "choose another --run-dir")
            if differing := differing_settings(found, wanted, _may_change(run_dir, found, wanted)):
                raise RunError(
                    f"the run directory {run_dir} belongs to another configuration: {'; '.join(differing)}. Choose "
                    "another --run-dir, or give the same flags to resume"
                )
        check_data(run_dir, data_digest)
        _set_aside_results(run_dir, wanted)
        write_json(config_file, wanted)
        if data_digest is not None:
            write_json(run_dir / DATA_FILE, {"sha256": data_digest})
        yield


def differing_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Iterable[str] = ()) -> list[str]:
    """The settings that change results and differ from the stored ones, in words; without those of `ignored`."""
    return [
        f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted((found.keys() | wanted.keys()) - {*IRRELEVANT, *ignored})
        if found.get(name) != wanted.get(name)
    ]


def _may_change(run_dir: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Those of `EXTENDABLE` that may be as wanted.

    The number of meta-steps may be any that the training has not passed, if the outer rate does not depend on it. The
    episodes of the test of a finished training may become more. In some experiments its validations have as many, so a
    training that goes on has those of before, and so has the first test, whose results say how many they were.
    """
    if not all(isinstance(settings.get("num_meta_steps"), int) for settings in (found, wanted)):
        return []
    is_fixed = wanted.get("outer_schedule", "constant") in ("constant", "halved")
    steps = checkpoint.steps(run_dir / "checkpoints")
    is_ahead = all(step <= wanted["num_meta_steps"] for step in steps)
    may_change = ["num_meta_steps"] if is_fixed and is_ahead else []
    old, new = (settings.get("eval_episodes") for settings in (found, wanted))
    if not (isinstance(old, int) and isinstance(new, int)):
        return may_change
    of_training = min([old, *(int(file.stem.split("_")[2]) for file in results_before(run_dir))])
    most = MOST_VALIDATED.get(str(wanted.get("experiment")), 0)
    is_tested = (run_dir / "results.json").exists() or bool(results_before(run_dir))
    goes_on = bool(steps) and is_ahead and not (is_tested and wanted["num_meta_steps"] in steps)
    is_changed = (old, found["num_meta_steps"]) != (new, wanted["num_meta_steps"])
    if goes_on and is_changed and min(new, most) > min(of_training, most):
        raise RunError(
            f"{run_dir} is validated on {of_training} episodes, and would not compare its states on other numbers of "
            f"them; give --eval-episodes {of_training} while it is trained, and more when it is finished"
        )
    is_known = _set_aside(run_dir, wanted).exists() and is_ahead
    return [*may_change, "eval_episodes"] if old < new or is_known or (is_ahead and new == of_training) else may_change


def results_before(run_dir: Path) -> list[Path]:
    """The files with the results of a run that has grown since, which are results_STEPS_EPISODES.json."""
    return sorted(file for file in run_dir.glob("results_*.json") if _SET_ASIDE.fullmatch(file.name))


def _set_aside(run_dir: Path, settings: Mapping[str, Any]) -> Path:
    """The file with the results of a run that has grown since."""
    return run_dir / f"results_{'_'.join(str(settings.get(name)) for name in EXTENDABLE)}.json"


def _set_aside_results(run_dir: Path, wanted: dict[str, Any]) -> None:
    """Keeps the results of a run that is to grow as results_STEPS_EPISODES.json, so that nothing takes them as its own.

    Those of a run that goes back are taken from there.

    Args:
      run_dir: the directory of the run.
      wanted: its settings from now on.
    """
    file, before = run_dir / "results.json", _set_aside(run_dir, wanted)
    if (found := read_results(run_dir)) is not None and _set_aside(run_dir, found["config"]) != before:
        file.rename(_set_aside(run_dir, found["config"]))
    if before.exists() and not file.exists():
        before.rename(file)


def check_data(run_dir: Path, data_digest: str | None) -> None:
    """Raises RunError if a run was made with other data; a run that kept no checksum passes."""
    file = run_dir / DATA_FILE
    if data_digest is None or not file.exists():
        return
    # A run made before the network that embeds its images was part of the checksum has that of the images alone.
    if read_record(file).get("sha256") not in (data_digest, data_digest.split()[0]):
        raise RunError(
            f"the run directory {run_dir} was made with other data. If they have moved, repeat its command once with "
            "their --data-dir, or let the environment variable name them; the network of --pretrained-run must not be "
            "trained further. For other data choose another --run-dir"
        )


@contextlib.contextmanager
def metrics_log(run_dir: Path, step: int) -> Iterator[Callable[[dict], None]]:
    """Appends records to metrics.jsonl. Records after `step`, left by an interrupted run, are dropped first."""
    if jax.process_index() > 0:
        yield lambda record: None
        return
    file = run_dir / "metrics.jsonl"
    kept = [json.dumps(record) + "\n" for record in read_log(run_dir) if record["step"] <= step]
    write_text(file, "".join(kept))

    def write(record: dict) -> None:
        with _named_if_not_written(file), open(file, "a") as stream:
            stream.write(json.dumps(finite(record), allow_nan=False) + "\n")

    yield write


@contextlib.contextmanager
def on_signal(handle: Callable[[int], None]) -> Iterator[None]:
    """Calls `handle(number)` for every SIGTERM and SIGINT, from another thread.

    Python runs its own handlers between two instructions of the main thread, so not during a compiled call.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handled = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                handle(number[0])
            handled.set()

    def wait(number: int, frame: Any) -> None:
        handled.wait(1.0)  # what the main thread does next already sees what `handle` has done

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, wait) for number in (signal.SIGTERM, signal.SIGINT)}
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join(1.0)
        reader.close()


def stop_at_once(number: int) -> None:
    """Ends the process with the code 128 plus the number of the signal."""
    console.print("stopped during the test; the training is kept, and the same command does the test")
    os._exit(128 + number)


@dataclasses.dataclass
class Trained:
    """Result of training: the selected parameters, their step, timings, devices, chunks and operations of a step."""

    params: ArrayTree
    best_step: int
    seconds: dict[str, float]
    execution: dict[str, int | None]


def as_metric(evaluation: Evaluation) -> dict[str, list[float]]:
    """The mean and 95 % interval of an evaluation, lists of K+1 numbers.

    If an episode is not finite, the number of such episodes and the mean and median of the others are there too.
    """
    names = ["mean", "ci95"]
    if np.any(evaluation.num_nonfinite):
        names += ["num_nonfinite", "finite_mean", "finite_median"]
    return {name: np.asarray(getattr(evaluation, name)).tolist() for name in names}


def finish(
    run_dir: Path, experiment: str, config: Any, trained: Trained, protocol: dict, test: Callable[[], dict]
) -> dict[str, Any]:
    """Tests what was trained and writes results.json. A finished run is not tested again.

    Args:
      run_dir: claimed by `open_run`.
      experiment: its name.
      config: the settings, stored with the results.
      trained: from `train`.
      protocol: how the test is done, stored with the results.
      test: `() -> dict` with "metrics" and whatever else the experiment reports.

    Returns:
      The content of results.json.
    """
    file = run_dir / "results.json"
    with processes.watchdog("looking for results", PROCESS_TIMEOUT_SECONDS):
        results = processes.on_process_zero(lambda: read_results(run_dir))
    if results is not None:
        console.print(f"{run_dir} is finished; these are its results", markup=False)
        return results
    is_alone = jax.process_count() == 1
    with (
        processes.watchdog("the test", TEST_TIMEOUT_SECONDS),
        on_signal(stop_at_once) if is_alone else contextlib.nullcontext(),
    ):
        start = time.perf_counter()
        tested = test()
    results = finite(
        {
            "experiment": experiment,
            "algorithm": config.algorithm,
            "config": as_json(config),
            "protocol": {"loss_reduction": "mean", "ensemble": 1} | protocol,
            **tested,
            "curve": curve(run_dir),
            "execution": trained.execution,
            "seconds": trained.seconds | {"eval": time.perf_counter() - start},
            "meta_steps": config.num_meta_steps,
            "seed": config.seed,
            "versions": versions(),
            "device": device_name(),
        }
    )
    write_json(file, results)
    return results


def curve(run_dir: Path, num_points: int = 100) -> list[dict[str, float]]:
    """The learning curve of a run: records with "step", "loss" and, where it was validated, "val" and "train".

    "val" is the validation score, and "train" the same of training tasks, if the run has logged it.

    Args:
      run_dir: the directory of the run.
      num_points: about how many records there are, besides those with a validation.
    """
    records = read_log(run_dir)
    every = max(1, round(len(records) / num_points))
    return [
        {name: record[name] for name in ("step", "loss", "val", "train") if name in record}
        for number, record in enumerate(records, 1)
        if number % every == 0 or "val" in record
    ]


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, of what all numbers depend on, and of those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "chex", "orbax-checkpoint", "numpy", *packages):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def device_name() -> str:
    """The kind and number of devices; for a CPU the processor's name and its cores."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {kind}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                kind = line.partition(":")[2].strip()
    return f"{kind}, {num_cores()} cores"


def num_cores() -> int:
    """The processor cores that this process may use; where the system does not tell, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
