"""Translation of a language of one's own: a trained network is fine-tuned on sentence pairs first."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments import finetuning, lexical, parallel_text
from experiments.finetuning import FineTuning
from experiments.parallel_text import Subwords
from experiments.runs import console
from maml_jax.models import Translator
from maml_jax.types import ArrayTree

LEAST_PAIRS = 10
"""A fine-tuning needs so many pairs; a tenth of them stops it."""


class Network(NamedTuple):
    """A trained network that translates, with what it reads and writes.

    Attributes:
      subwords: of both sides.
      translator: the network.
      params: its parameters.
      keys: [M, Q], the vectors of the English subwords for a lexical representation; None without.
      length: S and T, the subwords of a sentence are fewer.
      vectors: [V, Q], the vectors of the source subwords of the present language; None before it is known, and without
        a lexical representation.
    """

    subwords: Subwords
    translator: Translator
    params: ArrayTree
    keys: np.ndarray | None
    length: int
    vectors: np.ndarray | None = None


def adapted(
    network: Network, source: Sequence[str], target: Sequence[str], how: FineTuning, *, vocabulary: int, seed: int
) -> Network:
    """The network after a fine-tuning on sentence pairs.

    Args:
      network: the network.
      source: sentences of a language.
      target: their translations.
      how: the settings.
      vocabulary: V, the number of source subwords.
      seed: which pairs stop the fine-tuning.

    Raises:
      ValueError: if there are too few pairs that the network can read, or a lexical representation finds no two
        subwords that occur together more often than by chance.
    """
    pairs = parallel_text.pairs_of(network.subwords, source, target, network.length, cut=False)
    count, most = len(pairs.source), network.length - 1
    if count < len(source):
        console.print(f"{len(source) - count} of {len(source)} pairs are longer than {most} subwords and left out")
    if count < LEAST_PAIRS:
        raise ValueError(
            f"there are {count} pairs of at most {most} subwords; a fine-tuning needs at least {LEAST_PAIRS}"
        )
    order, num_dev = np.random.default_rng(seed).permutation(count), count // LEAST_PAIRS
    dev, few = (jax.tree.map(lambda x, rows=rows: x[rows], pairs) for rows in (order[:num_dev], order[num_dev:]))
    own = None
    if network.keys is not None:
        encoded = parallel_text.encode(network.subwords.source, source)
        own = lexical.word_vectors(encoded, vocabulary, network.keys.shape[1])
    language = parallel_text.Language(few, dev, dev, (), own)
    jobs = finetuning.jobs_of([language], (len(few.source),), 1, network.keys)
    tuned = finetuning.fine_tune_all(network.translator, how, network.params, [language], jobs)
    console.print(
        f"fine-tuned on {len(few.source)} pairs for {tuned.step[0]} steps: loss on {num_dev} others "
        f"{tuned.losses[0, 0]:.3f} before, {tuned.loss[0]:.3f} after, nats a token"
    )
    params, vectors = jax.tree.map(lambda x: x[0], (tuned.params, jobs.vectors))
    return network._replace(params=params, vectors=vectors)


def check_sentences(network: Network, sentences: Sequence[str]) -> None:
    """Raises ValueError if there is no sentence, or one is empty or too long for the network."""
    if not sentences or not all(line.strip() for line in sentences):
        raise ValueError(
            '--text holds no words; give one or more sentences, each in quotes: --text "um homem" "um cão"'
        )
    most = network.length - 1
    for line, tokens in zip(sentences, parallel_text.encode(network.subwords.source, sentences), strict=True):
        if len(tokens) > most:
            raise ValueError(
                f"the sentence {line[:40]!r}... of --text has {len(tokens)} subwords and the network reads at most "
                f"{most}; divide it"
            )


def translations(network: Network, sentences: Sequence[str], *, beam: int) -> list[str]:
    """The translations of sentences by beam search.

    Raises:
      ValueError: if there is no sentence, or one is empty or too long; or if the network has a lexical representation
        and no vectors of the language.
    """
    check_sentences(network, sentences)
    if network.keys is not None and network.vectors is None:
        raise ValueError("a run with --lexical knows a language by its pairs; give some by --pairs")
    nothing = [""] * len(sentences)
    source = parallel_text.pairs_of(network.subwords, sentences, nothing, network.length, cut=True).source
    found = finetuning.translated(
        network.translator, network.params, source, network.vectors, max_length=network.length, beam=beam
    )
    return parallel_text.decode(network.subwords.target, found)
