"""Strategies for Bernoulli bandits, which RL^2 is compared with, and the best that any strategy can do.

Duan et al., 2016, table 1. https://arxiv.org/abs/1611.02779. Every strategy has the prior that the tasks come from:
probabilities are uniform in [0, 1]. After s successes and f failures an arm has the posterior Beta(1 + s, 1 + f). In
the authors' code, too, counts start at one success and one failure.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from experiments.intervals import mean_and_interval
from maml_jax.tasks.bandits import bandits
from maml_jax.types import PRNGKey, check_integer

GITTINS_LEVELS = 1000
"""The costs of a pull that are tried for a Gittins index, which is therefore exact to ±1/2000."""
MAX_GITTINS_PULLS = 500
"""The largest number of pulls for which they are computed. It takes 1.5 GB of memory, and twice as many pulls 8 GB."""
MAX_STATES = 200_000
"""The largest number of states for which the optimum is computed; it takes seconds."""


class Beliefs(NamedTuple):
    """The parameters of the Beta posteriors of the arms.

    Attributes:
      successes: [A], one more than the rewards so far.
      failures: [A], one more than the pulls without a reward.
    """

    successes: jax.Array
    failures: jax.Array


ScoreFn = Callable[[PRNGKey, Beliefs, jax.Array], jax.Array]
"""`(key, beliefs, pull) -> [A]`. The arm with the largest number is pulled; `pull` counts the pulls before this one."""


class Played(NamedTuple):
    """What a strategy got from T bandits.

    Attributes:
      reward: [T], the sums of the rewards.
      regret: [T, H], what each pull was expected to pay less than the best arm.
    """

    reward: jax.Array
    regret: jax.Array


class Strategy(NamedTuple):
    """How to choose an arm.

    Attributes:
      make: `(num_pulls, parameter) -> ScoreFn`, with None for the parameter of a strategy that has none.
      grid: the values of the parameter to choose from; empty if there is no parameter.
    """

    make: Callable[[int, jax.Array | None], ScoreFn]
    grid: tuple[float, ...] = ()


def mean_of(beliefs: Beliefs) -> jax.Array:
    """The posterior means of the probabilities, [A]."""
    return beliefs.successes / (beliefs.successes + beliefs.failures)


def draw_probabilities(key: PRNGKey, beliefs: Beliefs) -> jax.Array:
    """Draws the probabilities of the arms from their posterior, [A]."""
    success, failure = draw_gamma(key, jnp.stack(beliefs))
    return success / (success + failure)


def draw_gamma(key: PRNGKey, shape: jax.Array) -> jax.Array:
    """Draws from Gamma distributions with scale 1 and shape parameters of at least 1.

    Marsaglia and Tsang, 2000, "A simple method for generating gamma variables", as in `jax.random.gamma`, which has a
    key and a loop for every number. With one of each for the array, this is three times as fast and more on a CPU.

    Args:
      key: the randomness.
      shape: α ≥ 1, an array of any shape.

    Returns:
      An array like `shape`.
    """
    d = shape - 1 / 3
    c = 1 / jnp.sqrt(9 * d)

    def draw_again(carry):
        key, drawn, waiting = carry
        key, normal_key, uniform_key = jax.random.split(key, 3)
        x = jax.random.normal(normal_key, shape.shape)
        v = (1 + c * x) ** 3
        # No logarithm of what is not positive: its value would not be a number, though it is not used.
        bound = x**2 / 2 + d * (1 - v + jnp.log(jnp.where(v > 0, v, 1.0)))
        accepted = (v > 0) & (jnp.log(jax.random.uniform(uniform_key, shape.shape)) < bound)
        return key, jnp.where(waiting & accepted, d * v, drawn), waiting & ~accepted

    start = key, jnp.zeros_like(shape), jnp.ones(shape.shape, bool)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), draw_again, start)[1]


def random(num_pulls: int, parameter: None) -> ScoreFn:
    """Pulls any arm."""
    return lambda key, beliefs, pull: jax.random.uniform(key, beliefs.successes.shape)


def greedy(num_pulls: int, parameter: None) -> ScoreFn:
    """Pulls the arm with the largest posterior mean."""
    return lambda key, beliefs, pull: mean_of(beliefs)


def epsilon_greedy(num_pulls: int, epsilon: jax.Array) -> ScoreFn:
    """Pulls any arm with probability ε, or else the arm with the largest posterior mean."""

    def score(key, beliefs, pull):
        explore_key, arm_key = jax.random.split(key)
        anything = jax.random.uniform(arm_key, beliefs.successes.shape)
        return jnp.where(jax.random.bernoulli(explore_key, epsilon), anything, mean_of(beliefs))

    return score


def ucb1(num_pulls: int, width: jax.Array) -> ScoreFn:
    """Pulls the arm with the largest mean + c √(2 log t / n), where t pulls came before and n counts those of the arm.

    n contains the success and the failure of the prior. With c = 1 and without a prior it is UCB1 of Auer et al., 2002.
    """

    def score(key, beliefs, pull):
        bonus = jnp.sqrt(2 * jnp.log(jnp.maximum(pull, 1)) / (beliefs.successes + beliefs.failures))
        return mean_of(beliefs) + width * bonus

    return score


def thompson(num_pulls: int, parameter: None) -> ScoreFn:
    """Draws probabilities from the posterior and pulls the arm that has the largest."""
    return lambda key, beliefs, pull: draw_probabilities(key, beliefs)


def optimistic_thompson(num_pulls: int, num_samples: jax.Array) -> ScoreFn:
    """Draws N times from the posterior and pulls the best arm of the draw that has the largest posterior density.

    This is what the authors' code does. With N = 1 it is Thompson sampling.
    """

    def score(key, beliefs, pull):
        def draw(sample, best):
            probabilities = draw_probabilities(jax.random.fold_in(key, sample), beliefs)
            log_density = jnp.sum(
                xlogy(beliefs.successes - 1, probabilities) + xlogy(beliefs.failures - 1, 1 - probabilities)
            )
            better = log_density >= best[1]
            return jax.tree.map(functools.partial(jnp.where, better), (probabilities, log_density), best)

        nothing = jnp.zeros_like(beliefs.successes), -jnp.inf
        return jax.lax.fori_loop(0, num_samples, draw, nothing)[0]

    return score


def gittins(num_pulls: int, parameter: None) -> ScoreFn:
    """Pulls the arm with the largest Gittins index for the pulls that are left, without discount.

    The authors' code takes indices for infinitely many pulls instead, with the best of four discounts.
    """
    indices = gittins_indices(num_pulls)

    def score(key, beliefs, pull):
        successes, failures = (jnp.astype(count, int) - 1 for count in beliefs)
        return indices[num_pulls - pull - 1, successes, failures]

    return score


def gittins_indices(num_pulls: int) -> jax.Array:
    """Gittins indices of a Bernoulli arm for every number of pulls that are left.

    If a pull costs λ, an arm that may be pulled up to h times, and given up at any time, is worth
    V_h(s, f) = max(0, p − λ + p V_{h−1}(s+1, f) + (1 − p) V_{h−1}(s, f+1)) with p = (1 + s) / (2 + s + f) and V_0 = 0.
    The index is the λ at which this becomes 0: sup_τ E[rewards before τ] / E[τ] over stopping times 1 ≤ τ ≤ h.

    Args:
      num_pulls: H.

    Returns:
      [H, H, H], at [h − 1, s, f] the index after s successes and f failures with h pulls left, for s + f + h ≤ H.
    """
    levels = ((jnp.arange(GITTINS_LEVELS) + 0.5) / GITTINS_LEVELS)[:, None, None]
    count = jnp.arange(num_pulls)
    mean = ((1 + count[:, None]) / (2 + count[:, None] + count[None, :]))[None]

    def one_more_pull(value, _):
        # What follows the largest counts is never asked for: the pulls are used up before.
        after_success = jnp.pad(value[:, 1:, :], ((0, 0), (0, 1), (0, 0)))
        after_failure = jnp.pad(value[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
        value = jnp.maximum(mean - levels + mean * after_success + (1 - mean) * after_failure, 0.0)
        return value, jnp.mean(value > 0, axis=0)

    nothing = jnp.zeros((GITTINS_LEVELS, num_pulls, num_pulls))
    return jax.lax.scan(one_more_pull, nothing, length=num_pulls)[1]


STRATEGIES = {
    "random": Strategy(random),
    "greedy": Strategy(greedy),
    "epsilon-greedy": Strategy(epsilon_greedy, tuple(tenths / 10 for tenths in range(11))),
    "UCB1": Strategy(ucb1, tuple(tenths / 10 for tenths in range(11))),
    "Thompson sampling": Strategy(thompson),
    "optimistic Thompson sampling": Strategy(optimistic_thompson, (1, 2, 3, 5, 7, 10, 15, 20)),
    "Gittins": Strategy(gittins),
}
"""The competitors of the paper. The grids are those of the authors' code, which tries every number of samples to 20."""


def play(
    strategy: Strategy,
    key: PRNGKey,
    *,
    num_tasks: int,
    num_arms: int,
    num_pulls: int,
    parameter: float | None = None,
) -> Played:
    """Lets a strategy play on random bandits.

    Args:
      strategy: one of `STRATEGIES`, or another.
      key: the randomness. Strategies with the same key play on the same bandits.
      num_tasks: T bandits.
      num_arms: of a bandit.
      num_pulls: on each bandit.
      parameter: of the strategy; `best_parameter` chooses one.

    Returns:
      Rewards and regrets.

    Raises:
      ValueError: if a number is no positive integer, or if a parameter is missing or not wanted.
    """
    settings = {"num_tasks": num_tasks, "num_arms": num_arms, "num_pulls": num_pulls}
    settings = {name: check_integer(name, value, at_least=1) for name, value in settings.items()}
    check_parameter(strategy.grid, parameter)
    return _play(strategy, key, parameter, **settings)


@functools.partial(jax.jit, static_argnames=("strategy", "num_tasks", "num_arms", "num_pulls"))
def _play(strategy, key, parameter, *, num_tasks, num_arms, num_pulls):
    environment = bandits(num_arms)
    score = strategy.make(num_pulls, parameter)

    def one(key):
        task_key, reset_key, play_key = jax.random.split(key, 3)
        probabilities = environment.sample_task(task_key)

        def pull_arm(carry, now):
            state, beliefs = carry
            pull, key = now
            score_key, step_key = jax.random.split(key)
            arm = jnp.argmax(score(score_key, beliefs, pull))
            state, _, reward, _ = environment.step(probabilities, state, arm, step_key)
            beliefs = Beliefs(beliefs.successes.at[arm].add(reward), beliefs.failures.at[arm].add(1 - reward))
            return (state, beliefs), (reward, jnp.max(probabilities) - probabilities[arm])

        state, _ = environment.reset(probabilities, reset_key)
        prior = Beliefs(jnp.ones(num_arms), jnp.ones(num_arms))
        pulls = jnp.arange(num_pulls), jax.random.split(play_key, num_pulls)
        _, (rewards, regrets) = jax.lax.scan(pull_arm, (state, prior), pulls)
        return Played(jnp.sum(rewards), regrets)

    return jax.vmap(one)(jax.random.split(key, num_tasks))


def check_parameter(grid: Sequence[float], parameter: float | None) -> None:
    """Raises ValueError if the parameter of a strategy is missing, or is given to one without a grid."""
    if (parameter is None) == bool(grid):
        wanted = f"one of {grid}, or another number" if grid else "None, for the strategy has none"
        raise ValueError(f"parameter must be {wanted}, got {parameter}")


def best_parameter(grid: Sequence[float], rewards_of: Callable[[float], jax.Array]) -> float | None:
    """The number of a grid with the largest mean reward, the first of several; None if the grid is empty."""
    means = [jnp.mean(rewards_of(parameter)) for parameter in grid]
    return grid[int(np.argmax(means))] if means else None


def compare(
    key: PRNGKey, *, num_tasks: int, num_arms: int, num_pulls: int
) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """All strategies on the same bandits, with parameters that are chosen on others.

    Gittins indices are left out above `MAX_GITTINS_PULLS`, because their memory grows as the cube of the pulls.

    Args:
      key: the randomness.
      num_tasks: bandits of the test; a parameter is chosen on at most 2,000.
      num_arms: of a bandit.
      num_pulls: H, on each bandit.

    Returns:
      By name "parameter", and "mean" and "ci95" of the total reward, lists of one number; and by name the mean of the
      regret after each pull, [H].
    """
    tune_key, test_key = jax.random.split(key)
    sizes, found, regrets = {"num_arms": num_arms, "num_pulls": num_pulls}, {}, {}
    for name, strategy in STRATEGIES.items():
        if name == "Gittins" and num_pulls > MAX_GITTINS_PULLS:
            continue
        tune = functools.partial(play, strategy, tune_key, num_tasks=min(2000, num_tasks), **sizes)
        parameter = best_parameter(strategy.grid, lambda value, tune=tune: tune(parameter=value).reward)
        played = play(strategy, test_key, num_tasks=num_tasks, parameter=parameter, **sizes)
        found[name] = {"parameter": parameter} | mean_and_interval(np.asarray(played.reward)[:, None])
        regrets[name] = np.cumsum(np.asarray(played.regret).mean(0)).tolist()
    return found, regrets


def bayes_optimum(num_arms: int, num_pulls: int) -> float:
    """The largest expected total reward that a strategy can have, exactly.

    By dynamic programming over what may be known: the successes and failures of each arm. Arms in another order are
    the same state, and arms that were not pulled are not written down.

    Args:
      num_arms: A.
      num_pulls: H.

    Returns:
      The expectation over bandits with uniform probabilities.

    Raises:
      ValueError: if a number is no positive integer, or if there are more than `MAX_STATES` states.
    """
    num_arms = check_integer("num_arms", num_arms, at_least=1)
    num_pulls = check_integer("num_pulls", num_pulls, at_least=1)
    layers = [{(): 0.0}]
    for _ in range(num_pulls):
        outcomes = (after for state in layers[-1] for pull in _pulls(state, num_arms) for after in pull[1:])
        layers.append(dict.fromkeys(outcomes, 0.0))
        if (total := sum(map(len, layers))) > MAX_STATES:
            raise ValueError(
                f"num_arms={num_arms} with num_pulls={num_pulls} has at least {total} states, and the limit is "
                f"MAX_STATES={MAX_STATES}: the exact optimum needs fewer pulls, or fewer arms"
            )
    for layer, following in zip(layers[-2::-1], layers[:0:-1], strict=True):
        for state in layer:
            layer[state] = max(
                mean * (1 + following[success]) + (1 - mean) * following[failure]
                for mean, success, failure in _pulls(state, num_arms)
            )
    return layers[0][()]


def _pulls(state, num_arms):
    """What may be pulled: its posterior mean, and the state after a success and after a failure."""
    untouched = [(0, 0)] if len(state) < num_arms else []
    for arm in {*state, *untouched}:
        others = list(state)
        if arm in state:
            others.remove(arm)
        successes, failures = arm
        yield (
            (1 + successes) / (2 + successes + failures),
            tuple(sorted([*others, (successes + 1, failures)])),
            tuple(sorted([*others, (successes, failures + 1)])),
        )
