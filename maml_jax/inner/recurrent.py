"""A long short-term memory as two pure functions, for the learners that read a support set as a sequence.

Hochreiter and Schmidhuber, 1997; with the forget gate of Gers et al., 2000.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.types import ArrayTree, PRNGKey


class LSTMState(NamedTuple):
    """The state between two steps.

    Attributes:
      hidden: [..., H], the output of the step.
      cell: [..., H].
    """

    hidden: jax.Array
    cell: jax.Array


def init_lstm(key: PRNGKey, num_inputs: int, num_units: int, dtype: Any = None) -> ArrayTree:
    """The parameters of an LSTM.

    Args:
      key: the randomness.
      num_inputs: I, the size of an input.
      num_units: H, the size of the hidden state.
      dtype: of the parameters, which is that of the inputs; by default that of JAX.

    Returns:
      "kernel" [I + H, 4H], Glorot uniform, and "bias" [4H], the gates in the order input, forget, cell, output. The
      bias of the forget gate starts at one, the others at zero.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    kernel = jax.nn.initializers.glorot_uniform()(key, (num_inputs + num_units, 4 * num_units), dtype)
    bias = jnp.zeros((4, num_units), dtype).at[1].set(1.0).reshape(-1)
    return {"kernel": kernel, "bias": bias}


def split_inputs(params: ArrayTree, inputs: jax.Array) -> tuple[ArrayTree, jax.Array]:
    """Multiplies inputs that are known before a scan by their part of the kernel, all steps in one product.

    Args:
      params: from `init_lstm`.
      inputs: [..., J], the first J of the I inputs of each step.

    Returns:
      The parameters for the I - J other inputs, and what these inputs add to the gates, [..., 4H].
    """
    size = inputs.shape[-1]
    return params | {"kernel": params["kernel"][size:]}, inputs @ params["kernel"][:size]


def lstm_step(
    params: ArrayTree, state: LSTMState, inputs: jax.Array | None, added: jax.Array | None = None
) -> LSTMState:
    """One step: c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c').

    Args:
      params: from `init_lstm`, or from `split_inputs`.
      state: [..., H] each.
      inputs: [..., I]; None if `split_inputs` has taken all of them.
      added: what the inputs that `split_inputs` has taken add to the gates, [..., 4H].
    """
    joined = state.hidden if inputs is None else jnp.concatenate([inputs, state.hidden], -1)
    gates = joined @ params["kernel"]
    gates = gates + params["bias"].reshape((1,) * (gates.ndim - 1) + (-1,))
    gates = gates if added is None else gates + added
    write, forget, new, output = jnp.split(gates, 4, -1)
    cell = jax.nn.sigmoid(forget) * state.cell + jax.nn.sigmoid(write) * jnp.tanh(new)
    return LSTMState(jax.nn.sigmoid(output) * jnp.tanh(cell), cell)
