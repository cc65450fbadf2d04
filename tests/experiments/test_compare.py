"""Runs are compared on the same episodes, by tests that are checked by hand and against scipy."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

from experiments import compare, domains, faces, omniglot, paired, retest, runs, sinusoid
from experiments.cli import parse
from experiments.runs import RunError

EPISODES = 11
"""Not divisible over the devices of the tests, so programs are compiled for one."""
TINY = {
    "num_meta_steps": 4,
    "val_every": 2,
    "log_every": 1,
    "meta_batch_size": 3,
    "eval_episodes": EPISODES,
    "eval_query_shot": 7,
    "eval_inner_steps": 2,
    "eval_shots": (5,),
}
TINY_IMAGES = {
    "num_meta_steps": 2,
    "val_every": 1,
    "log_every": 1,
    "meta_batch_size": EPISODES,
    "eval_episodes": EPISODES,
    "train_episodes": 0,
    "network": "mlp",
    "way": 3,
    "query_shot": 2,
}


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Trains without the figures of what adaptation does."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("inner_curves", "predictions"):
            patch.setattr(f"experiments.figures.{name}", lambda *arguments: None)
        yield


def changed(run_dir, copy, **settings):
    """A copy of a run with other settings in its config.json."""
    shutil.copytree(run_dir, copy)
    runs.write_json(copy / "config.json", runs.read_json(copy / "config.json") | settings)
    return copy


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """Runs on sinusoids by name."""
    where = tmp_path_factory.mktemp("waves")
    recipes = {
        "maml": ("maml", {"eval_shots": (5, 10)}),
        "other": ("maml", {"seed": 1}),
        "tuned": ("pretrained", {"inner_lr_grid": (0.02,)}),
    }
    for name, (algorithm, settings) in recipes.items():
        sinusoid.run(dataclasses.replace(sinusoid.METHODS[algorithm], run_dir=where / name, **TINY | settings))
    return {name: where / name for name in recipes}


@pytest.fixture(scope="module")
def drawings():
    """Random characters in place of the data set, others in a directory of another name."""
    images = np.random.default_rng(0).integers(0, 2, (30, 20, 28, 28, 1)).astype(np.uint8) * 255
    parts = {"train": images[:15], "val": images[15:22], "test": images[22:]}

    def load(split, data_dir=None, split_by="character"):
        return parts[split][:, ::-1] if data_dir else parts[split]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maml_jax.tasks.omniglot.load", load)
        yield


@pytest.fixture(scope="module")
def characters(drawings, tmp_path_factory):
    """Runs on characters by name."""
    where = tmp_path_factory.mktemp("characters")
    trained = where / "fomaml"
    omniglot.run(dataclasses.replace(omniglot.METHODS["fomaml"], run_dir=trained, **TINY_IMAGES))
    return {
        "fomaml": trained,
        "steps": changed(trained, where / "steps", eval_inner_steps=1),
        "inductive": changed(trained, where / "inductive", inductive=True, query_shot=1),
    }


def run(*arguments):
    return compare.run(parse(compare.Config, "", [str(argument) for argument in arguments]))


def test_runs_are_tested_on_the_same_episodes(waves):
    compared = run(*waves.values(), "--episodes", EPISODES)
    scores = {one["run"]: one for one in compared["evaluations"]}
    # Only the first is tested with 10 support points too, so they are compared with 5.
    assert [(one["run"], one["task"]) for one in compared["evaluations"]] == [
        (name, "5 support points") for name in waves
    ]
    # Runs with the seed of the comparison were tested on the same episodes when they were trained, and the rate that
    # was chosen in that test is used again.
    for name in ("maml", "tuned"):
        reported = runs.read_json(waves[name] / "results.json")["evaluations"][0]
        for number in ("mean", "ci95"):
            np.testing.assert_allclose(scores[name][number], reported["metrics"]["mse"][number], rtol=1e-5)
    assert reported["inner_lr"] == 0.02
    assert reported["inner_lr"] != runs.read_json(waves["tuned"] / "config.json")["inner_lr"]
    # The third was tested on others then; a loop over the episodes says what is right.
    learner, params = sinusoid.load(waves["other"])
    sampler = sinusoid.sinusoid.make_sampler(shot=5, query_shot=7)

    @jax.jit
    def error(key):
        episode = sampler(key)
        task_params, _ = learner.adapt(params, episode.support)
        return ((learner.predict(task_params, episode.query.inputs) - episode.query.targets) ** 2).mean()

    expected = [error(jax.random.fold_in(runs.streams(0).test, index)) for index in range(EPISODES)]
    np.testing.assert_allclose(scores["other"]["per_episode"], expected, rtol=1e-4)
    pair = compared["pairs"][0]
    a, b = (scores[name]["per_episode"] for name in ("maml", "other"))
    assert pair["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6)
    assert pair["difference"] == pytest.approx(np.mean(a) - np.mean(b), rel=1e-5)
    # A smaller error is better.
    assert (pair["better"], pair["worse"]) == (int(np.sum(np.less(a, b))), int(np.sum(np.greater(a, b))))
    assert len(compared["pairs"]) == 3
    for of_test in ("p", "sign_p"):
        adjusted = paired.holm([pair[of_test] for pair in compared["pairs"]])
        assert [pair[f"{of_test}_holm"] for pair in compared["pairs"]] == adjusted


def test_another_seed_draws_other_episodes(waves):
    first, second = (
        run(waves["maml"], waves["other"], "--episodes", 2, "--seed", seed)["evaluations"] for seed in (0, 1)
    )
    assert first[0]["per_episode"] != second[0]["per_episode"]


def test_only_settings_that_differ_are_shown(waves, capsys):
    compared = run(waves["maml"], waves["other"], waves["tuned"], "--episodes", 0)
    assert compared["settings"] == {
        "algorithm": ["maml", "maml", "pretrained"],
        "seed": [0, 1, 0],
        "tune_inner_lr": [False, False, True],
        "inner_lr_grid": [[3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2]] * 2 + [[0.02]],
        "eval_shots": [[5, 10], [5], [5]],
    }
    assert compared["pairs"] == compared["evaluations"] == []
    shown = capsys.readouterr().out
    assert "tune_inner_lr" in shown
    assert "meta_batch_size" not in shown


def test_tests_that_are_not_comparable_are_named_and_not_made(waves, tmp_path, capsys):
    queries = changed(waves["maml"], tmp_path / "queries", eval_query_shot=8)
    compared = run(waves["maml"], queries, "--episodes", EPISODES)
    assert compared["evaluations"] == []
    (pair,) = compared["pairs"]
    assert pair["differing"] == {"eval_query_shot": [7, 8]}
    assert "maml and queries are not comparable: eval_query_shot is 7 for maml and 8 for queries." in (
        capsys.readouterr().out.replace("\n", " ")
    )


def test_runs_on_characters(characters):
    compared = run(*characters.values(), "--episodes", EPISODES)
    pairs = {(pair["a"], pair["b"]): pair for pair in compared["pairs"]}
    assert pairs["fomaml", "steps"]["comparable"]
    different = {"query_shot": [2, 1], "normalisation": ["transductive", "inductive"]}
    assert pairs["fomaml", "inductive"]["differing"] == different
    assert [one["run"] for one in compared["evaluations"]] == ["fomaml", "steps"]
    # The first was tested on these episodes when it was trained, and the second is it with fewer inner steps.
    reported = runs.read_json(characters["fomaml"] / "results.json")["metrics"]["accuracy"]
    for one, length in zip(compared["evaluations"], (4, 2), strict=True):
        np.testing.assert_allclose(one["mean"], reported["mean"][:length], atol=1e-6)
        np.testing.assert_allclose(one["ci95"], reported["ci95"][:length], atol=1e-6)
    assert compared["runs"][0]["reported"][0]["episodes"] == EPISODES


def test_other_images_are_not_comparable(characters, tmp_path):
    elsewhere = changed(characters["fomaml"], tmp_path / "elsewhere", data_dir="elsewhere")
    with pytest.raises(RunError, match="elsewhere was made with other data"):
        run(characters["fomaml"], elsewhere, "--episodes", EPISODES)
    (elsewhere / runs.DATA_FILE).unlink()  # as if it had been made there
    (pair,) = run(characters["fomaml"], elsewhere, "--episodes", EPISODES)["pairs"]
    assert list(pair["differing"]) == ["the checksum of an episode's images"]
    alphabets = changed(characters["fomaml"], tmp_path / "alphabets", split_by="alphabet")
    (pair,) = run(characters["fomaml"], alphabets, "--episodes", EPISODES)["pairs"]
    assert pair["differing"] == {"split_by": ["character", "alphabet"]}


def test_the_same_state_is_found_to_be_the_same(characters, tmp_path):
    shutil.copytree(characters["fomaml"], tmp_path / "copy")
    (pair,) = run(characters["fomaml"], tmp_path / "copy", "--episodes", EPISODES)["pairs"]
    assert pair["equal"] == EPISODES
    assert pair["sentence"] == f"fomaml and copy have the same score in every one of {EPISODES} episodes, 3-way 1-shot."


def test_domains_are_compared_on_their_examples(drawings, tmp_path):
    for algorithm in ("erm", "mldg"):
        config = dataclasses.replace(
            domains.METHODS[algorithm], num_characters=5, num_meta_steps=1, val_every=1, log_every=1, network="mlp",
            features=4, run_dir=tmp_path / algorithm,
        )  # fmt: skip
        domains.run(config)
    compared = run(tmp_path / "erm", tmp_path / "mldg")
    assert {one["episodes"] for one in compared["evaluations"]} == {35}
    for one in compared["evaluations"]:
        reported = runs.read_json(tmp_path / one["run"] / "results.json")["metrics"]["accuracy"]
        assert one["mean"] == pytest.approx(reported["mean"])
        assert one["ci95"] == pytest.approx(reported["ci95"])
    assert "35 examples" in compared["pairs"][0]["sentence"]
    (tmp_path / "erm" / runs.DATA_FILE).write_text(json.dumps({"sha256": "that of other data"}))
    with pytest.raises(runs.RunError, match="was made with other data"):
        run(tmp_path / "erm", tmp_path / "mldg")


def test_a_run_that_is_still_training(waves, tmp_path, capsys):
    running = tmp_path / "running"
    shutil.copytree(waves["other"], running)
    (running / "results.json").unlink()
    lines = (running / "metrics.jsonl").read_text().splitlines()
    (running / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:7]]))
    before = {file: file.stat().st_mtime_ns for file in running.rglob("*")}
    compared = run(waves["maml"], running, "--episodes", 2)
    assert {file: file.stat().st_mtime_ns for file in running.rglob("*")} == before
    described = compared["runs"][1]
    assert (described["step"], described["num_meta_steps"], described["finished"]) == (3, 4, False)
    assert described["reported"] == []
    assert re.search("not .*finished", capsys.readouterr().out, re.DOTALL)
    tuned = tmp_path / "tuned"
    shutil.copytree(waves["tuned"], tuned)
    (tuned / "results.json").unlink()
    with pytest.raises(RunError, match="its rate at test is chosen at the end"):
        run(waves["maml"], tuned, "--episodes", 2)


def test_json_is_all_that_is_printed(waves, tmp_path, capsys):
    compared = run(waves["maml"], waves["other"], "--episodes", 2, "--json", "--figure", tmp_path / "curves.svg")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == compared
    assert "testing maml" in printed.err
    assert runs.console.stderr is False
    assert (tmp_path / "curves.svg").read_text().lstrip().startswith("<?xml")


def test_the_curves_are_those_of_the_logs():
    long = [{"step": step, "loss": 1.0 / step, "val": step / 100} for step in range(10, 101, 10)]
    short = [{"step": 20, "loss": 3.0}, {"step": 40, "loss": None, "val": 0.5}, {"step": 50, "loss": 2.0}]
    found = compare.curves({"long": long, "short": short}, num_steps=4)
    assert found == {
        "metric": "val",
        "steps": [10, 40, 70, 100],
        "values": {"long": [0.1, 0.4, 0.7, 1.0], "short": [None, 0.5, None, None]},
    }
    unscored = [{"step": record["step"], "loss": record["loss"]} for record in short]
    found = compare.curves({"long": long, "short": unscored}, num_steps=3)
    assert (found["metric"], found["steps"]) == ("loss", [10, 50, 100])
    assert found["values"] == {"long": [0.1, 0.02, 0.01], "short": [None, 2.0, None]}
    assert compare.curves({"new": [], "other": []})["steps"] == []


def test_the_curves_are_shown(waves, capsys):
    run(waves["maml"], waves["other"], "--episodes", 0)
    assert "Training objective" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_learning_curves_are_drawn(suffix, characters, waves, tmp_path):
    for runs_of_one in (characters, waves):
        names = list(runs_of_one)[:2]
        run(*(runs_of_one[name] for name in names), "--episodes", 0, "--figure", tmp_path / f"curves{suffix}")
        assert (tmp_path / f"curves{suffix}").stat().st_size > 5000


def test_a_figure_comes_before_the_tests_and_takes_any_name(waves, tmp_path, monkeypatch):
    monkeypatch.setattr(retest, "evaluate", None)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RunError, match=r"--figure .*folder\.png cannot be written"):
        run(waves["maml"], waves["other"], "--figure", tmp_path / "folder.png")
    shutil.copytree(waves["maml"], tmp_path / "rate$_$")
    run(tmp_path / "rate$_$", waves["other"], "--episodes", 0, "--figure", tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 5000


def made_up(a, b, metric, num_tests=1):
    """The sentence for made-up scores of runs A and B."""
    record = compare.difference(np.array(a, float), np.array(b, float), metric)
    adjusted = {f"{name}_holm": record[name] for name in ("p", "sign_p") if name in record}
    pair = {"a": "A", "b": "B", "task": "5-way", "metric": metric.name, "comparable": True, "counted": "episodes"}
    return compare.sentence(pair | record | adjusted, num_tests)


def test_what_a_test_does_not_depend_on_makes_no_difference():
    def test_of(horizon, inner_steps):
        return retest.Test("goals", {"horizon": horizon, "steps": inner_steps}, retest.RETURN, None, None)

    assert compare.differing(test_of(100, retest.ANY), test_of(100, 3)) == {}
    assert compare.differing(test_of(100, 4), test_of(100, 3)) == {"steps": [4, 3]}
    assert compare.differing(test_of(100, retest.ANY), test_of(50, 3)) == {"horizon": [100, 50]}


def test_a_sentence_says_which_is_better():
    ahead, behind = np.linspace(0.5, 0.9, 20), np.linspace(0.4, 0.8, 20) + 0.01 * (-1.0) ** np.arange(20)
    higher = made_up(ahead, behind, retest.ACCURACY)
    assert higher.startswith("A is better than B on average, 5-way; mean accuracy of A minus that of B: 10.00 points")
    assert "A is ahead in 20 of 20 episodes and behind in 0" in higher
    assert made_up(ahead, behind, retest.ERROR).startswith("B is better than A on average")
    noise = 0.3 * (-1.0) ** np.arange(20)
    assert made_up(ahead, ahead + noise, retest.ACCURACY).startswith("A and B cannot be told apart, 5-way; ")


def test_one_diverged_episode_does_not_hide_who_is_ahead():
    ahead, behind = np.full(20, 0.1), np.full(20, 0.2)
    ahead[3] = 1e6
    found = made_up(ahead, behind, retest.ERROR)
    assert found.startswith("A is better than B in most episodes, but their means cannot be told apart, 5-way: ")
    ahead[3] = np.inf
    found = made_up(ahead, behind, retest.ERROR)
    assert found.startswith(
        "A is better than B in most episodes, 5-way: A is ahead in 19 of 20 episodes and behind in 1"
    )
    assert "no mean exists, because the scores of 1 and 0 of 20 episodes are not finite" in found
    ahead[:] = np.nan
    assert "B is ahead in 20 of 20" in made_up(ahead, behind, retest.ERROR)
    # A few large gains against many small losses.
    b = np.concatenate([np.full(18, 0.51), np.zeros(12)])
    found = made_up(np.full(30, 0.5), b - 0.001 * np.arange(30), retest.ACCURACY)
    assert found.startswith("A is better than B on average")


def test_directories_of_several_seeds_are_compared_seed_by_seed_and_over_the_seeds(waves, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, name in enumerate(("maml", "other")):
        changed(waves[name], first / f"seed-{seed}", eval_shots=[5])
        changed(waves["maml"], second / f"seed-{seed}", seed=seed, outer_lr=0.5, eval_shots=[5])
    compared = run(first, second, "--episodes", 20, "--figure", tmp_path / "curves.png")
    names = [(pair["a"], pair["b"]) for pair in compared["pairs"]]
    assert set(names) == {(f"first/seed-{seed}", f"second/seed-{seed}") for seed in (0, 1)}
    assert compared["names"] == ["first", "second"]
    assert compared["settings"] == {"outer_lr": [0.001, 0.5]}
    (record,) = compared["over_seeds"]
    differences = [pair["difference"] for pair in compared["pairs"] if pair["task"] == "5 support points"]
    test = stats.ttest_1samp(differences, 0.0)
    mean, ci95 = np.mean(differences), test.confidence_interval().high - np.mean(differences)
    assert [record[name] for name in ("a", "b", "task", "seeds")] == ["first", "second", "5 support points", 2]
    np.testing.assert_allclose([record["difference"], record["ci95"], record["p"]], [mean, ci95, test.pvalue])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Over 2 seeds first and second cannot be told apart, 5 support points; mean mse of first minus" in printed
    assert "Another --seed" not in printed
    # A single run is compared with every seed.
    compared = run(waves["maml"], second, "--episodes", 2)
    assert {(pair["a"], pair["b"]) for pair in compared["pairs"]} == {("maml", f"second/seed-{n}") for n in (0, 1)}
    assert compared["over_seeds"] == []


def test_tests_over_seeds_are_adjusted_for_their_number():
    differences = {"x": [1.0, 1.1, 1.05], "y": [1.0, 1.8, 1.4], "z": [-1.0, 1.0, 0.5]}
    groups = {f"{name}{seed}": name for name in "abcd" for seed in range(3)}
    pairs = [
        {
            "a": f"a{seed}",
            "b": f"b{seed}",
            "task": task,
            "metric": "accuracy",
            "comparable": True,
            "difference": difference,
        }
        for task, of_seeds in differences.items()
        for seed, difference in enumerate(of_seeds)
    ]
    records = compare.over_seeds(pairs, groups)
    p_values = [stats.ttest_1samp(of_seeds, 0.0).pvalue for of_seeds in differences.values()]
    np.testing.assert_allclose([record["p"] for record in records], p_values)
    np.testing.assert_allclose([record["p_holm"] for record in records], paired.holm(p_values))
    assert p_values[1] < compare.LEVEL < records[1]["p_holm"]
    assert ["is better than" in record["sentence"] for record in records] == [True, False, False]
    assert f"adjusted {records[0]['p_holm']:.2g})" in records[0]["sentence"]
    (alone,) = compare.over_seeds(pairs[3:6], groups)
    assert alone["p"] == alone["p_holm"]
    assert "Over 3 seeds a is better than b, y" in alone["sentence"]
    assert "adjusted" not in alone["sentence"]
    # A seed whose score is not finite is not left out, because the others would speak for the method that diverged.
    del pairs[4]["difference"]
    records = compare.over_seeds(pairs, groups)
    assert records[1]["num_nonfinite"] == 1
    assert "a and b have no mean difference over seeds, y, because in 1 of 3 seeds" in records[1]["sentence"]
    np.testing.assert_allclose([records[i]["p_holm"] for i in (0, 2)], paired.holm([p_values[i] for i in (0, 2)]))


def test_a_seed_is_not_compared_with_itself(waves, tmp_path):
    shutil.copytree(waves["maml"], tmp_path / "several" / "seed-0")
    with pytest.raises(RunError, match=r"seed-0 and .*seed-0 are the same run"):
        run(tmp_path / "several", tmp_path / "several" / "seed-0", "--episodes", 0)


def test_mistakes_are_named_before_anything_is_computed(waves, characters, tmp_path, monkeypatch):
    monkeypatch.setattr(retest, "evaluate", None)
    maml = waves["maml"]
    empty = tmp_path / "empty"
    empty.mkdir()
    unsaved = tmp_path / "unsaved"
    shutil.copytree(waves["other"], unsaved)
    shutil.rmtree(unsaved / "checkpoints")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"experiment": "hyperparameters", "algorithm": "hypergradient"}))
    link = tmp_path / "link"
    link.symlink_to(maml)
    for directories, message in (
        ([], "needs two or more run directories, got 0"),
        ([maml], "needs two or more run directories, got 1"),
        ([maml, maml], "are the same run"),
        ([maml, link], f"{maml} and {link} are the same run"),
        ([maml, empty], f"{empty} is no run directory: it holds no config.json"),
        ([maml, tmp_path / "none"], "none is no run directory"),
        ([maml, unsaved], f"{unsaved} holds no checkpoint"),
        ([maml, foreign], "is a run of hyperparameters; only runs of .* can be loaded"),
        ([maml, characters["fomaml"]], "is a run of experiments.sinusoid and .* one of experiments.omniglot"),
    ):
        with pytest.raises(RunError, match=message):
            run(*directories)
    assert run(maml, unsaved, "--episodes", 0)["runs"][1]["step"] == 4
    for settings, message in (
        ({"episodes": 1}, "--episodes 1 gives no interval"),
        ({"episodes": -1}, "--episodes must be an integer of at least 0"),
        ({"figure": Path("curves.jpg")}, "--figure curves.jpg must end in .png, .pdf or .svg"),
        ({"seed": 2**32}, "does not fit into 32 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.Config(runs=(maml, waves["other"]), **settings)


def test_runs_of_one_name_are_told_apart_by_their_paths(waves, tmp_path):
    shutil.copytree(waves["maml"], tmp_path / "maml")
    compared = run(waves["maml"], tmp_path / "maml", "--episodes", 0)
    assert [one["name"] for one in compared["runs"]] == [str(waves["maml"]), str(tmp_path / "maml")]
    assert compared["settings"] == {}


def test_of_other_experiments_settings_and_numbers_are_shown(tmp_path, capsys):
    directories = [tmp_path / f"run{seed}" for seed in (0, 1)]
    for seed, directory in enumerate(directories):
        directory.mkdir()
        config = faces.with_paper_defaults(dataclasses.replace(faces.METHODS["erm"], seed=seed, run_dir=directory))
        runs.write_json(directory / "config.json", runs.as_json(config))
        rate = {"mean": [100.0 + seed], "ci95": [1.5]}
        results = {"experiment": "faces", "config": runs.as_json(config), "seed": seed, "metrics": {"rate": rate}}
        results |= {"algorithm": "erm", "protocol": {"episodes": 1000}}
        runs.write_json(directory / "results.json", results)
    compared = compare.run(compare.Config(runs=tuple(directories), episodes=0))
    assert compared["settings"] == {"seed": [0, 1]}
    assert compared["pairs"] == []
    printed = capsys.readouterr().out
    assert re.search(r"run1 .* rate .* 101\.000 ± 1\.500", printed)
    assert "Runs of experiments.faces are not tested on the same episodes here." in printed


def test_the_seeds_of_a_directory_are_those_of_one_command(waves, tmp_path):
    for seed in (0, 1):
        shutil.copytree(waves["maml"], tmp_path / "several" / f"seed-{seed}")
    file = tmp_path / "several" / "seed-1" / "config.json"
    settings = json.loads(file.read_text()) | {"seed": 1}
    file.write_text(json.dumps(settings | {"outer_lr": 0.5}))
    with pytest.raises(RunError, match=r"seed-0 and several/seed-1 are no seeds of one command: outer_lr is"):
        run(tmp_path / "several", waves["other"], "--episodes", 0)
    file.write_text(json.dumps(settings))
    shutil.copytree(waves["maml"], tmp_path / "several" / "seed-0-backup")
    compared = run(tmp_path / "several", waves["other"], "--episodes", 0)
    assert len(compared["runs"]) == 3
