"""Recurrent networks: a state that is carried from one input to the next."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maml_jax.types import ArrayTree, PRNGKey, check_integer


class RecurrentModel(NamedTuple):
    """A network with a state.

    Attributes:
      init: `(key, inputs [..., D]) -> params`.
      start: `() -> carry`, the state before the first input.
      step: `(params, carry, inputs [D]) -> (carry, outputs)`.
    """

    init: Callable[[PRNGKey, jax.Array], ArrayTree]
    start: Callable[[], ArrayTree]
    step: Callable[[ArrayTree, ArrayTree, jax.Array], tuple[ArrayTree, ArrayTree]]


class _GRU(nn.Module):
    hidden_size: int
    heads: tuple[tuple[str, int], ...]

    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        carry, hidden = nn.GRUCell(self.hidden_size, name="gru")(carry, inputs)
        # Small last layers: the outputs start near 0.
        small = nn.initializers.orthogonal(0.01)
        return carry, {name: nn.Dense(width, kernel_init=small, name=name)(hidden) for name, width in self.heads}


def gru(*, hidden_size: int, heads: Mapping[str, int], memory: int | None = None) -> RecurrentModel:
    """A gated recurrent unit with linear layers on its state.

    Args:
      hidden_size: the number of units.
      heads: the width of each linear layer, by its name.
      memory: T, how long the units remember at the start. The bias of an update gate is log u with u ~ U[1, T-1], so
        without inputs the state of a unit decays over 1 + u steps, which are between 2 and T. None for biases of 0.

    Returns:
      A `RecurrentModel` whose outputs are a dictionary of arrays [width]. They start near 0.

    Raises:
      ValueError: if a number is not a positive integer, or `memory` below 2.

    References:
      Cho et al., 2014, section 2.3. https://arxiv.org/abs/1406.1078
      Tallec and Ollivier, 2018, the biases of `memory` (chrono initialisation). https://arxiv.org/abs/1804.11188
    """
    memory = None if memory is None else check_integer("memory", memory, at_least=2)
    hidden_size = check_integer("hidden_size", hidden_size, at_least=1)
    module = _GRU(hidden_size, tuple((name, check_integer(name, width, at_least=1)) for name, width in heads.items()))

    def start() -> jax.Array:
        return jnp.zeros(hidden_size)

    def init(key: PRNGKey, inputs: jax.Array) -> ArrayTree:
        params = module.init(key, start(), inputs.reshape(-1, inputs.shape[-1])[0])["params"]
        if memory is not None:
            u = jax.random.uniform(jax.random.fold_in(key, 1), (hidden_size,), minval=1.0, maxval=memory - 1.0)
            params["gru"]["iz"]["bias"] = jnp.log(u)
        return params

    def step(params: ArrayTree, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return module.apply({"params": params}, carry, inputs)

    return RecurrentModel(init, start, step)
