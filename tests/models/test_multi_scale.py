import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from maml_jax import models
from maml_jax.models.multi_scale import _overlapping_pool

NORM = functools.partial(models.BatchStatNorm, scale=True)


def test_the_geometry_of_the_paper():
    model = models.multi_scale(norm=NORM)
    images = jnp.zeros((2, 28, 28, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.eval_shape(model.apply, params, images).shape == (2, 2 * 2 * 64 * 2)
    # Four convolutions with biases, and a scale and an offset for each filter.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 3 * 64


def test_a_forward_pass_by_hand(x64):
    model = models.multi_scale(features=(2, 3, 2, 2), norm=NORM, param_dtype=jnp.float64)
    images = jax.random.normal(jax.random.key(0), (3, 20, 20, 1))
    params = model.init(jax.random.key(1), images)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params)

    def windows(x, stride):
        size = x.shape[1]
        places = [(i, j) for i in range(0, size - 1, stride) for j in range(0, size - 1, stride)]
        rows = len({i for i, _ in places})
        return np.stack([x[:, i : i + 2, j : j + 2].max((1, 2)) for i, j in places], 1).reshape(len(x), rows, rows, -1)

    hidden, kept = np.asarray(images), []
    for index in range(4):
        conv, norm = params[f"conv_{index}"], params[f"norm_{index}"]
        hidden = np.asarray(
            jax.lax.conv_general_dilated(
                hidden, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            + conv["bias"].reshape(1, 1, 1, -1)
        )
        hidden = (hidden - hidden.mean((0, 1, 2))) / np.sqrt(hidden.var((0, 1, 2)) + 1e-3)
        hidden = hidden * np.asarray(norm["scale"]) + np.asarray(norm["offset"])
        hidden = (
            windows(hidden[:, : hidden.shape[1] // 2 * 2, : hidden.shape[1] // 2 * 2], 2)
            if index < 3
            else windows(hidden, 1)
        )
        hidden = np.where(hidden > 0, hidden, 0.1 * hidden)
        kept.append(hidden)
    expected = np.concatenate([windows(kept[2], 1).reshape(3, -1), kept[3].reshape(3, -1)], 1)
    np.testing.assert_allclose(model.apply(params, images), expected, rtol=1e-9, atol=1e-12)


def test_finite_differences_of_both_scales(x64):
    model = models.multi_scale(features=(2, 2, 2, 2), norm=NORM, param_dtype=jnp.float64)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
    params = model.init(jax.random.key(1), images)
    for scale in (slice(0, 2), slice(2, 4)):  # features of the third and of the fourth block
        outputs = jax.jit(lambda params, scale=scale: jnp.sum(model.apply(params, images)[:, scale] ** 2))
        check_grads(outputs, (params,), order=1, modes=["rev"], eps=1e-6)


def test_of_equal_values_the_first_gets_the_derivative_in_windows_that_overlap():
    gradient = jax.grad(lambda x: _overlapping_pool(x).sum())(jnp.ones((1, 2, 3, 1)))
    chex.assert_trees_all_equal(gradient[0, :, :, 0], jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_wrong_filters_are_refused():
    with pytest.raises(ValueError, match=r"features=\(64,\) must be the filters of four convolutions"):
        models.multi_scale(features=(64,))
    with pytest.raises(ValueError, match="features must be an integer of at least 1, got 0"):
        models.multi_scale(features=(1, 1, 1, 0))


def test_images_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"at least 16 pixels a side, got inputs \(2, 12, 16, 1\)"):
        models.multi_scale(features=(2, 2, 2, 2)).init(jax.random.key(0), jnp.zeros((2, 12, 16, 1)))
