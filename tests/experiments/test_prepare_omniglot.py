"""The command, from the zips to images that experiments read; with all of Omniglot where it is at hand."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import prepare_omniglot
from maml_jax.tasks import omniglot, omniglot_builder

DATA_DIR = os.environ.get("TFDS_DATA_DIR")
needs_data = pytest.mark.skipif(
    not DATA_DIR or not omniglot.prepared_dir(DATA_DIR).is_dir(),
    reason="needs Omniglot: run `python -m experiments.prepare_omniglot --data-dir D` and set TFDS_DATA_DIR=D",
)


def call(*arguments):
    command = [sys.executable, "-m", "experiments.prepare_omniglot", *map(str, arguments)]
    return subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True
    )


def test_help_names_every_flag_and_where_the_drawings_come_from():
    told = call("--help")
    assert told.returncode == 0
    for word in ("--data-dir", "--zips", "--npz", "https://github.com/brendenlake/omniglot", "images_evaluation.zip"):
        assert word in told.stdout


def test_a_mistake_is_one_paragraph_and_exit_code_2(tmp_path):
    told = call("--data-dir", tmp_path / "data", "--zips", tmp_path)
    assert told.returncode == 2
    assert told.stderr.startswith(f"error: no images_background.zip in {tmp_path}; fetch it from https://")
    assert "Traceback" not in told.stderr
    assert list((tmp_path / "data").iterdir()) == []


def write_original_zips(directory):
    """Rebuilds the two zips, in their original layout, from the PNGs inside the prepared data."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(omniglot.prepared_dir(DATA_DIR))
    alphabets = builder.info.features["alphabet"].names
    for split, (file, _) in omniglot_builder.ARCHIVES.items():
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        drawers = {}
        with zipfile.ZipFile(directory / file, "w") as archive:
            for example in source.__getitems__(range(len(source))):
                label = example["label"] + 1
                drawers[label] = drawers.get(label, 0) + 1
                folder = (
                    f"{Path(file).stem}/{alphabets[example['alphabet']]}/character{example['alphabet_char_id'] + 1:02d}"
                )
                archive.writestr(f"{folder}/{label:04d}_{drawers[label]:02d}.png", example["image"])


@needs_data
def test_all_of_omniglot_is_prepared_from_the_zips(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_original_zips(tmp_path)
    data_dir, npz = tmp_path / "data", tmp_path / "omniglot.npz"
    prepare_omniglot.run(prepare_omniglot.Config(data_dir=data_dir, zips=tmp_path, npz=npz))
    # load verifies the checksum, which is that of the data in TFDS_DATA_DIR.
    images = omniglot.load("test", npz)
    assert images.shape == (423, 20, 28, 28, 1)
    assert f"--data-dir {npz}" in capsys.readouterr().out
    prepared, public = omniglot.prepared_dir(data_dir), omniglot.prepared_dir(DATA_DIR)
    for file in ("label.labels.txt", "alphabet.labels.txt", "features.json"):
        assert (prepared / file).read_bytes() == (public / file).read_bytes()


def test_with_prepared_data_only_the_npz_is_written(tmp_path, monkeypatch, capsys):
    prepared = omniglot.prepared_dir(tmp_path)
    prepared.mkdir(parents=True)
    images, npz = np.zeros((3, 20), np.uint8), tmp_path / "omniglot.npz"
    monkeypatch.setattr(omniglot, "read_tfds", lambda data_dir: images if data_dir == tmp_path else None)
    prepare_omniglot.run(prepare_omniglot.Config(data_dir=tmp_path, npz=npz))
    np.testing.assert_array_equal(np.load(npz)["images"], images)
    assert f"{prepared} was there, and is verified" in capsys.readouterr().out
    # With zips to prepare from, or no .npz to write, it is a mistake.
    for config in ({"zips": tmp_path, "npz": npz}, {"zips": None, "npz": None}):
        with pytest.raises(FileExistsError, match="is not overwritten"):
            prepare_omniglot.run(prepare_omniglot.Config(data_dir=tmp_path, **config))
