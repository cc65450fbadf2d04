"""2D navigation: a point is to find a goal that it does not see.

Finn, Abbeel and Levine, 2017, section 5.3. https://arxiv.org/abs/1703.03400. The text says that the reward is minus the
squared distance and that velocities are clipped to ±0.1. In the saved trajectories behind the published numbers, which
are in the repository of the authors' code, the reward is minus the distance itself, and the velocity is 0.1 times an
action clipped to ±1. This file follows the trajectories.
"""

import jax
import jax.numpy as jnp

from maml_jax.types import Environment

HORIZON = 100
"""Time steps of a trajectory."""
SPEED = 0.1
"""The largest move along an axis in one time step."""
NEAR = 0.01
"""A trajectory ends when both coordinates are within this of the goal."""


def navigation() -> Environment:
    """The environment: a goal uniform in [−0.5, 0.5]², a start at the origin, an observation that is the position [2].

    The action is two numbers, clipped to ±1; the point moves by a tenth of them. The reward is minus the distance to
    the goal after the move.

    Returns:
      An `Environment` whose tasks are goals [2].
    """

    def sample_task(key):
        return jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5)

    def reset(goal, key):
        return (position := jnp.zeros(2)), position

    def step(goal, position, action, key):
        position = position + SPEED * jnp.clip(action, -1.0, 1.0)
        gap = position - goal
        return position, position, -jnp.linalg.norm(gap), jnp.all(jnp.abs(gap) < NEAR)

    return Environment(sample_task, reset, step)


def optimal_return(goal: jax.Array, horizon: int = HORIZON) -> jax.Array:
    """The largest return from the origin: the point moves towards the goal by at most 0.1 along each axis.

    Args:
      goal: [..., 2].
      horizon: H.

    Returns:
      [...].
    """
    moved = SPEED * jnp.arange(1, horizon + 1).reshape((horizon,) + (1,) * goal.ndim)
    left = jnp.maximum(jnp.abs(goal)[None] - moved, 0.0)
    return -jnp.sum(jnp.linalg.norm(left, axis=-1), 0)
