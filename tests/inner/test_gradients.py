from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from maml_jax import (
    Batch,
    check_inner_grad,
    checkpointed,
    first_order,
    inner_loop,
    losses,
    mixed_mode,
    models,
    parallel,
)
from maml_jax.algorithms import maml
from maml_jax.types import Episode

TRANSFORMS = {"mixed_mode": mixed_mode, "checkpointed": checkpointed, "reverse": jax.value_and_grad}


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
    """`outer(transform)` is a scalar function; every exact transform must give its value and derivatives."""
    results = [jax.jit(jax.value_and_grad(outer(t), argnums))(*args) for t in TRANSFORMS.values()]
    for result in results:
        chex.assert_trees_all_close(result, results[-1], rtol=rtol, atol=1e-12)
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(result))


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
    mixed, reverse = (t(loss, has_aux=True)(*args) for t in (mixed_mode, jax.value_and_grad))
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


def test_keyword_arguments_are_differentiated_too(x64):
    def loss(a, *, scale):
        return jnp.sum(jnp.sin(a) * scale)

    def outer(transform):
        return lambda a, scale: scalar_of(transform(loss)(a, scale=scale))

    assert_derivatives_agree(outer, normal(0, 3), normal(1, 3), argnums=(0, 1))


def outcome(transform, args, **kwargs):
    """The result, or the type and message of the error."""
    try:
        return transform(lambda a, b: jnp.sum(a * b), **kwargs)(*args)
    except Exception as error:
        return type(error), str(error)


MISUSES = {
    "argnums out of range": ({"argnums": 2}, (jnp.ones(3), jnp.ones(3))),
    "argnums far below zero": ({"argnums": -3}, (jnp.ones(3), jnp.ones(3))),
    "an integer argument": ({"argnums": 1}, (jnp.ones(3), jnp.arange(3))),
    "no positional argument": ({}, ()),
    "a float for argnums": ({"argnums": 0.0}, (jnp.ones(3), jnp.ones(3))),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_ends_in_the_error_of_value_and_grad(misuse):
    kwargs, args = MISUSES[misuse]
    ours, jax_own = (outcome(transform, args, **kwargs) for transform in (mixed_mode, jax.value_and_grad))
    assert ours == jax_own
    assert issubclass(ours[0], Exception)


def test_an_argument_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"argnums=\(0, -2\) names an argument twice"):
        mixed_mode(product, argnums=(0, -2))(jnp.ones(3), {"x": jnp.ones(3)})


@pytest.mark.parametrize("transform", [mixed_mode, checkpointed])
def test_numpy_argnums_and_values_that_are_no_arrays_pass_through(transform):
    def loss(a, flag, *, name):
        assert flag is True
        return jnp.sum(jnp.sin(a)), {"name": name, "nothing": None, "a": a, "half": 0.5}

    ours, jax_own = (
        t(loss, argnums=np.int64(0), has_aux=True)(jnp.arange(3.0), True, name="x")
        for t in (transform, jax.value_and_grad)
    )
    (_, aux), _ = ours
    assert (aux["name"], aux["nothing"], aux["half"]) == ("x", None, 0.5)
    chex.assert_trees_all_close((ours[0][0], aux["a"], ours[1]), (jax_own[0][0], jnp.arange(3.0), jax_own[1]))


def test_complex_arguments_are_differentiated(x64):
    def outer(transform):
        return lambda a, z: scalar_of(transform(lambda a, z: jnp.sum(jnp.abs(z * jnp.sin(a)) ** 2))(a, z))

    z = normal(1, 3) + 1j * normal(2, 3)
    ours, exact = (jax.grad(outer(t), (0, 1))(normal(0, 3), z) for t in (mixed_mode, jax.value_and_grad))
    chex.assert_trees_all_close(ours, exact, rtol=1e-12)
    assert jnp.all(exact[1] != 0)


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

    check_grads(jax.jit(jax.grad(objective, (0, 1))), (a, b), order=1, modes=["fwd", "rev"], rtol=1e-6, eps=1e-5)


def three_levels(transform):
    """Learning to learn to learn: an inner step inside an inner step, differentiated from outside."""

    def outer(start, scale):
        def lower(x):
            return jnp.sum(jnp.sin(x * scale) * x)

        def middle(x):
            adapted, _ = inner_loop(lambda p, _: lower(p), optax.sgd(0.1), x, None, num_steps=2, inner_grad=transform)
            return jnp.sum(jnp.cos(adapted * scale))

        _, grads = transform(middle)(start)
        return jnp.sum((start - 0.1 * grads) ** 3)

    return outer


def test_it_may_be_nested(x64):
    assert_derivatives_agree(three_levels, normal(0, 3), normal(1, 3), argnums=(0, 1))
    check_grads(three_levels(mixed_mode), (normal(0, 3), normal(1, 3)), order=1, modes=["rev"], rtol=1e-5, eps=1e-5)


def test_hessians_and_their_products(x64):
    args = (normal(0, 3), normal(1, 3))
    for transform in (mixed_mode, checkpointed):
        chex.assert_trees_all_close(
            jax.hessian(three_levels(transform))(*args), jax.hessian(three_levels(jax.value_and_grad))(*args), rtol=1e-9
        )
    ours, exact = (
        jax.jvp(jax.grad(three_levels(t)), args, (normal(2, 3), normal(3, 3))) for t in (mixed_mode, jax.value_and_grad)
    )
    chex.assert_trees_all_close(ours, exact, rtol=1e-9)


FORWARD = {
    "jvp": lambda f, args, tangents: jax.jvp(f, args, tangents),
    "jit": lambda f, args, tangents: jax.jit(lambda *args: jax.jvp(f, args, tangents))(*args),
    "linearize": lambda f, args, tangents: jax.linearize(f, *args)[1](*tangents),
    "vmap": lambda f, args, tangents: jax.vmap(lambda s: jax.jvp(f, args, tuple(s * t for t in tangents))[1])(
        jnp.arange(3.0)
    ),
    "forward over forward": lambda f, args, tangents: jax.jvp(
        lambda *args: jax.jvp(f, args, tangents)[1], args, tangents
    ),
    "reverse over forward": lambda f, args, tangents: jax.grad(lambda *args: jax.jvp(f, args, tangents)[1])(*args),
    "some arguments": lambda f, args, tangents: jax.jvp(lambda start: f(start, args[1]), args[:1], tangents[:1]),
}


@pytest.mark.parametrize("transform", [mixed_mode, checkpointed])
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode(x64, transform, mode):
    args, tangents = (normal(0, 3), normal(1, 3)), (normal(2, 3), normal(3, 3))
    ours, exact = (FORWARD[mode](three_levels(t), args, tangents) for t in (transform, jax.value_and_grad))
    chex.assert_trees_all_close(ours, exact, rtol=1e-9)


def test_forward_mode_with_integers_and_auxiliary_outputs(x64):
    def loss(a, n):
        return jnp.sum(jnp.sin(a) ** n), {"twice": 2 * n, "square": a**2, "name": "x"}

    def outputs(transform):
        return lambda a: transform(lambda a: loss(a, jnp.array([2, 3])), has_aux=True)(a)[0][1]["square"].sum()

    ours, exact = (jax.jvp(outputs(t), (normal(0, 2),), (normal(1, 2),)) for t in (mixed_mode, jax.value_and_grad))
    chex.assert_trees_all_close(ours, exact, rtol=1e-12)


def test_a_transposed_product_is_transposed_again(x64):
    """The transpose of the linear map of a `jax.linearize`, transposed once more, is that map."""
    args, tangents = (normal(0, 3), normal(1, 3)), (normal(2, 3), normal(3, 3))
    _, linear = jax.linearize(lambda *args: mixed_mode(lambda x, y: jnp.sum(jnp.sin(x * y)))(*args)[1], *args)
    back = jax.linear_transpose(linear, *tangents)
    (again,) = jax.linear_transpose(back, tangents[0])(tuple(tangents))
    chex.assert_trees_all_close(again, linear(*tangents), rtol=1e-12)


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


# The pattern of JAX's documentation: the forward rule calls the function itself.
sine.defvjp(lambda x: (sine(x), x), lambda x, bar: (bar * jnp.cos(x),))


@jax.custom_vjp
def known_sine(x):
    return jnp.sin(x)


known_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, bar: (bar * jnp.cos(x),))


@pytest.mark.parametrize("transform", [mixed_mode, checkpointed])
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_through_a_custom_vjp(x64, transform, mode):
    def result(sine, transform):
        def norm_of_gradient(*args):
            return jnp.sum(transform(lambda x, y: jnp.sum(sine(x) * y**2))(*args)[1] ** 2)

        return FORWARD[mode](norm_of_gradient, (normal(0, 3), normal(1, 3)), (normal(2, 3), normal(3, 3)))

    chex.assert_trees_all_close(result(known_sine, transform), result(jnp.sin, jax.value_and_grad), rtol=1e-9)


@jax.custom_vjp
def reverse_gradient(x):
    return x


reverse_gradient.defvjp(lambda x: (x, None), lambda _, bar: (-bar,))


@jax.custom_vjp
def binarise(x):
    return jnp.where(x > 0, 1.0, -1.0)


binarise.defvjp(lambda x: (binarise(x), x), lambda x, bar: (bar * (jnp.abs(x) < 1),))


@pytest.mark.parametrize("rule", [sine, reverse_gradient, binarise])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_loss_with_rules_of_its_own_is_differentiated_by_these_rules(x64, rule, num_steps):
    def loss(params, batch):
        return jnp.mean(jnp.square(jnp.tanh(rule(batch.inputs @ params["first"])) @ params["second"] - batch.targets))

    params, support, query = network()

    def outer(transform):
        def objective(params):
            task_params, _ = inner_loop(
                loss, optax.sgd(0.1), params, support, num_steps=num_steps, inner_grad=transform
            )
            return loss(task_params, query)

        return objective

    assert_derivatives_agree(outer, params)
    check_inner_grad(loss, params, support)
    assert check_inner_grad(lambda x: x**3, 2.0) < 1e-6  # a number of Python is a parameter too


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, lambda f: lambda x: jax.lax.cond(True, f, f, x)])
def test_a_rule_of_its_own_is_found_inside_other_programs(x64, wrap):
    def loss(params, batch):
        hidden = jnp.tanh(wrap(reverse_gradient)(batch.inputs @ params["first"]))
        return jnp.mean(jnp.square(hidden @ params["second"] - batch.targets))

    params, support, query = network()

    def outer(transform):
        return lambda params: loss(
            inner_loop(loss, optax.sgd(0.1), params, support, num_steps=2, inner_grad=transform)[0], query
        )

    assert_derivatives_agree(outer, params)


def test_a_function_with_rules_of_its_own_is_run_again_and_not_stored():
    primitives = [eqn.primitive.name for eqn in jax.make_jaxpr(mixed_mode(lambda x: sine(x) ** 2))(1.0).eqns]
    assert jax.make_jaxpr(jax.checkpoint(jnp.sin))(1.0).eqns[0].primitive.name in primitives


@jax.custom_jvp
def made_up(x):
    return x


made_up.defjvp(lambda primals, tangents: (made_up(primals[0]), tangents[0] * jnp.roll(primals[0], 1)))


def test_the_check_finds_a_rule_that_is_no_derivative(x64):
    def loss(a, b):
        return jnp.sum(jnp.sin(made_up(a * b)) * a)

    args = (normal(0, 3), normal(1, 3))
    with pytest.raises(ValueError, match=r"differs from reverse over reverse by \d+\.\d%.*inner_grad=checkpointed"):
        check_inner_grad(loss, *args)
    assert check_inner_grad(loss, *args, inner_grad=checkpointed) < 1e-12
    with pytest.raises(ValueError, match="differs from reverse over reverse by 100"):
        check_inner_grad(network_loss, *network()[:2], inner_grad=first_order)


@pytest.mark.parametrize("product", [0, 1])
def test_the_largest_difference_counts(product):
    # Wrong for one of the random numbers with which the derivative is multiplied.
    number = jax.random.normal(*jax.random.split(jax.random.key(product), 1), ())

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(
        lambda x: (x, None), lambda _, cotangent: (jnp.where(cotangent == number, factor, 1.0) * cotangent,)
    )

    def wrong_once(fun):
        def value_and_grad(x):
            value, grad = jax.value_and_grad(fun)(x)
            return value, identity(grad)

        return value_and_grad

    factor = 2.0
    with pytest.raises(ValueError, match=r"differs from reverse over reverse by 100\.0%"):
        check_inner_grad(lambda x: x**3, 2.0, inner_grad=wrong_once, num_products=product + 1)
    if product:
        assert check_inner_grad(lambda x: x**3, 2.0, inner_grad=wrong_once, num_products=product) < 1e-6
    factor = 1.005
    assert check_inner_grad(lambda x: x**3, 2.0, inner_grad=wrong_once) == pytest.approx(0.005, rel=0.01)
    with pytest.raises(ValueError, match=r"differs from reverse over reverse by 0\.5%"):
        check_inner_grad(lambda x: x**3, 2.0, inner_grad=wrong_once, rtol=1e-3)


def test_the_derivative_in_the_data_is_compared_too():
    def constant_data(fun):
        return lambda params, data: jax.value_and_grad(fun)(params, jax.lax.stop_gradient(data))

    with pytest.raises(ValueError, match="differs from reverse over reverse"):
        check_inner_grad(
            lambda params, data: jnp.sum(params**2 * data), jnp.ones(3), jnp.ones(3), inner_grad=constant_data
        )


@pytest.mark.parametrize("context", [lambda f: f, jax.jit])
def test_a_mean_over_a_mapped_axis_inside_the_loss(x64, context):
    def outer(transform):
        def one(a):
            return scalar_of(transform(lambda a: jnp.sum(jnp.sin(a) * jax.lax.pmean(a, "tasks")))(a)[1])

        return lambda a: jnp.sum(jax.vmap(one, axis_name="tasks")(a))

    ours, exact = (context(jax.grad(outer(t)))(normal(0, 4, 3)) for t in (mixed_mode, jax.value_and_grad))
    chex.assert_trees_all_close(ours, exact, rtol=1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map(x64, check_vma):
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
        return gradients(jax.lax.pcast(params, "tasks", to="varying") if check_vma else params, scales)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), tasks), out_specs=tasks, check_vma=check_vma)
    expected = jax.jit(gradients)(params, scales)
    chex.assert_trees_all_close(jax.jit(sharded)(params, scales), expected, rtol=1e-12)
    chex.assert_trees_all_close(sharded(params, scales), expected, rtol=1e-12)


CONTEXTS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: lambda x: jnp.sum(jax.lax.scan(lambda _, y: (None, f(y)), None, x[None])[1]),
    "vmap": lambda f: lambda x: jnp.sum(jax.vmap(f)(x[None])),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_closing_over_a_differentiated_value(x64, context):
    a = normal(0, 3)

    def outer(transform):
        return CONTEXTS[context](lambda b: scalar_of(transform(lambda a: jnp.sum(jnp.sin(a) * b * jnp.exp(a * b)))(a)))

    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        ours, exact = (wrap(jax.grad(outer(t)))(normal(1, 3)) for t in (mixed_mode, jax.value_and_grad))
        chex.assert_trees_all_close(ours, exact, rtol=1e-11)
        assert jnp.all(exact != 0)


def test_a_learned_regulariser_may_be_closed_over(x64):
    params, support, query = network()

    def outer(transform):
        def objective(params, strength):
            def regularised(params, batch):
                return network_loss(params, batch) + jnp.exp(strength) * jnp.sum(ravel_pytree(params)[0] ** 4)

            task_params, _ = inner_loop(regularised, optax.sgd(0.1), params, support, num_steps=3, inner_grad=transform)
            return network_loss(task_params, query)

        return objective

    assert_derivatives_agree(outer, params, jnp.array(-1.0), argnums=(0, 1), rtol=1e-9)


@pytest.mark.parametrize("context", CONTEXTS)
def test_closing_over_any_other_value_works(context):
    a, b = jnp.arange(3.0), jnp.linspace(1.0, 2.0, 3)

    def outer(transform):
        def objective(a):
            inside = jnp.sqrt(b)  # a tracer of its own under jit, scan and vmap
            return jnp.sum(transform(lambda a: jnp.sum(jnp.sin(a) * inside * b))(a)[1] ** 2)

        return CONTEXTS[context](objective)

    ours, exact = (jax.grad(outer(t))(a) for t in (mixed_mode, jax.value_and_grad))
    chex.assert_trees_all_close(ours, exact, rtol=1e-6)


def test_first_order_gradients_are_constants_and_values_are_not():
    a, b = jnp.arange(3.0), jnp.ones(3)

    def outer(a):
        value, grads = first_order(lambda a: jnp.sum(jnp.sin(a) * b))(a)
        return value + jnp.sum(grads * a)

    # Of value + g·a, the value differentiates to cos a and the constant g = cos a to itself.
    chex.assert_trees_all_close(jax.grad(outer)(a), 2 * jnp.cos(a), rtol=1e-6)


def test_parameters_in_half_precision_and_a_value_in_float32():
    def outer(transform):
        def objective(a):
            value, grads = transform(lambda a: jnp.sum(a.astype(jnp.float32) ** 3))(a)
            return value + jnp.sum(grads.astype(jnp.float32))

        return objective

    a = jnp.arange(3.0, dtype=jnp.bfloat16)
    ours, exact = (jax.grad(outer(transform))(a) for transform in (mixed_mode, jax.value_and_grad))
    assert ours.dtype == jnp.bfloat16
    chex.assert_trees_all_close(ours, exact)


def test_first_order_gradients_of_a_function_with_auxiliary_data():
    def outer(a):
        (value, aux), grads = first_order(lambda a, b: (jnp.sum(a * b**2), 3.0 * b), argnums=1, has_aux=True)(a, a)
        return value + jnp.sum(aux) + jnp.sum(grads), aux

    # Σ a³ + 3 Σ a, and the constant 2 Σ a².
    grads, aux = jax.grad(outer, has_aux=True)(jnp.arange(3.0))
    chex.assert_trees_all_close(grads, 3 * jnp.arange(3.0) ** 2 + 3.0)
    chex.assert_trees_all_close(aux, 3 * jnp.arange(3.0))


def lowered_meta_gradient(inner_grad, num_steps):
    """A meta-gradient with 200 support examples, whose activations outweigh the parameters; and the parameters."""
    model = models.mlp(features=(64, 64, 64, 5), activation=jnp.tanh)
    support, query = (
        Batch(jax.ShapeDtypeStruct((n, 16), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)) for n in (200, 75)
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
            lowered, params = lowered_meta_gradient(inner_grad, num_steps)
            temporaries[name, num_steps] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporaries["mixed_mode", 20] <= 1.5 * temporaries["mixed_mode", 1]
    # What grows is one copy of the parameters a step, which the backward pass starts from.
    growth = temporaries["mixed_mode", 20] - temporaries["mixed_mode", 1]
    assert growth <= 20 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    # Reverse over reverse also keeps the activations of a forward and a backward pass.
    assert temporaries["checkpointed", 20] <= 2 * temporaries["checkpointed", 1]
    assert temporaries["reverse", 20] > 2 * temporaries["reverse", 1]
    assert temporaries["reverse", 20] > 2 * temporaries["mixed_mode", 20]


def test_a_product_that_is_no_number_is_no_agreement():
    # The norm has no derivative at zero.
    with pytest.raises(ValueError, match="a derivative of the inner gradient is not finite here"):
        check_inner_grad(lambda p: jnp.linalg.norm(0.0 * p), jnp.ones(3))
    with pytest.raises(ValueError, match="num_products must be an integer of at least 1, got 0"):
        check_inner_grad(lambda p: jnp.sum(p**2), jnp.ones(3), num_products=0)


def test_a_linear_loss_in_half_precision_agrees():
    assert check_inner_grad(lambda p: jnp.sum(3 * p), jnp.ones(3, jnp.float16)) == 0.0


def test_a_rule_that_hides_a_custom_vjp_is_named_and_checkpointed_takes_it(x64):
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, bar: (2.0 * x * bar,))

    @jax.custom_jvp
    def tanh(x):
        return jnp.tanh(x)

    tanh.defjvp(lambda primals, tangents: (tanh(*primals), (1.0 - square(tanh(*primals))) * tangents[0]))

    def of_gradient(transform, function):
        return jax.grad(lambda p: jnp.sum(transform(lambda p: jnp.sum(function(p)))(p)[1] ** 2))(jnp.array([0.3, -0.7]))

    with pytest.raises(TypeError, match=r"contains a jax\.custom_vjp, .* inner_grad=checkpointed"):
        of_gradient(mixed_mode, tanh)
    expected = of_gradient(jax.value_and_grad, jnp.tanh)
    chex.assert_trees_all_close(of_gradient(checkpointed, tanh), expected, rtol=1e-10)


def test_a_loss_may_have_a_check(x64):
    def checked(params, batch):
        checkify.check(jnp.all(params < 2.0), "a parameter is too large")
        return jnp.mean(jnp.square(batch @ params))

    def outer(params):
        return inner_loop(checked, optax.sgd(0.1), params, jnp.ones((3, 4)), num_steps=2)[0].sum()

    error, found = jax.jit(checkify.checkify(jax.grad(outer)))(jnp.ones(4))
    error.throw()
    plain = jax.grad(
        lambda p: inner_loop(
            lambda p, batch: jnp.mean(jnp.square(batch @ p)), optax.sgd(0.1), p, jnp.ones((3, 4)), num_steps=2
        )[0].sum()
    )(jnp.ones(4))
    chex.assert_trees_all_close(found, plain, rtol=1e-12)
    # JAX itself loses a check where it differentiates a gradient, so it is found without the outer derivative.
    assert "too large" in checkify.checkify(outer)(jnp.full(4, 3.0))[0].get()
