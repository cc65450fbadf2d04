from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import batch_normalisation, convolution, dense, num_parameters, random_params

from maml_jax import models
from maml_jax.models.layers import conv_lax

WIDTHS = (2, 3, 4, 5)


@pytest.fixture(scope="module")
def inputs():
    return np.random.default_rng(0).normal(size=(3, 17, 16, 2))


def leaky_relu(hidden):
    return jnp.where(hidden > 0, hidden, 0.1 * hidden)


def written_out(params, inputs, activation=leaky_relu):
    """The network as the papers draw it, with XLA's convolution and pooling."""

    def conv_norm(hidden, suffix, prefix=""):
        convolved = convolution(params[f"{prefix or 'conv'}_{suffix}"], hidden)
        return batch_normalisation(params[f"{prefix + '_' if prefix else ''}norm_{suffix}"], convolved)

    hidden = inputs
    for b in range(4):
        first = activation(conv_norm(hidden, f"{b}_0"))
        second = activation(conv_norm(first, f"{b}_1"))
        third = conv_norm(second, f"{b}_2")
        summed = activation(third + conv_norm(hidden, b, prefix="shortcut"))
        hidden = nn.max_pool(summed, (2, 2), (2, 2))
    return dense(params["head"], jnp.mean(hidden, (1, 2)))


@pytest.mark.usefixtures("x64")
def test_is_the_network_of_the_papers(inputs):
    model = models.resnet12(way=6, widths=WIDTHS)
    params = random_params(model, inputs)
    outputs = jax.jit(model.apply)(params, inputs)
    assert outputs.shape == (3, 6)
    chex.assert_trees_all_close(outputs, jax.jit(written_out)(params, inputs), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_another_nonlinearity_and_the_convolution_of_xla(inputs):
    convolutions = []

    def conv_fn(inputs, kernel, strides):
        convolutions.append(kernel.shape)
        return conv_lax(inputs, kernel, strides)

    model = models.resnet12(way=6, widths=WIDTHS, activation=jnp.tanh, conv_fn=conv_fn)
    params = random_params(model, inputs)
    convolutions.clear()
    outputs = jax.jit(model.apply)(params, inputs)
    chex.assert_trees_all_close(outputs, jax.jit(partial(written_out, activation=jnp.tanh))(params, inputs), rtol=1e-10)
    assert len(convolutions) == 4 * len(WIDTHS)


def test_default_size():
    def block(channels, width):
        convolutions = 9 * channels * width + 2 * 9 * width * width + channels * width
        return convolutions + 4 * width + 4 * 2 * width  # and four biases, scales and offsets

    expected = block(3, 64) + block(64, 128) + block(128, 256) + block(256, 512) + 512 * 5 + 5
    assert num_parameters(models.resnet12(way=5), 1, 84, 84, 3) == expected


def test_initial_kernels_have_the_variance_of_he(inputs):
    params = models.resnet12(way=5, widths=(64,)).init(jax.random.key(0), inputs)
    kernel = params["conv_0_1"]["kernel"]
    # 36,864 normal numbers: their standard deviation is known to 1 / √(2n) = 0.4 %; six times that.
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.022)
    # Of so many normal numbers about a hundred are beyond three standard deviations.
    assert 50 < np.sum(np.abs(kernel) > 3 * np.std(kernel)) < 150
    # The fan-out does not depend on the two channels of the images: 1,152 numbers, and 128 of the shortcut.
    np.testing.assert_allclose(np.std(params["conv_0_0"]["kernel"]), np.sqrt(2 / (9 * 64)), rtol=0.13)
    np.testing.assert_allclose(np.std(params["shortcut_0"]["kernel"]), np.sqrt(2 / 64), rtol=0.38)
    np.testing.assert_array_equal(params["norm_0_0"]["scale"], 1.0)
    np.testing.assert_array_equal(params["norm_0_0"]["offset"], 0.0)


def test_without_a_head_the_outputs_are_the_inputs_of_the_head(inputs):
    @jax.jit
    def outputs(key):
        with_head, without = (models.resnet12(way=way, widths=(2, 3)) for way in (6, None))
        params = with_head.init(key, inputs)
        body = {name: values for name, values in params.items() if name != "head"}
        embedding = without.apply(body, inputs)
        chex.assert_shape(embedding, (3, 3))
        return dense(params["head"], embedding), with_head.apply(params, inputs)

    chex.assert_trees_all_close(*outputs(jax.random.key(0)), rtol=1e-5, atol=1e-5)


def test_rejects_what_it_cannot_be_built_of():
    with pytest.raises(ValueError, match="way must be an integer of at least 1, got 0"):
        models.resnet12(way=0)
    with pytest.raises(ValueError, match="widths must have at least one block"):
        models.resnet12(way=5, widths=())
    with pytest.raises(ValueError, match="a width of widths must be an integer of at least 1, got 0"):
        models.resnet12(way=5, widths=(4, 0))
    with pytest.raises(ValueError, match="at least 16 pixels"):
        models.resnet12(way=5, widths=WIDTHS).init(jax.random.key(0), jnp.zeros((2, 28, 15, 1)))
