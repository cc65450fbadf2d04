"""The Omniglot experiment in miniature, on made-up and on real characters."""

import dataclasses
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import classification, export, omniglot, runs
from maml_jax import CATALOGUE, Batch, Model, evaluate, load_learner, losses
from maml_jax.tasks import few_shot
from maml_jax.types import Evaluation, learner_at

TINY = {
    "num_meta_steps": 4,
    "val_every": 2,
    "log_every": 1,
    "meta_batch_size": 4,
    "eval_episodes": 4,
    "train_episodes": 0,
    "eval_inner_steps": 3,
    "network": "mlp",
}


def config_of(algorithm="maml", *, num_inner_steps=None, **settings):
    config = dataclasses.replace(omniglot.METHODS[algorithm], **settings)
    return dataclasses.replace(
        config, hyperparameters=dataclasses.replace(config.hyperparameters, num_inner_steps=num_inner_steps)
    )


LOAD = omniglot.omniglot.load


@pytest.fixture
def real(monkeypatch):
    """The loader of the data set, which `drawings` replaces for the rest of the module."""
    monkeypatch.setattr(omniglot.omniglot, "load", LOAD)


@pytest.fixture(scope="module")
def drawings():
    """Random characters in place of the data set, fewer of them."""
    images = np.random.default_rng(0).integers(0, 2, (30, 20, 28, 28, 1)).astype(np.uint8) * 255
    parts = {"train": images[:15], "val": images[15:22], "test": images[22:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniglot.omniglot, "load", lambda split, data_dir, split_by: parts[split])
        yield


@pytest.fixture(scope="module")
def finished(drawings, tmp_path_factory):
    """The configuration and the results of a finished run."""
    config = config_of(run_dir=tmp_path_factory.mktemp("finished"), **TINY)
    return config, omniglot.run(config)


# The conformance tests try every algorithm; these have recipes and parameters of different kinds.
@pytest.mark.parametrize("algorithm", ["maml", pytest.param("maml++", marks=pytest.mark.slow)])
def test_an_algorithm_runs(algorithm, finished, tmp_path):
    config, results = finished
    if algorithm != "maml":
        config = config_of(algorithm, run_dir=tmp_path, **TINY)
        results = omniglot.run(config)
    run_dir = config.run_dir
    assert json.loads((run_dir / "results.json").read_text()) == results
    accuracy = results["metrics"]["accuracy"]
    assert len(accuracy["mean"]) == len(accuracy["ci95"]) == 4  # before, and after each of 3 steps
    assert results["protocol"]["selected_step"] in (2, 4)
    for name in ("config.json", "metrics.jsonl", "checkpoints", "figures/learning_curve.png"):
        assert (run_dir / name).exists()
    # Two validations make an ensemble of two, if one was asked for.
    assert results["protocol"]["ensemble"] == (2 if algorithm == "maml++" else 1)
    learner, params = omniglot.load(run_dir)
    task_params, _ = learner.adapt(params, Batch(np.zeros((5, 28, 28, 1), np.float32), np.arange(5)))
    assert learner.predict(task_params, np.zeros((2, 28, 28, 1), np.float32)).shape == (2, 5)


@pytest.mark.parametrize("algorithm", omniglot.METHODS)
def test_every_algorithm_builds_the_learners_of_training_and_test(algorithm):
    config = omniglot.with_paper_defaults(omniglot.METHODS[algorithm])
    learner = learner_at(omniglot.make_learner(config), 0)
    images = jax.ShapeDtypeStruct((5, 64) if config.network == "features" else (5, 28, 28, 1), np.float32)
    params = jax.eval_shape(learner.init, jax.random.key(0), images)
    support = Batch(images, jax.ShapeDtypeStruct((5,), np.int32))
    if config.population and config.network != "features":  # the statistics of training images are beside the others
        params = jax.eval_shape(omniglot.make_tester(config).init, jax.random.key(0), images)
    _, info = jax.eval_shape(
        lambda params, support: omniglot.make_tester(config).adapt(params, support, observe_fn=lambda _: jnp.zeros(())),
        params,
        support,
    )
    num_steps = 10 if algorithm == "leo" else 0 if CATALOGUE[algorithm].classifies else config.eval_inner_steps
    assert info.observed.shape == (num_steps + 1,)


@pytest.mark.parametrize("algorithm", sorted(set(omniglot.METHODS) - {"leo"}))  # LEO needs a run of another
def test_every_recipe_reaches_its_training(algorithm, drawings, tmp_path, reached):
    config = dataclasses.replace(omniglot.METHODS[algorithm], run_dir=tmp_path)
    with reached:
        classification.run(dataclasses.replace(omniglot.DATA, settings=((5, 1), (5, 5))), config)


SMALL = TINY | {"way": 2, "network": "conv4", "filters": 3, "pooling": False, "eval_inner_steps": 2}


def run_in_settings(run_dir, algorithm, settings, **changes):
    """The results of a run that is tested in some settings, (way, shot) each."""
    config = dataclasses.replace(omniglot.METHODS[algorithm], run_dir=run_dir, **SMALL | changes)
    return classification.run(dataclasses.replace(omniglot.DATA, settings=settings), config)


@pytest.fixture(scope="module")
def pretrained(drawings, tmp_path_factory):
    """The directory and the results of a pretrained network."""
    run_dir = tmp_path_factory.mktemp("pretrained")
    return run_dir, run_in_settings(run_dir, "pretrained-classifier", ((2, 1), (3, 1)))


@pytest.mark.parametrize("algorithm", ["protonets", "pretrained-classifier"])
def test_a_classifier_is_tested_in_all_settings(algorithm, drawings, pretrained, tmp_path):
    settings, heads = ((2, 1), (3, 1)), ["centroid", "neighbour", "linear", "fine-tuned"]
    run_dir, results = pretrained
    if algorithm == "protonets":
        settings, heads, run_dir = ((2, 1), (2, 5), (3, 1)), [None], tmp_path
        results = run_in_settings(run_dir, algorithm, settings, train_way=4)
    described = [(e["way"], e["shot"], e.get("head")) for e in results["evaluations"]]
    assert described == [(way, shot, head) for way, shot in settings for head in heads]
    assert results["metrics"] == results["evaluations"][0]["metrics"]
    assert results["protocol"]["normalisation"] == "statistics of training images"
    # What comes out of the run has these statistics, and then no prediction depends on the other queries.
    learner, params = omniglot.load(run_dir)
    images = np.random.default_rng(0).random((6, 28, 28, 1), np.float32)
    task_params, _ = learner.adapt(params, Batch(images[:2], np.arange(2)))
    together, alone = learner.predict(task_params, images[2:]), learner.predict(task_params, images[2:3])
    chex.assert_trees_all_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_leo_learns_on_the_features_of_a_pretrained_run(drawings, pretrained, tmp_path, monkeypatch):
    shutil.copytree(pretrained[0], tmp_path / "pretrained")
    settings = {"network": "features", "train_way": 2, "query_shot": 2, "pretrained_run": tmp_path / "pretrained"}
    results = run_in_settings(tmp_path / "leo", "leo", ((2, 1), (3, 1)), **settings)
    config = dataclasses.replace(omniglot.METHODS["leo"], **SMALL | settings)
    assert len(results["metrics"]["accuracy"]["mean"]) == 1 + 5 + 5
    assert len(results["evaluations"]) == 2
    # Four rotations of 15 characters; each drawing is a vector of unit length.
    ((examples, table),) = classification.make_sampler(
        omniglot.DATA, omniglot.with_paper_defaults(config), "train", 2, 1
    ).args
    assert len(table.counts) == 60
    np.testing.assert_allclose(np.linalg.norm(examples, axis=1), 1.0, rtol=1e-4)
    learner, params = omniglot.load(tmp_path / "leo")
    support = Batch(examples[:2], np.arange(2))
    assert learner.predict(learner.adapt(params, support)[0], examples[:5]).shape == (5, 2)
    stored = classification.selected_params
    with monkeypatch.context() as patch:  # the pretrained network was trained further meanwhile
        patch.setattr(
            classification, "selected_params", lambda *args: jax.tree.map(lambda leaf: 2 * leaf, stored(*args))
        )
        with pytest.raises(runs.RunError, match=r"leo was made with other data\. .* must not be trained further"):
            omniglot.load(tmp_path / "leo")
    with pytest.raises(runs.RunError, match=r"there is no run in nowhere; make it with `python -m experiments\.omni"):
        omniglot.run(dataclasses.replace(config, run_dir=tmp_path / "other", pretrained_run=Path("nowhere")))
    (tmp_path / "several" / "seed-0").mkdir(parents=True)
    (tmp_path / "several" / "seed-0" / "config.json").write_text("{}")
    with pytest.raises(runs.RunError, match="several holds several seeds; name one of its directories seed-0"):
        omniglot.run(dataclasses.replace(config, run_dir=tmp_path / "other", pretrained_run=tmp_path / "several"))
    with pytest.raises(runs.RunError, match="is a run of leo with --split-by alphabet; give a run of pretrained-class"):
        omniglot.run(dataclasses.replace(config, run_dir=tmp_path / "other", pretrained_run=tmp_path / "leo"))
    runs.write_json(tmp_path / "pretrained" / "data.json", {"sha256": "of other data"})
    classification.features_of.cache_clear()
    with pytest.raises(runs.RunError, match="pretrained was made with other data"):
        omniglot.run(dataclasses.replace(config, run_dir=tmp_path / "other"))
    stored = json.loads((tmp_path / "pretrained" / "config.json").read_text())
    runs.write_json(tmp_path / "pretrained" / "config.json", stored | {"population": False})
    with pytest.raises(runs.RunError, match="pretrained has --no-population"):
        omniglot.run(dataclasses.replace(config, run_dir=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_sequences_are_scored_by_instance(drawings, tmp_path):
    settings = TINY | {"network": "pixels", "train_shot": 2, "query_shot": 1, "chunk_size": None}
    config = dataclasses.replace(omniglot.METHODS["lstm"], run_dir=tmp_path, **settings)
    results = omniglot.run(config)
    assert [(e["way"], e["shot"]) for e in results["evaluations"]] == [(5, 1), (5, 5)]
    assert len(results["instances"]["mean"]) == len(results["instances"]["ci95"]) == 3


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        ("maml", {"population": True, "inductive": True}, "--population excludes --inductive"),
        ("protonets", {"network": "mlp"}, "--network mlp does not fit protonets; choose conv4"),
        ("maml", {"network": "multi-scale"}, "--network multi-scale does not fit maml"),
        ("cavia", {"network": "mlp"}, "--network mlp does not fit cavia; choose conv4"),
        ("leo", {"pretrained_run": None}, "--network features and --pretrained-run belong together"),
        ("mann", {"ensemble": 3}, "--ensemble 3 does not fit mann"),
        ("maml", {"train_way": 20}, "--train-way 20 differs from --way 5, and the parameters of maml depend"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(algorithm, settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(omniglot.METHODS[algorithm], **settings)


def test_population_statistics_make_any_learner_inductive(drawings, tmp_path):
    config = config_of(run_dir=tmp_path, population=True, **TINY)
    # Statistics that stay do not stop the activations from growing, so the rate of the paper is too large.
    slow = dataclasses.replace(config.hyperparameters, inner_lr=0.01)
    config = dataclasses.replace(config, hyperparameters=slow)
    assert omniglot.run(config)["protocol"]["normalisation"] == "statistics of training images"
    learner, params = omniglot.load(tmp_path)
    images = np.random.default_rng(0).random((9, 28, 28, 1), np.float32)
    task_params, _ = learner.adapt(params, Batch(images[:5], np.arange(5)))
    together, alone = learner.predict(task_params, images[5:]), learner.predict(task_params, images[5:6])
    chex.assert_trees_all_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["meta-sgd", "meta-curvature", "cavia", "maml++", "meta-lstm"])
def test_statistics_without_a_place_among_the_parameters_are_refused(algorithm, drawings, tmp_path):
    settings = TINY | {"network": "conv4", "filters": 3, "population": True, "ensemble": 1}
    config = dataclasses.replace(omniglot.METHODS[algorithm], run_dir=tmp_path / "run", **settings)
    with pytest.raises(runs.RunError, match=f"--population does not fit {re.escape(algorithm)}"):
        omniglot.run(config)
    assert not (tmp_path / "run").exists()


def test_other_data_are_not_a_reason_to_resume(finished, monkeypatch):
    config, results = finished
    others = np.random.default_rng(1).integers(0, 2, (10, 20, 28, 28, 1)).astype(np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(omniglot.omniglot, "load", lambda split, data_dir, split_by: others)
        with pytest.raises(runs.RunError, match="was made with other data"):
            omniglot.run(config)
    assert omniglot.run(config) == results


def test_reptile_draws_mini_batches_from_a_larger_support_set(drawings, tmp_path):
    config = dataclasses.replace(omniglot.METHODS["reptile"], run_dir=tmp_path, **TINY | {"way": 2, "shot": 6})
    assert omniglot.with_paper_defaults(config).hyperparameters.batch_size < config.train_shot * config.way
    results = omniglot.run(config)
    assert np.isfinite(results["metrics"]["accuracy"]["mean"]).all()
    learner, params = omniglot.load(tmp_path)
    task_params, _ = learner.adapt(params, Batch(np.zeros((2, 28, 28, 1), np.float32), np.arange(2)))
    assert learner.predict(task_params, np.zeros((4, 28, 28, 1), np.float32)).shape == (4, 2)


def test_with_seeds_too_a_test_that_cannot_be_is_refused_before_the_training(drawings, tmp_path):
    settings = {"query_shot": 16, "filters": 3, "seeds": 2, "num_meta_steps": 1, "train_way": 5}
    config = dataclasses.replace(omniglot.METHODS["protonets"], run_dir=tmp_path / "run", **settings)
    with pytest.raises(runs.RunError, match="shot=5 plus query_shot=16 exceeds the 20 examples"):
        omniglot.run(config)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_shown_and_not_overwritten(finished):
    config, results = finished
    written = (config.run_dir / "results.json").stat().st_mtime_ns
    assert omniglot.run(config) == results
    assert (config.run_dir / "results.json").stat().st_mtime_ns == written


def test_defaults_are_those_of_the_paper():
    five = omniglot.with_paper_defaults(config_of())
    twenty = omniglot.with_paper_defaults(config_of(way=20, shot=5))
    names = ("query_shot", "meta_batch_size", "eval_inner_steps")
    assert [getattr(five, name) for name in names] == [1, 32, 3]
    assert [getattr(twenty, name) for name in names] == [5, 16, 5]
    assert (five.hyperparameters.num_inner_steps, twenty.hyperparameters.num_inner_steps) == (1, 5)
    assert five.hyperparameters.inner_lr == pytest.approx(0.4 * 5)
    assert twenty.hyperparameters.inner_lr == pytest.approx(0.1 * 20)
    assert "--inner-lr 0.001 or 0.0005, --num-inner-steps 5 or 10" in omniglot.about()["reptile"]
    assert "or for more" not in omniglot.about()["protonets"]
    for way, steps in ((5, 16), (20, 25)):
        imaml = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS["imaml"], way=way))
        assert (imaml.hyperparameters.num_inner_steps, imaml.eval_inner_steps) == (steps, steps)
    names = ("inner_lr", "num_inner_steps", "batch_size")
    for way, steps, of_paper in ((5, 100_000, [1e-3, 5, 10]), (20, 200_000, [5e-4, 10, 20])):
        reptile = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS["reptile"], way=way))
        assert reptile.num_meta_steps == steps
        assert [getattr(reptile.hyperparameters, name) for name in names] == of_paper
        five = omniglot.with_paper_defaults(dataclasses.replace(omniglot.METHODS["reptile"], way=way, shot=5))
        assert (reptile.query_shot, five.query_shot) == (1, 1)
        chosen = dataclasses.replace(reptile.hyperparameters, inner_lr=1e-3, batch_size=10)
        chosen = dataclasses.replace(reptile, hyperparameters=chosen, num_meta_steps=7)
        assert omniglot.with_paper_defaults(chosen) == chosen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"way": 8}, r"split 'val' of Omniglot: way=8 exceeds the 7 classes of the split"),
        (
            {"shot": 15, "query_shot": 6},
            r"split 'train' of Omniglot: shot=15 plus query_shot=6 exceeds the 20 examples",
        ),
        ({"num_inner_steps": -2}, r"num_inner_steps must be an integer of at least 0, got -2"),
        ({"train_episodes": 1}, r"--train-episodes 1 gives no interval; choose 0 or at least 2"),
    ],
)
def test_mistakes_are_reported_before_anything_is_trained(settings, message, drawings, tmp_path):
    with pytest.raises((runs.RunError, ValueError), match=message):
        omniglot.run(config_of(run_dir=tmp_path / "run", **{**TINY, **settings}))
    assert not (tmp_path / "run").exists()


def test_a_missing_data_directory_is_named(real, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Omniglot at .*nowhere.*maml_jax.tasks.omniglot_builder"):
        omniglot.run(config_of(data_dir=tmp_path / "nowhere", run_dir=tmp_path / "run", **TINY))


@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ,
    reason="set TFDS_DATA_DIR to a directory made by `python -m maml_jax.tasks.omniglot_builder --data-dir DIR`",
)
def test_real_characters(real):
    samplers = classification.make_samplers(omniglot.DATA, omniglot.with_paper_defaults(config_of()))
    assert samplers.keys() == {"train", "val", "test"}
    for sampler in samplers.values():
        support, query, _ = sampler(jax.random.key(0))
        assert support.inputs.shape == query.inputs.shape == (5, 28, 28, 1)
        # Strokes of ink are few, and no two of ten drawings are equal.
        images = np.concatenate([support.inputs, query.inputs])
        assert np.all((images.mean((1, 2, 3)) > 0.01) & (images.mean((1, 2, 3)) < 0.3))
        assert len(np.unique(images, axis=0)) == 10


@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ,
    reason="set TFDS_DATA_DIR to a directory made by `python -m maml_jax.tasks.omniglot_builder --data-dir DIR`",
)
@pytest.mark.parametrize(("name", "least"), [("maml", 0.85), ("protonets", 0.95)])
def test_the_networks_that_are_shipped_classify_new_characters(real, name, least):
    sampler = classification.make_samplers(omniglot.DATA, omniglot.with_paper_defaults(config_of()))["test"]
    loaded = load_learner(Path(omniglot.__file__).parent / "pretrained" / f"omniglot_{name}.npz", way=5)
    settings = {"metric_fn": losses.accuracy, "num_episodes": 100, "one_query_at_a_time": True}
    found = evaluate(loaded.learner, loaded.params, sampler, jax.random.key(0), **settings)
    assert least < found.mean[-1] < 1.0


def test_the_trained_network_comes_out_of_a_run(finished):
    config, results = finished
    learner, params = omniglot.load(config.run_dir)
    sampler = classification.make_samplers(omniglot.DATA, omniglot.with_paper_defaults(config))["test"]
    again = evaluate(
        learner, params, sampler, runs.streams(0).test, metric_fn=losses.accuracy, num_episodes=TINY["eval_episodes"]
    )
    chex.assert_trees_all_close(again.mean, np.float32(results["metrics"]["accuracy"]["mean"]), atol=1e-6)
    with pytest.raises(runs.RunError, match=r"is no run directory: it holds no config\.json"):
        omniglot.load(config.run_dir / "figures")


@pytest.mark.parametrize(("algorithm", "steps"), [("maml", 60_000), ("imaml", 20_000), ("reptile", 100_000)])
def test_a_number_of_meta_steps_that_is_left_to_the_paper_has_its_value(algorithm, steps):
    config = dataclasses.replace(omniglot.METHODS[algorithm], num_meta_steps=None)
    assert omniglot.with_paper_defaults(config).num_meta_steps == steps


def test_a_longer_run_keeps_the_results_of_the_shorter_one(finished, tmp_path):
    config, short = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    longer = omniglot.run(dataclasses.replace(config, run_dir=tmp_path / "run", num_meta_steps=6))
    assert longer["meta_steps"] == 6
    assert json.loads((tmp_path / "run" / "results_4_4.json").read_text()) == short
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == longer


def test_a_run_that_grows_has_no_results_of_its_present_settings(finished, tmp_path):
    config, short = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    longer = dataclasses.replace(omniglot.with_paper_defaults(config), run_dir=tmp_path / "run", num_meta_steps=6)
    with runs.open_run(tmp_path / "run", longer):
        pass  # stopped before its end
    assert runs.read_results(tmp_path / "run") is None
    assert json.loads((tmp_path / "run" / "results_4_4.json").read_text()) == short
    assert "test accuracy" not in export.made_by(tmp_path / "run", longer)
    assert "test accuracy" in export.made_by(config.run_dir, config)


def test_an_accuracy_that_is_not_finite_is_told_as_that(finished, tmp_path):
    config, results = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    accuracy = {name: [None] * len(values) for name, values in results["metrics"]["accuracy"].items()}
    runs.write_json(tmp_path / "run" / "results.json", results | {"metrics": {"accuracy": accuracy}})
    assert "(test accuracy not finite; normalisation" in export.made_by(tmp_path / "run", config)


def test_an_inductive_test_is_another_and_says_so(finished, tmp_path):
    config, transductive = finished
    inductive = omniglot.run(dataclasses.replace(config, run_dir=tmp_path, inductive=True))
    assert transductive["protocol"]["normalisation"] == "transductive"
    assert inductive["protocol"]["normalisation"] == "each query with the support set"
    assert transductive["metrics"] != inductive["metrics"]


@pytest.mark.parametrize("adapt_norm", [False, True])
def test_the_offsets_of_the_normalisation_adapt_if_asked_to(adapt_norm):
    learner = omniglot.make_learner(config_of(num_inner_steps=1, adapt_norm=adapt_norm, network="mlp"))
    support = Batch(jax.random.normal(jax.random.key(0), (5, 28, 28, 1)), jnp.arange(5))
    params = learner.init(jax.random.key(1), support.inputs)
    adapted, _ = learner.adapt(params, support)
    moved = {
        jax.tree_util.keystr(path): bool(jnp.any(before != after))
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(adapted), strict=True
        )
    }
    assert any("norm" in name for name in moved)
    assert all(moves == (adapt_norm or "norm" not in name) for name, moves in moved.items()), moved


def test_validation_and_test_have_classes_and_keys_of_their_own(drawings, tmp_path, monkeypatch):
    seen = []

    def record(learner, params, sample_episode, key, **kwargs):
        seen.append((len(sample_episode.args[0][1].counts), key))
        return evaluate(learner, params, sample_episode, key, **kwargs)

    monkeypatch.setattr(classification, "evaluate", record)
    omniglot.run(config_of(**TINY | {"run_dir": tmp_path, "train_episodes": 4}))
    keys = runs.streams(0)
    validation = [(7, keys.val), (15, keys.val)]  # the numbers of classes of the splits; training classes are logged
    assert seen == [*validation, *validation, (8, keys.test)]


@pytest.mark.parametrize("rotations", [False, True])
def test_the_sampler_rotates_if_asked_to(drawings, monkeypatch, rotations):
    given = []

    def record(*args, **kwargs):
        given.append(kwargs["rotations"])

    monkeypatch.setattr(few_shot, "make_sampler", record)
    classification.make_samplers(omniglot.DATA, omniglot.with_paper_defaults(config_of(rotations=rotations)))
    assert given == [rotations] * 3


def test_the_accuracy_on_training_classes_is_logged_and_selects_nothing(drawings, tmp_path):
    logs = {}
    for episodes in (0, 4):
        config = config_of(**TINY | {"run_dir": tmp_path / str(episodes), "train_episodes": episodes})
        omniglot.run(config)
        records = runs.read_log(config.run_dir)
        logs[episodes] = [{k: v for k, v in record.items() if k != "steps_per_second"} for record in records]
    at_validations = [record["train"] for record in logs[4] if "val" in record]
    _, params = omniglot.load(tmp_path / "4")
    config = omniglot.with_paper_defaults(config)
    tasks = classification.make_sampler(omniglot.DATA, config, "train", config.way, config.shot)
    learner = omniglot.make_tester(config)
    found = classification.score(config, learner, params, tasks, runs.streams(0).val, 4)
    step = json.loads((tmp_path / "4" / "results.json").read_text())["protocol"]["selected_step"]
    of_selected = [record["train"] for record in logs[4] if record["step"] == step]
    assert of_selected == [pytest.approx(float(found.mean[-1]))]
    assert len(at_validations) == sum("val" in record for record in logs[0])
    assert [{k: v for k, v in record.items() if k != "train"} for record in logs[4]] == logs[0]


@pytest.mark.parametrize("settings", [{}, {"train_shot": 2}, {"algorithm": "pretrained-classifier"}])
def test_a_training_holds_its_images_once_and_none_of_the_test(drawings, settings):
    tiny = {name: value for name, value in TINY.items() if name in ("way", "shot", "query_shot", "eval_episodes")}
    method = dataclasses.replace(omniglot.METHODS[settings.get("algorithm", "maml")], population=False)
    config = omniglot.with_paper_defaults(dataclasses.replace(method, **tiny | {"train_episodes": 4} | settings))
    training = classification.training_of(omniglot.DATA, config)
    known = inspect.getclosurevars(training.monitor).nonlocals["known"]
    assert jax.tree.leaves(known)[0] is jax.tree.leaves(training.sample_episode)[0]
    expected = classification.make_sampler(omniglot.DATA, config, "train", config.way, config.shot)
    chex.assert_trees_all_equal(known(jax.random.key(0)), expected(jax.random.key(0)))
    held = jax.tree.leaves([inspect.getclosurevars(f).nonlocals for f in (training.validate, training.monitor)])
    assert {len(leaf) for leaf in held if getattr(leaf, "ndim", 0) == 4} == {15 * 20, 7 * 20}


def test_features_are_normalised_as_the_run_that_they_come_from():
    mann = dataclasses.replace(omniglot.METHODS["mann"], network="features", pretrained_run=Path("run"))
    assert not mann.population
    assert classification.normalisation(mann) == "statistics of training images"


def test_training_classes_that_are_too_few_for_the_test_are_not_scored(drawings, capsys):
    config = dataclasses.replace(omniglot.METHODS["protonets"], train_way=3, rotated_classes=False)
    few = dataclasses.replace(
        omniglot.DATA,
        examples=lambda config, split: omniglot.examples(config, split)[: 3 if split == "train" else None],
        settings=(),
    )
    training = classification.training_of(few, omniglot.with_paper_defaults(config))
    assert training.monitor is None
    assert "the accuracy on training classes is not logged: split 'train' of Omniglot" in capsys.readouterr().out


def test_a_validation_is_the_accuracy_after_the_last_step(drawings, monkeypatch):
    found = Evaluation(np.array([0.25, 0.5, 0.75]), *[None] * 5)
    monkeypatch.setattr(classification, "score", lambda *args: found)
    training = classification.training_of(omniglot.DATA, omniglot.with_paper_defaults(config_of(**TINY)))
    assert training.validate({}) == 0.75


def test_features_are_those_of_the_rotated_drawings(drawings, tmp_path, monkeypatch):
    source = dataclasses.replace(omniglot.METHODS["pretrained-classifier"], run_dir=tmp_path)
    with runs.open_run(tmp_path, omniglot.with_paper_defaults(source)):
        pass
    flat = Model(lambda key, x: {}, lambda params, x: x.reshape(len(x), -1))
    monkeypatch.setattr(classification, "load", lambda *args: (None, {"embedding": {}}))
    monkeypatch.setattr(classification, "make_network", lambda *args, **settings: flat)
    config = dataclasses.replace(omniglot.METHODS["leo"], pretrained_run=tmp_path)
    found = classification.features_of(omniglot.DATA, config, "val", True)
    images = omniglot.examples(config, "val").astype(np.float32)
    assert len(found) == 4 * len(images)
    for turns in range(4):
        turned = np.rot90(images[2], turns, (1, 2)).reshape(20, -1)
        unit = turned / np.linalg.norm(turned, axis=1, keepdims=True)
        np.testing.assert_allclose(found[turns * len(images) + 2], unit, rtol=1e-5)


@pytest.mark.parametrize("split_by", ["character", "alphabet"])
def test_the_characters_of_a_split_are_those_of_the_settings(split_by, monkeypatch):
    monkeypatch.setattr(omniglot.omniglot, "load", lambda *given: given)
    config = config_of(split_by=split_by, data_dir=Path("data"))
    assert omniglot.examples(config, "val") == ("val", Path("data"), split_by)


@pytest.mark.parametrize("rotated_test_classes", [False, True])
def test_rotations_are_classes_of_the_test_only_if_asked_to(drawings, monkeypatch, rotated_test_classes):
    given = []
    monkeypatch.setattr(few_shot, "make_sampler", lambda *args, **kwargs: given.append(kwargs["rotated_classes"]))
    config = config_of(rotated_classes=True, rotated_test_classes=rotated_test_classes)
    classification.make_samplers(omniglot.DATA, omniglot.with_paper_defaults(config))
    assert given == [True, rotated_test_classes, rotated_test_classes]  # training, validation, test
