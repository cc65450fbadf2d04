"""Random Markov decision processes with few states and actions, and their exact solution.

Duan et al., 2016, RL^2, section 3.2. https://arxiv.org/abs/1611.02779
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.types import Environment, check_integer


class TabularMDP(NamedTuple):
    """A Markov decision process with S states and A actions.

    Attributes:
      transitions: [S, A, S], the probabilities of the next state.
      mean_rewards: [S, A].
    """

    transitions: jax.Array
    mean_rewards: jax.Array


def random_mdps(num_states: int = 10, num_actions: int = 5) -> Environment:
    """The environment: for each state and action, next states with probabilities from a Dirichlet distribution, all of
    whose parameters are 1, and a reward N(m, 1) with m ~ N(1, 1).

    The state is an integer in 0 … S−1, as the action is in 0 … A−1. A trajectory starts in state 0 and has no end of
    its own; the paper stops it after 10 steps. The observation is the state as a one-hot vector [S].

    Args:
      num_states: S.
      num_actions: A.

    Returns:
      An `Environment` whose tasks are `TabularMDP`s.

    Raises:
      ValueError: if a number is not a positive integer.
    """
    num_states = check_integer("num_states", num_states, at_least=1)
    num_actions = check_integer("num_actions", num_actions, at_least=1)

    def sample_task(key):
        transition_key, reward_key = jax.random.split(key)
        # With all parameters 1, this is the Dirichlet distribution; jax.random.dirichlet takes far longer.
        weights = jax.random.exponential(transition_key, (num_states, num_actions, num_states))
        mean_rewards = 1.0 + jax.random.normal(reward_key, (num_states, num_actions))
        return TabularMDP(weights / jnp.sum(weights, -1, keepdims=True), mean_rewards)

    def reset(mdp, key):
        return (state := jnp.zeros((), jnp.int32)), jax.nn.one_hot(state, num_states)

    def step(mdp, state, action, key):
        state_key, reward_key = jax.random.split(key)
        reward = mdp.mean_rewards[state, action] + jax.random.normal(reward_key)
        following = jax.random.categorical(state_key, jnp.log(mdp.transitions[state, action])).astype(jnp.int32)
        return following, jax.nn.one_hot(following, num_states), reward, jnp.zeros((), bool)

    return Environment(sample_task, reset, step)


def action_values(mdp: TabularMDP, following_values: jax.Array) -> jax.Array:
    """The mean reward of each action and what is expected to follow, r(s, a) + Σ_s' P(s' | s, a) V(s').

    Args:
      mdp: the process.
      following_values: V [S], from the next time step on.

    Returns:
      [S, A].
    """
    return mdp.mean_rewards + jnp.einsum("sat,t->sa", mdp.transitions, following_values)


def value_iteration(mdp: TabularMDP, horizon: int) -> tuple[jax.Array, jax.Array]:
    """The largest expected return and a policy that has it, for a trajectory of H steps without discount.

    V_H = 0 and V_h(s) = max_a r(s, a) + Σ_s' P(s' | s, a) V_{h+1}(s').

    Args:
      mdp: the process.
      horizon: H.

    Returns:
      The values V [H+1, S] and the best actions [H, S]; of several best ones, the first.

    Raises:
      ValueError: if `horizon` is not a positive integer.
    """
    horizon = check_integer("horizon", horizon, at_least=1)

    def back_up(following_values, _):
        of_actions = action_values(mdp, following_values)
        values = jnp.max(of_actions, -1)
        return values, (values, jnp.argmax(of_actions, -1))

    end = jnp.zeros_like(mdp.mean_rewards[:, 0])
    _, (values, policy) = jax.lax.scan(back_up, end, length=horizon, reverse=True)
    return jnp.concatenate([values, end[None]]), policy
