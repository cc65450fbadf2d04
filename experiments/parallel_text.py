"""Parallel text in several languages with English, its subwords, and its arrays.

A directory or a zip holds files train.L, val.L and test.L of each language L. Line i of every file of a part is a
translation of line i of the English file of that part.
"""

import dataclasses
import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from experiments import lexical
from experiments.decoding import BEGIN, END
from maml_jax.models import PAD

ENGLISH = "en"
PACK = "captions13.zip"
UNKNOWN = 1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where the files of a corpus are: a directory or a zip."""

    path: Path

    @classmethod
    def find(cls, where: Path | None) -> "Corpus":
        """The corpus in a directory or zip, by default the captions in $MAML_JAX_PACKS.

        Raises:
          FileNotFoundError: if there is none.
        """
        if where is None:
            packs = os.environ.get("MAML_JAX_PACKS")
            where = Path(packs).expanduser() / PACK if packs else None
        where = None if where is None else Path(where)
        if where is None or not where.exists():
            raise FileNotFoundError(
                f"{'the text is in no known place' if where is None else f'there is no {where}'}; give a directory or "
                "a zip with files train.LANGUAGE, val.LANGUAGE and test.LANGUAGE by --data-dir, or the directory that "
                f"holds {PACK} by $MAML_JAX_PACKS"
            )
        return cls(where)

    def lines(self, part: str, language: str) -> tuple[str, ...]:
        """The lines of a file, as many as the English file has.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is no text, holds no words, or has another number of lines than the English one.
        """
        lines = _read(self.path, f"{part}.{language}")
        if not any(line.strip() for line in lines):
            raise ValueError(f"{part}.{language} in {self.path} holds no words; leave the language out")
        count = len(_read(self.path, f"{part}.{ENGLISH}"))
        if len(lines) != count:
            raise ValueError(
                f"{part}.{language} in {self.path} has {len(lines):,} lines and {part}.{ENGLISH} has {count:,}; line i "
                "of both must be translations of each other, so align them or leave the language out"
            )
        return lines


@functools.lru_cache(maxsize=64)
def _read(path: Path, name: str) -> tuple[str, ...]:
    try:
        if path.is_dir():
            content = (path / name).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(name)
    except (FileNotFoundError, KeyError):
        raise FileNotFoundError(f"{path} holds no file {name}; add it, or leave the language out") from None
    except Exception as error:  # zipfile, zlib and the system share no class
        raise ValueError(
            f"{path} is neither a directory nor an undamaged zip that holds {name} ({type(error).__name__}: {error}); "
            "get it again"
        ) from error
    return _lines(content, f"{name} in {path}")


def _lines(content: bytes, what: str) -> tuple[str, ...]:
    try:
        return tuple(content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text ({error}); convert it") from None


class Subwords(NamedTuple):
    """The subwords of the sources, of all languages together, and those of English, as sentencepiece keeps them."""

    source: bytes
    target: bytes


@functools.lru_cache(maxsize=8)
def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        if not model:
            raise RuntimeError("an empty file")
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"the subwords are damaged ({error}); choose another run") from error


def train_subwords(lines: Iterable[str], size: int, what: str) -> bytes:
    """Learns subwords from text.

    Raises:
      ValueError: if the text is too little for so many.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"{what} cannot be divided into {size} subwords ({error}); change --source-subwords or --target-subwords "
            "as it says, or give more text"
        ) from error
    return model.getvalue()


def encode(model: bytes, lines: Sequence[str]) -> list[list[int]]:
    """The tokens of each line."""
    return _processor(model).encode(list(lines))


def decode(model: bytes, tokens: np.ndarray) -> list[str]:
    """The text of each row [B, T]; `PAD`, `BEGIN` and `END` are left out."""
    kept = [[int(token) for token in row if token not in (PAD, BEGIN, END)] for row in tokens]
    return _processor(model).decode(kept)


class Pairs(NamedTuple):
    """Sentences with their translations.

    Attributes:
      source: int32 [n, S], each with `END`, filled with `PAD`.
      target: int32 [n, T + 1], each between `BEGIN` and `END`, filled with `PAD`.
    """

    source: np.ndarray
    target: np.ndarray


def pairs_of(subwords: Subwords, source: Sequence[str], target: Sequence[str], length: int, *, cut: bool) -> Pairs:
    """The arrays of sentence pairs.

    Args:
      subwords: of both sides.
      source: n sentences.
      target: their translations.
      length: S and T, with `END`.
      cut: whether longer sentences are cut off. If not, their pairs are left out, and so are empty sentences.
    """
    rows = []
    for left, right in zip(encode(subwords.source, source), encode(subwords.target, target), strict=True):
        if cut:
            rows.append((left[: length - 1], right[: length - 1]))
        elif 0 < len(left) < length and 0 < len(right) < length:
            rows.append((left, right))
    filled = Pairs(np.full((len(rows), length), PAD, np.int32), np.full((len(rows), length + 1), PAD, np.int32))
    for row, (left, right) in enumerate(rows):
        filled.source[row, : len(left) + 1] = [*left, END]
        filled.target[row, : len(right) + 2] = [BEGIN, *right, END]
    return filled


class Language(NamedTuple):
    """A language that is fine-tuned on few sentences.

    Attributes:
      pool: the pairs that the few sentences are drawn from, of lines that no training has seen.
      dev: the pairs that stop the fine-tuning.
      test: the pairs of the test; those of a validation language are its dev pairs.
      references: the English of the test, as it is written.
      vectors: [V, Q], the vectors of the source tokens by the language's own text; None without a lexical
        representation.
    """

    pool: Pairs
    dev: Pairs
    test: Pairs
    references: tuple[str, ...]
    vectors: np.ndarray | None


class Text(NamedTuple):
    """All that an experiment reads.

    Attributes:
      subwords: of both sides.
      keys: [M, Q], the vectors of the English subwords; None without a lexical representation.
      sources: the training pairs of each source language.
      vectors: [languages, V, Q], the aligned vectors of the source tokens in each source language; None without.
      languages: the low-resource languages, validation included.
      digest: SHA-256 of all lines that were read, in hexadecimal digits.
    """

    subwords: Subwords
    keys: np.ndarray | None
    sources: dict[str, Pairs]
    vectors: np.ndarray | None
    languages: dict[str, Language]
    digest: str


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What `read` needs; hashable, so that a process reads once."""

    path: Path
    sources: tuple[str, ...]
    held_out: tuple[str, ...]
    validation: str
    source_pairs: int
    pool_lines: int
    dev_pairs: int
    length: int
    test_length: int
    source_subwords: int
    target_subwords: int
    vector_size: int | None


@functools.lru_cache(maxsize=2)
def read(settings: TextSettings) -> Text:
    """Reads a corpus, learns its subwords, and divides its English.

    The last lines of "train" are the pool that the few sentences of a low-resource language are drawn from. No training
    pair of a source language is of these lines. Subwords, and the vectors of a lexical representation, are learned from
    the text of every language, the low-resource ones and all English of "train" included.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if files are not aligned, a language has too few sentences, or the subwords do not fit the text.
    """
    corpus = Corpus(settings.path)
    low = (*settings.held_out, settings.validation)
    everything = (*settings.sources, *low)
    train = {language: corpus.lines("train", language) for language in (*everything, ENGLISH)}
    for language in low:
        for part in ("val", *(("test",) if language in settings.held_out else ())):
            corpus.lines(part, language)
        if settings.dev_pairs > (count := len(corpus.lines("val", language))):
            raise ValueError(
                f"--dev-pairs {settings.dev_pairs} exceeds the {count} sentences of {language} for validation; "
                "choose a smaller number"
            )
    num_lines = len(train[ENGLISH])
    first_of_pool = num_lines - settings.pool_lines
    if first_of_pool < 1:
        raise ValueError(
            f"train.{ENGLISH} has {num_lines:,} lines and {settings.pool_lines:,} are kept for the low-resource "
            "languages; give more text, or fewer by --pool-lines"
        )
    lines = [line for language in everything for line in train[language][: settings.source_pairs]]
    subwords = Subwords(
        train_subwords(lines, settings.source_subwords, "the text of the source side"),
        train_subwords(train[ENGLISH], settings.target_subwords, "the English text"),
    )
    sources = {}
    for number, language in enumerate(settings.sources):
        order = np.random.default_rng(number).permutation(first_of_pool)
        found = pairs_of(
            subwords,
            [train[language][line] for line in order],
            [train[ENGLISH][line] for line in order],
            settings.length,
            cut=False,
        )
        if not len(found.source):
            raise ValueError(f"train.{language} has no pair of at most {settings.length - 1} subwords a sentence")
        sources[language] = Pairs(*(array[: settings.source_pairs] for array in found))
    keys = vectors = None
    own = dict.fromkeys(everything)
    if settings.vector_size is not None:
        size = settings.vector_size
        keys = lexical.word_vectors(encode(subwords.target, train[ENGLISH]), settings.target_subwords, size)
        own = {
            language: lexical.word_vectors(encode(subwords.source, train[language]), settings.source_subwords, size)
            for language in everything
        }
        vectors = np.stack([lexical.aligned(own[language], keys, *sources[language]) for language in sources])
    languages = {
        language: _language(corpus, settings, subwords, language, first_of_pool, own[language]) for language in low
    }
    digest = hashlib.sha256()
    for part, names in {"train": everything, "val": low, "test": settings.held_out}.items():
        for name in (*names, ENGLISH):
            digest.update("\n".join(corpus.lines(part, name)).encode())
    return Text(subwords, keys, sources, vectors, languages, digest.hexdigest())


def _language(
    corpus: Corpus,
    settings: TextSettings,
    subwords: Subwords,
    language: str,
    first_of_pool: int,
    vectors: np.ndarray | None,
) -> Language:
    pool = (corpus.lines("train", name)[first_of_pool:] for name in (language, ENGLISH))
    dev = [corpus.lines("val", name) for name in (language, ENGLISH)]
    dev = [lines[: settings.dev_pairs] for lines in dev]
    test = dev
    if language in settings.held_out:
        test = [corpus.lines("test", name) for name in (language, ENGLISH)]
    return Language(
        pairs_of(subwords, *pool, settings.length, cut=False),
        pairs_of(subwords, *dev, settings.test_length, cut=True),
        pairs_of(subwords, *test, settings.test_length, cut=True),
        test[1],
        vectors,
    )


def read_pairs(file: Path) -> tuple[list[str], list[str]]:
    """The two sides of a file with a sentence, a tab and its translation in each line. Empty lines are left out.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line has another form, there is none, or the file is no UTF-8 text.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; give one with a sentence, a tab and its English a line")
    left, right = [], []
    for number, line in enumerate(_lines(file.read_bytes(), str(file)), 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            raise ValueError(
                f"line {number} of {file} is {line[:60]!r}; each line holds a sentence, one tab and its English"
            )
        left.append(cells[0].strip())
        right.append(cells[1].strip())
    if not left:
        raise ValueError(f"{file} holds no pair; each line holds a sentence, a tab and its English")
    return left, right
