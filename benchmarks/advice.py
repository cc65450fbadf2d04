"""What the measurements of `benchmarks.accelerator` say about each default of the library."""

import math
from collections.abc import Sequence
from typing import Any

from maml_jax.meta_gradient import ACCELERATOR_MEMORY_SHARE

STAGES = ("convolution", "chunk size", "precision")
"""What the sweep varies, one after the other. Each stage starts from the fastest of the stages before."""
NOISE = 1.02
"""A gain of at most this factor is none."""
FIT = 0.9
"""The share of a device's memory that one program may take."""
WHERE = {
    "convolution": "conv_fn in maml_jax/models/layers.py and conv4.py",
    "chunk size": "default_chunk_size in maml_jax/meta_gradient.py",
    "precision": "--precision of the experiments",
}


def advice(content: dict[str, Any]) -> list[dict[str, str]]:
    """What the sweep says about each default: "setting", "workload", "now", "best" and "advice"."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in content["rows"]:
        groups.setdefault((row["stage"], row["workload"]), []).append(row)
    found = [
        {"setting": stage, "workload": workload, **judge(stage, rows)}
        for stage in STAGES
        for (of_stage, workload), rows in groups.items()
        if of_stage == stage
    ]
    return found + [judge_share(memory) for memory in content["memory"]]


def judge(stage: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Whether one comparison speaks for another value than that of its first row."""
    reference, best = rows[0], min(rows, key=lambda row: row["seconds"].median)
    now, name, factors = reference["value"], best["value"], best["times_reference"]
    gain, least, most = 1 / factors.median, 1 / factors.upper, 1 / factors.lower
    faster = f"{gain:.2f} times faster ({least:.2f}-{most:.2f})"
    if len(rows) == 1:
        text = "not decided: there was no time for an alternative"
    elif best is reference:
        text = f"keep {now}: the fastest of {len(rows)}"
    elif stage == "precision" and best["deviation"] == 0:
        text = f"keep {now}: {name} computes the same on this device"
    elif gain <= NOISE:
        text = f"keep {now}: within {NOISE - 1:.0%} of the best"
    elif best["seconds"].repetitions < 3 or reference["seconds"].repetitions < 3:
        text = f"not decided: {name} looks {gain:.2f} times faster, after too few repetitions; give more --minutes"
    elif least <= NOISE:
        text = f"keep {now}: {name} is not clearly faster, {gain:.2f} times ({least:.2f}-{most:.2f})"
    elif stage == "precision":
        text = f"a choice: {name} is {faster}, and its meta-gradient deviates by {best['deviation']:.0e}"
    else:
        text = f"set it to {name}: {faster}; {WHERE[stage]}"
    return {"now": now, "best": name, "advice": text}


def judge_share(memory: dict[str, Any]) -> dict[str, str]:
    """Whether `ACCELERATOR_MEMORY_SHARE` allows the fastest chunk, and whether the chunks that it allows fit."""
    share, limit = ACCELERATOR_MEMORY_SHARE, memory["bytes_limit"]
    fitting = min(1.0, math.floor(100 * FIT * memory["forward_bytes"] / memory["peak_bytes"]) / 100)
    if memory["backend"] == "cpu":
        best, text = "", "not used on a CPU"
    elif limit is None:
        best, text = "", "not used: this device does not report its memory"
    else:
        needed = math.ceil(100 * memory["best_chunk"] * memory["forward_bytes"] / limit) / 100
        allowed = int(share * limit / memory["forward_bytes"])
        best = f"{needed:.2g} to {fitting:.2g}"
        if share > fitting:
            taken = share * memory["peak_bytes"] / memory["forward_bytes"]
            text = f"set it to {fitting:.2g}: with {share:g} a chunk may take {taken:.0%} of the memory"
        elif share < needed <= fitting:
            text = f"set it to {needed:.2g}: {share:g} allows {allowed} tasks, {memory['best_chunk']} are the fastest"
        else:
            text = f"keep {share:g}: it allows {allowed} tasks, the fastest chunk has {memory['best_chunk']}"
    return {
        "setting": "ACCELERATOR_MEMORY_SHARE",
        "workload": memory["workload"],
        "now": f"{share:g}",
        "best": best,
        "advice": text,
    }
