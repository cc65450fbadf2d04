"""Linear regression: the support loss is quadratic, and every meta-gradient has a closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax import Batch, Episode, Model

ALPHA = 0.3  # inner step size, below 2 / the largest eigenvalue of the Hessians drawn here

linear_model = Model(
    init=lambda key, inputs: jax.random.normal(key, inputs.shape[1:]),
    apply=lambda params, inputs: inputs @ params,
)


def half_mse(outputs, targets):
    return 0.5 * jnp.mean(jnp.square(outputs - targets))


class Quadratic(NamedTuple):
    """½ θᵀAθ − bᵀθ + constant, which is `half_mse` of the linear model on one batch."""

    hessian: jax.Array  # A = XᵀX / n
    offset: jax.Array  # b = Xᵀy / n

    @classmethod
    def of(cls, batch):
        count = batch.inputs.shape[0]
        return cls(batch.inputs.T @ batch.inputs / count, batch.inputs.T @ batch.targets / count)

    def gradient(self, params):
        return self.hessian @ params - self.offset

    def descend(self, params, alpha, num_steps):
        """φ_K = a + P^K (θ − a) for the minimiser a and P = I − αA."""
        minimiser = jnp.linalg.solve(self.hessian, self.offset)
        return minimiser + self.contraction(alpha, num_steps) @ (params - minimiser)

    def descend_once(self, params, alpha):
        """One step, also where the Hessian has no inverse."""
        return params - alpha * self.gradient(params)

    def contraction(self, alpha, num_steps):
        """P^K, the derivative of φ_K with respect to θ."""
        step = jnp.eye(len(self.offset)) - alpha * self.hessian
        return jnp.linalg.matrix_power(step, num_steps)


def make_episode(key, dim=4, num_support=6, num_query=5):
    """An episode of random inputs and noisy targets, so that support and query disagree."""
    support_key, query_key = jax.random.split(key)

    def batch(key, count):
        input_key, target_key = jax.random.split(key)
        return Batch(jax.random.normal(input_key, (count, dim)), jax.random.normal(target_key, (count,)))

    return Episode(batch(support_key, num_support), batch(query_key, num_query))


def make_episodes(key, num_tasks, **kwargs):
    """Episodes [T, ...]."""
    return jax.vmap(lambda key: make_episode(key, **kwargs))(jax.random.split(key, num_tasks))
