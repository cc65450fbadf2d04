"""Environments with the interface of gymnax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import models, rl


class Params(NamedTuple):
    force: float = 1.0
    max_steps_in_episode: int = 4


class State(NamedTuple):
    position: jax.Array
    time: int


class Cart:
    """An environment as gymnax has them: numbers of Python in the state, an integer for a reward."""

    def reset_env(self, key, params):
        state = State(jax.random.uniform(key), 0.0)
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        state = State(state.position + params.force * (2 * action - 1), state.time + 1)
        done = (jnp.abs(state.position) > 2) | (state.time >= params.max_steps_in_episode)
        return self.observe(state), state, jnp.int32(state.position > 0), done, {"discount": 1.0}

    def observe(self, state):
        return jnp.array([state.position, state.time])


ENVIRONMENT = rl.from_gymnax(Cart(), lambda key: Params(force=jax.random.uniform(key, minval=0.1, maxval=1.0)))


def right(observation):
    return rl.Categorical(jnp.broadcast_to(jnp.array([-jnp.inf, 0.0]), (len(observation), 2)))


def test_a_task_is_the_parameters_and_trajectories_end_by_themselves():
    task = ENVIRONMENT.sample_task(jax.random.key(0))
    found = rl.rollout(ENVIRONMENT, right, task, jax.random.key(1), num_trajectories=5, horizon=6)
    position = np.asarray(found.observation[..., 0])
    np.testing.assert_allclose(position[1] - position[0], float(task.force), rtol=1e-6)
    assert len(np.unique(position[0])) == 5  # what reset_env draws differs between trajectories
    length = np.minimum(4, np.floor((2 - position[0]) / float(task.force)) + 1)
    np.testing.assert_array_equal(found.mask.sum(0), length)
    assert found.reward.dtype == jnp.float32


def test_dtypes_stay_as_they_start():
    task = ENVIRONMENT.sample_task(jax.random.key(0))
    state, observation = ENVIRONMENT.reset(task, jax.random.key(1))
    after, seen, reward, done = ENVIRONMENT.step(task, state, jnp.int32(1), jax.random.key(2))
    assert [leaf.dtype for leaf in state] == [leaf.dtype for leaf in after]
    assert (observation.dtype, seen.dtype, reward.dtype, done.dtype) == (jnp.float32, jnp.float32, jnp.float32, bool)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, observation, after)))


class Drifting(Cart):
    """An integer in the state becomes a fraction."""

    def step_env(self, key, state, action, params):
        return self.observe(state), state._replace(time=state.time + 0.5), 0.0, False, {}

    def reset_env(self, key, params):
        observation, state = super().reset_env(key, params)
        return observation, state._replace(time=0)


class Growing(Cart):
    """The state gets another structure."""

    def step_env(self, key, state, action, params):
        return self.observe(state), (state, state), 0.0, False, {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [(Drifting(), r"changes state\.time from int32\[\] to float32\[\]"), (Growing(), "must return the same structure")],
)
def test_a_state_that_would_lose_something_is_refused(environment, message):
    broken = rl.from_gymnax(environment, lambda key: Params())
    task = broken.sample_task(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        rl.rollout(broken, right, task, jax.random.key(1), num_trajectories=2, horizon=3)


def test_tasks_are_batched_and_a_trial_can_be_run():
    policy = rl.gru_policy(num_actions=2, hidden_size=3)
    params = policy.init(jax.random.key(0), jnp.zeros((1, 2 + 2 + 2)))
    sampler = rl.make_trial_sampler(ENVIRONMENT, policy, num_episodes=2, horizon=5)
    episodes = jax.jit(jax.vmap(sampler, (0, None)))(jax.random.split(jax.random.key(1), 3), params)
    assert episodes.support.inputs.shape == (3, 10, 6)


def test_another_interface_is_refused():
    with pytest.raises(ValueError, match="object has no reset_env; from_gymnax needs"):
        rl.from_gymnax(object(), lambda key: ())


def test_an_environment_of_gymnax_itself():
    gymnax = pytest.importorskip("gymnax", reason="gymnax is not installed")
    cart, default = gymnax.make("CartPole-v1")
    environment = rl.from_gymnax(
        cart, lambda key: default.replace(length=jax.random.uniform(key, minval=0.3, maxval=0.7))
    )
    policy = rl.categorical_policy(models.mlp(features=(8, 2)))
    params = policy.init(jax.random.key(0), jnp.zeros((1, 4)))
    task = environment.sample_task(jax.random.key(1))
    found = rl.rollout(
        environment, lambda seen: policy.apply(params, seen), task, jax.random.key(2), num_trajectories=6, horizon=200
    )
    assert np.all((found.mask.sum(0) > 5) & (found.mask.sum(0) < 200))  # a random policy drops the pole
    np.testing.assert_array_equal(found.reward, found.mask)


def test_every_episode_of_a_trial_has_a_reset_of_its_own():
    policy = rl.gru_policy(num_actions=2, hidden_size=4)
    task = ENVIRONMENT.sample_task(jax.random.key(0))
    params = policy.init(jax.random.key(1), jnp.zeros((1, 2 + 2 + 2)))
    trial = jax.jit(
        jax.vmap(lambda key: rl.run_trial(ENVIRONMENT, policy, params, task, key, num_episodes=3, horizon=2))
    )(jax.random.split(jax.random.key(2), 500))
    starts = np.asarray(trial.inputs)[:, ::2, 0]  # the position where each of the three episodes begins
    assert len(np.unique(starts)) > starts.size - 10  # 24 bits repeat rarely
    np.testing.assert_allclose(np.corrcoef(starts.T), np.eye(3), atol=5 / np.sqrt(500))
