"""The part of the report on translation: tables, paired differences, examples and the figure."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, runs
from experiments.translation import METHODS

FlagsFn = Callable[[dict[str, Any]], Sequence[str]]
"""`(result) -> flags`, those of its command but for the seed."""


def section(results: Sequence[dict[str, Any]], flags_of: FlagsFn) -> str:
    """The Markdown of the section; empty without results."""
    if not results:
        return ""
    by_label = labelled(results, flags_of)
    protocol = next(iter(by_label.values()))["protocol"]
    config = next(iter(by_label.values()))["config"]
    return (
        "\n\n## Translation from few sentences\n\nA network that has learnt from "
        f"{', '.join(config['sources'])} to English is fine-tuned on few sentence pairs of a language that it has not "
        f"seen. BLEU of greedy translations in %, and in brackets the dev loss in nats per token: means over "
        f"{config['num_subsets']} draws of the pairs. The state is selected by {config['validation']}, a language that "
        "is fine-tuned in the same way and is neither trained on nor tested; the last state is the one of equal work. "
        f"BLEU is `{protocol['bleu']}` on {protocol['test_sentences']:,} captions, so the published numbers, which are "
        "those of news and parliament, cannot be compared.\n\n"
        f"{_scores(by_label)}\n\n"
        "### Does the meta-learned start help?\n\nDifferences from pretraining, paired by language, number of pairs "
        "and draw; negative losses and positive BLEU are in favour of the method. The first interval is over the "
        f"fine-tunings of a language (Student's t), the second over {len(_rows(by_label)[0]['resampled_bleu'])} test "
        "sets that are drawn with replacement; both are of 95 %. The fine-tunings of a language share test sentences "
        "and the training, so neither says what another seed would give.\n\n"
        f"{_differences(by_label)}\n\n![BLEU against sentence pairs](figures/translation.png)\n\n"
        f"### Before and after the fine-tuning\n\n{_examples(by_label)}"
    )


def labelled(results: Sequence[dict[str, Any]], flags_of: FlagsFn) -> dict[str, dict[str, Any]]:
    """The first seed of each command, by its method and flags."""
    names = list(METHODS)
    found: dict[str, dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: (-names.index(r["algorithm"]), r["meta_steps"], r["seed"])):
        flags = [f"`{flag}`" for flag in flags_of(result) if not flag.startswith("--num-meta-steps")]
        title = "from scratch" if not result["meta_steps"] else figures.title(result["algorithm"])
        if result["algorithm"] == "pretrained" and result["meta_steps"]:
            title = "pretraining"
        found.setdefault(", ".join([title, *flags]), result)
    return found


def draw(file: Path, results: Sequence[dict[str, Any]], flags_of: FlagsFn) -> None:
    """BLEU against the number of sentence pairs."""
    curves = {}
    for label, result in labelled(results, flags_of).items():
        for state, shown in (("selected", label), ("last", f"{label}, last state")):
            rows = [row for row in result["evaluations"] if row["state"] == state]
            if rows and (state == "selected" or label == "pretraining"):
                curves[shown] = rows
    figures.low_resource(file, curves)


def _rows(by_label: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for result in by_label.values() for row in result["evaluations"]]


def _scores(by_label: Mapping[str, dict[str, Any]]) -> str:
    sizes = sorted({row["pairs"] for row in _rows(by_label)})
    lines = []
    for label, result in by_label.items():
        cells: dict[tuple, dict[int, str]] = {}
        for row in result["evaluations"]:
            cell = f"{np.mean(row['bleu']):.2f} ({np.mean(row['nll']):.3f})"
            cells.setdefault((row["language"], row["state"], row["step"]), {})[row["pairs"]] = cell
        for (language, state, step), of_size in cells.items():
            which = f"{state}, step {step:,}" if result["meta_steps"] else ""
            numbers = [of_size.get(size, "") for size in sizes]
            lines.append([label, which, f"{result['protocol']['pairs_trained'] / 1000:.0f}k", language, *numbers])
    header = ["", "state", "pairs trained", "language", *(f"{size} pairs" for size in sizes)]
    return runs.markdown_table(header, lines)


def _differences(by_label: Mapping[str, dict[str, Any]]) -> str:
    lines = []
    for label, result in by_label.items():
        if result["algorithm"] == "pretrained":
            continue
        for name, baseline in by_label.items():
            if baseline["algorithm"] != "pretrained" or not baseline["meta_steps"]:
                continue
            if baseline["config"]["lexical"] != result["config"]["lexical"]:
                continue
            for state, what in (("last", "equal work"), ("selected", "stopped in time")):
                for language in dict.fromkeys(row["language"] for row in result["evaluations"]):
                    pair = [_of(one, language, which) for one, which in ((result, "selected"), (baseline, state))]
                    if all(pair):
                        lines.append([label, f"{name}, {what}", language, *_difference(*pair)])
    header = ["", "against", "language", "dev loss", "BLEU, over fine-tunings", "BLEU, over test sets"]
    return runs.markdown_table(header, lines)


def _of(result: dict[str, Any], language: str, state: str) -> list[dict[str, Any]]:
    """The fine-tuned rows of a language and a state; those of the selected one if it is the last too."""
    states = {row["state"] for row in result["evaluations"]}
    chosen = state if state in states else "selected"
    return [
        row for row in result["evaluations"] if (row["language"], row["state"]) == (language, chosen) and row["pairs"]
    ]


def _difference(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Cells with the paired differences of the loss and of BLEU, and the interval of BLEU over resampled test sets."""

    def paired(name: str) -> np.ndarray:
        both = zip(rows, others, strict=True)
        return np.concatenate([np.subtract(row[name], other[name]) for row, other in both])

    cells = []
    for name, digits in (("nll", 3), ("bleu", 2)):
        found = runs.mean_and_interval(paired(name))
        cells.append(runs.format_mean(found["mean"][0], found["ci95"][0], digits=digits))
    resampled = np.mean(
        [np.subtract(row["resampled_bleu"], other["resampled_bleu"]) for row, other in zip(rows, others, strict=True)],
        axis=0,
    )
    low, high = np.percentile(resampled, [2.5, 97.5])
    return [*cells, f"{low:.2f} to {high:.2f}"]


def _examples(by_label: Mapping[str, dict[str, Any]]) -> str:
    """Test sentences with their translations by the first method that adapts."""
    label, result = next(
        ((label, result) for label, result in by_label.items() if result["algorithm"] != "pretrained"),
        next(iter(by_label.items())),
    )
    lines = [
        [example["language"], *(example[name].replace("|", "/") for name in ("source", "before", "after", "reference"))]
        for example in result["examples"]
    ]
    largest = max(result["config"]["sizes"])
    header = ["", "source", "before", f"after {largest:,} pairs", "reference"]
    return f"By {label}, beam {result['config']['beam']}.\n\n{runs.markdown_table(header, lines)}"
