"""A learner goes into one file and comes out as it was, and whatever is wrong with a file is said."""

import dataclasses
import json
import os
import re
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import Batch, Episode, InnerInfo, MetaLearner, losses, portable
from maml_jax.portable import LearnerConfig, build_learner, classify, load_learner, outputs_by_step, save_learner

MAML = LearnerConfig(
    algorithm="maml",
    hyperparameters={"inner_lr": 0.5, "num_inner_steps": 1},
    way=3,
    inner_steps=2,
    features=4,
    made_by="python -m experiments.omniglot maml",
)
PROTONETS = LearnerConfig(algorithm="protonets", way=3, features=4, pooling=True, flatten=True, norm_scale=True)
IMAGES = np.random.default_rng(0).random((10, 28, 28, 1)).astype(np.float32)
SUPPORT = Batch(IMAGES[:6], np.array([0, 1, 2, 0, 1, 2], np.int32))
QUERIES = IMAGES[6:]


def random_params(config, way=None):
    """Parameters of the learner of `config`, all different from their initial values."""
    shapes = jax.eval_shape(build_learner(config, way=way).init, jax.random.key(0), IMAGES[: config.way])
    rng = np.random.default_rng(1)

    def values(leaf):
        return (0.3 * (rng.normal if len(leaf.shape) > 1 else rng.uniform)(size=leaf.shape)).astype(np.float32)

    return jax.tree.map(values, shapes)


@pytest.fixture(scope="module")
def params():
    return random_params(MAML)


@pytest.fixture
def file(tmp_path, params):
    save_learner(tmp_path / "maml.npz", params, MAML)
    return tmp_path / "maml.npz"


# The parameters of these are no nested dictionaries: they hold lists and the state of an optimiser.
OTHERS = {
    "meta-curvature": {"hyperparameters": {"num_inner_steps": 1}, "inner_steps": 1},
    "reptile": {
        "hyperparameters": {"num_inner_steps": 1, "inner_optimizer": "adam", "carry_state": True},
        "inner_steps": 1,
    },
    "neural-statistician": {"hyperparameters": {"num_context": 4, "num_latent": 3, "num_hidden": 8}},
    "leo": {"hyperparameters": {"num_latent": 4, "num_latent_steps": 1, "num_finetuning_steps": 1}},
}


@pytest.mark.parametrize(
    "config",
    [
        MAML,
        PROTONETS,
        dataclasses.replace(PROTONETS, norm="population", epsilon=0.1),
        *(LearnerConfig(algorithm=name, way=3, features=4, **settings) for name, settings in OTHERS.items()),
    ],
)
def test_a_learner_comes_out_of_its_file_as_it_was(tmp_path, config):
    params = random_params(config)
    save_learner(tmp_path / "made" / "learner.npz", params, config)
    learner, restored, restored_config = load_learner(tmp_path / "made" / "learner.npz")
    assert restored_config == config
    chex.assert_trees_all_equal(restored, params)
    chex.assert_trees_all_equal_dtypes(restored, params)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["made", "learner.npz"]
    chex.assert_trees_all_equal(
        jax.jit(learner.adapt)(restored, SUPPORT)[0], jax.jit(build_learner(config).adapt)(params, SUPPORT)[0]
    )


def test_the_fields_of_the_configuration_reach_the_learner(params):
    def adapted(**change):
        return jax.jit(build_learner(dataclasses.replace(MAML, **change)).adapt)(params, SUPPORT)

    task_params, info = adapted()
    assert info.support_loss.shape == (2,)
    chex.assert_trees_all_equal(task_params["norm_0"], params["norm_0"])
    others, info_of_others = adapted(adapt_norm=True, epsilon=1.0)
    assert np.abs(others["norm_0"]["offset"] - params["norm_0"]["offset"]).max() > 1e-4
    assert np.abs(info_of_others.support_loss[0] - info.support_loss[0]) > 1e-3
    scaled = random_params(dataclasses.replace(MAML, norm_scale=True, flatten=True, norm="population"))
    assert set(scaled["norm_0"]) == {"scale", "offset", "population_mean", "population_variance"}
    assert scaled["head"]["kernel"].shape == (4 * 4, 3)


def test_a_learner_that_depends_on_the_meta_step_is_that_after_training():
    # MAML++ begins with the mean of the losses after every step, and ends with the loss after the last.
    config = dataclasses.replace(MAML, algorithm="maml++", hyperparameters={"inner_lr": 0.5, "num_inner_steps": 2})
    learner, params = build_learner(config), random_params(config)
    episode = Episode(SUPPORT, Batch(QUERIES, jnp.array([0, 1, 2, 0])), jax.random.key(0))
    outputs = learner.predict(learner.adapt(params, SUPPORT)[0], QUERIES)
    np.testing.assert_allclose(
        learner.objective(params, episode)[0], losses.cross_entropy(outputs, episode.query.targets), rtol=1e-5
    )


def test_inner_steps_of_training_and_test_may_differ(tmp_path):
    # MAML++ learns a rate for each inner step of the training, and repeats the last one.
    config = dataclasses.replace(
        MAML, algorithm="maml++", hyperparameters={"num_inner_steps": 2, "inner_lr": 0.1}, inner_steps=3
    )
    params = random_params(dataclasses.replace(config, inner_steps=2))
    save_learner(tmp_path / "learner.npz", params, config)
    learner, restored, _ = load_learner(tmp_path / "learner.npz")
    chex.assert_trees_all_equal(restored, params)
    shapes = jax.eval_shape(lambda p: outputs_by_step(learner, p, SUPPORT, QUERIES), restored)
    assert shapes.shape == (4, 4, 3)


def test_inner_steps_are_those_of_the_fine_tuning_too():
    def shapes(head):
        config = LearnerConfig(
            algorithm="pretrained-classifier",
            hyperparameters={"head": head, "num_classes": 3, "num_finetuning_steps": 5},
            way=3,
            inner_steps=2,
            features=2,
            flatten=True,
        )
        learner = build_learner(config)
        return jax.eval_shape(lambda params: learner.adapt(params, SUPPORT)[1].support_loss, random_params(config))

    assert shapes("fine-tuned").shape == shapes("linear").shape == (2,)


def test_a_file_does_not_depend_on_x64(tmp_path):
    config = dataclasses.replace(PROTONETS, algorithm="matching")  # which has a number of its own, a scale
    save_learner(tmp_path / "learner.npz", random_params(config), config)
    with jax.enable_x64(True):
        params = load_learner(tmp_path / "learner.npz").params
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_hyperparameters_may_be_any_mapping(tmp_path):
    config = dataclasses.replace(MAML, hyperparameters=types.MappingProxyType(dict(MAML.hyperparameters)))
    save_learner(tmp_path / "learner.npz", random_params(MAML), config)
    assert load_learner(tmp_path / "learner.npz").config == MAML


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = dataclasses.replace(
        MAML, way=np.int64(3), hyperparameters={"inner_lr": np.float32(0.5), "num_inner_steps": 1}
    )
    save_learner(tmp_path / "learner.npz", random_params(MAML), config)
    assert load_learner(tmp_path / "learner.npz").config == MAML


def test_protonets_take_another_number_of_classes_and_maml_does_not(tmp_path, file):
    save_learner(tmp_path / "protonets.npz", random_params(PROTONETS), PROTONETS)
    loaded = load_learner(tmp_path / "protonets.npz", way=2)
    assert loaded.config == dataclasses.replace(PROTONETS, way=2)
    assert classify(loaded, Batch(IMAGES[:2], np.arange(2)), QUERIES).shape == (4, 2)
    assert load_learner(file, way=3).config == MAML
    with pytest.raises(ValueError, match=r"way=2 is not possible: the last layer of this maml has 3 outputs"):
        load_learner(file, way=2)
    with pytest.raises(ValueError, match=r"way must be an integer of at least 2, got 1"):
        load_learner(tmp_path / "protonets.npz", way=1)


# Classification


def test_classify_is_adapt_and_predict(file):
    learner, params, _ = loaded = load_learner(file)
    task_params, _ = jax.jit(learner.adapt)(params, SUPPORT)
    predict = jax.jit(learner.predict)
    together = jax.nn.softmax(predict(task_params, QUERIES))
    chex.assert_trees_all_close(classify(loaded, SUPPORT, QUERIES, one_at_a_time=False), together, atol=1e-6)
    beside = [predict(task_params, np.concatenate([SUPPORT.inputs, query[None]]))[-1] for query in QUERIES]
    found = classify(loaded, SUPPORT, QUERIES)
    chex.assert_trees_all_close(found, jax.nn.softmax(jnp.stack(beside)), atol=1e-6)
    # What is classified one at a time does not depend on the other queries.
    others = np.concatenate([QUERIES[:1], QUERIES[1:] ** 4])
    chex.assert_trees_all_close(classify(loaded, SUPPORT, others)[0], found[0], atol=1e-6)
    assert np.abs(classify(loaded, SUPPORT, others, one_at_a_time=False)[0] - together[0]).max() > 1e-3


def test_outputs_are_given_before_the_first_and_after_every_inner_step(file):
    learner, params, config = load_learner(file)
    shape = jax.eval_shape(lambda p: outputs_by_step(learner, p, SUPPORT, QUERIES), params).shape
    assert shape == (config.inner_steps + 1, 4, 3)


def test_the_key_reaches_an_adaptation_that_draws():
    def adapt(params, support, *, key=None, observe_fn=None):
        task_params = params + jax.random.normal(key, (3,))
        return task_params, InnerInfo(jnp.zeros(1), None if observe_fn is None else observe_fn(task_params)[None])

    def predict(task_params, inputs):
        return jnp.broadcast_to(task_params, (len(inputs), 3))

    learner, key = MetaLearner(init=None, adapt=adapt, predict=predict, objective=None), jax.random.key(5)
    found = outputs_by_step(learner, jnp.ones(3), SUPPORT, QUERIES, key=key)
    np.testing.assert_allclose(found[-1, 0], 1.0 + jax.random.normal(key, (3,)), rtol=1e-6)


@pytest.mark.parametrize(
    ("support", "queries", "message"),
    [
        (SUPPORT._replace(targets=np.arange(3)), QUERIES, r"one class index for each of its 6 images, got .* \[3\]"),
        (SUPPORT._replace(targets=np.zeros(6, np.int32)), QUERIES, r"has no example of class 1 of way=3"),
        (
            SUPPORT,
            QUERIES[:, :20],
            r"inputs must be floating images of shape \[28, 28, 1\] .*got float32\[4, 20, 28, 1\]",
        ),
        (SUPPORT, QUERIES[0], r"inputs must be floating images of shape \[28, 28, 1\]"),
        (SUPPORT._replace(inputs=np.zeros((6, 28, 28, 1), np.uint8)), QUERIES, r"the support set must be .*got uint8"),
        (SUPPORT, [], r"inputs must be floating images of shape \[28, 28, 1\]"),
        (
            SUPPORT,
            255 * QUERIES,
            r"inputs must hold pixels from 0 to 1 \(ink 1\.0, background 0\.0\), got numbers from 0 to",
        ),
        (SUPPORT, QUERIES * np.nan, r"inputs must hold pixels from 0 to 1 .*got numbers from nan to nan"),
        (SUPPORT._replace(inputs=-SUPPORT.inputs), QUERIES, r"the support set must hold pixels from 0 to 1"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(file, support, queries, message):
    with pytest.raises(ValueError, match=message):
        classify(load_learner(file), support, queries)


# Saving


def test_a_file_is_overwritten_only_if_told_to(file, params):
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(
        ValueError, match=r"maml\.npz already exists and is not overwritten; delete it, or pass overwrite"
    ):
        save_learner(file, other, MAML)
    chex.assert_trees_all_equal(load_learner(file).params, params)
    save_learner(file, other, MAML, overwrite=True)
    chex.assert_trees_all_equal(load_learner(file).params, other)


def test_an_interrupted_save_leaves_the_file_as_it_was(file, params, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    content = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)  # after everything is written
        with pytest.raises(KeyboardInterrupt):
            save_learner(file, jax.tree.map(lambda leaf: leaf + 1, params), MAML, overwrite=True)
    assert [entry.name for entry in file.parent.iterdir()] == ["maml.npz"]
    assert file.read_bytes() == content


def changed(params, change):
    """A copy of the parameters whose dictionaries were changed by a function."""
    copy = {name: dict(leaves) for name, leaves in params.items()}
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.pop("head"),
            r"the array 'head/bias' is nothing, and the configuration \(maml.*\) needs float32\[3\]",
        ),
        (lambda p: p.update(extra={"a": np.ones(1, np.float32)}), r"'extra/a' is float32\[1\], and .* needs nothing"),
        (lambda p: p["head"].update(bias=np.zeros(5, np.float32)), r"'head/bias' is float32\[5\].* needs float32\[3\]"),
        (lambda p: p["head"].update(bias=np.zeros(3)), r"'head/bias' is float64\[3\].* needs float32\[3\]"),
        (
            lambda p: p["head"].update(bias=np.full(3, np.nan, np.float32)),
            r"'head/bias' has values that are not finite; train again",
        ),
        (lambda p: p.update(head=[np.zeros(3, np.float32)]), r"'head/0' is float32\[3\], and .* needs nothing"),
    ],
)
def test_parameters_that_do_not_fit_are_not_written(tmp_path, params, change, message):
    with pytest.raises(ValueError, match=message):
        save_learner(tmp_path / "new" / "maml.npz", changed(params, change), MAML)
    assert not (tmp_path / "new").exists()


def test_the_name_ends_in_npz(tmp_path, params):
    with pytest.raises(ValueError, match=r"maml\.zip must end in \.npz"):
        save_learner(tmp_path / "maml.zip", params, MAML)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "mamml"}, r"unknown algorithm 'mamml'; this version knows .*maml.*protonets"),
        ({"network": "resnet"}, r"unknown network 'resnet'; this version knows conv4, multi-scale"),
        ({"network": "multi-scale"}, r'the network "multi-scale" has no last layer, which maml needs; use "conv4"'),
        ({"norm": "layer"}, r"unknown norm 'layer'; this version knows batch, population"),
        ({"way": 1}, r"way must be an integer of at least 2, got 1"),
        ({"features": 0}, r"features must be an integer of at least 1, got 0"),
        ({"pooling": 1}, r"pooling must be true or false, got 1"),
        ({"epsilon": 0.0}, r"epsilon=0.0 must be a positive number"),
        ({"epsilon": "small"}, r"epsilon must be a positive number, got 'small'"),
        ({"made_by": None}, r"made_by must be text, got None"),
        ({"input_shape": (28, 28)}, r"input_shape must be \[height, width, channels\], got \(28, 28\)"),
        ({"input_shape": (28, 0, 1)}, r"a size of input_shape must be an integer of at least 1, got 0"),
        ({"inner_steps": None}, r"inner_steps must be an integer of at least 0, got None"),
        ({"hyperparameters": {"rate": 1.0}}, r"maml has no hyperparameter 'rate'; it has inner_lr, num_inner_steps"),
        ({"hyperparameters": {"num_inner_steps": None}}, r"hyperparameters must say num_inner_steps"),
        ({"hyperparameters": {"inner_lr": -1.0}}, r"inner_lr=-1.0 must be a positive number"),
        ({"hyperparameters": 3}, r"hyperparameters must be a record with names, got 3"),
        (
            {"algorithm": "protonets", "hyperparameters": {}},
            r"protonets takes no inner steps; inner_steps=2 must be None",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MAML, **change)


# Files that something is wrong with


def rewrite(file, *, config=None, arrays=None, **others):
    """Writes a file again with other content; functions change the configuration and the arrays."""
    with np.load(file) as archive:
        content = dict(archive)
    stored = json.loads(str(content.pop("config")))
    if config:
        config(stored)
    if arrays:
        arrays(content)
    np.savez(file, **{"config": np.array(json.dumps(stored))} | content | others)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda c: c.update(format=2), r"has format 2, and maml_jax .* reads up to 1; install a newer maml_jax"),
        (lambda c: c.update(format="new"), r"has the unknown format 'new'"),
        (lambda c: c.pop("format"), r"has the unknown format None"),
        (
            lambda c: c.update(algorithm="new"),
            r"cannot be used: unknown algorithm 'new'.*install the version of maml_jax",
        ),
        (lambda c: c.update(network="new"), r"cannot be used: unknown network 'new'"),
        (lambda c: c.update(colour="red"), r"its configuration has the unknown field 'colour'"),
        (lambda c: c.pop("way"), r"its configuration lacks the field 'way'"),
        (lambda c: c.update(way=5), r"the array 'head/bias' is float32\[3\], and .*way=5.* needs float32\[5\]"),
        (lambda c: c.update(algorithm=["maml"]), r"unknown algorithm \['maml'\]"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(file, config, message):
    rewrite(file, config=config)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        load_learner(file)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (lambda a: a.pop("params/head/bias"), r"'head/bias' is nothing, and .* needs float32\[3\]"),
        (lambda a: a.update({"params/more": np.ones(1, np.float32)}), r"'more' is float32\[1\], and .* needs nothing"),
        (lambda a: a.update({"params/head/bias": np.zeros(4, np.float32)}), r"'head/bias' is float32\[4\]"),
        (lambda a: a.update({"params/head/bias": np.zeros(3, np.float16)}), r"'head/bias' is float16\[3\]"),
        (
            lambda a: a.update({"params/head/bias": np.full(3, np.inf, np.float32)}),
            r"'head/bias' has values that are not",
        ),
        (lambda a: a.update({"other": np.zeros(3)}), r"is damaged or was not written by save_learner"),
        (lambda a: a.update({"params/head/bias": np.array([{}])}), r"is damaged or was not .*allow_pickle=False"),
    ],
)
def test_arrays_that_do_not_fit_are_named(file, arrays, message):
    rewrite(file, arrays=arrays)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        load_learner(file)


def test_damage_is_noticed_or_harmless(file, params):
    content = file.read_bytes()
    broken = [b"", b"text", content[: len(content) // 2], content[:-1]]
    for position in range(0, len(content), 197):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        broken.append(bytes(flipped))
    noticed = 0
    for other in broken:
        file.write_bytes(other)
        try:
            loaded = load_learner(file)
        except ValueError:
            noticed += 1
        else:  # such as the time in the directory of the archive
            chex.assert_trees_all_equal(loaded.params, params)
            assert loaded.config == MAML
    assert noticed > 0.8 * len(broken)


def test_a_file_without_a_configuration_and_a_missing_file_are_named(tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz is damaged or was not written by save_learner .*get it again"):
        load_learner(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.npz; `save_learner` writes such a file"):
        load_learner(tmp_path / "none.npz")


def test_the_file_of_a_published_network_is_small(tmp_path):
    config = dataclasses.replace(MAML, features=64, way=5)
    save_learner(tmp_path / "maml.npz", random_params(config), config)
    assert (tmp_path / "maml.npz").stat().st_size < 1_000_000
    assert portable.FORMAT == 1


@pytest.mark.parametrize("name", ["maml", "protonets"])
def test_the_files_of_the_project_learn_new_symbols(name):
    file = Path(__file__).parents[1] / "experiments" / "pretrained" / f"omniglot_{name}.npz"
    assert file.stat().st_size < 1e6
    steps = np.arange(5, 23)
    strokes = [(steps, 14), (14, steps), (steps, steps), (steps, 27 - steps), (5, steps)]

    def drawn(down, right):
        images = np.zeros((5, 28, 28, 1), np.float32)
        for image, (rows, columns) in zip(images, strokes, strict=True):
            for thick in (0, 1):
                image[rows + down + thick, columns + right] = 1.0
        return images

    queries = np.concatenate([drawn(1, 0), drawn(0, -2), drawn(-2, 1)])
    found = classify(load_learner(file), Batch(drawn(0, 0), np.arange(5)), queries)
    accuracy = np.mean(np.asarray(found).argmax(-1) == np.tile(np.arange(5), 3))
    assert accuracy >= 0.8, found
