"""The sinusoid table of the MAML paper on your own machine, in a few minutes and without a download.

Trains MAML and the pretraining baseline for 70,000 meta-steps each, prints their errors beside the
published ones and draws three figures. Interrupted, it goes on where it was; finished, it shows the
result again. `make demo` runs it.
"""

import dataclasses
import time
from pathlib import Path

from rich.table import Table

from experiments import figures, published, runs, sinusoid
from experiments.cli import Precision, main
from experiments.intervals import format_mean
from experiments.runs import console


@dataclasses.dataclass(frozen=True)
class Config:
    """Where and how long."""

    run_dir: Path = Path("runs/demo")
    """Holds a run directory for each algorithm, and the figures."""
    num_meta_steps: int = 70_000
    """Outer updates of each algorithm."""
    seed: int = 0
    """Seed of initial parameters, tasks and evaluation."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""


def run(config: Config) -> dict[str, dict]:
    """Trains or resumes both, prints the table and draws the figures; returns the results by algorithm."""
    start = time.perf_counter()
    results, curves, logs = {}, {}, {}
    for algorithm in ("maml", "pretrained"):
        console.print(f"[bold]{figures.title(algorithm)}[/]: {config.num_meta_steps} meta-steps")
        run_config = dataclasses.replace(
            sinusoid.METHODS[algorithm],
            num_meta_steps=config.num_meta_steps,
            seed=config.seed,
            precision=config.precision,
            run_dir=config.run_dir / algorithm,
        )
        results[algorithm], params = sinusoid.train_and_test(run_config)
        inner_lr = results[algorithm]["evaluations"][0]["inner_lr"]
        curves[algorithm] = sinusoid.predictions(run_config, params, inner_lr)
        logs[algorithm] = [runs.curve(run_config.run_dir)]
    drawn = {
        "predictions.png": (figures.predictions, curves),
        "inner_steps.png": (figures.inner_curves, {name: result["evaluations"] for name, result in results.items()}),
        "learning_curve.png": (figures.learning_curves, logs),
    }
    for name, (draw, content) in drawn.items():
        draw(config.run_dir / "figures" / name, content)
    show(results)
    console.print(f"{time.perf_counter() - start:.0f} seconds; figures: {config.run_dir / 'figures'}", markup=False)
    return results


def show(results: dict[str, dict]) -> None:
    """Prints the errors after 1, 5 and 10 steps on 5 support points beside the published ones."""
    table = Table(title="Sinusoids, 5 support points: mean squared error, 95 % interval")
    table.add_column("")
    for steps in (1, 5, 10):
        table.add_column(f"{steps} step{'s' * (steps > 1)}", justify="right")
    for algorithm, result in results.items():
        mse = result["metrics"]["mse"]
        ours = [format_mean(mse["mean"][steps], mse["ci95"][steps]) for steps in (1, 5, 10)]
        table.add_row(figures.title(algorithm), *ours)
        paper = [f"{number:.2f}       " for number in published.SINUSOID[algorithm, 0.001]]
        table.add_row("  published", *paper, style="dim", end_section=True)
    console.print(table)


if __name__ == "__main__":
    main(Config, run, __doc__)
