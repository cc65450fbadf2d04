"""What is drawn of an adaptation is what the test of the run has scored, and mistakes are marked."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import classification, common, omniglot, pictures, retest, runs, show, sinusoid
from experiments.cli import parse
from experiments.runs import RunError
from maml_jax import checkpoint
from maml_jax.tasks import few_shot
from maml_jax.tasks import omniglot as omniglot_data

WAVES = {"eval_query_shot": 7, "eval_inner_steps": 3, "eval_shots": (5,)}
CHARACTERS = {"way": 3, "shot": 2, "query_shot": 4}
LOAD = omniglot_data.load


def untrained(run_dir, config, learner, inputs):
    """A run that has saved its initial parameters and is not finished."""
    with runs.open_run(run_dir, config):
        optimizer = common.outer_optimizer(config)
        state = common.initial_state(learner, optimizer, inputs, runs.streams(config.seed).init, None)
        saved = common.load_state(run_dir / "checkpoints", state)
        best = common.keep_best(saved["best"], state.params, 0.0, 1, always=True)
        checkpoint.save(run_dir / "checkpoints", 1, saved | {"best": best})


@pytest.fixture(scope="module")
def drawings():
    """Random characters in place of the data set; the images of its test split."""
    images = np.random.default_rng(0).integers(0, 2, (30, 20, 28, 28, 1)).astype(np.uint8) * 255
    parts = {"train": images[:15], "val": images[15:22], "test": images[22:]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maml_jax.tasks.omniglot.load", lambda split, data_dir=None, split_by="character": parts[split])
        yield parts["test"]


@pytest.fixture(scope="module")
def saved(drawings, tmp_path_factory):
    """Runs by name."""
    where = tmp_path_factory.mktemp("saved")
    for algorithm, num_inputs in (("maml", 1), ("oracle", 3)):
        config = sinusoid.with_paper_defaults(dataclasses.replace(sinusoid.METHODS[algorithm], **WAVES))
        learner = sinusoid.make_learner(config, 0.01, 1)
        untrained(where / algorithm, config, learner, np.zeros((5, num_inputs), np.float32))
    # The rate of the oracle is chosen in its test.
    of_test = {"shot": 5, "inner_lr": 0.3, "metrics": {"mse": {}}}
    results = {"experiment": "sinusoid", "algorithm": "oracle", "config": {}, "seed": 0, "evaluations": [of_test]}
    results |= {"protocol": {}, "metrics": of_test["metrics"]}
    runs.write_json(where / "oracle" / "results.json", results)
    of_images = {"fomaml": {"network": "mlp"}, "protonets": {"train_way": 3, "filters": 2, "pooling": False}}
    for algorithm, settings in of_images.items():
        config = dataclasses.replace(omniglot.METHODS[algorithm], **CHARACTERS | settings)
        config = omniglot.with_paper_defaults(config)
        images = np.zeros((6, 28, 28, 1), np.float32)
        untrained(where / algorithm, config, omniglot.make_learner(config), images)
    shutil.copytree(where / "fomaml", where / "inductive")
    stored = runs.read_json(where / "inductive" / "config.json")
    runs.write_json(where / "inductive" / "config.json", stored | {"inductive": True, "eval_inner_steps": 1})
    return where


@pytest.fixture
def drawn(monkeypatch):
    """What is given to the drawing functions."""
    tasks = []
    for name in ("adapting_curve", "adapting_images"):
        monkeypatch.setattr(pictures, name, lambda files, task: tasks.append(task))
    return tasks


def run(*arguments):
    return show.run(parse(show.Config, "", [str(argument) for argument in arguments]))


def scores_of(run_dir, num_episodes):
    (test,) = retest.tests(retest.open_run(run_dir))
    return test.score(11, 0)[:num_episodes]  # not divisible over the devices of the tests


@pytest.mark.parametrize("algorithm", ["maml", "oracle"])
def test_the_curves_are_those_of_the_test(algorithm, saved, drawn, capsys):
    run(saved / algorithm, "--episodes", 2)
    np.testing.assert_allclose([task.query_error for task in drawn], scores_of(saved / algorithm, 2), rtol=1e-4)
    sampler = sinusoid.sinusoid.make_sampler(shot=5, query_shot=7, oracle=True)
    for index, task in enumerate(drawn):
        episode = sampler(jax.random.fold_in(runs.streams(0).test, index))
        x, amplitude, phase = np.asarray(episode.support.inputs).T
        y = np.asarray(episode.support.targets)[:, 0]
        np.testing.assert_array_equal(task.support, [x, y])
        np.testing.assert_allclose(np.interp(x, task.x, task.true), y, atol=0.01)
        assert f"amplitude {amplitude[0]:.1f}, phase {phase[0]:.1f} radians, 5 support points" in task.title
        assert task.predicted.shape == (4, 200)
        # The drawn curve passes through what was scored on the support points.
        at_support = np.stack([np.interp(x, task.x, predicted) for predicted in task.predicted])
        np.testing.assert_allclose(np.mean((at_support - y) ** 2, axis=1), task.support_error, rtol=0.05)
    errors = drawn[1].query_error
    assert f"episode 1: mean squared error {errors[0]:.3g} before, {errors[-1]:.3g} after 3 steps" in (
        capsys.readouterr().out
    )


def unturned(image):
    """The same for all rotations of an image."""
    return min(np.rot90(image, turns).astype(np.float32).tobytes() for turns in range(4))


@pytest.mark.parametrize(("algorithm", "num_steps"), [("fomaml", 3), ("inductive", 1), ("protonets", 0)])
def test_the_images_are_those_of_the_test(algorithm, num_steps, saved, drawings, drawn, capsys):
    run(saved / algorithm, "--episodes", 2)
    accuracy = [np.mean(task.probabilities.argmax(-1) == task.query_labels, axis=1) for task in drawn]
    np.testing.assert_allclose(accuracy, scores_of(saved / algorithm, 2), atol=1e-6)
    for task in drawn:
        assert task.probabilities.shape == (num_steps + 1, 12, 3)
        np.testing.assert_allclose(task.probabilities.sum(-1), 1, atol=1e-5)
        assert task.support_labels.tolist() == [0, 0, 1, 1, 2, 2]
        # Up to its rotation, every image is a drawing of the character of its label, and none is in both sets.
        shown = [unturned(image) for image in (*task.support_images, *task.query_images)]
        labels = [*task.support_labels, *task.query_labels]
        assert len(set(zip(labels, shown, strict=True))) == 18
        character = {unturned(image / 255): index for index, of_one in enumerate(drawings) for image in of_one}
        assert len({(label, character[image]) for label, image in zip(labels, shown, strict=True)}) == 3
    words = capsys.readouterr().out
    assert ("after 3 steps" in words) == (num_steps == 3)
    assert f"episode 0: accuracy {100 * accuracy[0][0]:.0f} %" in words


def test_figures_are_written_as_png_and_pdf(saved, tmp_path):
    for algorithm in ("maml", "fomaml"):
        files = run(saved / algorithm, "--episodes", 1, "--out", tmp_path / algorithm)
        assert [file.name for file in files] == ["adaptation_0_0.png", "adaptation_0_0.pdf"]
        assert files[0].read_bytes().startswith(b"\x89PNG")
        assert files[1].read_bytes().startswith(b"%PDF")
        assert sorted((tmp_path / algorithm).iterdir()) == sorted(files)


def test_embeddings_are_shown_as_the_images_that_they_are_of(drawings, monkeypatch):
    monkeypatch.setattr(classification, "digest_of", lambda data, config: "")  # there is no pretrained network
    # What a network with --network features sees are the embeddings of all rotations; here, the pixels themselves.
    config = dataclasses.replace(
        omniglot.METHODS["leo"], network="features", pretrained_run=Path("a-run"), way=4, shot=2, query_shot=3,
        rotations=True, rotated_classes=True, rotated_test_classes=True,
    )  # fmt: skip
    pixels = np.concatenate([np.rot90(drawings, turns, (2, 3)) for turns in range(4)]).astype(np.float32) / 255
    seen = few_shot.make_sampler(pixels, way=4, shot=2, query_shot=3)
    shown = retest.image_sampler(retest.Run("", Path("none"), "omniglot", config, omniglot.DATA, None))
    for key in jax.random.split(jax.random.key(0), 5):
        for part in ("support", "query"):
            a, b = (getattr(sampler(key), part) for sampler in (seen, shown))
            np.testing.assert_array_equal(a.inputs, b.inputs)
            np.testing.assert_array_equal(a.targets, b.targets)


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.fixture
def figures_drawn(monkeypatch):
    """The figures that would be written."""
    saved = []
    monkeypatch.setattr(pictures, "save", lambda figure, file: saved.append(figure))
    return saved


def image_task(probabilities, channels=1):
    """Three classes, one support and two query images of each, with queries ordered by class."""
    num_steps = len(probabilities)
    images = np.random.default_rng(0).random((9, 8, 8, channels))
    return pictures.ImageTask(
        "title",
        images[:3],
        np.arange(3),
        images[3:],
        np.repeat(np.arange(3), 2),
        np.reshape(probabilities, (num_steps, 6, 3)),
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_mistakes_are_marked_by_more_than_colour(channels, figures_drawn):
    right = np.repeat(np.eye(3) * 0.7 + 0.1, 2, axis=0)
    wrong_twice = right.copy()
    wrong_twice[[0, 3]] = right[[2, 4]]  # of classes A and B, taken for B and C
    wrong_once = right.copy()
    wrong_once[3] = right[4]
    pictures.adapting_images(["a.png"], image_task([wrong_twice, wrong_once], channels))
    (figure,) = figures_drawn
    bars = [patch for axes in figure.axes for patch in axes.patches]
    assert sum(patch.get_fill() and patch.get_facecolor()[:3] == (1, 1, 1) for patch in bars) == 3
    assert sum(patch.get_linewidth() > 2 for patch in bars) == 1
    found = texts(figure)
    assert found.count("✗") == 1  # on the query that is wrong in the end
    assert [text for text in found if text.startswith("✗ ")] == ["✗ B  80 %", "✗ C  80 %", "✗ C  80 %"]
    assert found.count("A  80 %") == 3
    assert {"before", "1 step", "support", "query", "A", "B", "C"} <= set(found)


@pytest.mark.parametrize("is_ink", [True, False])
def test_ink_is_dark_and_light_is_light(is_ink, figures_drawn):
    pictures.adapting_images(["a.png"], image_task([np.repeat(np.eye(3), 2, axis=0)])._replace(is_ink=is_ink))
    drawn = [image for axes in figures_drawn[0].axes for image in axes.images]
    assert {sum(image.cmap(1.0)[:3]) for image in drawn} == {0.0 if is_ink else 3.0}


def test_a_single_prediction_has_no_steps(figures_drawn):
    pictures.adapting_images(["a.png"], image_task([np.repeat(np.eye(3), 2, axis=0)]))
    assert not {"before", "1 step"} & set(texts(figures_drawn[0]))
    assert not any("✗" in text for text in texts(figures_drawn[0]))


def test_what_is_left_out_is_said(figures_drawn):
    way, shot = 20, 7
    labels = np.repeat(np.arange(way), shot)
    images = np.zeros((len(labels), 4, 4, 1))
    probabilities = np.tile(np.eye(way)[labels], (31, 1, 1))
    pictures.adapting_images(["a.pdf"], pictures.ImageTask("title", images, labels, images, labels, probabilities))
    (note,) = [text for text in texts(figures_drawn[0]) if text.startswith("Shown:")]
    assert (
        note
        == "Shown: 5 of 7 support images of each class, 1 of 7 query images of each class, some of the inner steps."
    )
    assert sum(text == "T  100 %" for text in texts(figures_drawn[0])) == pictures.MAX_STEPS


@pytest.mark.parametrize(
    ("num_steps", "most", "expected"),
    [(0, 6, [0]), (5, 6, [0, 1, 2, 3, 4, 5]), (10, 6, [0, 1, 2, 3, 6, 10]), (50, 6, [0, 1, 3, 7, 19, 50])],
)
def test_the_first_steps_and_the_last_are_shown(num_steps, most, expected):
    assert pictures.steps_to_show(num_steps, most) == expected


def test_numbers_that_are_not_finite_are_named(figures_drawn, tmp_path):
    x = np.linspace(-1, 1, 5)
    predicted = np.stack([x, np.full(5, np.nan)])
    error = np.array([0.5, np.nan])
    curve = pictures.CurveTask("title", x, x, (x[:2], x[:2]), predicted, error, error)
    pictures.adapting_curve([tmp_path / "a.png"], curve)
    titles = [axes.get_title() for axes in figures_drawn[0].axes]
    assert titles[:2] == ["before: error 0.5", "1 step: error not finite"]
    pictures.adapting_images(["a.png"], image_task([np.full((6, 3), np.nan)]))
    assert texts(figures_drawn[1]).count("✗ not finite") == 6


def test_mistakes_are_named(saved, tmp_path):
    domain = tmp_path / "domain"
    domain.mkdir()
    stored = {"experiment": "domains", "algorithm": "erm", "held_out": "75"}
    (domain / "config.json").write_text(json.dumps(stored))
    unsaved = tmp_path / "unsaved"
    shutil.copytree(saved / "maml", unsaved)
    shutil.rmtree(unsaved / "checkpoints")
    for run_dir, message in (
        (tmp_path / "none", "is no run directory"),
        (domain, "there are no pictures of runs of experiments.domains"),
        (unsaved, "holds no checkpoint"),
    ):
        with pytest.raises(RunError, match=message):
            run(run_dir)
    (tmp_path / "file").touch()
    for settings, message in (
        ({"episodes": 0}, "--episodes must be an integer of at least 1"),
        ({"out": tmp_path / "file"}, "is a file; name a directory"),
        ({"seed": -1}, "--seed must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            show.Config(run_dir=saved / "maml", **settings)


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="set TFDS_DATA_DIR to the directory of omniglot/3.0.0")
def test_real_characters_are_dark_ink_on_white(monkeypatch):
    monkeypatch.setattr(omniglot_data, "load", LOAD)
    config = dataclasses.replace(omniglot.METHODS["maml"], query_shot=1)
    episode = retest.image_sampler(retest.Run("", Path("none"), "omniglot", config, omniglot.DATA, None))(
        jax.random.key(0)
    )
    # `adapting_images` draws 1 as black: the ink, which is the smaller part.
    assert 0 < np.mean(episode.query.inputs) < 0.3
