"""Embeddings: their shape and dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import Batch, Model, losses, pretrained_classifier, r2d2
from maml_jax.inner.embedding import embed, unit_length

WAY = 20


def model_of(dtype):
    """Embeddings that are the inputs."""
    return Model(lambda key, inputs: jnp.zeros(()), lambda params, inputs: inputs.astype(dtype))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float64, jnp.float64)]
)
def test_embeddings_have_at_least_single_precision(dtype, expected, x64):
    assert embed(model_of(dtype), jnp.zeros(()), jnp.ones((2, 3))).dtype == expected


def test_long_vectors_of_half_precision_have_unit_length():
    vectors = jnp.array([[300.0, 400.0], [0.0, 0.0]], jnp.float16)  # the square of the first is infinite in float16
    chex.assert_trees_all_close(unit_length(vectors), jnp.array([[0.6, 0.8], [0.0, 0.0]], jnp.float32))


def test_a_zero_vector_has_a_derivative():
    def last(vectors):
        return jnp.sum(unit_length(vectors)[:, -1])

    # ∂/∂v of v / √(|v|² + ε) at zero is ε^(-1/2), one million.
    chex.assert_trees_all_close(jax.grad(last)(jnp.zeros((1, 3))), jnp.array([[0.0, 0.0, 1e6]]), rtol=1e-5)


def adapted(build, dtype, **settings):
    """Outputs for 20 classes whose embeddings are alike, of one example each."""
    inputs = jnp.asarray(1.0 + 0.05 * np.random.default_rng(0).normal(size=(WAY, 64)), jnp.bfloat16)
    learner = build(model_of(dtype), losses.cross_entropy, way=WAY, **settings)
    params = learner.init(jax.random.key(0), inputs)
    task_params, _ = learner.adapt(params, Batch(inputs, jnp.arange(WAY)))
    return learner.predict(task_params, inputs)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (
            pretrained_classifier,
            {"num_classes": WAY, "head": "centroid", "inner_optimizer": optax.sgd(0.1), "num_inner_steps": 0},
        ),
        (r2d2, {}),
    ],
)
def test_half_precision_of_the_network_leaves_the_classifier_its_digits(build, settings):
    half, single = (adapted(build, dtype, **settings) for dtype in (jnp.bfloat16, jnp.float32))
    chex.assert_trees_all_equal(half, single)
