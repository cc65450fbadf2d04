"""The builder and its command, on two small zips; with all of Omniglot where the drawings are prepared."""

import functools
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from maml_jax.tasks import omniglot, omniglot_builder

DATA_DIR = os.environ.get("TFDS_DATA_DIR")
needs_data = pytest.mark.skipif(
    not DATA_DIR or not omniglot.prepared_dir(DATA_DIR).is_dir(),
    reason="needs Omniglot: run `python -m maml_jax.tasks.omniglot_builder --data-dir D` and set TFDS_DATA_DIR=D",
)
COMMAND = [sys.executable, "-W", "error", "-m", "maml_jax.tasks.omniglot_builder"]

# Numbers as in the original: the order of the labels is not that of the names.
CHARACTERS = {
    "images_background": [("Latin", 2, 684), ("Latin", 1, 683), ("Alphabet_of_the_Magi", 3, 711)],
    "images_evaluation": [("Angelic", 10, 974)],
}
NO_DRAWINGS = [
    "{}/.DS_Store",
    "__MACOSX/{}/Latin/character01/0683_07.png",
    "{}/Latin/character01/0683_07.png.txt",
]
NAMES = ["Latin_0", "Latin_1", "Alphabet_of_the_Magi_2", "Angelic_9"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A directory with two zips of 1-bit PNGs, two of each character, and the pixels by character and drawing."""
    directory, pixels = tmp_path_factory.mktemp("zips"), {}
    rng = np.random.default_rng(0)
    for folder, characters in CHARACTERS.items():
        with zipfile.ZipFile(directory / f"{folder}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in NO_DRAWINGS:
                archive.writestr(path.format(folder), b"no drawing")
            for alphabet, character, label in characters:
                for drawer in (1, 2):
                    paper = rng.random((105, 105)) > 0.2
                    png = io.BytesIO()
                    PIL.Image.fromarray(paper).save(png, "png")
                    path = f"{folder}/{alphabet}/character{character:02d}/{label:04d}_{drawer:02d}.png"
                    archive.writestr(path, png.getvalue())
                    pixels.setdefault(f"{alphabet}_{character - 1}", []).append(paper)
    return directory, pixels


@pytest.fixture(scope="module")
def built(originals, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    omniglot_builder.build(originals[0], data_dir)
    return data_dir


def pass_for_original(directory, monkeypatch):
    """Replaces the published checksums by those of the zips in a directory."""
    archives = {
        split: archive._replace(sha256=hashlib.sha256((directory / archive.file).read_bytes()).hexdigest())
        for split, archive in omniglot_builder.ARCHIVES.items()
    }
    monkeypatch.setattr(omniglot_builder, "ARCHIVES", archives)


@pytest.fixture
def checksums(originals, monkeypatch):
    """The small zips pass for the original ones."""
    pass_for_original(originals[0], monkeypatch)


@pytest.fixture
def server(originals, tmp_path):
    """A web server on this machine: /whole has the zips, /other has other files, /short breaks off."""
    (tmp_path / "www" / "other").mkdir(parents=True)
    (tmp_path / "www" / "whole").symlink_to(originals[0])
    for file in omniglot_builder.FILES:
        (tmp_path / "www" / "other" / file).write_bytes(b"a page that says sorry")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if not self.path.startswith("/short"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "www")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


# The builder


def test_the_drawings_come_back_under_the_names_of_the_splits(originals, built):
    found = {}
    for name, pixels in omniglot.read_drawings(built):
        found.setdefault(name, []).append(pixels != 0)
    assert found.keys() == originals[1].keys() == set(NAMES)
    assert found.keys() <= {name for names in omniglot.splits().values() for name in names}
    for name, drawings in found.items():
        expected = originals[1][name]
        assert sorted(d.tobytes() for d in drawings) == sorted(d.tobytes() for d in expected)


def test_tensorflow_datasets_reads_it_by_its_public_name(built):
    import tensorflow_datasets as tfds

    features = tfds.builder("omniglot", data_dir=built).info.features
    assert features["label"].names == NAMES  # by their numbers in the original
    assert features["alphabet"].names == ["Alphabet_of_the_Magi", "Angelic", "Latin"]
    sources = tfds.data_source("omniglot", data_dir=built)
    assert {split: len(source) for split, source in sources.items()} == {"train": 6, "test": 2}
    example = sources["test"][0]
    assert (example["label"], example["alphabet"], example["alphabet_char_id"]) == (3, 1, 9)
    assert example["image"].shape == (105, 105, 3)
    assert example["image"].dtype == np.uint8


def test_its_features_are_those_of_the_public_version(built):
    directory = omniglot.prepared_dir(built)
    features = json.loads((directory / "features.json").read_text())["featuresDict"]["features"]
    assert features["image"]["image"] == {
        "shape": {"dimensions": ["105", "105", "3"]},
        "dtype": "uint8",
        "encodingFormat": "png",
    }
    assert features["alphabet"]["classLabel"] == {"numClasses": "3"}
    assert features["label"]["classLabel"] == {"numClasses": "4"}
    assert features["alphabet_char_id"]["tensor"] == {"shape": {}, "dtype": "int64", "encoding": "none"}
    info = json.loads((directory / "dataset_info.json").read_text())
    assert (info["name"], info["version"], info["fileFormat"]) == ("omniglot", "3.0.0", "array_record")


# prepare


def test_zips_without_all_the_drawings_leave_nothing(originals, checksums, tmp_path):
    with pytest.raises(
        ValueError, match=r"are not the original Omniglot \(.*1623 of the 1623 characters .*download them again"
    ):
        omniglot_builder.prepare(tmp_path / "data", originals[0])
    assert list((tmp_path / "data").iterdir()) == []


@pytest.fixture
def zips(originals, tmp_path):
    """A copy of the small zips."""
    (tmp_path / "zips").mkdir()
    for file in omniglot_builder.FILES:
        (tmp_path / "zips" / file).write_bytes((originals[0] / file).read_bytes())
    return tmp_path / "zips"


def test_zips_are_compared_with_their_checksums_before_they_are_opened(zips, checksums, tmp_path, monkeypatch):
    def opened(path):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    bad = zips / "images_evaluation.zip"
    content = bytearray(bad.read_bytes())
    content[1000] ^= 1
    bad.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{bad} has checksum .*, not .*: it is damaged .*download it again from https:"
    ):
        omniglot_builder.prepare(tmp_path / "data", zips)
    bad.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no images_evaluation\.zip in {zips}; download it from https://"):
        omniglot_builder.prepare(tmp_path / "data", zips)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["no zip", "no png", "half a png", "flipped", "no drawings"])
def test_zips_that_cannot_be_read_are_named_and_leave_nothing(zips, tmp_path, monkeypatch, damage):
    bad = zips / "images_evaluation.zip"
    content = bad.read_bytes()
    if damage == "no zip":
        bad.write_bytes(content[:-50])
    elif damage == "flipped":
        bad.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])  # within a drawing
    else:
        with zipfile.ZipFile(zips / "images_background.zip") as archive:
            png = archive.read("images_background/Latin/character01/0683_01.png")
        with zipfile.ZipFile(bad, "w") as archive:
            file = "images_evaluation/Angelic/character10/0974_01.png" if damage != "no drawings" else "readme.txt"
            archive.writestr(file, png[: len(png) // 2] if damage == "half a png" else b"this is no picture")
    pass_for_original(zips, monkeypatch)
    with pytest.raises(
        ValueError, match=rf"images_evaluation\.zip in {zips} are not the original Omniglot \(.*\); download them again"
    ):
        omniglot_builder.prepare(tmp_path / "data", zips)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_full_disk_is_not_blamed_on_the_zips(originals, checksums, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(omniglot_builder, "build", full)
    with pytest.raises(OSError, match="No space left"):
        omniglot_builder.prepare(tmp_path / "data", originals[0])


def test_a_prepared_directory_is_never_overwritten(originals, tmp_path):
    prepared = omniglot.prepared_dir(tmp_path)
    prepared.mkdir(parents=True)
    (prepared / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match=f"{prepared} exists and is not overwritten; delete it"):
        omniglot_builder.prepare(tmp_path, originals[0])
    assert [file.read_text() for file in prepared.iterdir()] == ["precious"]
    assert list(tmp_path.iterdir()) == [prepared.parent]


def test_verified_data_are_put_in_place(originals, tmp_path, monkeypatch, checksums, server):
    # The verdict is a stand-in, the rest is not: downloaded, built, read back, put in place, cleaned up.
    verdict = np.zeros((4, 2), np.uint8)
    seen = []
    monkeypatch.setattr(
        omniglot, "canonical_array", lambda drawings: seen.extend(name for name, _ in drawings) or verdict
    )
    assert omniglot_builder.prepare(tmp_path / "data", url=f"{server}/whole") is verdict
    assert sorted(seen) == sorted(2 * NAMES)
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == ["omniglot"]
    assert sorted(name for name, _ in omniglot.read_drawings(tmp_path / "data")) == sorted(seen)


def test_of_two_processes_that_prepare_at_once_the_second_finds_the_directory(
    originals, checksums, tmp_path, monkeypatch
):
    prepared = omniglot.prepared_dir(tmp_path / "data")

    def first_one_finishes(drawings):
        prepared.mkdir(parents=True)
        (prepared / "records").write_text("of the first one")

    monkeypatch.setattr(
        omniglot_builder, "build", lambda zips, data_dir: omniglot.prepared_dir(data_dir).mkdir(parents=True)
    )
    monkeypatch.setattr(omniglot, "canonical_array", first_one_finishes)
    with pytest.raises(FileExistsError, match=f"{prepared} exists and is not overwritten"):
        omniglot_builder.prepare(tmp_path / "data", originals[0])
    assert [file.read_text() for file in prepared.iterdir()] == ["of the first one"]
    assert list((tmp_path / "data").iterdir()) == [prepared.parent]


# download


def test_download_fetches_both_zips(originals, server, tmp_path, checksums):
    omniglot_builder.download(tmp_path / "www", f"{server}/whole")
    for file in omniglot_builder.FILES:
        assert (tmp_path / "www" / file).read_bytes() == (originals[0] / file).read_bytes()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("other", ValueError, r"images_background\.zip has checksum .*, not ad41ab679c8b\.\.\."),
        ("nowhere", OSError, "cannot be downloaded .*404.*as --zips"),
        ("short", OSError, "cannot be downloaded .*IncompleteRead.*as --zips"),
    ],
)
def test_a_failed_download_is_told_and_writes_nothing(server, tmp_path, path, error, message):
    with pytest.raises(error, match=message) as told:
        omniglot_builder.prepare(tmp_path / "data", url=f"{server}/{path}")
    assert f"{server}/{path}/images_background.zip" in str(told.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_the_checksums_are_those_that_tensorflow_datasets_publishes():
    import tensorflow_datasets as tfds

    published = tfds.builder_cls("omniglot").url_infos
    for file, sha256 in omniglot_builder.ARCHIVES.values():
        assert published[f"{omniglot_builder.URL}/{file}"].checksum == sha256


# The command


def test_help_names_every_flag_and_where_the_drawings_come_from():
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
    for word in ("--data-dir", "--zips", "--npz", "https://github.com/brendenlake/omniglot", "images_evaluation.zip"):
        assert word in shown
    assert "python -m maml_jax.tasks.omniglot_builder --zips Z" in shown


def fail(capsys, *arguments):
    """The message of a command that fails."""
    with pytest.raises(SystemExit) as ended:
        omniglot_builder.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_mistake_is_one_paragraph_and_exit_code_2(tmp_path, capsys):
    told = fail(capsys, "--data-dir", tmp_path / "data", "--zips", tmp_path)
    assert told.startswith(f"error: no images_background.zip in {tmp_path}; download it from https://")
    assert told.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_wrong_name_of_an_npz_is_refused_before_anything_is_prepared(originals, checksums, tmp_path, capsys):
    told = fail(capsys, "--data-dir", tmp_path / "data", "--zips", originals[0], "--npz", tmp_path / "foo.zip")
    assert told.startswith(f"error: {tmp_path}/foo.zip must end in .npz")
    assert not (tmp_path / "data").exists()


def test_without_tensorflow_datasets_the_command_names_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    told = fail(capsys, "--data-dir", tmp_path / "data")
    assert "tensorflow_datasets" in told
    assert "pip install 'maml_jax[experiments]'" in told


def test_the_home_directory_is_expanded_in_every_flag(originals, checksums, tmp_path, monkeypatch):
    images = np.zeros((3, 20), np.uint8)
    monkeypatch.setattr(omniglot, "canonical_array", lambda drawings: images)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zips").symlink_to(originals[0])
    omniglot_builder.main(["--data-dir=~/data", "--zips=~/zips", "--npz=~/made/omniglot.npz"])
    assert omniglot.prepared_dir(tmp_path / "data").is_dir()
    np.testing.assert_array_equal(np.load(tmp_path / "made" / "omniglot.npz")["images"], images)
    omniglot_builder.main(["--data-dir=~/data", "--npz=~/made/again.npz"])  # reads what is prepared
    assert (tmp_path / "made" / "again.npz").is_file()
    assert {entry.name for entry in tmp_path.iterdir()} == {"data", "zips", "made"}


def test_with_prepared_data_only_the_npz_is_written(originals, checksums, tmp_path, monkeypatch, capsys):
    prepared = omniglot.prepared_dir(tmp_path)
    prepared.mkdir(parents=True)
    images, npz = np.zeros((3, 20), np.uint8), tmp_path / "omniglot.npz"
    monkeypatch.setattr(omniglot, "read_tfds", lambda data_dir: images if data_dir == tmp_path else None)
    omniglot_builder.main(["--data-dir", str(tmp_path), "--npz", str(npz)])
    np.testing.assert_array_equal(np.load(npz)["images"], images)
    shown = capsys.readouterr().out
    assert f"{prepared} exists and is verified" in shown
    assert f"--data-dir {npz}" in shown
    # With zips to prepare from, or no .npz to write, it is a mistake.
    for flags in (["--zips", originals[0], "--npz", npz], []):
        assert "is not overwritten" in fail(capsys, "--data-dir", tmp_path, *flags)


# All of Omniglot


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


@pytest.mark.slow
@needs_data
def test_all_of_omniglot_is_prepared_from_the_zips(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_original_zips(tmp_path)
    pass_for_original(tmp_path, monkeypatch)
    data_dir, npz = tmp_path / "data", tmp_path / "omniglot.npz"
    omniglot_builder.main([f"--data-dir={data_dir}", f"--zips={tmp_path}", f"--npz={npz}"])
    # load verifies the checksum, which is that of the data in TFDS_DATA_DIR.
    assert omniglot.load("test", npz).shape == (423, 20, 28, 28, 1)
    prepared, public = omniglot.prepared_dir(data_dir), omniglot.prepared_dir(DATA_DIR)
    for file in ("label.labels.txt", "alphabet.labels.txt", "features.json"):
        assert (prepared / file).read_bytes() == (public / file).read_bytes()
