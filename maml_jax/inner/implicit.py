"""A proximal inner problem and the implicit derivative of its solution."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.loop import inner_loop
from maml_jax.types import (
    ArrayTree,
    InnerInfo,
    ObserveFn,
    at_least_float32,
    check_integer,
    check_not_negative,
    holds_for,
)


def proximal_solution(
    loss_fn: Callable[[ArrayTree, ArrayTree], jax.Array],
    rule: optax.GradientTransformation,
    params: ArrayTree,
    support: ArrayTree,
    *,
    strength: float | jax.Array,
    num_steps: int,
    num_cg_steps: int,
    damping: float | jax.Array = 0.0,
    penalty_last: bool = False,
    observe_fn: ObserveFn | None = None,
) -> tuple[ArrayTree, InnerInfo]:
    """Solves φ* = argmin_φ L_S(φ) + λ/2 ‖φ − θ‖² approximately. The derivative is exact if it is solved exactly.

    The derivative does not depend on how the solution was found, and nothing of the inner steps is stored for it. A
    cotangent v is multiplied by dφ*/dθ = (I + H/λ)⁻¹, with H the Hessian of L_S at the solution, by conjugate
    gradients on (I + H/λ) u = v. Derivatives with respect to λ, the support set and whatever `loss_fn` closes over
    follow from the same u.

    Conjugate gradients need I + H/λ positive definite. The Hessian of a network has negative eigenvalues. With one
    near −λ or below it a step may end far away, so the iterate with the smallest residual is taken. `damping` moves
    this bound to −(λ + δ).

    Args:
      loss_fn: `(params, support) -> scalar`, L_S.
      rule: optax transformation that minimises the proximal objective.
      params: θ, the centre of the proximal term and where the steps start.
      support: any pytree.
      strength: λ > 0. Without the proximal term, the solution would not depend on θ.
      num_steps: K, steps of `rule`.
      num_cg_steps: steps of the conjugate gradients. But for rounding they are exact if H has no more distinct
        eigenvalues than that.
      damping: δ ≥ 0. The system that is solved is (I + H/(λ + δ)) u = v, so the derivative is exact only for δ = 0.
      penalty_last: whether the K steps minimise L_S alone, and one more, with a fresh state of `rule`, is then taken on
        the proximal term alone. The result is not the minimiser φ*; its derivative is computed as if it were.
      observe_fn: as in `inner_loop`. Its values are constants to the outer gradient; integers are exact up to 2²⁴.
        With `penalty_last`, the last of them is after the additional step.

    Returns:
      φ_K and an `InnerInfo`; `support_loss` [K] is L_S without the proximal term.

    Raises:
      ValueError: if `strength` is a number that is not positive, `damping` one that is negative, or a count is not an
        integer in its range.

    References:
      Rajeswaran et al., 2019, Meta-learning with implicit gradients, equations 3 and 6, Lemma 1.
      https://arxiv.org/abs/1909.04630
    """
    check_strength(strength)
    check_not_negative("damping", damping)
    num_cg_steps = check_integer("num_cg_steps", num_cg_steps, at_least=1)

    def penalty(phi):
        return 0.5 * strength * optax.tree.norm(at_least_float32(optax.tree.sub(phi, params)), squared=True)

    def objective(phi):
        return loss_fn(phi, support) + penalty(phi)

    def observe(phi):
        return penalty(phi), None if observe_fn is None else observe_fn(phi)

    def minimise(function, start, num_steps):
        return inner_loop(
            lambda phi, _: function(phi),
            rule,
            start,
            None,
            num_steps=num_steps,
            inner_grad=jax.value_and_grad,
            observe_fn=observe,
        )

    def solve(_, start):
        if penalty_last:
            phi, info = minimise(lambda phi: loss_fn(phi, support), start, num_steps)
            phi, last = minimise(penalty, phi, 1)
            observed = jax.tree.map(lambda old, new: old.at[-1].set(new[-1]), info.observed[1], last.observed[1])
            return phi, (info.support_loss, _as_floats(observed))
        phi, info = minimise(objective, start, num_steps)
        penalties, observed = info.observed
        return phi, (info.support_loss - penalties[:-1], _as_floats(observed))

    def solve_linear(hessian_plus_strength, cotangent):
        def operator(u):
            shifted = optax.tree.add_scale(hessian_plus_strength(u), damping, u)
            return optax.tree.cast_like(jax.tree.map(lambda x: x / (strength + damping), shifted), u)

        def solve_scaled(operator, v):
            return conjugate_gradients(operator, v, num_cg_steps)

        scaled = optax.tree.cast_like(jax.tree.map(lambda x: x / strength, cotangent), cotangent)
        return jax.lax.custom_linear_solve(operator, scaled, solve_scaled, symmetric=True)

    start = jax.lax.stop_gradient(params)
    phi, (losses, observed) = jax.lax.custom_root(jax.grad(objective), start, solve, solve_linear, has_aux=True)
    if observe_fn is not None:
        observed = jax.tree.map(lambda x, like: x.astype(like.dtype), observed, jax.eval_shape(observe_fn, start))
    return phi, InnerInfo(losses, observed)


def _as_floats(tree: ArrayTree) -> ArrayTree:
    """Integers and truth values as floats, because `custom_root` gives every auxiliary value a tangent of its dtype."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float), tree)


def check_strength(strength: float | jax.Array) -> None:
    """Raises ValueError for what is no strength of a proximal term; traced arrays pass."""
    if not holds_for(strength, lambda x: x > 0):
        raise ValueError(
            f"strength={strength} must be positive and finite: without the proximal term λ/2 ‖φ − θ‖² the solution "
            "does not depend on θ, and the implicit gradient is zero"
        )


def conjugate_gradients(operator: Callable[[ArrayTree], ArrayTree], target: ArrayTree, num_steps: int) -> ArrayTree:
    """Solves operator(u) = target for a symmetric positive operator by a fixed number of steps from u = 0.

    A step that finds a zero residual changes nothing. The residual may grow for a while. If the operator is not
    positive definite, or nearly singular, one step may multiply residual and solution by any factor. The iterates are
    float32 or more, of a target that is scaled by a power of two, so no square overflows or vanishes.

    Args:
      operator: linear, symmetric and positive definite; it gets and returns arrays of the dtypes of `target`.
      target: a pytree of floating arrays.
      num_steps: the number of products with `operator`.

    Returns:
      The iterate with the smallest residual ‖target − operator(u)‖, u = 0 included, with the dtypes of `target`. If the
      target or its product with the operator is not finite, neither is the result.

    References:
      Hestenes and Stiefel, 1952, Methods of conjugate gradients for solving linear systems, section 3.
    """

    def add_scale(tree, scalar, other):
        return optax.tree.cast_like(optax.tree.add_scale(tree, scalar, other), tree)

    def step(carry, number):
        solution, residual, direction, squared, best, least = carry
        product = at_least_float32(operator(optax.tree.cast_like(direction, target)))
        curvature = optax.tree.vdot(direction, product)
        rate = jnp.where(squared > 0, squared / jnp.where(squared > 0, curvature, 1), 0)
        solution = add_scale(solution, rate, direction)
        residual = add_scale(residual, -rate, product)
        next_squared = optax.tree.norm(residual, squared=True)
        ratio = jnp.where(squared > 0, next_squared / jnp.where(squared > 0, squared, 1), 0)
        direction = add_scale(residual, ratio, direction)
        best = optax.tree.where(next_squared < least, solution, best)
        # Later products may overflow where the iterates diverge, and then an earlier iterate is the best one.
        best = optax.tree.where((number > 0) | jnp.isfinite(curvature), best, optax.tree.full_like(best, jnp.nan))
        return (solution, residual, direction, next_squared, best, jnp.fmin(next_squared, least)), None

    start = at_least_float32(target)
    largest = optax.tree.max(jax.tree.map(jnp.abs, start))
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1.0))
    # Squares of float16 fit into float32, and a scaled product may not fit into float16.
    is_narrow = any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(target))
    limit = -jnp.finfo(largest.dtype).minexp  # 2 to the power of this and of minus this are normal numbers
    scale = jnp.ldexp(jnp.ones_like(largest), 0 if is_narrow else -jnp.clip(exponent, -limit, limit))
    start = jax.tree.map(lambda x: scale * x, start)
    squared = optax.tree.norm(start, squared=True)
    zero = optax.tree.full_like(start, jnp.where(jnp.isfinite(squared), 0.0, jnp.nan))
    initial = (optax.tree.zeros_like(start), start, start, squared, zero, squared)
    (*_, best, _), _ = jax.lax.scan(step, initial, jnp.arange(num_steps))
    return optax.tree.cast_like(jax.tree.map(lambda x: x / scale, best), target)
