"""Tasks over devices, and over the processes of many hosts. The only file that knows a mesh.

The parameters are on every device, the tasks are divided, and one all-reduce a meta-step averages the
meta-gradient. Several processes run one program on equal values, each on the tasks of its own devices.
`initialize` makes them one system; `together` and `leaving_none_behind` see to it that no process waits
for ever for one that is gone.
"""

import contextlib
import faulthandler
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maml_jax.outer import apply_meta_gradient, meta_gradient
from maml_jax.types import ArrayTree, Episode, MetaInfo, MetaLearner, MetaState

AXIS = "tasks"


class ProcessError(RuntimeError):
    """Another process has failed, is gone, or did not come in time."""


# Devices


def task_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh whose only axis divides the tasks.

    Args:
      devices: the devices to use; by default all of them, those of other processes included.

    Returns:
      A `Mesh` with the axis "tasks".
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def check_divides(num_tasks: int, num_devices: int, what: str) -> None:
    """Raises ValueError unless `num_tasks` is a multiple of `num_devices`."""
    if num_tasks % num_devices:
        raise ValueError(
            f"{what}={num_tasks} does not divide over the {num_devices} devices asked for; "
            f"choose a multiple of {num_devices}, or fewer devices"
        )


def mean_over_tasks(function: Callable, mesh: Mesh) -> Callable:
    """Divides the tasks of a mean over the devices of a mesh.

    Args:
      function: `(params, tasks) -> pytree of floating arrays`, a mean over the leading axis of `tasks`.
      mesh: from `task_mesh`.

    Returns:
      The same function of the same arguments. Its result is reduced once, as one flat vector.
    """

    def local(params: ArrayTree, tasks: ArrayTree) -> ArrayTree:
        # Without this cast an inner `grad` with respect to replicated parameters would itself be summed
        # over the devices, and every device would adapt to the tasks of all.
        params = jax.lax.pcast(params, AXIS, to="varying")
        flat, unravel = ravel_pytree(function(params, tasks))
        return unravel(jax.lax.pmean(flat, AXIS))

    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(AXIS)), out_specs=PartitionSpec())


def each_task(function: Callable, mesh: Mesh) -> Callable:
    """Divides independent tasks over the devices of a mesh.

    Args:
      function: `(params, tasks) -> pytree`, one result a task along the leading axis.
      mesh: from `task_mesh`.

    Returns:
      The same function of the same arguments, with results [T, ...] gathered on every device, so that
      every process can read them.
    """

    def local(params: ArrayTree, tasks: ArrayTree) -> ArrayTree:
        return function(jax.lax.pcast(params, AXIS, to="varying"), tasks)

    divided = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(AXIS)), out_specs=PartitionSpec(AXIS)
    )
    return jax.jit(divided, out_shardings=NamedSharding(mesh, PartitionSpec()))


def pmap_meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    *,
    chunk_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[MetaState, Episode], tuple[MetaState, MetaInfo]]:
    """Compiles the meta-update of `make_meta_step` with `jax.pmap` in place of a mesh.

    The meta-gradient, the update and the call are those of `make_meta_step`; use that one with more than
    one process, or for whole training loops in one call.

    Args:
      learner: the algorithm.
      optimizer: the outer optax optimiser.
      chunk_size: see `outer.meta_gradient`; it counts the tasks of one device.
      devices: D devices of this process; by default all of them.

    Returns:
      `step(state, episodes) -> (state, info)` for a plain state and plain episodes [T, ...], which it
      divides itself. The state that comes back is on all D devices and is not copied again when it is
      passed on. Nothing is donated. It raises ValueError if T does not divide over the devices, or
      `chunk_size` does not divide the tasks of one.
    """
    devices = jax.local_devices() if devices is None else list(devices)

    def local_step(state: MetaState, episodes: Episode) -> tuple[MetaState, MetaInfo]:
        flat, unravel = ravel_pytree(meta_gradient(learner, state.params, episodes, chunk_size=chunk_size))
        return apply_meta_gradient(optimizer, state, *unravel(jax.lax.pmean(flat, AXIS)))

    # out_axes=None takes the state of one device: they are equal.
    mapped = jax.pmap(local_step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)

    def step(state: MetaState, episodes: Episode) -> tuple[MetaState, MetaInfo]:
        num_tasks = jax.tree.leaves(episodes.support)[0].shape[0]
        check_divides(num_tasks, len(devices), "meta_batch_size")
        return mapped(state, jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), episodes))

    return step


# Processes


def initialize(distributed: str = "auto", *, timeout_seconds: float = 600.0) -> None:
    """Joins this process to the others of its job, through the runtime of JAX. Call it before any device is used.

    Args:
      distributed: "off" for one process. HOST:PORT, the address at which process 0 will listen; the number of
        processes and the index of this one are read from $JAX_NUM_PROCESSES and $JAX_PROCESS_ID, or else left
        to JAX, which knows those of SLURM, Open MPI and Kubernetes. "auto" takes the address from
        $JAX_COORDINATOR_ADDRESS if that is set; else lets JAX find everything if SLURM, Open MPI or Kubernetes
        (with the package `kubernetes`) has started this process as one of several, or on a TPU pod; else does
        nothing.
      timeout_seconds: how long to wait for the others to come. A process that dies, or is stopped, is found
        after the smaller of this and 100 seconds.

    Raises:
      ValueError: if `distributed` is none of these, or the number or index of processes is unknown.
      RuntimeError: if devices have been used before, or the others do not come.
    """
    if distributed == "off":
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") if distributed == "auto" else distributed
    if address is None and not _started_as_one_of_several():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # With it, SIGTERM is a notice that nobody reads here; without it, SIGTERM ends the process.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **({} if address is None else _explicit(address)),
        initialization_timeout=int(timeout_seconds),
        heartbeat_timeout_seconds=int(min(timeout_seconds, 100)),
        shutdown_timeout_seconds=int(min(timeout_seconds, 300)),
    )


def _started_as_one_of_several() -> bool:
    """Whether a launcher that JAX knows has started this process together with others."""
    env = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm):  # a shell of salloc has them all, and is a step of one task
        return int(env["SLURM_NTASKS"]) > 1 and int(env.get("SLURM_STEP_NUM_TASKS", 2)) > 1
    if "OMPI_MCA_orte_hnp_uri" in env:
        return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return importlib.util.find_spec("kubernetes") is not None
    if hosts := env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES")):
        return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in env
    # JAX sets the first where it finds TPU chips, and the second (others do too) where there is no pod to ask for.
    return "TPU_ML_PLATFORM" in env and "TPU_SKIP_MDS_QUERY" not in env


def _explicit(address: str) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` for a given address of process 0."""
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


_meetings = itertools.count()


def _meet(key: str, what: str, seconds: float) -> None:
    """Waits until every process has come to `key`; after `seconds` raises ProcessError, naming those that have not."""
    import orbax.checkpoint as ocp  # heavy, and needed with several processes alone

    try:
        # Between the processes and not their devices: it has a limit, and says who is missing.
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=int(1000 * seconds))
    except Exception as error:
        raise ProcessError(
            f"process {jax.process_index()} of {jax.process_count()} waited {seconds:g} s for the others before "
            f"{what}, and not all came. The runtime says: {error}"
        ) from error


@contextlib.contextmanager
def together(what: str, seconds: float) -> Iterator[None]:
    """Bounds a stretch of work that needs every process, such as a compiled call with an all-reduce.

    The processes first meet; those that are late by more than `seconds` are named in the error. If the work
    then takes longer than `seconds`, this process ends with a traceback, for nothing else can end a call that
    waits inside a device. With one process there is nothing to bound.

    Args:
      what: the work, for messages; the same in every process.
      seconds: more than the work can take, compilation included.

    Raises:
      ProcessError: if not all come.
    """
    if jax.process_count() == 1:
        yield
        return
    _meet(f"{next(_meetings)}: {what}", what, seconds)

    def give_up() -> None:
        faulthandler.dump_traceback()
        _end(f"process {jax.process_index()}: {what} has not ended after {seconds:g} s; a process or a device hangs", 1)

    watchdog = threading.Timer(seconds, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


@contextlib.contextmanager
def leaving_none_behind(seconds: float = 10.0) -> Iterator[None]:
    """Ends this process when the block raises, rather than have it wait for the others while they wait for it.

    With several processes an exception is printed, the others have `seconds` to come to the same end, and
    those that do not are named. With one process the exception goes its way.
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
            _meet("end", "the end after an error", seconds)
        except ProcessError as missing:
            message = str(missing)
        _end(message, error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _end(message: str, code: int) -> None:
    """Ends the process at once: the runtime's own way out waits for every other process."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_first(function: Callable[[], Any]) -> Any:
    """Calls a function on process 0, for what must be done or decided once.

    Args:
      function: returns what JSON can hold.

    Returns:
      The result, on every process.

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


def differing(value: str) -> list[int]:
    """The indices of the processes whose value is not that of process 0; every process calls this and is told.

    Args:
      value: this process's own.
    """
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    return np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
