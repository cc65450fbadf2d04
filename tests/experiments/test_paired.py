"""The tests of paired differences, by hand and against scipy."""

import numpy as np
import pytest
from scipy import stats

from experiments import paired


def test_the_paired_test_by_hand_and_by_scipy():
    # Differences 2, 3, 1: mean 2, standard error 1/√3, t = 2√3. With two degrees of freedom the two-sided p-value is
    # 1 − t/√(t² + 2), and the 97.5 % quantile is 4.302653.
    found = paired.paired_test(np.array([3.0, 5.0, 7.0]), np.array([1.0, 2.0, 6.0]))
    assert found.mean == 2
    assert found.p == pytest.approx(1 - np.sqrt(12) / np.sqrt(14), rel=1e-12)
    assert found.ci95 == pytest.approx(4.302652729749464 / np.sqrt(3), rel=1e-9)
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.2, 1, 50), rng.normal(0, 1, 50)
    found, expected = paired.paired_test(a, b), stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean - found.ci95, found.mean + found.ci95) == pytest.approx((low, high), rel=1e-9)
    # Episodes are paired: in another order the same scores say less or more.
    assert paired.paired_test(a, b[::-1]).p != pytest.approx(found.p, rel=1e-3)


def test_differences_that_are_all_the_same_leave_no_doubt():
    scores = np.array([0.2, 0.4, 0.8])
    assert paired.paired_test(scores, scores) == (0.0, 0.0, 1.0)
    assert paired.paired_test(np.array([1.0, 2.0]), np.array([0.0, 1.0])) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0], [1.0], "length of at least 2"),
        ([1.0, 2], [1.0, 2, 3], "same length"),
        ([1.0, np.inf], [1.0, 2], "finite"),
    ],
)
def test_scores_that_cannot_be_tested(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired.paired_test(np.array(a), np.array(b))


def test_the_sign_test_and_the_correction_by_hand():
    assert paired.sign_test(5, 0) == paired.sign_test(0, 5) == pytest.approx(2 / 2**5)
    assert paired.sign_test(3, 3) == 1
    assert paired.sign_test(0, 0) == 1
    assert paired.sign_test(40, 60) == pytest.approx(stats.binomtest(40, 100).pvalue, rel=1e-9)
    # Sorted 0.01, 0.03, 0.04, times 3, 2, 1; no adjusted value is below an earlier one.
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []
