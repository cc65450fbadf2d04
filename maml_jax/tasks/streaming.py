"""Few-shot classification with data that stay on the host: for example memory maps, larger than the device or the host.

The samplers draw exactly the episodes of `few_shot` for the same keys. Only the images of an episode travel to the
device, as uint8, and are scaled and turned there. A sampler works wherever one of `few_shot` does; then the program
waits for the images of every meta-step. `make_train_loop` gathers them ahead in another thread instead.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.tasks import few_shot
from maml_jax.types import Episode, MetaState, PRNGKey, SampleEpisodeFn, check_integer, task_keys

_IN_FLIGHT = 2  # meta-steps that were started and not waited for


def make_sampler(
    images: np.ndarray | Sequence[np.ndarray],
    *,
    way: int,
    shot: int,
    query_shot: int | None = None,
    num_queries: int | None = None,
    rotations: bool = False,
    rotated_classes: bool = False,
) -> SampleEpisodeFn:
    """`few_shot.make_sampler` of images that stay on the host; arguments and episodes are the same.

    So are the errors, but features are not searched for what is not finite, which would read all of them.

    Args:
      images: arrays of numpy, [C, n, ...] or C arrays [n_c, ...], such as the memory maps of `image_folder.load`. They
        must not change.
      way: as there.
      shot: as there.
      query_shot: as there.
      num_queries: as there.
      rotations: as there.
      rotated_classes: as there.

    Returns:
      `(key) -> Episode`, which may be jitted, mapped and divided over the devices of one process.
    """
    table = few_shot.class_table(images, must_rotate=rotations or rotated_classes)
    draws = few_shot.few_shot_draws(
        table.counts,
        way=way,
        shot=shot,
        query_shot=query_shot,
        num_queries=num_queries,
        rotations=rotations,
        rotated_classes=rotated_classes,
    )
    return jax.tree_util.Partial(_Streamed(draws, _Store(images, table)), jax.tree.map(jnp.asarray, table))


def make_batch_sampler(
    images: np.ndarray | Sequence[np.ndarray], *, batch_size: int, rotated_classes: bool = False
) -> SampleEpisodeFn:
    """`few_shot.make_batch_sampler` of images that stay on the host; see `make_sampler`."""
    table = few_shot.class_table(images, must_rotate=rotated_classes)
    draws = few_shot.batch_draws(table.counts, batch_size=batch_size, rotated_classes=rotated_classes)
    return jax.tree_util.Partial(_Streamed(draws, _Store(images, table)), jax.tree.map(jnp.asarray, table))


def is_streamed(sample_episode: SampleEpisodeFn) -> bool:
    """Whether a task distribution comes from this module, so that `make_train_loop` can gather its images ahead."""
    return isinstance(getattr(sample_episode, "func", None), _Streamed)


def make_train_loop(
    meta_step: Callable[[MetaState, Episode], tuple[MetaState, Any]],
    sample_episode: SampleEpisodeFn,
    *,
    meta_batch_size: int,
    num_steps: int,
    ahead: int = 2,
) -> Callable[[MetaState, PRNGKey], tuple[MetaState, Any]]:
    """Many meta-steps, for which another thread gathers the images while the device computes.

    It draws the tasks of `outer.make_train_loop`: those of step i with `fold_in(key, i)` for the absolute step i.

    Args:
      meta_step: from `outer.make_meta_step`, which says how to update and whether there is a mesh.
      sample_episode: from `make_sampler` or `make_batch_sampler` of this module.
      meta_batch_size: T, tasks a meta-step.
      num_steps: meta-steps a call.
      ahead: meta-steps whose images are gathered before they are needed. So many more wait on the device.

    Returns:
      `loop(state, key) -> (state, info)` with `info` leaves [num_steps]. An error of the other thread, such as an
      image that cannot be read, is raised by the call.

    Raises:
      ValueError: if a count is not a positive integer, or `sample_episode` is of another kind.
    """
    meta_batch_size = check_integer("meta_batch_size", meta_batch_size, at_least=1)
    num_steps, ahead = check_integer("num_steps", num_steps, at_least=1), check_integer("ahead", ahead, at_least=1)
    if not is_streamed(sample_episode):
        raise ValueError("sample_episode must come from streaming.make_sampler or streaming.make_batch_sampler")
    streamed, (table,) = sample_episode.func, sample_episode.args

    @jax.jit
    def draw_all(table: few_shot.ClassTable, key: PRNGKey, first: jax.Array) -> few_shot.Draw:
        def of_step(step):
            keys = task_keys(jax.random.fold_in(key, step), meta_batch_size)  # those of outer.make_train_loop
            return jax.vmap(lambda key: streamed.draws.draw(table, key))(keys)

        return jax.vmap(of_step)(first + jnp.arange(num_steps))

    @jax.jit
    def episodes_of(draws: few_shot.Draw, step: jax.Array, images: jax.Array) -> Episode:
        draws = jax.tree.map(lambda leaf: leaf[step], draws)
        return jax.vmap(streamed.episode)(draws, images)

    def fetch(indices: np.ndarray) -> jax.Array:
        return jax.device_put(streamed.store.gather(indices))

    def loop(state: MetaState, key: PRNGKey) -> tuple[MetaState, Any]:
        draws = draw_all(table, key, np.asarray(state.step))
        indices = np.asarray(draws.examples)
        infos, waiting = [], collections.deque()
        with ThreadPoolExecutor(1, thread_name_prefix="gather") as thread:
            try:
                for step in range(num_steps):
                    while len(waiting) <= ahead and step + len(waiting) < num_steps:
                        waiting.append(thread.submit(fetch, indices[step + len(waiting)]))
                    episodes = episodes_of(draws, step, waiting.popleft().result())
                    state, info = meta_step(state, episodes)
                    infos.append(info)
                    if step >= _IN_FLIGHT:  # else the images of all steps could pile up on the device
                        infos[step - _IN_FLIGHT] = jax.device_get(infos[step - _IN_FLIGHT])
            finally:
                thread.shutdown(cancel_futures=True)
        return state, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *jax.device_get(infos))

    return loop


class _Store:
    """Examples on the host. Equal only to itself, because it is a part of compiled programs."""

    def __init__(self, images: np.ndarray | Sequence[np.ndarray], table: few_shot.ClassTable):
        self.classes = [np.asarray(examples) for examples in images]  # memory maps become plain arrays, still on disk
        self.starts = table.starts
        self.example_shape = self.classes[0].shape[1:]
        self.dtype = jax.dtypes.canonicalize_dtype(self.classes[0].dtype)  # float64 becomes float32, as on a device

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """The examples [..., *example] for indices [...] into the row of all examples."""
        flat = np.asarray(indices).ravel()
        classes = np.searchsorted(self.starts, flat, side="right") - 1
        gathered = np.empty((len(flat), *self.example_shape), self.dtype)
        for place, (c, example) in enumerate(zip(classes, flat - self.starts[classes], strict=True)):
            gathered[place] = self.classes[c][example]
        return gathered.reshape(*np.shape(indices), *self.example_shape)


@dataclasses.dataclass(frozen=True)
class _Streamed:
    """`(table, key) -> Episode` with examples from the host."""

    draws: few_shot.FewShotDraws | few_shot.BatchDraws
    store: _Store

    def __call__(self, table: few_shot.ClassTable, key: PRNGKey) -> Episode:
        draw = self.draws.draw(table, key)
        shape = jax.ShapeDtypeStruct((*draw.examples.shape, *self.store.example_shape), self.store.dtype)
        # Mapped over T tasks it is called once, with [T, E].
        images = jax.pure_callback(self.store.gather, shape, draw.examples, vmap_method="broadcast_all")
        return self.episode(draw, images)

    def episode(self, draw: few_shot.Draw, images: jax.Array) -> Episode:
        """The episode of a draw from its examples [E, ...]."""
        return few_shot.episode_of(draw, images, self.draws.num_support)
