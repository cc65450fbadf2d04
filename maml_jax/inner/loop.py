"""The inner loop: K steps of any optax rule on one support set, in one `lax.scan`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.gradients import mixed_mode
from maml_jax.types import (
    ArrayTree,
    InnerGradFn,
    InnerInfo,
    ObserveFn,
    at_least_float32,
    check_floating,
    check_function,
    check_integer,
    combine,
    select,
)


def inner_loop(
    loss_fn: Callable[..., jax.Array],
    rule: optax.GradientTransformation,
    params: ArrayTree,
    support: ArrayTree,
    *,
    num_steps: int,
    where: Callable[[str], bool] | None = None,
    per_step: ArrayTree = None,
    num_microbatches: int = 1,
    inner_grad: InnerGradFn = mixed_mode,
    observe_fn: ObserveFn | None = None,
    opt_state: ArrayTree = None,
) -> tuple[ArrayTree, InnerInfo]:
    """Adapts parameters to one support set with a differentiable optimiser.

    Iterates φ ← φ + rule(∇L_S(φ)) from φ = params. The result is differentiable in `params`, in
    `support`, in `per_step` and in whatever `loss_fn` and `rule` close over, such as a learned step size.

    Args:
      loss_fn: `(params, support) -> scalar`, the mean loss of the support set; with `per_step`,
        `(params, support, data_of_the_step) -> scalar`.
      rule: optax transformation turning a gradient into an update. A rule that asks for the value, the gradient
        or the loss function (`value`, `grad`, `value_fn` of optax) gets them. The meta-gradient through a rule
        that takes the square root of a second moment is not finite where that moment is zero: `adam`, `adamw` and
        `nadam` need `eps_root=1e-8`, and `rmsprop` its default `eps_in_sqrt=True`. `radam` is not finite with
        `eps_root` either. Where a gradient is zero, as in a support set that is fitted, it is not finite through
        `polyak_sgd` and clipping by a norm (`clip_by_global_norm`; `clip_by_block_rms` and `adaptive_grad_clip` at
        one zero leaf). Reverse mode does not differentiate line searches, as of `lbfgs`. Safe as they are: `sgd`,
        also with momentum, `lion`, `sign_sgd`, `clip` and schedules.
      params: θ, a pytree of floating arrays.
      support: usually a `Batch` [S, ...]; any pytree.
      num_steps: K ≥ 0. With K = 0, `params` come back unchanged.
      where: `(name) -> bool`, whether a parameter adapts; the name is its path, such as "norm_0/offset". The others
        keep their values, no inner gradient is computed for them, and the outer gradient still reaches them. The
        rule sees None in their place. By default all parameters adapt.
      per_step: data that belong to one step, a pytree with leaves [K, ...] that is scanned along: mini-batches,
        keys, learned numbers.
      num_microbatches: M, a divisor of S. With M > 1 the leaves of `support` are cut into M equal parts, and the
        gradient of a step is the mean over the parts, computed one after another with the memory of one. A
        loss that is no mean over examples, as with batch statistics, changes by it.
      inner_grad: transform with the signature of `jax.value_and_grad`; says how ∇L_S is itself
        differentiated. With `first_order`, ∂φ/∂θ = I, unless the rule uses more than the gradient.
      observe_fn: `(task_params) -> pytree`, evaluated at φ before the first and after every step.
      opt_state: the state that the rule starts from, such as `opt_state` of the info of an earlier call; by default
        that of `rule.init`.

    Returns:
      φ with the structure of `params`, and an `InnerInfo`: `support_loss` [K], L_S before each step,
      `observed` [K+1, ...], and `opt_state`.

    Raises:
      ValueError: if a count is wrong, `params` are not all floating, `where` selects none of them, the loss is not a
        scalar, or leading axes of `per_step` and `support` do not fit `num_steps` and `num_microbatches`.

    References:
      Finn et al., 2017, Algorithm 1, lines 5-6. https://arxiv.org/abs/1703.03400
    """
    num_steps = check_integer("num_steps", num_steps, at_least=0)
    num_microbatches = check_integer("num_microbatches", num_microbatches, at_least=1)
    check_floating(params)
    check_function("inner_grad", inner_grad, "maml_jax.mixed_mode or maml_jax.first_order")
    _check_leading_axis(
        per_step, "per_step", lambda size: size == num_steps, f"one entry for each of the {num_steps} steps"
    )
    if num_microbatches > 1:
        what = f"a multiple of num_microbatches={num_microbatches} examples"
        _check_leading_axis(support, "support", lambda size: size % num_microbatches == 0, what)
        support = jax.tree.map(lambda x: x.reshape(num_microbatches, len(x) // num_microbatches, *x.shape[1:]), support)
    value = jax.eval_shape(loss_fn, params, *_batch(support, per_step, num_microbatches))
    found = f"shape {value.shape}" if hasattr(value, "shape") else f"a {type(value).__name__}"
    if found != "shape ()":
        raise ValueError(f"the inner loss must be a scalar, got {found}; take the mean and return only that")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"the inner loss has dtype {value.dtype} and no gradient; return a floating number")
    rule = optax.with_extra_args_support(rule)
    adapting, fixed = select(params, where)

    def loss_of(adapting, *batch):
        return loss_fn(combine(adapting, fixed), *batch)

    def observe(adapting):
        return None if observe_fn is None else jax.tree.map(jnp.asarray, observe_fn(combine(adapting, fixed)))

    value_and_grad = inner_grad(loss_of)

    def step(carry, of_step):
        adapting, opt_state = carry
        observed = observe(adapting)
        own = () if per_step is None else (of_step,)
        loss, grads = _mean_over_parts(partial(value_and_grad, adapting), support, own, num_microbatches)
        updates, opt_state = rule.update(
            grads,
            opt_state,
            adapting,
            value=loss,
            grad=grads,
            value_fn=lambda adapting: _mean_over_parts(partial(loss_of, adapting), support, own, num_microbatches),
        )
        return (optax.apply_updates(adapting, updates), opt_state), (loss, observed)

    start = (adapting, rule.init(adapting) if opt_state is None else opt_state)
    if num_steps == 0:  # without jit, JAX runs no loop without a step
        observed = jax.tree.map(lambda x: x[None], observe(adapting))
        return jax.tree.map(jnp.array, params), InnerInfo(jnp.zeros(0, value.dtype), observed, start[1])
    (adapting, opt_state), (losses, observed) = jax.lax.scan(step, start, per_step, length=num_steps)
    if observe_fn is not None:
        observed = jax.tree.map(lambda old, new: jnp.concatenate([old, new[None]]), observed, observe(adapting))
    return combine(adapting, fixed), InnerInfo(losses, observed, opt_state)


def _batch(support: ArrayTree, per_step: ArrayTree, num_microbatches: int) -> tuple:
    """Shapes of what the loss is given beside the parameters, in one step and one part."""

    def without_leading_axis(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)

    part = support if num_microbatches == 1 else without_leading_axis(support)
    return (part,) if per_step is None else (part, without_leading_axis(per_step))


def _mean_over_parts(function: Callable, support: ArrayTree, own: tuple, num_parts: int) -> ArrayTree:
    """The mean of `function(part, *own)` over the parts [M, ...] of a support set, computed one after another.

    The sums are in float32 or more.
    """
    if num_parts == 1:
        return function(support, *own)

    def add(total, part):
        return jax.tree.map(lambda t, x: t + x / num_parts, total, at_least_float32(function(part, *own))), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], support), *own)
    zeros = at_least_float32(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return optax.tree.cast_like(jax.lax.scan(add, zeros, support)[0], shapes)


def _check_leading_axis(tree: ArrayTree, name: str, fits: Callable[[int], bool], what: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.ndim(leaf) or not fits(jnp.shape(leaf)[0]):
            raise ValueError(f"{name}{jax.tree_util.keystr(path)} must hold {what}, got shape {jnp.shape(leaf)}")
