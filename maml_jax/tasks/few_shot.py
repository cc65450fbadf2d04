"""Few-shot classification: episodes of N classes drawn on the device from an array of images."""

import jax
import jax.numpy as jnp

from maml_jax.types import Batch, Episode, PRNGKey, SampleEpisodeFn


def make_sampler(
    images: jax.Array, *, way: int, shot: int, query_shot: int, rotations: bool = False
) -> SampleEpisodeFn:
    """Makes a task distribution from images that stay on the device.

    An episode has `way` different classes and `shot + query_shot` different examples of each. Labels
    0..N−1 are given in the order of the draw, so a class has another label in each episode.

    Args:
      images: uint8 [C, n, H, W, channels], n examples of each of C classes.
      way: N ≤ C.
      shot: support examples per class.
      query_shot: query examples per class; shot + query_shot ≤ n.
      rotations: whether to turn every class of every episode by a random multiple of 90 degrees.
        Classes are drawn before they are turned: an episode never holds two rotations of one class.

    Returns:
      `(key) -> Episode`: inputs float32 [N·shot, H, W, channels] in [0, 1] and int32 targets [N·shot],
      both ordered by class; the query set likewise.

    Raises:
      ValueError: if `images` is not such an array, or holds too few classes or examples.

    References:
      Vinyals et al., 2016, section 4.1; rotations: Santoro et al., 2016. https://arxiv.org/abs/1606.04080
    """
    if images.ndim != 5 or images.dtype != jnp.uint8:
        raise ValueError(
            "images must be uint8 [classes, examples, height, width, channels], got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    num_classes, num_examples, height, width, _ = images.shape
    if min(way, shot, query_shot) < 1:
        raise ValueError(f"way, shot and query_shot must be positive, got {way}, {shot} and {query_shot}")
    if way > num_classes:
        raise ValueError(f"way={way} exceeds the {num_classes} classes of the split; choose a smaller way")
    if shot + query_shot > num_examples:
        raise ValueError(
            f"shot={shot} plus query_shot={query_shot} exceeds the {num_examples} examples of a class; "
            "lower one of them"
        )
    if rotations and height != width:
        raise ValueError(f"rotations need square images, got {height}x{width}; crop them or pass rotations=False")
    images = jnp.asarray(images)

    def sample_episode(key: PRNGKey) -> Episode:
        class_key, example_key, rotation_key, episode_key = jax.random.split(key, 4)
        classes = _draw_distinct(class_key, num_classes, way)
        examples = jax.vmap(lambda k: _draw_distinct(k, num_examples, shot + query_shot))(
            jax.random.split(example_key, way)
        )
        drawn = images[classes[:, None], examples]
        if rotations:
            turns = jax.random.randint(rotation_key, (way, 1, 1, 1, 1), 0, 4)
            drawn = jnp.where(turns % 2 == 1, jnp.rot90(drawn, axes=(2, 3)), drawn)
            drawn = jnp.where(turns >= 2, jnp.flip(drawn, axis=(2, 3)), drawn)
        inputs = drawn.astype(jnp.float32) / 255.0
        targets = jnp.broadcast_to(jnp.arange(way, dtype=jnp.int32)[:, None], (way, shot + query_shot))

        def flat(array: jax.Array) -> jax.Array:
            return array.reshape(-1, *array.shape[2:])

        return Episode(
            Batch(flat(inputs[:, :shot]), flat(targets[:, :shot])),
            Batch(flat(inputs[:, shot:]), flat(targets[:, shot:])),
            episode_key,
        )

    return sample_episode


def _draw_distinct(key: PRNGKey, population: int, count: int) -> jax.Array:
    """`count` different numbers below `population` in random order: the first swaps of a Fisher-Yates shuffle.

    `jax.random.choice` sorts the whole population, which is most of the time it takes to sample an episode.
    """
    partners = jax.random.randint(key, (count,), jnp.arange(count), population)

    def swap(i: jax.Array, order: jax.Array) -> jax.Array:
        j = partners[i]
        return order.at[i].set(order[j]).at[j].set(order[i])

    # Added to zeros made of the key's numbers, so that inside `shard_map` the carry varies with the key.
    order = jnp.arange(population) + jnp.zeros_like(partners[0])
    return jax.lax.fori_loop(0, count, swap, order)[:count]
