"""Makes experiments/RESULTS.md, its figures and the tables of README.md and GUIDE.md from experiments/results/*.json.

With --add it first takes in the results of finished runs, each under a name of its own.
"""

import dataclasses
import math
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments import (
    bandits,
    cli,
    cross_domain,
    domains,
    faces,
    figures,
    hyperparameters,
    images,
    mazes,
    mdps,
    navigation,
    omniglot,
    published,
    rl_report,
    runs,
    sinusoid,
    translation,
    translation_report,
)
from maml_jax import CATALOGUE

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "GUIDE.md")
"""The pages with tables of the report between markers."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to take in."""

    add: tuple[Path, ...] = ()
    """Run directories whose results.json is copied to experiments/results."""


def add(run_dir: Path, results_dir: Path) -> Path:
    """Copies the results of a finished run to `results_dir`, named after what distinguishes it.

    The picture of what a policy does is copied too, if the report has a place for it and the settings are the default.

    Raises:
      FileNotFoundError: if the run has no results.json.
      RunError: if the directory holds no run, or several seeds.
      ValueError: if other results have that name.
    """
    if not (run_dir / "results.json").exists():
        runs.check_is_run(run_dir)
        raise FileNotFoundError(f"{run_dir} has no results.json; finish it, by the command that began it")
    results = runs.finite(runs.read_json(run_dir / "results.json"))
    if results["experiment"] == "cross_domain":
        flags = []
        ways = "-".join(map(str, results["config"]["ways"]))
        name = f"cross_domain_ways-{ways}_seed-{results['seed']}"
    else:
        flags = [flag.lstrip("-").replace(" ", "-").replace("/", "-") for flag in flags_but_seed(results)]
        name = "_".join([results["experiment"], results["algorithm"], *flags, f"seed-{results['seed']}"])
    file = results_dir / f"{name}.json"
    if file.exists() and runs.read_json(file) != results:
        raise ValueError(f"{file} holds other results of the same command; delete it to replace them")
    runs.write_json(file, results)
    picture = run_dir / "figures" / "behaviour.png"
    picture_name = rl_report.BEHAVIOUR.get((results["experiment"], results["algorithm"]))
    if picture_name and picture.exists() and results["seed"] == 0 and not flags:
        shutil.copy(picture, results_dir.parent / "figures" / picture_name)
    return file


EXPERIMENTS = {
    "sinusoid": sinusoid,
    "omniglot": omniglot,
    "images": images,
    "domains": domains,
    "hyperparameters": hyperparameters,
    "navigation": navigation,
    "bandits": bandits,
    "mdps": mdps,
    "mazes": mazes,
    "faces": faces,
    "translation": translation,
}
FROM_DATA = ("num_classes",)
"""Settings that a run takes from its data if no flag gives them."""


def changed_flags(results: dict) -> list[str]:
    """The flags of the command that made `results`, those at their defaults left out."""
    module, config = EXPERIMENTS[results["experiment"]], results["config"]
    method = module.METHODS[results["algorithm"]]
    base = {name: config[name] for name in ("way", "shot") if name in config}
    defaults = runs.as_json(module.with_paper_defaults(dataclasses.replace(method, **base)))
    plain = runs.as_json(method)
    flags = []
    for name, value in config.items():
        reference = plain[name] if name in base else defaults.get(name)
        if name in FROM_DATA and reference is None:
            continue
        if name in defaults and name != "algorithm" and name not in runs.IRRELEVANT and value != reference:
            flag = cli.flag(name)
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            flags.append(f"--no-{flag[2:]}" if value is False else flag if value is True else f"{flag} {words}")
    return flags


def flags_but_seed(results: dict) -> list[str]:
    """`changed_flags` without the seed."""
    return [flag for flag in changed_flags(results) if not flag.startswith("--seed")]


def command(results: dict) -> str:
    """The command line that made `results`, without its seed."""
    return " ".join([f"python -m experiments.{results['experiment']} {results['algorithm']}", *flags_but_seed(results)])


def by_command(results: list[dict]) -> dict[str, list[dict]]:
    """Results grouped by the command that made them, seeds together."""
    groups = defaultdict(list)
    for result in results:
        groups[command(result)].append(result)
    return dict(sorted(groups.items(), key=lambda item: _order(item[1][0])))


def _order(result: dict) -> tuple:
    names, config = list(EXPERIMENTS[result["experiment"]].METHODS), result["config"]
    where = config.get("way", 0), config.get("data", ""), str(config.get("held_out", "")), config.get("shot", 0)
    where += (config.get("network") == "mlp",)  # the networks without convolutions last
    return names.index(result["algorithm"]), *where, str(config.get("inner_lr"))


def at(values: list[float | None], step: int) -> float | None:
    """The value after some number of inner steps; None if the curve is shorter."""
    return values[step] if step < len(values) else None


def over_seeds(values: list[float | None]) -> str:
    """The mean over seeds and, from two on, the smallest and largest; or the number of seeds without a finite value."""
    if bad := sum(value is None for value in values):
        return f"not finite in {bad} of {len(values)}"
    numbers = [
        f"{value:.2f}" if value < 1000 else f"{value:.0e}" for value in (statistics.fmean(values), *sorted(values))
    ]
    return numbers[0] if len(values) == 1 else f"{numbers[0]} ({numbers[1]}–{numbers[-1]})"


def sinusoid_table(results: list[dict], shot: int) -> str:
    """Errors after 1, 5 and 10 steps: mean over seeds, range over seeds, median, share of diverged tasks."""
    rows = []
    for group in by_command(results).values():
        config, algorithm = group[0]["config"], group[0]["algorithm"]
        chosen = [e for result in group for e in result["evaluations"] if e["shot"] == shot]
        if not chosen:
            continue
        flags = [
            f"`{flag}`" for flag in flags_but_seed(group[0]) if not flag.startswith(("--inner-lr", "--eval-shots"))
        ]
        mse = [evaluation["metrics"]["mse"] for evaluation in chosen]
        rates = sorted({evaluation["inner_lr"] for evaluation in chosen})
        paper = published.SINUSOID.get((algorithm, config["inner_lr"])) if shot == 5 and not flags else None
        rows.append(
            [
                ", ".join([figures.title(algorithm), *flags]),
                " or ".join(f"{rate:g}" for rate in rates),
                *(over_seeds([at(m["mean"], step) for m in mse]) for step in (1, 5, 10)),
                " / ".join(f"{number:.2f}" for number in paper) if paper else "",
                _mean_at_10(mse, "median", ".2f"),
                _mean_at_10(mse, "diverged", ".2%"),
                str(len(group)),
            ]
        )
    header = ["", "rate", "1 step", "5 steps", "10 steps", "published", "median, 10 steps", "diverged", "seeds"]
    return runs.markdown_table(header, rows)


def _mean_at_10(curves: list[dict], name: str, style: str) -> str:
    values = [at(curve[name], 10) for curve in curves]
    return "" if None in values else format(statistics.fmean(values), style)


def training_time(result: dict, minutes: float) -> str:
    """Minutes as a cell, with the device if it is no CPU."""
    return f"{minutes:.0f} min" + ("" if on_cpu(result) else f", {result['device']}")


def on_cpu(result: dict) -> bool:
    """Whether a run was made on a CPU, by what `runs.device_name` says."""
    return result.get("device", "").endswith("cores")


def costs(result: dict) -> tuple[float | None, float | None]:
    """Operations a task in GFLOP and temporaries of the training program in MB; None for what was not counted."""
    execution = result.get("execution", {})
    flops, memory = execution.get("flops"), execution.get("temporary_bytes")
    return flops and flops / result["config"]["meta_batch_size"] / 1e9, memory and memory / 1e6


def cost_cells(result: dict, results: list[dict]) -> list[str]:
    """`costs` with three digits, and in brackets the ratio to those of FOMAML in the same task, network and chunks."""

    def circumstances(of: dict) -> list:
        config, execution = of["config"], of.get("execution", {})
        return [*(config[name] for name in ("way", "shot", "network")), execution.get("chunk_size"), of.get("device")]

    here = circumstances(result)
    references = [costs(other) for other in results if other["algorithm"] == "fomaml" and circumstances(other) == here]
    cells = []
    for index, cost in enumerate(costs(result)):
        reference = next((found[index] for found in references if found[index]), None)
        ratio = f" ({cost / reference:.1f} x)" if cost and reference else ""
        cells.append(f"{cost:.3g}{ratio}" if cost else "")
    return cells


def omniglot_table(results: list[dict], *, with_costs: bool = False) -> str:
    """Accuracy after the steps of the test protocol, one row a command; flags that are not the paper's are named."""
    rows = []
    for group in by_command(results).values():
        config, algorithm = group[0]["config"], group[0]["algorithm"]
        accuracy = [result["metrics"]["accuracy"] for result in group]
        steps = len(accuracy[0]["mean"]) - 1
        cells = [runs.format_mean(a["mean"][-1], a["ci95"][-1], scale=100) for a in accuracy]
        paper = published.OMNIGLOT.get((algorithm, config["network"], config["way"], config["shot"]))
        if paper is None or not as_published(group[0]):
            paper = ""
        minutes = statistics.fmean(result["seconds"]["train"] for result in group) / 60
        rows.append(
            [
                ", ".join([figures.title(algorithm), *(f"`{flag}`" for flag in variation(group[0]))]),
                f"{config['way']}-way {config['shot']}-shot",
                ", ".join(cells),
                paper,
                str(steps),
                f"{group[0]['protocol']['episodes']} x {group[0]['protocol']['query_shot']}",
                f"{group[0]['meta_steps']:,}",
                training_time(group[0], minutes),
            ]
        )
        if with_costs:
            milliseconds = 1000 * group[0]["seconds"]["train"] / group[0]["meta_steps"]
            rows[-1] += [f"{milliseconds:.0f}", *cost_cells(group[0], results)]
    header = ["", "task", "accuracy, %", "published", "test steps", "episodes x queries", "meta-steps", "training"]
    header += ["ms each", "GFLOP a task", "MB"] if with_costs else []
    return runs.markdown_table(header, rows)


def equal_budget(results: list[dict]) -> list[dict]:
    """The results of the papers' recipes in 5-way 1-shot with the most frequent smaller number of meta-steps."""
    task = {"way": 5, "shot": 1, "network": "conv4"}
    shown = [result for result in results if has_smaller_budget(result) and task.items() <= result["config"].items()]
    steps = statistics.mode(result["meta_steps"] for result in shown) if shown else 0
    return [result for result in shown if result["meta_steps"] == steps]


def relative_costs() -> dict[str, dict]:
    """The cost of a task relative to FOMAML by method, as `benchmarks.methods` measured it last."""
    file = HERE.parent / "benchmarks" / "results" / "methods.json"
    return {row["method"]: row for row in runs.read_json(file)["rows"]} if file.exists() else {}


def budget_table(results: list[dict]) -> str:
    """Accuracy after an equal number of meta-steps, with what a task costs relative to FOMAML."""
    rows, of_method = [], relative_costs()
    for group in by_command(results).values():
        config, algorithm = group[0]["config"], group[0]["algorithm"]
        accuracy = [result["metrics"]["accuracy"] for result in group]
        cost = of_method.get(algorithm)
        ratios = cost and (
            cost["times_fomaml"]["median"], cost["flops_times_fomaml"], cost["temporary_bytes_times_fomaml"]
        )  # fmt: skip
        rows.append(
            [
                figures.title(algorithm),
                ", ".join(runs.format_mean(a["mean"][-1], a["ci95"][-1], scale=100) for a in accuracy),
                f"{rate:g}" if (rate := config.get("inner_lr")) else "",
                str(len(accuracy[0]["mean"]) - 1),
                f"{group[0]['meta_steps']:,}",
                str(config["meta_batch_size"]),
                *(f"{ratio:.1f}" for ratio in ratios or ()),
                *[""] * (0 if ratios else 3),
            ]
        )
    header = ["", "accuracy, %", "inner rate", "test steps", "meta-steps", "tasks each"]
    return runs.markdown_table([*header, "time of a task, x FOMAML", "operations, x", "memory, x"], rows)


def evaluations(result: dict) -> list[dict]:
    """The settings in which a training on Omniglot was tested: way, shot, metrics, and a head if there are several."""
    own = {name: result["protocol"][name] for name in ("way", "shot")} | {"metrics": result["metrics"]}
    return result.get("evaluations", [own])


def all_methods(results: list[dict]) -> list[dict]:
    """Every training on Omniglot with its accuracies by way and shot, the same recipes and seeds together.

    Returns:
      Records with "name", "first" (one of the results), "accuracy" (by (way, shot), means and intervals by seed),
      "published" (by (way, shot)) and "minutes".
    """
    groups = defaultdict(list)
    for result in results:
        is_episodic = CATALOGUE[result["algorithm"]].any_way and result["algorithm"] != "pretrained-classifier"
        trained = f"{result['config']['train_shot']}-shot" if is_episodic else ""
        for evaluation in evaluations(result):
            flags = tuple(variation(result))
            key = result["algorithm"], evaluation.get("head", ""), trained, flags, result["meta_steps"]
            groups[key].append((result, evaluation))
    records = []
    for (algorithm, head, trained, flags, _), group in groups.items():
        first, accuracy, paper = group[0][0], defaultdict(list), {}
        for result, evaluation in group:
            setting = evaluation["way"], evaluation["shot"]
            mean, ci95 = (evaluation["metrics"]["accuracy"][name][-1] for name in ("mean", "ci95"))
            accuracy[setting].append((mean, ci95))
            of_head = algorithm if head in ("", "neighbour") else f"{algorithm}, {head}"
            number = published.OMNIGLOT.get((of_head, result["config"]["network"], *setting))
            if number and not departures(result):
                paper[setting] = number
        minutes = statistics.fmean(result["seconds"]["train"] for result, _ in group) / 60
        parts = [head, f"trained {trained}" if trained else "", *(f"`{flag}`" for flag in flags)]
        name = ", ".join([figures.title(algorithm), *filter(None, parts)])
        records.append({"name": name, "first": first, "accuracy": accuracy, "published": paper, "minutes": minutes})
    names = list(omniglot.METHODS)
    return sorted(records, key=lambda r: (names.index(r["first"]["algorithm"]), r["name"], r["first"]["meta_steps"]))


def all_methods_table(results: list[dict]) -> str:
    """One row a training and head: accuracy in every setting with its interval, beside the published numbers."""
    rows = []
    for record in all_methods(results):
        first, accuracy = record["first"], record["accuracy"]
        cells = [
            ", ".join(runs.format_mean(mean, ci95, scale=100, digits=1) for mean, ci95 in accuracy.get(setting, []))
            for setting in omniglot.SETTINGS
        ]
        papers = [record["published"].get(setting, "").partition(" ")[0] or "-" for setting in omniglot.SETTINGS]
        protocol = first["protocol"]
        rows.append(
            [
                record["name"],
                *cells,
                " / ".join(papers) if record["published"] else "",
                protocol.get("split_by", "character"),
                "transductive" if protocol["normalisation"] == "transductive" else "inductive",
                f"{first['meta_steps']:,} of {omniglot.METHODS[first['algorithm']].num_meta_steps:,}",
                f"{1000 * first['seconds']['train'] / first['meta_steps']:.0f}",
                f"{flops / 1e9:.1f}" if (flops := first.get("execution", {}).get("flops")) else "",
                training_time(first, record["minutes"]),
            ]
        )
    settings = [f"{way}-way {shot}-shot" for way, shot in omniglot.SETTINGS]
    header = ["", *settings, "published", "split by", "test", "meta-steps", "ms each", "GFLOP each", "training"]
    return runs.markdown_table(header, rows)


def images_table(results: list[dict]) -> str:
    """Accuracy on photographs with 1 and 5 examples of a class, one row a method, its head and its flags."""
    groups, rows = defaultdict(list), []
    for result in sorted(results, key=_order):
        # How often a run is validated and logged is left to the list of commands; the others have columns.
        hidden = ("--size", "--eval-episodes", "--val-every", "--log-every")
        flags = tuple(flag for flag in variation(result) if not flag.startswith(hidden))
        in_columns = result["config"]["size"], result["protocol"]["episodes"]
        groups[result["algorithm"], flags, result["meta_steps"], *in_columns].append(result)
    for (algorithm, flags, meta_steps, *_), group in groups.items():
        first = group[0]
        by_head = defaultdict(lambda: defaultdict(list))
        for result in group:
            for evaluation in evaluations(result):
                accuracy = evaluation["metrics"]["accuracy"]
                cell = runs.format_mean(accuracy["mean"][-1], accuracy["ci95"][-1], scale=100)
                by_head[evaluation.get("head", "")][evaluation["shot"]].append(cell)
        for head, cells in by_head.items():
            of_head = algorithm if head in ("", "neighbour") else f"{algorithm}, {head}"
            paper = published.IMAGES.get(of_head)
            variations = (f"`{flag}`" for flag in flags)
            rows.append(
                [
                    ", ".join([figures.title(algorithm), *filter(None, [head]), *variations]),
                    *(", ".join(cells.get(shot, [])) for shot in (1, 5)),
                    " / ".join(paper) if paper else "",
                    f"{first['config']['size']}",
                    f"{first['protocol']['episodes']}",
                    first["protocol"]["normalisation"].partition(" of ")[0],
                    f"{meta_steps:,} of {images.METHODS[algorithm].num_meta_steps:,}",
                    training_time(first, statistics.fmean(result["seconds"]["train"] for result in group) / 60),
                ]
            )
    header = ["", "1-shot", "5-shot", "miniImageNet", "pixels", "episodes", "test", "meta-steps", "training"]
    return runs.markdown_table(header, rows)


def cross_domain_section(result: dict) -> str:
    """What learners reach on data sets that they were not trained on, one row each."""
    names, config = list(result["data_sets"]), result["config"]
    rows = []
    for record in sorted(result["methods"], key=lambda record: record.get("average_rank") or math.inf):
        numbers = [cross_domain.cell_text(record["data_sets"][name]) for name in names]
        rank = record.get("average_rank")
        rows.append([record["label"], record["training"], *numbers, "" if rank is None else f"{rank:.2f}"])
    chance = [f"{100 * result['data_sets'][name]['chance']:.1f}" for name in names]
    table = runs.markdown_table(["", "trained on", *names, "average rank"], [*rows, ["chance", "", *chance, ""]])
    return (
        f"Episodes of {', '.join(map(str, config['ways']))} classes, {config['episodes']} of each data set; "
        f"{result['protocol']['shot']}. Made by `python -m experiments.cross_domain {' '.join(config['learners'])} "
        f"--ways {' '.join(map(str, config['ways']))} --heads {' '.join(config['heads'])} --episodes "
        f"{config['episodes']}`.\n\n{table}"
    )


def instance_table(results: list[dict]) -> str:
    """Accuracy of the learners of sequences on the n-th image of a class."""
    shown = (1, 2, 3, 4, 5, 10)
    rows = []
    for result in results:
        found = result["instances"]
        cells = [runs.format_mean(found["mean"][n - 1], found["ci95"][n - 1], scale=100, digits=1) for n in shown]
        paper = " / ".join(map(str, published.INSTANCES[result["algorithm"]]))
        rows.append([figures.title(result["algorithm"]), *cells, paper, f"{result['meta_steps']:,}"])
    return runs.markdown_table(["", *map(str, shown), "published", "meta-steps"], rows)


def domain_table(results: list[dict]) -> str:
    """Accuracy on the held-out domain, and in brackets that on validation examples of the source domains."""

    def cell(group: list[dict]) -> str:
        held_out, source = (
            over_seeds([100 * result[part]["accuracy"]["mean"][-1] for result in group])
            for part in ("metrics", "source_validation")
        )
        return f"{held_out} [{source}]"

    groups = defaultdict(lambda: defaultdict(list))
    in_columns = ("--data", "--held-out", "--num-meta-steps", "--seed")
    for result in results:
        config = result["config"]
        flags = [f"`{flag}`" for flag in changed_flags(result) if not flag.startswith(in_columns)]
        data = ", ".join([config["data"], *flags])
        groups[data, config["held_out"], result["meta_steps"]][result["algorithm"]].append(result)
    names = sorted({result["algorithm"] for result in results}, key=list(domains.METHODS).index)
    rows = []
    for (data, held_out, steps), by in sorted(groups.items()):
        cells = (cell(by[name]) if name in by else "" for name in names)
        rows.append([data, held_out, *cells, _paired(by), f"{steps:,}", _seeds(by)])
    header = ["data", "held out", *map(figures.title, names), "MLDG more than ERM", "meta-steps", "seeds"]
    return runs.markdown_table(header, rows)


def _paired(by_algorithm: dict[str, list[dict]]) -> str:
    """The difference of MLDG and ERM on the held-out domain with its 95 % interval, paired by seed."""
    mldg, erm = (
        {result["seed"]: 100 * result["metrics"]["accuracy"]["mean"][-1] for result in by_algorithm.get(name, [])}
        for name in ("mldg", "erm")
    )
    differences = [[mldg[seed] - erm[seed]] for seed in mldg if seed in erm]
    if len(differences) < 2:
        return ""
    found = runs.mean_and_interval(differences)
    return runs.format_mean(found["mean"][0], found["ci95"][0])


def hyperparameter_table(results: list[dict]) -> str:
    """The loss of every way to choose hyperparameters, the best on the test digits first."""
    rows = []
    for result in results:
        methods = result["methods"]
        for name in sorted(methods, key=lambda name: methods[name]["test_loss"]["mean"] or float("inf")):
            method = methods[name]
            losses = (runs.format_mean(**method[metric], digits=4) for metric in ("heldout_loss", "test_loss"))
            accuracy = runs.format_mean(**method["test_accuracy"], scale=100)
            rows.append([name, *losses, accuracy, str(method["runs"]), f"{method['seconds']:.0f}"])
    return runs.markdown_table(
        ["", "held-out loss", "test loss", "test accuracy, %", "training runs", "seconds to choose"], rows
    )


def _seeds(by_algorithm: dict[str, list[dict]]) -> str:
    counts = sorted({len(group) for group in by_algorithm.values()})
    return " or ".join(map(str, counts))


def variation(results: dict) -> list[str]:
    """The flags of the command that are neither in a column of the table nor the seed."""
    in_columns = ("--way", "--shot", "--num-meta-steps", "--seed")
    return [flag for flag in changed_flags(results) if not flag.startswith(in_columns)]


def departures(results: dict) -> list[str]:
    """`variation` without the network of a published row, such as that of the "no conv" rows of MAML."""
    config = results["config"]
    row = results["algorithm"], config["network"], config["way"], config["shot"]
    of_paper = [f"--network {config['network']}"] if row in published.OMNIGLOT else []
    return [flag for flag in variation(results) if flag not in of_paper]


def as_published(results: dict) -> bool:
    """Whether a run had the paper's settings and its number of meta-steps."""
    return not departures(results) and results["meta_steps"] == omniglot.METHODS[results["algorithm"]].num_meta_steps


def has_smaller_budget(results: dict) -> bool:
    """Whether a run had the paper's settings and fewer meta-steps."""
    return not departures(results) and not as_published(results)


def details(results: list[dict]) -> str:
    """For every command: seeds, device, versions and the whole curve."""
    parts = []
    for line, group in by_command(results).items():
        first = group[0]
        name = next(iter(first["metrics"]))
        versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
        parts.append(
            f"`{line}`\n\n- seeds {', '.join(str(result['seed']) for result in group)}; {first['device']}; {versions}\n"
            f"- seconds of the first: {', '.join(f'{k} {v:.0f}' for k, v in first['seconds'].items())}\n"
            f"- protocol: {', '.join(f'{k} {v}' for k, v in first['protocol'].items())}\n"
            f"- {name}, after 0, 1, ... inner steps if there are several, first seed: "
            + ", ".join(runs.format_mean(mean, digits=4) for mean in first["metrics"][name]["mean"])
        )
    return "\n\n".join(parts)


def seed_curves(results: list[dict]) -> dict[str, list[list[dict]]]:
    """The learning curves of every command on sinusoids that has several seeds with one, by the name of the method."""
    logs = {}
    for group in by_command([result for result in results if result["experiment"] == "sinusoid"]).values():
        curves = [result["curve"] for result in group if result.get("curve")]
        if len(curves) > 1:
            first = group[0]
            logs[f"{figures.title(first['algorithm'])}, rate {first['config']['inner_lr']:g}"] = curves
    return logs


def write(results_dir: Path, report: Path, pages: Sequence[Path] = ()) -> None:
    """Writes the report and its figures, and the tables between the markers of other pages."""
    results = [runs.read_json(file) for file in sorted(results_dir.glob("*.json"))]
    of = defaultdict(list)
    for result in results:
        of[result["experiment"]].append(result)
    curves_of_seeds = seed_curves(results)
    trained = [result for result in of["omniglot"] if result["meta_steps"]]
    gradient_based = [result for result in trained if not CATALOGUE[result["algorithm"]].classifies]
    full = [result for result in gradient_based if as_published(result)]
    sections = {
        "sinusoid-5": sinusoid_table(of["sinusoid"], 5),
        "sinusoid-10": sinusoid_table(of["sinusoid"], 10),
        "omniglot": omniglot_table(full),
        "omniglot-budget": budget_table(equal_budget(gradient_based)),
        "omniglot-variations": omniglot_table([result for result in gradient_based if departures(result)]),
        "omniglot-instances": instance_table([result for result in of["omniglot"] if "instances" in result]),
        "omniglot-all": all_methods_table(trained),
        "images": images_table(of["images"]),
        "domains": domain_table(of["domains"]),
        "hyperparameters": hyperparameter_table(of["hyperparameters"]),
    }
    photographs = other_kinds = verification = ""
    if of["images"]:
        photographs = (
            "\n\n## Photographs\n\n5-way accuracy in %, with its 95 % interval over the test episodes, on 100 classes "
            "of ImageNet (64 for training, 16 for validation, 20 for the test) at 64x64 pixels. They are not "
            "miniImageNet, so only the order of the methods is comparable with its published numbers, which are those "
            "of full trainings. A method with one last layer is trained for each shot. LEO learns on the features of "
            "the pretrained classifier, whose minutes are not in its own. Inductive and transductive tests do not "
            "compare; of the former, LEO and centroids of the same features are within their intervals.\n\n"
            f"{sections['images']}"
        )
    if of["cross_domain"]:
        other_kinds = (
            "\n\n## Data sets of other kinds\n\nAccuracy in %, with its 95 % interval over the episodes, on data sets "
            "that are new to the learners. They were trained on Omniglot, whose test has new characters. Episodes are "
            "unbalanced: Meta-Dataset's protocol in small. Learners that the paired interval cannot tell apart share a "
            "rank.\n\n"
            + "\n\n".join(map(cross_domain_section, of["cross_domain"]))
            + "\n\n![accuracy on data sets of other kinds](figures/cross_domain.png)"
        )
    if of["faces"]:
        verification = (
            "\n\n## Verification in unseen domains\n\nTrue accept rate in % at a false accept rate of 1 %, mean over "
            "seeds with its 95 % interval, on identities and domains that were never seen. Differences are paired by "
            "seed. All methods are selected on other identities of the source domains. Nothing that is published can "
            f"be compared.\n\n{faces.section(of['faces'], flags_but_seed)}\n\n![ROC](figures/faces.png)"
        )
    report.write_text(
        "# Results\n\nMade by `python -m experiments.report` from `experiments/results/*.json`.\n\n"
        "## Sinusoids\n\nMean squared error, mean over seeds with the smallest and largest seed in parentheses. The "
        "rate is that of the gradient steps at test; a task has diverged when its error is above "
        f"{sinusoid.DIVERGED:g}, and then the mean says little and the median more. The figure has the mean over seeds "
        "of the median over tasks. A method with one seed has no range, so small differences to it mean nothing. iMAML "
        "is not here, because conjugate gradients need a curvature that is not far below zero; MAML++ neither, because "
        "an outer rate of 0.001 is as large as the inner rates that it would learn.\n\n"
        f"### 5 support points\n\n{sections['sinusoid-5']}\n\n### 10 support points\n\n{sections['sinusoid-10']}\n\n"
        "![error against inner steps](figures/sinusoid.png)\n\n"
        + ("![learning curves with intervals over seeds](figures/learning_curves.png)\n\n" if curves_of_seeds else "")
        + "## Omniglot\n\nAccuracy over the test episodes with its 95 % interval, one number a seed. The characters "
        "are divided at random into those of training, validation and test. Normalisation is "
        "transductive: the queries of an episode are normalised together. GFLOP a task are the counted operations of a "
        "meta-step divided by its tasks; MB are the temporary memory of the compiled training program of one device, "
        "which grows with the tasks that are computed together. The ratio to FOMAML is in parentheses. On the GPU four "
        f"trainings ran at once, so its times are upper bounds.\n\n{omniglot_table(full, with_costs=True)}\n\n"
        "Reptile, MAML++, iMAML and Meta-Curvature were not trained with the meta-steps of their papers, nor was any "
        "method in 20-way.\n\n"
        "### Equal meta-steps\n\n5-way 1-shot, the same recipes with fewer meta-steps. Each method has the rates, the "
        "schedule and the meta-batch of its paper, so equal numbers of meta-steps are not equal numbers of tasks, and "
        "part of a difference may be the rate. Costs are those of one task, measured in turns by "
        "`python -m benchmarks.methods`.\n\n"
        f"{sections['omniglot-budget']}\n\n![accuracy against inner steps and time](figures/omniglot.png)\n\n"
        "### Variations\n\nShort runs that differ in one setting. The default does not adapt the offsets of the "
        f"normalisation in the inner loop, as the authors' code does not.\n\n{sections['omniglot-variations']}\n\n"
        "### All methods\n\nAccuracy in %, with its 95 % interval over the test episodes. Methods whose parameters do "
        "not depend on the number of classes are tested in all settings after one training. Numbers of different "
        "splits are not comparable: by alphabet, the test has new alphabets. An inductive test classifies every query "
        "on its own; in a transductive one the queries are normalised together. The published numbers are those of "
        "full trainings; that of MAML++ is the ensemble of its five best states, ours is one state. Times are of two "
        "cores that often did other work too, unless a GPU is named, so compare "
        "operations where they were counted; the figure has the runs on a CPU. Where a number is below the published "
        "one, the column of meta-steps says how much of the training was done; the neural statistician is far smaller "
        "than the published network, and trained without dilated images. LEO learns on the features of a pretrained "
        "classifier, whose training comes before its own and is not in its minutes; centroids of the same features do "
        "better. The test of the memory module does not turn its characters, as in the authors' code, and the other "
        "tests by alphabet do. " + published.OMNIGLOT_SOURCES + "\n\n"
        f"{sections['omniglot-all']}\n\n![accuracy against minutes of training](figures/omniglot_all.png)\n\n"
        "### Sequences\n\nAccuracy in % on the 1st, 2nd, ... image of a class in a sequence of 50 images of 5 classes. "
        "The label of an image is shown with the next one, so the first image of a class can only be guessed. The "
        f"published 1-shot and 5-shot numbers of MANN are the second and the fifth.\n\n{sections['omniglot-instances']}"
        + photographs
        + other_kinds
        + rl_report.section(of, flags_but_seed)
        + verification
        + translation_report.section(of["translation"], flags_but_seed)
        + "\n\n## Unseen domains\n\nAccuracy in % on a domain that was never seen, mean over seeds with the smallest "
        "and largest seed in parentheses, and the same on validation examples of the source domains in brackets. Both "
        "methods are selected by the latter. No model adapts, and no batch statistics are used. The difference has its "
        "95 % interval over seeds. Of the rotations, two angles were held out.\n\n"
        f"{sections['domains']}\n\n"
        "## Hyperparameters of a whole training run\n\nMade by `python -m experiments.hyperparameters`. A network is "
        "trained on digits for hundreds of mini-batches. Every method may use the same number of training runs; "
        "hyperparameters are chosen by the held-out loss, and the test digits were never chosen with. A run with its "
        "hypergradient takes several times the operations of one without, and compiled programs of single runs are far "
        "faster, so equal runs are not equal cost. One seed; the intervals are over training runs.\n\n"
        f"{sections['hyperparameters']}\n\n![the learned schedules](figures/hyperparameters.png)\n\n"
        "![memory of a hypergradient](figures/hyperparameters_memory.png)\n\n"
        f"## How each was made\n\n{details([result for name in EXPERIMENTS for result in of[name]])}\n"
    )
    if of["sinusoid"]:
        curves = {}
        for group in by_command(of["sinusoid"]).values():
            name, rate = group[0]["algorithm"], group[0]["config"]["inner_lr"]
            label = name if name not in curves else f"{figures.title(name)}, rate {rate:g}"
            curves[label] = [evaluation for result in group for evaluation in result["evaluations"]]
        figures.inner_curves(report.parent / "figures" / "sinusoid.png", curves)
    rl_report.draw(report.parent / "figures", of, flags_but_seed)
    if characters := [result for result in of["faces"] if result["config"]["data"] == "characters"]:
        figures.roc(
            report.parent / "figures" / "faces.png", faces.curves_of(faces.labelled(characters, flags_but_seed))
        )
    if of["translation"]:
        translation_report.draw(report.parent / "figures" / "translation.png", of["translation"], flags_but_seed)
    for result in of["cross_domain"]:
        cross_domain.draw(report.parent / "figures" / "cross_domain.png", result)
    if curves_of_seeds:
        figures.learning_curves(report.parent / "figures" / "learning_curves.png", curves_of_seeds)
    for result in of["hyperparameters"]:
        figures.schedules(report.parent / "figures" / "hyperparameters.png", result["methods"])
        figures.memory(report.parent / "figures" / "hyperparameters_memory.png", result["memory"])
    if records := all_methods(list(filter(on_cpu, trained))):
        figures.accuracy_against_time(report.parent / "figures" / "omniglot_all.png", records)
    if shown := {result["algorithm"]: result for result in equal_budget(gradient_based) if not result["seed"]}:
        of_method = relative_costs()
        work = {
            name: result["meta_steps"] * result["config"]["meta_batch_size"] * of_method[name]["times_fomaml"]["median"]
            for name, result in shown.items()
            if name in of_method
        }
        figures.accuracy(report.parent / "figures" / "omniglot.png", shown, work)
    for page in pages:
        text = page.read_text()
        for name, table in sections.items():
            marker = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            text = marker.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
        page.write_text(text)


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, prog="python -m experiments.report", description=__doc__)
    with cli.mistakes_in_one_paragraph():
        for run_dir in config.add:
            print(add(run_dir, HERE / "results"))
        write(HERE / "results", HERE / "RESULTS.md", PAGES)


if __name__ == "__main__":
    main()
