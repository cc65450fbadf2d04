"""Translation from few sentences in miniature, on made-up languages."""

import dataclasses
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up_languages import TINY, config_of, write
from sacrebleu.metrics import BLEU

from experiments import (
    bleu,
    cli,
    common,
    decoding,
    finetuning,
    low_resource,
    own_language,
    parallel_text,
    runs,
    translation,
)
from maml_jax import Episode, losses
from maml_jax.models import TASK_VECTORS, UNIVERSAL_VECTORS


@pytest.fixture(autouse=True, scope="module")
def short_validation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "VALIDATION_STEPS", 20)
        yield


RUNS = {
    "fomaml": {"pretrain_steps": 2, "lexical": True, "sizes": (4,)},
    # The last state is not the best.
    "pretrained": {"network": "gru", "outer_lr": 1.0, "val_every": 1, "beam": 1, "sizes": (4,)},
}


@pytest.fixture(scope="module", params=["fomaml", pytest.param("pretrained", marks=pytest.mark.slow)])
def finished(request, corpus, tmp_path_factory):
    """The configuration and the results of a finished run."""
    config = config_of(corpus, request.param, run_dir=tmp_path_factory.mktemp("finished"), **RUNS[request.param])
    return config, translation.run(config)


def test_a_run_is_tested_and_can_be_used(corpus, finished):
    config, results = finished
    algorithm, run_dir = config.algorithm, config.run_dir
    assert json.loads((run_dir / "results.json").read_text()) == results
    selected = [row for row in results["evaluations"] if row["state"] == "selected"]
    # The alignment of a lexical representation needs pairs.
    sizes = {4: 2} if config.lexical else {0: 1, 4: 2}
    expected = [(language, size, subsets) for language in ("xc", "xd") for size, subsets in sizes.items()]
    assert [(row["language"], row["pairs"], len(row["bleu"])) for row in selected] == expected
    assert len(results["examples"]) == 2 * 3
    assert results["examples"][0]["reference"] in parallel_text.Corpus(corpus).lines("test", "en")
    last = [row for row in results["evaluations"] if row["state"] == "last"]
    assert [row["step"] for row in last] == ([4] * 4 if algorithm == "pretrained" else [])  # the last of FOMAML is best
    assert (run_dir / "figures" / "bleu.png").exists()
    assert translation.run(config) == results  # found finished
    learner, params, loaded = runs.load(run_dir)
    assert loaded.sources == ("xa", "xb")
    episode = translation.setup_of(config).training.sample_episode(jax.random.key(0))
    assert np.isfinite(jax.jit(learner.objective)(params, episode)[0])
    if not config.lexical:
        # Without the text: the run directory is enough.
        command = translation.Translate(run=run_dir, text=("kidog kiruns", "kithe kiman"))
        assert len(translation.translate(command)) == 2


def test_a_network_from_scratch_is_tested_without_training(corpus, tmp_path):
    config = config_of(corpus, "pretrained", num_meta_steps=0, sizes=(4,), beam=1, run_dir=tmp_path / "run")
    results = translation.run(config)
    assert [row["state"] for row in results["evaluations"]] == ["selected"] * 4
    assert results["protocol"]["pairs_trained"] == 0


@pytest.mark.parametrize("finished", ["fomaml"], indirect=True)
def test_a_run_translates_a_language_of_ones_own(corpus, finished, tmp_path, capsys, monkeypatch):
    run_dir = finished[0].run_dir
    lines = [parallel_text.Corpus(corpus).lines("train", name)[:20] for name in ("xc", "en")]
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join("\t".join(pair) for pair in zip(*lines, strict=True)) + "\n\n")
    command = translation.Translate(run=run_dir, text=("kidog kiruns",), pairs=file)
    assert len(translation.translate(command)) == 1
    assert "fine-tuned on 18 pairs" in capsys.readouterr().out
    # Mistakes are found before a fine-tuning.
    monkeypatch.setattr(finetuning, "fine_tune_all", None)
    with pytest.raises(ValueError, match="give some by --pairs"):
        translation.translate(dataclasses.replace(command, pairs=None))
    with pytest.raises(ValueError, match="--text holds no words"):
        translation.translate(dataclasses.replace(command, text=("kidog", " ")))
    with pytest.raises(ValueError, match=r"of --text has \d+ subwords and the network reads at most 31; divide it"):
        translation.translate(dataclasses.replace(command, text=("kidog " * 40,)))
    file.write_text("kidog\tdog\n" * 9)
    with pytest.raises(ValueError, match=r"there are 9 pairs .* at least 10"):
        translation.translate(command)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        translation.translate(dataclasses.replace(command, pairs=tmp_path / "none"))
    with pytest.raises(runs.RunError, match="no run directory"):
        translation.translate(dataclasses.replace(command, run=tmp_path))
    with pytest.raises(ValueError, match="--seed must be an integer of at least 0, got -1"):
        dataclasses.replace(command, seed=-1)
    spoilt = tmp_path / "spoilt"
    for name, message in {
        "source.model": r"the subwords are damaged \(an empty file\)",
        "keys.npy": "keys.npy is dam",
    }.items():
        shutil.copytree(run_dir, spoilt)
        (spoilt / "text" / name).write_bytes(b"")
        with pytest.raises((ValueError, runs.RunError), match=message):
            translation.translate(dataclasses.replace(command, run=spoilt))
        shutil.rmtree(spoilt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"kidog dog\n", "line 1 of .* each line holds a sentence, one tab and its English"),
        (b"kidog\tdog\n\nkiman\t\n", "line 3 of"),
        (b"kidog\tdog\tcat\n", "line 1 of"),
        (b"\n", "holds no pair"),
        (b"\xff\xfe\tdog\n", "pairs.tsv is not UTF-8 text"),
    ],
)
def test_a_file_of_pairs_that_is_none_is_refused(tmp_path, content, message):
    file = tmp_path / "pairs.tsv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parallel_text.read_pairs(file)


def test_a_file_of_pairs_may_have_a_mark_and_other_line_ends(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_bytes("\ufeffkidog\tdog\r\nki\u2028man\t man \r\n".encode())
    assert parallel_text.read_pairs(file) == (["kidog", "ki\u2028man"], ["dog", "man"])


def test_translate_is_a_subcommand(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(translation, "translate", seen.append)
    monkeypatch.setattr(cli, "set_up_jax", lambda precision: None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", translation.__spec__)
    monkeypatch.setattr(sys, "argv", ["x", "translate", str(tmp_path / "run"), "--text", "kidog", "ki man"])
    translation._main()
    assert seen == [translation.Translate(run=tmp_path / "run", text=("kidog", "ki man"))]
    monkeypatch.setattr(sys, "argv", ["x", "translate", "--help"])
    with pytest.raises(SystemExit):
        translation._main()
    assert "python -m experiments.translation translate" in capsys.readouterr().out


def test_another_text_than_that_of_the_run_is_refused(corpus, tmp_path):
    text = translation.text_of(config_of(corpus, lexical=True))
    for name, other in {
        "source.model": text._replace(subwords=text.subwords._replace(source=b"others")),
        "keys.npy": text._replace(keys=text.keys + 1),
        "sha256": text._replace(digest="0"),
    }.items():
        directory = tmp_path / name
        directory.mkdir()
        translation.keep_text(directory, text)
        translation.keep_text(directory, text)
        with pytest.raises(runs.RunError, match=f"{name} is not what the text gives now"):
            translation.keep_text(directory, other)


def test_another_word_of_the_test_is_another_text(corpus, tmp_path):
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = translation.text_of(config_of(corpus))
    lines = list(parallel_text.Corpus(corpus).lines("test", "xd"))
    write(tmp_path, "test", "xd", [*lines[:-1], lines[-1] + " bigun"])
    assert translation.text_of(config_of(tmp_path)).digest != before.digest


def test_a_run_of_another_experiment_does_not_translate(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "sinusoid", "algorithm": "fomaml"}))
    with pytest.raises(runs.RunError, match="is a run of sinusoid; name one of translation"):
        translation.translate(translation.Translate(run=tmp_path, text=("kidog",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": ("xa",)}, "--held-out xa is --sources too"),
        ({"validation": "en"}, "--validation en is the target language too"),
        ({"sources": ()}, "--sources  must be one or more, each once"),
        ({"sizes": (8, 4)}, "--sizes 8 4 must be in increasing order"),
        ({"width": 6}, "--width 6 must be a multiple of 4, the heads of the attention"),
        ({"lexical": True, "vector_size": 34}, "--vector-size 34 must be smaller than --source-subwords 60 and"),
        ({"sizes": (4, 4)}, "--sizes 4 4 must be one or more, each once"),
        ({"sizes": (0,)}, "--sizes must be an integer of at least 1, got 0"),
        ({"finetune_steps": 30}, "--finetune-steps 30 must be a multiple of 20"),
        ({"finetune_lr": 0.0}, "--finetune-lr=0.0 must be a positive number"),
        ({"beam": 0}, "--beam must be an integer of at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(corpus, **settings)


def test_pretraining_leaves_steps_to_the_method(corpus):
    with pytest.raises(ValueError, match="--pretrain-steps 4 leave no step of --num-meta-steps 4 to fomaml"):
        config_of(corpus, "fomaml", pretrain_steps=4, num_meta_steps=4)


def test_pretraining_has_no_second_phase(corpus):
    with pytest.raises(ValueError, match="pretrained has none"):
        config_of(corpus, "pretrained", pretrain_steps=1)


def test_the_own_vectors_of_a_task_are_not_meta_learned_and_universal_ones_do_not_adapt(corpus):
    config = config_of(corpus, lexical=True)
    setup = translation.setup_of(translation.with_paper_defaults(config))
    learner, sample = setup.training.learner, setup.training.sample_episode
    params = learner.init(jax.random.key(0), setup.training.inputs)
    episode = sample(jax.random.key(1))
    gradient = jax.jit(jax.grad(lambda p: learner.objective(p, episode)[0]))(params)["source"]
    assert not np.any(gradient[TASK_VECTORS])
    assert np.any(gradient[UNIVERSAL_VECTORS])
    adapted, _ = jax.jit(learner.adapt)(params, episode.support)
    assert np.any(adapted["source"][TASK_VECTORS])
    np.testing.assert_array_equal(adapted["source"][UNIVERSAL_VECTORS], params["source"][UNIVERSAL_VECTORS])


def test_pretraining_comes_first_in_one_run(corpus):
    config = translation.with_paper_defaults(config_of(corpus, pretrain_steps=3))
    setup = translation.setup_of(config)
    plain = translation.setup_of(dataclasses.replace(config, pretrain_steps=0)).training.learner
    pretrained = translation.setup_of(
        dataclasses.replace(
            translation.METHODS["pretrained"],
            **TINY | {"data_dir": corpus, "run_dir": config.run_dir},
        )
    ).training.learner
    episode = setup.training.sample_episode(jax.random.key(0))
    params = plain.init(jax.random.key(1), setup.training.inputs)
    empty = jax.tree.map(lambda x: x[:0], episode.support)
    for step, expected in ((2, pretrained.objective(params, Episode(empty, episode.query))[0]),
                           (3, plain.objective(params, episode)[0])):  # fmt: skip
        found, info = setup.training.learner(jnp.int32(step)).objective(params, episode)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert info.support_loss.shape == (1,)
    seen = [translation.pairs_seen(runs.as_json(config), step) for step in (0, 2, 3, 5)]
    assert seen == [0, 2 * 2 * 3, 3 * 2 * 3, 3 * 2 * 3 + 2 * 2 * (2 + 3)]


def test_episodes_are_shifted_and_have_the_vectors_of_their_language(corpus):
    setup = translation.setup_of(config_of(corpus, lexical=True))
    languages = set()
    for number in range(6):
        episode = setup.training.sample_episode(jax.random.key(number))
        for batch in (jax.tree.map(lambda x: x[0], episode.support), episode.query):
            (sentences, given), targets = batch
            np.testing.assert_array_equal(
                given[:, 1:][targets[:, :-1] != decoding.END], targets[:, :-1][targets[:, :-1] != decoding.END]
            )
            assert np.all(given[:, 0] == decoding.BEGIN)
            assert np.all(np.sum(targets == decoding.END, axis=1) == 1)
            for row in range(len(targets)):
                places = [
                    place
                    for place, pairs in enumerate(setup.text.sources.values())
                    if (pairs.source == np.asarray(sentences.tokens[row])[None]).all(axis=1).any()
                ]
                assert len(places) == 1
                languages.add(places[0])
                np.testing.assert_allclose(
                    sentences.vectors[row], setup.text.vectors[places[0]][sentences.tokens[row]], rtol=1e-6
                )
    assert languages == {0, 1}


@pytest.mark.slow
def test_fomaml_and_maml_have_their_own_derivatives(corpus):
    plain = {"inner_optimizer": "sgd", "inner_lr": 1.0}
    methods = {}
    for name in ("fomaml", "maml"):
        config = config_of(corpus, name)
        config = dataclasses.replace(config, hyperparameters=dataclasses.replace(config.hyperparameters, **plain))
        methods[name] = translation.setup_of(config).training
    training = methods["maml"]
    params = training.learner.init(jax.random.key(0), training.inputs)
    episode = training.sample_episode(jax.random.key(1))

    def loss_of(params, batch):
        return losses.masked_cross_entropy(setup_model.apply(params, batch.inputs), batch.targets)

    setup_model = translation.setup_of(config_of(corpus)).translator.model
    support = jax.tree.map(lambda x: x[0], episode.support)

    def adapted(params):
        return jax.tree.map(lambda x, g: x - g, params, jax.grad(loss_of)(params, support))

    expected = {
        "fomaml": jax.jit(lambda p: jax.grad(loss_of)(adapted(p), episode.query))(params),
        "maml": jax.jit(jax.grad(lambda p: loss_of(adapted(p), episode.query)))(params),
    }
    for name, training in methods.items():
        found = jax.jit(jax.grad(lambda p, t=training: t.learner.objective(p, episode)[0]))(params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected[name])
    assert any(np.max(np.abs(x - y)) > 1e-3 for x, y in zip(*map(jax.tree.leaves, expected.values()), strict=True))


def test_a_lower_loss_is_a_better_validation(corpus, monkeypatch):
    training = translation.setup_of(config_of(corpus)).training
    tuned = finetuning.Tuned({}, np.zeros(2, int), np.array([2.0, 4.0]), np.zeros((2, 2)))
    monkeypatch.setattr(finetuning, "fine_tune_all", lambda *args: tuned)
    assert training.validate({}) == -3.0


def test_a_row_is_of_its_language_and_size(corpus, monkeypatch):
    text, count = translation.text_of(config_of(corpus)), 2 * 2 * 2
    tuned = finetuning.Tuned({}, np.arange(count), np.arange(count), 100.0 + np.arange(count)[:, None])
    shown = np.asarray(parallel_text.encode(text.subwords.target, ["a man"]))
    monkeypatch.setattr(finetuning, "fine_tune_all", lambda *args: tuned)
    monkeypatch.setattr(
        finetuning, "translate_all", lambda *args, **kw: np.broadcast_to(shown, (len(args[3].size), 6, shown.size))
    )
    protocol = low_resource.Protocol(("xc", "xd"), (4, 8), 2, finetuning.FineTuning(), 16)
    rows, _ = low_resource.evaluate(protocol, text, None, {}, beam=1)
    assert [(row["language"], row["pairs"], row["nll"], row.get("stopped_at")) for row in rows] == [
        ("xc", 0, [100.0], None),
        ("xc", 4, [0, 1], [0, 1]),
        ("xc", 8, [2, 3], [2, 3]),
        ("xd", 0, [104.0], None),
        ("xd", 4, [4, 5], [4, 5]),
        ("xd", 8, [6, 7], [6, 7]),
    ]


def test_a_translation_counts_for_its_job_alone(corpus, monkeypatch):
    text, count = translation.text_of(config_of(corpus)), 2 * 2 * 2
    tuned = finetuning.Tuned({}, np.arange(count), np.arange(count), 100.0 + np.arange(count)[:, None])
    monkeypatch.setattr(finetuning, "fine_tune_all", lambda *args: tuned)

    def translate_all(translator, params, languages, jobs, *, max_length, beam):
        # Of two languages and eight fine-tunings: before, after, and with a wider beam the first draw of each size.
        what = {(2, 1): "before", (8, 1): "after", (2, 3): "before, wide", (4, 3): "after, wide"}[len(jobs.size), beam]
        return [[f"{what} {job}"] * 20 for job in range(len(jobs.size))]

    monkeypatch.setattr(finetuning, "translate_all", translate_all)
    decode = parallel_text.decode
    monkeypatch.setattr(
        parallel_text, "decode", lambda subwords, lines: lines if isinstance(lines, list) else decode(subwords, lines)
    )
    monkeypatch.setattr(
        low_resource,
        "_scores",
        lambda references, greedy, wide: {"greedy": [lines[0] for lines in greedy], "wide": wide and wide[0]},
    )
    protocol = low_resource.Protocol(("xc", "xd"), (4, 8), 2, finetuning.FineTuning(), 16)
    rows, examples = low_resource.evaluate(protocol, text, None, {}, beam=3)
    assert [(row["language"], row["pairs"], row["greedy"], row["wide"]) for row in rows] == [
        ("xc", 0, ["before 0"], "before, wide 0"),
        ("xc", 4, ["after 0", "after 1"], "after, wide 0"),
        ("xc", 8, ["after 2", "after 3"], "after, wide 1"),
        ("xd", 0, ["before 1"], "before, wide 1"),
        ("xd", 4, ["after 4", "after 5"], "after, wide 2"),
        ("xd", 8, ["after 6", "after 7"], "after, wide 3"),
    ]
    # The examples are those of the first draw of the most pairs.
    shown = {(example["language"], example["before"], example["after"]) for example in examples}
    assert shown == {("xc", "before 0", "after 2"), ("xd", "before 1", "after 6")}


def test_a_fine_tuning_has_the_settings_of_the_run(corpus, monkeypatch):
    given, selected_by = [], []

    def fine_tune_all(translator, how, params, languages, jobs):
        given.append(how)
        selected_by.append((languages, jobs.size))
        return finetuning.Tuned({}, np.zeros(2, int), np.zeros(2), np.zeros((2, 2)))

    def evaluate(protocol, *args, **settings):
        given.append(protocol.how)
        return [{"pairs": 4, "nll": [1.0], "bleu": [1.0]}], []

    monkeypatch.setattr(finetuning, "fine_tune_all", fine_tune_all)
    monkeypatch.setattr(low_resource, "evaluate", evaluate)
    config = config_of(corpus, finetune_lr=0.25, finetune_batch=3, finetune_steps=40)
    setup = translation.setup_of(config)
    setup.training.validate({})
    ((languages, sizes),) = selected_by
    assert len(languages) == 1
    assert languages[0] is setup.text.languages[config.validation]
    assert set(np.asarray(sizes).tolist()) == {config.validation_pairs}
    translation.test(config, setup, {"selected": (0, {})})
    assert given == [
        finetuning.FineTuning(rate=0.25, steps=steps, batch_size=3) for steps in (translation.VALIDATION_STEPS, 40)
    ]


def test_the_scores_of_fine_tunings_are_those_of_their_translations():
    references = ("a man in a red shirt is walking", "two dogs play in the snow", "a child")
    greedy = [list(references), ["a man in a shirt is walking", "dogs play in the snow", "a child"]]
    wide = [*references[:2], "a man in the park"]
    found = low_resource._scores(references, greedy, wide)

    def of_corpus(lines):
        return pytest.approx(BLEU(lowercase=True).corpus_score(lines, [references]).score)

    assert found["bleu"] == list(map(of_corpus, greedy))
    assert found["bleu_beam"] == [of_corpus(wide)]
    resampled = [bleu.resampled(bleu.counts(lines, references)) for lines in greedy]
    np.testing.assert_allclose(found["resampled_bleu"], (resampled[0] + resampled[1]) / 2, atol=1e-3)
    assert "bleu_beam" not in low_resource._scores(references, greedy, None)


def test_the_first_state_gives_the_metrics_and_is_searched(corpus, monkeypatch):
    given = []

    def evaluate(protocol, text, translator, params, *, beam):
        given.append((protocol, beam))
        rows = [(0, [9.0]), (4, [1.0 + params, 3.0 + params]), (8, [3.0 + params, 5.0 + params])]
        return [{"pairs": pairs, "nll": draws, "bleu": [10 * x for x in draws]} for pairs, draws in rows], [params]

    monkeypatch.setattr(low_resource, "evaluate", evaluate)
    config = config_of(corpus, beam=3)
    setup = translation.Setup(None, None, None)
    found = translation.test(config, setup, {"selected": (2, 0.0), "last": (4, 100.0)})
    how = finetuning.FineTuning(config.finetune_lr, config.finetune_steps, config.finetune_batch)
    protocol = low_resource.Protocol(("xc", "xd"), (4, 8), 2, how, 32)
    assert given == [(protocol, 3), (protocol, 1)]
    assert [(row["state"], row["step"]) for row in found["evaluations"]] == [("selected", 2)] * 3 + [("last", 4)] * 3
    assert found["examples"] == [0.0]
    # Means of both draws over the sizes: 2 and 4, with a standard error of 1 and one degree of freedom.
    assert found["metrics"]["nll"] == {"mean": [3.0], "ci95": [pytest.approx(12.7062, rel=1e-5)]}
    assert found["metrics"]["bleu"]["mean"] == [30.0]


def test_the_last_state_is_that_of_the_last_checkpoint(corpus, tmp_path, monkeypatch):
    last = types.SimpleNamespace(step=jnp.int32(4), params="last")
    monkeypatch.setattr(common, "blank_state", lambda *args: None)
    monkeypatch.setattr(common, "load_state", lambda directory, blank: {"state": last})
    training = types.SimpleNamespace(learner=None, optimizer=lambda config, params: None, inputs=None)
    config, setup = config_of(corpus, run_dir=tmp_path), translation.Setup(None, None, training)
    for best_step, expected in ((2, {"selected": (2, "best"), "last": (4, "last")}), (4, {"selected": (4, "best")})):
        trained = types.SimpleNamespace(best_step=best_step, params="best")
        assert translation.states_of(config, setup, trained) == expected


def test_the_inner_optimiser_is_that_of_the_settings():
    gradient = jnp.array([2.0, -0.5])
    for settings, expected in (
        ({}, -0.25 * np.sign(gradient)),
        ({"eps_root": 3.0}, -0.25 * gradient / np.sqrt(gradient**2 + 3.0)),
        ({"inner_optimizer": "sgd"}, -0.25 * gradient),
    ):
        rule = translation.AdamSteps(inner_lr=0.25, **settings).rule()
        updates, _ = rule.update(gradient, rule.init(gradient))
        np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_the_pairs_of_ones_own_are_divided_and_the_fine_tuned_network_translates(corpus, monkeypatch):
    text, given = translation.text_of(config_of(corpus)), {}
    network = own_language.Network(text.subwords, None, {"w": 1.0}, None, 32)
    lines = [parallel_text.Corpus(corpus).lines("train", name)[:20] for name in ("xc", "en")]

    def fine_tune_all(translator, how, params, languages, jobs):
        given.update(how=how, params=params, languages=languages, size=jobs.size.tolist())
        return finetuning.Tuned({"w": np.array([7.0])}, np.array([20]), np.array([1.0]), np.array([[2.0, 1.0]]))

    def translated(translator, params, source, vectors, *, max_length, beam):
        given.update(used=params, max_length=max_length, beam=beam)
        return np.asarray(parallel_text.encode(text.subwords.target, ["a man"] * len(source)))

    monkeypatch.setattr(finetuning, "fine_tune_all", fine_tune_all)
    monkeypatch.setattr(finetuning, "translated", translated)
    how = finetuning.FineTuning(steps=40)
    found = own_language.adapted(network, *lines, how, vocabulary=60, seed=0)
    (language,) = given["languages"]
    few, dev = (set(parallel_text.decode(text.subwords.source, part.source)) for part in language[:2])
    assert (len(few), len(dev), given["size"]) == (18, 2, [18])
    assert few | dev == set(lines[0])
    assert own_language.translations(found, ["kiman"], beam=3) == ["a man"]
    assert (given["how"], given["params"], given["used"]) == (how, {"w": 1.0}, {"w": 7.0})
    assert (given["max_length"], given["beam"]) == (32, 3)
