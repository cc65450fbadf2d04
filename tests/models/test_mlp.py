import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from maml_jax import models


def shapes(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def test_it_is_the_composition_of_its_layers():
    model = models.mlp(features=(4, 3, 2), activation=jnp.tanh, bias_init=nn.initializers.normal(1.0))
    inputs = jax.random.normal(jax.random.key(0), (5, 6))
    params = model.init(jax.random.key(1), inputs)
    hidden = inputs
    for index in range(3):
        layer = params[f"dense_{index}"]
        hidden = hidden @ layer["kernel"] + layer["bias"][None]
        hidden = jnp.tanh(hidden) if index < 2 else hidden
    chex.assert_trees_all_close(model.apply(params, inputs), hidden, rtol=1e-5)


def test_inputs_of_any_rank_are_flattened():
    model = models.mlp(features=(2,))
    inputs = jax.random.normal(jax.random.key(0), (3, 2, 2))
    params = model.init(jax.random.key(1), inputs)
    chex.assert_trees_all_equal(model.apply(params, inputs), model.apply(params, inputs.reshape(3, 4)))


def test_the_fully_connected_omniglot_network():
    # Finn et al., 2017, "no conv": 256-128-64-64, each normalised, truncated normal weights of scale 0.01.
    model = models.omniglot_mlp(way=5)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((5, 28, 28, 1)))
    widths = (784, 256, 128, 64, 64, 5)
    expected = {f"dense_{i}/kernel": (widths[i], widths[i + 1]) for i in range(5)}
    expected |= {f"dense_{i}/bias": (widths[i + 1],) for i in range(5)}
    expected |= {f"norm_{i}/offset": (widths[i + 1],) for i in range(4)}
    assert shapes(params) == expected
    first = params["dense_0"]["kernel"]
    # Cut off at two standard deviations, a normal distribution has 0.88 of its standard deviation left.
    assert 0.0086 < jnp.std(first) < 0.0090
    assert jnp.abs(first).max() < 0.025  # cut at two standard deviations, whichever way those are counted
    chex.assert_shape(jax.eval_shape(model.apply, params, jnp.zeros((7, 28, 28, 1))), (7, 5))
