"""Strategies for random Markov decision processes, which RL^2 is compared with, and the best with a known process.

Duan et al., 2016, table 2. https://arxiv.org/abs/1611.02779. There are 10 states and 5 actions, and a strategy acts for
n episodes of 10 steps in the same process. Before each episode it makes a plan from what it has seen. All but UCRL2
have the prior that the processes come from: transitions from a Dirichlet distribution with parameters 1, mean rewards
N(1, 1), and rewards with variance 1 about their means.

The authors used TabulaRL, https://github.com/iosband/TabulaRL, in which the prior of the mean rewards is N(0, 1), and
greedy and ε-greedy have almost no prior. With 10 episodes this makes PSRL better, and greedy worse, than it is here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bandit_strategies import best_parameter, check_parameter, draw_gamma
from experiments.intervals import mean_and_interval
from maml_jax.tasks.tabular_mdp import TabularMDP, action_values, random_mdps, value_iteration
from maml_jax.types import PRNGKey, check_integer

NUM_STATES, NUM_ACTIONS = 10, 5
HORIZON = 10
"""Time steps of an episode."""
CONFIDENCE = 0.05
"""δ of UCRL2, the probability that its intervals do not hold."""


class Record(NamedTuple):
    """What was seen in a process.

    Attributes:
      visits: [S, A], how often an action was taken in a state.
      reward_sum: [S, A].
      transitions: [S, A, S], how often a state followed. What follows the last step of an episode is not seen.
    """

    visits: jax.Array
    reward_sum: jax.Array
    transitions: jax.Array


PlanFn = Callable[[PRNGKey, Record, jax.Array | None], jax.Array]
"""`(key, record, parameter) -> [H, S]`, the actions of the next episode."""


class Strategy(NamedTuple):
    """How to act.

    Attributes:
      plan: `(key, record, parameter) -> [H, S]`, with None for the parameter of a strategy that has none.
      grid: the values of the parameter to choose from; empty if there is no parameter.
    """

    plan: PlanFn
    grid: tuple[float, ...] = ()


def posterior_mean(record: Record) -> TabularMDP:
    """The process with the posterior means of transitions and mean rewards."""
    transitions = 1 + record.transitions
    mean_rewards = (1 + record.reward_sum) / (1 + record.visits)
    return TabularMDP(transitions / jnp.sum(transitions, -1, keepdims=True), mean_rewards)


def posterior_sample(key: PRNGKey, record: Record) -> TabularMDP:
    """A process from the posterior."""
    transition_key, reward_key = jax.random.split(key)
    weights = draw_gamma(transition_key, 1 + record.transitions)
    deviations = jax.random.normal(reward_key, record.visits.shape) / jnp.sqrt(1 + record.visits)
    mean_rewards = posterior_mean(record).mean_rewards + deviations
    return TabularMDP(weights / jnp.sum(weights, -1, keepdims=True), mean_rewards)


def random(key: PRNGKey, record: Record, parameter: None) -> jax.Array:
    """Takes any action."""
    return jax.random.randint(key, (HORIZON, record.visits.shape[0]), 0, record.visits.shape[1])


def greedy(key: PRNGKey, record: Record, parameter: None) -> jax.Array:
    """Takes the best actions of the posterior mean."""
    return value_iteration(posterior_mean(record), HORIZON)[1]


def epsilon_greedy(key: PRNGKey, record: Record, epsilon: jax.Array) -> jax.Array:
    """Takes any action with probability ε at each step, or else the best one of the posterior mean."""
    explore_key, action_key = jax.random.split(key)
    best = greedy(key, record, None)
    # An episode uses one state of each time step, so that these are independent for its steps.
    explore = jax.random.bernoulli(explore_key, epsilon, best.shape)
    return jnp.where(explore, random(action_key, record, None), best)


def psrl(key: PRNGKey, record: Record, parameter: None) -> jax.Array:
    """Takes the best actions of a process from the posterior. Osband et al., 2013. https://arxiv.org/abs/1306.0940."""
    return value_iteration(posterior_sample(key, record), HORIZON)[1]


def opsrl(key: PRNGKey, record: Record, num_samples: jax.Array) -> jax.Array:
    """Draws N processes from the posterior and takes the actions whose largest value in one of them is largest.

    This is what TabulaRL calls optimistic PSRL. With N = 1 it is PSRL.
    """

    def draw(sample, largest):
        mdp = posterior_sample(jax.random.fold_in(key, sample), record)
        values, _ = value_iteration(mdp, HORIZON)
        return jnp.maximum(largest, jax.vmap(action_values, (None, 0))(mdp, values[1:]))

    nothing = jnp.full((HORIZON, *record.visits.shape), -jnp.inf)
    return jnp.argmax(jax.lax.fori_loop(0, num_samples, draw, nothing), -1)


def beb(key: PRNGKey, record: Record, scale: jax.Array) -> jax.Array:
    """Takes the best actions of the posterior mean, with a bonus β / (1 + α_0(s, a)) to each reward.

    α_0 is the sum of the parameters of the Dirichlet posterior. Kolter and Ng, 2009, "Near-Bayesian exploration in
    polynomial time", https://doi.org/10.1145/1553374.1553441, prove their theorem for β = 2H²; here it is that times a
    number to choose.
    """
    mdp = posterior_mean(record)
    bonus = 2 * HORIZON**2 * scale / (1 + jnp.sum(1 + record.transitions, -1))
    return value_iteration(mdp._replace(mean_rewards=mdp.mean_rewards + bonus), HORIZON)[1]


def ucrl2(key: PRNGKey, record: Record, scale: jax.Array) -> jax.Array:
    """Takes the best actions of the best process that the confidence intervals allow.

    Jaksch et al., 2010, https://jmlr.org/papers/v11/jaksch10a.html, equations 3 and 4 and figure 2, with intervals that
    are multiplied by a number to choose, and two changes for episodes: H steps of extended value iteration, and a plan
    for each episode. It has no prior: what was never seen has reward 0 and uniform transitions, ± the intervals.
    """
    num_states, num_actions = record.visits.shape
    num_rewards = jnp.maximum(record.visits, 1)
    num_transitions = jnp.maximum(jnp.sum(record.transitions, -1), 1)
    never = jnp.sum(record.transitions, -1, keepdims=True) == 0
    frequencies = jnp.where(never, 1 / num_states, record.transitions / num_transitions[..., None])
    time = 1 + jnp.sum(record.visits)
    reward_width = jnp.sqrt(7 * jnp.log(2 * num_states * num_actions * time / CONFIDENCE) / (2 * num_rewards))
    transition_width = jnp.sqrt(14 * num_states * jnp.log(2 * num_actions * time / CONFIDENCE) / num_transitions)
    largest_rewards = record.reward_sum / num_rewards + scale * reward_width

    def back_up(following_values, _):
        transitions = jax.vmap(jax.vmap(optimistic_transitions, (0, 0, None)), (0, 0, None))(
            frequencies, scale * transition_width, following_values
        )
        of_actions = action_values(TabularMDP(transitions, largest_rewards), following_values)
        return jnp.max(of_actions, -1), jnp.argmax(of_actions, -1)

    return jax.lax.scan(back_up, jnp.zeros(num_states), length=HORIZON, reverse=True)[1]


def optimistic_transitions(probabilities: jax.Array, width: jax.Array, values: jax.Array) -> jax.Array:
    """The probabilities with the largest expected value within a distance Σ|p − p̂| of others.

    Args:
      probabilities: p̂ [S].
      width: the largest distance.
      values: [S].

    Returns:
      [S].
    """
    order = jnp.argsort(values)
    ascending = probabilities[order]
    gain = jnp.minimum(width / 2, 1 - ascending[-1])
    # What the best state gains the worst lose, each as much as it has.
    lost = jnp.diff(jnp.minimum(jnp.cumsum(ascending), gain), prepend=0.0)
    return jnp.zeros_like(probabilities).at[order].set((ascending - lost).at[-1].add(gain))


SCALES = tuple(np.geomspace(1e-4, 1.0, 21).tolist())
"""Multiples of the bonus of BEB and of the intervals of UCRL2."""

STRATEGIES = {
    "random": Strategy(random),
    "greedy": Strategy(greedy),
    "epsilon-greedy": Strategy(epsilon_greedy, tuple(tenths / 10 for tenths in range(1, 11))),
    "PSRL": Strategy(psrl),
    "OPSRL": Strategy(opsrl, (1, 2, 3, 5, 7, 10, 15, 20)),
    "BEB": Strategy(beb, SCALES),
    "UCRL2": Strategy(ucrl2, SCALES),
}
"""The competitors of the paper. The grids are those of the authors' code, which tries every number of samples to 20."""


def total_rewards(
    strategy: Strategy, key: PRNGKey, *, num_tasks: int, num_episodes: int, parameter: float | None = None
) -> jax.Array:
    """Lets a strategy act in random processes.

    Args:
      strategy: one of `STRATEGIES`, or another.
      key: the randomness. Strategies with the same key act in the same processes.
      num_tasks: T processes.
      num_episodes: in each process, of `HORIZON` steps.
      parameter: of the strategy; `bandit_strategies.best_parameter` chooses one.

    Returns:
      The sums of the rewards, [T].

    Raises:
      ValueError: if a number is no positive integer, or if a parameter is missing or not wanted.
    """
    num_tasks = check_integer("num_tasks", num_tasks, at_least=1)
    num_episodes = check_integer("num_episodes", num_episodes, at_least=1)
    check_parameter(strategy.grid, parameter)
    return _total_rewards(strategy, key, parameter, num_tasks=num_tasks, num_episodes=num_episodes)


@functools.partial(jax.jit, static_argnames=("strategy", "num_tasks", "num_episodes"))
def _total_rewards(strategy, key, parameter, *, num_tasks, num_episodes):
    environment = random_mdps(NUM_STATES, NUM_ACTIONS)

    def act(key):
        task_key, act_key = jax.random.split(key)
        mdp = environment.sample_task(task_key)

        def episode(record, key):
            plan_key, reset_key, step_key = jax.random.split(key, 3)
            policy = strategy.plan(plan_key, record, parameter)

            def step(carry, now):
                state, record = carry
                actions, follows, key = now
                action = actions[state]
                following, _, reward, _ = environment.step(mdp, state, action, key)
                record = Record(
                    record.visits.at[state, action].add(1),
                    record.reward_sum.at[state, action].add(reward),
                    record.transitions.at[state, action, following].add(follows),
                )
                return (following, record), reward

            state, _ = environment.reset(mdp, reset_key)
            follows = jnp.ones(HORIZON).at[-1].set(0)
            steps = policy, follows, jax.random.split(step_key, HORIZON)
            (_, record), rewards = jax.lax.scan(step, (state, record), steps)
            return record, jnp.sum(rewards)

        nothing = Record(*map(jnp.zeros_like, (mdp.mean_rewards, mdp.mean_rewards, mdp.transitions)))
        return jnp.sum(jax.lax.scan(episode, nothing, jax.random.split(act_key, num_episodes))[1])

    return jax.vmap(act)(jax.random.split(key, num_tasks))


def compare(key: PRNGKey, *, num_tasks: int, num_episodes: int) -> dict[str, dict]:
    """All strategies in the same processes, with parameters that are chosen in others.

    Args:
      key: the randomness.
      num_tasks: processes of the test; a parameter is chosen in at most 300.
      num_episodes: in each process.

    Returns:
      By name "parameter", and "mean" and "ci95" of the total reward, lists of one number. "known process" is the
      largest reward that can be expected by who knows the process.
    """
    tune_key, test_key = jax.random.split(key)
    found = {}
    for name, strategy in STRATEGIES.items():
        rewards_of = functools.partial(total_rewards, strategy, num_episodes=num_episodes)
        tune = functools.partial(rewards_of, tune_key, num_tasks=min(300, num_tasks))
        parameter = best_parameter(strategy.grid, lambda value, tune=tune: tune(parameter=value))
        rewards = rewards_of(test_key, num_tasks=num_tasks, parameter=parameter)
        found[name] = {"parameter": parameter} | mean_and_interval(np.asarray(rewards)[:, None])
    best = optimal_rewards(test_key, num_tasks=num_tasks, num_episodes=num_episodes)
    return found | {"known process": {"parameter": None} | mean_and_interval(np.asarray(best)[:, None])}


def optimal_rewards(key: PRNGKey, *, num_tasks: int, num_episodes: int) -> jax.Array:
    """The largest expected total rewards for who knows the process.

    Args:
      key: the randomness. The processes are those of `total_rewards` with the same key.
      num_tasks: T processes.
      num_episodes: in each process.

    Returns:
      [T].

    Raises:
      ValueError: if a number is no positive integer.
    """
    num_tasks = check_integer("num_tasks", num_tasks, at_least=1)
    num_episodes = check_integer("num_episodes", num_episodes, at_least=1)
    environment = random_mdps(NUM_STATES, NUM_ACTIONS)

    def best(key):
        task_key, _ = jax.random.split(key)
        return num_episodes * value_iteration(environment.sample_task(task_key), HORIZON)[0][0, 0]

    return jax.jit(jax.vmap(best))(jax.random.split(key, num_tasks))
