"""Small data sets of several kinds, and images made alike for a learner.

A pack is an `.npz` of uint8 images and their labels in the directory $MAML_JAX_PACKS. Omniglot is read as in
experiments.omniglot.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np

from experiments.runs import read_npz
from maml_jax.tasks import omniglot

Name = Literal["omniglot", "digits", "faces", "objects", "signs", "textures", "cifar10"]
NAMES: tuple[Name, ...] = get_args(Name)
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value, ITU-R BT.601."""


class DataSet(NamedTuple):
    """The images of one data set.

    Attributes:
      images: uint8 [E, H, W, channels], 1 or 3 channels.
      labels: [E], the class of each.
      groups: [E], the same number for near copies within a class; None if there are none.
      about: what it is, for the protocol.
    """

    images: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None
    about: str


class _Pack(NamedTuple):
    """A file of packs.

    Attributes:
      file: its name in the directory of packs.
      shape: of its images; None for any number.
      about: see `DataSet`.
      groups: the name of the array of groups, if there is one.
    """

    file: str
    shape: tuple[int | None, ...]
    about: str
    groups: str | None = None


_PACKS: Mapping[Name, _Pack] = {
    "digits": _Pack("mnist_t10k.npz", (None, 28, 28), "MNIST's test set, light digits on black"),
    "faces": _Pack("orl_faces_56x46.npz", (None, None, 56, 46), "ORL faces: 40 people"),
    "objects": _Pack("coil20_32.npz", (None, 32, 32), "COIL-20: views of 20 objects on black"),
    "signs": _Pack(
        "gtsrb_32.npz",
        (None, 32, 32, 3),
        "GTSRB: traffic signs; an episode has at most one frame of a track",
        groups="tracks",
    ),
    "textures": _Pack("dtd10_64.npz", (None, 64, 64, 3), "ten classes of the Describable Textures Dataset"),
    "cifar10": _Pack("cifar10_300.npz", (None, None, 32, 32, 3), "CIFAR-10, 300 photographs of each class"),
}


def load(
    name: Name, packs_dir: Path | None = None, omniglot_dir: Path | None = None, *, remedy: str | None = None
) -> DataSet:
    """Reads a data set.

    Of Omniglot these are the characters that belong to split "test" in both divisions, by character and by alphabet,
    so that no run of experiments.omniglot was trained on one of them.

    Args:
      name: one of `NAMES`.
      packs_dir: the directory of the packs; by default $MAML_JAX_PACKS.
      omniglot_dir: where Omniglot is, see `maml_jax.tasks.omniglot.load`.
      remedy: how the caller takes the directory, if it is not there; by default as experiments.cross_domain does.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if its content is another.
    """
    if name == "omniglot":
        names = sorted(set(omniglot.splits("character")["test"]) & set(omniglot.splits("alphabet")["test"]))
        characters = omniglot.splits("character")["test"]
        drawings = omniglot.load("test", omniglot_dir, "character")[[characters.index(name) for name in names]]
        return _by_class(drawings, f"{len(names)} characters that are for the test in both divisions, light on black")
    pack = _PACKS[name]
    remedy = remedy or f"--packs-dir or $MAML_JAX_PACKS, or leave {name} out of --data-sets"
    file = find(pack.file, packs_dir, remedy=remedy)
    content = read_npz(file, (), optional=("images", "labels", *filter(None, [pack.groups])))
    images = content.get("images", np.zeros(0))
    is_by_class = len(pack.shape) - (pack.shape[-1] == 3) == 4
    needed = {"images", *([] if is_by_class else ["labels"]), *filter(None, [pack.groups])}
    fits = len(images.shape) == len(pack.shape) and all(
        wanted in (None, size) for size, wanted in zip(images.shape, pack.shape, strict=True)
    )
    lengths = {len(array) for array in content.values()}
    if needed - content.keys() or images.dtype != np.uint8 or not fits or len(lengths) != 1:
        found = ", ".join(f"{key} {array.dtype}{list(array.shape)}" for key, array in content.items())
        wanted = "images uint8" + str(list(pack.shape)).replace("None", "n")
        raise ValueError(
            f"{file} holds {found or 'none of the arrays'}; it must hold {wanted} and, of the same length, "
            f"{', '.join(sorted(needed - {'images'})) or 'nothing else'}"
        )
    images = images if pack.shape[-1] == 3 else images[..., None]
    if is_by_class:
        return _by_class(images, pack.about)
    return DataSet(images, content["labels"], content.get(pack.groups), pack.about)


def find(name: str, packs_dir: Path | None = None, *, remedy: str = "--data-dir or $MAML_JAX_PACKS") -> Path:
    """The file of a pack.

    Args:
      name: of the file.
      packs_dir: the directory of the packs; by default $MAML_JAX_PACKS.
      remedy: how the caller takes the directory.

    Raises:
      FileNotFoundError: if it is not there.
    """
    where = packs_dir or os.environ.get("MAML_JAX_PACKS")
    file = Path(where or ".").expanduser() / name
    if not where or not file.is_file():
        problem = f"there is no file {file}" if where else "the packs are in no known directory"
        raise FileNotFoundError(f"{problem}; give the directory that holds {name} by {remedy}")
    return file


def _by_class(images: np.ndarray, about: str) -> DataSet:
    """A data set from images [C, n, H, W, channels]."""
    labels = np.repeat(np.arange(len(images)), images.shape[1])
    return DataSet(images.reshape(-1, *images.shape[2:]), labels, None, about)


def fitted(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Images in the shape that a learner takes.

    Colours become grey by luminance, and grey becomes three equal channels. Then the image is resized, without regard
    to its aspect ratio, by linear interpolation that averages when it makes an image smaller. Values are not inverted:
    the characters and digits are light on black already, and other images have no ink. Images that have the shape are
    not changed.

    Args:
      images: uint8 [E, H, W, 1 or 3].
      shape: [height, width, 1 or 3].

    Returns:
      uint8 [E, *shape].

    Raises:
      ValueError: if the learner takes another number of channels.
    """
    if shape[-1] not in (1, 3):
        raise ValueError(f"images of {shape[-1]} channels cannot be made; the learner must take 1 or 3")
    if images.shape[1:] == shape:
        return images
    parts = [images[start : start + 500] for start in range(0, len(images), 500)]
    return np.concatenate([_fitted(part, shape) for part in parts])


def _fitted(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    pixels = images.astype(np.float32)
    if shape[-1] < images.shape[-1]:
        pixels = np.sum(pixels * LUMINANCE, -1, keepdims=True, dtype=np.float32)
    pixels = np.asarray(jax.image.resize(pixels, (len(pixels), *shape[:2], pixels.shape[-1]), "linear"))
    return np.broadcast_to(np.clip(np.round(pixels), 0, 255).astype(np.uint8), (len(pixels), *shape))
