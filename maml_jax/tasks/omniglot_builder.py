"""Prepares the Omniglot drawings once, from the original zips.

Downloads the two zips of https://github.com/brendenlake/omniglot (16 MB), or takes them from a directory; writes them
as the dataset omniglot/3.0.0 of tensorflow-datasets, without tensorflow; and checks all 32,460 drawings. It takes
half a minute.

On a machine with network: python -m maml_jax.tasks.omniglot_builder

Without network, with the zips in directory Z: python -m maml_jax.tasks.omniglot_builder --zips Z
"""

import argparse
import contextlib
import hashlib
import http.client
import io
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maml_jax.tasks import omniglot

URL = "https://github.com/brendenlake/omniglot/raw/master/python"


class Archive(NamedTuple):
    """One of the original zips, and its SHA-256 as published by tensorflow-datasets (`url_checksums/omniglot.txt`)."""

    file: str
    sha256: str


ARCHIVES = {
    "train": Archive("images_background.zip", "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    "test": Archive("images_evaluation.zip", "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
}
"""The zip of each split of the prepared data: 30 background and 20 evaluation alphabets."""
FILES = tuple(archive.file for archive in ARCHIVES.values())


class Drawing(NamedTuple):
    """A PNG of a zip, described by its path, such as `images_background/Greek/character01/0394_07.png`.

    Attributes:
      path: the path inside the zip.
      alphabet: the name of its alphabet.
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
    """Downloads the two original zips, 16 MB.

    Args:
      directory: an existing directory to write to. Files of the same names are replaced.
      url: base URL of the two files.

    Raises:
      OSError: if the network or the server fails.
      ValueError: if a file does not have its checksum. It is not written then.
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
                f"{source} cannot be downloaded ({error!r}). Without network, download {' and '.join(FILES)} on "
                "another machine and give their directory as --zips"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise ValueError(
                f"{source} has checksum {found[:12]}..., not {sha256[:12]}...: it was cut short or changed; try again"
            )
        (Path(directory) / file).write_bytes(content)


def check_zips(directory: str | Path) -> None:
    """Compares the two zips with their checksums, without opening them.

    Args:
      directory: the directory that holds them.

    Raises:
      FileNotFoundError: if a zip is missing.
      ValueError: if a zip does not have its checksum.
    """
    for file, sha256 in ARCHIVES.values():
        path = Path(directory) / file
        if not path.is_file():
            raise FileNotFoundError(f"no {file} in {directory}; download it from {URL}/{file}")
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(
                f"{path} has checksum {found[:12]}..., not {sha256[:12]}...: it is damaged or not the original; "
                f"download it again from {URL}/{file}"
            )


def prepare(data_dir: str | Path, zip_dir: str | Path | None = None, url: str = URL) -> np.ndarray:
    """Writes `data_dir/omniglot/3.0.0` from the original zips.

    The data are written to a temporary directory, read back, checked, and renamed.

    Args:
      data_dir: the data directory of tensorflow-datasets, made if it does not exist.
      zip_dir: the directory that holds the two zips. With None they are downloaded, and deleted afterwards.
      url: base URL of the download.

    Returns:
      What `omniglot.read_tfds(data_dir)` will return, uint8 [1623, 20, 28, 28, 1].

    Raises:
      FileExistsError: if the prepared directory exists, or another process makes it meanwhile. It is not changed.
      ModuleNotFoundError: if tensorflow-datasets is not installed.
      OSError: if a zip is missing or cannot be downloaded, or the data cannot be written.
      ValueError: if a zip does not have its checksum, or its drawings cannot be read.
    """
    data_dir = Path(data_dir).expanduser()
    prepared = omniglot.prepared_dir(data_dir)
    exists = f"{prepared} exists and is not overwritten; delete it or choose another directory"
    if prepared.exists():
        raise FileExistsError(exists)
    if zip_dir is not None:
        zip_dir = Path(zip_dir).expanduser()
        check_zips(zip_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".omniglot-") as scratch:
        if zip_dir is None:
            download(scratch, url)
        source = scratch if zip_dir is None else zip_dir
        try:
            build(source, scratch)
            images = omniglot.canonical_array(omniglot.read_drawings(scratch))
        except ModuleNotFoundError:
            raise
        except Exception as error:  # zipfile, zlib, Pillow, tensorflow-datasets and array_record share no class
            if isinstance(error, OSError) and error.errno is not None:  # a full disk, for example; Pillow sets no errno
                raise
            raise ValueError(
                f"{' and '.join(FILES)} in {source} are not the original Omniglot ({type(error).__name__}: {error}); "
                "download them again"
            ) from error
        prepared.parent.mkdir(exist_ok=True)
        try:
            omniglot.prepared_dir(scratch).rename(prepared)
        except OSError as error:
            if prepared.exists():  # made by another process in the meantime
                raise FileExistsError(exists) from error
            raise
    return images


def build(zip_dir: str | Path, data_dir: str | Path) -> None:
    """Runs the builder of tensorflow-datasets, without tensorflow, on all drawings of the zips.

    Args:
      zip_dir: the directory of the zips, which are trusted; see `check_zips`.
      data_dir: the data directory to write `omniglot/3.0.0` to.
    """
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    with contextlib.ExitStack() as stack:
        archives = {
            split: stack.enter_context(zipfile.ZipFile(Path(zip_dir) / file)) for split, (file, _) in ARCHIVES.items()
        }
        drawings = {split: list_drawings(archive) for split, archive in archives.items()}
        everything = [*drawings["train"], *drawings["test"]]
        names = {drawing.label: drawing.name for drawing in everything}

        class Omniglot(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            """Same as the public omniglot/3.0.0, without the small1 and small2 splits."""

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
                    # The records are ordered by a hash of this key, which is the key of the public builder.
                    yield (
                        f"{drawing.name}_{Path(drawing.path).name}",
                        {
                            "image": io.BytesIO(archives[split].read(drawing.path)),
                            "alphabet": drawing.alphabet,
                            "alphabet_char_id": drawing.character,
                            "label": drawing.name,
                        },
                    )

        with contextlib.redirect_stdout(io.StringIO()):  # it prints the directory, which may be temporary
            Omniglot(data_dir=data_dir).download_and_prepare(file_format="array_record")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepares the data and writes an `.npz` if one is named; an error ends in one paragraph and exit code 2.

    Args:
      argv: the arguments of the command line; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m maml_jax.tasks.omniglot_builder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        help="The tensorflow-datasets directory to write omniglot/3.0.0 to, which is never overwritten. By default "
        "$TFDS_DATA_DIR, else ~/tensorflow_datasets. Give the experiment the same --data-dir.",
    )
    parser.add_argument(
        "--zips",
        metavar="DIR",
        type=Path,
        help=f"A directory that holds {' and '.join(FILES)}. By default they are downloaded.",
    )
    parser.add_argument(
        "--npz",
        metavar="FILE",
        type=Path,
        help="Also write all images to this .npz file, 1 MB, to copy to other machines. The experiment takes it as its "
        "--data-dir, and needs no tensorflow-datasets then. If the data are prepared already and --zips is not given, "
        "nothing else is done.",
    )
    flags = parser.parse_args(argv)
    try:
        _run(flags.data_dir or omniglot.default_data_dir(), flags.zips, flags.npz)
    except ModuleNotFoundError as error:
        parser.exit(2, f"error: {error}; install it with `pip install 'maml_jax[experiments]'`\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def _run(data_dir: Path, zips: Path | None, npz: Path | None) -> None:
    """Does what the flags ask for."""
    if npz:
        omniglot.npz_path(npz)  # a wrong name is refused before the work
    import tensorflow_datasets as tfds  # slow to import, and not needed for --help

    tfds.disable_progress_bar()
    prepared = omniglot.prepared_dir(data_dir)
    if npz and not zips and prepared.exists():
        images = omniglot.read_tfds(data_dir)
        print(f"{prepared} exists and is verified")
    else:
        print(f"preparing {prepared} from {zips or URL}")
        images = prepare(data_dir, zips)
        print(f'prepared and verified; use it with --data-dir {data_dir} or omniglot.load(split, "{data_dir}")')
    if npz:
        omniglot.save_npz(images, npz)
        print(f'wrote {npz}; use it with --data-dir {npz} or omniglot.load(split, "{npz}")')


if __name__ == "__main__":
    main()
