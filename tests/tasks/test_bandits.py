"""What an arm pays, counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax.tasks.bandits import bandits


def test_probabilities_are_uniform():
    probabilities = jax.vmap(bandits(3).sample_task)(jax.random.split(jax.random.key(0), 4000))
    assert probabilities.shape == (4000, 3)
    # Each of ten parts has 400 ± 19 of the 4000 probabilities of an arm.
    for arm in probabilities.T:
        counts, _ = np.histogram(arm, bins=10, range=(0, 1))
        np.testing.assert_array_less(np.abs(counts - 400), 5 * 19)
    # The correlation of two arms is 0 ± 1/√4000.
    np.testing.assert_allclose(np.corrcoef(probabilities.T), np.eye(3), atol=5 / np.sqrt(4000))


def test_an_arm_pays_with_its_probability():
    probabilities, count = jnp.array([0.0, 0.3, 1.0]), 4000
    step = jax.vmap(bandits(3).step, (None, None, None, 0))
    keys = jax.random.split(jax.random.key(0), count)
    for arm, probability in enumerate(probabilities.tolist()):
        _, observation, reward, done = step(probabilities, (), jnp.int32(arm), keys)
        assert set(reward.tolist()) <= {0.0, 1.0}
        deviation = np.sqrt(probability * (1 - probability) / count)
        np.testing.assert_allclose(reward.mean(), probability, atol=5 * deviation + 1e-6)
        assert not observation.any()
        assert not done.any()


def test_a_step_keeps_shapes_and_dtypes():
    environment, key = bandits(4), jax.random.key(0)
    probabilities = environment.sample_task(key)
    before = environment.reset(probabilities, key)
    *after, reward, done = jax.jit(environment.step)(probabilities, before[0], jnp.int32(2), key)
    assert jax.tree.map(jax.typeof, tuple(after)) == jax.tree.map(jax.typeof, before)
    assert before[1].shape == (1,)
    assert (reward.shape, reward.dtype) == ((), jnp.float32)
    assert (done.shape, done.dtype) == ((), jnp.bool_)


@pytest.mark.parametrize("num_arms", [0, 1.5, True])
def test_impossible_numbers_of_arms_are_refused(num_arms):
    with pytest.raises(ValueError, match=f"num_arms must be an integer of at least 1, got {num_arms}"):
        bandits(num_arms)
