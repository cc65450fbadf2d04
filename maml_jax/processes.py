"""Several processes as one job: how they start, wait for each other, and end when one of them fails."""

import contextlib
import faulthandler
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class ProcessError(RuntimeError):
    """Another process failed, ended, or did not arrive in time."""


def initialize(distributed: str = "auto", *, timeout_seconds: float = 600.0) -> None:
    """Connects this process to the others of its job with `jax.distributed`. Call it before any device is used.

    Args:
      distributed: one of
        "off": one process.
        HOST:PORT: the address at which process 0 listens. The number of processes and the index of this one
        are read from $JAX_NUM_PROCESSES and $JAX_PROCESS_ID. If they are not set, JAX takes them from SLURM,
        Open MPI or Kubernetes.
        "auto": $JAX_COORDINATOR_ADDRESS if it is set. Otherwise JAX configures itself if SLURM, Open MPI or
        Kubernetes (with the package `kubernetes`) started several processes, or on a TPU pod. Otherwise one
        process.
      timeout_seconds: how long to wait for the other processes. A process that dies or hangs is detected
        after the smaller of this and 100 seconds.

    Raises:
      ValueError: if `distributed` is none of these, or the number or index of processes is unknown.
      RuntimeError: if a device was used before, or the other processes do not connect in time.
    """
    if distributed == "off":
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") if distributed == "auto" else distributed
    if address is None and not _started_as_one_of_several():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The preemption service replaces the handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **({} if address is None else _explicit(address)),
        initialization_timeout=int(timeout_seconds),
        heartbeat_timeout_seconds=int(min(timeout_seconds, 100)),
        shutdown_timeout_seconds=int(min(timeout_seconds, 300)),
    )


def _started_as_one_of_several() -> bool:
    """Whether a launcher that JAX knows started several processes."""
    env = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm):  # a shell of salloc sets them too, for a step of one task
        return int(env["SLURM_NTASKS"]) > 1 and int(env.get("SLURM_STEP_NUM_TASKS", 2)) > 1
    if "OMPI_MCA_orte_hnp_uri" in env:
        return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return importlib.util.find_spec("kubernetes") is not None
    if hosts := env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES")):
        return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in env
    # JAX sets the first where it finds TPU chips. The second says that the chips belong to no pod.
    return "TPU_ML_PLATFORM" in env and "TPU_SKIP_MDS_QUERY" not in env


def _explicit(address: str) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` for a given address of process 0."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"distributed={address!r} is not auto, off or HOST:PORT")
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    found = {argument: os.environ[name] for argument, name in names.items() if name in os.environ}
    if len(found) < 2 and not _started_as_one_of_several():
        raise ValueError(
            f"distributed={address!r} needs the number of processes in $JAX_NUM_PROCESSES and the index of this one, "
            "from 0, in $JAX_PROCESS_ID"
        )
    if not all(value.isdigit() for value in found.values()):
        raise ValueError(f"$JAX_NUM_PROCESSES and $JAX_PROCESS_ID must be whole numbers, got {found}")
    arguments = {argument: int(value) for argument, value in found.items()} | {"coordinator_address": address}
    return arguments | ({"cluster_detection_method": "deactivate"} if len(found) == 2 else {})


_barriers = itertools.count()


def _barrier(key: str, what: str, seconds: float) -> None:
    """Waits until every process reaches `key`; after `seconds` raises ProcessError naming those that did not."""
    import orbax.checkpoint as ocp  # slow to import, and only needed with several processes

    try:
        # A barrier between processes has a timeout and names the missing ones; one between devices has neither.
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(1000 * seconds))
    except Exception as error:
        raise ProcessError(
            f"process {jax.process_index()} of {jax.process_count()} waited {seconds:g} s for the others before "
            f"{what}, and not all came. The runtime says: {error}"
        ) from error


@contextlib.contextmanager
def watchdog(what: str, seconds: float) -> Iterator[None]:
    """Runs a block that all processes take part in, such as a compiled call with an all-reduce, with a timeout.

    The processes first synchronise. If the block then exceeds `seconds`, this process prints a traceback and
    exits, because a blocked collective cannot be interrupted. With one process, nothing is limited.

    Args:
      what: the work, for messages; the same in every process.
      seconds: an upper bound on the duration of the work, compilation included.

    Raises:
      ProcessError: if a process does not arrive within `seconds`; the message names it.
    """
    if jax.process_count() == 1:
        yield
        return
    _barrier(f"{next(_barriers)}: {what}", what, seconds)

    def give_up() -> None:
        faulthandler.dump_traceback()
        _exit(
            f"process {jax.process_index()}: {what} has not ended after {seconds:g} s; a process or a device hangs", 1
        )

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def exit_on_error(seconds: float = 30.0) -> Iterator[None]:
    """Ends this process when the block raises, so that the other processes do not wait for it.

    In a job of several processes it prints the exception, waits up to `seconds` for the other processes to
    fail as well, reports those that did not, and exits. In a single process it re-raises.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        message = ""
        try:
            _barrier("end", "the end after an error", seconds)
            if jax.process_index() == 0:
                time.sleep(1.0)  # The runtime aborts a process that sees the end of process 0 before its own.
        except ProcessError as missing:
            message = str(missing)
        _exit(message, error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _exit(message: str, code: int) -> None:
    """Exits without running exit handlers; that of `jax.distributed` would wait for every other process."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_process_zero(function: Callable[[], Any]) -> Any:
    """Calls a function on process 0 and returns its result on every process.

    Every process must call this.

    Args:
      function: returns a value that JSON can represent.

    Raises:
      ProcessError: on the other processes, with the same message, when `function` raises on process 0.
    """
    if jax.process_count() == 1:
        return function()
    answer, failure = {}, None
    if jax.process_index() == 0:
        try:
            answer["result"] = function()
        except Exception as error:
            answer["error"], failure = str(error), error
    encoded = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(encoded.size)))
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(encoded, length))))
    if failure is not None:
        raise failure
    if "error" in answer:
        raise ProcessError(answer["error"])
    return answer["result"]


def largest(value: int) -> int:
    """The largest `value` of all processes. Every process must call this."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(value)).max())


def processes_that_differ(value: str) -> list[int]:
    """Returns the indices of the processes whose `value` differs from that of process 0.

    Every process must call this.
    """
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    return np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
