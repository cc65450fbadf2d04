"""The residual network of the few-shot literature, twelve convolutions deep.

Oreshkin et al., 2018 (widths doubling from 64), https://arxiv.org/abs/1805.10123; Lee et al., 2019 (widths 64 to 640),
https://arxiv.org/abs/1904.03758.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax

from maml_jax.models.from_flax import from_linen
from maml_jax.models.layers import BatchStatNorm, Conv, ConvFn, conv_matmul, max_pool
from maml_jax.types import Model

_FAN_OUT_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_SCALED_NORM = partial(BatchStatNorm, scale=True)
_LEAKY_RELU = partial(nn.leaky_relu, negative_slope=0.1)


class ResNet12(nn.Module):
    """Residual blocks and a linear layer; see `resnet12`."""

    way: int
    widths: Sequence[int]
    conv_fn: ConvFn
    norm: Callable[..., nn.Module]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[S, H, W, C] -> [S, N]."""
        if min(inputs.shape[1:3]) < 2 ** len(self.widths):
            raise ValueError(
                f"resnet12 halves its images {len(self.widths)} times and needs at least {2 ** len(self.widths)} "
                f"pixels a side, got inputs {inputs.shape}; use larger images or fewer widths"
            )
        conv = partial(Conv, conv_fn=self.conv_fn, kernel_init=_FAN_OUT_NORMAL)
        hidden = inputs
        for block, width in enumerate(self.widths):
            shortcut = conv(width, kernel_size=(1, 1), name=f"shortcut_{block}")(hidden)
            shortcut = self.norm(name=f"shortcut_norm_{block}")(shortcut)
            for layer in range(3):
                hidden = conv(width, name=f"conv_{block}_{layer}")(hidden)
                hidden = self.norm(name=f"norm_{block}_{layer}")(hidden)
                hidden = self.activation(hidden + shortcut if layer == 2 else hidden)
            hidden = max_pool(hidden)
        return nn.Dense(self.way, name="head")(hidden.mean((1, 2)))


def resnet12(
    *,
    way: int,
    widths: Sequence[int] = (64, 128, 256, 512),
    conv_fn: ConvFn = conv_matmul,
    norm: Callable[..., nn.Module] = _SCALED_NORM,
    activation: Callable[[jax.Array], jax.Array] = _LEAKY_RELU,
) -> Model:
    """ResNet-12: residual blocks of three 3x3 convolutions, a mean over positions and a linear layer.

    A block adds its input, through a 1x1 convolution, to the output of its third normalisation, before the
    nonlinearity, and ends with a 2x2 maximum. The dropout of the papers is left out: the network is a
    deterministic function of its parameters and its batch. Kernels are normal with variance 2 / fan-out.

    Args:
      way: N, the number of outputs.
      widths: filters of each block; (64, 160, 320, 640) for the network of Lee et al.
      conv_fn: how the convolution is computed, `layers.conv_matmul` or `layers.conv_lax`.
      norm: a flax module class or partial; by default batch statistics with scale and offset.
      activation: the nonlinearity, by default a rectifier of slope 0.1 below zero.

    Returns:
      A `Model` from inputs [S, H, W, C] to outputs [S, N]. It raises ValueError for images that cannot be
      halved once a block.

    Raises:
      ValueError: if `way` or a width is not positive, or there are no widths.
    """
    if way < 1 or not widths or min(widths) < 1:
        raise ValueError(f"resnet12 needs at least one output, block and filter, got way={way} and widths={widths}")
    return from_linen(ResNet12(way, tuple(widths), conv_fn, norm, activation))
