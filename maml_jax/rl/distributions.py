"""What a policy returns: a distribution over actions, a pytree of arrays [..., A] with any leading axes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.types import PRNGKey, at_least_float32, wide_integers


class Categorical(NamedTuple):
    """A distribution over A actions, numbered from 0.

    Attributes:
      logits: unnormalised log-probabilities [..., A].
    """

    logits: jax.Array

    def sample(self, key: PRNGKey) -> jax.Array:
        """Actions, int32 [...]."""
        # Noise of half precision has so few values that ties would favour the first actions.
        return jax.random.categorical(key, at_least_float32(self.logits)).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """The log-probabilities [...] of actions [...]; not a number for an action out of range."""
        # Compares instead of gathering, whose derivative is a scatter, a loop over the entries on a CPU.
        num_actions, action = self.logits.shape[-1], wide_integers(action)
        chosen = action[..., None] == jnp.arange(num_actions).reshape((1,) * action.ndim + (-1,))
        of_action = jnp.sum(jnp.where(chosen, jax.nn.log_softmax(self.logits), 0.0), -1)
        return jnp.where((action >= 0) & (action < num_actions), of_action, jnp.nan)

    def kl(self, other: "Categorical") -> jax.Array:
        """KL(self ‖ other) [...], in nats."""
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        # An action with a logit of −∞ is never taken and adds nothing.
        return jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p - log_q, 0.0), -1)

    def entropy(self) -> jax.Array:
        """The entropy [...], in nats."""
        log_p = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p, 0.0), -1)

    def mode(self) -> jax.Array:
        """The most probable actions, int32 [...]."""
        return jnp.argmax(self.logits, -1).astype(jnp.int32)


class Normal(NamedTuple):
    """Independent normal distributions of A numbers.

    Attributes:
      mean: [..., A].
      log_std: the logarithms of the standard deviations, [..., A].
    """

    mean: jax.Array
    log_std: jax.Array

    def sample(self, key: PRNGKey) -> jax.Array:
        """Actions [..., A]."""
        noise = jax.random.normal(key, self.mean.shape, at_least_float32(self.mean).dtype)
        return self.mean + jnp.exp(self.log_std) * noise.astype(self.mean.dtype)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """The log-densities [...] of actions [..., A], a sum over the A numbers."""
        scaled = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * jnp.square(scaled) - self.log_std - 0.5 * jnp.log(2.0 * jnp.pi), -1)

    def kl(self, other: "Normal") -> jax.Array:
        """KL(self ‖ other) [...], in nats."""
        variance = jnp.exp(2.0 * self.log_std) + jnp.square(self.mean - other.mean)
        return jnp.sum(
            other.log_std - self.log_std + 0.5 * variance * jnp.exp(-2.0 * other.log_std) - 0.5,
            -1,
        )

    def entropy(self) -> jax.Array:
        """The entropy [...], in nats."""
        return jnp.sum(self.log_std + 0.5 * jnp.log(2.0 * jnp.pi * jnp.e), -1)

    def mode(self) -> jax.Array:
        """The most probable actions, [..., A]."""
        return self.mean


Distribution = Categorical | Normal


def unless_diverged(distribution: Distribution, action: jax.Array, reward: jax.Array) -> jax.Array:
    """The rewards [...] of actions, NaN where the policy was: the largest of logits that are NaN is action 0."""
    return jnp.where(jnp.isnan(distribution.log_prob(action)), jnp.nan, reward)
