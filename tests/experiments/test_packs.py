"""Reading packs of data, and making their images alike."""

import os

import jax
import numpy as np
import pytest

from experiments import packs
from maml_jax.tasks import omniglot, variable

HAS_PACKS = "MAML_JAX_PACKS" in os.environ
needs_packs = pytest.mark.skipif(not HAS_PACKS, reason="set MAML_JAX_PACKS to the directory of the packs")


def signs(**changes):
    return {
        "images": np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3),
        "labels": np.array([0, 1], np.uint8),
        "tracks": np.array([4, 4], np.uint16),
    } | changes


def test_a_pack_gives_images_labels_and_groups(tmp_path):
    np.savez(tmp_path / "gtsrb_32.npz", **signs())
    data = packs.load("signs", tmp_path)
    np.testing.assert_array_equal(data.images, signs()["images"])
    assert (data.labels.tolist(), data.groups.tolist()) == ([0, 1], [4, 4])
    assert data.images.dtype == np.uint8


def test_images_that_are_stored_by_class_get_labels(tmp_path):
    faces = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1) + np.zeros((56, 46), np.uint8)
    np.savez(tmp_path / "orl_faces_56x46.npz", images=faces)
    data = packs.load("faces", tmp_path)
    assert data.images.shape == (6, 56, 46, 1)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.groups is None


@pytest.mark.parametrize(
    "content",
    [
        {"images": np.zeros((2, 32, 32, 3), np.float32)},
        {"images": np.zeros((2, 32, 32), np.uint8)},
        {"labels": np.zeros(3, np.uint8)},
        {"tracks": np.zeros(1, np.uint8)},
    ],
)
def test_other_content_is_an_error(tmp_path, content):
    np.savez(tmp_path / "gtsrb_32.npz", **signs(**content))
    with pytest.raises(ValueError, match=r"gtsrb_32.npz holds .* must hold images uint8\[n, 32, 32, 3\]"):
        packs.load("signs", tmp_path)


def test_a_missing_array_is_an_error(tmp_path):
    np.savez(tmp_path / "gtsrb_32.npz", **{name: array for name, array in signs().items() if name != "tracks"})
    with pytest.raises(ValueError, match="labels, tracks"):
        packs.load("signs", tmp_path)


def test_a_missing_pack_is_named_with_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"mnist_t10k.npz; give .*--packs-dir .* leave digits out"):
        packs.load("digits", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mnist_t10k.npz by --data-dir$"):
        packs.load("digits", tmp_path, remedy="--data-dir")
    monkeypatch.delenv("MAML_JAX_PACKS", raising=False)
    with pytest.raises(FileNotFoundError, match="in no known directory"):
        packs.load("digits")


def test_omniglot_is_what_no_division_trains_on(monkeypatch):
    tests = {by: omniglot.splits(by)["test"] for by in ("character", "alphabet")}
    values = np.arange(len(tests["character"]))
    drawings = np.stack([values // 256, values % 256], -1).astype(np.uint8).reshape(-1, 1, 1, 1, 2)
    monkeypatch.setattr(packs.omniglot, "load", lambda split, data_dir, by: drawings if split == "test" else None)
    data = packs.load("omniglot")
    places = data.images[:, 0, 0, 0].astype(int) * 256 + data.images[:, 0, 0, 1]
    names = {tests["character"][place] for place in places}
    assert len(names) == len(places) == len(set(data.labels)) > 50
    assert names <= set(tests["alphabet"])
    for by in ("character", "alphabet"):
        assert not names & {name for split in ("train", "val") for name in omniglot.splits(by)[split]}


def test_colours_become_grey_by_luminance():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [100, 100, 100]], np.uint8)
    images = np.zeros((4, 28, 28, 1), np.uint8) + colours[:, None, None]
    grey = packs.fitted(images, (28, 28, 1))
    assert grey.shape == (4, 28, 28, 1)
    assert grey.dtype == np.uint8
    # 255 times 0.299, 0.587 and 0.114, rounded.
    assert [np.unique(image).tolist() for image in grey] == [[76], [150], [29], [100]]


def test_grey_becomes_three_channels_and_is_averaged_when_made_smaller():
    stripes = np.zeros((1, 64, 64, 1), np.uint8)
    stripes[:, :, ::2] = 200
    small = packs.fitted(stripes, (16, 16, 3))
    assert small.shape == (1, 16, 16, 3)
    assert np.abs(small[:, :, 1:-1].astype(int) - 100).max() <= 6  # without averaging 0 or 200
    assert (small == small[..., :1]).all()
    assert packs.fitted(stripes, (100, 20, 1)).shape == (1, 100, 20, 1)


def test_images_of_the_right_shape_are_not_changed():
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    assert packs.fitted(images, (28, 28, 1)) is images
    many = np.concatenate([images] * 400)
    np.testing.assert_array_equal(packs.fitted(many, (28, 28, 3))[..., 1:2], many)
    with pytest.raises(ValueError, match="4 channels"):
        packs.fitted(images, (28, 28, 4))


@needs_packs
@pytest.mark.parametrize("name", [name for name in packs.NAMES if name != "omniglot"])
def test_the_real_packs_have_enough_examples(name):
    data = packs.load(name)
    assert len(data.images) == len(data.labels)
    selector = variable.make_selector(data.labels, groups=data.groups, min_examples=10, ways=(5, 10))
    assert selector.ways == (5, 10)
    assert selector.query_shot >= 5


@needs_packs
def test_no_track_of_a_traffic_sign_is_in_support_and_query():
    data = packs.load("signs")
    selector = variable.make_selector(data.labels, groups=data.groups, min_examples=10)
    assert len(selector.classes) == 34
    for key in jax.random.split(jax.random.key(0), 20):
        support, query = (
            set(zip(data.labels[examples], data.groups[examples], strict=True)) for examples in selector(key)[3:5]
        )
        assert not support & query
