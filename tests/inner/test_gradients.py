from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from maml_jax import Batch, first_order, inner_loop, losses, mixed_mode, models, parallel
from maml_jax.algorithms import maml
from maml_jax.types import Episode

TRANSFORMS = {"mixed_mode": mixed_mode, "reverse": jax.value_and_grad}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def network_loss(params, batch):
    hidden = jnp.tanh(batch.inputs @ params["first"])
    return jnp.mean(jnp.square(hidden @ params["second"] - batch.targets))


def network():
    """Parameters, support and query of a smooth two-layer regression in the default precision."""
    params = {"first": 0.7 * normal(0, 2, 3), "second": normal(1, 3)}
    return params, Batch(normal(2, 4, 2), normal(3, 4)), Batch(normal(4, 4, 2), normal(5, 4))


def scalar_of(tree):
    """A smooth scalar that depends on every floating entry, each with a weight of its own."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    flat, _ = ravel_pytree(leaves)
    return jnp.sum(jnp.sin(flat) * jnp.arange(1.0, flat.size + 1))


def assert_derivatives_agree(outer, *args, argnums=0, rtol=1e-11):
    """`outer(transform)` is a scalar function; both transforms must give its value and derivatives."""
    results = [jax.jit(jax.value_and_grad(outer(t), argnums))(*args) for t in TRANSFORMS.values()]
    chex.assert_trees_all_close(*results, rtol=rtol, atol=1e-12)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(results[0]))


def make_rule(name):
    return {
        "sgd": optax.sgd,
        "momentum": partial(optax.sgd, momentum=0.9),
        "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
        "adam": partial(optax.adam, eps_root=1e-8),
    }[name]


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adam"])
def test_exact_through_an_inner_loop_in_parameters_rate_data_and_regulariser(x64, rule):
    params, support, query = network()
    strength = jnp.array(-1.0)
    rate = jnp.array(0.1)

    def regularised(params, support):
        batch, strength = support
        return network_loss(params, batch) + jnp.exp(strength) * jnp.sum(ravel_pytree(params)[0] ** 4)

    def outer(transform):
        def objective(params, rate, support, strength):
            task_params, _ = inner_loop(
                regularised, make_rule(rule)(rate), params, (support, strength), num_steps=3, inner_grad=transform
            )
            return network_loss(task_params, query)

        return objective

    args = (params, rate, support, strength)
    assert_derivatives_agree(outer, *args, argnums=(0, 1, 2, 3), rtol=1e-9)
    check_grads(jax.jit(outer(mixed_mode)), args, order=1, modes=["rev"], rtol=1e-5, eps=1e-5)


def product(a, b):
    return jnp.sum(jnp.sin(a) * jnp.exp(b["x"]) * a)


@pytest.mark.parametrize("argnums", [0, 1, -1, -2, (0,), (0, 1), (1, 0), (-1,), (0, -1)])
def test_argnums_of_value_and_grad(x64, argnums):
    args = (normal(0, 3), {"x": normal(1, 3)})
    results = [transform(product, argnums)(*args) for transform in (mixed_mode, jax.value_and_grad, first_order)]
    chex.assert_trees_all_close(results[0], results[1], rtol=1e-12)
    chex.assert_trees_all_equal(results[2], results[1])

    def outer(transform):
        return lambda *args: scalar_of(transform(product, argnums)(*args))

    assert_derivatives_agree(outer, *args, argnums=(0, 1))


def test_auxiliary_outputs_and_the_gradient_through_them(x64):
    def loss(a, b):
        return jnp.sum(jnp.sin(a * b)), {"floating": jnp.cos(a) * b, "index": jnp.arange(3), "key": jax.random.key(0)}

    args = (normal(0, 3), normal(1, 3))
    mixed, reverse = (t(loss, has_aux=True)(*args) for t in TRANSFORMS.values())
    assert jax.tree.structure(mixed) == jax.tree.structure(reverse)
    assert mixed[0][1].pop("key") == reverse[0][1].pop("key")
    chex.assert_trees_all_close(mixed, reverse, rtol=1e-12)

    def through_aux_alone(transform):
        return lambda *args: scalar_of(transform(loss, has_aux=True)(*args)[0][1]["floating"])

    def through_everything(transform):
        def objective(*args):
            (value, aux), grads = transform(loss, has_aux=True)(*args)
            return scalar_of((value, aux["floating"], grads))

        return objective

    assert_derivatives_agree(through_aux_alone, *args, argnums=(0, 1))
    assert_derivatives_agree(through_everything, *args, argnums=(0, 1))


def test_integers_keys_and_python_numbers_are_arguments_too(x64):
    def loss(params, labels, key, temperature):
        noisy = params["scores"] + 0.1 * jax.random.normal(key, params["scores"].shape)
        return losses.cross_entropy(noisy * temperature, labels)

    params = {"scores": normal(0, 4, 3)}

    def outer(transform):
        return lambda params: scalar_of(transform(loss)(params, jnp.array([0, 2, 1, 1]), jax.random.key(5), 2.0))

    assert_derivatives_agree(outer, params)


def test_keyword_arguments_are_constants_of_the_rule(x64):
    def loss(a, *, scale):
        return jnp.sum(jnp.sin(a) * scale)

    a, scale = normal(0, 3), normal(1, 3)

    def outer(transform):
        return lambda a: scalar_of(transform(loss)(a, scale=scale))

    assert_derivatives_agree(outer, a)
    with pytest.raises(ValueError, match="Pass the value to the loss as an argument"):
        jax.grad(lambda scale: scalar_of(mixed_mode(loss)(a, scale=scale)))(scale)


@pytest.mark.parametrize("level", ["vmap", "scan", "jit", "grad of grad", "checkpoint"])
def test_under_other_transformations(x64, level):
    a, b = normal(0, 2, 3), normal(1, 2, 3)

    def outer(transform):
        def one(a, b):
            return scalar_of(transform(lambda a, b: product(a, {"x": b}), (0, 1))(a, b))

        if level == "vmap":
            return lambda a, b: jnp.sum(jax.vmap(one)(a, b) * jnp.arange(1.0, 3.0))
        if level == "scan":
            return lambda a, b: jnp.sum(
                jax.lax.scan(lambda c, ab: (c + one(*ab), one(ab[0] + c, ab[1])), 0.1, (a, b))[1]
            )
        if level == "jit":
            return lambda a, b: jax.jit(one)(a[0], b[1]) + jax.jit(one)(a[1], b[0])
        if level == "checkpoint":
            return jax.checkpoint(one)
        return lambda a, b: scalar_of(jax.grad(one, (0, 1))(a, b))

    assert_derivatives_agree(outer, a, b, argnums=(0, 1))


def test_second_outer_derivatives_agree_with_finite_differences(x64):
    a, b = normal(0, 3), normal(1, 3)

    def objective(a, b):
        return scalar_of(mixed_mode(lambda a, b: product(a, {"x": b}))(a, b))

    check_grads(jax.jit(jax.grad(objective, (0, 1))), (a, b), order=1, modes=["rev"], rtol=1e-6, eps=1e-5)


def test_under_shard_map(x64):
    params, support, query = network()
    num_tasks = 4
    scales = jnp.linspace(0.5, 1.5, num_tasks)

    def objective(params, scale):
        batch = support._replace(targets=support.targets * scale)
        task_params, _ = inner_loop(
            network_loss, optax.sgd(0.1, momentum=0.9), params, batch, num_steps=2, inner_grad=mixed_mode
        )
        return network_loss(task_params, query)

    def gradients(params, scales):
        return jax.vmap(jax.grad(objective, (0, 1)), in_axes=(None, 0))(params, scales)

    mesh = parallel.task_mesh(jax.devices()[:num_tasks])
    tasks = PartitionSpec("tasks")

    def local(params, scales):
        return gradients(jax.lax.pcast(params, "tasks", to="varying"), scales)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), tasks), out_specs=tasks)
    chex.assert_trees_all_close(jax.jit(sharded)(params, scales), jax.jit(gradients)(params, scales), rtol=1e-12)


CONTEXTS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: lambda x: jnp.sum(jax.lax.scan(lambda _, y: (None, f(y)), None, x[None])[1]),
    "vmap": lambda f: lambda x: jnp.sum(jax.vmap(f)(x[None])),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_closing_over_a_differentiated_value_is_refused(context):
    a = jnp.arange(3.0)

    def outer(b):
        return jnp.sum(mixed_mode(lambda a: jnp.sum(jnp.sin(a) * b))(a)[1])

    with pytest.raises(ValueError, match=r"closes over a value of shape \(3,\).*Pass the value to the loss as an"):
        jax.grad(CONTEXTS[context](outer))(jnp.ones(3))


@pytest.mark.parametrize("context", CONTEXTS)
def test_closing_over_any_other_value_works(context):
    a, b = jnp.arange(3.0), jnp.linspace(1.0, 2.0, 3)

    def outer(transform):
        def objective(a):
            inside = jnp.sqrt(b)  # a tracer of its own under jit, scan and vmap
            return jnp.sum(transform(lambda a: jnp.sum(jnp.sin(a) * inside * b))(a)[1] ** 2)

        return CONTEXTS[context](objective)

    chex.assert_trees_all_close(*(jax.grad(outer(t))(a) for t in TRANSFORMS.values()), rtol=1e-6)


def test_a_closed_over_value_is_refused_in_the_second_outer_derivative_as_well():
    def outer(b):
        return jnp.sum(jax.grad(lambda a: jnp.sum(mixed_mode(lambda a: jnp.sum(a**3 * b))(a)[1]))(jnp.ones(3)))

    with pytest.raises(ValueError, match="closes over a value"):
        jax.grad(outer)(jnp.ones(3))


def test_first_order_gradients_are_constants_and_values_are_not():
    a, b = jnp.arange(3.0), jnp.ones(3)

    def outer(a):
        value, grads = first_order(lambda a: jnp.sum(jnp.sin(a) * b))(a)
        return value + jnp.sum(grads * a)

    # Of value + g·a, the value differentiates to cos a and the constant g = cos a to itself.
    chex.assert_trees_all_close(jax.grad(outer)(a), 2 * jnp.cos(a), rtol=1e-6)


def omniglot_meta_gradient(inner_grad, num_steps):
    """One 5-way 1-shot meta-gradient of the Omniglot network with 15 queries a class, and its parameters."""
    model = models.conv4(way=5)
    support, query = (
        Batch(jax.ShapeDtypeStruct((n, 28, 28, 1), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)) for n in (5, 75)
    )
    learner = maml(
        model, losses.cross_entropy, inner_optimizer=optax.sgd(0.4), num_inner_steps=num_steps, inner_grad=inner_grad
    )
    params = jax.eval_shape(model.init, jax.random.key(0), support.inputs)
    return jax.jit(jax.grad(learner.objective, has_aux=True)).lower(params, Episode(support, query)), params


def test_memory_is_flat_in_the_number_of_inner_steps():
    temporaries = {}
    for name, inner_grad in TRANSFORMS.items():
        for num_steps in (1, 20):
            lowered, params = omniglot_meta_gradient(inner_grad, num_steps)
            temporaries[name, num_steps] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporaries["mixed_mode", 20] <= 1.5 * temporaries["mixed_mode", 1]
    # What grows is one copy of the parameters a step, which the backward pass starts from.
    growth = temporaries["mixed_mode", 20] - temporaries["mixed_mode", 1]
    assert growth <= 20 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    # Reverse over reverse also keeps the activations of a forward and a backward pass.
    assert temporaries["reverse", 20] > 2 * temporaries["reverse", 1]
    assert temporaries["reverse", 20] > 2 * temporaries["mixed_mode", 20]
