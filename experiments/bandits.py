"""Bernoulli bandits by RL² (Duan et al., 2016, section 3.1 and table 1), and by MAML.

A policy pulls the arms of a new bandit n times. It sees which arm it pulled last and what that paid, and no algorithm
tells it how to explore: the state of RL² is that of a recurrent network, and MAML takes a policy-gradient step after
every pull. The probabilities of the arms are uniform in [0, 1]. The strategies of the literature are tested beside it
on as many tasks, and for few pulls the largest expected reward that any strategy can have.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bandit_strategies, figures, intervals, published, trials
from experiments.cli import check_counts, main
from experiments.runs import console
from maml_jax import rl
from maml_jax.tasks.bandits import bandits
from maml_jax.types import ArrayTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(trials.TrialConfig):
    """The settings of one run; the paper's policy sees up to 250 million pulls."""

    experiment: ClassVar[str] = "bandits"

    num_arms: int = 5
    """Arms of a bandit; 5, 10 and 50 in the RL² paper."""
    num_pulls: int = 10
    """Pulls of a trial; 10, 100 and 500 in the RL² paper."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(self, num_arms=2, num_pulls=1)


METHODS = {
    "rl2": Config(algorithm="rl2", hyperparameters=trials.RecurrentTraining(), num_meta_steps=900, log_every=20),
    "maml": Config(
        algorithm="maml",
        hyperparameters=trials.DescentTraining(entropy_weight=0.01),
        num_meta_steps=600,
        log_every=20,
        outer_lr=2e-2,
        outer_lr_end=2e-3,
    ),
}
TEXTS = {
    "rl2": "RL² (Duan et al., 2016).",
    "maml": "MAML, an inner step after every pull.",
}


def about() -> dict[str, str]:
    """A line on each method for --help, with its published rewards."""

    def line(name: str) -> str:
        numbers = [
            f"{rewards[title]} with {pulls} pulls of {arms} arms"
            for (pulls, arms), rewards in published.BANDITS.items()
            if (title := trials.TITLES[name]) in rewards
        ]
        return f"{TEXTS[name]} Published total rewards: {', '.join(numbers)}."

    return {name: line(name) for name in METHODS}


def problem_of(config: Config) -> trials.Problem:
    """One episode of `num_pulls` time steps."""
    return _problem(config.num_arms, config.num_pulls)


@functools.cache
def _problem(num_arms: int, num_pulls: int) -> trials.Problem:
    return trials.Problem(
        environment=bandits(num_arms),
        num_actions=num_arms,
        num_inputs=1 + num_arms + 2,
        num_episodes=1,
        horizon=num_pulls,
    )


def reward_and_regret(problem: trials.Problem, probabilities: jax.Array, trial: rl.Trial) -> tuple:
    """The total reward of a trial, and what each pull is expected to pay less than the best arm, [n]."""
    return jnp.sum(trial.reward), jnp.max(probabilities) - probabilities[trial.action]


def test(config: Config, params: ArrayTree) -> dict[str, Any]:
    """The rewards and regrets of the policy and of the strategies, and the largest reward that can be expected."""
    *keys, strategy_key = trials.keys_of_test(config.seed)
    problem, metrics, regrets = problem_of(config), {}, {}
    names = {"reward": True, "reward_of_draws": False}
    for key, (name, greedy) in zip(keys, names.items(), strict=True):
        reward, regret = trials.through_trials(
            config, problem, params, key, config.eval_episodes, reward_and_regret, greedy=greedy
        )
        metrics[name] = intervals.mean_and_interval(reward[:, None])
        regrets[name] = np.cumsum(regret.mean(0)).tolist()
    strategies, of_strategies = bandit_strategies.compare(
        strategy_key, num_arms=config.num_arms, num_pulls=config.num_pulls, num_tasks=config.eval_episodes
    )
    try:
        optimum = bandit_strategies.bayes_optimum(config.num_arms, config.num_pulls)
    except ValueError:  # there are too many states for the dynamic programme
        optimum = None
    regret = {trials.TITLES[config.algorithm]: regrets["reward"], **of_strategies}
    return {"metrics": metrics, "strategies": strategies, "regret": regret, "optimum": optimum}


def draw(directory: Path, results: dict[str, Any]) -> None:
    """Draws the regret after each pull, if the results have it."""
    if "regret" not in results:
        return
    arms, pulls = (results["config"][name] for name in ("num_arms", "num_pulls"))
    figures.regrets(directory / "regret.png", {f"{pulls} pulls of {arms} arms": results["regret"]})


def show(results: dict[str, Any]) -> None:
    """Prints the total reward of the policy and of the strategies beside the published ones."""
    arms, pulls = (results["config"][name] for name in ("num_arms", "num_pulls"))
    count = results["protocol"]["episodes"]
    table = trials.reward_table(
        results,
        published.BANDITS.get((pulls, arms), {}),
        f"mean total reward of {pulls} pulls, {arms} arms, {count:,} bandits",
    )
    if results["optimum"] is not None:
        table.add_row("largest that can be expected", "", f"{results['optimum']:.3f}", "")
    console.print(table)


EXPERIMENT = trials.Experiment(
    METHODS,
    run_name=lambda config: f"{config.num_arms}arms-{config.num_pulls}pulls",
    problem_of=problem_of,
    test=test,
    reward=functools.partial(trials.greedy_reward, problem_of),
    show=show,
    draw=draw,
)
run = functools.partial(trials.run, EXPERIMENT)
load = functools.partial(trials.load, EXPERIMENT)
with_paper_defaults = functools.partial(trials.with_paper_defaults, EXPERIMENT)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
