"""Policies: models whose outputs are distributions over actions."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maml_jax.rl.distributions import Categorical, Normal
from maml_jax.types import (
    ArrayTree,
    Model,
    check_integer,
    check_model,
    check_not_negative,
    check_positive,
    combine,
    select,
)


def categorical_policy(model: Model, *, observation_ndim: int = 1) -> Model:
    """A policy over A actions from a model with A outputs, which are the logits.

    Args:
      model: the network, from observations [S, ...] to [S, A].
      observation_ndim: the number of axes of one observation. All axes before them are batch axes.

    Returns:
      A `Model` from observations [..., *observation] to a `Categorical` with logits [..., A].

    Raises:
      ValueError: if `model` is not a `Model`, or `observation_ndim` a negative number.
    """
    model = _on_any_batch(model, observation_ndim)
    return model._replace(apply=lambda params, inputs, **key: Categorical(model.apply(params, inputs, **key)))


def normal_policy(
    model: Model, *, action_size: int, std: float = 1.0, smallest_std: float = 1e-6, observation_ndim: int = 1
) -> Model:
    """A policy over A numbers from a model with A outputs, which are the means.

    The logarithms of the standard deviations are parameters of their own, which do not depend on the observation.

    Args:
      model: the network of the means, from observations [S, ...] to [S, A].
      action_size: A.
      std: the standard deviations at the start.
      smallest_std: they do not fall below it.
      observation_ndim: the number of axes of one observation. All axes before them are batch axes.

    Returns:
      A `Model` from observations [..., *observation] to a `Normal` [..., A]. Its parameters are {"network": those of
      the model, "log_std": [A]}.

    Raises:
      ValueError: if `model` is not a `Model`, a count is wrong, a standard deviation not positive, or `std` below
        `smallest_std`.
    """
    model = _on_any_batch(model, observation_ndim)
    action_size = check_integer("action_size", action_size, at_least=1)
    check_positive("std", std)
    check_positive("smallest_std", smallest_std)
    if std < smallest_std:
        raise ValueError(f"std={std} is below smallest_std={smallest_std} and is not learned; choose a larger std")

    def init(key, inputs):
        return {"network": model.init(key, inputs), "log_std": jnp.log(jnp.full(action_size, std, jnp.float32))}

    def apply(params, inputs, **key):
        mean = model.apply(params["network"], inputs, **key)
        if mean.shape[-1] != action_size:
            raise ValueError(f"the network has {mean.shape[-1]} outputs; action_size={action_size} needs as many")
        log_std = jnp.maximum(params["log_std"], jnp.log(smallest_std))
        return Normal(mean, jnp.broadcast_to(log_std, mean.shape))

    return Model(init, apply, model.stochastic)


def _on_any_batch(model: Model, observation_ndim: int) -> Model:
    """The model on inputs with any number of batch axes."""
    check_model(model)
    observation_ndim = check_integer("observation_ndim", observation_ndim, at_least=0)

    def flat(inputs):
        def flatten(x):
            batch, observation = x.shape[: x.ndim - observation_ndim], x.shape[x.ndim - observation_ndim :]
            return x.reshape(math.prod(batch), *observation)

        return jax.tree.map(flatten, inputs)

    def apply(params, inputs, **key):
        leaf = jax.tree.leaves(inputs)[0]
        outputs = model.apply(params, flat(inputs), **key)
        return outputs.reshape(*leaf.shape[: leaf.ndim - observation_ndim], *outputs.shape[1:])

    return Model(lambda key, inputs: model.init(key, flat(inputs)), apply, model.stochastic)


def scaled_start(model: Model, where: Callable[[str], bool], factor: float) -> Model:
    """The model with some of its initial parameters multiplied by a factor.

    A policy whose last layer starts small begins near the distribution that does not depend on the observation. It is
    less likely to run away.

    Args:
      model: the network.
      where: `(name) -> bool`, the parameters to multiply, by their path such as "dense_2/kernel".
      factor: by what, a number of at least 0.

    Returns:
      A `Model` whose `apply` is that of `model`.

    Raises:
      ValueError: if `model` is not a `Model`, or `factor` negative or not finite; from `init`, if `where` is false for
        all parameters.
    """
    check_model(model)
    check_not_negative("factor", factor)

    def init(key, inputs) -> ArrayTree:
        chosen, others = select(model.init(key, inputs), where)
        return combine(jax.tree.map(lambda x: factor * x, chosen), others)

    return model._replace(init=init)
