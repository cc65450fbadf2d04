"""The training loop of the experiments."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments import bandits, common, devices, hyperparameters, navigation, nonfinite, progress, runs
from experiments import sinusoid as sinusoid_experiment
from experiments.tracking import Tracking
from maml_jax import (
    InnerDescent,
    InnerInfo,
    MetaInfo,
    ReptileDescent,
    checkpoint,
    init_meta_state,
    losses,
    make_meta_step,
    maml,
    models,
    reptile,
    types,
)
from maml_jax.cost import count_flops
from maml_jax.meta_gradient import meta_gradient
from maml_jax.tasks import sinusoid


@dataclasses.dataclass(frozen=True)
class Config:
    algorithm: str = "maml"
    num_meta_steps: int = 12
    meta_batch_size: int = 4
    outer_optimizer: str = "adam"
    outer_lr: float = 1e-2
    outer_schedule: str = "constant"
    outer_lr_end: float = 0.0
    outer_half_life: int = 2
    outer_clip: float | None = None
    hyperparameters: InnerDescent = dataclasses.field(default_factory=InnerDescent)
    val_every: int = 4
    log_every: int = 2
    eval_episodes: int = 2
    chunk_size: int | None = None
    seed: int = 0
    run_dir: Path | None = None
    on_nonfinite: str = "stop"
    tracking: Tracking = dataclasses.field(default_factory=Tracking)


SAMPLE = sinusoid.make_sampler(shot=3, query_shot=3)
MODEL = models.mlp(features=(8, 1))
LEARNER = maml(MODEL, losses.mean_squared_error, inner_optimizer=optax.sgd(0.01), num_inner_steps=1)


def train(run_dir, config=Config(), validate=None, learner=LEARNER):
    with runs.open_run(run_dir, config):
        return common.train(run_dir, config, common.Training(learner, SAMPLE, validate))


def logged(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = train(tmp_path / "whole")
    assert (whole.execution["devices"], whole.execution["chunk_size"]) == (4, 1)
    state = common.initial_state(LEARNER, common.outer_optimizer(Config()), np.zeros((3, 1)), jax.random.key(0), None)
    episodes = jax.eval_shape(jax.vmap(SAMPLE), jax.random.split(jax.random.key(0), Config().meta_batch_size))
    step = make_meta_step(LEARNER, common.outer_optimizer(Config()), chunk_size=1)
    assert whole.execution["flops"] == count_flops(step.jitted, state, episodes)
    assert whole.execution["temporary_bytes"] > 0
    calls = []

    def interrupt(params):
        calls.append(params)
        if len(calls) == 2:  # the state of step 4 is saved, that of step 8 is not
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halves", validate=interrupt)
    resumed = train(tmp_path / "halves")
    chex.assert_trees_all_equal(resumed.params, whole.params)
    steps = {name: [record["step"] for record in logged(tmp_path / name)] for name in ("whole", "halves")}
    assert steps["whole"] == steps["halves"] == [2, 4, 6, 8, 10, 12]


def test_the_best_validated_state_is_returned_and_survives_an_interruption(tmp_path):
    seen, scores = [], iter([0.1, 0.9, 0.3])

    def validate(params):
        seen.append(jax.tree.map(np.asarray, params))
        return next(scores)

    trained = train(tmp_path, validate=validate)
    assert trained.best_step == 8
    chex.assert_trees_all_equal(trained.params, seen[1])
    again = train(tmp_path, validate=validate)  # finished: nothing is trained or validated
    assert again.best_step == 8
    chex.assert_trees_all_equal(again.params, seen[1])
    loaded = common.load_params(tmp_path, Config(), LEARNER, np.zeros((3, 1), np.float32))
    chex.assert_trees_all_equal(loaded, seen[1])


def test_a_signal_stops_after_the_compiled_call_and_the_run_resumes_from_there(tmp_path):
    whole = train(tmp_path / "whole")

    def terminate(params):
        os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "stopped", validate=terminate)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # The signal comes while step 4 is validated; a signal between validations saves a state of its own.
    assert checkpoint.latest(tmp_path / "stopped" / "checkpoints") == 4
    resumed = train(tmp_path / "stopped")
    chex.assert_trees_all_equal(resumed.params, whole.params)


def test_a_signal_in_the_last_validation_is_obeyed_too(tmp_path):
    steps = iter(range(4, 100, 4))

    def terminate(params):
        if next(steps) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, validate=terminate)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoint.latest(tmp_path / "checkpoints") == 12
    train(tmp_path, validate=lambda params: pytest.fail("the training is finished"))


def test_a_signal_between_validations_saves_the_state(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    write = runs.finite

    def terminate(record):
        if isinstance(record, dict) and record.get("step") == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return write(record)

    monkeypatch.setattr(runs, "finite", terminate)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "stopped")
    monkeypatch.undo()
    assert stopped.value.code == 128 + signal.SIGINT
    assert checkpoint.latest(tmp_path / "stopped" / "checkpoints") == 2
    # Nothing is validated, so the last state is selected.
    loaded = common.load_params(tmp_path / "stopped", Config(), LEARNER, np.zeros((3, 1), np.float32))
    chex.assert_trees_all_equal(loaded, train(tmp_path / "short", Config(num_meta_steps=2)).params)
    chex.assert_trees_all_equal(train(tmp_path / "stopped").params, whole.params)


def test_long_training_is_saved_between_validations(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    monkeypatch.setattr(common, "SAVE_SECONDS", 0.0)
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (saved.append(arguments[1]), save(*arguments)))
    often = train(tmp_path / "often")
    assert saved == [2, 4, 6, 8, 10, 12]
    chex.assert_trees_all_equal(often.params, whole.params)


def test_the_first_call_is_saved_although_no_time_has_passed(tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (saved.append(arguments[1]), save(*arguments)))
    train(tmp_path, Config(num_meta_steps=4, val_every=4, log_every=1))
    assert saved == [1, 4]
    saved.clear()
    train(tmp_path, Config(num_meta_steps=8, val_every=4, log_every=1))
    assert saved == [8]


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_is_used(tmp_path, capsys):
    whole = train(tmp_path)
    shutil.rmtree(next((tmp_path / "checkpoints" / "12").glob("*/d"), tmp_path / "checkpoints" / "12"))
    resumed = train(tmp_path)
    assert "checkpoints [12] in" in capsys.readouterr().out
    chex.assert_trees_all_equal(resumed.params, whole.params)


def test_a_run_may_be_continued_with_more_steps_and_other_chunks(tmp_path):
    train(tmp_path, Config(num_meta_steps=4))
    longer = train(tmp_path, Config(chunk_size=1))
    assert longer.best_step == 12
    chex.assert_trees_all_equal(longer.params, train(tmp_path / "whole").params)
    with pytest.raises(runs.RunError, match="num_meta_steps is 12 there and 4 here"):
        train(tmp_path, Config(num_meta_steps=4))


NOT_FINITE = {
    "the loss": lambda loss, params: loss / 0.0,
    # The value is finite, its derivative is not.
    "the meta-gradient": lambda loss, params: loss + jnp.sqrt(0.0 * jnp.sum(params["dense_0"]["bias"])),
}


@pytest.mark.parametrize("what", NOT_FINITE)
@pytest.mark.parametrize("num_meta_steps", [1, 12])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, what, num_meta_steps):
    def objective(params, episode):
        loss, info = LEARNER.objective(params, episode)
        return NOT_FINITE[what](loss, params), info

    message = rf"{what} is not finite at meta-step 0 .*set its eps_root to 1e-8; else lower --inner-lr or --outer-lr"
    message += r".* by --outer-clip\. --on-nonfinite skip leaves such"
    for _ in range(2):  # the second attempt finds no state of the first
        with pytest.raises(runs.RunError, match=message):
            train(tmp_path, Config(num_meta_steps=num_meta_steps), learner=LEARNER._replace(objective=objective))
        assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_parameters_that_are_not_finite_stop_the_run(tmp_path):
    def objective(params, episode):
        loss, info = LEARNER.objective(params, episode)
        return 1e3 * loss, info

    # The meta-gradient is about a thousand, and the update larger than any number.
    config = Config(outer_optimizer="sgd", outer_lr=1e38)
    with pytest.raises(runs.RunError, match=r"the parameters are not finite at meta-step 0 .*lower --inner-lr"):
        train(tmp_path, config, learner=LEARNER._replace(objective=objective))
    assert checkpoint.latest(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("score", [np.nan, -np.inf])
def test_a_run_whose_validations_are_not_finite_has_selected_nothing(tmp_path, score):
    for _ in range(2):  # also when there is nothing left to train
        with pytest.raises(runs.RunError, match=r"no validation of .* was finite.*metrics\.jsonl\. .*--inner-lr"):
            train(tmp_path, validate=lambda params: score)
    assert checkpoint.latest(tmp_path / "checkpoints") == 12
    scores = iter([score, 0.5, score])
    assert train(tmp_path / "other", validate=lambda params: next(scores)).best_step == 8


def test_a_run_without_a_terminal_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    train(tmp_path / "short")
    assert re.findall(r"step (\d+)/12 ", capsys.readouterr().out) == ["12"]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    train(tmp_path / "long")
    lines = capsys.readouterr().out
    assert re.findall(r"step (\d+)/12 ", lines) == ["2", "4", "6", "8", "10", "12"]
    assert re.search(r"meta-steps/s  0 min left  \d+\.\d GB", lines)


@pytest.mark.parametrize("num_meta_steps", [2, 4])
def test_a_trace_is_written_however_few_calls_there_are(tmp_path, num_meta_steps):
    train(tmp_path, Config(num_meta_steps=num_meta_steps, tracking=Tracking(profile=True)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_inner_step_that_is_not_finite_is_named(tmp_path):
    unstable = maml(
        models.mlp(features=(8, 1)), losses.mean_squared_error, inner_optimizer=optax.sgd(1e20), num_inner_steps=4
    )
    message = r"meta-step 0 .*Its support loss ceased to be finite before inner step [23]: \d.*(inf|nan)"
    with pytest.raises(runs.RunError, match=message):
        train(tmp_path, learner=unstable)
    # The forward pass is finite here, and the loss of the query set is not.
    info = InnerInfo(np.array([[1.0, 0.5]]), None)
    info = MetaInfo(np.array([np.nan]), np.array([np.nan]), np.array([False]), info)
    with pytest.raises(
        runs.RunError, match=r"before each inner step are finite: 1, 0\.5\. .* inner step 2, the last, or in"
    ):
        nonfinite.check_finite(info, 0, tmp_path, Config())


def spoilt(is_bad, learner=LEARNER):
    """The learner with a loss and a meta-gradient of NaN on tasks for which `is_bad(episode)`."""

    def objective(params, episode):
        loss, info = learner.objective(params, episode)
        return loss * jnp.where(is_bad(episode), jnp.nan, 1.0), info

    return learner._replace(objective=objective)


def test_meta_gradients_that_are_not_finite_are_left_out_if_asked_to(tmp_path, capsys):
    """Meta-steps 2 and 5 of 12 have no update: the same run by hand, one step after the other."""
    config = Config(on_nonfinite="skip", outer_optimizer="sgd")
    key = runs.streams(0).train
    first_inputs = [
        SAMPLE(types.task_keys(jax.random.fold_in(key, step), 4)[1]).support.inputs[0, 0] for step in (2, 5)
    ]
    learner = spoilt(lambda episode: jnp.any(episode.support.inputs[0, 0] == jnp.stack(first_inputs)))
    trained = train(tmp_path / "skipped", config, learner=learner)
    assert "2 meta-gradients were not finite and left out" in capsys.readouterr().out
    assert [record["skipped"] for record in logged(tmp_path / "skipped")] == [0, 1, 1, 0, 0, 0]
    assert all(np.isfinite(record["loss"]) for record in logged(tmp_path / "skipped"))
    params = jax.tree.map(np.asarray, LEARNER.init(runs.streams(0).init, np.zeros((3, 1), np.float32)))
    for step in range(12):
        if step not in (2, 5):
            episodes = jax.vmap(SAMPLE)(types.task_keys(jax.random.fold_in(key, step), 4))
            _, grads = meta_gradient(LEARNER, params, episodes)
            params = jax.tree.map(lambda p, g: p - config.outer_lr * g, params, grads)
    chex.assert_trees_all_close(trained.params, params, rtol=1e-4, atol=1e-5)
    with pytest.raises(runs.RunError, match="the loss is not finite at meta-step 0"):
        train(tmp_path / "stopped", config, learner=spoilt(lambda episode: True))
    assert checkpoint.latest(tmp_path / "stopped" / "checkpoints") is None


def test_a_step_that_is_left_out_leaves_the_carried_state_of_the_inner_optimiser():
    config = Config(
        on_nonfinite="skip",
        outer_optimizer="sgd",
        outer_lr=1.0,
        hyperparameters=ReptileDescent(inner_optimizer="adam", carry_state=True),
    )
    settings = {"inner_optimizer": optax.adam(0.1, b1=0.0), "num_inner_steps": 1, "carry_state": True}
    learner = reptile(MODEL, losses.mean_squared_error, **settings)
    learner = spoilt(lambda episode: episode.support.inputs[0, 0] == 0, learner)
    optimizer = common.outer_optimizer(config)
    good = jax.tree.map(lambda x: x[None], SAMPLE(jax.random.key(0)))
    bad = good._replace(support=jax.tree.map(jnp.zeros_like, good.support))
    state = init_meta_state(learner, optimizer, jax.random.key(1), good.support.inputs[0])
    step = make_meta_step(learner, optimizer)
    for episodes, count in ((good, 1), (bad, 1), (good, 2)):
        state, _ = step(state, episodes)
        assert state.params["inner_state"][0].count == count
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_a_call_of_one_meta_step_may_be_left_out(tmp_path):
    config = Config(on_nonfinite="skip", outer_optimizer="sgd", log_every=1, num_meta_steps=4)
    bad = SAMPLE(types.task_keys(jax.random.fold_in(runs.streams(0).train, 2), 4)[1]).support.inputs[0, 0]
    train(tmp_path, config, learner=spoilt(lambda episode: episode.support.inputs[0, 0] == bad))
    assert [record["skipped"] for record in logged(tmp_path)] == [0, 0, 1, 0]
    assert [record["loss"] is None for record in logged(tmp_path)] == [False, False, True, False]
    info = MetaInfo(np.array([np.nan]), np.array([np.nan]), np.array([False]), None)
    nonfinite.check_finite(info, 0, tmp_path, config, is_skipped=True, num_in_a_row=nonfinite.MOST_SKIPPED - 1)
    with pytest.raises(runs.RunError, match="the loss is not finite at meta-step 0"):
        nonfinite.check_finite(info, 0, tmp_path, config, is_skipped=True, num_in_a_row=nonfinite.MOST_SKIPPED)


def test_a_training_does_not_end_where_it_was_stopped_without_a_validation(tmp_path):
    config = Config(num_meta_steps=6)
    train(tmp_path, config, validate=lambda params: 0.5)
    records = logged(tmp_path)
    del records[-1]["val"]  # as of a run of more meta-steps that was stopped here
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(runs.RunError, match=r"was stopped at meta-step 6, where it has no validation, .* give a la"):
        train(tmp_path, config, validate=lambda params: 0.5)
    train(tmp_path, dataclasses.replace(config, num_meta_steps=8), validate=lambda params: 0.5)
    assert logged(tmp_path)[-1]["val"] == 0.5


def test_a_loss_that_is_not_finite_stops_a_run_that_leaves_out_gradients(tmp_path):
    info = MetaInfo(np.array([1.0, np.inf]), np.ones(2), np.array([True, False]), None)
    with pytest.raises(runs.RunError, match="the loss is not finite at meta-step 1"):
        nonfinite.check_finite(info, 0, tmp_path, Config(), is_skipped=True)
    others = info._replace(grad_norm=np.array([1.0, np.nan]))
    nonfinite.check_finite(others, 0, tmp_path, Config(), is_skipped=True)


def test_a_mesh_is_the_largest_that_divides():
    assert jax.device_count() == 8
    assert devices.mesh_for(32).size == 8
    assert devices.mesh_for(12).size == 6
    assert devices.mesh_for(25).size == 5
    assert devices.mesh_for(11) is None


@pytest.mark.parametrize(("name", "expected"), [("sgd", -1.0), ("adam", -0.5)])
def test_the_outer_optimiser_is_the_one_asked_for_at_its_rate(name, expected):
    # From a gradient of 2, Adam first steps by its rate, and gradient descent by twice its rate.
    optimizer = common.outer_optimizer(Config(outer_optimizer=name, outer_lr=0.5))
    updates, _ = optimizer.update(jnp.float32(2.0), optimizer.init(jnp.float32(0.0)))
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_a_bfloat16_product_is_one_on_every_device():
    assert devices.matmul_algorithm("bfloat16") == "BF16_BF16_F32"
    assert devices.matmul_algorithm("float32") == "float32"
    assert jax.lax.DotAlgorithmPreset[devices.matmul_algorithm("bfloat16")]


def test_of_equal_scores_the_first_state_is_kept_and_the_time_of_training_survives(tmp_path):
    scores = iter([0.9, 0.9, 0.9])  # no number of float32
    trained = train(tmp_path, validate=lambda params: next(scores))
    assert trained.best_step == 4
    again = train(tmp_path)  # finished: nothing is trained
    assert trained.seconds["train"] > 0
    assert again.seconds["train"] == pytest.approx(trained.seconds["train"])


def test_the_step_that_is_not_finite_is_named(tmp_path):
    info = MetaInfo(np.array([1.0, 2.0, np.nan]), np.array([1.0, np.inf, np.nan]), np.array([True, False, False]), None)
    with pytest.raises(runs.RunError, match=r"the meta-gradient is not finite at meta-step 6 \(loss 2, .* inf\)"):
        nonfinite.check_finite(info, 5, tmp_path, Config())


@pytest.mark.parametrize(
    ("config", "remedies"),
    [
        (
            sinusoid_experiment.METHODS["maml"],
            "If the inner optimiser is adaptive, set its eps_root to 1e-8; else lower --inner-lr or --outer-lr, or "
            "bound the meta-gradient by --outer-clip. --on-nonfinite skip leaves such meta-steps out. ",
        ),
        (
            bandits.METHODS["rl2"],
            "Lower --outer-lr, or bound the meta-gradient by --max-norm. --on-nonfinite skip leaves such meta-steps "
            "out. ",
        ),
        (hyperparameters.Config(), "Lower --initial-rate or --outer-lr. "),
        (
            navigation.METHODS["maml"],
            "If the inner optimiser is adaptive, set its eps_root to 1e-8; else lower --inner-lr or --max-kl. ",
        ),
        (
            sinusoid_experiment.METHODS["pretrained"],
            "Lower --outer-lr, or bound the meta-gradient by --outer-clip. --on-nonfinite skip leaves such meta-steps "
            "out. ",
        ),
    ],
)
def test_only_flags_that_an_experiment_has_are_remedies(config, remedies):
    assert nonfinite._remedies(config, is_skipped=False) == remedies


def test_without_meta_steps_the_initial_parameters_are_the_result(tmp_path):
    untrained = train(tmp_path, Config(num_meta_steps=0), validate=lambda params: 0.0)
    assert untrained.best_step == 0
    again = train(tmp_path, Config(num_meta_steps=0), validate=lambda params: 0.0)
    chex.assert_trees_all_equal(untrained.params, again.params)
    inputs = np.zeros((3, 1), np.float32)
    chex.assert_trees_all_equal(untrained.params, common.load_params(tmp_path, Config(), LEARNER, inputs))
    # A validated state takes their place, however bad it is.
    assert train(tmp_path, validate=lambda params: -1e9).best_step == 4


def test_entries_of_the_meta_gradient_are_bounded_before_the_optimiser():
    optimizer = common.outer_optimizer(Config(outer_optimizer="sgd", outer_lr=0.5, outer_clip=0.1))
    gradient = jnp.array([0.05, -3.0, 7.0])
    updates, _ = optimizer.update(gradient, optimizer.init(gradient))
    np.testing.assert_allclose(updates, [-0.025, 0.05, -0.05], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("constant", 0.5), ("linear", 0.3), ("cosine", 0.3), ("halved", 0.25)]
)
def test_the_outer_rate_falls_to_its_end(schedule, halfway):
    config = Config(outer_optimizer="sgd", outer_lr=0.5, outer_schedule=schedule, outer_lr_end=0.1, num_meta_steps=4)
    optimizer = common.outer_optimizer(config)
    state, rates = optimizer.init(jnp.ones(1)), []
    for _ in range(5):
        update, state = optimizer.update(jnp.ones(1), state)
        rates.append(-float(update[0]))
    end = {"constant": 0.5, "halved": 0.125}.get(schedule, 0.1)
    np.testing.assert_allclose([rates[0], rates[2], rates[4]], [0.5, halfway, end], rtol=1e-6)


def test_the_half_life_is_one_of_meta_steps_however_many_updates_each_has():
    config = Config(outer_optimizer="sgd", outer_lr=0.5, outer_schedule="halved", outer_half_life=2, num_meta_steps=8)
    optimizer = common.outer_optimizer(config, updates_per_step=3)
    state, rates = optimizer.init(jnp.ones(1)), []
    for _ in range(13):
        update, state = optimizer.update(jnp.ones(1), state)
        rates.append(-float(update[0]))
    np.testing.assert_allclose([rates[0], rates[5], rates[6], rates[11], rates[12]], [0.5, 0.5, 0.25, 0.25, 0.125])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_ends_with_the_last_update_of_the_last_meta_step(schedule):
    config = Config(outer_optimizer="sgd", outer_lr=0.5, outer_schedule=schedule, outer_lr_end=0.1, num_meta_steps=4)
    optimizer = common.outer_optimizer(config, updates_per_step=3)
    state, rates = optimizer.init(jnp.ones(1)), []
    for _ in range(13):
        update, state = optimizer.update(jnp.ones(1), state)
        rates.append(-float(update[0]))
    np.testing.assert_allclose([rates[0], rates[6], rates[12]], [0.5, 0.3, 0.1], rtol=1e-6)


def test_the_best_states_are_kept_in_order():
    best = {"params": np.zeros((3, 1)), "score": np.full(3, -np.inf, np.float32), "step": np.zeros(3, np.int32)}
    for step, score in enumerate([0.5, 0.7, 0.5, np.nan, 0.6, 0.7], 1):
        best = common.keep_best(best, np.array([float(step)]), score, step)
    np.testing.assert_array_equal(best["score"], np.float32([0.7, 0.7, 0.6]))
    np.testing.assert_array_equal(best["step"], [2, 6, 5])  # of equal scores the older one is in front
    np.testing.assert_array_equal(common.selected(best), [[2.0], [6.0], [5.0]])


def test_initial_parameters_are_no_member_of_an_ensemble():
    best = {"params": np.zeros((3, 1)), "score": np.full(3, -np.inf, np.float32), "step": np.zeros(3, np.int32)}
    best = common.keep_best(best, np.array([9.0]), common.UNTRAINED, 0, always=True)
    np.testing.assert_array_equal(common.selected(best), [[9.0]])
    best = common.keep_best(best, np.array([4.0]), -1e9, 4)
    np.testing.assert_array_equal(common.selected(best), [[4.0]])


def test_fewer_validations_than_states_make_a_smaller_ensemble(tmp_path):
    config = Config(num_meta_steps=8)
    scores = iter([0.2, 0.1])
    with runs.open_run(tmp_path, config):
        trained = common.train(
            tmp_path, config, common.Training(LEARNER, SAMPLE, lambda params: next(scores), num_best=3)
        )
    assert {len(leaf) for leaf in jax.tree.leaves(trained.params)} == {2}
    assert trained.best_step == 4


def test_a_narrow_terminal_shows_every_number(monkeypatch):
    shown = Console(width=80, force_terminal=True, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(progress, "console", shown)
    with progress.progress_bar(60_000) as show:
        show({"step": 12_000, "loss": 1.2345, "steps_per_second": 123.4, "val": 0.9123})
    text = shown.file.getvalue()
    for part in ("12000/60000", "123.4/s", "loss 1.2345", "validation 0.9123", "GB"):
        assert part in text
    assert "…" not in text


def finish(run_dir):
    results = {"experiment": "other", "config": dataclasses.asdict(Config()), "seed": 0, "meta_steps": 12}
    runs.write_json(run_dir / "results.json", results)


def test_a_finished_run_whose_checkpoints_are_gone_is_not_trained_again(tmp_path):
    train(tmp_path)
    finish(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = logged(tmp_path)
    for name in ("results.json", "results_6_2.json"):
        with pytest.raises(
            runs.RunError, match=rf"{name} has the results after 12 meta-steps, and there is no checkpoint"
        ):
            train(tmp_path)
        assert logged(tmp_path) == before
        (tmp_path / "results.json").rename(tmp_path / "results_6_2.json") if name == "results.json" else None


def test_a_curve_keeps_every_validation(tmp_path):
    validated = (37, 402, 999)
    records = [
        {"step": step, "loss": 1.0 / step, "grad_norm": 1.0} | ({"val": 0.5, "train": 0.6} if step in validated else {})
        for step in range(1, 1001)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = runs.curve(tmp_path)
    assert [record["step"] for record in found if "val" in record] == list(validated)
    assert [record["step"] for record in found if "val" not in record] == list(range(10, 1001, 10))
    assert set(found[0]) == {"step", "loss"}
    assert found[3] == {"step": 37, "loss": 1 / 37, "val": 0.5, "train": 0.6}


def test_results_of_another_name_are_not_those_of_the_run(tmp_path):
    train(tmp_path)
    finish(tmp_path)
    (tmp_path / "results.json").rename(tmp_path / "results_first_run.json")
    assert runs.results_before(tmp_path) == []
    assert train(tmp_path).best_step == 12  # and the run goes on
    (tmp_path / "results_first_run.json").rename(tmp_path / "results_12_4.json")
    assert runs.results_before(tmp_path) == [tmp_path / "results_12_4.json"]


def test_a_state_before_that_of_the_results_is_not_loaded(tmp_path):
    whole = train(tmp_path)
    finish(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    with pytest.raises(runs.RunError, match="results after 12 meta-steps, and its newest undamaged checkpoint is of 8"):
        common.load_params(tmp_path, Config(), LEARNER, np.zeros((3, 1), np.float32))
    chex.assert_trees_all_equal(train(tmp_path).params, whole.params)
    loaded = common.load_params(tmp_path, Config(), LEARNER, np.zeros((3, 1), np.float32))
    chex.assert_trees_all_equal(loaded, whole.params)


def test_a_signal_while_the_last_checkpoint_is_written_is_obeyed(tmp_path, monkeypatch):
    save = checkpoint.save

    def terminate(directory, step, tree):
        save(directory, step, tree)
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save", terminate)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoint.latest(tmp_path / "checkpoints") == 12
