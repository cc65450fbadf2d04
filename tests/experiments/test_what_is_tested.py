"""Experiments score and compare what their tables say: the parts that no table would show to be exchanged."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import classification, common, compare, cross_domain, domains, omniglot, packs, retest, runs, sinusoid
from experiments import hyperparameters as hyper
from maml_jax import Batch, MetaLearner, mixed_mode
from maml_jax.algorithms.hypergradient import default_segments
from maml_jax.tasks import few_shot, variable
from maml_jax.types import Evaluation, InnerInfo

LAYERS = ("dense_0", "dense_1")


def same_key(a, b):
    return np.array_equal(*map(jax.random.key_data, (a, b)))


def evaluation_of(*per_step):
    """An evaluation of made-up errors [E] for each number of inner steps."""
    scores, ones = np.stack(per_step, 1), np.ones(len(per_step))
    return Evaluation(scores.mean(0), ones, scores, 0 * ones, ones, ones)


# Sinusoids


def test_a_task_has_diverged_above_a_hundred_and_its_error_is_in_the_mean_and_not_in_the_median():
    metric = sinusoid.as_metric(evaluation_of(np.array([1.0, 2.0, 3.0, 99.0, 145.0])))
    assert (metric["mean"], metric["median"], metric["diverged"]) == ([50.0], [3.0], [0.2])


def test_the_rate_at_test_has_the_lowest_mean_error_after_the_last_step(monkeypatch):
    errors = {0.125: (9.0, 1.0, 8.0), 0.25: (9.0, 5.0, 4.0), 0.5: (9.0, 0.5, math.inf)}

    def evaluate(learner, *_, **__):
        return evaluation_of(*([error] * 2 for error in errors[float(learner.args[0])]))

    monkeypatch.setattr(sinusoid, "evaluate", evaluate)
    config = dataclasses.replace(sinusoid.METHODS["oracle"], inner_lr_grid=tuple(errors))
    found = sinusoid.test(config, None, None)
    assert found["inner_lr"] == 0.25
    assert found["metrics"]["mse"]["mean"] == [9.0, 5.0, 4.0]


def test_the_test_of_every_number_of_points_is_on_tasks_with_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "train", lambda *_: runs.Trained(None, 0, {}, {}))
    for name in ("inner_curves", "learning_curves", "predictions"):
        monkeypatch.setattr(sinusoid.figures, name, lambda *_: None)
    monkeypatch.setattr(sinusoid, "predictions", lambda *_: None)

    def test(config, params, sample):
        episode = jax.eval_shape(sample, jax.random.key(0))
        return {"inner_lr": 0.1, "metrics": [len(part.targets) for part in (episode.support, episode.query)]}

    monkeypatch.setattr(sinusoid, "test", test)
    config = dataclasses.replace(sinusoid.METHODS["maml"], eval_shots=(7, 3), eval_query_shot=11, run_dir=tmp_path)
    results, _ = sinusoid.train_and_test(config)
    assert [(e["shot"], e["metrics"]) for e in results["evaluations"]] == [(7, [7, 11]), (3, [3, 11])]
    assert results["metrics"] == [7, 11]


def test_the_drawn_predictions_are_those_after_as_many_steps_as_they_say(monkeypatch):
    observed = jnp.arange(11.0)[:, None, None] * jnp.ones((1, 200, 1))
    learner = MetaLearner(None, lambda *_, observe_fn: (None, InnerInfo(None, observed)), None, None)
    monkeypatch.setattr(sinusoid, "make_tester", lambda config, rate, num_inner_steps: learner)
    (curve,) = sinusoid.predictions(sinusoid.METHODS["maml"], None, 0.01, num_tasks=1)
    assert {steps: set(values.tolist()) for steps, values in curve["predicted"].items()} == {0: {0}, 1: {1}, 10: {10}}


def test_the_network_begins_with_the_weights_of_the_authors():
    learner = sinusoid.make_learner(sinusoid.METHODS["maml"], 0.1, 1)
    kernel = learner.init(jax.random.key(0), jnp.zeros((5, 1)))["dense_1"]["kernel"]
    assert kernel.shape == (40, 40)
    assert float(kernel.std()) == pytest.approx(0.01, rel=0.15)


def test_the_rate_of_a_test_made_again_is_that_of_its_number_of_points(monkeypatch):
    monkeypatch.setattr(sinusoid, "make_tester", lambda config, rate, num_inner_steps: rate)
    results = {"evaluations": [{"shot": 5, "inner_lr": 0.1}, {"shot": 10, "inner_lr": 0.2}]}
    run = retest.Run("run", Path("run"), "sinusoid", sinusoid.METHODS["oracle"], None, results)
    assert [retest.sinusoid_learner(run, shot) for shot in (5, 10)] == [0.1, 0.2]


# Domains


def test_mldg_and_erm_differ_in_nothing_but_the_objective():
    erm, mldg = domains.METHODS["erm"], domains.METHODS["mldg"]
    assert dataclasses.replace(erm, algorithm="mldg", hyperparameters=mldg.hyperparameters) == mldg


@pytest.mark.parametrize("data", domains.DOMAINS)
def test_mldg_and_erm_train_the_same_network(data):
    inputs = np.random.default_rng(0).random((2, *domains.INPUT_SHAPES[data]), np.float32)
    outputs = []
    for name in ("erm", "mldg"):
        learner = domains.make_learner(dataclasses.replace(domains.METHODS[name], data=data, features=2))
        params = jax.jit(learner.init)(jax.random.key(0), inputs[None])
        outputs.append(jax.jit(learner.predict)(params, inputs))
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("data", domains.DOMAINS)
def test_the_parts_of_the_domains_are_the_same_with_every_seed(data, tmp_path, monkeypatch):
    drawings = np.random.default_rng(0).integers(0, 256, (4, 20, 1, 1, 1)).astype(np.uint8)
    monkeypatch.setattr(domains.omniglot, "load", lambda *_: np.tile(drawings, (1, 1, 28, 28, 1)))
    monkeypatch.setattr(domains, "rotate", lambda images, degrees: images)
    pictures = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3)).astype(np.uint8)
    names = {"domain_names": np.array(domains.DOMAINS["pacs"]), "class_names": np.array(list("abcdefg"))}
    of_picture = {"domains": np.repeat(np.arange(4), 20), "labels": np.arange(80) % 7}
    np.savez(tmp_path / "pacs_32.npz", images=pictures, **of_picture, **names)
    config = dataclasses.replace(domains.METHODS["erm"], data=data, data_dir=tmp_path, num_characters=2)
    first, second = (
        domains.READERS[data](domains.with_paper_defaults(dataclasses.replace(config, seed=seed))) for seed in (0, 1)
    )
    chex.assert_trees_all_equal(first, second)


# Hyperparameters


def test_what_is_compared_has_as_many_trainings_on_draws_that_no_score_uses(monkeypatch):
    config = hyper.Config(
        num_inner_steps=2, num_meta_steps=5, meta_batch_size=3, val_every=2, log_every=1, val_episodes=2, seed=4,
        memory_steps=(),
    )  # fmt: skip
    tried, keys = [], []

    def make_search(learner, episode):
        keys.append(episode.key)
        return lambda found: tried.append(len(found)) or found[-1]

    def score(learner, hyperparameters, digits, config):
        scored.append(hyperparameters)
        number = float(len(scored))
        return {"test_loss": {"mean": number, "ci95": 0.0}}, np.array([number, 3 * number])

    scored = []
    monkeypatch.setattr(hyper, "make_search", make_search)
    monkeypatch.setattr(hyper, "score", score)
    monkeypatch.setattr(hyper, "relative_flops", lambda *_: 4.0)
    digits = dict.fromkeys(("training", "heldout", "test"), Batch(np.zeros((1, 2, 2), np.uint8), np.zeros(1, np.int32)))
    learned = hyper.constant(LAYERS, 2, rate=0.7, momentum=0.5, l2=1e-5)
    found = hyper.compare(config, None, learned, 60.0, digits)["methods"]
    # Three for each of five meta-steps, and two for the validations after 2, 4 and 5.
    assert tried == [21] * 3
    assert [method["runs"] for method in found.values()] == [0, *[21] * 4]
    assert same_key(keys[0], runs.streams(4).tune)
    chex.assert_trees_all_equal(scored[1], learned)
    # Positive if the other method has the larger loss: 1 and 3 before learning, 2 and 6 with hypergradients.
    assert found["before learning"]["test_loss_more"]["mean"] == -2.0
    assert found["random search"]["test_loss_more"]["mean"] == 6.0


def test_scores_are_those_of_runs_that_no_validation_has_used(monkeypatch):
    keys = []

    def evaluate(learner, hyperparameters, sampler, key, **_):
        keys.append(key)
        info = SimpleNamespace(metric=0.5)
        return SimpleNamespace(mean=(1.0, info), ci95=(0.1, info), per_episode=(np.zeros(2), None))

    monkeypatch.setattr(hyper, "evaluate_objective", evaluate)
    digits = dict.fromkeys(("training", "heldout", "test"), Batch(np.zeros((1, 2, 2), np.uint8), np.zeros(1, np.int32)))
    hyper.score(None, None, digits, hyper.Config(seed=4))
    assert len(keys) == 2
    assert all(same_key(key, runs.streams(4).test) for key in keys)


@pytest.mark.parametrize("method", hyper.BASELINES)
def test_a_method_tries_as_many_candidates_as_it_may(method):
    for count in (1, 7, 8, 9):
        assert len(hyper.candidates(method, LAYERS, hyper.Config(num_inner_steps=2), count)) == count


def test_every_seed_has_a_random_search_of_its_own():
    def first_of(seed):
        (candidate,) = hyper.candidates("random search", LAYERS, hyper.Config(num_inner_steps=3, seed=seed), 1)
        return candidate.hyperparameters

    chex.assert_trees_all_equal(first_of(0), first_of(0))
    assert np.all(first_of(0).momentum_logits != first_of(1).momentum_logits)


def test_random_search_draws_from_these_intervals():
    drawn = []

    class Recording:
        def uniform(self, low, high):
            drawn.append((low, high))
            return (low + high) / 2

    hyper.random_schedule(("layer",), 4, Recording())
    warm_up, exponent, first, relative, *momenta, l2 = drawn
    assert (warm_up, exponent) == ((0, 0.2), (0.5, 2))
    # Rates from 0.1 to 3, the last of them relative to the first, momenta up to 0.98, and L2 penalties.
    intervals = np.exp([first, relative, *momenta, l2])
    np.testing.assert_allclose(intervals, [(0.1, 3), (1e-3, 1), (0.02, 1), (0.02, 1), (1e-6, 1e-2)])


def test_the_compared_memory_is_that_of_the_hypergradient_that_it_names(monkeypatch):
    made = []

    def make_learner(config, **settings):
        made.append(settings)
        return MetaLearner(None, None, None, lambda held, _: (sum(map(jnp.sum, jax.tree.leaves(held))), None))

    def temporary_bytes(function, hyperparameters, episode):
        chex.assert_trees_all_equal_structs(function(hyperparameters, episode)[0], hyperparameters)
        return 100 * len(made)

    monkeypatch.setattr(hyper, "make_learner", make_learner)
    monkeypatch.setattr(hyper, "temporary_bytes", temporary_bytes)
    rows = hyper.memory(hyper.Config(memory_steps=(9, 16), truncation=4), LAYERS, None)
    ways = {
        "reverse over reverse": (jax.value_and_grad, lambda steps: 1),
        "mixed mode": (mixed_mode, lambda steps: 1),
        "mixed mode, segments": (mixed_mode, default_segments),
    }
    assert default_segments(9) > 1
    expected = [(steps, way, inner_grad, of(steps)) for steps in (9, 16) for way, (inner_grad, of) in ways.items()]
    assert [row.pop("temporary_bytes") for row in rows] == [100, 200, 300, 400, 500, 600]
    for row, settings, (steps, way, inner_grad, segments) in zip(rows, made, expected, strict=True):
        assert row == {"inner_steps": steps, "way": way, "segments": segments}
        assert settings == {
            "num_inner_steps": steps, "num_segments": segments, "truncation": None, "inner_grad": inner_grad,
        }  # fmt: skip


def test_every_seed_divides_the_digits_in_its_own_way(tmp_path):
    images = np.arange(30, dtype=np.uint8)[:, None, None]
    np.savez(tmp_path / hyper.FILE, images=images, labels=np.zeros(30, int))
    sizes = {"num_training": 10, "num_heldout": 10, "num_test": 10, "batch_size": 5}
    parts = [hyper.load_digits(hyper.Config(data_dir=tmp_path, seed=seed, **sizes)) for seed in (0, 1)]
    assert set(parts[0]["test"].inputs.ravel()) != set(parts[1]["test"].inputs.ravel())


def test_a_training_run_has_the_settings_of_the_experiment(monkeypatch):
    given = {}
    monkeypatch.setattr(hyper, "hypergradient", lambda *_, **settings: given.update(settings))
    hyper.make_learner(hyper.Config(num_inner_steps=36, batch_size=7))
    found = {name: given[name] for name in ("num_inner_steps", "batch_size", "truncation", "num_segments")}
    assert found == {
        "num_inner_steps": 36, "batch_size": 7, "truncation": None, "num_segments": default_segments(36),
    }  # fmt: skip


# Data sets of other kinds


def test_all_methods_see_the_same_episodes_of_a_data_set(monkeypatch):
    seen = {}

    def score(method, selection, images):
        seen.setdefault(method.label, []).append(selection)
        return 0.5

    monkeypatch.setattr(cross_domain, "score", score)
    labels = np.repeat(np.arange(6), 12)
    data = packs.DataSet(np.zeros((72, 28, 28, 1), np.uint8), labels, None, "made up")
    selector = variable.make_selector(labels, ways=(3, 5))
    methods = [cross_domain.pixels((28, 28, 1))._replace(label=label) for label in "ab"]
    config = cross_domain.Config((Path("run"),), episodes=3)
    cross_domain.measure(config, "digits", data, selector, methods)
    a, b = (seen[label] for label in "ab")
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.support, other.support)
        np.testing.assert_array_equal(one.query, other.query)
    assert len({tuple(selection.support.tolist()) for selection in a}) == 3


def test_an_inductive_method_sees_one_query_at_a_time():
    def predict(params, inputs):
        is_alone = inputs.shape[0] == 3  # beside two images of the support set
        return jnp.tile(jnp.array([1.0, 0.0] if is_alone else [0.0, 1.0]), (len(inputs), 1))

    learner = MetaLearner(None, lambda params, support, key=None: (params, None), predict, None)
    support, query = Batch(jnp.zeros((2, 1)), jnp.array([0, 1])), Batch(jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32))
    found = [float(cross_domain.accuracy(learner, alone, {}, support, query, None)) for alone in (True, False)]
    assert found == [1.0, 0.0]


def test_a_row_says_the_episodes_of_its_training(tmp_path):
    config = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS["leo"], train_way=4, train_shot=3))
    runs.write_json(tmp_path / "config.json", runs.as_json(config))
    (method,) = cross_domain.methods_of(tmp_path)
    assert method.training == f"Omniglot, 4-way 3-shot, {config.num_meta_steps} meta-steps"


def test_chance_is_the_mean_over_the_numbers_of_classes():
    data = packs.DataSet(np.zeros((4, 1, 1, 1), np.uint8), np.arange(4), None, "made up")
    selector = SimpleNamespace(classes=np.arange(4), ways=(2, 4), query_shot=1)
    config = cross_domain.Config((Path("run"),))
    found = cross_domain.summary(config, [], {"digits": data}, {"digits": selector}, {"digits": {}})
    assert found["data_sets"]["digits"]["chance"] == 0.375


# Comparisons


def test_a_verdict_is_that_of_the_adjusted_p_values_and_its_interval_has_the_unit_of_the_mean():
    pair = {
        "a": "A", "b": "B", "task": "5-way", "metric": "accuracy", "comparable": True, "counted": "episodes",
        "episodes": 20, "better": 15, "worse": 5, "equal": 0, "difference": 0.1, "ci95": 0.02,
    }  # fmt: skip

    def said(p_holm, sign_p_holm):
        return compare.sentence(pair | {"p": 0.01, "sign_p": 0.01, "p_holm": p_holm, "sign_p_holm": sign_p_holm}, 9)

    assert said(0.04, 0.04).startswith("A is better than B on average, 5-way; ")
    assert said(0.09, 0.04).startswith("A is better than B in most episodes, but their means cannot be told apart")
    assert said(0.09, 0.09).startswith("A and B cannot be told apart")
    assert "10.00 points (95 % interval 8.00 to 12.00, p = 0.01, adjusted 0.09)" in said(0.09, 0.09)
    record = pair | {"seeds": 3, "p": 0.01, "p_holm": 0.01}
    assert "10.00 points (95 % interval 8.00 to 12.00, p = 0.01)" in compare.sentence_over_seeds(record, 1)


@pytest.mark.parametrize(
    "change", [{"way": 3}, {"shot": 5}, {"query_shot": 4}, {"rotations": False}, {"inductive": True}]
)
def test_a_classifier_is_compared_on_tasks_of_the_same_kind(change):
    def test_of(**settings):
        config = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS["maml"], **settings))
        return retest.classification_test(retest.Run("run", Path("run"), "omniglot", config, omniglot.DATA, None))

    assert compare.differing(test_of(), test_of(seed=5, filters=3)) == {}
    assert compare.differing(test_of(), test_of(**change))


@pytest.mark.parametrize("change", [{"data": "pacs", "held_out": "photo"}, {"held_out": "30"}, {"num_characters": 7}])
def test_methods_are_compared_on_the_same_domain(change):
    def test_of(**settings):
        config = domains.with_paper_defaults(dataclasses.replace(domains.METHODS["erm"], **settings))
        return retest.domain_test(retest.Run("run", Path("run"), "domains", config, None, None))

    assert compare.differing(test_of(), test_of(seed=5)) == {}
    assert compare.differing(test_of(), test_of(**change))


# Classification


def test_the_statistics_of_the_normalisation_are_those_of_training_images(monkeypatch):
    given, make_batch_sampler = [], few_shot.make_batch_sampler

    def of_split(split, **settings):
        given.append(split)
        return make_batch_sampler(np.zeros((2, 20, 28, 28, 1), np.uint8), **settings)

    monkeypatch.setattr(few_shot, "make_batch_sampler", of_split)
    data = dataclasses.replace(omniglot.DATA, examples=lambda config, split: split)
    classification.with_statistics(data, dataclasses.replace(omniglot.METHODS["maml"], population=True))
    assert given == ["train"]


def test_sequences_of_the_test_are_as_long_as_in_training_and_of_test_classes(tmp_path, monkeypatch):
    given, info = [], SimpleNamespace(instance_accuracy=np.array([0.25, 0.75]))
    learner = MetaLearner(None, None, None, None)
    monkeypatch.setattr(classification, "training_of", lambda *_: common.Training(learner, None))
    monkeypatch.setattr(classification, "with_statistics", lambda *_: lambda params: params)
    monkeypatch.setattr(classification, "tests", lambda *_: iter([({"way": 5, "shot": 1}, learner, None)]))
    monkeypatch.setattr(classification, "score", lambda *_: None)
    monkeypatch.setattr(classification, "make_sampler", lambda data, config, *sizes: given.append(sizes))
    monkeypatch.setattr(
        classification, "evaluate_objective", lambda *_, **__: SimpleNamespace(mean=(0.0, info), ci95=(0.0, info))
    )
    monkeypatch.setattr(common, "train", lambda *_: runs.Trained(np.zeros(1), 0, {}, {}))
    monkeypatch.setattr(runs, "as_metric", lambda found: {"mean": [0.5], "ci95": [0.1]})
    monkeypatch.setattr(classification.figures, "learning_curves", lambda *_: None)
    config = dataclasses.replace(omniglot.METHODS["mann"], run_dir=tmp_path)
    results = omniglot.run(config)
    assert given == [("test", 5, omniglot.with_paper_defaults(config).train_shot)]
    assert results["instances"] == {"mean": [0.25, 0.75], "ci95": [0.25, 0.75]}
