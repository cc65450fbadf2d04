from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads
from networks import batch_normalisation

from maml_jax import models
from maml_jax.models import BatchStatNorm, PopulationNorm, fill_population_statistics
from maml_jax.models.normalisation import standardise


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 5, 3)])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_batch_stat_norm_against_its_formula(x64, shape, scale, offset):
    inputs = 3.0 + 2.0 * normal(0, *shape)
    layer = BatchStatNorm(scale=scale, offset=offset, epsilon=0.1)
    initial = layer.init(jax.random.key(1), inputs).get("params", {})
    assert set(initial) == {name for name, present in (("scale", scale), ("offset", offset)) if present}
    given = {"scale": jnp.array([1.0, 2.0, -1.0]), "offset": jnp.array([0.5, 0.0, 3.0])}

    flat = inputs.reshape(-1, 3)
    centred = flat - flat.mean(0, keepdims=True)
    expected = centred / jnp.sqrt((centred**2).mean(0, keepdims=True) + 0.1)

    chex.assert_trees_all_close(layer.apply({"params": initial}, inputs).reshape(-1, 3), expected, rtol=1e-12)
    if scale:
        expected = expected * given["scale"][None]
    if offset:
        expected = expected + given["offset"][None]
    outputs = layer.apply({"params": {name: given[name] for name in initial}}, inputs)
    chex.assert_trees_all_close(outputs.reshape(-1, 3), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 5, 3)])
def test_the_derivatives_of_standardise_are_those_of_its_steps(x64, shape):
    epsilon = 0.1
    inputs, direction, other = (3.0 + 2.0 * normal(seed, *shape) for seed in range(3))

    def by_steps(x):
        axes = tuple(range(x.ndim - 1))
        multiplier = (x.var(axes, keepdims=True) + epsilon) ** -0.5
        return (x - x.mean(axes, keepdims=True)) * multiplier, multiplier

    def derivatives(fun):
        def scalar(x):
            outputs, multiplier = fun(x)
            return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(multiplier))

        gradient = jax.grad(scalar)
        product = partial(jax.jvp, gradient, (inputs,), (direction,))()[1]
        third = jax.grad(lambda x: jnp.vdot(jax.grad(lambda y: jnp.vdot(gradient(y), direction))(x), other))(inputs)
        return jax.jvp(fun, (inputs,), (direction,)), gradient(inputs), product, third

    chex.assert_trees_all_close(
        derivatives(lambda x: standardise(x, epsilon)), derivatives(by_steps), rtol=1e-10, atol=1e-12
    )
    check_grads(lambda x: standardise(x, epsilon), (inputs,), order=2, atol=1e-5, rtol=1e-5)


def test_batch_stat_norm_of_a_constant_batch_is_its_offset_with_finite_derivatives():
    layer = BatchStatNorm()
    params = {"offset": jnp.array([1.0, -2.0])}
    inputs = jnp.full((4, 2), 7.0)
    chex.assert_trees_all_equal(layer.apply({"params": params}, inputs), jnp.tile(params["offset"], (4, 1)))
    chex.assert_tree_all_finite(jax.grad(lambda x: layer.apply({"params": params}, x).sum())(inputs))


@pytest.mark.parametrize("layer", [BatchStatNorm, PopulationNorm])
def test_the_published_epsilon(x64, layer):
    # With a variance of about 1e-6, 1e-3 and 1e-5 differ by a factor of ten in the outputs.
    inputs = 1e-3 * normal(0, 8, 3)
    layer = layer()
    params = layer.init(jax.random.key(1), inputs)["params"]
    expected = batch_normalisation(params, inputs)
    chex.assert_trees_all_close(layer.apply({"params": params}, inputs), expected, rtol=1e-6)


@pytest.mark.parametrize("layer", [BatchStatNorm, PopulationNorm])
def test_statistics_of_bfloat16_are_computed_in_float32(layer):
    # bfloat16 has no number between 128 and 129, so a mean in bfloat16 would be 128 or 129.
    inputs = jnp.array([[128.0], [129.0], [129.0], [129.0]], jnp.bfloat16)
    layer = layer(dtype=jnp.bfloat16, offset=False)
    outputs = layer.apply(layer.init(jax.random.key(0), inputs), inputs)
    assert outputs.dtype == jnp.bfloat16
    expected = batch_normalisation({"offset": jnp.zeros(1)}, inputs.astype(jnp.float32))
    chex.assert_trees_all_close(outputs.astype(jnp.float32), expected, rtol=2**-7)


NETWORKS = {
    "conv4": (partial(models.conv4, way=5, features=2), {}, (6, 16, 16, 1)),
    "resnet12": (partial(models.resnet12, way=5, widths=(2,)), {"scale": True}, (6, 4, 4, 1)),
    "mlp": (partial(models.mlp, features=(4, 3, 5)), {}, (6, 8)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_on_the_images_of_the_statistics_both_normalisations_agree(network):
    build, arguments, shape = NETWORKS[network]
    transductive = build(norm=partial(BatchStatNorm, **arguments))
    inductive = build(norm=partial(PopulationNorm, **arguments))
    images = normal(0, *shape)

    @jax.jit
    def run(key):
        params = jax.tree.map(
            lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), transductive.init(key, images)
        )
        filled = fill_population_statistics(inductive, params, images)
        again = fill_population_statistics(
            inductive, fill_population_statistics(inductive, params, 2.0 + 3.0 * images), images
        )
        outputs = (
            inductive.apply(filled, images),
            transductive.apply(params, images),
            inductive.apply(filled, images[:1]),
        )
        gradient = jax.grad(lambda params: jnp.sum(jnp.sin(inductive.apply(params, images))))(filled)
        return params, filled, again, gradient, outputs

    params, filled, again, gradient, (by_population, by_batch, alone) = run(jax.random.key(1))
    chex.assert_trees_all_close(by_population, by_batch, rtol=1e-4, atol=1e-5)
    # A single image gets the same outputs, although its own statistics are others.
    chex.assert_trees_all_close(alone, by_population[:1], rtol=1e-4, atol=1e-5)
    # Nothing but statistics is new, old statistics are replaced, and they have no gradient.
    kept = {layer: {name: filled[layer][name] for name in values} for layer, values in params.items()}
    chex.assert_trees_all_equal(kept, params)
    chex.assert_trees_all_close(again, filled, rtol=1e-6)
    statistics = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not jnp.any(leaf)}
    assert statistics == {"population_mean", "population_variance"}


def test_filling_leaves_the_given_parameters_alone():
    model, images = models.mlp(features=(3, 2), norm=PopulationNorm), normal(0, 4, 5)
    params = model.init(jax.random.key(0), images)
    filled = fill_population_statistics(model, params, images)
    jax.jit(lambda params: jax.tree.map(lambda x: 2 * x, params), donate_argnums=0)(filled)
    chex.assert_tree_all_finite(model.apply(params, images))


def test_filling_refuses_other_models_and_parameters():
    images = normal(0, 4, 5)
    without = models.mlp(features=(3, 2), norm=BatchStatNorm)
    params = without.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"no PopulationNorm .*norm=maml_jax\.models\.PopulationNorm"):
        fill_population_statistics(without, params, images)
    model = models.mlp(features=(3, 2), norm=PopulationNorm)
    with pytest.raises(ValueError, match=r"params has dense_2/.* of shape .*, and MLP has no such parameter"):
        fill_population_statistics(model, {**params, "dense_2": params["dense_1"]}, images)
    with pytest.raises(ValueError, match=r"params lacks \['dense_1/bias', 'dense_1/kernel'\]"):
        fill_population_statistics(model, {name: params[name] for name in ("dense_0", "norm_0")}, images)


def test_inner_and_outer_steps_do_not_change_statistics():
    model, images = models.mlp(features=(3, 2), norm=PopulationNorm), normal(0, 4, 5)
    params = model.init(jax.random.key(0), images)
    optimizer = optax.adam(0.1)
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(model.apply(params, images))))(params)
    updated = optax.apply_updates(params, optimizer.update(gradient, optimizer.init(params))[0])
    for name in ("population_mean", "population_variance"):
        chex.assert_trees_all_equal(updated["norm_0"][name], params["norm_0"][name])
    assert jnp.any(updated["norm_0"]["offset"] != params["norm_0"]["offset"])
