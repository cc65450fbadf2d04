"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each, as one uint8 array.

Read with tensorflow-datasets, without tensorflow. The array is canonical: characters sorted by
name, drawings sorted by their pixels, ink 255 on 0, so that one checksum holds for
everybody, whoever prepared the data and with whatever library.

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

import numpy as np

NUM_CHARACTERS, NUM_DRAWINGS, SIZE = 1623, 20, 28
SHA256 = "f7e8705d0a1e116fc92ace3978f29428bf69bbd0f4ba34d8e95b814ffc85e412"
"""Checksum of the bytes of the uint8 array [1623, 20, 28, 28, 1] that everything here agrees on."""


def splits() -> dict[str, list[str]]:
    """The characters, by name, of the splits "train" (1100), "val" (100) and "test" (423).

    Drawn once at random from all 1623, as in the MAML paper, and written down: the paper's own draw
    depends on the order of a directory listing.
    """
    return json.loads(resources.files("maml_jax.tasks").joinpath("omniglot_splits.json").read_text())


def shrink(pixels: np.ndarray) -> np.ndarray:
    """One drawing as the few-shot literature uses it.

    Args:
      pixels: [105, 105], zero where there is ink, whatever the value of paper.

    Returns:
      uint8 [28, 28]: nearest neighbour, 255 where there is ink and 0 elsewhere. Nearest neighbour is what
      Pillow does to the 1-bit originals whatever filter it is asked for.
    """
    nearest = ((np.arange(SIZE) + 0.5) * pixels.shape[0] / SIZE).astype(int)
    return np.where(pixels[nearest[:, None], nearest], 0, 255).astype(np.uint8)


def canonical(drawings: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    """Puts drawings in any order into the canonical array.

    Args:
      drawings: pairs of a character's name, "Alphabet_number", and its pixels [105, 105].

    Returns:
      uint8 [1623, 20, 28, 28, 1].

    Raises:
      ValueError: if characters or drawings are missing or differ from the known ones.
    """
    by_name: dict[str, list[bytes]] = {name: [] for split in splits().values() for name in split}
    for name, pixels in drawings:
        if name not in by_name:
            raise ValueError(f"{name!r} is no character of Omniglot")
        by_name[name].append(shrink(pixels).tobytes())
    if wrong := {name: len(found) for name, found in by_name.items() if len(found) != NUM_DRAWINGS}:
        name, count = next(iter(wrong.items()))
        raise ValueError(
            f"{len(wrong)} of the {NUM_CHARACTERS} characters do not have {NUM_DRAWINGS} drawings, {name} has {count}"
        )
    flat = b"".join(drawing for name in sorted(by_name) for drawing in sorted(by_name[name]))
    return verified(np.frombuffer(flat, np.uint8).reshape(NUM_CHARACTERS, NUM_DRAWINGS, SIZE, SIZE, 1))


def verified(images: np.ndarray) -> np.ndarray:
    """Returns `images` if the checksum of their bytes is `SHA256`, and raises a ValueError if not."""
    found = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"the images have checksum {found[:12]}..., the original drawings {SHA256[:12]}...")
    return images


def default_data_dir() -> Path:
    """The data directory of tensorflow-datasets: `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared_dir(data_dir: str | Path) -> Path:
    """Where tensorflow-datasets keeps Omniglot in a data directory."""
    return Path(data_dir) / "omniglot" / "3.0.0"


def read_drawings(data_dir: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """The drawings of a prepared `omniglot/3.0.0` directory, in its order, as `canonical` takes them.

    Args:
      data_dir: the directory that holds `omniglot/3.0.0`.

    Yields:
      A character's name and its pixels [105, 105].
    """
    import tensorflow_datasets as tfds  # heavy, and needed for the first reading alone
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it would recommend OpenCV, which is not needed for small PNGs
    try:
        builder = tfds.builder_from_directory(prepared_dir(data_dir))
        names = builder.info.features["label"].names
        for split in ("train", "test"):
            source = builder.as_data_source(split)
            for start in range(0, len(source), 1000):  # records read by the thousand come twice as fast
                for example in source.__getitems__(range(start, min(start + 1000, len(source)))):
                    yield names[example["label"]], example["image"][..., 0]
    finally:
        logging.set_verbosity(verbosity)


def read_tfds(data_dir: str | Path) -> np.ndarray:
    """Reads and verifies a prepared `omniglot/3.0.0` directory of tensorflow-datasets.

    Args:
      data_dir: the directory that holds `omniglot/3.0.0`.

    Returns:
      uint8 [1623, 20, 28, 28, 1].

    Raises:
      ModuleNotFoundError: if tensorflow-datasets is not installed.
      ValueError: if it cannot be read or its content is not Omniglot.
    """
    try:
        return canonical(read_drawings(data_dir))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # those of tensorflow-datasets, array_record and Pillow share no class
        raise ValueError(
            f"the prepared Omniglot at {prepared_dir(data_dir)} is damaged or not the original "
            f"({type(error).__name__}: {error}); delete that directory and prepare it again with "
            f"`python -m experiments.prepare_omniglot --data-dir {data_dir}`"
        ) from error


def save_npz(images: np.ndarray, file: str | Path) -> None:
    """Writes the canonical array to an `.npz` that needs no tensorflow-datasets to be read; never half of it.

    Args:
      images: uint8 [1623, 20, 28, 28, 1].
      file: a name that ends in `.npz`; its directory is made, a file that is there is replaced.

    Raises:
      OSError: if it cannot be written.
      ValueError: if the name does not end in `.npz`.
    """
    file = Path(file)
    if file.suffix != ".npz":
        raise ValueError(f"{file} must end in .npz, by which it is recognised later")
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
      ValueError: if the file is damaged or holds something else.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"there is no file {file}; write it with `python -m experiments.prepare_omniglot --npz {file}`"
        )
    try:
        with open(file, "rb") as stream, np.load(stream) as archive:  # numpy leaves a damaged file open
            return verified(archive["images"])
    except Exception as error:  # of the zip, of its compression, of the array inside
        raise ValueError(
            f"{file} is damaged or holds no Omniglot ({type(error).__name__}: {error}); delete it. A cache is made "
            f"again by itself, any other file with `python -m experiments.prepare_omniglot --npz {file}`"
        ) from error


def load(split: str, data_dir: str | Path | None = None) -> np.ndarray:
    """The images of one split.

    A prepared directory is read once; the array is then kept under `$XDG_CACHE_HOME/maml_jax`, for as long
    as the files of the directory stay as they are.

    Args:
      split: "train", "val" or "test", disjoint sets of characters.
      data_dir: the data directory of tensorflow-datasets (it holds `omniglot/3.0.0`), or an `.npz` file
        written by `save_npz`. By default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Returns:
      uint8 [C, 20, 28, 28, 1], ink 255; C is 1100, 100 or 423.

    Raises:
      FileNotFoundError: if there is nothing at `data_dir`.
      ValueError: if the split is unknown or the data are damaged.
    """
    characters = splits()
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
            f"no Omniglot at {data_dir}: it holds no omniglot/3.0.0. Prepare it with `python -m "
            f"experiments.prepare_omniglot --data-dir {data_dir}`, or name the directory that has it"
        )
    files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in prepared.iterdir())
    fingerprint = hashlib.sha256(repr((str(prepared.resolve()), files)).encode()).hexdigest()[:12]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = cache_home / "maml_jax" / f"omniglot-{fingerprint}.npz"
    if cache.is_file():
        return load_npz(cache)
    images = read_tfds(data_dir)
    with contextlib.suppress(OSError):  # where nothing can be kept, the next run reads again
        save_npz(images, cache)
    return images
