"""Pretraining on all tasks at once: the baseline whose training ignores that it will be adapted.

The objective is Σ_n l_n(θ) where MAML's is Σ_n l_n(φ_n). At test time both fine-tune by gradient descent. Targets
must mean the same in every episode, as in regression or with global labels. If every episode shuffles its
labels, no single θ is better than chance.

Finn et al., 2017, section 5.1 and appendix C. https://arxiv.org/abs/1703.03400
"""

from collections.abc import Callable

import optax

from maml_jax.algorithms.maml import fomaml
from maml_jax.types import LossFn, MetaLearner, Model, all_examples


def pretrained(
    model: Model,
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    where: Callable[[str], bool] | None = None,
) -> MetaLearner:
    """Builds the pretraining baseline: min_θ E[L_{S ∪ Q}(θ)], adapted only at test time.

    Support and query examples are training examples alike. The query set may be empty, as in batches over all
    training classes.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch.
      inner_optimizer: the fine-tuning rule at test time; the training objective does not depend on it.
      num_inner_steps: K ≥ 0 fine-tuning steps in `adapt`.
      where: `(name) -> bool`, the parameters that are fine-tuned; by default all.

    Returns:
      A `MetaLearner`; in training the `support_loss` of its `info` is empty, [0].

    Raises:
      ValueError: if `inner_optimizer` is not an optax transformation, `model` not a `Model`, or a count not an integer
        in its range.

    References:
      Finn et al., 2017, section 5.1 and appendix C.
    """
    fine_tuned = fomaml(model, loss_fn, inner_optimizer=inner_optimizer, num_inner_steps=num_inner_steps, where=where)
    plain = fomaml(model, loss_fn, inner_optimizer=inner_optimizer, num_inner_steps=0)

    def objective(meta_params, episode):
        both = all_examples(episode)
        return plain.objective(meta_params, episode._replace(query=both))

    return fine_tuned._replace(objective=objective)
