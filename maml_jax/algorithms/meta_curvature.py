"""Meta-Curvature: learn the initialisation and a matrix that transforms the inner gradient of every layer.

Park and Oliva, 2019, Meta-curvature. https://arxiv.org/abs/1902.03356
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.gradients import mixed_mode
from maml_jax.inner.learner import gradient_based
from maml_jax.types import ArrayTree, InnerGradFn, LossFn, MetaLearner, Model, check_not_negative, select


def meta_curvature(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    inner_lr: float,
    num_inner_steps: int = 1,
    where: Callable[[str], bool] | None = None,
    inner_grad: InnerGradFn = mixed_mode,
    num_microbatches: int = 1,
    data_per_step: bool = False,
) -> MetaLearner:
    """Builds Meta-Curvature: min_{θ, M} E[L_Q(φ_K)] with φ_0 = θ and φ_{k+1} = φ_k − α M(∇L_S(φ_k)).

    M multiplies the gradient of every parameter along each of its axes by a learned square matrix (the paper's MC2).
    A convolution kernel [h, w, C, F] has one for its positions [hw, hw], one for its inputs [C, C] and one for its
    outputs [F, F]; a matrix [D, F] has two and a vector [F] one. They start as identities, where it is MAML.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      inner_lr: α; it is not learned, because the matrices contain a factor.
      num_inner_steps: K ≥ 0.
      where: `(name) -> bool`, the parameters that adapt and have matrices; by default all.
      inner_grad: how the inner gradient is differentiated. With `first_order` the matrices still learn.
      num_microbatches: parts of the support set whose gradients are computed one after another.
      data_per_step: whether each inner step has a support set of its own, leaves [K, S, ...].

    Returns:
      A `MetaLearner` with the meta-parameters {"params": θ, "curvature": a list of matrices for every parameter that
      adapts}.

    Raises:
      ValueError: if `model` is not a `Model`, `inner_lr` not a number of at least 0, or a count not an integer in its
        range.

    References:
      Park and Oliva, 2019, equations 7 to 9.
    """
    check_not_negative("inner_lr", inner_lr)

    def init(key, inputs):
        params = model.init(key, inputs)
        identities = jax.tree.map(
            lambda x: [jnp.eye(size, dtype=x.dtype) for size in _matrix_shape(x)], select(params, where)[0]
        )
        return {"params": params, "curvature": identities}

    def rule(meta_params):
        return optax.chain(transformed(meta_params["curvature"]), optax.sgd(inner_lr))

    return gradient_based(
        model,
        loss_fn,
        query_loss_fn,
        rule=rule,
        num_inner_steps=num_inner_steps,
        init=init,
        start=lambda meta_params: meta_params["params"],
        where=where,
        inner_grad=inner_grad,
        num_microbatches=num_microbatches,
        data_per_step=data_per_step,
    )


def transformed(curvature: ArrayTree) -> optax.GradientTransformation:
    """Multiplies gradients by the matrices of `curvature`, a list for every parameter, along each axis."""

    def transform(gradient, matrices):
        result = gradient.reshape(_matrix_shape(gradient))
        for axis, matrix in enumerate(matrices):
            result = jnp.moveaxis(jnp.tensordot(matrix, result, axes=(1, axis)), 0, axis)
        return result.reshape(gradient.shape)

    return optax.stateless(lambda grads, params: jax.tree.map(transform, grads, curvature))


def _matrix_shape(array: jax.Array) -> tuple[int, ...]:
    """The shape with all axes but the last two joined."""
    if array.ndim < 3:
        return array.shape
    *positions, inputs, outputs = array.shape
    return math.prod(positions), inputs, outputs
