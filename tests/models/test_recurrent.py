"""The gated recurrent unit against its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import models


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def test_a_step_is_that_of_the_equations():
    network = models.gru(hidden_size=4, heads={"logits": 3, "value": 1})
    params = network.init(jax.random.key(0), jnp.zeros((7, 2)))
    carry, inputs = np.linspace(-1.0, 1.0, 4), np.array([0.5, -2.0])
    p = jax.tree.map(np.asarray, params["gru"])
    reset, update = (
        sigmoid(inputs @ p[f"i{gate}"]["kernel"] + p[f"i{gate}"]["bias"] + carry @ p[f"h{gate}"]["kernel"])
        for gate in "rz"
    )
    new = np.tanh(inputs @ p["in"]["kernel"] + p["in"]["bias"] + reset * (carry @ p["hn"]["kernel"] + p["hn"]["bias"]))
    expected = (1.0 - update) * new + update * carry
    found, outputs = network.step(params, jnp.asarray(carry, jnp.float32), jnp.asarray(inputs, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, width in (("logits", 3), ("value", 1)):
        head = jax.tree.map(np.asarray, params[name])
        assert outputs[name].shape == (width,)
        np.testing.assert_allclose(outputs[name], expected @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-7)
        assert np.all(np.abs(outputs[name]) < 0.05)  # near 0 at the start
    assert network.start().shape == (4,)
    assert not np.any(network.start())


def test_units_remember_between_two_and_memory_steps_at_the_start():
    plain = models.gru(hidden_size=500, heads={"value": 1})
    network = models.gru(hidden_size=500, heads={"value": 1}, memory=40)
    params = network.init(jax.random.key(0), jnp.zeros((1, 2)))
    bias = params["gru"]["iz"].pop("bias")
    expected = plain.init(jax.random.key(0), jnp.zeros((1, 2)))
    expected["gru"]["iz"].pop("bias")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    # Without inputs and connections a step keeps u / (1 + u) of the state.
    alone = jax.tree.map(jnp.zeros_like, params)
    alone["gru"]["iz"]["bias"] = bias
    kept, _ = network.step(alone, jnp.ones(500), jnp.zeros(2))
    steps = 1.0 / (1.0 - kept)
    assert np.all((steps >= 1.999) & (steps <= 40.001))
    assert np.min(steps) < 4.0
    assert np.max(steps) > 38.0
    np.testing.assert_allclose(np.mean(steps), 21.0, atol=1.5)  # uniform


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 1}, "memory must be an integer of at least 2, got 1"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"heads": {"value": 0}}, "value must be an integer of at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        models.gru(**{"hidden_size": 4, "heads": {"value": 1}} | settings)
