"""Trained learners are tested on unbalanced episodes of several data sets, in miniature and on made-up images."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import classification, common, cross_domain, export, omniglot, packs, runs
from experiments.cli import parse
from experiments.cross_domain import Config
from experiments.runs import RunError
from maml_jax import CATALOGUE, Model, checkpoint, losses, maml, portable
from maml_jax.inner import class_means
from maml_jax.tasks import variable
from maml_jax.types import Batch, InnerInfo, MetaLearner

NUM_EXAMPLES = 12
KEYS = jax.random.split(jax.random.key(0), 6)


def make_run(run_dir, algorithm="protonets", **settings):
    """The directory of a run whose selected parameters are the initial ones plus a little."""
    settings = {"way": 3, "filters": 4, "seed": 7, "population": False} | settings
    config = dataclasses.replace(omniglot.METHODS[algorithm], **settings)
    config = omniglot.with_paper_defaults(config)
    run_dir.mkdir()
    runs.write_json(run_dir / "config.json", runs.as_json(config))
    inputs = np.zeros((config.way * config.shot, 28, 28, 1), np.float32)
    keys = runs.streams(config.seed)
    state = common.initial_state(
        classification.make_learner(config), common.outer_optimizer(config), inputs, keys.init, mesh=None
    )
    saved = common.load_state(run_dir / "checkpoints", state, config.ensemble)
    params = jax.tree.map(lambda leaf: leaf + 0.1, state.params)
    saved["best"] = common.keep_best(saved["best"], params, 0.5, 1, always=True)
    checkpoint.save(run_dir / "checkpoints", 1, saved)
    results = {"experiment": "omniglot", "algorithm": algorithm, "config": runs.as_json(config), "seed": 0}
    results |= {"metrics": {"accuracy": {"mean": [0.2, 0.987]}}, "protocol": {"normalisation": "transductive"}}
    runs.write_json(run_dir / "results.json", results)
    return run_dir


def made_up(name, *ignored):
    """Images whose class shows: one noisy picture for each of 6 classes."""
    rng = np.random.default_rng(packs.NAMES.index(name))
    shape = (32, 32, 3) if name == "signs" else (28, 28, 1)
    labels = np.repeat(np.arange(6), NUM_EXAMPLES)
    images = rng.integers(0, 200, (6, *shape))[labels] + rng.integers(0, 55, (len(labels), *shape))
    return packs.DataSet(images.astype(np.uint8), labels, None, "made up")


@pytest.fixture(scope="module", autouse=True)
def data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "load", made_up)
        yield made_up("digits")


@pytest.fixture(scope="module")
def selector(data):
    return variable.make_selector(data.labels, ways=(3, 4), mean_shots=(1, 2))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A run of ProtoNets, and one of MAML for 3 classes."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in ("protonets", "maml")}


def test_the_accuracy_is_that_of_a_plain_loop(directories, data, selector):
    # ProtoNets whose normalisation sees the whole support set, so that a padded image would change everything.
    (method,) = cross_domain.methods_of(directories["protonets"])
    network = classification.make_network(runs.stored_config(omniglot.METHODS, directories["protonets"]), None)
    _, params = method.at(3)
    embed, scores = jax.jit(network.apply), []
    for key in KEYS[:2]:
        selection = selector(key)
        way = len(selection.classes)
        sets = [data.images[examples].astype(np.float32) / 255 for examples in (selection.support, selection.query)]
        support, query = (np.asarray(embed(params, images), np.float64) for images in sets)
        starts = np.cumsum(selection.shots) - selection.shots
        means = [support[start : start + shot].mean(0) for start, shot in zip(starts, selection.shots, strict=True)]
        right = 0
        for index, embedding in enumerate(query):
            distances = [np.sum((embedding - mean) ** 2) for mean in means]
            right += int(np.argmin(distances)) == index // selection.query_shot
        scores.append(right / len(query))
        assert float(cross_domain.score(method, selection, data.images)) == pytest.approx(scores[-1])
        assert len(query) == way * 6
    assert max(scores) > 0.6  # it is more than chance, and a loop over wrong labels would not be


def test_each_combination_of_shapes_is_compiled_once(data):
    traced = []

    def at(way):
        traces = traced  # one learner a way, as a method has

        def adapt(meta_params, support, *, key=None, observe_fn=None):
            traces.append((way, support.inputs.shape[0]))
            return class_means(support.inputs.reshape(len(support.inputs), -1), support.targets, way), InnerInfo(0.0)

        def predict(means, inputs):
            return inputs.reshape(len(inputs), -1) @ means.T

        return learners.setdefault(way, MetaLearner(None, adapt, predict, None)), {}

    learners = {}
    method = cross_domain.pixels((28, 28, 1))._replace(at=at)
    selector = variable.make_selector(data.labels, ways=(3, 6), mean_shots=(1, 2, 4))
    selections = [selector(key) for key in jax.random.split(jax.random.key(1), 40)]
    for selection in selections:
        cross_domain.score(method, selection, data.images)
    shapes = {(len(s.classes), len(s.support)) for s in selections}
    assert sorted(traced) == sorted(shapes)
    assert shapes == {(way, way * mean) for way in (3, 6) for mean in (1, 2, 4)}


def test_the_first_columns_are_those_of_a_network_without_the_others(tmp_path, data):
    run_dir = make_run(tmp_path / "maml", "maml", way=5, eval_inner_steps=2)
    config = runs.stored_config(omniglot.METHODS, run_dir)
    (method,) = cross_domain.methods_of(run_dir)
    selection = variable.make_selector(data.labels, ways=[3], mean_shots=(1, 2))(KEYS[0])
    support, query, _ = selection.episode(data.images)
    learner, params = method.at(3)

    def predicted(learner, params):
        return jax.jit(lambda params: learner.predict(learner.adapt(params, support)[0], query.inputs))(params)

    outputs = predicted(learner, params)
    assert outputs.shape == (18, 3)

    whole = classification.make_network(config, 5)
    narrow = Model(whole.init, lambda params, inputs: whole.apply(params, inputs)[:, :3])
    where = None if config.adapt_norm else lambda name: "norm" not in name
    reference = maml(narrow, losses.cross_entropy, inner_optimizer=optax.sgd(2.0), num_inner_steps=2, where=where)
    trained = method.at(5)[1]
    wanted = predicted(reference, trained)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-4, atol=1e-4)
    before = reference.predict(trained, query.inputs)
    assert np.abs(wanted - before).max() > 0.1  # it has adapted


@pytest.mark.parametrize(
    "algorithm", [name for name in omniglot.METHODS if not CATALOGUE[name].classifies and name != "maml"]
)
def test_every_method_with_a_last_layer_takes_fewer_classes(tmp_path, data, algorithm):
    run_dir = make_run(tmp_path / algorithm, algorithm, way=5, ensemble=2 if algorithm == "maml++" else 1)
    (method,) = cross_domain.methods_of(run_dir)
    learner, params = method.at(3)
    support, query, _ = variable.make_selector(data.labels, ways=[3])(KEYS[0]).episode(data.images)
    outputs = jax.eval_shape(lambda params: learner.predict(learner.adapt(params, support)[0], query.inputs), params)
    assert outputs.shape == (18, 3)
    with pytest.raises(ValueError, match=r"way=6 exceeds the 5 outputs .* train with --way 6"):
        method.at(6)


def test_an_axis_that_counts_no_classes_is_not_cut():
    learner = MetaLearner(lambda key, inputs: {"w": jnp.zeros((4, 3))}, None, None, None)
    with pytest.raises(ValueError, match="an axis of 6 entries cannot be cut to 4"):
        cross_domain.first_columns({"w": jnp.zeros((6, 5))}, learner, (28, 28, 1), 5, 3)
    cut = cross_domain.first_columns({"w": jnp.arange(20.0).reshape(4, 5)}, learner, (28, 28, 1), 5, 3)
    np.testing.assert_array_equal(cut["w"], np.arange(20.0).reshape(4, 5)[:, :3])


def test_what_cannot_be_tested_says_why(tmp_path, directories):
    (method,) = cross_domain.methods_of(directories["maml"])
    assert method.refusal((3,)) is None
    assert method.refusal((2, 3)) is None
    assert method.refusal((3, 4)) == "up to 3 ways only"
    (method,) = cross_domain.methods_of(make_run(tmp_path / "mann", "mann", network="pixels"))
    assert method.refusal((3,)) is None
    assert method.refusal((2, 3)) == "3 ways only"
    (method,) = cross_domain.methods_of(directories["protonets"])
    assert method.refusal((2, 20)) is None
    leo = tmp_path / "leo"
    leo.mkdir()
    runs.write_json(leo / "config.json", runs.as_json(omniglot.with_paper_defaults(omniglot.METHODS["leo"])))
    (method,) = cross_domain.methods_of(leo)
    assert method.refusal((5,)) == "takes embeddings and no images"
    with pytest.raises(RunError, match="none of the learners can be tested: LEO"):
        cross_domain.run(Config((leo,), run_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_pretrained_classifier_has_a_row_for_each_head(tmp_path, data, selector):
    run_dir = make_run(tmp_path / "pre", "pretrained-classifier", eval_inner_steps=3)
    methods = cross_domain.methods_of(run_dir, ("centroid", "linear"))
    assert [method.label for method in methods] == [
        "pretrained on all classes, centroid (pre)",
        "pretrained on all classes, linear (pre)",
    ]
    selection = selector(KEYS[0])
    support, query, _ = selection.episode(data.images)
    for method, largest in zip(methods, (1.0, np.inf), strict=True):
        learner, params = method.at(len(selection.classes))
        outputs = learner.predict(learner.adapt(params, support)[0], query.inputs)
        assert np.abs(outputs).max() <= largest + 1e-5  # cosines, or scores of a trained layer
    assert np.abs(outputs).max() > 1e-3


@pytest.mark.parametrize("algorithm", ["protonets", "maml"])
def test_a_file_of_export_is_tested_as_the_run_is(tmp_path, directories, data, algorithm):
    file = tmp_path / f"{algorithm}.npz"
    config = export.config_of_run(directories[algorithm])
    portable.save_learner(file, runs.load(directories[algorithm]).params, config)
    (of_run,), (of_file,) = (cross_domain.methods_of(path) for path in (directories[algorithm], file))
    assert (of_file.normalisation, of_file.way, of_file.is_fixed) == (of_run.normalisation, of_run.way, of_run.is_fixed)
    assert "python -m experiments.omniglot" in of_file.training
    selector = variable.make_selector(data.labels, ways=[2], mean_shots=[1])
    for key in KEYS[:2]:
        selection = selector(key)
        assert cross_domain.score(of_file, selection, data.images) == cross_domain.score(of_run, selection, data.images)


@pytest.mark.parametrize("head", ["linear", "fine-tuned"])
def test_a_head_of_a_file_takes_its_own_steps(tmp_path, head):
    of_head = dataclasses.replace(omniglot.METHODS["pretrained-classifier"].hyperparameters, head=head)
    run_dir = make_run(tmp_path / "pre", "pretrained-classifier", eval_inner_steps=3, hyperparameters=of_head)
    config = export.config_of_run(run_dir)
    portable.save_learner(tmp_path / "pre.npz", runs.load(run_dir).params, config)
    support = Batch(np.zeros((2, *config.input_shape), np.float32), np.arange(2))
    for path in (run_dir, tmp_path / "pre.npz"):
        for method, steps in zip(cross_domain.methods_of(path, ("linear", "fine-tuned")), (3, 15), strict=True):
            learner, params = method.at(2)
            found = jax.eval_shape(lambda params, learner=learner: learner.adapt(params, support)[1], params)
            assert found.support_loss.shape == (steps,)


def test_ranks_by_hand():
    # The mean of 0.025 of the gaps 0.1, -0.1, 0.1, 0 between the first two has a half-width of 0.15: one group. That
    # of the third, 0.45, has 0.09: it is worse. The fourth is below it by 0.025 ± 0.08: they share the third and
    # fourth place. The order of the rows does not matter.
    accuracies = np.array([[0.3, 0.2, 0.3, 0.1], [0.8, 0.6, 0.8, 0.6], [0.3, 0.2, 0.3, 0.2], [0.7, 0.7, 0.7, 0.6]])
    assert cross_domain.ranks(accuracies).tolist() == [3.5, 1.5, 3.5, 1.5]
    assert cross_domain.ranks(accuracies[[1]]).tolist() == [1.0]
    assert cross_domain.ranks(np.full((3, 4), 0.5)).tolist() == [2.0, 2.0, 2.0]
    # Paired: each is exactly 0.1 below the one before in every episode, however much the episodes differ.
    apart = np.array([0.9, 0.2, 0.5, 0.7]) - 0.1 * np.arange(3)[:, None]
    assert cross_domain.ranks(apart).tolist() == [1.0, 2.0, 3.0]


def test_outputs_that_are_not_finite_classify_nothing():
    metric = cross_domain.as_metric(np.array([0.5, np.nan, 1.0]))
    assert metric["mean"] == [0.5]
    assert metric["num_nonfinite"] == [1]
    # The standard deviation of 0.5, 0, 1 is 0.5, and Student's t with 2 degrees of freedom has 4.3027.
    assert metric["ci95"] == [pytest.approx(4.302653 * 0.5 / np.sqrt(3))]
    assert "num_nonfinite" not in cross_domain.as_metric(np.array([0.5, 0.6]))


def test_a_whole_run(tmp_path, directories, capsys, monkeypatch):
    config = Config(
        tuple(directories.values()), data_sets=("digits", "signs"), ways=(4,), episodes=4, run_dir=tmp_path / "out"
    )
    results = cross_domain.run(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert (tmp_path / "out" / "figures" / "accuracy.png").stat().st_size > 1000
    protonets, of_maml, baseline = results["methods"]
    assert of_maml["data_sets"] == {name: {"not_tested": "up to 3 ways only"} for name in ("digits", "signs")}
    assert of_maml["average_rank"] is None
    for record in (protonets, baseline):
        of_sets = record["data_sets"].values()
        assert record["average_rank"] == pytest.approx(np.mean([found["rank"] for found in of_sets]))
        assert all(0 <= found["accuracy"]["mean"][0] <= 1 for found in of_sets)
    for name in ("digits", "signs"):
        assert sum(record["data_sets"][name]["rank"] for record in (protonets, baseline)) == 3
        assert baseline["data_sets"][name]["accuracy"]["mean"][0] > 0.9  # the pictures of a class are alike
        assert results["data_sets"][name] == {
            "about": "made up", "classes": 6, "images": 72, "ways": [4], "query_shot": 6, "chance": 0.25,
        }  # fmt: skip
    printed = capsys.readouterr().out
    assert "nearest pixels, 28x28 grey" in printed
    assert "transductive" in printed

    with monkeypatch.context() as patched:  # a finished test is not repeated
        patched.setattr(cross_domain, "measure", None)
        (tmp_path / "out" / "figures" / "accuracy.png").unlink()
        assert cross_domain.run(config) == results
        assert (tmp_path / "out" / "figures" / "accuracy.png").exists()
    assert "accuracy in %, 4 episodes of each data set" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        others = lambda name, *ignored: made_up(name)._replace(images=255 - made_up(name).images)  # noqa: E731
        patched.setattr(packs, "load", others)
        with pytest.raises(RunError, match="was made with other data"):
            cross_domain.run(config)
    stored = tmp_path / "out" / "results.json"
    stored.write_text(json.dumps(results | {"learners_sha256": "of another network"}))
    with pytest.raises(RunError, match=r"holds a test of other learners: those at .* have changed since"):
        cross_domain.run(config)

    again = cross_domain.run(dataclasses.replace(config, learners=config.learners[:1], run_dir=tmp_path / "again"))
    assert again["methods"][0]["data_sets"]["signs"]["accuracy"] == protonets["data_sets"]["signs"]["accuracy"]
    other = dataclasses.replace(config, learners=config.learners[:1], run_dir=tmp_path / "other", seed=1)
    assert cross_domain.run(other)["methods"][0]["data_sets"] != again["methods"][0]["data_sets"]


def test_an_interrupted_test_goes_on_with_the_data_set_where_it_was(tmp_path, directories, monkeypatch):
    config = Config(
        (directories["protonets"],), data_sets=("digits", "signs"), ways=(3,), episodes=4, run_dir=tmp_path / "out"
    )
    measured, measure = [], cross_domain.measure

    def interrupted(config, name, *arguments):
        if name == "signs" and "signs" not in measured:
            measured.append(name)
            raise KeyboardInterrupt
        measured.append(name)
        return measure(config, name, *arguments)

    monkeypatch.setattr(cross_domain, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cross_domain.run(config)
    results = cross_domain.run(config)
    assert measured == ["digits", "signs", "signs"]
    assert not list((tmp_path / "out").glob("measured_*"))
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "load", made_up)
        whole = cross_domain.run(dataclasses.replace(config, run_dir=tmp_path / "whole"))
    assert results["methods"] == whole["methods"]


def test_learners_are_told_apart_by_their_names(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b[").mkdir()  # read as markup, "[/0.4]" would be an error
    given = make_run(tmp_path / "a" / "0.4]", inductive=True), make_run(tmp_path / "b[" / "0.4]")
    other = make_run(tmp_path / "rate-0.01")
    assert cross_domain.methods_of(other)[0].label == "ProtoNets (rate-0.01)"
    assert [cross_domain.methods_of(path)[0].one_query_at_a_time for path in given] == [True, False]
    config = Config(given, data_sets=("digits",), ways=(4,), episodes=2, run_dir=tmp_path / "out")
    labels = [record["label"] for record in cross_domain.run(config)["methods"][:2]]
    assert labels == ["ProtoNets (a/0.4])", "ProtoNets (b[/0.4])"]
    assert "digits: ProtoNets (b[/0.4]): " in capsys.readouterr().out
    assert cross_domain.short_names([Path("x/a.npz"), Path("y/a.npz"), Path("b")]) == ["x/a", "y/a", "b"]
    assert cross_domain.short_names([Path("a.npz"), Path("a.zip")]) == ["a.npz", "a.zip"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for record, name in zip(results["methods"], ("one", "two", "pixels"), strict=True):
        record["label"] = name
    capsys.readouterr()
    cross_domain.show(results)
    printed = capsys.readouterr().out
    assert "one*" not in printed
    assert "two*" in printed


def test_mistakes_are_named_before_anything_is_written(tmp_path, directories):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing; give a run directory, or an .npz"):
        cross_domain.methods_of(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"holds no config\.json"):
        cross_domain.methods_of(tmp_path)
    runs.write_json(tmp_path / "config.json", {"experiment": "sinusoid", "algorithm": "maml"})
    with pytest.raises(RunError, match=r"is a run of experiments\.sinusoid, which does not classify"):
        cross_domain.methods_of(tmp_path)
    (tmp_path / "bad.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"bad\.npz is damaged"):
        cross_domain.methods_of(tmp_path / "bad.npz")
    learner = (directories["protonets"],)
    for settings, message in (
        ({"learners": ()}, "no learner is given"),
        ({"learners": learner * 2}, "--learners must hold something, and nothing twice"),
        ({"ways": (1,)}, "--ways must be an integer of at least 2"),
        ({"episodes": 1}, "--episodes"),
        ({"data_sets": ()}, "--data-sets must hold"),
        ({"seed": 2**32}, "--seed 4294967296 does not fit into 32 bits"),
        ({"run_dir": Path("")}, "--run-dir is empty or the current directory"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**{"learners": learner} | settings)
    with pytest.raises(ValueError, match=r"none of the ways \[7\] is at most the 6 classes"):
        cross_domain.run(Config(learner, ways=(7,), run_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_line():
    assert parse(Config, "", ["a", "--run-dir=~/out"]).run_dir == Path.home() / "out"
    config = parse(Config, "", ["a", "b.npz", "--data-sets", "digits", "faces", "--ways", "5", "--heads", "linear"])
    assert [path.name for path in config.learners] == ["a", "b.npz"]
    assert (config.data_sets, config.ways, config.heads) == (("digits", "faces"), (5,), ("linear",))


def test_near_copies_count_once(tmp_path, directories, monkeypatch):
    # Twelve images of a class in six pairs of near copies are six examples, fewer than MIN_EXAMPLES.
    pairs = np.arange(72) // 2
    monkeypatch.setattr(packs, "load", lambda name, *ignored: made_up(name)._replace(groups=pairs))
    config = Config((directories["protonets"],), data_sets=("digits",), ways=(3,), episodes=2, run_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="min_examples=10 leaves out all classes; the largest has 6"):
        cross_domain.run(config)
