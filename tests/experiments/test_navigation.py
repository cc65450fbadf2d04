"""The navigation experiment in miniature."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compare, devices, navigation, published, runs, show
from experiments.cli import parse
from experiments.runs import RunError
from maml_jax import parallel

TINY = {
    "num_meta_steps": 2,
    "val_every": 2,
    "log_every": 1,
    "meta_batch_size": 2,
    "shot": 3,
    "eval_shot": 3,
    "horizon": 6,
    "eval_episodes": 4,
    "eval_inner_steps": 2,
}


def config_of(algorithm="maml", **settings):
    untrained = {"num_meta_steps": 0} if algorithm == "random" else {}
    return dataclasses.replace(navigation.METHODS[algorithm], **TINY | untrained | settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = config_of(run_dir=tmp_path_factory.mktemp("finished"))
    return config, navigation.run(config)


def test_a_run_reports_the_return_after_every_update(finished):
    config, results = finished
    assert json.loads((config.run_dir / "results.json").read_text()) == results
    published, fresh = results["evaluations"]
    assert (published["goals"], published["count"]) == ("published", 40)
    assert (fresh["goals"], fresh["count"]) == ("fresh", 4)
    for evaluation in (published, fresh):
        metric = evaluation["metrics"]["return"]
        assert len(metric["mean"]) == len(metric["ci95"]) == 3
        assert all(mean < evaluation["optimum"] for mean in metric["mean"])
    assert results["rates"][0] == 0.5
    assert results["rates"][1:] in [[rate] for rate in navigation.LATER_RATES]
    assert len(results["policy_std"]) == 2
    record = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"return_0", "return_1", "kl", "entropy", "val"} <= record.keys()
    assert 0.0 <= record["kl"] <= 0.01
    for name in ("returns.png", "behaviour.pdf", "learning_curve.png"):
        assert (config.run_dir / "figures" / name).exists()


def test_the_state_of_a_run_can_be_used(finished):
    config, results = finished
    learner, params, loaded = runs.load(config.run_dir)
    assert loaded.algorithm == "maml"
    goals = navigation.published_goals()
    _, key, _ = jax.random.split(runs.streams(config.seed).test, 3)
    found = navigation.returns_at(config, params, goals, key, results["rates"], config.eval_shot)
    np.testing.assert_allclose(found.mean(0), results["metrics"]["return"]["mean"], rtol=1e-5)
    distribution = learner.predict(params, jnp.zeros((7, 2)))
    assert distribution.mean.shape == (7, 2)


@pytest.mark.parametrize("algorithm", [pytest.param("pretrained", marks=pytest.mark.slow), "oracle"])
def test_a_method_runs(algorithm, tmp_path):
    settings = {"outer_rule": "clipped", "surrogate": "loaded-dice"}
    results = navigation.run(config_of(algorithm, run_dir=tmp_path, **settings))
    updates = 0 if algorithm == "oracle" else 2
    assert len(results["metrics"]["return"]["mean"]) == updates + 1
    assert len(results["rates"]) == updates
    if algorithm == "pretrained":
        assert results["rates"][0] in navigation.FIRST_RATES
    assert (tmp_path / "figures" / "returns.png").exists()


def test_the_outer_rule_has_the_settings_of_the_run(monkeypatch):
    given = {}
    for name in ("trust_region", "clipped_epochs", "clipped_surrogate"):
        monkeypatch.setattr(
            navigation.rl, name, lambda *args, name=name, **settings: given.update({name: (args, settings)})
        )
    monkeypatch.setattr(navigation.rl, "meta_policy", lambda learner, outer: outer)
    config = config_of(outer_rule="trust-region", max_kl=0.02, metric_stride=3)
    assert navigation.meta_learner_of(config) is navigation.rl.ratio_surrogate
    navigation.outer_rule_of(config, "learner", "mesh")
    assert given == {"trust_region": (("learner",), {"max_kl": 0.02, "metric_stride": 3, "mesh": "mesh"})}
    config = config_of(outer_rule="clipped", max_kl=0.03, clip=0.1, epochs=4, outer_schedule="linear", num_meta_steps=3)
    navigation.meta_learner_of(config)
    assert given["clipped_surrogate"] == ((0.1,), {})
    navigation.outer_rule_of(config, "learner", None)
    (optimizer,), settings = given["clipped_epochs"]
    assert settings == {"num_epochs": 4, "max_kl": 0.03}
    # The schedule ends after all updates of all meta-steps.
    state, moved = optimizer.init(jnp.ones(1)), []
    for _ in range(13):
        update, state = optimizer.update(jnp.ones(1), state)
        moved.append(float(jnp.abs(update[0])))
    assert moved[11] > 1e-3 * moved[0]
    assert moved[12] == pytest.approx(0.0, abs=1e-9)


def test_paths_are_drawn(finished, tmp_path):
    config, _ = finished
    files = show.run(show.Config(run_dir=config.run_dir, episodes=2, out=tmp_path))
    assert [file.name for file in files] == ["behaviour_0_2.png", "behaviour_0_2.pdf"]
    assert all(file.stat().st_size > 5000 for file in files)


def test_the_oracle_sees_the_goal():
    environment = navigation.environment_of(navigation.METHODS["oracle"])
    goal = jnp.array([0.3, -0.4])
    state, observation = environment.reset(goal, jax.random.key(0))
    np.testing.assert_allclose(observation, [0.0, 0.0, 0.3, -0.4])
    state, observation, *_ = environment.step(goal, state, jnp.array([1.0, 0.0]), jax.random.key(0))
    np.testing.assert_allclose(observation, [0.1, 0.0, 0.3, -0.4], rtol=1e-6)


def test_the_published_goals_are_those_of_numpy():
    np.random.seed(1)  # the authors' code uses the global generator
    expected = np.random.uniform(-0.5, 0.5, (40, 2))
    np.testing.assert_allclose(navigation.published_goals(), expected, rtol=1e-6)
    # Before adapting, the published policy earned about what standing still earns.
    standing_still = -100 * np.linalg.norm(expected, axis=1).mean()
    np.testing.assert_allclose(standing_still, published.NAVIGATION["maml"][0], atol=1.0)


def test_rates_are_chosen_on_goals_of_their_own(monkeypatch):
    keys = []
    monkeypatch.setattr(navigation, "returns_at", lambda *args: keys.append(args[2]) or np.full((4, 5), -args[4][1]))
    rates, score = navigation.on_validation_goals(config_of(), {})
    assert rates == [0.5, 0.05]
    assert score == pytest.approx(-0.05)
    test_goals = navigation.draw_goals(jax.random.split(runs.streams(0).test, 3)[0], 40)
    assert not np.any(np.isin(np.asarray(keys[0]), np.asarray(test_goals)))
    given = navigation.on_validation_goals(config_of(later_lr=0.2), {})[0]
    assert given == [0.5, 0.2]


def test_a_policy_is_scored_by_its_returns_after_one_two_and_three_updates(monkeypatch):
    def returns_at(config, params, goals, key, rates, shot):
        later = 1.0 if rates[1] == 0.05 else 2.0
        return np.tile([-100.0, -1.0 * later, -2.0 * later, -3.0 * later, -50.0], (4, 1))

    monkeypatch.setattr(navigation, "returns_at", returns_at)
    assert navigation.on_validation_goals(config_of(), {}) == ([0.5, 0.05], pytest.approx(-2.0))


def test_no_rates_are_tried_twice():
    assert navigation.rate_candidates(config_of(eval_inner_steps=1)) == [[0.5]]
    assert len(navigation.rate_candidates(config_of("random"))) == 20
    assert navigation.rate_candidates(config_of("oracle")) == [[]]


def test_later_rates_are_relative_to_the_first():
    halved = dataclasses.replace(navigation.DESCENT, inner_lr=0.25)
    cases = {config_of("random"): navigation.FIRST_RATES, config_of(hyperparameters=halved): [0.25]}
    for config, firsts in cases.items():
        expected = [(first, 2 * first * later) for first in firsts for later in navigation.LATER_RATES]
        np.testing.assert_allclose(navigation.rate_candidates(config), expected)


def test_adapting_is_descent_at_the_rates(finished):
    config, _ = finished
    _, params, _ = runs.load(config.run_dir)
    support, _ = navigation.collect(config, params, jnp.ones(2) / 3, jax.random.key(0), jnp.array([0.5, 0.1]), 2, 3)
    adapted, _ = navigation.learner_of(config, [0.5, 0.1], 2).adapt(params, support)
    policy = navigation.make_policy(config)
    expected = params
    for step, rate in enumerate((0.5, 0.1)):
        batch = jax.tree.map(lambda x, step=step: x[step], support)
        grads = jax.grad(
            lambda p, batch=batch: navigation.rl.policy_gradient(policy.apply(p, batch.inputs), batch.targets)
        )(expected)
        expected = jax.tree.map(lambda p, g, rate=rate: p - rate * g, expected, grads)
    for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "--horizon must be an integer of at least 1, got 0"),
        ({"max_kl": float("inf")}, "--max-kl=inf must be a positive number"),
        ({"later_lr": -0.1}, r"--later-lr=-0\.1 must be a positive number"),
        ({"later_lr": 0.1, "eval_inner_steps": 1}, "--later-lr 0.1 has no effect with --eval-inner-steps 1; leave it"),
        ({"epochs": 6}, "--epochs 6 has no effect with --outer-rule trust-region; leave it at 5"),
        ({"outer_rule": "clipped", "metric_stride": 3}, "--metric-stride 3 has no effect with --outer-rule clipped"),
        ({"on_nonfinite": "skip"}, "--on-nonfinite skip needs --outer-rule clipped"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_a_policy_that_is_not_finite_stops_the_run_and_keeps_the_last_state(finished, tmp_path, monkeypatch):
    make_policy = navigation.make_policy

    def broken(config):
        policy = make_policy(config)
        return policy._replace(apply=lambda params, x: jax.tree.map(lambda y: y * jnp.nan, policy.apply(params, x)))

    monkeypatch.setattr(navigation, "make_policy", broken)
    with pytest.raises(RunError, match=r"the loss is not finite at meta-step 0 .*There is no checkpoint in .* yet"):
        navigation.run(config_of(run_dir=tmp_path, shot=2))


@pytest.mark.slow
def test_seeds_are_trained_in_one_program(tmp_path):
    results = navigation.run(config_of(run_dir=tmp_path, seeds=2, eval_inner_steps=1))
    assert results["seeds"] == [0, 1]
    assert len(results["metrics"]["return"]["mean"]) == 2


def test_the_command_line_has_the_defaults():
    config = parse(navigation.METHODS, "", ["maml", "--max-kl", "0.02", "--inner-lr", "0.1"])
    assert config.max_kl == 0.02
    assert config.hyperparameters.inner_lr == 0.1
    assert navigation.with_paper_defaults(config).run_dir.name == "navigation-maml-0"


def test_every_method_has_its_algorithm_and_surrogate(monkeypatch):
    for name in ("maml", "fomaml", "anil"):
        monkeypatch.setattr(navigation, name, lambda policy, loss_fn, name=name, **settings: (name, loss_fn))
    for method in navigation.METHODS:
        for surrogate, loss_fn in navigation.SURROGATES.items():
            found = navigation.learner_of(config_of(method, surrogate=surrogate), [0.5], 1)
            assert found == (method if method in ("fomaml", "anil") else "maml", loss_fn)


def test_runs_are_compared_at_the_same_goals(tmp_path):
    # They have no meta-steps.
    for seed in (0, 1):
        navigation.run(config_of("random", seed=seed, run_dir=tmp_path / str(seed)))
    compared = compare.compare(compare.Config(runs=(tmp_path / "0", tmp_path / "1"), episodes=4))
    one, other = compared["evaluations"]
    for run in compared["runs"]:
        (reported,) = run["reported"]
        assert (reported["task"], reported["episodes"]) == ("fresh goals", 4)
    # The first run was tested at these goals.
    assert one["mean"][-1] == pytest.approx(compared["runs"][0]["reported"][0]["mean"], rel=1e-5)
    assert other["mean"][-1] != pytest.approx(compared["runs"][1]["reported"][0]["mean"], rel=1e-3)
    (pair,) = compared["pairs"]
    higher = np.greater(one["per_episode"], other["per_episode"])
    assert (pair["metric"], pair["better"]) == ("return", int(higher.sum()))
    assert pair["difference"] == pytest.approx(np.mean(one["per_episode"]) - np.mean(other["per_episode"]), rel=1e-5)
    assert "4 goals" in pair["sentence"]
    assert show.run(show.Config(run_dir=tmp_path / "0", episodes=2))
    blocked = compare.Config(runs=(tmp_path / "0", tmp_path / "1"), figure=tmp_path / "0" / "config.json" / "x.png")
    with pytest.raises(RunError, match=r"--figure .*x\.png cannot be written"):
        compare.compare(blocked)


def test_a_test_has_trajectories_of_its_own_number(monkeypatch):
    given = []

    def returns_at(config, params, goals, key, rates, num_trajectories):
        given.append((len(goals), num_trajectories))
        return np.zeros((len(goals), len(rates) + 1))

    monkeypatch.setattr(navigation, "returns_at", returns_at)
    config = config_of(shot=3, eval_shot=5, later_lr=0.1)
    assert navigation.test(config, {"log_std": np.log([0.5, 2.0])})["policy_std"] == pytest.approx([0.5, 2.0])
    assert given == [(navigation.NUM_VALIDATION_GOALS, 3), (40, 5), (4, 5)]
    params = navigation.make_policy(config).init(jax.random.key(0), jnp.zeros((1, 2)))
    episode = jax.eval_shape(navigation.sampler_of(config), jax.random.key(0), params)
    assert episode.support.inputs.shape == (1, 6, 3, 2)
    assert episode.query.inputs.shape == (6, 3, 2)


def test_the_weights_of_the_last_layer_are_scaled_at_the_start():
    params, scaled = (
        navigation.make_policy(config_of(head_scale=scale)).init(jax.random.key(0), jnp.zeros((1, 2)))
        for scale in (1.0, 0.25)
    )
    params["network"]["dense_2"]["kernel"] *= 0.25
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(scaled), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6)


def test_goals_that_are_divided_over_devices_have_the_same_returns(monkeypatch):
    config, found = config_of(horizon=3), []
    params = navigation.make_policy(config).init(jax.random.key(0), jnp.zeros((1, 2)))
    rates, goals = jnp.array([0.5]), navigation.published_goals()[:4]
    for mesh in (None, parallel.task_mesh(jax.devices()[:2])):
        monkeypatch.setattr(devices, "mesh_of_any", lambda count, mesh=mesh: mesh)
        program = navigation.returns_program.__wrapped__(config, len(goals), len(rates), 2)
        found.append(program((params, rates), (goals, jax.random.split(jax.random.key(1), len(goals)))))
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert [len(returns.devices()) for returns in found] == [1, 2]


@pytest.mark.parametrize("algorithm", ["maml", "anil"])
def test_training_adapts_at_its_rate_and_anil_its_last_layer_alone(algorithm):
    config = config_of(algorithm, horizon=4, hyperparameters=dataclasses.replace(navigation.DESCENT, inner_lr=0.3))
    policy, learner = navigation.make_policy(config), navigation.meta_learner_of(config)
    params = learner.init(jax.random.key(0), jnp.zeros((1, 2)))
    episode = jax.jit(navigation.sampler_of(config))(jax.random.key(1), params)
    support, query = jax.tree.map(lambda x: x[0], episode.support), episode.query
    grads = jax.grad(lambda p: navigation.rl.policy_gradient(policy.apply(p, support.inputs), support.targets))(params)
    adapted = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    if algorithm == "anil":
        adapted = params | {"network": params["network"] | {"dense_2": adapted["network"]["dense_2"]}}
    chex.assert_trees_all_close(learner.adapt(params, episode.support)[0], adapted, rtol=1e-4, atol=1e-6)
    acted = policy.apply(adapted, query.inputs)
    chex.assert_trees_all_close(query.targets.policy, acted, rtol=1e-4, atol=1e-5)
