import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classes import SIZE, WAY, draw_episode, embedding, identity
from jax.test_util import check_grads

from maml_jax import RidgeHead, losses, r2d2
from maml_jax.algorithms.r2d2 import ridge_regression


@pytest.mark.parametrize("shot", [1, 4])  # fewer and more examples than features
def test_the_head_is_numpys_least_squares(x64, shot):
    episode = draw_episode(shot=shot)
    learner = r2d2(identity, losses.cross_entropy, way=WAY, strength=0.3, scale=2.0)
    params = learner.init(jax.random.key(0), episode.support.inputs) | {"offset": jnp.float64(0.7)}
    task_params, _ = learner.adapt(params, episode.support)
    # Ridge regression is least squares with further rows: sqrt(λ) W = 0.
    size = len(episode.support.targets)
    inputs = np.concatenate([episode.support.inputs, np.ones((size, 1))], 1) / np.sqrt(size)
    targets = np.eye(WAY)[np.asarray(episode.support.targets)] / np.sqrt(size)
    rows = np.concatenate([inputs, np.sqrt(0.3) * np.eye(SIZE + 1)])
    expected = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((SIZE + 1, WAY))]), rcond=None)[0]
    chex.assert_trees_all_close(task_params["weights"], jnp.array(expected), rtol=1e-9)
    outputs = 2.0 * (np.concatenate([episode.query.inputs, np.ones((9, 1))], 1) @ expected) + 0.7
    chex.assert_trees_all_close(learner.predict(task_params, episode.query.inputs), jnp.array(outputs), rtol=1e-9)


@pytest.mark.parametrize("num_examples", [3, 9])
def test_its_gradient_is_that_of_the_explicit_inverse(x64, num_examples):
    keys = jax.random.split(jax.random.key(0), 3)
    inputs, targets, weight = (
        jax.random.normal(key, shape, jnp.float64)
        for key, shape in zip(keys, ((num_examples, 5), (num_examples, 2), (5, 2)), strict=True)
    )

    def explicit(inputs, targets, strength):
        return jnp.linalg.inv(inputs.T @ inputs + strength * jnp.eye(5)) @ inputs.T @ targets

    def gradient(solve):
        return jax.grad(lambda *args: jnp.sum(weight * solve(*args) ** 2), argnums=(0, 1, 2))(inputs, targets, 0.7)

    chex.assert_trees_all_close(gradient(ridge_regression), gradient(explicit), rtol=1e-9)


@pytest.mark.parametrize("num_examples", [3, 9])
def test_the_smaller_matrix_is_factorised(num_examples):
    program = jax.make_jaxpr(ridge_regression)(jnp.ones((num_examples, 5)), jnp.ones((num_examples, 2)), 0.7)
    factorised = re.findall(r"f32\[(\d+),\1\] = cholesky", str(program))
    assert factorised == [str(min(num_examples, 5))]


def test_a_learned_strength_starts_at_its_value_and_has_a_gradient(x64):
    episode = draw_episode()
    plain, learned = (r2d2(embedding, losses.cross_entropy, way=WAY, learn_strength=flag) for flag in (False, True))
    params = learned.init(jax.random.key(0), episode.support.inputs)
    fixed = {name: value for name, value in params.items() if name != "log_strength"}
    chex.assert_trees_all_close(learned.objective(params, episode)[0], plain.objective(fixed, episode)[0], rtol=1e-9)
    assert jnp.abs(jax.grad(learned.objective, has_aux=True)(params, episode)[0]["log_strength"]) > 0


@pytest.mark.parametrize("shot", [1, 3])
def test_finite_differences(x64, shot):
    episode = draw_episode(shot=shot)
    learner = r2d2(embedding, losses.cross_entropy, way=WAY, strength=0.5, learn_strength=True)
    params = learner.init(jax.random.key(1), episode.support.inputs)
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


@pytest.mark.parametrize("name", ["strength", "scale"])
def test_numbers_that_are_not_positive_are_refused(name):
    for make in (RidgeHead, lambda **numbers: r2d2(embedding, losses.cross_entropy, way=WAY, **numbers)):
        for number in (0.0, np.float32(0), np.int64(-1)):
            with pytest.raises(ValueError, match=f"{name}={number} must be a positive number"):
                make(**{name: number})
