"""The report is what the committed results say, and the README's examples run."""

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments import omniglot, report, sinusoid

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
    ("experiment", "settings", "expected"),
    [
        ("sinusoid", {}, "python -m experiments.sinusoid"),
        ("sinusoid", {"algorithm": "pretrained"}, "python -m experiments.sinusoid --algorithm pretrained"),
        ("sinusoid", {"inner_lr": 0.01, "seed": 3}, "python -m experiments.sinusoid --inner-lr 0.01"),
        ("omniglot", {"way": 20}, "python -m experiments.omniglot --way 20"),
        (
            "omniglot",
            {"algorithm": "fomaml", "shot": 5, "rotations": False},
            "python -m experiments.omniglot --algorithm fomaml --shot 5 --no-rotations",
        ),
    ],
)
def test_the_command_is_recovered_from_the_results(experiment, settings, expected):
    module = {"omniglot": omniglot, "sinusoid": sinusoid}[experiment]
    fill = {"omniglot": omniglot.with_paper_defaults, "sinusoid": sinusoid.with_defaults}[experiment]
    config = report.runs.as_json(fill(module.Config(**settings)))
    assert report.command({"experiment": experiment, "config": config}) == expected


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
