"""Figures of the experiments."""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from experiments.intervals import mean_and_interval
from experiments.verification import ROC_POINTS
from maml_jax import CATALOGUE

MARKERS = "osD^v<>pP*X"
PUBLISHED_MARKERS = "x+14"
DASHES = ("-", "--", ":", "-.")
TIMED_SETTINGS = ((5, 1), (20, 1))
"""Way and shot of the panels of `accuracy_against_time`."""


def line_style(index: int) -> dict[str, Any]:
    """The line of a number, which can be told from its neighbours in grey too."""
    color = f"C{index % 10}"
    return {
        "color": color,
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white" if index % 2 else color,
    }


def title(algorithm: str) -> str:
    """The name of an algorithm in tables and figures."""
    if algorithm in CATALOGUE:
        return CATALOGUE[algorithm].title
    return {"oracle": "oracle (amplitude and phase as inputs)"}.get(algorithm, algorithm)


def plain(text: str) -> str:
    """Text that matplotlib shows as it is, such as the name of a directory, without mathematics between dollars."""
    return text.replace("$", r"\$")


def save(figure: plt.Figure, file: Path) -> None:
    """Writes a figure, each file atomically; beside a PNG it writes a PDF for papers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    files = [file, file.with_suffix(".pdf")] if file.suffix == ".png" else [file]
    try:
        for target in files:
            # In memory first: on a full disk matplotlib hides the error of the system behind one of its own.
            drawn = io.BytesIO()
            # Without a date, equal figures are equal files.
            metadata = {"CreationDate": None} if target.suffix == ".pdf" else None
            figure.savefig(drawn, dpi=120, format=target.suffix[1:], metadata=metadata)
            partial = target.with_name(f".{target.name}")
            try:
                partial.write_bytes(drawn.getvalue())
                os.replace(partial, target)
            except OSError as error:
                with contextlib.suppress(OSError):  # the disk may have become read-only
                    partial.unlink()
                raise OSError(f"the figure {target} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def predictions(file: Path, curves: dict[str, list[dict]]) -> None:
    """A row of tasks for every algorithm: the true curve, the support points, predictions before and after.

    Args:
      file: the PNG to write.
      curves: by algorithm, the tasks as `experiments.sinusoid.predictions` returns them.
    """
    num_tasks = len(next(iter(curves.values())))
    figure, grid = plt.subplots(
        len(curves), num_tasks, figsize=(4 * num_tasks, 3 * len(curves) + 0.6), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    styles = {0: ("C7", ":"), 1: ("C0", "--"), 10: ("C0", "-")}
    for row, (algorithm, tasks) in zip(grid, curves.items(), strict=True):
        for axes, task in zip(row, tasks, strict=True):
            axes.plot(task["x"], task["true"], color="C3", linewidth=2.5, alpha=0.5, label="true curve")
            for steps, values in task["predicted"].items():
                colour, dashes = styles[steps]
                label = "before adapting" if steps == 0 else f"after {steps} step{'s' * (steps > 1)}"
                axes.plot(task["x"], values, color=colour, linestyle=dashes, label=label)
            axes.plot(*task["support"], "^", color="C2", markersize=9, label="support points")
            axes.set_ylim(-6, 6)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{title(algorithm)}\ny")
    for axes in grid[-1]:
        axes.set_xlabel("x")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save(figure, file)


def inner_curves(file: Path, evaluations: dict[str, list[dict]]) -> None:
    """Median squared error against inner steps, a panel for every number of support points.

    The median and not the mean, because one diverged task makes a mean meaningless.

    Args:
      file: the PNG to write.
      evaluations: by label, the "evaluations" of a sinusoid result, or those of several seeds, which are averaged.
    """
    shots = sorted({evaluation["shot"] for of_label in evaluations.values() for evaluation in of_label})
    figure, row = plt.subplots(
        1, len(shots), figsize=(4.5 * len(shots), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, shot in zip(row[0], shots, strict=True):
        for index, (label, of_label) in enumerate(evaluations.items()):
            medians = [e["metrics"]["mse"]["median"] for e in of_label if e["shot"] == shot]
            if medians:  # not every command has tested with every number
                axes.plot(np.asarray(medians, float).mean(0), markersize=5, label=title(label), **line_style(index))
        axes.set(title=f"{shot} support points", xlabel="inner gradient steps at test", yscale="log", ylim=(1e-3, 10))
        axes.grid(alpha=0.3)
    row[0][0].set_ylabel("median squared error on new points")
    handles = {label: line for axes in row[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", frameon=False, ncols=2 * len(shots))
    save(figure, file)


def orders(
    file: Path,
    curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    panels: Mapping[tuple[str, str], Mapping[str, Any]],
) -> None:
    """First against second order: the training objective, and the score of the test against inner steps.

    Args:
      file: the figure to write.
      curves: by label, the records of metrics.jsonl of each seed.
      panels: by title and name of the score, the score after 0, 1, ... inner steps of each seed, [seeds, K+1], by
        label. Errors have a logarithmic axis. The band goes from the smallest to the largest seed.
    """
    figure, (training, *tests) = _panels(1 + len(panels))
    labels = list(dict.fromkeys([*curves, *(label for panel in panels.values() for label in panel)]))
    styles = {label: line_style(index) for index, label in enumerate(labels)}

    def draw(axes: plt.Axes, label: str, steps: Sequence[int], of_seeds: np.ndarray) -> None:
        style = styles[label] | {"markersize": 5, "markevery": max(1, len(steps) // 10)}
        axes.plot(steps, of_seeds.mean(0), label=label, **style)
        axes.fill_between(steps, of_seeds.min(0), of_seeds.max(0), alpha=0.2, color=style["color"])

    for label, seeds in curves.items():
        draw(training, label, *of_common_steps(seeds, "loss"))
    training.set(title="sinusoids, training", xlabel="meta-steps", ylabel="objective", yscale="log")
    training.xaxis.set_major_locator(MaxNLocator(4))
    for axes, ((text, score), panel) in zip(tests, panels.items(), strict=True):
        adapted = []
        for label, of_seeds in panel.items():
            values = np.asarray(of_seeds, float)
            draw(axes, label, range(values.shape[1]), values)
            finite = values[:, 1:][np.isfinite(values[:, 1:])]
            adapted += finite.tolist()
        axes.set(title=text, xlabel="inner steps at test", ylabel=score)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "error" in score:
            axes.set_yscale("log")
        elif adapted:  # before the first step all guess
            axes.set_ylim(min(adapted) - 4, max(adapted) + 1)
    for axes in (training, *tests):
        if axes.get_yscale() == "log":
            _plain_logarithmic(axes.yaxis)
    _legend_below(figure, [training, *tests])
    save(figure, file)


def mean_and_bar(of_seeds: Sequence[tuple[float, float]]) -> tuple[float, np.ndarray]:
    """The mean over seeds, and how far its bar goes below and above, [2, 1] as matplotlib takes it.

    Args:
      of_seeds: mean and half-width of the 95 % interval of every seed; None if they are not finite.

    Returns:
      The bar of several seeds ends at the smallest and the largest, that of one at its interval.
    """
    means, intervals = np.transpose(np.asarray(of_seeds, float))
    mean = means.mean()
    ends = (mean - means.min(), means.max() - mean) if len(means) > 1 else (intervals[0], intervals[0])
    return float(mean), np.reshape(ends, (2, 1))


def accuracy(file: Path, results: Mapping[str, Sequence[dict]], work: Mapping[str, float]) -> None:
    """Test accuracy against inner steps, and against the time of training.

    Args:
      file: the PNG to write.
      results: by algorithm, the content of results.json of every seed; see `mean_and_bar`.
      work: the time of training by algorithm, relative to that of FOMAML; those of others are not drawn.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    lowest, most_steps = 100.0, 16
    for index, (algorithm, seeds) in enumerate(results.items()):
        found = [result["metrics"]["accuracy"] for result in seeds]
        mean = 100 * np.mean(np.asarray([of_seed["mean"] for of_seed in found], float), axis=0)  # NaN for null
        shown, style = np.arange(1, min(len(mean), most_steps + 1)), line_style(index)
        left.plot(shown, mean[shown], markersize=5, label=title(algorithm), **style)
        lowest = np.nanmin([lowest, *mean[1:]])
        if algorithm in work:
            last, bar = mean_and_bar(
                [100 * np.asarray((of_seed["mean"][-1], of_seed["ci95"][-1]), float) for of_seed in found]
            )
            right.errorbar(work[algorithm], last, bar, capsize=3, **style | {"linestyle": "none"})
    left.set(xlabel=f"inner steps at test, up to {most_steps}", ylabel="test accuracy, %", ylim=(lowest - 4, None))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(
        xlabel="computed time of the training, relative to FOMAML",
        ylabel="test accuracy after the last step, %",
    )
    right.set_xscale("log")
    _plain_logarithmic(right.xaxis)
    right.margins(x=0.25)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save(figure, file)


def accuracy_against_time(file: Path, records: list[dict]) -> None:
    """Test accuracy of every method against the minutes of its training, for `TIMED_SETTINGS`.

    Args:
      file: the PNG to write.
      records: as `experiments.few_shot_report.all_methods` returns them.
    """
    size = (14, max(5.0, 0.25 * len(records)))  # the legend has a row for each
    figure, row = plt.subplots(1, len(TIMED_SETTINGS), figsize=size, sharey=True, layout="constrained")
    drawn = {}
    for index, record in enumerate(records):
        for axes, setting in zip(row, TIMED_SETTINGS, strict=True):
            if setting in record["accuracy"]:
                mean, bar = mean_and_bar(record["accuracy"][setting])
                label = f"{record['name'].replace('`', '')}, {record['first']['meta_steps']:,}"
                if record["first"]["algorithm"] == "leo":
                    label += " (without its features)"
                style = {"fmt": MARKERS[index % len(MARKERS)], "color": plt.get_cmap("tab20")(index % 20)}
                on_new_alphabets = record["first"]["protocol"].get("split_by") == "alphabet"
                style["fillstyle"] = "none" if on_new_alphabets else "full"
                drawn[label] = axes.errorbar(record["minutes"][setting], mean, bar, capsize=3, **style)
            # The last points below 100 % are the dear ones, and on this axis they are as wide as the first.
            axes.set(
                xlabel="minutes of training on a CPU",
                ylabel="test accuracy, % (logit axis)",
                xscale="log",
                yscale="logit",
            )
            axes.set_title(f"{setting[0]}-way {setting[1]}-shot")
            axes.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99]))
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            _plain_logarithmic(axes.xaxis)
            axes.grid(alpha=0.3)
    if drawn:
        title_of_legend = "method, meta-steps; hollow: tested on new alphabets"
        figure.legend(drawn.values(), drawn, loc="outside right center", fontsize=9, title=title_of_legend)
    save(figure, file)


def of_common_steps(seeds: Sequence[Sequence[Mapping[str, Any]]], name: str) -> tuple[list[int], np.ndarray]:
    """The meta-steps at which every seed has logged a number, and the numbers [seeds, steps], NaN for null.

    A seed that was continued has logged at other steps than one that was trained at once.
    """
    logged = [{record["step"]: record[name] for record in of_seed if name in record} for of_seed in seeds]
    steps = sorted(set.intersection(*map(set, logged)))
    return steps, np.array([[of_seed[step] for step in steps] for of_seed in logged], float)


def learning_curves(file: Path, logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """The training objective against meta-steps, and the validation score beside it if there is one.

    Where runs have logged the same score of training tasks, it is a thin dotted line without markers.

    Args:
      file: the figure to write.
      logs: by label, the records of metrics.jsonl of each seed. Of several seeds the mean and its 95 % interval are
        drawn; on a logarithmic axis, those of the logarithms.
    """
    is_validated = any("val" in record for seeds in logs.values() for record in seeds[0])
    size = (11 if is_validated else 6.5, 4.6)
    figure, row = plt.subplots(1, 1 + is_validated, figsize=size, squeeze=False, sharex=True, layout="constrained")
    losses = [record["loss"] for seeds in logs.values() for of_seed in seeds for record in of_seed if "loss" in record]
    is_log, lines = 0 < min((loss for loss in losses if loss is not None), default=0.0) < math.inf, {}
    is_compared = False
    for index, (label, seeds) in enumerate(logs.items()):
        style = line_style(index) | {"markersize": 5}
        text = plain(title(label)) + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")
        for axes, name in zip(row[0], ("loss", "val"), strict=False):
            steps, values = of_common_steps(seeds, name)
            onto, back = (np.log, np.exp) if name == "loss" and is_log else (np.asarray, np.asarray)
            shown = back(onto(values).mean(0))
            (lines[text],) = axes.plot(steps, shown, markevery=max(1, len(steps) // 12), **style)
            steps_of_training, of_training = of_common_steps(seeds, "train")
            if name == "val" and steps_of_training:
                axes.plot(steps_of_training, of_training.mean(0), color=style["color"], linestyle=":", linewidth=1.2)
                is_compared = True
            if len(seeds) > 1 and steps:
                mean, half = (np.array(part) for part in mean_and_interval(onto(values)).values())
                axes.fill_between(steps, back(mean - half), back(mean + half), alpha=0.2, color=style["color"])
    has_bands = any(len(seeds) > 1 for seeds in logs.values())
    row[0][0].set(ylabel="training objective, which depends on the method")
    row[0][0].set_title("bands: 95 % interval over seeds" if has_bands else "", fontsize=10)
    if is_log:
        row[0][0].set_yscale("log")
        _plain_logarithmic(row[0][0].yaxis)
    if is_validated:
        row[0][1].set(ylabel="validation score; thin dots: training tasks" if is_compared else "validation score")
    for axes in row[0]:
        axes.set_xlabel("meta-steps")
        axes.grid(alpha=0.3)
    columns = min(3 if is_validated else 2, len(lines))
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=columns, frameon=False)
    save(figure, file)


def schedules(file: Path, methods: dict[str, dict]) -> None:
    """The rates and the momentum of every step of a training run, and the losses after it.

    Args:
      file: the PNG to write.
      methods: by name, the "methods" of a result of `experiments.hyperparameters`.
    """
    names = [name for name in methods if name != "before learning"]
    figure, (rates, momenta, scores) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for index, name in enumerate(names):
        for layer, dashes in zip(methods[name]["hyperparameters"]["log_rates"], ("-", "--", ":", "-."), strict=False):
            values = np.exp(methods[name]["hyperparameters"]["log_rates"][layer])
            is_same_in_all = name in ("constant rate", "linear decay")
            if is_same_in_all and dashes != "-":
                continue
            label = name if is_same_in_all else f"{name}, {layer}"
            style = {"color": f"C{index}", "marker": MARKERS[index], "markersize": 4, "linewidth": 1}
            style["markevery"] = max(1, len(values) // 8)
            values = np.exp(_smooth(np.log(values))) if name == "hypergradients" else values
            rates.plot(values, linestyle=dashes, label=label, **style)
        momentum = 1 / (1 + np.exp(-np.asarray(methods[name]["hyperparameters"]["momentum_logits"])))
        momenta.plot(_smooth(momentum) if name == "hypergradients" else momentum, label=name, **style)
    rates.set(xlabel="mini-batch; hypergradients: means over 21", ylabel="learning rate", yscale="log")
    momenta.set(xlabel="mini-batch; hypergradients: means over 21", ylabel="momentum", ylim=(-0.03, 1.03))
    rates.legend(fontsize="small")
    momenta.legend(fontsize="small")
    for index, name in enumerate(names):
        found = methods[name]
        for metric, filled in (("heldout_loss", "none"), ("test_loss", f"C{index}")):
            mean, ci95 = found[metric]["mean"], found[metric]["ci95"]
            if mean is not None:
                style = {"color": f"C{index}", "marker": MARKERS[index], "markerfacecolor": filled, "capsize": 3}
                scores.errorbar(mean, -index, xerr=ci95, **style)
    scores.set_yticks([-index for index in range(len(names))], names)
    scores.set(xlabel="loss, nats per digit: held out (hollow), test (filled)")
    for axes in (rates, momenta, scores):
        axes.grid(alpha=0.3)
    save(figure, file)


def _smooth(values: np.ndarray, width: int = 21) -> np.ndarray:
    """The mean over `width` neighbours, over fewer at both ends."""
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def memory(file: Path, rows: list[dict]) -> None:
    """The memory of a hypergradient against the length of the training run.

    Args:
      file: the PNG to write.
      rows: the "memory" of a result of `experiments.hyperparameters`.
    """
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for way in dict.fromkeys(row["way"] for row in rows):
        points = [(row["inner_steps"], row["temporary_bytes"] / 1e6) for row in rows if row["way"] == way]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
    axes.set(xlabel="mini-batches", ylabel="temporaries, MB", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, file)


def returns(
    file: Path, results: Mapping[str, Sequence[Mapping[str, Any]]], paper: Mapping[str, Sequence[float]]
) -> None:
    """The return against the updates at test, on the published goals, with the published returns where there are any.

    Args:
      file: the figure to write.
      results: by label, the content of results.json of each seed of `experiments.navigation`. The interval is over
        goals with one seed, and over seeds with several.
      paper: by label, the published returns.
    """
    figure, row = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for axes, (index, (label, of_seeds)) in itertools.product(row, enumerate(results.items())):
        metrics = [result["evaluations"][0]["metrics"]["return"] for result in of_seeds]
        means = np.array([metric["mean"] for metric in metrics], float)
        half = np.array(metrics[0]["ci95"] if len(metrics) == 1 else mean_and_interval(means)["ci95"], float)
        text = label + (f", {len(metrics)} seeds" if len(metrics) > 1 else "")
        axes.errorbar(range(means.shape[1]), means.mean(0), half, label=text, capsize=3, **line_style(index))
        if numbers := paper.get(label):
            shown, marker = numbers[: means.shape[1]], PUBLISHED_MARKERS[list(paper).index(label)]
            style = {"marker": marker, "color": f"C{index % 10}", "linestyle": "none", "markersize": 9}
            axes.plot(range(len(shown)), shown, label=f"{label}, published", **style)
    for axes in row:
        axes.set(xlabel="updates", ylabel="mean return")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    row[1].set(title="after the first update", xlim=(0.8, None), ylim=(-14, 0))
    _legend_below(figure, row)
    save(figure, file)


def regrets(file: Path, cells: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """The mean regret after each pull of a bandit, a panel for every size of the bandit.

    Args:
      file: the figure to write.
      cells: by title of the panel and label, the sum of the regrets up to each pull. The curves of learned policies are
        wider.
    """
    labels = list(dict.fromkeys(label for curves in cells.values() for label in curves))
    figure, panels = _panels(len(cells))
    for axes, (title, curves) in zip(panels, cells.items(), strict=True):
        for label, regret in curves.items():
            style = line_style(labels.index(label))
            if label.startswith(("RL²", "MAML")):
                style |= {"linewidth": 2.5, "alpha": 0.7}
            axes.plot(range(1, len(regret) + 1), regret, label=label, markevery=0.2, markersize=4, **style)
        axes.set(title=title, xlabel="pulls", ylabel="cumulative regret")
        axes.set_ylim(0, 1.1 * max([r[-1] for name, r in curves.items() if name != "random"], default=None))
    _legend_below(figure, panels)
    save(figure, file)


def _plain_logarithmic(axis: Axis) -> None:
    """Numbers such as 0.2 and 500 on a logarithmic axis, not powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _panels(count: int) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    """A figure with panels side by side."""
    figure, panels = plt.subplots(1, count, figsize=(max(4.2 * count, 5.5), 4.3), layout="constrained", squeeze=False)
    for axes in panels[0]:
        axes.grid(alpha=0.3)
    return figure, panels[0]


def _legend_below(figure: plt.Figure, panels: Sequence[plt.Axes]) -> None:
    """One legend with every label of all panels."""
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 3 if len(panels) < 3 else 5
    shown = [label.replace("`", "") for label in handles]
    figure.legend(handles.values(), shown, loc="outside lower center", ncols=columns, fontsize=8)


def roc(file: Path, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """The true accept rate against the false accept rate, a panel for every domain.

    Args:
      file: the figure to write.
      curves: by domain and label, the true accept rate at each of `verification.ROC_POINTS`.
    """
    figure, panels = _panels(len(curves))
    labels = list(dict.fromkeys(label for of_domain in curves.values() for label in of_domain))
    for axes, (domain, of_domain) in zip(panels, curves.items(), strict=True):
        for label, rates in of_domain.items():
            style = line_style(labels.index(label))
            axes.plot(ROC_POINTS, rates, label=label, markevery=max(1, len(ROC_POINTS) // 8), markersize=5, **style)
        axes.set(
            title=f"unseen domain: {domain}",
            xscale="log",
            xlabel="false accept rate",
            ylabel="true accept rate",
            xlim=(ROC_POINTS[0], 1),
            ylim=(0, 1),
        )
    _legend_below(figure, panels)
    save(figure, file)


def paths(file: Path, walks: Sequence[Mapping[str, Any]]) -> None:
    """Paths of a navigator before each update and after the last, a row for every goal.

    Args:
      file: the figure to write.
      walks: for each goal "goal" [2] and "paths" [K+1, H, N, 2].
    """
    num_updates = len(walks[0]["paths"])
    size = (2.3 * num_updates + 0.6, 2.3 * len(walks) + 0.5)
    figure, grid = plt.subplots(
        len(walks), num_updates, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for number, (row, walk) in enumerate(zip(grid, walks, strict=True)):
        for update, (axes, of_update) in enumerate(zip(row, walk["paths"], strict=True)):
            axes.plot(of_update[..., 0], of_update[..., 1], color="C0", linewidth=0.8, alpha=0.6)
            axes.plot(0.0, 0.0, "s", color="0.2", markersize=5)
            axes.plot(*walk["goal"], "*", color="C3", markersize=13)
            axes.set(xlim=(-0.9, 0.9), ylim=(-0.9, 0.9), aspect="equal")
            axes.grid(alpha=0.3)
            if number == 0:
                axes.set_title("before adapting" if update == 0 else f"after {update} update{'s' * (update > 1)}")
    handles = [
        plt.Line2D([], [], color="C0", label="trajectory"),
        plt.Line2D([], [], color="0.2", marker="s", linestyle="none", label="start"),
        plt.Line2D([], [], color="C3", marker="*", markersize=11, linestyle="none", label="goal, which is not seen"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    save(figure, file)


def mazes(file: Path, drawn: Sequence[Mapping[str, Any]]) -> None:
    """Walks through mazes, a row for every maze and a column for every walk.

    Args:
      file: the figure to write.
      drawn: for each maze "maze", a `maml_jax.tasks.mazes.Maze`, and "walks", the squares [steps + 1, 2] of each walk.
    """
    num_walks = len(drawn[0]["walks"])
    size = (3.0 * num_walks + 0.4, 3.0 * len(drawn) + 0.5)
    figure, grid = plt.subplots(len(drawn), num_walks, figsize=size, squeeze=False, layout="constrained")
    for row, record in zip(grid, drawn, strict=True):
        maze = record["maze"]
        for index, (axes, squares) in enumerate(zip(row, record["walks"], strict=True)):
            axes.imshow(maze.walls, cmap="Greys", vmin=0, vmax=1.6)
            # Steps that are taken twice lie side by side.
            beside = np.linspace(-0.25, 0.25, len(squares))
            axes.plot(squares[:, 1] + beside, squares[:, 0] + beside, color="C0", linewidth=1.2)
            axes.plot(maze.start[1], maze.start[0], "s", color="0.2", markersize=7)
            axes.plot(maze.goal[1], maze.goal[0], "*", color="C3", markersize=15)
            end = "reaches the goal" if np.array_equal(squares[-1], maze.goal) else "is given up"
            axes.set_title(f"walk {index + 1} {end} after {len(squares) - 1} steps", fontsize=9)
            axes.set(xticks=[], yticks=[])
    handles = [
        plt.Line2D([], [], color="C0", label="path"),
        plt.Line2D([], [], color="0.2", marker="s", linestyle="none", label="start"),
        plt.Line2D([], [], color="C3", marker="*", markersize=11, linestyle="none", label="goal"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    save(figure, file)


def low_resource(file: Path, groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """BLEU against the number of sentence pairs: a row of panels for every held-out language, a column for every group.

    Args:
      file: the figure to write.
      groups: by title and label, "evaluations" of a result of `experiments.translation`. Those with the state of the
        first one are drawn; the interval is over the draws.
    """
    languages = list(
        dict.fromkeys(row["language"] for group in groups.values() for rows in group.values() for row in rows)
    )
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    size = max(3.8 * len(groups), 5.5), 3.2 * len(languages) + 1.0
    figure, grid = plt.subplots(
        len(languages), len(groups), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey="row"
    )
    for language, panels in zip(languages, grid, strict=True):
        for axes, (title, group) in zip(panels, groups.items(), strict=True):
            for label, rows in group.items():
                shown = [row for row in rows if row["language"] == language and row["state"] == rows[0]["state"]]
                each = [np.asarray(row["bleu"]) for row in shown]
                axes.errorbar(
                    [row["pairs"] for row in shown],
                    [values.mean() for values in each],
                    [mean_and_interval(values)["ci95"][0] if len(values) > 1 else 0.0 for values in each],
                    label=label,
                    capsize=3,
                    **line_style(labels.index(label)),
                )
            axes.set_title(", ".join([f"held out: {language}", *filter(None, [title])]))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("BLEU, greedy")
    for axes in grid[-1]:
        axes.set_xlabel("sentence pairs")
    _legend_below(figure, grid.ravel()[: len(groups)])
    save(figure, file)
