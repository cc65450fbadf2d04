"""Malformed data of every kind end in a ValueError or an OSError that names the file, or in the right images."""

import json
import struct
import zipfile

import numpy as np
import pytest
from damage import mutations, outcome
from photographs import SPLIT, encoded, files, pixels, write_folder, write_json, write_zip

from maml_jax.tasks.class_splits import read_split
from maml_jax.tasks.image_folder import load

pytest.importorskip("PIL.Image", reason="install Pillow with `pip install pillow`")
EVERYTHING = {"train": ["a"], "val": [], "test": []}


def reader(source, split_file, size=8):
    """Reads the training classes of a source, with a cache beside it."""
    return lambda: load(source, "train", size=size, split_file=split_file, cache_dir=split_file.parent / "cache")


def test_400_damaged_zips(tmp_path):
    rng = np.random.default_rng(0)
    split_file = write_json(tmp_path / "split.json", EVERYTHING)
    pool = tmp_path / "pool.zip"
    intact = write_zip(pool, {"a/0.png": encoded(pixels(0, 0)), "b/0.png": encoded(pixels(1, 0))}).read_bytes()
    refused = 0
    for content in mutations(intact, rng, 400):
        pool.write_bytes(content)
        found = outcome(reader(pool, split_file), "pool.zip")
        if found is None:
            refused += 1
        elif content != intact:  # what was damaged is not a part of the image
            np.testing.assert_array_equal(found.images[0], [pixels(0, 0)])
    assert refused > 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_40_damaged_images_of_each_format(tmp_path, kind):
    rng = np.random.default_rng(1)
    split_file = write_json(tmp_path / "split.json", EVERYTHING)
    file = write_folder(tmp_path / "pool", {f"a/0.{kind.lower()}": encoded(pixels(0, 0), kind)}) / f"a/0.{kind.lower()}"
    refused = 0
    for content in mutations(file.read_bytes(), rng, 40):
        file.write_bytes(content)
        load_it = reader(tmp_path / "pool", split_file, size=4)
        found = outcome(load_it, file.name)
        refused += found is None
        assert found is None or found.images[0].shape == (1, 4, 4, 3)  # changed pixels cannot be told
    assert refused > 10


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../x.png", "a/../../x.png", "a/..", "/", "/a/x.png", "//a/x.png", "\\a\\x.png", "a\\x.png", "C:x.png"),
        *("a/b/c/d/x.png", "a/x.exe", "a/x", "a/x.png/y.png", "a/x.eps", "a/x.png ", "x.png", "é.png"),
        *(
            "a/\n.txt",
            "a/x.png\n",
            "a/\x7f",
            "b" * 300 + "/x.txt",
            "a/" + "b" * 300,
            "a/x.svg",
            "~/x.gif.txt",
            "a/%2e%2e",
        ),
    ],
)
def test_hostile_names_in_a_zip(tmp_path, name):
    split_file = write_json(tmp_path / "split.json", EVERYTHING)
    pool = write_zip(tmp_path / "pool.zip", {"a/0.png": encoded(pixels(0, 0)), name: b"no image"})
    assert outcome(reader(pool, split_file), "pool.zip") is None


def test_names_with_odd_characters_are_names(tmp_path):
    names = ["a b", "ä", "日本", "a\nb", "%s", "{x}", "'", '"', "a.zip", "train", "-x", "😀", "null", "a\tb", "x" * 200]
    members = {f"{name}/{name[:50]}.png": encoded(pixels(c % 9, 0)) for c, name in enumerate(names)}
    split_file = write_json(tmp_path / "split.json", {"train": names, "val": [], "test": []})
    for pool in (write_zip(tmp_path / "pool.zip", members), write_folder(tmp_path / "pool", members)):
        found = load(pool, "train", size=8, split_file=split_file, cache_dir=tmp_path / "cache")
        assert found.names == tuple(sorted(names))
        for name, images in zip(*found, strict=True):
            np.testing.assert_array_equal(images, [pixels(names.index(name) % 9, 0)])


def test_names_that_are_no_unicode_are_read(tmp_path):
    (tmp_path / "pool").mkdir()
    try:
        write_folder(tmp_path / "pool", {"\udcff/\udcfe.png": encoded(pixels(0, 0))})
    except OSError:
        pytest.skip("this file system takes no such names")
    split_file = write_json(tmp_path / "split.json", {"train": ["\udcff"], "val": [], "test": []})
    assert load(tmp_path / "pool", "train", size=8, split_file=split_file, cache_dir=tmp_path / "c").names == (
        "\udcff",
    )


NO_SPLITS = [
    *(b"", b"{", b"[]", b"{}", b"null", b"1", b'"train"', b"\xff\xfe", b"[" * 50_000, b"{" * 9, b"NaN", b"\x00" * 99),
    *(
        json.dumps({**SPLIT, **change}).encode()
        for change in (
            *({"more": []}, {"train": None}, {"train": "cat"}, {"train": {}}, {"train": [1]}, {"train": [["cat"]]}),
            *({"train": ["cat", "cat"]}, {"val": ["cat"]}, {"train": [None]}, {"test": 0}, {"train": True}),
            *({"train": ["no such class"]}, {"val": ["Cat"]}, {"train": [""]}, {"train": ["../cat"]}, {"train": []}),
        )
    ),
    *(json.dumps({key: SPLIT[key] for key in SPLIT if key != missing}).encode() for missing in SPLIT),
]


@pytest.mark.parametrize("content", NO_SPLITS)
def test_malformed_split_files(tmp_path, content):
    pool = write_zip(tmp_path / "pool.zip", files())
    (tmp_path / "split.json").write_bytes(content)
    load_it = reader(pool, tmp_path / "split.json")
    assert outcome(load_it, "split.json") is None


def test_60_random_split_files(tmp_path):
    rng = np.random.default_rng(2)
    intact = json.dumps(SPLIT).encode()
    for content in mutations(intact, rng, 60):
        (tmp_path / "split.json").write_bytes(content)
        found = outcome(lambda: read_split(tmp_path / "split.json"), "split.json")
        assert found is None or set(found) == set(SPLIT)


def test_100_damaged_caches_are_made_again(tmp_path):
    rng = np.random.default_rng(3)
    split_file = write_json(tmp_path / "split.json", SPLIT)
    pool = write_zip(tmp_path / "pool.zip", files())
    load_it = reader(pool, split_file)
    expected = load_it()
    for suffix in ("npy", "json"):
        (file,) = (tmp_path / "cache").glob(f"*.{suffix}")
        for content in mutations(file.read_bytes(), rng, 50):
            file.unlink()
            file.write_bytes(content)
            found = load_it()
            assert found.names == expected.names
            for images, right in zip(found.images, expected.images, strict=True):
                np.testing.assert_array_equal(images, right)


WRONG = [
    *({"directory": value} for value in (None, 5, "", b"x", "\0", [], "no such folder")),
    *({"split": value} for value in (None, 0, "", "Train", "validation", ["train"], b"train")),
    *({"size": value} for value in (0, -1, 1.5, "8", None, True, np.float32(8), [8], np.nan)),
    *({"colour": value} for value in (0, 1, None, "grey", np.bool_(True))),
    *({"split_file": value} for value in (5, "", b"x", "\0", "no such file", [])),
    *({"cache_dir": value} for value in (5, "", b"x", "\0", [])),
    *({"min_images": value} for value in (0, -1, 1.5, None, "1", 4, 10**9)),
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_arguments_of_the_wrong_kind(tmp_path, change):
    for split in SPLIT:
        write_zip(tmp_path / f"{split}.zip", {f"{split}/0.png": encoded(pixels(0, 0))})
    arguments = {"directory": tmp_path, "split": "train", "size": 8, "cache_dir": tmp_path / "cache", **change}
    directory, split = arguments.pop("directory"), arguments.pop("split")
    assert (
        outcome(lambda: load(directory, split, **arguments), *change, *map(str, change.values()), "min_images") is None
    )


def test_zips_that_are_no_zips_or_lie_about_themselves(tmp_path):
    split_file = write_json(tmp_path / "split.json", EVERYTHING)
    pool = tmp_path / "pool.zip"
    intact = write_zip(pool, {"a/0.png": encoded(pixels(0, 0))}).read_bytes()
    directory, end = intact.index(b"PK\x01\x02"), intact.index(b"PK\x05\x06")

    def lie(place, form, value):
        content = bytearray(intact)
        struct.pack_into(form, content, place, value)
        return bytes(content)

    lies = [
        *(b"", b"PK", b"PK\x05\x06", b"PK\x03\x04" * 9, b"\x1f\x8b" + bytes(99), intact[:end], intact[end:]),
        *(lie(directory + 10, "<H", method) for method in (1, 9, 12, 14, 93, 99)),  # how it is compressed
        *(lie(directory + 20, "<I", size) for size in (0, 1, 2**31)),  # compressed
        *(lie(directory + 24, "<I", size) for size in (0, 1, 2**28, 2**31, 2**32 - 1)),  # not compressed
        *(lie(directory + 42, "<I", offset) for offset in (1, 2**31, 2**32 - 1)),
        *(lie(end + 16, "<I", offset) for offset in (0, 2**31, 2**32 - 1)),
        *(lie(end + 10, "<H", count) for count in (0, 2, 2**16 - 1)),
    ]
    for content in lies:
        pool.write_bytes(content)
        found = outcome(reader(pool, split_file), "pool.zip")
        assert found is None or (found.images[0] == pixels(0, 0)).all()


def test_a_small_archive_does_not_become_a_large_file(tmp_path):
    split_file = write_json(tmp_path / "split.json", EVERYTHING)
    with zipfile.ZipFile(tmp_path / "pool.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(2**22))
    content = bytearray((tmp_path / "pool.zip").read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 100)  # the member claims 100 bytes
    (tmp_path / "pool.zip").write_bytes(content)
    load_it = reader(tmp_path / "pool.zip", split_file)
    assert outcome(load_it, "a/0.png in ") is None
