"""Saves and restores pytrees of arrays with orbax.

A checkpoint is written under another name and renamed when it is complete, so a process that is killed at any
moment leaves the older checkpoints intact. It holds a SHA-256 of each of its files, which is verified before
anything is restored.

In a job of several processes every process must call these functions, with identical values. Only process 0
reads and writes the disk; restored values are broadcast.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from maml_jax import processes
from maml_jax.types import ArrayTree, check_integer

_CHECKSUMS = "sha256.json"


class CheckpointError(ValueError):
    """A checkpoint is damaged."""


class Restored(NamedTuple):
    """What `restore_latest` found.

    Attributes:
      step: the step of the checkpoint.
      tree: the pytree that was saved.
      damaged: the steps of newer checkpoints, which are damaged and were skipped, newest first.
    """

    step: int
    tree: ArrayTree
    damaged: tuple[int, ...]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tracebacks that orbax and its threads log, one for every array. The exception still propagates."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.excepthook

    def without_closed_loops(kind, error, trace):
        if "Event loop is closed" not in str(error):
            hook(kind, error, trace)

    sys.excepthook = without_closed_loops
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
        sys.excepthook = hook  # after an error, threads that are late still call it
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    """What the operating system says, if a message of tensorstore or orbax has it, else the start of the message."""
    texts = [str(error), str(error.__cause__ or ""), str(error.__context__ or "")]
    reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)]
    found = (reason for text in texts for reason in reasons if reason in text)
    return next(found, " ".join(texts[0].split())[:300])


def save(directory: str | Path, step: int, tree: ArrayTree, *, keep: int = 2) -> None:
    """Writes `tree` as the checkpoint of `step` and deletes old checkpoints.

    A damaged checkpoint of the same step is replaced. Checkpoints of later steps are left as they are.

    Args:
      directory: where the checkpoints of one run are kept; made if it does not exist.
      step: the number of the checkpoint, at least 0.
      tree: a pytree of arrays, typed PRNG keys and Python numbers.
      keep: how many checkpoints are kept of those up to `step`, at least 1.

    Raises:
      OSError: if it cannot be written. Earlier checkpoints stay as they are.
      ValueError: if `step` or `keep` is out of range, `tree` has a leaf that cannot be stored or no values at
        all, or there is an undamaged checkpoint of that step. Nothing is written then.
    """
    step, keep = check_integer("step", step, 0), check_integer("keep", keep, 1)
    leaves = _named_leaves(tree)
    values = {name: _stored_value(name, leaf) for name, leaf in leaves.items()}
    if not any(value.size for value in values.values()):
        raise ValueError("the tree holds no values, and an empty checkpoint cannot be stored; save at least one array")
    if jax.process_index() > 0:
        return
    directory = Path(directory).expanduser().resolve()
    path, incomplete = directory / str(step), directory / ".incomplete"
    if _is_intact(path):
        raise ValueError(f"{path} already exists and is not overwritten; delete it or save to another directory")
    try:
        with _quiet(), _checkpointer() as checkpointer:
            checkpointer.save(
                incomplete,
                {name: value for name, value in values.items() if value.size},  # orbax refuses arrays of size zero
                force=True,  # an interrupted save may have left one
                custom_metadata={"leaves": {name: _describe(leaf) for name, leaf in leaves.items()}},
            )
        (incomplete / _CHECKSUMS).write_text(json.dumps(_checksums(incomplete)))
        if path.exists():  # damaged
            shutil.rmtree(path)
        incomplete.rename(path)
    except Exception as error:  # tensorstore reports a full disk as a ValueError
        raise OSError(
            f"the checkpoint {path} cannot be written ({_reason(error)}); free some space, or choose another "
            "directory. Earlier checkpoints are as they were"
        ) from error
    for old in [saved for saved in steps(directory) if saved <= step][:-keep]:
        shutil.rmtree(directory / str(old))


def steps(directory: str | Path) -> list[int]:
    """The steps that have a checkpoint, damaged or not, in ascending order, as this process sees the directory.

    Args:
      directory: as given to `save`; it need not exist.
    """
    names = [entry.name for entry in Path(directory).expanduser().glob("*") if entry.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def latest(directory: str | Path) -> int | None:
    """The step of the newest checkpoint, which may be damaged, or None.

    Args:
      directory: as given to `save`; it need not exist.
    """
    return processes.on_process_zero(lambda: max(steps(directory), default=None))


def exists(directory: str | Path, step: int) -> bool:
    """Whether there is an undamaged checkpoint of `step`.

    Args:
      directory: as given to `save`; it need not exist.
      step: the number of the checkpoint.
    """
    return processes.on_process_zero(lambda: _is_intact(Path(directory).expanduser() / str(step)))


def restore(directory: str | Path, step: int, like: ArrayTree) -> ArrayTree:
    """Reads the checkpoint of `step`.

    Args:
      directory: as given to `save`.
      step: a step that has a checkpoint.
      like: a pytree with the structure, shapes, dtypes and shardings of the result. Arrays may be
        `jax.ShapeDtypeStruct`s.

    Returns:
      The pytree that was saved.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      CheckpointError: if it is damaged.
      ValueError: if it does not fit `like`.
      ProcessError: instead of these, on every process except process 0.
    """
    step = check_integer("step", step, 0)
    values: dict[str, np.ndarray] = {}
    processes.on_process_zero(lambda: values.update(_read(directory, step, like)))
    return _place(values, like)


def restore_latest(directory: str | Path, like: ArrayTree) -> Restored | None:
    """Reads the newest checkpoint that is not damaged.

    Args:
      directory: as given to `save`; it need not exist.
      like: as in `restore`.

    Returns:
      The step, the pytree and the steps that were skipped; None if there is no checkpoint.

    Raises:
      CheckpointError: if all checkpoints are damaged.
      ValueError: if the newest undamaged checkpoint does not fit `like`.
      ProcessError: instead of these, on every process except process 0.
    """
    values: dict[str, np.ndarray] = {}

    def read() -> tuple[int | None, list[int]]:
        damaged = []
        for step in reversed(steps(directory)):
            try:
                values.update(_read(directory, step, like))
                return step, damaged
            except CheckpointError:
                damaged.append(step)
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {directory} is intact (steps {damaged}); delete this directory to start again"
            )
        return None, damaged

    step, damaged = processes.on_process_zero(read)
    return None if step is None else Restored(step, _place(values, like), tuple(damaged))


def _checkpointer() -> ocp.StandardCheckpointer:
    """A checkpointer for process 0 that does not wait for the other processes."""
    options = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _named_leaves(tree: ArrayTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path) or "(the only leaf)": leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    """Dtype and shape of an array, such as "float32[2, 3]" or "key<fry>[]"; the type of anything else."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored_value(name: str, leaf: Any) -> np.ndarray:
    """The array that is stored for a leaf; of a typed key, its integers."""
    value = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    if not _is_storable(value.dtype):
        raise ValueError(
            f"the leaf {name}, a {type(leaf).__name__} of dtype {value.dtype}, cannot be stored in a checkpoint; "
            "leave it out or convert it to a numeric dtype such as float32"
        )
    return value


def _is_storable(dtype: np.dtype) -> bool:
    """Whether orbax returns an array of this dtype as it was."""
    try:
        tensorstore.dtype(dtype)
    except ValueError:
        return False
    return dtype.isnative and (dtype.kind == "b" or jax.dtypes.issubdtype(dtype, np.number))


def _checksums(path: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint by its relative path, without hidden files and the checksums."""
    sums = {}
    for file in sorted(path.rglob("[!.]*")):
        if file.is_file() and file.name != _CHECKSUMS:
            with open(file, "rb") as stream:
                sums[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _is_intact(path: Path) -> bool:
    """Whether there is an undamaged checkpoint at `path`."""
    try:
        _verify(path)
    except CheckpointError:
        return False
    return True


def _verify(path: Path) -> None:
    """Raises CheckpointError if a file of the checkpoint is not as it was written."""
    try:
        if json.loads((path / _CHECKSUMS).read_bytes()) == _checksums(path):
            return
        problem = f"{_CHECKSUMS} and the other files do not match"
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # a file is missing, or is no JSON
        problem = str(error)
    raise CheckpointError(
        f"the checkpoint {path} is damaged, or was written by a version without checksums ({problem}); delete it, "
        "and continue from an older one or start again"
    )


def _read(directory: str | Path, step: int, like: ArrayTree) -> dict[str, np.ndarray]:
    """Reads a checkpoint into the memory of the host; returns the arrays by the names of their leaves."""
    path = Path(directory).expanduser().resolve() / str(step)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {directory}")
    _verify(path)
    with _checkpointer() as checkpointer:
        stored = checkpointer.metadata(path).custom_metadata["leaves"]
        wanted = {name: _describe(leaf) for name, leaf in _named_leaves(like).items()}
        if stored != wanted:
            differing = sorted(dict(stored.items() ^ wanted.items()))
            raise ValueError(
                f"the checkpoint of step {step} in {directory} does not fit `like` at "
                + "; ".join(f"{name}: stored {stored.get(name)}, wanted {wanted.get(name)}" for name in differing[:5])
                + ". Restore with the configuration that it was saved with"
            )
        return checkpointer.restore(path)


def _place(values: dict[str, np.ndarray], like: ArrayTree) -> ArrayTree:
    """The tree `like` with the values that process 0 has read."""
    templates = {name: _template(leaf) for name, leaf in _named_leaves(like).items()}
    values = templates | values  # leaves of size zero are not stored
    if jax.process_count() > 1:
        # Bytes, because a broadcast would round float64 to float32.
        received = multihost_utils.broadcast_one_to_all(
            {name: np.frombuffer(value.tobytes(), np.uint8) for name, value in values.items()}
        )
        values = {
            name: np.frombuffer(bytearray(received[name]), template.dtype).reshape(template.shape)
            for name, template in templates.items()
        }
    names = jax.tree.unflatten(jax.tree.structure(like), list(templates))
    return jax.tree.map(lambda leaf, name: _as_leaf(values[name], leaf), like, names)


def _template(leaf: Any) -> np.ndarray:
    """An array of the shape and dtype in which a leaf is stored."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return np.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf)


def _as_leaf(value: np.ndarray, like: Any) -> Any:
    """A stored value as the kind of leaf that `like` is."""
    if not hasattr(like, "dtype"):
        return type(like)(value.item())
    if isinstance(like, np.generic):
        return value[()]
    if isinstance(like, np.ndarray):
        return value
    if _is_key(like):
        # Only a compiled program places keys on devices of other processes; `device_put` refuses them.
        return jax.jit(lambda data: jax.random.wrap_key_data(data, dtype=like.dtype), out_shardings=like.sharding)(
            value
        )
    # An array that no device was chosen for may still be moved to a mesh.
    sharding = like.sharding if getattr(like, "committed", True) else None
    with jax.enable_x64(True):  # without it float64 becomes float32
        return jax.device_put(value, sharding)
