"""Verification in unseen domains in miniature, on made-up identities."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import faces, faces_report, runs, verification
from maml_jax import Batch, Episode, losses

TINY = {"num_meta_steps": 4, "val_every": 2, "log_every": 1, "identities": 3}
rng = np.random.default_rng(0)


def config_of(algorithm="mldg", **settings):
    return dataclasses.replace(faces.METHODS[algorithm], **TINY | settings)


@pytest.fixture
def characters(monkeypatch):
    """Forty characters of four drawings. The first pixel of all drawings of a character names it."""
    images = (rng.random((40, 4, 28, 28, 1)) < 0.2).astype(np.uint8) * 255
    images[:, :, 0, 0, 0] = 100 + np.arange(40)[:, None]
    parts = {"train": images[:20], "val": images[20:25], "test": images[25:]}
    monkeypatch.setattr(faces.omniglot, "load", lambda split, data_dir: parts[split])
    return images


@pytest.mark.parametrize(("algorithm", "name"), [pytest.param("erm", "cdt", marks=pytest.mark.slow), ("mldg", "mfr")])
def test_a_run_is_tested_and_can_be_used(characters, algorithm, name, tmp_path):
    config = config_of(algorithm, losses=name, run_dir=tmp_path / "run")
    results = faces.run(config)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert [(row["by"], row["domain"]) for row in results["evaluations"]] == [
        (by, domain) for by in ("embedding", "pixels") for domain in ("edges", "coarse")
    ]
    learner, params, loaded = runs.load(tmp_path / "run")
    assert loaded.losses == name
    examples = faces.examples_of(faces.with_paper_defaults(config))
    again = faces.test(loaded, learner, params, examples)
    assert again["evaluations"] == results["evaluations"]
    assert (tmp_path / "run" / "figures" / "roc.png").exists()
    assert faces.run(config) == results  # found finished


def test_no_identity_is_in_two_parts(characters):
    found = faces.examples_of(faces.with_paper_defaults(config_of()))
    undone = {"plain": lambda x: x, "inverted": lambda x: 255 - x}
    assert list(found.train) == ["plain", "inverted", "thick", "turned"]
    assert list(found.test) == ["edges", "coarse"]
    trained = [{int(undone[name](images)[0, 0, 0, 0]) for images in found.train[name]} for name in undone]
    validated = [{int(undone[name](images)[0, 0, 0, 0]) for images in found.val[name]} for name in undone]
    tested = {int(images[0, 0, 0, 0]) for images in found.test["coarse"]}
    assert validated[0] == validated[1]
    assert len(trained[0]) == len(trained[1]) == 6
    assert not trained[0] & trained[1]
    assert not (trained[0] | trained[1]) & (validated[0] | tested)
    assert not validated[0] & tested
    assert [len(x) for x in (validated[0], tested)] == [6, 10]


def test_the_test_has_random_images_of_an_identity_and_the_same_ones_in_every_call():
    people = [np.tile(np.arange(20, dtype=np.uint8)[:, None, None, None], (1, 2, 2, 1))] * 5
    chosen = faces.embed(None, {}, people)[..., 0]
    assert chosen.shape == (5, faces.MAX_TEST_IMAGES)
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    assert len({tuple(row) for row in chosen.tolist()}) == 5
    np.testing.assert_array_equal(chosen, faces.embed(None, {}, people)[..., 0])


def test_renderings_keep_shape_and_dtype(characters):
    for name, render in faces.RENDERINGS.items():
        found = render(characters)
        assert (found.shape, found.dtype) == (characters.shape, np.uint8), name
        assert name == "plain" or np.any(found != characters)
    line = np.zeros((1, 28, 28, 1), np.uint8)
    line[0, 10, 5:20, 0] = 200
    assert np.count_nonzero(faces.RENDERINGS["thick"](line)) == 3 * 17
    assert not np.any(faces.RENDERINGS["edges"](line)[line > 0])


def test_erm_with_cdt_measures_every_domain_by_each_other_one():
    config = config_of("erm", losses="cdt", across_weight=1.0)
    plain = config_of("erm", losses="cdt", across_weight=0.0)
    inputs = jnp.asarray(rng.random((3, 6, 28, 28, 1)), jnp.float32)
    targets = jnp.tile(jnp.repeat(jnp.arange(3), 2), (3, 1))
    episode = Episode(Batch(inputs, targets), Batch(inputs[:0], targets[:0]), jax.random.key(0))
    learner = faces.make_learner(config)
    params = learner.init(jax.random.key(1), inputs)
    with_it, without = (faces.make_learner(c).objective(params, episode)[0] for c in (config, plain))
    outputs = jnp.stack([learner.predict(params, x) for x in inputs])
    crossed = losses.cross_domain_triplet(config.margin)
    expected = np.mean(
        [
            crossed(outputs[i], targets[i], outputs[j][None], targets[j][None])
            for i in range(3)
            for j in range(3)
            if i != j
        ]
    )
    np.testing.assert_allclose(with_it - without, expected, rtol=1e-4)


def write_folder(directory, people=5, images=3, domains=("day", "night", "sketch")):
    for domain in domains:
        for person in range(people):
            folder = directory / domain / f"{domain[0]}{person}"
            folder.mkdir(parents=True)
            for image in range(images):
                Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(folder / f"{image}.png")
    return directory


def test_a_folder_of_ones_own(tmp_path):
    directory = write_folder(tmp_path / "data")
    config = config_of("erm", data="folder", data_dir=directory, identities=2, run_dir=tmp_path / "run")
    results = faces.run(config)
    assert results["protocol"]["held_out"] == ["sketch"]
    assert results["protocol"]["sources"] == ["day", "night"]
    assert results["evaluations"][0]["identities"] == 5


def test_people_who_are_trained_on_are_not_tested(tmp_path):
    directory = write_folder(tmp_path / "data")
    for person in range(4):
        (directory / "sketch" / f"s{person}").rename(directory / "sketch" / f"d{person}")
    found = faces.of_folder(directory, ("sketch",))
    # s4 is in no source domain, and one other is taken out of them.
    assert {name: len(people) for name, people in found.test.items()} == {"sketch": 2}
    assert {name: len(people) for name, people in found.val.items()} == {"day": 2, "night": 2}
    assert {name: len(people) for name, people in found.train.items()} == {"day": 2, "night": 3}


def test_people_who_are_in_all_domains_are_in_one_part_only(tmp_path):
    for domain in ("day", "night", "sketch"):
        for person in range(10):
            folder = tmp_path / domain / f"p{person}"
            folder.mkdir(parents=True)
            for image in range(2):  # whose grey names the person
                Image.fromarray(np.full((9, 7), 20 * person, np.uint8)).save(folder / f"{image}.png")
    found = faces.of_folder(tmp_path, ("sketch",))
    parts = [
        {int(images[0].mean()) // 20 for people in part.values() for images in people}
        for part in (found.train, found.val, found.test)
    ]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert len(set.union(*parts)) == 10
    assert all(len(people) == 6 for people in found.train.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: (d / "day" / "d0" / "1.png").unlink() or (d / "day" / "d0" / "2.png").unlink(),
            "d0 holds one image",
        ),
        (lambda d: (d / "day" / "d0" / "1.png").write_bytes(b"nothing"), "1.png"),
        (lambda d: (d / "extra").mkdir(), "extra holds no folder of a person"),
        (lambda d: [(d / "day" / f"d{i}").rename(d / "night" / f"x{i}") for i in range(3)], "2 people, of whom 0 are"),
    ],
)
def test_folders_that_do_not_suffice_are_refused(tmp_path, spoil, message):
    directory = write_folder(tmp_path / "data")
    spoil(directory)
    with pytest.raises(ValueError, match=message):
        faces.run(config_of("erm", data="folder", data_dir=directory, held_out=("sketch",), run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"identities": 1}, "--identities must be an integer of at least 2, got 1"),
        ({"shot": 1}, "--shot must be an integer of at least 2, got 1"),
        ({"held_out": ("fog",)}, "--held-out fog is no domain; choose among plain"),
        ({"data": "folder"}, "--data folder needs the folder by --data-dir"),
        ({"positive_threshold": 2.0}, r"--positive-threshold 2\.0 must be a cosine"),
        ({"scale": 0.0}, r"--scale=0\.0 must be a positive number"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_too_few_identities_are_refused_before_training(characters, tmp_path):
    with pytest.raises(ValueError, match="--identities 7 exceeds the 6 training identities"):
        faces.run(config_of(identities=7, run_dir=tmp_path / "run"))
    folder = {"data": "folder", "data_dir": write_folder(tmp_path / "data"), "held_out": ("sketch",)}
    with pytest.raises(ValueError, match="--identities 7 exceeds the 3 training identities of a source domain of fold"):
        faces.run(config_of(identities=7, run_dir=tmp_path / "run", **folder))
    with pytest.raises(ValueError, match="leaves no source domain"):
        faces.run(config_of(held_out=tuple(faces.RENDERINGS), run_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match="--shot 5 exceeds the 4 images of a training identity of characters"):
        faces.run(config_of(shot=5, run_dir=tmp_path / "run"))


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        ("mldg", {}, "--num-held-out 1 leaves none of the 1 source domains for meta-train"),
        ("erm", {"losses": "cdt"}, "the one source domain turned, .* need two; let it have fewer domains$"),
        ("erm", {}, "let it have fewer domains, or set --across-weight 0"),
    ],
)
def test_losses_between_domains_need_two(characters, algorithm, settings, message):
    others = tuple(name for name in faces.RENDERINGS if name != "turned")
    config = faces.with_paper_defaults(config_of(algorithm, held_out=others, **settings))
    with pytest.raises(ValueError, match=message):
        faces.examples_of(config)
    faces.examples_of(faces.with_paper_defaults(config_of("erm", held_out=others, across_weight=0.0)))


def test_the_loss_between_domains_needs_two_in_meta_train(characters):
    others = tuple(faces.RENDERINGS)[2:]
    with pytest.raises(ValueError, match="--num-held-out 1 leaves one of the 2 source domains for meta-train"):
        faces.examples_of(faces.with_paper_defaults(config_of("mldg", held_out=others)))
    for settings in ({"across_weight": 0.0}, {"losses": "cdt"}):
        faces.examples_of(faces.with_paper_defaults(config_of("mldg", held_out=others, **settings)))


def result(algorithm, seed, rate, **config):
    metrics = {"tar_at_0.01": {"mean": [rate], "ci95": [0.01]}}
    roc = np.linspace(0, 1, 41).tolist()
    rows = [{"by": by, "domain": "edges", "metrics": metrics, "roc": roc} for by in ("embedding", "pixels")]
    config = {"losses": "mfr", "data": "characters"} | config
    return {"algorithm": algorithm, "seed": seed, "config": config, "evaluations": rows}


def test_differences_are_paired_by_seed():
    results = [result("erm", s, 0.3 + 0.1 * s) for s in range(3)] + [
        result("mldg", s, 0.31 + 0.1 * s) for s in range(3)
    ]
    rows = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in faces_report.section(results, lambda r: []).splitlines()[4:]
    ]
    assert rows[0][1:] == ["edges", "3", "40.00 ± 24.84", ""]
    assert rows[1][3:] == ["41.00 ± 24.84", "1.00 ± 0.00"]
    assert rows[2][0] == "pixels"

    def flags_of(result):  # of other data, and of the method
        return ["--identities 6", *["--first-order", "--num-held-out 2"] * (result["algorithm"] == "mldg")]

    text = faces_report.section(results, flags_of)
    assert "`--first-order`, `--num-held-out 2` | edges | 3 | 41.00 ± 24.84 | 1.00 ± 0.00 |" in text
    assert faces_report.section([], lambda r: []) == ""


def test_tested_identities_are_seen_in_the_held_out_renderings(characters):
    found = faces.examples_of(faces.with_paper_defaults(config_of())).test
    tested = [int(images[0, 0, 0, 0]) - 100 for images in found["coarse"]]
    for name, people in found.items():
        np.testing.assert_array_equal(people, faces.RENDERINGS[name](characters[tested]))


def test_the_held_out_domains_have_no_part_in_the_selection(characters):
    config = faces.with_paper_defaults(config_of())
    examples, learner = faces.examples_of(config), faces.make_learner(config)
    params = learner.init(jax.random.key(0), np.zeros((1, 1, 28, 28, 1), np.float32))
    alone = examples._replace(train={}, test={})
    assert faces.validation_score(learner, params, alone) == faces.validation_score(learner, params, examples)
    assert len(faces.validation_pairs(None, {}, alone)) == 4


def test_the_threshold_of_a_test_is_chosen_on_the_sources(characters, monkeypatch):
    config, given = faces.with_paper_defaults(config_of()), []
    examples, learner = faces.examples_of(config), faces.make_learner(config)
    params = learner.init(jax.random.key(0), np.zeros((1, 1, 28, 28, 1), np.float32))
    tested = faces.verification.tested
    monkeypatch.setattr(
        faces.verification, "tested", lambda pairs, threshold: given.append(threshold) or tested(pairs, threshold)
    )
    faces.test(config, learner, params, examples)
    for of_method, thresholds in ((learner, given[:2]), (None, given[2:])):
        chosen = map(faces.verification.best_threshold, faces.validation_pairs(of_method, params, examples))
        assert thresholds == [pytest.approx(np.mean(list(chosen)))] * 2


@pytest.mark.parametrize("name", ["mfr", "cdt"])
def test_mldg_has_the_loss_between_domains(name, monkeypatch):
    given = {}
    monkeypatch.setattr(faces, "mldg", lambda model, loss_fn, **settings: given.update(settings))
    faces.make_learner(config_of(losses=name, across_weight=2.0))
    outputs = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 4)), jnp.float32)
    targets = jnp.tile(jnp.repeat(jnp.arange(3), 2), (3, 1))
    if name == "mfr":
        found, expected = given["across_fn"](outputs[1:], targets[1:]), losses.domain_alignment(outputs[1:])
        assert given["held_out_fn"] is None
    else:
        others = outputs[1:], targets[1:]
        found = jax.jit(given["held_out_fn"])(outputs[:1], targets[:1], *others)
        expected = jax.jit(losses.cross_domain_triplet(0.3))(outputs[0], targets[0], *others)
        assert given["across_fn"] is None
    np.testing.assert_allclose(found, 2.0 * expected, rtol=1e-5)
    assert (given["beta"], given["num_held_out"]) == (1.0, 1)


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        (
            {"losses": "mfr", "scale": 3.0, "positive_threshold": 0.5, "negative_threshold": -0.2},
            losses.hard_pair_attention(positive_threshold=0.5, negative_threshold=-0.2),
        ),
        ({"losses": "cdt", "scale": 3.0, "margin": 0.7}, losses.triplet(0.7)),
    ],
)
def test_the_loss_of_a_domain_is_that_of_pairs_and_of_classification(settings, pairs, monkeypatch):
    monkeypatch.setattr(faces, "erm", lambda model, loss_fn, **settings: loss_fn)
    outputs = jnp.asarray(np.random.default_rng(1).normal(size=(12, 4)), jnp.float32)
    targets = jnp.repeat(jnp.arange(3), 4)
    expected = pairs(outputs, targets) + losses.soft_classification(3.0)(outputs, targets)
    loss_fn = faces.make_learner(config_of("erm", **settings))
    np.testing.assert_allclose(loss_fn(outputs, targets), expected, rtol=1e-6)
    # These outputs tell every setting from its default.
    for name in settings.keys() - {"losses"}:
        changed = faces.make_learner(config_of("erm", **settings | {name: getattr(faces.METHODS["erm"], name)}))
        assert abs(changed(outputs, targets) - expected) > 1e-3, name


def test_the_triplets_between_domains_have_the_margin_of_the_settings(monkeypatch):
    monkeypatch.setattr(faces, "erm", lambda model, loss_fn, *, across_fn: across_fn)
    outputs = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 4)), jnp.float32)
    targets = jnp.tile(jnp.repeat(jnp.arange(3), 2), (2, 1))
    found = faces.make_learner(config_of("erm", losses="cdt", margin=0.7))(outputs, targets)
    crossed = losses.cross_domain_triplet(0.7)
    pairs = [crossed(outputs[i], targets[i], outputs[1 - i][None], targets[1 - i][None]) for i in range(2)]
    np.testing.assert_allclose(found, np.mean(pairs), rtol=1e-5)


@pytest.mark.parametrize(("network", "ndim"), [("mlp", 2), ("conv4", 4)])
def test_the_network_is_that_of_the_settings(network, ndim):
    model = faces.make_model(config_of(network=network))
    images = jax.ShapeDtypeStruct((5, faces.SIZE, faces.SIZE, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    assert max(leaf.ndim for leaf in jax.tree.leaves(params)) == ndim  # kernels of convolutions have four axes
    assert jax.eval_shape(model.apply, params, images).shape == (5, 64)


def test_a_state_is_selected_by_the_rate_at_one_percent(monkeypatch):
    # Of 100 pairs of two identities one may be accepted, so the threshold is 0.98.
    different = np.arange(100) / 100
    domains = [verification.Pairs(np.array([same]), different) for same in ([0.985, 0.97], [0.985, 0.985])]
    monkeypatch.setattr(faces, "validation_pairs", lambda *args: domains)
    assert faces.validation_score(None, {}, None) == 0.75


def test_only_seeds_that_both_have_are_paired():
    results = [result("erm", s, 0.3 + 0.1 * s) for s in range(3)] + [
        result("mldg", s, 0.31 + 0.1 * s) for s in range(1, 4)
    ]
    row = next(line for line in faces_report.section(results, lambda r: []).splitlines() if line.startswith("| MLDG"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["edges", "3", "51.00 ± 24.84", "1.00 ± 0.00"]


def test_curves_are_means_over_seeds_of_the_embedding_and_of_the_pixels():
    results = [result("erm", seed, 0.3) for seed in (0, 1)]
    results[1]["evaluations"][0]["roc"] = [0.0] * 41
    found = faces.curves_of({"ERM": results})
    assert {domain: list(curves) for domain, curves in found.items()} == {"edges": ["ERM", "pixels"]}
    np.testing.assert_allclose(found["edges"]["ERM"], np.linspace(0, 0.5, 41))
    np.testing.assert_allclose(found["edges"]["pixels"], np.linspace(0, 1, 41))
