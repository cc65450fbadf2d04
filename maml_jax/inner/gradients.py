"""How the inner gradient is itself differentiated.

Every transform here has the signature of `jax.value_and_grad` and returns the same numbers. They
differ in what an outer `jax.grad` sees: `jax.value_and_grad` keeps the whole backward pass to run it
backwards once more, `mixed_mode` gets the same exact derivative from one forward-mode product and
stores nothing but the arguments, `first_order` makes the gradient a constant.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values


def first_order(fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` whose gradient is a constant to any outer differentiation.

    The inner *gradient* is stopped and not the adapted parameters: ∂φ/∂θ = I remains, and a learned
    step size that multiplies the gradient still learns.

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


def mixed_mode(fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """`jax.value_and_grad` whose gradient is differentiated forward over reverse.

    Let g(a, b) = ∂f/∂a at the arguments a in `argnums` and the others b. Reverse mode needs vᵀ∂g/∂a
    and vᵀ∂g/∂b for a cotangent v. Second derivatives commute, so both are the derivative of the
    *complete* gradient (∂f/∂a, ∂f/∂b) along v in a:

        vᵀ ∂g/∂(a, b) = d/dε ∇f(a + εv, b) at ε = 0,

    one `jax.jvp` of `jax.grad`. The result is exact, and all that is kept for it is (a, b): inside a
    `lax.scan` the memory of an inner loop grows by one copy of the parameters a step and not by the
    activations of a forward and a backward pass. (Outside of a scan XLA may merge the recomputation
    with the first pass, which costs memory and saves time; the result is the same.)

    Derivatives flow to every floating array among the positional arguments, whether in `argnums` or
    not: pass the support set, a learned regulariser or a temperature as an argument and its mixed
    derivative is exact. Integer arrays and keys may be passed too. The rule is for reverse mode, and
    may be nested in it; `jax.jvp` of the result is refused by JAX, use `jax.value_and_grad` for that.

    Args:
      fun: `(*args) -> scalar`, or `(scalar, aux)` with `has_aux`.
      argnums: which positional arguments to differentiate; negative ones count from the end.
      has_aux: whether `fun` returns auxiliary data beside its value.

    Returns:
      `(*args) -> (value, grads)`, or `((value, aux), grads)`.

    Raises:
      ValueError: when differentiated, if `fun` closes over a value that the outer derivative depends
        on. Pass that value to `fun` as an argument.

    References:
      Pearlmutter, 1994, Fast exact multiplication by the Hessian (the product with Hv); Kemaev et al.,
      2025, Scalable meta-learning via mixed-mode differentiation. https://arxiv.org/abs/2505.00793
    """

    def mixed_value_and_grad(*args, **kwargs):
        numbers = (argnums,) if isinstance(argnums, int) else argnums
        positions = tuple(n + len(args) if n < 0 else n for n in numbers)
        converted_fun, closed_over = jax.closure_convert(lambda *a: fun(*a, **kwargs), *args)
        chosen = tuple(jax.tree.map(jnp.asarray, args[n]) for n in positions)
        rest = tuple(None if n in positions else arg for n, arg in enumerate(args))
        leaves, treedef = jax.tree.flatten((rest, closed_over))
        is_floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]
        floating = [jnp.asarray(leaf) for leaf, floats in zip(leaves, is_floating, strict=True) if floats]
        fixed = [leaf for leaf, floats in zip(leaves, is_floating, strict=True) if not floats]

        def value_and_aux(chosen, floating, fixed):
            sources = {True: iter(floating), False: iter(fixed)}
            rest, consts = treedef.unflatten([next(sources[floats]) for floats in is_floating])
            by_position = dict(zip(positions, chosen, strict=True))
            out = converted_fun(*(by_position.get(n, arg) for n, arg in enumerate(rest)), *consts)
            return out if has_aux else (out, None)

        @jax.custom_vjp
        def value_and_grads(chosen, floating, fixed):
            return jax.value_and_grad(value_and_aux, has_aux=True)(chosen, floating, fixed)

        def forward(*primals):
            num_closed_over = sum(is_floating[len(leaves) - len(closed_over) :])
            for const in primals[1][len(floating) - num_closed_over :]:
                if const.perturbed:
                    raise ValueError(
                        f"mixed_mode: the inner loss closes over a value of shape {jnp.shape(const.value)} that "
                        "the outer derivative depends on, and its derivative would be lost. Pass the value to "
                        "the loss as an argument (beside the support set, for example), or choose "
                        "inner_grad=jax.value_and_grad"
                    )
            primals = custom_vjp_primal_tree_values(primals)
            return value_and_grads(*primals), primals

        def backward(primals, cotangents):
            chosen, floating, fixed = primals
            (value_bar, aux_bar), direction = cotangents

            def complete_gradient(chosen):
                return jax.grad(value_and_aux, (0, 1), has_aux=True)(chosen, floating, fixed)[0]

            gradient, product = jax.jvp(complete_gradient, (chosen,), (_instantiate(direction),))
            if not isinstance(value_bar, SymbolicZero):
                product = jax.tree.map(lambda p, g: p + value_bar * g, product, gradient)
            if not all(isinstance(bar, SymbolicZero) for bar in jax.tree.leaves(aux_bar)):
                _, pull = jax.vjp(lambda c, f: value_and_aux(c, f, fixed)[1], chosen, floating)
                product = jax.tree.map(jnp.add, product, pull(_instantiate(aux_bar)))
            return *product, None

        value_and_grads.defvjp(forward, backward, symbolic_zeros=True)
        (value, aux), grads = value_and_grads(chosen, floating, fixed)
        return ((value, aux) if has_aux else value), (grads[0] if isinstance(argnums, int) else grads)

    return mixed_value_and_grad


def _instantiate(cotangents: Any) -> Any:
    return jax.tree.map(
        lambda bar: jnp.zeros(bar.shape, bar.dtype) if isinstance(bar, SymbolicZero) else bar, cotangents
    )
