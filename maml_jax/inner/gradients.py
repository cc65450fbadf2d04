"""How the inner gradient is itself differentiated.

Every transform here has the signature of `jax.value_and_grad` and returns the same numbers. They
differ in what an outer `jax.grad` does: `jax.value_and_grad` stores the activations of the forward and
the backward pass, `mixed_mode` stores only the arguments and computes the same derivative by one forward-mode
product, `checkpointed` stores only the arguments and runs both passes again, `first_order` treats the gradient
as a constant.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import zero_from_primal
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from maml_jax.inner.pullback import contains, with_pullback
from maml_jax.types import ArrayTree, InnerGradFn, at_least_float32, check_integer, combine, partition


def first_order(fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` whose gradient is a constant to any outer differentiation.

    The inner *gradient* is stopped and not the adapted parameters: ∂φ/∂θ = I remains, and a learned
    step size that multiplies the gradient still learns. A rule that also uses the parameters or the loss, such as
    `optax.adamw` or `optax.polyak_sgd`, is differentiated with respect to these.

    Args:
      fun: `(*args) -> scalar`, or `(scalar, aux)` with `has_aux`.
      argnums: which positional arguments to differentiate; negative ones count from the end.
      has_aux: whether `fun` returns auxiliary data beside its value.

    Returns:
      `(*args) -> (value, grads)`, or `((value, aux), grads)`.

    References:
      Finn et al., 2017, section 5.2, "first-order approximation". https://arxiv.org/abs/1703.03400
    """
    value_and_grad = jax.value_and_grad(fun, argnums, has_aux=has_aux)

    def first_order_value_and_grad(*args, **kwargs):
        value, grads = value_and_grad(*args, **kwargs)
        return value, jax.lax.stop_gradient(grads)

    return first_order_value_and_grad


def checkpointed(fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` that keeps only its arguments and is run again when it is differentiated.

    It is reverse over reverse with the memory of `mixed_mode`, at a higher cost. It is also exact where `mixed_mode`
    is not: with rules of `jax.custom_jvp` that are no true derivatives.

    Args:
      fun: `(*args) -> scalar`, or `(scalar, aux)` with `has_aux`.
      argnums: which positional arguments to differentiate.
      has_aux: whether `fun` returns auxiliary data beside its value.

    Returns:
      `(*args) -> (value, grads)`, or `((value, aux), grads)`.
    """
    return _storing_arguments(fun, argnums, has_aux, is_forward=False)


def mixed_mode(fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` whose gradient is differentiated forward over reverse.

    Let f(a, b) be the function, a the arguments in `argnums` and b everything else that it depends on:
    other arguments and closed-over values. The gradient g(a, b) = ∂f/∂a is differentiated for a cotangent v.
    Because second derivatives commute, vᵀ∂g/∂a and vᵀ∂g/∂b are the derivative of the *complete* gradient
    (∂f/∂a, ∂f/∂b) along v in a,

        vᵀ ∂g/∂(a, b) = d/dε ∇f(a + εv, b) at ε = 0,

    which is one `jax.jvp` of `jax.grad`. Only (a, b) is stored for it. Inside a `lax.scan` the memory of an inner
    loop grows by one copy of the parameters a step, and not by the activations of both passes. (Outside of a
    scan XLA may merge the recomputation with the first pass. This costs memory and saves time.)

    The result is exact if ∇f is the gradient of a scalar function, because its Jacobian is then symmetric. A custom
    rule that is not the derivative of its function, such as gradient reversal, breaks this. A function that
    contains a `jax.custom_vjp` is therefore differentiated as by `checkpointed`, and so is one with a collective over a
    mapped axis or a `checkify.check`. A rule of `jax.custom_jvp` that is no derivative is not noticed;
    `check_inner_grad` compares a few products.

    The result may be differentiated any number of times, in both modes (`jax.grad`, `jax.jvp`, `jax.hessian`). From
    the second outer derivative on, the memory is that of `jax.value_and_grad`. Forward mode through a function with a
    `jax.custom_vjp` needs a forward rule that does not call the function itself, here as in `jax.value_and_grad`.

    Args:
      fun: `(*args, **kwargs) -> scalar`, or `(scalar, aux)` with `has_aux`.
      argnums: which positional arguments to differentiate; negative ones count from the end.
      has_aux: whether `fun` returns auxiliary data beside its value.

    Returns:
      `(*args, **kwargs) -> (value, grads)`, or `((value, aux), grads)`.

    Raises:
      TypeError, ValueError: as `jax.value_and_grad`, when called. A TypeError when it is differentiated, if a rule of
        `jax.custom_jvp` contains a `jax.custom_vjp`.

    References:
      Pearlmutter, 1994, Fast exact multiplication by the Hessian (the product with Hv); Kemaev et al.,
      2025, Scalable meta-learning via mixed-mode differentiation. https://arxiv.org/abs/2505.00793
    """
    return _storing_arguments(fun, argnums, has_aux, is_forward=True)


def check_inner_grad(
    fun: Callable,
    *args: ArrayTree,
    inner_grad: InnerGradFn = mixed_mode,
    num_products: int = 3,
    rtol: float = 1e-2,
) -> float:
    """Compares derivatives of an inner gradient with those of reverse over reverse.

    A transform that claims to be exact agrees with `jax.value_and_grad` to rounding. `mixed_mode` does not if `fun`
    contains a derivative rule that is not the derivative of a function.

    Args:
      fun: `(*args) -> scalar`, the inner loss; its first argument holds the parameters.
      args: where to compare. Floating arrays are varied, other leaves are constants.
      inner_grad: the transform to check.
      num_products: how many products of the derivative with random vectors are compared.
      rtol: the largest difference allowed, relative to the norm of the product.

    Returns:
      The largest relative difference.

    Raises:
      ValueError: if it is larger than `rtol` or not a number, or `num_products` not a positive integer.
    """
    num_products = check_integer("num_products", num_products, at_least=1)
    args = (jax.tree.map(jnp.asarray, args[0]), *args[1:])
    floating, fixed = partition(args, lambda _, leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))

    def product_of(transform):
        def product(cotangent):
            _, pullback = jax.vjp(lambda floating: transform(fun)(*combine(floating, fixed))[1], floating)
            # In float16 the bound below is zero, and squares overflow.
            return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(at_least_float32(pullback(cotangent)))])

        return jax.jit(product)

    product, exact_product = product_of(inner_grad), product_of(jax.value_and_grad)
    worst = 0.0
    for index in range(num_products):
        keys = iter(jax.random.split(jax.random.key(index), len(jax.tree.leaves(args[0]))))
        cotangent = jax.tree.map(lambda x, keys=keys: jax.random.normal(next(keys), x.shape, x.dtype), args[0])
        difference = jnp.linalg.norm(product(cotangent) - exact_product(cotangent))
        relative = difference / jnp.maximum(jnp.linalg.norm(exact_product(cotangent)), 1e-30)
        worst = float(np.maximum(worst, relative))  # NaN stays
    if np.isnan(worst):
        raise ValueError("a derivative of the inner gradient is not finite here; compare at other parameters or data")
    if not worst <= rtol:
        raise ValueError(
            f"the derivative of the inner gradient differs from reverse over reverse by {worst:.1%}. A custom "
            "derivative rule in the loss is probably no true derivative; choose inner_grad=checkpointed"
        )
    return worst


def _storing_arguments(fun: Callable, argnums: int | tuple[int, ...], has_aux: bool, *, is_forward: bool) -> Callable:
    """`jax.value_and_grad` that stores only its arguments when it is differentiated.

    Args:
      fun: as in `mixed_mode`.
      argnums: as in `mixed_mode`.
      has_aux: as in `mixed_mode`.
      is_forward: whether it is differentiated forward over reverse where it can be; otherwise it is run again.
    """

    def value_and_gradient(*args, **kwargs):
        # JAX's own check of `argnums` and of the differentiated arguments, on a function that costs nothing.
        jax.value_and_grad(lambda *args, **kwargs: jnp.zeros(()), argnums)(*args, **kwargs)
        positions = [operator.index(n) % len(args) for n in np.atleast_1d(argnums)]
        if len(set(positions)) < len(positions):
            raise ValueError(f"argnums={argnums} names an argument twice")
        chosen = [args[n] for n in positions]
        rest = [None if n in positions else arg for n, arg in enumerate(args)]
        arrays, static = partition(
            (rest, kwargs), lambda _, leaf: isinstance(leaf, jax.Array | np.ndarray | np.generic)
        )
        static_aux = None

        def call(chosen, arrays):
            nonlocal static_aux
            args, kwargs = combine(arrays, static)
            for n, arg in zip(positions, chosen, strict=True):
                args[n] = arg
            out = fun(*args, **kwargs)
            value, aux = out if has_aux else (out, None)
            aux, static_aux = partition(aux, lambda _, leaf: hasattr(leaf, "dtype"))
            return value, aux

        chosen = jax.tree.map(jnp.asarray, chosen)
        converted, closed_over, suits = _hoist(call, chosen, arrays)
        floating, fixed = partition(
            (arrays, closed_over), lambda _, leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        )

        def value_and_aux(chosen, floating, fixed):
            return converted(chosen, *combine(floating, fixed))

        def plain(chosen, floating, fixed):
            return jax.value_and_grad(value_and_aux, has_aux=True)(chosen, floating, fixed)

        def backward(primals, cotangents):
            """The pullback of `plain`; a cotangent that is zero is None."""
            chosen, floating, fixed = primals
            (value_bar, aux_bar), grads_bar = cotangents

            def complete_gradient(chosen):
                return jax.grad(value_and_aux, (0, 1), has_aux=True)(chosen, floating, fixed)[0]

            gradient, product = jax.jvp(complete_gradient, (chosen,), (_with_zeros(grads_bar, chosen),))
            if value_bar is not None:
                product = jax.tree.map(lambda p, g: p + (value_bar * g).astype(p.dtype), product, gradient)
            if jax.tree.leaves(aux_bar):
                aux, pullback = jax.vjp(lambda *floats: value_and_aux(*floats, fixed)[1], chosen, floating)
                product = jax.tree.map(jnp.add, product, pullback(_with_zeros(aux_bar, aux)))
            return product

        value_and_grads = with_pullback(plain, backward) if suits and is_forward else jax.checkpoint(plain)
        (value, aux), grads = value_and_grads(chosen, floating, fixed)
        grads = tuple(grads) if isinstance(argnums, tuple | list) else grads[0]
        return ((value, combine(aux, static_aux)) if has_aux else value), grads

    return value_and_gradient


def _hoist(fun: Callable, *args: ArrayTree) -> tuple[Callable, list, bool]:
    """Makes the values that `fun` closes over arguments.

    Returns:
      `(*args, closed_over) -> fun(*args)`; the closed-over values; whether `fun` can be differentiated forward over
      reverse: it contains no `jax.custom_vjp`, no collective over a mapped axis, whose name is not bound in a custom
      rule, and no `checkify.check`, which `checkify` does not find in a custom rule.
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)

    def converted(*args):
        *args, closed_over = args
        outputs = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, closed_over))(*jax.tree.leaves(args))
        return jax.tree.structure(shapes).unflatten(outputs)

    has_effect = any(type(effect).__name__ in ("NamedAxisEffect", "ErrorEffect") for effect in closed.jaxpr.effects)
    has_custom_vjp = contains(closed, lambda name: name.startswith("custom_vjp"))
    return converted, closed.consts, not (has_effect or has_custom_vjp)


def _with_zeros(cotangents: Any, primals: Any) -> Any:
    """`cotangents` with zeros for None; those of integers are JAX's zeros without a size."""

    def zero_for_none(primal, bar):
        return zero_from_primal(primal) if bar is None else bar

    return jax.tree.map(zero_for_none, primals, cotangents)
