"""Run directories: whose they are, and what they hold."""

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest

from experiments import intervals, omniglot, report, retest, runs, sinusoid
from maml_jax import Batch
from maml_jax.types import Evaluation


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    num_meta_steps: int = 10
    data_dir: str | None = None
    run_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class Validated:
    experiment: ClassVar[str] = "omniglot"  # which is validated on as many episodes as it is tested on
    num_meta_steps: int = 10
    eval_episodes: int | None = 6
    outer_schedule: str = "constant"


def claim(run_dir, config=Config()):
    with runs.open_run(run_dir, config):
        pass


def test_settings_of_another_experiment_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "images", "algorithm": "protonets"}))
    with pytest.raises(runs.RunError, match=r"is a run of experiments\.images; name one of experiments\.omniglot"):
        runs.stored_config(omniglot.METHODS, tmp_path)


def test_a_directory_of_another_configuration_is_refused(tmp_path):
    claim(tmp_path)
    claim(tmp_path)
    with pytest.raises(runs.RunError, match=r"another configuration: seed is 0 there and 1 here\. Choose"):
        claim(tmp_path, Config(seed=1))
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 0, "num_meta_steps": 10, "data_dir": None}


def test_what_does_not_change_the_results_may_change_and_the_length_may_grow(tmp_path):
    claim(tmp_path)
    claim(tmp_path, Config(data_dir="elsewhere", run_dir="here", num_meta_steps=20))
    assert json.loads((tmp_path / "config.json").read_text())["num_meta_steps"] == 20
    (tmp_path / "checkpoints" / "15").mkdir(parents=True)
    with pytest.raises(runs.RunError, match="num_meta_steps is 20 there and 10 here"):
        claim(tmp_path)


def test_a_length_that_was_a_slip_may_be_taken_back_before_the_training_passes_it(tmp_path):
    results = {"experiment": "other", "config": dataclasses.asdict(Validated()), "seed": 0}
    claim(tmp_path, Validated())
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(
        runs.RunError, match=r"is validated on 6 episodes, .* give --eval-episodes 6 while it is trained"
    ):
        claim(tmp_path, Validated(100, 60))
    for slip in (Validated(num_meta_steps=100), Validated(eval_episodes=60)):
        claim(tmp_path, slip)
        assert runs.read_results(tmp_path) is None
        claim(tmp_path, Validated())
        assert runs.read_results(tmp_path) == results
    with pytest.raises(runs.RunError, match="eval_episodes is 6 there and 5 here"):
        claim(tmp_path, Validated(eval_episodes=5))
    claim(tmp_path, Validated(eval_episodes=60))
    with pytest.raises(runs.RunError, match="give --eval-episodes 6 while it is trained"):
        claim(tmp_path, Validated(100, 60))
    claim(tmp_path, Validated(num_meta_steps=100))  # from 60 episodes of the test back to the 6 of the validations
    (tmp_path / "checkpoints" / "11").mkdir()
    with pytest.raises(runs.RunError, match="num_meta_steps is 100 there and 10 here"):
        claim(tmp_path, Validated())


def test_a_training_that_was_not_tested_has_the_episodes_of_its_validations(tmp_path):
    """Without results nothing would say on how many episodes the states were compared that a longer training keeps."""
    claim(tmp_path, Validated())
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(runs.RunError, match=r"validated on 6 episodes, .* give --eval-episodes 6 while it is trained"):
        claim(tmp_path, Validated(eval_episodes=60))
    results = {"experiment": "other", "config": dataclasses.asdict(Validated()), "seed": 0}
    (tmp_path / "results.json").write_text(json.dumps(results))
    for _ in range(2):  # again after an interruption, when its results were set aside
        claim(tmp_path, Validated(eval_episodes=60))


def test_a_run_without_a_number_of_episodes_is_another(tmp_path):
    claim(tmp_path, Validated())
    with pytest.raises(runs.RunError, match="eval_episodes is 6 there and None here"):
        claim(tmp_path, Validated(eval_episodes=None))


def test_a_damaged_file_is_named(tmp_path):
    claim(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(runs.RunError, match=r"config\.json is damaged .*; choose another --run-dir"):
        claim(tmp_path)
    for read in (runs.experiment_of, lambda run_dir: runs.stored_config(omniglot.METHODS, run_dir)):
        with pytest.raises(runs.RunError, match=r"config\.json is damaged .*; restore it from a copy"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "results.json"])
def test_what_is_no_run_of_known_settings_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    (tmp_path / "lock").write_text("theirs")
    with pytest.raises(runs.RunError, match=f"holds {name} but no config.json, .*; choose another --run-dir"):
        claim(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "theirs", "lock": "theirs"}


def test_every_stream_of_an_experiment_is_another():
    # Two seeds, every stream, and the keys that training and evaluation derive from a stream in two levels.
    keys = []
    for seed in (0, 1):
        for stream in runs.streams(seed):
            keys.append(stream)
            for i in range(4):
                child = jax.random.fold_in(stream, i)
                keys += [child, *(jax.random.fold_in(child, j) for j in range(4))]
    data = np.stack([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == len(keys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None), "not finite"),
        ((0.5,), "0.50"),
        ((0.5, 0.25), "0.50 ± 0.25"),
        ((4e9, 5e8), "4e+09 ± 5e+08"),
    ],
)
def test_means_are_printed(arguments, expected):
    assert intervals.format_mean(*arguments) == expected


def test_means_are_scaled_with_their_interval():
    assert intervals.format_mean(0.5, 0.25, scale=100) == "50.00 ± 25.00"


def test_episodes_that_are_not_finite_are_counted_in_tables():
    metric = {"mean": [0.25, None], "ci95": [0.01, None], "num_nonfinite": [0, 3], "finite_mean": [0.25, 0.5]}
    assert intervals.format_metric(metric, 0, scale=100) == "25.00 ± 1.00"
    assert intervals.format_metric(metric, scale=100) == "not finite in 3 episodes (others 50.00)"
    assert intervals.format_metric({"mean": [None], "ci95": [None]}) == "not finite"


def test_an_interval_is_students():
    # The variance of three ones and a zero is 1/4; the 0.975 quantile of Student's t with 3 degrees is 3.182.
    values = np.array([1.0, 0.0, 1.0, 1.0])
    found = intervals.mean_and_interval(values)
    assert found["mean"] == [0.75]
    np.testing.assert_allclose(found["ci95"], [3.182446 * 0.5 / 2], rtol=1e-5)
    both = intervals.mean_and_interval(np.stack([values, 2 * values], 1))
    np.testing.assert_allclose(both["mean"], [0.75, 1.5])
    np.testing.assert_allclose(both["ci95"], [found["ci95"][0], 2 * found["ci95"][0]])


def test_a_read_only_run_directory_is_named_and_left_as_it_is(tmp_path, monkeypatch):
    claim(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def read_only_open(file, mode="r", *args, **keywords):  # as root, permissions do not hold
        if mode != "r":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return open(file, mode, *args, **keywords)

    monkeypatch.setattr(runs, "open", read_only_open, raising=False)
    with pytest.raises(runs.RunError, match=r"cannot be written \(Read-only file system\).*choose another directory"):
        claim(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_line_that_is_being_written_is_no_record(tmp_path):
    assert runs.read_log(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n5\n{"loss": 1}\n[2]\n\n{"step": 2, "lo')
    assert runs.read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
    with runs.metrics_log(tmp_path, 1) as log:
        log({"step": 2, "loss": float("nan")})
    assert runs.read_log(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    with runs.metrics_log(tmp_path, 1):
        assert runs.read_log(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_metrics_that_cannot_be_written_name_the_file(tmp_path):
    with runs.metrics_log(tmp_path, 0) as log:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(runs.RunError, match=r"metrics.jsonl cannot be written .*; free some space"):
            log({"step": 1})


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"config": {}, "experiment": "sinusoid"}', "{"])
def test_damaged_results_are_named_at_every_door(tmp_path, content):
    run_dir, config = tmp_path / "a[/x]", sinusoid.with_paper_defaults(sinusoid.METHODS["maml"])  # no markup of rich
    with runs.open_run(run_dir, config):
        (run_dir / "results.json").write_text(content)
        doors = [
            lambda: runs.finish(run_dir, "sinusoid", config, None, {}, None),
            lambda: report.add(run_dir, tmp_path),
            lambda: retest.open_run(run_dir),
        ]
        for door in doors:
            with pytest.raises(runs.RunError, match=r"results.json is damaged"):
                door()
        results = {"experiment": "sinusoid", "config": runs.as_json(config), "seed": 0}
        runs.write_json(run_dir / "results.json", results)
        with pytest.raises(runs.RunError, match=r"damaged: it lacks algorithm, protocol, metrics; delete it"):
            report.add(run_dir, tmp_path)
        results |= {"algorithm": "maml", "protocol": {}, "metrics": {}}
        runs.write_json(run_dir / "results.json", results)
        assert runs.finish(run_dir, "sinusoid", config, None, {}, None) == results


@pytest.mark.parametrize("number", ["abc", None, [3], 1.5])
def test_settings_of_another_type_are_another_configuration(tmp_path, number):
    config = sinusoid.with_paper_defaults(sinusoid.METHODS["maml"])
    (tmp_path / "config.json").write_text(json.dumps(runs.as_json(config) | {"num_meta_steps": number}))
    with pytest.raises(runs.RunError, match="num_meta_steps is"), runs.open_run(tmp_path, config):
        pass


def test_a_name_that_is_no_choice_is_refused(tmp_path):
    config = runs.as_json(sinusoid.with_paper_defaults(sinusoid.METHODS["maml"]))
    (tmp_path / "config.json").write_text(json.dumps(config | {"outer_optimizer": "x"}))
    with pytest.raises(runs.RunError, match="outer_optimizer 'x' is none of adam, sgd"):
        runs.stored_config(sinusoid.METHODS, tmp_path)


def test_a_directory_held_by_a_live_process_is_refused(tmp_path):
    holder = (
        "import fcntl, sys, time\n"
        f"lock = open({str(tmp_path / 'lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(runs.RunError, match=r"in use by a running process; .* another --run-dir"):
            claim(tmp_path)
        process.kill()
    claim(tmp_path)  # the lock ended with the process that held it


def test_numbers_that_are_not_finite_are_stored_as_null(tmp_path):
    runs.write_json(tmp_path / "numbers.json", {"mean": [1.0, float("nan"), float("inf")]})
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"mean": [1.0, None, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["numbers.json"]


@dataclasses.dataclass(frozen=True)
class WithPlace:
    seed: int = 0
    run_dir: str | None = None
    distributed: str = "auto"
    data_dir: str | None = None
    chunk_size: int | None = None
    outer_lr: float = 1e-3


def test_settings_are_stored_but_for_where_a_run_is_made(tmp_path):
    def claim(**settings):
        with runs.open_run(tmp_path, WithPlace(**settings)):
            return json.loads((tmp_path / "config.json").read_text())

    assert claim() == {"seed": 0, "data_dir": None, "chunk_size": None, "outer_lr": 1e-3}
    assert claim(run_dir="here", distributed="off", data_dir="there", chunk_size=2)["chunk_size"] == 2
    with pytest.raises(runs.RunError, match=r"outer_lr is 0\.001 there and 0\.1 here"):
        claim(outer_lr=0.1)


def test_a_run_with_a_schedule_is_not_continued_with_more_steps(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        num_meta_steps: int
        outer_schedule: str

    refused = "num_meta_steps is 5 there and 9 here"
    for schedule, message in (("constant", None), ("halved", None), ("linear", refused), ("cosine", refused)):
        with runs.open_run(tmp_path / schedule, Config(5, schedule)):
            pass
        expectation = contextlib.nullcontext() if message is None else pytest.raises(runs.RunError, match=message)
        with expectation, runs.open_run(tmp_path / schedule, Config(9, schedule)):
            pass


def test_only_directories_named_after_a_seed_are_seeds(tmp_path):
    for name in ("seed-0", "seed-12", "seed-0-backup", "seed-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert runs.seed_directories(tmp_path) == ["seed-0", "seed-12"]


def test_a_run_inside_of_another_does_not_lock_it_out(tmp_path):
    claim(tmp_path)
    with pytest.raises(runs.RunError, match="has the name of a seed, and the directory around it is one run"):
        claim(tmp_path / "seed-3")
    claim(tmp_path / "inside")
    (tmp_path / "seed-4").mkdir()
    (tmp_path / "seed-4" / "config.json").write_text("{}")
    claim(tmp_path)


@pytest.mark.parametrize("value", ["10min", "0", "-1", "nan", "inf"])
def test_a_time_limit_that_is_none_is_named(value, monkeypatch, capsys):
    monkeypatch.setenv("LIMIT", value)
    assert runs._seconds_of_environment("LIMIT", 600.0) == 600.0
    assert f"LIMIT='{value}' is no positive number of seconds; 600 is taken" in capsys.readouterr().err
    monkeypatch.setenv("LIMIT", "2.5")
    assert runs._seconds_of_environment("LIMIT", 600.0) == 2.5


def test_a_program_goes_on_when_nobody_reads_its_output():
    code = "from experiments.runs import console\nfor _ in range(2000): console.print('x' * 70)\nprint('end')"
    said = "nobody reads the output any more; going on without printing\n"
    for errors, expected in (("", said), ("2>&1", "")):
        line = f'{sys.executable} -c "$CODE" {errors} | head -c 10; echo status ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", line], env=os.environ | {"CODE": code}, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("x" * 10 + "status 0\n", expected)


def test_data_without_the_network_that_embeds_them_are_those_of_an_older_run(tmp_path):
    runs.write_json(tmp_path / runs.DATA_FILE, {"sha256": "images"})
    runs.check_data(tmp_path, "images")
    runs.check_data(tmp_path, "images network")
    for stored, wanted in (("images old", "images new"), ("images old", "images"), ("images", "others new")):
        runs.write_json(tmp_path / runs.DATA_FILE, {"sha256": stored})
        with pytest.raises(runs.RunError, match="was made with other data"):
            runs.check_data(tmp_path, wanted)


def test_results_that_were_set_aside_are_found_without_a_number_of_episodes_too(tmp_path):
    for name in ("results_2000_None.json", "results_2000_600.json", "results.json", "results_2000.json"):
        (tmp_path / name).write_text("{}")
    assert [file.name for file in runs.results_before(tmp_path)] == ["results_2000_600.json", "results_2000_None.json"]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    file, write_text = tmp_path / "results.json", Path.write_text
    file.write_text("before")

    def write_half(path, text):
        write_text(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(runs.RunError, match=r"results\.json cannot be written \(No space left on device\)"):
        runs.write_text(file, "after")
    assert file.read_text() == "before"


def test_a_directory_of_other_data_is_refused(tmp_path):
    for data_digest in ("images", "images", None):
        with runs.open_run(tmp_path, Config(), data_digest):
            pass
    with pytest.raises(runs.RunError, match="was made with other data"), runs.open_run(tmp_path, Config(), "others"):
        pass


ZEROS, ONES, TWOS = (np.full((3, 2), value, np.uint8) for value in range(3))


@pytest.mark.parametrize(
    "other",
    [
        [[ZEROS], [ONES, TWOS]],  # a class in another split
        [[ZEROS, ONES[:2]], [TWOS]],  # fewer examples
        [[ZEROS, TWOS], [ONES]],
        [[ZEROS, ONES.astype(np.int8)], [TWOS]],
        [[ZEROS, ONES.reshape(3, 1, 2)], [TWOS]],
    ],
)
def test_other_examples_have_another_checksum(other):
    assert runs.digest([[ZEROS, ONES], [TWOS]]) == runs.digest([[ZEROS.copy(), ONES.copy()], [TWOS.copy()]])
    assert runs.digest([[ZEROS, ONES], [TWOS]]) != runs.digest(other)


def test_the_same_examples_with_other_labels_have_another_checksum():
    found = {runs.digest_of_batches([Batch(ZEROS, np.array(labels))]) for labels in ([0, 0, 1], [0, 1, 0], [2, 2, 3])}
    assert len(found) == 3


def test_settings_come_back_as_they_were_stored(tmp_path):
    method = sinusoid.METHODS["maml"]
    hyperparameters = dataclasses.replace(method.hyperparameters, inner_lr=0.5, num_inner_steps=3)
    config = dataclasses.replace(method, hyperparameters=hyperparameters, eval_shots=(7, 3), seed=5)
    config = sinusoid.with_paper_defaults(dataclasses.replace(config, run_dir=tmp_path))
    claim(tmp_path, config)
    assert runs.stored_config(sinusoid.METHODS, tmp_path) == config


def test_results_say_what_was_trained_and_how(tmp_path):
    config = dataclasses.replace(sinusoid.METHODS["maml"], seed=3, num_meta_steps=20, outer_lr=0.25)
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "loss": 0.5}\n')
    trained = runs.Trained(None, 10, {"compile": 1.0, "train": 2.0}, {"devices": 4})
    tested = {"metrics": {"mse": {"mean": [0.5]}}, "inner_lr": 0.1}
    found = runs.finish(tmp_path, "sinusoid", config, trained, {"query_shot": 4}, lambda: tested)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["seconds"].pop("eval") >= 0
    assert found["config"]["outer_lr"] == 0.25
    expected = tested | {
        "experiment": "sinusoid", "algorithm": "maml", "seed": 3, "meta_steps": 20, "execution": {"devices": 4},
        "seconds": {"compile": 1.0, "train": 2.0}, "curve": [{"step": 20, "loss": 0.5}],
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_a_metric_counts_the_episodes_that_are_not_finite_at_any_step():
    mean, ci95, median = np.array([0.5, np.nan]), np.array([0.25, np.nan]), np.array([0.5, 0.125])
    evaluation = Evaluation(mean, ci95, None, np.array([0, 0]), mean, median)
    assert list(runs.as_metric(evaluation)) == ["mean", "ci95"]
    found = runs.as_metric(evaluation._replace(num_nonfinite=np.array([0, 3])))
    assert (found["ci95"][0], found["num_nonfinite"], found["finite_median"]) == (0.25, [0, 3], [0.5, 0.125])
