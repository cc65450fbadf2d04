"""Bernoulli bandits by RL² (Duan et al., 2016, section 3.1 and table 1).

A recurrent policy pulls the arms of a new bandit n times. It sees which arm it pulled last and what that paid, and no
algorithm tells it how to explore. The probabilities of the arms are uniform in [0, 1]. The strategies of the literature
are tested beside it on as many tasks, and for few pulls the largest expected reward that any strategy can have.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax

from experiments import bandit_strategies, published, runs, trials
from experiments.cli import main
from experiments.runs import console
from maml_jax.tasks.bandits import bandits
from maml_jax.types import ArrayTree, check_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(trials.TrialConfig):
    """The settings of one run; the paper's policy sees up to 250 million pulls."""

    experiment: ClassVar[str] = "bandits"

    num_arms: int = 5
    """Arms of a bandit; 5, 10 and 50 in the paper."""
    num_pulls: int = 10
    """Pulls of a trial; 10, 100 and 500 in the paper."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_integer("--num-arms", self.num_arms, at_least=2)
        check_integer("--num-pulls", self.num_pulls, at_least=1)


METHODS = {"rl2": Config(algorithm="rl2", hyperparameters=trials.TrialTraining(), num_meta_steps=900, log_every=20)}


def about() -> dict[str, str]:
    """A line on each method for --help."""
    numbers = ", ".join(
        f"{rewards['RL²']} with {pulls} pulls of {arms} arms" for (pulls, arms), rewards in published.BANDITS.items()
    )
    return {"rl2": f"RL² (Duan et al., 2016). Published total rewards: {numbers}."}


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


def test(config: Config, params: ArrayTree) -> dict[str, Any]:
    """The total reward of the policy and of the strategies, and the largest that can be expected."""
    *keys, strategy_key = jax.random.split(runs.streams(config.seed).test, 3)
    metrics = trials.reward_metrics(config, problem_of(config), params, keys)
    sizes = {"num_arms": config.num_arms, "num_pulls": config.num_pulls, "num_tasks": config.eval_episodes}
    strategies = bandit_strategies.compare(strategy_key, **sizes)
    try:
        optimum = bandit_strategies.bayes_optimum(config.num_arms, config.num_pulls)
    except ValueError:  # there are too many states for the dynamic programme
        optimum = None
    return {"metrics": metrics, "strategies": strategies, "optimum": optimum}


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
    show=show,
)
run = functools.partial(trials.run, EXPERIMENT)
load = functools.partial(trials.load, EXPERIMENT)
with_paper_defaults = functools.partial(trials.with_paper_defaults, EXPERIMENT)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
