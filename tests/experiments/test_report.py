"""The report is what the committed results say, and the README's examples run."""

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments import cli, report, runs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


def test_report_and_readme_are_those_of_the_committed_results(tmp_path):
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    report.write(RESULTS, tmp_path / "RESULTS.md", readme)
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "experiments" / "RESULTS.md").read_text()
    assert readme.read_text() == (ROOT / "README.md").read_text()


def test_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["info"].loss.shape == (200,)
    assert float(namespace["info"].loss[-50:].mean()) < float(namespace["info"].loss[:50].mean())


@pytest.mark.parametrize(
    ("experiment", "flags"),
    [
        ("sinusoid", "maml"),
        ("sinusoid", "pretrained"),
        ("sinusoid", "maml --inner-lr 0.01"),
        ("sinusoid", "reptile --num-inner-steps 5"),
        ("omniglot", "maml --way 20"),
        ("omniglot", "fomaml --shot 5 --no-rotations"),
    ],
)
def test_the_command_is_recovered_from_the_results(experiment, flags):
    module = report.EXPERIMENTS[experiment]
    config = module.with_paper_defaults(cli.parse(module.METHODS, "", [*flags.split(), "--seed", "3"]))
    results = {"experiment": experiment, "algorithm": config.algorithm, "config": runs.as_json(config)}
    assert report.command(results) == f"python -m experiments.{experiment} {flags}"


def test_a_short_curve_is_reported(tmp_path):
    results = json.loads((RESULTS / "sinusoid_maml_seed-0.json").read_text())
    for evaluation in results["evaluations"]:
        for name, values in evaluation["metrics"]["mse"].items():
            evaluation["metrics"]["mse"][name] = values[:4]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "short.json").write_text(json.dumps(results))
    report.write(tmp_path / "results", tmp_path / "RESULTS.md", None)
    assert "not finite in 1 of 1" in (tmp_path / "RESULTS.md").read_text()


def test_adding_never_replaces_other_results(tmp_path):
    (tmp_path / "run").mkdir()
    results = json.loads(next(iter(sorted(RESULTS.glob("*.json")))).read_text()) | {"diverged": None}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"diverged": float("nan")}))
    (tmp_path / "results").mkdir()
    file = report.add(tmp_path / "run", tmp_path / "results")
    assert json.loads(file.read_text()) == results
    assert report.add(tmp_path / "run", tmp_path / "results") == file  # the same again is no conflict
    (tmp_path / "run" / "results.json").write_text(json.dumps(results | {"seconds": {}}))
    with pytest.raises(ValueError, match="holds other results of the same command; delete it"):
        report.add(tmp_path / "run", tmp_path / "results")
