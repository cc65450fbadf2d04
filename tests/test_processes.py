"""How a process finds out that it is one of several, and how it ends when another one fails."""

import importlib.util
import os
import threading
import time

import jax
import pytest

from maml_jax import processes

LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "TPU_", "MEGASCALE_")


@pytest.fixture
def launched(monkeypatch):
    """Starts from an environment of no launcher; `launched(**env)` adds to it and returns what JAX is asked for."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    asked, updates = [], {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.append(arguments))
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)

    def launch(distributed="auto", timeout_seconds=600.0, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        processes.initialize(distributed, timeout_seconds=timeout_seconds)
        if asked:
            assert updates == {"jax_cpu_collectives_implementation": "gloo", "jax_enable_preemption_service": False}
        return asked.pop() if asked else None

    return launch


SLURM = {"SLURM_JOB_ID": 7, "SLURM_STEP_NODELIST": "n[01-02]", "SLURM_NTASKS": 2, "SLURM_PROCID": 1, "SLURM_LOCALID": 0}
LIMITS = {"initialization_timeout": 600, "heartbeat_timeout_seconds": 100, "shutdown_timeout_seconds": 300}


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0},  # in a script of sbatch, no srun
        SLURM | {"SLURM_NTASKS": 1},
        SLURM | {"SLURM_STEP_NUM_TASKS": 1},  # in the shell of salloc
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": 1},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"},
    ],
)
def test_auto_does_nothing_for_a_single_process(launched, env):
    assert launched(**env) is None


@pytest.mark.parametrize(
    "env",
    [
        SLURM,
        SLURM | {"SLURM_STEP_NUM_TASKS": 2},
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": 2},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "a"},
        {"TPU_ML_PLATFORM": "JAX"},
    ],
)
def test_auto_leaves_it_to_jax_for_one_of_several(launched, env):
    assert launched(**env) == LIMITS


def test_auto_joins_an_indexed_kubernetes_job_if_jax_can(launched, monkeypatch):
    env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": 1}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launched(**env) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "kubernetes")
    assert launched(**env) == LIMITS


def test_an_address_is_taken_from_the_flag_or_the_environment(launched):
    counts = {"JAX_NUM_PROCESSES": 4, "JAX_PROCESS_ID": 3}
    asked = {"coordinator_address": "host:99", "num_processes": 4, "process_id": 3} | LIMITS
    asked |= {"cluster_detection_method": "deactivate"}
    assert launched("host:99", **counts) == asked
    assert launched(JAX_COORDINATOR_ADDRESS="host:99") == asked
    assert launched("off") is None


def test_an_address_under_slurm_leaves_the_counts_to_jax(launched):
    assert launched("host:99", **SLURM) == {"coordinator_address": "host:99"} | LIMITS


def test_the_limits_follow_the_timeout(launched):
    asked = launched(timeout_seconds=20, **SLURM)
    assert asked == dict.fromkeys(LIMITS, 20)


@pytest.mark.parametrize(
    ("distributed", "env", "message"),
    [
        ("always", {}, "is not auto, off or HOST:PORT"),
        ("host:http", {}, "is not auto, off or HOST:PORT"),
        (":99", {}, "is not auto, off or HOST:PORT"),
        ("host:99", {}, r"needs the number of processes in \$JAX_NUM_PROCESSES"),
        ("host:99", {"JAX_NUM_PROCESSES": 2}, r"the index of this one, from 0, in \$JAX_PROCESS_ID"),
        ("host:99", {"JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": "one"}, "must be whole numbers"),
    ],
)
def test_what_cannot_be_a_job_is_refused(launched, distributed, env, message):
    with pytest.raises(ValueError, match=message):
        launched(distributed, **env)


class Ended(BaseException):
    """Raised in place of the exit of the process."""


@pytest.fixture
def of_two(monkeypatch):
    """This process believes that it is the first of two; returns the list of its ends, as (message, status)."""
    ends = []

    def end(message, code):
        ends.append((message, code))
        raise Ended

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "_exit", end)
    monkeypatch.setattr(processes, "_barrier", lambda key, what, seconds: None)
    return ends


def test_a_call_that_does_not_end_ends_the_process(of_two, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(processes, "_exit", lambda message, code: (of_two.append((message, code)), ended.set()))
    with processes.watchdog("the call", seconds=0.1):
        assert ended.wait(timeout=60)
    assert of_two == [("process 0: the call has not ended after 0.1 s; a process or a device hangs", 1)]


def test_a_call_that_ends_in_time_is_let_be(of_two):
    before = threading.active_count()
    with processes.watchdog("the call", seconds=3600):
        assert threading.active_count() == before + 1
    for _ in range(600):
        if threading.active_count() == before:
            break
        time.sleep(0.1)
    assert threading.active_count() == before
    assert of_two == []


@pytest.mark.parametrize(
    ("error", "status"), [(SystemExit(2), 2), (SystemExit("words"), 1), (KeyError("mine"), 1), (KeyboardInterrupt(), 1)]
)
def test_an_error_ends_the_process_when_it_is_one_of_several(of_two, capsys, error, status):
    with pytest.raises(Ended), processes.exit_on_error():
        raise error
    assert of_two == [("", status)]
    assert ("KeyError: 'mine'" in capsys.readouterr().err) == isinstance(error, KeyError)


@pytest.mark.parametrize(("index", "waits"), [(0, [1.0]), (1, [])])
def test_process_zero_leaves_last_after_an_error(of_two, monkeypatch, index, waits):
    slept = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    with pytest.raises(Ended), processes.exit_on_error():
        raise SystemExit(2)
    assert slept == waits


def test_an_error_names_those_that_do_not_come(of_two, monkeypatch):
    def barrier(key, what, seconds):
        raise processes.ProcessError(f"{what}: process 1 is missing after {seconds:g} s")

    monkeypatch.setattr(processes, "_barrier", barrier)
    with pytest.raises(Ended), processes.exit_on_error():
        raise SystemExit(2)
    assert of_two == [("the end after an error: process 1 is missing after 30 s", 2)]


def test_one_process_waits_for_nobody():
    with processes.exit_on_error(), processes.watchdog("nothing", seconds=0.001):
        assert processes.on_process_zero(lambda: {"step": 3}) == {"step": 3}
        assert processes.processes_that_differ("flags") == []
    with pytest.raises(KeyError, match="mine"), processes.exit_on_error():
        raise KeyError("mine")
