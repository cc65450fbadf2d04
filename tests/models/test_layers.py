from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax.models import conv4
from maml_jax.models.layers import Conv, conv_lax, conv_matmul, max_pool


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 4), (7, 5)])
@pytest.mark.parametrize("features", [4, 30])  # fewer and more than the 27 inputs of a filter
def test_both_convolutions_agree_in_value_and_two_derivatives(x64, height, width, features, strides):
    inputs, kernel = normal(0, 2, height, width, 3), normal(1, 3, 3, 3, features)
    directions = normal(2, *inputs.shape), normal(3, *kernel.shape)

    @partial(jax.jit, static_argnums=0)
    def value_and_derivatives(conv_fn):
        def scalar(inputs, kernel):
            return jnp.sum(jnp.sin(conv_fn(inputs, kernel, strides)))

        gradient = jax.grad(scalar, (0, 1))
        return conv_fn(inputs, kernel, strides), *jax.jvp(gradient, (inputs, kernel), directions)

    by_matmul, by_lax = value_and_derivatives(conv_matmul), value_and_derivatives(conv_lax)
    chex.assert_shape(by_matmul[0], (2, -(-height // strides[0]), -(-width // strides[1]), features))
    chex.assert_trees_all_close(by_matmul, by_lax, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 5), (1, 3)])
def test_both_convolutions_agree_for_other_kernels(x64, size):
    inputs, kernel = normal(0, 2, 6, 5, 2), normal(1, *size, 2, 3)
    chex.assert_trees_all_close(
        conv_matmul(inputs, kernel, (2, 2)), conv_lax(inputs, kernel, (2, 2)), rtol=1e-12, atol=1e-13
    )


def test_both_convolutions_agree_for_a_kernel_per_task(x64):
    inputs, kernels = normal(0, 3, 2, 5, 5, 2), normal(1, 3, 3, 3, 2, 4)

    def kernel_gradients(conv_fn):
        def scalar(kernel, inputs):
            return jnp.sum(jnp.sin(conv_fn(inputs, kernel, (2, 2))))

        return jax.jit(jax.vmap(jax.grad(scalar)))(kernels, inputs)

    chex.assert_trees_all_close(kernel_gradients(conv_matmul), kernel_gradients(conv_lax), rtol=1e-12)


@pytest.mark.parametrize("conv_fn", [conv_matmul, conv_lax])
def test_the_layer_adds_a_bias_to_its_convolution(conv_fn):
    inputs = normal(0, 2, 6, 6, 3)
    layer = Conv(4, strides=(2, 2), conv_fn=conv_fn)
    params = layer.init(jax.random.key(1), inputs)["params"]
    chex.assert_shape(params["kernel"], (3, 3, 3, 4))
    chex.assert_trees_all_equal(params["bias"], jnp.zeros(4))
    bias = jnp.arange(4.0)
    outputs = layer.apply({"params": {"kernel": params["kernel"], "bias": bias}}, inputs)
    expected = conv_lax(inputs, params["kernel"], (2, 2)) + jnp.broadcast_to(bias, (2, 3, 3, 4))
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-5)


def test_max_pool_takes_the_largest_and_drops_the_remainder():
    inputs = jnp.arange(2 * 5 * 7 * 3.0).reshape(2, 5, 7, 3)[:, ::-1]
    outputs = max_pool(inputs)
    chex.assert_shape(outputs, (2, 2, 3, 3))
    for row in range(2):
        for column in range(3):
            window = inputs[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            chex.assert_trees_all_equal(outputs[:, row, column], window.max((1, 2)))


def test_max_pool_keeps_what_is_not_a_number():
    for place in range(4):
        window = jnp.ones(4).at[place].set(jnp.nan)
        assert jnp.isnan(max_pool(window.reshape(1, 2, 2, 1)))[0, 0, 0, 0]


def test_max_pool_of_another_window_agrees_with_reduce_window():
    inputs = normal(0, 2, 6, 6, 2)
    expected = jax.lax.reduce_window(inputs, -jnp.inf, jax.lax.max, (1, 3, 2, 1), (1, 3, 2, 1), "VALID")
    chex.assert_trees_all_equal(max_pool(inputs, (3, 2)), expected)


def test_the_derivative_of_max_pool_survives_a_compiler_that_computes_its_inputs_twice():
    """Compiled as one program, the inputs of the maximum may be computed again with another rounding."""
    model = conv4(way=3, features=3, pooling=True)
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3))
    params = model.init(jax.random.key(1), images)

    def loss(params):
        return jnp.mean(jnp.square(model.apply(params, images) - 1.0))

    gradient = jax.jit(jax.grad(loss))(params)
    with jax.enable_x64(True):
        images = np.float64(images)
        exact = jax.jit(jax.grad(loss))(jax.tree.map(np.float64, params))
    chex.assert_trees_all_close(gradient, jax.tree.map(np.float32, exact), rtol=1e-3, atol=1e-4)


def test_of_equal_values_the_first_gets_the_derivative():
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    chex.assert_trees_all_equal(gradient, jnp.zeros((1, 2, 2, 1)).at[0, 0, 0, 0].set(1.0))
