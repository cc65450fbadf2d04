"""Trajectories of a policy, and episodes for meta-learning that the policies of the moment collect.

Data are constants to every gradient: the parameters that collect them are stopped.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maml_jax.rl.advantages import AdvantageFn, Trajectories, linear_advantages
from maml_jax.rl.distributions import Categorical, Distribution, Normal
from maml_jax.rl.surrogates import Transition
from maml_jax.types import ArrayTree, Batch, Environment, Episode, MetaLearner, PRNGKey, SampleEpisodeFn, check_integer


def rollout(
    environment: Environment,
    policy: Callable[[ArrayTree], Distribution],
    task: ArrayTree,
    key: PRNGKey,
    *,
    num_trajectories: int,
    horizon: int,
) -> Trajectories:
    """Lets a policy act N times in one task, for at most H time steps.

    Args:
      environment: the processes.
      policy: `(observations [N, ...]) -> distribution`.
      task: of the environment.
      key: the randomness.
      num_trajectories: N.
      horizon: H.

    Returns:
      `Trajectories` [H, N, ...].

    Raises:
      ValueError: if a count is wrong, or the environment or the policy breaks its contract.
    """
    num_trajectories = check_integer("num_trajectories", num_trajectories, at_least=1)
    horizon = check_integer("horizon", horizon, at_least=1)
    reset_key, act_key = jax.random.split(key)
    state, observation = jax.vmap(environment.reset, (None, 0))(task, jax.random.split(reset_key, num_trajectories))
    check_environment(environment, task, jax.eval_shape(policy, observation), state, observation)

    def act(carry, key):
        state, observation, mask = carry
        action_key, step_key = jax.random.split(key)
        distribution = policy(observation)
        action = distribution.sample(action_key)
        *after, reward, done = jax.vmap(environment.step, (None, 0, 0, 0))(
            task, state, action, jax.random.split(step_key, num_trajectories)
        )
        step = Trajectories(observation, action, jnp.where(mask > 0, reward, 0.0), mask, distribution)
        # A trajectory that has ended stands still: what an environment does after the end may not be finite.
        going = mask * (1.0 - done)
        state, observation = jax.tree.map(
            lambda new, old: jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)) > 0, new, old),
            tuple(after),
            (state, observation),
        )
        return (state, observation, going), step

    return jax.lax.scan(act, (state, observation, jnp.ones(num_trajectories)), jax.random.split(act_key, horizon))[1]


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


def as_batch(trajectories: Trajectories, advantage_fn: AdvantageFn) -> Batch:
    """Trajectories as a `Batch` of observations and `Transition`s, for the surrogates."""
    advantage = advantage_fn(trajectories)
    targets = Transition(trajectories.action, trajectories.reward, advantage, trajectories.mask, trajectories.policy)
    return Batch(trajectories.observation, targets)


def collect(
    learner_of: Callable[[int], MetaLearner],
    environment: Environment,
    meta_params: ArrayTree,
    task: ArrayTree,
    key: PRNGKey,
    *,
    num_updates: int,
    num_trajectories: int,
    horizon: int,
    advantage_fn: AdvantageFn,
    start: Callable[[ArrayTree], ArrayTree] = lambda meta_params: meta_params,
) -> tuple[Batch, Batch]:
    """Alternates collection and adaptation: φ_k acts, and the learner takes inner step k+1 on what it did.

    Args:
      learner_of: `(k) -> MetaLearner` that takes k inner steps, each with data of its own (`data_per_step=True`).
      environment: the processes.
      meta_params: θ.
      task: of the environment.
      key: the randomness.
      num_updates: K ≥ 0.
      num_trajectories: N, before every update and after the last.
      horizon: H.
      advantage_fn: the advantages of N trajectories.
      start: `(meta_params) -> φ_0`, that of the learner.

    Returns:
      The batches before each update [K, H, N, ...], and the batch [H, N, ...] after the last.

    Raises:
      ValueError: if a count is wrong, or the environment or the policy breaks its contract.
    """
    num_updates = check_integer("num_updates", num_updates, at_least=0)
    task_params, batches = start(meta_params), []
    for num_steps, step_key in enumerate(jax.random.split(key, num_updates + 1)):
        learner = learner_of(num_steps)
        if num_steps:
            # From θ again, because an inner rule may have a state.
            task_params, _ = learner.adapt(meta_params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))
        policy = functools.partial(learner.predict, task_params)
        trajectories = rollout(environment, policy, task, step_key, num_trajectories=num_trajectories, horizon=horizon)
        batches.append(as_batch(trajectories, advantage_fn))
    *before, after = batches
    return jax.tree.map(lambda last, *leaves: jnp.stack([*leaves, last])[:-1], after, *before), after


def make_sampler(
    learner_of: Callable[[int], MetaLearner],
    environment: Environment,
    *,
    num_updates: int,
    num_trajectories: int,
    horizon: int,
    advantage_fn: AdvantageFn | None = None,
    start: Callable[[ArrayTree], ArrayTree] = lambda meta_params: meta_params,
) -> SampleEpisodeFn:
    """A task distribution whose data the current policy collects.

    Args:
      learner_of: `(k) -> MetaLearner` that takes k inner steps, each with data of its own (`data_per_step=True`).
      environment: the processes.
      num_updates: K ≥ 0, the inner steps of training.
      num_trajectories: N, before every update and after the last.
      horizon: H.
      advantage_fn: the advantages of N trajectories; by default `linear_advantages()`.
      start: `(meta_params) -> φ_0`, that of the learner.

    Returns:
      `sample_episode(key, params)`, an episode with a support set [K, H, N, ...], drawn by φ_0 … φ_{K−1}, and a query
      set [H, N, ...], drawn by φ_K.

    Raises:
      ValueError: if a count is wrong.
    """
    settings = {
        "num_updates": check_integer("num_updates", num_updates, at_least=0),
        "num_trajectories": check_integer("num_trajectories", num_trajectories, at_least=1),
        "horizon": check_integer("horizon", horizon, at_least=1),
        "advantage_fn": advantage_fn or linear_advantages(),
        "start": start,
    }

    def sample_episode(key: PRNGKey, params: ArrayTree) -> Episode:
        task_key, collect_key = jax.random.split(key)
        task = environment.sample_task(task_key)
        return Episode(*collect(learner_of, environment, params, task, collect_key, **settings))

    return sample_episode


def mean_return(reward: jax.Array) -> jax.Array:
    """The mean over trajectories of the sums of their rewards [..., H, N]; its shape is [...]."""
    return jnp.mean(jnp.sum(reward, -2), -1)


def returns_of(support: Batch, query: Batch) -> jax.Array:
    """The mean returns before each update and after the last, [K+1], of what `collect` returns."""
    after = mean_return(query.targets.reward)
    return jnp.concatenate([mean_return(support.targets.reward), after[None]])
