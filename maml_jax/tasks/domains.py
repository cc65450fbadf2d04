"""Domains: one task seen in several ways, in episodes that hold batches of every source domain, or of one.

A sampler is a `jax.tree_util.Partial` of its settings and its data, so a compiled program takes the data as an
argument.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.tasks import few_shot
from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import Batch, Episode, PRNGKey, SampleEpisodeFn, check_integer


def make_sampler(domains: Sequence[Batch], *, batch_size: int) -> SampleEpisodeFn:
    """Makes a distribution of batches from every domain, for learning to generalise to other domains.

    The examples of a domain are drawn independently and uniformly from all of its examples, whatever their class. A
    batch may hold an example twice. Every domain has as many examples in an episode as any other.

    Args:
      domains: D domains, each a `Batch` (or a pair) of inputs [n_d, ...] and targets [n_d, ...]. Domains may have
        different numbers of examples; shapes and dtypes of an example are the same.
      batch_size: B, the examples of each domain in an episode.

    Returns:
      `(key) -> Episode`: the support set has inputs [D, B, ...] and targets [D, B, ...] in the order of `domains`.
      Inputs of uint8 become float32 in [0, 1]; others, and all targets, are not changed. The query set is empty,
      [0, B, ...]. `algorithms.mldg` draws its split from the key of the episode.

    Raises:
      ValueError: if `batch_size` is not a positive integer, there is no domain, a domain has no example, or the leaves
        of the domains do not fit together.
    """
    batch_size = check_integer("batch_size", batch_size, at_least=1)
    return jax.tree_util.Partial(_DomainBatches(batch_size), _data_of(domains))


def make_single_domain_sampler(
    domains: Sequence[Batch], *, num_inner_steps: int, shot: int, query_shot: int
) -> SampleEpisodeFn:
    """Makes a distribution of episodes of one domain each, with a batch for every inner step.

    A domain is drawn uniformly, and its examples independently and uniformly. An episode may hold an example twice.

    Args:
      domains: D domains, as in `make_sampler`.
      num_inner_steps: K ≥ 0. With K = 0 the support set is empty.
      shot: the examples of each inner step.
      query_shot: those of the query set.

    Returns:
      `(key) -> Episode` for a learner with `data_per_step`: a support set with leaves [K, shot, ...] and a query set
      [query_shot, ...]. Inputs of uint8 become float32 in [0, 1].

    Raises:
      ValueError: if a count is wrong, or the domains do not fit together.
    """
    sizes = (
        check_integer("num_inner_steps", num_inner_steps, at_least=0),
        check_integer("shot", shot, at_least=1),
        check_integer("query_shot", query_shot, at_least=1),
    )
    return jax.tree_util.Partial(_SingleDomain(*sizes), _data_of(domains))


def make_identity_sampler(
    domains: Sequence[jax.Array | Sequence[jax.Array]], *, num_identities: int, num_images: int
) -> SampleEpisodeFn:
    """Makes a distribution of identities with several images each from every domain, for verification.

    In each domain P different identities are drawn uniformly, and K different images of each. Domains need not have the
    same identities, nor as many.

    Args:
      domains: D domains, each the images of its identities as in `few_shot.make_sampler`: an array [I, n, ...], or a
        list of I arrays [n_i, ...].
      num_identities: P, of each domain.
      num_images: K ≥ 2, of each identity.

    Returns:
      `(key) -> Episode`: the support set has inputs [D, P·K, ...] and int32 targets [D, P·K] in 0..P−1, the identities
      within a domain. Pixels become float32 in [0, 1]. The query set is empty, [0, P·K, ...].

    Raises:
      ValueError: if there is no domain, a number is no such integer, a domain has too few identities or images, or an
        image of it has another dtype or shape than those of domain 0.
    """
    num_images = check_integer("num_images", num_images, at_least=2)
    if not len(domains):
        raise ValueError("domains is empty; give the images of at least one domain")
    samplers = []
    for index, images in enumerate(domains):
        try:
            samplers.append(few_shot.make_sampler(images, way=num_identities, shot=num_images - 1, query_shot=1))
        except ValueError as error:
            raise ValueError(f"domain {index}: {error}") from error
    drawn = [jax.eval_shape(sampler, jax.random.key(0)).support.inputs for sampler in samplers]
    kinds = [f"{inputs.dtype}{list(inputs.shape[1:])}" for inputs in drawn]
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"an image of domain {index} is {kind} and one of domain 0 {kinds[0]}; give all domains images of one "
                "dtype and one shape"
            )
    return jax.tree_util.Partial(_identity_batches, tuple(samplers))


def _identity_batches(samplers: tuple[SampleEpisodeFn, ...], key: PRNGKey) -> Episode:
    """The support and query sets of an episode of every domain, as one support set."""
    episode_key, *keys = jax.random.split(key, len(samplers) + 1)

    def all_images(sample_episode, key):
        episode = sample_episode(key)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), episode.support, episode.query)

    batches = [all_images(*pair) for pair in zip(samplers, keys, strict=True)]
    support = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    return Episode(support, jax.tree.map(lambda leaf: leaf[:0], support), episode_key)


class _Data(NamedTuple):
    """The examples of all domains.

    Attributes:
      examples: leaves [E, ...], domain after domain.
      starts: int32 [D], the index of the first example of each domain.
      counts: int32 [D], the number of examples of each domain.
    """

    examples: Batch
    starts: jax.Array
    counts: jax.Array


@dataclasses.dataclass(frozen=True)
class _DomainBatches:
    """`(data, key) -> Episode` with the settings of `make_sampler`."""

    batch_size: int

    def __call__(self, data: _Data, key: PRNGKey) -> Episode:
        example_key, episode_key = jax.random.split(key)
        shape = (len(data.starts), self.batch_size)
        places = jax.random.randint(example_key, shape, 0, data.counts[:, None])
        support = jax.tree.map(lambda leaf: leaf[data.starts[:, None] + places], data.examples)
        support = support._replace(inputs=scale_pixels(support.inputs))
        return Episode(support, jax.tree.map(lambda leaf: leaf[:0], support), episode_key)


@dataclasses.dataclass(frozen=True)
class _SingleDomain:
    """`(data, key) -> Episode` with the settings of `make_single_domain_sampler`."""

    num_inner_steps: int
    shot: int
    query_shot: int

    def __call__(self, data: _Data, key: PRNGKey) -> Episode:
        domain_key, example_key, episode_key = jax.random.split(key, 3)
        domain = jax.random.randint(domain_key, (), 0, len(data.starts))
        num_support = self.num_inner_steps * self.shot
        places = jax.random.randint(example_key, (num_support + self.query_shot,), 0, data.counts[domain])
        drawn = jax.tree.map(lambda leaf: leaf[data.starts[domain] + places], data.examples)
        drawn = drawn._replace(inputs=scale_pixels(drawn.inputs))
        shape = self.num_inner_steps, self.shot
        support = jax.tree.map(lambda leaf: leaf[:num_support].reshape(*shape, *leaf.shape[1:]), drawn)
        return Episode(support, jax.tree.map(lambda leaf: leaf[num_support:], drawn), episode_key)


def _data_of(domains: Sequence[Batch]) -> _Data:
    """The examples of all domains in one array a leaf.

    Raises:
      ValueError: if the domains do not fit together.
    """
    for index, domain in enumerate(domains):
        if not isinstance(domain, tuple | list) or len(domain) != 2:
            raise ValueError(f"domain {index} must be a pair of inputs and targets, got {type(domain).__name__}")
    domains = [Batch(*domain) for domain in domains]
    counts = _count_examples(domains)
    examples = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *domains)
    starts = np.cumsum(counts) - counts
    return _Data(examples, jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32))


def _count_examples(domains: list[Batch]) -> list[int]:
    """The number of examples of each domain, after checking that the domains fit together."""
    if not domains:
        raise ValueError("domains is empty; give the examples of at least one domain")
    counts, kinds = [], []
    for index, domain in enumerate(domains):
        leaves, structure = jax.tree.flatten(domain)
        sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
        if len(sizes) != 1 or not all(map(all, sizes)) or () in sizes:
            raise ValueError(
                f"the leaves of domain {index} have the shapes {', '.join(str(jnp.shape(leaf)) for leaf in leaves)}; "
                "inputs and targets must share a leading axis of at least one example"
            )
        counts.append(sizes.pop()[0])
        kinds.append((structure, [(leaf.dtype, leaf.shape[1:]) for leaf in leaves]))
        if kinds[index] != kinds[0]:
            raise ValueError(
                f"an example of domain {index} is {kinds[index][1]} and one of domain 0 {kinds[0][1]}; give all "
                "domains the same arrays, with one dtype and one shape of an example"
            )
    return counts
