"""Photographs that tell their class and number come back sorted, whatever holds them, and what is wrong is named."""

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from photographs import COUNTS, SPLIT, encoded, files, pixels, write_folder, write_json, write_zip

from maml_jax.tasks import image_folder
from maml_jax.tasks.image_folder import load

Image = pytest.importorskip("PIL.Image", reason="install Pillow with `pip install pillow`")
IMAGES = os.environ.get("MAML_JAX_IMAGES")


def members_of(split):
    return {name: content for name, content in files().items() if name.split("/")[0] in SPLIT[split]}


@pytest.fixture
def split_file(tmp_path):
    return write_json(tmp_path / "split.json", SPLIT)


def source(tmp_path, layout):
    """A directory, or a zip, in one of the layouts."""
    directory = tmp_path / "data"
    directory.mkdir()
    if layout == "folders":
        for split in SPLIT:
            write_folder(directory / split, members_of(split))
        (directory / "README").write_text("beside the splits")
    elif layout == "zips":
        for split in SPLIT:
            write_zip(directory / f"{split}.zip", members_of(split))
        (directory / "classes.json").write_text("{}")
    elif layout == "pool":
        write_folder(directory, {**files(), "notes.txt": b"beside the classes", ".hidden/a": b"", "ant/.DS_Store": b""})
    elif layout == "zip":
        directory = write_zip(tmp_path / "pool.zip", {"./": b"", "__MACOSX/": b"", **files(), "notes.txt": b""})
    else:
        directory = write_zip(tmp_path / "pool.zip", {"around/": b"", **{f"around/{n}": c for n, c in files().items()}})
    return directory


@pytest.mark.parametrize("layout", ["folders", "zips", "pool", "zip", "around"])
def test_every_layout_gives_the_same_classes(tmp_path, split_file, layout):
    directory = source(tmp_path, layout)
    options = {} if layout in ("folders", "zips") else {"split_file": split_file}
    for split in SPLIT:
        for _ in range(2):  # the second time from the cache
            found = load(directory, split, size=8, cache_dir=tmp_path / "cache", **options)
            assert found.names == tuple(sorted(SPLIT[split]))
            for name, images in zip(*found, strict=True):
                expected = [pixels(sorted(COUNTS).index(name), i) for i in range(COUNTS[name])]
                np.testing.assert_array_equal(images, expected)
                assert isinstance(images, np.memmap)
                assert not images.flags.writeable


def test_images_are_sorted_by_name_and_not_by_their_place_in_the_zip(tmp_path, split_file):
    pool = write_zip(tmp_path / "pool.zip", dict(reversed(files().items())))
    found = load(pool, "test", size=8, split_file=split_file, cache_dir=tmp_path)
    np.testing.assert_array_equal(found.images[1][:, 0, 0, 1], [0, 10, 20, 30])


def one_image(tmp_path, content, name="a.png", **options):
    """How a file is read as the only image of a class."""
    tmp_path.mkdir(exist_ok=True)
    pool = write_zip(tmp_path / "one.zip", {f"a/{name}": content})
    split_file = write_json(tmp_path / "one.json", {"train": ["a"], "val": [], "test": []})
    options = {"size": 8, "cache_dir": tmp_path, **options}
    return load(pool, "train", split_file=split_file, **options).images[0][0]


def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture is shown a quarter clockwise
    content = encoded(pixels(3, 2), exif=exif)
    np.testing.assert_array_equal(one_image(tmp_path, content), np.rot90(pixels(3, 2), -1))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("TIFF", "RGBA"), ("BMP", "RGB"), ("PNG", "P")])
def test_the_mode_and_the_format_do_not_matter(tmp_path, kind, mode):
    image = np.where(pixels(5, 7) > 20, np.uint8(255), np.uint8(0))  # colours that every palette has
    found = one_image(tmp_path, encoded(image, kind, mode), f"a.{kind.lower()}")
    np.testing.assert_array_equal(found, image)


def test_grey_images_and_numbers_of_16_bits(tmp_path):
    image = pixels(5, 7)
    grey = np.asarray(Image.fromarray(image).convert("L"))
    np.testing.assert_array_equal(one_image(tmp_path / "grey", encoded(image), colour=False), grey[..., None])
    np.testing.assert_array_equal(one_image(tmp_path / "l", encoded(grey)), np.repeat(grey[..., None], 3, 2))
    deep = (grey.astype(np.uint16) * 257).astype(np.uint16)  # 65535 = 255 * 257
    np.testing.assert_array_equal(one_image(tmp_path / "16", encoded(deep), colour=False), grey[..., None])
    np.testing.assert_array_equal(
        one_image(tmp_path / "1", encoded(grey > 20), colour=False)[..., 0], 255 * (grey > 20)
    )


def test_what_is_transparent_is_white(tmp_path):
    image = np.dstack([pixels(1, 1), np.full((8, 8), 255, np.uint8)])
    image[:4, :, 3] = 0
    found = one_image(tmp_path, encoded(image))
    np.testing.assert_array_equal(found[4:], pixels(1, 1)[4:])
    assert (found[:4] == 255).all()


def test_an_image_is_resized_as_a_whole_with_a_good_filter(tmp_path):
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, 45:] = 200
    found = one_image(tmp_path, encoded(image), size=10)
    # A step in the middle stays in the middle, whatever the aspect ratio, and every row is the same.
    expected = np.asarray(Image.fromarray(image[:1]).resize((10, 1), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(found, np.repeat(expected, 10, 0))
    # Lanczos overshoots a little beside a step; a nearest neighbour or a mean would not.
    assert np.abs(found.astype(int)[0, :, 0] - np.repeat([0, 200], 5)).max() in range(1, 20)


def test_the_cache_is_used_until_the_source_changes(tmp_path, split_file, monkeypatch):
    directory = source(tmp_path, "pool")
    arguments = {"size": 8, "split_file": split_file, "cache_dir": tmp_path / "cache"}
    before = load(directory, "test", **arguments)
    monkeypatch.setattr(image_folder, "decode_images", lambda *_: pytest.fail("the images were read again"))
    load(directory, "test", **arguments)
    load(directory, "test", **arguments, min_images=2)
    monkeypatch.undo()
    (directory / "dog" / "0.png").write_bytes(encoded(pixels(9, 9)))
    os.utime(directory / "dog" / "0.png", ns=(0, 0))  # as if time had no resolution, the size may be equal too
    after = load(directory, "test", **arguments)
    np.testing.assert_array_equal(after.images[0][0], pixels(9, 9))
    np.testing.assert_array_equal(before.images[0][0], pixels(3, 0))  # an open map keeps its file
    assert load(directory, "test", **{**arguments, "size": 4}).images[0].shape == (2, 4, 4, 3)
    assert load(directory, "test", **{**arguments, "colour": False}).images[0].shape == (2, 8, 8, 1)


def test_another_image_in_a_zip_is_another_source(tmp_path, split_file):
    # Without compression all images of a size have as many bytes: only the checksum of the archive tells.
    content = files() | {"dog/0.png": encoded(pixels(3, 0), compress_level=0)}
    arguments = {"size": 8, "split_file": split_file, "cache_dir": tmp_path / "cache"}
    pool = write_zip(tmp_path / "pool.zip", content)
    np.testing.assert_array_equal(load(pool, "test", **arguments).images[0][0], pixels(3, 0))
    other = encoded(pixels(9, 9), compress_level=0)
    assert len(other) == len(content["dog/0.png"])
    write_zip(pool, content | {"dog/0.png": other})
    np.testing.assert_array_equal(load(pool, "test", **arguments).images[0][0], pixels(9, 9))


@pytest.mark.parametrize("differs", ["time", "place"])
def test_an_image_of_as_many_bytes_in_a_folder_is_another_source(tmp_path, split_file, differs):
    # Without compression all images of a size have as many bytes: the time of the file tells, or the folder.
    for turn, c in enumerate((3, 9)):
        image = {"dog/0.png": encoded(pixels(c, 0), compress_level=0)}
        directory = write_folder(tmp_path / (f"pool {turn}" if differs == "place" else "pool"), files() | image)
        for file in directory.rglob("*.png"):
            os.utime(file, ns=(0, turn if differs == "time" else 0))
        found = load(directory, "test", size=8, split_file=split_file, cache_dir=tmp_path / "cache")
        np.testing.assert_array_equal(found.images[0][0], pixels(c, 0))


def test_the_default_cache_is_that_of_the_user(tmp_path, split_file, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    load(source(tmp_path, "zip"), "val", size=8, split_file=split_file)
    assert {file.suffix for file in (tmp_path / "home" / "maml_jax" / "images").iterdir()} == {".npy", ".json"}


def test_a_copy_of_a_zip_needs_no_second_cache(tmp_path, split_file, monkeypatch):
    pool = write_zip(tmp_path / "pool.zip", files())
    load(pool, "val", size=8, split_file=split_file, cache_dir=tmp_path / "cache")
    (tmp_path / "copy.zip").write_bytes(pool.read_bytes())
    monkeypatch.setattr(image_folder, "decode_images", lambda *_: pytest.fail("the images were read again"))
    load(tmp_path / "copy.zip", "val", size=8, split_file=split_file, cache_dir=tmp_path / "cache")


def refused(directory, split="train", error=ValueError, **options):
    cache = Path(str(directory)).parent / "refused"
    with pytest.raises(error) as raised:
        load(directory, split, **{"size": 8, "cache_dir": cache, **options})
    assert not cache.exists() or not list(cache.iterdir()), "something was written"
    return str(raised.value)


def test_a_class_in_two_splits_is_refused(tmp_path):
    # The usual division of a classification set, by examples.
    for split in ("train", "test"):
        write_folder(tmp_path / "data" / split, files())
    message = refused(tmp_path / "data")
    assert message.startswith(f"5 classes are in {tmp_path}/data/train and in {tmp_path}/data/test, such as 'ant'")


def test_small_classes_are_refused_by_name_or_left_out(tmp_path, split_file):
    directory = source(tmp_path, "zip")
    message = refused(directory, "test", split_file=split_file, min_images=4)
    assert message == (
        f"1 of 2 classes of {directory} have fewer than 4 images, such as 'dog' with 2; use fewer examples of a class, "
        "add images, or leave these classes out with leave_out_small (in the experiments --leave-out-small)"
    )
    found = load(directory, "test", size=8, cache_dir=tmp_path, split_file=split_file)
    assert image_folder.check_examples(found, 2) is found
    with pytest.raises(ValueError, match=r"1 of 2 classes of the split have fewer than 3 images, such as 'dog' with 2"):
        image_folder.check_examples(found, 3)
    kept, left_out = image_folder.leave_out_small(found, 3)
    assert (kept.names, left_out) == (("elk",), 1)
    np.testing.assert_array_equal(kept.images[0], found.images[1])
    with pytest.raises(ValueError, match=r"none of the 2 classes has 5 images"):
        image_folder.leave_out_small(found, 5)


def test_a_pool_without_a_split_file_says_how_to_make_one(tmp_path, monkeypatch):
    directory = source(tmp_path, "pool")
    message = refused(directory)
    assert message.startswith(f"{directory} has no train, val and test, so it is taken as one pool of classes")
    command = message[message.index("image_folder.write_split") :].rstrip("`").replace("FILE", "'made.json'")
    monkeypatch.chdir(tmp_path)
    eval(command, {"image_folder": image_folder})
    options = {"split_file": tmp_path / "made.json", "size": 8, "cache_dir": tmp_path}
    names = [load(directory, split, **options).names for split in ("train", "val", "test")]
    assert sorted(sum(names, ())) == sorted(COUNTS)
    assert [len(of_split) for of_split in names] == [3, 1, 1]


def test_what_is_wrong_with_a_directory_is_named(tmp_path, split_file):
    good = files()
    assert refused(tmp_path / "none", error=FileNotFoundError).startswith(f"there is no folder or zip {tmp_path}/none")
    write_folder(tmp_path / "a" / "train", good)
    assert refused(tmp_path / "a", "val", FileNotFoundError).startswith(f"{tmp_path}/a has no 'val'; put a folder val")
    write_zip(tmp_path / "a" / "train.zip", good)
    assert refused(tmp_path / "a") == f"{tmp_path}/a has both train and train.zip; remove one of them"
    cases = {
        "stray/1.png": f"the image {tmp_path}/b/1.png is in no class folder",
        "ant/notes.txt": f"{tmp_path}/b/ant/notes.txt is no image file such as .png or .jpg; remove it",
        "ant/more/1.png": f"{tmp_path}/b/ant/more is a folder; {tmp_path}/b/ant must hold the images",
        "ant/0.png": f"{tmp_path}/b/ant/0.png cannot be read as an image (UnidentifiedImageError",
    }
    for name, message in cases.items():
        write_folder(tmp_path / "b", {**good, name.removeprefix("stray/"): b"x"})
        assert refused(tmp_path / "b", split_file=split_file).startswith(message)
        shutil.rmtree(tmp_path / "b")
    (tmp_path / "b" / "ant").mkdir(parents=True)
    assert refused(tmp_path / "b", split_file=split_file).startswith(f"the class 'ant' of {tmp_path}/b holds no image")
    (tmp_path / "c").mkdir()
    assert refused(tmp_path / "c", split_file=split_file).startswith(f"{tmp_path}/c holds no class folder")


def test_a_damaged_image_in_a_zip_is_named_with_its_zip(tmp_path, split_file):
    pool = write_zip(tmp_path / "pool.zip", {**files(), "cat/2.png": files()["cat/2.png"][:45]})
    message = refused(pool, split_file=split_file)
    assert message.startswith(f"cat/2.png in {pool} cannot be read as an image (")
    stored = files()["cat/2.png"]
    intact = write_zip(tmp_path / "pool.zip", files()).read_bytes()
    pool.write_bytes(intact.replace(stored, stored[:40] + b"!" + stored[41:]))
    assert refused(pool, split_file=split_file).startswith(
        f"cat/2.png in {pool} cannot be read (BadZipFile: Bad CRC-32"
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../cat/9.png", "does not stay within the zip"),
        ("cat/../../9.png", "does not stay within the zip"),
        ("/cat/9.png", "does not stay within the zip"),
        ("C:/9.png", "does not stay within the zip"),
        ("cat\\9.png", "does not stay within the zip"),
    ],
)
def test_members_that_leave_the_zip_are_refused(tmp_path, split_file, name, problem):
    pool = write_zip(tmp_path / "pool.zip", {**files(), name: b"x"})
    assert refused(pool, split_file=split_file).startswith(f"{name!r} in {pool} {problem}")


def test_a_link_to_nothing_is_refused_by_name(tmp_path, split_file):
    (tmp_path / "pool" / "cat").mkdir(parents=True)
    (tmp_path / "pool" / "cat" / "a.png").symlink_to(tmp_path / "gone.png")
    assert refused(tmp_path / "pool", split_file=split_file).endswith(
        "a.png is a link to a file that does not exist; remove it"
    )


def test_what_is_no_file_or_a_huge_one_is_refused_by_name(tmp_path, split_file):
    directory = source(tmp_path, "pool")
    os.mkfifo(directory / "dog" / "pipe.png")
    assert refused(directory, "test", split_file=split_file).endswith("dog/pipe.png is no file; remove it")
    (directory / "dog" / "pipe.png").unlink()
    with open(directory / "dog" / "huge.png", "wb") as stream:
        stream.truncate(2**28 + 1)  # no block is written
    message = refused(directory, "test", split_file=split_file)
    assert message.endswith("dog/huge.png has 268,435,457 bytes, more than 268,435,456; shrink it")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([], {}, r"read_images takes a list of one or more files, got \[\]"),
        ("a.png", {}, "read_images takes a list of one or more files, got 'a.png'"),
        (Path("a.png"), {}, r"read_images takes a list of one or more files, got .*Path\('a.png'\)"),
        (["a.png"], {"colour": "grey"}, "colour must be True or False, got 'grey'"),
        (["a.png"], {"size": 0}, "size must be an integer of at least 1, got 0"),
        (["a.txt"], {}, "a.txt is no image file"),
    ],
)
def test_what_cannot_be_read_without_a_cache_is_refused(files, options, message):
    with pytest.raises(ValueError, match=message):
        image_folder.read_images(files, **{"size": 8} | options)


def test_links_bombs_and_encrypted_members_are_refused(tmp_path, split_file):
    pool = tmp_path / "pool.zip"
    with zipfile.ZipFile(pool, "w") as archive:
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert refused(pool, split_file=split_file).startswith(f"'cat/link.png' in {pool} is a link")
    content = bytearray(write_zip(pool, {"cat/1.png": b"x" * 10}).read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = (2**29).to_bytes(4, "little")  # the declared size
    pool.write_bytes(content)
    assert refused(pool, split_file=split_file).startswith(
        f"'cat/1.png' in {pool} has 536,870,912 bytes, more than 268,435,456"
    )
    content[place + 24 : place + 28] = (10).to_bytes(4, "little")
    content[place + 8] |= 1
    pool.write_bytes(content)
    assert refused(pool, split_file=split_file).startswith(f"'cat/1.png' in {pool} is encrypted")
    for width in (11_000, 20_000):  # Pillow itself warns of the first and refuses the second
        write_zip(pool, {**files(), "cat/huge.ppm": b"P6 %d %d 255 " % (width, width)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert refused(pool, split_file=split_file).startswith(f"cat/huge.ppm in {pool} cannot be read as an image")


def test_two_images_of_one_name_are_refused(tmp_path, split_file):
    with zipfile.ZipFile(tmp_path / "pool.zip", "w") as archive:
        archive.writestr("cat/1.png", encoded(pixels(0, 0)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cat/1.png", encoded(pixels(0, 0)))
    assert "cat/1.png in " in refused(tmp_path / "pool.zip", split_file=split_file)


def test_nothing_is_unpacked(tmp_path, split_file, monkeypatch):
    pool = source(tmp_path, "zip")
    for method in ("extract", "extractall"):
        monkeypatch.setattr(zipfile.ZipFile, method, lambda *_, **__: pytest.fail("unpacked"))
    before = set(tmp_path.rglob("*"))
    load(pool, "val", size=8, split_file=split_file, cache_dir=tmp_path / "cache")
    assert {path.suffix for path in set(tmp_path.rglob("*")) - before} == {"", ".npy", ".json"}


@pytest.mark.skipif(not IMAGES, reason="set MAML_JAX_IMAGES to a folder with train.zip, val.zip and test.zip")
def test_real_photographs(tmp_path):
    found = load(IMAGES, "val", size=16, cache_dir=tmp_path)
    described = json.loads((Path(IMAGES) / "classes.json").read_text())
    assert list(found.names) == sorted(described["val"])
    assert [images.shape for images in found.images] == [(200, 16, 16, 3)] * 16
    with zipfile.ZipFile(Path(IMAGES) / "val.zip") as archive:
        name = sorted(member for member in archive.namelist() if member.startswith(found.names[3]))[7]
        with archive.open(name) as stream, Image.open(stream) as image:
            expected = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(found.images[3][7], expected)
