"""Returns, generalised advantages, and a baseline that is linear in features of the observations."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maml_jax.rl.distributions import Distribution
from maml_jax.types import ArrayTree, check_not_negative, check_positive


class Trajectories(NamedTuple):
    """N trajectories of a policy in one task, of at most H time steps, leaves [H, N, ...].

    Attributes:
      observation: what the policy saw before each action.
      action: what it did.
      reward: [H, N], 0 after the end of a trajectory.
      mask: [H, N], 1 for a time step that belongs to its trajectory and 0 after its end.
      policy: the distributions that the actions were drawn from.
    """

    observation: ArrayTree
    action: ArrayTree
    reward: jax.Array
    mask: jax.Array
    policy: Distribution


AdvantageFn = Callable[[Trajectories], jax.Array]
"""`(trajectories) -> advantages [H, N]`."""


def discounted_returns(reward: jax.Array, discount: float = 1.0) -> jax.Array:
    """The returns to go R_t = r_t + γ R_{t+1}.

    Args:
      reward: [H, ...], time first; 0 after the end of a trajectory.
      discount: γ.

    Returns:
      [H, ...].
    """
    reward = reward.astype(jnp.result_type(reward, 0.0))
    discount = jnp.asarray(discount, reward.dtype)

    def add(later, reward):
        return (total := reward + discount * later), total

    return jax.lax.scan(add, jnp.zeros_like(reward[0]), reward, reverse=True)[1]


def generalised_advantages(
    reward: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    discount: float,
    decay: float,
) -> jax.Array:
    """Generalised advantage estimates A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V(s_{t+1}) − V(s_t).

    What comes after the last time step has the value 0, as has what comes after the end of a trajectory.

    Args:
      reward: [H, ...], time first.
      value: V(s_t), of the same shape.
      mask: of the same shape, 1 where a time step belongs to its trajectory.
      discount: γ.
      decay: λ. With 1 it is the return minus the value, with 0 the error of one step.

    Returns:
      [H, ...], 0 where the mask is 0.

    Raises:
      ValueError: if the shapes differ.

    References:
      Schulman et al., 2016, equation 16. https://arxiv.org/abs/1506.02438
    """
    shapes = [list(jnp.shape(x)) for x in (reward, value, mask)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"reward, value and mask must have one shape, time first, got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    goes_on = jnp.concatenate([mask[1:], jnp.zeros_like(mask[:1])])
    following = jnp.concatenate([value[1:], jnp.zeros_like(value[:1])])
    # A product with the mask would keep what is not finite.
    error = jnp.where(mask > 0, reward + discount * jnp.where(goes_on > 0, following, 0) - value, 0)
    discount, decay = (jnp.asarray(number, error.dtype) for number in (discount, decay))

    def add(later, step):
        error, goes_on = step
        return (total := error + discount * decay * goes_on * later), total

    return jax.lax.scan(add, jnp.zeros_like(error[0]), (error, goes_on), reverse=True)[1] * mask


def linear_baseline(observation: ArrayTree, returns: jax.Array, mask: jax.Array, *, ridge: float = 1e-5) -> jax.Array:
    """The values of a ridge regression of the returns on features of observation and time.

    The features are the numbers of the observation less their mean, their squares, t/100, its square and its cube, and
    1. The regression is fitted to the trajectories whose values it returns. Taking the mean off changes the values only
    by the penalty. Without it, float32 would not tell the numbers, their squares and 1 apart where the mean is large.

    Args:
      observation: a pytree of arrays [H, N, ...].
      returns: the returns to go [H, N].
      mask: [H, N]; other time steps are left out of the fit.
      ridge: the strength of the penalty on the squared coefficients.

    Returns:
      [H, N].

    Raises:
      ValueError: if the arrays do not share the axes H and N.

    References:
      Duan et al., 2016, supplementary material, section 2. https://arxiv.org/abs/1604.06778
    """
    leaves = jax.tree.leaves(observation)
    of_returns, of_mask, *observed = (list(jnp.shape(x)) for x in (returns, mask, *leaves))
    if len(of_mask) != 2 or any(shape != of_mask for shape in (of_returns, *(shape[:2] for shape in observed))):
        raise ValueError(
            f"returns and mask must be [H, N], time steps by trajectories, got {of_returns} and {of_mask}, and an "
            f"observation must begin with these axes, got {', '.join(map(str, observed))}"
        )
    horizon, num_trajectories = mask.shape
    returns = returns.astype(jnp.result_type(returns, 0.0))  # integers would take the fractions of the observations
    parts = [leaf.reshape(horizon, num_trajectories, -1) for leaf in leaves]
    seen = jnp.concatenate(parts, -1).astype(returns.dtype)
    # A product with the mask would keep what is not finite.
    is_valid, returns = mask[..., None] > 0, jnp.where(mask > 0, returns, 0)
    seen -= jnp.sum(jnp.where(is_valid, seen, 0), (0, 1), keepdims=True) / jnp.maximum(jnp.sum(mask), 1.0)
    time = jnp.arange(horizon, dtype=returns.dtype)[:, None, None] / 100.0
    time = jnp.broadcast_to(time, (horizon, num_trajectories, 1))
    features = jnp.concatenate([seen, jnp.square(seen), time, time**2, time**3, jnp.ones_like(time)], -1)
    # Columns of one size, because float32 loses the small ones beside the square of a large number. The penalty is part
    # of the size. Otherwise a number that hardly changes would get a large penalty, and float32 would lose the others.
    squares = jnp.sum(jnp.square(jnp.where(is_valid, features, 0)), (0, 1), keepdims=True) + ridge
    size = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    features = features / size
    valid = jnp.where(is_valid, features, 0)
    exactly = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # float32 on every device
    gram = exactly("tnd,tne->de", valid, valid) + jnp.diag(ridge / jnp.square(size.reshape(-1)))
    # Least squares, because an observation that never changes makes the features collinear, and then the ridge is lost
    # in the rounding of float32.
    coefficients, *_ = jnp.linalg.lstsq(gram, exactly("tnd,tn->d", valid, returns))
    return exactly("tnd,d->tn", features, coefficients)


def standardised(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Values [H, N] with mean 0 and standard deviation 1 over the time steps of the mask, and 0 elsewhere.

    Equal values give 0.
    """
    count, centred = jnp.maximum(jnp.sum(mask), 1.0), jnp.where(mask > 0, values, 0)
    for _ in range(2):  # again, because the rounding of the first mean would be all that is left of equal values
        centred = (centred - jnp.sum(centred) / count) * mask
    return centred / (jnp.sqrt(jnp.sum(jnp.square(centred)) / count) + 1e-8)


def linear_advantages(*, discount: float = 0.99, decay: float = 1.0, ridge: float = 1e-5) -> AdvantageFn:
    """Builds standardised generalised advantages over `linear_baseline`, as the code of the MAML paper has them.

    That code bounds observations at ±10 first. Here they are not bounded, and their mean is taken off.

    Args:
      discount: γ.
      decay: λ.
      ridge: of the baseline.

    Returns:
      `(trajectories) -> advantages [H, N]`.

    Raises:
      ValueError: if γ or λ is negative or above 1, or `ridge` not positive.
    """
    for name, value in {"discount": discount, "decay": decay}.items():
        check_not_negative(name, value)
        if value > 1.0:
            raise ValueError(f"{name}={value} must be at most 1")
    check_positive("ridge", ridge)

    def advantages(trajectories: Trajectories) -> jax.Array:
        reward, mask = trajectories.reward, trajectories.mask
        value = linear_baseline(trajectories.observation, discounted_returns(reward, discount), mask, ridge=ridge)
        return standardised(generalised_advantages(reward, value, mask, discount=discount, decay=decay), mask)

    return advantages
