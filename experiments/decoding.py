"""Translations of a trained network: greedily, or by beam search."""

import jax
import jax.numpy as jnp

from maml_jax.models import PAD, Sentences, Translator
from maml_jax.types import ArrayTree

BEGIN, END = 2, 3
"""The tokens before a translation and after it."""
LENGTH_POWER = 0.6
"""The log-probability of a translation is divided by this power of its length before translations are compared."""


def translations(
    translator: Translator, params: ArrayTree, sentences: Sentences, *, max_length: int, beam: int = 1
) -> jax.Array:
    """The most probable translations that a beam search finds; with a beam of 1 the greedy ones.

    Args:
      translator: the network.
      params: its parameters.
      sentences: B sources.
      max_length: T, the most tokens of a translation.
      beam: W, how many beginnings of each translation are kept.

    Returns:
      int32 [B, T], without `BEGIN`, filled with `PAD` from `END` on.
    """
    count = len(sentences.tokens)
    wide = jax.tree.map(lambda x: jnp.repeat(x, beam, axis=0), sentences)
    memory, state = translator.start(params, wide, max_length)
    # All but one of the equal beginnings are impossible.
    score = jnp.full((count, beam), -jnp.inf).at[:, 0].set(0.0)
    written = jnp.full((count, beam, max_length), PAD, jnp.int32)
    last = jnp.full((count, beam), BEGIN, jnp.int32)

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        state, score, written, last, length = carry
        state, logits = translator.step(params, memory, state, index, last.reshape(-1))
        gain = jax.nn.log_softmax(logits).reshape(count, beam, -1)
        vocabulary = gain.shape[-1]
        is_pad = (jnp.arange(vocabulary) == PAD)[None, None]
        ended = ((last == END) | (last == PAD))[..., None]
        # What has ended goes on with only PAD, and nothing else does.
        gain = jnp.where(ended, jnp.where(is_pad, 0.0, -jnp.inf), jnp.where(is_pad, -jnp.inf, gain))
        score, place = jax.lax.top_k((score[..., None] + gain).reshape(count, -1), beam)
        parent, token = place // vocabulary, (place % vocabulary).astype(jnp.int32)
        if beam > 1:
            rows = (jnp.arange(count)[:, None] * beam + parent).reshape(-1)
            state = jax.tree.map(lambda x: x[rows], state)
        written = jnp.take_along_axis(written, parent[..., None], axis=1).at[:, :, index].set(token)
        length = jnp.take_along_axis(length, parent, axis=1) + (token != PAD)
        return (state, score, written, token, length), None

    start = (state, score, written, last, jnp.zeros((count, beam), jnp.int32))
    (_, score, written, _, length), _ = jax.lax.scan(step, start, jnp.arange(max_length))
    best = jnp.argmax(score / jnp.maximum(length, 1) ** LENGTH_POWER, axis=1)
    written = jnp.take_along_axis(written, best[:, None, None], axis=1)[:, 0]
    return jnp.where(written == END, PAD, written)
