"""Bernoulli bandits: which of the arms pays most often is to be found by pulling them.

Duan et al., 2016, RL^2, section 3.1. https://arxiv.org/abs/1611.02779
"""

import jax
import jax.numpy as jnp

from maml_jax.types import Environment, check_integer


def bandits(num_arms: int) -> Environment:
    """The environment: A arms, each with a probability of a reward that is uniform in [0, 1].

    An action is an arm, an integer in 0 … A−1; the reward is 1 with the probability of the arm, or else 0. There is
    nothing to observe: the observation is a zero [1]. A trajectory has no end of its own.

    Args:
      num_arms: A.

    Returns:
      An `Environment` whose tasks are the probabilities [A].

    Raises:
      ValueError: if `num_arms` is not a positive integer.
    """
    num_arms = check_integer("num_arms", num_arms, at_least=1)

    def sample_task(key):
        return jax.random.uniform(key, (num_arms,))

    def reset(probabilities, key):
        return (), jnp.zeros(1)

    def step(probabilities, state, arm, key):
        reward = jax.random.bernoulli(key, probabilities[arm]).astype(probabilities.dtype)
        return state, jnp.zeros(1), reward, jnp.zeros((), bool)

    return Environment(sample_task, reset, step)
