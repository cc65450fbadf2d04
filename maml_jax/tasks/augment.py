"""Random changes to the images of an episode: reflections, shifts and colours."""

import dataclasses

import jax
import jax.numpy as jnp

from maml_jax.types import (
    Batch,
    Episode,
    PRNGKey,
    SampleEpisodeFn,
    check_integer,
    function_and_data,
    holds_for,
    with_data,
)


def augmented(
    sample_episode: SampleEpisodeFn, *, flip: bool = True, max_shift: int = 8, jitter: float = 0.4
) -> SampleEpisodeFn:
    """Changes every image of every episode at random, support and query set alike.

    Each image is changed on its own: it is reflected with probability 1/2, shifted by up to `max_shift` pixels in both
    directions (what comes in from outside repeats the border), and its brightness, contrast and saturation, in this
    order, are multiplied by numbers drawn uniformly from [1 − jitter, 1 + jitter]. Results are clipped to [0, 1].

    Args:
      sample_episode: `(key) -> Episode` with images [S, H, W, channels] in [0, 1].
      flip: whether left and right may be exchanged.
      max_shift: the largest shift, in pixels; 0 for none.
      jitter: the largest relative change of the colours, in [0, 1); 0 for none.

    Returns:
      `(key) -> Episode` with the same targets and key. The arrays of a `jax.tree_util.Partial` stay arguments of a
      compiled program.

    Raises:
      ValueError: if `max_shift` is negative or `jitter` is not in [0, 1). The distribution raises it if inputs are no
        floating images.
    """
    max_shift = check_integer("max_shift", max_shift, at_least=0)
    if not holds_for(jitter, lambda x: (x >= 0) & (x < 1)):
        raise ValueError(f"jitter={jitter} must be in [0, 1); 0.4 changes colours by up to 40 %")
    function, data = function_and_data(sample_episode)
    return jax.tree_util.Partial(_Augmented(function, flip, max_shift, float(jitter)), data)


@dataclasses.dataclass(frozen=True)
class _Augmented:
    """`(data, key) -> Episode` with the settings of `augmented`."""

    function: SampleEpisodeFn
    flip: bool
    max_shift: int
    jitter: float

    def __call__(self, data: tuple, key: PRNGKey) -> Episode:
        sample_key, change_key = jax.random.split(key)
        episode = with_data(self.function, data)(sample_key)
        support_key, query_key = jax.random.split(change_key)
        return episode._replace(
            support=self._change_batch(support_key, episode.support), query=self._change_batch(query_key, episode.query)
        )

    def _change_batch(self, key: PRNGKey, batch: Batch) -> Batch:
        if batch.inputs.ndim != 4 or not jnp.issubdtype(batch.inputs.dtype, jnp.floating):
            raise ValueError(
                f"augmented changes floating images [S, height, width, channels], got {batch.inputs.dtype}"
                f"{list(batch.inputs.shape)}"
            )
        if not len(batch.inputs):
            return batch
        keys = jax.random.split(key, len(batch.inputs))
        return batch._replace(inputs=jax.vmap(self._change)(keys, batch.inputs))

    def _change(self, key: PRNGKey, image: jax.Array) -> jax.Array:
        flip_key, shift_key, colour_key = jax.random.split(key, 3)
        if self.flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        if self.max_shift:
            row, column = jax.random.randint(shift_key, (2,), 0, 2 * self.max_shift + 1)
            margin = (self.max_shift, self.max_shift)
            padded = jnp.pad(image, (margin, margin, (0, 0)), mode="edge")
            image = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
        if self.jitter:
            brightness, contrast, saturation = jax.random.uniform(
                colour_key, (3,), minval=1 - self.jitter, maxval=1 + self.jitter
            )
            image = image * brightness
            mean = image.mean()
            image = mean + contrast * (image - mean)
            grey = image.mean(-1, keepdims=True)
            image = jnp.clip(grey + saturation * (image - grey), 0.0, 1.0)
        return image
