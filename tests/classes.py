"""Small classification episodes in float64, for the learners that compare embeddings."""

import jax
import jax.numpy as jnp

from maml_jax import Batch, Episode, Model, models

WAY, SIZE = 3, 5

embedding = models.mlp(features=(6, 4), activation=jnp.tanh, param_dtype=jnp.float64)
"""A smooth network from [S, 5] to [S, 4]."""

identity = Model(init=lambda key, inputs: {}, apply=lambda params, inputs: inputs)
"""The inputs are their own embedding."""


def draw_episode(seed=0, shot=2, query_shot=3, way=WAY):
    """Normal inputs, classes in turn."""
    support_key, query_key, key = jax.random.split(jax.random.key(seed), 3)

    def batch(key, num):
        return Batch(jax.random.normal(key, (num * way, SIZE), jnp.float64), jnp.tile(jnp.arange(way), num))

    return Episode(batch(support_key, shot), batch(query_key, query_shot), key)


def permuted(value, seed=1):
    """A permutation of a batch."""
    order = jax.random.permutation(jax.random.key(seed), len(jax.tree.leaves(value)[0]))
    return jax.tree.map(lambda x: x[order], value)
