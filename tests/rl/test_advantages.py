"""Returns, advantages and the linear baseline, against sums and numpy's least squares."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import rl
from maml_jax.rl import Normal, Trajectories, advantages

H, N = 6, 3
rng = np.random.default_rng(0)
MASK = np.ones((H, N))
MASK[4:, 1] = 0.0
REWARD, VALUE = rng.normal(size=(H, N)) * MASK, rng.normal(size=(H, N))


def test_returns_are_discounted_sums(x64):
    found = rl.discounted_returns(jnp.asarray(REWARD), 0.9)
    for t in range(H):
        np.testing.assert_allclose(found[t], sum(0.9 ** (s - t) * REWARD[s] for s in range(t, H)), rtol=1e-12)


def test_rewards_may_be_integers():
    np.testing.assert_allclose(rl.discounted_returns(jnp.array([1, 0, 2]), 0.5), [1.5, 1.0, 2.0])


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_advantages_are_sums_of_errors(decay, x64):
    found = rl.generalised_advantages(
        jnp.asarray(REWARD), jnp.asarray(VALUE), jnp.asarray(MASK), discount=0.9, decay=decay
    )
    following = np.concatenate([VALUE[1:] * MASK[1:], np.zeros((1, N))])
    error = (REWARD + 0.9 * following - VALUE) * MASK
    for t in range(H):
        expected = sum((0.9 * decay) ** (s - t) * error[s] for s in range(t, H)) * MASK[t]
        np.testing.assert_allclose(found[t], expected, rtol=1e-12)
    if decay == 1.0:
        returns = rl.discounted_returns(jnp.asarray(REWARD), 0.9)
        np.testing.assert_allclose(found, (returns - VALUE) * MASK, rtol=1e-12)


@pytest.mark.parametrize("wrong", [{"value": VALUE[:, 0]}, {"value": VALUE.T}, {"mask": MASK[:, :1]}])
def test_shapes_that_would_be_broadcast_are_refused(wrong):
    arrays = {"reward": REWARD, "value": VALUE, "mask": MASK} | wrong
    (shape,) = (list(array.shape) for array in wrong.values())
    with pytest.raises(ValueError, match=rf"must have one shape, time first, got \[6, 3\], .*{re.escape(str(shape))}"):
        rl.generalised_advantages(**arrays, discount=0.9, decay=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_comes_after_the_end_of_a_trajectory_may_be_anything(value):
    spoilt = {name: jnp.where(MASK > 0, x, value) for name, x in (("reward", REWARD), ("value", VALUE))}
    arrays = {"mask": jnp.asarray(MASK), "discount": 0.9, "decay": 0.5}
    found = rl.generalised_advantages(**spoilt, **arrays)
    np.testing.assert_allclose(found, rl.generalised_advantages(jnp.asarray(REWARD), jnp.asarray(VALUE), **arrays))
    np.testing.assert_allclose(
        advantages.standardised(spoilt["value"], jnp.asarray(MASK)),
        advantages.standardised(jnp.asarray(VALUE), jnp.asarray(MASK)),
    )
    observation = rng.normal(size=(H, N, 2)).astype(np.float32)
    of_spoilt = jnp.where(MASK[..., None] > 0, observation, value)
    fitted, expected = (
        rl.linear_baseline(x, returns, jnp.asarray(MASK))
        for x, returns in ((of_spoilt, spoilt["reward"]), (jnp.asarray(observation), jnp.asarray(REWARD)))
    )
    np.testing.assert_allclose(np.where(MASK > 0, fitted, 0), np.where(MASK > 0, expected, 0), rtol=1e-4, atol=1e-5)


def test_a_number_of_numpy_keeps_the_dtype_of_the_rewards(x64):
    reward = jnp.asarray(REWARD, jnp.float32)
    assert rl.discounted_returns(reward, np.float64(0.9)).dtype == jnp.float32
    arrays = {"reward": reward, "value": reward, "mask": jnp.ones_like(reward), "discount": 0.9}
    assert rl.generalised_advantages(**arrays, decay=np.float64(0.9)).dtype == jnp.float32


def test_the_baseline_is_the_ridge_regression_of_numpy(x64):
    observation, returns = rng.normal(size=(H, N, 2)), rng.normal(size=(H, N))
    found = rl.linear_baseline(jnp.asarray(observation), jnp.asarray(returns), jnp.asarray(MASK), ridge=0.1)
    rows, targets = [], []
    centred = observation - np.sum(observation * MASK[..., None], (0, 1)) / MASK.sum()
    for t in range(H):
        for n in range(N):
            rows.append([*centred[t, n], *centred[t, n] ** 2, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])
            targets.append(returns[t, n])
    rows, targets, valid = np.array(rows), np.array(targets), MASK.reshape(-1).astype(bool)
    penalised = np.concatenate([rows[valid], np.sqrt(0.1) * np.eye(8)])
    coefficients = np.linalg.lstsq(penalised, np.concatenate([targets[valid], np.zeros(8)]), rcond=None)[0]
    np.testing.assert_allclose(found, (rows @ coefficients).reshape(H, N), rtol=1e-9)


@pytest.mark.parametrize(("largest", "horizon"), [(100.0, 100), (1.0, 1000)])
def test_the_baseline_is_as_good_in_float32_for_large_observations_and_long_trajectories(largest, horizon, x64):
    observation = rng.uniform(-largest, largest, size=(horizon, 20, 2))
    time = np.arange(horizon)[:, None] / horizon
    returns = 20.0 * (1.0 - time) ** 2 + 5.0 * observation[..., 0] / largest
    arrays = observation, returns, np.ones(returns.shape)
    single, double = (
        np.asarray(rl.linear_baseline(*(jnp.asarray(x, dtype) for x in arrays))) for dtype in ("float32", "float64")
    )
    np.testing.assert_allclose(double, returns, atol=1e-3)  # the returns are linear in the features
    np.testing.assert_allclose(single, double, atol=0.01)  # of returns up to 25


def test_an_observation_may_be_a_pytree():
    observation = jax.random.normal(jax.random.key(0), (5, 3, 4))
    parts = {"position": observation[..., :1], "rest": observation[..., 1:].reshape(5, 3, 3, 1)}
    returns, mask = jax.random.normal(jax.random.key(1), (5, 3)), jnp.ones((5, 3))
    expected = rl.linear_baseline(observation, returns, mask)
    np.testing.assert_allclose(rl.linear_baseline(parts, returns, mask), expected, rtol=1e-6)


def test_a_number_of_the_observation_may_never_change():
    moving = rng.normal(size=(100, 20, 2))
    still = np.broadcast_to([0.3, -0.4], moving.shape)  # collinear with the constant feature
    returns = 10.0 * moving.sum(-1) + rng.normal(size=moving.shape[:2])
    mask = jnp.ones(returns.shape)
    found = rl.linear_baseline(
        jnp.asarray(np.concatenate([moving, still], -1), jnp.float32), jnp.asarray(returns, jnp.float32), mask
    )
    without = rl.linear_baseline(jnp.asarray(moving, jnp.float32), jnp.asarray(returns, jnp.float32), mask)
    np.testing.assert_allclose(found, without, atol=0.05)


def test_advantages_of_trajectories_are_standardised():
    observation = jnp.asarray(rng.normal(size=(H, N, 2)), jnp.float32)
    policy = Normal(observation, observation)
    reward, mask = jnp.asarray(REWARD, jnp.float32), jnp.asarray(MASK, jnp.float32)
    found = rl.linear_advantages(ridge=1.0)(Trajectories(observation, observation, reward, mask, policy))
    valid = np.asarray(found)[MASK > 0]
    np.testing.assert_allclose([valid.mean(), valid.std()], [0.0, 1.0], atol=1e-5)
    assert not np.any(np.asarray(found)[MASK == 0])
    # A reward after the end must not matter, nor an observation.
    other = Trajectories(observation + 9.0 * (1.0 - mask)[..., None], observation, reward, mask, policy)
    np.testing.assert_allclose(rl.linear_advantages(ridge=1.0)(other), found, atol=1e-5)


def test_linear_advantages_are_those_over_the_baseline_with_its_settings():
    observation = jnp.asarray(rng.normal(size=(H, N, 2)), jnp.float32)
    reward, mask = jnp.asarray(REWARD, jnp.float32), jnp.asarray(MASK, jnp.float32)
    trajectories = Trajectories(observation, observation, reward, mask, Normal(observation, observation))
    settings = {"discount": 0.9, "decay": 0.7, "ridge": 3.0}
    value = rl.linear_baseline(observation, rl.discounted_returns(reward, 0.9), mask, ridge=3.0)
    valid = np.asarray(rl.generalised_advantages(reward, value, mask, discount=0.9, decay=0.7))[MASK > 0]
    expected = (valid - valid.mean()) / valid.std()
    np.testing.assert_allclose(rl.linear_advantages(**settings)(trajectories)[MASK > 0], expected, atol=1e-4)
    for name, default in {"discount": 0.99, "decay": 1.0, "ridge": 1e-5}.items():
        other = rl.linear_advantages(**settings | {name: default})(trajectories)[MASK > 0]
        assert np.abs(other - expected).max() > 1e-2, name


def test_without_rewards_there_is_no_advantage():
    same = jnp.zeros((H, N))
    trajectories = Trajectories(jnp.ones((H, N, 1)), same, same, jnp.ones((H, N)), Normal(same, same))
    assert jnp.all(jnp.abs(rl.linear_advantages()(trajectories)) < 1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discount": 1.5}, r"discount=1\.5 must be at most 1"),
        ({"decay": -0.1}, r"decay=-0\.1 must be a number of at least 0"),
        ({"ridge": 0.0}, r"ridge=0\.0 must be a positive number"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rl.linear_advantages(**settings)


@pytest.mark.parametrize("offset", [5.0, 50.0])
def test_an_offset_of_the_observations_does_not_matter_in_float32(offset):
    observation = 0.05 * np.cumsum(np.random.default_rng(1).normal(size=(100, 20, 2)), 0).astype(np.float32)
    mask = jnp.ones((100, 20))
    returns = advantages.discounted_returns(-jnp.abs(observation).sum(-1), 0.99)

    def unexplained(offset):
        return jnp.std(returns - advantages.linear_baseline(jnp.asarray(observation + offset), returns, mask))

    assert unexplained(0.0) < 0.7 * jnp.std(returns)
    # An observation of 50 in float32 is rounded by 4e-6, a hundred-thousandth of its spread of 0.34.
    np.testing.assert_allclose(unexplained(offset), unexplained(0.0), rtol=1e-3)


@pytest.mark.parametrize("value", [0.1, 3.7, 100.1])
def test_equal_values_are_standardised_to_zero(value):
    # What the two means leave is rounding of rounding, below the 1e-8 that the deviation is increased by.
    np.testing.assert_allclose(advantages.standardised(jnp.full((100, 20), value), jnp.ones((100, 20))), 0, atol=1e-3)


def test_integer_returns_leave_the_fractions_of_the_observations():
    observation, returns = jnp.asarray(rng.normal(size=(H, N, 2)), jnp.float32), jnp.arange(H * N).reshape(H, N)
    found, expected = (
        rl.linear_baseline(observation, values, jnp.ones((H, N))) for values in (returns, returns.astype(jnp.float32))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"observation": {"seen": np.zeros((N, H, 2))}}, r"must begin with these axes, got \[3, 6, 2\]"),
        ({"returns": REWARD[:1]}, r"got \[1, 3\] and \[6, 3\]"),
        ({"mask": MASK[:, :1]}, r"got \[6, 3\] and \[6, 1\]"),
        ({"returns": REWARD[0], "mask": MASK[0]}, r"must be \[H, N\], .*, got \[3\] and \[3\]"),
    ],
)
def test_a_baseline_of_arrays_that_do_not_fit_is_refused(wrong, message):
    arrays = {"observation": np.zeros((H, N, 2)), "returns": REWARD, "mask": MASK} | wrong
    with pytest.raises(ValueError, match=message):
        rl.linear_baseline(**arrays)
