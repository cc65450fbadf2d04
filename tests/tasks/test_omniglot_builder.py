"""The builder runs on two small zips here; tests/experiments/test_prepare_omniglot.py gives it all of Omniglot."""

import functools
import hashlib
import http.server
import io
import json
import threading
import zipfile

import numpy as np
import PIL.Image
import pytest

from maml_jax.tasks import omniglot, omniglot_builder

# Numbers as in the original: the order of the labels is not that of the names.
CHARACTERS = {
    "images_background": [("Latin", 2, 684), ("Latin", 1, 683), ("Alphabet_of_the_Magi", 3, 711)],
    "images_evaluation": [("Angelic", 10, 974)],
}
NAMES = ["Latin_0", "Latin_1", "Alphabet_of_the_Magi_2", "Angelic_9"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A directory with two zips of 1-bit PNGs, two of each character, and the pixels by character and drawing."""
    directory, pixels = tmp_path_factory.mktemp("zips"), {}
    rng = np.random.default_rng(0)
    for folder, characters in CHARACTERS.items():
        with zipfile.ZipFile(directory / f"{folder}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{folder}/.DS_Store", b"no drawing")
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


@pytest.fixture
def checksums(originals, monkeypatch):
    """The small zips pass for the original ones."""
    archives = {
        split: archive._replace(sha256=hashlib.sha256((originals[0] / archive.file).read_bytes()).hexdigest())
        for split, archive in omniglot_builder.ARCHIVES.items()
    }
    monkeypatch.setattr(omniglot_builder, "ARCHIVES", archives)


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


def test_zips_without_all_the_drawings_leave_nothing(originals, tmp_path):
    with pytest.raises(
        ValueError, match=r"are not the original Omniglot \(1623 of the 1623 characters .*fetch them again"
    ):
        omniglot_builder.prepare(tmp_path / "data", originals[0])
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("missing", FileNotFoundError, r"no images_evaluation\.zip in .*fetch it from https://"),
        ("cut short", ValueError, r"in {zips} are not the original Omniglot \(File is not a zip file\); fetch"),
        ("flipped", ValueError, r"in {zips} are not the original Omniglot \(.*\); fetch them again"),
        ("empty", ValueError, r"in {zips} are not the original Omniglot \(there are no .*\); fetch them again"),
    ],
)
def test_bad_zips_are_told_and_leave_nothing(originals, tmp_path, damage, error, message):
    zips = tmp_path / "zips"
    zips.mkdir()
    for file in omniglot_builder.FILES:
        (zips / file).write_bytes((originals[0] / file).read_bytes())
    bad = zips / "images_evaluation.zip"
    if damage == "missing":
        bad.unlink()
    elif damage == "cut short":
        bad.write_bytes(bad.read_bytes()[:-50])
    elif damage == "flipped":
        content = bytearray(bad.read_bytes())
        content[1000] ^= 1  # within a drawing
        bad.write_bytes(content)
    else:
        with zipfile.ZipFile(bad, "w") as archive:
            archive.writestr("images_evaluation/readme.txt", b"nothing here")
    with pytest.raises(error, match=message.format(zips=zips)):
        omniglot_builder.prepare(tmp_path / "data", zips)
    assert list((tmp_path / "data").iterdir()) == []


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
    monkeypatch.setattr(omniglot, "canonical", lambda drawings: seen.extend(name for name, _ in drawings) or verdict)
    assert omniglot_builder.prepare(tmp_path / "data", url=f"{server}/whole") is verdict
    assert sorted(seen) == sorted(2 * NAMES)
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == ["omniglot"]
    assert sorted(name for name, _ in omniglot.read_drawings(tmp_path / "data")) == sorted(seen)


# download


def test_download_fetches_both_zips(originals, server, tmp_path, checksums):
    omniglot_builder.download(tmp_path / "www", f"{server}/whole")
    for file in omniglot_builder.FILES:
        assert (tmp_path / "www" / file).read_bytes() == (originals[0] / file).read_bytes()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("other", ValueError, r"images_background\.zip has checksum .*, not ad41ab679c8b\.\.\."),
        ("nowhere", OSError, "cannot be fetched .*404.*as --zips"),
        ("short", OSError, "cannot be fetched .*IncompleteRead.*as --zips"),
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
