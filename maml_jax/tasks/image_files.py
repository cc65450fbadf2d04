"""Files and folders of images: what a folder holds, and images of any mode as grey values or colours.

Shared by `drawings`, `image_folder` and `tfds_classes`.
"""

import contextlib
import functools
import io
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA"),
    *("TIFF", "WEBP"),
)  # pixels only: Pillow runs another program for some of the others, such as EPS
MOST_PIXELS = 100_000_000
_AT_ONCE = 64  # files in memory


class Listing(NamedTuple):
    """What a folder holds, sorted by name, without names that start with a dot."""

    folders: tuple[Path, ...]
    others: tuple[Path, ...]


def list_folder(directory: str | Path) -> Listing:
    """Lists a folder.

    Raises:
      FileNotFoundError: if there is no such folder.
      OSError: if it cannot be read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file and no folder" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"the folder {directory} {what}; give the name of a folder")
    folders, others = [], []
    for entry in sorted(directory.iterdir()):
        if not entry.name.startswith("."):
            (folders if entry.is_dir() else others).append(entry)
    return Listing(tuple(folders), tuple(others))


def image_files(directory: str | Path) -> list[Path]:
    """The image files of one folder, sorted by name.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it has no image, or holds a folder or a file of another kind.
    """
    folders, files = list_folder(directory)
    if folders:
        raise ValueError(f"{folders[0]} is no image file but a folder; {directory} must hold the images themselves")
    for file in files:
        check_image_name(file)
    if not files:
        raise ValueError(f"{directory} holds no image; put at least one there, or remove the folder")
    return list(files)


def class_files(directory: str | Path, *, at_least: int = 0) -> dict[str, list[Path]]:
    """The image files of every class folder of a folder, by the name of the class.

    Args:
      directory: the folder.
      at_least: how many classes it must have.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it holds a file beside the folders or too few of them, or a class folder has no image or something
        else.
    """
    folders, others = list_folder(directory)
    if others:
        raise ValueError(f"{others[0]} is no folder; {directory} must hold only one folder of images for each class")
    if len(folders) < at_least:
        raise ValueError(
            f"{directory} holds {len(folders)} class folder{'' if len(folders) == 1 else 's'}; a task needs at least "
            f"{at_least}, each with the images of one class"
        )
    return {folder.name: image_files(folder) for folder in folders}


def has_image_name(file: str | PurePath) -> bool:
    """Whether the name of a file ends as that of an image that Pillow reads."""
    return os.path.splitext(file)[1].lower() in _image_suffixes()


def check_image_name(file: str | PurePath) -> None:
    """Raises ValueError unless a file has the name of an image that Pillow reads."""
    if not has_image_name(file):
        raise ValueError(f"{file} is no image file such as .png or .jpg; remove it, or convert it to one")


def check_files(files: Any) -> None:
    """Raises ValueError unless `files` is a list of one or more."""
    if isinstance(files, str | os.PathLike) or not files:
        raise ValueError(f"read_images takes a list of one or more files, got {files!r}")


def pillow() -> Any:
    """The module `PIL.Image` with all its formats.

    Raises:
      ModuleNotFoundError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading images needs Pillow; install it with `pip install pillow`") from error
    Image.init()
    return Image


@contextlib.contextmanager
def upright(file: str | Path | BinaryIO, name: str) -> Iterator[Any]:
    """Opens an image, turned as its EXIF data say.

    Whatever is raised until the end of the context becomes one error, because each format of Pillow raises its own.

    Args:
      file: its path, or its bytes.
      name: what it is called in the message.

    Raises:
      ModuleNotFoundError: if Pillow is not installed.
      ValueError: if the file is not an image that can be read, or has more than 100 million pixels.
    """
    image = pillow()
    from PIL import ImageOps

    try:
        with image.open(file, formats=_formats()) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width}x{opened.height} is more than {MOST_PIXELS:,} pixels")
            yield ImageOps.exif_transpose(opened)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read as an image ({type(error).__name__}: {error}); remove or replace it"
        ) from error


def numbers(image: Any) -> np.ndarray | None:
    """The grey values [height, width] in [0, 255] of an image of integers or floats, which Pillow would clip.

    The range of integers ends at 65535, that of floats at 1, or at the largest value if that is larger. Images of
    another mode give None.

    Raises:
      ValueError: if a value is not finite.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    pixels = np.asarray(image, np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("a pixel is not finite")
    top = 65535 if image.mode.startswith("I") else 1
    return np.maximum(pixels, 0) * (255.0 / max(top, pixels.max()))


def on_background(image: Any, grey: int) -> Any:
    """An image without transparency; the background is grey, in 0..255."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    beneath = pillow().new("RGBA", image.size, (grey,) * 3 + (255,))
    return pillow().alpha_composite(beneath, image)


def resize(image: Any, size: int, colour: bool) -> np.ndarray:
    """A Pillow image as uint8 [size, size, 3 or 1], whatever its aspect ratio, with a Lanczos filter.

    Numbers are scaled as in `numbers`, and what is transparent becomes white.
    """
    if (grey := numbers(image)) is not None:
        image = pillow().fromarray(np.round(grey).astype(np.uint8))
    image = on_background(image, 255).convert("RGB" if colour else "L")
    pixels = np.asarray(image.resize((size, size), pillow().Resampling.LANCZOS))
    return pixels if colour else pixels[..., None]


def decode_images(contents: Iterator[tuple[str, bytes]], size: int, colour: bool) -> Iterator[np.ndarray]:
    """Decodes image files in several threads and gives uint8 [size, size, 3 or 1] in the order of the files.

    Args:
      contents: what each file is called in messages, and its bytes.
      size: see `resize`.
      colour: see `resize`.

    Raises:
      ModuleNotFoundError: if Pillow is not installed.
      ValueError: if one is not an image that can be read.
    """

    def read(item: tuple[str, bytes]) -> np.ndarray:
        name, content = item
        with upright(io.BytesIO(content), name) as image:
            return resize(image, size, colour)

    pillow()
    with ThreadPoolExecutor() as threads:
        while batch := list(itertools.islice(contents, _AT_ONCE)):
            yield from threads.map(read, batch)


def as_path(name: str, value: Any) -> Path:
    """Returns the path with `~` expanded, or raises ValueError if `value`, called `name` in the message, is none."""
    if not isinstance(value, str | os.PathLike) or "\0" in (text := os.fspath(value)) or not text:
        raise ValueError(f"{name} must be the name of a file or folder, got {value!r}")
    return Path(text).expanduser()


def _formats() -> list[str]:
    image = pillow()
    return [name for name in _FORMATS if name in image.OPEN]


@functools.cache
def _image_suffixes() -> set[str]:
    formats = _formats()
    return {suffix for suffix, name in pillow().registered_extensions().items() if name in formats}
