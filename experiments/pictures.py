"""Figures of single runs and of several: learning curves, and what adaptation does. They can be read in grey."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from experiments.figures import save

SUFFIXES = (".png", ".pdf", ".svg")
MAX_STEPS = 6
"""Inner steps whose predictions stand under one image."""
MAX_QUERIES = 30
"""Query images in one figure."""
MAX_PER_CLASS = 5
"""Images of one class in the support set, and in the query set, that are drawn."""
CELL, LINE, GAP = 0.9, 0.17, 0.12
"""Width of an image, height of a line of text, and space between, in inches."""


class ImageTask(NamedTuple):
    """One episode of images and what was predicted.

    Attributes:
      title: above the figure.
      support_images: [S, H, W, channels] in [0, 1].
      support_labels: [S] in 0..N−1.
      query_images: [M, H, W, channels].
      query_labels: [M].
      probabilities: [K+1, M, N], before the first and after every inner step; [1, M, N] if the learner does not
        iterate.
      is_ink: whether images of one channel are drawings, whose ink is 1 and drawn dark; otherwise 1 is white.
    """

    title: str
    support_images: np.ndarray
    support_labels: np.ndarray
    query_images: np.ndarray
    query_labels: np.ndarray
    probabilities: np.ndarray
    is_ink: bool = True


class CurveTask(NamedTuple):
    """One sinusoid and what was predicted.

    Attributes:
      title: above the figure.
      x: [n].
      true: [n].
      support: x [S] and y [S].
      predicted: [K+1, n].
      support_error: [K+1], mean squared error on the support points.
      query_error: [K+1], the same on the query points.
    """

    title: str
    x: np.ndarray
    true: np.ndarray
    support: tuple[np.ndarray, np.ndarray]
    predicted: np.ndarray
    support_error: np.ndarray
    query_error: np.ndarray


def check_suffix(name: str, file: Path) -> None:
    """Raises ValueError if a figure cannot be written to a file of this name."""
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{name} {file} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def steps_to_show(num_steps: int, most: int) -> list[int]:
    """At most `most` ≥ 3 numbers of inner steps out of 0..K: all, or 0, 1, ..., K, wider apart at the end."""
    if num_steps < most:
        return list(range(num_steps + 1))
    return sorted({0, *np.rint(np.geomspace(1, num_steps, most - 1)).astype(int).tolist()})


def step_name(step: int) -> str:
    """How a number of inner steps is called."""
    return "before" if step == 0 else f"{step} step{'s' * (step > 1)}"


def class_name(label: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    return chr(ord("A") + label % 26) + (str(label // 26) if label >= 26 else "")


def adapting_curve(files: Sequence[Path], task: CurveTask) -> None:
    """A panel for each inner step with the prediction at that step, and one with the errors.

    Args:
      files: the figures to write, .png, .pdf or .svg.
      task: what is drawn.
    """
    num_steps = len(task.predicted) - 1
    shown = steps_to_show(num_steps, 11)
    has_errors = num_steps > 0
    num_panels = len(shown) + has_errors
    columns = min(4, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(3.1 * columns, 2.4 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    height = 1.3 * max(1.0, np.abs(task.true).max(), np.abs(task.support[1]).max())
    for place, (axes, step) in enumerate(zip(grid, shown, strict=False)):
        axes.plot(task.x, task.true, color="0.75", linewidth=5, label="true curve", solid_capstyle="round")
        if place:
            before = task.predicted[shown[place - 1]]
            axes.plot(task.x, before, color="C0", linestyle=":", linewidth=1.3, label="prediction one panel earlier")
        axes.plot(task.x, task.predicted[step], color="C0", linewidth=1.8, label="prediction")
        axes.plot(*task.support, "^", color="black", markersize=7, label="support points")
        error = task.query_error[step]
        text = f"{error:.3g}" if np.isfinite(error) else "not finite"
        axes.set_title(f"{step_name(step) if num_steps else 'prediction'}: error {text}", fontsize=10)
        axes.set(ylim=(-height, height), xlim=(task.x[0], task.x[-1]))
        axes.grid(alpha=0.3)
        if place % columns == 0:
            axes.set_ylabel("y")
        if place + columns >= len(shown):
            axes.set_xlabel("x")
    if has_errors:
        _errors(grid[len(shown)], task)
    for axes in grid[num_panels:]:
        axes.set_axis_off()
    figure.suptitle(task.title, fontsize=11)
    handles, labels = grid[1 if len(shown) > 1 else 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for file in files:
        save(figure, file)


def _errors(axes: Axes, task: CurveTask) -> None:
    """The mean squared errors against inner steps."""
    for label, error, style in (
        ("query points", task.query_error, "ko-"),
        ("support points", task.support_error, "k^--"),
    ):
        values = np.where(np.isfinite(error) & (error > 0), error, np.nan)
        axes.plot(values, style, markersize=4, label=label, markerfacecolor="white" if "^" in style else "black")
    axes.set_title("mean squared error on", fontsize=10)
    axes.set(xlabel="inner steps", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def adapting_images(files: Sequence[Path], task: ImageTask) -> None:
    """A row for each class: its support images, and its query images with what was predicted at every inner step.

    A wrong prediction has a cross and a white bar, and a query that is wrong in the end a thick frame with a cross.

    Args:
      files: the figures to write, .png, .pdf or .svg.
      task: what is drawn.
    """
    way, num_steps = task.probabilities.shape[2], len(task.probabilities) - 1
    shown = steps_to_show(num_steps, MAX_STEPS)
    support = {label: np.flatnonzero(task.support_labels == label)[:MAX_PER_CLASS] for label in range(way)}
    most = max(1, min(MAX_PER_CLASS, MAX_QUERIES // way))
    query = {label: np.flatnonzero(task.query_labels == label)[:most] for label in range(way)}
    num_support, num_query = (max(map(len, part.values())) for part in (support, query))
    steps_width = 0.75 if num_steps else 0.1
    block_width = 0.35 + (num_support + num_query) * (CELL + GAP) + steps_width + 0.3
    row_height = CELL + len(shown) * LINE + 2 * GAP
    blocks = min(
        (n for n in range(1, way + 1)),
        key=lambda n: abs(math.log(n * block_width / (math.ceil(way / n) * row_height) / 1.5)),
    )
    rows = math.ceil(way / blocks)
    blocks = math.ceil(way / rows)
    notes = _notes(task, len(shown) < num_steps + 1, num_support, num_query)
    head, foot = 0.75 + 0.2 * task.title.count("\n"), 0.15 + 0.19 * len(notes)
    width, height = max(6.5, blocks * block_width + GAP), head + rows * row_height + foot
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    left = (width - blocks * block_width) / 2
    for label in range(way):
        block, row = divmod(label, rows)
        x, y = left + block * block_width, height - head - row * row_height
        axes.text(x + 0.15, y - CELL / 2, class_name(label), fontsize=14, fontweight="bold", ha="center", va="center")
        x += 0.35
        for place, index in enumerate(support[label]):
            _image(axes, task, task.support_images[index], x + place * (CELL + GAP), y)
        x += num_support * (CELL + GAP)
        if num_steps:
            for line, step in enumerate(shown):
                at = y - CELL - (line + 0.5) * LINE - 0.02
                axes.text(x + steps_width - 0.07, at, step_name(step), fontsize=7.5, ha="right", va="center")
        x += steps_width
        for place, index in enumerate(query[label]):
            _query(axes, task, index, shown, x + place * (CELL + GAP), y)
        if row == 0:
            for at, word in ((left + block * block_width + 0.35, "support"), (x, "query")):
                axes.text(at, y + 0.07, word, fontsize=9, style="italic", ha="left", va="bottom")
    axes.text(width / 2, height - 0.1, task.title, fontsize=11, ha="center", va="top")
    for line, note in enumerate(notes):
        axes.text(width / 2, foot - 0.1 - line * 0.19, note, fontsize=8, ha="center", va="center")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.set_axis_off()
    for file in files:
        save(figure, file)


def _notes(task: ImageTask, leaves_out_steps: bool, num_support: int, num_query: int) -> list[str]:
    """The lines below a figure."""
    notes = ["Bars: the class with the highest probability, and that probability.", "Cross and white bar: it is wrong."]
    if len(task.probabilities) > 1:
        notes[0] += ' "before": before the first inner step.'
    if np.any(task.probabilities[-1].argmax(-1) != task.query_labels):
        notes[-1] += " Thick frame with a cross: wrong in the end."
    totals = (np.bincount(labels).max() for labels in (task.support_labels, task.query_labels))
    shown = zip(("support", "query"), (num_support, num_query), totals, strict=True)
    left_out = [f"{count} of {total} {name} images of each class" for name, count, total in shown if count < total]
    left_out += ["some of the inner steps"] * leaves_out_steps
    return [*notes, *([f"Shown: {', '.join(left_out)}."] if left_out else [])]


def _image(axes: Axes, task: ImageTask, image: np.ndarray, x: float, y: float, *, is_wrong: bool = False) -> None:
    """Draws an image [H, W, channels] of a task with its upper left corner at (x, y)."""
    extent = (x, x + CELL, y - CELL, y)
    if image.shape[-1] == 1:
        colours = "gray_r" if task.is_ink else "gray"
        axes.imshow(image[..., 0], extent=extent, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(np.clip(image, 0, 1), extent=extent, interpolation="nearest")
    frame = {"linewidth": 2.8, "edgecolor": "black"} if is_wrong else {"linewidth": 0.6, "edgecolor": "0.5"}
    axes.add_patch(Rectangle((x, y - CELL), CELL, CELL, fill=False, zorder=3, **frame))
    if is_wrong:
        axes.text(
            x + CELL - 0.02, y - 0.02, "✗", fontsize=13, fontweight="bold", ha="right", va="top", zorder=4,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"},
        )  # fmt: skip


def _query(axes: Axes, task: ImageTask, index: int, shown: Sequence[int], x: float, y: float) -> None:
    """A query image, and below it a bar for each inner step."""
    label = task.query_labels[index]
    _image(axes, task, task.query_images[index], x, y, is_wrong=task.probabilities[-1, index].argmax() != label)
    for line, step in enumerate(shown):
        probabilities = task.probabilities[step, index]
        bottom = y - CELL - (line + 1) * LINE - 0.02
        if not np.isfinite(probabilities).all():
            axes.text(x + CELL / 2, bottom + LINE / 2, "✗ not finite", fontsize=7, ha="center", va="center")
            continue
        predicted = int(probabilities.argmax())
        is_wrong = predicted != label
        style = {"facecolor": "white", "edgecolor": "black"} if is_wrong else {"facecolor": "0.82", "edgecolor": "0.65"}
        axes.add_patch(
            Rectangle(
                (x, bottom + 0.015),
                CELL * probabilities[predicted],
                LINE - 0.03,
                linewidth=1.0 if is_wrong else 0.5,
                **style,
            )
        )
        axes.text(
            x + 0.03, bottom + LINE / 2 - 0.005,
            f"{'✗ ' if is_wrong else ''}{class_name(predicted)}  {100 * probabilities[predicted]:.0f} %",
            fontsize=7.5, va="center", zorder=4, fontweight="bold" if is_wrong else "normal",
            path_effects=[withStroke(linewidth=2.5, foreground="white")] if is_wrong else None,
        )  # fmt: skip
