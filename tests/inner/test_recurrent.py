"""The initial values of the LSTM; its steps are written out in the tests of the learners that use it."""

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.inner.recurrent import init_lstm


def test_the_forget_gate_starts_open_and_the_kernel_glorot_uniform():
    params = init_lstm(jax.random.key(0), num_inputs=30, num_units=20)
    np.testing.assert_array_equal(params["bias"].reshape(4, 20), np.repeat([[0.0], [1.0], [0.0], [0.0]], 20, axis=1))
    bound = np.sqrt(6 / (50 + 80))
    assert params["kernel"].shape == (50, 80)
    assert 0.99 * bound < jnp.max(jnp.abs(params["kernel"])) <= bound
