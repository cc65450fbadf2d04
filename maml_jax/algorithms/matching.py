"""Matching networks: attend to the support examples by the cosine of their embeddings.

Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra, 2016, Matching networks for one shot learning.
https://arxiv.org/abs/1606.04080
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from maml_jax.inner.embedding import embed, embedded_like, unit_length
from maml_jax.inner.learner import feed_forward
from maml_jax.inner.recurrent import LSTMState, init_lstm, lstm_step
from maml_jax.types import (
    ArrayTree,
    LossFn,
    MetaLearner,
    Model,
    check_classes,
    check_integer,
    check_model,
    check_positive,
)


def matching_networks(
    embedding: Model, loss_fn: LossFn, *, way: int, scale: float | None = 10.0, num_reads: int = 0
) -> MetaLearner:
    """Builds matching networks: P(n | x) = Σ_s a(x, x_s) [y_s = n], with a the softmax of cosines over the support set.

    The outputs are log P(n | x). Embeddings do not depend on N, so parameters that were trained with one `way` can be
    tested with another.

    The paper takes the softmax of the plain cosines. A cosine is at most 1, so the attention stays nearly uniform:
    with five support examples and cosines in [0, 1], as after a ReLU, no probability exceeds e / (e + 4) = 0.40. A
    learned factor removes this bound, and learns faster.

    With `num_reads`, full context embeddings replace the plain ones. A support embedding becomes the sum of itself
    and of the outputs of a forward and a backward LSTM over the support set. A query embedding is read out by an LSTM
    with attention over these, `num_reads` times. The order of the support set then matters. `adapt` draws it from its
    key, and takes the order as given without one.

    Args:
      embedding: a network from inputs [S, ...] to embeddings [S, D].
      loss_fn: `(outputs, targets) -> scalar` on the query set; `losses.cross_entropy` is the paper's.
      way: N, the number of classes. Every class has at least one support example; if labels are traced this is not
        checked, and a class without one has the output −∞.
      scale: the initial value of the learned factor of the cosines; None for plain cosines.
      num_reads: R ≥ 0, the steps of the LSTM that reads a query; 0 for plain embeddings.

    Returns:
      A `MetaLearner` with meta-parameters {"embedding": θ, "log_scale": scalar, "context": ...}, the last two only if
      they are used. Outputs are log-probabilities [M, N].

    Raises:
      ValueError: if a number is out of its range, or `embedding` not a `Model`; when it is used, if embeddings are no
        [S, D] or labels do not fit.

    References:
      Vinyals et al., 2016, equation 1, and appendix A for full context embeddings.
    """
    check_model(embedding)
    way = check_integer("way", way, at_least=1)
    Matching(scale, num_reads)  # it checks them

    def init(key, inputs):
        embedding_key, context_key = jax.random.split(key)
        params = {"embedding": embedding.init(embedding_key, inputs)}
        if scale is not None:
            params["log_scale"] = jnp.zeros(()) + math.log(scale)
        if num_reads:
            like = embedded_like(embedding, params["embedding"], inputs)
            size, dtype = like.shape[1], like.dtype
            forward, backward, query = jax.random.split(context_key, 3)
            params["context"] = {
                "forward": init_lstm(forward, size, size, dtype),
                "backward": init_lstm(backward, size, size, dtype),
                # Beside the embedding, its other input is what it read in the step before.
                "query": init_lstm(query, 2 * size, size, dtype),
            }
        return params

    def read(meta_params, support, key):
        check_classes(way, support.targets)
        embed_key = order_key = None
        if key is not None:
            embed_key, order_key = jax.random.split(key)
        embedded, targets = embed(embedding, meta_params["embedding"], support.inputs, embed_key), support.targets
        if num_reads:
            if order_key is not None:
                order = jax.random.permutation(order_key, len(targets))
                embedded, targets = embedded[order], jnp.asarray(targets)[order]
            embedded = _in_context(meta_params["context"], embedded)
        return {"params": meta_params, "support": embedded, "one_hot": jax.nn.one_hot(targets, way, dtype=bool)}

    def predict(task_params, inputs, key):
        params, support = task_params["params"], task_params["support"]
        queries = embed(embedding, params["embedding"], inputs, key)
        if num_reads:
            queries = _read_out(params["context"]["query"], queries, support, num_reads)
        cosines = unit_length(queries) @ unit_length(support).T
        factor = 1.0 if scale is None else jnp.exp(params["log_scale"])
        log_attention = jax.nn.log_softmax(factor * cosines)
        # In logarithms, because the probability of a class may be too small for a float.
        return jax.nn.logsumexp(log_attention[:, :, None], axis=1, where=task_params["one_hot"][None])

    return feed_forward(init, read, predict, loss_fn)


def _in_context(params: ArrayTree, embedded: jax.Array) -> jax.Array:
    """Support embeddings [S, D] after a forward and a backward LSTM over the set: g = →h + ←h + g'."""

    def outputs(lstm, sequence, reverse):
        def step(state, inputs):
            state = lstm_step(lstm, state, inputs)
            return state, state.hidden

        zeros = jnp.zeros_like(sequence[0])
        return jax.lax.scan(step, LSTMState(zeros, zeros), sequence, reverse=reverse)[1]

    return embedded + outputs(params["forward"], embedded, False) + outputs(params["backward"], embedded, True)


def _read_out(lstm: ArrayTree, queries: jax.Array, support: jax.Array, num_reads: int) -> jax.Array:
    """Query embeddings [M, D] after an LSTM that attends to the support embeddings [S, D].

    Equations 3 to 6 of the paper: r = Σ softmax(h · g) g, ĥ, c = LSTM(f', [h, r], c), h = ĥ + f'. As h is 0 before the
    first step, that reads the mean of g.
    """

    def step(state, _):
        read = jax.nn.softmax(state.hidden @ support.T) @ support
        state = lstm_step(lstm, state, jnp.concatenate([queries, read], -1))
        return LSTMState(state.hidden + queries, state.cell), None

    zeros = jnp.zeros_like(queries)
    state, _ = jax.lax.scan(step, LSTMState(zeros, zeros), length=num_reads)
    return state.hidden


@dataclasses.dataclass(frozen=True)
class Matching:
    """Hyperparameters of matching networks."""

    scale: float | None = 10.0
    """Initial value of the learned factor of the cosines; None for the plain cosines of the paper."""
    num_reads: int = 0
    """Steps of the LSTM that reads a query in the context of the support set; 0 for plain embeddings."""

    def __post_init__(self):
        """Raises ValueError for a factor that is not positive, or a negative number of steps."""
        if self.scale is not None:
            check_positive("scale", self.scale)
        check_integer("num_reads", self.num_reads, at_least=0)
