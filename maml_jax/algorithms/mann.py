"""MANN: a recurrent network reads examples and delayed labels, and keeps them in an external memory.

At every step the network sees an example together with the label of the example before, and predicts the label of
this one. It learns to bind what it sees to the label that comes a step later. `lstm` is the same without the memory.

Santoro, Bartunov, Botvinick, Wierstra and Lillicrap, 2016, One-shot learning with memory-augmented neural networks.
https://arxiv.org/abs/1605.06065
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.inner.embedding import embed, embedding_size
from maml_jax.inner.learner import observed_once
from maml_jax.inner.recurrent import LSTMState, init_lstm, lstm_step, split_inputs
from maml_jax.losses import accuracy
from maml_jax.types import (
    ArrayTree,
    LossFn,
    MetaLearner,
    Model,
    PRNGKey,
    all_examples,
    check_classes,
    check_integer,
    check_model,
    holds_for,
)


class SequenceInfo(NamedTuple):
    """What happened along the sequence of one episode.

    Attributes:
      support_loss: [0], empty, because nothing iterates.
      instance_accuracy: [n] with n = (S + M) // N, in [0, 1]. Entry i is the accuracy on the example that is number
        i + 1 of its class in the sequence, a mean over the classes. The first is a guess; before the second the
        network has seen one label of the class.
    """

    support_loss: jax.Array
    instance_accuracy: jax.Array


class MemoryState(NamedTuple):
    """The state of MANN between two steps.

    Attributes:
      controller: the state of the LSTM, [H] each.
      memory: M, [num_slots, slot_size].
      read_vectors: what the heads read in the last step, [num_reads * slot_size].
      read_weights: w^r, where they read it, [num_reads, num_slots].
      usage: w^u, [num_slots].
    """

    controller: LSTMState
    memory: jax.Array
    read_vectors: jax.Array
    read_weights: jax.Array
    usage: jax.Array


class _Cell(NamedTuple):
    """A recurrent network: init(key, num_inputs, way), start(params), step(params, state, added).

    `added` [4H] is what the example and the label before add to the gates of the controller; see `split_inputs`.
    """

    init: Callable[[PRNGKey, int, int], dict]
    start: Callable[[ArrayTree], ArrayTree]
    step: Callable[[ArrayTree, ArrayTree, jax.Array], tuple[ArrayTree, jax.Array]]


def mann(
    embedding: Model,
    loss_fn: LossFn,
    *,
    way: int,
    num_units: int = 200,
    num_slots: int = 128,
    slot_size: int = 40,
    num_reads: int = 4,
    usage_decay: float = 0.95,
) -> MetaLearner:
    """Builds a memory-augmented neural network with least recently used access.

    Step t sees the embedding of x_t and the one-hot y_{t-1}, zeros at the first step. The controller h_t is an LSTM
    whose input also holds the read vectors of the step before. From h_t, every head j has a key k_j, a write vector
    a_j, both with a tanh, and a gate g_j; all are affine. With w^lu_j the one-hot of the j-th least used slot:

        w^w_j  = σ(g_j) w^r_j + (1 - σ(g_j)) w^lu_j            from w^r and w^u of the step before
        M     <- (M, with zeros in the least used slot) + Σ_j w^w_j a_jᵀ
        w^r_j <- softmax(cos(k_j, M)),   r_j = w^r_jᵀ M
        w^u   <- usage_decay w^u + Σ_j (w^r_j + w^w_j)

    The outputs are affine in h_t and the vectors r_j. The memory starts at 1e-6, the state of the LSTM at zero, and
    w^r and w^u at slot 0. No derivative passes through the choice of the least used slots.

    `adapt` runs the support set; its order is drawn from the key, and without one it is the given order. The state
    then contains all labels but the last, which is the label input of the queries. Every query takes one step of its
    own from the same state. `objective` shuffles support and query set into one sequence of S + M steps, as the paper
    does, and is the loss of all steps. It depends on the key of the episode, so it needs one.

    The paper leaves several points open. This follows a public implementation, github.com/tristandeleu/ntm-one-shot:

    - The paper writes the key (equation 8). Here there is a write vector beside the key.
    - In the paper w^lu marks all of the `num_reads` least used slots (equation 6). Here each head has one of them.
    - In the paper the gate is one scalar. Here there is one for every head, computed from the controller.
    - The write comes before the read of the same step, and 1e-6 is added to the product of the squared lengths in the
      cosine, which then is zero for an empty slot. There is no key strength.

    Two things are different there. The weights of the LSTM are drawn for its three inputs apart, and its forget gate
    has no bias at the start; here that bias is 1.

    Args:
      embedding: a network from inputs [S, ...] to [S, D]. That of the paper flattens the pixels and has no parameters:
        `init` gives {}.
      loss_fn: `(outputs, targets) -> scalar`, the mean loss of a set, such as `losses.cross_entropy`. In the objective
        it gets all steps of the sequence, outputs [S + M, N] and targets [S + M].
      way: N, the number of classes. The parameters depend on it. If labels are traced, their values are not checked.
      num_units: H, the size of the state of the LSTM.
      num_slots: rows of the memory, at least `num_reads`.
      slot_size: columns of the memory.
      num_reads: heads, which read and write.
      usage_decay: γ in [0, 1], the share of the usage that is left after a step.

    Returns:
      A `MetaLearner`. Its meta-parameters are {"embedding", "controller", "key", "write", "gate", "output"} and its
      task parameters {"params": meta-parameters, "state": `MemoryState`, "label": one-hot [N] of the last label}.
      `adapt` gives an `InnerInfo` with an empty `support_loss`, [0], and observes once. The info of `objective` is a
      `SequenceInfo`.

    Raises:
      ValueError: if a number is out of its range or `embedding` not a `Model`; when it is used, if embeddings are no
        [S, D] or labels do not fit. The objective raises it if the episode has no key.

    References:
      Santoro et al., 2016, section 2 for the task, equations 2 to 4 for reading, 5 to 8 for writing.
    """
    ExternalMemory(num_units, num_slots, slot_size, num_reads, usage_decay)  # it checks them

    def init(key, num_inputs, way):
        controller, read_key, write, gate, output = jax.random.split(key, 5)
        read_size = num_reads * slot_size
        return {
            "controller": init_lstm(controller, num_inputs + read_size, num_units),
            "key": _init_affine(read_key, (num_reads, num_units, slot_size)),
            "write": _init_affine(write, (num_reads, num_units, slot_size)),
            "gate": _init_affine(gate, (num_reads, num_units, 1)),
            "output": _init_affine(output, (num_units + read_size, way)),
        }

    def start(params):
        dtype = params["controller"]["kernel"].dtype
        first_slot = jnp.zeros(num_slots, dtype).at[0].set(1.0)
        return MemoryState(
            controller=_zero_state(num_units, dtype),
            memory=jnp.full((num_slots, slot_size), 1e-6, dtype),
            read_vectors=jnp.zeros(num_reads * slot_size, dtype),
            read_weights=jnp.tile(first_slot, (num_reads, 1)),
            usage=first_slot,
        )

    def step(params, state, added):
        controller = lstm_step(params["controller"], state.controller, state.read_vectors, added)
        read_key = jnp.tanh(_per_head(params["key"], controller.hidden))  # [num_reads, slot_size]
        write = jnp.tanh(_per_head(params["write"], controller.hidden))
        gate = jax.nn.sigmoid(_per_head(params["gate"], controller.hidden))  # [num_reads, 1]

        least_used = _least_used(state.usage, num_reads).astype(gate.dtype)  # [num_reads, num_slots]
        write_weights = gate * state.read_weights + (1.0 - gate) * least_used
        memory = state.memory * (1.0 - least_used[0])[:, None] + write_weights.T @ write

        read_weights = jax.nn.softmax(_cosines(read_key, memory), -1)
        read_vectors = (read_weights @ memory).reshape(-1)
        # It only chooses slots, and so has no derivative.
        usage = jax.lax.stop_gradient(usage_decay * state.usage + jnp.sum(read_weights + write_weights, 0))
        outputs = _affine(params["output"], jnp.concatenate([controller.hidden, read_vectors]))
        return MemoryState(controller, memory, read_vectors, read_weights, usage), outputs

    return _sequence_learner(embedding, loss_fn, way, _Cell(init, start, step))


def lstm(embedding: Model, loss_fn: LossFn, *, way: int, num_units: int = 200) -> MetaLearner:
    """Builds an LSTM that learns from a sequence of examples and delayed labels, without an external memory.

    It is the baseline of MANN and differs from it in the network only. The outputs are affine in the state of the
    LSTM.

    Args:
      embedding: a network from inputs [S, ...] to [S, D], as for `mann`.
      loss_fn: `(outputs, targets) -> scalar`, the mean loss of a set, as for `mann`.
      way: N, the number of classes. The parameters depend on it. If labels are traced, their values are not checked.
      num_units: H, the size of the state.

    Returns:
      A `MetaLearner` as that of `mann`, with meta-parameters {"embedding", "controller", "output"} and an `LSTMState`
      as "state".

    Raises:
      ValueError: as `mann`.

    References:
      Santoro et al., 2016, section 4 and table 1; Hochreiter, Younger and Conwell, 2001, Learning to learn using
      gradient descent.
    """
    RecurrentUnits(num_units)  # it checks them

    def init(key, num_inputs, way):
        controller, output = jax.random.split(key)
        return {
            "controller": init_lstm(controller, num_inputs, num_units),
            "output": _init_affine(output, (num_units, way)),
        }

    def start(params):
        return _zero_state(num_units, params["controller"]["kernel"].dtype)

    def step(params, state, added):
        state = lstm_step(params["controller"], state, None, added)
        return state, _affine(params["output"], state.hidden)

    return _sequence_learner(embedding, loss_fn, way, _Cell(init, start, step))


@dataclasses.dataclass(frozen=True)
class ExternalMemory:
    """Hyperparameters of MANN."""

    num_units: int = 200
    """Size of the state of the LSTM that controls the memory."""
    num_slots: int = 128
    """Rows of the memory."""
    slot_size: int = 40
    """Columns of the memory."""
    num_reads: int = 4
    """Heads, each of which reads the memory and writes to it once in a step."""
    usage_decay: float = 0.95
    """Share of the usage of a slot that is left after a step; the least used slots are written to."""

    def __post_init__(self):
        """Raises ValueError for a number out of its range."""
        for name in ("num_units", "num_slots", "slot_size", "num_reads"):
            check_integer(name, getattr(self, name), at_least=1)
        if self.num_slots < self.num_reads:
            raise ValueError(
                f"num_slots={self.num_slots} is less than num_reads={self.num_reads}; every head writes to a slot of "
                "its own"
            )
        if not holds_for(self.usage_decay, lambda x: (x >= 0) & (x <= 1)):
            raise ValueError(f"usage_decay={self.usage_decay} must be a number from 0 to 1")


@dataclasses.dataclass(frozen=True)
class RecurrentUnits:
    """Hyperparameters of the LSTM that learns from a sequence."""

    num_units: int = 200
    """Size of the state of the LSTM."""

    def __post_init__(self):
        """Raises ValueError for a number out of its range."""
        check_integer("num_units", self.num_units, at_least=1)


def _sequence_learner(embedding: Model, loss_fn: LossFn, way: int, cell: _Cell) -> MetaLearner:
    """A learner that reads examples one after another, each with the label of the one before."""
    check_model(embedding)
    way = check_integer("way", way, at_least=1)

    def init(key, inputs):
        embedding_key, cell_key = jax.random.split(key)
        params = embedding.init(embedding_key, inputs)
        num_features = embedding_size(embedding, params, inputs)
        return {"embedding": params, **cell.init(cell_key, num_features + way, way)}

    def embedded(params, inputs, key=None):
        return embed(embedding, params["embedding"], inputs, key).astype(params["controller"]["kernel"].dtype)

    def split(params, inputs):
        """The parameters without the part of the controller's kernel for `inputs` [L, I], and its product with them."""
        controller, added = split_inputs(params["controller"], inputs)
        return params | {"controller": controller}, added

    def run(params, inputs, targets, order_key, embedding_key):
        """The state after the last step, its label [N], and the outputs [L, N] and targets [L] in their order."""
        features = embedded(params, inputs, embedding_key)
        if order_key is not None:
            order = jax.random.permutation(order_key, len(targets))
            features, targets = features[order], jnp.asarray(targets)[order]
        labels = jax.nn.one_hot(targets, way, dtype=features.dtype)
        label_before = jnp.concatenate([jnp.zeros_like(labels[:1]), labels[:-1]])
        rest, added = split(params, jnp.concatenate([features, label_before], -1))
        state, outputs = jax.lax.scan(lambda state, x: cell.step(rest, state, x), cell.start(params), added)
        return state, labels[-1], outputs, targets

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        check_classes(way, support.targets)
        order_key, embedding_key = (None, None) if key is None else jax.random.split(key)
        state, label, _, _ = run(meta_params, support.inputs, support.targets, order_key, embedding_key)
        task_params = {"params": meta_params, "state": state, "label": label}
        return task_params, observed_once(task_params, observe_fn)

    def predict(task_params, inputs):
        params, state, label = (task_params[name] for name in ("params", "state", "label"))
        features = embedded(params, inputs)
        labels = jnp.broadcast_to(label, (len(features), way))
        rest, added = split(params, jnp.concatenate([features, labels], -1))
        return jax.vmap(lambda x: cell.step(rest, state, x)[1])(added)

    def objective(meta_params, episode):
        if episode.key is None:
            raise ValueError(
                "the order of the sequence is drawn from the key of the episode, which is None; set it with "
                "episode._replace(key=jax.random.key(...)), a different one for every episode"
            )
        check_classes(way, episode.support.targets)
        both = all_examples(episode)
        check_classes(way, both.targets, "the episode")
        order_key, embedding_key = jax.random.split(episode.key)
        _, _, outputs, targets = run(meta_params, both.inputs, both.targets, order_key, embedding_key)
        return loss_fn(outputs, targets), SequenceInfo(jnp.zeros(0), _instance_accuracy(outputs, targets, way))

    return MetaLearner(init, adapt, predict, objective)


def _least_used(usage: jax.Array, number: int) -> jax.Array:
    """One-hot rows [number, num_slots], the least used slot first; the first of equal ones."""
    rows = []
    for _ in range(number):  # faster than a sort, because there are few
        rows.append(jnp.arange(len(usage)) == jnp.argmin(usage))
        usage = jnp.where(rows[-1], jnp.inf, usage)
    return jnp.stack(rows)


def _instance_accuracy(outputs: jax.Array, targets: jax.Array, way: int) -> jax.Array:
    """Accuracy [L // N] on the 1st, 2nd, ... showing of a class, from outputs [L, N] and targets [L]."""
    is_class = jax.nn.one_hot(targets, way, dtype=int)
    number = jnp.sum(jnp.cumsum(is_class, 0) * is_class, 1) - 1  # [L], how often the class was shown before
    is_number = number[None] == jnp.arange(len(targets) // way)[:, None]
    is_right = jax.vmap(accuracy)(outputs, targets)
    # There are N of each number if the classes have the same size, and at least one in any case.
    return jnp.sum(jnp.where(is_number, is_right[None], 0.0), 1) / jnp.sum(is_number, 1)


def _zero_state(num_units: int, dtype: jnp.dtype) -> LSTMState:
    return LSTMState(jnp.zeros(num_units, dtype), jnp.zeros(num_units, dtype))


def _init_affine(key: PRNGKey, shape: tuple[int, ...]) -> dict:
    """Glorot uniform weights [..., I, O] and zero biases [..., O]; leading axes are heads, drawn apart."""
    initializer = jax.nn.initializers.glorot_uniform(batch_axis=tuple(range(len(shape) - 2)))
    return {"kernel": initializer(key, shape), "bias": jnp.zeros(shape[:-2] + shape[-1:])}


def _affine(params: ArrayTree, inputs: jax.Array) -> jax.Array:
    return inputs @ params["kernel"] + params["bias"]


def _per_head(params: ArrayTree, inputs: jax.Array) -> jax.Array:
    """An affine function of inputs [I] for every head, as [num_reads, O]."""
    return jnp.einsum("i,rio->ro", inputs, params["kernel"]) + params["bias"]


def _cosines(keys: jax.Array, memory: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Cosines [num_reads, num_slots] between keys and slots; that with a slot of zeros is zero."""
    squared = jnp.sum(jnp.square(keys), -1)[:, None] * jnp.sum(jnp.square(memory), -1)[None]
    return keys @ memory.T * jax.lax.rsqrt(squared + epsilon)
