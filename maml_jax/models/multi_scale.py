"""The four-block network of R2-D2, whose embedding joins the features of two depths.

Bertinetto et al., 2019, Meta-learning with differentiable closed-form solvers. https://arxiv.org/abs/1805.08136
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from maml_jax.models.from_flax import from_linen
from maml_jax.models.layers import Conv, larger, max_pool
from maml_jax.models.normalisation import BatchStatNorm
from maml_jax.types import Model, check_integer


class MultiScale(nn.Module):
    """The flax module behind `multi_scale`, with the same arguments."""

    features: Sequence[int] = (64, 64, 64, 64)
    norm: Callable[..., nn.Module] = BatchStatNorm
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[S, H, W, C] -> [S, D]."""
        if min(inputs.shape[1:3]) < 16:
            raise ValueError(f"multi_scale needs images of at least 16 pixels a side, got inputs {inputs.shape}")
        hidden, kept = inputs, []
        for index, features in enumerate(self.features):
            conv = Conv(features, name=f"conv_{index}", param_dtype=self.param_dtype)
            hidden = self.norm(name=f"norm_{index}", param_dtype=self.param_dtype)(conv(hidden))
            hidden = max_pool(hidden) if index < 3 else _overlapping_pool(hidden)
            hidden = nn.leaky_relu(hidden, 0.1)
            if index >= 2:
                kept.append(hidden)
        kept[0] = _overlapping_pool(kept[0])
        return jnp.concatenate([part.reshape(len(part), math.prod(part.shape[1:])) for part in kept], 1)


def _overlapping_pool(inputs: jax.Array) -> jax.Array:
    """The maximum over windows 2x2 at stride 1: [B, H, W, C] -> [B, H - 1, W - 1, C]."""
    rows = larger(inputs[:, :-1], inputs[:, 1:])
    return larger(rows[:, :, :-1], rows[:, :, 1:])


def multi_scale(
    *,
    features: Sequence[int] = (64, 64, 64, 64),
    norm: Callable[..., nn.Module] = BatchStatNorm,
    param_dtype: Dtype = jnp.float32,
) -> Model:
    """Four blocks of convolution, normalisation, 2x2 maximum and leaky ReLU; an embedding of the last two.

    The last maximum has stride 1. The output of the third block has one more maximum of stride 1, and then both are
    flattened and joined. For 28x28 images and 64 filters each is 2x2x64, so D = 512.

    Args:
      features: filters of the four convolutions; (96, 192, 384, 512) in the larger network of the paper.
      norm: a flax module class or partial with the arguments `param_dtype` and `name`; by default
        `BatchStatNorm` with an offset and no scale. The authors' has both.
      param_dtype: dtype of the initial parameters.

    Returns:
      A `Model` from inputs [S, H, W, C] to embeddings [S, D]. It raises ValueError for images of fewer than 16 pixels a
      side.

    Raises:
      ValueError: if there are not four numbers of filters, or one is not a positive integer.

    References:
      Bertinetto et al., 2019, and the authors' code. https://github.com/bertinetto/r2d2
    """
    if len(features) != 4:
        raise ValueError(f"features={tuple(features)} must be the filters of four convolutions")
    for number in features:
        check_integer("features", number, 1)
    return from_linen(MultiScale(tuple(features), norm, param_dtype))
