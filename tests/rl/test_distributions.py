"""Distributions over actions: densities against scipy, divergences against quadrature and sums."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from maml_jax.rl import Categorical, Normal

rng = np.random.default_rng(0)
NORMALS = [Normal(jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(0.3 * rng.normal(size=(3, 2)))) for _ in range(2)]
CATEGORICALS = [Categorical(jnp.asarray(rng.normal(size=(3, 4)))) for _ in range(2)]


def test_the_normal_density_is_that_of_scipy(x64):
    (normal, _), action = NORMALS, rng.normal(size=(3, 2))
    expected = stats.norm.logpdf(action, normal.mean, np.exp(normal.log_std)).sum(-1)
    np.testing.assert_allclose(normal.log_prob(action), expected, rtol=1e-6)
    expected = stats.norm.entropy(normal.mean, np.exp(normal.log_std)).sum(-1)
    np.testing.assert_allclose(normal.entropy(), expected, rtol=1e-6)


def test_the_normal_divergence_is_the_integral():
    p, q = (Normal(of.mean[:, :1], of.log_std[:, :1]) for of in NORMALS)
    grid = np.linspace(-12.0, 12.0, 20_001)
    for index in range(3):
        log_p, log_q = (
            stats.norm.logpdf(grid, float(of.mean[index, 0]), np.exp(float(of.log_std[index, 0]))) for of in (p, q)
        )
        expected = np.trapezoid(np.exp(log_p) * (log_p - log_q), grid)
        np.testing.assert_allclose(p.kl(q)[index], expected, rtol=1e-4)


def test_the_categorical_numbers_are_sums_over_actions():
    p, q = CATEGORICALS
    probability, other = (np.exp(of.logits) / np.exp(of.logits).sum(-1, keepdims=True) for of in (p, q))
    for action in range(4):
        np.testing.assert_allclose(p.log_prob(jnp.full(3, action)), np.log(probability[:, action]), rtol=1e-5)
    np.testing.assert_allclose(p.kl(q), (probability * np.log(probability / other)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(p.entropy(), -(probability * np.log(probability)).sum(-1), rtol=1e-5)
    assert p.mode().tolist() == np.argmax(probability, -1).tolist()


def test_actions_that_are_ruled_out_add_nothing():
    def ruled_out(logits):
        return Categorical(logits.at[:, 3].set(-jnp.inf))

    p, q = (of.logits.astype(jnp.float32) for of in CATEGORICALS)
    for measure in (lambda p: ruled_out(p).kl(ruled_out(q)), lambda p: ruled_out(p).entropy()):
        grads = jax.grad(lambda p, measure=measure: measure(p).sum())(p)
        assert np.all(np.isfinite(grads))
        assert not np.any(grads[:, 3])
    np.testing.assert_allclose(
        ruled_out(p).kl(ruled_out(q)), Categorical(p[:, :3]).kl(Categorical(q[:, :3])), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(ruled_out(p).entropy(), Categorical(p[:, :3]).entropy(), rtol=1e-5)


def test_draws_are_from_the_distribution():
    many = jax.random.split(jax.random.key(0), 20_000)
    categorical, normal = CATEGORICALS[0], NORMALS[0]
    drawn = np.asarray(jax.vmap(categorical.sample)(many))
    assert drawn.dtype == np.int32
    probability = np.exp(categorical.logits) / np.exp(categorical.logits).sum(-1, keepdims=True)
    for action in range(4):
        np.testing.assert_allclose((drawn == action).mean(0), probability[:, action], atol=0.02)
    drawn = np.asarray(jax.vmap(normal.sample)(many))
    np.testing.assert_allclose(drawn.mean(0), normal.mean, atol=0.04)
    np.testing.assert_allclose(drawn.std(0), np.exp(normal.log_std), rtol=0.03)
    np.testing.assert_array_equal(normal.mode(), normal.mean)
    # Nothing of an action is drawn with anything of another one, or of another trajectory.
    correlation = np.corrcoef(drawn.reshape(len(drawn), -1).T)
    np.testing.assert_allclose(correlation, np.eye(6), atol=5 / np.sqrt(len(drawn)))


def test_an_action_out_of_range_has_no_probability():
    of = Categorical(jnp.zeros(3))
    values = jax.vmap(of.log_prob)(jnp.array([-1, 0, 2, 3]))
    np.testing.assert_array_equal(np.isnan(values), [True, False, False, True])


def test_narrow_actions_are_those_of_int32():
    policy = Categorical(jax.random.normal(jax.random.key(0), (3, 256)))
    action = jnp.array([0, 5, 255])
    np.testing.assert_array_equal(policy.log_prob(action.astype(jnp.uint8)), policy.log_prob(action))
    assert jnp.isfinite(policy.log_prob(action)).all()


def test_draws_of_half_precision_are_those_of_single_precision():
    keys = jax.random.split(jax.random.key(0), 1000)
    logits, mean = jnp.zeros(3), jnp.zeros(2)
    half, single = (jax.vmap(Categorical(logits.astype(dtype)).sample)(keys) for dtype in (jnp.bfloat16, jnp.float32))
    np.testing.assert_array_equal(half, single)
    half, single = (
        jax.vmap(Normal(mean.astype(dtype), mean.astype(dtype)).sample)(keys) for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, single.astype(jnp.bfloat16))
