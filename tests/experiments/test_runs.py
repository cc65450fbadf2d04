"""Run directories: whose they are, and what they hold."""

import dataclasses
import json
import subprocess
import sys

import pytest

from experiments import runs


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


def claim(run_dir, config=Config()):
    with runs.open_run(run_dir, config):
        pass


def test_a_directory_of_another_configuration_is_refused(tmp_path):
    claim(tmp_path)
    claim(tmp_path)
    with pytest.raises(runs.RunError, match=r"another configuration: seed is 0 there and 1 here\. Choose"):
        claim(tmp_path, Config(seed=1))
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 0}


def test_a_directory_held_by_a_live_process_is_refused(tmp_path):
    holder = (
        "import fcntl, sys, time\n"
        f"lock = open({str(tmp_path / 'lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(runs.RunError, match=r"in use by a running process; .* another --run-dir"):
            claim(tmp_path)
        process.kill()
    claim(tmp_path)  # the lock ended with the process that held it


def test_numbers_that_are_not_finite_are_stored_as_null(tmp_path):
    runs.write_json(tmp_path / "numbers.json", {"mean": [1.0, float("nan"), float("inf")]})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"mean": [1.0, None, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["numbers.json"]
