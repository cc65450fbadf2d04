"""CAVIA: adapt a few context parameters that the network takes as further inputs, and not the network.

Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson, 2019, Fast context adaptation via meta-learning.
https://arxiv.org/abs/1810.03642
"""

import dataclasses

import jax.numpy as jnp
import optax

from maml_jax.algorithms.maml import InnerDescent
from maml_jax.inner.gradients import mixed_mode
from maml_jax.inner.learner import gradient_based
from maml_jax.types import InnerGradFn, LossFn, MetaLearner, Model, check_integer, check_model, check_optimizer


def cavia(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    num_context: int,
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    inner_grad: InnerGradFn = mixed_mode,
) -> MetaLearner:
    """Builds CAVIA: min_θ E[L_Q(θ, c_K)] with a context c_0 = 0 and c_{k+1} = c_k + rule(∇_c L_S(θ, c_k)).

    Args:
      model: a network whose inputs are a pair: inputs [S, ...] and the context [C], one for all examples.
        `with_context` makes one of a network on vectors, and `models.conv4(context_block=2)` is one on images.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      num_context: C, the number of context parameters.
      inner_optimizer: any optax transformation. The paper takes a rate of 1 for sinusoids.
      num_inner_steps: K ≥ 0.
      inner_grad: how the inner gradient is differentiated.

    Returns:
      A `MetaLearner`. The meta-parameters are those of the network; `adapt` gives
      {"params": θ, "context": c_K [C]} and an `InnerInfo`.

    Raises:
      ValueError: if `inner_optimizer` is not an optax transformation, `model` not a `Model`, or a count not an integer
        in its range. `init` raises it if the network does not take a pair.

    References:
      Zintgraf et al., 2019, equations 4 and 5.
    """
    check_model(model)
    check_optimizer("inner_optimizer", inner_optimizer)
    num_context = check_integer("num_context", num_context, at_least=1)

    def init(key, inputs):
        try:
            return model.init(key, (inputs, jnp.zeros(num_context)))
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"the network fails on a pair of inputs and a context: {error}. Make one that takes a pair, with "
                "with_context(model) for vectors or models.conv4(context_block=2) for images"
            ) from error

    def apply(params, inputs, **keywords):
        return model.apply(params["params"], (inputs, params["context"]), **keywords)

    return gradient_based(
        Model(init, apply, model.stochastic),
        loss_fn,
        query_loss_fn,
        rule=lambda meta_params: inner_optimizer,
        num_inner_steps=num_inner_steps,
        start=lambda meta_params: {"params": meta_params, "context": jnp.zeros(num_context)},
        where=lambda name: name == "context",
        inner_grad=inner_grad,
    )


def with_context(model: Model) -> Model:
    """Makes a network whose inputs are pairs `(x [S, ..., D], context [C])`, concatenated to [S, ..., D + C].

    It is for vectors in front of a layer without normalisation. A context that is the same for all examples adds a
    constant to each unit or filter, and a normalisation by the statistics of a batch takes that out again. For images
    the paper modulates features after a normalisation: see `context_block` of `models.conv4`.

    Args:
      model: the network on [S, ..., D + C].

    Returns:
      A `Model`.

    Raises:
      ValueError: if `model` is not a `Model`.
    """
    check_model(model)

    def joined(pair):
        inputs, context = pair
        if not jnp.issubdtype(inputs.dtype, jnp.floating):
            inputs = inputs.astype(context.dtype)  # a context of integers would have no gradient
        context = jnp.broadcast_to(context.astype(inputs.dtype), (*inputs.shape[:-1], context.size))
        return jnp.concatenate([inputs, context], axis=-1)

    return Model(
        lambda key, pair: model.init(key, joined(pair)),
        lambda params, pair, **keywords: model.apply(params, joined(pair), **keywords),
        model.stochastic,
    )


@dataclasses.dataclass(frozen=True)
class ContextDescent(InnerDescent):
    """Hyperparameters of an inner loop over context parameters."""

    num_context: int = 5
    """Number of context parameters."""

    def __post_init__(self):
        """Raises ValueError for a wrong rate or count."""
        super().__post_init__()
        check_integer("num_context", self.num_context, at_least=1)
