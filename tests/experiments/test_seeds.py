"""Several seeds in one program, against the same seeds one after the other."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from scipy import stats

from experiments import commands, common, report, runs, seeds, sinusoid
from maml_jax import MetaState, checkpoint

TINY = {
    "num_meta_steps": 6,
    "meta_batch_size": 2,
    "val_every": 2,
    "log_every": 2,
    "eval_episodes": 4,
    "eval_shots": (5,),
    "eval_inner_steps": 1,
    "seed": 3,
}


def config_of(run_dir, **settings):
    return dataclasses.replace(sinusoid.METHODS["maml"], **{**TINY, "run_dir": run_dir, **settings})


def logged(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("together")
    return run_dir, sinusoid.run(config_of(run_dir, seeds=4))


def test_every_seed_is_that_of_a_run_of_its_own(together, tmp_path):
    run_dir, summary = together
    assert summary["seeds"] == [3, 4, 5, 6]
    alone = sinusoid.run(config_of(tmp_path, seed=4))
    found = summary["results"][1]
    assert found["config"] == alone["config"]
    np.testing.assert_allclose(found["metrics"]["mse"]["mean"], alone["metrics"]["mse"]["mean"], rtol=1e-4)
    np.testing.assert_allclose(logged(run_dir / "seed-4"), logged(tmp_path), rtol=1e-5)
    one, other = (runs.load(directory).params for directory in (run_dir / "seed-4", tmp_path))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert (summary["execution"]["seeds"], summary["execution"]["devices"]) == (4, 4)


def test_what_a_run_keeps_is_written_into_directories_that_are_claimed(tmp_path):
    kept = []

    def training_of(config):
        training = sinusoid.training_of(config)
        return training._replace(keep=lambda run_dir: kept.append((run_dir / "config.json").exists()))

    seeds.run_seeds(sinusoid.run, training_of, sinusoid.with_paper_defaults(config_of(tmp_path, seeds=2)))
    assert kept == [True, True]


def test_the_summary_has_the_mean_over_seeds_and_its_interval(together):
    run_dir, summary = together
    final = [result["metrics"]["mse"]["mean"][-1] for result in summary["results"]]
    assert len(set(final)) == 4
    assert summary["metrics"]["mse"]["mean"][-1] == pytest.approx(np.mean(final))
    low, high = stats.t.interval(0.95, 3, np.mean(final), stats.sem(final))
    assert summary["metrics"]["mse"]["ci95"][-1] == pytest.approx((high - low) / 2)
    assert json.loads((run_dir / "seeds.json").read_text()) == summary
    assert (run_dir / "figures" / "learning_curve.pdf").exists()


def test_a_finished_command_that_is_given_again_keeps_how_it_was_executed(together):
    run_dir, summary = together
    assert {"devices", "temporary_bytes"} <= summary["execution"].keys()
    assert sinusoid.run(config_of(run_dir, seeds=4))["execution"] == summary["execution"]


def test_the_report_takes_in_every_seed_as_a_result_of_its_own(together, tmp_path):
    run_dir, _ = together
    for reader in (lambda directory: report.add(directory, tmp_path), runs.load):
        with pytest.raises(runs.RunError, match="holds several seeds; name one of its directories seed-3, seed-4"):
            reader(run_dir)
    files = [report.add(run_dir / f"seed-{seed}", tmp_path) for seed in (3, 4)]
    assert [file.stem.rpartition("_")[2] for file in files] == ["seed-3", "seed-4"]
    assert len({commands.command(json.loads(file.read_text())) for file in files}) == 1


def test_seeds_that_were_saved_at_different_steps_go_on_from_the_last_common_one(together, tmp_path, monkeypatch):
    """As when the process was killed between the checkpoints of two seeds."""
    save, saved = checkpoint.save, []

    def save_some(directory, step, tree, **keywords):
        saved.append(step)
        if len(saved) == 7:  # two seeds have step 4, and two have step 2 alone
            raise KeyboardInterrupt
        save(directory, step, tree, **keywords)

    monkeypatch.setattr(checkpoint, "save", save_some)
    config = config_of(tmp_path, seeds=4)
    with pytest.raises(KeyboardInterrupt):
        sinusoid.run(config)
    monkeypatch.undo()
    steps = [checkpoint.latest(tmp_path / f"seed-{seed}" / "checkpoints") for seed in (3, 4, 5, 6)]
    assert steps == [4, 4, 2, 2]
    shown = []
    monkeypatch.setattr(common, "progress_bar", lambda num_steps: contextlib.nullcontext(shown.append))
    summary = sinusoid.run(config)
    # The time left is that of all seeds; a seed's own record has its share of the time.
    record = json.loads((tmp_path / "seed-3" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (shown[-1]["step"], 4 * shown[-1]["steps_per_second"]) == (6, pytest.approx(record["steps_per_second"]))
    assert summary["metrics"] == together[1]["metrics"]
    for seed in (3, 6):
        assert logged(tmp_path / f"seed-{seed}") == logged(together[0] / f"seed-{seed}")


def test_seeds_that_are_stopped_within_the_last_checkpoint_end_with_the_same_parameters(
    together, tmp_path, monkeypatch
):
    """Those that were saved last are not trained on without the others, which would round in another way."""
    whole, config = together[0], config_of(tmp_path, seeds=4)
    save = checkpoint.save

    def save_some(directory, step, tree, **keywords):
        if step == 6 and directory.parent.name == "seed-6":
            raise KeyboardInterrupt
        save(directory, step, tree, **keywords)

    monkeypatch.setattr(checkpoint, "save", save_some)
    with pytest.raises(KeyboardInterrupt):
        sinusoid.run(config)
    monkeypatch.undo()
    sinusoid.run(config)
    for seed in range(3, 7):
        one, other = (runs.load(run_dir / f"seed-{seed}").params for run_dir in (whole, tmp_path))
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert logged(whole / f"seed-{seed}") == logged(tmp_path / f"seed-{seed}")


def test_more_seeds_leave_those_that_are_finished_as_they_are(together, tmp_path):
    shutil.copytree(together[0], tmp_path, dirs_exist_ok=True)
    summary = sinusoid.run(config_of(tmp_path, seeds=5))
    assert summary["seeds"] == [3, 4, 5, 6, 7]
    assert summary["results"][:4] == together[1]["results"]
    assert summary["execution"].get("seeds", 1) == 1
    assert logged(tmp_path / "seed-3") == logged(together[0] / "seed-3")
    assert [step for step, _ in logged(tmp_path / "seed-7")] == [2, 4, 6]


def test_the_summary_has_the_tested_seeds_of_an_earlier_call_too(together, tmp_path):
    for name in ("seed-5", "seed-6"):
        shutil.copytree(together[0] / name, tmp_path / name)
    (tmp_path / "seed-6" / "results.json").unlink()
    summary = sinusoid.run(config_of(tmp_path, seeds=2))
    assert summary["seeds"] == [3, 4, 5]
    assert summary["results"][2] == together[1]["results"][2]
    final = [result["metrics"]["mse"]["mean"][-1] for result in summary["results"]]
    assert summary["metrics"]["mse"]["mean"][-1] == pytest.approx(np.mean(final))


def test_seeds_of_other_data_are_not_averaged(together, tmp_path):
    shutil.copytree(together[0] / "seed-5", tmp_path / "seed-5")
    runs.write_json(tmp_path / "seed-5" / runs.DATA_FILE, {"sha256": "of other data"})

    def training_of(config):
        return sinusoid.training_of(config)._replace(data_digest="of these data")

    with pytest.raises(runs.RunError, match="seed-5 was made with other data"):
        seeds.run_seeds(sinusoid.run, training_of, sinusoid.with_paper_defaults(config_of(tmp_path, seeds=2)))


def test_a_seed_cannot_join_others_while_they_are_extended(together, tmp_path):
    for seed in (3, 4):
        shutil.copytree(together[0] / f"seed-{seed}", tmp_path / f"seed-{seed}")
    with pytest.raises(runs.RunError, match=r"at meta-step 6 and .*seed-5 at 0: too far apart .* --seed 5 --run-dir"):
        sinusoid.run(config_of(tmp_path, seeds=3, num_meta_steps=8, val_every=10))
    # Nothing has changed: the earlier command shows what it has made.
    assert not (tmp_path / "seed-5").exists()
    assert sinusoid.run(config_of(tmp_path, seeds=2))["results"] == together[1]["results"][:2]


def test_seeds_that_are_far_apart_are_not_trained_together(together, tmp_path):
    shutil.copytree(together[0] / "seed-3", tmp_path / "seed-3")
    with pytest.raises(runs.RunError, match=r"seed-3 is at meta-step 6 and .*seed-4 at 0: .* --seed 4 --run-dir"):
        sinusoid.run(config_of(tmp_path, seeds=2, num_meta_steps=8))
    assert len(logged(tmp_path / "seed-3")) == 3


def test_a_directory_of_seeds_has_one_configuration(together):
    run_dir, _ = together
    with pytest.raises(
        runs.RunError, match=r"holds seed-[3-6] of another configuration: outer_lr is 0\.001 there and 0\.5"
    ):
        sinusoid.run(config_of(run_dir, seed=9, seeds=2, outer_lr=0.5))
    with pytest.raises(runs.RunError, match=r"holds seed-[56] of another .*: num_meta_steps is 6 there and 8 here"):
        sinusoid.run(config_of(run_dir, seeds=2, num_meta_steps=8))
    assert sorted(runs.seed_directories(run_dir)) == ["seed-3", "seed-4", "seed-5", "seed-6"]


def test_a_directory_is_one_run_or_several_seeds(together):
    with pytest.raises(runs.RunError, match=r"holds several seeds .*seed-3, .* give --seeds to go on with them"):
        sinusoid.run(config_of(together[0]))
    with pytest.raises(runs.RunError, match="holds one run; leave --seeds out"):
        sinusoid.run(config_of(together[0] / "seed-3", seeds=2))


def test_a_directory_of_a_seed_that_is_in_use_is_refused(tmp_path):
    config = config_of(tmp_path, seeds=2)
    of_seed = sinusoid.with_paper_defaults(dataclasses.replace(config, seed=4, seeds=1, run_dir=tmp_path / "seed-4"))
    with runs.open_run(of_seed.run_dir, of_seed), pytest.raises(runs.RunError, match="in use by a running process"):
        sinusoid.run(config)


def test_metrics_of_different_length_share_a_table(together, tmp_path, monkeypatch, capsys):
    shutil.copytree(together[0], tmp_path, dirs_exist_ok=True)
    config = config_of(tmp_path, seeds=4)

    def run(of_seed):
        found = together[1]["results"][of_seed.seed - config.seed]
        return found | {"metrics": {"walks": {"mean": [1.0, 2.0]}, "share": {"mean": [0.5]}}}

    monkeypatch.setattr(seeds.figures, "learning_curves", lambda *args: None)
    summary = seeds.run_seeds(run, sinusoid.training_of, sinusoid.with_paper_defaults(config))
    assert summary["metrics"]["share"]["mean"] == [0.5]
    assert "2.0000" in capsys.readouterr().out


def test_seeds_are_trained_in_one_process_and_followed_by_nobody(tmp_path, monkeypatch):
    watched = dataclasses.replace(config_of(None).tracking, wandb=True)
    with pytest.raises(runs.RunError, match="--wandb follows one seed"):
        sinusoid.run(config_of(tmp_path / "run", seeds=2, tracking=watched))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(runs.RunError, match="--seeds 2 trains in one process"):
        sinusoid.run(config_of(tmp_path / "run", seeds=2))
    assert not (tmp_path / "run").exists()


def test_a_seed_that_was_ahead_is_saved_with_the_others(tmp_path):
    """Otherwise there would be no step that all seeds have, and no way to go on."""
    training = common.Training(None, None, validate=lambda params: 0.0)
    members = [common.Member(tmp_path / name, None, training) for name in ("ahead", "behind")]
    start = MetaState({"w": np.zeros(3)}, (), np.int32(0))
    # It was killed between the two checkpoints of step 400.
    for step, saved in ((100, members), (400, members[:1] * 2), (250, members)):
        state = jax.tree.map(lambda x, step=step: np.stack([np.full_like(x, step)] * 2), start)
        common.Progress(saved, state, [{"score": np.zeros(1)}] * 2, step, {"train": 0.0}).save()
    directories = [member.run_dir / "checkpoints" for member in members]
    assert all(checkpoint.exists(directory, 250) for directory in directories)
    shutil.rmtree(directories[0] / "250")
    like = {"state": start, "best": {"score": np.zeros(1)}, "train_seconds": np.float32(0.0)}
    assert checkpoint.restore_latest(directories[0], like).step == 400


def test_no_seed_is_no_number_of_seeds():
    with pytest.raises(ValueError, match="--seeds must be an integer of at least 1, got 0"):
        config_of(None, seeds=0)
