"""Trajectories and collection, on an environment whose every number is known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from key_use import keys_by_use

from maml_jax import Model, maml, meta_sgd, models, rl
from maml_jax.rl import Categorical, Normal
from maml_jax.types import Environment

N, H = 4, 6


def counter(limit=100):
    """A count that the actions 0 and 1 raise by 1 and 2, to a limit; the action 1 pays the task."""

    def step(task, state, action, key):
        state = state + 1 + action
        return state, state[None].astype(jnp.float32), task * action.astype(jnp.float32), state >= limit

    return Environment(
        sample_task=lambda key: jax.random.uniform(key, (), minval=1.0, maxval=2.0),
        reset=lambda task, key: (jnp.int32(0), jnp.zeros(1)),
        step=step,
    )


MODEL = Model(
    lambda key, inputs: {"bias": jnp.zeros(2)}, lambda params, x: x @ jnp.zeros((1, 2)) + params["bias"][None]
)
POLICY = rl.categorical_policy(MODEL)


def roll(environment=None, policy=lambda seen: Categorical(jnp.zeros((len(seen), 2))), **settings):
    settings = {"num_trajectories": N, "horizon": H} | settings
    return rl.rollout(environment or counter(), policy, jnp.float32(3.0), jax.random.key(0), **settings)


def test_a_trajectory_is_what_the_environment_does():
    found = roll()
    assert found.action.shape == found.reward.shape == found.mask.shape == (H, N)
    np.testing.assert_array_equal(found.reward, 3.0 * found.action)
    counts = np.concatenate([np.zeros((1, N)), np.cumsum(1 + found.action, 0)[:-1]])
    np.testing.assert_array_equal(found.observation[..., 0], counts)
    assert np.all(found.mask == 1.0)
    assert 0 < np.mean(found.action) < 1
    assert len({tuple(column) for column in np.asarray(found.action).T}) > 1  # the trajectories differ


def test_a_policy_that_has_diverged_earns_no_number():
    # It acts all the same: the largest of several NaN is the first.
    found = roll(counter(limit=5), lambda seen: Categorical(jnp.full((len(seen), 2), jnp.nan)))
    assert np.all(found.action == 0)
    assert np.all(np.isnan(found.reward) == (np.asarray(found.mask) > 0))
    # Of an action that can never be taken the logit is minus infinity.
    assert np.all(
        np.isfinite(roll(policy=lambda seen: Categorical(jnp.tile(jnp.array([0.0, -jnp.inf]), (N, 1)))).reward)
    )


def test_after_the_end_nothing_counts():
    found = roll(counter(limit=5))
    counts = np.cumsum(1 + np.asarray(found.action), 0)
    expected = np.concatenate([np.ones((1, N)), counts[:-1] < 5])
    np.testing.assert_array_equal(found.mask, np.cumprod(expected, 0))
    assert np.all(np.asarray(found.reward)[np.asarray(found.mask) == 0] == 0.0)
    assert np.any(found.mask == 0)


def test_rewards_after_the_end_may_be_anything():
    def step(task, state, action, key):
        return state + 1, state[None].astype(jnp.float32), jnp.where(state >= 2, jnp.nan, 1.0), state >= 1

    found = roll(counter()._replace(step=step))
    np.testing.assert_array_equal(found.reward.sum(0), np.full(N, 2.0))


def test_a_trajectory_stands_still_after_its_end():
    # The state squares itself until it overflows, but every trajectory ends after one or two steps.
    def step(task, state, action, key):
        state = state**2 * (2.0 + action)
        return state, state[None], jnp.float32(1.0), state > 8.0

    environment = Environment(lambda key: jnp.zeros(()), lambda task, key: (jnp.float32(2.0), jnp.full(1, 2.0)), step)
    found = roll(environment, horizon=30)
    assert jnp.all(found.mask.sum(0) < 3)
    assert jnp.all(jnp.isfinite(found.observation))
    batch = rl.Trajectories(*found)
    advantage = rl.linear_advantages()(batch)
    targets = rl.Transition(found.action, found.reward, advantage, found.mask, found.policy)
    for loss in (rl.policy_gradient, rl.ratio_surrogate, rl.loaded_dice):
        grads = jax.grad(lambda w, loss=loss: loss(Categorical(found.observation @ w), targets))(jnp.ones((1, 2)))
        assert jnp.all(jnp.isfinite(grads))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "horizon must be an integer of at least 1, got 0"),
        ({"num_trajectories": -1}, "num_trajectories must be an integer of at least 1, got -1"),
        ({"policy": lambda seen: jnp.zeros((N, 2))}, r"the policy returned \w+; it must return rl\.Categorical"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        roll(**change)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda s: (s.astype(jnp.float32), jnp.zeros(1), 1.0, False), r"changes state from int32\[\] to float32\[\]"),
        (lambda s: (s, jnp.zeros(2), 1.0, False), r"changes observation from float32\[1\] to float32\[2\]"),
        (lambda s: ((s, s), jnp.zeros(1), 1.0, False), "returned a state .* and reset .*; both must return the same"),
        (lambda s: (s, jnp.zeros(1), jnp.zeros(1), False), r"must return a scalar reward, got shape \[1\]"),
        (lambda s: (s, jnp.zeros(1), 1.0, jnp.zeros(2, bool)), r"must return a scalar done, got shape \[2\]"),
        (lambda s: (s, jnp.zeros(1), jnp.int32(1), False), "must return a floating reward, got int32"),
        (
            lambda s: (s, jnp.zeros(1), 1.0, jnp.float32(0)),
            "must return a bool for the end of a trajectory, got float32",
        ),
    ],
)
def test_an_environment_that_breaks_its_contract_is_named(returned, message):
    with pytest.raises(ValueError, match=message):
        roll(counter()._replace(step=lambda task, state, action, key: jax.tree.map(jnp.asarray, returned(state))))


def learner_of(num_steps):
    return maml(
        POLICY, rl.policy_gradient, inner_optimizer=optax.sgd(0.5), num_inner_steps=num_steps, data_per_step=True
    )


SETTINGS = {"num_trajectories": N, "horizon": H}
PARAMS = {"bias": jnp.array([0.3, -0.2])}


@pytest.mark.parametrize("num_updates", [0, 1, 3])
def test_every_policy_of_the_adaptation_acts_once(num_updates):
    sample = jax.jit(rl.make_sampler(learner_of, counter(), num_updates=num_updates, **SETTINGS))
    episode = sample(jax.random.key(0), PARAMS)
    assert episode.support.inputs.shape == (num_updates, H, N, 1)
    assert episode.query.inputs.shape == (H, N, 1)
    acted = [jax.tree.map(lambda x, k=k: x[k], episode.support) for k in range(num_updates)] + [episode.query]
    adapted = [PARAMS]
    for num_steps in range(1, num_updates + 1):
        first = jax.tree.map(lambda x, n=num_steps: x[:n], episode.support)
        adapted.append(learner_of(num_steps).adapt(PARAMS, first)[0])
    for batch, params in zip(acted, adapted, strict=True):
        np.testing.assert_allclose(batch.targets.policy.logits, POLICY.apply(params, batch.inputs).logits, rtol=1e-5)
    # Each draws its own actions, and all act in the same task.
    actions = [np.asarray(batch.targets.action) for batch in acted]
    assert all(np.any(a != b) for a, b in itertools.pairwise(actions))
    rewards = [batch.targets.reward[batch.targets.action == 1] for batch in acted]
    np.testing.assert_allclose(np.concatenate(rewards), rewards[0][0], rtol=1e-6)
    returns = rl.returns_of(episode.support, episode.query)
    assert returns.shape == (num_updates + 1,)
    np.testing.assert_allclose(returns[-1], episode.query.targets.reward.sum(0).mean(), rtol=1e-6)


def test_the_state_of_an_inner_rule_lasts_from_one_update_to_the_next():
    def with_momentum(num_steps):
        rule = optax.sgd(optax.linear_schedule(0.5, 0.1, 2), momentum=0.9)
        return maml(POLICY, rl.policy_gradient, inner_optimizer=rule, num_inner_steps=num_steps, data_per_step=True)

    episode = jax.jit(rl.make_sampler(with_momentum, counter(), num_updates=3, **SETTINGS))(jax.random.key(0), PARAMS)
    adapted, _ = with_momentum(3).adapt(PARAMS, episode.support)
    acted = episode.query.targets.policy.logits
    np.testing.assert_allclose(acted, POLICY.apply(adapted, episode.query.inputs).logits, rtol=1e-5)
    # A rule that begins anew in every step ends elsewhere.
    anew = PARAMS
    for k in range(3):
        one = jax.tree.map(lambda x, k=k: x[k : k + 1], episode.support)
        anew, _ = with_momentum(1).adapt(anew, one)
    assert np.max(np.abs(acted - POLICY.apply(anew, episode.query.inputs).logits)) > 1e-3


def test_a_start_of_its_own_acts_first():
    def learner_of(num_steps):
        return meta_sgd(POLICY, rl.policy_gradient, inner_lr=0.5, num_inner_steps=num_steps, data_per_step=True)

    meta_params = {"params": PARAMS, "rates": {"bias": jnp.array([0.1, 5.0])}}
    sample = rl.make_sampler(learner_of, counter(), num_updates=1, start=lambda meta: meta["params"], **SETTINGS)
    episode = sample(jax.random.key(0), meta_params)
    first = episode.support.targets.policy.logits[0]
    np.testing.assert_allclose(first, np.broadcast_to(PARAMS["bias"], first.shape), rtol=1e-6)
    moved = episode.query.targets.policy.logits[0, 0] - PARAMS["bias"]
    assert abs(moved[1]) > 5 * abs(moved[0])


def test_data_are_constants_of_the_gradient():
    sample = rl.make_sampler(learner_of, counter(), num_updates=1, **SETTINGS)

    def through_sampling(params):
        episode = sample(jax.random.key(0), params)
        return jnp.sum(episode.query.targets.policy.logits) + jnp.sum(episode.query.targets.advantage)

    assert not np.any(jax.grad(through_sampling)(PARAMS)["bias"])


@pytest.mark.parametrize("loss_fn", [rl.policy_gradient, rl.ratio_surrogate, rl.clipped_surrogate(0.2), rl.loaded_dice])
def test_trajectories_of_all_updates_at_once_are_refused(loss_fn):
    def undivided(num_steps):
        return maml(POLICY, loss_fn, inner_optimizer=optax.sgd(0.1), num_inner_steps=num_steps)

    sample = rl.make_sampler(undivided, counter(), num_updates=1, **SETTINGS)
    with pytest.raises(ValueError, match=r"\(1, 6, 4\), more than time steps by trajectories.*data_per_step=True"):
        sample(jax.random.key(0), PARAMS)


def test_the_sampler_has_the_advantages_asked_for():
    settings = {"num_updates": 1, "num_trajectories": N, "horizon": H}
    sample = rl.make_sampler(learner_of, counter(), advantage_fn=lambda t: 7.0 * t.reward, **settings)
    for batch in sample(jax.random.key(0), PARAMS)[:2]:
        assert np.any(batch.targets.reward)
        np.testing.assert_allclose(batch.targets.advantage, 7.0 * batch.targets.reward)
    usual = rl.make_sampler(learner_of, counter(), **settings)(jax.random.key(0), PARAMS).support.targets
    linear = rl.make_sampler(learner_of, counter(), advantage_fn=rl.linear_advantages(), **settings)
    np.testing.assert_array_equal(usual.advantage, linear(jax.random.key(0), PARAMS).support.targets.advantage)


def test_a_negative_number_of_updates_is_refused():
    with pytest.raises(ValueError, match="num_updates must be an integer of at least 0, got -1"):
        rl.make_sampler(learner_of, counter(), num_updates=-1, num_trajectories=N, horizon=H)


def test_adaptation_raises_the_return():
    sample = rl.make_sampler(learner_of, counter(), num_updates=3, num_trajectories=200, horizon=H)
    episodes = jax.jit(jax.vmap(sample, (0, None)))(jax.random.split(jax.random.key(0), 20), PARAMS)
    returns = jax.vmap(rl.returns_of)(episodes.support, episodes.query).mean(0)
    assert np.all(np.diff(returns) > 0.1)


def test_policies_take_any_batch_axes():
    policy = rl.normal_policy(
        Model(lambda key, x: jnp.ones((3, 2)), lambda w, x: x @ w), action_size=2, std=0.5, smallest_std=0.1
    )
    params = policy.init(jax.random.key(0), jnp.zeros((H, N, 3)))
    np.testing.assert_allclose(params["log_std"], np.log(0.5), rtol=1e-6)
    for axes in ((), (N,), (H, N)):
        found = policy.apply(params, jnp.ones((*axes, 3)))
        assert isinstance(found, Normal)
        assert found.mean.shape == found.log_std.shape == (*axes, 2)
    narrow = policy.apply(params | {"log_std": jnp.full(2, -9.0)}, jnp.ones(3))
    np.testing.assert_allclose(narrow.log_std, np.log(0.1), rtol=1e-6)
    with pytest.raises(ValueError, match="the network has 2 outputs; action_size=3 needs as many"):
        rl.normal_policy(Model(policy.init, lambda w, x: x @ w), action_size=3).apply(
            {"network": jnp.ones((3, 2)), "log_std": jnp.zeros(3)}, jnp.ones((N, 3))
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action_size": 0}, "action_size must be an integer of at least 1, got 0"),
        ({"std": 0.0}, r"std=0\.0 must be a positive number"),
        ({"smallest_std": -1.0}, r"smallest_std=-1\.0 must be a positive number"),
        ({"std": 1e-8}, r"std=1e-08 is below smallest_std=1e-06 and is not learned; choose a larger"),
        ({"observation_ndim": -1}, "observation_ndim must be an integer of at least 0, got -1"),
    ],
)
def test_numbers_of_a_policy_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rl.normal_policy(models.mlp(features=(2,)), **({"action_size": 2} | settings))


@pytest.mark.parametrize(
    "build",
    [
        rl.categorical_policy,
        functools.partial(rl.normal_policy, action_size=2),
        functools.partial(rl.scaled_start, where=lambda name: True, factor=0.1),
    ],
)
def test_a_policy_needs_a_model(build):
    with pytest.raises(ValueError, match=r"model must be a maml_jax\.Model, got function"):
        build(lambda params, inputs: inputs)


@pytest.mark.parametrize("ndim", [0, 2])
def test_an_observation_may_have_any_number_of_axes(ndim):
    observation = (2, 3)[:ndim]
    weight = jnp.linspace(-1.0, 2.0, 3 * int(np.prod(observation))).reshape(-1, 3)
    model = Model(lambda key, x: None, lambda w, x: x.reshape(len(x), -1) @ w)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(H, N, *observation)), jnp.float32)
    expected = inputs.reshape(H, N, -1) @ weight
    policy = rl.categorical_policy(model, observation_ndim=ndim)
    np.testing.assert_allclose(policy.apply(weight, inputs).logits, Categorical(expected).logits, rtol=1e-5, atol=1e-5)
    policy = rl.normal_policy(model, action_size=3, observation_ndim=ndim)
    found = policy.apply({"network": weight, "log_std": jnp.zeros(3)}, inputs)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-5)


def test_a_scaled_start_changes_what_is_named():
    model = Model(lambda key, x: {"body": jnp.ones(2), "head": jnp.ones(2)}, lambda params, x: x)
    params = rl.scaled_start(model, lambda name: name == "head", 0.1).init(jax.random.key(0), jnp.zeros(1))
    np.testing.assert_allclose(params["body"], 1.0)
    np.testing.assert_allclose(params["head"], 0.1)
    with pytest.raises(ValueError, match="selects none of the parameters"):
        rl.scaled_start(model, lambda name: name == "haed", 0.1).init(jax.random.key(0), jnp.zeros(1))
    with pytest.raises(ValueError, match="factor=nan must be a number of at least 0"):
        rl.scaled_start(model, lambda name: name == "head", float("nan"))


def test_every_draw_of_an_episode_has_a_key_of_its_own():
    def step(task, state, action, key):
        return state, jnp.zeros(1), jax.random.uniform(key), jnp.bool_(False)

    noisy = counter()._replace(step=step, reset=lambda task, key: (jax.random.uniform(key), jnp.zeros(1)))
    sample, episodes = rl.make_sampler(learner_of, noisy, num_updates=1, **SETTINGS), []
    drawn, divided = keys_by_use(lambda: episodes.append(sample(jax.random.key(0), PARAMS)))
    assert len(drawn) == 1 + 2 * (N + H + H * N)  # the task, and before the update and after it: resets, actions, steps
    assert len(set(drawn)) == len(drawn)
    assert not divided & set(drawn)
    rewards = np.concatenate([np.ravel(batch.targets.reward) for batch in episodes[0][:2]])
    assert len(np.unique(rewards)) == len(rewards)
