"""The sinusoid experiment in miniature, the demo, and the mistakes a user can make."""

import dataclasses
import json
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import demo, runs, sinusoid
from maml_jax import Batch, models

TINY = {
    "num_meta_steps": 4,
    "val_every": 2,
    "log_every": 1,
    "meta_batch_size": 3,
    "chunk_size": None,
    "eval_episodes": 4,
    "eval_query_shot": 7,
}


def config_of(algorithm, **settings):
    return dataclasses.replace(sinusoid.METHODS[algorithm], **settings)


# The conformance tests try every algorithm; these have parameters and tests of different kinds.
@pytest.mark.parametrize("algorithm", ["maml", "meta-sgd", "pretrained", "oracle"])
def test_an_algorithm_runs_and_reports_every_step(algorithm, tmp_path):
    config = config_of(algorithm, inner_lr_grid=(1e-3, 1e-2), run_dir=tmp_path, **TINY)
    results = sinusoid.run(config)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [evaluation["shot"] for evaluation in results["evaluations"]] == [5, 10]
    for evaluation in results["evaluations"]:
        for numbers in evaluation["metrics"]["mse"].values():
            assert len(numbers) == 11
    assert results["metrics"] == results["evaluations"][0]["metrics"]
    assert results["config"]["query_shot"] == 10
    learner, params = sinusoid.load(tmp_path)
    inputs = np.zeros((2, 3 if algorithm == "oracle" else 1), np.float32)
    task_params, _ = learner.adapt(params, Batch(inputs, np.zeros((2, 1), np.float32)))
    assert learner.predict(task_params, inputs).shape == (2, 1)
    figures = {file.name for file in (tmp_path / "figures").iterdir()}
    drawn = {"inner_steps", "learning_curve"} | ({"predictions"} if algorithm != "oracle" else set())
    assert figures == {f"{name}.{kind}" for name in drawn for kind in ("png", "pdf")}


def test_the_rate_at_test_is_only_tuned_for_the_baselines(tmp_path):
    # Almost untrained, the network gains nothing from a step: the grid's absurd rate must lose.
    config = config_of("pretrained", inner_lr_grid=(1e-3, 1e6), run_dir=tmp_path, **TINY)
    assert [e["inner_lr"] for e in sinusoid.run(config)["evaluations"]] == [1e-3, 1e-3]
    assert sinusoid.with_paper_defaults(config_of("maml")).tune_inner_lr is False


def test_diverged_tasks_are_counted_and_leave_the_median():
    per_episode = np.array([[1.0, 1.0], [2.0, np.inf], [3.0, np.nan], [4.0, 2.0]])
    mean, bad = per_episode.mean(0), np.array([0, 2])
    metric = sinusoid.as_metric(sinusoid.Evaluation(mean, mean, per_episode, bad, np.ones(2), np.ones(2)))
    assert metric["num_nonfinite"] == [0, 2]
    assert metric["diverged"] == [0.0, 0.5]
    assert metric["median"][0] == 2.5
    assert metric["median"][1] == np.inf


def test_the_demo_trains_both_and_draws_them_together(tmp_path, monkeypatch, capsys):
    tiny = {name: config_of(name, **TINY) for name in ("maml", "pretrained")}
    monkeypatch.setattr(sinusoid, "METHODS", tiny)
    results = demo.run(demo.Config(run_dir=tmp_path, num_meta_steps=2))
    assert set(results) == {"maml", "pretrained"}
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    drawn = ("predictions", "inner_steps", "learning_curve")
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("png", "pdf")}
    printed = capsys.readouterr().out
    for published in ("0.67", "0.38", "0.35", "2.41", "2.23", "2.19"):
        assert published in printed


def test_a_mistake_ends_in_a_message_and_no_traceback(tmp_path):
    flags = ["--num-inner-steps", "-1", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sinusoid", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "XDG_CACHE_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert "error: --num-inner-steps must be an integer of at least 0, got -1" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shot": 0}, "--shot must be an integer of at least 1, got 0"),
        ({"meta_batch_size": 0}, "--meta-batch-size must be an integer of at least 1, got 0"),
        ({"num_meta_steps": -1}, "--num-meta-steps must be an integer of at least 0, got -1"),
        ({"eval_episodes": 1}, "--eval-episodes must be an integer of at least 2, got 1"),
        ({"log_every": 3, "val_every": 4}, "--log-every 3 does not divide --val-every 4"),
        ({"chunk_size": 0}, "--chunk-size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "--seed must be an integer of at least 0, got -1"),
        ({"seed": 10**20}, "--seed 100000000000000000000 does not fit into 32 bits"),
        ({"outer_lr": -0.1}, "--outer-lr -0.1 must be a positive number"),
        ({"eval_shots": ()}, "--eval-shots needs positive numbers"),
        ({"eval_query_shot": 0}, "--eval-query-shot must be an integer of at least 1, got 0"),
        ({"inner_lr_grid": ()}, "--inner-lr-grid needs positive rates"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_trained(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of("maml", **settings)


def test_diverged_results_are_shown(capsys):
    results = {
        "algorithm": "maml",
        "protocol": {"episodes": 2},
        "evaluations": [
            {
                "shot": 5,
                "inner_lr": 0.01,
                "metrics": {
                    "mse": {"mean": [1.0, None], "ci95": [0.1, None], "median": [1.0, None], "diverged": [0.0, 1.0]}
                },
            }
        ],
    }
    sinusoid.show(results)
    assert "not finite" in capsys.readouterr().out


def test_tuning_compiles_once_for_all_rates(monkeypatch):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(sinusoid.make_learner, n=1)
    monkeypatch.setattr(sinusoid, "make_learner", lambda *args: counted(*args))
    config = sinusoid.with_paper_defaults(config_of("pretrained", **TINY, eval_shots=(5,)))
    params = models.mlp(features=(40, 40, 1)).init(jax.random.key(0), jnp.zeros((5, 1)))
    sinusoid.test(config, params, sinusoid.test_samplers(config)[5])


def test_rates_are_tuned_on_other_tasks_than_the_test(monkeypatch):
    evaluate, seen = sinusoid.evaluate, []

    def record(learner, params, sample_episode, key, **kwargs):
        seen.append(key)
        return evaluate(learner, params, sample_episode, key, **kwargs)

    monkeypatch.setattr(sinusoid, "evaluate", record)
    config = sinusoid.with_paper_defaults(config_of("pretrained", **TINY, inner_lr_grid=(1e-3, 1e-2), eval_shots=(5,)))
    params = models.mlp(features=(40, 40, 1)).init(jax.random.key(0), jnp.zeros((5, 1)))
    sinusoid.test(config, params, sinusoid.test_samplers(config)[5])
    keys = runs.streams(config.seed)
    assert seen == [keys.tune, keys.tune, keys.test]


@pytest.mark.parametrize(("algorithm", "num_inputs"), [("maml", 1), ("oracle", 3)])
def test_training_tasks_have_the_sizes_of_the_settings(algorithm, num_inputs):
    config = sinusoid.with_paper_defaults(config_of(algorithm, shot=3, query_shot=7))
    episode = jax.eval_shape(sinusoid.training_of(config).sample_episode, jax.random.key(0))
    assert episode.support.inputs.shape == (3, num_inputs)
    assert episode.query.inputs.shape == (7, num_inputs)
