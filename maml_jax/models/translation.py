"""Networks that read one sequence of tokens and write another: a transformer, and gated recurrent units with attention.

The vectors of the source tokens are looked up in a table, or they are the universal lexical representation, which
languages share (Gu, Hassan, Devlin and Li, 2018, Universal neural machine translation for extremely low resource
languages, https://arxiv.org/abs/1802.05368).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.models.from_flax import from_linen
from maml_jax.types import ArrayTree, Model, check_integer, check_positive

PAD = 0
"""The token that fills sequences up to one length."""


class Sentences(NamedTuple):
    """Sentences of a language, filled up with `PAD`.

    Attributes:
      tokens: integers [B, S].
      vectors: [B, S, Q], the fixed vectors of the tokens for a lexical representation; None without one. A network
        with a lexicon raises ValueError if they are missing or of another size.
    """

    tokens: jax.Array
    vectors: jax.Array | None = None


class Translator(NamedTuple):
    """A network that translates.

    Attributes:
      model: its inputs are a pair: `Sentences` of B sources, and the first tokens of their translations, integers
        [B, T]. Its outputs are the logits [B, T, V] of the token after each of these.
      start: `(params, sentences, max_length) -> (memory, state)`, leaves [B, ...]: what has been read, and the state
        before the first token.
      step: `(params, memory, state, index, tokens [B]) -> (state, logits [B, V])`, for the token after `tokens`, the
        ones with this index (a scalar), counted from 0 and below `max_length`; a larger one is not noticed.
    """

    model: Model
    start: Callable[[ArrayTree, Sentences, int], tuple[ArrayTree, ArrayTree]]
    step: Callable[[ArrayTree, ArrayTree, ArrayTree, jax.Array, jax.Array], tuple[ArrayTree, jax.Array]]


class Lexicon(NamedTuple):
    """The universal tokens of a lexical representation.

    Attributes:
      keys: [M, Q], a fixed vector of each.
      temperature: of the attention on them; 0.05 in the authors' code.
    """

    keys: np.ndarray
    temperature: float = 0.05


TASK_VECTORS = "task_vectors"
"""The name of the parameters that a lexical representation adds to each token. They are a task's own: 0 in the
beginning of a task, and not meta-learned."""
UNIVERSAL_VECTORS = "universal_vectors"
"""The name of the vectors of universal tokens, which no task adapts."""


class _SourceVectors(nn.Module):
    """[B, S, D], the vectors of the source tokens.

    With a lexicon, the vector of token w is Σ_m softmax_m(k_m·A q_w / τ) u_m + Δ_w, as in MetaNMT (Gu, Wang, Chen, Li
    and Cho, 2018). The keys k are fixed, as in the authors' code. A token whose vector q_w is 0 has only Δ_w.
    """

    vocabulary: int
    width: int
    lexicon: Lexicon | None

    @nn.compact
    def __call__(self, sentences: Sentences) -> jax.Array:
        scale = nn.initializers.normal(self.width**-0.5)
        if self.lexicon is None:
            return nn.Embed(self.vocabulary, self.width, embedding_init=scale, name="tokens")(sentences.tokens)
        keys = jnp.asarray(self.lexicon.keys)
        count, size = keys.shape
        if sentences.vectors is None or sentences.vectors.shape != (*sentences.tokens.shape, size):
            raise ValueError(
                f"with a lexicon the sentences need vectors {(*sentences.tokens.shape, size)} of their tokens, got "
                f"{None if sentences.vectors is None else sentences.vectors.shape}"
            )
        universal = self.param(UNIVERSAL_VECTORS, scale, (count, self.width))
        own = self.param(TASK_VECTORS, nn.initializers.zeros, (self.vocabulary, self.width))
        align = self.param("alignment", lambda _: jnp.eye(size))
        scores = (sentences.vectors @ align.T) @ keys.T / self.lexicon.temperature
        known = jnp.any(sentences.vectors != 0, axis=-1, keepdims=True)
        shared = jnp.where(known, jax.nn.softmax(scores) @ universal, 0.0)
        return shared + jnp.asarray(own)[sentences.tokens]


class _Attention(nn.Module):
    """Attention with several heads, whose keys and values can be kept."""

    heads: int
    width: int

    def setup(self) -> None:
        shape = self.heads, self.width // self.heads
        self.query, self.key, self.value = (nn.DenseGeneral(shape) for _ in range(3))
        self.out = nn.DenseGeneral(self.width, axis=(-2, -1))

    def project(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, L, heads, D / heads] of inputs [B, L, D]."""
        return self.key(inputs), self.value(inputs)

    def __call__(self, inputs: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D]; `mask` [B or 1, 1, T or 1, L] says which keys are seen."""
        return self.out(nn.dot_product_attention(self.query(inputs), keys, values, mask=mask))


class _FullyConnected(nn.Module):
    width: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return nn.Dense(self.width)(nn.relu(nn.Dense(4 * self.width)(inputs)))


class _EncoderLayer(nn.Module):
    heads: int
    width: int

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        attention, normed = _Attention(self.heads, self.width, name="attention"), nn.LayerNorm()(hidden)
        hidden += attention(normed, *attention.project(normed), mask)
        return hidden + _FullyConnected(self.width, name="mlp")(nn.LayerNorm()(hidden))


class _DecoderLayer(nn.Module):
    heads: int
    width: int

    def setup(self) -> None:
        self.own, self.other = (_Attention(self.heads, self.width) for _ in range(2))
        self.norms = [nn.LayerNorm() for _ in range(3)]
        self.mlp = _FullyConnected(self.width)

    def __call__(
        self, hidden: jax.Array, cache: tuple | None, index: jax.Array | int, memory: tuple, memory_mask: jax.Array
    ) -> tuple[jax.Array, tuple]:
        """[B, T, D] of T tokens from the index on, and the cache with their keys and values."""
        normed = self.norms[0](hidden)
        kept = self.own.project(normed)
        if cache is not None:
            kept = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, index, 1) for old, new in zip(cache, kept, strict=True)
            )
        queries = index + jnp.arange(hidden.shape[1])
        seen = jnp.arange(kept[0].shape[1])[None, :] <= queries[:, None]
        hidden += self.own(normed, *kept, seen[None, None])
        hidden += self.other(self.norms[1](hidden), *memory, memory_mask)
        return hidden + self.mlp(self.norms[2](hidden)), kept


def _positions(index: jax.Array | int, length: int, width: int) -> jax.Array:
    """[1, L, D], sines and cosines of the positions from the index on (Vaswani et al., 2017, section 3.5)."""
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2) / width)
    angles = (index + jnp.arange(length))[:, None] * rates[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[None]


class _Transformer(nn.Module):
    source_vocabulary: int
    target_vocabulary: int
    width: int
    depth: int
    heads: int
    lexicon: Lexicon | None

    def setup(self) -> None:
        self.source = _SourceVectors(self.source_vocabulary, self.width, self.lexicon)
        scale = nn.initializers.normal(self.width**-0.5)
        self.target = nn.Embed(self.target_vocabulary, self.width, embedding_init=scale)
        self.encoder = [_EncoderLayer(self.heads, self.width) for _ in range(self.depth)]
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(), nn.LayerNorm()
        self.decoder = [_DecoderLayer(self.heads, self.width) for _ in range(self.depth)]

    def encode(self, sentences: Sentences) -> tuple[list[tuple], jax.Array]:
        """The keys and values of each decoder layer, and which of them are seen."""
        mask = (sentences.tokens != PAD)[:, None, None, :]
        hidden = self.source(sentences) * self.width**0.5 + _positions(0, sentences.tokens.shape[1], self.width)
        for layer in self.encoder:
            hidden = layer(hidden, mask)
        hidden = self.encoder_norm(hidden)
        return [layer.other.project(hidden) for layer in self.decoder], mask

    def decode(
        self, tokens: jax.Array, caches: list[tuple] | None, index: jax.Array | int, memories: list[tuple], mask: Any
    ) -> tuple[list[tuple], jax.Array]:
        """The caches, and logits [B, T, V], after T tokens from the index on."""
        hidden = self.target(tokens) * self.width**0.5 + _positions(index, tokens.shape[1], self.width)
        kept = []
        for number, layer in enumerate(self.decoder):
            cache = None if caches is None else caches[number]
            hidden, own = layer(hidden, cache, index, memories[number], mask)
            kept.append(own)
        return kept, self.target.attend(self.decoder_norm(hidden))

    def __call__(self, inputs: tuple[Sentences, jax.Array]) -> jax.Array:
        sentences, tokens = inputs
        return self.decode(tokens, None, 0, *self.encode(sentences))[1]


def transformer_translator(
    *,
    source_vocabulary: int,
    target_vocabulary: int,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    lexicon: Lexicon | None = None,
) -> Translator:
    """A transformer with normalisation before each part, and one table for target tokens and logits.

    Args:
      source_vocabulary: the number of source tokens, `PAD` included.
      target_vocabulary: V, the number of target tokens, `PAD` included.
      width: D, even and a multiple of `heads`.
      depth: the layers of the encoder, and those of the decoder.
      heads: of each attention.
      lexicon: the universal tokens of a lexical representation; by default source tokens have a table.

    Returns:
      A `Translator`.

    Raises:
      ValueError: if a number does not fit.

    References:
      Vaswani et al., 2017. https://arxiv.org/abs/1706.03762
    """
    for name, value in {"width": width, "depth": depth, "heads": heads}.items():
        check_integer(name, value, at_least=1)
    _check_vocabularies(source_vocabulary, target_vocabulary, lexicon)
    if width % 2 or width % heads:
        raise ValueError(f"width={width} must be even and a multiple of heads={heads}")
    module = _Transformer(source_vocabulary, target_vocabulary, width, depth, heads, lexicon)

    def start(params: ArrayTree, sentences: Sentences, max_length: int) -> tuple[ArrayTree, ArrayTree]:
        empty = jnp.zeros((len(sentences.tokens), max_length, heads, width // heads))
        return module.apply({"params": params}, sentences, method=module.encode), [(empty, empty)] * depth

    def step(params: ArrayTree, memory: ArrayTree, caches: ArrayTree, index: jax.Array, tokens: jax.Array) -> tuple:
        arguments = tokens[:, None], caches, index, *memory
        caches, logits = module.apply({"params": params}, *arguments, method=module.decode)
        return caches, logits[:, 0]

    return Translator(from_linen(module), start, step)


class _GRUs(nn.Module):
    source_vocabulary: int
    target_vocabulary: int
    width: int
    lexicon: Lexicon | None

    def setup(self) -> None:
        self.source = _SourceVectors(self.source_vocabulary, self.width, self.lexicon)
        scale = nn.initializers.normal(self.width**-0.5)
        self.target = nn.Embed(self.target_vocabulary, self.width, embedding_init=scale)
        self.forwards, self.backwards = (nn.RNN(nn.GRUCell(self.width)) for _ in range(2))
        self.memory, self.first, self.join = (nn.Dense(self.width) for _ in range(3))
        self.cell = nn.GRUCell(self.width)

    def encode(self, sentences: Sentences) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The first state [B, D], the memory [B, S, D], and which of it is seen [B, S]."""
        seen = sentences.tokens != PAD
        vectors, lengths = self.source(sentences) * self.width**0.5, jnp.sum(seen, axis=-1)
        start = {"initial_carry": jnp.zeros_like(vectors[:, 0]), "seq_lengths": lengths}
        both = self.forwards(vectors, **start), self.backwards(vectors, **start, reverse=True, keep_order=True)
        memory = self.memory(jnp.concatenate(both, axis=-1))
        weights = seen / jnp.maximum(lengths, 1)[:, None]
        mean = jnp.sum(memory * weights[..., None], axis=1)
        return jnp.tanh(self.first(mean)), memory, seen

    def advance(
        self, state: jax.Array, tokens: jax.Array, memory: jax.Array, seen: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The next state [B, D] and the logits [B, V] after one token of each sentence."""
        state, _ = self.cell(state, self.target(tokens) * self.width**0.5)
        scores = jnp.einsum("bd,bsd->bs", state, memory) / self.width**0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        context = jnp.einsum("bs,bsd->bd", weights, memory)
        joined = jnp.tanh(self.join(jnp.concatenate([state, context], axis=-1)))
        return state, self.target.attend(joined)

    def __call__(self, inputs: tuple[Sentences, jax.Array]) -> jax.Array:
        sentences, tokens = inputs
        state, memory, seen = self.encode(sentences)

        def step(module: "_GRUs", state: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            return module.advance(state, tokens, memory, seen)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        return scan(self, state, tokens)[1]


def gru_translator(
    *, source_vocabulary: int, target_vocabulary: int, width: int = 128, lexicon: Lexicon | None = None
) -> Translator:
    """An encoder that reads in both directions, and a decoder with attention on what it has read.

    The attention is the scaled product of the decoder's state with the memory, after the state has seen the token.

    Args:
      source_vocabulary: the number of source tokens, `PAD` included.
      target_vocabulary: V, the number of target tokens, `PAD` included.
      width: the units of every part.
      lexicon: the universal tokens of a lexical representation; by default source tokens have a table.

    Returns:
      A `Translator`.

    Raises:
      ValueError: if a number does not fit.

    References:
      Luong et al., 2015, section 3.1, global attention. https://arxiv.org/abs/1508.04025
    """
    check_integer("width", width, at_least=1)
    _check_vocabularies(source_vocabulary, target_vocabulary, lexicon)
    module = _GRUs(source_vocabulary, target_vocabulary, width, lexicon)

    def start(params: ArrayTree, sentences: Sentences, max_length: int) -> tuple[ArrayTree, ArrayTree]:
        state, *memory = module.apply({"params": params}, sentences, method=module.encode)
        return memory, state

    def step(params: ArrayTree, memory: ArrayTree, state: ArrayTree, index: jax.Array, tokens: jax.Array) -> tuple:
        return module.apply({"params": params}, state, tokens, *memory, method=module.advance)

    return Translator(from_linen(module), start, step)


def _check_vocabularies(source: int, target: int, lexicon: Lexicon | None) -> None:
    for name, value in {"source_vocabulary": source, "target_vocabulary": target}.items():
        check_integer(name, value, at_least=2)
    if lexicon is not None:
        check_positive("the temperature of the lexicon", lexicon.temperature)
        if np.ndim(lexicon.keys) != 2:
            raise ValueError(f"the keys of the lexicon must be [M, Q], got shape {np.shape(lexicon.keys)}")
