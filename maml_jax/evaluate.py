"""Adapts to many episodes and scores them at every inner step, with intervals."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maml_jax.types import ArrayTree, Evaluation, MetaLearner, PRNGKey, SampleEpisodeFn


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _scores(learner, sample_episode, metric_fn, chunk_size, mesh, meta_params, keys):
    """The metric [E, K+1] of the episodes drawn with keys [E]."""

    def score(params, key):
        episode = sample_episode(key)

        def observe(task_params):
            return metric_fn(learner.predict(task_params, episode.query.inputs), episode.query.targets)

        return learner.adapt(params, episode.support, key=episode.key, observe_fn=observe)[1].observed

    def scores(params, keys):
        return jax.lax.map(lambda key: score(params, key), keys, batch_size=chunk_size if chunk_size > 1 else None)

    if mesh is not None:
        from maml_jax import parallel

        parallel.check_divides(keys.shape[0], mesh.size, "num_episodes")
        scores = parallel.each_task(scores, mesh)
    return scores(meta_params, keys)


def evaluate(
    learner: MetaLearner,
    meta_params: ArrayTree,
    sample_episode: SampleEpisodeFn,
    key: PRNGKey,
    *,
    metric_fn: Callable[[ArrayTree, ArrayTree], jax.Array],
    num_episodes: int = 600,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Evaluation:
    """Adapts to fresh episodes and scores their query sets before and after every inner step.

    A learner built with more inner steps than were trained with shows the whole curve. The program is
    compiled once for each combination of functions and is kept: evaluating again costs no compilation.

    Args:
      learner: the algorithm, usually with the number of inner steps of the test protocol.
      meta_params: θ.
      sample_episode: the task distribution to test on.
      key: the randomness; episode i depends on `key` and i alone.
      metric_fn: `(outputs, targets) -> scalar` of one query set, such as `losses.accuracy`.
      num_episodes: E ≥ 2.
      chunk_size: episodes that are vmapped together; by default 1 on a CPU and 100 elsewhere.
      mesh: from `parallel.task_mesh`, to divide the episodes over devices.

    Returns:
      An `Evaluation`: mean [K+1], ci95 [K+1] and per_episode [E, K+1].

    Raises:
      ValueError: if `num_episodes` is below 2 (an interval needs two), or does not divide over `mesh`.
    """
    if num_episodes < 2:
        raise ValueError(f"num_episodes={num_episodes} gives no interval; evaluate at least 2 episodes")
    if chunk_size is None:
        chunk_size = 1 if jax.default_backend() == "cpu" else 100
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_episodes))
    per_episode = _scores(learner, sample_episode, metric_fn, chunk_size, mesh, meta_params, keys)
    standard_error = jnp.std(per_episode, axis=0, ddof=1) / jnp.sqrt(num_episodes)
    return Evaluation(jnp.mean(per_episode, axis=0), 1.96 * standard_error, per_episode)
