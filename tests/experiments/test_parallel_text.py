"""The text of a translation: what is read, divided into subwords and left out, on made-up languages."""

import os
import zipfile

import jax
import numpy as np
import pytest
from made_up_languages import LANGUAGES, LINES, config_of, write

from experiments import decoding, parallel_text, translation
from maml_jax.models import PAD


def test_english_of_the_low_resource_languages_is_in_no_training(corpus):
    config = config_of(corpus)
    text = translation.text_of(config)
    everything = parallel_text.Corpus(corpus).lines("train", "en")

    def english(pairs):
        return set(parallel_text.decode(text.subwords.target, pairs.target))

    for pairs in text.sources.values():
        assert len(pairs.source) <= 30
        assert english(pairs) <= set(everything[:30])
    for language in text.languages.values():
        assert english(language.pool) <= set(everything[30:])
    assert text.languages["xc"].references == parallel_text.Corpus(corpus).lines("test", "en")
    assert text.languages["xv"].references == parallel_text.Corpus(corpus).lines("val", "en")[:5]
    for language in text.languages.values():  # a fine-tuning is stopped by pairs that are not tested
        assert english(language.dev) <= set(parallel_text.Corpus(corpus).lines("val", "en")[:5])
    assert not english(text.languages["xc"].dev) & english(text.languages["xc"].test)


def test_sides_are_filled_and_framed(corpus):
    text = translation.text_of(config_of(corpus))
    pairs = parallel_text.pairs_of(text.subwords, ["odog oruns", "", "oman"], ["dog runs", "man", "man"], 8, cut=False)
    assert len(pairs.source) == 2  # the empty one is left out
    for side, begins in (pairs.source, 0), (pairs.target, 1):
        for row in side:
            end = np.flatnonzero(row == decoding.END)
            assert len(end) == 1
            assert np.all(row[end[0] + 1 :] == PAD)
            assert np.all(row[begins : end[0]] > decoding.END)
    assert np.all(pairs.target[:, 0] == decoding.BEGIN)
    assert parallel_text.decode(text.subwords.target, pairs.target[:, 1:]) == ["dog runs", "man"]
    long = parallel_text.pairs_of(text.subwords, ["odog " * 30], ["dog " * 30], 8, cut=True)
    assert long.source.shape == (1, 8)
    assert long.source[0, -1] == decoding.END


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: write(d, "train", "xa", ["one", "two"]),
            "train.xa in .* has 2 lines and train.en has 60; line i of",
        ),
        (lambda d: write(d, "test", "xc", ["one"] * 5), "test.xc in .* has 5 lines and test.en has 6"),
        (lambda d: write(d, "train", "xb", [" "] * 60), "train.xb in .* holds no words; leave the language out"),
        (
            lambda d: [write(d, "val", name, ["o"] * 4) for name in (*LANGUAGES, "en")],
            "--dev-pairs 5 exceeds the 4 sentences of x[cdv]",
        ),
        (lambda d: (d / "val.xv").unlink(), "holds no file val.xv; add it, or leave the language out"),
        (lambda d: (d / "train.xa").write_bytes(b"\xff\xfe\xff"), "train.xa in .* is not UTF-8 text"),
    ],
)
def test_text_that_does_not_fit_is_refused_before_anything_else(corpus, tmp_path, change, message):
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        translation.run(config_of(tmp_path, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool_lines": 60}, "train.en has 60 lines and 60 are kept"),
        ({"sizes": (40,)}, "40 pairs of xc are wanted and the last 30 lines have .* or choose fewer by --sizes"),
        ({"validation_pairs": 40}, "40 pairs of xv are wanted .* or choose fewer by --validation-pairs"),
        ({"source_subwords": 5000}, "cannot be divided into 5000 subwords"),
        ({"max_subwords": 3}, "train.xa has no pair of at most 2 subwords a sentence"),
    ],
)
def test_text_that_is_too_little_is_refused(corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        translation.text_of(config_of(corpus, **settings))


def test_a_corpus_may_be_a_zip(corpus, tmp_path, monkeypatch):
    file = tmp_path / parallel_text.PACK
    with zipfile.ZipFile(file, "w") as archive:
        for part in corpus.iterdir():
            archive.write(part, part.name)
    expected = parallel_text.Corpus(corpus).lines("val", "xa")
    assert parallel_text.Corpus.find(file).lines("val", "xa") == expected
    monkeypatch.setenv("MAML_JAX_PACKS", str(tmp_path))
    assert parallel_text.Corpus.find(None).lines("val", "xa") == expected
    (tmp_path / "other.zip").write_text("nothing")
    with pytest.raises(ValueError, match="is neither a directory nor an undamaged zip"):
        parallel_text.Corpus.find(tmp_path / "other.zip").lines("val", "xa")
    with pytest.raises(FileNotFoundError, match=r"there is no .*none"):
        parallel_text.Corpus.find(tmp_path / "none")
    monkeypatch.delenv("MAML_JAX_PACKS")
    with pytest.raises(FileNotFoundError, match="the text is in no known place"):
        parallel_text.Corpus.find(None)


PACKS = os.environ.get("MAML_JAX_PACKS")


@pytest.mark.skipif(not PACKS, reason="the captions are not here; set MAML_JAX_PACKS to the directory that holds them")
def test_the_captions_are_aligned_but_for_three_files_that_are_not_there():
    corpus = parallel_text.Corpus.find(None)
    languages = ["de", "fr", "cs", "pt", "brx", "es", "uk", "ar", "zh", "gn", "qu", "ay"]
    for part, count in {"train": 29_000, "val": 1014, "test": 1000}.items():
        for language in languages:
            if part == "test" and language in ("gn", "qu", "ay"):
                with pytest.raises(FileNotFoundError, match=f"holds no file test.{language}"):
                    corpus.lines(part, language)
            else:
                assert len(corpus.lines(part, language)) == count
    assert corpus.lines("train", "pt")[0].startswith("Dois jovens, homens brancos")


def test_both_sides_of_every_pair_are_translations(corpus):
    text = translation.text_of(config_of(corpus))
    parts = [*text.sources.items()]
    parts += [(name, pairs) for name, language in text.languages.items() for pairs in language[:3]]
    for name, pairs in parts:
        source, target = map(parallel_text.decode, text.subwords, pairs)
        assert source == [" ".join(LANGUAGES[name].format(word) for word in line.split()) for line in target]


def test_nothing_but_the_training_text_gives_subwords_and_vectors(corpus, tmp_path):
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        if not file.name.startswith("train"):
            write(tmp_path, *file.name.split("."), ["zebras zigzag"] * LINES[file.name.split(".")[0]])
    before, after = (translation.text_of(config_of(directory, lexical=True)) for directory in (corpus, tmp_path))
    assert before.subwords == after.subwords
    for name in ("keys", "vectors", "sources"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    for name, language in before.languages.items():
        np.testing.assert_array_equal(language.vectors, after.languages[name].vectors)
        assert np.any(language.dev.target != after.languages[name].dev.target)


def test_a_sentence_of_the_test_that_is_cut_or_empty_stays_beside_its_reference(corpus, tmp_path):
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    english = ["dog", " ".join(["man"] * 60), "", "a dog", "a man"]
    for name, form in {"en": "{}", **LANGUAGES}.items():
        lines = [" ".join(form.format(word) for word in line.split()) for line in english]
        for part in ("val", "test"):
            write(tmp_path, part, name, lines)
    text = translation.text_of(config_of(tmp_path))
    assert text.languages["xc"].references == tuple(english)
    for language in text.languages.values():
        for pairs in (language.dev, language.test):
            target = parallel_text.decode(text.subwords.target, pairs.target)
            assert [*target[:1], *target[2:]] == [*english[:1], *english[2:]]
            assert english[1].startswith(target[1])
