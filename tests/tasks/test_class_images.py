"""Images in the cache are those that were made, and damage is found out."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from maml_jax.tasks.class_images import ClassImages, cached_classes, check_examples, leave_out_small

COUNTS = {"a": 2, "b": 7}
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)


def cached(cache_dir, description=None, images=IMAGES):
    """What the cache gives, and how often the images were made."""
    made = []

    def make():
        made.append(1)
        return COUNTS, iter(images)

    found = cached_classes(cache_dir, "x", description or {"source": "s"}, make, size=4, colour=True)
    assert found.names == ("a", "b")
    np.testing.assert_array_equal(found.images[0], IMAGES[:2])
    np.testing.assert_array_equal(found.images[1], IMAGES[2:])
    return len(made)


def test_images_are_made_once_for_each_description(tmp_path):
    assert [cached(tmp_path / "new" / "cache") for _ in range(2)] == [1, 0]
    assert [cached(tmp_path / "new" / "cache", {"source": "t"}) for _ in range(2)] == [1, 0]
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 4


def test_the_array_is_a_plain_file_of_numpy(tmp_path):
    cached(tmp_path)
    (file,) = tmp_path.glob("*.npy")
    np.testing.assert_array_equal(np.load(file, allow_pickle=False), IMAGES)


@pytest.mark.parametrize("suffix", ["npy", "json"])
@pytest.mark.parametrize("damage", ["flip first", "flip middle", "flip last", "truncate", "empty", "remove", "append"])
def test_a_damaged_file_is_made_again(tmp_path, suffix, damage):
    cached(tmp_path)
    (file,) = tmp_path.glob(f"*.{suffix}")
    content = bytearray(file.read_bytes())
    place = {"flip first": 0, "flip middle": len(content) // 2, "flip last": len(content) - 1}.get(damage)
    if place is not None:
        content[place] ^= 1
    file.unlink()
    if damage != "remove":
        file.write_bytes({"truncate": content[:-9], "empty": b"", "append": content + b"x"}.get(damage, content))
    assert [cached(tmp_path), cached(tmp_path)] == [1, 0]


def test_counts_that_were_changed_are_found_out(tmp_path):
    cached(tmp_path)
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    content["classes"] = {"a": 3, "b": 6}
    file.write_text(json.dumps(content))
    assert cached(tmp_path) == 1


def test_a_pickle_is_not_opened(tmp_path):
    cached(tmp_path)
    (file,) = tmp_path.glob("*.npy")
    with open(file, "wb") as stream:
        np.save(stream, np.array([{"a": 1}], object), allow_pickle=True)
    assert cached(tmp_path) == 1


def test_an_error_leaves_nothing(tmp_path):
    def failing():
        yield IMAGES[0]
        raise ValueError("image 1")

    with pytest.raises(ValueError, match="image 1"):
        cached(tmp_path, images=failing())
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_leaves_nothing_under_the_final_names(tmp_path):
    code = """
import sys, time
import numpy as np
from maml_jax.tasks.class_images import cached_classes
from pathlib import Path
def images():
    for i in range(9):
        yield np.zeros((4, 4, 3), np.uint8)
    print("written", flush=True)
    time.sleep(60)
cached_classes(Path(sys.argv[1]), "x", {"source": "s"}, lambda: ({"a": 2, "b": 7}, images()), size=4, colour=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".part-")
    assert cached(tmp_path) == 1
    assert left.exists()  # it may belong to a process that is running
    os.utime(left, (time.time() - 90_000,) * 2)
    cached(tmp_path, {"source": "t"})
    assert not left.exists()


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the cache folder .*file/cache cannot be made .*; give another cache_dir"):
        cached(tmp_path / "file" / "cache")


def test_a_class_with_just_the_images_that_are_needed_is_kept():
    kept, left_out = leave_out_small(ClassImages(("a", "b", "c"), (IMAGES[:2], IMAGES[:3], IMAGES[:4])), 3)
    assert (kept.names, left_out) == (("b", "c"), 1)
    assert [len(images) for images in kept.images] == [3, 4]
    assert check_examples(kept, 3) is kept


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 2.0}, {"colour": 1}])
def test_wrong_settings_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        cached_classes(tmp_path, "x", {}, lambda: ({}, iter(())), **{"size": 4, "colour": True, **options})
