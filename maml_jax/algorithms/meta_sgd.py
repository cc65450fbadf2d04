"""Meta-SGD: learn the initialisation and one inner rate for every parameter.

Li, Zhou, Chen and Li, 2017, Meta-SGD: learning to learn quickly for few-shot learning.
https://arxiv.org/abs/1707.09835
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maml_jax.algorithms.maml import LearnedRates
from maml_jax.inner.gradients import mixed_mode
from maml_jax.inner.learner import gradient_based
from maml_jax.types import ArrayTree, InnerGradFn, LossFn, MetaLearner, Model, check_not_negative, holds_for, select


def meta_sgd(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    inner_lr: float | tuple[float, float],
    num_inner_steps: int = 1,
    where: Callable[[str], bool] | None = None,
    inner_grad: InnerGradFn = mixed_mode,
    num_microbatches: int = 1,
    data_per_step: bool = False,
) -> MetaLearner:
    """Builds Meta-SGD: min_{θ, α} E[L_Q(φ_K)] with φ_0 = θ and φ_{k+1} = φ_k − α ∘ ∇L_S(φ_k).

    The rates α have the shape of the parameters and may change their sign. With equal rates that are not learned it
    is MAML. The paper takes one step and draws the initial rates uniformly from [0.005, 0.1].

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      inner_lr: the initial value of all rates, or (low, high) to draw each rate uniformly between them.
      num_inner_steps: K ≥ 0.
      where: `(name) -> bool`, the parameters that adapt and have rates; by default all.
      inner_grad: how the inner gradient is differentiated. With `first_order` the rates still learn.
      num_microbatches: parts of the support set whose gradients are computed one after another.
      data_per_step: whether each inner step has a support set of its own, leaves [K, S, ...].

    Returns:
      A `MetaLearner` with the meta-parameters {"params": θ, "rates": α}; α is None where a parameter does not adapt.

    Raises:
      ValueError: if `model` is not a `Model`, `inner_lr` not a number of at least 0 nor two in rising order, or a count
        not an integer in its range.

    References:
      Li et al., 2017, equations 2 and 3.
    """
    is_drawn = isinstance(inner_lr, tuple)
    for rate in inner_lr if is_drawn else (inner_lr,):
        check_not_negative("inner_lr", rate)
    if is_drawn and not (len(inner_lr) == 2 and holds_for(inner_lr[1] - inner_lr[0], lambda gap: gap >= 0)):
        raise ValueError(f"inner_lr={inner_lr} must be one rate, or the smallest and the largest one")
    low, high = inner_lr if is_drawn else (inner_lr, inner_lr)

    def init(key, inputs):
        # Not `fold_in(key, 1)`, which is a key that the model may split off too.
        params_key, rates_key = jax.random.split(key) if is_drawn else (key, None)
        params = model.init(params_key, inputs)
        rates = jax.tree.map(lambda x: jnp.full_like(x, low), select(params, where)[0])
        if is_drawn:
            leaves, tree = jax.tree.flatten(rates)
            keys = jax.random.split(rates_key, len(leaves))
            drawn = (jax.random.uniform(k, x.shape, x.dtype, low, high) for k, x in zip(keys, leaves, strict=True))
            rates = tree.unflatten(drawn)
        return {"params": params, "rates": rates}

    return gradient_based(
        model,
        loss_fn,
        query_loss_fn,
        rule=lambda meta_params: scaled_descent(meta_params["rates"]),
        num_inner_steps=num_inner_steps,
        init=init,
        start=lambda meta_params: meta_params["params"],
        where=where,
        inner_grad=inner_grad,
        num_microbatches=num_microbatches,
        data_per_step=data_per_step,
    )


def scaled_descent(rates: ArrayTree) -> optax.GradientTransformation:
    """Gradient descent with a rate for every entry of every parameter: the update is −rates ∘ gradient."""
    return optax.stateless(lambda grads, params: jax.tree.map(lambda g, rate: -rate * g, grads, rates))


@dataclasses.dataclass(frozen=True)
class DrawnRates(LearnedRates):
    """Hyperparameters of an inner loop with a learned rate for every entry of every parameter."""

    inner_lr_max: float | None = None
    """Draw the initial rates uniformly between --inner-lr and this one; the paper does, between 0.005 and 0.1. By
    default all are --inner-lr."""

    def __post_init__(self):
        """Raises ValueError for an interval that is none, and as `InnerDescent` does."""
        super().__post_init__()
        if self.inner_lr_max is not None and not holds_for(self.inner_lr_max - self.inner_lr, lambda gap: gap >= 0):
            raise ValueError(
                f"inner_lr_max={self.inner_lr_max} must be finite and at least inner_lr={self.inner_lr}; give the "
                "smallest rate as inner_lr and the largest as inner_lr_max"
            )

    @property
    def rates(self) -> float | tuple[float, float]:
        """The initial rates, as `meta_sgd` takes them."""
        return self.inner_lr if self.inner_lr_max is None else (self.inner_lr, self.inner_lr_max)
