"""Drawings of your own as a task: folders of image files, one folder for each class.

Images of any size and mode become what Omniglot is: square, grey, ink 255 on a background of 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maml_jax.tasks.image_files import (
    MOST_PIXELS,
    check_files,
    check_image_name,
    class_files,
    numbers,
    on_background,
    pillow,
    upright,
)
from maml_jax.types import Batch, check_integer

Ink = Literal["auto", "dark", "light"]
"""Whether the ink is darker or lighter than the background; "auto" decides by the border of each image."""

_ORIGINAL_SIZE = 105  # of the drawings of Omniglot
_LEAST_CONTRAST = 0.1  # of the range from black to white; paper without a drawing has less


def read_classes(directory: str | Path, *, size: int = 28, ink: Ink = "auto") -> tuple[list[str], list[np.ndarray]]:
    """Reads a folder that holds one folder of images for each class.

    Names that start with a dot are skipped.

    Args:
      directory: the folder.
      size: H, the height and width of the result.
      ink: as for `read_image`.

    Returns:
      The names of the classes, sorted, and for each a uint8 array [n, H, H, 1] with its images sorted by name.

    Raises:
      FileNotFoundError: if there is no such folder.
      ModuleNotFoundError: if Pillow is not installed.
      ValueError: if there are fewer than two classes, a class has no image, or a file is no image. The message names
        it.
    """
    files = class_files(directory, at_least=2)
    return list(files), [read_images(paths, size=size, ink=ink) for paths in files.values()]


def read_images(files: Sequence[str | Path], *, size: int = 28, ink: Ink = "auto") -> np.ndarray:
    """Reads files as `read_image` does, into one uint8 array [n, H, H, 1].

    Raises:
      ValueError: if `files` is not a list of one or more; else as `read_image`.
    """
    check_files(files)
    return np.stack([read_image(file, size=size, ink=ink) for file in files])


def read_image(file: str | Path, *, size: int = 28, ink: Ink = "auto") -> np.ndarray:
    """Reads one image file of any size and mode.

    What is transparent counts as background. The rest is described at `as_drawing`.

    Args:
      file: its name.
      size: H, the height and width of the result.
      ink: whether the ink is "dark" or "light"; "auto" compares the border of the image with the rest.

    Returns:
      uint8 [H, H, 1], ink 255 and background 0.

    Raises:
      FileNotFoundError: if there is no such file.
      ModuleNotFoundError: if Pillow is not installed.
      ValueError: if it cannot be read as an image, or nothing is drawn on it.
    """
    file = Path(file)
    pillow()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    check_image_name(file)
    with upright(file, str(file)) as image:
        pixels = _grey(image, background=0 if ink == "light" else 255)
    try:
        return as_drawing(pixels, size=size, ink=ink)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def as_drawing(pixels: np.ndarray, *, size: int = 28, ink: Ink = "auto") -> np.ndarray:
    """Turns grey pixels into a drawing as Omniglot has them.

    The background is the median of the border, and the ink is measured from there, so that the strongest ink becomes
    255. The image is padded to a square and scaled by averaging over areas. An image of 105x105 with two values, such
    as an original of Omniglot, is scaled by nearest neighbour, as in the literature.

    Args:
      pixels: grey values [height, width] in [0, 255].
      size: H, the height and width of the result.
      ink: "dark", "light" or "auto": dark if the border is nearer to the lightest than to the darkest pixel.

    Returns:
      uint8 [H, H, 1], ink 255 and background 0.

    Raises:
      ModuleNotFoundError: if Pillow is not installed.
      ValueError: if the shape is wrong, the square has more than 100 million pixels, a pixel is not finite, `ink` is
        unknown, or nothing is drawn: the ink differs from the background by less than a tenth of the range from black
        to white.
    """
    size = check_integer("size", size, at_least=1)
    if ink not in ("auto", "dark", "light"):
        raise ValueError(f"unknown ink {ink!r}; choose auto, dark or light")
    pixels = np.asarray(pixels, np.float32)
    if pixels.ndim != 2 or not pixels.size:
        raise ValueError(f"an image must have the shape [height, width], got {list(pixels.shape)}")
    if max(pixels.shape) ** 2 > MOST_PIXELS:
        height, width = pixels.shape
        raise ValueError(f"{width}x{height} is a square of more than {MOST_PIXELS:,} pixels when it is padded; crop it")
    if not np.isfinite(pixels).all():
        raise ValueError("an image has pixels that are NaN or infinite")
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border)
    if ink == "auto":
        ink = "dark" if 2 * background > pixels.min() + pixels.max() else "light"
    strength = np.maximum(background - pixels if ink == "dark" else pixels - background, 0)
    if strength.max() < _LEAST_CONTRAST * 255:
        raise ValueError(f"there is no {ink} ink; draw something, or name the ink: dark or light")
    is_original = pixels.shape == (_ORIGINAL_SIZE, _ORIGINAL_SIZE) and len(np.unique(pixels)) == 2
    return _scale(_pad_to_square(strength), size, average=not is_original)


def as_batch(images: Sequence[np.ndarray]) -> Batch:
    """The support set of a task from the images of its classes.

    Args:
      images: for each class uint8 [n, H, W, C], as `read_classes` gives them; the counts may differ.

    Returns:
      Inputs [S, H, W, C], float32 in [0, 1], and the class indices [S], int32.

    Raises:
      ValueError: if there is no class.
    """
    if not len(images):
        raise ValueError("as_batch was given no class; give the images of one or more")
    targets = np.concatenate([np.full(len(of_class), index, np.int32) for index, of_class in enumerate(images)])
    return Batch(as_inputs(np.concatenate(list(images))), targets)


def as_inputs(images: np.ndarray) -> np.ndarray:
    """Images of uint8 as float32 in [0, 1]; ink becomes 1.0, the background 0.0."""
    return np.asarray(images, np.float32) / 255.0


def _grey(image: Any, background: int) -> np.ndarray:
    """The grey values [height, width] in [0, 255] of an image; what is transparent gets the background."""
    if (pixels := numbers(image)) is not None:
        return pixels
    return np.asarray(on_background(image, background).convert("L"), np.float32)


def _pad_to_square(strength: np.ndarray) -> np.ndarray:
    """Adds background, so that the image becomes square and stays in the middle."""
    missing = [max(strength.shape) - length for length in strength.shape]
    return np.pad(strength, [(count // 2, count - count // 2) for count in missing])


def _scale(strength: np.ndarray, size: int, *, average: bool) -> np.ndarray:
    """Square ink of any strength as uint8 [size, size, 1] with a maximum of 255."""
    image = pillow()
    resampling = image.Resampling.BOX if average else image.Resampling.NEAREST
    scaled = np.asarray(image.fromarray(strength).resize((size, size), resampling))
    if not scaled.any():  # thin lines, all of them between the pixels that are kept
        return _scale(strength, size, average=True)
    return np.round(scaled * (255.0 / scaled.max())).astype(np.uint8)[..., None]
