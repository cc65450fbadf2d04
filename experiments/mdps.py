"""Random Markov decision processes by RL² (Duan et al., 2016, section 3.2 and table 2).

A process has 10 states and 5 actions. A recurrent policy acts in it for n episodes of 10 steps, and has to find out
what its actions do while it earns. The strategies of the literature are tested beside it in as many processes.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax

from experiments import mdp_strategies, published, runs, seeds, trials
from experiments.cli import main, with_defaults
from experiments.runs import console, stored_config
from maml_jax.tasks.tabular_mdp import random_mdps
from maml_jax.types import ArrayTree, MetaLearner, check_integer

NUM_STATES, NUM_ACTIONS = mdp_strategies.NUM_STATES, mdp_strategies.NUM_ACTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(trials.TrialConfig):
    """The settings of one run."""

    experiment: ClassVar[str] = "mdps"

    num_episodes: int = 10
    """Episodes of a trial; 10, 25, 50, 75 and 100 in the paper."""
    meta_batch_size: int = 500
    """Trials per meta-step, each of a new process."""
    num_meta_steps: int = 1000
    """Outer updates. A run with a constant rate may be continued with a larger number."""
    eval_episodes: int = 1000
    """Processes of the test and of each validation."""
    val_every: int = 100
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 10
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_integer("--num-episodes", self.num_episodes, at_least=1)


METHODS = {"rl2": Config(algorithm="rl2", hyperparameters=trials.RecurrentPolicy(hidden_size=128))}


def about() -> dict[str, str]:
    """A line on each method for --help."""
    numbers = ", ".join(f"{rewards['RL²']} with {episodes} episodes" for episodes, rewards in published.MDPS.items())
    return {"rl2": f"RL² (Duan et al., 2016). Published total rewards: {numbers}."}


def with_paper_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    name = f"{config.algorithm}-{config.num_episodes}episodes-{config.seed}"
    return with_defaults(config, {"run_dir": Path(f"runs/mdps-{name}"), "chunk_size": config.meta_batch_size})


def problem_of(config: Config) -> trials.Problem:
    """Several episodes of 10 time steps."""
    return trials.Problem(
        environment=random_mdps(NUM_STATES, NUM_ACTIONS),
        num_actions=NUM_ACTIONS,
        num_inputs=NUM_STATES + NUM_ACTIONS + 2,
        num_episodes=config.num_episodes,
        horizon=mdp_strategies.HORIZON,
    )


def test(config: Config, params: ArrayTree) -> dict[str, Any]:
    """The total reward of the policy and of the strategies, and the rewards of each episode."""
    keys = jax.random.split(runs.streams(config.seed).test, 3)
    greedy, drawn = (
        trials.outcome(config, problem_of(config), params, key, config.eval_episodes, greedy=greedy).reward
        for key, greedy in zip(keys[:2], (True, False), strict=True)
    )
    metrics = {
        "reward": runs.mean_and_interval(greedy.sum(1, keepdims=True)),
        "reward_of_draws": runs.mean_and_interval(drawn.sum(1, keepdims=True)),
    }
    sizes = {"num_episodes": config.num_episodes, "num_tasks": config.eval_episodes}
    return {
        "metrics": metrics,
        "by_episode": runs.mean_and_interval(drawn),
        "strategies": mdp_strategies.compare(keys[2], **sizes),
    }


def run(config: Config) -> dict[str, Any]:
    """Trains, tests, prints, and returns the content of results.json, or of seeds.json."""
    config = with_paper_defaults(config)
    if config.seeds > 1:
        return seeds.run_seeds(run, lambda of_seed: trials.training_of(of_seed, problem_of(of_seed)), config)
    protocol = {"shot": config.num_episodes}
    results = trials.train_and_test(config, problem_of(config), lambda params: test(config, params), protocol)
    show(results)
    return results


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner and the selected parameters of a run."""
    config = with_paper_defaults(stored_config(METHODS, Path(run_dir)))
    return trials.load(config, problem_of(config))


def show(results: dict[str, Any]) -> None:
    """Prints the total reward of the policy and of the strategies beside the published ones."""
    episodes, count = results["config"]["num_episodes"], results["protocol"]["episodes"]
    table = trials.reward_table(
        results, published.MDPS.get(episodes, {}), f"mean total reward of {episodes} episodes, {count:,} processes"
    )
    console.print(table)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
