"""Vectors of subwords and their alignment: against numpy, and rotations that are undone."""

import itertools

import numpy as np
import pytest

from experiments import lexical
from experiments.decoding import END


def test_vectors_without_a_translation_are_left_as_they_are():
    vectors = np.eye(3, dtype=np.float32)
    none = np.zeros((2, 2), np.int32)
    np.testing.assert_array_equal(lexical.aligned(vectors, vectors, none, none), vectors)


def test_an_alignment_undoes_a_rotation():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(30, 4)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    order = rng.permutation(np.arange(4, 30))
    vectors = np.zeros((30, 4), np.float32)
    vectors[order] = keys[4:] @ rotation
    # Each sentence has one subword, whose translation is always the same.
    source = np.repeat(order, 4)[:, None]
    target = np.repeat(np.arange(4, 30), 4)[:, None]
    pairs = lexical.translations(source, target)
    assert {tuple(pair) for pair in pairs} == set(zip(order.tolist(), range(4, 30), strict=True))
    found = lexical.aligned(vectors, keys, source, target)
    np.testing.assert_allclose(found[order], keys[4:], atol=1e-5)
    rare = lexical.translations(source[::2], target[::2])
    assert not len(rare)  # twice is not often enough


@pytest.mark.parametrize("most_dense", [0, lexical.MOST_DENSE])
def test_word_vectors_factorise_the_positive_information_of_neighbours(most_dense, monkeypatch):
    monkeypatch.setattr(lexical, "MOST_DENSE", most_dense)
    rng = np.random.default_rng(0)
    text = [rng.integers(4, 12, 6).tolist() for _ in range(40)]
    vectors = lexical.word_vectors(text, 13, 8)
    counts = np.zeros((13, 13))
    for sentence in text:
        for i, j in itertools.permutations(range(len(sentence)), 2):
            counts[sentence[i], sentence[j]] += abs(i - j) <= lexical.WINDOW
    of_word = counts.sum(1)
    of_context = of_word**lexical.SMOOTHING
    expected = np.zeros((13, 13))
    for i, j in zip(*np.nonzero(counts), strict=True):
        expected[i, j] = max(0.0, np.log(counts[i, j] * of_context.sum() / (of_word[i] * of_context[j])))
    left, values, _ = np.linalg.svd(expected)
    rows = left[4:12, :8] * np.sqrt(values[:8])
    cosines = rows @ rows.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(vectors[4:12] @ vectors[4:12].T, cosines, atol=1e-5)
    assert not np.any(vectors[[0, 1, 2, 3, 12]])


def test_the_vectors_of_a_short_text_are_the_same_every_time():
    rng = np.random.default_rng(0)
    text = [rng.integers(4, 60, 6).tolist() for _ in range(5)]
    first, again = (lexical.word_vectors(text, 3000, 64) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3000, 64)
    occurring = np.unique(np.concatenate(text))
    assert len(occurring) < 64
    np.testing.assert_allclose(np.linalg.norm(first[occurring], axis=1), 1.0, rtol=1e-5)
    assert not np.any(np.delete(first, occurring, axis=0))


def test_translations_are_mutually_best_by_dices_measure():
    pairs = [
        *[([4, 5, 9], [10, 11])] * 3,  # 9 is best translated by 11, which is better translated by 5
        ([4, 5], [10, 11]),
        *[([4, 6], [10, 12])] * 3,
        ([4, 6], [10]),  # 6 is more often beside the frequent 10, but Dice's measure is 6/7 for 12 and 8/14 for 10
        ([4, 7, 7], [10, 13]),  # twice in a sentence counts once, so two pairs hold 7 and 13
        ([4, 7], [10, 13]),
    ]
    source, target = np.zeros((2, 10, 5), np.int32)
    for row, sides in enumerate(pairs):
        for array, tokens in zip((source, target), sides, strict=True):
            array[row, : len(tokens) + 2] = [*tokens, 1, END]  # special tokens and the unknown one do not count
    found = lexical.translations(source, target)
    assert {tuple(pair) for pair in found.tolist()} == {(4, 10), (5, 11), (6, 12)}
