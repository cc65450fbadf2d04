"""A Markov decision process so small that every trajectory can be listed: 2 states, 2 actions, 3 time steps.

The policy is a table of softmax logits θ [2, 2]. Its expected return is a polynomial of probabilities, so every
derivative of it is exact.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import Batch, Model
from maml_jax.rl import Categorical, Transition

HORIZON = 3
rng = np.random.default_rng(0)
TRANSITIONS = rng.dirichlet(np.ones(2), (2, 2))  # [state, action, next state]
REWARDS = rng.normal(size=(2, 2))  # [state, action]
START = 0

PATHS = [
    (states, actions)
    for states in itertools.product(range(2), repeat=HORIZON)
    if states[0] == START
    for actions in itertools.product(range(2), repeat=HORIZON)
]
STATES, ACTIONS = (np.array(part).T for part in zip(*PATHS, strict=True))  # [H, N]
MOVES = np.prod([TRANSITIONS[STATES[t], ACTIONS[t], STATES[t + 1]] for t in range(HORIZON - 1)], axis=0)  # [N]
REWARD = REWARDS[STATES, ACTIONS]  # [H, N]

POLICY = Model(lambda key, inputs: jnp.zeros((2, 2)), lambda table, states: Categorical(states @ table))
THETA = rng.normal(size=(2, 2))


def probabilities(table):
    """p(τ) of every trajectory, [N]."""
    chosen = jax.nn.softmax(table)[STATES, ACTIONS]
    return MOVES * jnp.prod(chosen, 0)


def expected_return(table):
    """J(θ), exactly."""
    return jnp.sum(probabilities(table) * REWARD.sum(0))


def values(table):
    """V_t(s) [H, 2] by going backwards, a baseline that does not see the action."""
    following, found = jnp.zeros(2), []
    for _ in range(HORIZON):
        following = jnp.sum(jax.nn.softmax(table) * (REWARDS + TRANSITIONS @ following), -1)
        found.append(following)
    return jnp.stack(found[::-1])


def batch(table, baseline=True):
    """All trajectories, each with the weight that it has under the policy `table`.

    The surrogates take means over N trajectories of H time steps. An advantage that is multiplied by N p(τ) makes the
    mean an expectation; H times minus the loss then has the derivatives of a return.
    """
    table = jax.lax.stop_gradient(table)
    to_go = jnp.cumsum(REWARD[::-1], 0)[::-1]
    advantage = to_go - (values(table)[jnp.arange(HORIZON)[:, None], STATES] if baseline else 0.0)
    weights = len(PATHS) * probabilities(table)[None]
    states = jax.nn.one_hot(STATES, 2, dtype=table.dtype)
    mask = jnp.ones((HORIZON, len(PATHS)), table.dtype)
    transition = Transition(jnp.asarray(ACTIONS), REWARD, weights * advantage, mask, POLICY.apply(table, states))
    return Batch(states, transition)
