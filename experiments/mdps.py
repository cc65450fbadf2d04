"""Random Markov decision processes by RL² (Duan et al., 2016, section 3.2 and table 2), and by MAML.

A process has 10 states and 5 actions. A policy acts in it for n episodes of 10 steps, and has to find out what its
actions do while it earns. The state of RL² is that of a recurrent network. MAML takes a policy-gradient step on a table
of logits after every reward, as if an action earned its own reward only. The strategies of the literature are tested
beside it in as many processes.
"""

import dataclasses
import functools
from typing import Any, ClassVar

from experiments import intervals, mdp_strategies, published, trials
from experiments.cli import check_counts, main
from experiments.runs import console
from maml_jax.tasks.tabular_mdp import random_mdps
from maml_jax.types import ArrayTree

NUM_STATES, NUM_ACTIONS = mdp_strategies.NUM_STATES, mdp_strategies.NUM_ACTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(trials.TrialConfig):
    """The settings of one run."""

    experiment: ClassVar[str] = "mdps"

    num_episodes: int = 10
    """Episodes of a trial; 10, 25, 50, 75 and 100 in the paper."""
    meta_batch_size: int = 500
    """Trials per meta-step, each of a new process."""
    eval_episodes: int = 1000
    """Processes of the test, and at most 2,000 of them in each validation."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(self, num_episodes=1)


METHODS = {
    "rl2": Config(algorithm="rl2", hyperparameters=trials.RecurrentTraining(hidden_size=128)),
    "maml": Config(
        algorithm="maml",
        hyperparameters=trials.DescentTraining(inner_lr=0.5, baseline=1.0, entropy_weight=0.01),
        num_meta_steps=200,
        val_every=50,
        outer_lr=2e-2,
        outer_lr_end=2e-3,
    ),
}


def about() -> dict[str, str]:
    """A line on each method for --help."""
    numbers = ", ".join(f"{rewards['RL²']} with {episodes} episodes" for episodes, rewards in published.MDPS.items())
    return {
        "rl2": f"RL² (Duan et al., 2016). Published total rewards: {numbers}.",
        "maml": "MAML, an inner step after every reward. No published number.",
    }


def problem_of(config: Config) -> trials.Problem:
    """Several episodes of 10 time steps."""
    return _problem(config.num_episodes)


@functools.cache
def _problem(num_episodes: int) -> trials.Problem:
    return trials.Problem(
        environment=random_mdps(NUM_STATES, NUM_ACTIONS),
        num_actions=NUM_ACTIONS,
        num_inputs=NUM_STATES + NUM_ACTIONS + 2,
        num_episodes=num_episodes,
        horizon=mdp_strategies.HORIZON,
    )


def test(config: Config, params: ArrayTree) -> dict[str, Any]:
    """The total reward of the policy and of the strategies."""
    *keys, strategy_key = trials.keys_of_test(config.seed)
    problem, metrics = problem_of(config), {}
    names = {"reward": True, "reward_of_draws": False}
    for key, (name, greedy) in zip(keys, names.items(), strict=True):
        found = trials.outcome(config, problem, params, key, config.eval_episodes, greedy=greedy)
        metrics[name] = intervals.mean_and_interval(found.reward.sum(1, keepdims=True))
    sizes = {"num_episodes": config.num_episodes, "num_tasks": config.eval_episodes}
    return {
        "metrics": metrics,
        "strategies": mdp_strategies.compare(strategy_key, **sizes),
    }


def show(results: dict[str, Any]) -> None:
    """Prints the total reward of the policy and of the strategies beside the published ones."""
    episodes, count = results["config"]["num_episodes"], results["protocol"]["episodes"]
    table = trials.reward_table(
        results, published.MDPS.get(episodes, {}), f"mean total reward of {episodes} episodes, {count:,} processes"
    )
    console.print(table)


EXPERIMENT = trials.Experiment(
    METHODS,
    run_name=lambda config: f"{config.num_episodes}episodes",
    problem_of=problem_of,
    test=test,
    reward=functools.partial(trials.greedy_reward, problem_of),
    show=show,
)
run = functools.partial(trials.run, EXPERIMENT)
load = functools.partial(trials.load, EXPERIMENT)
with_paper_defaults = functools.partial(trials.with_paper_defaults, EXPERIMENT)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
