"""Tests of the differences between two learners, episode by episode."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, stdtr, stdtrit


class Paired(NamedTuple):
    """The test of paired differences.

    Attributes:
      mean: of the differences.
      ci95: half-width of the 95 % interval of the mean.
      p: the probability of a mean at least as far from 0 if the two were equally good.
    """

    mean: float
    ci95: float
    p: float


def paired_test(a: np.ndarray, b: np.ndarray) -> Paired:
    """Student's t test of the differences a − b.

    Args:
      a: scores [E], E ≥ 2, finite.
      b: scores [E] of the same episodes.

    Returns:
      The mean of the differences, its interval and its p-value. Differences that are all the same leave no doubt:
      p is 1 if they are 0, and 0 otherwise.

    Raises:
      ValueError: if the numbers of scores differ, are below 2, or a score is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"a paired test needs two vectors of the same length of at least 2, got {a.shape}, {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a paired test needs finite scores")
    differences, freedom = a - b, len(a) - 1
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(len(a))
    if np.ptp(differences) == 0:
        return Paired(float(mean), 0.0, float(mean == 0))
    return Paired(float(mean), float(stdtrit(freedom, 0.975) * error), float(2 * stdtr(freedom, -abs(mean) / error)))


def sign_test(better: int, worse: int) -> float:
    """The probability of numbers at least as unequal if being better and being worse were equally likely.

    Args:
      better: episodes in which the first of two runs was better; equal ones do not count.
      worse: episodes in which it was worse.
    """
    return min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values of several tests, so that one false difference among all of them has a probability below 5 %.

    References:
      Holm, 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
