"""Saves and restores pytrees of arrays: orbax behind three functions.

A checkpoint is written beside its place and renamed when it is whole, so that a process killed at any
moment leaves the newest complete checkpoint intact.

With several processes all call these functions, with values that are equal in all. Process 0 alone writes
and reads, and tells the others what it read: they need not see its disk.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from maml_jax import parallel
from maml_jax.types import ArrayTree


def _checkpointer() -> ocp.StandardCheckpointer:
    """A checkpointer for process 0, which waits for no other."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _steps(directory: Path) -> list[int]:
    return sorted(int(entry.name) for entry in directory.glob("*") if entry.is_dir() and entry.name.isdigit())


def _signature(tree: ArrayTree) -> dict[str, str]:
    """Shape and dtype of every leaf by its path; a typed key counts as the integers that it is stored as."""

    def describe(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf) for path, leaf in leaves}


def save(directory: str | Path, step: int, tree: ArrayTree, *, keep: int = 2) -> None:
    """Writes `tree` as the checkpoint of `step` and deletes all but the newest `keep`.

    Args:
      directory: where the checkpoints of one run live; made if it does not exist.
      step: a step that has no checkpoint yet.
      tree: a pytree of arrays.
      keep: how many checkpoints stay, at least 1.

    Raises:
      ValueError: if there is a checkpoint of that step, or `keep` is not positive.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint just written; keep at least 1")
    if jax.process_index() > 0:
        return
    if jax.process_count() > 1:
        tree = jax.tree.map(np.asarray, tree)  # of arrays that are spread over processes, orbax would write a part
    directory = Path(directory).resolve()
    with _checkpointer() as checkpointer:
        checkpointer.save(directory / str(step), tree)
    for old in _steps(directory)[:-keep]:
        shutil.rmtree(directory / str(old))


def latest(directory: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None.

    Args:
      directory: as given to `save`; it need not exist.
    """
    return parallel.on_first(lambda: max(_steps(Path(directory)), default=None))


def restore(directory: str | Path, step: int, like: ArrayTree) -> ArrayTree:
    """Reads the checkpoint of `step`.

    Args:
      directory: as given to `save`.
      step: one that has a checkpoint.
      like: a pytree with the structure, shapes, dtypes and shardings that the result is to have.

    Returns:
      The pytree that was saved.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if it does not fit `like`.
    """
    if jax.process_count() == 1:
        return _read(directory, step, like)
    # Process 0 reads into its own memory; only then are the values put where those of `like` are.
    values = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    if jax.process_index() == 0:
        values = _read(directory, step, values)
    values = multihost_utils.broadcast_one_to_all(values)
    return jax.tree.map(
        lambda value, leaf: jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value, values, like
    )


def _read(directory: str | Path, step: int, like: ArrayTree) -> ArrayTree:
    """`restore` in one process."""
    path = Path(directory).resolve() / str(step)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {directory}")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _checkpointer() as checkpointer:
        stored, wanted = _signature(checkpointer.metadata(path).item_metadata.tree), _signature(like)
        if stored != wanted:
            differing = sorted(dict(stored.items() ^ wanted.items()))
            raise ValueError(
                f"the checkpoint of step {step} in {directory} does not fit `like` at "
                + "; ".join(f"{name}: stored {stored.get(name)}, wanted {wanted.get(name)}" for name in differing[:5])
                + ". Restore with the configuration that it was saved with"
            )
        return checkpointer.restore(path, target)
