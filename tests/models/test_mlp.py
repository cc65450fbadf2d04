import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from networks import batch_normalisation, dense, num_parameters, random_params

from maml_jax import models


def shapes(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def test_it_is_the_composition_of_its_layers():
    model = models.mlp(features=(4, 3, 2), activation=jnp.tanh, bias_init=nn.initializers.normal(1.0))
    inputs = jax.random.normal(jax.random.key(0), (5, 6))
    params = jax.jit(model.init)(jax.random.key(1), inputs)
    hidden = inputs
    for index in range(3):
        hidden = dense(params[f"dense_{index}"], hidden)
        hidden = jnp.tanh(hidden) if index < 2 else hidden
    chex.assert_trees_all_close(model.apply(params, inputs), hidden, rtol=1e-5)


def test_the_initialisers_are_those_asked_for():
    settings = {"kernel_init": nn.initializers.constant(2.0), "bias_init": nn.initializers.constant(3.0)}
    params = models.mlp(features=(4, 3), **settings).init(jax.random.key(0), jnp.zeros((1, 6)))
    for layer in params.values():
        chex.assert_trees_all_equal(layer, {"kernel": 2.0 + 0 * layer["kernel"], "bias": 3.0 + 0 * layer["bias"]})


def test_the_normalisation_is_before_the_activation(x64):
    model = models.mlp(features=(4, 3, 2), activation=jnp.tanh, norm=models.BatchStatNorm)
    inputs = jax.random.normal(jax.random.key(0), (5, 6))
    params = random_params(model, inputs)
    hidden = inputs
    for index in range(2):
        hidden = jnp.tanh(batch_normalisation(params[f"norm_{index}"], dense(params[f"dense_{index}"], hidden)))
    expected = dense(params["dense_2"], hidden)
    chex.assert_trees_all_close(model.apply(params, inputs), expected, rtol=1e-10)


def test_inputs_of_any_rank_are_flattened():
    model = models.mlp(features=(2,))
    inputs = jax.random.normal(jax.random.key(0), (3, 2, 2))
    params = jax.jit(model.init)(jax.random.key(1), inputs)
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
    # (784 + 1) 256 + (256 + 1) 128 + (128 + 1) 64 + (64 + 1) 64 + (64 + 1) 5 + offsets 256 + 128 + 64 + 64.
    assert num_parameters(model, 5, 28, 28, 1) == 200_960 + 32_896 + 8_256 + 4_160 + 325 + 512


def test_the_fully_connected_omniglot_network_is_the_composition_of_its_layers(x64):
    model = models.omniglot_mlp(way=5)
    inputs = jax.random.normal(jax.random.key(0), (7, 28, 28, 1))
    params = random_params(model, inputs)
    hidden = inputs.reshape(7, 784)
    for index in range(4):
        hidden = batch_normalisation(params[f"norm_{index}"], dense(params[f"dense_{index}"], hidden))
        hidden = jnp.maximum(hidden, 0.0)
    chex.assert_trees_all_close(model.apply(params, inputs), dense(params["dense_4"], hidden), rtol=1e-9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.mlp(features=()), r"features must be a sequence of widths such as \(40, 40, 1\), got \(\)"),
        (lambda: models.mlp(features=40), "features must be a sequence of widths .*, got 40"),
        (lambda: models.mlp(features=(4, 0)), "a width of features must be an integer of at least 1, got 0"),
        (lambda: models.mlp(features=(4, 1.0)), "a width of features must be an integer of at least 1, got 1.0"),
        (lambda: models.omniglot_mlp(way=0), "way must be an integer of at least 1, got 0"),
    ],
)
def test_an_empty_network_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
