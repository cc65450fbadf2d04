"""The training loop of the experiments."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest

from experiments import common, runs
from maml_jax import losses, maml, models
from maml_jax.tasks import sinusoid


@dataclasses.dataclass(frozen=True)
class Config:
    num_meta_steps: int = 12
    meta_batch_size: int = 4
    val_every: int = 4
    log_every: int = 2
    eval_episodes: int = 2
    eval_inner_steps: int = 1
    chunk_size: int | None = None
    seed: int = 0
    run_dir: Path | None = None


OPTIMIZER = optax.adam(1e-2)
SAMPLE = sinusoid.make_sampler(shot=3, query_shot=3)
LEARNER = maml(
    models.mlp(features=(8, 1)), losses.mean_squared_error, inner_optimizer=optax.sgd(0.01), num_inner_steps=1
)


def train(run_dir, config=Config(), validate=None):
    with runs.open_run(run_dir, config):
        return common.train(run_dir, config, LEARNER, OPTIMIZER, SAMPLE, validate=validate)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = train(tmp_path / "whole")
    assert whole.execution == {"devices": 4, "chunk_size": 1}
    calls = []

    def interrupt(params):
        calls.append(params)
        if len(calls) == 2:  # the state of step 4 is saved, that of step 8 is not
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halves", validate=interrupt)
    resumed = train(tmp_path / "halves")
    chex.assert_trees_all_equal(resumed.params, whole.params)
    steps = {
        name: [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    }
    assert steps["whole"] == steps["halves"] == [2, 4, 6, 8, 10, 12]


def test_a_killed_process_resumes_to_the_same_parameters(tmp_path):
    flags = [
        "--num-meta-steps",
        "4000",
        "--val-every",
        "500",
        "--log-every",
        "100",
        "--eval-episodes",
        "2",
        "--eval-shots",
        "5",
    ]
    command = [sys.executable, "-m", "experiments.sinusoid", *flags, "--run-dir"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoints/[0-9]*")):
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], env=environment, check=True, stdout=subprocess.DEVNULL)
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole")]
    assert found[0]["metrics"] == found[1]["metrics"]


def test_the_best_validated_state_is_returned_and_survives_an_interruption(tmp_path):
    seen, scores = [], iter([0.1, 0.9, 0.3])

    def validate(params):
        seen.append(jax.tree.map(np.asarray, params))
        return next(scores)

    trained = train(tmp_path, validate=validate)
    assert trained.best_step == 8
    chex.assert_trees_all_equal(trained.params, seen[1])
    again = train(tmp_path, validate=validate)  # finished: nothing is trained or validated
    assert again.best_step == 8
    chex.assert_trees_all_equal(again.params, seen[1])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    diverging = LEARNER._replace(
        objective=lambda params, episode: (LEARNER.objective(params, episode)[0] / 0.0, None),
    )
    config = Config()
    with (
        runs.open_run(tmp_path, config),
        pytest.raises(runs.RunError, match=r"not finite from step 0 on; lower --outer-lr"),
    ):
        common.train(tmp_path, config, diverging, OPTIMIZER, SAMPLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_meta_steps": -1}, r"--num-meta-steps -1 is too small; give at least 0"),
        ({"eval_episodes": 1}, r"--eval-episodes 1 is too small; give at least 2"),
        ({"log_every": 3}, r"--log-every 3 does not divide --val-every 4"),
        ({"log_every": 0}, r"--log-every 0 is too small"),
    ],
)
def test_impossible_counts_are_refused(change, message):
    with pytest.raises(runs.RunError, match=message):
        common.check_config(dataclasses.replace(Config(), **change))


def test_a_mesh_is_the_largest_that_divides():
    assert jax.device_count() == 8
    assert common.mesh_for(32).size == 8
    assert common.mesh_for(12).size == 6
    assert common.mesh_for(25).size == 5
    assert common.mesh_for(11) is None
