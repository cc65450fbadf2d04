"""A function with a pullback of its own that can be differentiated forwards too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def with_pullback(function: Callable, backward: Callable) -> Callable:
    """Gives `function` a pullback of its own, and leaves its forward mode as it is.

    A `jax.custom_vjp` has no forward mode: `jax.jvp` of it is an error.

    Args:
      function: `(*primals) -> outputs`, pytrees of arrays; it must not close over traced values.
      backward: `(primals, cotangents) -> cotangents of the floating primals`, in the order of the leaves. The primals
        that are not floating come last. A cotangent that is zero is None.

    Returns:
      `function`, differentiable any number of times in both modes.
    """

    def derivative(primals, tangents):
        outputs = function(*primals)
        residuals, primal_tree = jax.tree.flatten(primals)
        leaves, output_tree = jax.tree.flatten(outputs)
        tangents = jax.tree.leaves(tangents)
        varied = [n for n, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]
        floating = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def pushforward(residuals, tangents):
            def of_varied(*values):
                replaced = dict(zip(varied, values, strict=True))
                primals = primal_tree.unflatten([replaced.get(n, x) for n, x in enumerate(residuals)])
                outputs = jax.tree.leaves(function(*primals))
                return [outputs[n] for n in floating]

            return jax.jvp(of_varied, [residuals[n] for n in varied], tangents)[1]

        def pullback(residuals, cotangents):
            given = dict(zip(floating, cotangents, strict=True))
            bars = output_tree.unflatten([given.get(n) for n in range(len(leaves))])
            product = jax.tree.leaves(backward(primal_tree.unflatten(residuals), bars))
            return [product[n] for n in varied]

        moved = _linear_with_transpose(pushforward, pullback, residuals, [tangents[n] for n in varied])
        moved = dict(zip(floating, moved, strict=True))
        return outputs, output_tree.unflatten([moved.get(n, zero_from_primal(x)) for n, x in enumerate(leaves)])

    result = jax.custom_jvp(function)
    result.defjvp(derivative, symbolic_zeros=True)
    return result


def contains(jaxpr: Any, is_meant: Callable[[str], bool]) -> bool:
    """Whether a jaxpr, or one within it, has a primitive whose name fulfils `is_meant`."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        is_meant(eqn.primitive.name)
        or any(
            contains(value, is_meant)
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda value: hasattr(value, "eqns"))
            if hasattr(value, "eqns")
        )
        for eqn in jaxpr.eqns
    )


ListFn = Callable[[list, list], list]
"""`(residuals, linear) -> outputs`, lists of arrays; linear in its second argument."""

_linear_p = Primitive("linear_with_transpose")
_linear_p.multiple_results = True


def _linear_with_transpose(forward: ListFn, transpose: ListFn, residuals: list, linear: list) -> list:
    """Calls `forward(residuals, linear)`, which is transposed by calling `transpose`.

    Neither function may close over traced values. Transposing twice applies `forward` again. If the
    residuals are differentiated too, the result is that of `forward`, without a transpose of its own.

    Args:
      forward: `(residuals, linear) -> outputs`.
      transpose: `(residuals, cotangents of the outputs) -> cotangents of linear`; a cotangent that is zero is None.
      residuals: arrays in which `forward` need not be linear.
      linear: floating arrays.

    Returns:
      The outputs of `forward`.

    Raises:
      TypeError: if `forward` contains a `jax.custom_vjp`, which a rule of `jax.custom_jvp` had called.
    """
    jaxpr = jax.make_jaxpr(forward)(residuals, linear)
    if contains(jaxpr, lambda name: name == "custom_lin"):
        raise TypeError(
            "a rule of jax.custom_jvp in the inner loss contains a jax.custom_vjp, which has no forward mode; choose "
            "inner_grad=checkpointed, which is as exact and keeps as little"
        )
    return _linear_p.bind(*residuals, *linear, jaxpr=jaxpr, transpose=transpose, num_residuals=len(residuals))


def _run(*args: jax.Array, jaxpr: ClosedJaxpr, transpose: ListFn, num_residuals: int) -> list:
    return jaxpr_as_fun(jaxpr)(*args)


def _jvp(primals: tuple, tangents: tuple, *, jaxpr: ClosedJaxpr, transpose: ListFn, num_residuals: int) -> tuple:
    params = {"jaxpr": jaxpr, "transpose": transpose, "num_residuals": num_residuals}
    of_residuals, of_linear = tangents[:num_residuals], [ad.instantiate_zeros(t) for t in tangents[num_residuals:]]
    if all(type(t) is ad.Zero for t in of_residuals):
        return _linear_p.bind(*primals, **params), _linear_p.bind(*primals[:num_residuals], *of_linear, **params)
    return jax.jvp(jaxpr_as_fun(jaxpr), primals, (*map(ad.instantiate_zeros, of_residuals), *of_linear))


def _transpose(cotangents: list, *args: Any, jaxpr: ClosedJaxpr, transpose: ListFn, num_residuals: int) -> list:
    residuals, linear = list(args[:num_residuals]), args[num_residuals:]
    unknown = [n for n, value in enumerate(linear) if ad.is_undefined_primal(value)]
    given = [n for n, bar in enumerate(cotangents) if type(bar) is not ad.Zero]

    def transposed(residuals, bars):
        of_outputs = dict(zip(given, bars, strict=True))
        of_linear = transpose(residuals, [of_outputs.get(n) for n in range(len(cotangents))])
        return [of_linear[n] for n in unknown]

    def back(residuals, bars):
        of_linear = dict(zip(unknown, bars, strict=True))
        shapes = jaxpr.in_avals[num_residuals:]
        filled = [
            jnp.zeros(s.shape, s.dtype) if of_linear.get(n) is None else of_linear[n] for n, s in enumerate(shapes)
        ]
        outputs = jaxpr_as_fun(jaxpr)(*residuals, *filled)
        return [outputs[n] for n in given]

    result: list = [None] * len(linear)
    found = _linear_with_transpose(transposed, back, residuals, [cotangents[n] for n in given])
    for n, bar in zip(unknown, found, strict=True):
        result[n] = bar
    return [None] * num_residuals + result


def _batch(args: tuple, dims: tuple, *, jaxpr: ClosedJaxpr, transpose: ListFn, num_residuals: int) -> tuple:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    residuals, axes = list(args[:num_residuals]), list(dims[:num_residuals])
    linear = [
        batching.bdim_at_front(x, d, size) for x, d in zip(args[num_residuals:], dims[num_residuals:], strict=True)
    ]

    def over_batch(function):
        return jax.vmap(function, in_axes=(axes, 0), axis_size=size)

    outputs = _linear_with_transpose(
        over_batch(lambda residuals, linear: jaxpr_as_fun(jaxpr)(*residuals, *linear)),
        over_batch(transpose),
        residuals,
        linear,
    )
    return outputs, [0] * len(outputs)


_linear_p.def_impl(_run)
_linear_p.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (jaxpr.out_avals, jaxpr.effects))
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
