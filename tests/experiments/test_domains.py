"""The experiment on domains in miniature, on made-up drawings and pictures that name themselves."""

import dataclasses
import itertools
import json
import os

import jax
import numpy as np
import pytest

from experiments import domains, runs
from maml_jax import Batch

TINY = {
    "num_meta_steps": 4,
    "val_every": 2,
    "log_every": 1,
    "shot": 3,
    "network": "mlp",
    "features": 4,
    "num_characters": 3,
}
CENTRE = (Ellipsis, 14, 14, 0)
"""The pixel of a drawing that no rotation moves away from its grey value, if the drawing has only one."""


def config_of(algorithm="mldg", **settings):
    return dataclasses.replace(domains.METHODS[algorithm], **{**TINY, **settings})


def examples_of(config):
    config = domains.with_paper_defaults(config)
    return domains.READERS[config.data](config)


@pytest.fixture
def drawings(monkeypatch):
    """Three characters of 20 drawings. Each has one grey value, 4 for the first and 4 more for every other."""
    values = 4 * (1 + np.arange(60, dtype=np.uint8)).reshape(3, 20, 1, 1, 1)
    monkeypatch.setattr(domains.omniglot, "load", lambda split, data_dir: np.tile(values, (1, 1, 28, 28, 1)))


def write_pack(directory, held_out_seed=0, **changes):
    """A pack like pacs_32.npz, of 30 images a domain. The seed changes the images of "photo" only."""
    of_domain, rng = np.repeat(np.arange(4), 30), np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 32, 32, 3)).astype(np.uint8)
    images[of_domain == 2] = np.random.default_rng(held_out_seed).integers(0, 256, (30, 32, 32, 3))
    content = {
        "images": images,
        "domains": of_domain.astype(np.uint8),
        "labels": (np.arange(120) % 7).astype(np.uint8),
        "domain_names": np.array(domains.DOMAINS["pacs"]),
        "class_names": np.array(list("abcdefg")),
    }
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / "pacs_32.npz", **content | changes)
    return directory


@pytest.mark.parametrize("algorithm", domains.METHODS)
@pytest.mark.parametrize("data", domains.DOMAINS)
def test_every_algorithm_runs(algorithm, data, drawings, tmp_path):
    data_dir = write_pack(tmp_path / "packs")
    results = domains.run(config_of(algorithm, data=data, data_dir=data_dir, run_dir=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    for metrics in (results["metrics"], results["source_validation"]):
        assert 0 <= metrics["accuracy"]["mean"][0] <= 1
        assert len(metrics["accuracy"]["mean"]) == len(metrics["accuracy"]["ci95"]) == 1
    protocol = results["protocol"]
    assert protocol["selected_step"] in (2, 4)
    assert protocol["held_out"] == domains.DOMAINS[data][-1]
    assert protocol["sources"] == list(domains.DOMAINS[data][:-1])
    assert (protocol["examples"], protocol["validation_examples"]) == {
        "rotated-omniglot": (3 * 7, 5 * 3 * 3),
        "pacs": (30, 3 * 3),
    }[data]
    for name in ("config.json", "metrics.jsonl", "checkpoints", "figures/learning_curve.png"):
        assert (tmp_path / "run" / name).exists()


def test_a_state_is_selected_by_the_validation_examples_of_the_sources(drawings):
    config = domains.with_paper_defaults(config_of())
    examples = domains.READERS[config.data](config)
    training = domains.training_of(config, examples)
    inputs = jax.eval_shape(training.sample_episode, jax.random.key(0)).support.inputs
    params = training.learner.init(jax.random.key(0), np.zeros(inputs.shape, np.float32))
    outputs = training.learner.predict(params, domains.joined(examples.val).inputs)
    right = np.asarray(outputs).argmax(-1)
    # Labels that are right on the validation examples alone.
    ends = np.cumsum([len(batch.targets) for batch in examples.val])[:-1]
    val = [batch._replace(targets=labels) for batch, labels in zip(examples.val, np.split(right, ends), strict=True)]
    wrong = {
        part: [batch._replace(targets=np.full_like(batch.targets, -1)) for batch in batches]
        for part, batches in {"train": examples.train, "test": [examples.test]}.items()
    }
    told = examples._replace(val=val, train=wrong["train"], test=wrong["test"][0])
    assert domains.training_of(config, told).validate(params) == 1.0


def test_a_drawing_is_in_one_part_and_in_every_source_domain(drawings):
    examples = examples_of(config_of(held_out="30"))
    train, val = ([set(batch.inputs[CENTRE].tolist()) for batch in part] for part in (examples.train, examples.val))
    test = set(examples.test.inputs[CENTRE].tolist())
    assert len(train) == len(val) == 5
    assert all(part == train[0] for part in train)
    assert all(part == val[0] for part in val)
    parts = {"train": train[0], "val": val[0], "test": test}
    assert {name: len(part) for name, part in parts.items()} == {"train": 30, "val": 9, "test": 21}
    assert set.union(*parts.values()) == set(range(4, 241, 4))


def test_labels_are_those_of_the_characters(drawings):
    examples = examples_of(config_of())
    characters = {}
    for batch in (*examples.train, *examples.val, examples.test):
        for value, label in zip(batch.inputs[CENTRE].tolist(), batch.targets.tolist(), strict=True):
            characters.setdefault(label, set()).add((value // 4 - 1) // 20)
    assert sorted(map(len, characters.values())) == [1, 1, 1]
    assert set.union(*characters.values()) == {0, 1, 2}


def test_parts_are_the_same_whichever_domain_is_held_out(drawings, tmp_path):
    write_pack(tmp_path)
    first, second = (
        examples_of(config_of(data="pacs", data_dir=tmp_path, held_out=held_out)) for held_out in ("photo", "sketch")
    )
    for part in ("train", "val"):
        for batch, other in zip(getattr(first, part)[:2], getattr(second, part)[:2], strict=True):
            jax.tree.map(np.testing.assert_array_equal, batch, other)
    assert first.test.inputs.shape == (30, 32, 32, 3)
    for train, val in zip(first.train, first.val, strict=True):
        both = np.concatenate([train.inputs, val.inputs]).reshape(30, -1)
        assert (len(train.targets), len(val.targets)) == (27, 3)
        assert len(np.unique(both, axis=0)) == 30


def test_a_rotation_is_about_the_centre():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 1)).astype(np.uint8)
    np.testing.assert_array_equal(domains.rotate(images, 0.0), images)
    np.testing.assert_array_equal(domains.rotate(images, 90.0), np.rot90(images, axes=(1, 2)))
    # A bar through the centre, turned by 45 degrees, lies on the diagonal.
    bar = np.zeros((1, 21, 21, 1), np.uint8)
    bar[0, 10] = 255
    turned = domains.rotate(bar, 45.0)[0, ..., 0].astype(int)
    diagonal = max(np.trace(turned), np.trace(turned[::-1]))
    assert diagonal > 0.9 * 255 * 15
    assert domains.rotate(bar, 30.0).dtype == np.uint8


def test_the_held_out_domain_has_no_part_in_training_and_selection(tmp_path):
    def finished(seed):
        data_dir = write_pack(tmp_path / f"packs{seed}", seed)
        config = config_of("erm", data="pacs", held_out="photo", data_dir=data_dir, run_dir=tmp_path / f"run{seed}")
        return domains.run(config), domains.load(config.run_dir)[1], examples_of(config)

    (first, params, examples), (second, other_params, other_examples) = finished(0), finished(1)
    jax.tree.map(np.testing.assert_array_equal, params, other_params)
    assert first["source_validation"] == second["source_validation"]
    assert first["protocol"] == second["protocol"]
    assert (examples.test.inputs != other_examples.test.inputs).any()
    other = config_of("erm", data="pacs", held_out="photo", data_dir=tmp_path / "packs1", run_dir=tmp_path / "run0")
    with pytest.raises(runs.RunError, match="was made with other data"):
        domains.run(other)


def test_the_trained_network_comes_out_of_a_run(drawings, tmp_path):
    config = config_of(run_dir=tmp_path)
    results = domains.run(config)
    learner, params = domains.load(tmp_path)
    test = examples_of(config).test
    outputs = learner.predict(params, test.inputs.astype(np.float32) / 255)
    accuracy = np.mean(np.argmax(outputs, -1) == test.targets)
    np.testing.assert_allclose(results["metrics"]["accuracy"]["mean"], [accuracy])


@pytest.mark.parametrize("data", domains.DOMAINS)
@pytest.mark.parametrize("network", ["conv4", "mlp"])
def test_a_prediction_does_not_depend_on_other_examples(data, network):
    learner = domains.make_learner(config_of(data=data, network=network))
    inputs = np.random.default_rng(0).random((4, *domains.INPUT_SHAPES[data]), np.float32)
    params = jax.jit(learner.init)(jax.random.key(0), inputs[None])
    together, alone = (jax.jit(learner.predict)(params, batch) for batch in (inputs, inputs[:1]))
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": "20"}, r"--held-out 20 is no domain of rotated-omniglot; choose one of 0, 15, 30"),
        ({"data": "pacs", "held_out": "75"}, r"--held-out 75 is no domain of pacs; choose one of art_painting"),
        ({"num_characters": 1}, r"--num-characters must be an integer of at least 2, got 1"),
        ({"num_characters": 4}, r"--num-characters 4 exceeds the 3 characters of the split"),
        ({"features": 0}, r"--features must be an integer of at least 1"),
        ({"num_held_out": 5}, r"--num-held-out 5 leaves none of the 5 source domains of rotated-omniglot"),
        ({"data": "pacs", "num_held_out": 3}, r"--num-held-out 3 leaves none of the 3 source domains of pacs"),
    ],
)
def test_mistakes_are_reported_before_anything_is_trained(settings, message, drawings, tmp_path):
    hyperparameters = domains.METHODS["mldg"].hyperparameters
    if "num_held_out" in settings:
        hyperparameters = dataclasses.replace(hyperparameters, num_held_out=settings.pop("num_held_out"))
    with pytest.raises(ValueError, match=message):
        domains.run(config_of(hyperparameters=hyperparameters, run_dir=tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_missing_data_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("MAML_JAX_PACKS", raising=False)
    with pytest.raises(FileNotFoundError, match=r"the packs are in no known directory; give .*--data-dir or"):
        domains.run(config_of(data="pacs"))
    np.savez(tmp_path / "pacs_32.npz", images=np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must hold the arrays images, domains, labels, domain_names, class_names"):
        domains.run(config_of(data="pacs", data_dir=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere/pacs_32\.npz; .*images uint8 \[n, 32, 32, 3\]"):
        domains.run(config_of(data="pacs", data_dir=tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no Omniglot at .*nowhere"):
        domains.run(config_of(data_dir=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "changes", [{"class_names": np.array(list("ab"))}, {"domain_names": np.array(["a", "b", "c", "d"])}]
)
def test_another_pack_is_refused(changes, tmp_path):
    write_pack(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"pacs_32\.npz holds domains .*it must hold art_painting, cartoon, photo"):
        examples_of(config_of(data="pacs", data_dir=tmp_path))


def test_the_environment_names_the_packs_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MAML_JAX_PACKS", str(write_pack(tmp_path)))
    assert len(examples_of(config_of(data="pacs")).test.targets) == 30


def test_every_run_has_a_directory_of_its_own():
    names = {
        domains.with_paper_defaults(config_of(algorithm, data=data, seed=seed, held_out=held_out)).run_dir
        for algorithm, seed in itertools.product(domains.METHODS, range(2))
        for data, held_outs in domains.DOMAINS.items()
        for held_out in held_outs
    }
    assert len(names) == 2 * 2 * 10


@pytest.mark.skipif("MAML_JAX_PACKS" not in os.environ, reason="set MAML_JAX_PACKS to a directory with pacs_32.npz")
def test_real_pictures(tmp_path):
    config = config_of(data="pacs", held_out="photo", run_dir=tmp_path)
    results = domains.run(config)
    assert results["protocol"]["examples"] == 1670  # the photographs of PACS
    examples = examples_of(config)
    assert sum(len(b.targets) for b in (*examples.train, *examples.val, examples.test)) == 9991


@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ,
    reason="set TFDS_DATA_DIR to a directory made by `python -m maml_jax.tasks.omniglot_builder --data-dir DIR`",
)
def test_real_characters(tmp_path):
    results = domains.run(config_of(run_dir=tmp_path, num_characters=20))
    assert results["protocol"]["examples"] == 20 * 7
    with pytest.raises(runs.RunError, match=r"is no run directory"):
        domains.load(tmp_path / "figures")


def test_every_domain_is_turned_by_its_angle(drawings):
    examples, angles = examples_of(config_of(held_out="30")), (0, 15, 45, 60, 75)
    for angle, batch in [*zip(angles * 2, examples.train + examples.val, strict=True), (30, examples.test)]:
        plain = np.broadcast_to(batch.inputs[:, 14:15, 14:15], batch.inputs.shape)  # a drawing has one grey value
        np.testing.assert_array_equal(batch.inputs, domains.rotate(plain, angle))


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((100, 32, 32, 3), np.uint8)},
        {"images": np.zeros((120, 32, 32, 3))},
        {"labels": np.arange(120) % 7 + 50},
        {"domains": np.full(120, 9)},
        {"labels": np.zeros(120)},
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changes, tmp_path):
    write_pack(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"must hold uint8 images and as many (labels|domains), integers below [47]"):
        examples_of(config_of(data="pacs", data_dir=tmp_path))


def test_the_training_names_its_data(tmp_path):
    digests = set()
    for seed in (0, 1):
        config = config_of(data="pacs", data_dir=write_pack(tmp_path / str(seed), held_out_seed=seed))
        digests.add(domains.training_of(domains.with_paper_defaults(config)).data_digest)
    assert None not in digests
    assert len(digests) == 2


def test_other_labels_are_other_data():
    images = np.arange(4 * 3, dtype=np.uint8).reshape(4, 3)
    digests = {
        runs.digest_of_batches([Batch(images, np.array(labels))])
        for labels in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0])
    }
    assert len(digests) == 4


@pytest.mark.parametrize("network", ["mlp", "conv4"])
def test_episodes_and_the_network_have_the_sizes_of_the_settings(drawings, network):
    training = domains.training_of(domains.with_paper_defaults(config_of(shot=7, features=6, network=network)))
    episode = jax.eval_shape(training.sample_episode, jax.random.key(0))
    assert episode.support.inputs.shape == (5, 7, 28, 28, 1)
    params = jax.eval_shape(training.learner.init, jax.random.key(0), episode.support.inputs)
    widths = {leaf.shape[-1] for leaf in jax.tree.leaves(params)}
    assert widths == {6, 3}  # of the layers, and the classes
