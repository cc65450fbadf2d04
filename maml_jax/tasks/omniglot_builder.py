"""Omniglot's original zips, fetched and prepared as `omniglot/3.0.0` of tensorflow-datasets.

The public builder needs tensorflow to prepare; this one does not, and writes the same records. What it
wrote is read back and compared with the known checksum before it is put in place.
"""

import contextlib
import hashlib
import http.client
import io
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maml_jax.tasks import omniglot

URL = "https://github.com/brendenlake/omniglot/raw/master/python"


class Archive(NamedTuple):
    """One of the original zips, and its checksum as tensorflow-datasets publishes it (`url_checksums/omniglot.txt`)."""

    file: str
    sha256: str


ARCHIVES = {
    "train": Archive("images_background.zip", "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    "test": Archive("images_evaluation.zip", "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
}
"""The zip of each split of the prepared data: 30 background and 20 evaluation alphabets."""
FILES = tuple(archive.file for archive in ARCHIVES.values())


class Drawing(NamedTuple):
    """A PNG of a zip, told by its path: `images_background/Greek/character01/0394_07.png`.

    Attributes:
      path: inside the zip.
      alphabet: its alphabet.
      character: the character's number in its alphabet, from 0.
      label: the character's number among all 1623, from 0.
    """

    path: str
    alphabet: str
    character: int
    label: int

    @property
    def name(self) -> str:
        """The character's name, as in `omniglot.splits`."""
        return f"{self.alphabet}_{self.character}"


def list_drawings(archive: zipfile.ZipFile) -> list[Drawing]:
    """The drawings of a zip, in the order of their paths."""
    layout = re.compile(r"images_\w+/([^/]+)/character(\d+)/(\d+)_\d+\.png")
    found = filter(None, map(layout.fullmatch, sorted(archive.namelist())))
    return [Drawing(match[0], match[1], int(match[2]) - 1, int(match[3]) - 1) for match in found]


def download(directory: str | Path, url: str = URL) -> None:
    """Fetches the two original zips, 16 MB.

    Args:
      directory: where to; it exists. Files of those names are replaced.
      url: where they lie.

    Raises:
      OSError: if the network or the server fails.
      ValueError: if a file does not have its checksum; it is not written.
    """
    for file, sha256 in ARCHIVES.values():
        source = f"{url}/{file}"
        try:
            with urllib.request.urlopen(source, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            raise OSError(
                f"{source} cannot be fetched ({error!r}). Without network, fetch {' and '.join(FILES)} on another "
                "machine and give their directory as --zips"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise ValueError(
                f"{source} has checksum {found[:12]}..., not {sha256[:12]}...: it was cut short or changed; try again"
            )
        (Path(directory) / file).write_bytes(content)


def prepare(data_dir: str | Path, zip_dir: str | Path | None = None, url: str = URL) -> np.ndarray:
    """Writes `data_dir/omniglot/3.0.0` from the original zips: whole and verified, or not at all.

    Args:
      data_dir: the data directory of tensorflow-datasets, made if it does not exist.
      zip_dir: the directory that holds the two zips; None downloads them, and does not keep them.
      url: where they are downloaded from.

    Returns:
      What `omniglot.read_tfds(data_dir)` will return, uint8 [1623, 20, 28, 28, 1].

    Raises:
      FileExistsError: if the prepared directory exists; it is left as it is.
      OSError: if a zip is missing or cannot be downloaded, or the data cannot be written.
      ValueError: if the zips cannot be read or do not hold the original drawings.
    """
    data_dir = Path(data_dir)
    prepared = omniglot.prepared_dir(data_dir)
    if prepared.exists():
        raise FileExistsError(f"{prepared} exists and is not overwritten; delete it, or choose another directory")
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".omniglot-") as scratch:
        if zip_dir is None:
            download(scratch, url)
        source = scratch if zip_dir is None else zip_dir
        try:
            build(source, scratch)
            images = omniglot.canonical(omniglot.read_drawings(scratch))
        except (OSError, ModuleNotFoundError):  # a full disk, a missing zip: nothing about the drawings
            raise
        except Exception as error:  # those of zipfile, zlib, tensorflow-datasets and array_record share no class
            raise ValueError(
                f"{' and '.join(FILES)} in {source} are not the original Omniglot ({error}); fetch them again"
            ) from error
        prepared.parent.mkdir(exist_ok=True)
        omniglot.prepared_dir(scratch).rename(prepared)  # fails if another process has been faster
    return images


def build(zip_dir: str | Path, data_dir: str | Path) -> None:
    """Runs the builder of tensorflow-datasets, without tensorflow, over whatever drawings the zips hold.

    Args:
      zip_dir: the directory of the zips.
      data_dir: the data directory to write `omniglot/3.0.0` to.

    Raises:
      FileNotFoundError: if a zip is missing.
      ValueError: if there are no drawings.
      zipfile.BadZipFile: if a zip is damaged; zlib and tensorflow-datasets have other errors for that.
    """
    import tensorflow_datasets as tfds  # heavy, and needed here alone

    with contextlib.ExitStack() as stack:
        archives = {}
        for split, (file, _) in ARCHIVES.items():
            path = Path(zip_dir) / file
            if not path.is_file():
                raise FileNotFoundError(f"no {file} in {zip_dir}; fetch it from {URL}/{file}")
            archives[split] = stack.enter_context(zipfile.ZipFile(path))
        drawings = {split: list_drawings(archive) for split, archive in archives.items()}
        if not all(drawings.values()):
            raise ValueError("there are no images_*/ALPHABET/characterNN/NNNN_NN.png in one of them")
        everything = [*drawings["train"], *drawings["test"]]
        names = {drawing.label: drawing.name for drawing in everything}

        class Omniglot(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            """The public omniglot/3.0.0, but for its small1 and small2 splits."""

            name = "omniglot"
            VERSION = tfds.core.Version("3.0.0")

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="1623 handwritten characters of 50 alphabets, drawn by 20 people each.",
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(105, 105, 3), encoding_format="png"),
                            "alphabet": tfds.features.ClassLabel(names=sorted({d.alphabet for d in everything})),
                            "alphabet_char_id": np.int64,
                            "label": tfds.features.ClassLabel(names=[names[label] for label in sorted(names)]),
                        }
                    ),
                    supervised_keys=("image", "label"),
                    homepage="https://github.com/brendenlake/omniglot/",
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
                return {split: self._generate_examples(split) for split in archives}

            def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
                for drawing in drawings[split]:
                    # The records are ordered by a hash of this key, which is the public builder's.
                    yield (
                        f"{drawing.name}_{Path(drawing.path).name}",
                        {
                            "image": io.BytesIO(archives[split].read(drawing.path)),
                            "alphabet": drawing.alphabet,
                            "alphabet_char_id": drawing.character,
                            "label": drawing.name,
                        },
                    )

        with contextlib.redirect_stdout(io.StringIO()):  # it would tell where, and that may be a temporary place
            Omniglot(data_dir=data_dir).download_and_prepare(file_format="array_record")
