"""Experiments train, select and test what their settings say: the parts that no result would show to be exchanged."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import classification, common, domains, omniglot, runs, sinusoid
from experiments import hyperparameters as hyper
from maml_jax import Batch, MetaInfo, MetaLearner, evaluate_objective, models
from maml_jax.tasks import few_shot
from maml_jax.tasks import sinusoid as waves
from maml_jax.types import named_leaves

LAYERS = ("dense_0", "dense_1")


def test_hyperparameters_are_selected_by_the_lowest_heldout_loss_of_the_settings(tmp_path, monkeypatch):
    rng, given = np.random.default_rng(0), []
    np.savez(tmp_path / hyper.FILE, images=rng.integers(0, 256, (30, 6, 6), np.uint8), labels=rng.integers(0, 10, 30))
    monkeypatch.setattr(hyper.common, "train", lambda run_dir, config, training: given.append(training) or 1 / 0)
    config = hyper.Config(
        data_dir=tmp_path, run_dir=tmp_path / "run", num_inner_steps=2, batch_size=5, hidden=3, num_training=10,
        num_heldout=10, num_test=10, initial_momentum=0.25, val_episodes=2,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        hyper.run(config)
    (training,) = given
    start = training.learner.init(jax.random.key(0), np.zeros((5, 6, 6), np.uint8))
    by_hand = hyper.constant(LAYERS, 2, rate=config.initial_rate, momentum=0.25, l2=config.initial_l2)
    chex.assert_trees_all_close(start, by_hand, rtol=1e-6)
    digits = hyper.load_digits(config)
    sampler = hyper.make_sampler(digits["training"], digits["heldout"])
    found = evaluate_objective(training.learner, start, sampler, runs.streams(0).val, num_episodes=2)
    assert training.validate(start) == pytest.approx(-float(found.mean[0]), rel=1e-5)


def test_a_training_of_domains_draws_from_the_training_part_alone(monkeypatch):
    greys = 4 * (1 + np.arange(60, dtype=np.uint8)).reshape(3, 20, 1, 1, 1)  # every drawing has one of its own
    monkeypatch.setattr(domains.omniglot, "load", lambda *_: np.tile(greys, (1, 1, 28, 28, 1)))
    config = dataclasses.replace(domains.METHODS["erm"], network="mlp", features=4, num_characters=3, shot=100)
    config = domains.with_paper_defaults(config)
    examples = domains.READERS[config.data](config)
    support = domains.training_of(config, examples).sample_episode(jax.random.key(0)).support
    drawn = set(np.rint(255 * np.asarray(support.inputs[..., 14, 14, 0])).astype(int).ravel().tolist())
    assert len(drawn) > 20
    assert drawn <= set(examples.train[0].inputs[:, 14, 14, 0].tolist())


def test_a_score_is_of_pixels_between_zero_and_one():
    learner = MetaLearner(None, None, lambda params, x: jnp.stack([x <= 1.0, x > 1.0], -1).astype(float), None)
    white = Batch(np.full(3, 255, np.uint8), np.zeros(3, np.int32))
    np.testing.assert_array_equal(domains.score(learner, {}, white), 1.0)


@pytest.mark.parametrize("grid", [(1e-3, 1e6), (1e6, 1e-3)])
def test_the_rate_at_test_is_the_best_wherever_it_stands_in_the_grid(grid):
    config = dataclasses.replace(
        sinusoid.METHODS["pretrained"], inner_lr_grid=grid, eval_shots=(5,), eval_episodes=4, eval_query_shot=7
    )
    params = models.mlp(features=(40, 40, 1)).init(jax.random.key(0), jnp.zeros((5, 1)))
    assert sinusoid.test(config, params, sinusoid.test_samplers(config)[5])["inner_lr"] == 1e-3


def test_a_training_has_the_chunks_of_its_settings(monkeypatch):
    given = {}
    for name in ("make_train_loop", "make_meta_step"):
        monkeypatch.setattr(common, name, lambda *_, name=name, **settings: given.update({name: settings}) or 1 / 0)
    config = dataclasses.replace(sinusoid.METHODS["maml"], chunk_size=3, meta_batch_size=6)
    sample = waves.make_sampler(shot=2, query_shot=2)
    for is_streamed in (False, True):
        monkeypatch.setattr(common.streaming, "is_streamed", lambda _, streamed=is_streamed: streamed)
        with pytest.raises(ZeroDivisionError):
            common.program_of(common.Training(None, sample), None, config, None, 2, None, jax.random.key(0))
    assert [settings["chunk_size"] for settings in given.values()] == [3, 3]


def test_a_sinusoid_is_trained_with_the_inner_steps_of_training():
    config = dataclasses.replace(sinusoid.METHODS["maml"], eval_inner_steps=3)
    steps = dataclasses.replace(config.hyperparameters, num_inner_steps=2)
    config = sinusoid.with_paper_defaults(dataclasses.replace(config, hyperparameters=steps))
    training = sinusoid.training_of(config)
    episode = training.sample_episode(jax.random.key(0))
    params = training.learner.init(jax.random.key(0), episode.support.inputs)
    _, info = jax.eval_shape(training.learner.objective, params, episode)
    assert info.support_loss.shape == (2,)


@pytest.fixture
def characters(monkeypatch):
    images = np.random.default_rng(0).integers(0, 2, (8, 20, 28, 28, 1)).astype(np.uint8) * 255
    monkeypatch.setattr(omniglot.omniglot, "load", lambda *_: images)


def test_episodes_of_training_and_test_have_sizes_of_their_own(characters):
    settings = {"way": 2, "train_way": 3, "shot": 1, "train_shot": 4, "query_shot": 2, "population": False}
    config = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS["protonets"], **settings))
    samplers = classification.make_samplers(omniglot.DATA, config)
    sizes = {split: len(jax.eval_shape(draw, jax.random.key(0)).support.targets) for split, draw in samplers.items()}
    assert sizes == {"train": 12, "val": 2, "test": 2}


def test_a_classifier_is_trained_with_the_inner_steps_of_training(characters):
    config = dataclasses.replace(omniglot.METHODS["maml"], network="mlp", eval_inner_steps=3)
    training = classification.training_of(omniglot.DATA, omniglot.with_paper_defaults(config))
    episode = jax.eval_shape(training.sample_episode, jax.random.key(0))
    params = jax.eval_shape(training.learner.init, jax.random.key(0), episode.support.inputs)
    assert jax.eval_shape(training.learner.objective, params, episode)[1].support_loss.shape == (1,)


@pytest.mark.parametrize(("network", "head"), [("conv4", "head"), ("mlp", "dense_4"), ("sinusoid", "dense_2")])
def test_anil_adapts_the_last_layer_of_the_network_of_an_experiment(network, head):
    if network == "sinusoid":
        learner = sinusoid.make_learner(sinusoid.METHODS["anil"], 0.1, 1)
        support = Batch(jnp.linspace(-1.0, 1.0, 5)[:, None], jnp.ones((5, 1)))
    else:
        config = dataclasses.replace(omniglot.METHODS["anil"], network=network, filters=3)
        learner = omniglot.make_learner(config, num_inner_steps=1)
        support = Batch(jax.random.normal(jax.random.key(0), (5, 28, 28, 1)), jnp.arange(5))
    params = jax.jit(learner.init)(jax.random.key(1), support.inputs)
    before, after = named_leaves(params), named_leaves(jax.jit(learner.adapt)(params, support)[0])
    moved = {name.split("/")[0] for name in before if jnp.any(before[name] != after[name])}
    assert moved == {head}


@pytest.mark.parametrize(("algorithm", "is_stochastic"), [("maml", False), ("mann", True)])
def test_the_order_of_a_support_set_is_drawn_in_the_test_of_a_classifier(algorithm, is_stochastic, monkeypatch):
    given = {}
    monkeypatch.setattr(classification, "evaluate", lambda *_, **settings: given.update(settings))
    classification.score(omniglot.METHODS[algorithm], None, None, None, None, 4)
    assert given["stochastic"] == is_stochastic


@pytest.mark.parametrize("rotations", [True, False])
def test_the_statistics_are_those_of_a_thousand_images_turned_as_in_training(characters, monkeypatch, rotations):
    given, sampler = {}, waves.make_sampler(shot=2, query_shot=2)
    monkeypatch.setattr(few_shot, "make_batch_sampler", lambda images, **settings: given.update(settings) or sampler)
    config = dataclasses.replace(omniglot.METHODS["maml"], population=True, rotations=rotations)
    classification.with_statistics(omniglot.DATA, config)
    assert given == {"batch_size": 1000, "rotated_classes": rotations}


def test_a_record_has_the_means_of_the_finite_steps():
    info = MetaInfo(np.array([1.0, np.nan, 3.0]), np.array([2.0, np.inf, 6.0]), np.array([True, False, True]), None)
    expected = {"step": 7, "loss": 2.0, "grad_norm": 4.0, "steps_per_second": 2.0}
    assert common.record_of(info, 7, 1.5, False) == expected
    assert common.record_of(info, 7, 1.5, True) == expected | {"skipped": 1}


def test_a_protocol_says_the_size_of_the_ensemble(tmp_path):
    config = sinusoid.with_paper_defaults(sinusoid.METHODS["maml"])
    trained = runs.Trained(None, 0, {}, {})
    results = runs.finish(tmp_path, "sinusoid", config, trained, {"ensemble": 2}, lambda: {"metrics": {}})
    assert results["protocol"] == {"loss_reduction": "mean", "ensemble": 2}


def test_as_many_states_are_kept_and_averaged_as_an_ensemble_has(characters, tmp_path, monkeypatch):
    given = {}

    def train(run_dir, config, training):
        given["num_best"] = training.num_best
        inputs = jax.eval_shape(training.sample_episode, jax.random.key(0)).support.inputs
        params = jax.eval_shape(training.learner.init, jax.random.key(0), inputs)
        params = jax.tree.map(lambda x: np.zeros((2, *x.shape), x.dtype), params)  # two validations
        return runs.Trained(params, 0, {}, {})

    def score(config, learner, params, *_):
        given["members"] = {len(leaf) for leaf in jax.tree.leaves(params)}
        given["way"] = learner.predict(params, np.zeros((4, 28, 28, 1), np.float32)).shape
        return given

    monkeypatch.setattr(common, "train", train)
    monkeypatch.setattr(classification, "score", score)
    monkeypatch.setattr(runs, "as_metric", lambda found: {"mean": [0.5], "ci95": [0.1]})
    monkeypatch.setattr(classification.figures, "learning_curves", lambda *_: None)
    config = dataclasses.replace(omniglot.METHODS["maml"], network="mlp", ensemble=3, run_dir=tmp_path)
    results = omniglot.run(config)
    assert given == {"num_best": 3, "members": {2}, "way": (4, 5)}
    assert results["protocol"]["ensemble"] == 2


def test_the_drawn_curve_is_that_of_the_support_points():
    config = dataclasses.replace(sinusoid.METHODS["maml"])
    params = models.mlp(features=(40, 40, 1)).init(jax.random.key(0), jnp.zeros((5, 1)))
    for curve in sinusoid.predictions(config, params, 0.01, num_tasks=2):
        x, y = curve["support"]
        np.testing.assert_allclose(np.interp(x, curve["x"], curve["true"]), y, atol=0.01)
