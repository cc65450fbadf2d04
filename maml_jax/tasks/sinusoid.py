"""Sinusoid regression: y = A sin(x − b), a task for every amplitude and phase.

Finn et al., 2017, section 5.1. https://arxiv.org/abs/1703.03400
"""

import dataclasses

import jax
import jax.numpy as jnp

from maml_jax.types import Batch, Episode, PRNGKey, SampleEpisodeFn, check_integer

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, jnp.pi)  # radians
INPUTS = (-5.0, 5.0)


def make_sampler(*, shot: int, query_shot: int, oracle: bool = False) -> SampleEpisodeFn:
    """Makes the task distribution of the MAML paper.

    Amplitude A ~ U[0.1, 5], phase b ~ U[0, π] radians, inputs x ~ U[−5, 5], no noise.

    Args:
      shot: K, support points of an episode.
      query_shot: query points of an episode.
      oracle: whether the inputs contain amplitude and phase too, for the baseline that knows its task.

    Returns:
      `(key) -> Episode` with inputs [shot, D] and targets [shot, 1], D = 1, or 3 (x, A, b) for the oracle; the query
      set has [query_shot, ...]. It is a `jax.tree_util.Partial`; samplers with equal settings share compiled programs.

    Raises:
      ValueError: if `shot` or `query_shot` is not a positive integer.
    """
    settings = _Sinusoid(check_integer("shot", shot, 1), check_integer("query_shot", query_shot, 1), oracle)
    return jax.tree_util.Partial(settings)


@dataclasses.dataclass(frozen=True)
class _Sinusoid:
    """`(key) -> Episode` with the settings of `make_sampler`."""

    shot: int
    query_shot: int
    oracle: bool

    def __call__(self, key: PRNGKey) -> Episode:
        amplitude_key, phase_key, input_key, episode_key = jax.random.split(key, 4)
        amplitude = jax.random.uniform(amplitude_key, minval=AMPLITUDES[0], maxval=AMPLITUDES[1])
        phase = jax.random.uniform(phase_key, minval=PHASES[0], maxval=PHASES[1])
        num_points = self.shot + self.query_shot
        x = jax.random.uniform(input_key, (num_points, 1), minval=INPUTS[0], maxval=INPUTS[1])
        y = amplitude * jnp.sin(x - phase)
        task = jnp.broadcast_to(jnp.stack([amplitude, phase]), (num_points, 2))
        inputs = jnp.concatenate([x, task], axis=1) if self.oracle else x
        return Episode(
            Batch(inputs[: self.shot], y[: self.shot]), Batch(inputs[self.shot :], y[self.shot :]), episode_key
        )
