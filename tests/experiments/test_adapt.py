"""Images of your own are classified from a few examples, and every mistake is named before anything is computed."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import adapt, runs
from experiments.cli import parse
from experiments.runs import RunError
from maml_jax import portable
from maml_jax.portable import PHOTOGRAPH, LearnerConfig, build_learner, classify, load_learner, save_learner
from maml_jax.tasks import drawings, image_folder

Image = pytest.importorskip("PIL.Image", reason="install Pillow with `pip install pillow`")

MAML = LearnerConfig(
    algorithm="maml", hyperparameters={"inner_lr": 0.5, "num_inner_steps": 1}, way=3, inner_steps=1, features=4
)
PROTONETS = LearnerConfig(algorithm="protonets", way=5, features=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of untrained learners by name."""
    directory = tmp_path_factory.mktemp("learners")
    for config in (MAML, PROTONETS):
        params = jax.jit(build_learner(config).init)(jax.random.key(0), np.zeros((5, 28, 28, 1), np.float32))
        save_learner(directory / f"{config.algorithm}.npz", params, config)
    return {name: directory / f"{name}.npz" for name in ("maml", "protonets")}


def draw(file, kind, shift=0, size=60):
    """A line in one of three directions, a little shifted."""
    pixels = np.full((size, size), 255, np.uint8)
    at = np.arange(10, size - 10)
    rows, columns = {"down": (at, 25 + 0 * at), "across": (25 + 0 * at, at), "slant": (at, at)}[kind]
    for width in range(4):
        pixels[rows + shift, columns + width] = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def task(tmp_path):
    """Class folders "across", "down" and "slant" in support, and two queries of each in query."""
    for index, kind in enumerate(("across", "down", "slant")):
        for shift in range(1 + index):
            draw(tmp_path / "support" / kind / f"{shift}.png", kind, shift)
        for shift in (4, 5):
            draw(tmp_path / "query" / kind / f"{shift}.png", kind, shift, size=70)
    return tmp_path


def run(*arguments):
    return adapt.run(parse(adapt.Config, "", [str(argument) for argument in arguments]))


def run_task(file, task, *options, query="query"):
    return run(file, "--support", task / "support", "--query", task / query, *options)


@pytest.mark.parametrize("algorithm", ["maml", "protonets"])
def test_images_are_classified_and_the_accuracy_is_printed(files, task, algorithm, capsys):
    answers = run_task(files[algorithm], task)
    names, images = drawings.read_classes(task / "support")
    loaded = load_learner(files[algorithm], way=3)
    query_names, queries = drawings.read_classes(task / "query")
    expected = classify(loaded, drawings.as_batch(images), drawings.as_inputs(np.concatenate(queries)))
    found = np.array([[query["probabilities"][name] for name in names] for query in answers["queries"]])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert answers["classes"] == names == query_names == ["across", "down", "slant"]
    assert answers["examples"] == [1, 2, 3]
    assert [query["class"] for query in answers["queries"]] == [
        Path(query["file"]).parent.name for query in answers["queries"]
    ]
    right = [query["predicted"] == query["class"] for query in answers["queries"]]
    assert answers["accuracy"] == np.mean(right)
    shown = capsys.readouterr().out
    assert f"accuracy {100 * np.mean(right):.1f} %: {sum(right)} of 6" in shown
    for query, row in zip(answers["queries"], expected, strict=True):
        assert query["confidence"] == pytest.approx(float(row.max()), abs=1e-6)
        assert f"{query['class']}/" in shown
    assert f"{100 * float(expected[0].max()):.1f}" in shown


def test_an_image_or_a_folder_of_images_will_do(files, task, capsys):
    everything = run_task(files["protonets"], task)["queries"]
    folder = run_task(files["protonets"], task, query="query/down")
    one = run_task(files["protonets"], task, query="query/down/4.png")
    assert "accuracy" not in folder
    capsys.readouterr()
    # One at a time, an answer does not depend on the other queries.
    for queries in (folder["queries"], one["queries"]):
        for query in queries:
            (same,) = [other for other in everything if other["file"] == query["file"]]
            assert query["probabilities"] == pytest.approx(same["probabilities"], abs=1e-5)
    assert [len(found["queries"]) for found in (folder, one)] == [2, 1]


def test_together_the_answers_depend_on_each_other(files, task, capsys):
    alone = run_task(files["protonets"], task, "--no-one-at-a-time", query="query/down/4.png")["queries"][0]
    together = run_task(files["protonets"], task, "--no-one-at-a-time", query="query/down")["queries"][0]
    assert alone["file"] == together["file"]
    assert abs(alone["confidence"] - together["confidence"]) > 1e-6
    assert "all images together" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_are_read_as_in_training(task, tmp_path, channels, capsys):
    shape = (16, 16, channels)
    config = LearnerConfig(algorithm="protonets", way=2, features=4, input_shape=shape, input_values=PHOTOGRAPH)
    params = jax.jit(build_learner(config).init)(jax.random.key(0), np.zeros((2, *shape), np.float32))
    save_learner(tmp_path / "photographs.npz", params, config)
    answers = run_task(tmp_path / "photographs.npz", task)
    read = {"size": 16, "colour": channels == 3}
    names, images = image_folder.read_classes(task / "support", **read)
    assert images[2].shape == (3, *shape)
    queries = image_folder.read_images(sorted((task / "query").rglob("*.png")), **read)
    loaded = load_learner(tmp_path / "photographs.npz", way=3)
    expected = classify(loaded, drawings.as_batch(images), drawings.as_inputs(queries))
    found = [[query["probabilities"][name] for name in names] for query in answers["queries"]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(RunError, match=r"--ink dark is for drawings, and this protonets takes photographs"):
        run_task(tmp_path / "photographs.npz", task, "--ink", "dark")
    capsys.readouterr()


def test_json_is_all_that_is_printed(files, task, capsys, monkeypatch):
    open_learner = adapt.open_learner

    def with_a_message(*args, **kwargs):
        runs.console.print("a checkpoint is damaged and left out")
        return open_learner(*args, **kwargs)

    monkeypatch.setattr(adapt, "open_learner", with_a_message)
    answers = run_task(files["protonets"], task, "--json")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == answers
    assert "left out" in printed.err


def test_many_classes_are_shown_without_a_column_for_each(files, task, capsys):
    for index in range(9):
        draw(task / "support" / f"class number {index}" / "a.png", "slant", index)
    answers = run_task(files["protonets"], task, query="query/down")
    assert len(answers["classes"]) == 12
    assert "confidence in %" in capsys.readouterr().out


def test_without_room_the_most_probable_classes_are_shown(monkeypatch):
    monkeypatch.setattr(adapt, "console", Console(width=120, file=io.StringIO()))
    names = [f"class number {index}" for index in range(5)]
    probabilities = dict(zip(names, (0.1, 0.4, 0.05, 0.3, 0.15), strict=True))
    query = {"file": "a.png", "predicted": names[1], "probabilities": probabilities}
    answers = {"algorithm": "maml", "classes": names, "examples": 5 * [1], "one_at_a_time": True, "queries": [query]}
    adapt.show(answers, Path("a.png"))
    shown = adapt.console.file.getvalue()
    assert "class number 1 40.0, class number 3 30.0, class number 4 15.0" in shown


def test_light_ink_may_be_named(files, task, capsys):
    before = run_task(files["protonets"], task)
    for file in task.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    assert run_task(files["protonets"], task, "--ink", "light") == before
    assert run_task(files["protonets"], task) == before
    with pytest.raises(ValueError, match=r"across/0\.png: there is no dark ink"):
        run_task(files["protonets"], task, "--ink", "dark")
    capsys.readouterr()


def test_outputs_that_are_not_finite_are_no_answer(files, task, monkeypatch):
    monkeypatch.setattr(adapt, "classify", lambda *task, **options: np.full((1, 3), np.nan))
    with pytest.raises(RunError, match=r"the outputs of maml are not finite: its inner steps diverge"):
        run_task(files["maml"], task, query="query/down/4.png")


@pytest.fixture
def no_computation(monkeypatch):
    """Fails if anything is computed."""

    def refuse(*arguments, **options):
        raise AssertionError("nothing should be computed")

    monkeypatch.setattr(adapt, "classify", refuse)
    monkeypatch.setattr(portable, "_program", refuse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: draw(t / "support" / "more" / "a.png", "slant"),
            r"support has 4 classes, and this maml takes exactly 3",
        ),
        (lambda t: (t / "support" / "more").mkdir(), r"support/more holds no image"),
        (lambda t: (t / "support" / "down" / "notes.txt").write_text("x"), r"down/notes\.txt is no image file"),
        (lambda t: (t / "support" / "down" / "0.png").write_text("x"), r"down/0\.png cannot be read as an image"),
        (lambda t: (t / "query" / "slant" / "4.png").write_text("x"), r"slant/4\.png cannot be read as an image"),
        (
            lambda t: (t / "query" / "slant").rename(t / "query" / "other"),
            r"query/other is named after none of the classes",
        ),
        (lambda t: draw(t / "query" / "a.png", "slant"), r"query/a\.png is no folder"),
        (lambda t: (t / "query").rename(t / "old"), r"there is no file or folder .*query; give --query an image"),
        (lambda t: (t / "support").rename(t / "old"), r"the folder .*support does not exist"),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(files, task, no_computation, change, message):
    change(task)
    with pytest.raises((RunError, ValueError, OSError), match=message):
        run_task(files["maml"], task)


def test_one_class_and_one_image_are_no_task(files, task, no_computation):
    draw(task / "one" / "a" / "a.png", "slant")
    with pytest.raises(ValueError, match=r"one holds 1 class folder; a task needs at least 2"):
        run(files["protonets"], "--support", task / "one", "--query", task / "query")
    with pytest.raises(ValueError, match=r"across/0\.png is no folder; .*one folder of images for each class"):
        run(files["protonets"], "--support", task / "support" / "across", "--query", task / "query")


def test_a_learner_that_cannot_be_used_is_named(files, task, no_computation, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*none\.npz; give the directory of a run"):
        run_task(tmp_path / "none.npz", task)
    with pytest.raises(RunError, match=r"support is no run directory: it holds no config\.json"):
        run_task(task / "support", task)
    (tmp_path / "text.npz").write_text("x")
    with pytest.raises(ValueError, match=r"text\.npz is damaged or was not written by save_learner"):
        run_task(tmp_path / "text.npz", task)
    config = LearnerConfig(algorithm="protonets", way=2, features=1, input_shape=(20, 20, 3))
    params = jax.jit(build_learner(config).init)(jax.random.key(0), np.zeros((2, 20, 20, 3), np.float32))
    save_learner(tmp_path / "small.npz", params, config)
    with pytest.raises(RunError, match=r"small\.npz takes images of shape \[20, 20, 3\] \(ink 1\.0"):
        run_task(tmp_path / "small.npz", task)
