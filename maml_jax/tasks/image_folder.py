"""Photographs of your own: folders or zips with one folder of image files for each class.

`load` reads one of three layouts:

- a folder with `train`, `val` and `test`, each a folder of class folders;
- a folder with `train.zip`, `val.zip` and `test.zip`, each with class folders inside;
- one pool, a folder or a zip of class folders, and a split file that says which class belongs to which split. Classes
  that it does not name are not used.

A class folder holds image files and nothing else. Files beside the class folders are not read, and names that start
with a dot are skipped. Nothing of a zip is unpacked to disk.
"""

import contextlib
import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maml_jax.tasks.class_images import ClassImages as ClassImages
from maml_jax.tasks.class_images import cached_classes, check_colour, check_counts, default_cache_dir
from maml_jax.tasks.class_images import check_examples as check_examples
from maml_jax.tasks.class_images import leave_out_small as leave_out_small
from maml_jax.tasks.class_splits import SPLITS, check_split, read_split
from maml_jax.tasks.class_splits import make_split as make_split
from maml_jax.tasks.class_splits import write_split as write_split
from maml_jax.tasks.image_files import (
    as_path,
    check_files,
    check_image_name,
    class_files,
    decode_images,
    has_image_name,
    list_folder,
)
from maml_jax.types import check_integer

_MOST_BYTES = 2**28  # of one image file


def load(
    directory: str | os.PathLike,
    split: str,
    *,
    size: int,
    colour: bool = True,
    split_file: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    min_images: int = 1,
) -> ClassImages:
    """Reads the images of one split; the next time they come from a cache.

    An image may have any size, mode and orientation. It is turned as its EXIF data say, laid on white where it is
    transparent, scaled to 8 bits if it has 16, and resized once to size x size with a Lanczos filter, without regard to
    its aspect ratio, as published for miniImageNet. One that has this size already is not changed.

    The cache is used until a file of the source, or an argument, changes. Its checksum is verified by reading it once,
    and it is made again if it is damaged. The arrays are memory maps of it.

    Args:
      directory: a folder or a zip, in one of the layouts above.
      split: "train", "val" or "test".
      size: H, the height and width of the images.
      colour: whether the images have 3 channels, RGB, and not 1, grey.
      split_file: a JSON file `{"train": [names of classes], "val": [...], "test": [...]}`; see `write_split`. It makes
        `directory` a pool, whatever the names in it are.
      cache_dir: where the cache is; by default `$XDG_CACHE_HOME/maml_jax/images`, else `~/.cache/maml_jax/images`.
      min_images: how many images every class must have.

    Returns:
      The classes of the split, with uint8 images [n_c, size, size, 3 or 1].

    Raises:
      FileNotFoundError: if there is no such directory, split or split file.
      ModuleNotFoundError: if Pillow is not installed.
      OSError: if a file cannot be read, or the cache cannot be written.
      ValueError: if an argument has no possible value, a pool has no split file, a class is in two splits, missing or
        too small, or something is no image, or is damaged. The message names the file, and the zip that holds it.
    """
    directory, split = as_path("directory", directory), check_split(split)
    min_images = check_integer("min_images", min_images, at_least=1)
    pool = _find_split(directory, split, None if split_file is None else as_path("split_file", split_file))
    counts = {name: len(files) for name, files in pool.classes.items()}
    check_counts(counts, min_images, str(pool.where))
    return cached_classes(
        default_cache_dir() if cache_dir is None else as_path("cache_dir", cache_dir),
        split,
        {"source": _fingerprint(pool)},
        lambda: (counts, decode_images(_contents(pool), size, colour)),
        size=size,
        colour=colour,
    )


def class_names(directory: str | os.PathLike) -> list[str]:
    """The names of the classes of a pool, a folder or a zip, sorted.

    Raises:
      FileNotFoundError: if there is no such folder or zip.
      ValueError: if it is no such pool.
    """
    return list(_list_pool(as_path("directory", directory)).classes)


def read_classes(directory: str | os.PathLike, *, size: int, colour: bool = True) -> tuple[list[str], list[np.ndarray]]:
    """Reads a small folder with one folder of images for each class, such as a support set, without a cache.

    Images are resized as in `load`. Names that start with a dot are skipped.

    Args:
      directory: the folder.
      size: H, the height and width of the images.
      colour: whether the images have 3 channels, RGB, and not 1, grey.

    Returns:
      The names of the classes, sorted, and for each a uint8 array [n, H, H, 3 or 1] with its images sorted by name.

    Raises:
      FileNotFoundError: if there is no such folder.
      ModuleNotFoundError: if Pillow is not installed.
      ValueError: if there are fewer than two classes, a class has no image, or a file is no image. The message names
        it.
    """
    files = class_files(directory, at_least=2)
    return list(files), [read_images(paths, size=size, colour=colour) for paths in files.values()]


def read_images(files: Sequence[str | os.PathLike], *, size: int, colour: bool = True) -> np.ndarray:
    """Reads image files, resized as in `load`, into one uint8 array [n, size, size, 3 or 1].

    Raises:
      FileNotFoundError: if there is no such file.
      ModuleNotFoundError: if Pillow is not installed.
      ValueError: if `files` is not a list of one or more, `size` is not a positive integer, `colour` is not a bool, or
        a file cannot be read as an image. The message names it.
    """
    check_files(files)
    check_colour(colour)
    size, paths = check_integer("size", size, at_least=1), [as_path("an image", file) for file in files]
    for path in paths:
        check_image_name(path)
    return np.stack(list(decode_images(((str(path), path.read_bytes()) for path in paths), size, colour)))


class _File(NamedTuple):
    """An image file.

    Attributes:
      label: what it is called in messages.
      stamp: its name and what changes when its content changes.
      member: its path, or its entry in a zip.
    """

    label: str
    stamp: tuple
    member: Path | zipfile.ZipInfo


class _Pool(NamedTuple):
    """The image files of every class of a folder or a zip, sorted."""

    where: Path
    classes: dict[str, list[_File]]


def _find_split(directory: Path, split: str, split_file: Path | None) -> _Pool:
    """The files of one split, after it was checked that no class is in two of them."""
    if split_file is None:
        places = _split_places(directory)
        if split not in places:
            raise FileNotFoundError(f"{directory} has no {split!r}; put a folder {split} or a file {split}.zip there")
        pools = {name: _list_pool(place) for name, place in places.items()}
        for name, pool in pools.items():
            if name != split and (common := sorted(pool.classes.keys() & pools[split].classes.keys())):
                raise ValueError(
                    f"{len(common)} classes are in {places[split]} and in {pool.where}, such as {common[0]!r}. Tasks "
                    "of new classes need disjoint splits; put all images of a class into one folder of one pool, and "
                    "give a split_file"
                )
        return pools[split]
    members, pool = read_split(split_file), _list_pool(directory)
    if missing := sorted({name for names in members.values() for name in names} - pool.classes.keys()):
        raise ValueError(
            f"{len(missing)} classes of the split file {split_file} are not in {directory}, such as {missing[0]!r}; "
            "correct their names"
        )
    if not members[split]:
        raise ValueError(f"the split file {split_file} has no classes in {split!r}; add some")
    return _Pool(pool.where, {name: pool.classes[name] for name in sorted(members[split])})


def _split_places(directory: Path) -> dict[str, Path]:
    """The folder or zip of each split that a directory has."""
    if not directory.exists():
        raise FileNotFoundError(f"there is no folder or zip {directory}; give the name of one")
    places = {}
    for split in SPLITS:
        found = [path for path in (directory / split, directory / f"{split}.zip") if path.exists()]
        if len(found) == 2:
            raise ValueError(f"{directory} has both {split} and {split}.zip; remove one of them")
        if found:
            places[split] = found[0]
    if not places:
        raise ValueError(
            f"{directory} has no train, val and test, so it is taken as one pool of classes, which needs a split_file. "
            "Make one with `image_folder.write_split(FILE, image_folder.make_split(image_folder.class_names("
            f"{str(directory)!r}), seed=0))`"
        )
    return places


def _list_pool(where: Path) -> _Pool:
    if where.is_dir():
        classes, stray = _list_classes_of_folder(where)
    elif where.is_file():
        classes, stray = _list_classes_of_zip(where)
    else:
        raise FileNotFoundError(f"there is no folder or zip {where}; give the name of one")
    if stray:
        raise ValueError(f"the image {stray[0]} is in no class folder; move it into the folder of its class")
    for name, files in classes.items():
        if not files:
            raise ValueError(f"the class {name!r} of {where} holds no image; put some there, or remove the folder")
    if not classes:
        raise ValueError(f"{where} holds no class folder; it must have one folder of images for each class")
    return _Pool(where, {name: sorted(classes[name], key=lambda file: file.stamp) for name in sorted(classes)})


def _list_classes_of_folder(where: Path) -> tuple[dict[str, list[_File]], list[str]]:
    """The files of every class, and the names of images beside the class folders."""
    folders, others = list_folder(where)
    classes = {}
    for folder in folders:
        within = list_folder(folder)
        if within.folders:
            raise ValueError(f"{within.folders[0]} is a folder; {folder} must hold the images of its class themselves")
        classes[folder.name] = []
        for file in within.others:
            check_image_name(file)
            if not file.exists():
                raise ValueError(f"{file} is a link to a file that does not exist; remove it")
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{file} is no file; remove it")
            stamp = (file.name, status.st_size, status.st_mtime_ns)
            classes[folder.name].append(_File(str(file), stamp, file))
    return classes, [str(file) for file in others if has_image_name(file)]


def _list_classes_of_zip(where: Path) -> tuple[dict[str, list[_File]], list[str]]:
    """As `_list_classes_of_folder`. One folder around all class folders is left out."""
    with _opened_zip(where) as archive:
        members = [(member, _check_member(where, member)) for member in archive.infolist()]
    members = [(member, parts) for member, parts in members if not _is_hidden(parts)]
    paths = [parts for member, parts in members if not member.is_dir()]
    if paths and all(len(parts) >= 3 for parts in paths) and len({parts[0] for parts in paths}) == 1:
        members = [(member, parts[1:]) for member, parts in members if parts[0] == paths[0][0]]
    classes: dict[str, list[_File]] = {}  # a folder without a file is a class too
    stray, seen = [], set()
    for member, parts in members:
        label = f"{member.filename} in {where}"
        if member.is_dir():
            if parts:
                classes.setdefault(parts[0], [])
            continue
        if len(parts) == 1:
            if has_image_name(parts[0]):
                stray.append(label)
            continue
        if len(parts) > 2:
            raise ValueError(f"{label} is in a folder of the class {parts[0]!r}; a class has no folders within")
        if not has_image_name(parts[1]):
            raise ValueError(f"{label} is no image file such as .png or .jpg; remove it, or convert it to one")
        if parts in seen:
            raise ValueError(f"{label} is there twice; make the zip again")
        seen.add(parts)
        classes.setdefault(parts[0], []).append(_File(label, (parts[1], member.file_size, member.CRC), member))
    return classes, stray


def _check_member(where: Path, member: zipfile.ZipInfo) -> tuple[str, ...]:
    """The parts of the path of a member of a zip, whose author may be an enemy."""
    name = member.filename
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    problem = None
    if name.startswith("/") or ".." in parts or "\\" in name or name[1:2] == ":":
        problem = "does not stay within the zip"
    elif stat.S_ISLNK(member.external_attr >> 16):
        problem = "is a link"
    elif member.flag_bits & 1:
        problem = "is encrypted"
    elif member.file_size > _MOST_BYTES:
        problem = f"has {member.file_size:,} bytes, more than {_MOST_BYTES:,}"
    if problem:
        raise ValueError(f"{name!r} in {where} {problem}; make the zip again with plain image files in class folders")
    return parts


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


@contextlib.contextmanager
def _opened_zip(where: Path) -> Iterator[zipfile.ZipFile]:
    with open(where, "rb") as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except Exception as error:  # a damaged directory of a zip raises whatever its numbers lead to
            raise ValueError(
                f"{where} cannot be read as a zip ({type(error).__name__}: {error}); make it again"
            ) from error
        with archive:
            yield archive


def _contents(pool: _Pool) -> Iterator[tuple[str, bytes]]:
    """What every image file is called in messages, and its bytes."""
    files = (file for of_class in pool.classes.values() for file in of_class)
    if pool.where.is_dir():
        for file in files:
            if file.stamp[1] > _MOST_BYTES:
                raise ValueError(f"{file.label} has {file.stamp[1]:,} bytes, more than {_MOST_BYTES:,}; shrink it")
            yield file.label, file.member.read_bytes()
        return
    with _opened_zip(pool.where) as archive:
        for file in files:
            try:
                content = archive.read(file.member)  # never more than the declared size
            except Exception as error:  # zipfile, zlib, bz2 and lzma share no class
                raise ValueError(
                    f"{file.label} cannot be read ({type(error).__name__}: {error}); make the zip again"
                ) from error
            yield file.label, content


def _fingerprint(pool: _Pool) -> str:
    """A checksum of the names of all files and of what changes with their content.

    The checksums of the files in a zip are known, so a copy of the zip has the same fingerprint. A folder has not got
    them, so its place counts too.
    """
    place = str(pool.where.resolve()) if pool.where.is_dir() else None
    classes = {name: [file.stamp for file in files] for name, files in pool.classes.items()}
    return hashlib.sha256(json.dumps([place, classes]).encode()).hexdigest()
