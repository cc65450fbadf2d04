"""Makes RESULTS.md, PROVENANCE.md, figures, and the tables of README.md and GUIDE.md from experiments/results/*.json.

With --add it first takes in the results of finished runs, each under a name of its own.
"""

import dataclasses
import re
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments import (
    cli,
    domains,
    faces,
    faces_report,
    few_shot_report,
    figures,
    hyperparameters,
    intervals,
    published,
    rl_report,
    runs,
    sinusoid,
    translation_report,
)
from experiments.commands import EXPERIMENTS, by_command, changed_flags, command, flags_but_seed
from maml_jax import CATALOGUE

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "GUIDE.md")
"""The pages with tables of the report between markers."""
ORDERS = """MAML and FOMAML, trained by the same recipe: with five seeds on sinusoids, three on Omniglot for 1,000
meta-steps, and one for 60,000. Lines are means. Bands go from the smallest to the largest seed.

- On sinusoids the second derivative lowers the median error at every inner step. The bands are disjoint after one and
  two steps, and overlap from the third on.
- On Omniglot it does not help after 1,000 meta-steps. After 60,000 it is 0.6 points ahead, with one seed each, and
  the two intervals over test episodes overlap.

The [guide](GUIDE.md#first-or-second-order) compares them with one, five and ten inner steps in training. The cosine of
the two meta-gradients, seconds and bytes are in
[benchmarks/README.md](../benchmarks/README.md#first-and-second-order)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to take in."""

    add: Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Run directories whose results.json is copied to experiments/results."""


def add(run_dir: Path, results_dir: Path) -> Path:
    """Copies the results of a finished run to `results_dir`, named after what distinguishes it.

    The picture of what a policy does is copied too, if the report has a place for it and the settings are the default.

    Raises:
      FileNotFoundError: if the run has no results.json.
      RunError: if the directory holds no run, or several seeds.
      ValueError: if other results have that name, or the tables have no place for these.
    """
    if (results := runs.finite(runs.read_results(run_dir))) is None:
        runs.check_is_run(run_dir)
        raise FileNotFoundError(f"{run_dir} has no results.json; finish it, by the command that began it")
    config = results["config"]
    others = ("tfds", "split_file", "data_dir")
    if results["experiment"] == "images" and (config["way"] != 5 or any(config[name] for name in others)):
        raise ValueError(
            f"{run_dir} was trained on other tasks than those of the table of photographs, which are 5-way and on "
            "the data that $MAML_JAX_IMAGES names; experiments.compare shows runs side by side"
        )
    if results["experiment"] == "cross_domain":
        flags = []
        name = few_shot_report.cross_domain_name(results) + ("" if results["seed"] else "_seed-0")
    else:
        flags = [flag.lstrip("-").replace(" ", "-").replace("/", "-") for flag in flags_but_seed(results)]
        name = "_".join([results["experiment"], results["algorithm"], *flags, f"seed-{results['seed']}"])
    file = results_dir / f"{name}.json"
    if file.exists() and runs.read_json(file) != results:
        raise ValueError(f"{file} holds other results of that name; delete it to replace them")
    runs.write_json(file, results)
    picture = run_dir / "figures" / "behaviour.png"
    picture_name = rl_report.BEHAVIOUR.get((results["experiment"], results.get("algorithm")))
    if picture_name and picture.exists() and results["seed"] == 0 and not flags:
        kept = results_dir.parent / "figures" / picture_name
        for suffix in (".png", ".pdf"):
            shutil.copy(picture.with_suffix(suffix), kept.with_suffix(suffix))
    return file


def sinusoid_table(results: list[dict], shot: int) -> str:
    """Errors after 1, 5 and 10 steps: mean over seeds, range over seeds, median, share of diverged tasks."""
    rows, of_method = [], few_shot_report.relative_costs("methods_sinusoid")
    for group in by_command(results).values():
        config, algorithm = group[0]["config"], group[0]["algorithm"]
        chosen = [e for result in group for e in result["evaluations"] if e["shot"] == shot]
        if not chosen:
            continue
        flags = [f"`{flag}`" for flag in _further_flags(group[0])]
        mse = [evaluation["metrics"]["mse"] for evaluation in chosen]
        rates = sorted({evaluation["inner_lr"] for evaluation in chosen})
        paper = published.SINUSOID.get((algorithm, config["inner_lr"])) if shot == 5 and not flags else None
        rows.append(
            [
                ", ".join([figures.title(algorithm), *flags]),
                " or ".join(f"{rate:g}" for rate in rates),
                *(_after(step, [m["mean"] for m in mse]) for step in (1, 5, 10)),
                " / ".join(f"{number:.2f}" for number in paper) if paper else "",
                _mean_at_10(mse, "median", ".2f"),
                _mean_at_10(mse, "diverged", ".2%"),
                str(len(group)),
                *few_shot_report.relative_cells(of_method.get(algorithm)),
            ]
        )
    header = ["", "rate", "1 step", "5 steps", "10 steps", "published", "median, 10 steps", "diverged", "seeds"]
    return intervals.markdown_table([*header, *few_shot_report.RELATIVE_COSTS], rows)


def _further_flags(result: dict) -> list[str]:
    """The changed flags of a result on sinusoids, without those that are columns of the table."""
    in_columns = ("--inner-lr ", "--inner-lr-grid ", "--eval-shots ")
    return [flag for flag in flags_but_seed(result) if not flag.startswith(in_columns)]


def _curve_label(result: dict) -> str:
    """The method of a result on sinusoids with its rate and its changed flags."""
    rate = f"rate {result['config']['inner_lr']:g}"
    return ", ".join([figures.title(result["algorithm"]), rate, *_further_flags(result)])


def _by_curve(results: list[dict]) -> dict[str, list[dict]]:
    """The results on sinusoids by the name of their curve, seeds together.

    Raises:
      RunError: if two commands have the same name.
    """
    found: dict[str, list[dict]] = {}
    for group in by_command(results).values():
        if (other := found.setdefault(_curve_label(group[0]), group)) is not group:
            raise runs.RunError(
                f"`{command(other[0])}` and `{command(group[0])}` have one row in the tables; keep the results of one"
            )
    return found


def _after(step: int, curves: list[list[float | None]]) -> str:
    """The values of all seeds after some number of inner steps; empty if the test has fewer."""
    return intervals.format_over_seeds([curve[step] for curve in curves]) if step < len(curves[0]) else ""


def _mean_at_10(curves: list[dict], name: str, style: str) -> str:
    values = [value for curve in curves for value in curve[name][10:11]]
    return "" if not values or None in values else format(statistics.fmean(values), style)


def domain_table(results: list[dict]) -> str:
    """Accuracy on the held-out domain, and in brackets that on validation examples of the source domains."""

    def cell(group: list[dict]) -> str:
        held_out, source = (
            intervals.format_over_seeds([intervals.percent(result[part]["accuracy"]["mean"][-1]) for result in group])
            for part in ("metrics", "source_validation")
        )
        return f"{held_out} [{source}]"

    names = sorted({result["algorithm"] for result in results}, key=list(domains.METHODS).index)
    rows = []
    for (data, held_out), by in _domain_rows(results):
        cells = (cell(by[name]) if name in by else "" for name in names)
        differences = (_paired(by, part) for part in ("metrics", "source_validation"))
        steps = " / ".join(dict.fromkeys(f"{by[name][0]['meta_steps']:,}" for name in names if name in by))
        rows.append([data, held_out, *cells, *differences, steps, _operations(by), _seeds(by)])
    header = ["data", "held out", *map(figures.title, names), "MLDG minus ERM", "the same on the sources"]
    return intervals.markdown_table([*header, "meta-steps, MLDG / ERM", "operations of MLDG, x ERM", "seeds"], rows)


def _domain_rows(results: list[dict]) -> list[tuple[tuple[str, str], dict[str, list[dict]]]]:
    """The rows of the table of domains: data and held-out domain, and the results of each method.

    MLDG is beside the ERM with as many meta-steps. Another ERM is beside the MLDG, at its defaults, that has the most
    meta-steps below its own.
    """
    of_method = {cli.flag(field.name) for field in dataclasses.fields(CATALOGUE["mldg"].hyperparameters)}
    in_columns = ("--data", "--held-out", "--num-meta-steps", "--seed")
    groups = defaultdict(lambda: {"mldg": defaultdict(list), "erm": defaultdict(list)})
    for result in results:
        flags = [flag for flag in changed_flags(result) if not flag.startswith(in_columns)]
        own = tuple(flag for flag in flags if flag.split()[0] in of_method)
        shared = tuple(flag for flag in flags if flag not in own)
        config = result["config"]
        by = groups[config["data"], config["held_out"], shared]
        by[result["algorithm"]][own, result["meta_steps"]].append(result)
    rows = []
    for (data, held_out, shared), by in sorted(groups.items()):
        pairs = [(key, ((), key[1])) for key in sorted(by["mldg"])]
        for key in sorted(by["erm"]):
            if key not in by["mldg"]:
                pairs.append((max((other for other in by["mldg"] if not other[0] and other < key), default=None), key))
        for mldg, erm in pairs:
            own = mldg[0] if mldg else ()
            label = ", ".join([data, *(f"`{flag}`" for flag in (*shared, *own))])
            found = {"mldg": by["mldg"].get(mldg, []), "erm": by["erm"].get(erm, [])}
            # Differences are paired, so both means are over the seeds that both have.
            seeds = [{result["seed"] for result in group} for group in found.values() if group]
            both = set.intersection(*seeds) or set.union(*seeds)
            kept = {name: [result for result in group if result["seed"] in both] for name, group in found.items()}
            rows.append(((label, held_out), {name: group for name, group in kept.items() if group}))
    return rows


def _operations(by_algorithm: dict[str, list[dict]]) -> str:
    """The counted operations of the training of MLDG, relative to that of ERM; empty if one was not counted."""
    counted = [
        by_algorithm[name][0].get("execution", {}).get("flops") for name in ("mldg", "erm") if name in by_algorithm
    ]
    if len(counted) < 2 or not all(counted):
        return ""
    steps = [by_algorithm[name][0]["meta_steps"] for name in ("mldg", "erm")]
    return f"{counted[0] * steps[0] / (counted[1] * steps[1]):.1f}"


def _paired(by_algorithm: dict[str, list[dict]], part: str) -> str:
    """The difference of MLDG and ERM in a part of the results with its 95 % interval, paired by seed."""
    mldg, erm = (
        {
            result["seed"]: intervals.percent(result[part]["accuracy"]["mean"][-1])
            for result in by_algorithm.get(name, [])
        }
        for name in ("mldg", "erm")
    )
    both = [(mldg[seed], erm[seed]) for seed in mldg if seed in erm]
    differences = [[one - other] for one, other in both if None not in (one, other)]
    if len(differences) < 2:
        return ""
    found = intervals.mean_and_interval(differences)
    return intervals.format_mean(found["mean"][0], found["ci95"][0])


def over_seeds(results: list[dict]) -> dict[str, dict]:
    """The "methods" of one command of `experiments.hyperparameters`.

    With several seeds the losses and accuracies are means over them, with the 95 % interval over seeds; what else there
    is comes from the first.
    """
    first = results[0]["methods"]
    if len(results) == 1:
        return first
    pooled = {name: dict(method) for name, method in first.items()}
    for name, method in pooled.items():
        for metric in ("heldout_loss", "test_loss", "test_accuracy", "test_loss_more"):
            if metric in method:
                # null, which stands for a number that is not finite, becomes NaN and null again
                means = np.array([result["methods"][name][metric]["mean"] for result in results], float)
                found = runs.finite(intervals.mean_and_interval(means))
                method[metric] = {measure: value[0] for measure, value in found.items()}
    return pooled


def _by_loss(methods: dict[str, dict]) -> list[str]:
    """The names of the methods, the lowest test loss first and those that are not finite last."""
    losses = {name: method["test_loss"]["mean"] for name, method in methods.items()}
    return sorted(losses, key=lambda name: float("inf") if losses[name] is None else losses[name])


def hyperparameter_summary(results: list[dict]) -> str:
    """Who wins, in how many seeds, and what a hypergradient costs."""
    sentences = []
    for group in by_command(results).values():
        methods = over_seeds(group)
        losses = {name: methods[name]["test_loss"]["mean"] for name in _by_loss(methods)}
        best = [name for name, loss in losses.items() if loss is not None][:2]
        shown = ", before ".join(f"{name} ({losses[name]:.4f})" for name in best)
        sentences.append(f"The lowest test loss is that of {shown}.")
        differences = [methods[name]["test_loss_more"] for name in best if "test_loss_more" in methods[name]]
        if len(best) == 2 and len(differences) == 1 and abs(differences[0]["mean"]) <= differences[0]["ci95"]:
            sentences.append("Their difference is within its interval.")
        if len(group) > 1:
            wins = Counter(_by_loss(result["methods"])[0] for result in group)
            counts = ", ".join(f"of {name} in {count}" for name, count in wins.most_common())
            sentences.append(f"Of {len(group)} seeds, the lowest is that {counts}.")
        sentences.append(
            f"A run with its hypergradient takes {group[0]['relative_flops']:.1f} times the operations of one without."
        )
    return " ".join(sentences)


def hyperparameter_table(results: list[dict]) -> str:
    """The loss of every way to choose hyperparameters, the best on the test digits first."""
    rows = []
    for group in by_command(results).values():
        methods = over_seeds(group)
        for name in _by_loss(methods):
            method = methods[name]
            losses = (intervals.format_mean(**method[metric], digits=4) for metric in ("heldout_loss", "test_loss"))
            accuracy = intervals.format_mean(**method["test_accuracy"], scale=100)
            more = hyperparameters.format_more(method)
            counts = f"{method['runs']}", f"{method['seconds']:.0f}", f"{len(group)}"
            named = ", ".join([name, *(f"`{flag}`" for flag in flags_but_seed(group[0]))])
            rows.append([named, *losses, more, accuracy, *counts])
    header = ["", "held-out loss", "test loss", "test loss minus hypergradients", "test accuracy, %", "training runs"]
    return intervals.markdown_table([*header, "seconds to choose", "seeds"], rows)


def _seeds(by_algorithm: dict[str, list[dict]]) -> str:
    counts = sorted({len(group) for group in by_algorithm.values()})
    return " or ".join(map(str, counts))


def details(results: list[dict]) -> str:
    """For every command: seeds, device, versions and the whole curve."""
    parts = []
    for line, group in by_command(results).items():
        first = group[0]
        name = next(iter(first["metrics"]))
        made_on = defaultdict(list)
        for result in group:
            versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
            made_on[f"{result['device']}; {versions}"].append(str(result["seed"]))
        parts.append(
            f"`{line}`\n\n"
            + "".join(f"- seeds {', '.join(seeds)}; {where}\n" for where, seeds in made_on.items())
            + f"- seconds of the first: {', '.join(f'{k} {v:.0f}' for k, v in first['seconds'].items())}\n"
            f"- protocol: {', '.join(f'{k} {v}' for k, v in first['protocol'].items())}\n"
            f"- {name}, after 0, 1, ... inner steps if there are several, first seed: "
            + ", ".join(intervals.format_mean(mean, digits=4) for mean in first["metrics"][name]["mean"])
        )
    return "\n\n".join(parts)


def seed_curves(results: list[dict]) -> dict[str, list[list[dict]]]:
    """The learning curves of every command on sinusoids that has several seeds with one, by the name of the method."""
    logs = {}
    for label, group in _by_curve([result for result in results if result["experiment"] == "sinusoid"]).items():
        curves = [result["curve"] for result in group if result.get("curve")]
        if len(curves) > 1:
            logs[label] = curves
    return logs


def orders_section(of: Mapping[str, Sequence[dict]]) -> str:
    """What the second derivative is worth, as a figure; empty without results of both orders."""
    if not orders_panels(of):
        return ""
    figure = "![first against second order](figures/first_against_second_order.png)"
    return f"## First against second order\n\n{ORDERS}\n\n{figure}\n\n"


def orders_panels(of: Mapping[str, Sequence[dict]]) -> dict[tuple[str, str], dict[str, list[list[float]]]]:
    """The scores of MAML and FOMAML after 0, 1, ... inner steps, as `figures.orders` takes them."""
    panels = defaultdict(lambda: defaultdict(list))
    for name in ("maml", "fomaml"):
        chosen = [r for r in of["sinusoid"] if r["algorithm"] == name and not flags_but_seed(r)]
        for evaluation in (e for result in chosen for e in result["evaluations"] if e["shot"] == 5):
            median = evaluation["metrics"]["mse"]["median"]
            panels["sinusoids, test with 5 points", "median squared error"][figures.title(name)].append(median)
        recipes = few_shot_report.equal_budget(few_shot_report.gradient_based(of)), few_shot_report.published_runs(of)
        for result in (result for group in recipes for result in group if result["algorithm"] == name):
            if (result["config"]["way"], result["config"]["shot"], result["config"]["network"]) == (5, 1, "conv4"):
                after = f"Omniglot, after {result['meta_steps']:,} meta-steps"
                accuracy = (100 * np.asarray(result["metrics"]["accuracy"]["mean"], float)).tolist()
                panels[after, "test accuracy, %"][figures.title(name)].append(accuracy)
    return {text: dict(panel) for text, panel in panels.items() if len(panel) == 2}


def sinusoid_section(tables: Mapping[str, str], has_seeds: bool) -> str:
    """The text on sinusoids, around its two tables."""
    curves = ""
    if has_seeds:
        curves = (
            "Learning curves of the methods with at least two stored curves; the legend has their number.\n\n"
            "![learning curves with intervals over seeds](figures/learning_curves.png)\n\n"
        )
    return (
        "## Sinusoids\n\nMean squared error, mean over seeds with the smallest and largest seed in parentheses. The "
        "rate is that of the gradient steps at test; a task has diverged when its error is above "
        f"{sinusoid.DIVERGED:g}, and then the mean says little and the median more. The figure has the mean over seeds "
        "of the median over tasks. Costs are those of a meta-step of 25 tasks, measured in turns by `python -m "
        "benchmarks.methods --workload sinusoid`. Published errors are those of the MAML paper. Methods that adapt in "
        "training do so with one inner step, Reptile with ten. With one step, MAML++ is a learned rate for each layer. "
        "iMAML is not here. Its meta-gradient does not see the inner steps, so nothing keeps them stable.\n\n"
        f"### 5 support points\n\n{tables['sinusoid-5']}\n\n### 10 support points\n\n{tables['sinusoid-10']}\n\n"
        f"![error against inner steps](figures/sinusoid.png)\n\n{curves}"
    )


def verification_section(results: list[dict]) -> str:
    """The text on faces, its tables and its figure; empty without results."""
    if not results:
        return ""
    return (
        "\n\n## Verification in unseen domains\n\nTrue accept rate in % at a false accept rate of 1 %, mean over "
        "seeds with its 95 % interval, on identities and domains that were never seen. Differences are paired by "
        "seed. All methods are selected on other identities of the source domains. The test has six random "
        "images of each identity, the same for every method. No published number can be "
        f"compared with these.\n\n{faces_report.section(results, flags_but_seed)}\n\n![ROC](figures/faces.png)\n\nThe "
        "figure is that of the characters."
    )


def domain_section(table: str) -> str:
    """The text on unseen domains, around its table."""
    return (
        "\n\n## Unseen domains\n\nAccuracy in % on a domain that was never seen, mean over seeds with the smallest "
        "and largest seed in parentheses, and the same on validation examples of the source domains in brackets. Both "
        "methods are selected by the latter. No model adapts, and no batch statistics are used. Differences have their "
        "95 % interval over seeds. Of the rotations, two angles were held out.\n\n"
        "- MLDG has an inner rate of 0.02 and β = 1, set by hand. On upright characters, rates from 0.005 to 0.5 "
        "differ by less than seeds do.\n"
        "- At equal meta-steps MLDG has about three times the operations of ERM. ERM with as many operations has 6,600 "
        "meta-steps on characters. Then the lead of MLDG on upright ones, 1.9 points, is within its interval.\n"
        "- At equal meta-steps MLDG is ahead on the source domains of both angles too. So what it gains on upright "
        "characters may be a better fit, and not better generalisation. Where there is no difference, at least one of "
        "six such intervals misses zero with a probability of about a quarter.\n"
        "- On PACS the accuracy on the sources rises by 0.7 to 1.6 points in 100 meta-steps over the last 500 of "
        "1,000, and by 0.6 at most over the last 500 of 3,000. No difference in an unseen domain of PACS exceeds its "
        "interval.\n\n"
        f"{table}\n\n"
    )


def hyperparameter_section(results: list[dict], table: str) -> str:
    """The text on learned hyperparameters, around its table, with its figures."""
    if not results:
        return ""
    config = results[0]["config"]
    of_validations = -(-config["num_meta_steps"] // config["val_every"]) * config["val_episodes"]
    num_runs = results[0]["methods"]["hypergradients"]["runs"]
    return (
        "## Hyperparameters of a whole training run\n\nMade by `python -m experiments.hyperparameters`. A network is "
        "trained on digits for hundreds of mini-batches. Every method may use the same number of training runs; "
        "hyperparameters are chosen by the held-out loss, and no choice used the test digits. A candidate of a search "
        f"is judged by one training run, learned hyperparameters by {config['val_episodes']}: {of_validations} of the "
        f"{num_runs} training runs are validations. A seed divides the digits, draws weights and mini-batches of all "
        "runs, and begins the random search. With several seeds the numbers are means over them with the interval over "
        "seeds, and differences are paired by seed; with one the intervals are over training runs. The seconds, which "
        "leave out validations, and the schedules of the figure are those of the first seed. "
        f"{hyperparameter_summary(results)}\n\n{table}\n\n"
        "![the learned schedules](figures/hyperparameters.png)\n\n"
        "![memory of a hypergradient](figures/hyperparameters_memory.png)\n\n"
    )


def draw(directory: Path, of: Mapping[str, list[dict]], curves_of_seeds: dict[str, list[list[dict]]]) -> None:
    """Writes every figure that there are results for."""
    if of["sinusoid"]:
        curves = {}
        for label, group in _by_curve(of["sinusoid"]).items():
            name, flags = group[0]["algorithm"], flags_but_seed(group[0])
            is_plain = not any(flag.startswith("--inner-lr ") for flag in flags) and not _further_flags(group[0])
            curves[name if is_plain else label] = [
                evaluation for result in group for evaluation in result["evaluations"]
            ]
        figures.inner_curves(directory / "sinusoid.png", curves)
    if panels := orders_panels(of):
        labels = {f"{figures.title(name)}, rate 0.001": figures.title(name) for name in ("maml", "fomaml")}
        curves = {labels[label]: curve for label, curve in curves_of_seeds.items() if label in labels}
        figures.orders(directory / "first_against_second_order.png", curves, panels)
    if curves_of_seeds:
        figures.learning_curves(directory / "learning_curves.png", curves_of_seeds)
    few_shot_report.draw(directory, of)
    rl_report.draw(directory, of, flags_but_seed)
    if characters := [result for result in of["faces"] if result["config"]["data"] == "characters"]:
        figures.roc(directory / "faces.png", faces.curves_of(faces_report.labelled(characters, flags_but_seed)))
    if of["translation"]:
        translation_report.draw(directory / "translation.png", of["translation"], flags_but_seed)
    if of["hyperparameters"]:
        learned = min(by_command(of["hyperparameters"]).values(), key=lambda group: len(flags_but_seed(group[0])))
        figures.schedules(directory / "hyperparameters.png", over_seeds(learned))
        figures.memory(directory / "hyperparameters_memory.png", learned[0]["memory"])


def write(results_dir: Path, report: Path, pages: Sequence[Path] = ()) -> None:
    """Writes the report, its figures and PROVENANCE.md beside it, and the tables between the markers of other pages."""
    results = [runs.read_json(file) for file in sorted(results_dir.glob("*.json"))]
    of = defaultdict(list)
    for result in results:
        of[result["experiment"]].append(result)
    curves_of_seeds = seed_curves(results)
    tables = few_shot_report.tables(of) | {
        "sinusoid-5": sinusoid_table(of["sinusoid"], 5),
        "sinusoid-10": sinusoid_table(of["sinusoid"], 10),
        "domains": domain_table(of["domains"]),
        "hyperparameters": hyperparameter_table(of["hyperparameters"]),
    }
    content = (
        "# Results\n\nMade by `python -m experiments.report` from `experiments/results/*.json`. The command, the "
        "seeds, the device and the versions of each training are in [PROVENANCE.md](PROVENANCE.md).\n\n"
        + sinusoid_section(tables, has_seeds=bool(curves_of_seeds))
        + orders_section(of)
        + few_shot_report.section(of, tables)
        + rl_report.section(of, flags_but_seed)
        + verification_section(of["faces"])
        + translation_report.section(of["translation"], flags_but_seed)
        + domain_section(tables["domains"])
        + hyperparameter_section(of["hyperparameters"], tables["hyperparameters"])
    )
    provenance = (
        "# How each training was made\n\nMade by `python -m experiments.report`, as [RESULTS.md](RESULTS.md) is."
    )
    for name in EXPERIMENTS:
        if of[name]:
            provenance += f"\n\n## {name}\n\n{details(of[name])}"
    draw(report.parent / "figures", of, curves_of_seeds)
    runs.write_text(report, content.rstrip() + "\n")
    runs.write_text(report.with_name("PROVENANCE.md"), provenance + "\n")
    for page in pages:
        text = page.read_text()
        for name, table in tables.items():
            marker = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            text = marker.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
        runs.write_text(page, text)


def main() -> None:
    """The command line."""
    config = tyro.cli(Config, prog="python -m experiments.report", description=cli.wrapped(__doc__))
    with cli.mistakes_in_one_paragraph():
        for run_dir in config.add:
            print(add(run_dir.expanduser(), HERE / "results"))
        write(HERE / "results", HERE / "RESULTS.md", PAGES)


if __name__ == "__main__":
    main()
