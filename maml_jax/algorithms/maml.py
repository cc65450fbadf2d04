"""MAML: learn an initialisation from which a few gradient steps solve a new task.

The meta-gradient differentiates the query loss through the inner loop, Hessians included. FOMAML is
the same learner whose inner gradients are constants.

Finn, Abbeel and Levine, 2017, Model-agnostic meta-learning for fast adaptation of deep networks.
https://arxiv.org/abs/1703.03400
"""

import dataclasses
from collections.abc import Callable

import optax

from maml_jax.inner.gradients import first_order, mixed_mode
from maml_jax.inner.learner import gradient_based
from maml_jax.types import InnerGradFn, LossFn, MetaLearner, Model, check_integer, check_optimizer, check_positive


def maml(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    where: Callable[[str], bool] | None = None,
    inner_grad: InnerGradFn = mixed_mode,
    num_microbatches: int = 1,
    data_per_step: bool = False,
) -> MetaLearner:
    """Builds MAML: min_θ E[L_Q(φ_K)] with φ_0 = θ and φ_{k+1} = φ_k + rule(∇L_S(φ_k)).

    With plain gradient descent of rate α the meta-gradient is Π_k (I − α ∇²L_S(φ_k)) ∇L_Q(φ_K).

    The authors' code differs in classification. Its loss is a sum over the N classes, so its rate α is N α for a mean
    loss, and the offsets of its normalisations do not adapt, as with `where=lambda name: "norm" not in name`.

    Args:
      model: the network; its parameters are the meta-parameters θ. A stochastic model draws from the key of
        the episode, see `inner.gradient_based`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      inner_optimizer: any optax transformation, for example `optax.sgd(0.4)`; `inner.inner_loop` lists the ones that
        need an `eps_root`.
      num_inner_steps: K ≥ 0. With K = 0 the objective is the query loss at θ.
      where: `(name) -> bool`, the parameters that adapt, by their path such as "norm_0/offset"; by default all.
      inner_grad: how the inner gradient is differentiated: `mixed_mode` (exact; stores one copy of the adapting
        parameters for each step and no activations), `checkpointed` or `jax.value_and_grad` (exact, reverse over
        reverse), or `first_order`.
      num_microbatches: parts of the support set whose gradients are computed one after another.
      data_per_step: whether each inner step has a support set of its own, leaves [K, S, ...].

    Returns:
      A `MetaLearner`. `adapt` gives φ_K and an `InnerInfo`.

    Raises:
      ValueError: if `inner_optimizer` is not an optax transformation, `model` not a `Model`, or a count not an integer
        in its range. `adapt` raises it for an empty support set, and the objective for an empty query set.

    References:
      Finn et al., 2017, Algorithm 2. https://arxiv.org/abs/1703.03400
    """
    check_optimizer("inner_optimizer", inner_optimizer)
    return gradient_based(
        model,
        loss_fn,
        query_loss_fn,
        rule=lambda meta_params: inner_optimizer,
        num_inner_steps=num_inner_steps,
        where=where,
        inner_grad=inner_grad,
        num_microbatches=num_microbatches,
        data_per_step=data_per_step,
    )


def fomaml(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    where: Callable[[str], bool] | None = None,
    num_microbatches: int = 1,
    data_per_step: bool = False,
) -> MetaLearner:
    """Builds first-order MAML: the meta-gradient is ∇L_Q at φ_K, without second derivatives.

    It is `maml` with `inner_grad=first_order`, and the arguments, what is returned and what is raised are those of
    `maml`. If the inner optimiser uses more than the gradient, as weight decay does, its derivatives with respect to
    that remain.

    References:
      Finn et al., 2017, section 5.2. https://arxiv.org/abs/1703.03400
    """
    return maml(
        model,
        loss_fn,
        query_loss_fn,
        inner_optimizer=inner_optimizer,
        num_inner_steps=num_inner_steps,
        where=where,
        inner_grad=first_order,
        num_microbatches=num_microbatches,
        data_per_step=data_per_step,
    )


@dataclasses.dataclass(frozen=True)
class InnerDescent:
    """Hyperparameters of an inner loop of gradient descent."""

    inner_lr: float = 0.01
    """Rate of the inner gradient descent, for a loss that is a mean over the batch."""
    num_inner_steps: int | None = 1
    """Inner gradient steps in training; None for the published number, if it depends on the task."""

    def __post_init__(self):
        """Raises ValueError for a rate that is not positive and finite, or a negative number of steps."""
        check_positive("inner_lr", self.inner_lr)
        if self.num_inner_steps is not None:
            check_integer("num_inner_steps", self.num_inner_steps, at_least=0)

    def rule(self) -> optax.GradientTransformation:
        """Gradient descent."""
        return optax.sgd(self.inner_lr)


@dataclasses.dataclass(frozen=True)
class LearnedRates(InnerDescent):
    """Hyperparameters of an inner loop whose rates are learned."""

    inner_lr: float = 0.01
    """Initial value of every learned inner rate, for a loss that is a mean over the batch."""
