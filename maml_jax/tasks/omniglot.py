"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each, as one uint8 array.

The drawings are read with tensorflow-datasets, without tensorflow. Characters are sorted by name and the drawings
of each character by their pixels, so the array and its checksum do not depend on how the data were prepared.

Lake, Salakhutdinov and Tenenbaum, 2015, Human-level concept learning through probabilistic program
induction. https://github.com/brendenlake/omniglot
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

NUM_CHARACTERS, NUM_DRAWINGS, SIZE = 1623, 20, 28
SHA256 = "f7e8705d0a1e116fc92ace3978f29428bf69bbd0f4ba34d8e95b814ffc85e412"
"""Checksum of the bytes of the uint8 array [1623, 20, 28, 28, 1]."""

_COMMAND = "python -m maml_jax.tasks.omniglot_builder"


SplitBy = Literal["character", "alphabet"]
"""How the characters are divided; see `splits`."""

_SPLIT_FILES = {"character": "omniglot_splits.json", "alphabet": "omniglot_alphabet_splits.json"}


def splits(split_by: SplitBy = "character") -> dict[str, list[str]]:
    """The characters, by name, of the splits "train", "val" and "test". Each of the two divisions is kept in a file.

    Args:
      split_by: "character": 1100, 100 and 423 characters that were drawn once at random from all 1623, as in the MAML
        paper. Every alphabet is in all splits. (The paper's own draw depends on the order of a directory listing.)
        "alphabet": 1028, 172 and 423 characters of different alphabets, as in the code of ProtoNets. The background
        alphabets, sorted by name, are followed by the evaluation alphabets; the first 1200 characters are for
        training, and five whole alphabets of these are "val". Only Gurmukhi is in both "train" and "test". Tasks of
        new alphabets are harder.

    Raises:
      ValueError: if the division is unknown.

    References:
      Vinyals et al., 2016, section 4.1.1; Snell et al., 2017, section 3.1.
    """
    if split_by not in _SPLIT_FILES:
        raise ValueError(f"split_by={split_by!r} is unknown; choose one of {sorted(_SPLIT_FILES)}")
    return json.loads(resources.files("maml_jax.tasks").joinpath(_SPLIT_FILES[split_by]).read_text())


def downscale_to_28(pixels: np.ndarray) -> np.ndarray:
    """Downscales one drawing to 28x28, as in the few-shot literature, by nearest neighbour.

    Pillow uses nearest neighbour for the 1-bit originals whichever filter is requested.

    Args:
      pixels: [105, 105], zero where there is ink and any other value elsewhere.

    Returns:
      uint8 [28, 28], 255 where there is ink and 0 elsewhere.
    """
    nearest = ((np.arange(SIZE) + 0.5) * pixels.shape[0] / SIZE).astype(int)
    return np.where(pixels[nearest[:, None], nearest], 0, 255).astype(np.uint8)


def canonical_array(drawings: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    """Downscales all drawings, given in any order, and sorts them into the canonical array.

    Args:
      drawings: pairs of a character's name, "Alphabet_number", and its pixels [105, 105].

    Returns:
      uint8 [1623, 20, 28, 28, 1].

    Raises:
      ValueError: if characters or drawings are missing or differ from the originals.
    """
    by_name: dict[str, list[bytes]] = {name: [] for split in splits().values() for name in split}
    for name, pixels in drawings:
        if name not in by_name:
            raise ValueError(f"{name!r} is no character of Omniglot")
        by_name[name].append(downscale_to_28(pixels).tobytes())
    if wrong := {name: len(found) for name, found in by_name.items() if len(found) != NUM_DRAWINGS}:
        name, count = next(iter(wrong.items()))
        raise ValueError(
            f"{len(wrong)} of the {NUM_CHARACTERS} characters do not have {NUM_DRAWINGS} drawings, {name} has {count}"
        )
    flat = b"".join(drawing for name in sorted(by_name) for drawing in sorted(by_name[name]))
    return check_images(np.frombuffer(flat, np.uint8).reshape(NUM_CHARACTERS, NUM_DRAWINGS, SIZE, SIZE, 1))


def check_images(images: np.ndarray) -> np.ndarray:
    """Returns the canonical array unchanged.

    Raises:
      ValueError: if its shape, its dtype or the checksum of its bytes is not that of Omniglot.
    """
    shape = (NUM_CHARACTERS, NUM_DRAWINGS, SIZE, SIZE, 1)
    if (images.shape, images.dtype) != (shape, np.uint8):
        raise ValueError(f"the images are {images.dtype}{list(images.shape)}, and must be uint8{list(shape)}")
    found = hashlib.sha256(images.tobytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"the images have checksum {found[:12]}..., and the original drawings {SHA256[:12]}...")
    return images


def default_data_dir() -> Path:
    """The data directory of tensorflow-datasets: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared_dir(data_dir: str | Path) -> Path:
    """The directory of Omniglot in a data directory of tensorflow-datasets."""
    return Path(data_dir).expanduser() / "omniglot" / "3.0.0"


def read_drawings(data_dir: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the drawings of a prepared `omniglot/3.0.0` directory, in the order of its records.

    Args:
      data_dir: the directory that holds `omniglot/3.0.0`.

    Yields:
      A character's name and its pixels [105, 105].
    """
    import tensorflow_datasets as tfds  # slow to import, and only needed until there is a cache

    with quiet_tfds():
        builder = tfds.builder_from_directory(prepared_dir(data_dir))
        names = builder.info.features["label"].names
        for split in ("train", "test"):
            source = builder.as_data_source(split)
            for start in range(0, len(source), 1000):  # twice as fast as one by one
                for example in source.__getitems__(range(start, min(start + 1000, len(source)))):
                    yield names[example["label"]], example["image"][..., 0]


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Without the recommendation of tensorflow-datasets to install OpenCV, which small images do not need."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def read_tfds(data_dir: str | Path) -> np.ndarray:
    """Reads and checks a prepared `omniglot/3.0.0` directory of tensorflow-datasets.

    Args:
      data_dir: the directory that holds `omniglot/3.0.0`.

    Returns:
      uint8 [1623, 20, 28, 28, 1].

    Raises:
      ModuleNotFoundError: if tensorflow-datasets is not installed.
      ValueError: if the directory cannot be read or its content is not Omniglot.
    """
    try:
        return canonical_array(read_drawings(data_dir))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # tensorflow-datasets, array_record and Pillow share no class
        raise ValueError(
            f"the prepared Omniglot at {prepared_dir(data_dir)} is damaged or not the original "
            f"({type(error).__name__}: {error}); delete that directory and prepare it again with "
            f"`{_COMMAND} --data-dir {data_dir}`"
        ) from error


def npz_path(file: str | Path) -> Path:
    """Returns the path of an `.npz` file, with `~` expanded.

    Raises:
      ValueError: if the name does not end in `.npz`.
    """
    file = Path(file).expanduser()
    if file.suffix != ".npz":
        raise ValueError(f"{file} must end in .npz, because `load` recognises such a file by its name")
    return file


def save_npz(images: np.ndarray, file: str | Path) -> None:
    """Writes the canonical array to an `.npz`, which can be read without tensorflow-datasets.

    The file is written under another name and renamed when it is complete.

    Args:
      images: uint8 [1623, 20, 28, 28, 1].
      file: a name that ends in `.npz`. Its directory is made; an existing file is replaced.

    Raises:
      OSError: if it cannot be written.
      ValueError: if the name does not end in `.npz`.
    """
    file = npz_path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".omniglot-") as scratch:
        np.savez_compressed(Path(scratch) / file.name, images=images)
        os.replace(Path(scratch) / file.name, file)


def load_npz(file: str | Path) -> np.ndarray:
    """Reads what `save_npz` wrote.

    Args:
      file: its name.

    Returns:
      uint8 [1623, 20, 28, 28, 1].

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, or holds anything but uint8 [1623, 20, 28, 28, 1] with the checksum of
        Omniglot.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; write it with `{_COMMAND} --npz {file}`")
    try:
        with open(file, "rb") as stream, np.load(stream) as archive:  # numpy does not close a damaged file
            return check_images(archive["images"])
    except Exception as error:  # zipfile, zlib and numpy share no class
        raise ValueError(
            f"{file} is damaged or holds no Omniglot ({type(error).__name__}: {error}); delete it. A file in the cache "
            f"is written again by the next run, any other file by `{_COMMAND} --npz {file}`"
        ) from error


def load(split: str, data_dir: str | Path | None = None, split_by: SplitBy = "character") -> np.ndarray:
    """The images of one split.

    A prepared directory is only read the first time. The array is then cached in `$XDG_CACHE_HOME/maml_jax`
    (by default `~/.cache/maml_jax`), and the cache is used until a file of the directory changes.

    Args:
      split: "train", "val" or "test", disjoint sets of characters.
      data_dir: the data directory of tensorflow-datasets (it holds `omniglot/3.0.0`), or an `.npz` file
        written by `save_npz`. By default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      split_by: how the characters are divided; see `splits`.

    Returns:
      uint8 [C, 20, 28, 28, 1], ink 255; C is 1100, 100 or 423, or 1028, 172 or 423 by alphabet.

    Raises:
      FileNotFoundError: if there is no Omniglot at `data_dir`.
      ModuleNotFoundError: if tensorflow-datasets is not installed, and neither an `.npz` nor the cache is read.
      ValueError: if the split is unknown or the data are damaged.
    """
    characters = splits(split_by)
    if split not in characters:
        raise ValueError(f"unknown split {split!r}; choose one of {sorted(characters)}")
    images = load_all(data_dir)
    names = sorted(name for members in characters.values() for name in members)
    return images[[names.index(name) for name in characters[split]]]


def load_all(data_dir: str | Path | None = None) -> np.ndarray:
    """The canonical array [1623, 20, 28, 28, 1] of all characters; see `load`."""
    data_dir = Path(data_dir).expanduser() if data_dir else default_data_dir()
    if data_dir.suffix == ".npz":
        return load_npz(data_dir)
    prepared = prepared_dir(data_dir)
    if not prepared.is_dir():
        raise FileNotFoundError(
            f"no Omniglot at {data_dir}: it holds no omniglot/3.0.0. Prepare it with "
            f"`{_COMMAND} --data-dir {data_dir}`, or give the directory that holds it"
        )
    files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in prepared.iterdir())
    fingerprint = hashlib.sha256(repr((str(prepared.resolve()), files)).encode()).hexdigest()[:12]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = cache_home / "maml_jax" / f"omniglot-{fingerprint}.npz"
    if cache.is_file():
        return load_npz(cache)
    images = read_tfds(data_dir)
    with contextlib.suppress(OSError):  # without a cache the next run reads the directory again
        save_npz(images, cache)
    return images
