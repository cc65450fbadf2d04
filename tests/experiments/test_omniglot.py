"""The Omniglot experiment in miniature, on made-up and on real characters."""

import json
import os

import numpy as np
import pytest

from experiments import omniglot, runs

TINY = {
    "num_meta_steps": 4,
    "val_every": 2,
    "log_every": 1,
    "meta_batch_size": 4,
    "eval_episodes": 4,
    "network": "mlp",
}


@pytest.fixture
def drawings(monkeypatch):
    """Random characters in place of the data set, fewer of them."""
    images = np.random.default_rng(0).integers(0, 2, (30, 20, 28, 28, 1)).astype(np.uint8) * 255
    parts = {"train": images[:15], "val": images[15:22], "test": images[22:]}
    monkeypatch.setattr(omniglot.omniglot, "load", lambda split, data_dir: parts[split])


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile", "pretrained"])
def test_every_algorithm_runs(algorithm, drawings, tmp_path):
    results = omniglot.run(omniglot.Config(algorithm=algorithm, run_dir=tmp_path, **TINY))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    accuracy = results["metrics"]["accuracy"]
    assert len(accuracy["mean"]) == len(accuracy["ci95"]) == 4  # before, and after each of 3 steps
    assert results["protocol"]["selected_step"] in (2, 4)
    for name in ("config.json", "metrics.jsonl", "checkpoints", "figures/learning_curve.png"):
        assert (tmp_path / name).exists()


def test_a_finished_run_is_shown_and_not_overwritten(drawings, tmp_path):
    config = omniglot.Config(run_dir=tmp_path, **TINY)
    first = omniglot.run(config)
    written = (tmp_path / "results.json").stat().st_mtime_ns
    assert omniglot.run(config) == first
    assert (tmp_path / "results.json").stat().st_mtime_ns == written


def test_defaults_are_those_of_the_paper():
    five = omniglot.with_paper_defaults(omniglot.Config())
    twenty = omniglot.with_paper_defaults(omniglot.Config(way=20, shot=5))
    assert (five.query_shot, five.meta_batch_size, five.num_inner_steps, five.eval_inner_steps) == (1, 32, 1, 3)
    assert (twenty.query_shot, twenty.meta_batch_size, twenty.num_inner_steps, twenty.eval_inner_steps) == (5, 16, 5, 5)
    assert five.inner_lr == pytest.approx(0.4 * 5)
    assert twenty.inner_lr == pytest.approx(0.1 * 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"way": 8}, r"split 'val' of Omniglot: way=8 exceeds the 7 classes of the split"),
        (
            {"shot": 15, "query_shot": 6},
            r"split 'train' of Omniglot: shot=15 plus query_shot=6 exceeds the 20 examples",
        ),
        ({"num_inner_steps": -2}, r"num_inner_steps must be an integer of at least 0, got -2"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(settings, message, drawings, tmp_path):
    with pytest.raises((runs.RunError, ValueError), match=message):
        omniglot.run(omniglot.Config(run_dir=tmp_path / "run", **{**TINY, **settings}))
    assert not (tmp_path / "run").exists()


def test_a_missing_data_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Omniglot at .*nowhere.*experiments.prepare_omniglot"):
        omniglot.run(omniglot.Config(data_dir=tmp_path / "nowhere", run_dir=tmp_path / "run", **TINY))


@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ,
    reason="set TFDS_DATA_DIR to a directory made by `python -m experiments.prepare_omniglot --data-dir DIR`",
)
def test_real_characters(tmp_path):
    results = omniglot.run(omniglot.Config(run_dir=tmp_path, **TINY))
    assert 0.0 <= results["metrics"]["accuracy"]["mean"][-1] <= 1.0
