"""The experiment on photographs in miniature, on made-up images of classes of unequal size."""

import dataclasses
import json
import os
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from experiments import classification, images, runs
from maml_jax import CATALOGUE, Batch, evaluate, losses
from maml_jax.tasks import few_shot, streaming
from maml_jax.types import learner_at

TINY = {
    "num_meta_steps": 4,
    "val_every": 2,
    "log_every": 2,
    "meta_batch_size": 2,
    "eval_episodes": 4,
    "train_episodes": 0,
    "eval_inner_steps": 1,
    "filters": 3,
    "size": 16,
    "way": 3,
    "query_shot": 2,
}
SIZES = {"train": (4, 9, 6, 7), "val": (4, 5, 6), "test": (5, 4, 30)}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with train, val and test; every class has a colour of its own, and some noise."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, sizes in SIZES.items():
        for index, count in enumerate(sizes):
            folder = root / split / f"{split}_{index}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (20, 24, 3)) + 150 * np.eye(3)[index % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config_of(algorithm="fomaml", **settings):
    """Few steps of first order, which compile fast."""
    config = dataclasses.replace(images.METHODS[algorithm], **{**TINY, **settings})
    if algorithm == "fomaml":
        steps = dataclasses.replace(config.hyperparameters, num_inner_steps=1)
        config = dataclasses.replace(config, hyperparameters=steps)
    return config


@pytest.fixture(scope="module")
def finished(photographs, tmp_path_factory):
    """The directory and the results of a finished run."""
    run_dir = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(run_dir / "cache"))
        return run_dir, images.run(config_of(data_dir=photographs, run_dir=run_dir, chunk_size=1))


def test_a_run_on_a_folder_is_tested_and_loaded(photographs, finished):
    run_dir, results = finished
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert len(results["metrics"]["accuracy"]["mean"]) == 2
    assert results["protocol"]["normalisation"] == "transductive"
    learner, params, config = runs.load(run_dir)
    assert (config.algorithm, config.data_dir) == ("fomaml", str(photographs))
    sampler = classification.make_samplers(images.DATA, images.with_paper_defaults(config_of(data_dir=photographs)))[
        "test"
    ]
    again = evaluate(learner, params, sampler, runs.streams(0).test, metric_fn=losses.accuracy, num_episodes=4)
    np.testing.assert_allclose(again.mean, results["metrics"]["accuracy"]["mean"], atol=1e-6)


def test_statistics_of_other_images_are_refused(photographs, tmp_path):
    images.run(config_of("protonets", data_dir=photographs, run_dir=tmp_path, train_way=3))
    runs.load(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps({"sha256": "that of other images"}))
    with pytest.raises(runs.RunError, match="was made with other data"):
        runs.load(tmp_path)


@pytest.fixture
def pool(photographs, tmp_path):
    """The same photographs in one folder of classes, and the split file that divides them."""
    folder = tmp_path / "pool"
    for split in SIZES:
        shutil.copytree(photographs / split, folder, dirs_exist_ok=True)
    file = tmp_path / "split.json"
    file.write_text(
        json.dumps({split: [f"{split}_{index}" for index in range(len(sizes))] for split, sizes in SIZES.items()})
    )
    return {"data_dir": folder, "split_file": file}


def test_episodes_streamed_from_the_host_train_the_same_parameters(pool, finished, tmp_path):
    results = images.run(config_of(**pool, run_dir=tmp_path, stream=True, chunk_size=1))
    assert results["protocol"]["split_file"] == str(pool["split_file"])
    resident, streamed = runs.load(finished[0]), runs.load(tmp_path)
    assert streaming.is_streamed(
        classification.make_samplers(images.DATA, images.with_paper_defaults(streamed.config))["train"]
    )
    for one, other in zip(jax.tree.leaves(resident.params), jax.tree.leaves(streamed.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_statistics_of_streamed_images_are_those_of_resident_ones(photographs, monkeypatch):
    found = []
    for stream in (False, True):
        config = images.with_paper_defaults(config_of("protonets", data_dir=photographs, stream=stream, train_way=3))
        network = classification.make_network(config, None, population=True)
        params = {"embedding": network.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))}
        if stream:  # nothing is put on the device as a whole
            monkeypatch.setattr(few_shot, "make_batch_sampler", None)
        found.append(classification.with_statistics(images.DATA, config)(params))
    chex.assert_trees_all_close(*found, rtol=1e-5)
    filled, start = jax.tree.leaves(found[0]), jax.tree.leaves(params)
    assert any(np.any(leaf != other) for leaf, other in zip(filled, start, strict=True))


@pytest.mark.slow
def test_a_pretrained_network_is_tested_with_every_head(photographs, tmp_path):
    settings = {"data_dir": photographs, "run_dir": tmp_path / "run", "shot": 1, "augment": True}
    results = images.run(config_of("pretrained-classifier", **settings))
    assert results["config"]["num_classes"] == len(SIZES["train"])
    heads = {evaluation["head"] for evaluation in results["evaluations"]}
    assert heads == {"neighbour", "centroid", "linear", "fine-tuned"}
    learner, params, _ = runs.load(tmp_path / "run")
    inputs = np.zeros((3, 16, 16, 3), np.float32)
    task_params, _ = learner.adapt(params, Batch(inputs, np.arange(3)))
    assert learner.predict(task_params, inputs).shape == (3, 3)


@pytest.fixture(autouse=True)
def few_settings(monkeypatch):
    monkeypatch.setattr(images, "DATA", dataclasses.replace(images.DATA, settings=((3, 1),)))


def test_small_classes_are_refused_by_name_or_left_out(photographs, tmp_path, capsys):
    settings = {"data_dir": photographs, "run_dir": tmp_path / "run", "way": 2, "shot": 3}
    with pytest.raises(runs.RunError, match=r"split 'train' of photographs: .*fewer than 5 images, such as 'train_0'"):
        images.run(config_of(**settings))
    assert not (tmp_path / "run").exists()
    classification.make_samplers(images.DATA, images.with_paper_defaults(config_of(**settings, leave_out_small=True)))
    said = " ".join(capsys.readouterr().out.split())
    assert "split 'train': 1 classes with fewer than 5 images are left out" in said
    assert "split 'test': 1 classes" in said


def test_published_settings_that_the_classes_do_not_allow_are_left_out(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "DATA", dataclasses.replace(images.DATA, settings=((2, 1), (4, 1), (2, 3))))
    settings = {"data_dir": photographs, "run_dir": tmp_path / "run", "way": 2, "shot": 1, "train_way": 2}
    config = images.with_paper_defaults(config_of("protonets", **settings))
    said = []
    assert [test["way"] for test, *_ in classification.tests(images.DATA, config, said.append)] == [2]
    assert len(said) == 2
    assert "the 4-way 1-shot test is left out: split 'test' of photographs: way=4 exceeds the 3 classes" in said[0]
    assert "the 2-way 3-shot test is left out" in said[1]
    with pytest.raises(
        runs.RunError, match=r"way=9 exceeds the 4 classes .*\(with --train-way 9 --train-shot 1 --query-shot 2\)"
    ):
        classification.make_samplers(images.DATA, dataclasses.replace(config, train_way=9))


def test_classes_that_are_too_small_for_a_later_test_are_those_of_every_method(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "DATA", dataclasses.replace(images.DATA, settings=((3, 1), (3, 5))))
    settings = {"data_dir": photographs, "run_dir": tmp_path / "run", "way": 2, "train_way": 2, "leave_out_small": True}
    config = images.with_paper_defaults(config_of("protonets", **settings))
    assert len(images.examples(config, "val")) == 3
    maml = images.with_paper_defaults(config_of("maml", **settings))
    found, expected = ([len(of_class) for of_class in images.examples(c, "test")] for c in (config, maml))
    assert found == expected
    assert min(found) < 5 + 2
    said = []
    assert [test["shot"] for test, *_ in classification.tests(images.DATA, config, said.append)] == [1, 1]
    assert "the 3-way 5-shot test is left out" in said[0]


def test_the_chunk_size_is_that_of_the_test_too(monkeypatch):
    given = {}
    monkeypatch.setattr(classification, "evaluate", lambda *args, **keywords: given.update(keywords))
    classification.score(config_of(chunk_size=3), None, None, None, jax.random.key(0), 4)
    assert given["chunk_size"] == 3


def test_the_split_file_and_the_colours_of_a_set_are_those_of_the_settings(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        images.tfds_classes, "load", lambda *args, **keywords: given.update(keywords) or FileNotFoundError()
    )
    monkeypatch.setattr(images.image_folder, "check_examples", lambda found, needed: found)
    images.read_classes(config_of(tfds="cifar100", split_file=tmp_path / "mine.json", colour=False), "train")
    assert (given["split_file"], given["colour"]) == (tmp_path / "mine.json", False)


@pytest.mark.parametrize("algorithm", images.METHODS)
def test_every_algorithm_builds_the_learners_of_training_and_test(algorithm):
    config = images.with_paper_defaults(dataclasses.replace(images.METHODS[algorithm], size=32, filters=4))
    if algorithm == "pretrained-classifier":
        config = images.with_defaults(config, {"num_classes": 4})
    learner = learner_at(classification.make_learner(config), 0)
    shape = (5, 64) if config.network == "features" else (5, 32, 32, 3)
    inputs = jax.ShapeDtypeStruct(shape, np.float32)
    params = jax.eval_shape(learner.init, jax.random.key(0), inputs)
    assert jax.tree.leaves(params)
    assert images.about()[algorithm].startswith(CATALOGUE[algorithm].title)


@pytest.mark.parametrize("algorithm", sorted(set(images.METHODS) - {"leo"}))  # LEO needs a run of another
def test_every_recipe_reaches_its_training(algorithm, photographs, tmp_path, reached):
    recipe = images.METHODS[algorithm]
    small = {"train_way": recipe.train_way and 3, "train_shot": recipe.train_shot and 2}
    with reached:
        images.run(config_of(algorithm, data_dir=photographs, run_dir=tmp_path, **small))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 8}, "--size 8 cannot be halved four times; choose at least 16"),
        ({"size": 12, "network": "resnet12", "pooling": False}, "--size 12 cannot be halved four times"),
        ({"size": 0}, "--size must be an integer of at least 8, got 0"),
        ({"network": "multi-scale"}, "--network multi-scale does not fit fomaml; choose conv4"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_without_a_folder_it_says_how_to_name_one(monkeypatch, tmp_path):
    monkeypatch.delenv("MAML_JAX_IMAGES", raising=False)
    with pytest.raises(FileNotFoundError, match=r"give the folder .* by --data-dir or \$MAML_JAX_IMAGES"):
        images.run(config_of(run_dir=tmp_path / "run"))


def test_a_setting_that_is_left_to_the_paper_has_its_value():
    assert images.with_paper_defaults(config_of(query_shot=None)).query_shot == 15
    small = dataclasses.replace(images.METHODS["leo"], size=8, pooling=True)  # features are not halved
    assert small.size == 8


def test_defaults_are_those_of_the_paper():
    one, five = (images.with_paper_defaults(dataclasses.replace(images.METHODS["maml"], shot=shot)) for shot in (1, 5))
    assert (one.meta_batch_size, five.meta_batch_size) == (4, 2)
    assert (one.hyperparameters.inner_lr, one.hyperparameters.num_inner_steps) == (pytest.approx(0.01 * 5), 5)
    assert (one.filters, one.query_shot, one.eval_inner_steps, one.outer_clip, one.size) == (32, 15, 10, 10.0, 84)
    learned = [
        images.with_paper_defaults(dataclasses.replace(images.METHODS["meta-lstm"], shot=shot)) for shot in (1, 5)
    ]
    assert [(c.hyperparameters.num_inner_steps, c.eval_inner_steps) for c in learned] == [(12, 12), (5, 5)]
    filled = {name: images.with_paper_defaults(images.METHODS[name]) for name in ("boil", "cavia", "meta-sgd", "r2d2")}
    for name, steps in {"boil": 1, "cavia": 2, "meta-sgd": 1}.items():
        assert (filled[name].hyperparameters.num_inner_steps, filled[name].eval_inner_steps) == (steps, steps)
    assert (filled["boil"].filters, filled["cavia"].meta_batch_size) == (64, 16)
    r2d2 = filled["r2d2"]
    assert (r2d2.train_way, r2d2.outer_lr, r2d2.hyperparameters.scale) == (16, 5e-3, 1e-4)


@pytest.mark.skipif("MAML_JAX_IMAGES" not in os.environ, reason="set MAML_JAX_IMAGES to a folder of train, val, test")
def test_real_photographs():
    config = config_of("protonets", size=16, train_way=5, way=5, query_shot=15)
    classes = images.read_classes(config, "val")
    assert classes.images[0].shape[1:] == (16, 16, 3)
    episode = few_shot.make_sampler(list(classes.images), way=5, shot=1, query_shot=15)(jax.random.key(0))
    assert episode.query.inputs.shape == (75, 16, 16, 3)
    assert float(episode.query.inputs.std()) > 0.1


@pytest.mark.parametrize("augment", [False, True])
def test_only_training_images_are_augmented_and_only_if_asked_to(photographs, monkeypatch, augment):
    given = []
    monkeypatch.setattr(images, "augmented", lambda sampler, **settings: given.append(settings) or "augmented")
    config = images.with_paper_defaults(config_of(data_dir=photographs, augment=augment, size=32))
    samplers = classification.make_samplers(images.DATA, config)
    assert given == [{"max_shift": 3}] * augment
    assert [split for split, sampler in samplers.items() if sampler == "augmented"] == ["train"] * augment


@pytest.mark.parametrize(("colour", "channels"), [(True, 3), (False, 1)])
def test_images_have_the_channels_of_the_settings(photographs, colour, channels):
    config = images.with_paper_defaults(config_of(data_dir=photographs, colour=colour))
    assert images.DATA.input_shape(config) == (16, 16, channels)
    for sampler in classification.make_samplers(images.DATA, config).values():
        episode = jax.eval_shape(sampler, jax.random.key(0))
        assert episode.support.inputs.shape == (3, 16, 16, channels)
