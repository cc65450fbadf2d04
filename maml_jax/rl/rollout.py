"""Trajectories of a policy, and episodes for meta-learning that the policies of the moment collect.

Data are constants to every gradient.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maml_jax.rl.advantages import AdvantageFn, Trajectories, linear_advantages
from maml_jax.rl.distributions import Distribution, unless_diverged
from maml_jax.rl.environments import check_environment
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
      `Trajectories` [H, N, ...], constants to every gradient.

    Raises:
      ValueError: if a count is wrong, or the environment or the policy breaks its contract.
    """
    num_trajectories = check_integer("num_trajectories", num_trajectories, at_least=1)
    horizon = check_integer("horizon", horizon, at_least=1)
    task = jax.tree.map(jnp.asarray, task)  # an environment may index it by what is traced
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
        reward = jnp.where(mask > 0, unless_diverged(distribution, action, reward), 0.0)
        step = Trajectories(observation, action, reward, mask, distribution)
        # A trajectory that has ended stands still: what an environment does after the end may not be finite.
        going = mask * (1.0 - done)
        state, observation = jax.tree.map(
            lambda new, old: jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)) > 0, new, old),
            tuple(after),
            (state, observation),
        )
        return (state, observation, going), step

    start = (state, observation, jnp.ones(num_trajectories))
    return jax.lax.stop_gradient(jax.lax.scan(act, start, jax.random.split(act_key, horizon))[1])


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
      start: `(meta_params) -> φ_0`, that of the learner; for `meta_sgd` and `maml_plus_plus`
        `lambda meta_params: meta_params["params"]`.

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
