"""Tasks over devices. The only file that knows a mesh.

The parameters are on every device, the tasks are divided, and one all-reduce a meta-step averages the
meta-gradient.
"""

from collections.abc import Callable, Sequence

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from maml_jax.types import ArrayTree

AXIS = "tasks"


def task_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh whose only axis divides the tasks.

    Args:
      devices: the devices to use; by default all of them, those of other processes included.

    Returns:
      A `Mesh` with the axis "tasks".
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def check_divides(num_tasks: int, mesh: Mesh, what: str) -> None:
    """Raises ValueError unless `num_tasks` is a multiple of the devices of `mesh`."""
    if num_tasks % mesh.size:
        raise ValueError(
            f"{what}={num_tasks} does not divide over the {mesh.size} devices of the mesh; "
            f"choose a multiple of {mesh.size}, or a mesh of fewer devices"
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
      The same function of the same arguments, with results [T, ...] spread over the devices.
    """

    def local(params: ArrayTree, tasks: ArrayTree) -> ArrayTree:
        return function(jax.lax.pcast(params, AXIS, to="varying"), tasks)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(AXIS)), out_specs=PartitionSpec(AXIS)
    )
