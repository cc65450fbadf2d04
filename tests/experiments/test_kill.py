"""A run that is really killed, again and again, against one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from maml_jax import checkpoint

KILLS = 20
# A checkpoint at every meta-step, so that a process is often killed within one.
WORKER = """
import sys
from pathlib import Path
import jax, optax
jax.config.update("jax_num_cpu_devices", 1)
from experiments import common, runs, sinusoid
from maml_jax import losses, maml, models
from maml_jax.tasks import sinusoid as tasks
import dataclasses

run_dir, steps = Path(sys.argv[1]), int(sys.argv[2])
config = dataclasses.replace(
    sinusoid.METHODS["maml"], num_meta_steps=steps, meta_batch_size=2, query_shot=3, val_every=1, log_every=1,
    eval_episodes=2, chunk_size=2,
)
learner = maml(
    models.mlp(features=(64, 64, 1)), losses.mean_squared_error, inner_optimizer=optax.sgd(0.01), num_inner_steps=1
)
with runs.open_run(run_dir, config):
    print("claimed", flush=True)
    common.train(run_dir, config, learner, tasks.make_sampler(shot=3, query_shot=3))
"""


def start(worker, run_dir, steps, **keywords):
    command = [sys.executable, str(worker), str(run_dir), str(steps)]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, **keywords)


def lines(run_dir):
    """What was logged, without the speed."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "steps_per_second"} for record in records]


def arrays(run_dir, step):
    """The files of a checkpoint but for the seconds of training, by their arrays."""
    with checkpoint._checkpointer() as checkpointer:
        found = checkpointer.restore((run_dir / "checkpoints" / str(step)).resolve())
    return {name: np.asarray(value) for name, value in found.items() if "train_seconds" not in name}


def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    rng = random.Random(0)
    reached, within_a_checkpoint = [], 0
    run_dir = tmp_path / "killed"
    for _ in range(KILLS):
        process = start(worker, run_dir, 100_000, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"claimed\n"
        before = checkpoint.latest(run_dir / "checkpoints") or 0
        deadline = time.monotonic() + 120
        while (checkpoint.latest(run_dir / "checkpoints") or 0) <= before:
            assert process.poll() is None, "the worker ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        within_a_checkpoint += bool(list((run_dir / "checkpoints").glob(".incomplete*")))
        reached.append(checkpoint.latest(run_dir / "checkpoints"))
    assert reached == sorted(set(reached)), "every process went on from where the one before had come to"
    assert within_a_checkpoint, "no process was killed while it wrote a checkpoint"
    steps = reached[-1] + 3
    (run_dir / "config.json").unlink()  # it asks for more meta-steps than are wanted now
    for of_run in (run_dir, tmp_path / "whole"):
        assert start(worker, of_run, steps).wait() == 0
    assert lines(run_dir) == lines(tmp_path / "whole")
    assert [record["step"] for record in lines(run_dir)] == list(range(1, steps + 1))
    found, expected = arrays(run_dir, steps), arrays(tmp_path / "whole", steps)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_its_code_and_nothing_is_lost(tmp_path, number):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    process = start(worker, tmp_path / "run", 100_000, stdout=subprocess.PIPE, text=True)
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
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "long.py"), str(seconds)]
    environment = os.environ | {"PYTHONPATH": root}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "interrupt again to stop at once" in said
    assert ("compiled call after step 7 takes too long" in said) == (signals == 1)


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
exec(open(sys.argv[4]).read())
"""


def test_a_full_disk_ends_the_run_and_leaves_the_earlier_state_intact(tmp_path):
    """No file may grow beyond a limit, as if the disk was full; the parameters do not fit, the settings do."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    assert start(worker, tmp_path / "run", 3).wait() == 0
    (tmp_path / "full.py").write_text(FULL_DISK)
    command = [sys.executable, str(tmp_path / "full.py"), str(tmp_path / "run"), "6", "3000", str(worker)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_COMPILATION_CACHE_DIR": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "cannot be written" in ended.stderr, ended.stderr
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == 3
    checkpoint._verify(tmp_path / "run" / "checkpoints" / "3")
    assert start(worker, tmp_path / "run", 6).wait() == 0
    assert start(worker, tmp_path / "whole", 6).wait() == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
