"""Image files of any size and mode become what Omniglot is, and whatever is no image is named."""

import re
import subprocess
import sys

import numpy as np
import pytest

from maml_jax.tasks import drawings, omniglot
from maml_jax.tasks.drawings import as_batch, as_drawing, as_inputs, read_classes, read_image

Image = pytest.importorskip("PIL.Image", reason="install Pillow with `pip install pillow`")


def character():
    """A drawing of 105x105 with lines of 3 pixels, ink 0 on 255, as the originals of Omniglot."""
    pixels = np.full((105, 105), 255, np.uint8)
    pixels[20:80, 30:33] = 0
    pixels[77:80, 30:90] = 0
    pixels[20:23, 30:60] = 0
    return pixels


def block(height=56, width=56, ink=0, paper=255):
    """A square of ink of which half is on even and half on odd pixels when 56 become 28."""
    pixels = np.full((height, width), paper, np.uint8)
    pixels[11:31, 21:41] = ink
    return pixels


def save(pixels, file, mode=None, **options):
    image = Image.fromarray(pixels)
    file.parent.mkdir(parents=True, exist_ok=True)
    (image.convert(mode) if mode else image).save(file, **options)
    return file


@pytest.fixture
def classes(tmp_path):
    """Three classes with 1, 3 and 2 images."""
    for name, count in (("b", 3), ("a", 1), ("c", 2)):
        for index in range(count):
            save(block(ink=10 * index), tmp_path / "classes" / name / f"{index}.png")
    return tmp_path / "classes"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_an_original_of_omniglot_is_scaled_as_in_the_literature(tmp_path, mode):
    found = read_image(save(character(), tmp_path / "original.png", mode))
    assert (found.shape, found.dtype) == ((28, 28, 1), np.uint8)
    np.testing.assert_array_equal(found[..., 0], omniglot.downscale_to_28(character()))


def test_other_images_are_averaged_over_areas(tmp_path):
    found = read_image(save(block(), tmp_path / "block.png"))[..., 0]
    expected = np.zeros((28, 28))
    expected[6:15, 11:20] = 255
    expected[[5, 15], 11:20] = expected[6:15, [10, 20]] = 127.5
    expected[[5, 5, 15, 15], [10, 20, 10, 20]] = 63.75
    np.testing.assert_allclose(found, expected, atol=0.51)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "RGB"), ("a.png", "P"), ("a.png", "LA"), ("a.bmp", "RGB"), ("a.gif", "P"), ("a.tif", "CMYK")],
)
def test_the_mode_and_the_format_do_not_matter(tmp_path, name, mode):
    found = read_image(save(block(), tmp_path / name, mode))
    np.testing.assert_allclose(found.astype(int), read_image(save(block(), tmp_path / "grey.png")), atol=2)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1.0)])
def test_numbers_of_another_range_are_not_clipped(tmp_path, dtype, top):
    pixels = (block() / 255 * top).astype(dtype)
    np.testing.assert_array_equal(read_image(save(pixels, tmp_path / "deep.tif")), as_drawing(block()))


def test_a_photograph_in_jpeg_is_nearly_the_same(tmp_path):
    found = read_image(save(block(ink=60, paper=190), tmp_path / "photo.JPG", quality=95))
    assert np.abs(found.astype(int) - as_drawing(block())).max() < 12


@pytest.mark.parametrize(
    ("ink", "paper", "name"), [(0, 255, "dark"), (255, 0, "light"), (20, 90, "dark"), (230, 160, "light")]
)
def test_ink_is_found_by_the_border(ink, paper, name):
    expected = as_drawing(block())
    for choice in ("auto", name):
        np.testing.assert_array_equal(as_drawing(block(ink=ink, paper=paper), ink=choice), expected)
    other = {"dark": "light", "light": "dark"}[name]
    with pytest.raises(ValueError, match=f"there is no {other} ink; draw something, or name the ink"):
        as_drawing(block(ink=ink, paper=paper), ink=other)


def test_ink_is_measured_from_the_median_of_all_four_borders():
    pixels = np.full((16, 8), 200)
    pixels[0] = 0  # ten of the 48 pixels of the border, and half of those of its rows
    pixels[4, 5], pixels[5, 5] = 120, 230  # paler ink, and paper that is lighter than most
    expected = np.zeros((16, 16))
    expected[0, 4:12] = 255
    expected[4, 9] = 102  # 255 (200 - 120) / 200
    np.testing.assert_array_equal(as_drawing(pixels, size=16)[..., 0], expected)


def test_what_is_named_decides_when_the_ink_fills_the_border():
    pixels = block()
    pixels[:5] = pixels[-5:] = 0
    pixels[:, :5] = pixels[:, -5:] = 0
    assert as_drawing(pixels)[14, 3, 0] == 255  # the paper, taken for ink
    with pytest.raises(ValueError, match="there is no dark ink"):
        as_drawing(pixels, ink="dark")  # the background is the median of the border


def test_what_is_transparent_is_background(tmp_path):
    for ink, choice in ((0, "auto"), (255, "light")):
        pixels = np.zeros((56, 56, 4), np.uint8)
        pixels[11:31, 21:41] = (ink, ink, ink, 255)
        np.testing.assert_array_equal(read_image(save(pixels, tmp_path / "clear.png"), ink=choice), as_drawing(block()))


@pytest.mark.parametrize("shape", [(56, 140), (140, 56), (56, 57)])
def test_an_image_is_padded_to_a_square_and_stays_in_the_middle(shape):
    found = as_drawing(
        np.pad(np.zeros((2, 2)), [(length // 2 - 1, length - length // 2 - 1) for length in shape], constant_values=255)
    )
    assert found.shape == (28, 28, 1)
    rows, columns = np.nonzero(found[..., 0])
    assert set(rows) | set(columns) <= {13, 14}


@pytest.mark.parametrize("shape", [(7, 7), (1, 9), (300, 200)])
def test_any_size_will_do(shape):
    pixels = np.full(shape, 255)
    pixels[0, shape[1] // 2] = 0
    assert as_drawing(pixels).max() == 255
    assert as_drawing(pixels, size=20).shape == (20, 20, 1)


def test_a_camera_that_was_turned_is_turned_back(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees against the clock
    file = save(np.rot90(block()), tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(file), as_drawing(block()))


def test_thin_lines_do_not_get_lost():
    pixels = np.full((105, 105), 255)
    pixels[:, 3] = 0  # between the columns that nearest neighbour keeps
    assert as_drawing(pixels).max() == 255


def test_a_grey_image_of_the_size_of_an_original_is_averaged():
    pixels = np.full((105, 105), 255)
    pixels[:, 50:60] = 0
    pixels[:, 3] = 100  # between the columns that nearest neighbour keeps
    assert as_drawing(pixels)[14, 0, 0] > 20


# Folders


def test_classes_are_sorted_and_may_differ_in_size(classes):
    save(block(), classes / ".hidden" / "a.png")
    (classes / ".DS_Store").write_text("")
    (classes / "a" / ".thumbnail").write_text("")
    names, images = read_classes(classes)
    assert names == ["a", "b", "c"]
    assert [image.shape for image in images] == [(1, 28, 28, 1), (3, 28, 28, 1), (2, 28, 28, 1)]
    assert all(image.dtype == np.uint8 for image in images)
    np.testing.assert_array_equal(images[1][0], as_drawing(block()))
    assert read_classes(classes, size=20)[1][1].shape == (3, 20, 20, 1)


def test_a_batch_has_the_classes_as_labels_and_ink_as_one(classes):
    _, images = read_classes(classes)
    batch = as_batch(images)
    assert batch.targets.tolist() == [0, 1, 1, 1, 2, 2]
    assert (batch.inputs.dtype, batch.targets.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(batch.inputs[1:4], as_inputs(images[1]))
    assert (batch.inputs.min(), batch.inputs.max()) == (0.0, 1.0)


def refused(classes, change):
    change(classes)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read_classes(classes)
    return str(raised.value)


def test_what_is_wrong_with_a_folder_is_named(classes, tmp_path):
    assert (
        refused(tmp_path / "none", lambda c: None)
        == f"the folder {tmp_path}/none does not exist; give the name of a folder"
    )
    assert "is a file and no folder" in refused(classes / "a" / "0.png", lambda c: None)
    message = refused(classes, lambda c: (c / "d").mkdir())
    assert message == f"{classes}/d holds no image; put at least one there, or remove the folder"
    (classes / "d").rmdir()
    message = refused(classes, lambda c: (c / "notes.txt").write_text("x"))
    assert message.startswith(
        f"{classes}/notes.txt is no folder; {classes} must hold only one folder of images for each"
    )
    (classes / "notes.txt").unlink()
    message = refused(classes, lambda c: (c / "b" / "notes.txt").write_text("x"))
    assert message.startswith(f"{classes}/b/notes.txt is no image file such as .png or .jpg; remove it")
    (classes / "b" / "notes.txt").unlink()
    message = refused(classes, lambda c: (c / "b" / "more.png").mkdir())
    assert message.startswith(f"{classes}/b/more.png is no image file")
    (classes / "b" / "more.png").rmdir()
    message = refused(classes, lambda c: (c / "b" / "0.png").write_bytes(b"no image"))
    assert message.startswith(f"{classes}/b/0.png cannot be read as an image (UnidentifiedImageError: ")
    message = refused(classes, lambda c: save(np.full((30, 30), 200, np.uint8), c / "b" / "0.png"))
    assert message == f"{classes}/b/0.png: there is no light ink; draw something, or name the ink: dark or light"


def test_a_truncated_image_is_named(classes):
    file = save(np.random.default_rng(0).integers(0, 255, (50, 50)).astype(np.uint8), classes / "b" / "0.png")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"b/0\.png cannot be read as an image .*; remove or replace it"):
        read_classes(classes)


@pytest.mark.parametrize("count", [0, 1])
def test_one_class_is_no_task(classes, tmp_path, count):
    (tmp_path / "few").mkdir()
    for name in ["a"][:count]:
        (classes / name).rename(tmp_path / "few" / name)
    with pytest.raises(ValueError, match=f"few holds {count} class folder.*; a task needs at least 2"):
        read_classes(tmp_path / "few")


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (np.zeros((3, 3, 3)), {}, r"must have the shape \[height, width\], got \[3, 3, 3\]"),
        (np.zeros((0, 3)), {}, r"must have the shape \[height, width\], got \[0, 3\]"),
        (block(), {"ink": "red"}, r"unknown ink 'red'; choose auto, dark or light"),
        (block(), {"size": 0}, r"size must be an integer of at least 1, got 0"),
        (block(ink=240), {}, r"there is no dark ink"),
        (np.zeros((1, 10_001)), {}, r"10001x1 is a square of more than 100,000,000 pixels when it is padded; crop it"),
        (np.where(np.eye(5) > 0, np.nan, 255.0), {}, r"an image has pixels that are NaN or infinite"),
    ],
)
def test_pixels_that_are_no_drawing_are_refused(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        as_drawing(pixels, **options)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.png"):
        read_image(tmp_path / "none.png")


def test_pillow_is_only_loaded_when_an_image_is_read(monkeypatch):
    code = "import sys, maml_jax, maml_jax.portable, maml_jax.tasks.drawings; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"reading images needs Pillow; install it with `pip install pillow`"):
        drawings.as_drawing(block())


def test_nothing_to_read_is_an_error():
    for files in ([], "a.png"):
        with pytest.raises(
            ValueError, match=rf"read_images takes a list of one or more files, got {re.escape(repr(files))}"
        ):
            drawings.read_images(files)
    with pytest.raises(ValueError, match="as_batch was given no class"):
        drawings.as_batch([])
