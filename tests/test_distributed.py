"""Several real processes on this machine, started as a user would and as SLURM would, beside one; and faults."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import cli, omniglot

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "experiments" / "launch"
LIMIT = 240  # seconds for a job, which takes about 15 on two free cores and many times that on busy ones
TIMEOUT = 60  # where a job is to lose it: enough for one process to compile while the other waits
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "TPU_", "MEGASCALE_", "WORKER_")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def alone(**env):
    """Environment and flags of a job of one process."""
    return [(env, ["--distributed", "off"])]


def explicit(num_processes, **env):
    """Those of each process of a job that is given an address."""
    flag = ["--distributed", f"127.0.0.1:{free_port()}"]
    return [(env | {"JAX_NUM_PROCESSES": num_processes, "JAX_PROCESS_ID": i}, flag) for i in range(num_processes)]


STUBS = {
    "srun": """#!/usr/bin/env bash
        while [[ $1 == --* ]]; do shift; done # its own options
        for ((i = 0; i < SLURM_NTASKS; i++)); do
          SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS "$@" &
          started+=($!)
        done
        status=0
        for process in "${started[@]}"; do wait "$process" || status=$?; done
        exit "$status"
        """,
    "scontrol": """#!/usr/bin/env bash
        echo "scontrol $*"
        """,
}


def slurm_script(tmp_path, num_processes):
    """Environment and command of the job script on a machine whose `srun` starts processes here."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": ROOT}
    env |= {"SLURM_JOB_ID": 4242, "SLURM_NTASKS": num_processes, "JAX_COORDINATOR_PORT": free_port()}
    return env, ["bash", str(LAUNCH / "slurm.sbatch")]


class Job:
    """The processes of one job; leaving the context ends those that still run."""

    def __init__(self, run_dir, cache, processes, command=(sys.executable, "-m")):
        shared = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)} | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the programs are tiny, and compiling them is most of the time
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(cache),
        }
        self.processes = [
            subprocess.Popen(
                [*command, "tests.distributed_worker", "--run-dir", str(run_dir), *flags],
                cwd=ROOT,
                env=shared | {name: str(value) for name, value in env.items()},
                start_new_session=True,  # so that what a script started ends with it
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for env, flags in processes
        ]
        self.deadline = time.monotonic() + LIMIT

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def wait(self, index=0):
        """Exit status, standard output and error of a process, which must end in time."""
        process = self.processes[index]
        out, err = process.communicate(timeout=max(self.deadline - time.monotonic(), 1))
        return process.returncode, out, err

    def succeed(self):
        """What process 0 printed; all must end well, and the others print nothing of their own."""
        printed = []
        for index in range(len(self.processes)):
            status, out, err = self.wait(index)
            assert status == 0, err
            printed.append([line for line in out.splitlines() if "Gloo" not in line])  # gloo itself greets
        assert not any(printed[1:])
        return "\n".join(printed[0])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def lost(tmp_path_factory, cache):
    """Jobs that lose a process, begun together, because they wait most of the time."""
    folder = tmp_path_factory.mktemp("lost")
    jobs = {
        fault: Job(
            folder / fault, cache, explicit(2, WORKER_FAULT=f"{fault}:1", MAML_JAX_PROCESS_TIMEOUT_SECONDS=TIMEOUT)
        )
        for fault in ("stop", "hang")
    }
    yield jobs
    for job in jobs.values():
        job.__exit__()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, cache):
    """The run directory of one process that trained to the end."""
    run_dir = tmp_path_factory.mktemp("one")
    with Job(run_dir, cache, alone()) as job:
        assert "step 12/12" in job.succeed()
    return run_dir


def assert_same_run(run_dir, num_processes, one_process):
    """The parameters of every process, the log and the results are those of one process."""
    with np.load(one_process / "process-0-of-1.npz") as file:
        expected = list(file.values())
    for index in range(num_processes):
        with np.load(run_dir / f"process-{index}-of-{num_processes}.npz") as file:
            found = list(file.values())
        assert found[0] == expected[0]  # the step that validation chose
        for got, want in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, one_process)
    ]
    assert [record["step"] for record in logs[0]] == [2, 4, 6, 8, 10, 12]
    for got, want in zip(*logs, strict=True):
        assert got.keys() == want.keys()
        for name in got.keys() - {"steps_per_second"}:
            assert got[name] == pytest.approx(want[name], abs=1e-5)
    results = [json.loads((folder / "results.json").read_text()) for folder in (run_dir, one_process)]
    assert results[0]["config"] == results[1]["config"]
    for got, want in zip(*(result["per_episode"] for result in results), strict=True):
        assert got == pytest.approx(want, abs=1e-5)


def test_two_processes_go_on_after_one_is_killed(tmp_path, cache, one_process):
    run_dir = tmp_path / "run"
    with Job(run_dir, cache, explicit(2, WORKER_FAULT="kill:1")) as job:
        status, out, err = job.wait()
        assert status not in (0, None)
        assert job.wait(1)[0] == -9
    assert "step 4/12" in out
    assert "step 8/12" not in out
    assert "task names:\n1" in err or "Task 1 heartbeat timeout" in err, err
    # The first call is saved, and every validation.
    assert sorted(entry.name for entry in (run_dir / "checkpoints").iterdir()) == ["2", "4"]

    # Here one process would save after every call and the other would not: saving takes both.
    env, command = slurm_script(tmp_path, 2)
    with Job(run_dir, cache, [(env | {"WORKER_FAULT": "clock:1"}, [])], command) as job:
        out = job.succeed()
    assert "from step 4" in out
    assert "step 4/12" not in out
    assert "step 12/12" in out
    assert_same_run(run_dir, 2, one_process)


def test_two_processes_save_when_one_is_asked_to_end(tmp_path, cache):
    run_dir = tmp_path / "run"
    with Job(run_dir, cache, explicit(2, WORKER_FAULT="end:1")) as job:
        for index in range(2):
            status, out, err = job.wait(index)
            assert status == 128 + signal.SIGTERM, err
            if index == 0:
                assert "stopped after step 8; the same command resumes from there" in out
    assert (run_dir / "checkpoints" / "8").is_dir()


def test_a_mistake_seen_by_process_0_ends_all_with_its_message(tmp_path, cache):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Job(tmp_path, cache, explicit(2)) as job:
            for index in range(2):
                status, _, err = job.wait(index)
                assert status == 2
                assert f"the run directory {tmp_path} is in use by a running process" in err
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_processes_with_different_flags_end(tmp_path, cache):
    first, second = explicit(2)
    with Job(tmp_path, cache, [first, (second[0], [*second[1], "--seed", "1"])]) as job:
        for index in range(2):
            status, _, err = job.wait(index)
            assert status == 2
            assert "of the processes, [1] were started with other settings or data than process 0" in err
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_stopped_process_is_missed(lost):
    # It sends no heartbeats any more.
    status, _, err = lost["stop"].wait()
    assert status not in (0, None)
    assert "Task 1 heartbeat timeout" in err or "stopped sending heartbeats):\n1" in err, err


@pytest.mark.slow
def test_a_hanging_process_is_named_and_ended(lost):
    # It sends heartbeats, and is missed where the processes meet.
    status, _, err = lost["hang"].wait()
    assert status == 2
    assert f"process 0 of 2 waited {TIMEOUT} s for the others before the start of training, and not all came" in err
    assert "task names:\n1" in err, err
    assert lost["hang"].wait(1)[0] not in (0, None)


# What starts jobs elsewhere


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (2, 0, False), (134, 0, True), (137, 2, True), (137, 3, False)]
)
def test_the_slurm_script_requeues_what_another_try_may_mend(tmp_path, status, restarts, requeued):
    env, command = slurm_script(tmp_path, 1)
    (tmp_path / "srun").write_text(f'#!/usr/bin/env bash\necho ran "$@"\nexit {status}\n')
    done = subprocess.run(
        [*command, "experiments.omniglot", "--way", "20"],
        env={name: str(value) for name, value in (env | {"SLURM_RESTART_COUNT": restarts}).items()},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == status, done.stderr
    ran = f"ran --kill-on-bad-exit=1 --label {sys.executable} -m experiments.omniglot --way 20\n"
    assert done.stdout == ran + requeued * "scontrol requeue 4242\n"


def test_the_slurm_script_asks_for_a_module(tmp_path):
    env, command = slurm_script(tmp_path, 1)
    done = subprocess.run(
        command, env={name: str(value) for name, value in env.items()}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "give the module to run" in done.stderr


def test_the_kubernetes_manifest_fits_together():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    # The pods find each other as JOB-INDEX.SERVICE, before they are ready.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy needs
    assert spec["completionMode"] == "Indexed"
    container = pod["containers"][0]
    env = {entry["name"]: entry for entry in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(env["JAX_NUM_PROCESSES"]["value"])
    index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}

    assert container["command"] == ["python", "-m", "experiments.omniglot"]
    config = cli.parse(omniglot.METHODS, "", container["args"])
    host, port = config.distributed.split(":")
    assert host == f"{name}-0.{service['metadata']['name']}"
    assert 1024 < int(port) < 65536
    assert Path(mounted["runs"]) in config.run_dir.parents
    devices = spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.meta_batch_size % devices == config.eval_episodes % devices == 0
