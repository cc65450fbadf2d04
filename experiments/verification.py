"""Verification: whether two images show the same identity, by the cosine of their embeddings."""

from typing import Any, NamedTuple

import numpy as np

from experiments.intervals import mean_and_interval

FALSE_ACCEPT_RATES = (0.01, 0.001)
"""The rates at which true accept rates are reported."""
ROC_POINTS = np.logspace(-4, 0, 41)
"""The false accept rates of a curve."""


class Pairs(NamedTuple):
    """The cosines of all pairs of images of one domain.

    Attributes:
      same: [I, m], those of each of I identities with itself, m pairs of each.
      different: [M], those of two identities, sorted.
    """

    same: np.ndarray
    different: np.ndarray


def pairs_of(embeddings: np.ndarray) -> Pairs:
    """All pairs of images.

    Args:
      embeddings: [I, n, C], n ≥ 2 images of each of I ≥ 2 identities. They need not have unit length.
    """
    num_identities, num_images, _ = embeddings.shape
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    unit = (embeddings / np.maximum(lengths, 1e-12)).reshape(num_identities * num_images, -1)
    cosine = unit @ unit.T
    first, second = np.triu_indices(num_images, 1)
    blocks = cosine.reshape(num_identities, num_images, num_identities, num_images)
    same = np.stack([blocks[identity, :, identity][first, second] for identity in range(num_identities)])
    owner = np.repeat(np.arange(num_identities), num_images)
    different = cosine[owner[:, None] < owner[None, :]]
    return Pairs(same, np.sort(different))


def threshold_at(pairs: Pairs, rate: float) -> float:
    """The smallest cosine that at most this share of the pairs of two identities exceeds."""
    allowed = int(np.floor(rate * len(pairs.different)))
    return float(pairs.different[len(pairs.different) - 1 - allowed]) if allowed < len(pairs.different) else -np.inf


def true_accept_rates(pairs: Pairs, threshold: float) -> np.ndarray:
    """[I, 1], for each identity the share of its pairs whose cosine exceeds the threshold."""
    return np.mean(pairs.same > threshold, axis=1, keepdims=True)


def balanced_accuracy(pairs: Pairs, threshold: float) -> float:
    """The mean of the share of accepted pairs of one identity and of rejected pairs of two."""
    return float((np.mean(pairs.same > threshold) + np.mean(pairs.different <= threshold)) / 2)


def best_threshold(pairs: Pairs) -> float:
    """The cosine, among those at the rates of a curve, with the largest balanced accuracy."""
    return max((threshold_at(pairs, rate) for rate in ROC_POINTS), key=lambda t: balanced_accuracy(pairs, t))


def tested(pairs: Pairs, threshold: float) -> dict[str, Any]:
    """What is reported of one domain.

    Args:
      pairs: of the domain.
      threshold: that of the balanced accuracy, chosen on other data.

    Returns:
      "metrics": the true accept rates at `FALSE_ACCEPT_RATES`, with 95 % intervals over identities, and the balanced
      accuracy; "roc": the true accept rate at each of `ROC_POINTS`.
    """
    rates = {
        f"tar_at_{rate:g}": mean_and_interval(true_accept_rates(pairs, threshold_at(pairs, rate)))
        for rate in FALSE_ACCEPT_RATES
    }
    roc = [float(true_accept_rates(pairs, threshold_at(pairs, rate)).mean()) for rate in ROC_POINTS]
    return {"metrics": rates | {"balanced_accuracy": balanced_accuracy(pairs, threshold)}, "roc": roc}
