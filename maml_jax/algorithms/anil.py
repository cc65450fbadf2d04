"""ANIL: adapt the last layer, and meta-learn the features that it sees.

Raghu, Raghu, Bengio and Vinyals, 2020, Rapid learning or feature reuse? Towards understanding the effectiveness of
MAML. https://arxiv.org/abs/1909.09157
"""

from collections.abc import Callable

import optax

from maml_jax.algorithms.maml import maml
from maml_jax.inner.gradients import mixed_mode
from maml_jax.types import InnerGradFn, LossFn, MetaLearner, Model, check_function


def anil(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    head: Callable[[str], bool],
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    inner_grad: InnerGradFn = mixed_mode,
    data_per_step: bool = False,
) -> MetaLearner:
    """Builds ANIL ("almost no inner loop"): MAML whose inner loop changes the head only.

    The meta-gradient is still that of all parameters. If `head` is true for every parameter, it is MAML.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      head: `(name) -> bool`, the parameters that adapt, by their path, such as
        `lambda name: name.startswith("head")` for `models.conv4`.
      inner_optimizer: any optax transformation.
      num_inner_steps: K ≥ 0.
      inner_grad: how the inner gradient is differentiated.
      data_per_step: whether each inner step has a support set of its own, leaves [K, S, ...].

    Returns:
      A `MetaLearner`, as `maml` does.

    Raises:
      ValueError: as `maml` does, and if `head` is not a function; when it is used, if `head` selects no parameter.

    References:
      Raghu et al., 2020, section 4.
    """
    check_function("head", head, 'lambda name: name.startswith("head")')
    return maml(
        model,
        loss_fn,
        query_loss_fn,
        inner_optimizer=inner_optimizer,
        num_inner_steps=num_inner_steps,
        where=head,
        inner_grad=inner_grad,
        data_per_step=data_per_step,
    )
