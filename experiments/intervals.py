"""Means with their 95 % intervals, and how tables print them."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit


def format_mean(mean: float | None, ci95: float | None = None, *, digits: int = 2, scale: float = 1.0) -> str:
    """A mean and its interval, as tables print it; "not finite" for None."""
    if mean is None:
        return "not finite"
    style = f".{digits}f" if abs(mean) < 1e4 else ".0e"
    return " ± ".join(format(scale * number, style) for number in (mean, ci95) if number is not None)


def percent(share: float | None) -> float | None:
    """A share in percent; None for what is not finite."""
    return None if share is None else 100 * share


def format_metric(metric: Mapping[str, Sequence[float | None]], step: int = -1, *, scale: float = 1.0) -> str:
    """The mean and interval of a metric of results.json after some inner steps, as tables print it.

    If episodes are not finite, it is their number and the mean of the others.
    """
    shown = format_mean(metric["mean"][step], metric["ci95"][step], scale=scale)
    if metric["mean"][step] is None and "num_nonfinite" in metric:
        others = format_mean(metric["finite_mean"][step], scale=scale)
        shown += f" in {metric['num_nonfinite'][step]} episodes (others {others})"
    return shown


def format_over_seeds(values: list[float | None]) -> str:
    """The mean over seeds and, from two on, the smallest and largest; or the number of seeds without a finite value."""
    if bad := sum(value is None for value in values):
        return f"not finite in {bad} of {len(values)}"
    numbers = [f"{value:.2f}" if value < 1000 else f"{value:.0e}" for value in (np.mean(values), *sorted(values))]
    to = " to " if min(values) < 0 else "–"
    return numbers[0] if len(values) == 1 else f"{numbers[0]} ({numbers[1]}{to}{numbers[-1]})"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_interval(values: np.ndarray) -> dict[str, list[float]]:
    """The mean over examples, episodes or seeds, and the half-width of its 95 % interval, by Student's t.

    Args:
      values: [E] or [E, K+1], E ≥ 2.

    Returns:
      "mean" and "ci95", lists of one or of K+1 numbers.
    """
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    with np.errstate(invalid="ignore", over="ignore"):
        error = values.std(0, ddof=1) / math.sqrt(len(values))
        return {"mean": values.mean(0).tolist(), "ci95": (stdtrit(len(values) - 1, 0.975) * error).tolist()}
