"""Few-shot classification with a variable number of classes, and of examples of each class.

Triantafillou et al., 2020, Meta-Dataset: A dataset of datasets for learning to learn from few examples.
https://arxiv.org/abs/1903.03096

The key of an episode decides its shapes, so it is drawn on the host, and each combination of shapes has a compiled
program of its own. No episode is padded: a padded example would enter class means and the statistics of normalisations.
Instead the numbers of classes and the sizes of support sets come from short lists.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import Batch, Episode, PRNGKey, check_integer

_LOG_WEIGHTS = np.log(0.5), np.log(2.0)


class Selection(NamedTuple):
    """Which examples of a data set make one episode; all arrays are numpy's.

    Attributes:
      classes: [N], the labels in the data set. Class `classes[n]` has the label n in the episode.
      shots: int [N], the support examples of each class.
      query_shot: the query examples of every class.
      support: int [S], indices of examples, ordered by class.
      query: int [N·query_shot], the same.
      key: the key of the episode.
    """

    classes: np.ndarray
    shots: np.ndarray
    query_shot: int
    support: np.ndarray
    query: np.ndarray
    key: PRNGKey

    def episode(self, examples: np.ndarray | jax.Array) -> Episode:
        """The episode.

        Args:
          examples: [E, ...], in the order of the labels that the selector was made with.

        Returns:
          Inputs [S, ...] and int32 targets [S] in 0..N−1, and the same for the query set. Pixels of uint8 become
          float32 in [0, 1]; others are not changed.

        Raises:
          ValueError: if there are fewer examples than the selection needs.
        """
        # An array of jax would repeat its last example.
        if (last := max(self.support.max(), self.query.max())) >= len(examples):
            raise ValueError(f"example {last} is chosen and there are {len(examples)}; give one for each of the labels")
        labels = np.arange(len(self.classes), dtype=np.int32)
        return Episode(
            Batch(scale_pixels(examples[self.support]), np.repeat(labels, self.shots)),
            Batch(scale_pixels(examples[self.query]), np.repeat(labels, self.query_shot)),
            self.key,
        )


def make_selector(
    labels: Sequence[int] | np.ndarray,
    *,
    groups: Sequence[int] | np.ndarray | None = None,
    min_examples: int | None = None,
    ways: Sequence[int] = range(5, 21),
    mean_shots: Sequence[int] = (1, 2, 4, 8, 16),
    max_shot: int = 20,
    max_support: int = 200,
    max_query_shot: int = 10,
) -> "Selector":
    """Makes a distribution of unbalanced episodes, section 3.2 of Meta-Dataset in small.

    With n_c examples of class c:

    - The query set is balanced: q = min(max_query_shot, ⌊min_c n_c / 2⌋) examples a class. The minimum is over all
      classes of the data set, where the paper takes those of the episode, so that q is one number.
    - The way N is uniform over those of `ways` that are at most the number of classes. The N classes are drawn
      uniformly without replacement.
    - The support set is to have s = min(max_support, Σ_c ⌈β r_c⌉) examples, with β uniform in (0, 1] and
      r_c = min(max_shot, n_c − q).
    - The shot of class c is k_c = min(⌊R_c (s − N)⌋ + 1, r_c). Its share is R_c = e^(α_c) n_c / Σ e^(α_c') n_c', with
      each α uniform in [log 1/2, log 2). The paper's bound is n_c − q, without `max_shot`.
    - Then the support set is thinned, which the paper does not do: its size becomes N·m for the largest m of
      `mean_shots` with N·m ≤ Σ k_c. One example of each class stays, and which of the others go is uniform.
    - The examples of a class are drawn uniformly without replacement. None is in both sets.

    There are at most len(ways)·len(mean_shots) combinations of shapes.

    Args:
      labels: [E], the class of each example, integers.
      groups: [E], or None. Examples of one class with the same number are near copies, such as frames of one film. An
        episode has at most one of them: a group counts as one example in n_c, and gives a random one of its members.
      min_examples: classes with fewer are left out. By default none is, and every class must have two.
      ways: numbers of classes; those above the number of classes of the data set are left out.
      mean_shots: mean numbers of support examples of a class. One of them is 1.
      max_shot: the largest number of support examples of a class.
      max_support: the largest support set; at least the largest way.
      max_query_shot: the largest number of query examples of a class.

    Returns:
      `(key) -> Selection`, a function for the host: it is not traceable. A selection depends only on the key, and
      serves any array of examples in the order of `labels`. Its attributes `ways` and `query_shot` say what is drawn.

    Raises:
      ValueError: if a number is out of its range, `labels` or `groups` are no vectors of integers of one length, no
        class or no way is left, or a class has fewer than two examples.

    References:
      Triantafillou et al., 2020, section 3.2 and appendix A.2. The bounds are 50 ways, 100 shots, 500 support and 10
      query examples there.
    """
    labels = _as_integers("labels", labels)
    groups = np.arange(len(labels)) if groups is None else _as_integers("groups", groups)
    if len(groups) != len(labels):
        raise ValueError(f"there are {len(groups)} groups and {len(labels)} labels; give one group an example")
    max_shot = check_integer("max_shot", max_shot, at_least=1)
    max_support = check_integer("max_support", max_support, at_least=1)
    max_query_shot = check_integer("max_query_shot", max_query_shot, at_least=1)
    ways = sorted({check_integer("a way", way, at_least=2) for way in ways})
    mean_shots = sorted({check_integer("a mean shot", shot, at_least=1) for shot in mean_shots})
    if not mean_shots or mean_shots[0] != 1:
        raise ValueError(f"mean_shots is {mean_shots} and must hold 1, because some episodes have one example a class")
    classes, members = _members(labels, groups)
    counts = np.array([len(of_class.starts) for of_class in members])
    if min_examples is not None:
        is_kept = counts >= check_integer("min_examples", min_examples, at_least=2)
        if not is_kept.any():
            raise ValueError(f"min_examples={min_examples} leaves out all classes; the largest has {counts.max()}")
        classes, members, counts = classes[is_kept], list(itertools.compress(members, is_kept)), counts[is_kept]
    possible = [way for way in ways if way <= len(classes)]
    if not possible:
        raise ValueError(f"none of the ways {ways} is at most the {len(classes)} classes; give a smaller one")
    if possible[-1] > max_support:
        raise ValueError(
            f"max_support={max_support} is less than the way {possible[-1]}; every class needs a support example"
        )
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[counts.argmin()]} has {counts.min()} example (groups counted once); every class needs one "
            "for the support and one for the query set; pass min_examples=2 to leave it out"
        )
    query_shot = int(min(max_query_shot, counts.min() // 2))
    return Selector(classes, members, tuple(possible), tuple(mean_shots), query_shot, max_shot, max_support)


class _Members(NamedTuple):
    """The examples of one class.

    Attributes:
      examples: their indices, group after group.
      starts: where each group starts in `examples`.
      sizes: the number of examples of each group.
    """

    examples: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


def _members(labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, list[_Members]]:
    """The classes, sorted, and the examples of each."""
    classes = np.unique(labels)
    members = []
    for label in classes:
        examples = np.flatnonzero(labels == label)
        examples = examples[np.argsort(groups[examples], kind="stable")]
        _, starts, sizes = np.unique(groups[examples], return_index=True, return_counts=True)
        members.append(_Members(examples, starts, sizes))
    return classes, members


@dataclasses.dataclass(frozen=True, eq=False)
class Selector:
    """`(key) -> Selection`, made by `make_selector`.

    Attributes:
      classes: [C], the labels of the data set, sorted.
      members: the examples of each.
      ways: those that are drawn.
      mean_shots: see `make_selector`.
      query_shot: q.
      max_shot: see `make_selector`.
      max_support: see `make_selector`.
    """

    classes: np.ndarray
    members: list[_Members]
    ways: tuple[int, ...]
    mean_shots: tuple[int, ...]
    query_shot: int
    max_shot: int
    max_support: int

    def __call__(self, key: PRNGKey) -> Selection:
        """Draws an episode; the key must have a value and not be traced."""
        selection_key, episode_key = jax.random.split(key)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(selection_key)))
        way = rng.choice(self.ways)
        drawn = rng.choice(len(self.classes), way, replace=False)
        shots = self._shots(rng, np.array([len(self.members[index].starts) for index in drawn]))
        support, query = [], []
        for index, shot in zip(drawn, shots, strict=True):
            examples, starts, sizes = self.members[index]
            chosen = rng.choice(len(starts), shot + self.query_shot, replace=False)
            places = examples[starts[chosen] + rng.integers(sizes[chosen])]
            support.append(places[:shot])
            query.append(places[shot:])
        return Selection(
            self.classes[drawn], shots, self.query_shot, np.concatenate(support), np.concatenate(query), episode_key
        )

    def _shots(self, rng: np.random.Generator, counts: np.ndarray) -> np.ndarray:
        """The support examples [N] of classes that have `counts` [N] examples."""
        way, room = len(counts), np.minimum(self.max_shot, counts - self.query_shot)
        beta = 1.0 - rng.random()
        size = min(self.max_support, int(np.ceil(beta * room).sum()))
        weights = counts * np.exp(rng.uniform(*_LOG_WEIGHTS, way))
        shots = np.minimum((weights / weights.sum() * (size - way)).astype(int) + 1, room)
        kept = max(way * mean for mean in self.mean_shots if way * mean <= shots.sum())
        return shots - rng.multivariate_hypergeometric(shots - 1, shots.sum() - kept)


def _as_integers(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    """A vector of integers as an array of numpy."""
    array = np.asarray(values)
    if array.ndim != 1 or not len(array) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be a vector of integers, one an example, got {array.dtype}{list(array.shape)}")
    return array
