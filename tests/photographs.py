"""Folders and zips of small photographs for the tests."""

import io
import json
import zipfile

import numpy as np

COUNTS = {"ant": 3, "bee": 1, "cat": 5, "dog": 2, "elk": 4}
SPLIT = {"train": ["cat", "ant"], "val": ["bee"], "test": ["dog", "elk"]}


def pixels(class_index, index, size=8):
    """uint8 [size, size, 3] that tell the class and the image, with a gradient to see how it is turned."""
    image = np.zeros((size, size, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 20 * class_index, 10 * index, np.arange(size)[:, None] * 8
    return image


def encoded(image, kind="PNG", mode=None, **options):
    """The bytes of an image file."""
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


def files(counts=None):
    """`class/image.png` and the bytes of every image."""
    counts = COUNTS if counts is None else counts
    return {
        f"{name}/{i}.png": encoded(pixels(c, i)) for c, name in enumerate(sorted(counts)) for i in range(counts[name])
    }


def write_folder(directory, members):
    for name, content in members.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def write_zip(file, members):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def write_json(file, content):
    file.write_text(json.dumps(content))
    return file
