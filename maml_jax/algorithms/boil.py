"""BOIL: adapt the features, and keep the last layer as it was meta-learned.

Oh, Yoo, Kim and Yun, 2021, BOIL: towards representation change for few-shot learning.
https://arxiv.org/abs/2008.08882
"""

from collections.abc import Callable

import optax

from maml_jax.algorithms.maml import maml
from maml_jax.inner.gradients import mixed_mode
from maml_jax.types import InnerGradFn, LossFn, MetaLearner, Model, check_function


def boil(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    head: Callable[[str], bool],
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    where: Callable[[str], bool] | None = None,
    inner_grad: InnerGradFn = mixed_mode,
    data_per_step: bool = False,
) -> MetaLearner:
    """Builds BOIL ("body only update in inner loop"): MAML whose inner loop changes everything but the head.

    It is the complement of `anil`. If `head` is false for every parameter, it is MAML. In the authors' code scales and
    offsets of normalisations adapt too.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      head: `(name) -> bool`, the parameters that do not adapt, by their path.
      inner_optimizer: any optax transformation.
      num_inner_steps: K ≥ 0.
      where: `(name) -> bool`, the parameters that may adapt at all; by default all.
      inner_grad: how the inner gradient is differentiated.
      data_per_step: whether each inner step has a support set of its own, leaves [K, S, ...].

    Returns:
      A `MetaLearner`, as `maml` does.

    Raises:
      ValueError: as `maml` does, and if `head` is not a function; when it is used, if no parameter is left to adapt.

    References:
      Oh et al., 2021, section 3.
    """
    check_function("head", head, 'lambda name: name.startswith("head")')
    if where is not None:
        check_function("where", where, 'lambda name: not name.startswith("norm")')
    return maml(
        model,
        loss_fn,
        query_loss_fn,
        inner_optimizer=inner_optimizer,
        num_inner_steps=num_inner_steps,
        where=lambda name: not head(name) and (where is None or where(name)),
        inner_grad=inner_grad,
        data_per_step=data_per_step,
    )
