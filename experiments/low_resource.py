"""The test of a translator on languages with few sentences: fine-tuned on draws of several sizes, scored by BLEU."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import bleu, finetuning, intervals, parallel_text
from experiments.finetuning import FineTuning
from experiments.parallel_text import Text
from maml_jax.models import Translator
from maml_jax.types import ArrayTree

NUM_EXAMPLES = 3
"""Sentences of each language whose translations are shown."""


class Protocol(NamedTuple):
    """How a translator is tested.

    Attributes:
      languages: their names.
      sizes: the numbers of sentence pairs, in increasing order.
      num_subsets: draws of each size.
      how: the fine-tuning.
      max_length: the most subwords of a translation.
    """

    languages: tuple[str, ...]
    sizes: tuple[int, ...]
    num_subsets: int
    how: FineTuning
    max_length: int


def evaluate(
    protocol: Protocol, text: Text, translator: Translator, params: ArrayTree, *, beam: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """A row for every language and number of pairs, and some sentences before and after the fine-tuning.

    Args:
      protocol: the settings.
      text: with the languages.
      translator: the network.
      params: the meta-parameters.
      beam: all fine-tunings translate greedily; with a beam above 1 the first of each size does so by beam search too.

    Returns:
      Rows with "language", "pairs", "nll" (dev loss in nats per token), "bleu" (in %), lists with a number for each
      draw, "resampled_bleu" (see `bleu.resampled`, the mean over draws), "bleu_beam" (of the first draw) and
      "stopped_at" (steps). Without a lexical representation there is a row of 0 pairs, of the network as it is. And
      examples with "language", "source", "reference", "before" and "after".
    """
    languages = [text.languages[name] for name in protocol.languages]
    jobs = finetuning.jobs_of(languages, protocol.sizes, protocol.num_subsets, text.keys)
    tuned = finetuning.fine_tune_all(translator, protocol.how, params, languages, jobs)

    def translate_all(params: ArrayTree, jobs: finetuning.Job, beam: int) -> list[list[str]]:
        found = finetuning.translate_all(translator, params, languages, jobs, max_length=protocol.max_length, beam=beam)
        counts = [len(languages[place].references) for place in jobs.language]
        return [
            parallel_text.decode(text.subwords.target, tokens[:count])
            for tokens, count in zip(found, counts, strict=True)
        ]

    def every(step: int, tree: ArrayTree) -> ArrayTree:
        return jax.tree.map(lambda x: x[::step], tree)

    num_sizes, per_size = len(protocol.sizes), protocol.num_subsets
    untuned = (
        jax.tree.map(lambda x: np.stack([np.asarray(x)] * len(languages)), params),
        every(num_sizes * per_size, jobs),
    )
    firsts = every(per_size, tuned.params), every(per_size, jobs)
    before, after = translate_all(*untuned, 1), translate_all(tuned.params, jobs, 1)
    # A lexical representation is aligned by pairs, so it has no zero shots.
    before_wide = translate_all(*untuned, beam) if beam > 1 and text.keys is None else None
    after_wide = translate_all(*firsts, beam) if beam > 1 else None
    rows, examples = [], []
    for place, (name, language) in enumerate(zip(protocol.languages, languages, strict=True)):
        score = functools.partial(_scores, language.references)
        if text.keys is None:
            zero_shot = tuned.losses[place * num_sizes * per_size, :1].tolist()
            wide = None if before_wide is None else before_wide[place]
            rows.append({"language": name, "pairs": 0, "nll": zero_shot} | score([before[place]], wide))
        for number, size in enumerate(protocol.sizes, place * num_sizes):
            part = slice(number * per_size, (number + 1) * per_size)
            found = {"nll": tuned.loss[part].tolist(), "stopped_at": tuned.step[part].tolist()}
            wide = None if after_wide is None else after_wide[number]
            rows.append({"language": name, "pairs": size} | found | score(after[part], wide))
        sources = parallel_text.decode(text.subwords.source, language.test.source[:NUM_EXAMPLES])
        largest = (place + 1) * num_sizes - 1
        shown = zip(sources, language.references, before[place], after[largest * per_size], strict=False)
        names = "source", "reference", "before", "after"
        examples += [{"language": name} | dict(zip(names, lines, strict=True)) for lines in shown]
    return rows, examples


def _scores(references: tuple[str, ...], greedy: list[list[str]], wide: list[str] | None) -> dict[str, list[float]]:
    """BLEU of the greedy translations of each fine-tuning, its mean on resamples, and BLEU of those by beam search."""
    counts = [bleu.counts(lines, references) for lines in greedy]
    found = {
        "bleu": [bleu.score(one.sum(0)) for one in counts],
        "resampled_bleu": np.mean([bleu.resampled(one) for one in counts], axis=0).round(3).tolist(),
    }
    return found | ({} if wide is None else {"bleu_beam": [bleu.score(bleu.counts(wide, references).sum(0))]})


def over_draws(values: list[list[float]]) -> dict[str, list[float | None]]:
    """The mean over rows of the same draws, averaged over these, with its interval; without one for a single draw."""
    each = np.mean(values, axis=0)
    return intervals.mean_and_interval(each) if len(each) > 1 else {"mean": each.tolist(), "ci95": [None]}
