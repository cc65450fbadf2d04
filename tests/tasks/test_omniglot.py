"""What can be said without the drawings is tested without them; the rest needs TFDS_DATA_DIR."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys

import numpy as np
import PIL.Image
import pytest

from maml_jax.tasks import omniglot

DATA_DIR = os.environ.get("TFDS_DATA_DIR")
needs_data = pytest.mark.skipif(
    not DATA_DIR or not omniglot.prepared_dir(DATA_DIR).is_dir(),
    reason="needs Omniglot: run `python -m maml_jax.tasks.omniglot_builder --data-dir D` and set TFDS_DATA_DIR=D",
)
REMEDY = re.escape("`python -m maml_jax.tasks.omniglot_builder --")


# Splits


def test_splits_have_the_sizes_of_the_paper_and_share_no_character():
    splits = omniglot.splits()
    assert {split: len(names) for split, names in splits.items()} == {"train": 1100, "val": 100, "test": 423}
    union = {name for names in splits.values() for name in names}
    assert len(union) == omniglot.NUM_CHARACTERS == 1623
    assert len({name.rpartition("_")[0] for name in union}) == 50
    assert all(re.fullmatch(r".+_\d+", name) for name in union)


def test_splits_stay_as_they_are():
    # Published results are about these characters: a change is a new version, not a repair.
    found = hashlib.sha256(json.dumps(omniglot.splits(), sort_keys=True).encode()).hexdigest()
    assert found == "964e580cccaf11056ae4544001298cf357d6f0afbbcd1ac28168f39f8cd27283"


def test_the_alphabet_split_is_that_of_protonets():
    splits = omniglot.splits("alphabet")
    assert {split: len(names) for split, names in splits.items()} == {"train": 1028, "val": 172, "test": 423}
    by_character = omniglot.splits()
    every, same = (sorted(name for names in found.values() for name in names) for found in (splits, by_character))
    assert every == same
    alphabets = {split: {name.rpartition("_")[0] for name in names} for split, names in splits.items()}
    assert alphabets["val"] == {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
    assert not alphabets["val"] & (alphabets["train"] | alphabets["test"])
    assert alphabets["train"] & alphabets["test"] == {"Gurmukhi"}
    assert len(alphabets["test"]) == 13
    assert sum(name.startswith("Gurmukhi") for name in splits["test"]) == 4
    found = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    assert found == "6c88ed60aafee14674a49284def1c8f13e19d6bc4943ee4abd5f5baa77892201"


def test_an_unknown_division_is_refused():
    with pytest.raises(ValueError, match=r"split_by='drawer' is unknown; choose one of \['alphabet', 'character'\]"):
        omniglot.load("train", split_by="drawer")


# One drawing


@pytest.mark.parametrize("paper", [1, 255])
def test_downscaling_is_what_pillow_makes_of_a_one_bit_image(paper):
    ink = np.random.default_rng(0).random((105, 105)) < 0.3
    image = PIL.Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1")
    expected = 255 - np.asarray(image.resize((28, 28)).convert("L"))
    shrunk = omniglot.downscale_to_28(np.where(ink, 0, paper).astype(np.uint8))
    np.testing.assert_array_equal(shrunk, expected)
    assert shrunk.dtype == np.uint8


# A small Omniglot of three characters


@pytest.fixture
def drawings(monkeypatch):
    """All drawings of three made-up characters, which pass for the whole of Omniglot."""
    names = {"train": ["Greek_1"], "val": ["Latin_0"], "test": ["Greek_0"]}
    monkeypatch.setattr(omniglot, "splits", lambda split_by="character": names)
    monkeypatch.setattr(omniglot, "NUM_CHARACTERS", 3)
    rng = np.random.default_rng(1)
    made = [(name, (rng.random((105, 105)) > 0.1).astype(np.uint8)) for (name,) in names.values() for _ in range(20)]
    by_name = {
        name: sorted(omniglot.downscale_to_28(pixels).tobytes() for n, pixels in made if n == name) for name, _ in made
    }
    content = b"".join(drawing for name in ("Greek_0", "Greek_1", "Latin_0") for drawing in by_name[name])
    monkeypatch.setattr(omniglot, "SHA256", hashlib.sha256(content).hexdigest())
    return made


def test_the_canonical_array_does_not_depend_on_the_order_of_the_drawings(drawings):
    images = omniglot.canonical_array(drawings)
    assert images.shape == (3, 20, 28, 28, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(omniglot.canonical_array(reversed(drawings)), images)


def test_the_canonical_array_refuses_anything_else(drawings):
    with pytest.raises(ValueError, match="1 of the 3 characters do not have 20 drawings, Greek_1 has 19"):
        omniglot.canonical_array(drawings[1:])
    with pytest.raises(ValueError, match="'Greek_9' is no character"):
        omniglot.canonical_array([*drawings[1:], ("Greek_9", drawings[0][1])])
    other = drawings[0][1].copy()
    other[50, 50] ^= 1  # nearest neighbour reads pixel 13.5 * 3.75
    with pytest.raises(ValueError, match="the images have checksum"):
        omniglot.canonical_array([("Greek_1", other), *drawings[1:]])


def test_load_picks_the_characters_of_the_split(drawings, tmp_path):
    images = omniglot.canonical_array(drawings)
    omniglot.save_npz(images, tmp_path / "omniglot.npz")
    for split, row in (("train", 1), ("val", 2), ("test", 0)):
        np.testing.assert_array_equal(omniglot.load(split, tmp_path / "omniglot.npz"), images[row : row + 1])
    with pytest.raises(ValueError, match=r"unknown split 'eval'; choose one of \['test', 'train', 'val'\]"):
        omniglot.load("eval", tmp_path / "omniglot.npz")


# Files


def test_missing_data_are_told_with_the_directory_and_the_command(tmp_path, monkeypatch):
    for data_dir in (str(tmp_path), None):  # given, or from the environment
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        with pytest.raises(FileNotFoundError, match=f"no Omniglot at {tmp_path}.*{REMEDY}data-dir {tmp_path}`"):
            omniglot.load("train", data_dir)
    with pytest.raises(FileNotFoundError, match=f"no file {tmp_path}/a.npz.*{REMEDY}npz {tmp_path}/a.npz`"):
        omniglot.load("train", tmp_path / "a.npz")
    assert importlib.util.find_spec("maml_jax.tasks.omniglot_builder"), "the command does not exist"


def test_the_default_directory_is_that_of_tensorflow_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    assert omniglot.default_data_dir() == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/here")
    assert omniglot.default_data_dir() == tmp_path / "here"


def test_a_home_directory_is_expanded_in_the_name_of_an_npz(drawings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    omniglot.save_npz(omniglot.canonical_array(drawings), "~/made/omniglot.npz")
    assert (tmp_path / "made" / "omniglot.npz").is_file()
    assert omniglot.load_npz("~/made/omniglot.npz").shape == (3, 20, 28, 28, 1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda images: images.reshape(60, 28, 28), r"uint8\[60, 28, 28\]"),
        (lambda images: images.reshape(3, 20, 784), r"uint8\[3, 20, 784\]"),
        (lambda images: images.view(np.int8), r"int8\[3, 20, 28, 28, 1\]"),
        (lambda images: images.view(np.bool_), r"bool\[3, 20, 28, 28, 1\]"),
    ],
)
def test_the_right_bytes_in_another_shape_or_dtype_are_refused(drawings, tmp_path, change, found):
    file = tmp_path / "omniglot.npz"
    omniglot.save_npz(change(omniglot.canonical_array(drawings)), file)
    with pytest.raises(
        ValueError, match=rf"{file} .*the images are {found}, and must be uint8\[3, 20, 28, 28, 1\].*{REMEDY}npz"
    ):
        omniglot.load_npz(file)


@pytest.mark.parametrize("damage", ["cut short", "other images", "other content", "empty"])
def test_a_damaged_npz_is_told_with_its_name_and_the_remedy(drawings, tmp_path, damage):
    file = tmp_path / "omniglot.npz"
    images = omniglot.canonical_array(drawings)
    omniglot.save_npz(255 - images if damage == "other images" else images, file)
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "other content":
        np.savez(file, pictures=images)
    elif damage == "empty":
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{file} is damaged or holds no Omniglot .*delete it.*{REMEDY}npz {file}`"):
        omniglot.load("train", file)


def test_save_npz_replaces_whole_or_not_at_all(drawings, tmp_path, monkeypatch):
    file = tmp_path / "new" / "omniglot.npz"
    images = omniglot.canonical_array(drawings)
    omniglot.save_npz(images, file)

    def full_disk(name, **arrays):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="no space left"):
        omniglot.save_npz(images, file)
    assert list(file.parent.iterdir()) == [file]
    np.testing.assert_array_equal(omniglot.load_npz(file), images)
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        omniglot.save_npz(images, tmp_path / "omniglot.zip")


@pytest.fixture
def prepared(drawings, tmp_path, monkeypatch):
    """A directory that passes for a prepared one, and the list of its readings."""
    directory = omniglot.prepared_dir(tmp_path / "data")
    directory.mkdir(parents=True)
    (directory / "records").write_text("drawings")
    readings = []

    def read_tfds(data_dir):
        readings.append(data_dir)
        return omniglot.canonical_array(drawings)

    monkeypatch.setattr(omniglot, "read_tfds", read_tfds)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return directory, readings


def test_a_directory_is_read_once_for_as_long_as_it_stays_the_same(prepared, tmp_path):
    directory, readings = prepared
    first = omniglot.load_all(tmp_path / "data")
    np.testing.assert_array_equal(omniglot.load_all(tmp_path / "data"), first)
    assert len(readings) == 1
    stat = (directory / "records").stat()
    os.utime(directory / "records", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    omniglot.load_all(tmp_path / "data")
    assert len(readings) == 2
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    omniglot.load_all(tmp_path / "copy")
    assert len(readings) == 3


def test_a_cache_that_was_tampered_with_is_not_used(prepared, tmp_path):
    images = omniglot.load_all(tmp_path / "data").copy()
    (cache,) = (tmp_path / "cache" / "maml_jax").iterdir()
    images[0, 0, 0, 0, 0] ^= 255
    np.savez_compressed(cache, images=images)
    with pytest.raises(ValueError, match=f"^{cache} is damaged .*A file in the cache is written again by the next run"):
        omniglot.load_all(tmp_path / "data")
    cache.unlink()
    omniglot.load_all(tmp_path / "data")


def test_a_cache_that_cannot_be_written_does_not_lose_the_run(prepared, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    for count in (1, 2):
        assert omniglot.load_all(tmp_path / "data").shape == (3, 20, 28, 28, 1)
        assert len(prepared[1]) == count


# The drawings themselves


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    """A cache directory that has been filled from the prepared data, without tensorflow."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        omniglot.load_all(DATA_DIR)
    assert "tensorflow" not in sys.modules
    return cache


@needs_data
def test_the_second_load_needs_no_tensorflow_datasets(real_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(real_cache))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    loaded = {split: omniglot.load(split, DATA_DIR) for split in omniglot.splits()}
    assert {split: images.shape for split, images in loaded.items()} == {
        "train": (1100, 20, 28, 28, 1),
        "val": (100, 20, 28, 28, 1),
        "test": (423, 20, 28, 28, 1),
    }
    for images in loaded.values():
        assert np.unique(images).tolist() == [0, 255]
        assert 0.03 < (images == 255).mean() < 0.15  # thin strokes of ink on paper
    (cache,) = (real_cache / "maml_jax").iterdir()
    np.testing.assert_array_equal(omniglot.load("val", cache), loaded["val"])


@needs_data
@pytest.mark.parametrize(
    ("damage", "reason"), [("cut short", "Corrupted"), ("missing", "No such file"), ("info", "JSON")]
)
def test_damaged_prepared_data_are_told_with_the_directory_and_the_remedy(
    damage, reason, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = omniglot.prepared_dir(tmp_path)
    shutil.copytree(omniglot.prepared_dir(DATA_DIR), directory, copy_function=shutil.copyfile)
    os.chmod(directory, 0o755)
    (records,) = directory.glob("omniglot-train*")
    if damage == "cut short":
        records.write_bytes(records.read_bytes()[:4_000_000])
    elif damage == "missing":
        records.unlink()
    else:
        (directory / "dataset_info.json").write_text("{")
    with pytest.raises(
        ValueError, match=f"the prepared Omniglot at {directory} .*{reason}.*{REMEDY}data-dir {tmp_path}`"
    ) as told:
        omniglot.load("train", tmp_path)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "cache").exists()
    assert "OpenCV" not in caplog.text
