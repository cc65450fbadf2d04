"""Fully connected networks."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from maml_jax.models.from_flax import from_linen
from maml_jax.models.normalisation import BatchStatNorm
from maml_jax.types import Model, check_integer

_LECUN_NORMAL = nn.initializers.lecun_normal()


class MLP(nn.Module):
    """The flax module behind `mlp`, with the same arguments."""

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    kernel_init: nn.initializers.Initializer = _LECUN_NORMAL
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    norm: Callable[..., nn.Module] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[S, ...] -> [S, features[-1]]."""
        hidden = inputs.reshape(len(inputs), math.prod(inputs.shape[1:]))
        for index, width in enumerate(self.features):
            is_last = index + 1 == len(self.features)
            hidden = nn.Dense(
                width,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                dtype=None if is_last else self.dtype,
                param_dtype=self.param_dtype,
                name=f"dense_{index}",
            )(hidden)
            if not is_last:
                if self.norm is not None:
                    norm = self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name=f"norm_{index}")
                    hidden = norm(hidden)
                hidden = self.activation(hidden)
        return hidden


def mlp(
    *,
    features: Sequence[int],
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
    kernel_init: nn.initializers.Initializer = _LECUN_NORMAL,
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
    norm: Callable[..., nn.Module] | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
) -> Model:
    """A multilayer perceptron on flattened inputs.

    Args:
      features: widths of the layers. The last one is the number of outputs: (40, 40, 1) for the sinusoids of the
        MAML paper.
      activation: applied after every layer but the last.
      kernel_init: initialiser of each kernel [D, width].
      bias_init: initialiser of each bias [width].
      norm: a flax module class or partial with the arguments `dtype`, `param_dtype` and `name`, applied before
        every activation; None for no normalisation.
      dtype: dtype of all layers but the last, such as `jnp.bfloat16`. With None, inputs and parameters are
        promoted, as they always are in the last layer.
      param_dtype: dtype of the initial parameters.

    Returns:
      A `Model` from inputs [S, ...] to outputs [S, features[-1]].

    Raises:
      ValueError: if `features` is no sequence of at least one width, or one is not a positive integer.
    """
    if not isinstance(features, Sequence) or not features:
        raise ValueError(f"features must be a sequence of widths such as (40, 40, 1), got {features!r}")
    module = MLP(
        features=tuple(check_integer("a width of features", width, 1) for width in features),
        activation=activation,
        kernel_init=kernel_init,
        bias_init=bias_init,
        norm=norm,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return from_linen(module)


def omniglot_mlp(*, way: int, norm: Callable[..., nn.Module] = BatchStatNorm) -> Model:
    """The fully connected Omniglot network: widths 256, 128, 64 and 64, each normalised, then a linear layer.

    Args:
      way: N, the number of outputs.
      norm: a flax module class or partial, as in `mlp`; by default with an offset and no scale.

    Returns:
      A `Model` from inputs [S, 28, 28, 1] to outputs [S, N].

    Raises:
      ValueError: if `way` is not a positive integer.

    References:
      Finn et al., 2017, section 5.2, "no conv"; the weights are truncated normal with scale 0.01, as in the
      authors' code. https://arxiv.org/abs/1703.03400
    """
    return mlp(
        features=(256, 128, 64, 64, check_integer("way", way, 1)),
        kernel_init=nn.initializers.truncated_normal(0.01),
        norm=norm,
    )
