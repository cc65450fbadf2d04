"""The outer loop: meta-gradients averaged over tasks, an outer update, hundreds of meta-steps in one call."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml_jax import parallel
from maml_jax.types import (
    ArrayTree,
    Episode,
    LearnerOrSchedule,
    MetaInfo,
    MetaLearner,
    MetaState,
    PRNGKey,
    SampleEpisodeFn,
    as_floating,
    check_floating,
    check_integer,
    check_optimizer,
    draw_episode,
    function_and_data,
    learner_at,
    with_data,
)

GradientFn = Callable[[ArrayTree, Episode], tuple[tuple[jax.Array, ArrayTree], ArrayTree]]
"""`(params, episodes) -> ((loss, info), grads)`, means over the meta-batch."""


class OuterRule(NamedTuple):
    """How the outer update uses the meta-gradient.

    Attributes:
      init: `(params) -> rule_state`.
      update: `(gradient_fn, params, episodes, rule_state) -> (params, rule_state, info)`. It may call `gradient_fn`
        several times, at other parameters too. `info` is any pytree of arrays; training programs expect the
        fields of `MetaInfo`.
    """

    init: Callable[[ArrayTree], ArrayTree]
    update: Callable[[GradientFn, ArrayTree, Episode, ArrayTree], tuple[ArrayTree, ArrayTree, Any]]


def gradient_step(optimizer: optax.GradientTransformation) -> OuterRule:
    """The outer rule of one optax step on the mean meta-gradient; its info is a `MetaInfo`.

    Optimisers that ask for the value, the gradient or the function (`value`, `grad`, `value_fn` of optax) get them.

    Raises:
      ValueError: if `optimizer` is no optax transformation.
    """
    check_optimizer("optimizer", optimizer)
    with_extra_args = optax.with_extra_args_support(optimizer)

    def update(gradient_fn, params, episodes, opt_state):
        (loss, info), grads = gradient_fn(params, episodes)
        updates, opt_state = with_extra_args.update(
            grads,
            opt_state,
            params,
            value=loss,
            grad=grads,
            value_fn=lambda params: gradient_fn(params, episodes)[0][0],
        )
        params = optax.apply_updates(params, updates)
        # In at least float32: squares of float16 overflow above 256.
        grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads))
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((loss, grad_norm, params))])
        return params, opt_state, MetaInfo(loss, grad_norm, jnp.all(finite), info)

    return OuterRule(optimizer.init, update)


def _as_rule(optimizer: optax.GradientTransformation | OuterRule) -> OuterRule:
    return optimizer if isinstance(optimizer, OuterRule) else gradient_step(optimizer)


def init_meta_state(
    learner: LearnerOrSchedule, optimizer: optax.GradientTransformation | OuterRule, key: PRNGKey, inputs: ArrayTree
) -> MetaState:
    """Draws the initial meta-parameters and the state of the outer update.

    Args:
      learner: the algorithm; a schedule is evaluated at step 0.
      optimizer: the outer optax optimiser, or an `OuterRule`.
      key: the randomness of the initial parameters.
      inputs: inputs of one support set, [S, ...]; only shapes and dtypes matter.

    Returns:
      A `MetaState` at step 0. Its arrays are copies, which training may overwrite.

    Raises:
      ValueError: if a parameter is not floating, or `optimizer` is no optimiser.
    """
    params = learner_at(learner, jnp.zeros((), jnp.int32)).init(key, inputs)
    check_floating(params)
    state = MetaState(params, _as_rule(optimizer).init(params), jnp.zeros((), jnp.int32))
    return jax.tree.map(jnp.copy, state)


CPU_CHUNK_BYTES = 256 * 1024
"""CPU only: the largest intermediate result of one chunk, in bytes, so that it fits in a core's cache.
`benchmarks.sinusoid` measures it."""
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
    num_tasks = count_tasks(episodes)
    episode = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), episodes)
    own = sum(_num_bytes(leaf) for leaf in jax.tree.leaves(episode))
    results = [own, *_result_bytes(jax.make_jaxpr(learner.objective)(params, episode).jaxpr)]
    if jax.default_backend() == "cpu":
        most = CPU_CHUNK_BYTES // max(results)
    else:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        most = num_tasks if limit is None else ACCELERATOR_MEMORY_SHARE * limit // sum(results)
    num_chunks = -(-num_tasks // max(1, int(most)))
    return -(-num_tasks // num_chunks)


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
      ValueError: if they have no common leading axis, or `episodes` is a list of episodes.
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
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "every leaf of a meta-batch has the number of tasks as its leading axis [T, ...], got "
            + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            + ". Add the axis to a single episode with jax.tree.map(lambda x: x[None], episode)"
        )
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
        one may be smaller. With 1 there is no `vmap`. The result does not depend on it, but for rounding. None
        picks a size, see `default_chunk_size`.

    Returns:
      `((loss, info), grads)`: the mean objective, a scalar; the objective's info, averaged over the tasks as floating
      numbers; and the gradient with the structure of `params`.

    Raises:
      ValueError: if `episodes` is no meta-batch, or `chunk_size` is not a positive integer.
    """
    num_tasks = count_tasks(episodes)
    if chunk_size is None:
        chunk_size = default_chunk_size(learner, params, episodes)
    chunk_size = min(check_integer("chunk_size", chunk_size, at_least=1), num_tasks)

    def chunk_loss(params, chunk):
        if chunk_size == 1:  # a vmap over one task would turn plain products into batched ones
            loss, info = learner.objective(params, chunk)
            return _check_scalar(loss, 0), as_floating(info)
        losses, info = jax.vmap(learner.objective, in_axes=(None, 0))(params, chunk)
        return jnp.sum(_check_scalar(losses, 1)), jax.tree.map(lambda x: jnp.sum(x, 0), as_floating(info))

    chunk_gradient = jax.value_and_grad(chunk_loss, has_aux=True)
    num_chunks, rest = divmod(num_tasks, chunk_size)
    if num_chunks == 1 and not rest and chunk_size > 1:
        total = chunk_gradient(params, episodes)
    else:

        def add_chunk(grads, chunk):
            value, of_chunk = chunk_gradient(params, chunk)
            return jax.tree.map(jnp.add, grads, of_chunk), value

        chunks = jax.tree.map(lambda x: x[: num_tasks - rest], episodes) if rest else episodes
        if chunk_size > 1:
            chunks = jax.tree.map(lambda x: x.reshape(num_chunks, chunk_size, *x.shape[1:]), chunks)
        grads, values = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, params), chunks)
        total = jax.tree.map(lambda x: jnp.sum(x, 0), values), grads
        if rest:
            last = jax.tree.map(lambda x: x[num_tasks - rest :], episodes)
            total = jax.tree.map(jnp.add, total, chunk_gradient(params, last))
    return jax.tree.map(lambda x: x / num_tasks, total)


def _check_scalar(loss: jax.Array, num_axes: int) -> jax.Array:
    """Returns `loss`, the objective of one task or of several along `num_axes` = 1 axis."""
    if jnp.ndim(loss) != num_axes:
        raise ValueError(
            f"the objective must be a scalar, got shape {jnp.shape(loss)[num_axes:]}; take the mean over the query set"
        )
    return loss


def _gradient_fn(learner, step, chunk_size, mesh) -> GradientFn:
    """The meta-gradient at a meta-step, divided over a mesh if there is one."""

    def gradient(params_and_step, episodes):
        params, step = params_and_step
        return meta_gradient(learner_at(learner, step), params, episodes, chunk_size=chunk_size)

    if mesh is not None:
        gradient = parallel.mean_over_tasks(gradient, mesh)
    return lambda params, episodes: gradient((params, step), episodes)


@dataclasses.dataclass(frozen=True)
class StateProgram:
    """A jitted function of the state, called as `program(state, argument) -> (state, info)`.

    Attributes:
      jitted: the function of `(state, argument, *data)`.
      data: arrays that are arguments of the compiled program and not constants in it.
    """

    jitted: Callable
    data: tuple = ()

    def __call__(self, state: MetaState, argument: ArrayTree) -> tuple[MetaState, Any]:
        """Runs it, and compiles it when it is called the first time."""
        if any(map(_is_deleted, jax.tree.leaves(state))):
            raise ValueError(
                "the state was donated to an earlier call and holds no values any more; use the state that this call "
                "returned, or build the program with donate=False"
            )
        return self.jitted(state, argument, *self.data)

    def lower(self, state: MetaState, argument: ArrayTree) -> jax.stages.Lowered:
        """Lowers it for these shapes. What `compile()` returns is called with `(state, argument, *data)`."""
        return self.jitted.lower(state, argument, *self.data)


def _is_deleted(leaf: Any) -> bool:
    try:
        return leaf.is_deleted()
    except (AttributeError, jax.errors.ConcretizationTypeError):  # an array of numpy, or a tracer
        return False


def make_meta_step(
    learner: LearnerOrSchedule,
    optimizer: optax.GradientTransformation | OuterRule,
    *,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    donate: bool = True,
) -> StateProgram:
    """Compiles one meta-update, θ ← θ + optimizer(∇ mean_i objective(θ, episode_i)).

    Args:
      learner: the algorithm, or a function from the meta-step to it.
      optimizer: the outer optax optimiser, or an `OuterRule`.
      chunk_size: see `meta_gradient`; it counts the tasks of one device.
      mesh: from `parallel.task_mesh`, to divide the tasks over devices; None for one device.
      donate: whether the state passed in is donated: its buffers are reused, and it must not be used again. False
        under `jax.vmap`, which cannot reuse buffers. A state made by hand must not hold an array twice.

    Returns:
      `step(state, episodes) -> (state, info)`, jitted, for episodes [T, ...]. It raises ValueError if `episodes` is no
      meta-batch, T does not divide over the mesh, or the state was donated before.

    Raises:
      ValueError: if `optimizer` is no optimiser, or `chunk_size` no positive integer.
    """
    rule = _as_rule(optimizer)
    _check_chunk_size(chunk_size)

    def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
        _check_divides(count_tasks(episodes), mesh)
        gradient_fn = _gradient_fn(learner, state.step, chunk_size, mesh)
        return _update(rule, gradient_fn, state, episodes)

    return StateProgram(jax.jit(step, donate_argnums=(0,) if donate else ()))


def _update(rule: OuterRule, gradient_fn: GradientFn, state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
    params, opt_state, info = rule.update(gradient_fn, state.params, episodes, state.opt_state)
    return MetaState(params, opt_state, state.step + 1), info


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, at_least=1)


def _check_divides(num_tasks: int, mesh: jax.sharding.Mesh | None) -> None:
    if mesh is not None:
        parallel.check_divides(num_tasks, mesh.size, "meta_batch_size")


def pmap_meta_step(
    learner: LearnerOrSchedule,
    optimizer: optax.GradientTransformation | OuterRule,
    *,
    chunk_size: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[MetaState, Episode], tuple[MetaState, Any]]:
    """Compiles the meta-update of `make_meta_step` with `jax.pmap` in place of a mesh.

    The meta-gradient, the update and the call are those of `make_meta_step`. Use that function for several
    processes, and for whole training loops in one call.

    Args:
      learner: the algorithm, or a function from the meta-step to it.
      optimizer: the outer optax optimiser, or an `OuterRule`.
      chunk_size: see `meta_gradient`; it counts the tasks of one device.
      devices: D devices of this process; by default all of them.

    Returns:
      `step(state, episodes) -> (state, info)` for a plain state and plain episodes [T, ...], which it divides
      itself. The state that it returns is on all D devices and is not copied again when it is passed on. Nothing
      is donated. It raises ValueError if `episodes` is no meta-batch or T does not divide over the devices.

    Raises:
      ValueError: if `optimizer` is no optimiser, or `chunk_size` no positive integer.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    rule = _as_rule(optimizer)
    _check_chunk_size(chunk_size)

    def local_step(state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
        local_gradient = _gradient_fn(learner, state.step, chunk_size, mesh=None)
        return _update(rule, lambda *args: parallel.pmean(local_gradient(*args)), state, episodes)

    # out_axes=None takes the state of one device, which is that of all.
    mapped = jax.pmap(local_step, parallel.AXIS, in_axes=(None, 0), out_axes=None, devices=devices)

    def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
        parallel.check_divides(count_tasks(episodes), len(devices), "meta_batch_size")
        return mapped(state, jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), episodes))

    return step


def task_keys(key: PRNGKey, num_tasks: int) -> PRNGKey:
    """Keys [T] of a meta-batch; the i-th depends on `key` and i only, whatever T is.

    Args:
      key: the randomness of the meta-batch.
      num_tasks: T.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_tasks))


def make_train_loop(
    learner: LearnerOrSchedule,
    optimizer: optax.GradientTransformation | OuterRule,
    sample_episode: SampleEpisodeFn,
    *,
    meta_batch_size: int,
    num_steps: int,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    donate: bool = True,
) -> StateProgram:
    """Compiles many meta-steps, sampling included, into one call.

    Step i draws its tasks with `fold_in(key, i)` for the absolute step i in `state.step`: a run that
    is stopped and resumed draws the same tasks as one that is not.

    Args:
      learner: the algorithm, or a function from the meta-step to it.
      optimizer: the outer optax optimiser, or an `OuterRule`.
      sample_episode: the task distribution, `(key) -> Episode` or `(key, params) -> Episode`. The arrays of a
        `jax.tree_util.Partial` are arguments of the compiled program; those that a function closes over become
        constants of it.
      meta_batch_size: T, tasks a meta-step.
      num_steps: meta-steps a call.
      chunk_size: see `meta_gradient`; it counts the tasks of one device.
      mesh: from `parallel.task_mesh`; every device draws its own tasks. None for one device.
      donate: see `make_meta_step`.

    Returns:
      `loop(state, key) -> (state, info)`, jitted, with `info` leaves [num_steps].

    Raises:
      ValueError: if a count is not a positive integer, `optimizer` is no optimiser, or the tasks do not divide over
        the mesh.
    """
    meta_batch_size = check_integer("meta_batch_size", meta_batch_size, at_least=1)
    num_steps = check_integer("num_steps", num_steps, at_least=1)
    _check_chunk_size(chunk_size)
    _check_divides(meta_batch_size, mesh)
    rule = _as_rule(optimizer)

    sample_episode, data = function_and_data(sample_episode)

    def sample(data_and_params, keys):
        data, params = data_and_params
        return jax.vmap(lambda key: draw_episode(with_data(sample_episode, data), key, params))(keys)

    if mesh is not None:
        sample = parallel.each_task(sample, mesh, gather=False)

    def loop(state: MetaState, key: PRNGKey, data: ArrayTree) -> tuple[MetaState, Any]:
        def body(state, _):
            keys = task_keys(jax.random.fold_in(key, state.step), meta_batch_size)
            episodes = sample((data, state.params), keys)
            gradient_fn = _gradient_fn(learner, state.step, chunk_size, mesh)
            return _update(rule, gradient_fn, state, episodes)

        return jax.lax.scan(body, state, length=num_steps)

    return StateProgram(jax.jit(loop, donate_argnums=(0,) if donate else ()), (data,))
