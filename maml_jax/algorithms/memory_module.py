"""The memory module: a memory of embeddings and labels, in which every example looks for its nearest neighbours.

An example whose nearest neighbour has its label is averaged into it, and any other gets a slot of its own. The
embedding learns to be nearer to a right key than to a wrong one.

Kaiser, Nachum, Roy and Bengio, 2017, Learning to remember rare events. https://arxiv.org/abs/1703.03129
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.inner.embedding import embed, embedding_size, unit_length
from maml_jax.inner.learner import observed_once
from maml_jax.types import (
    InnerInfo,
    MetaLearner,
    Model,
    PRNGKey,
    all_examples,
    check_classes,
    check_integer,
    check_model,
    check_positive,
)

NO_KEY = -2.0
"""The output for a class without a key; a cosine is at least -1."""


def memory_module(
    embedding: Model,
    *,
    way: int,
    key_size: int = 128,
    num_slots: int = 8192,
    num_neighbours: int = 256,
    margin: float = 0.1,
) -> MetaLearner:
    """Builds the memory module: the output of a class is the largest cosine between q(x) and its keys.

    q(x) is a learned linear function of the embedding, divided by its length. The memory is empty at the start of an
    episode and reads it as a stream. Every class is shown k times before any is shown k + 1 times. The support examples
    of a class come before its queries, so that with k support examples of each class the first query is k-shot. Within
    a class the order is the given one. Within a round the classes come in an order drawn from the key, a new one in
    every round, and without a key by their index.

    For an example with q and label y, let p be the nearest key of label y, and n the nearest of another label, among
    the `num_neighbours` nearest keys. If there is no p among them, it is the newest key of label y. The loss is

        max(0, q·n - q·p + margin)

    and zero as long as p or n is missing. The objective is its mean over the S + M steps of the stream. Then, if the
    label of the nearest key is y, that key becomes unit(key + q). Otherwise q and y go to an empty slot, or to the
    oldest if none is empty: the one that was updated longest ago. Keys are constants in the gradient.

    `adapt` writes the support set, and `predict` compares each query with all keys and writes nothing. It uses
    no label: the newest right key helps the loss only.

    The authors' code differs in these points. Empty slots hold zeros with label 0 there; here nothing is near
    to them. For a class without a key it takes 0 for q·p, so that its loss pushes q away from the nearest key; the
    paper defines none, and here it is zero. It also keeps 16 episodes with disjoint labels in one memory and updates
    the parameters after every step; here each episode has a memory of its own, and the parameters are constant along
    it. The noise that the paper adds to the ages, against conflicts of parallel writers, is left out. In training that
    code drops 70 % of the entries of an embedding, as a stochastic `embedding` can. In its test every query is written
    with its label too.

    Args:
      embedding: a network from inputs [S, ...] to [S, D], such as `models.conv4(way=None)`.
      way: N, the number of classes. The parameters do not depend on it. If labels are traced, their values are not
        checked.
      key_size: the size of q and of the keys. The authors' code has 128; an author names 256 for the published results.
      num_slots: slots of the memory. The arrays hold no more slots than there are examples; the others stay empty.
      num_neighbours: the number of nearest keys among which p and n are looked for.
      margin: of the loss, in units of the cosine.

    Returns:
      A `MetaLearner`. Its meta-parameters are {"embedding", "projection" [D, key_size]} and its task parameters
      {"params": meta-parameters, "keys": [slots, key_size], "values": one-hot labels [slots, N], zeros for an empty
      slot}. A class without a key has the output -2. Both infos have an empty `support_loss`, [0]; that of `adapt`
      observes once.

    Raises:
      ValueError: if a number is out of its range or `embedding` not a `Model`; when it is used, if embeddings are no
        [S, D] or labels do not fit.

    References:
      Kaiser et al., 2017, section 2 for the loss and the update of the memory. The order of an episode is that of the
      authors' code. https://arxiv.org/abs/1703.03129
    """
    check_model(embedding)
    way = check_integer("way", way, at_least=1)
    NeighbourMemory(key_size, num_slots, num_neighbours, margin)  # it checks them

    def init(key, inputs):
        embedding_key, projection_key = jax.random.split(key)
        params = embedding.init(embedding_key, inputs)
        num_features = embedding_size(embedding, params, inputs)
        # The deviation is that of the authors' code.
        projection = jax.nn.initializers.truncated_normal(0.01)(projection_key, (num_features, key_size))
        return {"embedding": params, "projection": projection}

    def queries(params, inputs, key=None):
        features = embed(embedding, params["embedding"], inputs, key).astype(params["projection"].dtype)
        return unit_length(features @ params["projection"])

    def stream(params, inputs, targets, key):
        """Queries [L, key_size] and labels [L] in the order of the stream, the last memory, and what was found."""
        order_key, embedding_key = (None, None) if key is None else jax.random.split(key)
        found = queries(params, inputs, embedding_key)
        order = _rounds(targets, way, order_key)
        found, labels = found[order], jnp.asarray(targets, jnp.int32)[order]
        memory, pairs = jax.lax.scan(
            lambda memory, example: _remember(memory, *example, num_neighbours),
            _empty(min(num_slots, len(targets)), found),
            (jax.lax.stop_gradient(found), labels),
        )
        return found, memory, pairs

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        check_classes(way, support.targets)
        _, memory, _ = stream(meta_params, support.inputs, support.targets, key)
        task_params = {
            "params": meta_params,
            "keys": memory.keys,
            "values": jax.nn.one_hot(memory.values, way, dtype=memory.keys.dtype),
        }
        return task_params, observed_once(task_params, observe_fn)

    def predict(task_params, inputs):
        cosines = queries(task_params["params"], inputs) @ task_params["keys"].T  # [M, slots]
        is_class = task_params["values"][None] > 0  # [1, slots, N]
        return jnp.max(jnp.where(is_class, cosines[..., None], NO_KEY), 1)

    def objective(meta_params, episode):
        check_classes(way, episode.support.targets)
        both = all_examples(episode)
        check_classes(way, both.targets, "the episode")
        found, _, (right, wrong, exist) = stream(meta_params, both.inputs, both.targets, episode.key)
        losses = jnp.maximum(0.0, jnp.sum(found * (wrong - right), -1) + margin)
        return jnp.mean(jnp.where(exist, losses, 0.0)), InnerInfo(jnp.zeros(0))

    return MetaLearner(init, adapt, predict, objective)


@dataclasses.dataclass(frozen=True)
class NeighbourMemory:
    """Hyperparameters of the memory module."""

    key_size: int = 128
    """Size of the keys."""
    num_slots: int = 8192
    """Slots of the memory of an episode. A full memory overwrites the slot that was updated longest ago."""
    num_neighbours: int = 256
    """Nearest keys among which the loss looks for a right and a wrong one."""
    margin: float = 0.1
    """By how much the cosine with a right key should exceed that with a wrong one."""

    def __post_init__(self):
        """Raises ValueError for a number out of its range."""
        check_integer("key_size", self.key_size, at_least=1)
        check_integer("num_slots", self.num_slots, at_least=1)
        check_integer("num_neighbours", self.num_neighbours, at_least=1)
        check_positive("margin", self.margin)


class _Memory(NamedTuple):
    """keys [slots, key_size] of unit length, values [slots] with -1 for an empty slot, and ages [slots] in steps."""

    keys: jax.Array
    values: jax.Array
    ages: jax.Array


class _Pair(NamedTuple):
    """The nearest right and wrong key [key_size] of an example, and whether both exist."""

    right: jax.Array
    wrong: jax.Array
    exist: jax.Array


def _empty(num_slots: int, queries: jax.Array) -> _Memory:
    keys = jnp.zeros((num_slots, queries.shape[1]), queries.dtype)
    return _Memory(keys, jnp.full(num_slots, -1, jnp.int32), jnp.zeros(num_slots, jnp.int32))


def _remember(memory: _Memory, query: jax.Array, label: jax.Array, num_neighbours: int) -> tuple[_Memory, _Pair]:
    """One step of the stream: what the loss compares the example with, and the memory after it."""
    keys, values, ages = memory
    cosines = jnp.where(values >= 0, keys @ query, NO_KEY)
    _, neighbours = jax.lax.top_k(cosines, min(num_neighbours, len(values)))  # the nearest first
    is_right = values[neighbours] == label
    is_wrong = (values[neighbours] != label) & (values[neighbours] >= 0)
    newest = jnp.argmin(jnp.where(values == label, ages, np.iinfo(np.int32).max))
    right = jnp.where(jnp.any(is_right), neighbours[jnp.argmax(is_right)], newest)
    wrong = neighbours[jnp.argmax(is_wrong)]
    pair = _Pair(keys[right], keys[wrong], jnp.any(values == label) & jnp.any(is_wrong))

    nearest = neighbours[0]
    oldest = jnp.argmax(ages)  # an empty slot if there is one: it has aged since the start
    slot = jnp.where(is_right[0], nearest, oldest)
    key = jnp.where(is_right[0], unit_length(keys[nearest] + query), query)
    return _Memory(keys.at[slot].set(key), values.at[slot].set(label), (ages + 1).at[slot].set(0)), pair


def _rounds(targets: jax.Array, way: int, key: PRNGKey | None) -> jax.Array:
    """An order [L] in which every class is shown k times before any is shown k + 1 times."""
    is_class = jax.nn.one_hot(targets, way, dtype=jnp.int32)
    shown_before = jnp.sum(jnp.cumsum(is_class, 0) * is_class, 1)
    within = targets if key is None else jax.random.permutation(key, len(targets))
    return jnp.lexsort((within, shown_before))
