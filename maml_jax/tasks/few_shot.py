"""Few-shot classification: episodes of N classes, drawn on the device from labelled examples.

A sampler is a `jax.tree_util.Partial` of its settings and its data, so a compiled program takes the data as an
argument. Samplers with equal settings and data of equal shapes share one compiled program.

An episode is drawn in two steps: which examples it has, which needs only the sizes of the classes, and the examples
themselves. `streaming` shares the first step and takes the examples from the host.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import Batch, Episode, PRNGKey, SampleEpisodeFn, check_integer, values_of


def make_sampler(
    images: jax.Array | Sequence[jax.Array],
    *,
    way: int,
    shot: int,
    query_shot: int | None = None,
    num_queries: int | None = None,
    rotations: bool = False,
    rotated_classes: bool = False,
) -> SampleEpisodeFn:
    """Makes a distribution of N-way classification tasks.

    An episode has `way` different classes, drawn uniformly without replacement, and `shot` support examples of each,
    drawn uniformly without replacement from the class. Labels 0..N−1 follow the order in which the classes were drawn,
    so a class has another label in each episode. No support example is in the query set.

    The query set has one of two distributions:

    - `query_shot`: it is balanced. Each class has `query_shot` examples, drawn uniformly without replacement from
      those of the class that are not in the support set.
    - `num_queries`: it is not balanced. All examples of the N classes that are not in the support set form one pool,
      and M of them are drawn uniformly without replacement: every ordered selection of M has the same probability.
      The number of queries of a class is multivariate hypergeometric, and a class may have none.

    Args:
      images: an array [C, n, ...], n examples of each of C classes, or a list of C arrays [n_c, ...] if the classes
        have different sizes. Pixels are uint8 and an example is [H, W, channels]. Features are floating and an example
        has any shape.
      way: N ≤ C, or ≤ 4C with `rotated_classes`.
      shot: support examples per class.
      query_shot: query examples per class; every class must have shot + query_shot examples.
      num_queries: M, the query examples of an episode; any N classes must have N·shot + M examples together.
      rotations: whether to turn every class of every episode by a random multiple of 90 degrees. Classes are drawn
        before they are turned, so an episode never has two rotations of one class.
      rotated_classes: whether the four rotations of a class are four different classes, drawn independently. An
        episode may have two rotations of one class, and then one image may appear in both.

    Returns:
      `(key) -> Episode`: inputs [N·shot, ...] and int32 targets [N·shot], ordered by class. Pixels become float32 in
      [0, 1]; features are not changed. The query set is [N·query_shot, ...], ordered by class, or [M, ...] in random
      order.

    Raises:
      ValueError: if a number is not a positive integer, if not exactly one of `query_shot` and `num_queries` is given,
        if both kinds of rotation are requested, if `images` has another dtype or shape or a feature that is not finite,
        or if it has too few classes or examples.

    References:
      Vinyals et al., 2016, section 4.1; `rotations`: Santoro et al., 2016. https://arxiv.org/abs/1606.04080
      `rotated_classes`: Nichol et al., 2018, section 6.1: 1,200 characters make 4,800 classes.
      https://arxiv.org/abs/1803.02999
    """
    table = class_table(images, must_rotate=rotations or rotated_classes)
    settings = few_shot_draws(
        table.counts,
        way=way,
        shot=shot,
        query_shot=query_shot,
        num_queries=num_queries,
        rotations=rotations,
        rotated_classes=rotated_classes,
    )
    return jax.tree_util.Partial(_Resident(settings), _on_device(images, table))


def make_batch_sampler(
    images: jax.Array | Sequence[jax.Array], *, batch_size: int, rotated_classes: bool = False
) -> SampleEpisodeFn:
    """Makes a distribution of batches from all classes with their global labels, for pretraining or pairs.

    The examples of a batch are drawn independently and uniformly from all examples of all classes. A batch may hold
    an example twice, and a larger class is drawn more often.

    Args:
      images: the examples of C classes, as in `make_sampler`.
      batch_size: B, the examples of a batch.
      rotated_classes: whether the four rotations of a class are four classes. Every example is then turned by a
        random multiple of 90 degrees; class c turned k times has the label c + k·C.

    Returns:
      `(key) -> Episode`: the support set has inputs [B, ...] and int32 targets [B] in 0..C−1, or in 0..4C−1 with
      `rotated_classes`. The query set is empty, [0, ...].

    Raises:
      ValueError: if `batch_size` is not a positive integer, or `images` is no such data.
    """
    table = class_table(images, must_rotate=rotated_classes)
    settings = batch_draws(table.counts, batch_size=batch_size, rotated_classes=rotated_classes)
    return jax.tree_util.Partial(_Resident(settings), _on_device(images, table))


class ClassTable(NamedTuple):
    """Where the examples of each class are when all examples are in one row, class after class.

    Attributes:
      starts: int32 [C], the index of the first example of each class.
      counts: int32 [C], the number of examples of each class.
    """

    starts: jax.Array
    counts: jax.Array


class Draw(NamedTuple):
    """What an episode consists of, E = S + M examples, the support set first.

    Attributes:
      examples: int32 [E], indices into the row of all examples.
      labels: int32 [E].
      turns: int32 [E], how often each example is turned by 90 degrees; None if none is.
      key: of the episode.
    """

    examples: jax.Array
    labels: jax.Array
    turns: jax.Array | None
    key: PRNGKey


def few_shot_draws(
    sizes: np.ndarray,
    *,
    way: int,
    shot: int,
    query_shot: int | None = None,
    num_queries: int | None = None,
    rotations: bool = False,
    rotated_classes: bool = False,
) -> "FewShotDraws":
    """The first step of `make_sampler`, for classes of these sizes [C]; arguments and errors are the same."""
    if (query_shot is None) == (num_queries is None):
        raise ValueError(
            f"pass either query_shot or num_queries, got query_shot={query_shot}, num_queries={num_queries}"
        )
    if rotations and rotated_classes:
        raise ValueError("rotations and rotated_classes exclude each other; pass one of them")
    way, shot = check_integer("way", way, 1), check_integer("shot", shot, 1)
    query_shot = None if query_shot is None else check_integer("query_shot", query_shot, 1)
    num_queries = None if num_queries is None else check_integer("num_queries", num_queries, 1)
    counts = np.repeat(sizes, 4 if rotated_classes else 1)
    if way > len(counts):
        raise ValueError(f"way={way} exceeds the {len(counts)} classes of the split; choose a smaller way")
    if shot + (query_shot or 0) > sizes.min():
        raise ValueError(
            f"shot={shot}{f' plus query_shot={query_shot}' if query_shot else ''} exceeds the {sizes.min()} "
            f"examples of class {sizes.argmin()}; use fewer examples or leave the class out"
        )
    fewest = int(np.sort(counts)[:way].sum()) - way * shot
    if num_queries and num_queries > fewest:
        raise ValueError(
            f"num_queries={num_queries} exceeds the {fewest} examples that the {way} smallest classes have outside "
            "their support sets; use fewer queries or leave small classes out"
        )
    return FewShotDraws(way, shot, query_shot, num_queries, rotations, rotated_classes, int(sizes.max()))


def batch_draws(sizes: np.ndarray, *, batch_size: int, rotated_classes: bool = False) -> "BatchDraws":
    """The first step of `make_batch_sampler`, for classes of these sizes [C]; arguments and errors are the same."""
    return BatchDraws(check_integer("batch_size", batch_size, 1), rotated_classes, int(sizes.sum()))


@dataclasses.dataclass(frozen=True)
class FewShotDraws:
    """Draws with the settings of `make_sampler`; `max_examples` is the size of the largest class."""

    way: int
    shot: int
    query_shot: int | None
    num_queries: int | None
    rotations: bool
    rotated_classes: bool
    max_examples: int

    def draw(self, table: ClassTable, key: PRNGKey) -> Draw:
        """Draws the examples of an episode."""
        class_key, example_key, rotation_key, episode_key = jax.random.split(key, 4)
        num_classes = len(table.starts)
        num_drawable = num_classes * (4 if self.rotated_classes else 1)
        turns, classes = jnp.divmod(_shuffle(class_key, self.way, num_drawable, num_drawable)[: self.way], num_classes)
        if self.rotations:
            turns = jax.random.randint(rotation_key, (self.way,), 0, 4)

        # `order` [N, max_examples] has the support set of a class first, then its other examples.
        if self.num_queries is None:
            order = self._order_examples(example_key, table.counts[classes], self.shot + self.query_shot)
            query_labels = jnp.repeat(jnp.arange(self.way), self.query_shot)
            query_places = jnp.tile(jnp.arange(self.shot, self.shot + self.query_shot), self.way)
        else:
            example_key, query_key = jax.random.split(example_key)
            order = self._order_examples(example_key, table.counts[classes], self.shot)
            query_labels, query_places = self._draw_from_pool(query_key, table.counts[classes])

        labels = jnp.concatenate([jnp.repeat(jnp.arange(self.way), self.shot), query_labels])
        places = jnp.concatenate([jnp.tile(jnp.arange(self.shot), self.way), query_places])
        return Draw(
            table.starts[classes][labels] + order[labels, places],
            labels.astype(jnp.int32),
            turns[labels] if self.rotations or self.rotated_classes else None,
            episode_key,
        )

    @property
    def num_support(self) -> int:
        """S, the size of the support set."""
        return self.way * self.shot

    def _order_examples(self, key: PRNGKey, counts: jax.Array, num_drawn: int) -> jax.Array:
        """[N, max_examples]: for each class, the result of `_shuffle`."""
        return jax.vmap(lambda k, count: _shuffle(k, num_drawn, count, self.max_examples))(
            jax.random.split(key, self.way), counts
        )

    def _draw_from_pool(self, key: PRNGKey, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Labels [M] and places [M] in `order`, from the pool of all examples outside the support set."""
        left = counts - self.shot
        ends = jnp.cumsum(left)
        pool_size = self.way * (self.max_examples - self.shot)
        drawn = _shuffle(key, self.num_queries, ends[-1], pool_size)[: self.num_queries]
        labels = jnp.searchsorted(ends, drawn, side="right")
        return labels, drawn - (ends - left)[labels] + self.shot


@dataclasses.dataclass(frozen=True)
class BatchDraws:
    """Draws with the settings of `make_batch_sampler`, from `num_examples` in all."""

    batch_size: int
    rotated_classes: bool
    num_examples: int

    def draw(self, table: ClassTable, key: PRNGKey) -> Draw:
        """Draws the examples of a batch."""
        example_key, rotation_key, episode_key = jax.random.split(key, 3)
        drawn = jax.random.randint(example_key, (self.batch_size,), 0, self.num_examples)
        labels, turns = jnp.searchsorted(table.starts, drawn, side="right") - 1, None
        if self.rotated_classes:
            turns = jax.random.randint(rotation_key, (self.batch_size,), 0, 4)
            labels = labels + turns * len(table.starts)
        return Draw(drawn, labels.astype(jnp.int32), turns, episode_key)

    @property
    def num_support(self) -> int:
        """S, the size of the support set, which is everything."""
        return self.batch_size


def episode_of(draw: Draw, examples: jax.Array, num_support: int) -> Episode:
    """The second step: the episode of a draw from its examples [E, ...], as they are stored."""
    if draw.turns is not None:
        examples = _turn(examples, draw.turns)
    inputs = scale_pixels(examples)
    return Episode(
        Batch(inputs[:num_support], draw.labels[:num_support]),
        Batch(inputs[num_support:], draw.labels[num_support:]),
        draw.key,
    )


@dataclasses.dataclass(frozen=True)
class _Resident:
    """`(data, key) -> Episode` from examples on the device; `data` holds all examples in a row, and their table."""

    draws: FewShotDraws | BatchDraws

    def __call__(self, data: tuple[jax.Array, ClassTable], key: PRNGKey) -> Episode:
        examples, table = data
        draw = self.draws.draw(table, key)
        return episode_of(draw, examples[draw.examples], self.draws.num_support)


def class_table(images: jax.Array | Sequence[jax.Array], must_rotate: bool) -> ClassTable:
    """Checks the examples of all classes and says where they are in one row, on the host.

    Args:
      images: as in `make_sampler`.
      must_rotate: whether the examples must be square images.

    Raises:
      ValueError: as `make_sampler` does for `images`.
    """
    if isinstance(images, list | tuple):
        classes = [np.asarray(examples) for examples in images]
        for i, examples in enumerate(classes):
            if examples.ndim < 1 or (examples.shape[1:], examples.dtype) != (classes[0].shape[1:], classes[0].dtype):
                raise ValueError(
                    f"class {i} is {examples.dtype} {examples.shape} and class 0 is {classes[0].dtype} "
                    f"{classes[0].shape}; pass arrays [n_c, ...] with one dtype and one shape of an example"
                )
        counts = [len(examples) for examples in classes]
        dtype, example_shape = (classes[0].dtype, classes[0].shape[1:]) if classes else (None, ())
    else:
        if not hasattr(images, "ndim"):
            raise ValueError(
                f"images must be an array [classes, examples, ...] or a list of arrays [n_c, ...], got "
                f"{type(images).__name__}; of a dictionary pass list(images.values())"
            )
        if images.ndim < 2:
            raise ValueError(f"images must be [classes, examples, ...], got the shape {tuple(images.shape)}")
        counts = [images.shape[1]] * images.shape[0]
        dtype, example_shape = images.dtype, images.shape[2:]
    if not all(counts) or not counts:
        where = f"class {counts.index(0)} is empty" if counts else "there is no class"
        raise ValueError(f"images must have at least one class and one example of each class; {where}")
    shape = (len(counts), max(counts), *example_shape)
    if not (jnp.issubdtype(dtype, jnp.floating) or (dtype == jnp.uint8 and len(shape) == 5)):
        raise ValueError(
            "images must be uint8 [classes, examples, height, width, channels] or floating [classes, examples, ...], "
            f"got {dtype} {shape}; give pixels three axes, and convert other integers to float32, for example "
            "16-bit pixels by (images / 65535).astype(np.float32)"
        )
    if must_rotate and (len(shape) != 5 or shape[2] != shape[3]):
        raise ValueError(
            f"rotations need square images, got {'x'.join(map(str, shape[2:]))}; crop them to [n, n, channels] or do "
            "not rotate them"
        )
    ends = np.cumsum(counts)
    return ClassTable((ends - counts).astype(np.int32), np.asarray(counts, np.int32))


def _on_device(images: jax.Array | Sequence[jax.Array], table: ClassTable) -> tuple[jax.Array, ClassTable]:
    """All examples [E, ...] in a row, and their table.

    Raises:
      ValueError: if a feature is not finite.
    """
    if isinstance(images, list | tuple):
        examples = np.concatenate([np.asarray(examples) for examples in images])
    else:
        examples = images.reshape(-1, *images.shape[2:])
    if jnp.issubdtype(examples.dtype, jnp.floating) and (values := values_of(examples)) is not None:
        with np.errstate(over="ignore"):  # a large float64 is infinite in float32
            on_device = values.astype(jax.dtypes.canonicalize_dtype(values.dtype))
        finite = np.isfinite(on_device).reshape(len(values), -1).all(1)
        if not finite.all():
            where = np.searchsorted(table.starts + table.counts, np.argmin(finite), side="right")
            raise ValueError(
                f"a feature of class {where} is NaN or infinite; leave the example out, or mend what computes it"
            )
    return jax.tree.map(jnp.asarray, (examples, table))


def _shuffle(key: PRNGKey, num_drawn: int, population: int | jax.Array, size: int) -> jax.Array:
    """Draws without replacement: the first `num_drawn` swaps of a Fisher-Yates shuffle.

    `jax.random.choice` sorts the whole population, which is most of the time that it takes to sample an episode.

    Args:
      key: the randomness.
      num_drawn: static, ≤ population.
      population: ≤ size; it may be traced.
      size: static.

    Returns:
      [size]: first `num_drawn` different numbers below `population` in random order, then the other numbers below
      `population`, then the rest.
    """
    partners = jax.random.randint(key, (num_drawn,), jnp.arange(num_drawn), population)

    def swap(i: jax.Array, order: jax.Array) -> jax.Array:
        j = partners[i]
        return order.at[i].set(order[j]).at[j].set(order[i])

    return jax.lax.fori_loop(0, num_drawn, swap, jnp.arange(size))


def _turn(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns each of images [S, n, n, channels] by turns [S] times 90 degrees."""
    turns = turns[:, None, None, None]
    images = jnp.where(turns % 2 == 1, jnp.rot90(images, axes=(1, 2)), images)
    return jnp.where(turns >= 2, jnp.flip(images, axis=(1, 2)), images)
