"""Hyperparameters learned through a training run: the derivative, what it costs, and the experiment in miniature."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import devices
from experiments import hyperparameters as hyper
from maml_jax import MetaLearner, mixed_mode, parallel
from maml_jax.cost import temporary_bytes

STEPS, LAYERS = 6, ("dense_0", "dense_1")


def test_segments_need_less_memory_than_mixed_mode_and_that_less_than_reverse_over_reverse():
    config = hyper.Config(hidden=8, batch_size=20)
    images, labels = jax.ShapeDtypeStruct((40, 8, 8), jnp.uint8), jax.ShapeDtypeStruct((40,), jnp.int32)
    episode = hyper.Episode(hyper.Batch(images, labels), hyper.Batch(images, labels), jax.random.key(0))

    def megabytes(num_steps, **settings):
        learner = hyper.make_learner(config, num_inner_steps=num_steps, **settings)
        start = hyper.constant(LAYERS, num_steps, rate=0.1, momentum=0.5, l2=1e-5)
        return temporary_bytes(jax.grad(learner.objective, has_aux=True), start, episode) / 1e6

    reverse = megabytes(100, num_segments=1, inner_grad=jax.value_and_grad)
    mixed = megabytes(100, num_segments=1, inner_grad=mixed_mode)
    segments = megabytes(100, num_segments=10)
    assert 2 * segments < mixed < reverse


def test_random_search_is_over_ten_numbers():
    class Counting:
        def __init__(self):
            self.drawn, self.rng = 0, np.random.default_rng(0)

        def uniform(self, low, high):
            self.drawn += 1
            return self.rng.uniform(low, high)

    rng = Counting()
    drawn = hyper.random_schedule(LAYERS, 9, rng)
    assert rng.drawn == 10
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(drawn))


def test_a_drawn_schedule_by_hand():
    # Warm-up over 0.5 · 4 steps, exponent 1; first rate, last rate and L2 of two layers; two momenta.
    numbers = [0.5, 1.0, *np.log([0.8, 0.25, 0.4, 1.0]), *np.log([0.5, 0.1]), *np.log([1e-3, 1e-4])]

    class Given:
        def uniform(self, low, high):
            return numbers.pop(0)

    drawn = hyper.random_schedule(LAYERS, 4, Given())
    decay, warm_up = np.array([1.0, 0.75, 0.5, 0.25]), np.array([0.5, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(np.exp(drawn.log_rates["dense_0"]), 0.8 * warm_up * (0.25 + 0.75 * decay), rtol=1e-5)
    np.testing.assert_allclose(np.exp(drawn.log_rates["dense_1"]), 0.4 * warm_up, rtol=1e-5)  # the last is the first
    momentum = 1 / (1 + np.exp(-drawn.momentum_logits))
    np.testing.assert_allclose(momentum, [0.5, 0.6, 0.7, 0.8], rtol=1e-5)
    np.testing.assert_allclose([np.exp(drawn.log_l2[name]) for name in LAYERS], [1e-3, 1e-4], rtol=1e-5)
    assert not numbers


@pytest.mark.parametrize(("method", "rates"), [("constant rate", [1, 1, 1, 1]), ("linear decay", [1, 0.75, 0.5, 0.25])])
def test_what_a_grid_tries_is_what_it_says(method, rates):
    for candidate in hyper.candidates(method, LAYERS, hyper.Config(num_inner_steps=4), 6):
        tried, said = candidate.hyperparameters, candidate.description
        for name in LAYERS:
            np.testing.assert_allclose(np.exp(tried.log_rates[name]), said["rate"] * np.array(rates), rtol=1e-5)
            np.testing.assert_allclose(np.exp(tried.log_l2[name]), said["l2"], rtol=1e-5)
        np.testing.assert_allclose(1 / (1 + np.exp(-tried.momentum_logits)), said["momentum"], atol=2e-6)


def test_hand_made_schedules():
    decay = hyper.linear_decay(LAYERS, 4, rate=0.8, momentum=0.5, l2=1e-3)
    np.testing.assert_allclose(np.exp(decay.log_rates["dense_1"]), [0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(decay.momentum_logits, 0.0, atol=1e-6)
    tried = hyper.candidates("constant rate", LAYERS, hyper.Config(num_inner_steps=4), 30)
    assert len(tried) == 30
    rates = {candidate.description["rate"] for candidate in tried}
    assert (min(rates), max(rates), len(rates)) == (pytest.approx(0.03), pytest.approx(5.0), 10)


# The experiment


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 90)
    images = rng.integers(0, 100, (90, 6, 6), np.uint8)
    images[np.arange(90), labels % 6, labels // 6] = 255
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / hyper.FILE, images=images, labels=labels)
    return hyper.Config(
        data_dir=tmp_path / "data", run_dir=tmp_path / "run", num_inner_steps=4, batch_size=5, hidden=3,
        num_training=40, num_heldout=20, num_test=20, meta_batch_size=2, num_meta_steps=2, val_every=1, log_every=1,
        eval_episodes=2, val_episodes=2, memory_steps=(4,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny):
    return hyper.run(tiny)


def test_the_test_digits_choose_nothing(tiny, finished, tmp_path):
    file = tiny.data_dir / hyper.FILE
    images, labels = (np.load(file)[name] for name in ("images", "labels"))
    order = np.random.default_rng(tiny.seed).permutation(len(images))
    images[order[tiny.num_training + tiny.num_heldout :]] = 7  # the test digits, and those that are not used
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / hyper.FILE, images=images, labels=labels)
    other = dataclasses.replace(tiny, data_dir=tmp_path / "other", run_dir=tmp_path / "other_run")
    found, expected = hyper.run(other)["methods"], finished["methods"]
    with pytest.raises(hyper.RunError, match="was made with other data"):
        hyper.run(dataclasses.replace(other, run_dir=tiny.run_dir))
    for name, method in expected.items():
        for chosen_by in ("hyperparameters", "heldout_loss"):
            assert found[name][chosen_by] == method[chosen_by]
        assert found[name]["test_loss"] != method["test_loss"]


def test_the_experiment_learns_compares_and_draws(tiny, finished, capsys):
    results = finished
    assert json.loads((tiny.run_dir / "results.json").read_text()) == results
    assert set(results["methods"]) == {"before learning", "hypergradients", *hyper.BASELINES}
    for name, method in results["methods"].items():
        assert method["runs"] == (0 if name == "before learning" else 8)
        assert ("test_loss_more" in method) == (name != "hypergradients")
        if name != "hypergradients":
            more = method["test_loss"]["mean"] - results["methods"]["hypergradients"]["test_loss"]["mean"]
            assert method["test_loss_more"]["mean"] == pytest.approx(more, abs=1e-5)
            assert method["test_loss_more"]["ci95"] > 0
            # Paired: the runs of two methods have the same data, weights and mini-batches.
            unpaired = np.hypot(*(results["methods"][n]["test_loss"]["ci95"] for n in (name, "hypergradients")))
            assert method["test_loss_more"]["ci95"] < unpaired
        for metric in ("heldout_loss", "test_loss", "test_accuracy"):
            assert np.isfinite(method[metric]["mean"])
    before, learned = (results["methods"][name]["hyperparameters"] for name in ("before learning", "hypergradients"))
    for field in before:
        changed = jax.tree.map(lambda a, b: np.all(np.asarray(a) != np.asarray(b)), before[field], learned[field],
                               is_leaf=lambda x: isinstance(x, list))  # fmt: skip
        assert all(jax.tree.leaves(changed)), field
    assert results["metrics"]["test_loss"]["mean"] == [results["methods"]["hypergradients"]["test_loss"]["mean"]]
    assert results["relative_flops"] > 3
    assert {row["way"] for row in results["memory"]} == set(hyper.WAYS)
    drawn = {file.name for file in (tiny.run_dir / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in ("learning_curve", "schedules", "memory") for kind in ("png", "pdf")}
    assert hyper.run(tiny) == results  # found finished
    assert "linear decay" in capsys.readouterr().out


def test_the_parts_of_the_digits_share_none(tiny):
    parts = hyper.load_digits(tiny)
    seen = [image.tobytes() for part in parts.values() for image in part.inputs]
    assert len(seen) == len(set(seen)) == 80
    assert [len(part.targets) for part in parts.values()] == [40, 20, 20]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inner_steps": 0}, "--num-inner-steps must be an integer of at least 1, got 0"),
        ({"initial_rate": 0.0}, "--initial-rate 0.0 must be a positive number"),
        ({"initial_momentum": 1.0}, "--initial-momentum 1.0 must be between 0 and 1"),
        ({"batch_size": 99}, "--batch-size 99 exceeds --num-training 40"),
        ({"truncation": 5}, "truncation=5 exceeds num_inner_steps=4"),
        (
            {"num_segments": 3},
            "num_segments=3 does not divide the 4 differentiated steps; choose a divisor, such as 2",
        ),
        ({"log_every": 2}, "--log-every 2 does not divide --val-every 1"),
        ({"memory_steps": (4, 0)}, "--memory-steps must be an integer of at least 1, got 0"),
        ({"seed": 2**32}, "--seed 4294967296 does not fit into 32 bits"),
        ({"outer_lr_end": float("nan")}, "--outer-lr-end=nan must be a number of at least 0"),
        ({"outer_lr_end": 9.0}, "--outer-lr-end 9.0 must be between 0 and --outer-lr"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny, **settings)


def test_missing_and_wrong_data_are_named(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("MAML_JAX_PACKS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"--data-dir or \$MAML_JAX_PACKS"):
        hyper.load_digits(dataclasses.replace(tiny, data_dir=None))
    with pytest.raises(FileNotFoundError, match="there is no"):
        hyper.load_digits(dataclasses.replace(tiny, data_dir=tmp_path))
    with pytest.raises(hyper.RunError, match=r"ask for 91 digits and .* has 90"):
        hyper.load_digits(dataclasses.replace(tiny, num_test=31))
    images = np.zeros((3, 2, 2), np.uint8)
    for wrong, labels in ((np.zeros((3, 2)), np.zeros(3)), (images, np.full(3, 50)), (images, np.zeros((3, 1)))):
        np.savez(tmp_path / hyper.FILE, images=wrong, labels=labels)
        with pytest.raises(hyper.RunError, match=r"uint8 images \[n, height, width\] and labels \[n\] from 0 to 9"):
            hyper.load_digits(dataclasses.replace(tiny, data_dir=tmp_path))


def test_each_part_of_the_digits_scores_itself(tiny):
    digits, learner = hyper.load_digits(tiny), hyper.make_learner(tiny)
    start = hyper.constant(LAYERS, 4, rate=0.1, momentum=0.5, l2=1e-5)
    exchanged = digits | {"heldout": digits["test"], "test": digits["heldout"]}
    found, other = (hyper.score(learner, start, parts, tiny)[0] for parts in (digits, exchanged))
    for metric in ("loss", "accuracy"):
        assert found[f"test_{metric}"] == other[f"heldout_{metric}"]
        assert found[f"heldout_{metric}"] == other[f"test_{metric}"]
    assert found["test_loss"] != found["heldout_loss"]


def test_the_search_takes_the_lowest_finite_loss():
    # The loss of a candidate is what it holds.
    learner = MetaLearner(None, None, None, lambda held, episode: (held, None))
    tried = [hyper.Candidate(jnp.float32(x), {"loss": x}) for x in (3.0, np.nan, 1.0, 2.0)]
    assert hyper.make_search(learner, None)(tried).description == {"loss": 1.0}


def test_a_hypergradient_passes_through_no_more_than_the_last_steps_that_are_asked_for(tiny):
    digits, learner = hyper.load_digits(tiny), hyper.make_learner(dataclasses.replace(tiny, truncation=2))
    episode = hyper.make_sampler(digits["training"], digits["heldout"])(jax.random.key(0))
    start = hyper.constant(LAYERS, 4, rate=0.1, momentum=0.5, l2=1e-5)
    gradient, _ = jax.jit(jax.grad(learner.objective, has_aux=True))(start, episode)
    for rates in gradient.log_rates.values():
        np.testing.assert_array_equal(np.flatnonzero(rates), [2, 3])


def test_candidates_that_are_divided_over_devices_are_searched_as_on_one(monkeypatch):
    losses = (3.0, np.nan, 1.0, 2.0)
    learner = MetaLearner(None, None, None, lambda held, episode: (held + episode, None))
    tried = [hyper.Candidate(jnp.float32(x), {"loss": x}) for x in losses]
    divided, each_task = [], hyper.each_task

    def recorded(function, mesh):
        program = each_task(function, mesh)
        return lambda *args: divided.append(program(*args)) or divided[-1]

    monkeypatch.setattr(hyper, "each_task", recorded)
    monkeypatch.setattr(devices, "mesh_for", lambda *counts: parallel.task_mesh(jax.devices()[:2]))
    assert hyper.make_search(learner, jnp.float32(5.0))(tried).description == {"loss": 1.0}
    (found,) = divided
    np.testing.assert_array_equal(found, 5.0 + np.array(losses))
    assert len(found.devices()) == 2


def test_a_score_is_the_same_on_two_devices(tiny, monkeypatch):
    digits, learner = hyper.load_digits(tiny), hyper.make_learner(tiny)
    start = hyper.constant(LAYERS, 4, rate=0.1, momentum=0.5, l2=1e-5)
    given, evaluate = [], hyper.evaluate_objective
    monkeypatch.setattr(
        hyper, "evaluate_objective", lambda *args, **kw: given.append(kw["mesh"]) or evaluate(*args, **kw)
    )
    found = []
    for mesh in (None, parallel.task_mesh(jax.devices()[:2])):
        monkeypatch.setattr(devices, "mesh_for", lambda *counts, mesh=mesh: mesh)
        found.append(hyper.score(learner, start, digits, tiny))
    assert given == [None, None, mesh, mesh]
    chex.assert_trees_all_close(*found, rtol=1e-5)
