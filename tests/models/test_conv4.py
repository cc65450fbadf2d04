import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import batch_normalisation, convolution, dense, num_parameters, random_params

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


def test_published_sizes():
    # A convolution has 9 · C · F + F parameters, an offset F, the head D · N + N.
    # (9 · 1 · 64 + 64) + 3 (9 · 64 · 64 + 64) + 4 · 64 + (64 · 5 + 5) = 640 + 110,784 + 256 + 325.
    assert num_parameters(models.conv4(way=5), 1, 28, 28, 1) == 112_005
    # (9 · 3 · 32 + 32) + 3 (9 · 32 · 32 + 32) + 4 · 32 + (800 · 5 + 5) = 896 + 27,744 + 128 + 4,005.
    assert num_parameters(models.conv4(way=5, features=32, pooling=True), 1, 84, 84, 3) == 32_773


@pytest.mark.parametrize("pooling", [False, True])
def test_it_is_the_composition_of_its_layers(x64, pooling):
    model = models.conv4(way=5, features=3, pooling=pooling)
    inputs = jax.random.normal(jax.random.key(0), (4, 33, 32, 2))
    params = random_params(model, inputs)

    def written_out(params, hidden):
        for index in range(4):
            convolved = convolution(params[f"conv_{index}"], hidden, (1, 1) if pooling else (2, 2))
            normalised = batch_normalisation(params[f"norm_{index}"], convolved)
            hidden = jnp.maximum(normalised, 0.0)
            if pooling:
                hidden = nn.max_pool(hidden, (2, 2), (2, 2))
        # 33 -> 17 -> 9 -> 5 -> 3 by strides and 33 -> 16 -> 8 -> 4 -> 2 by pooling.
        chex.assert_shape(hidden, (4, 2, 2, 3) if pooling else (4, 3, 2, 3))
        return dense(params["head"], hidden.reshape(4, -1) if pooling else hidden.mean((1, 2)))

    expected = jax.jit(written_out)(params, inputs)
    chex.assert_trees_all_close(jax.jit(model.apply)(params, inputs), expected, rtol=1e-10)


@pytest.mark.parametrize("pooling", [False, True])
def test_without_a_head_the_outputs_are_the_inputs_of_the_head(pooling):
    inputs = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))

    @jax.jit
    def outputs(key):
        with_head, without = (models.conv4(way=way, features=3, pooling=pooling) for way in (5, None))
        params = with_head.init(key, inputs)
        body = {name: values for name, values in params.items() if name != "head"}
        embedding = without.apply(body, inputs)
        chex.assert_shape(embedding, (2, 12 if pooling else 3))
        return dense(params["head"], embedding), with_head.apply(params, inputs)

    chex.assert_trees_all_close(*outputs(jax.random.key(1)), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(("pooling", "flatten"), [(False, True), (True, False)])
def test_the_head_starts_by_what_it_sees_and_not_by_the_geometry(pooling, flatten):
    # 16 pixels a side leave one position: D = 8. Of 400 numbers N(0, 1) one is surely beyond the bound of Xavier.
    model = models.conv4(way=50, features=8, pooling=pooling, flatten=flatten)
    kernel = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["head"]["kernel"]
    assert (jnp.abs(kernel).max() <= (6 / (8 + 50)) ** 0.5) == flatten


@pytest.mark.parametrize("flatten", [False, True])
def test_the_head_starts_as_it_is_told_to(flatten):
    settings = {"way": 5, "features": 4, "flatten": flatten}
    images, key = jnp.zeros((1, 28, 28, 1)), jax.random.key(0)
    usual, zero = (
        models.conv4(**settings, **init).init(key, images) for init in ({}, {"head_init": nn.initializers.zeros})
    )
    assert not np.any(zero["head"]["kernel"])
    chex.assert_trees_all_equal(zero | {"head": usual["head"]}, usual)


@pytest.mark.parametrize("pooling", [False, True])
def test_how_the_convolution_is_computed_does_not_matter(x64, pooling):
    inputs = jax.random.normal(jax.random.key(0), (3, 17, 17, 2))
    networks = [models.conv4(way=4, features=3, pooling=pooling, conv_fn=f) for f in (conv_matmul, conv_lax)]
    params = jax.jit(networks[0].init)(jax.random.key(1), inputs)
    by_matmul, by_lax = (jax.jit(network.apply)(params, inputs) for network in networks)
    chex.assert_shape(by_matmul, (3, 4))
    chex.assert_trees_all_close(by_matmul, by_lax, rtol=1e-9)


def test_the_head_sees_the_mean_or_all_positions():
    # 64 -> 4 in both geometries: the mean leaves 8 features for the head, and flattening 4 · 4 · 8.
    assert shapes(models.conv4(way=2, features=8), 1, 64, 64, 1)["head/kernel"] == (8, 2)
    for pooling, flatten, size in ((True, None, 4 * 4 * 8), (True, False, 8), (False, True, 4 * 4 * 8)):
        network = models.conv4(way=2, features=8, pooling=pooling, flatten=flatten)
        assert shapes(network, 1, 64, 64, 1)["head/kernel"] == (size, 2)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_context_scales_and_shifts_the_normalised_features(x64, block):
    # After a normalisation with scale s and offset b: a scale of (1 + γ) s and an offset of (1 + γ) b + β.
    settings = {"way": 3, "features": 4, "norm": functools.partial(models.BatchStatNorm, scale=True)}
    images, context = jax.random.normal(jax.random.key(0), (6, 16, 16, 1)), jnp.array([0.3, -2.0])
    modulated = models.conv4(context_block=block, param_dtype=jnp.float64, **settings)
    params = modulated.init(jax.random.key(1), (images, context))
    plain, film = {name: leaf for name, leaf in params.items() if name != "film"}, params["film"]
    network = models.conv4(param_dtype=jnp.float64, **settings)
    at_zero = modulated.apply(params, (images, jnp.zeros(2)))
    np.testing.assert_allclose(at_zero, network.apply(plain, images), rtol=1e-12)
    film["bias"] = jnp.arange(8.0) / 10
    scale, shift = jnp.split(context @ film["kernel"] + film["bias"], 2)
    norm = plain[f"norm_{block}"]
    changed = {"scale": (1 + scale) * norm["scale"], "offset": (1 + scale) * norm["offset"] + shift}
    found = modulated.apply(params, (images, context))
    np.testing.assert_allclose(found, network.apply(plain | {f"norm_{block}": changed}, images), rtol=1e-9)
    assert not np.allclose(found, at_zero)


@pytest.mark.parametrize("arguments", [{"way": 0}, {"way": 5.0}, {"way": 5, "features": 0}])
def test_an_empty_network_is_refused(arguments):
    with pytest.raises(ValueError, match=r"(way|features) must be an integer of at least 1, got (0|5\.0)"):
        models.conv4(**arguments)


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="context_block=4 must be 0, 1, 2 or 3"):
        models.conv4(way=5, context_block=4)


def test_the_module_is_a_part_of_other_modules():
    class Siamese(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            embedding = models.Conv4(way=None, features=3)(inputs)
            return jnp.linalg.norm(embedding[::2] - embedding[1::2], axis=-1)

    inputs = jnp.zeros((4, 16, 16, 1))
    model = models.from_linen(Siamese())
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    assert set(params) == {"Conv4_0"}
    chex.assert_shape(jax.eval_shape(model.apply, params, inputs), (2,))


@pytest.mark.parametrize("flatten", [False, True])
def test_images_that_cannot_be_halved_four_times_are_refused(flatten):
    model = models.conv4(way=3, features=2, pooling=True, flatten=flatten)
    with pytest.raises(ValueError, match=r"needs at least 16 pixels a side, got inputs \(2, 16, 15, 1\)"):
        model.init(jax.random.key(0), jnp.zeros((2, 16, 15, 1)))
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 16, 16, 1)))
    jax.eval_shape(models.conv4(way=3, features=2).init, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
