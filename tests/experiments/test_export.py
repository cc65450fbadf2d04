"""A run of experiments.omniglot or experiments.images becomes a file that predicts as the run does."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest

from experiments import adapt, common, export, images, omniglot, runs, sinusoid
from experiments.cli import parse
from experiments.runs import RunError
from maml_jax import Batch, checkpoint
from maml_jax.portable import INK, PHOTOGRAPH, load_learner, outputs_by_step
from maml_jax.tasks.image_folder import ClassImages

SUPPORT = Batch(np.random.default_rng(0).random((6, 28, 28, 1)).astype(np.float32), np.arange(6, dtype=np.int32) % 3)
QUERIES = np.random.default_rng(1).random((4, 28, 28, 1)).astype(np.float32)
PHOTOGRAPHS = Batch(np.random.default_rng(2).random((6, 16, 16, 3)).astype(np.float32), SUPPORT.targets)
NEW_PHOTOGRAPHS = np.random.default_rng(3).random((4, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def drawings():
    """Random images in place of the data sets, which a run with --population reads again."""
    draw = np.random.default_rng(0).integers
    drawn = draw(0, 2, (15, 20, 28, 28, 1)).astype(np.uint8) * 255
    photographs = ClassImages(tuple("abc"), tuple(draw(0, 256, (3, 20, 16, 16, 3)).astype(np.uint8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniglot.omniglot, "load", lambda split, data_dir, split_by: drawn)
        patch.setattr(images, "read_classes", lambda config, split: photographs)
        yield


def make_run(run_dir, algorithm="maml", *, module=omniglot, is_finished=True, **settings):
    """The directory of a run whose selected parameters are the initial ones plus a little."""
    config = dataclasses.replace(module.METHODS[algorithm], way=3, filters=4, seed=7, **settings)
    config = module.with_paper_defaults(config)
    run_dir.mkdir()
    runs.write_json(run_dir / "config.json", runs.as_json(config))
    inputs = np.zeros((3, *module.DATA.input_shape(config)), np.float32)
    learner, keys = module.make_learner(config), runs.streams(config.seed)
    state = common.initial_state(learner, common.outer_optimizer(config), inputs, keys.init, mesh=None)
    saved = common.load_state(run_dir / "checkpoints", state, config.ensemble)
    params = jax.tree.map(lambda leaf: leaf + 0.1, state.params)
    saved["best"] = common.keep_best(saved["best"], params, 0.5, 1, always=True)
    checkpoint.save(run_dir / "checkpoints", 1, saved)
    if is_finished:
        runs.write_json(
            run_dir / "results.json",
            {
                "experiment": config.experiment,
                "algorithm": config.algorithm,
                "config": runs.as_json(config),
                "seed": 0,
                "metrics": {"accuracy": {"mean": [0.2, 0.987]}},
                "protocol": {"normalisation": "transductive"},
            },
        )
    return run_dir


@pytest.fixture(scope="module")
def maml(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "maml")


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("maml", {"eval_inner_steps": 1, "adapt_norm": True, "norm_scale": True}),
        ("maml", {"eval_inner_steps": 1, "flatten": True, "population": True}),
        ("reptile", {"eval_inner_steps": 1}),
        pytest.param("cavia", {"eval_inner_steps": 1}, marks=pytest.mark.slow),
        pytest.param("r2d2", {}, marks=pytest.mark.slow),
        ("protonets", {"pooling": False}),
        ("protonets", {"module": images, "size": 16}),
    ],
)
def test_the_file_predicts_as_the_run_does(tmp_path, algorithm, settings):
    run_dir = make_run(tmp_path / "run", algorithm, **settings)
    support, queries = (SUPPORT, QUERIES) if "module" not in settings else (PHOTOGRAPHS, NEW_PHOTOGRAPHS)
    export.run(export.Config(run_dir, tmp_path / "made" / "learner.npz"))
    learner, params, config = load_learner(tmp_path / "made" / "learner.npz")
    learner_of_run, params_of_run, _ = runs.load(run_dir)
    chex.assert_trees_all_equal(params, params_of_run)
    chex.assert_trees_all_close(
        outputs_by_step(learner, params, support, queries),
        outputs_by_step(learner_of_run, params_of_run, support, queries),
        atol=1e-6,
    )
    assert (config.algorithm, config.way, config.features) == (algorithm, 3, 4)
    assert config.input_values == (INK if support is SUPPORT else PHOTOGRAPH)
    from_run = adapt.open_learner(run_dir, way=3)
    assert from_run.config == config
    chex.assert_trees_all_equal(from_run.params, params)


def test_the_file_says_how_it_was_made(maml, tmp_path):
    export.run(export.Config(maml, tmp_path / "maml.npz"))
    made_by = load_learner(tmp_path / "maml.npz").config.made_by
    command, _, accuracy = made_by.partition(" (")
    assert command.startswith("python -m experiments.omniglot maml --")
    for flags in ("--way 3", "--filters 4", "--seed 7"):
        assert flags in command
    assert "run-dir" not in command
    assert "data-dir" not in command
    assert accuracy == "test accuracy 98.7 %; normalisation: transductive)"
    # The command stands for the same settings.
    parsed = omniglot.with_paper_defaults(parse(omniglot.METHODS, "", command.split()[3:]))
    assert runs.as_json(parsed) == json.loads((maml / "config.json").read_text())


def test_a_file_is_overwritten_only_if_told_to(maml, tmp_path):
    (tmp_path / "maml.npz").write_text("older")
    with pytest.raises(runs.RunError, match=r"maml\.npz already exists .*; delete it, or give --overwrite$"):
        export.run(export.Config(maml, tmp_path / "maml.npz"))
    assert (tmp_path / "maml.npz").read_text() == "older"
    export.run(export.Config(maml, tmp_path / "maml.npz", overwrite=True))
    assert load_learner(tmp_path / "maml.npz").config.algorithm == "maml"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_finished": False}, r"is not finished: it holds no results\.json. Run the command .* again"),
        ({"network": "mlp"}, r"trained the network 'mlp'; only a run with --network conv4 or multi-scale can be used"),
        ({"ensemble": 2}, r"holds an ensemble of 2 states; only a run with --ensemble 1 can be used"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tmp_path, settings, message):
    run_dir = make_run(tmp_path / "run", **settings)
    with pytest.raises(RunError, match=message):
        export.run(export.Config(run_dir, tmp_path / "learner.npz"))
    assert not (tmp_path / "learner.npz").exists()


def test_a_run_of_another_experiment_is_refused(tmp_path):
    config = sinusoid.with_paper_defaults(sinusoid.METHODS["maml"])
    runs.write_json(tmp_path / "config.json", runs.as_json(config))
    with pytest.raises(RunError, match=r"is a run of experiments\.sinusoid; only a run of experiments\.omniglot or"):
        export.run(export.Config(tmp_path, tmp_path / "learner.npz"))


def test_a_directory_without_a_run_and_a_run_without_a_checkpoint_are_named(maml, tmp_path):
    with pytest.raises(RunError, match=r"is no run directory: it holds no config\.json"):
        export.run(export.Config(tmp_path, tmp_path / "learner.npz"))
    run_dir = shutil.copytree(maml, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(RunError, match=r"holds no checkpoint of a validated state; train longer"):
        export.run(export.Config(run_dir, tmp_path / "learner.npz"))
    assert not (tmp_path / "learner.npz").exists()
