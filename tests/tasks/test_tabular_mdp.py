"""Steps are counted, and small processes are solved by trying every policy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from maml_jax.tasks.tabular_mdp import TabularMDP, action_values, random_mdps, value_iteration


def test_tasks_have_the_distribution_of_the_paper():
    mdps = jax.vmap(random_mdps(4, 2).sample_task)(jax.random.split(jax.random.key(0), 1000))
    assert mdps.transitions.shape == (1000, 4, 2, 4)
    assert mdps.mean_rewards.shape == (1000, 4, 2)
    np.testing.assert_allclose(mdps.transitions.sum(-1), 1, rtol=1e-6)
    # A part of a Dirichlet vector is Beta(1, S − 1), and two parts have the correlation −1 / (S − 1).
    assert stats.kstest(np.ravel(mdps.transitions[..., 0]), stats.beta(1, 3).cdf).pvalue > 1e-3
    correlations = np.corrcoef(np.reshape(mdps.transitions, (-1, 4)).T)
    np.testing.assert_allclose(correlations, np.eye(4) * 4 / 3 - 1 / 3, atol=5 / np.sqrt(8000))
    assert stats.kstest(np.ravel(mdps.mean_rewards), stats.norm(1, 1).cdf).pvalue > 1e-3


def test_steps_follow_the_transitions_and_pay_the_mean_rewards():
    environment, count = random_mdps(3, 2), 8000
    mdp = environment.sample_task(jax.random.key(0))
    step = jax.vmap(environment.step, (None, None, None, 0))
    for number, (state, action) in enumerate(np.ndindex(3, 2)):
        keys = jax.random.split(jax.random.key(number + 1), count)
        following, observation, reward, done = step(mdp, jnp.int32(state), jnp.int32(action), keys)
        probabilities = np.asarray(mdp.transitions[state, action])
        deviations = np.sqrt(probabilities * (1 - probabilities) / count)
        np.testing.assert_array_less(
            np.abs(np.bincount(following, minlength=3) / count - probabilities), 5 * deviations
        )
        np.testing.assert_array_equal(observation, np.eye(3)[following])
        # The reward is normal with variance 1, whatever the next state.
        assert stats.kstest(np.asarray(reward), stats.norm(mdp.mean_rewards[state, action], 1).cdf).pvalue > 1e-3
        assert abs(np.corrcoef(reward, following)[0, 1]) < 5 / np.sqrt(count)
        assert not done.any()


def test_a_step_keeps_shapes_and_dtypes():
    environment, key = random_mdps(), jax.random.key(0)
    mdp = environment.sample_task(key)
    before = environment.reset(mdp, key)
    np.testing.assert_array_equal(before[1], np.eye(10)[0])
    assert before[0] == 0
    *after, reward, done = jax.jit(environment.step)(mdp, before[0], jnp.int32(4), key)
    assert jax.tree.map(jax.typeof, tuple(after)) == jax.tree.map(jax.typeof, before)
    assert (before[0].dtype, before[1].dtype) == (jnp.int32, jnp.float32)
    assert (reward.shape, reward.dtype) == ((), jnp.float32)
    assert (done.shape, done.dtype) == ((), jnp.bool_)


def returns_of(mdp, policy):
    """The expected returns [S] of a policy [H, S], from each state."""
    states = np.arange(policy.shape[1])
    value = np.zeros(len(states))
    for actions in policy[::-1]:
        value = mdp.mean_rewards[states, actions] + mdp.transitions[states, actions] @ value
    return value


def test_value_iteration_finds_the_best_of_all_policies(x64):
    num_states, num_actions, horizon = 2, 3, 3
    for seed in range(3):
        mdp = random_mdps(num_states, num_actions).sample_task(jax.random.key(seed))
        values, policy = value_iteration(mdp, horizon)
        assert values.shape == (horizon + 1, num_states)
        every = itertools.product(range(num_actions), repeat=horizon * num_states)
        host = TabularMDP(*map(np.asarray, mdp))
        returns = np.array([returns_of(host, np.reshape(actions, (horizon, num_states))) for actions in every])
        np.testing.assert_allclose(values[0], returns.max(0), rtol=1e-12)
        np.testing.assert_allclose(returns_of(host, np.asarray(policy)), returns.max(0), rtol=1e-12)
        # What is left after a step is the process with a shorter horizon.
        np.testing.assert_allclose(values[1:], value_iteration(mdp, horizon - 1)[0], rtol=1e-12)


def test_the_value_of_an_action_is_its_reward_and_the_expected_value_after_it():
    mdp = TabularMDP(jnp.array([[[0.25, 0.75], [1.0, 0.0]]] * 2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_allclose(action_values(mdp, jnp.array([8.0, 4.0])), [[6.0, 10.0], [8.0, 12.0]])
    values, policy = value_iteration(mdp, 1)
    np.testing.assert_allclose(values, [[2.0, 4.0], [0.0, 0.0]])
    np.testing.assert_array_equal(policy, [[1, 1]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_mdps(0, 5), "num_states must be an integer of at least 1, got 0"),
        (lambda: random_mdps(10, 0), "num_actions must be an integer of at least 1, got 0"),
        (lambda: random_mdps(2.0), "num_states must be an integer of at least 1, got 2.0"),
        (lambda: value_iteration(random_mdps().sample_task(jax.random.key(0)), 0), "horizon must be .*, got 0"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
