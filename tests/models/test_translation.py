"""Networks that translate: against numpy, one token at a time, and what no token may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import Batch, Episode, inner, losses
from maml_jax.models import (
    PAD,
    TASK_VECTORS,
    UNIVERSAL_VECTORS,
    Lexicon,
    Sentences,
    gru_translator,
    transformer_translator,
)
from maml_jax.models.translation import _SourceVectors

SIZES = {"source_vocabulary": 11, "target_vocabulary": 13, "width": 8}
rng = np.random.default_rng(0)
KEYS = rng.normal(size=(7, 5))
TABLE = rng.normal(size=(11, 5))
TABLE[:4] = 0.0
SOURCE = np.array([[5, 6, 7, 8, 3, PAD], [9, 10, 3, PAD, PAD, PAD], [5, 4, 4, 6, 7, 3]])
TARGET = np.array([[2, 5, 6, 7, 8], [2, 9, 3, PAD, PAD], [2, 4, 12, 11, 3]])


def translators(lexical, depth=2):
    lexicon = Lexicon(KEYS, 0.5) if lexical else None
    return {
        "transformer": transformer_translator(depth=depth, heads=2, lexicon=lexicon, **SIZES),
        "gru": gru_translator(lexicon=lexicon, **SIZES),
    }


def sentences(source, lexical):
    return Sentences(jnp.asarray(source), jnp.asarray(TABLE[source]) if lexical else None)


def noisy(translator, lexical, seed=0):
    """Parameters none of which is at its start, so that nothing is 0 or 1 by chance."""
    params = jax.jit(translator.model.init)(jax.random.key(seed), (sentences(SOURCE, lexical), jnp.asarray(TARGET)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


networks = pytest.mark.parametrize("name", ["transformer", "gru"])
with_and_without_a_lexicon = pytest.mark.parametrize(("name", "lexical"), [("transformer", True), ("gru", False)])


def test_parameters_may_be_constants_of_numpy():
    translator = translators(lexical=True)["gru"]
    params = jax.tree.map(np.asarray, noisy(translator, lexical=True))
    logits = jax.eval_shape(lambda inputs: translator.model.apply(params, inputs), (sentences(SOURCE, True), TARGET))
    assert logits.shape[:2] == TARGET.shape


@with_and_without_a_lexicon
def test_one_token_at_a_time_gives_the_logits_of_all_together(name, lexical, x64):
    translator = translators(lexical)[name]
    params = noisy(translator, lexical)
    inputs = sentences(SOURCE, lexical)
    together = jax.jit(translator.model.apply)(params, (inputs, jnp.asarray(TARGET)))
    memory, state = jax.jit(translator.start, static_argnums=2)(params, inputs, 7)
    step = jax.jit(translator.step)
    for index in range(TARGET.shape[1]):
        state, logits = step(params, memory, state, jnp.int32(index), jnp.asarray(TARGET[:, index]))
        np.testing.assert_allclose(logits, together[:, index], atol=1e-12)


@with_and_without_a_lexicon
def test_a_token_sees_no_later_one_and_no_filling(name, lexical, x64):
    translator = translators(lexical)[name]
    params = noisy(translator, lexical)
    apply = jax.jit(functools.partial(translator.model.apply, params))
    expected = apply((sentences(SOURCE, lexical), jnp.asarray(TARGET)))
    later = TARGET.copy()
    later[:, 3:] = 10
    found = apply((sentences(SOURCE, lexical), jnp.asarray(later)))
    np.testing.assert_array_equal(found[:, :3], expected[:, :3])
    assert np.all(np.any(found[:, 3:] != expected[:, 3:], axis=-1))
    longer = np.pad(SOURCE, ((0, 0), (0, 3)), constant_values=PAD)
    found = apply((sentences(longer, lexical), jnp.asarray(TARGET)))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    alone = apply((sentences(SOURCE[1:2, :3], lexical), jnp.asarray(TARGET[1:2])))
    np.testing.assert_allclose(alone[0], expected[1], atol=1e-12)


@networks
def test_every_source_token_that_is_there_is_seen(name, x64):
    translator = translators(False)[name]
    params = noisy(translator, False)
    apply = jax.jit(functools.partial(translator.model.apply, params))
    expected = apply((sentences(SOURCE, False), jnp.asarray(TARGET)))
    for place in range(5):
        other = SOURCE.copy()
        other[0, place] = 10
        found = apply((sentences(other, False), jnp.asarray(TARGET)))
        assert np.any(np.abs(found[0, 0] - expected[0, 0]) > 1e-6)
        np.testing.assert_array_equal(found[1:], expected[1:])


def test_the_vectors_of_a_lexical_representation_are_those_of_the_equations(x64):
    translator = translators(True)["gru"]
    params = noisy(translator, True)
    source = jax.tree.map(np.asarray, params["source"])
    expected = np.zeros((*SOURCE.shape, 8))
    for row, place in np.ndindex(*SOURCE.shape):
        token = SOURCE[row, place]
        if np.any(TABLE[token]):
            scores = np.array([key @ source["alignment"] @ TABLE[token] / 0.5 for key in KEYS])
            weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            for weight, vector in zip(weights, source[UNIVERSAL_VECTORS], strict=True):
                expected[row, place] += weight * vector
        expected[row, place] += source[TASK_VECTORS][token]
    module = _SourceVectors(11, 8, Lexicon(KEYS, 0.5))
    found = module.apply({"params": params["source"]}, sentences(SOURCE, True))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_own_vectors_of_a_task_start_at_zero():
    params = translators(True)["transformer"].model.init(
        jax.random.key(0), (sentences(SOURCE, True), jnp.asarray(TARGET))
    )
    assert not np.any(params["source"][TASK_VECTORS])
    np.testing.assert_array_equal(params["source"]["alignment"], np.eye(5))


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attention(p, queries, others, allowed):
    """Two heads of four; `allowed` [T, L]."""
    out = np.zeros_like(queries)
    for head in range(2):
        q, k, v = (
            x @ p[part]["kernel"][:, head] + p[part]["bias"][head]
            for part, x in (("query", queries), ("key", others), ("value", others))
        )
        scores = np.where(allowed, q @ k.T / 2.0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out += weights / weights.sum(-1, keepdims=True) @ v @ p["out"]["kernel"][head]
    return out + p["out"]["bias"]


def fully_connected(p, x):
    hidden = np.maximum(x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"], 0.0)
    return hidden @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]


def test_the_transformer_is_that_of_the_equations(x64):
    translator = transformer_translator(depth=1, heads=2, **SIZES)
    params = noisy(translator, False)
    p = jax.tree.map(np.asarray, params)
    angles = np.arange(6)[:, None] / 10_000.0 ** (np.arange(0, 8, 2) / 8)
    positions = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    source, target = SOURCE[2], TARGET[2]  # without filling
    x = p["source"]["tokens"]["embedding"][source] * np.sqrt(8) + positions
    layer = p["encoder_0"]
    normed = layer_norm(x, layer["LayerNorm_0"])
    x = x + attention(layer["attention"], normed, normed, np.ones((6, 6), bool))
    x = x + fully_connected(layer["mlp"], layer_norm(x, layer["LayerNorm_1"]))
    memory = layer_norm(x, p["encoder_norm"])
    y = p["target"]["embedding"][target] * np.sqrt(8) + positions[:5]
    layer = p["decoder_0"]
    normed = layer_norm(y, layer["norms_0"])
    y = y + attention(layer["own"], normed, normed, np.tril(np.ones((5, 5), bool)))
    y = y + attention(layer["other"], layer_norm(y, layer["norms_1"]), memory, np.ones((5, 6), bool))
    y = y + fully_connected(layer["mlp"], layer_norm(y, layer["norms_2"]))
    expected = layer_norm(y, p["decoder_norm"]) @ p["target"]["embedding"].T
    found = translator.model.apply(params, (sentences(SOURCE, False), jnp.asarray(TARGET)))
    np.testing.assert_allclose(found[2], expected, atol=1e-10)


def affine(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def gru_states(p, inputs, state):
    """The states after each input: a reset and an update gate, and the reset gate within the candidate."""
    states = []
    for x in inputs:
        reset, update = (sigmoid(affine(p["i" + gate], x) + affine(p["h" + gate], state)) for gate in "rz")
        candidate = np.tanh(affine(p["in"], x) + reset * affine(p["hn"], state))
        state = (1 - update) * candidate + update * state
        states.append(state)
    return np.stack(states)


def test_the_gru_translator_is_that_of_the_equations(x64):
    translator = gru_translator(**SIZES)
    params = noisy(translator, False)
    p = jax.tree.map(np.asarray, params)
    vectors = p["source"]["tokens"]["embedding"][SOURCE[1, :3]] * np.sqrt(8)  # with filling after it
    forwards = gru_states(p["forwards"]["cell"], vectors, np.zeros(8))
    backwards = gru_states(p["backwards"]["cell"], vectors[::-1], np.zeros(8))[::-1]
    memory = affine(p["memory"], np.concatenate([forwards, backwards], 1))
    first = np.tanh(affine(p["first"], memory.mean(0)))
    expected = []
    for state in gru_states(p["cell"], p["target"]["embedding"][TARGET[1]] * np.sqrt(8), first):
        weights = np.exp(memory @ state / np.sqrt(8))
        joined = np.concatenate([state, weights / weights.sum() @ memory])
        expected.append(np.tanh(affine(p["join"], joined)) @ p["target"]["embedding"].T)
    found = translator.model.apply(params, (sentences(SOURCE, False), jnp.asarray(TARGET)))
    np.testing.assert_allclose(found[1], expected, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "lexical"), [("transformer", True), pytest.param("gru", False, marks=pytest.mark.slow)]
)
def test_exact_meta_gradients_agree_and_pass_finite_differences(name, lexical, x64):
    translator = translators(lexical, depth=1)[name]
    params = noisy(translator, lexical)
    batch = Batch((sentences(SOURCE, lexical), jnp.asarray(TARGET)), jnp.asarray(np.roll(TARGET, -1, axis=1)))
    support = jax.tree.map(lambda x: jnp.stack([x[:2], x[1:]]), batch)
    episode = Episode(support, batch)

    def learner(inner_grad):
        return inner.gradient_based(
            translator.model,
            losses.masked_cross_entropy,
            rule=lambda _: optax.adam(1e-2, eps_root=1e-4),
            num_inner_steps=2,
            inner_grad=inner_grad,
            data_per_step=True,
            where=lambda path: not path.endswith(UNIVERSAL_VECTORS),
        )

    def objective(inner_grad):
        return jax.jit(jax.value_and_grad(lambda params: learner(inner_grad).objective(params, episode)[0]))

    exact = objective(inner.mixed_mode)
    mixed = exact(params)[1]
    if name == "gru":  # the other program takes long to compile
        reverse = objective(jax.value_and_grad)(params)[1]
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), mixed, reverse)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    ends = [exact(jax.tree.map(lambda x, d, s=sign: x + s * 1e-7 * d, params, direction))[0] for sign in (1, -1)]
    slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (mixed, direction)), strict=True))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 7}, "width=7 must be even and a multiple of heads=2"),
        ({"heads": 3}, "width=8 must be even and a multiple of heads=3"),
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"source_vocabulary": 1}, "source_vocabulary must be an integer of at least 2, got 1"),
        ({"lexicon": Lexicon(np.ones(3))}, r"the keys of the lexicon must be \[M, Q\], got shape \(3,\)"),
        ({"lexicon": Lexicon(KEYS, 0.0)}, "the temperature of the lexicon=0.0 must be a positive number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        transformer_translator(**SIZES | {"heads": 2} | settings)


def test_vectors_that_do_not_fit_the_lexicon_are_refused():
    translator = transformer_translator(**SIZES, lexicon=Lexicon(KEYS))
    size = KEYS.shape[1]
    for vectors, shown in ((None, "None"), (np.zeros((*SOURCE.shape, size + 1)), rf"\(3, 6, {size + 1}\)")):
        with pytest.raises(ValueError, match=rf"need vectors \(3, 6, {size}\) of their tokens, got {shown}"):
            translator.model.init(jax.random.key(0), (Sentences(SOURCE, vectors), jnp.asarray(TARGET)))


def test_every_place_of_the_memory_has_read_the_whole_sentence(x64):
    translator = translators(False)["gru"]
    params = noisy(translator, False)
    read = jax.jit(lambda source: translator.start(params, Sentences(source), 7)[0][0])
    before = read(SOURCE)
    for place in range(6):
        other = SOURCE.copy()
        other[2, place] = 10
        assert np.all(np.any(np.abs(read(other)[2] - before[2]) > 1e-6, axis=-1))
