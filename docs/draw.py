"""Draws the figures of the documentation: `python docs/draw.py [DIRECTORY]`.

All of them can be read in grey.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

# The same file each time: no date, and no random names of paths.
STYLE = {"svg.hashsalt": "maml_jax", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
GREY = "0.6"


def episodes() -> plt.Figure:
    """Three tasks of one distribution, each with a support and a query set."""
    figure, row = plt.subplots(1, 3, figsize=(9, 2.9), sharey=True, layout="constrained")
    curve = np.linspace(-5, 5, 300)
    for index, (axes, amplitude, phase) in enumerate(zip(row, (4.0, 1.5, 3.0), (0.4, 2.6, 1.5), strict=True)):
        generator = np.random.default_rng(index)
        support, query = generator.uniform(-5, 5, 5), generator.uniform(-5, 5, 6)
        axes.plot(curve, amplitude * np.sin(curve - phase), color="0.8", linewidth=3)
        axes.plot(support, amplitude * np.sin(support - phase), "k^", markersize=8, label="support: adapt to these")
        axes.plot(
            query,
            amplitude * np.sin(query - phase),
            "o",
            color="k",
            markerfacecolor="w",
            label="query: scored on these",
        )
        axes.set(title=f"task {index + 1}", xlabel="x", ylim=(-5.5, 5.5), xticks=(-5, 0, 5), yticks=(-5, 0, 5))
    row[0].set_ylabel("y")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def loops() -> plt.Figure:
    """The outer loop moves θ; an inner loop branches off for every task."""
    figure, axes = plt.subplots(figsize=(7.4, 3.9), layout="constrained")
    axes.set(xlim=(-0.3, 10.2), ylim=(-0.4, 5.7), aspect="equal")
    axes.axis("off")
    path = np.array([(0.3, 4.4), (2.9, 3.5), (5.2, 2.8)])
    for start, end in itertools.pairwise(path):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "linewidth": 3, "color": "k", "shrinkB": 5})
    axes.plot(*path.T, "ko", markersize=9)
    axes.annotate("θ, before\ntraining", path[0], xytext=(2, 12), textcoords="offset points", va="bottom")
    axes.annotate("θ", path[2], xytext=(-3, 10), textcoords="offset points", va="bottom", fontsize=14)
    axes.text(1.95, 4.25, "outer loop: optax\nsteps on θ", ha="left")
    targets = {"task 1": (9.2, 4.6), "task 2": (9.5, 2.1), "task 3": (6.2, 0.0)}
    for subscript, (name, target) in zip("₁₂₃", targets.items(), strict=True):
        target = np.array(target)
        points = path[2] + (target - path[2]) * np.array([0, 0.34, 0.6, 0.78])[:, None]
        points[1:-1] += np.array([[0.12, -0.1], [0.05, -0.05]])
        for start, end in itertools.pairwise(points):
            axes.annotate(
                "", end, start, arrowprops={"arrowstyle": "->", "linewidth": 1.5, "color": GREY, "shrinkA": 2}
            )
        axes.plot(*points[1:].T, "o", color=GREY, markersize=5)
        axes.plot(*target, "*", color="k", markersize=15, markerfacecolor="w")
        axes.annotate(
            f"best for {name}",
            target,
            xytext=(0, 10 if target[1] > 4 else -20),
            textcoords="offset points",
            ha="center",
        )
        axes.annotate(f"φ{subscript}", points[-1], xytext=(2, 9), textcoords="offset points", color="0.35", fontsize=13)
    axes.text(
        0.1, 1.1, "inner loops: a few gradient steps\non the support loss of one task,\nfrom θ to φ", color="0.35"
    )
    return figure


def second_order() -> plt.Figure:
    """How the end of an inner loop moves with its start, in truth and to first order."""
    figure, row = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    curvature, rate, num_steps = np.array([0.15, 1.0]), 0.35, 2
    x, y = np.meshgrid(np.linspace(-0.8, 4.4, 200), np.linspace(-0.9, 3.6, 200))
    start = np.array([1.3, 2.0])
    shift = np.array([1.7, 0.9])

    def descend(theta):
        points = [theta]
        for _ in range(num_steps):
            points.append(points[-1] - rate * curvature * points[-1])
        return np.array(points)

    first, moved = descend(start), descend(start + shift)
    for axes, is_exact in zip(row, (True, False), strict=True):
        levels = np.array([0.05, 0.3, 0.8, 1.6, 2.8, 4.5])
        axes.contour(x, y, 0.5 * (curvature[0] * x**2 + curvature[1] * y**2), levels, colors="0.85", linewidths=1)
        ends = moved if is_exact else first + shift
        for points, colour, dashes in ((first, "k", "-"), (ends, "k", "--")):
            axes.plot(*points.T, color=colour, linestyle=dashes, marker="o", markersize=5)
        for origin, end in ((first[0], ends[0]), (first[-1], ends[-1])):
            axes.annotate("", end, origin, arrowprops={"arrowstyle": "-|>", "linewidth": 2.5, "color": "0.45"})
        axes.annotate("θ", first[0], xytext=(-16, -2), textcoords="offset points", fontsize=13)
        axes.annotate("φ", first[-1], xytext=(-16, -6), textcoords="offset points", fontsize=13)
        axes.annotate("ε", (first[0] + ends[0]) / 2, xytext=(-12, 6), textcoords="offset points", fontsize=13)
        label = "(I − αH)² ε" if is_exact else "ε"
        axes.annotate(label, (first[-1] + ends[-1]) / 2, xytext=(4, -16), textcoords="offset points")
        axes.set(title="second order: what happens" if is_exact else "first order: what it assumes", aspect="equal")
        axes.set(xticks=[], yticks=[], xlabel="a flat direction of the support loss")
    row[0].set_ylabel("a steep direction")
    return figure


def pipeline() -> plt.Figure:
    """From a key to an update, all of it inside of one compiled program."""
    figure, axes = plt.subplots(figsize=(10, 3.3), layout="constrained")
    axes.set(xlim=(-0.2, 20.2), ylim=(0, 6.4))
    axes.axis("off")
    boxes = [
        ("key", "one for each\ntask and step", 0.2, 2.3),
        ("Episode", "sample_episode(key)", 3.6, 3.3),
        ("Episode[T]", "jax.vmap over\nT tasks", 8.0, 2.8),
        ("objective", "adapt to the support,\nscore the query", 11.9, 3.4),
        ("meta-gradient", "jax.grad, mean\nover the tasks", 16.4, 3.2),
    ]
    for title, text, left, width in boxes:
        axes.add_patch(
            FancyBboxPatch(
                (left, 2.5), width, 1.9, boxstyle="round,pad=0.05,rounding_size=0.2", facecolor="0.95", edgecolor="k"
            )
        )
        axes.text(left + width / 2, 4.0, title, ha="center", va="center", weight="bold")
        axes.text(left + width / 2, 3.15, text, ha="center", va="center", fontsize=9)
    for (_, _, left, width), (_, _, right, _) in itertools.pairwise(boxes):
        axes.annotate(
            "", (right - 0.1, 3.45), (left + width + 0.1, 3.45), arrowprops={"arrowstyle": "-|>", "color": "k"}
        )
    axes.annotate(
        "", (13.6, 2.4), (18.0, 2.4), arrowprops={"arrowstyle": "-|>", "color": "k", "connectionstyle": "arc3,rad=-0.4"}
    )
    axes.text(15.8, 0.75, "optax: the next θ", ha="center", fontsize=10)
    axes.add_patch(
        FancyBboxPatch(
            (-0.05, 0.35),
            19.95,
            4.75,
            boxstyle="round,pad=0.05,rounding_size=0.3",
            facecolor="none",
            edgecolor=GREY,
            linestyle="--",
        )
    )
    axes.text(
        10, 5.7, "one jax.jit, and a jax.lax.scan over hundreds of meta-steps", ha="center", va="center", color="0.3"
    )
    return figure


FIGURES = {"episodes": episodes, "loops": loops, "second_order": second_order, "pipeline": pipeline}


def main(directory: Path) -> None:
    """Writes all figures to a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")
