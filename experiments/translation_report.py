"""The part of the report on translation: tables, paired differences, examples and the figure."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, intervals, runs
from experiments.low_resource import over_draws
from experiments.translation import METHODS, AdamSteps, pairs_seen

FlagsFn = Callable[[dict[str, Any]], Sequence[str]]
"""`(result) -> flags`, those of its command but for the seed."""
OF_TRAINING = {
    *("algorithm", "seed", "num_meta_steps", "pretrain_steps", "shot", "val_every", "log_every"),
    *(field.name for field in dataclasses.fields(AdamSteps)),
}
"""The settings in which results that are compared may differ."""


def section(results: Sequence[dict[str, Any]], flags_of: FlagsFn) -> str:
    """The Markdown of the section; empty without results."""
    if not results:
        return ""
    by_label = labelled(results, flags_of)
    first = next(iter(by_label.values()))
    protocol, config = first["protocol"], first["config"]
    return (
        "\n\n## Translation from few sentences\n\nA network that has learned to translate "
        f"{', '.join(config['sources'])} to English is fine-tuned on few sentence pairs of a language that it has not "
        "seen. BLEU of greedy translations in %, and in brackets the dev loss in nats per token: means over "
        f"{config['num_subsets']} draws of the pairs. The state is selected by the {protocol['selection']}; "
        f"{config['validation']} is neither trained on nor tested. The last states have seen equally many sentence "
        "pairs, for which the exact meta-gradient takes more operations than first order. "
        "The pairs of a held-out language are of other lines than the training pairs; two of these "
        "captions also stand in a training line. Subwords are learned from the text of "
        f"all languages. BLEU is `{protocol['bleu']}` on {protocol['test_sentences']:,} "
        "captions; the published numbers are those of news and parliament, and cannot be compared. With `--lexical`, "
        "subword vectors are learned from the text of each language and rotated onto the English ones with the "
        "sentence pairs. Without pairs there is no rotation, so its column of 0 pairs is empty. The texts of these "
        "languages are translations of each other, which makes their vectors more alike than those of unrelated texts "
        f"would be.\n\n{_scores(by_label)}\n\n"
        "### Does the meta-learned start help?\n\nDifferences from pretraining, paired by language, number of pairs "
        "and draw; negative losses and positive BLEU are in favour of the method. The first two intervals are over the "
        "draws (Student's t). Each draw counts with its mean over the numbers of pairs, which are nested. "
        f"The last interval is over {len(first['evaluations'][-1]['resampled_bleu'])} test sets that "
        "are drawn with replacement. All are 95 % intervals of one training, so they do not say what another seed "
        f"would give.\n\n{_differences(by_label)}\n\n![BLEU against sentence pairs](figures/translation.png)\n\n"
        f"### Before and after the fine-tuning\n\n{_examples(by_label)}"
    )


def labelled(results: Sequence[dict[str, Any]], flags_of: FlagsFn) -> dict[str, dict[str, Any]]:
    """Each result by its method and flags, pretraining first.

    Raises:
      ValueError: if two results are of the same command and seed.
    """
    names = list(METHODS)
    found: dict[str, dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: (-names.index(r["algorithm"]), r["meta_steps"], r["seed"])):
        flags = [f"`{flag}`" for flag in flags_of(result) if not flag.startswith("--num-meta-steps")]
        title = "pretraining" if result["algorithm"] == "pretrained" else figures.title(result["algorithm"])
        label = ", ".join([title if result["meta_steps"] else "from scratch", *flags])
        if label in found:
            label += f", {result['meta_steps']:,} meta-steps, seed {result['seed']}"
        if label in found:
            raise ValueError(f"there are two results of {label}; remove one of the files")
        found[label] = result
    return found


def draw(file: Path, results: Sequence[dict[str, Any]], flags_of: FlagsFn) -> None:
    """BLEU against the number of sentence pairs, of the selected states, and of the last one of pretraining.

    Results with the same settings but for those of training share a panel.
    """
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for label, result in labelled(results, flags_of).items():
        of_network = [
            part for part in label.split(", ") if part.startswith("`--") and _setting(part) not in OF_TRAINING
        ]
        name = ", ".join(part for part in label.split(", ") if part not in of_network)
        group = groups[" ".join(of_network).replace("`", "")]
        states = ("selected", "last") if result["algorithm"] == "pretrained" else ("selected",)
        for state in [one for one in states if any(row["state"] == one for row in result["evaluations"])]:
            rows = [row for row in result["evaluations"] if row["state"] == state]
            group[name if state == "selected" else f"{name}, {state} state"] = rows
    figures.low_resource(file, groups)


def _setting(flag: str) -> str:
    """The name of the setting that a flag in backticks is of."""
    return flag.strip("`").split()[0].removeprefix("--").replace("-", "_")


def _scores(by_label: Mapping[str, dict[str, Any]]) -> str:
    sizes = sorted({row["pairs"] for result in by_label.values() for row in result["evaluations"]})
    lines = []
    for label, result in by_label.items():
        cells: dict[tuple, dict[int, str]] = {}
        for row in result["evaluations"]:
            cell = f"{np.mean(row['bleu']):.2f} ({np.mean(row['nll']):.3f})"
            cells.setdefault((row["language"], row["state"], row["step"]), {})[row["pairs"]] = cell
        for (language, state, step), of_size in cells.items():
            which = f"{state}, step {step:,}" if result["meta_steps"] else ""
            trained = f"{pairs_seen(result['config'], step) / 1000:.0f}k"
            lines.append([label, which, trained, language, *(of_size.get(size, "") for size in sizes)])
    header = ["", "state", "pairs seen", "language", *(f"{size:,} pairs" for size in sizes)]
    return intervals.markdown_table(header, lines)


def _differences(by_label: Mapping[str, dict[str, Any]]) -> str:
    lines = []
    for label, result in by_label.items():
        for name, baseline in by_label.items():
            if not _are_comparable(result, baseline):
                continue
            work = [one["protocol"]["pairs_trained"] for one in (result, baseline)]
            is_equal = abs(work[0] / work[1] - 1) < 0.01
            for state, what in (("last", "last, equal pairs" if is_equal else "last"), ("selected", "selected")):
                for language in result["config"]["held_out"]:
                    pair = _of(result, language, state), _of(baseline, language, state)
                    if all(pair):
                        lines.append([label, name, what, language, *_difference(*pair)])
    header = ["", "against", "states", "language", "dev loss", "BLEU", "BLEU, over test sets"]
    return intervals.markdown_table(header, lines)


def _are_comparable(result: dict[str, Any], baseline: dict[str, Any]) -> bool:
    """Whether the second is a pretraining with the settings of the first, but for those of training."""
    if result["algorithm"] == "pretrained" or baseline["algorithm"] != "pretrained" or not baseline["meta_steps"]:
        return False
    # A setting that is newer than a result had its default there.
    mine, its = (runs.as_json(METHODS[one["algorithm"]]) | one["config"] for one in (result, baseline))
    return all(mine[name] == its.get(name) for name in mine.keys() - OF_TRAINING - set(runs.IRRELEVANT))


def _of(result: dict[str, Any], language: str, state: str) -> list[dict[str, Any]]:
    """The fine-tuned rows of a language and a state; those of the selected one if it is the last too."""
    states = {row["state"] for row in result["evaluations"]}
    wanted = language, state if state in states else "selected"
    return [row for row in result["evaluations"] if (row["language"], row["state"]) == wanted and row["pairs"]]


def _difference(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Cells with the paired differences of the loss and of BLEU, and the interval of BLEU over resampled test sets."""

    def paired(name: str) -> list[np.ndarray]:
        return [np.subtract(row[name], other[name]) for row, other in zip(rows, others, strict=True)]

    cells = []
    for name, digits in (("nll", 3), ("bleu", 2)):
        found = over_draws(paired(name))
        cells.append(intervals.format_mean(found["mean"][0], found["ci95"][0], digits=digits))
    low, high = np.percentile(np.mean(paired("resampled_bleu"), axis=0), [2.5, 97.5])
    return [*cells, f"{low:.2f} to {high:.2f}"]


def _examples(by_label: Mapping[str, dict[str, Any]]) -> str:
    """Test sentences with their translations by the first method that adapts."""
    label, result = next(
        (pair for pair in by_label.items() if pair[1]["algorithm"] != "pretrained"), next(iter(by_label.items()))
    )
    parts = "source", "before", "after", "reference"
    lines = [[one["language"], *(one[part].replace("|", "/") for part in parts)] for one in result["examples"]]
    header = ["", "source", "before", f"after {result['config']['sizes'][-1]:,} pairs", "reference"]
    return f"By {label}, greedily.\n\n{intervals.markdown_table(header, lines)}"
