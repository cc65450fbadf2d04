"""The command that made a result: what it changes from the defaults, and results grouped by it."""

import dataclasses
from collections import defaultdict

from experiments import (
    bandits,
    domains,
    faces,
    hyperparameters,
    images,
    mazes,
    mdps,
    navigation,
    omniglot,
    runs,
    sinusoid,
    translation,
)

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
            flags.append(runs.typed(name, value))
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
    return dict(sorted(groups.items(), key=lambda item: order_of(item[1][0])))


def order_of(result: dict) -> tuple:
    """The place of a result among others of its experiment, as a key to sort by."""
    names, config = list(EXPERIMENTS[result["experiment"]].METHODS), result["config"]
    where = config.get("way", 0), config.get("data", ""), str(config.get("held_out", "")), config.get("shot", 0)
    where += (config.get("network") == "mlp",)  # the networks without convolutions last
    return names.index(result["algorithm"]), *where, str(config.get("inner_lr"))
