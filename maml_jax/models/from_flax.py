"""Turns flax modules into `Model`s, pairs of pure functions."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from maml_jax.types import Model


def from_linen(module: nn.Module) -> Model:
    """Makes a `Model` of a linen module whose only variables are parameters.

    Args:
      module: called as `module(inputs) -> outputs`, with inputs [S, ...].

    Returns:
      A `Model` whose parameters are the module's "params" collection.

    Raises:
      ValueError: from `init`, if the module keeps other variables, such as the running averages of
        `nn.BatchNorm`. They are state that an inner loop would have to carry; use
        `models.BatchStatNorm`, or a normalisation without batch statistics.
    """

    def init(key, inputs):
        variables = dict(module.init(key, inputs))
        params = variables.pop("params", {})
        if variables:
            raise ValueError(
                f"{type(module).__name__} keeps variables beside its parameters: {sorted(variables)}; an inner "
                "loop adapts parameters alone. Use maml_jax.models.BatchStatNorm in place of a normalisation "
                "with running averages"
            )
        return params

    return Model(init, lambda params, inputs: module.apply({"params": params}, inputs))


def from_nnx(module: nnx.Module | Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Makes a `Model` of an nnx module.

    Args:
      module: a function from `nnx.Rngs` to a module, so that `init` can draw fresh parameters; or a
        module, whose present parameters `init` then returns copies of, whatever the key.

    Returns:
      A `Model` whose parameters are the `nnx.State` of the module's `nnx.Param`s.

    Raises:
      ValueError: if the module keeps variables other than `nnx.Param`, as running averages and dropout do.
    """
    is_module = isinstance(module, nnx.Module)
    abstract = module if is_module else nnx.eval_shape(lambda: module(nnx.Rngs(0)))
    graphdef, params, others = nnx.split(abstract, nnx.Param, ...)
    if kinds := sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(others)}):
        raise ValueError(
            f"{type(abstract).__name__} keeps variables beside nnx.Param: {kinds}; an inner loop adapts "
            "parameters alone. Leave out running averages and random streams"
        )

    def init(key, inputs):
        del inputs
        if is_module:
            # A copy, because a training loop donates its state and the module keeps its own arrays.
            return jax.tree.map(jnp.copy, params)
        return nnx.split(module(nnx.Rngs(key)), nnx.Param, ...)[1]

    return Model(init, lambda params, inputs: nnx.merge(graphdef, params)(inputs))
