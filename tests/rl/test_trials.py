"""RL²: trials of several episodes, the state that crosses them, and the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from key_use import keys_by_use

from maml_jax import Batch, Episode, init_meta_state, make_train_loop, models, parallel, rl
from maml_jax.rl import Categorical, RecurrentPolicy
from maml_jax.types import Environment

A, H, E = 3, 4, 3


def step(task, state, action, key):
    state = state + 1
    return state, state[None].astype(jnp.float32), (action == task).astype(jnp.float32), state >= task + 2


# One of the actions pays, and the episode ends after 2, 3 or 4 time steps, as the task says.
ENVIRONMENT = Environment(
    sample_task=lambda key: jax.random.randint(key, (), 0, A),
    reset=lambda task, key: (jnp.int32(0), jnp.zeros(1)),
    step=step,
)
POLICY = rl.gru_policy(num_actions=A, hidden_size=8)
PARAMS = POLICY.init(jax.random.key(0), jnp.zeros((1, 1 + A + 2)))
# Counts the time steps of a trial in its state, and says so in its value.
COUNTER = RecurrentPolicy(
    init=lambda key, inputs: {"w": jnp.zeros(A)},
    start=lambda: jnp.zeros(()),
    step=lambda params, carry, inputs: (carry + 1.0, (Categorical(params["w"]), carry)),
    num_actions=A,
)


def trial(task=0, policy=POLICY, params=PARAMS, seed=0, **settings):
    settings = {"num_episodes": E, "horizon": H} | settings
    return rl.run_trial(ENVIRONMENT, policy, params, jnp.int32(task), jax.random.key(seed), **settings)


@pytest.mark.parametrize("task", range(A))
def test_episodes_follow_one_another_until_the_trial_ends(task):
    found = trial(task)
    length = min(task + 2, H)
    assert found.reward.shape == (E * H,)
    expected = np.minimum(np.arange(E * H) // length, E)
    np.testing.assert_array_equal(np.asarray(found.episode)[: E * length], expected[: E * length])
    np.testing.assert_array_equal(found.mask, np.arange(E * H) < E * length)
    np.testing.assert_array_equal(found.reward, (found.action == task) * found.mask)
    np.testing.assert_array_equal(found.done, ((np.arange(E * H) % length) == length - 1) * found.mask)


def test_a_task_may_be_an_array_of_numpy():
    # It is indexed by what is traced, which an array of NumPy cannot be.
    def step(task, state, action, key):
        return state + 1, jnp.zeros(1), task[action], state >= 1

    def policy(seen):
        return Categorical(jnp.zeros((len(seen), A)))

    pays, task = ENVIRONMENT._replace(step=step), np.arange(A, dtype=np.float32)
    found = rl.run_trial(pays, POLICY, PARAMS, task, jax.random.key(0), num_episodes=E, horizon=H)
    np.testing.assert_array_equal(found.reward, found.action * found.mask)
    found = rl.rollout(pays, policy, task, jax.random.key(0), num_trajectories=2, horizon=H)
    np.testing.assert_array_equal(found.reward, found.action * found.mask)


def test_the_horizon_ends_an_episode_that_is_not_done():
    found = trial(2, horizon=2)
    np.testing.assert_array_equal(found.episode, [0, 0, 1, 1, 2, 2])
    assert not np.any(found.done)
    np.testing.assert_array_equal(found.inputs[:, 0], [0, 1, 0, 1, 0, 1])  # the count of the environment starts again
    np.testing.assert_array_equal(found.inputs[:, -1], [0, 0, 1, 0, 1, 0])  # and the policy sees that


def test_the_policy_sees_what_it_did_and_what_that_earned():
    found = trial(1)
    np.testing.assert_array_equal(found.inputs[0], np.zeros(1 + A + 2))  # nothing has happened yet
    before = jax.nn.one_hot(found.action[:-1], A)
    np.testing.assert_array_equal(found.inputs[1:, 1 : 1 + A], before)
    np.testing.assert_array_equal(found.inputs[1:, 1 + A], found.reward[:-1])
    ends = np.diff(np.asarray(found.episode)) > 0
    np.testing.assert_array_equal(found.inputs[1:, 2 + A][: 3 * E - 1], ends[: 3 * E - 1])


def test_the_state_crosses_episodes_and_not_trials():
    found = trial(0, COUNTER, COUNTER.init(None, None))
    np.testing.assert_array_equal(found.value, np.arange(E * H))  # it counts on through all episodes
    sample = rl.make_trial_sampler(ENVIRONMENT, COUNTER, num_episodes=E, horizon=H)
    episodes = jax.vmap(sample, (0, None))(jax.random.split(jax.random.key(1), 5), COUNTER.init(None, None))
    advantage = episodes.support.targets.transition.advantage
    values = episodes.support.targets.value - advantage
    np.testing.assert_allclose(values, np.broadcast_to(np.arange(E * H), (5, E * H)), atol=1e-4)  # each from 0


@pytest.mark.parametrize("greedy", [False, True])
def test_a_policy_that_has_diverged_earns_no_number(greedy):
    found = trial(params=jax.tree.map(lambda x: x * jnp.nan, PARAMS), greedy=greedy)
    assert np.all(np.isnan(found.reward) == (np.asarray(found.mask) > 0))


def test_greedy_takes_the_most_probable_action():
    params = {"w": jnp.array([0.0, 0.1, 0.0])}
    assert np.all(trial(0, COUNTER, params, greedy=True).action == 1)
    assert not np.all(trial(0, COUNTER, params).action == 1)


@pytest.mark.parametrize("name", ["num_episodes", "horizon"])
def test_counts_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        trial(**{name: 0})
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        rl.make_trial_sampler(ENVIRONMENT, POLICY, **({"num_episodes": 1, "horizon": 1} | {name: 0}))


@pytest.mark.parametrize("name", ["discount", "decay"])
def test_factors_out_of_range_are_refused(name):
    for value, message in ((-0.1, r"=-0\.1 must be a number of at least 0"), (1.5, r"=1\.5 must be at most 1")):
        with pytest.raises(ValueError, match=name + message):
            rl.make_trial_sampler(ENVIRONMENT, POLICY, num_episodes=E, horizon=H, **{name: value})
    rl.make_trial_sampler(ENVIRONMENT, POLICY, num_episodes=E, horizon=H, **{name: 1.0})


def test_scales_and_weights_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"reward_scale=0\.0 must be a positive number"):
        rl.make_trial_sampler(ENVIRONMENT, POLICY, num_episodes=E, horizon=H, reward_scale=0.0)
    for name in ("value_weight", "entropy_weight"):
        with pytest.raises(ValueError, match=rf"{name}=-1\.0 must be a number of at least 0"):
            rl.rl2(POLICY, **{name: -1.0})
    with pytest.raises(ValueError, match=r"clip=0\.0 must be a positive number"):
        rl.rl2(POLICY, clip=0.0)


LEARNER = rl.rl2(POLICY, entropy_weight=0.1)
SAMPLER = rl.make_trial_sampler(ENVIRONMENT, POLICY, num_episodes=E, horizon=H, discount=0.9, decay=0.8)


EPISODE = SAMPLER(jax.random.key(3), PARAMS)


def test_the_objective_is_the_loss_of_a_trial_written_out():
    other = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), PARAMS)
    loss, info = LEARNER.objective(other, EPISODE)
    targets, carry, terms = EPISODE.support.targets, POLICY.start(), []
    transition = targets.transition
    for t in range(E * H):
        carry, (distribution, value) = POLICY.step(other, carry, EPISODE.support.inputs[t])
        if not transition.mask[t]:
            continue
        log_p = jax.nn.log_softmax(distribution.logits)
        old = jax.nn.log_softmax(transition.policy.logits[t])
        ratio = jnp.exp(log_p - old)[transition.action[t]]
        gain = jnp.minimum(ratio * transition.advantage[t], jnp.clip(ratio, 0.8, 1.2) * transition.advantage[t])
        entropy = -jnp.sum(jnp.exp(log_p) * log_p)
        error = (value - targets.value[t]) ** 2
        terms.append([-gain + 0.25 * error - 0.1 * entropy, jnp.sum(jnp.exp(old) * (old - log_p)), entropy, error])
    means = np.mean(terms, 0)
    assert len(terms) < E * H  # the trial ends early, and the sum is divided by the most time steps all the same
    np.testing.assert_allclose(loss, np.sum(terms, 0)[0] / (E * H), rtol=1e-4)
    np.testing.assert_allclose([info.kl, info.entropy, info.value_error], means[1:], rtol=1e-3)
    np.testing.assert_allclose(info.reward, transition.reward.sum())


def test_short_trials_weigh_no_more_than_long_ones(x64):
    """Three actions that end a trial after 4, 1 and 4 steps: the expected objective has the gradient of the return."""
    returns, lengths, logits = np.array([2.5, 2.0, 0.0]), np.array([4, 1, 4]), jnp.array([0.3, -0.2, 0.1])
    learner = rl.rl2(COUNTER, value_weight=0.0, entropy_weight=0.0)
    probability = jax.nn.softmax(logits)
    baseline = jnp.sum(probability * returns)
    total = jnp.zeros(A)
    for action in range(A):
        first = jnp.arange(4) == 0  # the steps after it are all the same
        mask = jnp.asarray(np.arange(4) < lengths[action], jnp.float64)
        transition = rl.Transition(
            jnp.full(4, action), mask, jnp.where(first, returns[action] - baseline, 0.0), mask,
            Categorical(jnp.broadcast_to(logits, (4, A))),
        )  # fmt: skip
        support = Batch(jnp.zeros((4, 1)), rl.TrialTargets(transition, jnp.zeros(4)))
        episode = Episode(support, Batch((), ()))
        slope = jax.grad(lambda w, episode=episode: learner.objective({"w": w}, episode)[0])(logits)
        total += probability[action] * slope
    exact = jax.grad(lambda w: jnp.sum(jax.nn.softmax(w) * returns))(logits)
    np.testing.assert_allclose(-4 * total, exact, rtol=1e-12)


def test_it_reads_a_trial_and_goes_on_from_there():
    inputs = EPISODE.support.inputs
    task_params, info = LEARNER.adapt(
        PARAMS, jax.tree.map(lambda x: x[:5], EPISODE.support), observe_fn=lambda task_params: task_params["carry"][0]
    )
    assert info.observed.shape == (1,)
    distribution, value = LEARNER.predict(task_params, inputs[5:])
    targets = EPISODE.support.targets
    np.testing.assert_allclose(distribution.logits, targets.transition.policy.logits[5:], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, (targets.value - targets.transition.advantage)[5:], rtol=1e-3, atol=1e-5)


def test_reading_stops_where_the_trial_ends():
    sampler = rl.make_trial_sampler(ENVIRONMENT, COUNTER, num_episodes=E, horizon=H)
    learner = rl.rl2(COUNTER)
    lengths = set()
    for seed in range(8):
        support = sampler(jax.random.key(seed), {"w": jnp.zeros(A)}).support
        length = jnp.sum(support.targets.transition.mask)
        assert learner.adapt({"w": jnp.zeros(A)}, support)[0]["carry"] == length
        lengths.add(int(length))
    assert len(lengths) > 1


def test_gradients_have_the_differences_of_the_objective(x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    episode = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        EPISODE,
    )
    moved = jax.tree.map(lambda x: x + 0.01, params)  # beside the kink of the clipped ratio at 1
    jax.test_util.check_grads(lambda p: LEARNER.objective(p, episode)[0], (moved,), order=1, modes=["rev"], rtol=1e-6)


def test_advantages_are_standardised_over_all_trials():
    episodes = jax.vmap(SAMPLER, (0, None))(jax.random.split(jax.random.key(1), 6), PARAMS)
    before, after = (e.support.targets.transition for e in (episodes, rl.standardise_advantages(episodes)))
    is_valid = np.asarray(before.mask) > 0
    valid = np.asarray(before.advantage)[is_valid]
    # One mean and one deviation for all: each trial alone has others.
    np.testing.assert_allclose(after.advantage[is_valid], (valid - valid.mean()) / valid.std(), atol=1e-5)
    assert np.abs(np.asarray(after.advantage[0])[is_valid[0]].mean()) > 1e-2


RULE = rl.clipped_epochs(optax.adam(1e-2), num_epochs=4, num_minibatches=2, prepare=rl.standardise_advantages)


def train(num_steps, mesh=None):
    state = init_meta_state(LEARNER, RULE, jax.random.key(0), jnp.zeros((1, 1 + A + 2)))
    loop = make_train_loop(LEARNER, RULE, SAMPLER, meta_batch_size=64, num_steps=num_steps, chunk_size=16, mesh=mesh)
    return loop(state, jax.random.key(2))


def test_it_learns_to_find_the_action_that_pays_and_to_keep_to_it():
    # Nothing but the reward tells the tasks apart, so what it earns late in a trial it has learned in the trial.
    state, info = train(150)
    assert np.all(info.finite)
    tasks = jnp.arange(300) % A
    trials = jax.vmap(lambda task, key: trial_of(state.params, task, key))(
        tasks, jax.random.split(jax.random.key(9), 300)
    )
    by_episode = [
        np.sum(trials.reward * (trials.episode == e)) / np.sum(trials.mask * (trials.episode == e)) for e in range(E)
    ]
    assert by_episode[0] < 0.75
    assert by_episode[2] > 0.95


def trial_of(params, task, key):
    return rl.run_trial(ENVIRONMENT, POLICY, params, task, key, num_episodes=E, horizon=H, greedy=True)


def test_one_device_and_two_take_the_same_path():
    (one, first), (two, second) = (train(2, mesh) for mesh in (None, parallel.task_mesh(jax.devices()[:2])))
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-3, atol=1e-5)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_an_end_that_is_no_bool_is_refused():
    def with_float_end(*arguments):
        *rest, done = step(*arguments)
        return *rest, done.astype(jnp.float32)

    environment = ENVIRONMENT._replace(step=with_float_end)
    with pytest.raises(ValueError, match="must return a bool for the end of a trajectory, got float32"):
        rl.run_trial(environment, POLICY, PARAMS, jnp.int32(0), jax.random.key(0), num_episodes=1, horizon=2)


@pytest.mark.parametrize("build", [rl.gru_policy, functools.partial(rl.associative_policy, observation_size=1)])
def test_a_policy_may_start_with_a_long_memory(build):
    policies = [build(num_actions=A, hidden_size=8, memory=memory) for memory in (None, 40)]
    biases = [policy.init(jax.random.key(0), jnp.zeros((1, 1 + A + 2)))["gru"]["iz"]["bias"] for policy in policies]
    assert not np.any(biases[0])
    assert np.all(biases[1] > 0)


def test_an_associative_policy_is_that_of_two_products_by_hand():
    size, policy = 4, rl.associative_policy(num_actions=A, observation_size=4, hidden_size=8, memory=5)
    rng = np.random.default_rng(0)
    params = policy.init(jax.random.key(0), jnp.zeros((1, size + A + 2)))
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape), params)
    plain = models.gru(hidden_size=8, heads={"logits": A, "value": 1, "logits_of": size * A, "value_of": size})
    carry, hidden, before = policy.start(), plain.start(), np.zeros(size)
    for _ in range(3):
        inputs = rng.normal(size=size + A + 2)
        observation, action, reward = inputs[:size], inputs[size : size + A], inputs[size + A]
        pairs = [before[i] * action[j] for i in range(size) for j in range(A)]
        hidden, outputs = plain.step(params, hidden, jnp.array([*inputs, *pairs, *(reward * x for x in pairs)]))
        carry, (distribution, value) = policy.step(params, carry, jnp.asarray(inputs))
        weights = np.asarray(outputs["logits_of"]).reshape(size, A)
        logits = [outputs["logits"][j] + sum(observation[i] * weights[i, j] for i in range(size)) for j in range(A)]
        np.testing.assert_allclose(distribution.logits, logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(value, outputs["value"][0] + observation @ outputs["value_of"], rtol=1e-4, atol=1e-5)
        before = observation
    np.testing.assert_array_equal(carry["observation"], jnp.asarray(before))


def test_a_policy_needs_actions_and_observations():
    with pytest.raises(ValueError, match="num_actions must be an integer of at least 1, got 0"):
        rl.gru_policy(num_actions=0)
    with pytest.raises(ValueError, match="observation_size must be an integer of at least 1, got 0"):
        rl.associative_policy(num_actions=2, observation_size=0)
    with pytest.raises(ValueError, match="the inputs have 5 numbers; observation_size=4 and num_actions=2 need 8"):
        rl.associative_policy(num_actions=2, observation_size=4).init(jax.random.key(0), jnp.zeros(5))


def test_what_the_environment_draws_does_not_depend_on_the_drawn_action():
    # Every action pays with probability 1/2.
    def coin(task, state, action, key):
        return state, state[None].astype(jnp.float32), jax.random.bernoulli(key).astype(jnp.float32), jnp.bool_(False)

    @jax.jit
    @jax.vmap
    def run(key):
        environment, params = ENVIRONMENT._replace(step=coin), COUNTER.init(None, None)
        return rl.run_trial(environment, COUNTER, params, jnp.int32(0), key, num_episodes=1, horizon=H)

    found = run(jax.random.split(jax.random.key(0), 1500))
    for action in range(A):
        rewards = np.asarray(found.reward)[np.asarray(found.action) == action]
        np.testing.assert_allclose(rewards.mean(), 0.5, atol=2.5 / np.sqrt(len(rewards)))  # 5 standard deviations


def test_advantages_are_those_of_the_scaled_rewards():
    sizes = {"num_episodes": E, "horizon": H}
    sampler = rl.make_trial_sampler(ENVIRONMENT, POLICY, **sizes, discount=0.9, decay=0.6, reward_scale=0.5)
    task_key, trial_key = jax.random.split(jax.random.key(3))
    found = rl.run_trial(ENVIRONMENT, POLICY, PARAMS, ENVIRONMENT.sample_task(task_key), trial_key, **sizes)
    targets = sampler(jax.random.key(3), PARAMS).support.targets
    expected = rl.generalised_advantages(0.5 * found.reward, found.value, found.mask, discount=0.9, decay=0.6)
    np.testing.assert_allclose(targets.transition.advantage, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(targets.value, expected + found.value, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(targets.transition.reward, found.reward)


def test_every_draw_of_a_trial_has_a_key_of_its_own():
    def noisy(task, state, action, key):
        return state, state[None], jax.random.uniform(key), jnp.bool_(False)

    def reset(task, key):
        return (state := jax.random.uniform(key)), state[None]

    environment = ENVIRONMENT._replace(step=noisy, reset=reset)
    sample = rl.make_trial_sampler(environment, COUNTER, num_episodes=E, horizon=H)
    drawn, divided = keys_by_use(lambda: sample(jax.random.key(0), COUNTER.init(None, None)))
    assert len(drawn) == 1 + 1 + 3 * E * H  # the task, the first reset, and actions, steps and resets
    assert len(set(drawn)) == len(drawn)
    assert not divided & set(drawn)


@pytest.mark.parametrize(
    "use",
    [
        rl.rl2,
        lambda policy: rl.make_trial_sampler(ENVIRONMENT, policy, num_episodes=E, horizon=H),
        lambda policy: trial(policy=policy),
    ],
)
def test_a_policy_without_a_state_is_refused(use):
    with pytest.raises(ValueError, match=r"policy must be an rl\.RecurrentPolicy, got Model; rl\.gru_policy"):
        use(rl.categorical_policy(models.mlp(features=(A,))))
