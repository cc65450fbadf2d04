"""Saves and restores pytrees of arrays: orbax behind three functions.

A checkpoint is written beside its place and renamed when it is whole, so that a process killed at any
moment leaves the newest complete checkpoint intact.
"""

import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from maml_jax.types import ArrayTree


def _steps(directory: Path) -> list[int]:
    return sorted(int(entry.name) for entry in directory.glob("*") if entry.is_dir() and entry.name.isdigit())


def save(directory: str | Path, step: int, tree: ArrayTree, *, keep: int = 2) -> None:
    """Writes `tree` as the checkpoint of `step` and deletes all but the newest `keep`.

    Args:
      directory: where the checkpoints of one run live; made if it does not exist.
      step: a step that has no checkpoint yet.
      tree: a pytree of arrays.
      keep: how many checkpoints stay.

    Raises:
      ValueError: if there is a checkpoint of that step.
    """
    directory = Path(directory).resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / str(step), tree)
    for old in _steps(directory)[:-keep]:
        shutil.rmtree(directory / str(old))


def latest(directory: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None.

    Args:
      directory: as given to `save`; it need not exist.
    """
    steps = _steps(Path(directory))
    return steps[-1] if steps else None


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
    path = Path(directory).resolve() / str(step)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {directory}")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)
