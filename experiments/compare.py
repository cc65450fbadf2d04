"""Compares runs of one experiment: settings, learning curves, results, and a paired test on the same episodes.

Runs may be finished or still training. Every run is tested anew, with the state that it has selected so far, on the
same episodes. The differences of their scores, episode by episode, say which run is better, or that the episodes do not
tell the two apart: by their mean (Student's t, paired), and by how often one is ahead (sign test), because a few
episodes that diverge make a mean meaningless. Each of the two kinds of test has the level 5 %, adjusted for their
number. Runs whose tests differ in the split, the number of classes, examples or queries, or in what a prediction may
see, are not tested against each other. Of two directories of several seeds, the runs of the same seed are compared, and
then their differences over the seeds. Runs of navigation are tested at the same goals, and those of bandits, mdps and
mazes on the same tasks. Of faces and translation only the settings, the learning curves and the reported numbers are
shown.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.markup import escape
from rich.table import Table

from experiments import figures, intervals, pictures, runs
from experiments.cli import OptionalPath, Precision, check_seed, main
from experiments.intervals import format_mean
from experiments.paired import holm, paired_test, sign_test
from experiments.retest import ACCURACY, ANY, METRICS, Metric, Run, Test, fingerprint, open_run, tests
from experiments.runs import RunError, console, messages_to_stderr
from maml_jax.types import check_integer

LEVEL = 0.05
"""A difference with a smaller p-value is called one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Two or more run directories of one experiment. One made with --seeds stands for the runs of all its seeds."""
    episodes: int = 600
    """Episodes of the test; 0 for none, and then runs need no checkpoint. Domains are tested on all examples."""
    seed: int = 0
    """Seed of these episodes. Its episodes are those of the test of a run with the same --seed."""
    figure: OptionalPath = None
    """The file for a figure of the learning curves: .png, .pdf or .svg. By default a table shows a few points."""
    json: bool = False
    """Print JSON in place of tables. It holds the score of every episode."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        if check_integer("--episodes", self.episodes, at_least=0) == 1:
            raise ValueError("--episodes 1 gives no interval; choose 0 or at least 2")
        check_seed(self.seed)
        if self.figure is not None:
            pictures.check_suffix("--figure", self.figure)


def open_runs(run_dirs: Sequence[Path], *, needs_checkpoint: bool) -> list[Run]:
    """The runs to compare.

    Args:
      run_dirs: their directories. That of several seeds stands for all of them.
      needs_checkpoint: whether each must hold a selected state, if the experiment has tests that can be repeated.

    Raises:
      RunError: if there are fewer than two, one is given twice, is no run directory or holds no checkpoint, the seeds
        of a directory have different settings, or runs are of different experiments.
    """
    if len(run_dirs) < 2:
        raise RunError(f"a comparison needs two or more run directories, got {len(run_dirs)}; name another run")
    names = [run_dir.resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in run_dirs]
    opened = []
    for run_dir, name in zip(run_dirs, names, strict=True):
        seeds = [] if (run_dir / "config.json").exists() else runs.seed_directories(run_dir)
        opened += [open_run(run_dir / seed, f"{name}/{seed}", name) for seed in seeds] or [open_run(run_dir, name)]
    for run, other in itertools.pairwise(opened):
        if run.group is not None and run.group == other.group:
            differing = runs.differing_settings(runs.as_json(run.config), runs.as_json(other.config), ("seed",))
            if differing:
                raise RunError(f"{run.name} and {other.name} are no seeds of one command: {'; '.join(differing)}")
    places: dict[Path, Path] = {}
    for run in opened:
        if (place := run.run_dir.resolve()) in places:
            raise RunError(f"{places[place]} and {run.run_dir} are the same run; name different runs")
        places[place] = run.run_dir
    for run in opened[1:]:
        if run.experiment != opened[0].experiment:
            raise RunError(
                f"{opened[0].run_dir} is a run of experiments.{opened[0].experiment} and {run.run_dir} one of "
                f"experiments.{run.experiment}; compare runs of one experiment"
            )
    if needs_checkpoint and opened[0].experiment in METRICS:
        for run in opened:
            runs.load(run.run_dir)  # refuses one that has selected nothing, before tests that take minutes
    return opened


def is_paired(a: Run, b: Run) -> bool:
    """Whether two runs are compared: seeds of one command are not, and those of two only if the seed is the same."""
    if a.group is None or b.group is None:
        return True
    return a.group != b.group and a.config.seed == b.config.seed


def differing_settings(opened: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with the value of every run; None where a run has none."""
    stored = [runs.as_json(run.config) for run in opened]
    names = dict.fromkeys(name for settings in stored for name in settings)
    values = {name: [settings.get(name) for settings in stored] for name in names}
    return {name: of_runs for name, of_runs in values.items() if any(value != of_runs[0] for value in of_runs)}


def differing(a: Test, b: Test) -> dict[str, list[Any]]:
    """By name, in what two tests differ; empty if their scores are comparable."""
    names = dict.fromkeys([*a.protocol, *b.protocol])
    values = {name: [a.protocol.get(name), b.protocol.get(name)] for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1] and ANY not in pair}


def matches(a: Sequence[Test], b: Sequence[Test]) -> list[tuple[int, int, dict[str, list[Any]]]]:
    """The tests of two runs that belong together: indices, and in what they differ.

    Every test of the first run is matched with the most similar one of the second; if some are comparable, only these
    are given.
    """
    closest = []
    for i, test in enumerate(a):
        gaps = [differing(test, other) for other in b]
        j = min(range(len(b)), key=lambda j: len(gaps[j]))
        closest.append((i, j, gaps[j]))
    return [match for match in closest if not match[2]] or closest[:1]


def run(config: Config) -> dict[str, Any]:
    """Compares, prints, and returns what `--json` prints."""
    with messages_to_stderr(config.json):
        compared = compare(config)
    if config.json:
        print(json.dumps(compared, indent=1, allow_nan=False))
    else:
        show(compared)
    return compared


def compare(config: Config) -> dict[str, Any]:
    """All that is known about the runs, as a record for JSON.

    Returns:
      "experiment", "runs", "names" (of the runs, or of the directories of several seeds), "settings" (those that
      differ, with a value for each name), "curves" (see `curves`), "evaluations" (the scores on the same episodes),
      "pairs", "over_seeds" (see `over_seeds`) and "figure".
    """
    opened = open_runs(config.runs, needs_checkpoint=config.episodes > 0)
    if config.figure is not None:
        try:  # before the tests, which take minutes
            draw_curves(config.figure, opened)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"--figure {config.figure} cannot be written ({reason}); name another file") from error
    names = [run.name for run in opened]
    of_runs = {run.name: tests(run) for run in opened}
    found: dict[tuple[str, int], np.ndarray] = {}

    def scores(name: str, index: int) -> np.ndarray:
        if (name, index) not in found:
            test = of_runs[name][index]
            console.print(f"testing {escape(name)}, {test.task}", highlight=False)
            found[name, index] = test.score(config.episodes, config.seed)
        return found[name, index]

    @functools.cache
    def checksum(name: str, index: int) -> str | None:
        images = of_runs[name][index].images
        return images and fingerprint(images())

    pairs = []
    wanted = [(a.name, b.name) for a, b in itertools.combinations(opened, 2) if is_paired(a, b)]
    for a, b in wanted if config.episodes else ():
        for i, j, gaps in matches(of_runs[a], of_runs[b]):
            test = of_runs[a][i]
            if not gaps and checksum(a, i) != checksum(b, j):
                gaps = {"the checksum of an episode's images": [checksum(a, i), checksum(b, j)]}
            pair = {"a": a, "b": b, "task": test.task, "metric": test.metric.name, "comparable": not gaps}
            if gaps:
                pairs.append(pair | {"differing": gaps})
            else:
                compared = difference(scores(a, i)[:, -1], scores(b, j)[:, -1], test.metric)
                pairs.append(pair | {"counted": test.counted} | compared)
    for name in ("p", "sign_p"):
        tested = [pair for pair in pairs if name in pair]
        for pair, adjusted in zip(tested, holm([pair[name] for pair in tested]), strict=True):
            pair[f"{name}_holm"] = adjusted
    num_tests = sum(pair["comparable"] for pair in pairs)
    for pair in pairs:
        pair["sentence"] = sentence(pair, num_tests)
    # The runs of a directory differ in their seeds only.
    named = {run.group or run.name: run for run in reversed(opened)}
    compared = {
        "experiment": opened[0].experiment,
        "runs": [describe(run, of_runs[run.name]) for run in opened],
        "names": list(reversed(named)),
        "settings": differing_settings(list(reversed(named.values()))),
        "curves": curves({run.name: runs.read_log(run.run_dir) for run in opened}),
        "seed": config.seed,
        "evaluations": [
            {
                "run": name,
                "task": of_runs[name][index].task,
                "metric": of_runs[name][index].metric.name,
                "episodes": len(values),
                "counted": of_runs[name][index].counted,
                **intervals.mean_and_interval(values),
                "per_episode": values[:, -1].tolist(),
            }
            for (name, index), values in sorted(found.items(), key=lambda item: (names.index(item[0][0]), item[0][1]))
        ],
        "pairs": pairs,
        "over_seeds": over_seeds(pairs, {run.name: run.group for run in opened}),
        "figure": None if config.figure is None else str(config.figure),
    }
    return runs.finite(compared)


def draw_curves(file: Path, opened: Sequence[Run]) -> None:
    """Draws the learning curves of the runs; those of the seeds of one command as their mean."""
    logs: dict[str, list] = {}
    for run in opened:
        label = f"{run.group or run.name} ({figures.title(run.config.algorithm)})"
        logs.setdefault(label, []).append(runs.read_log(run.run_dir))
    figures.learning_curves(file, logs)


def metric_of(name: str) -> Metric:
    """The metric of a name."""
    return next(metric for metric in METRICS.values() if metric.name == name)


def over_seeds(pairs: Sequence[Mapping[str, Any]], groups: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """The differences of two commands over their seeds, which say what another seed would give.

    Args:
      pairs: records of `compare`.
      groups: by name of a run, the directory of several seeds that it is in, or None.

    Returns:
      For each pair of directories and each task that two or more seeds of both were tested on: "a", "b", "task",
      "metric", "seeds" (how many), the mean "difference", its "ci95", "p" (Student's t over seeds), "p_holm" (adjusted
      for the number of records that have one) and "sentence". If a score of a seed is not finite, there is
      "num_nonfinite" (of the seeds) in place of the four numbers, because the mean of the other seeds would hide it.
    """
    found: dict[tuple[str, str, str, str], list[float | None]] = {}
    for pair in pairs:
        first, second = groups[pair["a"]], groups[pair["b"]]
        if first and second and pair["comparable"]:
            found.setdefault((first, second, pair["task"], pair["metric"]), []).append(pair.get("difference"))
    records = []
    for (a, b, task, name), differences in found.items():
        if len(differences) < 2:
            continue
        records.append({"a": a, "b": b, "task": task, "metric": name, "seeds": len(differences)})
        if num_nonfinite := differences.count(None):
            records[-1]["num_nonfinite"] = num_nonfinite
        else:
            test = paired_test(np.array(differences), np.zeros(len(differences)))
            records[-1] |= {"difference": test.mean, "ci95": test.ci95, "p": test.p}
    tested = [record for record in records if "p" in record]
    for record, adjusted in zip(tested, holm([record["p"] for record in tested]), strict=True):
        record["p_holm"] = adjusted
    for record in records:
        record["sentence"] = sentence_over_seeds(record, len(tested))
    return records


def sentence_over_seeds(record: Mapping[str, Any], num_tests: int) -> str:
    """What a record of `over_seeds` has come to, in words; `num_tests` as in `sentence`."""
    a, b, metric = record["a"], record["b"], metric_of(record["metric"])
    if bad := record.get("num_nonfinite"):
        without = f"in {bad} of {record['seeds']} seeds a score is not finite"
        return f"{a} and {b} have no mean difference over seeds, {record['task']}, because {without}."
    mean, ci95 = record["difference"] * metric.scale, record["ci95"] * metric.scale
    better, worse = (a, b) if metric.is_better(mean) else (b, a)
    verdict = f"{better} is better than {worse}" if record["p_holm"] < LEVEL else f"{a} and {b} cannot be told apart"
    return (
        f"Over {record['seeds']} seeds {verdict}, {record['task']}; mean {metric.name} of {a} minus that of {b}: "
        f"{number(mean)}{metric.unit} (95 % interval {number(mean - ci95)} to {number(mean + ci95)}, "
        f"{_p(record, 'p', num_tests)})."
    )


def difference(a: np.ndarray, b: np.ndarray, metric: Metric) -> dict[str, Any]:
    """The tests of the scores [E] of two runs, as a record; without "p" if a score is not finite.

    "better", "worse" and "equal" count the episodes in which the first run was so. A score that is not finite is worse
    than every other.
    """
    bad = [int(np.sum(~np.isfinite(scores))) for scores in (a, b)]
    worst = np.inf if metric.is_better(-1.0) else -np.inf
    first, second = (np.where(np.isfinite(scores), scores, worst) for scores in (a, b))
    higher, lower = int(np.sum(first > second)), int(np.sum(first < second))
    better, worse = (higher, lower) if metric.is_better(1.0) else (lower, higher)
    record = {"episodes": len(a), "better": better, "worse": worse, "equal": len(a) - better - worse}
    record["sign_p"] = sign_test(better, worse)
    if any(bad):
        return record | {"num_nonfinite": bad}
    test = paired_test(a, b)
    return record | {"difference": test.mean, "ci95": test.ci95, "p": test.p}


def sentence(pair: Mapping[str, Any], num_tests: int) -> str:
    """What a pair has come to, in words.

    Args:
      pair: a record of `compare`.
      num_tests: how many tests were made, for which p-values are adjusted.
    """
    a, b = pair["a"], pair["b"]
    if not pair["comparable"]:
        gaps = "; ".join(f"{name} is {x} for {a} and {y} for {b}" for name, (x, y) in pair["differing"].items())
        return f"{a} and {b} are not comparable: {gaps}."
    metric = metric_of(pair["metric"])
    task, better, worse = pair["task"], pair["better"], pair["worse"]
    over = f"{pair['episodes']:,} {pair['counted']}"
    if better == worse == 0 and "num_nonfinite" not in pair:
        return f"{a} and {b} have the same score in every one of {over}, {task}."
    ahead, behind = (a, b) if better > worse else (b, a)
    is_often_ahead = pair["sign_p_holm"] < LEVEL
    often = f"{ahead} is ahead in {max(better, worse):,} of {over} and behind in {min(better, worse):,}"
    often += f" (sign test, {_p(pair, 'sign_p', num_tests)})"
    if bad := pair.get("num_nonfinite"):
        means = f"no mean exists, because the scores of {bad[0]:,} and {bad[1]:,} of {over} are not finite"
    else:
        mean, ci95 = pair["difference"] * metric.scale, pair["ci95"] * metric.scale
        interval = f"95 % interval {number(mean - ci95)} to {number(mean + ci95)}, {_p(pair, 'p', num_tests)}"
        means = f"mean {metric.name} of {a} minus that of {b}: {number(mean)}{metric.unit} ({interval})"
        if pair["p_holm"] < LEVEL:
            first, second = (a, b) if metric.is_better(mean) else (b, a)
            but = "; but " if is_often_ahead and ahead != first else "; "
            return f"{first} is better than {second} on average, {task}; {means}{but}{often}."
    if is_often_ahead:
        reason = "" if bad else ", but their means cannot be told apart"
        return f"{ahead} is better than {behind} in most {pair['counted']}{reason}, {task}: {often}; {means}."
    return f"{a} and {b} cannot be told apart, {task}; {means}; {often}."


def _p(pair: Mapping[str, Any], name: str, num_tests: int) -> str:
    """A p-value, and if there are several tests the adjusted one."""
    plain = f"p = {pair[name]:.2g}"
    return plain if num_tests < 2 else f"{plain}, adjusted {pair[f'{name}_holm']:.2g}"


def number(value: float) -> str:
    """A difference as it is printed: two digits behind the point, or three that count."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def describe(run: Run, of_run: Sequence[Test]) -> dict[str, Any]:
    """One run as a record: where it stands, and what it has reported."""
    records, results = runs.read_log(run.run_dir), run.results or {}
    reported = [(test.task, test.metric.name, test.reported) for test in of_run if test.reported]
    protocol = results.get("protocol", {})
    count = protocol.get("episodes", protocol.get("examples"))
    if not reported:
        # The metrics of a run are those of its first evaluation, which has a count of its own.
        first = (results.get("evaluations") or [{}])[0]
        count = first.get("count", first.get("identities", count))
        where = first.get("goals", first.get("domain"))
        reported = [
            (name if where is None else f"{name}, {where}", name, metric)
            for name, metric in results.get("metrics", {}).items()
        ]
    return {
        "name": run.name,
        "run_dir": str(run.run_dir),
        "algorithm": run.config.algorithm,
        "seed": run.config.seed,
        "step": records[-1]["step"] if records else 0,
        "num_meta_steps": run.config.num_meta_steps,
        "selected_step": protocol.get("selected_step"),
        "finished": run.results is not None,
        "reported": [
            {
                "task": task,
                "metric": name,
                "episodes": count,
                "mean": metric["mean"][-1],
                "ci95": metric["ci95"][-1],
            }
            for task, name, metric in reported
        ],
    }


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], num_steps: int = 6) -> dict[str, Any]:
    """The learning curves at a few meta-steps up to the last of all runs.

    Args:
      logs: the records of metrics.jsonl by run.
      num_steps: at how many meta-steps.

    Returns:
      "metric" ("val", the validation score, if all runs have one, else "loss"), "steps" and "values": by run, the last
      one that was logged up to each step, or None where the run has none or ended before.
    """
    is_validated = all(any("val" in record for record in log) for log in logs.values())
    name = "val" if is_validated else "loss"
    points = {run: {r["step"]: r[name] for r in log if name in r} for run, log in logs.items()}
    logged = sorted({step for of_run in points.values() for step in of_run})
    chosen = sorted({logged[round(index)] for index in np.linspace(0, len(logged) - 1, num_steps)}) if logged else []

    def value(of_run: Mapping[int, float | None], step: int) -> float | None:
        before = [logged_step for logged_step in of_run if logged_step <= step]
        return of_run[max(before)] if before and step <= max(of_run) else None

    values = {run: [value(of_run, step) for step in chosen] for run, of_run in points.items()}
    return {"metric": name, "steps": chosen, "values": values}


def _curve_table(found: Mapping[str, Any]) -> Table:
    """The learning curves of `curves`."""
    what = {"val": "Validation score", "loss": "Training objective; methods may have different ones"}[found["metric"]]
    table = Table(title=what)
    for heading in ("meta-steps", *(f"{step:,}" for step in found["steps"])):
        table.add_column(heading, overflow="fold")
    for run, values in found["values"].items():
        table.add_row(escape(run), *("–" if value is None else f"{value:.4g}" for value in values))
    return table


def show(compared: Mapping[str, Any]) -> None:
    """Prints the settings that differ, the learning curves, the results and what the pairs have come to."""
    table = Table(title="Settings that differ")
    for heading in ("", *compared["names"]):
        table.add_column(escape(heading), overflow="fold")
    for name, values in compared["settings"].items():
        table.add_row(name, *(escape(_setting(value)) for value in values))
    if compared["settings"]:
        console.print(table)
    else:
        console.print("The runs have the same settings.")
    if compared["curves"]["steps"]:
        console.print(_curve_table(compared["curves"]))
    metric = METRICS.get(compared["experiment"])
    table = Table(title=f"{metric.heading if metric else 'Reported'}, with 95 % interval")
    counts = {f"{one['episodes']:,} {one['counted']}" for one in compared["evaluations"]}
    for heading in ("run", "meta-steps", "task", "reported", f"on the same {' or '.join(counts) or 'episodes'}"):
        table.add_column(heading, overflow="fold")
    for run in compared["runs"]:
        state = f"{run['step']:,}" + ("" if run["finished"] else f" of {run['num_meta_steps']:,}, not finished")
        reported = {one["task"]: one for one in run["reported"]}
        again = {one["task"]: one for one in compared["evaluations"] if one["run"] == run["name"]}
        for task in dict.fromkeys([*reported, *again]) or ("",):
            cells = ["–", "–"]
            if task in reported:
                one = reported[task]
                count = f" ({one['episodes']:,})" if one["episodes"] else ""
                cells[0] = _mean(one["mean"], one["ci95"], metric) + count
            if task in again:
                cells[1] = _mean(again[task]["mean"][-1], again[task]["ci95"][-1], metric)
            table.add_row(escape(run["name"]), state, task, *cells)
    console.print(table)
    if any(run["reported"] for run in compared["runs"]):
        console.print(
            "Reported: the content of results.json, with the number of episodes or examples.", highlight=False
        )
    if metric is None:
        console.print(
            f"Runs of experiments.{compared['experiment']} are not tested on the same episodes here.", highlight=False
        )
    for pair in compared["pairs"]:
        console.print(f"- {escape(pair['sentence'])}", highlight=False)
    for record in compared["over_seeds"]:
        console.print(f"[bold]- {escape(record['sentence'])}[/]", highlight=False)
    if any(pair["comparable"] for pair in compared["pairs"]) and not compared["over_seeds"]:
        console.print(
            "A test compares two trained states. Another --seed of the training may come out otherwise, so compare "
            "several seeds before you prefer a method.",
            highlight=False,
        )
    if compared["figure"]:
        console.print(f"learning curves: {escape(compared['figure'])}", highlight=False)


def _mean(mean: float | None, ci95: float | None, metric: Metric | None) -> str:
    return format_mean(mean, ci95, scale=metric.scale if metric else 1.0, digits=2 if metric is ACCURACY else 3)


def _setting(value: Any) -> str:
    """A setting in a table."""
    if value is None:
        return "–"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main(Config, run, __doc__)
