"""The meta-step through pmap, the mean over a mesh, and how a process finds out that it is one of several."""

import importlib.util
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import parallel
from maml_jax.algorithms import maml
from maml_jax.losses import mean_squared_error
from maml_jax.models import mlp
from maml_jax.outer import init_meta_state, make_meta_step
from maml_jax.tasks import sinusoid

MODEL = mlp(features=(8, 1), activation=jnp.tanh)
LEARNER = maml(MODEL, mean_squared_error, inner_optimizer=optax.sgd(0.05), num_inner_steps=2)
SAMPLE = sinusoid.make_sampler(shot=4, query_shot=4)
NUM_TASKS = 8
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "TPU_", "MEGASCALE_")


OPTIMIZER = optax.adam(1e-2)


@jax.jit
def meta_batch(key):
    return jax.vmap(SAMPLE)(jax.random.split(key, NUM_TASKS))


EPISODES = [meta_batch(key) for key in jax.random.split(jax.random.key(1), 3)]


def initial_state():
    return init_meta_state(LEARNER, OPTIMIZER, jax.random.key(0), jnp.zeros((4, 1)))


def trajectory(step, num_steps=3):
    """The states and infos of a few meta-steps, and the first meta-gradient, which is ten times Adam's first mean."""
    state, found = initial_state(), []
    for episodes in EPISODES[:num_steps]:
        state, info = step(state, episodes)
        found.append(jax.tree.map(np.asarray, (state, info)))
    return found, jax.tree.map(lambda mean: 10 * mean, found[0][0].opt_state[0].mu)


@pytest.fixture(scope="module")
def expected():
    """What one device finds."""
    return trajectory(make_meta_step(LEARNER, OPTIMIZER))


def assert_same(found, expected, atol):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_pmap_takes_the_steps_of_one_device(expected, num_devices):
    step = parallel.pmap_meta_step(LEARNER, OPTIMIZER, devices=jax.devices()[:num_devices])
    assert_same(trajectory(step), expected, 1e-5)


def test_pmap_does_not_sum_inner_gradients_over_devices(expected):
    # An all-reduce that crept into the inner gradients would adapt to the tasks of all devices.
    reverse = maml(
        MODEL, mean_squared_error, inner_optimizer=optax.sgd(0.05), num_inner_steps=2, inner_grad=jax.value_and_grad
    )
    step = parallel.pmap_meta_step(reverse, OPTIMIZER, chunk_size=2, devices=jax.devices()[:4])
    assert_same(trajectory(step, 1)[1], expected[1], 1e-5)


@pytest.mark.parametrize(
    ("num_devices", "chunk_size", "message"),
    [
        (3, None, "meta_batch_size=8 does not divide over the 3 devices"),
        (4, 4, "chunk_size=4 does not divide the meta-batch of 2 tasks"),
    ],
)
def test_pmap_refuses_tasks_that_do_not_divide(num_devices, chunk_size, message):
    step = parallel.pmap_meta_step(LEARNER, OPTIMIZER, chunk_size=chunk_size, devices=jax.devices()[:num_devices])
    with pytest.raises(ValueError, match=message):
        step(initial_state(), EPISODES[0])


def test_pmap_leaves_the_state_usable_and_returns_it_on_every_device():
    state = initial_state()
    step = parallel.pmap_meta_step(LEARNER, OPTIMIZER, devices=jax.devices()[:2])
    once, again = step(state, EPISODES[0])[0], step(state, EPISODES[0])[0]
    assert_same(once, again, 0)
    for leaf in jax.tree.leaves(once):
        assert leaf.sharding.device_set == set(jax.devices()[:2])
        assert leaf.is_fully_replicated


# How a process finds out that it is one of several


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
        parallel.initialize(distributed, timeout_seconds=timeout_seconds)
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


def test_the_limits_follow_the_patience(launched):
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


def test_each_task_gathers_its_results_on_every_device():
    mesh = parallel.task_mesh(jax.devices()[:4])
    doubled = parallel.each_task(lambda factor, tasks: {"out": factor * tasks}, mesh)(2.0, jnp.arange(8.0))["out"]
    np.testing.assert_array_equal(doubled, 2 * np.arange(8.0))
    assert doubled.sharding.device_set == set(jax.devices()[:4])
    assert doubled.is_fully_replicated


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def of_two(monkeypatch):
    """This process believes that it is the first of two; returns the list of its ends, as (message, status)."""
    ends = []

    def end(message, code):
        ends.append((message, code))
        raise Ended

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel, "_end", end)
    monkeypatch.setattr(parallel, "_meet", lambda key, what, seconds: None)
    return ends


def test_a_call_that_does_not_end_ends_the_process(of_two, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(parallel, "_end", lambda message, code: (of_two.append((message, code)), ended.set()))
    with parallel.together("the call", seconds=0.1):
        assert ended.wait(timeout=60)
    assert of_two == [("process 0: the call has not ended after 0.1 s; a process or a device hangs", 1)]


def test_a_call_that_ends_in_time_is_let_be(of_two):
    before = threading.active_count()
    with parallel.together("the call", seconds=3600):
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
    with pytest.raises(Ended), parallel.leaving_none_behind():
        raise error
    assert of_two == [("", status)]
    assert ("KeyError: 'mine'" in capsys.readouterr().err) == isinstance(error, KeyError)


def test_an_error_names_those_that_do_not_come(of_two, monkeypatch):
    def meet(key, what, seconds):
        raise parallel.ProcessError(f"{what}: process 1 is missing after {seconds:g} s")

    monkeypatch.setattr(parallel, "_meet", meet)
    with pytest.raises(Ended), parallel.leaving_none_behind():
        raise SystemExit(2)
    assert of_two == [("the end after an error: process 1 is missing after 10 s", 2)]


def test_one_process_waits_for_nobody():
    with parallel.leaving_none_behind(), parallel.together("nothing", seconds=0.001):
        assert parallel.on_first(lambda: {"step": 3}) == {"step": 3}
        assert parallel.differing("flags") == []
    with pytest.raises(KeyError, match="mine"), parallel.leaving_none_behind():
        raise KeyError("mine")
