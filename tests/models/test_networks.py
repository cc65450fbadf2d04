"""What all networks have in common: arguments and dtypes."""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from maml_jax import models

NETWORKS = {
    "conv4": (models.Conv4, {"way": 3, "features": 4}, (5, 16, 16, 1)),
    "pooled conv4": (models.Conv4, {"way": 3, "features": 4, "pooling": True}, (5, 16, 16, 1)),
    "conv4 with another norm": (models.Conv4, {"way": 3, "features": 4, "norm": nn.LayerNorm}, (5, 16, 16, 1)),
    "inductive conv4": (models.Conv4, {"way": 3, "features": 4, "norm": models.PopulationNorm}, (5, 16, 16, 1)),
    "mlp": (models.MLP, {"features": (4, 3), "norm": models.BatchStatNorm}, (5, 6)),
    "resnet12": (models.ResNet12, {"way": 3, "widths": (2, 3)}, (5, 4, 4, 1)),
}


@pytest.mark.parametrize(
    ("builder", "module"),
    [(models.conv4, models.Conv4), (models.mlp, models.MLP), (models.resnet12, models.ResNet12)],
)
def test_modules_have_the_arguments_and_defaults_of_their_builders(builder, module):
    fields = inspect.signature(module).parameters
    for name, parameter in inspect.signature(builder).parameters.items():
        assert fields[name].default is parameter.default or fields[name].default == parameter.default
    assert set(fields) - {"parent", "name"} == set(inspect.signature(builder).parameters)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("param_dtype", [None, jnp.float64])
def test_parameters_have_one_dtype(x64, network, param_dtype):
    module, arguments, shape = NETWORKS[network]
    model = models.from_linen(module(**arguments, **({"param_dtype": param_dtype} if param_dtype else {})))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype or jnp.float32)}


@pytest.mark.parametrize("network", NETWORKS)
def test_activations_in_bfloat16(network):
    module, arguments, shape = NETWORKS[network]
    half = module(**arguments, dtype=jnp.bfloat16)

    def outputs_of_layers(key, inputs):
        params = models.from_linen(half).init(key, inputs)
        return params, half.apply({"params": params}, inputs, capture_intermediates=True, mutable=["intermediates"])

    params, (outputs, variables) = jax.eval_shape(outputs_of_layers, jax.random.key(0), jnp.zeros(shape))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    layers = variables["intermediates"]
    # The last layer computes in float32, and all others in bfloat16.
    last = layers.pop("head") if "head" in layers else layers.pop("dense_1")
    del layers["__call__"]
    assert [leaf.dtype for leaf in (outputs, *jax.tree.leaves(last))] == [jnp.float32, jnp.float32]
    assert {leaf.dtype for leaf in jax.tree.leaves(layers)} == {jnp.dtype(jnp.bfloat16)}


BUILDERS = {
    "conv4": (functools.partial(models.conv4, way=None, features=4), (5, 16, 16, 1)),
    "resnet12": (functools.partial(models.resnet12, way=None, widths=(2, 3)), (5, 4, 4, 1)),
    "multi_scale": (functools.partial(models.multi_scale, features=(2, 2, 2, 2)), (5, 16, 16, 1)),
}


@pytest.mark.parametrize("network", BUILDERS)
def test_builders_pass_the_dtype_of_the_parameters_on(x64, network):
    build, shape = BUILDERS[network]
    params = jax.eval_shape(build(param_dtype=jnp.float64).init, jax.random.key(0), jnp.zeros(shape))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("network", ["conv4", "resnet12"])
def test_builders_pass_the_dtype_of_the_blocks_on(network):
    build, shape = BUILDERS[network]
    model, inputs = build(dtype=jnp.bfloat16), jnp.zeros(shape)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    assert jax.eval_shape(model.apply, params, inputs).dtype == jnp.bfloat16


def test_bfloat16_changes_little():
    half, single = (models.mlp(features=(8, 2), activation=jnp.tanh, dtype=dtype) for dtype in (jnp.bfloat16, None))
    inputs = jax.random.normal(jax.random.key(0), (5, 4))
    params = single.init(jax.random.key(1), inputs)

    def meta_loss(params, model):
        def loss(params):
            return jnp.mean(jnp.square(model.apply(params, inputs)))

        return loss(jax.tree.map(lambda x, dx: x - 0.1 * dx, params, jax.grad(loss)(params)))

    of_half, of_single = (jax.jit(jax.value_and_grad(meta_loss), static_argnums=1)(params, m) for m in (half, single))
    chex.assert_trees_all_equal_dtypes(of_half, of_single)
    # The hidden layer is rounded to 8 bits. Rounding errors of the order of 2^-8 = 0.004 add up in sums of 4 and 8.
    chex.assert_trees_all_close(of_half, of_single, atol=0.03)
    assert of_half[0] != of_single[0]


@pytest.mark.parametrize(
    "model",
    [
        models.mlp(features=(4, 2)),
        models.conv4(way=2, features=3),
        models.conv4(way=2, features=3, pooling=True),
        models.multi_scale(features=(2, 2, 2, 2)),
    ],
)
def test_no_inputs_have_no_outputs(model):
    inputs = jnp.zeros((2, 28, 28, 1))
    params = model.init(jax.random.key(0), inputs)
    some, none = (jax.eval_shape(model.apply, params, batch) for batch in (inputs, inputs[:0]))
    assert none.shape == (0, *some.shape[1:])
