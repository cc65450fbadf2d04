"""The part of the report on few-shot classification: Omniglot, photographs and data of other kinds."""

import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from experiments import cross_domain, figures, images, intervals, omniglot, packs, published, runs
from experiments.commands import by_command, changed_flags, command, order_of
from maml_jax import CATALOGUE

METHOD_COSTS = Path(__file__).parents[1] / "benchmarks" / "results"

ALL_METHODS = """Accuracy in %, with its 95 % interval over the test episodes; one number a seed.

- A method whose parameters do not depend on the number of classes is tested in all four settings after one training.
- Split by alphabet, the test has new alphabets. Numbers of different splits are not comparable.
- Rows of MAML and its family with `--inductive`, `--split-by alphabet` have the split of the learners that compare
  embeddings, and a twelfth of the recipe's meta-steps. That of MAML with `--rotated-classes`, `--rotated-test-classes`,
  `--query-shot 5` has their test in all but the normalisation, which is with the support set and not by training
  images. The others have one query of a class and not five, and characters that are rotated at random and not four
  classes of each.
- Queries are those of a class in a test episode.
- An inductive test classifies every query on its own. In a transductive one the queries are normalised together.
- The column of meta-steps has those of the training and those of the recipe. The recipes of 20,000 of ProtoNets,
  matching networks, R2-D2, Siamese networks and the memory module, and of 40,000 of the neural statistician, are
  ours, because those papers stop early, have no episodes or do not say. So are the 4,000 of the pretrained classifier.
- Times are of one or two cores that often did other work too, unless a GPU is named. Compare operations where they were
  counted. The figure has the longest training of each method on a CPU with the settings of its recipe, or the longest
  of all where there is none. Its bars go from the smallest to the largest seed; with one seed they are the interval.
- The test characters of Reptile and of the memory module are not rotated; those of the others are."""
EQUAL_BUDGET = """5-way 1-shot, the same recipes with fewer meta-steps. A method has the rates, the schedule and the
meta-batch of its paper, if that has a recipe for Omniglot. So equal numbers of meta-steps are not equal numbers of
tasks, and part of a difference may be the rate. The linear schedule of Reptile and the cosine one of MAML++ end
with these meta-steps, but the weights of the steps of MAML++ are annealed over 5,000. ANIL, Meta-SGD and
Meta-Curvature have MAML's rate of 2; the paper of Meta-SGD, whose rates are learned, starts between 0.005 and 0.1,
and with that it is at 89.6 here (see the variations). At a rate of 0.5 MAML is at 84.9, FOMAML at 86.1 and BOIL at
85.8, means of three seeds: small rates learn faster at first, and the lead of BOIL in this table is that of its
rate. The recipes of BOIL and CAVIA are ours. Reptile trains with 10 examples of a class, adapts scales and offsets
of the normalisation, and its test characters are not rotated; those of the others are. The accuracy is the mean
over seeds, with the smallest and largest in parentheses; with one seed it has its 95 % interval over test episodes.
The bars of the figure are the same. Costs are those of a meta-step of 8 tasks, measured in turns by `python -m
benchmarks.methods`. The times of the figure are computed from them: meta-steps times tasks times the measured time of
a task."""
BELOW_PUBLISHED = """Where a number is below the published one:

- **The training is a part of the recipe** in most rows; see the column of meta-steps. The published numbers are those
  of full trainings.
- **MAML** in 5-way 5-shot, with all 60,000 meta-steps and one seed, is 0.4 below, more than the interval. From 22,000
  meta-steps on the validation accuracy stays between 99.3 and 99.6 %, and that on training characters between 99.6 and
  100. So what is missing is lost on characters that were not trained on, and longer training adds little.
- **Meta-SGD**, with all 60,000 meta-steps: the two intervals overlap. Its paper draws the first rates between 0.005
  and 0.1 (`--inner-lr 0.005 --inner-lr-max 0.1`), and ours are 2. After 1,000 meta-steps rates drawn from that range
  are 19 points ahead, after 5,000 they are at 96.7, and after all 60,000 at 98.87 ± 0.41, level with ours at 99.07. So
  with one seed each, the rates at the start decide how fast it learns, and not where it ends.
- **MAML without convolutions** (`--network mlp`) in 5-shot is 1.0 below after the three test steps of the recipe.
  After one step, as in training, it is at 97.4, and the published 97.5 is within its interval.
- **Reptile**, with all 100,000 meta-steps: the published number is within our interval. The inductive number is of a
  training of its own, whose validation is inductive too. It is 0.8 below, and the published 95.39 just above its
  interval.
- **MAML++**: the published number is that of an ensemble of five states, with pooling. Ours has stride 2. After all
  50,000 meta-steps an ensemble of five states is at 99.03, and the published 99.47 just above its interval. After
  1,000 the test has one state, because there was one validation. All meta-steps are second order, as in the authors'
  settings for Omniglot; the paper anneals the order (`--num-first-order 25000`). In the trainings of 1,000 the weights
  of the steps are still those of the beginning: their annealing takes 5,000.
- **iMAML**, with all 20,000 meta-steps, is 3.5 points below. Its validation accuracy is 83, 89 and 94 % after 1,000,
  5,000 and 10,000, and from 11,500 on between 94 and 96. The authors' code differs from the paper and from ours. Its
  inner steps are without the proximal term (`--penalty-last`), and it damps the conjugate gradients, in effect as
  `--damping 22`. With both the validation accuracy is ahead at first, by 4 points after 1,000 and 5,000 meta-steps,
  and level from 8,000 on; the test after 10,000 is at 93.7. So these two decide how fast it learns, and hardly where
  it ends. The damping alone does not help (77.3 after 1,000). Their network differs too: its last layer sees all
  positions, and scales and offsets of the normalisation adapt (`--flatten --norm-scale --adapt-norm`). With that as
  well, 1,000 meta-steps are at 89.2 and 13,000 at 97.3, where all 20,000 with our network are at 95.7. So the network
  explains nearly half of the gap. The other 7,000 were not trained; from 10,000 on the validation accuracy stays
  between 96.8 and 97.3 %. These trainings have one seed each. Not tried: their images, which are resized smoothly,
  their test without the proximal term, and their Adam, whose ε is 0.001. In ours the accuracy of the test still rises
  with its inner steps, from 94.0 after 10 to 95.7 after 16, so 16 steps may not solve the inner problem, and the
  implicit gradient assumes that they do. The conjugate gradients of the paper need I + H/λ positive definite, and the
  Hessian H of a network has negative eigenvalues. Ours return the iterate with the smallest residual.
- **ProtoNets** were published after a training for each shot. Ours of one shot is tested with all. With the
  authors' code its users reach 98.4 / 99.6 / 94.9 / 98.6, as they report at github.com/jakesnell/prototypical-networks.
- **Matching networks** have a learned scale of their cosines here, which their paper has not. With it they reach
  two of the four published numbers. In 5-way 1-shot they are 0.1 below, within the interval, and with 20 classes and
  five images 0.2. With the plain cosines of the paper (`--scale None`) and as many meta-steps they are 11 to 32 points
  behind: after a ReLU cosines are between 0 and 1, so of 5 classes no probability is above e / (e + 4) = 0.40.
- **R2-D2** has the highest validation accuracy, in 5-way 1-shot, at 4,500 of its 20,000 meta-steps. With 20 classes
  its test is 0.4 (one image) and 0.1 (five images) below the published numbers, both more than the interval. With 5
  classes it is 0.2 and 0.04 below, within the interval. The authors draw the number of examples of a training episode
  from 1 to 9, of 60 classes; ours have one, and five queries.
- **MANN**: its first and tenth instances are below the published ones. The first can only be guessed. The published
  network saw images that were rotated and shifted a little, and ours are as they are. Its training is 40 % of the
  published one, and so is that of the LSTM beside it. At these equal meta-steps the memory is worth 10.9 points on the
  second image of a class and 7.0 on the fifth. (The numbers under "Sequences" are of another test of the same states.)
  The published LSTM is further behind: 49.5 and 63.6.
- **Siamese networks**: three of the four numbers are above the published ones. That of 20-way 5-shot is 0.2 below,
  within the interval. Fine-tuned on the support set, which ours are not, the published ones are 97.3, 98.4, 88.1 and
  97.0.
- **The memory module** has its highest validation accuracy, 97.3 %, at 6,500 of 10,000 meta-steps, so longer training
  adds little. That state has 99.5 % on training classes, so what is missing is lost between alphabets. The authors'
  network is another one, without normalisation and with dropout. With stride 2 in place of pooling (`--no-pooling`)
  20,000 meta-steps are 0.4 to 2.6 points behind.
- **The neural statistician** is far smaller than the published network, and trained without dilated images.

Other differences: images are 28x28 by nearest neighbour, as in MAML's code. Those of MANN and the LSTM are reduced to
20x20 from these; their authors resize the originals smoothly. The neural statistician and the meta-learner LSTM are
trained without the clipping of their authors. The latter has no published numbers on Omniglot: its 8 inner steps and 2
episodes a meta-step are ours. Matching networks and R2-D2 have an outer rate of 0.005, ProtoNets 0.001. The test of the
memory module does not turn its characters, as in the authors' code; the other tests by alphabet do. LEO learns on the
features of a pretrained classifier, whose training is not in its minutes; the centroids of such a classifier do better
than LEO. With 20 classes, fine-tuning of the pretrained network is behind a new linear layer; its rate and steps were
not tuned."""


def training_time(*trainings: Sequence[dict]) -> str:
    """Minutes of one or several trainings as a cell, each the mean of its seeds, with the device if it is no CPU."""

    def device_of(seeds: Sequence[dict]) -> str:
        return "" if on_cpu(seeds[0]) else f", {seeds[0]['device']}"

    shown = []
    for device, of_device in itertools.groupby(trainings, device_of):
        minutes = (statistics.fmean(result["seconds"]["train"] / 60 for result in seeds) for seeds in of_device)
        shown.append(f"{joined(minutes, '.0f')} min{device}")
    return " / ".join(shown)


def kind_of_test(protocol: dict) -> str:
    """Whether the queries of a test episode are normalised together."""
    return "transductive" if protocol["normalisation"] == "transductive" else "inductive"


def joined(values: Iterable[float | None], style: str) -> str:
    """Numbers as a cell; one of them if all look alike, and nothing for None."""
    shown = list(dict.fromkeys("" if value is None else format(value, style) for value in values))
    return " / ".join(filter(None, shown))


def on_cpu(result: dict) -> bool:
    """Whether a run was made on a CPU, by what `runs.device_name` says."""
    return result.get("device", "").endswith("cores")


def cost_cells(result: dict) -> list[str]:
    """Operations a task in GFLOP and temporaries of the training program in MB; empty where they were not counted."""
    execution = result.get("execution", {})
    flops, memory = execution.get("flops"), execution.get("temporary_bytes")
    tasks = result["config"]["meta_batch_size"]
    return [f"{flops / tasks / 1e9:.3g}" if flops else "", f"{memory / 1e6:.3g}" if memory else ""]


def with_ensemble(result: dict) -> list[str]:
    """The title of the algorithm of a result and, if its test was that of several states, their number."""
    members = result["protocol"].get("ensemble", 1)
    return [figures.title(result["algorithm"]), *([f"ensemble of {members}"] if members > 1 else [])]


def omniglot_table(results: list[dict], *, with_costs: bool = False) -> str:
    """Accuracy after the steps of the test protocol, one row a command; flags that are not the paper's are named."""
    rows, of_method = [], relative_costs()
    for group in by_command(results).values():
        config = group[0]["config"]
        accuracy = [result["metrics"]["accuracy"] for result in group]
        steps = len(accuracy[0]["mean"]) - 1
        cells = [intervals.format_metric(a, scale=100) for a in accuracy]
        paper = published_accuracy(group[0], config["way"], config["shot"]) if as_published(group[0]) else ""
        rows.append(
            [
                ", ".join([*with_ensemble(group[0]), *(f"`{flag}`" for flag in variation(group[0]))]),
                f"{config['way']}-way {config['shot']}-shot",
                ", ".join(cells),
                paper,
                str(steps),
                f"{group[0]['protocol']['episodes']} x {group[0]['protocol']['query_shot']}",
                f"{group[0]['meta_steps']:,}",
                training_time(group),
            ]
        )
        if with_costs:
            milliseconds = 1000 * group[0]["seconds"]["train"] / group[0]["meta_steps"]
            is_measured = (config["way"], config["shot"], config["network"]) == (5, 1, "conv4")
            relative = relative_cells(of_method.get(group[0]["algorithm"]) if is_measured else None)
            rows[-1] += [f"{milliseconds:.0f}", *cost_cells(group[0]), *relative]
    header = ["", "task", "accuracy, %", "published", "test steps", "episodes x queries", "meta-steps", "training"]
    header += ["ms / meta-step", "GFLOP a task", "MB", *RELATIVE_COSTS] if with_costs else []
    return intervals.markdown_table(header, rows)


def equal_budget(results: list[dict]) -> list[dict]:
    """The results of the papers' recipes in 5-way 1-shot with the most frequent smaller number of meta-steps."""
    task = {"way": 5, "shot": 1, "network": "conv4"}
    shorter = [result for result in results if has_smaller_budget(result) and not result["config"].get("inductive")]
    shown = [result for result in shorter if task.items() <= result["config"].items()]
    steps = statistics.mode(result["meta_steps"] for result in shown) if shown else 0
    return [result for result in shown if result["meta_steps"] == steps]


RELATIVE_COSTS = ("time of a meta-step, x FOMAML", "FLOPs, x FOMAML", "memory, x FOMAML")
"""The columns of `relative_cells`."""


def relative_costs(name: str = "methods") -> dict[str, dict]:
    """The cost of a meta-step of as many tasks relative to FOMAML by method, as `benchmarks.methods` measured it last.

    Args:
      name: of the result file, "methods" for Omniglot or "methods_sinusoid".
    """
    file = METHOD_COSTS / f"{name}.json"
    return {row["method"]: row for row in runs.read_json(file)["rows"]} if file.exists() else {}


def relative_cells(cost: dict | None) -> list[str]:
    """The cells of `RELATIVE_COSTS` for a row of `benchmarks.methods`; empty ones for None."""
    if cost is None:
        return [""] * len(RELATIVE_COSTS)
    ratios = cost["times_fomaml"]["median"], cost["flops_times_fomaml"], cost["temporary_bytes_times_fomaml"]
    return [f"{ratio:.1f}" for ratio in ratios]


def budget_table(results: list[dict]) -> str:
    """Accuracy after an equal number of meta-steps, with what a task costs relative to FOMAML."""
    rows, of_method = [], relative_costs()
    for group in by_command(results).values():
        config, algorithm = group[0]["config"], group[0]["algorithm"]
        accuracy = [result["metrics"]["accuracy"] for result in group]
        shown = intervals.format_metric(accuracy[0], scale=100)
        if len(group) > 1:
            shown = intervals.format_over_seeds([intervals.percent(a["mean"][-1]) for a in accuracy])
        rows.append(
            [
                figures.title(algorithm),
                shown,
                str(len(group)),
                f"{rate:g}" if (rate := config.get("inner_lr")) else "",
                str(len(accuracy[0]["mean"]) - 1),
                f"{group[0]['meta_steps']:,}",
                str(config["meta_batch_size"]),
                *relative_cells(of_method.get(algorithm)),
                published_accuracy(group[0], config["way"], config["shot"]),
            ]
        )
    header = ["", "accuracy, %", "seeds", "inner rate", "test steps", "meta-steps", "tasks / meta-step"]
    return intervals.markdown_table([*header, *RELATIVE_COSTS, "published, after the full training"], rows)


def evaluations(result: dict) -> list[dict]:
    """The settings in which a training on Omniglot was tested: way, shot, metrics, and a head if there are several."""
    own = {name: result["protocol"][name] for name in ("way", "shot")} | {"metrics": result["metrics"]}
    return result.get("evaluations", [own])


def check_seeds_differ(group: Sequence[tuple[dict, dict]]) -> None:
    """Raises RunError if two results of a row, pairs of a result and an evaluation, have one seed in one setting."""
    found: dict[tuple, dict] = {}
    for result, evaluation in group:
        key = evaluation["way"], evaluation["shot"], result["seed"]
        if (other := found.setdefault(key, result)) is not result:
            raise runs.RunError(
                f"two results of one row have the seed {key[-1]}: `{command(other)}` and `{command(result)}`; keep one"
            )


def all_methods(results: list[dict]) -> list[dict]:
    """Every training on Omniglot with its accuracies by way and shot, the same recipes and seeds together.

    Returns:
      Records with "name", "head", "flags" (the changed settings), "first" (one of the results), "accuracy" (by
      (way, shot), means and intervals by seed), "published" and "minutes" (by (way, shot)), and "trainings" (the
      results of each training, seeds together).
    """
    groups = defaultdict(list)
    for result in results:
        is_episodic = CATALOGUE[result["algorithm"]].any_way and result["algorithm"] != "pretrained-classifier"
        trained = f"{result['config']['train_shot']}-shot" if is_episodic else ""
        for evaluation in evaluations(result):
            flags = tuple(variation(result))
            # A training of such a method is tested in several settings; others have one for each.
            shot = result["config"]["shot"] if CATALOGUE[result["algorithm"]].classifies else None
            key = result["algorithm"], evaluation.get("head", ""), trained, flags, result["meta_steps"], shot
            groups[key].append((result, evaluation))
    records = []
    for (_, head, trained, flags, *_), group in groups.items():
        check_seeds_differ(group)
        first, accuracy, paper = group[0][0], defaultdict(list), {}
        trainings, minutes = defaultdict(list), defaultdict(list)
        for result, evaluation in group:
            setting = evaluation["way"], evaluation["shot"]
            trainings[result["config"]["way"], result["config"]["shot"]].append(result)
            minutes[setting].append(result["seconds"]["train"] / 60)
            mean, ci95 = (evaluation["metrics"]["accuracy"][name][-1] for name in ("mean", "ci95"))
            accuracy[setting].append((mean, ci95))
            if (number := published_accuracy(result, *setting, head=head)) and not departures(result):
                paper[setting] = number
        parts = [head, f"trained {trained}" if trained else "", *(f"`{flag}`" for flag in flags)]
        name = ", ".join([*with_ensemble(first), *filter(None, parts)])
        records.append(
            {
                "name": name,
                "head": head,
                "flags": flags,
                "first": first,
                "accuracy": accuracy,
                "published": paper,
                "minutes": {setting: statistics.fmean(of_seeds) for setting, of_seeds in minutes.items()},
                "trainings": [trainings[setting] for setting in sorted(trainings)],
            }
        )
    names = list(omniglot.METHODS)
    return sorted(records, key=lambda r: (names.index(r["first"]["algorithm"]), r["name"], r["first"]["meta_steps"]))


def longest(records: list[dict], settings: Sequence[tuple[int, int]]) -> list[dict]:
    """The longest training of each method in each setting, (way, shot); with the recipe's settings if there is one."""

    def rank(record: dict) -> tuple[bool, int]:
        return not record["flags"], record["first"]["meta_steps"]

    best: dict[tuple, dict] = {}
    for record in records:
        for setting in record["accuracy"].keys() & set(settings):
            key = record["first"]["algorithm"], record["head"], setting
            best[key] = max(best.get(key, record), record, key=rank)
    return [record for record in records if any(record is kept for kept in best.values())]


def all_methods_table(results: list[dict]) -> str:
    """One row a training and head: accuracy in every setting with its interval, beside the published numbers."""
    rows = []
    for record in all_methods(results):
        first, accuracy, trainings = record["first"], record["accuracy"], record["trainings"]
        seconds = [statistics.fmean(result["seconds"]["train"] for result in of_seeds) for of_seeds in trainings]
        flops = [of_seeds[0].get("execution", {}).get("flops") for of_seeds in trainings]
        queries = [of[0]["protocol"].get("query_shot") or of[0]["config"]["query_shot"] for of in trainings]
        cells = [
            ", ".join(
                intervals.format_mean(mean, ci95, scale=100, digits=1) for mean, ci95 in accuracy.get(setting, [])
            )
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
                joined(queries, "d"),
                kind_of_test(protocol),
                f"{first['meta_steps']:,} of {published_steps(first):,}",
                joined((1000 * of_training / first["meta_steps"] for of_training in seconds), ".0f"),
                joined((count and count / 1e9 for count in flops), ".1f"),
                training_time(*trainings),
            ]
        )
    settings = [f"{way}-way {shot}-shot" for way, shot in omniglot.SETTINGS]
    header = [
        "",
        *settings,
        "published",
        "split by",
        "queries",
        "test",
        "meta-steps",
        "ms / meta-step",
        "GFLOP / meta-step",
        "training",
    ]
    return intervals.markdown_table(header, rows)


def images_table(results: list[dict]) -> str:
    """Accuracy on photographs with 1 and 5 examples of a class, one row a method, its head and its flags."""
    groups, rows = defaultdict(list), []
    for result in sorted(results, key=order_of):
        flags = tuple(flag for flag in variation(result) if not flag.startswith(("--size", "--eval-episodes")))
        # A training that is tested with both numbers of examples has a row of its own.
        several = len({evaluation["shot"] for evaluation in evaluations(result)}) > 1
        trained = result["config"]["shot"] if several else 1
        in_columns = result["config"]["size"], result["protocol"]["episodes"]
        groups[result["algorithm"], flags, trained, result["meta_steps"], *in_columns].append(result)
    for (algorithm, flags, trained, meta_steps, *_), group in groups.items():
        first = group[0]
        by_head, trainings = defaultdict(lambda: defaultdict(list)), defaultdict(list)
        for result in group:
            trainings[result["config"]["shot"]].append(result)
            for evaluation in evaluations(result):
                accuracy = evaluation["metrics"]["accuracy"]
                cell = intervals.format_metric(accuracy, scale=100)
                by_head[evaluation.get("head", "")][evaluation["shot"]].append(cell)
        for head, cells in by_head.items():
            of_head = algorithm if head in ("", "neighbour") else f"{algorithm}, {head}"
            paper = None if first["config"].get("inductive") else published.IMAGES.get(of_head)
            variations = (f"`{flag}`" for flag in flags)
            shot_of_training = "" if trained == 1 else f"trained {trained}-shot"
            rows.append(
                [
                    ", ".join([figures.title(algorithm), *filter(None, [head, shot_of_training]), *variations]),
                    *(", ".join(cells.get(shot, [])) for shot in (1, 5)),
                    " / ".join(paper) if paper else "",
                    f"{first['config']['size']}",
                    f"{first['protocol']['episodes']}",
                    kind_of_test(first["protocol"]),
                    f"{meta_steps:,} of {images.METHODS[algorithm].num_meta_steps:,}",
                    training_time(*(trainings[shot] for shot in sorted(trainings))),
                ]
            )
    header = ["", "1-shot", "5-shot", "miniImageNet", "pixels", "episodes", "test", "meta-steps", "training"]
    return intervals.markdown_table(header, rows)


def cross_domain_section(result: dict) -> str:
    """What learners reach on data sets that they were not trained on, one row each."""
    names, config = list(result["data_sets"]), result["config"]
    rows = []
    for record in sorted(result["methods"], key=lambda record: record.get("average_rank") or math.inf):
        numbers = [cross_domain.cell_text(record["data_sets"][name]) for name in names]
        rank = record.get("average_rank")
        described = [record["label"], record["training"], record["normalisation"]]
        rows.append([*described, *numbers, "" if rank is None else f"{rank:.2f}"])
    others = [f"--seed {config['seed']}"] if config["seed"] else []
    if tuple(config["data_sets"]) != packs.NAMES:
        others.append(f"--data-sets {' '.join(config['data_sets'])}")
    chance = [f"{100 * result['data_sets'][name]['chance']:.1f}" for name in names]
    table = intervals.markdown_table(
        ["", "trained on", "normalisation", *names, "average rank"], [*rows, ["chance", "", "", *chance, ""]]
    )
    return (
        f"Episodes of {', '.join(map(str, config['ways']))} classes, {config['episodes']} of each data set; "
        f"{result['protocol']['shot']}. Made by `python -m experiments.cross_domain {' '.join(config['learners'])} "
        f"--ways {' '.join(map(str, config['ways']))} --heads {' '.join(config['heads'])} --episodes "
        f"{' '.join([str(config['episodes']), *others])}`.\n\n{table}\n\n"
        f"![accuracy on data sets of other kinds](figures/{cross_domain_name(result)}.png)"
    )


def cross_domain_name(result: dict) -> str:
    """What its files are called after: the numbers of classes and of episodes, and the seed if it is not 0."""
    config = result["config"]
    name = f"cross_domain_ways-{'-'.join(map(str, config['ways']))}_episodes-{config['episodes']}"
    return name + (f"_seed-{config['seed']}" if config["seed"] else "")


def instance_table(results: list[dict]) -> str:
    """Accuracy of the learners of sequences on the n-th image of a class."""
    shown = (1, 2, 3, 4, 5, 10)
    rows = []
    for result in results:
        found = result["instances"]
        # A sequence of few images of a class has no tenth.
        cells = [
            intervals.format_mean(found["mean"][n - 1], found["ci95"][n - 1], scale=100, digits=1)
            if n <= len(found["mean"])
            else ""
            for n in shown
        ]
        paper = " / ".join(map(str, published.INSTANCES[result["algorithm"]]))
        rows.append([figures.title(result["algorithm"]), *cells, paper, f"{result['meta_steps']:,}"])
    return intervals.markdown_table(["", *map(str, shown), "published", "meta-steps"], rows)


def variation(results: dict) -> list[str]:
    """The flags of the command that are neither in a column of the table nor the seed.

    How often a run is validated and logged is left to the list of commands.
    """
    hidden = ("--way", "--shot", "--num-meta-steps", "--seed", "--val-every", "--log-every")
    return [flag for flag in changed_flags(results) if not flag.startswith(hidden)]


def departures(results: dict) -> list[str]:
    """`variation` without the network and the test of a published row: "no conv" of MAML, inductive of Reptile."""
    config = results["config"]
    is_published = bool(published_accuracy(results, config["way"], config["shot"]))
    of_paper = [f"--network {config['network']}", "--inductive"] if is_published else []
    return [flag for flag in variation(results) if flag not in of_paper]


def published_accuracy(results: dict, way: int, shot: int, *, head: str = "") -> str:
    """The published number for the algorithm, network and kind of test of a result; empty if there is none."""
    algorithm, config = results["algorithm"], results["config"]
    numbers = published.OMNIGLOT_INDUCTIVE if config.get("inductive") else published.OMNIGLOT
    of_head = algorithm if head in ("", "neighbour") else f"{algorithm}, {head}"
    return numbers.get((of_head, config["network"], way, shot), "")


def as_published(results: dict) -> bool:
    """Whether a run had the paper's settings and its number of meta-steps."""
    return not departures(results) and results["meta_steps"] == published_steps(results)


def published_steps(results: dict) -> int:
    """The meta-steps of the recipe, for a result on Omniglot."""
    of_paper = dataclasses.replace(omniglot.METHODS[results["algorithm"]], way=results["config"]["way"])
    return omniglot.with_paper_defaults(of_paper).num_meta_steps


def has_smaller_budget(results: dict) -> bool:
    """Whether a run had the paper's settings and fewer meta-steps."""
    return not departures(results) and not as_published(results)


def gradient_based(of: Mapping[str, Sequence[dict]]) -> list[dict]:
    """The results of trainings on Omniglot by methods that are not for classification only."""
    return [r for r in of["omniglot"] if r["meta_steps"] and not CATALOGUE[r["algorithm"]].classifies]


def published_runs(of: Mapping[str, Sequence[dict]]) -> list[dict]:
    """`gradient_based` with the paper's settings and its number of meta-steps."""
    return [result for result in gradient_based(of) if as_published(result)]


def tables(of: Mapping[str, Sequence[dict]]) -> dict[str, str]:
    """The tables by the names of their markers in other pages; `of` has the results by experiment."""
    results = gradient_based(of)
    return {
        "omniglot": omniglot_table(published_runs(of)),
        "omniglot-budget": budget_table(equal_budget(results)),
        "omniglot-variations": omniglot_table([result for result in results if departures(result)]),
        "omniglot-instances": instance_table([result for result in of["omniglot"] if "instances" in result]),
        "omniglot-all": all_methods_table([result for result in of["omniglot"] if result["meta_steps"]]),
        "images": images_table(of["images"]),
    }


def shorter_trainings(results: Sequence[dict]) -> str:
    """A paragraph on the settings in which no training has the meta-steps of the recipe; empty if there are none."""
    longest, names = {}, list(omniglot.METHODS)
    for result in sorted(results, key=lambda r: (names.index(r["algorithm"]), r["config"]["way"], r["config"]["shot"])):
        if not departures(result):
            name = ", ".join([figures.title(result["algorithm"]), *(f"`{flag}`" for flag in variation(result))])
            setting = f"{name} in {result['config']['way']}-way {result['config']['shot']}-shot"
            longest[setting] = max(longest.get(setting, (0, 0)), (result["meta_steps"], published_steps(result)))
    shown = [f"{setting} ({steps:,} of {full:,})" for setting, (steps, full) in longest.items() if steps < full]
    if not shown:
        return ""
    return (
        "Trained with fewer meta-steps than the recipe has, and therefore in the table of all methods below: "
        f"{'; '.join(shown)}. Settings that are in no table were not trained.\n\n"
    )


def section(of: Mapping[str, Sequence[dict]], of_name: Mapping[str, str]) -> str:
    """The text of the report.

    Args:
      of: the results by experiment.
      of_name: what `tables` gives.
    """
    photographs = other_kinds = ""
    if of["images"]:
        photographs = (
            "\n\n## Photographs\n\n5-way accuracy in %, with its 95 % interval over the test episodes, on 100 classes "
            "of Tiny ImageNet at 64x64 pixels: 64 for training (300 images each), 16 for validation and 20 for the "
            "test (200 images each). `experiments/tiny_imagenet_split.json` names them. They are not "
            "miniImageNet, so only the order of the methods is comparable with its published numbers, which are those "
            "of full trainings. A method with one last layer is trained for each shot. LEO learns on the features of "
            "the pretrained classifier, whose minutes are not in its own. Inductive and transductive tests do not "
            "compare. Among the inductive tests in 1-shot, LEO is 9.6 points ahead of MAML, which had 1,000 "
            "meta-steps of its 60,000, and centroids of the same features are 7.9 ahead of MAML. A longer training of "
            "MAML was not tested inductively. LEO is ahead of the centroids by 1.7 points in 1-shot, about the "
            "interval of the difference, and by 0.7 in 5-shot, which is within it. After 2,000 training episodes "
            "each, the meta-learner LSTM is 2.5 points ahead of MAML in 1-shot, more than the interval of the "
            "difference. MAML after 40,000 episodes is ahead of it. After 1,000 meta-steps FOMAML is 3.6 points ahead "
            "of MAML in 5-shot; its training there was halted for a while, so its minutes are too many.\n\n"
            "Where the recipes are not the published ones: CAVIA has 32 filters, and not the 512 of its number. LEO "
            "has an outer rate of 0.001, and its authors one of 0.00027 (1-shot) or 0.00041 (5-shot), for features of "
            "a wide residual network. The meta-learner LSTM bounds each entry of the meta-gradient by 10, and its "
            "authors the norm by 0.25. MAML++ has the cosine schedule of its paper; the authors' settings have a "
            "constant rate. R2-D2 trains with a fixed number of examples, and its authors draw it.\n\n"
            f"{of_name['images']}"
        )
    if of["cross_domain"]:
        other_kinds = (
            "\n\n## Data sets of other kinds\n\nAccuracy in %, with its 95 % interval over the episodes, on six data "
            "sets that are new to the learners, and on new characters of Omniglot, where they were trained. Episodes "
            "are unbalanced: Meta-Dataset's protocol in small. Learners that the paired interval cannot tell apart "
            "share a rank.\n\n" + "\n\n".join(map(cross_domain_section, of["cross_domain"]))
        )
    return (
        "## Omniglot\n\nAccuracy over the test episodes with its 95 % interval, one number a seed. The characters "
        "are divided at random into those of training, validation and test. Normalisation is "
        "transductive, but for `--inductive`: the queries of an episode are normalised together. The test characters "
        "of Reptile are not rotated; those of the others are. GFLOP a task are the counted operations of a "
        "meta-step divided by its tasks; MB are the temporary memory of the compiled training program of one device, "
        "which grows with the tasks that are computed together. Operations and memory of MAML++ are "
        "those of an older program, which computed one query loss more; the present one has 5 % fewer operations. On "
        "the GPU four trainings ran at once, so its times are upper bounds. Only the last three columns compare costs "
        "on one machine: those of a meta-step of 8 tasks in 5-way 1-shot, measured in turns by `python -m "
        "benchmarks.methods`.\n\n"
        f"{omniglot_table(published_runs(of), with_costs=True)}\n\n"
        f"{shorter_trainings(gradient_based(of))}"
        f"### Equal meta-steps\n\n{EQUAL_BUDGET}\n\n"
        f"{of_name['omniglot-budget']}\n\n![accuracy against inner steps and time](figures/omniglot.png)\n\n"
        "### Variations\n\nTrainings that differ from the recipe in the flags that are shown. The "
        "default does not adapt the offsets of the "
        f"normalisation in the inner loop, as the authors' code does not.\n\n{of_name['omniglot-variations']}\n\n"
        f"### All methods\n\n{ALL_METHODS}\n\n{of_name['omniglot-all']}\n\n"
        "![accuracy against minutes of training](figures/omniglot_all.png)\n\n"
        f"{BELOW_PUBLISHED}\n\n{published.OMNIGLOT_SOURCES}\n\n"
        "### Sequences\n\nAccuracy in % on the 1st, 2nd, ... image of a class in a sequence of 50 images of 5 classes. "
        "The label of an image is shown with the next one, so the first image of a class can only be guessed. The "
        "published 1-shot and 5-shot numbers of MANN are the second and the fifth. The characters of the test are "
        f"drawn at random.\n\n{of_name['omniglot-instances']}" + photographs + other_kinds
    )


def draw(directory: Path, of: Mapping[str, Sequence[dict]]) -> None:
    """Writes the figures of the section."""
    for result in of["cross_domain"]:
        cross_domain.draw(directory / f"{cross_domain_name(result)}.png", result)
    if records := all_methods([result for result in of["omniglot"] if result["meta_steps"] and on_cpu(result)]):
        figures.accuracy_against_time(directory / "omniglot_all.png", longest(records, figures.TIMED_SETTINGS))
    shown = defaultdict(list)
    for result in sorted(equal_budget(gradient_based(of)), key=order_of):
        shown[result["algorithm"]].append(result)
    if shown:
        of_method = relative_costs()
        work = {
            name: seeds[0]["meta_steps"]
            * seeds[0]["config"]["meta_batch_size"]
            * of_method[name]["times_fomaml"]["median"]
            for name, seeds in shown.items()
            if name in of_method
        }
        relative = {name: tasks / work["fomaml"] for name, tasks in work.items()} if "fomaml" in work else {}
        figures.accuracy(directory / "omniglot.png", shown, relative)
