import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import ALPHA, half_mse, linear_model, make_episode

from maml_jax import evaluate, maml, parallel

NUM_STEPS = 3
LEARNER = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=NUM_STEPS)
THETA = jnp.array([0.5, -1.0, 2.0, 0.1])
KEY = jax.random.key(3)


def run(num_episodes=8, learner=LEARNER, **kwargs):
    return evaluate(learner, THETA, make_episode, KEY, metric_fn=half_mse, num_episodes=num_episodes, **kwargs)


def test_scores_against_a_direct_computation():
    evaluation = run()
    scores = np.zeros((8, NUM_STEPS + 1))
    for e in range(8):
        episode = make_episode(jax.random.fold_in(KEY, e))
        params = THETA
        for k in range(NUM_STEPS + 1):
            scores[e, k] = half_mse(linear_model.apply(params, episode.query.inputs), episode.query.targets)
            support = episode.support
            gradient = support.inputs.T @ (support.inputs @ params - support.targets) / len(support.targets)
            params = params - ALPHA * gradient
    chex.assert_trees_all_close(evaluation.per_episode, scores.astype(np.float32), rtol=1e-4)
    chex.assert_trees_all_close(evaluation.mean, scores.mean(0).astype(np.float32), rtol=1e-4)
    ci95 = 1.96 * scores.std(0, ddof=1) / np.sqrt(8)
    chex.assert_trees_all_close(evaluation.ci95, ci95.astype(np.float32), rtol=1e-4)


def test_more_steps_at_test_time_extend_the_curve():
    longer = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=NUM_STEPS + 4)
    curve = run(learner=longer).mean
    chex.assert_shape(curve, (NUM_STEPS + 5,))
    chex.assert_trees_all_close(curve[: NUM_STEPS + 1], run().mean, rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{"chunk_size": 3}, {"chunk_size": 8}, {"chunk_size": 100}])
def test_chunks_do_not_matter(kwargs):
    chex.assert_trees_all_close(run(**kwargs), run(), rtol=1e-5)


def test_a_mesh_does_not_matter():
    mesh = parallel.task_mesh(jax.devices()[:4])
    chex.assert_trees_all_close(jax.device_get(run(mesh=mesh)), jax.device_get(run()), rtol=1e-5)


def test_an_episode_does_not_depend_on_how_many_there_are():
    chex.assert_trees_all_close(run(12).per_episode[:8], run(8).per_episode, rtol=1e-6)


def test_evaluating_again_does_not_trace_again():
    chex.clear_trace_counter()
    sampler = chex.assert_max_traces(make_episode, n=1)
    for seed in range(3):
        evaluation = evaluate(
            LEARNER, seed * THETA, sampler, jax.random.key(seed), metric_fn=half_mse, num_episodes=2, chunk_size=2
        )
    chex.assert_tree_all_finite(evaluation)


@pytest.mark.parametrize("num_episodes", [1, 0])
def test_fewer_than_two_episodes_are_refused(num_episodes):
    with pytest.raises(ValueError, match=f"num_episodes={num_episodes} gives no interval; evaluate at least 2"):
        run(num_episodes)


def test_episodes_that_do_not_divide_over_a_mesh_are_refused():
    with pytest.raises(ValueError, match=r"num_episodes=7 does not divide over the 4 devices .* multiple of 4"):
        run(7, mesh=parallel.task_mesh(jax.devices()[:4]))
