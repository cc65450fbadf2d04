import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from maml_jax import models

WIDTHS = (2, 3, 4, 5)


@pytest.fixture(scope="module")
def inputs():
    return np.random.default_rng(0).normal(size=(3, 17, 16, 2))


def random_params(model, inputs):
    """Parameters of which none is zero or one, so that each takes part."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])


def reference(params, inputs):
    """The network as the papers draw it, with XLA's convolution and pooling."""

    def conv(hidden, name):
        layer = params[name]
        return lax.conv_general_dilated(
            hidden, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) + jnp.expand_dims(layer["bias"], (0, 1, 2))

    def norm(hidden, name):
        layer = jax.tree.map(lambda x: jnp.expand_dims(x, (0, 1, 2)), params[name])
        mean, variance = (f(hidden, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        return layer["scale"] * (hidden - mean) / jnp.sqrt(variance + 1e-3) + layer["offset"]

    def leaky(hidden):
        return jnp.where(hidden > 0, hidden, 0.1 * hidden)

    hidden = inputs
    for b in range(4):
        first = leaky(norm(conv(hidden, f"conv_{b}_0"), f"norm_{b}_0"))
        second = leaky(norm(conv(first, f"conv_{b}_1"), f"norm_{b}_1"))
        third = norm(conv(second, f"conv_{b}_2"), f"norm_{b}_2")
        summed = leaky(third + norm(conv(hidden, f"shortcut_{b}"), f"shortcut_norm_{b}"))
        hidden = nn.max_pool(summed, (2, 2), (2, 2))
    return jnp.mean(hidden, (1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.usefixtures("x64")
def test_is_the_network_of_the_papers(inputs):
    model = models.resnet12(way=6, widths=WIDTHS)
    params = random_params(model, inputs)
    outputs = jax.jit(model.apply)(params, inputs)
    assert outputs.shape == (3, 6)
    chex.assert_trees_all_close(outputs, jax.jit(reference)(params, inputs), rtol=1e-10)


def test_default_size():
    params = jax.eval_shape(models.resnet12(way=5).init, jax.random.key(0), jnp.zeros((1, 84, 84, 3)))

    def block(channels, width):
        convolutions = 9 * channels * width + 2 * 9 * width * width + channels * width
        return convolutions + 4 * width + 4 * 2 * width  # and four biases, scales and offsets

    expected = block(3, 64) + block(64, 128) + block(128, 256) + block(256, 512) + 512 * 5 + 5
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_initial_kernels_have_the_variance_of_he(inputs):
    params = models.resnet12(way=5, widths=(64,)).init(jax.random.key(0), inputs)
    kernel = params["conv_0_1"]["kernel"]
    # 36,864 normal numbers: their standard deviation is known to 1 / √(2n) = 0.4 %; six times that.
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.022)
    np.testing.assert_array_equal(params["norm_0_0"]["scale"], 1.0)
    np.testing.assert_array_equal(params["norm_0_0"]["offset"], 0.0)


def test_rejects_what_it_cannot_be_built_of():
    with pytest.raises(ValueError, match="way=0"):
        models.resnet12(way=0)
    with pytest.raises(ValueError, match=r"widths=\(\)"):
        models.resnet12(way=5, widths=())
    with pytest.raises(ValueError, match=r"widths=\(4, 0\)"):
        models.resnet12(way=5, widths=(4, 0))
    with pytest.raises(ValueError, match="at least 16 pixels"):
        models.resnet12(way=5, widths=WIDTHS).init(jax.random.key(0), jnp.zeros((2, 28, 15, 1)))
