"""What the learners that compare embeddings share: the embedding itself, class means, distances and cosines."""

import jax
import jax.numpy as jnp

from maml_jax.types import ArrayTree, Model, PRNGKey, at_least_float32


def embed(embedding: Model, params: ArrayTree, inputs: ArrayTree, key: PRNGKey | None = None) -> jax.Array:
    """The embeddings [S, D] of a batch of inputs [S, ...], in float32 if the network's are of half precision.

    Distances and cosines of half precision have too few digits to tell classes apart.

    Raises:
      ValueError: if the network returns anything but an array [S, D] with D ≥ 1.
    """
    outputs = embedding.call(params, inputs, key)
    if jnp.ndim(outputs) != 2 or jnp.shape(outputs)[1] < 1:
        raise ValueError(
            f"the embedding must return [S, D] with D of at least 1, got shape {jnp.shape(outputs)}; flatten the other "
            "axes, and leave the classification layer out, as models.conv4(way=None) does"
        )
    return at_least_float32(outputs)


def embedded_like(embedding: Model, params: ArrayTree, inputs: ArrayTree) -> jax.ShapeDtypeStruct:
    """The shape [S, D] and the dtype of the embeddings of inputs like these, without computing one."""
    return jax.eval_shape(lambda params, inputs: embed(embedding, params, inputs), params, inputs)


def embedding_size(embedding: Model, params: ArrayTree, inputs: ArrayTree) -> int:
    """D, the size of the embeddings of inputs like these, without computing one."""
    return embedded_like(embedding, params, inputs).shape[1]


def class_means(embedded: jax.Array, targets: jax.Array, way: int) -> jax.Array:
    """The mean embedding [N, D] of each class, from embeddings [S, D] with class indices [S]."""
    one_hot = jax.nn.one_hot(targets, way, dtype=embedded.dtype)
    return one_hot.T @ embedded / jnp.sum(one_hot, 0)[:, None]


def squared_distances(embedded: jax.Array, others: jax.Array) -> jax.Array:
    """|a - b|² for every pair of [M, D] and [S, D], as [M, S]."""
    return jnp.sum(jnp.square(embedded[:, None] - others[None]), -1)


def unit_length(vectors: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Vectors [..., D] divided by their length, in float32 if they are of half precision.

    ε is added to the square, so that a zero vector has a derivative.
    """
    vectors = at_least_float32(vectors)
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), -1, keepdims=True) + epsilon)
