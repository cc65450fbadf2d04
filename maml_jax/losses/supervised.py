"""Losses and metrics: pure functions of the outputs and targets of one batch.

Each takes the mean over the batch, so that a step size keeps its meaning when the number of
examples changes. (The code of the MAML paper sums the inner cross-entropy over the N classes
instead; its inner rates are N times larger in the units used here.)
"""

from typing import Any

import jax
import jax.numpy as jnp

from maml_jax.types import wide_integers


def check_array(outputs: Any, name: str) -> None:
    """Raises ValueError if the outputs of a model are several arrays; `name` is that of the function."""
    if isinstance(outputs, tuple | list | dict):
        raise ValueError(
            f"{name} takes one array of outputs, got a {type(outputs).__name__}; choose an array of it in a loss of "
            "your own, or let the model return only that"
        )


def check_class_scores(outputs: jax.Array, targets: jax.Array, name: str) -> None:
    """Raises ValueError unless outputs are [..., N] and targets integers [...]; `name` is that of the function."""
    check_array(outputs, name)
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(
            f"{name} takes integer class indices as targets, got dtype {jnp.result_type(targets)}; "
            "for one-hot targets pass targets.argmax(-1)"
        )
    if jnp.ndim(outputs) < 1 or jnp.shape(outputs)[:-1] != jnp.shape(targets):
        raise ValueError(
            f"{name} takes outputs [..., N] and targets [...] of class indices, got outputs "
            f"{jnp.shape(outputs)} and targets {jnp.shape(targets)}; the model's last axis must hold "
            "one score a class"
        )


def mean_squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of (outputs - targets)² over every element.

    Args:
      outputs: floating array of any shape [S, ...].
      targets: array of the same shape.

    Returns:
      A scalar, in squared units of the targets.

    Raises:
      ValueError: if the shapes differ (a silent broadcast would average over pairs of examples).
    """
    check_array(outputs, "mean_squared_error")
    if jnp.shape(outputs) != jnp.shape(targets):
        raise ValueError(
            f"mean_squared_error takes outputs and targets of one shape, got outputs {jnp.shape(outputs)} "
            f"and targets {jnp.shape(targets)}; reshape the targets or change the model's last layer"
        )
    return jnp.mean(jnp.square(outputs - targets))


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy, in nats per example.

    Args:
      outputs: unnormalised log-probabilities [..., N].
      targets: integer class indices [...], in [0, N).

    Returns:
      A scalar; not a number if a target is out of range.

    Raises:
      ValueError: if the shapes do not fit or the targets are not integers.
    """
    check_class_scores(outputs, targets, "cross_entropy")
    return jnp.mean(_of_each(outputs, targets))


def masked_cross_entropy(outputs: jax.Array, targets: jax.Array, *, ignored: int = 0) -> jax.Array:
    """Mean softmax cross-entropy over the targets that count, in nats per target.

    The mean is over the targets and not over sentences, so a step size keeps its meaning for sentences of any length.

    Args:
      outputs: unnormalised log-probabilities [..., N].
      targets: integer class indices [...], in [0, N).
      ignored: targets with this value do not count, such as those that fill sentences up to one length.

    Returns:
      A scalar; 0 if no target counts, and not a number if one is out of range.

    Raises:
      ValueError: if the shapes do not fit or the targets are not integers.
    """
    check_class_scores(outputs, targets, "masked_cross_entropy")
    targets = wide_integers(targets)
    counts = targets != ignored
    losses = _of_each(outputs, targets)
    # In float32, because the sum of many targets may be too large for half precision where their mean is not.
    total = jnp.sum(jnp.where(counts, losses, 0.0), dtype=jnp.promote_types(losses.dtype, jnp.float32))
    return (total / jnp.maximum(jnp.sum(counts), 1)).astype(losses.dtype)


def _of_each(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The softmax cross-entropy of each target [...]."""
    # Compares instead of gathering: the derivative of a gather is a scatter, a loop over the examples on a CPU.
    num_classes, targets = outputs.shape[-1], wide_integers(targets)
    is_target = targets[..., None] == jnp.arange(num_classes).reshape((1,) * targets.ndim + (-1,))
    of_target = jnp.sum(jnp.where(is_target, jax.nn.log_softmax(outputs), 0.0), -1)
    return -jnp.where((targets >= 0) & (targets < num_classes), of_target, jnp.nan)


def accuracy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Share of examples whose largest output is the target's, in [0, 1].

    Args:
      outputs: scores [..., N].
      targets: integer class indices [...].

    Returns:
      A scalar of at least float32; not a number if an output is not, or if a target is not in 0, ..., N - 1. It is a
      metric and has no useful gradient.

    Raises:
      ValueError: if the shapes do not fit or the targets are not integers.
    """
    check_class_scores(outputs, targets, "accuracy")
    targets = wide_integers(targets)
    dtype = jnp.promote_types(jnp.result_type(outputs), jnp.float32)
    is_right = (jnp.argmax(outputs, axis=-1) == targets).astype(dtype)
    is_wrong = jnp.isnan(outputs).any(axis=-1) | (targets < 0) | (targets >= outputs.shape[-1])
    return jnp.mean(jnp.where(is_wrong, jnp.nan, is_right))
