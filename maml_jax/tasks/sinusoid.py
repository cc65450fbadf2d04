"""Sinusoid regression: y = A sin(x − b), a task for every amplitude and phase.

Finn et al., 2017, section 5.1. https://arxiv.org/abs/1703.03400
"""

import jax
import jax.numpy as jnp

from maml_jax.types import Batch, Episode, PRNGKey, SampleEpisodeFn

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, jnp.pi)  # radians
INPUTS = (-5.0, 5.0)


def make_sampler(*, shot: int, query_shot: int, oracle: bool = False) -> SampleEpisodeFn:
    """Makes the task distribution of the MAML paper.

    Amplitude U[0.1, 5], phase U[0, π] radians, inputs U[−5, 5], no noise.

    Args:
      shot: K, support points of an episode.
      query_shot: query points of an episode.
      oracle: whether the inputs also tell amplitude and phase, for the baseline that knows its task.

    Returns:
      `(key) -> Episode` with inputs [shot, D] and targets [shot, 1], D = 1, or 3 (x, A, b) for the oracle.

    Raises:
      ValueError: if `shot` or `query_shot` is not positive.
    """
    if shot < 1 or query_shot < 1:
        raise ValueError(f"an episode needs support and query points, got shot={shot}, query_shot={query_shot}")

    def sample_episode(key: PRNGKey) -> Episode:
        amplitude_key, phase_key, input_key, episode_key = jax.random.split(key, 4)
        amplitude = jax.random.uniform(amplitude_key, minval=AMPLITUDES[0], maxval=AMPLITUDES[1])
        phase = jax.random.uniform(phase_key, minval=PHASES[0], maxval=PHASES[1])
        x = jax.random.uniform(input_key, (shot + query_shot, 1), minval=INPUTS[0], maxval=INPUTS[1])
        y = amplitude * jnp.sin(x - phase)
        task = jnp.broadcast_to(jnp.stack([amplitude, phase]), (shot + query_shot, 2))
        inputs = jnp.concatenate([x, task], axis=1) if oracle else x
        return Episode(Batch(inputs[:shot], y[:shot]), Batch(inputs[shot:], y[shot:]), episode_key)

    return sample_episode
