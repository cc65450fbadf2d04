"""Mazes by RL² (Duan et al., 2016, section 3.3).

A recurrent policy walks twice through the same maze, whose walls and goal it sees only from near. The first time it has
to search. The second time it can go straight to the goal, if its state remembers the way. Mazes are grids here and
pictures in the paper, so that only the success, the ratio of the lengths and the share of mazes in which the second
walk is no longer can be compared.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from rich.table import Table

from experiments import figures, intervals, published, runs, trials
from experiments.cli import check_counts, main
from experiments.runs import console
from maml_jax import rl
from maml_jax.tasks.mazes import MOVES, Maze, mazes, shortest_path
from maml_jax.types import ArrayTree, PRNGKey

LARGER_SIZE = 9
"""Cells along a side of the larger mazes of the test."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(trials.TrialConfig):
    """The settings of one run."""

    experiment: ClassVar[str] = "mazes"

    size: int = 5
    """Cells along a side of a maze; 5 in the paper. Mazes of 9 are tested too if it is smaller."""
    view: int = 3
    """Squares along a side of what the agent sees, an odd number: 3 are the walls around its cell, 5 also the cells
    around it."""
    num_episodes: int = 2
    """Walks through the same maze."""
    horizon: int = 100
    """Time steps after which a walk is given up; 250 in the paper, whose steps are smaller."""
    meta_batch_size: int = 256
    """Trials per meta-step, each of a new maze."""
    outer_lr: float = 1e-3
    """Rate of the outer optimiser."""
    outer_lr_end: float = 1e-4
    """The outer rate at the end of a linear or cosine schedule."""
    eval_episodes: int = 1000
    """Mazes of the test, and at most 2,000 of them in each validation."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(self, size=2, num_episodes=2, horizon=1, view=3)
        if self.view % 2 == 0:
            raise ValueError(f"--view {self.view} has no middle; choose an odd number")


METHODS = {
    "rl2": Config(
        algorithm="rl2",
        hyperparameters=trials.RecurrentTraining(hidden_size=128, entropy_weight=0.01),
        num_meta_steps=2000,
    )
}


def about() -> dict[str, str]:
    """A line on each method for --help."""
    paper = published.MAZES["5 x 5"]
    first, second = paper["steps"]
    return {
        "rl2": f"RL² (Duan et al., 2016). Published: success in {paper['success'][0]:.1%}, the second walk "
        f"{second / first:.2f} times as long as the first and no longer in {paper['improved']:.1%} of mazes."
    }


def problem_of(config: Config) -> trials.Problem:
    """Several walks through one maze."""
    return _problem(config.size, config.view, config.num_episodes, config.horizon)


@functools.cache
def _problem(size: int, view: int, num_episodes: int, horizon: int) -> trials.Problem:
    return trials.Problem(
        environment=mazes(size=size, view=view),
        num_actions=len(MOVES),
        num_inputs=2 * view**2 + len(MOVES) + 2,
        num_episodes=num_episodes,
        horizon=horizon,
    )


def reward(config: Config, params: ArrayTree, seed: int, count: int) -> np.ndarray:
    """The total reward in the first mazes of a test, by drawn actions [count]. The most probable may go in circles."""
    return trials.outcome(config, problem_of(config), params, runs.streams(seed).test, count).reward.sum(1)


def test(config: Config, params: ArrayTree) -> dict[str, Any]:
    """Success and steps of every walk by the most probable actions and by drawn ones, beside the shortest path.

    The policy is also tested in larger mazes than it was trained in, with four times the time steps, as in the paper.
    """
    key = runs.streams(config.seed).test
    larger = dataclasses.replace(config, size=LARGER_SIZE, horizon=4 * config.horizon)
    found = walks_of(config, params, key)
    if config.size < LARGER_SIZE:
        found["larger"] = {"size": LARGER_SIZE, "horizon": larger.horizon} | walks_of(larger, params, key)
    return found


def walks_of(config: Config, params: ArrayTree, key: PRNGKey) -> dict[str, Any]:
    """What `test` reports of mazes of one size."""
    problem, metrics = problem_of(config), {}
    for name, greedy in {"draws": False, "most_probable": True}.items():
        found = trials.outcome(config, problem, params, key, config.eval_episodes, greedy=greedy)
        # A walk that was given up has the length of the horizon, and is no improvement.
        improved = (found.steps[:, 1:2] <= found.steps[:, :1]) & (found.done[:, 1:2] > 0)
        metrics |= {
            f"steps_of_{name}": intervals.mean_and_interval(found.steps),
            f"success_of_{name}": intervals.mean_and_interval(found.done),
            f"improved_of_{name}": intervals.mean_and_interval(improved.astype(float)),
        }
    # The mazes of `trials.outcome` with this key.
    task_keys = jax.vmap(lambda key: jax.random.split(key)[0])(jax.random.split(key, config.eval_episodes))
    shortest = jax.jit(jax.vmap(lambda key: shortest_path(problem.environment.sample_task(key))))(task_keys)
    return {"metrics": metrics, "shortest_path": float(np.mean(shortest))}


def draw_behaviour(file: Path, config: Config, params: ArrayTree, num_mazes: int, seed: int) -> None:
    """Draws every walk through the first mazes of the test, actions drawn."""
    problem = problem_of(config)
    policy, drawn = trials.make_policy(problem, config.hyperparameters), []
    for key in jax.random.split(runs.streams(seed).test, num_mazes):
        task_key, trial_key = jax.random.split(key)
        maze = problem.environment.sample_task(task_key)
        sizes = {"num_episodes": config.num_episodes, "horizon": config.horizon}
        trial = rl.run_trial(problem.environment, policy, params, maze, trial_key, **sizes)
        drawn.append({"maze": jax.tree.map(np.asarray, maze), "walks": squares_of(maze, trial, config.num_episodes)})
    figures.mazes(file, drawn)


def squares_of(maze: Maze, trial: rl.Trial, num_walks: int) -> list[np.ndarray]:
    """The squares (row, column) of every walk, each [steps + 1, 2]."""
    walls, walks = np.asarray(maze.walls), []
    for walk in range(num_walks):
        square = np.asarray(maze.start)
        squares = [square]
        for action in np.asarray(trial.action)[(np.asarray(trial.episode) == walk) & (np.asarray(trial.mask) > 0)]:
            if not walls[tuple(square + MOVES[action])]:
                square = square + 2 * MOVES[action]
            squares.append(square)
        walks.append(np.stack(squares))
    return walks


def show(results: dict[str, Any]) -> None:
    """Prints success and steps of every walk."""
    size, count = results["config"]["size"], results["protocol"]["episodes"]
    tested = {size: results}
    if larger := results.get("larger"):
        tested[larger["size"]] = larger
    for cells, found in tested.items():
        beyond = "" if cells == size else f", which are larger than those of the training ({size} x {size})"
        _show_walks(f"mazes of {cells} x {cells} cells, {count:,} of them{beyond}", found)


def _show_walks(title: str, found: dict[str, Any]) -> None:
    metrics, table = found["metrics"], Table(title=title)
    for heading in ("actions", "walk", "steps", "reached the goal, %", "reached and no longer than the first, %"):
        table.add_column(heading, justify="left" if heading == "actions" else "right")
    for name in ("draws", "most_probable"):
        for walk in range(len(metrics[f"steps_of_{name}"]["mean"])):
            cells = [
                intervals.format_mean(
                    *(metrics[f"{what}_of_{name}"][part][walk] for part in ("mean", "ci95")), scale=scale
                )
                for what, scale in (("steps", 1), ("success", 100))
            ]
            improved = metrics[f"improved_of_{name}"]
            shown = intervals.format_mean(improved["mean"][0], improved["ci95"][0], scale=100) if walk == 1 else ""
            table.add_row(name.replace("_", " "), str(walk + 1), *cells, shown)
    console.print(table)
    console.print(f"the shortest path has {found['shortest_path']:.2f} steps on average")


EXPERIMENT = trials.Experiment(
    METHODS,
    run_name=lambda config: f"{config.size}x{config.size}-view{config.view}",
    problem_of=problem_of,
    test=test,
    reward=reward,
    show=show,
    draw_behaviour=draw_behaviour,
)
run = functools.partial(trials.run, EXPERIMENT)
load = functools.partial(trials.load, EXPERIMENT)
with_paper_defaults = functools.partial(trials.with_paper_defaults, EXPERIMENT)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
