"""BLEU of whole test sets, and of resampled ones, by sacrebleu."""

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU

NUM_RESAMPLES = 300
"""Test sets that a bootstrap draws. They are the same for every result, so that differences are paired."""
_METRIC = BLEU(lowercase=True)
_OF_SENTENCE = BLEU(lowercase=True, effective_order=True)
_ORDERS = 4


def signature() -> str:
    """What BLEU depends on, as sacrebleu writes it."""
    _METRIC.corpus_score(["a"], [["a"]])
    return str(_METRIC.get_signature())


def counts(translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[N, 10], of each sentence the n-grams that are right, those that there are, and both lengths.

    Raises:
      ValueError: if there are not as many translations as references.
    """
    rows = []
    for translation, reference in zip(translations, references, strict=True):
        found = _OF_SENTENCE.sentence_score(translation, [reference])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, np.int64)


def score(total: np.ndarray) -> float:
    """BLEU in % of the sum [10] of `counts`."""
    numbers = [int(number) for number in total]
    right, there, (system, reference) = numbers[:_ORDERS], numbers[_ORDERS : 2 * _ORDERS], numbers[2 * _ORDERS :]
    return float(BLEU.compute_bleu(right, there, system, reference, smooth_method="exp").score)


def resampled(found: np.ndarray) -> np.ndarray:
    """[`NUM_RESAMPLES`], BLEU of test sets whose sentences are drawn with replacement (Koehn, 2004).

    Args:
      found: [N, 10], from `counts`.
    """
    number = len(found)
    weights = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES)
    return np.array([score(total) for total in weights @ found])
