import chex
import jax
import jax.numpy as jnp
import pytest

from maml_jax import models
from maml_jax.models.layers import conv_lax, conv_matmul


def shapes(model, *inputs_shape):
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(inputs_shape, jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def test_the_omniglot_geometry():
    # Finn et al., 2017: four strided convolutions of 64 filters, an offset and no scale, mean over 2x2.
    assert shapes(models.conv4(way=5), 5, 28, 28, 1) == {
        "conv_0/kernel": (3, 3, 1, 64),
        "conv_1/kernel": (3, 3, 64, 64),
        "conv_2/kernel": (3, 3, 64, 64),
        "conv_3/kernel": (3, 3, 64, 64),
        **{f"conv_{i}/bias": (64,) for i in range(4)},
        **{f"norm_{i}/offset": (64,) for i in range(4)},
        "head/kernel": (64, 5),
        "head/bias": (5,),
    }


def test_the_mini_imagenet_geometry():
    # 84 -> 42 -> 21 -> 10 -> 5 by pooling: 5 · 5 · 32 = 800 features into the head.
    assert shapes(models.conv4(way=5, features=32, pooling=True), 5, 84, 84, 3) == {
        "conv_0/kernel": (3, 3, 3, 32),
        "conv_1/kernel": (3, 3, 32, 32),
        "conv_2/kernel": (3, 3, 32, 32),
        "conv_3/kernel": (3, 3, 32, 32),
        **{f"conv_{i}/bias": (32,) for i in range(4)},
        **{f"norm_{i}/offset": (32,) for i in range(4)},
        "head/kernel": (800, 5),
        "head/bias": (5,),
    }


def test_initial_weights():
    # A head of standard deviation 1 for Omniglot; Xavier uniform, bounded by √(6 / (D + N)), with pooling.
    inputs = jnp.zeros((1, 16, 16, 1))
    omniglot = jax.jit(models.conv4(way=50, features=64).init)(jax.random.key(0), inputs)
    pooled = jax.jit(models.conv4(way=50, features=64, pooling=True).init)(jax.random.key(0), inputs)
    assert 0.95 < jnp.std(omniglot["head"]["kernel"]) < 1.05  # 3200 draws: standard error 0.013
    bound = (6 / (64 + 50)) ** 0.5
    assert 0.95 * bound < jnp.abs(pooled["head"]["kernel"]).max() <= bound
    for params in (omniglot, pooled):
        bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
        assert 0.99 * bound < jnp.abs(params["conv_1"]["kernel"]).max() <= bound
        assert not any(jnp.any(params[f"conv_{i}"]["bias"]) for i in range(4))
        assert not jnp.any(params["head"]["bias"])


@pytest.mark.parametrize("pooling", [False, True])
def test_how_the_convolution_is_computed_does_not_matter(x64, pooling):
    inputs = jax.random.normal(jax.random.key(0), (3, 17, 17, 2))
    networks = [models.conv4(way=4, features=3, pooling=pooling, conv_fn=f) for f in (conv_matmul, conv_lax)]
    params = networks[0].init(jax.random.key(1), inputs)
    by_matmul, by_lax = (network.apply(params, inputs) for network in networks)
    chex.assert_shape(by_matmul, (3, 4))
    chex.assert_trees_all_close(by_matmul, by_lax, rtol=1e-9)


def test_the_head_sees_the_mean_or_all_positions():
    # 64 -> 4 in both geometries: the mean leaves 8 features for the head, and flattening 4 · 4 · 8.
    assert shapes(models.conv4(way=2, features=8), 1, 64, 64, 1)["head/kernel"] == (8, 2)
    assert shapes(models.conv4(way=2, features=8, pooling=True), 1, 64, 64, 1)["head/kernel"] == (4 * 4 * 8, 2)


@pytest.mark.parametrize(("way", "features"), [(0, 64), (5, 0)])
def test_an_empty_network_is_refused(way, features):
    with pytest.raises(ValueError, match=f"at least one output and one filter, got way={way} and features={features}"):
        models.conv4(way=way, features=features)
