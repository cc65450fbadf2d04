"""MAML: learn an initialisation from which a few gradient steps solve a new task.

The meta-gradient differentiates the query loss through the inner loop, Hessians included. FOMAML is
the same learner whose inner gradients are constants.

Finn, Abbeel and Levine, 2017, Model-agnostic meta-learning for fast adaptation of deep networks.
https://arxiv.org/abs/1703.03400
"""

import optax

from maml_jax.inner.gradients import first_order, mixed_mode
from maml_jax.inner.loop import check_num_steps, inner_loop
from maml_jax.types import InnerGradFn, LossFn, MetaLearner, Model


def maml(
    model: Model,
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    inner_grad: InnerGradFn = mixed_mode,
) -> MetaLearner:
    """Builds MAML: min_θ E[L_Q(φ_K)] with φ_0 = θ and φ_{k+1} = φ_k + rule(∇L_S(φ_k)).

    With plain gradient descent of rate α the meta-gradient is Π_k (I − α ∇²L_S(φ_k)) ∇L_Q(φ_K).

    Args:
      model: the network; its parameters are the meta-parameters θ.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for support and query alike.
      inner_optimizer: any optax transformation, for example `optax.sgd(0.4)`.
      num_inner_steps: K ≥ 0. With K = 0 the objective is the query loss at θ.
      inner_grad: how the inner gradient is differentiated: `mixed_mode` (exact, flat memory),
        `jax.value_and_grad` (exact, reverse over reverse) or `first_order`.

    Returns:
      A `MetaLearner`. `adapt` gives φ_K and an `InnerInfo`; keys are not needed and ignored.

    Raises:
      ValueError: if `num_inner_steps` is negative.

    References:
      Finn et al., 2017, Algorithm 2. https://arxiv.org/abs/1703.03400
    """
    check_num_steps(num_inner_steps)

    def batch_loss(params, batch):
        return loss_fn(model.apply(params, batch.inputs), batch.targets)

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        del key
        return inner_loop(
            batch_loss,
            inner_optimizer,
            meta_params,
            support,
            num_steps=num_inner_steps,
            inner_grad=inner_grad,
            observe_fn=observe_fn,
        )

    def objective(meta_params, episode):
        task_params, info = adapt(meta_params, episode.support)
        return batch_loss(task_params, episode.query), info

    return MetaLearner(model.init, adapt, model.apply, objective)


def fomaml(
    model: Model, loss_fn: LossFn, *, inner_optimizer: optax.GradientTransformation, num_inner_steps: int
) -> MetaLearner:
    """Builds first-order MAML: the meta-gradient is ∇L_Q at φ_K, second derivatives left out.

    It is `maml` with `inner_grad=first_order`; see there for the arguments.

    References:
      Finn et al., 2017, section 5.2. https://arxiv.org/abs/1703.03400
    """
    return maml(
        model,
        loss_fn,
        inner_optimizer=inner_optimizer,
        num_inner_steps=num_inner_steps,
        inner_grad=first_order,
    )
