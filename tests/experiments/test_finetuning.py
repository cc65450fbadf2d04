"""Fine-tunings against a loop by hand, and beam search against all translations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import decoding, finetuning, lexical, parallel_text
from maml_jax import losses, parallel
from maml_jax.models import (
    PAD,
    TASK_VECTORS,
    UNIVERSAL_VECTORS,
    Lexicon,
    Sentences,
    Translator,
    transformer_translator,
)
from maml_jax.types import Model


def small_translator():
    translator = transformer_translator(source_vocabulary=7, target_vocabulary=6, width=8, depth=1, heads=2)
    source = Sentences(jnp.array([[5, 6, 3], [4, 3, PAD]]))
    params = translator.model.init(jax.random.key(0), (source, jnp.ones((2, 4), jnp.int32)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return translator, tree.unflatten([x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]), source  # noqa: B905


@pytest.mark.slow
def test_a_beam_that_holds_everything_finds_the_most_probable_translation():
    translator, params, source = small_translator()
    length, vocabulary = 3, 6
    found = decoding.translations(translator, params, source, max_length=length, beam=vocabulary**length)
    greedy = decoding.translations(translator, params, source, max_length=length)
    apply = jax.jit(translator.model.apply)
    tokens = [t for t in range(vocabulary) if t != PAD]
    candidates = []
    for count in range(1, length + 1):
        for body in itertools.product([t for t in tokens if t != decoding.END], repeat=count - 1):
            candidates += [(*body, last) for last in (tokens if count == length else [decoding.END])]
    scores = np.zeros((len(candidates), 2))
    for number, candidate in enumerate(candidates):
        given = jnp.tile(jnp.array([decoding.BEGIN, *candidate[:-1]]), (2, 1))
        logits = np.asarray(apply(params, (source, given)), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = sum(log_p[:, place, token] for place, token in enumerate(candidate))
        scores[number] = total / len(candidate) ** decoding.LENGTH_POWER
    for row in range(2):
        best = [t for t in candidates[int(np.argmax(scores[:, row]))] if t != decoding.END]
        assert found[row].tolist() == best + [PAD] * (length - len(best))
    given = jnp.full((2, 1), decoding.BEGIN)
    for place in range(length):
        logits = apply(params, (source, given))[:, -1].at[:, PAD].set(-jnp.inf)
        given = jnp.concatenate([given, jnp.argmax(logits, -1)[:, None]], axis=1)
        alive = jnp.cumprod(given[:, 1:] != decoding.END, axis=1)
        np.testing.assert_array_equal(greedy[:, place], jnp.where(alive[:, place], given[:, -1], PAD))


def pools(rng, translator_source=7, target=6):
    sides = rng.integers(4, translator_source, (9, 3)), rng.integers(4, target, (9, 5))
    return parallel_text.Pairs(*(side.astype(np.int32) for side in sides))


def test_a_fine_tuning_is_the_loop_that_stops_at_the_best_dev_loss(x64):
    translator, params, _ = small_translator()
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    rng = np.random.default_rng(0)
    language = parallel_text.Language(pools(rng), pools(rng), pools(rng), (), None)
    (job,) = [jax.tree.map(lambda x: x[0], finetuning.jobs_of([language], (5,), 1, None))]
    how = finetuning.FineTuning(rate=0.05, steps=60, batch_size=4)
    tuned = finetuning.fine_tune_all(translator, how, params, [language], jax.tree.map(lambda x: x[None], job))

    def loss_of(params, pairs):
        inputs, targets = finetuning.as_batch(pairs, None)
        return losses.masked_cross_entropy(translator.model.apply(params, inputs), targets)

    rule = optax.adam(0.05)

    @jax.jit
    def step(params, state, batch):
        updates, state = rule.update(jax.grad(loss_of)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    loss_of_dev = jax.jit(lambda params: loss_of(params, language.dev))
    state, dev = rule.init(params), [float(loss_of_dev(params))]
    kept = [params]
    for key in jax.random.split(job.key, 3):
        for rows in job.order[jax.random.randint(key, (20, 4), 0, 5)]:
            batch = jax.tree.map(lambda x, rows=rows: x[rows], language.pool)
            params, state = step(params, state, batch)
        dev.append(float(loss_of_dev(params)))
        kept.append(params)
    np.testing.assert_allclose(tuned.losses[0], dev, rtol=1e-6)
    best = int(np.argmin(dev))
    assert 0 < best < 3
    assert tuned.step[0] == 20 * best
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, atol=1e-6), tuned.params, kept[best])


def test_every_job_has_its_own_language_vectors_and_pairs(x64):
    """Two languages of different lengths and numbers of sentences, with a lexical representation."""
    rng = np.random.default_rng(0)
    keys, tables = rng.normal(size=(6, 3)), rng.normal(size=(2, 7, 3))

    def pairs(count, length):
        found = pools(rng)
        rows = rng.integers(0, 9, count)
        source, target = found.source[rows].copy(), found.target[rows].copy()
        source[:, length:], target[:, length + 1 :] = PAD, PAD
        return parallel_text.Pairs(source, target)

    languages = [
        parallel_text.Language(pairs(9, 3), pairs(count, length), pairs(count, length), (), table)
        for count, length, table in ((4, 3, tables[0]), (7, 2, tables[1]))
    ]
    jobs = finetuning.jobs_of(languages, (4, 6), 2, keys)
    translator = transformer_translator(
        source_vocabulary=7, target_vocabulary=6, width=8, depth=1, heads=2, lexicon=Lexicon(keys)
    )
    inputs = Sentences(jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3, 3))), jnp.ones((1, 4), jnp.int32)
    params = translator.model.init(jax.random.key(0), inputs)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    apply = jax.jit(translator.model.apply)
    how = finetuning.FineTuning(rate=0.1, steps=20, batch_size=3)
    tuned = finetuning.fine_tune_all(translator, how, params, languages, jobs)
    for index in range(8):
        language = languages[index // 4]
        few = jax.tree.map(lambda x, i=index: x[jobs.order[i, : jobs.size[i]]], language.pool)
        np.testing.assert_array_equal(jobs.vectors[index], lexical.aligned(language.vectors, keys, *few))
        total = count = 0
        for row in range(len(language.dev.source)):
            source, target = language.dev.source[row], language.dev.target[row]
            outputs = apply(params, (Sentences(source[None], jobs.vectors[index][source][None]), target[None, :-1]))
            log_p = jax.nn.log_softmax(outputs[0])
            for place, token in enumerate(target[1:]):
                if token != PAD:
                    total, count = total - log_p[place, token], count + 1
        np.testing.assert_allclose(tuned.losses[index, 0], total / count, rtol=1e-6)
    np.testing.assert_array_equal(
        tuned.params["source"][UNIVERSAL_VECTORS], np.stack([params["source"][UNIVERSAL_VECTORS]] * 8)
    )
    assert np.all(np.any(tuned.params["source"][TASK_VECTORS][tuned.step > 0] != 0, axis=(1, 2)))
    found = finetuning.translate_all(translator, tuned.params, languages, jobs, max_length=4, beam=1)
    assert found.shape == (8, 7, 4)
    for index in range(8):
        test = languages[index // 4].test.source
        one = jax.tree.map(lambda x, i=index: x[i], tuned.params)
        alone = finetuning.translated(translator, one, test, jobs.vectors[index], max_length=4, beam=1)
        np.testing.assert_array_equal(found[index, : len(test)], alone)


def test_a_dev_loss_that_is_not_finite_is_never_the_best():
    translator, params, _ = small_translator()
    rng = np.random.default_rng(0)
    language = parallel_text.Language(pools(rng), pools(rng), pools(rng), (), None)
    jobs = finetuning.jobs_of([language], (5,), 1, None)
    how = finetuning.FineTuning(rate=1e38, steps=40, batch_size=4)
    tuned = finetuning.fine_tune_all(translator, how, params, [language], jobs)
    assert not np.isfinite(tuned.losses[0, 1:]).any()
    assert tuned.step[0] == 0
    assert tuned.loss[0] == tuned.losses[0, 0]


def test_a_smaller_subset_is_a_part_of_the_larger():
    rng = np.random.default_rng(1)
    language = parallel_text.Language(pools(rng), pools(rng), pools(rng), (), None)
    jobs = finetuning.jobs_of([language, language], (2, 6), 3, None)
    assert jobs.language.tolist() == [0] * 6 + [1] * 6
    assert jobs.size.tolist() == ([2] * 3 + [6] * 3) * 2
    np.testing.assert_array_equal(jobs.order[0], jobs.order[3])
    assert jobs.order.shape == (12, 6)
    assert len({tuple(order) for order in jobs.order.tolist()}) == 6  # three subsets of each of two languages


def test_jobs_that_are_divided_over_devices_are_the_same_ones(monkeypatch):
    # In place of a fine-tuning and of a translation what tells jobs, languages and sentences apart.
    monkeypatch.setattr(
        finetuning, "fine_tune", lambda _, how, params, pool, dev, job: params * (pool - dev)[job.language] + job.size
    )
    monkeypatch.setattr(finetuning, "translated", lambda _, params, source, vectors, **settings: params * source)
    pool, dev, test = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    jobs = finetuning.Job(np.array([0, 0, 1, 1]), None, np.arange(4.0, dtype=np.float32), None, None)
    for mesh in (None, parallel.task_mesh(jax.devices()[:2])):
        monkeypatch.setattr(finetuning, "mesh_of_any", lambda count, mesh=mesh: mesh)
        tuned = finetuning._program.__wrapped__(None, None, 4)((3.0, pool, dev), jobs)
        decode = finetuning._decoding_program.__wrapped__(None, 4, 5, 1)
        translations = decode(test, (np.asarray(tuned), jobs.language, None))
        expected = 3.0 * (pool - dev)[jobs.language] + jobs.size[:, None]
        np.testing.assert_allclose(tuned, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(translations, expected * test[jobs.language], rtol=1e-5, atol=1e-6)
        assert len(tuned.devices()) == len(translations.devices()) == (1 if mesh is None else 2)


def beam_search_by_hand(log_p, beam, length):
    """The tokens that are found, by the log-probabilities [V] after some tokens."""
    kept = [((), 0.0)]
    for _ in range(length):
        grown = [one for one in kept if one[0][-1:] == (decoding.END,)]
        for tokens, score in kept:
            if tokens[-1:] != (decoding.END,):
                grown += [((*tokens, t), score + x) for t, x in enumerate(log_p(tokens)) if t != PAD]
        kept = sorted(grown, key=lambda one: -one[1])[:beam]
    return max(kept, key=lambda one: one[1] / len(one[0]) ** decoding.LENGTH_POWER)[0]


@pytest.mark.parametrize("beam", [1, 3, 6**3])
def test_a_beam_search_is_that_of_a_loop(beam):
    vocabulary, length, count = 6, 4, 30
    table = np.random.default_rng(0).normal(scale=2.0, size=(count, vocabulary**length, vocabulary)).astype(np.float32)

    def step(params, memory, state, index, tokens):
        state = state * vocabulary + tokens  # all that has been written
        return state, params[memory, state]

    def start(params, sentences, max_length):
        return sentences.tokens[:, 0], jnp.zeros(len(sentences.tokens), jnp.int32)

    translator, source = Translator(None, start, step), Sentences(jnp.arange(count)[:, None])
    found = decoding.translations(translator, jnp.asarray(table), source, max_length=length, beam=beam)
    lengths = set()
    for row, log_p in enumerate(table - np.log(np.exp(table).sum(-1, keepdims=True))):

        def after(tokens, log_p=log_p):
            return log_p[functools.reduce(lambda state, token: state * vocabulary + token, tokens, decoding.BEGIN)]

        expected = [t for t in beam_search_by_hand(after, beam, length) if t != decoding.END]
        assert found[row].tolist() == expected + [PAD] * (length - len(expected))
        lengths.add(len(expected))
    assert len(lengths) > 1


def test_a_fine_tuning_draws_only_as_many_pairs_as_it_has():
    def apply(params, inputs):  # ignores its inputs
        return jnp.broadcast_to(params, (*inputs[1].shape, 6))

    rng, how = np.random.default_rng(0), finetuning.FineTuning(rate=0.1, steps=20, batch_size=3)
    pool, dev = pools(rng), finetuning.stacked([pools(rng)])
    job = finetuning.Job(jnp.int32(0), jnp.arange(9), jnp.int32(4), None, jax.random.key(0))
    tune = jax.jit(
        lambda pool: finetuning.fine_tune(Translator(Model(None, apply), None, None), how, jnp.zeros(6), pool, dev, job)
    )
    losses = []
    for first in (9, 4, 3):  # the first pair that is another
        target = np.full_like(pool.target, 4)
        target[first:] = 5
        losses.append(tune(finetuning.stacked([pool._replace(target=target)])).losses[1])
    assert losses[0] == losses[1] != losses[2]
