"""Pairs of images, thresholds and rates against loops written by hand."""

import itertools

import numpy as np
import pytest

from experiments import verification
from experiments.verification import Pairs

rng = np.random.default_rng(0)
EMBEDDINGS = rng.normal(size=(5, 3, 4)) + rng.normal(size=(5, 1, 4))


def by_hand():
    same, different = {}, []
    items = [(i, k) for i in range(5) for k in range(3)]
    for (i, k), (j, m) in itertools.combinations(items, 2):
        a, b = EMBEDDINGS[i, k], EMBEDDINGS[j, m]
        cosine = a @ b / np.sqrt(a @ a * (b @ b))
        if i == j:
            same.setdefault(i, []).append(cosine)
        else:
            different.append(cosine)
    return same, different


def test_every_pair_is_there_once():
    same, different = by_hand()
    found = verification.pairs_of(EMBEDDINGS)
    np.testing.assert_allclose(found.same, [same[i] for i in range(5)], rtol=1e-12)
    np.testing.assert_allclose(found.different, sorted(different), rtol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.37, 1.0])
def test_no_more_pairs_of_two_identities_are_accepted_than_the_rate(rate):
    pairs = verification.pairs_of(EMBEDDINGS)
    threshold = verification.threshold_at(pairs, rate)
    accepted = int(np.sum(pairs.different > threshold))
    assert accepted == int(rate * len(pairs.different))
    rates = verification.true_accept_rates(pairs, threshold)
    assert rates.shape == (5, 1)
    np.testing.assert_allclose(rates[:, 0], [np.mean([c > threshold for c in row]) for row in pairs.same])


def test_separated_identities_are_always_told_apart_and_equal_ones_never():
    apart = verification.pairs_of(np.eye(5)[:, None].repeat(3, 1))
    threshold = verification.best_threshold(apart)
    assert 0.0 <= threshold < 1.0
    assert verification.balanced_accuracy(apart, threshold) == 1.0
    assert verification.true_accept_rates(apart, verification.threshold_at(apart, 0.001)).mean() == 1.0
    equal = verification.pairs_of(np.ones((5, 3, 4)))
    assert verification.true_accept_rates(equal, verification.threshold_at(equal, 0.01)).mean() == 0.0
    assert verification.balanced_accuracy(equal, 0.5) == 0.5


def test_chance_is_a_diagonal():
    drawn = Pairs(rng.normal(size=(400, 15)), np.sort(rng.normal(size=100_000)))
    found = verification.tested(drawn, 0.0)
    np.testing.assert_allclose(found["roc"], verification.ROC_POINTS, atol=0.02)
    rate = found["metrics"]["tar_at_0.01"]
    assert abs(rate["mean"][0] - 0.01) < 2 * rate["ci95"][0]
    assert found["metrics"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.02)


def test_an_embedding_of_zero_is_no_division_by_zero():
    found = verification.pairs_of(np.zeros((2, 2, 3)))
    assert np.all(found.same == 0.0)
    assert np.all(found.different == 0.0)
