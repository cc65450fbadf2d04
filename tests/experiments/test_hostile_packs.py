"""Damaged packs and texts end in an error that names the file."""

import zipfile

import numpy as np
import pytest
from damage import mutations, outcome

from experiments import packs, parallel_text, runs


def test_300_damaged_packs(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "mnist_t10k.npz"
    images = rng.integers(0, 256, (20, 28, 28), np.uint8)
    np.savez_compressed(file, images=images, labels=np.arange(20) % 10)
    intact, refused = file.read_bytes(), 0
    for content in mutations(intact, rng, 300):
        file.write_bytes(content)
        found = outcome(lambda: packs.load("digits", tmp_path), file.name)
        if found is None:
            refused += 1
        else:
            np.testing.assert_array_equal(found.images[..., 0], images)
    assert refused > 200


def test_300_damaged_texts(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / parallel_text.PACK
    lines = tuple(f"a line of words, number {number}" for number in range(50))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.xa", "\n".join(lines))
    intact, refused = file.read_bytes(), 0
    for content in mutations(intact, rng, 300):
        file.write_bytes(content)
        found = outcome(lambda: parallel_text.Corpus(file).lines("train", "xa"), file.name)
        if found is None:
            refused += 1
        else:
            assert found == lines
    assert refused > 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": np.zeros(3)}, "must hold the arrays images, labels; it lacks labels"),
        ({"images": np.array([None]), "labels": np.zeros(1)}, "is damaged or no .npz"),
    ],
)
def test_arrays_that_are_not_there_are_named(tmp_path, content, message):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(ValueError, match=message):
        runs.read_npz(tmp_path / "x.npz", ("images", "labels"))
