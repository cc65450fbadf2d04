"""The part of the report on reinforcement learning."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import figures, intervals, navigation, published, trials
from experiments.cli import flag

FIGURES = Path(__file__).parent / "figures"
BEHAVIOUR = {("navigation", "maml"): "navigation_behaviour.png", ("mazes", "rl2"): "mazes_behaviour.png"}
"""The pictures of what a policy does, in experiments/figures, by experiment and method."""
BANDIT_SIZES = {"num_pulls": "pulls", "num_arms": "arms"}
Results = Sequence[Mapping[str, Any]]
FlagsOf = Callable[[Mapping[str, Any]], Sequence[str]]


def labelled(results: Results, flags_of: FlagsOf) -> dict[str, Results]:
    """Results of navigation by method and changed flags, the seeds together; by meta-steps too, if they differ."""
    groups = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda r: (list(navigation.METHODS).index(r["algorithm"]), r["seed"])):
        flags = [f"`{flag}`" for flag in flags_of(result) if not flag.startswith("--num-meta-steps")]
        label = ", ".join([navigation.TITLES[result["algorithm"]], *flags])
        groups[label][result["meta_steps"]].append(result)
    return {
        label if len(by_steps) == 1 else f"{label}, {steps:,} meta-steps": group
        for label, by_steps in groups.items()
        for steps, group in by_steps.items()
    }


def navigation_table(results: Results, flags_of: FlagsOf) -> str:
    """The mean return after every update, one row a run and set of goals, with the published returns.

    Methods with several seeds have a row for their mean, with the smallest and largest seed in parentheses.

    Args:
      results: of `experiments.navigation`.
      flags_of: `(result) -> flags`, those of its command but for the seed.
    """
    rows = []
    for label, result in ((label, r) for label, group in labelled(results, flags_of).items() for r in group):
        for evaluation in result["evaluations"]:
            metric = evaluation["metrics"]["return"]
            cells = [intervals.format_mean(*pair) for pair in zip(metric["mean"], metric["ci95"], strict=True)]
            rows.append(
                [
                    label,
                    str(result["seed"]),
                    f"{evaluation['count']} {evaluation['goals']}",
                    *[*cells, *[""] * 5][:5],
                    ", ".join(f"{rate:g}" for rate in result["rates"][:2]),
                    f"{result['policy_std'][0]:.2f}",
                    f"{result['meta_steps']:,}",
                    f"{result['seconds']['train'] / 60:.0f} min",
                ]
            )
    for label, group in labelled(results, flags_of).items():
        for evaluations in zip(*(result["evaluations"] for result in group), strict=True) if len(group) > 1 else ():
            by_update = zip(*(evaluation["metrics"]["return"]["mean"] for evaluation in evaluations), strict=True)
            goals = f"{evaluations[0]['count']} {evaluations[0]['goals']}"
            shown = [*map(intervals.format_over_seeds, by_update), *[""] * 5][:5]
            rows.append([f"{label}, mean of {len(group)} seeds", "", goals, *shown, "", "", "", ""])
    for title, returns in navigation.published_returns(results).items():
        shown = [*map(str, returns), *[""] * 5][:5]
        rows.append([f"{title}, published values", "", "40", *shown, "", "", "", ""])
    header = ["", "seed", "goals", *map(str, range(5)), "rates", "std", "meta-steps", "training"]
    return intervals.markdown_table(header, rows)


def strategies_table(
    results: Results, flags_of: FlagsOf, paper: Mapping[Any, Mapping[str, float]], sizes: Mapping[str, str]
) -> str:
    """The total reward of the policies and of the strategies, a column for each size of the problem.

    Args:
      results: of one experiment.
      flags_of: as in `navigation_table`.
      paper: the published rewards by size and strategy.
      sizes: the settings that make the size, by the word for them in the table.
    """
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    policies: dict[str, set[int]] = defaultdict(set)
    for result in sorted(results, key=lambda r: [*(r["config"][name] for name in sizes), r["seed"]]):
        numbers = tuple(result["config"][name] for name in sizes)
        column = columns[cell_of(result, sizes)]
        of_paper = paper.get(numbers if len(numbers) > 1 else numbers[0], {})
        title, label = trials.TITLES[result["algorithm"]], label_of(result, flags_of, sizes)
        if label in column:
            label += f", seed {result['seed']}"
        if label in column:
            raise ValueError(f"two results are {label} in {cell_of(result, sizes)}; remove one of their files")
        found = {label: result["metrics"]["reward"], f"{label}, drawn actions": result["metrics"]["reward_of_draws"]}
        for name in found:
            policies[name].add(result["meta_steps"])
        # Strategies are tested on the tasks of the first result of a column, which has the smallest seed.
        for name, metric in (found | result["strategies"]).items():
            published_name = title if name == label else name
            beside = f" (published {of_paper[published_name]})" if published_name in of_paper else ""
            column.setdefault(name, intervals.format_mean(metric["mean"][0], metric["ci95"][0]) + beside)
        if result.get("optimum"):
            column["largest that can be expected"] = f"{result['optimum']:.3f}"
    others = (name for column in columns.values() for name in column if name not in policies)
    rows = [
        [
            name,
            *(c.get(name, "") for c in columns.values()),
            " / ".join(f"{n:,}" for n in sorted(policies.get(name, ()))),
        ]
        for name in dict.fromkeys([*policies, *others])
    ]
    return intervals.markdown_table(["", *columns, "meta-steps"], rows)


def cell_of(result: Mapping[str, Any], sizes: Mapping[str, str]) -> str:
    """The size of the problem in words."""
    return ", ".join(f"{result['config'][name]} {word}" for name, word in sizes.items())


def label_of(result: Mapping[str, Any], flags_of: FlagsOf, sizes: Mapping[str, str]) -> str:
    """The method of a result with its changed flags, but for those of the size, of validations and of the test."""
    left_out = tuple(flag(name) for name in (*sizes, "val_every", "eval_episodes"))
    flags = (f"`{one}`" for one in flags_of(result) if not one.startswith(left_out))
    return ", ".join([trials.TITLES[result["algorithm"]], *flags])


def regrets(results: Results, flags_of: FlagsOf) -> dict[str, dict[str, Sequence[float]]]:
    """The regret after each pull by the size of the bandit and the method, for the largest number of pulls.

    The labels have no flags of the length of the training, which the table has. Of several lengths the longest is
    drawn, and of several seeds the first.
    """
    cells: dict[str, dict[str, Sequence[float]]] = defaultdict(dict)
    sizes = BANDIT_SIZES | {"meta_batch_size": "", "num_meta_steps": ""}
    most = max(result["config"]["num_pulls"] for result in results)
    shown = [result for result in results if result["config"]["num_pulls"] == most and "regret" in result]
    for result in sorted(shown, key=lambda r: (r["config"]["num_arms"], -r["meta_steps"], r["seed"])):
        title, label = trials.TITLES[result["algorithm"]], label_of(result, flags_of, sizes)
        curves = cells[cell_of(result, BANDIT_SIZES)]
        if label not in curves:
            curves |= {name.replace(title, label): regret for name, regret in result["regret"].items()}
    return cells


def mazes_table(results: Results, flags_of: FlagsOf) -> str:
    """Steps and success of both walks, one row for every size of maze that a run was tested in, and way to act."""
    in_columns = ("size", "view", "horizon", "start_run", "num_meta_steps", "val_every", "eval_episodes")
    rows = []
    order = ("size", "horizon", "start_run")
    for result in sorted(results, key=lambda r: [r["config"].get(name) or "" for name in order]):
        config, larger = result["config"], result.get("larger")
        name = f"{config['size']} x {config['size']}, view {config['view']}"
        if start := config.get("start_run"):
            name += f", started from {Path(start).name}"
        further = [f"`{one}`" for one in flags_of(result) if not one.startswith(tuple(map(flag, in_columns)))]
        name = ", ".join([name, *further, *([f"seed {result['seed']}"] if result["seed"] else [])])
        tested = {name: (config["horizon"], result)}
        if larger:
            tested[f"{name}, tested in {larger['size']} x {larger['size']}"] = larger["horizon"], larger
        for label, (horizon, found) in tested.items():
            for how, way in {"drawn": "draws", "most probable": "most_probable"}.items():
                metrics = {what: found["metrics"][f"{what}_of_{way}"] for what in ("steps", "success", "improved")}
                first, second = metrics["steps"]["mean"][:2]
                rows.append(
                    [
                        label,
                        how,
                        str(horizon),
                        *(
                            intervals.format_mean(metrics["steps"]["mean"][k], metrics["steps"]["ci95"][k])
                            for k in (0, 1)
                        ),
                        f"{second / first:.2f}",
                        " / ".join(f"{100 * share:.1f}" for share in metrics["success"]["mean"][:2]),
                        intervals.format_mean(
                            metrics["improved"]["mean"][0], metrics["improved"]["ci95"][0], scale=100
                        ),
                        f"{found['shortest_path']:.2f}",
                        f"{result['meta_steps']:,}",
                    ]
                )
    for label, paper in published.MAZES.items():
        first, second = paper["steps"]
        success = " / ".join(f"{100 * share:.1f}" for share in paper["success"])
        improved = f"{100 * paper['improved']:.1f}"
        row = [f"published, in pictures, {label}", "", "", str(first), str(second), f"{second / first:.2f}"]
        rows.append([*row, success, improved, "", ""])
    header = [
        "cells", "actions", "given up after", "steps, first walk", "second", "ratio", "success, %",
        "second no longer, %", "shortest path", "meta-steps",
    ]  # fmt: skip
    return intervals.markdown_table(header, rows)


def behaviour(experiment: str, algorithm: str, title: str) -> str:
    """The picture of what a policy does, if there is one."""
    file = FIGURES / BEHAVIOUR[experiment, algorithm]
    return f"\n\n{title}:\n\n![what the policy does](figures/{file.name})" if file.exists() else ""


def section(of: Mapping[str, Results], flags_of: FlagsOf) -> str:
    """The text of the report, with what there are results of.

    Args:
      of: the results by experiment.
      flags_of: as in `navigation_table`.
    """
    parts = []
    if of["navigation"]:
        parts.append(
            "### 2D navigation\n\nMean return after 0 to 4 updates, with its 95 % interval over goals; the mean of "
            "several seeds has the smallest and the largest in parentheses. The optimum is "
            f"{of['navigation'][0]['evaluations'][-1]['optimum']:.2f} on the fresh goals and "
            f"{of['navigation'][0]['evaluations'][0]['optimum']:.2f} on the published ones. "
            '"Std" is the standard deviation of the policy; that of the authors\' policy is 0.47.\n\n'
            f"{navigation_table(of['navigation'], flags_of)}\n\n![return against updates](figures/navigation.png)\n\n"
            "- MAML and FOMAML train one update, at the authors' rate of 0.5. The text of the paper has a rate of 0.1 "
            "and the squared distance as reward. The data behind its curve have 0.5 and the distance, and ours follow "
            "the data. Later rates and the state were chosen on 40 other goals; for policies that were not trained to "
            "adapt, so was the first rate.\n"
            "- The published pretraining used the authors' rates. Ours, one seed with chosen rates, is close to MAML "
            "after two updates and ahead after three on the fresh goals.\n"
            "- Loaded DiCE, whose second derivative is exact for unbiased advantages, is not better here after two "
            "updates and more, with one seed; its policy is still noisier.\n"
            "- The last layer of our policies starts at a tenth, also that of the random ones.\n\n"
            "The figure has the 40 published goals. Bars are intervals over goals, or over seeds where there are "
            "several." + behaviour("navigation", "maml", "Paths of MAML at the first published goals")
        )
    if of["bandits"]:
        parts.append(
            "### Bandits\n\nMean total reward, with its 95 % interval over bandits. The policies take their most "
            "probable action where nothing else is said. Every cell is one training.\n\n"
            + strategies_table(of["bandits"], flags_of, published.BANDITS, BANDIT_SIZES)
            + "\n\n"
            "- MAML takes an inner step after every pull. Its rates, and the temperature of the policy that acts, are "
            "learned unless a flag says otherwise. The published MAML (Mishra et al., 2018) learns neither.\n"
            "- The parameters of strategies were chosen on other bandits. The ε that was chosen is 0, so "
            "epsilon-greedy is greedy. Published numbers, except those of MAML, have standard errors of 0.06 with 10 "
            "pulls and 0.4 with 100.\n"
            "- The largest expected reward is exact. A mean over bandits may exceed it by its interval.\n"
            "- With 100 pulls and 5 arms, RL² that draws its actions is 0.26 behind UCB1, less than the interval of "
            "the difference. With 10 arms it stays below the index strategies, UCB1 and Gittins. There it comes within "
            "a point of its published number with units that start with a long memory (`--memory 100`) and with "
            "products of the inputs, which bind a reward to its arm (`--associate`)."
            + "\n\nCumulative regret of the bandits with the most pulls:\n\n"
            "![regret](figures/regret.png)"
        )
    if of["mdps"]:
        parts.append(
            "### Random Markov decision processes\n\nMean total reward, with its 95 % interval over processes of 10 "
            "states and 5 actions. The policies take their most probable action where nothing else is said. Every cell "
            "is one training.\n\n"
            + strategies_table(of["mdps"], flags_of, published.MDPS, {"num_episodes": "episodes"})
            + "\n\n"
            "- MAML takes an inner step after every reward, on a table of logits and an offset that all states share. "
            "With 10 episodes it is ahead of RL² and of all strategies. With 25 it is level with PSRL if it draws its "
            "actions, and behind all strategies but the random one if it takes the most probable ones.\n"
            "- RL² with a plain unit falls short of its published number. Twice the meta-steps, advantages that decay "
            "more slowly, a smaller weight of the entropy and units that start with a long memory, all together, do "
            "not change that. The unit would have to bind each reward to the state and the action that it followed, "
            "keep that until the state returns, and read it by the state.\n"
            "- With `--associate` products of these are inputs, and the output layers are products with the state. "
            "Together with advantages of λ = 0.3, as in the paper, RL² then reaches the best of the strategies.\n"
            "- The authors' scripts of RL² have a plain unit, and take 250,000 time steps a meta-step; ours take "
            "50,000. Their strategies have another prior of the rewards, which makes greedy worse and PSRL better than "
            "here."
        )
    if of["mazes"]:
        parts.append(
            "### Mazes\n\nTwo walks through the same maze. A walk that does not reach the goal counts with the steps "
            "after which it is given up. Each pair of rows is a policy in mazes of a size.\n\n"
            + mazes_table(of["mazes"], flags_of)
            + "\n\n"
            "- In small mazes the second walk is a smaller part of the first than published (0.75, in mazes of three "
            "dimensions), and no longer than the first in as many of them.\n"
            "- In larger mazes that it was not trained in, the second walk of that policy is longer than the first: "
            "memory does not pay there. In the paper it does. When its training goes on in larger mazes, the second "
            "walk falls to four tenths of the first.\n"
            "- The last pair is the policy of the pair before, loaded from runs/mazes-longer. Its walks are given up "
            "later, after 400 steps; nothing is trained (`--num-meta-steps 0`)."
            + behaviour("mazes", "rl2", "Walks through the first mazes of the test")
        )
    return "\n\n## Reinforcement learning\n\n" + "\n\n".join(parts) if parts else ""


def draw(directory: Path, of: Mapping[str, Results], flags_of: FlagsOf) -> None:
    """Writes the figures of the section."""
    if of["navigation"]:
        paper = navigation.published_returns(of["navigation"])
        figures.returns(directory / "navigation.png", labelled(of["navigation"], flags_of), paper)
    if of["bandits"]:
        figures.regrets(directory / "regret.png", regrets(of["bandits"], flags_of))
