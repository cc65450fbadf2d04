"""The experiments on trials in miniature."""

import dataclasses
import json
import shutil
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    bandit_strategies,
    bandits,
    common,
    compare,
    devices,
    mazes,
    mdps,
    published,
    runs,
    seeds,
    show,
    trials,
)
from experiments.cli import parse
from maml_jax import parallel, rl

TINY = {"num_meta_steps": 2, "val_every": 2, "log_every": 1, "meta_batch_size": 8, "eval_episodes": 8}
SMALL = {
    bandits: {"num_arms": 3, "num_pulls": 4},
    mdps: {"num_episodes": 2},
    mazes: {"size": 3, "horizon": 6},
}


def config_of(module, *, method="rl2", settings=None, **changes):
    config = module.METHODS[method]
    small = {"hidden_size": 6} if method == "rl2" else {}
    hyperparameters = dataclasses.replace(config.hyperparameters, **small | (settings or {}))
    return dataclasses.replace(config, hyperparameters=hyperparameters, **TINY | SMALL[module] | changes)


RUNS = [
    (bandits, "maml"),
    (mdps, "rl2"),
    *(pytest.param((module, "rl2"), marks=pytest.mark.slow) for module in (bandits, mazes)),
]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0].__name__.split('.')[-1]}-{run[1]}")
def finished(request, tmp_path_factory):
    """An experiment, its configuration and the results of a finished run."""
    # The grids of the strategies are for larger tests.
    with pytest.MonkeyPatch.context() as patch:
        for module in (bandit_strategies, mdps.mdp_strategies):
            short = {name: s._replace(grid=s.grid[:2]) for name, s in module.STRATEGIES.items()}
            patch.setattr(module, "STRATEGIES", short)
        module, method = request.param
        config = config_of(module, method=method, run_dir=tmp_path_factory.mktemp("finished"))
        yield module, config, module.run(config)


def test_runs_are_compared_on_the_same_tasks(finished, tmp_path):
    module, config, results = finished
    for name, changes in {"same": {}, "longer": {"num_episodes": 5} if module is mdps else {"horizon": 9}}.items():
        shutil.copytree(config.run_dir, tmp_path / name)
        changes = {"num_pulls": 9} if module is bandits and changes else changes
        runs.write_json(tmp_path / name / "config.json", runs.read_json(tmp_path / name / "config.json") | changes)
    directories = (config.run_dir, tmp_path / "same", tmp_path / "longer")
    compared = compare.compare(compare.Config(runs=directories, episodes=config.eval_episodes))
    same, *others = compared["pairs"]
    assert f"have the same score in every one of {config.eval_episodes} tasks" in same["sentence"]
    assert not any(pair["comparable"] for pair in others)
    if module is not mazes:  # whose test reports walks
        found, reported = compared["evaluations"][0], results["metrics"]["reward"]
        np.testing.assert_allclose((found["mean"], found["ci95"]), (reported["mean"], reported["ci95"]), rtol=1e-5)


def test_a_run_is_tested_and_can_be_used(finished):
    module, config, results = finished
    assert json.loads((config.run_dir / "results.json").read_text()) == results
    record = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward", "kl", "entropy", "val"} <= record.keys()
    assert (config.run_dir / "figures" / "learning_curve.png").exists()
    learner, params, loaded = runs.load(config.run_dir)
    assert loaded.num_meta_steps == config.num_meta_steps
    problem = module.problem_of(config)
    key = runs.streams(config.seed).test
    test_key = key if module is mazes else jax.random.split(key, 3)[0]
    again = trials.outcome(config, problem, params, test_key, config.eval_episodes, greedy=True)
    expected = results["metrics"]["steps_of_most_probable" if module is mazes else "reward"]["mean"]
    found = again.steps.mean(0) if module is mazes else again.reward.sum(1).mean()
    np.testing.assert_allclose(found, expected if module is mazes else expected[0], rtol=1e-5)
    inputs = jnp.zeros((3, problem.num_inputs))
    start = trials.make_policy(problem, config.hyperparameters).start()
    distribution, value = learner.predict({"params": params, "carry": start}, inputs)
    assert distribution.logits.shape == (3, problem.num_actions)
    assert value.shape == (3,)


def test_a_run_may_start_from_another(finished, tmp_path, monkeypatch):
    module, config, _ = finished
    _, params, _ = runs.load(config.run_dir)
    started = []
    monkeypatch.setattr(common, "train", lambda run_dir, config, training: started.append(training) or sys.exit())
    with pytest.raises(SystemExit):
        module.run(dataclasses.replace(config, start_run=config.run_dir, run_dir=tmp_path, seed=1))
    (training,) = started
    chex.assert_trees_all_equal(training.learner.init(jax.random.key(2), training.inputs), params)
    # A run that has checkpoints goes on from them, and needs the other no more.
    again = dataclasses.replace(config, start_run=tmp_path / "deleted")
    assert trials.start_of(module.EXPERIMENT, again) is None


def test_a_seed_that_is_added_starts_from_the_other_run_too(finished, tmp_path, monkeypatch):
    module, config, _ = finished
    _, params, _ = runs.load(config.run_dir)
    # The first seed is trained already.
    one = dataclasses.replace(config, start_run=config.run_dir, num_meta_steps=0, run_dir=tmp_path / "seed-0")
    module.run(one)
    started = []

    def note(members, training):
        started.extend([[member.run_dir.name for member in members], training])
        sys.exit()

    monkeypatch.setattr(seeds, "train_together", note)
    with pytest.raises(SystemExit):
        module.run(dataclasses.replace(one, seeds=2, run_dir=tmp_path))
    names, training = started
    assert names[-1] == "seed-1"
    chex.assert_trees_all_equal(training.learner.init(jax.random.key(2), training.inputs), params)


def test_a_start_that_does_not_fit_is_refused(finished, tmp_path):
    module, config, _ = finished
    if config.algorithm == "rl2":  # the parameters of MAML have one size
        wider = dataclasses.replace(config.hyperparameters, hidden_size=7)
        other = dataclasses.replace(config, hyperparameters=wider, start_run=config.run_dir, run_dir=tmp_path / "run")
        with pytest.raises(runs.RunError, match=r"gru/hn/bias is \(6,\) there and \(7,\) here"):
            module.run(other)
    with pytest.raises(runs.RunError, match="is the directory of this run too; choose another --run-dir"):
        module.run(dataclasses.replace(config, start_run=config.run_dir))
    with pytest.raises(runs.RunError, match="nothing"):
        module.run(dataclasses.replace(config, start_run=tmp_path / "nothing", run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_strategies_are_beside_the_policy(finished):
    module, _, results = finished
    if module is mazes:
        assert results["shortest_path"] > 1.0
        larger = results["larger"]
        assert (larger["size"], larger["horizon"]) == (9, 24)
        assert larger["shortest_path"] > results["shortest_path"]
        assert max(larger["metrics"]["steps_of_draws"]["mean"]) <= 24
        return
    strategies = results["strategies"]
    assert all(np.isfinite(found["mean"][0]) and found["ci95"][0] > 0 for found in strategies.values())
    table = published.BANDITS[10, 5] if module is bandits else published.MDPS[10]
    assert table.keys() - {"RL²", "MAML"} <= strategies.keys()
    assert strategies["random"]["parameter"] is None
    assert strategies["epsilon-greedy"]["parameter"] is not None
    if module is bandits:
        assert results["optimum"] == pytest.approx(bandit_strategies.bayes_optimum(3, 4))
        assert results["regret"].keys() == strategies.keys() | {trials.TITLES[results["algorithm"]]}
        # A random pull loses E max(p) - E p = 3/4 - 1/2 on average.
        np.testing.assert_allclose(results["regret"]["random"], 0.25 * np.arange(1, 5), atol=0.5)
        assert all(np.all(np.diff([0.0, *curve]) >= 0) for curve in results["regret"].values())


def test_outcomes_are_divided_by_episode():
    config = config_of(mazes)
    problem = mazes.problem_of(config)
    params = trials.make_policy(problem, config.hyperparameters).init(
        jax.random.key(0), jnp.zeros((1, problem.num_inputs))
    )
    found = trials.outcome(config, problem, params, jax.random.key(1), 40)
    compiled = trials.trials_program.cache_info().misses
    trials.outcome(config, mazes.problem_of(config_of(mazes, seed=1)), params, jax.random.key(2), 40)
    assert trials.trials_program.cache_info().misses == compiled  # another run of the same sizes has the same program
    assert found.steps.shape == found.reward.shape == found.done.shape == (40, 2)
    assert np.all((found.steps >= 1) & (found.steps <= 6))
    assert np.all((found.steps < 6) <= (found.done == 1))  # a walk that ends early has reached the goal
    reached, given_up = found.reward[found.done == 1], found.reward[found.done == 0]
    assert np.all(reached >= 1 - 6 * 0.041)
    assert np.all(given_up <= -6 * 0.04 + 1e-6)


def test_walks_are_drawn_as_they_went(finished, tmp_path):
    module, config, _ = finished
    if module is not mazes:
        with pytest.raises(runs.RunError, match="there are no pictures of runs of experiments"):
            show.run(show.Config(run_dir=config.run_dir))
        return
    files = show.run(show.Config(run_dir=config.run_dir, episodes=2, out=tmp_path))
    assert all(file.stat().st_size > 5000 for file in files)
    problem = mazes.problem_of(config)
    _, params, _ = runs.load(config.run_dir)
    for seed in range(5):
        maze = problem.environment.sample_task(jax.random.key(seed))
        trial = rl.run_trial(
            problem.environment,
            trials.make_policy(problem, config.hyperparameters),
            params,
            maze,
            jax.random.key(seed),
            num_episodes=2,
            horizon=6,
        )
        walks = mazes.squares_of(maze, trial, 2)
        for index, squares in enumerate(walks):
            steps = (trial.episode == index) & (trial.mask > 0)
            assert len(squares) == int(steps.sum()) + 1
            assert squares[0].tolist() == maze.start.tolist()
            assert (squares[-1].tolist() == maze.goal.tolist()) == bool(trial.done[steps][-1])
            assert not np.any(np.asarray(maze.walls)[tuple(squares.T)])


def test_the_regret_is_that_of_the_most_probable_actions(monkeypatch):
    monkeypatch.setattr(bandit_strategies, "compare", lambda key, **sizes: ({}, {}))
    of_mode = {True: (np.full(4, 2.0), np.full((4, 2), 0.25)), False: (np.full(4, 1.0), np.full((4, 2), 0.5))}
    monkeypatch.setattr(trials, "through_trials", lambda *a, greedy, **k: of_mode[greedy])
    found = bandits.test(config_of(bandits), {})
    assert found["regret"] == {"RL²": [0.25, 0.5]}
    assert [found["metrics"][name]["mean"] for name in ("reward", "reward_of_draws")] == [[2.0], [1.0]]


def test_results_without_regret_are_drawn_without_it(tmp_path):
    bandits.draw(tmp_path, {"config": {"num_arms": 2, "num_pulls": 3}})
    assert not list(tmp_path.iterdir())


def test_too_many_states_have_no_optimum(monkeypatch):
    monkeypatch.setattr(bandit_strategies, "MAX_STATES", 3)
    monkeypatch.setattr(bandit_strategies, "compare", lambda key, **sizes: ({}, {}))
    monkeypatch.setattr(trials, "through_trials", lambda *a, **k: (np.ones(4), np.ones((4, 10))))
    assert bandits.test(config_of(bandits), {})["optimum"] is None


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (bandits, {"num_arms": 1}, "--num-arms must be an integer of at least 2, got 1"),
        (bandits, {"num_pulls": 0}, "--num-pulls must be an integer of at least 1, got 0"),
        (bandits, {"meta_batch_size": 7}, "--minibatches 2 does not divide --meta-batch-size 7"),
        (bandits, {"max_norm": 0.0}, r"--max-norm=0\.0 must be a positive number"),
        (mdps, {"num_episodes": 0}, "--num-episodes must be an integer of at least 1, got 0"),
        (mazes, {"view": 4}, "--view 4 has no middle; choose an odd number"),
        (mazes, {"horizon": 0}, "--horizon must be an integer of at least 1, got 0"),
        (mazes, {"size": 1}, "--size must be an integer of at least 2, got 1"),
        (bandits, {"settings": {"discount": 1.5}}, r"--discount 1\.5 must be at most 1"),
        (bandits, {"settings": {"memory": 1}}, "--memory must be an integer of at least 2, got 1"),
        (bandits, {"settings": {"hidden_size": 0}}, "--hidden-size must be an integer of at least 1, got 0"),
        (bandits, {"method": "maml", "settings": {"baseline": float("nan")}}, "--baseline nan must be a finite number"),
        (bandits, {"method": "maml", "settings": {"inner_lr": 0.0}}, r"--inner-lr=0\.0 must be a positive number"),
        (bandits, {"settings": {"entropy_weight": -1.0}}, r"--entropy-weight=-1\.0 must be a number of at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(module, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(module, **changes)


@pytest.mark.parametrize("module", SMALL)
def test_the_command_line_has_the_defaults(module):
    config = parse(module.METHODS, "", ["rl2", "--hidden-size", "32", "--memory", "9", "--outer-lr", "0.002"])
    problem = module.problem_of(config)
    policy = trials.make_policy(problem, config.hyperparameters)
    bias = policy.init(jax.random.key(0), jnp.zeros((1, problem.num_inputs)))["gru"]["iz"]["bias"]
    assert bias.shape == (32,)
    assert np.all((bias > 0) & (bias <= np.log(8)))
    assert config.outer_lr == 0.002
    assert module.with_paper_defaults(config).chunk_size == config.meta_batch_size
    assert "RL² (Duan et al., 2016). Published" in module.about()["rl2"]


def test_a_policy_may_associate_observations_with_rewards():
    config = parse(mdps.METHODS, "", ["rl2", "--associate", "--hidden-size", "4"])
    problem = mdps.problem_of(config)
    policy = trials.make_policy(problem, config.hyperparameters)
    params = policy.init(jax.random.key(0), jnp.zeros((1, problem.num_inputs)))
    assert policy.start()["observation"].shape == (10,)
    assert params["logits_of"]["kernel"].shape == (4, 10 * problem.num_actions)


def test_regret_is_what_the_best_arm_would_pay_more():
    config = config_of(bandits, num_arms=2, num_pulls=6)
    trial = rl.Trial(*([None] * 8))._replace(action=jnp.array([0, 1, 1]), reward=jnp.array([1.0, 0.0, 1.0]))
    reward, found = bandits.reward_and_regret(bandits.problem_of(config), jnp.array([0.9, 0.2]), trial)
    assert reward == 2.0
    np.testing.assert_allclose(found, [0.0, 0.7, 0.7], rtol=1e-6)
    problem = bandits.problem_of(config)
    params = trials.make_policy(problem, config.hyperparameters).init(jax.random.key(0), jnp.zeros((1, 5)))
    reward, regret = trials.through_trials(
        config, problem, params, jax.random.key(0), 4000, bandits.reward_and_regret, greedy=True
    )
    np.testing.assert_allclose(reward.mean() + regret.sum(1).mean(), 6 * 2 / 3, atol=0.08)
    played = bandit_strategies.play(
        bandit_strategies.STRATEGIES["greedy"], jax.random.key(0), num_tasks=4000, num_arms=2, num_pulls=6
    )
    # The regret and the reward of a pull add up to that of the best arm, 2/3 on average.
    total = played.reward.mean() + played.regret.sum(1).mean()
    np.testing.assert_allclose(total, 6 * 2 / 3, atol=0.08)


def test_values_are_averages_of_rewards():
    # With every reward 1 the discounted average is 1, whatever the length of the trial.
    config = config_of(bandits, num_pulls=50)
    environment = bandits.problem_of(config).environment
    always = environment._replace(
        step=lambda task, state, action, key: (state, jnp.zeros(1), jnp.float32(1.0), jnp.bool_(False))
    )
    problem = bandits.problem_of(config)._replace(environment=always)
    policy = trials.make_policy(problem, config.hyperparameters)
    params = policy.init(jax.random.key(0), jnp.zeros((1, problem.num_inputs)))
    params = params | {"value": jax.tree.map(jnp.zeros_like, params["value"])}
    config = dataclasses.replace(config, hyperparameters=dataclasses.replace(config.hyperparameters, decay=1.0))
    sampler = trials.training_of(config, problem).sample_episode
    targets = sampler(jax.random.key(1), params).support.targets
    np.testing.assert_allclose(targets.value[0], 1.0, rtol=1e-4)


@pytest.mark.parametrize("experiment", [bandits, mdps, mazes])
def test_a_state_is_selected_by_drawn_actions_in_other_tasks_than_those_of_the_test(experiment, monkeypatch):
    given = []

    def outcome(config, problem, params, key, count, **settings):
        given.append((key, count, settings))
        return types.SimpleNamespace(reward=np.array([[1.0, 2.0], [3.0, 6.0]]))

    monkeypatch.setattr(trials, "outcome", outcome)
    config = config_of(experiment, eval_episodes=3000)
    assert trials.training_of(config, experiment.problem_of(config)).validate({}) == 6.0  # the sum over a trial
    ((key, count, settings),) = given
    assert key == runs.streams(config.seed).val
    assert count == 2000
    assert not settings.get("greedy", False)


@pytest.mark.parametrize("discount", [0.5, 0.9])
def test_values_are_averages_by_the_discount_of_the_settings(discount):
    config = config_of(bandits, num_pulls=20)
    config = dataclasses.replace(
        config, hyperparameters=dataclasses.replace(config.hyperparameters, decay=1.0, discount=discount)
    )
    environment = bandits.problem_of(config).environment
    always = environment._replace(
        step=lambda task, state, action, key: (state, jnp.zeros(1), jnp.float32(1.0), jnp.bool_(False))
    )
    problem = bandits.problem_of(config)._replace(environment=always)
    params = trials.make_policy(problem, config.hyperparameters).init(
        jax.random.key(0), jnp.zeros((1, problem.num_inputs))
    )
    params = params | {"value": jax.tree.map(jnp.zeros_like, params["value"])}
    targets = trials.training_of(config, problem).sample_episode(jax.random.key(1), params).support.targets
    np.testing.assert_allclose(targets.value[0], 1.0, rtol=1e-4)


def test_a_walk_that_was_given_up_is_no_improvement(monkeypatch):
    # Faster, as fast, slower, given up twice, and given up after a walk that arrived with the last step.
    steps = np.array([[5.0, 3.0], [4.0, 4.0], [3.0, 5.0], [6.0, 6.0], [6.0, 6.0]])
    done = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    found = trials.Outcome(np.zeros((5, 2)), steps, done)
    monkeypatch.setattr(trials, "outcome", lambda *args, **settings: found)
    metrics = mazes.walks_of(config_of(mazes, eval_episodes=5), {}, jax.random.key(0))["metrics"]
    for way in ("draws", "most_probable"):
        assert metrics[f"improved_of_{way}"]["mean"] == [pytest.approx(0.4)]
        assert metrics[f"success_of_{way}"]["mean"] == pytest.approx([0.8, 0.6])
        assert metrics[f"steps_of_{way}"]["mean"] == pytest.approx([4.8, 4.8])


def test_seeds_are_trained_in_one_program(tmp_path, monkeypatch):
    monkeypatch.setattr(bandit_strategies, "compare", lambda key, **sizes: ({}, {}))
    results = bandits.run(config_of(bandits, run_dir=tmp_path, seeds=2, on_nonfinite="skip"))
    assert results["seeds"] == [0, 1]
    assert len(results["metrics"]["reward"]["mean"]) == 1


def test_the_outer_rate_falls_over_all_updates_of_the_training(monkeypatch):
    given, make = [], rl.clipped_epochs
    monkeypatch.setattr(
        rl, "clipped_epochs", lambda *args, **settings: given.append((*args, settings)) or make(*args, **settings)
    )
    config = config_of(bandits, outer_optimizer="sgd", outer_lr=0.5, outer_lr_end=0.1, max_norm=10.0)
    trials.training_of(config, bandits.problem_of(config))
    ((optimizer, settings),) = given
    assert settings == {"num_epochs": 4, "num_minibatches": 2, "prepare": rl.standardise_advantages}
    state, rates = optimizer.init(jnp.ones(1)), []
    for _ in range(2 * 4 * 2 + 1):
        update, state = optimizer.update(jnp.ones(1), state)
        rates.append(-float(update[0]))
    np.testing.assert_allclose(rates, np.linspace(0.5, 0.1, 17), rtol=1e-5)


def test_greedy_trials_take_the_most_probable_action():
    def took_the_mode(problem, task, trial):
        return jnp.all(trial.action == trial.policy.mode())

    config = config_of(bandits)
    problem = bandits.problem_of(config)
    params = trials.make_policy(problem, config.hyperparameters).init(jax.random.key(0), jnp.zeros((1, 6)))
    greedy, drawn = (
        trials.through_trials(config, problem, params, jax.random.key(1), 100, took_the_mode, greedy=greedy)
        for greedy in (True, False)
    )
    assert greedy.all()
    assert drawn.mean() < 0.5


def test_the_objective_has_the_clip_and_the_weights_of_the_settings():
    settings = {"clip": 0.05, "value_weight": 0.3, "entropy_weight": 0.7}
    config = config_of(bandits, settings=settings)
    problem = bandits.problem_of(config)
    training, policy = trials.training_of(config, problem), trials.make_policy(problem, config.hyperparameters)
    params = policy.init(jax.random.key(0), training.inputs)
    episode = training.sample_episode(jax.random.key(1), params)
    # A policy that is not the one which acted, so that ratios are clipped.
    params = jax.tree.map(lambda leaf: 100.0 * leaf, params)
    loss, info = training.learner.objective(params, episode)
    start = {"params": params, "carry": policy.start()}
    distribution, _ = training.learner.predict(start, episode.support.inputs)
    surrogate = rl.clipped_surrogate(0.05)(distribution, episode.support.targets.transition)
    assert abs(surrogate - rl.clipped_surrogate(0.2)(distribution, episode.support.targets.transition)) > 1e-3
    np.testing.assert_allclose(loss, surrogate + 0.15 * info.value_error - 0.7 * info.entropy, rtol=1e-5)


@pytest.mark.parametrize("learns", ["rates", "inverse_temperature", None])
def test_the_descent_has_the_rate_the_baseline_and_the_learned_numbers_of_the_settings(learns):
    settings = {"inner_lr": 0.3, "baseline": 0.25}
    settings |= {"learn_rates": learns == "rates", "learn_temperature": learns == "inverse_temperature"}
    config = config_of(bandits, method="maml", settings=settings)
    problem = bandits.problem_of(config)
    policy = trials.make_policy(problem, config.hyperparameters)
    params = policy.init(jax.random.key(0), jnp.zeros((1, problem.num_inputs)))
    assert params["baseline"] == np.float32(0.25)
    assert all(np.all(leaf == np.float32(0.3)) for leaf in jax.tree.leaves(params["rates"]))

    def logit(params):
        carry = policy.start()
        for inputs in (jnp.zeros(6), jnp.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])):  # the first arm pays
            carry, (distribution, _) = policy.step(params, carry, inputs)
        return distribution.logits[0]

    gradient = jax.grad(logit)(params)
    for name in ("rates", "inverse_temperature"):
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient[name])) == (name == learns), name


def test_the_norm_of_the_meta_gradient_is_bounded(monkeypatch):
    given, make = [], rl.clipped_epochs
    monkeypatch.setattr(rl, "clipped_epochs", lambda *args, **settings: given.append(args) or make(*args, **settings))
    config = config_of(bandits, outer_optimizer="sgd", outer_schedule="constant", outer_lr=1.0, max_norm=0.3)
    trials.training_of(config, bandits.problem_of(config))
    ((optimizer,),) = given
    for gradient, expected in (([3.0, 4.0], [0.18, 0.24]), ([0.03, 0.04], [0.03, 0.04])):
        gradient = jnp.array(gradient)
        update, _ = optimizer.update(gradient, optimizer.init(gradient))
        np.testing.assert_allclose(-update, expected, rtol=1e-5)


def test_trials_that_are_divided_over_devices_are_the_same_ones(monkeypatch):
    config = config_of(bandits)
    problem = bandits.problem_of(config)
    policy = trials.make_policy(problem, config.hyperparameters)
    params = policy.init(jax.random.key(0), jnp.zeros((1, problem.num_inputs)))
    found = []
    for mesh in (None, parallel.task_mesh(jax.devices()[:2])):
        monkeypatch.setattr(devices, "mesh_of_any", lambda count, mesh=mesh: mesh)
        program = trials.trials_program.__wrapped__(problem, config.hyperparameters, 6, False, trials.of_episodes)
        found.append(program(params, jax.random.split(jax.random.key(1), 6)))
    chex.assert_trees_all_close(*found)
    assert [len(outcome.reward.devices()) for outcome in found] == [1, 2]


def test_runs_of_mazes_are_compared_by_drawn_actions(monkeypatch):
    given = []

    def outcome(config, problem, params, key, count, *, greedy=False):
        given.append((key, count, greedy))
        return types.SimpleNamespace(reward=np.array([[1.0, 2.0], [3.0, 6.0]]))

    monkeypatch.setattr(trials, "outcome", outcome)
    np.testing.assert_array_equal(mazes.EXPERIMENT.reward(config_of(mazes), {}, 4, 2), [3.0, 9.0])
    assert given == [(runs.streams(4).test, 2, False)]
    given.clear()
    for module in (bandits, mdps):
        module.EXPERIMENT.reward(config_of(module), {}, 4, 2)
    assert given == [(jax.random.split(runs.streams(4).test, 3)[0], 2, True)] * 2


def test_the_shortest_paths_are_those_of_the_mazes_that_were_walked(monkeypatch):
    config, key = config_of(mazes, eval_episodes=30), jax.random.key(3)
    problem = mazes.problem_of(config)
    params = trials.make_policy(problem, config.hyperparameters).init(
        jax.random.key(0), jnp.zeros((1, problem.num_inputs))
    )
    shortest = trials.through_trials(config, problem, params, key, 30, lambda p, maze, t: mazes.shortest_path(maze))
    assert len(set(shortest.tolist())) > 1
    monkeypatch.setattr(trials, "outcome", lambda *args, **settings: trials.Outcome(*[np.ones((30, 2))] * 3))
    assert mazes.walks_of(config, params, key)["shortest_path"] == pytest.approx(shortest.mean())


def test_a_table_has_the_policy_the_strategies_and_the_published_rewards():
    def reward(mean):
        return {"mean": [mean], "ci95": [0.125]}

    results = {
        "algorithm": "rl2",
        "metrics": {"reward": reward(6.5), "reward_of_draws": reward(6.25)},
        "strategies": {"UCB1": reward(6.75) | {"parameter": 0.3}, "greedy": reward(6.0) | {"parameter": None}},
    }
    table = trials.reward_table(results, {"RL²": 6.7, "UCB1": 6.6}, "title")
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("RL², most probable action", "", "6.500 ± 0.125", "6.7"),
        ("RL², drawn action", "", "6.250 ± 0.125", ""),
        ("UCB1", "0.3", "6.750 ± 0.125", "6.6"),
        ("greedy", "", "6.000 ± 0.125", ""),
    ]
