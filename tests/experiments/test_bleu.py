"""BLEU against that of sacrebleu."""

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from experiments import bleu


def test_bleu_is_that_of_sacrebleu():
    references = ["A man in a red shirt is walking .", "two dogs play in the snow .", "a child"]
    found = ["a man in a blue shirt is walking", "Dogs play in snow .", ""]
    counts = bleu.counts(found, references)
    metric = BLEU(lowercase=True)
    assert bleu.score(counts.sum(0)) == pytest.approx(metric.corpus_score(found, [references]).score)
    resampled = bleu.resampled(counts)
    chosen = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), size=bleu.NUM_RESAMPLES)
    for number in (0, 17):
        rows = np.repeat(np.arange(3), chosen[number])
        drawn = [[lines[row] for row in rows] for lines in (found, references)]
        assert resampled[number] == pytest.approx(metric.corpus_score(drawn[0], [drawn[1]]).score)
    assert "case:lc" in bleu.signature()
    with pytest.raises(ValueError, match="zip"):
        bleu.counts(found[:2], references)
