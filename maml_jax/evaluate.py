"""Adapts to many episodes and scores them at every inner step, with intervals."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from scipy.special import stdtrit

from maml_jax import parallel
from maml_jax.types import (
    ArrayTree,
    Evaluation,
    MetaLearner,
    PRNGKey,
    SampleEpisodeFn,
    as_floating,
    at_least_float32,
    check_function,
    check_integer,
    check_learner,
    check_pair,
    draw_episode,
    function_and_data,
    predict_beside_support,
    task_keys,
    with_data,
)


def evaluate(
    learner: MetaLearner | jax.tree_util.Partial,
    meta_params: ArrayTree,
    sample_episode: SampleEpisodeFn,
    key: PRNGKey,
    *,
    metric_fn: Callable[[ArrayTree, ArrayTree], ArrayTree],
    num_episodes: int = 600,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    one_query_at_a_time: bool = False,
    stochastic: bool = False,
) -> Evaluation:
    """Adapts to fresh episodes and scores their query sets before and after every inner step.

    A learner built with more inner steps than in training shows the whole curve. Programs are compiled once for
    each combination of functions, and the most recent ones are kept.

    Args:
      learner: the algorithm, usually with the number of inner steps of the test protocol. To compile once for many
        values of a number, give a `jax.tree_util.Partial` that returns the learner: its arrays are arguments
        of the compiled program.
      meta_params: θ.
      sample_episode: the task distribution to test on, `(key) -> Episode` or `(key, params) -> Episode`.
      key: the randomness; episode i depends on `key` and i only.
      metric_fn: `(outputs, targets) -> pytree of numbers` for one query set, such as `losses.accuracy`.
      num_episodes: E ≥ 2.
      chunk_size: episodes that are vmapped together; by default 1 on a CPU and 100 elsewhere, whatever their size. If
        the memory of the device does not suffice, give a smaller number.
      mesh: from `parallel.task_mesh`, to divide the episodes over devices.
      one_query_at_a_time: whether each query goes through the network with only the support set beside it.
        The prediction is then inductive: a normalisation by batch statistics sees no other query. Otherwise
        all queries of an episode go through together, which is transductive for such a normalisation.
      stochastic: whether `adapt` gets the key of the episode. By default it gets none, and a stochastic model is
        deterministic.

    Returns:
      An `Evaluation` with leaves [K+1, ...]; K = 0 for a learner that does not iterate.

    Raises:
      ValueError: if a count is wrong, `metric_fn` is not a function or returns no number, `num_episodes` does not
        divide over `mesh`, the learner's `adapt` ignores `observe_fn`, or `stochastic` is set and an episode has no
        key.
    """
    check_function("metric_fn", metric_fn, "losses.accuracy")
    score = (_query_scores, metric_fn, one_query_at_a_time, stochastic)
    return _evaluate(score, learner, meta_params, sample_episode, key, num_episodes, chunk_size, mesh)


def evaluate_objective(
    learner: MetaLearner | jax.tree_util.Partial,
    meta_params: ArrayTree,
    sample_episode: SampleEpisodeFn,
    key: PRNGKey,
    *,
    num_episodes: int = 600,
    chunk_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Evaluation:
    """The training objective and its info over many episodes, without a gradient.

    Args:
      learner: as for `evaluate`.
      meta_params: θ.
      sample_episode: the task distribution.
      key: the randomness; episode i depends on `key` and i only.
      num_episodes: E ≥ 2.
      chunk_size: episodes that are vmapped together; by default 1 on a CPU and 100 elsewhere.
      mesh: from `parallel.task_mesh`, to divide the episodes over devices.

    Returns:
      An `Evaluation` whose attributes are pairs `(objective, info)`.

    Raises:
      ValueError: if a count is wrong, or `num_episodes` does not divide over `mesh`.
    """
    return _evaluate((_objective,), learner, meta_params, sample_episode, key, num_episodes, chunk_size, mesh)


def _query_scores(learner, params, episode, metric_fn, one_query_at_a_time, stochastic) -> ArrayTree:
    """The metric [K+1] of one query set."""
    support, query = episode.support, episode.query
    if any(jnp.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(query)):
        raise ValueError(
            "the query set of an episode is empty, so there is nothing to score; give a sample_episode that draws one "
            "query or more"
        )

    def observe(task_params):
        if one_query_at_a_time:
            outputs = predict_beside_support(learner.predict, task_params, support.inputs, query.inputs)
        else:
            outputs = learner.predict(task_params, query.inputs)
        found = metric_fn(outputs, query.targets)
        if not jax.tree.leaves(found):
            raise ValueError(
                f"metric_fn returned {found!r}, in which there is no number; return one, or a tree of them"
            )
        return jax.tree.map(jnp.asarray, found)

    if stochastic and episode.key is None:
        raise ValueError("stochastic=True needs a key in every episode; let the sampler return Episode(..., key)")
    _, info = learner.adapt(params, support, key=episode.key if stochastic else None, observe_fn=observe)
    observed = getattr(info, "observed", None)
    if observed is None:
        raise ValueError(
            "the learner's adapt returned no info.observed; it must evaluate observe_fn(task_params) before the first "
            "and after every inner step, and stack the values to [K+1, ...]"
        )
    return observed


def _objective(learner, params, episode) -> tuple[jax.Array, ArrayTree]:
    return check_pair(learner.objective(params, episode))


def _evaluate(score, learner, meta_params, sample_episode, key, num_episodes, chunk_size, mesh) -> Evaluation:
    """Scores episodes; `score` is a function of `(learner, params, episode, ...)` and its last arguments."""
    num_episodes = check_integer("num_episodes", num_episodes, at_least=2)  # one gives no interval
    if chunk_size is None:
        chunk_size = 1 if jax.default_backend() == "cpu" else 100
    chunk_size = check_integer("chunk_size", chunk_size, at_least=1)
    parallel.check_mesh(mesh, num_episodes, "num_episodes")
    is_built = isinstance(learner, jax.tree_util.Partial)
    learner, learner_data = function_and_data(learner)
    sample_episode, sample_data = function_and_data(sample_episode)
    try:
        program = _program(score, learner, is_built, sample_episode, chunk_size, mesh)
    except TypeError:  # a part that cannot be hashed: the program is not kept, and every call compiles
        program = _program.__wrapped__(score, learner, is_built, sample_episode, chunk_size, mesh)
    if mesh is not None:
        meta_params = parallel.replicate(meta_params, mesh)
    scores = program((meta_params, learner_data, sample_data), task_keys(key, num_episodes))
    per_episode = at_least_float32(as_floating(scores))
    quantile = float(stdtrit(num_episodes - 1, 0.975))
    return jax.tree.transpose(
        jax.tree.structure(per_episode),
        jax.tree.structure(Evaluation(*range(6))),
        jax.tree.map(lambda values: _summary(values, quantile), per_episode),
    )


@functools.lru_cache(maxsize=16)
def _program(score, learner, is_built, sample_episode, chunk_size, mesh) -> Callable:
    """A jitted function of `((params, data of the learner, data of the sampler), keys)`.

    What it closes over is freed when it leaves the cache.
    """
    score_fn, *settings = score

    def scores(arguments, keys):
        params, learner_data, sample_data = arguments
        built = with_data(learner, learner_data)() if is_built else learner
        check_learner(built)
        sample = with_data(sample_episode, sample_data)

        def score_one(key):
            return score_fn(built, params, draw_episode(sample, key, params), *settings)

        return _map_in_chunks(score_one, keys, chunk_size)

    return jax.jit(scores) if mesh is None else parallel.each_task(scores, mesh)


def _map_in_chunks(function: Callable, xs: jax.Array, size: int) -> ArrayTree:
    """`jax.lax.map` with `batch_size=size`, which fails if an output is an empty array."""
    if size == 1:
        return jax.lax.map(function, xs)
    rest = len(xs) % size
    num_whole = len(xs) - rest
    parts = [jax.vmap(function)(xs[num_whole:])] if rest else []
    if num_whole:
        chunks = jax.lax.map(jax.vmap(function), xs[:num_whole].reshape(-1, size, *xs.shape[1:]))
        parts.insert(0, jax.tree.map(lambda y: y.reshape(num_whole, *y.shape[2:]), chunks))
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


@jax.jit
def _summary(values: jax.Array, quantile: jax.Array) -> Evaluation:
    finite = jnp.isfinite(values)
    others = jnp.where(finite, values, jnp.nan)
    return Evaluation(
        mean=jnp.mean(values, 0),
        ci95=quantile * jnp.std(values, 0, ddof=1) / jnp.sqrt(values.shape[0]),
        per_episode=values,
        num_nonfinite=jnp.sum(~finite, 0),
        finite_mean=jnp.nanmean(others, 0),
        finite_median=jnp.nanmedian(others, 0),
    )
