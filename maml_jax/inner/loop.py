"""The inner loop: K steps of any optax rule on one support set, in one `lax.scan`."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.gradients import mixed_mode
from maml_jax.types import InnerGradFn, InnerInfo, ObserveFn, check_floating


def check_num_steps(num_steps: int) -> None:
    """Raises ValueError unless `num_steps` is an integer K ≥ 0."""
    if not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"num_inner_steps must be an integer of at least 0, got {num_steps!r}")


def inner_loop(
    batch_loss_fn: Callable[[chex.ArrayTree, chex.ArrayTree], jax.Array],
    rule: optax.GradientTransformation,
    params: chex.ArrayTree,
    support: chex.ArrayTree,
    *,
    num_steps: int,
    inner_grad: InnerGradFn = mixed_mode,
    observe_fn: ObserveFn | None = None,
) -> tuple[chex.ArrayTree, InnerInfo]:
    """Adapts parameters to one support set with a differentiable optimiser.

    Iterates φ ← φ + rule(∇L_S(φ)) from φ = params. The result is differentiable in `params`, in
    `support` and in whatever `rule` closes over, such as a learned step size.

    Args:
      batch_loss_fn: `(params, support) -> scalar`, the mean loss of the support set. With `mixed_mode`
        everything differentiable that it uses must come in through these two arguments.
      rule: optax transformation turning a gradient into an update. An adaptive rule needs a positive
        `eps_root` (1e-8, say): the derivative of √v at v = 0 is infinite.
      params: θ, a pytree of floating arrays.
      support: usually a `Batch` [S, ...]; any pytree, so that learned quantities can ride along.
      num_steps: K ≥ 0. With K = 0, `params` come back unchanged.
      inner_grad: transform with the signature of `jax.value_and_grad`; says how ∇L_S is itself
        differentiated. With `first_order`, ∂φ/∂θ = I.
      observe_fn: `(task_params) -> pytree`, evaluated at φ before the first and after every step.

    Returns:
      φ with the structure of `params`, and an `InnerInfo`: `support_loss` [K], L_S before each step,
      and `observed` [K+1, ...].

    Raises:
      ValueError: if `num_steps` is negative, `params` are not all floating, or the loss is no scalar.

    References:
      Finn et al., 2017, Algorithm 1, lines 5-6. https://arxiv.org/abs/1703.03400
    """
    check_num_steps(num_steps)
    check_floating(params)
    loss_shape = jax.eval_shape(batch_loss_fn, params, support).shape
    if loss_shape != ():
        raise ValueError(f"the inner loss must be a scalar, got shape {loss_shape}; take the mean over the batch")
    value_and_grad = inner_grad(batch_loss_fn)

    def step(carry, _):
        params, opt_state = carry
        observed = None if observe_fn is None else observe_fn(params)
        loss, grads = value_and_grad(params, support)
        updates, opt_state = rule.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (loss, observed)

    (params, _), (losses, observed) = jax.lax.scan(step, (params, rule.init(params)), length=num_steps)
    if observe_fn is not None:
        observed = jax.tree.map(lambda old, new: jnp.concatenate([old, new[None]]), observed, observe_fn(params))
    return params, InnerInfo(losses, observed)


def adapt_only(rule: optax.GradientTransformation, adapts: Callable[[str], bool]) -> optax.GradientTransformation:
    """Restricts an inner rule to some parameters; the others keep their meta-learned values.

    The outer gradient still reaches every parameter. For example, a network whose normalisation offsets
    are meta-learned and not adapted:

    >>> import optax
    >>> rule = adapt_only(optax.sgd(0.4), lambda name: "offset" not in name)

    Args:
      rule: the optax transformation for the parameters that adapt.
      adapts: `(name) -> bool`; the name is the parameter's path such as "norm_0/offset".

    Returns:
      An optax transformation with zero updates wherever `adapts` is false.
    """

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: adapts(jax.tree_util.keystr(path, simple=True, separator="/")), params
        )

    return optax.partition({True: rule, False: optax.set_to_zero()}, label)
