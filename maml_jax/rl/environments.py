"""Environments: the check of their contract, and those of gymnax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.rl.distributions import Categorical, Distribution, Normal
from maml_jax.types import ArrayTree, Environment, PRNGKey


def from_gymnax(environment: Any, sample_params: Callable[[PRNGKey], ArrayTree]) -> Environment:
    """An environment with the interface of gymnax, as a distribution of tasks. A task is the environment's parameters.

    `reset_env` and `step_env` are called, which start no new trajectory by themselves. What the environment draws in
    `reset_env` is drawn anew for every trajectory; only what is in its parameters belongs to the task. The limit of
    time steps in its parameters ends trajectories, as any other end does.

    Args:
      environment: with `reset_env(key, params) -> (observation, state)` and `step_env(key, state, action, params) ->
        (observation, state, reward, done, info)`.
      sample_params: `(key) -> params`, such as `lambda key: default.replace(gravity=jax.random.uniform(key))`.

    Returns:
      An `Environment` whose reward is a float. States of gymnax hold Python numbers, which change their dtype in the
      first step; the state keeps the dtypes that `reset_env` gives it wherever nothing is lost, such as a fraction.

    Raises:
      ValueError: if `environment` lacks one of the two functions.
    """
    for name in ("reset_env", "step_env"):
        if not callable(getattr(environment, name, None)):
            raise ValueError(
                f"{type(environment).__name__} has no {name}; from_gymnax needs an environment with the functions "
                "reset_env and step_env of gymnax"
            )

    def sample_task(key: PRNGKey) -> ArrayTree:
        return jax.tree.map(jnp.asarray, sample_params(key))

    def reset(params: ArrayTree, key: PRNGKey) -> tuple[ArrayTree, ArrayTree]:
        observation, state = environment.reset_env(key, params)
        return _arrays((state, observation))

    def step(params: ArrayTree, state: ArrayTree, action: ArrayTree, key: PRNGKey) -> tuple:
        observation, new_state, reward, done, *_ = environment.step_env(key, state, action, params)
        if jax.tree.structure(new_state) == jax.tree.structure(state):  # if not, `check_environment` says so
            new_state = jax.tree.map(_as_before, new_state, state)
        return new_state, _arrays(observation), jnp.asarray(reward, float), jnp.asarray(done, bool)

    return Environment(sample_task, reset, step)


def _as_before(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new leaf in the dtype of the old one; unchanged if that would lose a fraction."""
    new = jnp.asarray(new)
    return jnp.asarray(new, old.dtype) if np.can_cast(new.dtype, old.dtype, "same_kind") else new


def _arrays(tree: ArrayTree) -> ArrayTree:
    """The pytree with arrays for Python numbers, whose dtypes are not weak."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)


def check_environment(
    environment: Environment, task: ArrayTree, distribution: Distribution, state: ArrayTree, observation: ArrayTree
) -> None:
    """Checks the shapes of a policy and of a step, without taking it.

    Args:
      environment: the processes.
      task: one of its tasks.
      distribution: what the policy returns for N observations.
      state: N states.
      observation: N observations.

    Raises:
      ValueError: if the policy returns no distribution, if state or observation change their structure, shape or
        dtype, or if the reward is no floating scalar or the end of a trajectory no scalar bool.
    """
    if not isinstance(distribution, Categorical | Normal):
        raise ValueError(
            f"the policy returned {type(distribution).__name__}; it must return rl.Categorical or rl.Normal. "
            "rl.categorical_policy and rl.normal_policy make one from a model"
        )

    def first(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)

    action = first(jax.eval_shape(lambda distribution: distribution.sample(jax.random.key(0)), distribution))
    before = first((state, observation))
    *after, reward, done = jax.eval_shape(environment.step, task, before[0], action, jax.random.key(0))
    for name, old, new in zip(("state", "observation"), before, after, strict=True):
        if jax.tree.structure(old) != jax.tree.structure(new):
            raise ValueError(
                f"environment.step returned a {name} {jax.tree.structure(new)}, and reset {jax.tree.structure(old)}; "
                "both must return the same structure"
            )
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                where = f"{name}{jax.tree_util.keystr(path)}"
                raise ValueError(
                    f"environment.step changes {where} from {a.dtype}{list(a.shape)} to {b.dtype}{list(b.shape)}; the "
                    "shapes and dtypes of state and observation must stay as reset returns them"
                )
    for name, value in {"reward": reward, "done": done}.items():
        if value.shape != ():
            raise ValueError(f"environment.step must return a scalar {name}, got shape {list(value.shape)}")
    if not jnp.issubdtype(reward.dtype, jnp.floating):
        raise ValueError(f"environment.step must return a floating reward, got {reward.dtype}")
    if done.dtype != jnp.bool_:
        raise ValueError(f"environment.step must return a bool for the end of a trajectory, got {done.dtype}")
