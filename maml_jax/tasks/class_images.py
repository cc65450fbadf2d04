"""The images of classes in one file, which is opened without reading it into memory and whose damage is found out.

`<stem>.npy` holds the images, class after class, and `<stem>.json` the names and sizes of the classes, what the images
were made from, and the checksum of everything. Both are written under another name and renamed when they are complete,
the `.json` last. Nothing is ever unpickled.
"""

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maml_jax.types import check_integer

_FORMAT = 1  # counts the changes of the files, and of how images become pixels, after which older caches are wrong
_PART = ".part-"  # begins the names of files that are not complete
_A_DAY = 24 * 3600  # seconds, after which a temporary file belongs to no process


class ClassImages(NamedTuple):
    """The images of classes, ordered by the names of the classes.

    Attributes:
      names: of the C classes, sorted.
      images: C arrays uint8 [n_c, H, H, channels]. They may be memory maps.
    """

    names: tuple[str, ...]
    images: tuple[np.ndarray, ...]


def check_examples(classes: ClassImages, needed: int) -> ClassImages:
    """Returns the classes unchanged.

    Args:
      classes: from `load`.
      needed: the examples that an episode takes of a class, shot + query_shot.

    Raises:
      ValueError: if a class has fewer. The message names it.
    """
    needed = check_integer("needed", needed, at_least=1)
    check_counts({name: len(images) for name, images in zip(*classes, strict=True)}, needed, "the split")
    return classes


def leave_out_small(classes: ClassImages, needed: int) -> tuple[ClassImages, int]:
    """The classes with at least `needed` images, and the number of the others.

    Raises:
      ValueError: if no class is left.
    """
    needed = check_integer("needed", needed, at_least=1)
    kept = [(name, images) for name, images in zip(*classes, strict=True) if len(images) >= needed]
    if not kept:
        raise ValueError(f"none of the {len(classes.names)} classes has {needed} images; use fewer examples of a class")
    names, images = zip(*kept, strict=True)
    return ClassImages(names, images), len(classes.names) - len(names)


def check_counts(counts: dict[str, int], needed: int, what: str) -> None:
    """Raises ValueError if a class has fewer images than needed; `what` is the source in the message."""
    small = {name: count for name, count in counts.items() if count < needed}
    if small:
        name = min(small, key=small.__getitem__)
        raise ValueError(
            f"{len(small)} of {len(counts)} classes of {what} have fewer than {needed} images, such as {name!r} with "
            f"{small[name]}; use fewer examples of a class, add images, or leave these classes out with "
            "leave_out_small (in the experiments --leave-out-small)"
        )


def check_colour(colour: Any) -> None:
    """Raises ValueError unless `colour` is a bool."""
    if not isinstance(colour, bool):
        raise ValueError(f"colour must be True or False, got {colour!r}")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/maml_jax/images`, by default `~/.cache/maml_jax/images`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maml_jax" / "images"


def cached_classes(
    cache_dir: Path,
    name: str,
    description: dict[str, Any],
    make: Callable[[], tuple[dict[str, int], Iterable[np.ndarray]]],
    *,
    size: int,
    colour: bool,
) -> ClassImages:
    """Images from the cache, or made and cached if they are not there or damaged.

    Args:
      cache_dir: a folder, made if it does not exist.
      name: what the names of the files start with.
      description: everything else that the images depend on, as JSON can hold it.
      make: `() -> (counts, images)`: the number of images of every class by its name, sorted, and all images one by
        one, uint8 [H, H, channels], class after class.
      size: H.
      colour: whether there are 3 channels and not 1.

    Returns:
      The classes, with read-only memory maps.

    Raises:
      OSError: if the cache cannot be written or read.
      ValueError: if `size` is not a positive integer or `colour` is not a bool.
    """
    size = check_integer("size", size, at_least=1)
    check_colour(colour)
    description = {**description, "size": size, "colour": colour, "format": _FORMAT}
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    array_file, json_file = (
        cache_dir / f"{name}-{size}-{'colour' if colour else 'grey'}-{digest[:16]}.{suffix}"
        for suffix in ("npy", "json")
    )
    counts = _intact_counts(array_file, json_file, description)
    if counts is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the cache folder {cache_dir} cannot be made ({error}); give another cache_dir or set XDG_CACHE_HOME"
            ) from error
        _remove_leftovers(cache_dir)
        counts, images = make()
        with written_beside(array_file) as stream:
            checksum = _write_array(stream, (sum(counts.values()), size, size, 3 if colour else 1), images)
        content = {"description": description, "classes": counts}
        with written_beside(json_file) as stream:
            stream.write(json.dumps({**content, "sha256": _seal(checksum, content)}, indent=1).encode())
    flat = np.load(array_file, mmap_mode="r", allow_pickle=False)
    return ClassImages(tuple(counts), tuple(np.split(flat, np.cumsum(list(counts.values()))[:-1])))


def _seal(checksum: str, content: dict[str, Any]) -> str:
    """The checksum of the `.npy` and of what the `.json` says."""
    return hashlib.sha256(json.dumps([checksum, content]).encode()).hexdigest()


def _intact_counts(array_file: Path, json_file: Path, description: dict[str, Any]) -> dict[str, int] | None:
    """The number of images of every class, if both files are what `cached_classes` wrote for this description."""
    try:
        found = json.loads(json_file.read_bytes())
        with open(array_file, "rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    seal = found.pop("sha256", None) if isinstance(found, dict) else None
    if seal is None or seal != _seal(checksum, found) or found["description"] != description:
        return None
    return found["classes"]


def _write_array(stream: Any, shape: tuple[int, ...], images: Iterable[np.ndarray]) -> str:
    """Writes a file of numpy, image by image, and returns its SHA-256."""
    writer = _HashingWriter(stream)
    np.lib.format.write_array_header_1_0(writer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    count = 0
    for count, image in enumerate(images, 1):
        if (image.shape, image.dtype) != (shape[1:], np.uint8):
            raise AssertionError(f"image {count - 1} is {image.dtype} {image.shape}, and must be uint8 {shape[1:]}")
        writer.write(image.tobytes())
    if count != shape[0]:
        raise AssertionError(f"there are {count} images, and must be {shape[0]}")
    return writer.checksum.hexdigest()


class _HashingWriter:
    """A binary file that is written and hashed at once."""

    def __init__(self, stream: Any):
        self.stream, self.checksum = stream, hashlib.sha256()

    def write(self, content: bytes) -> None:
        """Appends to the file."""
        self.checksum.update(content)
        self.stream.write(content)


@contextlib.contextmanager
def written_beside(file: Path) -> Iterator[Any]:
    """A binary file that appears under its name when it is complete, and not at all if the block raises."""
    part = file.with_name(f"{_PART}{uuid.uuid4().hex}")
    try:
        with open(part, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _remove_leftovers(cache_dir: Path) -> None:
    """Removes temporary files of processes that were killed."""
    for file in cache_dir.glob(f"{_PART}*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _A_DAY:
                file.unlink()
