"""Several seeds of one experiment, trained in one program."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments import figures
from experiments.common import Member, Training, check_not_lost, train_together
from experiments.intervals import format_mean, mean_and_interval
from experiments.runs import (
    CONFIG_REMEDY,
    RunError,
    as_json,
    check_data,
    console,
    curve,
    differing_settings,
    finite,
    open_run,
    read_json,
    read_record,
    read_results,
    results_before,
    seed_directories,
    write_json,
)
from maml_jax import checkpoint

ROWS = {"mazes": "walk", "navigation": "updates"}
"""What a metric has an entry for, if it has several, in the experiments without inner steps."""


def _unfinished(configs: Sequence[Any]) -> list[int]:
    """The seeds that are still to be trained; all of them if none is.

    A seed at the end whose test is missing may have been there first when the process was killed. It is trained again
    with the others, from where they are, because a program of fewer seeds rounds in another way.

    Raises:
      RunError: if they are so far apart that those ahead have no checkpoint where the last one is, or would start anew
        beside their results.
    """
    found = [(checkpoint.latest(config.run_dir / "checkpoints") or 0, config) for config in configs]
    found = [(step, config) for step, config in found if not _is_tested(config)] or found
    (least, last), (most, first) = (choose(found, key=lambda pair: pair[0]) for choose in (min, max))
    has_results = any(read_results(config.run_dir) or results_before(config.run_dir) for _, config in found)
    if most - least > last.val_every or (least == 0 < most and has_results):
        raise RunError(
            f"{first.run_dir} is at meta-step {most} and {last.run_dir} at {least}: too far apart to train together. "
            f"Bring the latter forward by the same command with --seed {last.seed} --run-dir {last.run_dir} and "
            "without --seeds"
        )
    return [config.seed for _, config in found]


def _is_tested(config: Any) -> bool:
    """Whether the results of a seed are those of its whole training, after which no seed is trained further."""
    results = read_results(config.run_dir)
    return results is not None and results["meta_steps"] >= config.num_meta_steps


def run_seeds(run: Callable[[Any], dict], training_of: Callable[[Any], Training], config: Any) -> dict:
    """Trains `config.seeds` seeds in one program, tests each, and reports means over them.

    Args:
      run: the experiment, `(config) -> results`; it finds the training of a seed finished and does the test.
      training_of: `(config) -> Training` of one seed.
      config: the settings. The seeds are `config.seed`, `config.seed + 1`, ...

    Raises:
      RunError: if there are several processes, --wandb is given, the directory holds one run or another seed with other
        settings, or the unfinished seeds have no checkpoint in common.

    Returns:
      The content of seeds.json in the run directory: "seeds", their "results", "metrics" with the mean over seeds and
      its 95 % interval (Student's t), lists of K+1 numbers, and the "execution" of the common program. Other seeds that
      the directory has from an earlier call are among them.
    """
    if jax.process_count() > 1:
        raise RunError(f"--seeds {config.seeds} trains in one process; start a job with its own --seed for each seed")
    if config.tracking.wandb:
        raise RunError("--wandb follows one seed; start a run with its own --seed for each seed, or leave it out")
    if (config.run_dir / "config.json").exists():
        raise RunError(
            f"{config.run_dir} holds one run; leave --seeds out to go on with it, or choose another --run-dir"
        )
    seeds = range(config.seed, config.seed + config.seeds)
    names = set(seed_directories(config.run_dir)) - {f"seed-{seed}" for seed in seeds}
    others = [config.run_dir / name for name in sorted(names)]
    for other in others:
        stored = read_record(other / "config.json", CONFIG_REMEDY)
        if differing := differing_settings(stored, as_json(config), ("seed",)):
            raise RunError(
                f"{config.run_dir} holds {other.name} of another configuration: {'; '.join(differing)}. Choose another "
                "--run-dir, or give the flags of the other seeds"
            )
    configs = [
        dataclasses.replace(config, seed=seed, seeds=1, run_dir=config.run_dir / f"seed-{seed}") for seed in seeds
    ]
    unfinished = _unfinished(configs)
    with contextlib.ExitStack() as stack:
        trainings = [training_of(of_seed) for of_seed in configs]
        for other in others:
            check_data(other, trainings[0].data_digest)
        for of_seed, training in zip(configs, trainings, strict=True):
            stack.enter_context(open_run(of_seed.run_dir, of_seed, training.data_digest))
            if training.keep is not None:
                training.keep(of_seed.run_dir)
        for of_seed in configs:  # a seed that is tested is not trained, and its test needs a checkpoint
            check_not_lost([of_seed.run_dir], checkpoint.latest(of_seed.run_dir / "checkpoints") or 0)
        members = [Member(c.run_dir, c, t) for c, t in zip(configs, trainings, strict=True) if c.seed in unfinished]
        # A seed without a checkpoint may be the only one whose initial parameters are still needed.
        steps = [checkpoint.latest(member.run_dir / "checkpoints") for member in members]
        behind = members[steps.index(None) if None in steps else 0]
        together = train_together(members, trainings[seeds.index(behind.config.seed)])
        execution = together[0].execution
        if "devices" not in execution and (config.run_dir / "seeds.json").exists():  # nothing was trained by this call
            execution = read_json(config.run_dir / "seeds.json")["execution"]
        del training, trainings, members, behind, together  # the images of every seed
    # Other seeds have these settings too, but may not be tested yet.
    results = [*(run(of_seed) for of_seed in configs), *filter(None, map(read_results, others))]
    results.sort(key=lambda result: result["seed"])
    # null, which stands for a number that is not finite, becomes NaN
    metrics = {
        name: mean_and_interval(np.array([result["metrics"][name]["mean"] for result in results], float))
        for name in results[0]["metrics"]
    }
    all_seeds = [result["seed"] for result in results]
    summary = finite({"seeds": all_seeds, "metrics": metrics, "execution": execution, "results": results})
    write_json(config.run_dir / "seeds.json", summary)
    figures.learning_curves(
        config.run_dir / "figures" / "learning_curve.png",
        {config.algorithm: [curve(config.run_dir / f"seed-{seed}") for seed in all_seeds]},
    )
    table = Table(
        ROWS.get(config.experiment, "inner steps"),
        title=f"{config.algorithm}: mean over {len(results)} seeds, 95 % interval",
    )
    for name in metrics:
        table.add_column(name.replace("_", " "), overflow="fold")
    last = max(len(m["mean"]) for m in metrics.values()) - 1
    for at in sorted({at for at in (0, 1, 5) if at < last} | {last}):
        cells = [
            format_mean(m["mean"][at], m["ci95"][at], digits=4) if at < len(m["mean"]) else ""
            for m in finite(metrics).values()
        ]
        table.add_row(str(at) if last else "", *cells)
    console.print(table)
    return summary
