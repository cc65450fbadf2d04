"""The surrogates against a process whose every trajectory is listed, in float64."""

import chex
import enumerated_mdp as mdp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import Batch, Episode, Model, maml, mixed_mode, rl
from maml_jax.rl import Categorical, Normal, Transition

RATE = 0.7


def objective(loss, *, at, baseline=True):
    """H times minus the loss over all trajectories, as a function of θ; those of the policy `at` are given."""
    batch = mdp.batch(at, baseline)
    return lambda table: -mdp.HORIZON * loss(mdp.POLICY.apply(table, batch.inputs), batch.targets)


SURROGATES = {
    "policy_gradient": rl.policy_gradient,
    "ratio_surrogate": rl.ratio_surrogate,
    "clipped_surrogate": rl.clipped_surrogate(0.2),
    "loaded_dice": rl.loaded_dice,
}


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("name", SURROGATES)
def test_the_gradient_is_that_of_the_expected_return(name, baseline, x64):
    found = jax.grad(objective(SURROGATES[name], at=mdp.THETA, baseline=baseline))(mdp.THETA)
    chex.assert_trees_all_close(found, jax.grad(mdp.expected_return)(mdp.THETA), rtol=1e-12)


@pytest.mark.parametrize("baseline", [False, True])
def test_only_loaded_dice_has_the_second_derivative(baseline, x64):
    exact = jax.hessian(mdp.expected_return)(mdp.THETA)
    found = {
        name: jax.hessian(objective(loss, at=mdp.THETA, baseline=baseline))(mdp.THETA)
        for name, loss in SURROGATES.items()
    }
    np.testing.assert_allclose(found["loaded_dice"], exact, atol=1e-14)
    size = np.linalg.norm(exact)
    error = {name: np.linalg.norm(hessian - exact) / size for name, hessian in found.items()}
    # The log-likelihood of a softmax table leaves nothing, with a baseline that makes advantages zero on average.
    if baseline:
        assert np.linalg.norm(found["policy_gradient"]) < 1e-12 * size
    assert error["policy_gradient"] > 0.5
    assert error["ratio_surrogate"] > 0.1
    assert error["policy_gradient"] > 2 * error["ratio_surrogate"]


def test_the_third_derivative_of_loaded_dice_is_exact(x64):
    third = jax.jacfwd(jax.hessian(objective(rl.loaded_dice, at=mdp.THETA)))(mdp.THETA)
    np.testing.assert_allclose(third, jax.jacfwd(jax.hessian(mdp.expected_return))(mdp.THETA), atol=1e-14)


def exact_meta_objective(theta, num_steps):
    """J after `num_steps` steps of gradient ascent on J / H, which is minus the inner loss."""
    for _ in range(num_steps):
        theta = theta + RATE / mdp.HORIZON * jax.grad(mdp.expected_return)(theta)
    return mdp.expected_return(theta)


def meta_gradient(loss, num_steps, inner_grad):
    """The gradient of the objective of `maml` through `inner_loop`, with all trajectories before each step."""
    learners = [
        maml(
            mdp.POLICY, loss, inner_optimizer=optax.sgd(RATE), num_inner_steps=k, inner_grad=inner_grad,
            data_per_step=True,
        )
        for k in range(num_steps + 1)
    ]  # fmt: skip
    theta, batches = jnp.asarray(mdp.THETA), []
    for learner in learners:
        support = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches) if batches else None
        adapted = theta if support is None else learner.adapt(theta, support)[0]
        batches.append(mdp.batch(adapted))
    episode = Episode(support, batches[-1])
    return -mdp.HORIZON * jax.grad(learners[-1].objective, has_aux=True)(theta, episode)[0]


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_meta_gradient_of_loaded_dice_is_exact(num_steps, inner_grad, x64):
    exact = jax.grad(exact_meta_objective)(mdp.THETA, num_steps)
    found = meta_gradient(rl.loaded_dice, num_steps, inner_grad)
    np.testing.assert_allclose(found, exact, atol=1e-14)
    for biased in (rl.policy_gradient, rl.ratio_surrogate):
        error = np.linalg.norm(meta_gradient(biased, num_steps, inner_grad) - exact) / np.linalg.norm(exact)
        assert error > 1e-3


def test_the_exact_meta_objective_has_the_differences_of_its_gradient(x64):
    step, exact = 1e-5, jax.grad(exact_meta_objective)(mdp.THETA, 2)
    for index in np.ndindex(2, 2):
        moved = np.zeros((2, 2))
        moved[index] = step
        ahead, behind = (exact_meta_objective(mdp.THETA + sign * moved, 2) for sign in (1.0, -1.0))
        np.testing.assert_allclose((ahead - behind) / (2 * step), exact[index], rtol=1e-8)


def made_up(seed=0):
    """Normal actions of 4 trajectories of 5 time steps, the third of which ends after 2."""
    rng = np.random.default_rng(seed)
    mask = np.ones((5, 4))
    mask[2:, 2] = 0.0
    outputs = Normal(jnp.asarray(rng.normal(size=(5, 4, 2))), jnp.asarray(rng.normal(size=(5, 4, 2)) / 5))
    old = Normal(outputs.mean + 0.3 * rng.normal(size=(5, 4, 2)), outputs.log_std)
    action = old.sample(jax.random.key(seed))
    return outputs, Transition(action, rng.normal(size=(5, 4)), jnp.asarray(rng.normal(size=(5, 4))), mask, old)


def test_values_are_those_written_out(x64):
    outputs, targets = made_up()
    log_new, log_old = outputs.log_prob(targets.action), targets.policy.log_prob(targets.action)
    valid = targets.mask.astype(bool)
    ratio, advantage = np.exp(log_new - log_old)[valid], targets.advantage[valid]
    np.testing.assert_allclose(rl.policy_gradient(outputs, targets), -np.mean(log_new[valid] * advantage), rtol=1e-12)
    np.testing.assert_allclose(rl.ratio_surrogate(outputs, targets), -np.mean(ratio * advantage), rtol=1e-12)
    clipped = -np.mean(np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.1) * advantage))
    np.testing.assert_allclose(rl.clipped_surrogate(0.1)(outputs, targets), clipped, rtol=1e-12)
    assert np.any((ratio < 0.9) | (ratio > 1.1))
    assert rl.loaded_dice(outputs, targets) == 0.0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_a_ratio_that_overflows_and_is_clipped_has_no_gradient(dtype):
    def policy(mean):
        return Normal(mean, jnp.zeros((1, 1, 1), dtype))

    one = jnp.ones((1, 1), dtype)
    targets = Transition(jnp.full((1, 1, 1), 20.0, dtype), one, one, one, policy(jnp.zeros((1, 1, 1), dtype)))
    loss = jax.value_and_grad(lambda mean: rl.clipped_surrogate(0.2)(policy(mean), targets))
    value, slope = loss(jnp.full((1, 1, 1), 20.0, dtype))  # the logarithm of the ratio is 200
    np.testing.assert_allclose(value, -1.2, rtol=1e-3)
    assert slope == 0.0


@pytest.mark.parametrize("name", SURROGATES)
def test_what_comes_after_the_end_changes_nothing(name, x64):
    outputs, targets = made_up()
    after = 1.0 - targets.mask[..., None]
    other = outputs._replace(mean=outputs.mean + 1e4 * after)
    loss = jax.value_and_grad(SURROGATES[name])
    (value, grads), (same, others) = loss(outputs, targets), loss(other, targets)
    assert value == same
    chex.assert_tree_all_finite(others)
    chex.assert_trees_all_close(grads, others)
    assert not np.any(np.asarray(others.mean) * after)


def test_shapes_that_do_not_fit_are_refused():
    outputs, targets = made_up()
    with pytest.raises(ValueError, match=r"log-probabilities \(5, 4\), the targets an advantage \(5,\) and a mask"):
        rl.policy_gradient(outputs, targets._replace(advantage=targets.advantage[:, 0]))
    with pytest.raises(ValueError, match=r"clip=0\.0 must be a positive number"):
        rl.clipped_surrogate(0.0)


def test_they_are_losses_of_maml_like_any_other(x64):
    # One inner step on data that all steps share: the support set need not have an axis of steps.
    model = Model(lambda key, inputs: jnp.zeros((2, 2)), lambda table, states: Categorical(states @ table))
    batch = mdp.batch(mdp.THETA)
    learner = maml(model, rl.policy_gradient, inner_optimizer=optax.sgd(RATE), num_inner_steps=1)
    adapted, info = learner.adapt(jnp.asarray(mdp.THETA), Batch(batch.inputs, batch.targets))
    expected = mdp.THETA + RATE / mdp.HORIZON * jax.grad(mdp.expected_return)(mdp.THETA)
    np.testing.assert_allclose(adapted, expected, rtol=1e-12)
    assert info.support_loss.shape == (1,)
