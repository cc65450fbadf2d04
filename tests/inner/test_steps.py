import jax
import numpy as np
import pytest

from maml_jax.inner.steps import mini_batches, step_keys


def test_mini_batches_use_up_the_examples_before_they_repeat():
    drawn = np.asarray(mini_batches(jax.random.key(0), 10, num_steps=7, batch_size=4))
    assert drawn.shape == (7, 4)
    flat = drawn.ravel()
    for start in (0, 10):
        assert sorted(flat[start : start + 10]) == list(range(10))
    assert len(set(flat[20:])) == 8
    assert list(flat[:10]) != list(flat[10:20])
    assert not np.array_equal(drawn, mini_batches(jax.random.key(1), 10, num_steps=7, batch_size=4))


@pytest.mark.parametrize("num_steps", [0, 3])
def test_every_step_has_a_key_of_its_own(num_steps):
    keys = step_keys(jax.random.key(0), num_steps)
    assert keys.shape == (num_steps,)
    assert len({tuple(data) for data in np.asarray(jax.random.key_data(keys))}) == num_steps
    assert step_keys(None, num_steps) is None


def test_a_mini_batch_is_no_larger_than_the_set():
    with pytest.raises(ValueError, match="mini-batches of 7 exceed the 3 examples"):
        mini_batches(jax.random.key(0), 3, num_steps=2, batch_size=7)
