"""The four-layer convolutional network of the few-shot literature, in its two published geometries.

Vinyals et al., 2016, https://arxiv.org/abs/1606.04080; Finn et al., 2017, section 5.2,
https://arxiv.org/abs/1703.03400.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from maml_jax.models.from_flax import from_linen
from maml_jax.models.layers import Conv, ConvFn, conv_matmul, max_pool
from maml_jax.models.normalisation import BatchStatNorm
from maml_jax.types import Model, check_integer


class Conv4(nn.Module):
    """The flax module behind `conv4`, with the same arguments."""

    way: int | None
    features: int = 64
    pooling: bool = False
    flatten: bool | None = None
    conv_fn: ConvFn = conv_matmul
    norm: Callable[..., nn.Module] = BatchStatNorm
    head_init: nn.initializers.Initializer | None = None
    context_block: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array | tuple[jax.Array, jax.Array]) -> jax.Array:
        """[S, H, W, C] -> [S, N], or [S, D] without a head; with a context, ([S, H, W, C], [C']) -> the same."""
        inputs, context = (inputs, None) if self.context_block is None else inputs
        if self.pooling and min(inputs.shape[1:3]) < 16:
            raise ValueError(
                f"conv4 with pooling halves its images four times and needs at least 16 pixels a side, got inputs "
                f"{inputs.shape}; use larger images or pooling=False"
            )
        strides = (1, 1) if self.pooling else (2, 2)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = inputs
        for index in range(4):
            conv = Conv(self.features, strides=strides, conv_fn=self.conv_fn, name=f"conv_{index}", **dtypes)
            hidden = self.norm(name=f"norm_{index}", **dtypes)(conv(hidden))
            if index == self.context_block:
                kernel_init = nn.initializers.he_uniform()
                film = nn.Dense(2 * self.features, kernel_init=kernel_init, name="film", **dtypes)(context)
                scale, shift = jnp.split(film.astype(hidden.dtype).reshape(1, 1, 1, -1), 2, axis=-1)
                hidden = hidden * (1.0 + scale) + shift
            hidden = nn.relu(hidden)
            if self.pooling:
                hidden = max_pool(hidden)
        flatten = self.pooling if self.flatten is None else self.flatten
        hidden = hidden.reshape(len(hidden), math.prod(hidden.shape[1:])) if flatten else hidden.mean((1, 2))
        if self.way is None:
            return hidden
        default_init = nn.initializers.xavier_uniform() if flatten else nn.initializers.normal(1.0)
        head_init = self.head_init or default_init
        return nn.Dense(self.way, kernel_init=head_init, param_dtype=self.param_dtype, name="head")(hidden)


def conv4(
    *,
    way: int | None,
    features: int = 64,
    pooling: bool = False,
    flatten: bool | None = None,
    conv_fn: ConvFn = conv_matmul,
    norm: Callable[..., nn.Module] = BatchStatNorm,
    head_init: nn.initializers.Initializer | None = None,
    context_block: int | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
) -> Model:
    """Four 3x3 convolutions, each followed by normalisation and ReLU, and a linear layer.

    Without `pooling` this is the Omniglot geometry: the convolutions have stride 2, and the linear layer sees the
    mean over positions, 2x2 for images of 28x28. With `pooling` it is the geometry for larger images: stride 1, a
    2x2 maximum after each block, and all positions flattened. Kernels are Xavier uniform, biases are zero.

    Args:
      way: N, the number of outputs. With None there is no linear layer, and the outputs are the embedding [S, D]:
        D = `features`, times the number of positions with `flatten`.
      features: filters of each convolution; 64 for Omniglot, 32 for miniImageNet in the MAML paper.
      pooling: the geometry.
      flatten: whether the linear layer sees all positions and not their mean; by default with `pooling` only.
      conv_fn: how the convolution is computed, `layers.conv_matmul` or `layers.conv_lax`.
      norm: a flax module class or partial with the arguments `dtype`, `param_dtype` and `name`; by default
        `BatchStatNorm` with an offset and no scale.
      head_init: initialiser of the linear layer [D, N]; by default Xavier uniform with `flatten` and N(0, 1)
        without, as in the authors' code.
      context_block: 0 to 3, the block whose features a context modulates, for `cavia`: after the normalisation,
        h ← (1 + γ) h + β for each filter, with γ and β linear in the context (FiLM). Inputs are then pairs (images,
        context [C']). With None there is no context. CAVIA has it in the third block,
        in its authors' code after the pooling and as γ h + β.
      dtype: dtype of the four blocks, such as `jnp.bfloat16`. With None, inputs and parameters are promoted. The
        linear layer promotes the embedding and its own parameters in either case.
      param_dtype: dtype of the initial parameters.

    Returns:
      A `Model` from inputs [S, H, W, C] to outputs [S, N]. With `pooling` it raises ValueError for images of fewer than
      16 pixels a side.

    Raises:
      ValueError: if `way` or `features` is not a positive integer, or `context_block` no block.

    References:
      Perez et al., 2018, FiLM: visual reasoning with a general conditioning layer; Zintgraf et al., 2019, section 3.3,
      for `context_block`.
    """
    check_integer("features", features, 1)
    if way is not None:
        check_integer("way", way, 1)
    if context_block is not None and check_integer("context_block", context_block, 0) > 3:
        raise ValueError(f"context_block={context_block} must be 0, 1, 2 or 3: there are four blocks")
    module = Conv4(
        way=way,
        features=features,
        pooling=pooling,
        flatten=flatten,
        conv_fn=conv_fn,
        norm=norm,
        head_init=head_init,
        context_block=context_block,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return from_linen(module)
