"""The outer loop: meta-gradients averaged over tasks, an optax update, hundreds of steps in one call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maml_jax.types import (
    ArrayTree,
    Episode,
    MetaInfo,
    MetaLearner,
    MetaState,
    PRNGKey,
    SampleEpisodeFn,
    check_floating,
)


def init_meta_state(
    learner: MetaLearner, optimizer: optax.GradientTransformation, key: PRNGKey, inputs: ArrayTree
) -> MetaState:
    """Draws the initial meta-parameters and the outer optimiser's state.

    Args:
      learner: the algorithm.
      optimizer: the outer optax optimiser.
      key: the randomness of the initial parameters.
      inputs: inputs of one support set, [S, ...]; only shapes and dtypes matter.

    Returns:
      A `MetaState` at step 0.

    Raises:
      ValueError: if a parameter is not a floating array.
    """
    params = learner.init(key, inputs)
    check_floating(params)
    return MetaState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


CPU_CHUNK_BYTES = 256 * 1024
"""What the tasks of a chunk may hold on a CPU, a part of a core's cache; measured by `benchmarks.sinusoid`."""


def default_chunk_size(params: ArrayTree, episodes: Episode) -> int:
    """The number of tasks that are vmapped at once when `chunk_size` is None.

    An accelerator is filled by all tasks at once. On a CPU a convolutional task by itself is work enough and
    keeps its activations in the cache, while many tiny tasks are faster together: as many are taken as have
    no more parameters and examples than `CPU_CHUNK_BYTES`.

    Args:
      params: meta-parameters θ; arrays or their shapes.
      episodes: leaves [T, ...]; arrays or their shapes.

    Returns:
      A divisor of T.
    """
    num_tasks = jax.tree.leaves(episodes.support)[0].shape[0]
    if jax.default_backend() != "cpu":
        return num_tasks
    task_bytes = _num_bytes(params) + _num_bytes((episodes.support, episodes.query)) / num_tasks
    divisors = [n for n in range(1, num_tasks + 1) if num_tasks % n == 0]
    return max(n for n in divisors if n == 1 or n * task_bytes <= CPU_CHUNK_BYTES)


def _num_bytes(tree: ArrayTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def meta_gradient(
    learner: MetaLearner, params: ArrayTree, episodes: Episode, *, chunk_size: int | None = None
) -> tuple[jax.Array, ArrayTree]:
    """The mean objective over a meta-batch and its gradient.

    Args:
      learner: the algorithm.
      params: meta-parameters θ.
      episodes: leaves [T, ...].
      chunk_size: tasks that are vmapped together; the T / chunk_size chunks are scanned and their
        gradients summed, with 1 one task at a time and no `vmap`. The result does not depend on it, but for
        rounding. None picks, see `default_chunk_size`.

    Returns:
      The loss, a scalar, and the gradient with the structure of `params`.

    Raises:
      ValueError: if `chunk_size` does not divide T.
    """
    num_tasks = jax.tree.leaves(episodes.support)[0].shape[0]
    chunk_size = default_chunk_size(params, episodes) if chunk_size is None else chunk_size
    if chunk_size < 1 or num_tasks % chunk_size:
        raise ValueError(
            f"chunk_size={chunk_size} does not divide the meta-batch of {num_tasks} tasks; "
            "choose a divisor, or None to have one picked"
        )

    def chunk_loss(params, chunk):
        if chunk_size == 1:  # a vmap over one task would make batched products of plain ones
            return learner.objective(params, chunk)[0]
        return jnp.sum(jax.vmap(learner.objective, in_axes=(None, 0))(params, chunk)[0])

    chunk_gradient = jax.value_and_grad(chunk_loss)
    if chunk_size == num_tasks > 1:
        loss, grads = chunk_gradient(params, episodes)
    else:

        def add_chunk(total, chunk):
            loss, grads = chunk_gradient(params, chunk)
            return jax.tree.map(jnp.add, total, grads), loss

        if chunk_size > 1:
            episodes = jax.tree.map(lambda x: x.reshape(-1, chunk_size, *x.shape[1:]), episodes)
        grads, losses = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, params), episodes)
        loss = jnp.sum(losses)
    return jax.tree.map(lambda x: x / num_tasks, (loss, grads))


def _over_mesh(gradient_fn, mesh):
    if mesh is None:
        return gradient_fn
    from maml_jax import parallel  # the other direction of the import: parallel builds on this module

    def checked(params, tasks):
        parallel.check_divides(jax.tree.leaves(tasks)[0].shape[0], mesh.size, "meta_batch_size")
        return parallel.mean_over_tasks(gradient_fn, mesh)(params, tasks)

    return checked


def apply_meta_gradient(
    optimizer: optax.GradientTransformation, state: MetaState, loss: jax.Array, grads: ArrayTree
) -> tuple[MetaState, MetaInfo]:
    """The outer update: one step of `optimizer` on the mean meta-gradient.

    Args:
      optimizer: the outer optax optimiser.
      state: the state before the step.
      loss: the mean objective, a scalar; reported.
      grads: the meta-gradient, with the structure of `state.params`.

    Returns:
      The state after the step and a `MetaInfo` of scalars.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return MetaState(params, opt_state, state.step + 1), MetaInfo(loss, optax.tree.norm(grads))


def make_meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    *,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[MetaState, Episode], tuple[MetaState, MetaInfo]]:
    """Compiles one meta-update, θ ← θ + optimizer(∇ mean_i objective(θ, episode_i)).

    Args:
      learner: the algorithm.
      optimizer: the outer optax optimiser.
      chunk_size: see `meta_gradient`; it counts the tasks of one device.
      mesh: from `parallel.task_mesh`, to divide the tasks over devices; None for one device.

    Returns:
      `step(state, episodes) -> (state, info)`, jitted, for episodes [T, ...]. The state passed in is
      donated: its buffers are reused and it must not be used again. It raises ValueError if T does not
      divide over the mesh, or `chunk_size` does not divide the tasks of a device.
    """
    gradient_fn = _over_mesh(
        lambda params, episodes: meta_gradient(learner, params, episodes, chunk_size=chunk_size), mesh
    )

    def step(state: MetaState, episodes: Episode) -> tuple[MetaState, MetaInfo]:
        return apply_meta_gradient(optimizer, state, *gradient_fn(state.params, episodes))

    return jax.jit(step, donate_argnums=0)


def task_keys(key: PRNGKey, num_tasks: int) -> PRNGKey:
    """Keys [T] of a meta-batch; the i-th depends on `key` and i alone, whatever T is.

    Args:
      key: the randomness of the meta-batch.
      num_tasks: T.

    Returns:
      Keys [T].
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_tasks))


def make_train_loop(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sample_episode: SampleEpisodeFn,
    *,
    meta_batch_size: int,
    num_steps: int,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[MetaState, PRNGKey], tuple[MetaState, MetaInfo]]:
    """Compiles many meta-steps, sampling included, into one call.

    Step i draws its tasks with `fold_in(key, i)` for the absolute step i in `state.step`: a run that
    is stopped and resumed sees the tasks that it would have seen.

    Args:
      learner: the algorithm.
      optimizer: the outer optax optimiser.
      sample_episode: the task distribution.
      meta_batch_size: T, tasks a meta-step.
      num_steps: meta-steps a call.
      chunk_size: see `meta_gradient`; it counts the tasks of one device.
      mesh: from `parallel.task_mesh`; every device draws its own tasks. None for one device.

    Returns:
      `loop(state, key) -> (state, info)`, jitted, with `info` leaves [num_steps]. The state passed in
      is donated.

    Raises:
      ValueError: if a count is not positive; when called, if the tasks do not divide as `mesh` and
        `chunk_size` ask.
    """
    if meta_batch_size < 1 or num_steps < 1:
        raise ValueError(f"meta_batch_size and num_steps must be positive, got {meta_batch_size} and {num_steps}")

    def sampled_gradient(params, keys):
        return meta_gradient(learner, params, jax.vmap(sample_episode)(keys), chunk_size=chunk_size)

    gradient_fn = _over_mesh(sampled_gradient, mesh)

    def loop(state: MetaState, key: PRNGKey) -> tuple[MetaState, MetaInfo]:
        def body(state, _):
            keys = task_keys(jax.random.fold_in(key, state.step), meta_batch_size)
            return apply_meta_gradient(optimizer, state, *gradient_fn(state.params, keys))

        return jax.lax.scan(body, state, length=num_steps)

    return jax.jit(loop, donate_argnums=0)
