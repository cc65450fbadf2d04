"""Tasks over the devices of a mesh. The only file that knows a mesh.

Every device holds all parameters and a part of the tasks. One all-reduce a meta-step averages the
meta-gradient. With several processes the mesh spans the devices of all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maml_jax.types import ArrayTree

AXIS = "tasks"
"""The name of the only axis of a mesh."""


def task_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over whose axis "tasks" the tasks are divided.

    Args:
      devices: the devices to use; by default all of them, those of other processes included.
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


def check_mesh(mesh: Mesh | None, num_tasks: int, what: str) -> None:
    """Raises ValueError unless `mesh` is None, or one of `task_mesh` over which the tasks divide."""
    if mesh is not None:
        _check_is_mesh(mesh)
        check_divides(num_tasks, mesh.size, what)


def _check_is_mesh(mesh: Mesh) -> None:
    is_mesh = isinstance(mesh, Mesh) and mesh.axis_names == (AXIS,)
    if not is_mesh or mesh.axis_types != (jax.sharding.AxisType.Auto,):
        raise ValueError(f"mesh {mesh!r} must be made by parallel.task_mesh(devices), or None for one device")


def replicate(tree: ArrayTree, mesh: Mesh, *, donate: bool = False) -> ArrayTree:
    """A pytree with a copy on every device of a mesh, which is where a program on the mesh leaves its results.

    A program that is first called with arrays of one device and then with its own results is compiled twice.

    Args:
      tree: arrays. What is traced, and what is on all of the devices already, comes back as it is.
      mesh: from `task_mesh`.
      donate: whether arrays that are copied are deleted.

    Raises:
      ValueError: if `mesh` is not one of `task_mesh`.
    """
    _check_is_mesh(mesh)
    devices = set(mesh.devices.flat)
    if all(_is_on(leaf, devices) for leaf in jax.tree.leaves(tree)):
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    if mesh.is_multi_process:  # `device_put` refuses keys on devices of other processes
        return jax.jit(lambda tree: tree, out_shardings=everywhere, donate_argnums=(0,) if donate else ())(tree)
    placed = jax.device_put(tree, everywhere)
    if donate:
        placed = _copy(placed)  # on their own device, arrays that were placed share the buffer
        jax.tree.map(lambda leaf: leaf.delete() if isinstance(leaf, jax.Array) else None, tree)
    return placed


@jax.jit
def _copy(tree: ArrayTree) -> ArrayTree:
    return jax.tree.map(jnp.copy, tree)


def _is_on(leaf: Any, devices: set[jax.Device]) -> bool:
    try:
        return leaf.sharding.device_set == devices
    except jax.errors.ConcretizationTypeError:
        return True
    except AttributeError:  # a tracer, or an array of numpy
        return isinstance(leaf, jax.Array)


def pmean(tree: ArrayTree, axis_name: str = AXIS) -> ArrayTree:
    """The mean over devices of a pytree of floating arrays, in one all-reduce of one flat vector."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, axis_name))


def mean_over_tasks(function: Callable[[ArrayTree, ArrayTree], ArrayTree], mesh: Mesh) -> Callable:
    """Divides the tasks of a mean over the devices of a mesh.

    Args:
      function: `(params, tasks) -> pytree of floating arrays`, a mean over the leading axis of `tasks`.
      mesh: from `task_mesh`.

    Returns:
      The same function of the same arguments, with one all-reduce.
    """

    def local(params: ArrayTree, tasks: ArrayTree) -> ArrayTree:
        return pmean(function(params, tasks))

    return _divided(local, mesh, PartitionSpec())


def each_task(function: Callable[[ArrayTree, ArrayTree], ArrayTree], mesh: Mesh, *, gather: bool = True) -> Callable:
    """Divides independent tasks over the devices of a mesh.

    Args:
      function: `(params, tasks) -> pytree`, one result per task along the leading axis.
      mesh: from `task_mesh`.
      gather: whether every device gets the results of all, so that every process can read them. Otherwise
        they stay where they were made.

    Returns:
      The same function of the same arguments, with results [T, ...].
    """
    divided = _divided(function, mesh, PartitionSpec(AXIS))
    return jax.jit(divided, out_shardings=NamedSharding(mesh, PartitionSpec())) if gather else divided


def _divided(function: Callable, mesh: Mesh, out_specs: PartitionSpec) -> Callable:
    # With check_vma=True an inner `grad` with respect to the replicated parameters would be summed over the
    # devices, and a scan whose carry starts as a constant, which every recurrent network has, would be refused.
    return jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(AXIS)), out_specs=out_specs, check_vma=False
    )
