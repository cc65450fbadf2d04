"""Image files are decoded in order, upright, and without running anything."""

import io
import subprocess
import threading
import time

import numpy as np
import pytest
from photographs import encoded, pixels

from maml_jax.tasks import image_files
from maml_jax.tasks.image_files import check_image_name, decode_images, list_folder, numbers, resize

Image = pytest.importorskip("PIL.Image", reason="install Pillow with `pip install pillow`")


def test_images_come_in_the_order_of_the_files_whatever_they_cost(monkeypatch):
    def slow_first(image, size, colour):
        time.sleep(0.05 if image.getpixel((0, 0))[1] == 0 else 0)
        return resize(image, size, colour)

    monkeypatch.setattr(image_files, "resize", slow_first)
    contents = ((f"{i}", encoded(pixels(1, i % 10))) for i in range(3 * image_files._AT_ONCE + 1))
    found = np.stack(list(decode_images(contents, 8, True)))
    np.testing.assert_array_equal(found[:, 0, 0, 1] // 10, np.arange(len(found)) % 10)


def test_few_files_are_in_memory_at_once_and_no_thread_is_left():
    taken, before = [], threading.active_count()

    def contents():
        for i in range(1000):
            taken.append(i)
            yield f"{i}", encoded(pixels(0, 0)) if i < 100 else b"no image"

    images = decode_images(contents(), 4, True)
    next(images)
    assert len(taken) == image_files._AT_ONCE
    with pytest.raises(ValueError, match=r"^100 cannot be read as an image"):
        list(images)
    assert len(taken) == 2 * image_files._AT_ONCE
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.wmf", "a.svg", "a.pdf", "a.exe", "a", ".png"])
def test_other_names_are_no_images(name):
    with pytest.raises(ValueError, match=r"is no image file such as \.png or \.jpg"):
        check_image_name(name)


def test_a_program_in_an_image_is_not_run(monkeypatch):
    # Pillow hands PostScript to Ghostscript.
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was run"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image \(UnidentifiedImageError"):
        list(decode_images(iter([("a.png", content)]), 8, True))


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
    content = encoded(pixels(0, 0))
    monkeypatch.setattr(image_files, "MOST_PIXELS", 64)
    assert len(list(decode_images(iter([("a.png", content)]), 8, True))) == 1
    monkeypatch.setattr(image_files, "MOST_PIXELS", 63)
    with pytest.raises(ValueError, match=r"a\.png cannot be read .*8x8 is more than 63 pixels"):
        list(decode_images(iter([("a.png", content)]), 8, True))


def test_an_image_of_the_right_size_is_not_changed():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(Image.fromarray(image), 8, True), image)


def test_numbers_keep_their_range():
    floats = np.array([[0.0, 0.5], [1.0, -1.0]], np.float32)
    np.testing.assert_array_equal(numbers(Image.fromarray(floats)), [[0, 127.5], [255, 0]])
    np.testing.assert_array_equal(numbers(Image.fromarray(4 * floats)), [[0, 127.5], [255, 0]])
    np.testing.assert_array_equal(resize(Image.fromarray(floats), 2, False)[..., 0], [[0, 128], [255, 0]])  # rounded
    assert numbers(Image.new("L", (2, 2))) is None
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(stream, "TIFF")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read as an image \(ValueError: a pixel is not finite\)"):
        list(decode_images(iter([("a.tif", stream.getvalue())]), 8, True))


def test_a_folder_is_listed_in_order_without_hidden_names(tmp_path):
    for name in ("b", "a", ".c"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.txt").write_text("")
    assert [[path.name for path in paths] for paths in list_folder(tmp_path)] == [["a", "b"], ["a.txt", "b.txt"]]
    with pytest.raises(FileNotFoundError, match=r"the folder .*a\.txt is a file and no folder"):
        list_folder(tmp_path / "a.txt")
