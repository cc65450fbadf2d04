"""Fine-tunings on few sentences, each stopped where the loss on other sentences is least."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import decoding, lexical
from experiments.devices import mesh_of_any
from experiments.parallel_text import Language, Pairs
from maml_jax import inner, losses, parallel
from maml_jax.models import PAD, UNIVERSAL_VECTORS, Sentences, Translator
from maml_jax.types import ArrayTree, Batch, select

BATCH = 128
"""Sentences whose loss is computed together."""
EVERY = 20
"""Steps of a fine-tuning between looks at the dev pairs."""


class Job(NamedTuple):
    """One fine-tuning, or several with leading axes.

    Attributes:
      language: int32, its place among the languages.
      order: int32 [n], the pairs of the pool that may be used, n the largest number of any job.
      size: int32, how many of them are.
      vectors: [V, Q], the aligned vectors of the source tokens; None without a lexical representation.
      key: the mini-batches.
    """

    language: jax.Array
    order: jax.Array
    size: jax.Array
    vectors: jax.Array | None
    key: jax.Array


class FineTuning(NamedTuple):
    """How a fine-tuning is done.

    Attributes:
      rate: of Adam.
      steps: at most, a multiple of `EVERY`.
      batch_size: pairs of a step.
    """

    rate: float = 5e-4
    steps: int = 200
    batch_size: int = 32


class Tuned(NamedTuple):
    """What a fine-tuning gives.

    Attributes:
      params: with the least dev loss.
      step: their step, 0 for the start.
      loss: theirs on the dev pairs, in nats per token.
      losses: [steps / EVERY + 1], the dev loss at each look, in nats per token.
    """

    params: ArrayTree
    step: jax.Array
    loss: jax.Array
    losses: jax.Array


def stacked(pairs: list[Pairs]) -> Pairs:
    """The pairs of several languages, [L, n, ...]; shorter ones are filled with empty sentences."""
    count = max(len(one.source) for one in pairs)

    def fill(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, count - len(array)), (0, 0)), constant_values=PAD)

    return Pairs(*(np.stack([fill(array) for array in arrays]) for arrays in zip(*pairs, strict=True)))


def as_batch(pairs: Pairs, vectors: jax.Array | None) -> Batch:
    """Inputs and targets of a translator for pairs [..., B]; the source tokens have `vectors` [..., B, S, Q]."""
    return Batch((Sentences(pairs.source, vectors), pairs.target[..., :-1]), pairs.target[..., 1:])


def vectors_of(tokens: jax.Array, vectors: jax.Array | None) -> jax.Array | None:
    """The rows [..., Q] of a table [V, Q] for tokens [...]; None without a table."""
    return None if vectors is None else vectors[tokens]


def jobs_of(languages: list[Language], sizes: tuple[int, ...], num_subsets: int, keys: np.ndarray | None) -> Job:
    """A job for each language, size and subset, leaves [L · sizes · subsets, ...] in this order.

    A smaller subset is a part of the larger one of the same number. The subsets depend on the place of a language and
    on its pool, so they are the same in all runs with the same text and the same languages.

    Args:
      languages: each with at least as many pairs in its pool as the largest size.
      sizes: the numbers of sentences.
      num_subsets: of each size.
      keys: [M, Q], the vectors of English subwords for a lexical representation; None without.
    """
    jobs, largest = [], max(sizes)
    for place, language in enumerate(languages):
        for size in sizes:
            for subset in range(num_subsets):
                order = np.random.default_rng((place, subset)).permutation(len(language.pool.source))[:largest]
                few = Pairs(*(array[order[:size]] for array in language.pool))
                vectors = None if keys is None else lexical.aligned(language.vectors, keys, *few)
                jobs.append((np.int32(place), order.astype(np.int32), np.int32(size), vectors))
    stacked_jobs = jax.tree.map(lambda *leaves: np.stack(leaves), *jobs)
    return Job(*stacked_jobs, jax.random.split(jax.random.key(0), len(jobs)))


def adapts(name: str) -> bool:
    """Whether a parameter adapts to a language: all but the vectors of universal tokens do."""
    return not name.endswith(UNIVERSAL_VECTORS)


def dev_loss(translator: Translator, params: ArrayTree, pairs: Pairs, vectors: jax.Array | None) -> jax.Array:
    """The mean loss of a token of pairs [n, ...], in nats."""

    def of_one(pair: Pairs) -> tuple[jax.Array, jax.Array]:
        inputs, targets = as_batch(*jax.tree.map(lambda x: x[None], (pair, vectors_of(pair.source, vectors))))
        count = jnp.sum(targets != PAD)
        return losses.masked_cross_entropy(translator.model.apply(params, inputs), targets, ignored=PAD) * count, count

    totals, counts = jax.lax.map(of_one, pairs, batch_size=min(BATCH, len(pairs.source)))
    return jnp.sum(totals) / jnp.sum(counts)


def fine_tune(translator: Translator, how: FineTuning, params: ArrayTree, pool: Pairs, dev: Pairs, job: Job) -> Tuned:
    """Fine-tunes all parameters, but for the vectors of universal tokens, on the pairs of one job.

    Args:
      translator: the network.
      how: the settings.
      params: the meta-parameters.
      pool: of all languages, [L, n, ...].
      dev: of all languages, [L, m, ...].
      job: of one language.
    """
    pool, dev = jax.tree.map(lambda x: x[job.language], (pool, dev))
    rule = optax.adam(how.rate)

    def loss_fn(params, _, batch):
        inputs, targets = batch
        return losses.masked_cross_entropy(translator.model.apply(params, inputs), targets, ignored=PAD)

    def round_of(carry, key):
        params, opt_state, best, least, best_step, step = carry
        shape = EVERY, how.batch_size
        chosen = job.order[jax.random.randint(key, shape, 0, job.size)]
        drawn = jax.tree.map(lambda x: x[chosen], pool)
        batches = as_batch(drawn, vectors_of(drawn.source, job.vectors))
        params, info = inner.inner_loop(
            loss_fn, rule, params, None, num_steps=EVERY, per_step=batches, opt_state=opt_state, where=adapts
        )
        loss, step = dev_loss(translator, params, dev, job.vectors), step + EVERY
        better = loss < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        best_step = jnp.where(better, step, best_step)
        return (params, info.opt_state, best, jnp.where(better, loss, least), best_step, step), loss

    zero_shot = dev_loss(translator, params, dev, job.vectors)
    opt_state = rule.init(select(params, adapts)[0])
    first = (params, opt_state, params, zero_shot, jnp.int32(0), jnp.int32(0))
    keys = jax.random.split(job.key, how.steps // EVERY)
    (_, _, best, least, best_step, _), found = jax.lax.scan(round_of, first, keys)
    return Tuned(best, best_step, least, jnp.concatenate([zero_shot[None], found]))


def fine_tune_all(
    translator: Translator, how: FineTuning, params: ArrayTree, languages: list[Language], jobs: Job
) -> Tuned:
    """The fine-tunings of several jobs, leaves [J, ...] of numpy, divided over the devices."""
    params = jax.tree.map(np.asarray, params)  # wherever they were
    pool, dev = (stacked([getattr(language, part) for language in languages]) for part in ("pool", "dev"))
    return jax.tree.map(np.asarray, _program(translator, how, len(jobs.size))((params, pool, dev), jobs))


@functools.lru_cache(maxsize=8)
def _program(translator: Translator, how: FineTuning, num_jobs: int):
    def run(data, jobs):
        return jax.lax.map(lambda job: fine_tune(translator, how, *data, job), jobs)

    mesh = mesh_of_any(num_jobs)
    return jax.jit(run if mesh is None else parallel.each_task(run, mesh))


def translate_all(
    translator: Translator, tuned: ArrayTree, languages: list[Language], jobs: Job, *, max_length: int, beam: int
) -> np.ndarray:
    """int32 [J, n, T], the translations of the test sentences of each job by its parameters [J, ...]."""
    test = stacked([language.test for language in languages])
    program = _decoding_program(translator, len(jobs.size), max_length, beam)
    return np.asarray(program(test.source, (tuned, jobs.language, jobs.vectors)))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_length", "beam"))
def translated(
    translator: Translator,
    params: ArrayTree,
    source: jax.Array,
    vectors: jax.Array | None,
    *,
    max_length: int,
    beam: int,
) -> jax.Array:
    """int32 [n, T], the translations of sentences [n, S] whose subwords have the vectors [V, Q], or none."""
    sentences = Sentences(source, vectors_of(source, vectors))
    return decoding.translations(translator, params, sentences, max_length=max_length, beam=beam)


@functools.lru_cache(maxsize=8)
def _decoding_program(translator: Translator, num_jobs: int, max_length: int, beam: int):
    def of_job(sources, job):
        params, language, vectors = job
        return translated(translator, params, sources[language], vectors, max_length=max_length, beam=beam)

    def run(sources, jobs):
        return jax.lax.map(lambda job: of_job(sources, job), jobs)

    mesh = mesh_of_any(num_jobs)
    return jax.jit(run if mesh is None else parallel.each_task(run, mesh))
