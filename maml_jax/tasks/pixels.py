"""Pixels as episodes hold them."""

import jax
import jax.numpy as jnp

from maml_jax.types import ArrayTree


def scale_pixels(inputs: ArrayTree) -> ArrayTree:
    """Leaves of uint8 as float32 in [0, 1]; the others unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x, inputs)
