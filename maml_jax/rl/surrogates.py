"""Losses whose derivatives are those of the expected return, for inner loops and outer objectives.

Each is a `LossFn`: `(outputs, targets) -> scalar`. The outputs are the policy's distributions at the observations of N
trajectories of H time steps, leaves [H, N, ...]; the targets are a `Transition` with the same leading axes. Each is
minus a mean over the time steps that belong to a trajectory. Write l_t = log π(a_t | s_t), A_t for the advantage, and
box(x) = exp(x − stop(x)), which is 1 and has the derivative of x.

They have the same gradient where the policy is that which acted, and different second derivatives, which is what a
meta-gradient needs. Only `loaded_dice` has those of the expected return.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.rl.distributions import Distribution
from maml_jax.types import ArrayTree, check_positive


class Transition(NamedTuple):
    """What happened at each time step of N trajectories, leaves [H, N, ...].

    Attributes:
      action: as the distribution drew it.
      reward: [H, N].
      advantage: [H, N], an estimate of how much better the action was than the average action of the policy; a constant
        to every gradient. Its baseline must not depend on the action.
      mask: [H, N], 1 for a time step that belongs to its trajectory and 0 after its end.
      policy: the distributions that the actions were drawn from.
    """

    action: ArrayTree
    reward: jax.Array
    advantage: jax.Array
    mask: jax.Array
    policy: Distribution


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the values whose mask is 1; 0 if there is none."""
    return jnp.sum(jnp.where(mask > 0, values, 0.0) * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def policy_gradient(outputs: Distribution, targets: Transition) -> jax.Array:
    """Minus the mean of l_t A_t, the surrogate of REINFORCE and of the code of the MAML paper.

    Its second derivative lacks the products ∇l_t ∇l_t'ᵀ. For a table of softmax probabilities its expectation is zero.

    Args:
      outputs: the policy at the observations, leaves [H, N, ...].
      targets: what happened.

    Returns:
      A scalar, in units of the advantage.

    Raises:
      ValueError: if the leading axes differ.

    References:
      Williams, 1992. Finn et al., 2017, equation 4. https://arxiv.org/abs/1703.03400
    """
    return -masked_mean(_log_prob(outputs, targets) * targets.advantage, targets.mask)


def ratio_surrogate(outputs: Distribution, targets: Transition) -> jax.Array:
    """Minus the mean of π(a_t | s_t) / π_old(a_t | s_t) A_t, called LVC if π_old = π.

    Its second derivative lacks what earlier actions change in the states that are met later. Its variance is low.

    Args:
      outputs: the policy at the observations, leaves [H, N, ...].
      targets: what happened; `targets.policy` is π_old.

    Returns:
      A scalar, in units of the advantage.

    Raises:
      ValueError: if the leading axes differ.

    References:
      Rothfuss et al., 2019, ProMP, equation 12. https://arxiv.org/abs/1810.06784
    """
    return -masked_mean(_ratio(outputs, targets) * targets.advantage, targets.mask)


def clipped_surrogate(clip: float = 0.2) -> Callable[[Distribution, Transition], jax.Array]:
    """Builds the loss of proximal policy optimisation: minus the mean of min(r_t A_t, clamp(r_t, 1 ± ε) A_t).

    r_t = π(a_t | s_t) / π_old(a_t | s_t). Where the policy is that which acted, it is `ratio_surrogate`.

    Args:
      clip: ε, the change of the ratio beyond which nothing is gained.

    Returns:
      The loss; see `ratio_surrogate`.

    Raises:
      ValueError: if `clip` is not positive.

    References:
      Schulman et al., 2017, equation 7. https://arxiv.org/abs/1707.06347
    """
    check_positive("clip", clip)

    def loss(outputs: Distribution, targets: Transition) -> jax.Array:
        ratio = _ratio(outputs, targets)
        clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
        return -masked_mean(jnp.minimum(ratio * targets.advantage, clipped * targets.advantage), targets.mask)

    return loss


def loaded_dice(outputs: Distribution, targets: Transition) -> jax.Array:
    """Minus the mean of (box(w_t) − box(w_t − l_t)) A_t with w_t = l_1 + … + l_t.

    Every derivative is an unbiased estimate of that of the expected return, if the advantage is unbiased. The value is
    0. The price is variance: the estimates of second derivatives spread two to five times as far as those of
    `ratio_surrogate`, and more so in longer trajectories (`python -m benchmarks.surrogates`).

    The trajectories must all have the same length, or end in a state without further reward: the mean over time steps
    counts the steps as they happened to be.

    Args:
      outputs: the policy at the observations, leaves [H, N, ...]; it must be the policy that acted.
      targets: what happened.

    Returns:
      A scalar 0 with the derivatives.

    Raises:
      ValueError: if the leading axes differ.

    References:
      Farquhar, Whiteson and Foerster, 2019, Loaded DiCE, equation 11. https://arxiv.org/abs/1909.10549
    """
    log_prob = jnp.where(targets.mask > 0, _log_prob(outputs, targets), 0.0)
    until = jnp.cumsum(log_prob, axis=0)
    return -masked_mean((_box(until) - _box(until - log_prob)) * targets.advantage, targets.mask)


def _box(x: jax.Array) -> jax.Array:
    return jnp.exp(x - jax.lax.stop_gradient(x))


def _ratio(outputs: Distribution, targets: Transition) -> jax.Array:
    old = jax.lax.stop_gradient(targets.policy.log_prob(targets.action))
    # After the end of a trajectory anything may stand; a ratio that overflows there must not reach the gradient.
    log_ratio = jnp.where(targets.mask > 0, _log_prob(outputs, targets) - old, 0.0)
    # Finite, so that a ratio that `clipped_surrogate` leaves out has a gradient of zero: infinity times zero has none.
    largest = 0.9 * math.log(jnp.finfo(log_ratio.dtype).max)
    return jnp.exp(jnp.minimum(log_ratio, largest))


def _log_prob(outputs: Distribution, targets: Transition) -> jax.Array:
    log_prob = outputs.log_prob(targets.action)
    if log_prob.ndim > 2:
        raise ValueError(
            f"the policy has log-probabilities {log_prob.shape}, more than time steps by trajectories [H, N]; build "
            "the learner with data_per_step=True, so that each inner step gets the trajectories collected for it"
        )
    if log_prob.shape != targets.mask.shape or log_prob.shape != targets.advantage.shape:
        raise ValueError(
            f"the policy has log-probabilities {log_prob.shape}, the targets an advantage {targets.advantage.shape} "
            f"and a mask {targets.mask.shape}; all three must be [H, N], time steps by trajectories"
        )
    return log_prob
