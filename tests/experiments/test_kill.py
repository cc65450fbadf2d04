"""A run that is really killed, again and again, against one that never was."""

import fnmatch
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import photographs
import pytest
import train_worker

from maml_jax import checkpoint

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


def kill_again_and_again(forks, train, run_dir, checkpoints, kills):
    """Starts `train` and kills it at random moments.

    Returns:
      The newest checkpoint after each kill, and how many processes were killed within one.
    """
    rng = random.Random(0)
    reached, within_a_checkpoint = [], 0
    for kill in range(kills):
        before = checkpoint.latest(checkpoints) or 0
        process = forks(target=train, args=(run_dir, 100_000))
        process.start()
        deadline = time.monotonic() + 120
        # Every second one at any moment from its start on: before and while it restores, cuts its log and compiles.
        while kill % 2 == 0 and (checkpoint.latest(checkpoints) or 0) <= before:
            assert process.is_alive(), "the worker ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 2.0 if kill % 2 else 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        within_a_checkpoint += bool(list(checkpoints.glob(".incomplete*")))
        reached.append(checkpoint.latest(checkpoints))
    assert reached == sorted(reached), "every process went on from where the one before had come to"
    return reached, within_a_checkpoint


def finish(forks, train, run_dir, steps):
    """Runs `train` to its end."""
    for file in run_dir.rglob("config.json"):
        # It asks for more meta-steps than are wanted now, and a run is only continued with more.
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_meta_steps": 1}))
    process = forks(target=train, args=(run_dir, steps))
    process.start()
    process.join()
    assert process.exitcode == 0


def assert_same(run_dir, whole, steps):
    """The logs and the last checkpoints of two run directories are equal, bit for bit."""
    assert lines(run_dir) == lines(whole)
    assert [record["step"] for record in lines(run_dir)] == list(range(1, steps + 1))
    found, expected = arrays(run_dir, steps), arrays(whole, steps)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing(kills, tmp_path, forks):
    run_dir, whole = tmp_path / "killed", tmp_path / "whole"
    reached, within = kill_again_and_again(forks, train_worker.train, run_dir, run_dir / "checkpoints", kills)
    assert len(set(reached)) >= kills // 2
    if kills == 20:  # of fewer there may be none
        assert within, "no process was killed while it wrote a checkpoint"
    for directory in (run_dir, whole):
        finish(forks, train_worker.train, directory, reached[-1] + 3)
    assert_same(run_dir, whole, reached[-1] + 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "seeds"), [(train_worker.train_seeds, ("seed-0", "seed-1")), (train_worker.train_streamed, ("",))]
)
def test_kills_of_several_seeds_and_of_a_validated_and_streamed_run_lose_nothing(tmp_path, forks, train, seeds):
    counts = {f"{split}/{split} {name}": 3 for split in ("train", "val", "test") for name in ("ant", "bee", "cat")}
    photographs.write_folder(tmp_path / "photographs", photographs.files(counts))
    run_dir, whole = tmp_path / "killed", tmp_path / "whole"
    reached, _ = kill_again_and_again(forks, train, run_dir, run_dir / seeds[0] / "checkpoints", 8)
    assert len(set(reached)) >= 4
    steps = reached[-1] + 3
    for directory in (run_dir, whole):
        finish(forks, train, directory, steps)
    for seed in seeds:
        assert_same(run_dir / seed, whole / seed, steps)
        killed, alone = (json.loads((of / seed / "results.json").read_text()) for of in (run_dir, whole))
        assert killed["metrics"] == alone["metrics"]
        assert killed["protocol"] == alone["protocol"]  # also which state was selected


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


def described_names():
    """Patterns of the names that the documentation's table of a run directory has."""
    page = (TESTS.parent / "docs" / "how-to" / "runs.md").read_text()
    text = page.partition("## What a run directory holds")[2].partition("##")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    names = [name.split("/")[0] for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [re.sub("[A-Z]+", "*", name) for name in names if not name.startswith(".")]


def test_several_seeds_end_with_one_step_after_a_signal_and_go_on(tmp_path, forks):
    run_dir, whole = tmp_path / "stopped", tmp_path / "whole"
    process = forks(target=train_worker.train_seeds, args=(run_dir, 100_000))
    process.start()
    deadline = time.monotonic() + 120
    while checkpoint.latest(run_dir / "seed-1" / "checkpoints") is None:
        assert process.is_alive(), "the worker ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    reached = {checkpoint.latest(run_dir / seed / "checkpoints") for seed in ("seed-0", "seed-1")}
    assert len(reached) == 1
    steps = reached.pop() + 3
    for directory in (run_dir, whole):
        finish(forks, train_worker.train_seeds, directory, steps)
    for seed in ("seed-0", "seed-1"):
        assert_same(run_dir / seed, whole / seed, steps)
    found = {file.name for directory in (run_dir, run_dir / "seed-0") for file in directory.iterdir()}
    assert {"seeds.json", "config.json", "results.json", "lock"} < found
    assert not [name for name in found if not any(fnmatch.fnmatch(name, known) for known in described_names())]


LONG_TEST = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from experiments import runs, sinusoid
long = jax.jit(lambda x: jax.lax.while_loop(lambda y: y < 2.0, jnp.sin, x)).lower(1.0).compile()  # for ever
def test():
    print("started", flush=True)
    long(1.0).block_until_ready()
runs.finish(Path(sys.argv[1]), "sinusoid", sinusoid.METHODS["maml"], None, {}, test)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_test_ends_it_at_once(tmp_path, number):
    (tmp_path / "long.py").write_text(LONG_TEST)
    of_test = [sys.executable, str(tmp_path / "long.py"), str(tmp_path)]
    process = subprocess.Popen(of_test, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the training is kept, and the same command does the test" in said
    assert not (tmp_path / "results.json").exists()


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
