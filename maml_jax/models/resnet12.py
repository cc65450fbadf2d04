"""The residual network of the few-shot literature, twelve convolutions deep.

Oreshkin et al., 2018 (widths doubling from 64), https://arxiv.org/abs/1805.10123; Lee et al., 2019 (widths 64 to 640),
https://arxiv.org/abs/1904.03758.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from maml_jax.models.from_flax import from_linen
from maml_jax.models.layers import Conv, ConvFn, conv_matmul, max_pool
from maml_jax.models.normalisation import BatchStatNorm
from maml_jax.types import Model, check_integer

_FAN_OUT_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_SCALED_NORM = partial(BatchStatNorm, scale=True)
_LEAKY_RELU = partial(nn.leaky_relu, negative_slope=0.1)


class ResNet12(nn.Module):
    """The flax module behind `resnet12`, with the same arguments."""

    way: int | None
    widths: Sequence[int] = (64, 128, 256, 512)
    conv_fn: ConvFn = conv_matmul
    norm: Callable[..., nn.Module] = _SCALED_NORM
    activation: Callable[[jax.Array], jax.Array] = _LEAKY_RELU
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[S, H, W, C] -> [S, N], or [S, widths[-1]] without a head."""
        if min(inputs.shape[1:3]) < 2 ** len(self.widths):
            raise ValueError(
                f"resnet12 halves its images {len(self.widths)} times and needs at least {2 ** len(self.widths)} "
                f"pixels a side, got inputs {inputs.shape}; use larger images or fewer widths"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(Conv, conv_fn=self.conv_fn, kernel_init=_FAN_OUT_NORMAL, **dtypes)
        norm = partial(self.norm, **dtypes)
        hidden = inputs
        for block, width in enumerate(self.widths):
            shortcut = conv(width, kernel_size=(1, 1), name=f"shortcut_{block}")(hidden)
            shortcut = norm(name=f"shortcut_norm_{block}")(shortcut)
            for layer in range(3):
                hidden = conv(width, name=f"conv_{block}_{layer}")(hidden)
                hidden = norm(name=f"norm_{block}_{layer}")(hidden)
                hidden = self.activation(hidden + shortcut if layer == 2 else hidden)
            hidden = max_pool(hidden)
        hidden = hidden.mean((1, 2))
        return hidden if self.way is None else nn.Dense(self.way, param_dtype=self.param_dtype, name="head")(hidden)


def resnet12(
    *,
    way: int | None,
    widths: Sequence[int] = (64, 128, 256, 512),
    conv_fn: ConvFn = conv_matmul,
    norm: Callable[..., nn.Module] = _SCALED_NORM,
    activation: Callable[[jax.Array], jax.Array] = _LEAKY_RELU,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
) -> Model:
    """ResNet-12: residual blocks of three 3x3 convolutions, a mean over positions and a linear layer.

    A block adds its input, through a 1x1 convolution, to the output of its third normalisation, before the
    nonlinearity, and ends with a 2x2 maximum. The dropout of the papers is left out, so the network is a
    deterministic function of its parameters and its batch. Kernels are normal with variance 2 / fan-out.

    Args:
      way: N, the number of outputs. With None there is no linear layer, and the outputs are the means over
        positions [S, widths[-1]].
      widths: filters of each block; (64, 160, 320, 640) for the network of Lee et al.
      conv_fn: how the convolution is computed, `layers.conv_matmul` or `layers.conv_lax`.
      norm: a flax module class or partial with the arguments `dtype`, `param_dtype` and `name`; by default
        `BatchStatNorm` with scale and offset.
      activation: the nonlinearity, by default a leaky ReLU of slope 0.1 below zero.
      dtype: dtype of the blocks, such as `jnp.bfloat16`. With None, inputs and parameters are promoted. The linear
        layer promotes its inputs and its own parameters in either case.
      param_dtype: dtype of the initial parameters.

    Returns:
      A `Model` from inputs [S, H, W, C] to outputs [S, N]. It raises ValueError for images that are too small to
      be halved once in every block.

    Raises:
      ValueError: if `way` or a width is not a positive integer, or there are no widths.
    """
    if way is not None:
        check_integer("way", way, 1)
    if not widths:
        raise ValueError("widths must have at least one block; got none")
    module = ResNet12(
        way=way,
        widths=tuple(check_integer("a width of widths", width, 1) for width in widths),
        conv_fn=conv_fn,
        norm=norm,
        activation=activation,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return from_linen(module)
