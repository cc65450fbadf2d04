"""The report on verification in unseen domains."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import faces, intervals
from experiments.runs import flag
from maml_jax import CATALOGUE, DomainSplits

OF_METHOD = ("--across-weight", *(flag(field.name) for field in dataclasses.fields(DomainSplits)))
"""The flags in which results that are compared may differ."""


def section(results: Sequence[dict[str, Any]], flags_of: Callable[[dict[str, Any]], Sequence[str]]) -> str:
    """The part of the report on verification; empty without results.

    Args:
      results: of `experiments.faces`.
      flags_of: `(result) -> flags`, those of its command but for the seed.
    """
    tables = []
    for data in dict.fromkeys(result["config"]["data"] for result in results):
        groups = labelled([r for r in results if r["config"]["data"] == data], flags_of)
        tables.append(f"{data}:\n\n{_table(groups)}")
    return "\n\n".join(tables)


def labelled(
    results: Sequence[dict[str, Any]], flags_of: Callable[[dict[str, Any]], Sequence[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Results by method, losses and changed flags, the seeds together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    order = list(faces.METHODS)
    for result in sorted(results, key=lambda r: (r["config"]["losses"], order.index(r["algorithm"]), r["seed"])):
        flags = [f"`{one}`" for one in flags_of(result) if not one.startswith(("--losses", "--data"))]
        name = f"{CATALOGUE[result['algorithm']].title}, {result['config']['losses'].upper()}"
        groups.setdefault(", ".join([name, *flags]), []).append(result)
    return groups


def _table(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds, and beside all others the paired differences from ERM with the losses of their kind."""
    rows = []
    for label, of_seeds in groups.items():
        baseline = groups.get(_baseline(label), [])
        for index, row in enumerate(of_seeds[0]["evaluations"]):
            if row["by"] == "embedding":
                rates = {r["seed"]: _rate(r, index) for r in of_seeds}
                others = {r["seed"]: _rate(r, index) for r in baseline}
                paired = [rates[seed] - others[seed] for seed in rates if seed in others]
                is_other = len(paired) > 1 and of_seeds is not baseline
                rows.append(
                    [
                        label,
                        row["domain"],
                        str(len(rates)),
                        _cell(list(rates.values())),
                        _cell(paired) if is_other else "",
                    ]
                )
    first = next(iter(groups.values()))[0]
    rows += [["pixels", r["domain"], "", f"{100 * r['metrics']['tar_at_0.01']['mean'][0]:.2f}", ""]
             for r in first["evaluations"] if r["by"] == "pixels"]  # fmt: skip
    header = ["", "unseen domain", "seeds", "TAR at FAR 1 %", "difference to ERM"]
    return intervals.markdown_table(header, rows)


def _baseline(label: str) -> str:
    """The label of ERM with the losses and the data of another label."""
    _, losses_of, *flags = label.split(", ")
    kept = [one for one in flags if one.strip("`").split()[0] not in OF_METHOD]
    return ", ".join([CATALOGUE["erm"].title, losses_of, *kept])


def _rate(result: dict[str, Any], index: int) -> float:
    return result["evaluations"][index]["metrics"]["tar_at_0.01"]["mean"][0]


def _cell(values: list[float]) -> str:
    """The mean in % with its 95 % interval over seeds."""
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    found = intervals.mean_and_interval(np.array(values)[:, None])
    return intervals.format_mean(found["mean"][0], found["ci95"][0], scale=100)
