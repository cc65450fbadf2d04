"""The four-layer convolutional network of the few-shot literature, in its two published geometries.

Vinyals et al., 2016, https://arxiv.org/abs/1606.04080; Finn et al., 2017, section 5.2,
https://arxiv.org/abs/1703.03400.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from maml_jax.models.from_flax import from_linen
from maml_jax.models.layers import BatchStatNorm, Conv, ConvFn, conv_matmul, max_pool
from maml_jax.types import Model


class Conv4(nn.Module):
    """Four blocks of convolution, normalisation and ReLU, then a linear layer; see `conv4`."""

    way: int
    features: int
    pooling: bool
    conv_fn: ConvFn
    norm: Callable[..., nn.Module]
    head_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[S, H, W, C] -> [S, N]."""
        strides = (1, 1) if self.pooling else (2, 2)
        hidden = inputs
        for index in range(4):
            hidden = Conv(self.features, strides=strides, conv_fn=self.conv_fn, name=f"conv_{index}")(hidden)
            hidden = nn.relu(self.norm(name=f"norm_{index}")(hidden))
            if self.pooling:
                hidden = max_pool(hidden)
        hidden = hidden.reshape(hidden.shape[0], -1) if self.pooling else hidden.mean((1, 2))
        return nn.Dense(self.way, kernel_init=self.head_init, name="head")(hidden)


def conv4(
    *,
    way: int,
    features: int = 64,
    pooling: bool = False,
    conv_fn: ConvFn = conv_matmul,
    norm: Callable[..., nn.Module] = BatchStatNorm,
    head_init: nn.initializers.Initializer | None = None,
) -> Model:
    """Four 3x3 convolutions, each normalised and rectified, and a linear layer.

    Without `pooling` this is the Omniglot geometry: stride 2, and the mean over the 2x2 positions that
    are left of 28x28. With it, the geometry for larger images: stride 1, a 2x2 maximum after each block,
    and all positions flattened. Kernels are Xavier uniform and biases zero.

    Args:
      way: N, the number of outputs.
      features: filters of each convolution; 64 for Omniglot, 32 for miniImageNet in the MAML paper.
      pooling: the geometry.
      conv_fn: how the convolution is computed, `layers.conv_matmul` or `layers.conv_lax`.
      norm: a flax module class or partial; by default batch statistics with an offset and no scale.
      head_init: initialiser of the linear layer [D, N]; by default N(0, 1) without `pooling` and Xavier
        uniform with it, as in the authors' code.

    Returns:
      A `Model` from inputs [S, H, W, C] to outputs [S, N].

    Raises:
      ValueError: if `way` or `features` is not positive.
    """
    if way < 1 or features < 1:
        raise ValueError(f"conv4 needs at least one output and one filter, got way={way} and features={features}")
    if head_init is None:
        head_init = nn.initializers.xavier_uniform() if pooling else nn.initializers.normal(1.0)
    return from_linen(Conv4(way, features, pooling, conv_fn, norm, head_init))
