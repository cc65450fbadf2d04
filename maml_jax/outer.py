"""The outer loop: an update by the meta-gradient, hundreds of meta-steps in one call."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml_jax import parallel
from maml_jax.meta_gradient import count_tasks, meta_gradient
from maml_jax.types import (
    ArrayTree,
    Episode,
    LearnerOrSchedule,
    MetaInfo,
    MetaState,
    PRNGKey,
    SampleEpisodeFn,
    at_least_float32,
    check_floating,
    check_integer,
    check_optimizer,
    draw_episode,
    function_and_data,
    learner_at,
    task_keys,
    with_data,
)

GradientFn = Callable[[ArrayTree, Episode], tuple[tuple[jax.Array, ArrayTree], ArrayTree]]
"""`(params, episodes) -> ((loss, info), grads)`, means over the meta-batch."""


class OuterRule(NamedTuple):
    """How the outer update uses the meta-gradient.

    Attributes:
      init: `(params) -> rule_state`.
      update: `(gradient_fn, params, episodes, rule_state) -> (params, rule_state, info)`.
        `gradient_fn(params, episodes) -> ((loss, info), grads)` gives means over a meta-batch. It may be called
        several times, at other parameters too. `info` is any pytree of arrays; training programs expect the
        fields of `MetaInfo`.
      looks_at_episodes: whether `update` uses the episodes other than through `gradient_fn`.
    """

    init: Callable[[ArrayTree], ArrayTree]
    update: Callable[[GradientFn, ArrayTree, Episode, ArrayTree], tuple[ArrayTree, ArrayTree, Any]]
    looks_at_episodes: bool = False


def gradient_step(optimizer: optax.GradientTransformation) -> OuterRule:
    """The outer rule of one optax step on the mean meta-gradient; its info is a `MetaInfo`.

    Optimisers that ask for the value, the gradient or the function (`value`, `grad`, `value_fn` of optax) get them.

    Raises:
      ValueError: if `optimizer` is not an optax transformation.
    """
    check_optimizer("optimizer", optimizer)

    def update(gradient_fn, params, episodes, opt_state):
        (loss, info), grads = gradient_fn(params, episodes)
        params, opt_state = optax_step(optimizer, gradient_fn, params, episodes, loss, grads, opt_state)
        grad_norm = optax.tree.norm(at_least_float32(grads))  # squares of float16 overflow above 256
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((loss, grad_norm, params))])
        return params, opt_state, MetaInfo(loss, grad_norm, jnp.all(finite), info)

    return OuterRule(optimizer.init, update)


def optax_step(
    optimizer: optax.GradientTransformation,
    gradient_fn: GradientFn,
    params: ArrayTree,
    episodes: Episode,
    loss: jax.Array,
    grads: ArrayTree,
    opt_state: ArrayTree,
) -> tuple[ArrayTree, ArrayTree]:
    """The parameters and the state after one step of an optimiser, which gets the value and the function if it asks."""
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grads,
        opt_state,
        params,
        value=loss,
        grad=grads,
        value_fn=lambda params: gradient_fn(params, episodes)[0][0],
    )
    return optax.apply_updates(params, updates), opt_state


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
      ValueError: if a parameter is not floating, or `optimizer` is not an optimiser.
    """
    params = learner_at(learner, jnp.zeros((), jnp.int32)).init(key, inputs)
    check_floating(params)
    state = MetaState(params, _as_rule(optimizer).init(params), jnp.zeros((), jnp.int32))
    return jax.tree.map(_strong_copy, state)


def _strong_copy(x: Any) -> jax.Array:
    """A copy whose type is not weak, as that of `jnp.array(1.0)` is: after an update it is not, and that is another."""
    x = jnp.copy(x)
    return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x


def _gradient_fn(learner, step, chunk_size, mesh) -> GradientFn:
    """The meta-gradient at a meta-step, divided over a mesh if there is one."""

    def gradient(params_and_step, episodes):
        params, step = params_and_step
        return meta_gradient(learner_at(learner, step), params, episodes, chunk_size=chunk_size)

    if mesh is not None:
        gradient = parallel.mean_over_tasks(gradient, mesh)
    return lambda params, episodes: gradient((params, step), episodes)


@dataclasses.dataclass(frozen=True, eq=False)
class StateProgram:
    """A jitted function of the state, called as `program(state, argument) -> (state, info)`.

    Attributes:
      jitted: the function of `(state, argument, *data)`.
      data: arrays that are arguments of the compiled program and not constants in it.
      mesh: that of the program, or None.
      donate: whether the state is donated.
    """

    jitted: Callable
    data: tuple = ()
    mesh: jax.sharding.Mesh | None = None
    donate: bool = False

    def __call__(self, state: MetaState, argument: ArrayTree) -> tuple[MetaState, Any]:
        """Runs it, and compiles it when it is called the first time."""
        if any(map(_is_deleted, jax.tree.leaves(state))):
            raise ValueError(
                "the state was donated to an earlier call and holds no values any more; use the state that this call "
                "returned, or build the program with donate=False"
            )
        if self.mesh is not None:
            state = parallel.replicate(state, self.mesh, donate=self.donate)
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
      chunk_size: the tasks of one device that are vmapped together; None chooses by the device and the memory of a
        task. Only rounding depends on it.
      mesh: from `parallel.task_mesh`, to divide the tasks over devices; None for one device.
      donate: whether the state passed in is donated: its buffers are reused, and it must not be used again. False
        under `jax.vmap`, which cannot reuse buffers. A state made by hand must not hold an array twice.

    Returns:
      `step(state, episodes) -> (state, info)`, jitted, for episodes [T, ...]. It raises ValueError if `episodes` is no
      meta-batch, T does not divide over the mesh, or the state was donated before.

    Raises:
      ValueError: if `optimizer` is not an optimiser, or `chunk_size` not a positive integer.
    """
    rule = _as_rule(optimizer)
    _check_chunk_size(chunk_size)

    def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
        parallel.check_mesh(mesh, count_tasks(episodes), "meta_batch_size")
        gradient_fn = _gradient_fn(learner, state.step, chunk_size, mesh)
        return _update(rule, gradient_fn, state, episodes)

    return StateProgram(jax.jit(step, donate_argnums=(0,) if donate else ()), mesh=mesh, donate=donate)


def _update(rule: OuterRule, gradient_fn: GradientFn, state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
    updated = rule.update(gradient_fn, state.params, episodes, state.opt_state)
    if not isinstance(updated, tuple) or len(updated) != 3:
        raise ValueError(
            "OuterRule.update must return (params, rule_state, info), got "
            + (f"{len(updated)} values" if isinstance(updated, tuple) else f"a {type(updated).__name__}")
        )
    params, opt_state, info = updated
    return MetaState(params, opt_state, state.step + 1), info


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, at_least=1)


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
      chunk_size: the tasks of one device that are vmapped together; None chooses by the device and the memory of a
        task. Only rounding depends on it.
      devices: D devices of this process; by default all of them.

    Returns:
      `step(state, episodes) -> (state, info)` for a plain state and plain episodes [T, ...], which it divides
      itself. The state that it returns is on all D devices and is not copied again when it is passed on. Nothing
      is donated. It raises ValueError if `episodes` is no meta-batch or T does not divide over the devices.

    Raises:
      ValueError: if `optimizer` is not an optimiser or an outer rule that looks at the episodes, or `chunk_size` not a
        positive integer.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    rule = _as_rule(optimizer)
    if rule.looks_at_episodes:
        raise ValueError(
            "this outer rule looks at the episodes itself, and with jax.pmap each device holds only its own; use "
            "make_meta_step or make_train_loop with a mesh"
        )
    _check_chunk_size(chunk_size)

    def local_step(state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
        local_gradient = _gradient_fn(learner, state.step, chunk_size, mesh=None)
        return _update(rule, lambda *args: parallel.pmean(local_gradient(*args)), state, episodes)

    mesh = parallel.task_mesh(devices)
    # Every device has the same state; out_axes=None takes one copy.
    mapped = jax.pmap(local_step, parallel.AXIS, in_axes=(None, 0), out_axes=None, devices=devices)

    def step(state: MetaState, episodes: Episode) -> tuple[MetaState, Any]:
        num_tasks = count_tasks(episodes)
        parallel.check_divides(num_tasks, len(devices), "meta_batch_size")
        divided = jax.tree.map(lambda x: x.reshape(len(devices), num_tasks // len(devices), *x.shape[1:]), episodes)
        return mapped(parallel.replicate(state, mesh), divided)

    return step


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
      chunk_size: the tasks of one device that are vmapped together; None chooses by the device and the memory of a
        task. Only rounding depends on it.
      mesh: from `parallel.task_mesh`; every device draws its own tasks. None for one device.
      donate: see `make_meta_step`.

    Returns:
      `loop(state, key) -> (state, info)`, jitted, with `info` leaves [num_steps]. The next call takes the same key: the
      step in the state makes its tasks new ones. With `donate`, a state can be passed only once.

    Raises:
      ValueError: if a count is not a positive integer, `optimizer` is not an optimiser, or the tasks do not divide over
        the mesh.
    """
    meta_batch_size = check_integer("meta_batch_size", meta_batch_size, at_least=1)
    num_steps = check_integer("num_steps", num_steps, at_least=1)
    _check_chunk_size(chunk_size)
    parallel.check_mesh(mesh, meta_batch_size, "meta_batch_size")
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

    return StateProgram(jax.jit(loop, donate_argnums=(0,) if donate else ()), (data,), mesh, donate)
