"""Vectors of subwords by the text of one language, and their alignment with those of English.

They are the fixed vectors of a universal lexical representation (Gu, Hassan, Devlin and Li, 2018). Its authors took
fastText vectors; here they are positive pointwise mutual information, factorised.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from experiments.decoding import END

WINDOW = 3
"""Subwords at most so far apart occur together."""
SMOOTHING = 0.75
"""The power of the frequencies of contexts (Levy et al., 2015, section 3.2)."""
LEAST_COUNT = 3
"""A pair of subwords is a translation only if it occurs in at least so many sentence pairs."""

MOST_DENSE = 1000
"""A text of at most so many different subwords has a dense factorisation."""


def word_vectors(sentences: Sequence[Sequence[int]], vocabulary: int, size: int) -> np.ndarray:
    """[V, Q], a vector of unit length for each subword of a text; 0 for those that it does not hold.

    The rows are U √Σ of the largest singular values of the positive pointwise mutual information of subwords that
    occur within `WINDOW` of each other (Levy and Goldberg, 2014).

    Args:
      sentences: the text as subwords.
      vocabulary: V.
      size: Q, smaller than V.

    Raises:
      ValueError: if no two subwords occur together more often than by chance.
    """
    left, right = [], []
    for sentence in sentences:
        tokens = np.asarray(sentence, np.int64)
        for distance in range(1, WINDOW + 1):
            left.append(tokens[:-distance])
            right.append(tokens[distance:])
    left, right = np.concatenate(left), np.concatenate(right)
    ones = np.ones(len(left))
    counts = scipy.sparse.coo_matrix((ones, (left, right)), shape=(vocabulary, vocabulary)).tocsr()
    counts = (counts + counts.T).tocoo()
    of_word = np.asarray(counts.sum(1)).ravel()
    of_context = of_word**SMOOTHING
    information = np.log(counts.data * of_context.sum() / (of_word[counts.row] * of_context[counts.col]))
    positive = scipy.sparse.csr_matrix((np.maximum(information, 0.0), (counts.row, counts.col)), counts.shape)
    if not positive.count_nonzero():
        raise ValueError(
            "the text holds no two subwords that occur together more often than by chance, so their vectors are not "
            "defined; give more or longer sentences"
        )
    vectors = _factors(positive, np.flatnonzero(of_word), size)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where((of_word[:, None] > 0) & (lengths > 0), vectors / np.maximum(lengths, 1e-12), 0.0).astype(
        np.float32
    )


def _factors(matrix: scipy.sparse.csr_matrix, occurring: np.ndarray, size: int) -> np.ndarray:
    """[V, Q], U √Σ of the largest singular values of a matrix, whose other rows and columns than `occurring` are 0."""
    if len(occurring) > MOST_DENSE:
        # A fixed start makes the factorisation the same in every run.
        start = np.ones(matrix.shape[0]) / np.sqrt(matrix.shape[0])
        factors, values, _ = scipy.sparse.linalg.svds(matrix, k=size, v0=start)
        return factors * np.sqrt(values)
    # ARPACK goes on from random vectors where a matrix has too few singular values, as that of a short text may.
    factors, values, _ = np.linalg.svd(matrix[occurring][:, occurring].toarray())
    vectors, count = np.zeros((matrix.shape[0], size)), min(size, len(values))
    vectors[occurring, :count] = factors[:, :count] * np.sqrt(values[:count])
    return vectors


def translations(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[n, 2], source and target subwords that occur in the same sentence pairs, each the best partner of the other.

    The measure is Dice's: twice the pairs that hold both, over the sum of those that hold either.

    Args:
      source: [N, S], the source of each pair, as `parallel_text.Pairs` has it.
      target: [N, T], their translations.
    """
    first, second = (_occurrences(side) for side in (source, target))
    together = (first.T @ second).tocoo()
    of_first, of_second = (np.asarray(side.sum(0)).ravel() for side in (first, second))
    frequent = together.data >= LEAST_COUNT
    rows, columns, counts = together.row[frequent], together.col[frequent], together.data[frequent]
    dice = 2 * counts / (of_first[rows] + of_second[columns])
    best_of_row, best_of_column = np.zeros(len(of_first)), np.zeros(len(of_second))
    np.maximum.at(best_of_row, rows, dice)
    np.maximum.at(best_of_column, columns, dice)
    mutual = (dice >= best_of_row[rows]) & (dice >= best_of_column[columns])
    return np.stack([rows[mutual], columns[mutual]], axis=1)


def _occurrences(sentences: np.ndarray) -> scipy.sparse.csr_matrix:
    """[N, V], 1 where a sentence holds a subword; special tokens, the unknown one included, are left out."""
    rows, places = np.nonzero(sentences > END)
    tokens = sentences[rows, places]
    shape = len(sentences), int(sentences.max(initial=END)) + 1
    matrix = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, tokens)), shape)
    matrix.data[:] = 1.0
    return matrix


def aligned(vectors: np.ndarray, keys: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[V, Q], the vectors of a language, turned to the space of the English ones.

    The rotation is the orthogonal one that brings translations together (Procrustes; Xing et al., 2015). Without a
    translation the vectors are left as they are.

    Args:
      vectors: [V, Q], of the language.
      keys: [M, Q], of English.
      source: [N, S], sources of sentence pairs.
      target: [N, T], their translations.
    """
    found = translations(source, target)
    if not len(found):
        return vectors
    left, _, right = np.linalg.svd(vectors[found[:, 0]].T @ keys[found[:, 1]])
    return (vectors @ (left @ right)).astype(np.float32)
