"""The sinusoid experiment in miniature, the demo, and the mistakes a user can make."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments import demo, sinusoid

TINY = {
    "num_meta_steps": 4,
    "val_every": 2,
    "log_every": 1,
    "meta_batch_size": 3,
    "chunk_size": None,
    "eval_episodes": 4,
    "eval_query_shot": 7,
}


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile", "pretrained", "oracle"])
def test_every_algorithm_runs_and_reports_every_step(algorithm, tmp_path):
    config = sinusoid.Config(algorithm=algorithm, inner_lr_grid=(1e-3, 1e-2), run_dir=tmp_path, **TINY)
    results = sinusoid.run(config)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [evaluation["shot"] for evaluation in results["evaluations"]] == [5, 10]
    for evaluation in results["evaluations"]:
        for numbers in evaluation["metrics"]["mse"].values():
            assert len(numbers) == 11
    assert results["metrics"] == results["evaluations"][0]["metrics"]
    assert results["config"]["query_shot"] == 10
    figures = {file.name for file in (tmp_path / "figures").iterdir()}
    drawn = {"inner_steps.png", "learning_curve.png", "predictions.png"}
    assert figures == (drawn - {"predictions.png"} if algorithm == "oracle" else drawn)


def test_the_rate_at_test_is_tuned_for_the_baselines_alone(tmp_path):
    # Almost untrained, the network gains nothing from a step: the grid's absurd rate must lose.
    config = sinusoid.Config(algorithm="pretrained", inner_lr_grid=(1e-3, 1e6), run_dir=tmp_path, **TINY)
    assert [e["inner_lr"] for e in sinusoid.run(config)["evaluations"]] == [1e-3, 1e-3]
    assert sinusoid.with_defaults(sinusoid.Config(algorithm="maml")).tune_inner_lr is False


def test_diverged_tasks_are_counted_and_leave_the_median():
    per_episode = np.array([[1.0, 1.0], [2.0, np.inf], [3.0, np.nan], [4.0, 2.0]])
    metric = sinusoid.as_metric(sinusoid.Evaluation(per_episode.mean(0), per_episode.std(0), per_episode))
    assert metric["diverged"] == [0.0, 0.5]
    assert metric["median"][0] == 2.5
    assert metric["median"][1] == np.inf


def test_the_demo_trains_both_and_draws_them_together(tmp_path, monkeypatch, capsys):
    make = sinusoid.Config
    tiny = {name: value for name, value in TINY.items() if name != "num_meta_steps"} | {"eval_inner_steps": 10}
    monkeypatch.setattr(sinusoid, "Config", lambda **settings: make(**settings, **tiny))
    results = demo.run(demo.Config(run_dir=tmp_path, num_meta_steps=2))
    assert set(results) == {"maml", "pretrained"}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        "predictions.png",
        "inner_steps.png",
        "learning_curve.png",
    }
    printed = capsys.readouterr().out
    for published in ("0.67", "0.38", "0.35", "2.41", "2.23", "2.19"):
        assert published in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-inner-steps", "-1"], "num_inner_steps must be an integer of at least 0, got -1"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--shot", "0"], "shot=0"),
        (["--meta-batch-size", "0"], "--meta-batch-size 0 is too small; give at least 1"),
        (["--eval-episodes", "1"], "--eval-episodes 1 is too small"),
    ],
)
def test_mistakes_end_in_a_message_and_no_traceback(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sinusoid", "--run-dir", str(tmp_path / "run"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "XDG_CACHE_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
