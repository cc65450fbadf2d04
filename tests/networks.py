"""Parts of networks written out a second time, and random parameters to compare them with."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def random_params(model, inputs):
    """Parameters of which none is zero or one, so that each takes part."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), inputs))
    rng = np.random.default_rng(1)
    return treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])


def convolution(layer, hidden, strides=(1, 1)):
    outputs = lax.conv_general_dilated(
        hidden, layer["kernel"], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return outputs + jnp.expand_dims(layer["bias"], (0, 1, 2))


def batch_normalisation(layer, hidden):
    """With the published ε of 1e-3."""
    axes = tuple(range(hidden.ndim - 1))
    mean, variance = (statistic(hidden, axes, keepdims=True) for statistic in (jnp.mean, jnp.var))
    layer = {name: jnp.expand_dims(parameter, axes) for name, parameter in layer.items()}
    return layer.get("scale", 1.0) * (hidden - mean) / jnp.sqrt(variance + 1e-3) + layer["offset"]


def dense(layer, hidden):
    return hidden @ layer["kernel"] + layer["bias"][None]


def num_parameters(model, *inputs_shape):
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(inputs_shape, jnp.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(params))
