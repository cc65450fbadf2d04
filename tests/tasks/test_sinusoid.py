"""The oracle's inputs tell the task; everything else is checked against them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from key_use import assert_every_key_has_one_purpose

from maml_jax.tasks import sinusoid

TASKS, SHOT, QUERY_SHOT = 2000, 4, 3


@pytest.fixture(scope="module")
def episodes():
    sample_episode = sinusoid.make_sampler(shot=SHOT, query_shot=QUERY_SHOT, oracle=True)
    return jax.jit(jax.vmap(sample_episode))(jax.random.split(jax.random.key(0), TASKS))


def test_shapes_and_dtypes(episodes):
    chex.assert_shape(episodes.support, [(TASKS, SHOT, 3), (TASKS, SHOT, 1)])
    chex.assert_shape(episodes.query, [(TASKS, QUERY_SHOT, 3), (TASKS, QUERY_SHOT, 1)])
    chex.assert_type([*episodes.support, *episodes.query], np.float32)
    chex.assert_shape(episodes.key, (TASKS,))


def test_targets_are_the_sine_that_the_oracle_is_told(episodes):
    for batch in (episodes.support, episodes.query):
        x, amplitude, phase = np.moveaxis(np.asarray(batch.inputs, np.float64), -1, 0)
        # float32: x − b up to 8.2 is rounded to 5e-7, times an amplitude up to 5.
        np.testing.assert_allclose(batch.targets[..., 0], amplitude * np.sin(x - phase), atol=5e-6)


def test_an_episode_is_one_task(episodes):
    tasks = np.concatenate([episodes.support.inputs, episodes.query.inputs], axis=1)[..., 1:]
    np.testing.assert_array_equal(tasks, np.broadcast_to(tasks[:, :1], tasks.shape))
    assert len(np.unique(tasks[:, 0, 0])) > 0.99 * TASKS


@pytest.mark.parametrize(
    ("column", "low", "high"), [(0, -5.0, 5.0), (1, 0.1, 5.0), (2, 0.0, np.pi)], ids=["x", "amplitude", "phase"]
)
@pytest.mark.parametrize("which", ["support", "query"])
def test_ranges_of_the_paper_are_filled_evenly(episodes, which, column, low, high):
    values = np.sort(np.asarray(getattr(episodes, which).inputs[:, 0, column]))
    assert low <= values[0]
    assert values[-1] <= high
    # The distance of 2000 draws from the uniform distribution function exceeds 2.2 / sqrt(2000) once in 8000 times
    # (Kolmogorov: 2 exp(-2 * 2.2²)).
    uniform = (values - low) / (high - low)
    assert np.abs(uniform - (np.arange(TASKS) + 0.5) / TASKS).max() < 2.2 / np.sqrt(TASKS)


def test_amplitude_phase_and_input_are_independent(episodes):
    correlations = np.corrcoef(np.asarray(episodes.support.inputs[:, 0]).T)
    # Each is 0 ± 1 / sqrt(2000).
    assert np.abs(correlations[np.triu_indices(3, 1)]).max() < 4 / np.sqrt(TASKS)


def test_support_and_query_share_no_point(episodes):
    x = np.concatenate([episodes.support.inputs, episodes.query.inputs], axis=1)[..., 0]
    assert (np.diff(np.sort(x, axis=1), axis=1) > 0).mean() > 0.9999  # float32 has 2^23 of them: a rare tie is chance


def test_the_oracle_sees_the_same_tasks(episodes):
    sample_episode = sinusoid.make_sampler(shot=SHOT, query_shot=QUERY_SHOT)
    blind = jax.jit(jax.vmap(sample_episode))(jax.random.split(jax.random.key(0), TASKS))
    for without, with_task in ((blind.support, episodes.support), (blind.query, episodes.query)):
        chex.assert_trees_all_equal(without.inputs, with_task.inputs[..., :1])
        chex.assert_trees_all_close(without.targets, with_task.targets, atol=1e-6)


def test_it_is_a_pure_function_of_the_key():
    sample_episode = sinusoid.make_sampler(shot=2, query_shot=1)
    key, other = jax.random.split(jax.random.key(1))
    chex.assert_trees_all_close(sample_episode(key)[:2], jax.jit(sample_episode)(key)[:2], atol=1e-6)
    assert not np.isin(sample_episode(other).support.inputs, sample_episode(key).support.inputs).any()
    assert not np.array_equal(jax.random.key_data(sample_episode(key).key), jax.random.key_data(key))


def test_no_key_has_two_purposes():
    assert_every_key_has_one_purpose(sinusoid.make_sampler(shot=2, query_shot=1), jax.random.key(0))


def test_draws_of_earlier_versions_are_repeated():
    key = jax.random.key(11)
    episode = sinusoid.make_sampler(shot=2, query_shot=3)(key)
    amplitude_key, phase_key, input_key, episode_key = jax.random.split(key, 4)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, minval=0.0, maxval=jnp.pi)
    x = jax.random.uniform(input_key, (5, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    chex.assert_trees_all_equal([*episode.support, *episode.query], [x[:2], y[:2], x[2:], y[2:]])
    np.testing.assert_array_equal(jax.random.key_data(episode.key), jax.random.key_data(episode_key))


def test_equal_samplers_share_a_program():
    draw = jax.jit(lambda sample_episode, key: sample_episode(key))
    for settings in ({"shot": 2, "query_shot": 1}, {"shot": np.int64(2), "query_shot": 1, "oracle": False}):
        draw(sinusoid.make_sampler(**settings), jax.random.key(0))
    assert draw._cache_size() == 1
    draw(sinusoid.make_sampler(shot=2, query_shot=1, oracle=True), jax.random.key(0))
    assert draw._cache_size() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shot": 0}, "shot must be an integer of at least 1, got 0"),
        ({"query_shot": -1}, "query_shot must be an integer of at least 1, got -1"),
        ({"shot": 1.5}, "shot must be an integer of at least 1, got 1.5"),
        ({"query_shot": True}, "query_shot must be an integer of at least 1, got True"),
    ],
)
def test_an_episode_needs_points(changes, message):
    with pytest.raises(ValueError, match=message):
        sinusoid.make_sampler(**({"shot": 1, "query_shot": 1} | changes))
