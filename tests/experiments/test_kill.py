"""A run that is really killed, again and again, against one that never was."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import train_worker

from maml_jax import checkpoint

KILLS = 20
TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}


def command(run_dir, steps, *limit):
    return [sys.executable, str(TESTS / "train_worker.py"), str(run_dir), str(steps), *limit]


def lines(run_dir):
    """What was logged, without the speed."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "steps_per_second"} for record in records]


def arrays(run_dir, step):
    """The files of a checkpoint but for the seconds of training, by their arrays."""
    with checkpoint._checkpointer() as checkpointer:
        found = checkpointer.restore((run_dir / "checkpoints" / str(step)).resolve())
    return {name: np.asarray(value) for name, value in found.items() if "train_seconds" not in name}


@pytest.fixture
def forks(monkeypatch):
    """Starts processes by forking one that has imported everything and has no JAX backend yet."""
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_worker"])
    return context.Process


def test_twenty_kills_at_random_moments_lose_nothing(tmp_path, forks):
    rng = random.Random(0)
    reached, within_a_checkpoint = [], 0
    run_dir = tmp_path / "killed"
    for kill in range(KILLS):
        before = checkpoint.latest(run_dir / "checkpoints") or 0
        process = forks(target=train_worker.train, args=(run_dir, 100_000))
        process.start()
        deadline = time.monotonic() + 120
        # Every second one at any moment from its start on: before and while it restores, cuts its log and compiles.
        while kill % 2 == 0 and (checkpoint.latest(run_dir / "checkpoints") or 0) <= before:
            assert process.is_alive(), "the worker ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 2.0 if kill % 2 else 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        within_a_checkpoint += bool(list((run_dir / "checkpoints").glob(".incomplete*")))
        reached.append(checkpoint.latest(run_dir / "checkpoints"))
    assert reached == sorted(reached), "every process went on from where the one before had come to"
    assert len(set(reached)) >= KILLS // 2
    assert within_a_checkpoint, "no process was killed while it wrote a checkpoint"
    steps = reached[-1] + 3
    (run_dir / "config.json").unlink()  # it asks for more meta-steps than are wanted now
    for of_run in (run_dir, tmp_path / "whole"):
        process = forks(target=train_worker.train, args=(of_run, steps))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert lines(run_dir) == lines(tmp_path / "whole")
    assert [record["step"] for record in lines(run_dir)] == list(range(1, steps + 1))
    found, expected = arrays(run_dir, steps), arrays(tmp_path / "whole", steps)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_its_code_and_nothing_is_lost(tmp_path, number):
    process = subprocess.Popen(command(tmp_path / "run", 100_000), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while checkpoint.latest(tmp_path / "run" / "checkpoints") is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert f"stopped after step {step}; the same command resumes from there" in said
    assert lines(tmp_path / "run")[-1]["step"] == step
    checkpoint._verify(tmp_path / "run" / "checkpoints" / str(step))


LONG_CALL = """
import sys
import jax, jax.numpy as jnp
from experiments import common
common.STOP_SECONDS = float(sys.argv[1])
long = jax.jit(lambda x: jax.lax.while_loop(lambda y: y < 2.0, jnp.sin, x)).lower(1.0).compile()  # for ever
with common.stop_requests(lambda: 7):
    print("started", flush=True)
    long(1.0).block_until_ready()
"""


@pytest.mark.parametrize(("seconds", "signals"), [(0.5, 1), (600, 2)])
def test_a_compiled_call_that_takes_too_long_is_left(tmp_path, seconds, signals):
    """After the deadline, or at once with a second signal; the main thread never leaves the compiled call."""
    (tmp_path / "long.py").write_text(LONG_CALL)
    of_call = [sys.executable, str(tmp_path / "long.py"), str(seconds)]
    process = subprocess.Popen(of_call, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "interrupt again to stop at once" in said
    assert ("the compiled call or the validation after step 7 takes too long" in said) == (signals == 1)


def test_a_full_disk_ends_the_run_and_leaves_the_earlier_state_intact(tmp_path):
    """No file may grow beyond a limit, as if the disk was full; the parameters do not fit, the settings do."""
    run_dir = tmp_path / "run"
    subprocess.run(command(run_dir, 3), env=ENVIRONMENT, check=True)
    # It reads compiled programs, and writes none.
    environment = ENVIRONMENT | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    ended = subprocess.run(command(run_dir, 6, "3000"), env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "cannot be written (File too large)" in ended.stderr, ended.stderr
    assert checkpoint.latest(run_dir / "checkpoints") == 3
    checkpoint._verify(run_dir / "checkpoints" / "3")
    subprocess.run(command(run_dir, 6), env=ENVIRONMENT, check=True)
    assert [record["step"] for record in lines(run_dir)] == [1, 2, 3, 4, 5, 6]
