"""Reptile: move the initialisation towards the parameters that each task ends at.

No derivative passes through the inner loop. The update is the gradient of a squared distance, so that Reptile
trains with `jax.grad` like every other algorithm.

Nichol, Achiam and Schulman, 2018, On first-order meta-learning algorithms.
https://arxiv.org/abs/1803.02999
"""

import jax
import optax

from maml_jax.algorithms.maml import fomaml
from maml_jax.types import LossFn, MetaLearner, Model


def reptile(
    model: Model, loss_fn: LossFn, *, inner_optimizer: optax.GradientTransformation, num_inner_steps: int
) -> MetaLearner:
    """Builds Reptile: the objective ½‖θ − stop_gradient(φ_K)‖², whose gradient is θ − φ_K.

    With `optax.sgd(ε)` as outer optimiser the meta-step is θ ← θ + ε (mean φ_K − θ), the batched
    version of the paper. Only the support set is used; with K = 1 and gradient descent the
    meta-gradient is α∇L_S(θ), and with K = 0 it is zero.

    Args:
      model: the network; its parameters are the meta-parameters θ.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch.
      inner_optimizer: any optax transformation.
      num_inner_steps: K ≥ 0. With K = 1 Reptile is training on all tasks at once.

    Returns:
      A `MetaLearner`. The value of `objective` is a squared distance, not a loss.

    Raises:
      ValueError: if `inner_optimizer` is no optax transformation, `model` no `Model`, or a count no integer in its
        range.

    References:
      Nichol et al., 2018, Algorithm 2 and section 4. https://arxiv.org/abs/1803.02999
    """
    base = fomaml(model, loss_fn, inner_optimizer=inner_optimizer, num_inner_steps=num_inner_steps)

    def objective(meta_params, episode):
        start = jax.lax.stop_gradient(meta_params)
        task_params, info = base.adapt(start, episode.support, key=episode.key)
        gap = optax.tree.sub(meta_params, task_params)
        return 0.5 * optax.tree.norm(gap, squared=True), info

    return base._replace(objective=objective)
