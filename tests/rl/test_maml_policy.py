"""MAML within a trial: each inner step by hand, and the gradient of the expected reward over every trial."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import init_meta_state, make_train_loop, models, parallel, rl
from maml_jax.inner import first_order
from maml_jax.tasks.bandits import bandits

A, H = 2, 3
PROBABILITIES = np.array([0.3, 0.8])


def policy_of(**settings):
    settings = {"inner_lr": 1.3, "baseline": 0.4} | settings
    return rl.maml_policy(models.mlp(features=(A,)), num_actions=A, observation_size=1, **settings)


def params_of(policy, dtype=jnp.float64, size=1):
    """Parameters of which no two are equal, for observations of this size."""
    params = policy.init(jax.random.key(0), jnp.zeros((1, size + A + 2)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), jax.tree.unflatten(structure, noise))


def as_inputs(arms, rewards):
    """What the policy sees in a trial: nothing at first, and then what it pulled and got."""
    seen = [np.zeros(1 + A + 2)]
    seen += [[0.0, *np.eye(A)[arm], reward, 0.0] for arm, reward in zip(arms[:-1], rewards[:-1], strict=True)]
    return jnp.asarray(np.array(seen))


def logits_of(policy, params, inputs):
    return jax.lax.scan(lambda carry, seen: policy.step(params, carry, seen), policy.start(), inputs)[1][0].logits


def test_each_inner_step_is_that_of_a_softmax_table():
    with jax.enable_x64(True):
        policy = policy_of()
        params = params_of(policy)
        arms, rewards = [1, 1, 0], [0.0, 1.0, 1.0]
        found = logits_of(policy, params, as_inputs(arms, rewards))
        # The observation is 0, so that only the bias of the network matters.
        table, rate = (np.asarray(params[name]["dense_0"]["bias"]) for name in ("start", "rates"))
        for step in range(H):
            np.testing.assert_allclose(found[step], float(params["inverse_temperature"]) * table, rtol=1e-6)
            softmax = np.exp(table) / np.exp(table).sum()
            table = table + rate * (rewards[step] - float(params["baseline"])) * (np.eye(A)[arms[step]] - softmax)


def test_a_step_is_taken_at_the_observation_that_was_acted_on():
    # Two observations as one-hot vectors: a row of the kernel is the table of logits of its observation.
    with jax.enable_x64(True):
        policy = rl.maml_policy(
            models.mlp(features=(A,)), num_actions=A, observation_size=2, inner_lr=1.3, baseline=0.4
        )
        params = params_of(policy, size=2)
        states, arms, rewards = [0, 1, 1, 0], [1, 0, 1], [1.0, 0.0, 1.0]
        inputs = [np.concatenate([np.eye(2)[states[0]], np.zeros(A + 2)])]
        for state, arm, reward in zip(states[1:], arms, rewards, strict=True):
            inputs.append(np.concatenate([np.eye(2)[state], np.eye(A)[arm], [reward, 0.0]]))
        _, (distribution, value) = jax.lax.scan(
            lambda carry, seen: policy.step(params, carry, seen), policy.start(), jnp.array(inputs)
        )
        start, rates, critic = (params[name] for name in ("start", "rates", "critic"))
        kernel, bias = np.array(start["dense_0"]["kernel"]), np.array(start["dense_0"]["bias"])
        for step, state in enumerate(states):
            logits = float(params["inverse_temperature"]) * (kernel[state] + bias)
            np.testing.assert_allclose(distribution.logits[step], logits, rtol=1e-6)
            acting = np.exp(logits) / np.exp(logits).sum()
            features = np.concatenate([acting, [np.log1p(step)]])
            hidden = np.maximum(features @ critic["dense_0"]["kernel"] + critic["dense_0"]["bias"], 0.0)
            expected = hidden @ critic["dense_1"]["kernel"] + critic["dense_1"]["bias"]
            np.testing.assert_allclose(value[step], expected[0], rtol=1e-6)
            if step < len(arms):
                softmax = np.exp(kernel[state] + bias) / np.exp(kernel[state] + bias).sum()
                change = (rewards[step] - float(params["baseline"])) * (np.eye(A)[arms[step]] - softmax)
                kernel[state] = kernel[state] + np.asarray(rates["dense_0"]["kernel"])[state] * change
                bias = bias + np.asarray(rates["dense_0"]["bias"]) * change


def every_trial():
    """All trials: arms [M, H], rewards [M, H], what the policy sees, and the probability of the rewards [M]."""
    arms, rewards = (
        np.array(part)
        for part in zip(
            *itertools.product(itertools.product(range(A), repeat=H), itertools.product((0.0, 1.0), repeat=H)),
            strict=True,
        )
    )
    paid = PROBABILITIES[arms]
    of_rewards = np.prod(np.where(rewards > 0, paid, 1.0 - paid), 1)
    inputs = jnp.stack([as_inputs(*trial) for trial in zip(arms, rewards, strict=True)])
    return jnp.array(arms), jnp.array(rewards), inputs, jnp.array(of_rewards)


def enumerated(policy, params):
    """The expected reward of a trial, exactly, by adding up all trials."""
    arms, rewards, inputs, of_rewards = every_trial()
    acted = rl.Categorical(jax.vmap(lambda seen: logits_of(policy, params, seen))(inputs))
    return jnp.sum(jnp.exp(jnp.sum(acted.log_prob(arms), 1)) * of_rewards * jnp.sum(rewards, 1))


def expected_gradient(policy, params):
    """The expectation of the gradient of the clipped surrogate, by adding up all trials."""
    arms, rewards, inputs, of_rewards = every_trial()
    surrogate = rl.clipped_surrogate(0.2)

    def loss(params):
        def of_trial(arms, rewards, inputs, of_rewards):
            logits = logits_of(policy, params, inputs)
            acted = rl.Categorical(jax.lax.stop_gradient(logits))
            to_go = jnp.cumsum(rewards[::-1])[::-1]
            transition = rl.Transition(arms, rewards, to_go, jnp.ones(H), acted)
            weight = of_rewards * jnp.exp(jnp.sum(acted.log_prob(arms)))
            return -H * weight * surrogate(rl.Categorical(logits), transition)

        return jnp.sum(jax.vmap(of_trial)(arms, rewards, inputs, of_rewards))

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("loss_fn", [rl.policy_gradient, rl.ratio_surrogate, rl.loaded_dice])
def test_the_meta_gradient_is_that_of_the_expected_reward_of_a_trial(loss_fn):
    with jax.enable_x64(True):
        policy = policy_of(loss_fn=loss_fn)
        params = params_of(policy)
        exact = jax.jit(jax.grad(lambda params: enumerated(policy_of(), params)))(params)
        found = expected_gradient(policy, params)
        distance = jnp.max(jnp.abs(jax.flatten_util.ravel_pytree(exact)[0] - jax.flatten_util.ravel_pytree(found)[0]))
        if loss_fn is rl.policy_gradient:
            assert distance < 1e-12
        else:  # another second derivative, which is not that of the step as it is taken
            assert distance > 1e-3
        first = expected_gradient(policy_of(inner_grad=first_order), params)
        assert jnp.max(jnp.abs(first["start"]["dense_0"]["bias"] - exact["start"]["dense_0"]["bias"])) > 1e-3


def test_what_is_not_learned_has_no_gradient():
    policy = policy_of(learn_rates=False, learn_temperature=False)
    params = params_of(policy, jnp.float32)
    inputs = as_inputs([0, 1, 1], [1.0, 0.0, 1.0]).astype(jnp.float32)
    grads = jax.grad(lambda params: jnp.sum(jnp.sin(logits_of(policy, params, inputs))))(params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves((grads["rates"], grads["inverse_temperature"])))
    assert jnp.any(grads["start"]["dense_0"]["bias"])
    assert jnp.any(grads["baseline"])


def test_it_is_trained_like_any_recurrent_policy_on_one_device_and_on_two():
    policy = policy_of()
    learner = rl.rl2(policy)
    sampler = rl.make_trial_sampler(bandits(A), policy, num_episodes=1, horizon=6)
    rule = rl.clipped_epochs(optax.adam(1e-2), num_epochs=2, prepare=rl.standardise_advantages)

    def start():
        return init_meta_state(learner, rule, jax.random.key(0), inputs=jnp.zeros((1, 1 + A + 2)))

    found = []
    for mesh in (None, parallel.task_mesh(jax.devices()[:2])):
        loop = make_train_loop(learner, rule, sampler, meta_batch_size=64, num_steps=3, mesh=mesh)
        found.append(loop(start(), jax.random.key(1))[0].params)
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    before, after = (params["start"]["dense_0"]["bias"] for params in (start().params, found[0]))
    assert jnp.all(before != after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_actions": 0}, "num_actions must be an integer of at least 1, got 0"),
        ({"observation_size": 0}, "observation_size must be an integer of at least 1, got 0"),
        ({"critic_size": 0}, "critic_size must be an integer of at least 1, got 0"),
        ({"inner_lr": -1.0}, r"inner_lr=-1\.0 must be a positive number"),
        ({"inner_lr": float("nan")}, "inner_lr=nan must be a positive number"),
        ({"baseline": float("nan")}, "baseline=nan must be a finite number"),
    ],
)
def test_wrong_numbers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rl.maml_policy(models.mlp(features=(A,)), **{"num_actions": A, "observation_size": 1} | settings)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"observation_size": 2}, 1, "the inputs have 5 numbers; observation_size=2 and num_actions=2 need 6"),
        ({}, 2, "the inputs have 6 numbers; observation_size=1 and num_actions=2 need 5"),
        ({"num_actions": 3}, 2, "the network has 2 outputs; num_actions=3 needs as many"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, size, message):
    policy = rl.maml_policy(models.mlp(features=(A,)), **{"num_actions": A, "observation_size": 1} | settings)
    with pytest.raises(ValueError, match=message):
        policy.init(jax.random.key(0), jnp.zeros((1, size + A + 2)))


def test_it_learns_to_stay_with_the_arm_that_pays():
    # One of the two arms always pays, and the other never does: after the first pull nothing has to be missed.
    policy = policy_of(inner_lr=0.5, baseline=0.5)
    learner = rl.rl2(policy, entropy_weight=0.0)
    plain = bandits(A)
    sure = plain._replace(sample_task=lambda key: jax.nn.one_hot(jax.random.randint(key, (), 0, A), A))
    sampler = rl.make_trial_sampler(sure, policy, num_episodes=1, horizon=4)
    rule = rl.clipped_epochs(optax.adam(5e-2), num_epochs=4, prepare=rl.standardise_advantages)
    state = init_meta_state(learner, rule, jax.random.key(0), inputs=jnp.zeros((1, 1 + A + 2)))
    loop = make_train_loop(learner, rule, sampler, meta_batch_size=200, num_steps=40, chunk_size=200)
    _, info = loop(state, jax.random.key(1))
    reward = np.asarray(info.objective.reward)
    assert reward[0] < 3.0
    assert reward[-5:].mean() > 3.35  # 3.5 is the most that can be expected


def test_the_network_of_the_values_has_the_size_asked_for():
    params = policy_of(critic_size=7).init(jax.random.key(0), jnp.zeros((1, 1 + A + 2)))
    assert params["critic"]["dense_0"]["kernel"].shape == (A + 1, 7)
