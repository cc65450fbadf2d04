"""Which class belongs to which split, drawn once and written down.

A split file is JSON, `{"train": [names of classes], "val": [...], "test": [...]}`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from maml_jax.tasks.class_images import written_beside
from maml_jax.tasks.image_files import as_path
from maml_jax.types import check_integer

SPLITS = ("train", "val", "test")
FRACTIONS = (0.64, 0.16, 0.2)
"""Of the classes of miniImageNet: 64 of 100 for training, 16 for validation and 20 for the test."""


def make_split(names: Iterable[str], *, seed: int = 0, fractions: Sequence[float] = FRACTIONS) -> dict[str, list[str]]:
    """Divides classes at random into three disjoint splits.

    The order is that of the SHA-256 of the seed and the name, so it is the same on every machine and in every version,
    and a class that is added later does not change the order of the others.

    Args:
      names: of the classes, in any order.
      seed: an integer.
      fractions: of the classes of "train", "val" and "test"; their sum is 1. The counts of "val" and "test" are
        rounded, and "train" has the rest.

    Returns:
      The sorted names of "train", "val" and "test".

    Raises:
      ValueError: if `names` is one string, a name is given twice, the fractions are not as described, or a split would
        be empty although its fraction is not 0.
    """
    names = sorted(_check_names("names", names if isinstance(names, str) else list(names)))
    seed = check_integer("seed", seed, at_least=0)
    if (
        len(fractions) != len(SPLITS)
        or not all(isinstance(f, int | float) and 0 <= f <= 1 for f in fractions)
        or abs(sum(fractions) - 1) > 1e-6
    ):
        raise ValueError(f"fractions must be three numbers from 0 to 1 with the sum 1, got {fractions!r}")
    shuffled = sorted(names, key=lambda name: hashlib.sha256(json.dumps([seed, name]).encode()).digest())
    val, test = (round(fraction * len(names)) for fraction in fractions[1:])
    test = min(test, len(names) - val)  # without "train" both may be rounded up
    ends = (len(names) - val - test, len(names) - test)
    parts = (shuffled[: ends[0]], shuffled[ends[0] : ends[1]], shuffled[ends[1] :])
    for name, fraction, part in zip(SPLITS, fractions, parts, strict=True):
        if fraction and not part:
            raise ValueError(f"{len(names)} classes are too few for fractions={fractions!r}: {name!r} would be empty")
    return {name: sorted(part) for name, part in zip(SPLITS, parts, strict=True)}


def write_split(file: str | os.PathLike, split: Mapping[str, Sequence[str]]) -> None:
    """Writes a split file, which `load` reads. An existing file is not replaced.

    Args:
      file: its name.
      split: the names of the classes of "train", "val" and "test", as `make_split` gives them.

    Raises:
      FileExistsError: if the file exists.
      OSError: if it cannot be written.
      ValueError: if the splits are not these three, or a class is in two of them.
    """
    file = as_path("file", file)
    content = json.dumps(_check_splits("split", {**split}), indent=1) + "\n"
    if file.exists():
        raise FileExistsError(f"{file} exists and is not overwritten; delete it or choose another name")
    with written_beside(file) as stream:
        stream.write(content.encode())


def read_split(file: str | os.PathLike) -> dict[str, list[str]]:
    """Reads what `write_split` wrote, or a JSON file of the same form.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it has another form, or a class is in it twice.
    """
    file = as_path("split_file", file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no split file {file}; make one with `image_folder.write_split`")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the split file {file} is no JSON ({type(error).__name__}: {error}); make it again"
        ) from error
    return _check_splits(f"the split file {file}", content)


def check_split(split: Any) -> str:
    """Returns the name of a split, or raises ValueError if it is none."""
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    return split


def _check_splits(what: str, splits: Any) -> dict[str, list[str]]:
    if not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise ValueError(f'{what} must be {{"train": [names of classes], "val": [...], "test": [...]}}')
    checked = {name: _check_names(f"{name!r} of {what}", splits[name]) for name in SPLITS}
    everything = [name for names in checked.values() for name in names]
    if len(set(everything)) < len(everything):
        twice = next(name for name in everything if everything.count(name) > 1)
        raise ValueError(f"{what} has the class {twice!r} in two splits; leave it in one")
    return checked


def _check_names(what: str, names: Any) -> list[str]:
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be a list of names of classes")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{what} has the class {twice!r} twice; leave it in once")
    return list(names)
