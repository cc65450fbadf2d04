"""Strategies are compared with numbers that need no simulation: the exact optimum, closed forms, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from experiments import bandit_strategies, mdp_strategies
from experiments.bandit_strategies import Beliefs, bayes_optimum, draw_gamma, draw_probabilities, gittins_indices
from experiments.mdp_strategies import Record, optimal_rewards, optimistic_transitions, posterior_mean, posterior_sample
from maml_jax.tasks.tabular_mdp import random_mdps, value_iteration

BANDITS = bandit_strategies.STRATEGIES
MDPS = mdp_strategies.STRATEGIES
TASKS = 2500


def play(name, **changes):
    """The total rewards of a strategy for bandits."""
    settings = {"num_tasks": TASKS, "num_arms": 5, "num_pulls": 10} | changes
    return np.asarray(bandit_strategies.play(BANDITS[name], jax.random.key(0), **settings).reward)


@functools.cache
def rewards_of(name, parameter=None):
    return play(name, parameter=parameter)


def act(name, **changes):
    """The total rewards of a strategy for Markov decision processes."""
    settings = {"num_tasks": 500, "num_episodes": 5} | changes
    return np.asarray(mdp_strategies.total_rewards(MDPS[name], jax.random.key(0), **settings))


def assert_mean(samples, expected):
    """The mean is within four standard errors."""
    np.testing.assert_allclose(samples.mean(), expected, atol=4 * samples.std() / np.sqrt(len(samples)))


def pulls_in_order(num_arms, num_pulls, choose=None):
    """The expected total reward, by trying everything that can happen; of the best choices, if `choose` is None.

    `choose(counts, pull)` is an arm, and counts are successes and failures of each, with the prior.
    """

    @functools.cache
    def value(counts, pull):
        if pull == num_pulls:
            return 0.0
        totals = []
        for arm in range(num_arms) if choose is None else [choose(counts, pull)]:
            (successes, failures), mean = counts[arm], counts[arm][0] / sum(counts[arm])
            success = (*counts[:arm], (successes + 1, failures), *counts[arm + 1 :])
            failure = (*counts[:arm], (successes, failures + 1), *counts[arm + 1 :])
            totals.append(mean * (1 + value(success, pull + 1)) + (1 - mean) * value(failure, pull + 1))
        return max(totals)

    return value(((1, 1),) * num_arms, 0)


@functools.cache
def exact_reward(name, parameter):
    """The expected total reward of a strategy that leaves nothing to chance, 10 pulls of 5 arms."""
    score = jax.jit(BANDITS[name].make(10, parameter))

    def choose(counts, pull):
        beliefs = Beliefs(*jnp.array(counts, jnp.float32).T)
        return int(jnp.argmax(score(jax.random.key(0), beliefs, pull)))

    return pulls_in_order(5, 10, choose)


@pytest.mark.parametrize(("num_arms", "optimum"), [(5, 6.660), (10, 6.714), (50, 6.714)])
def test_the_bayes_optimum_of_ten_pulls(num_arms, optimum):
    assert bayes_optimum(num_arms, 10) == pytest.approx(optimum, abs=1e-3)


@pytest.mark.parametrize(("num_arms", "num_pulls"), [(1, 4), (2, 1), (2, 5), (3, 4), (4, 3)])
def test_the_bayes_optimum_is_the_best_of_all_choices(num_arms, num_pulls):
    assert bayes_optimum(num_arms, num_pulls) == pytest.approx(pulls_in_order(num_arms, num_pulls), rel=1e-12)


def test_the_bayes_optimum_by_hand():
    # After a success stay, with 2/3; after a failure change, with 1/2.
    assert bayes_optimum(2, 2) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3 + 1 / 2 * 1 / 2)
    assert bayes_optimum(1, 30) == pytest.approx(15)


def test_too_many_states_are_refused(monkeypatch):
    monkeypatch.setattr(bandit_strategies, "MAX_STATES", 1000)
    with pytest.raises(ValueError, match=r"num_arms=5 with num_pulls=100 has at least \d+ states, .*MAX_STATES=1000"):
        bayes_optimum(5, 100)


@pytest.mark.parametrize(
    ("name", "parameter", "expected"),
    [("random", None, 5.0), ("Thompson sampling", None, 5.832), ("greedy", None, 6.572), ("UCB1", 0.1, 6.654)],
)
def test_mean_rewards_of_five_arms(name, parameter, expected):
    # The last three are means over 20,000 tasks and more of another implementation.
    assert_mean(rewards_of(name, parameter), expected)


@pytest.mark.parametrize(("name", "parameter"), [("greedy", None), ("UCB1", 0.1), ("Gittins", None)])
def test_the_mean_over_tasks_is_the_expectation_over_all_that_can_happen(name, parameter):
    assert_mean(rewards_of(name, parameter), exact_reward(name, parameter))
    assert exact_reward(name, parameter) < bayes_optimum(5, 10) + 1e-9


def test_gittins_indices_are_optimal_for_ten_pulls_of_five_arms():
    assert exact_reward("Gittins", None) == pytest.approx(bayes_optimum(5, 10), abs=1e-5)


def test_gittins_indices_of_one_and_two_pulls():
    indices = np.asarray(gittins_indices(6))
    for successes, failures in np.ndindex(5, 5):
        pulls = successes + failures
        mean, after_success = (1 + successes) / (2 + pulls), (2 + successes) / (3 + pulls)
        # A second pull is worth it after a success alone.
        expected = [mean, mean * (1 + after_success) / (1 + mean)]
        if pulls <= 4:
            np.testing.assert_allclose(indices[:2, successes, failures], expected, atol=1e-3)
            # A longer horizon is never worse.
            assert (np.diff(indices[: 6 - pulls, successes, failures]) >= 0).all()


def test_strategies_are_special_cases_of_each_other():
    np.testing.assert_array_equal(rewards_of("epsilon-greedy", 0.0), rewards_of("greedy"))
    np.testing.assert_array_equal(rewards_of("UCB1", 0.0), rewards_of("greedy"))
    assert_mean(rewards_of("epsilon-greedy", 1.0), 5.0)
    optimistic = "optimistic Thompson sampling"
    assert_mean(rewards_of(optimistic, 1) - rewards_of("Thompson sampling"), 0.0)
    better = rewards_of(optimistic, 5) - rewards_of("Thompson sampling")
    assert better.mean() > 4 * better.std() / np.sqrt(TASKS)


@pytest.mark.parametrize("shape", [1.0, 2.5, 40.0])
def test_gamma_and_beta_draws(shape):
    drawn = draw_gamma(jax.random.key(0), jnp.full(5000, shape))
    assert stats.kstest(np.asarray(drawn), stats.gamma(shape).cdf).pvalue > 1e-3
    probabilities = draw_probabilities(jax.random.key(1), Beliefs(jnp.full(5000, shape), jnp.full(5000, 3.0)))
    assert stats.kstest(np.asarray(probabilities), stats.beta(shape, 3).cdf).pvalue > 1e-3


def test_the_best_parameter_of_the_grid_is_chosen():
    rewards = {1.0: [0.0, 4.0], 0.0: [3.0, 3.0], 0.8: [6.0, 0.0]}
    best = bandit_strategies.best_parameter(tuple(rewards), lambda parameter: jnp.asarray(rewards[parameter]))
    assert best == 0.0
    assert bandit_strategies.best_parameter((), lambda parameter: jnp.zeros(2)) is None


def test_strategies_are_compared_at_their_best_parameters(monkeypatch):
    # Epsilon-greedy is best when it is greedy: at 0.
    key, grid = jax.random.key(1), (1.0, 0.0, 0.8)
    for module in (bandit_strategies, mdp_strategies):
        strategies = {
            "epsilon-greedy": module.STRATEGIES["epsilon-greedy"]._replace(grid=grid),
            "greedy": module.STRATEGIES["greedy"],
        }
        monkeypatch.setattr(module, "STRATEGIES", strategies)
    of_bandits, _ = bandit_strategies.compare(key, num_tasks=500, num_arms=3, num_pulls=5)
    of_mdps = mdp_strategies.compare(key, num_tasks=200, num_episodes=5)
    for found in (of_bandits, of_mdps):
        assert found["epsilon-greedy"]["parameter"] == 0.0
        assert found["greedy"]["parameter"] is None


def test_gittins_indices_are_left_out_where_they_would_take_much_memory(monkeypatch):
    chosen = {name: bandit_strategies.STRATEGIES[name] for name in ("greedy", "Gittins")}
    monkeypatch.setattr(bandit_strategies, "STRATEGIES", chosen)
    monkeypatch.setattr(bandit_strategies, "MAX_GITTINS_PULLS", 5)
    for pulls, expected in ((5, {"greedy", "Gittins"}), (6, {"greedy"})):
        found, regrets = bandit_strategies.compare(jax.random.key(0), num_tasks=4, num_arms=2, num_pulls=pulls)
        assert found.keys() == regrets.keys() == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("greedy", {"num_tasks": 0}, "num_tasks must be an integer of at least 1, got 0"),
        ("greedy", {"num_arms": 0}, "num_arms must be an integer of at least 1, got 0"),
        ("greedy", {"num_pulls": 0}, "num_pulls must be an integer of at least 1, got 0"),
        ("UCB1", {}, "parameter must be one of .*, got None"),
        ("Gittins", {"parameter": 0.9}, "parameter must be None, .*, got 0.9"),
    ],
)
def test_impossible_plays_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        play(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("greedy", {"num_tasks": 0}, "num_tasks must be an integer of at least 1, got 0"),
        ("greedy", {"num_episodes": 0}, "num_episodes must be an integer of at least 1, got 0"),
        ("BEB", {}, "parameter must be one of .*, got None"),
        ("PSRL", {"parameter": 2}, "parameter must be None, .*, got 2"),
    ],
)
def test_impossible_acts_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        act(name, **changes)


@pytest.mark.parametrize(
    ("optimum", "message"),
    [
        (lambda: bayes_optimum(0, 10), "num_arms must be an integer of at least 1, got 0"),
        (lambda: bayes_optimum(5, 0), "num_pulls must be an integer of at least 1, got 0"),
        (lambda: optimal_rewards(jax.random.key(0), num_tasks=0, num_episodes=1), "num_tasks must be .*, got 0"),
        (lambda: optimal_rewards(jax.random.key(0), num_tasks=1, num_episodes=0), "num_episodes must be .*, got 0"),
    ],
)
def test_impossible_optima_are_refused(optimum, message):
    with pytest.raises(ValueError, match=message):
        optimum()


MDP = random_mdps().sample_task(jax.random.key(3))


def record_of(visits):
    """A record of `MDP`, without noise, in which every action [A] was taken so often in every state."""
    visits = jnp.broadcast_to(visits, MDP.mean_rewards.shape)
    return Record(visits, visits * MDP.mean_rewards, visits[..., None] * MDP.transitions)


def test_the_posterior_is_that_of_the_processes():
    # Processes are weighted with the likelihood of what was seen: rewards 2, 2 and −1 of one action, and the next
    # states 0, 0 and 2; the posterior variance of the mean reward is 1/4.
    states, rewards = np.array([0, 0, 2]), np.array([2.0, 2.0, -1.0])
    mdps = jax.vmap(random_mdps(3, 1).sample_task)(jax.random.split(jax.random.key(0), 40_000))
    transitions, means = np.asarray(mdps.transitions)[:, 0, 0], np.asarray(mdps.mean_rewards)[:, 0, 0]
    record = Record(
        visits=jnp.array([[3.0], [0.0], [0.0]]),
        reward_sum=jnp.array([[3.0], [0.0], [0.0]]),
        transitions=jnp.zeros((3, 1, 3)).at[0, 0].set(jnp.array([2.0, 0.0, 1.0])),
    )
    mdp = posterior_mean(record)
    np.testing.assert_allclose(
        mdp.transitions[0, 0], np.average(transitions, axis=0, weights=transitions[:, states].prod(1)), atol=0.01
    )
    likelihood = np.exp(-0.5 * ((rewards - means[:, None]) ** 2).sum(1))
    np.testing.assert_allclose(mdp.mean_rewards[0, 0], np.average(means, weights=likelihood), atol=0.02)
    # Nothing is known of the other states.
    np.testing.assert_allclose(mdp.transitions[1:], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(mdp.mean_rewards[1:], 1.0)

    samples = jax.vmap(posterior_sample, (0, None))(jax.random.split(jax.random.key(1), 4000), record)
    reward = np.asarray(samples.mean_rewards)[:, 0, 0]
    assert stats.kstest(reward, stats.norm(1.0, 1 / 2).cdf).pvalue > 1e-3
    assert stats.kstest(np.asarray(samples.transitions)[:, 0, 0, 0], stats.beta(3, 3).cdf).pvalue > 1e-3
    np.testing.assert_allclose(samples.transitions.sum(-1), 1, rtol=1e-5)


PLANS = {name: jax.jit(strategy.plan) for name, strategy in MDPS.items()}


def test_plans_are_special_cases_of_each_other():
    key, record = jax.random.key(5), record_of(2.0)
    greedy = PLANS["greedy"](key, record, None)
    np.testing.assert_array_equal(PLANS["epsilon-greedy"](key, record, 0.0), greedy)
    np.testing.assert_array_equal(PLANS["BEB"](key, record, 0.0), greedy)
    np.testing.assert_array_equal(
        PLANS["OPSRL"](key, record, 1), PLANS["PSRL"](jax.random.fold_in(key, 0), record, None)
    )
    changed = np.mean(PLANS["epsilon-greedy"](key, record, 0.5) != greedy)
    assert 0.2 < changed < 0.6  # 0.4 ± 0.05
    # Without intervals UCRL2 believes frequencies.
    np.testing.assert_array_equal(PLANS["UCRL2"](key, record, 0.0), value_iteration(MDP, 10)[1])


@pytest.mark.parametrize(
    ("name", "parameter"), [("greedy", None), ("PSRL", None), ("OPSRL", 3), ("BEB", 1.0), ("UCRL2", 1.0)]
)
def test_who_has_seen_everything_plans_the_optimum(name, parameter):
    plan = PLANS[name](jax.random.key(0), record_of(1e9), parameter)
    np.testing.assert_array_equal(plan, value_iteration(MDP, 10)[1])


@pytest.mark.parametrize(("name", "parameter", "tries"), [("greedy", None, 0), ("BEB", 0.1, 1), ("UCRL2", 1.0, 1)])
def test_optimists_try_what_was_never_tried(name, parameter, tries):
    # Action 0 is known to pay 2, and next states are equally likely; of the others greed expects 1.
    visits = jnp.zeros((10, 5)).at[:, 0].set(1000.0)
    record = Record(visits, 2 * visits, jnp.repeat(visits[..., None] / 10, 10, axis=-1))
    np.testing.assert_array_equal(PLANS[name](jax.random.key(0), record, parameter), tries)


def test_optimistic_transitions_solve_the_linear_programme():
    generator = np.random.default_rng(0)
    for width in (0.0, 0.3, 1.0, 3.0):
        probabilities, values = generator.dirichlet(np.ones(4)), generator.normal(size=4)
        found = np.asarray(jax.jit(optimistic_transitions)(*map(jnp.float32, (probabilities, width, values))))
        np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)
        assert (found >= 0).all()
        assert np.abs(found - probabilities).sum() <= width + 1e-5
        # p = p̂ + gain − loss with Σ(gain + loss) ≤ width.
        best = optimize.linprog(
            np.concatenate([-values, values]),
            A_ub=np.vstack([np.ones(8), np.hstack([-np.eye(4), np.eye(4)])]),
            b_ub=[width, *probabilities],
            A_eq=[np.repeat([1, -1], 4)],
            b_eq=[0],
        )
        np.testing.assert_allclose(found @ values, probabilities @ values - best.fun, rtol=1e-4)


def test_a_record_is_what_happened_in_the_episodes_before():
    records = []

    def plan(key, record, parameter):
        jax.debug.callback(lambda *record: records.append(record), *record, ordered=True)
        return jnp.full((10, 10), 2)

    strategy = mdp_strategies.Strategy(plan)
    mdp_strategies.total_rewards(strategy, jax.random.key(0), num_tasks=1, num_episodes=3)
    jax.effects_barrier()
    assert [visits.sum() for visits, _, _ in records] == [0, 10, 20]
    assert [transitions.sum() for _, _, transitions in records] == [0, 9, 18]
    for episodes, (visits, reward_sum, transitions) in enumerate(records):
        assert (visits[:, [0, 1, 3, 4]] == 0).all()
        assert (reward_sum[visits == 0] == 0).all()
        # A state is entered by a transition, or as the first one of an episode, which is state 0.
        entered = transitions.sum((0, 1)) + episodes * np.eye(10)[0]
        np.testing.assert_array_equal(entered, visits.sum(1))


def test_posterior_sampling_is_better_than_chance_and_worse_than_knowledge():
    chance, sampling = act("random"), act("PSRL")
    knowledge = np.asarray(optimal_rewards(jax.random.key(0), num_tasks=500, num_episodes=5))
    assert chance.shape == sampling.shape == knowledge.shape == (500,)
    assert_mean(chance, 5 * 10 * 1.0)
    for gain in (sampling - chance, knowledge - sampling):
        assert gain.mean() > 4 * gain.std() / np.sqrt(500)
    # The processes are the same.
    assert np.corrcoef(sampling, knowledge)[0, 1] > 0.4


def test_ten_episodes_with_the_bonus_of_beb():
    # Duan et al., table 2: 150.2, the mean of 1,000 processes, with a standard error of about 0.8.
    assert_mean(act("BEB", num_episodes=10, parameter=0.04), 150.2)


def test_the_bonus_of_ucb1():
    score = BANDITS["UCB1"].make(10, 0.5)
    found = score(None, Beliefs(jnp.array([3.0, 1.0]), jnp.array([2.0, 1.0])), 7)
    expected = [3 / 5 + 0.5 * np.sqrt(2 * np.log(7) / 5), 1 / 2 + 0.5 * np.sqrt(2 * np.log(7) / 2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_who_explores_pulls_every_arm_as_often():
    beliefs = Beliefs(jnp.array([1.0, 9.0, 1.0, 1.0, 1.0]), jnp.ones(5))
    score = BANDITS["epsilon-greedy"].make(10, 0.3)
    arms = jax.vmap(lambda key: jnp.argmax(score(key, beliefs, 0)))(jax.random.split(jax.random.key(0), 4000))
    shares, expected = np.bincount(arms, minlength=5) / 4000, np.array([0.06, 0.76, 0.06, 0.06, 0.06])
    np.testing.assert_array_less(np.abs(shares - expected), 5 * np.sqrt(expected * (1 - expected) / 4000))


def test_the_most_probable_of_many_draws_is_near_the_mode_of_the_posterior():
    # That of Beta(3, 2) is at 2/3.
    score = BANDITS["optimistic Thompson sampling"].make(10, 500)
    found = score(jax.random.key(0), Beliefs(jnp.array([3.0]), jnp.array([2.0])), 0)
    np.testing.assert_allclose(found, [2 / 3], atol=0.01)


def test_parameters_are_chosen_on_other_tasks_than_those_of_the_test(monkeypatch):
    given = []

    def play(strategy, key, *, num_tasks, num_pulls=1, parameter=None, **sizes):
        given.append((tuple(jax.random.key_data(key).tolist()), num_tasks))
        played = bandit_strategies.Played(np.zeros(num_tasks), np.zeros((num_tasks, num_pulls)))
        return played if "num_arms" in sizes else played.reward

    def keys_by_size(compare, **sizes):
        given.clear()
        compare(jax.random.key(0), **sizes)
        return [{key for key, size in given if (size == sizes["num_tasks"]) is is_test} for is_test in (False, True)]

    monkeypatch.setattr(bandit_strategies, "play", play)
    monkeypatch.setattr(mdp_strategies, "total_rewards", play)
    monkeypatch.setattr(mdp_strategies, "optimal_rewards", lambda key, **sizes: play(None, key, **sizes))
    for tune, test in (
        keys_by_size(bandit_strategies.compare, num_tasks=2500, num_arms=2, num_pulls=3),
        keys_by_size(mdp_strategies.compare, num_tasks=400, num_episodes=2),
    ):
        assert len(tune) == len(test) == 1
        assert tune != test


def plans_of_ucrl2(scale, gain, record, step):
    """What is done in state 0, where action 0 is known to pay `gain`: a hundredth less of it, and a hundredth more."""
    plans = []
    for factor in (0.99, 1.01):
        reward_sum = record.reward_sum.at[0, 0].add(factor * gain * record.visits[0, 0])
        plans.append(int(PLANS["UCRL2"](None, record._replace(reward_sum=reward_sum), scale)[step, 0]))
    return plans


def test_the_intervals_of_ucrl2():
    # Jaksch et al., 2010, equations 3 and 4, with 10 states, 5 actions and δ = 0.05.
    scale, visits = 0.5, jnp.full((10, 5), 50.0).at[:, 1].set(5.0)
    time = 1 + 10 * (4 * 50 + 5)
    few, many = (np.sqrt(7 * np.log(2 * 10 * 5 * time / 0.05) / (2 * count)) for count in (5, 50))
    record = Record(visits, jnp.zeros((10, 5)), jnp.zeros((10, 5, 10)))
    assert plans_of_ucrl2(scale, scale * (few - many), record, step=-1) == [1, 0]
    # In the last but one step, action 1 may lead from state 0 to state 1, which pays 1; the others are sure not to.
    visits = jnp.full((10, 5), 50.0)
    seen = jnp.zeros((10, 5, 10)).at[0, :, 2].set(1e12).at[0, 1, 2].set(1000.0)
    width = np.sqrt(14 * 10 * np.log(2 * 5 * (1 + 2500) / 0.05) / 1000)
    record = Record(visits, jnp.zeros((10, 5)).at[1].set(50.0), seen)
    assert plans_of_ucrl2(scale, scale * width / 2, record, step=-2) == [1, 0]
