"""The meta-gradient of a meta-batch: tasks vmapped in chunks, chunks scanned, gradients averaged."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from maml_jax.types import ArrayTree, Episode, MetaLearner, as_floating, at_least_float32, check_integer, check_pair

CPU_CHUNK_BYTES = 256 * 1024
"""CPU only: the largest intermediate result of one chunk, in bytes, so that it fits in a core's cache. It is not tuned.
Convolutional networks of the literature get one task a chunk, and the networks of sinusoids all tasks."""
ACCELERATOR_MEMORY_SHARE = 0.25
"""Accelerators only: the share of the memory that the results of a chunk's forward pass may take. Not measured."""


def default_chunk_size(learner: MetaLearner, params: ArrayTree, episodes: Episode) -> int:
    """The number of tasks that are vmapped together when `chunk_size` is None.

    On a CPU the largest intermediate result of a chunk fits into the cache of a core: a convolutional network gets
    one task at a time, a small fully connected one gets many. On an accelerator all intermediate results of a
    chunk fit into a share of its memory. Parameters count only where a task has its own copy.

    Args:
      learner: the algorithm.
      params: meta-parameters θ; arrays or their shapes.
      episodes: leaves [T, ...]; arrays or their shapes.

    Returns:
      A number from 1 to T. The chunks that follow from it are of equal size if possible.
    """
    num_tasks, results = count_tasks(episodes), forward_bytes(learner, params, episodes)
    if jax.default_backend() == "cpu":
        most = CPU_CHUNK_BYTES // max(results)
    else:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        most = num_tasks if limit is None else ACCELERATOR_MEMORY_SHARE * limit // sum(results)
    num_chunks = -(-num_tasks // max(1, int(most)))
    return -(-num_tasks // num_chunks)


def forward_bytes(learner: MetaLearner, params: ArrayTree, episodes: Episode) -> list[int]:
    """The bytes of the data of one task, and of every result of its forward pass, in the order of the computation.

    Args:
      learner: the algorithm.
      params: meta-parameters θ; arrays or their shapes.
      episodes: leaves [T, ...]; arrays or their shapes.
    """
    episode = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), episodes)
    own = sum(_num_bytes(leaf) for leaf in jax.tree.leaves(episode))
    return [own, *_result_bytes(jax.make_jaxpr(learner.objective)(params, episode).jaxpr)]


def _result_bytes(jaxpr: Any) -> Iterator[int]:
    """The bytes of the results of every equation, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield sum(_num_bytes(var.aval) for var in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(value, "eqns"):
                yield from _result_bytes(getattr(value, "jaxpr", value))


def _num_bytes(array: Any) -> int:
    return array.size * getattr(array.dtype, "itemsize", 0)


def count_tasks(episodes: Episode) -> int:
    """T, the size of the axis that all leaves of a meta-batch begin with.

    Raises:
      ValueError: if they have no common leading axis, or `episodes` is a list of episodes or one without its axis.
    """
    if type(episodes) in (list, tuple):
        raise ValueError(
            f"got a {type(episodes).__name__} of {len(episodes)} episodes; stack them into one Episode of leaves "
            "[T, ...]: jax.tree.map(lambda *leaves: jnp.stack(leaves), *episodes)"
        )
    shapes = {
        jax.tree_util.keystr(path).lstrip("."): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(episodes)
    }
    sizes = {shape[:1] for shape in shapes.values()}
    # Support and query sets of one size have a common leading axis too, that of the examples.
    lacks_tasks = any(len(shape) < 2 for name, shape in shapes.items() if name.startswith("support.targets"))
    if len(sizes) != 1 or () in sizes or lacks_tasks:
        raise ValueError(
            "every leaf of a meta-batch has the number of tasks as its leading axis, and targets are [T, S, ...], got "
            + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            + ". Add the axis to a single episode with jax.tree.map(lambda x: x[None], episode). A leaf that "
            "a task has only once must be repeated for every example"
        )
    if (0,) in sizes:
        raise ValueError("the meta-batch has no task; give it one or more")
    return sizes.pop()[0]


def meta_gradient(
    learner: MetaLearner, params: ArrayTree, episodes: Episode, *, chunk_size: int | None = None
) -> tuple[tuple[jax.Array, ArrayTree], ArrayTree]:
    """The mean objective over a meta-batch and its gradient.

    Args:
      learner: the algorithm.
      params: meta-parameters θ.
      episodes: leaves [T, ...].
      chunk_size: tasks that are vmapped together. The chunks are scanned and their gradients summed; the last
        one may be smaller. With 1 there is no `vmap`. Only rounding depends on it: sums over chunks are in float32 or
        more. Sums within a chunk are in the dtype of the parameters; in float16 they may overflow. None picks a size,
        see `default_chunk_size`.

    Returns:
      `((loss, info), grads)`: the mean objective, a scalar; the objective's info, averaged over the tasks; both as
      floating numbers of at least 32 bits; and the gradient with the structure and dtypes of `params`.

    Raises:
      ValueError: if `episodes` is no meta-batch, or `chunk_size` is not a positive integer.
    """
    num_tasks = count_tasks(episodes)
    if chunk_size is None:
        chunk_size = default_chunk_size(learner, params, episodes)
    chunk_size = min(check_integer("chunk_size", chunk_size, at_least=1), num_tasks)

    def chunk_loss(params, chunk):
        if chunk_size == 1:  # a vmap over one task would turn plain products into batched ones
            loss, info = check_pair(learner.objective(params, chunk))
            return at_least_float32((_check_scalar(loss, 0), as_floating(info)))
        losses, info = check_pair(jax.vmap(learner.objective, in_axes=(None, 0))(params, chunk))
        return jax.tree.map(lambda x: jnp.sum(x, 0), at_least_float32((_check_scalar(losses, 1), as_floating(info))))

    chunk_gradient = jax.value_and_grad(chunk_loss, has_aux=True)
    num_chunks, rest = divmod(num_tasks, chunk_size)
    if num_chunks == 1 and not rest and chunk_size > 1:
        total = chunk_gradient(params, episodes)
    else:

        def add_chunk(grads, chunk):
            value, of_chunk = chunk_gradient(params, chunk)
            return jax.tree.map(jnp.add, grads, at_least_float32(of_chunk)), value

        chunks = jax.tree.map(lambda x: x[: num_tasks - rest], episodes) if rest else episodes
        if chunk_size > 1:
            chunks = jax.tree.map(lambda x: x.reshape(num_chunks, chunk_size, *x.shape[1:]), chunks)
        zeros = at_least_float32(jax.tree.map(jnp.zeros_like, params))
        grads, values = jax.lax.scan(add_chunk, zeros, chunks)
        total = jax.tree.map(lambda x: jnp.sum(x, 0), values), grads
        if rest:
            last = jax.tree.map(lambda x: x[num_tasks - rest :], episodes)
            total = jax.tree.map(jnp.add, total, chunk_gradient(params, last))
    value, grads = jax.tree.map(lambda x: x / num_tasks, total)
    return value, jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), grads, params)


def _check_scalar(loss: jax.Array, num_axes: int) -> jax.Array:
    """Returns `loss`, the objective of one task or of several along `num_axes` = 1 axis."""
    if isinstance(loss, tuple | list | dict):
        raise ValueError(f"the objective must be a scalar, got a {type(loss).__name__}; return only the loss")
    if jnp.ndim(loss) != num_axes:
        raise ValueError(
            f"the objective must be a scalar, got shape {jnp.shape(loss)[num_axes:]}; take the mean over the query set"
        )
    return loss
