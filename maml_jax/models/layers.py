"""Layers for networks whose weights differ from task to task."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

ConvFn = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]
"""`(inputs [B, H, W, C], kernel [h, w, C, F], strides) -> outputs [B, H', W', F]`, padding "SAME"."""


def conv_lax(inputs: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolution by `lax.conv_general_dilated`, padding "SAME".

    Under a `vmap` over kernels it becomes a grouped convolution, whose weight gradient is slow on most
    backends; see `conv_matmul`.

    Args:
      inputs: [B, H, W, C].
      kernel: [h, w, C, F].
      strides: (vertical, horizontal).

    Returns:
      [B, ⌈H / s₀⌉, ⌈W / s₁⌉, F].
    """
    return lax.conv_general_dilated(inputs, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv_matmul(inputs: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """The same convolution as one matrix product of strided slices.

    The h·w shifted views of the padded input are concatenated along the channels and multiplied by the
    kernel as a [h·w·C, F] matrix. Everything in it batches over a task axis of the kernel as a batched
    matrix product, in the first derivative and in the second.

    Args:
      inputs: [B, H, W, C].
      kernel: [h, w, C, F].
      strides: (vertical, horizontal).

    Returns:
      [B, ⌈H / s₀⌉, ⌈W / s₁⌉, F].
    """
    batch, *size, channels = inputs.shape
    pads = lax.padtype_to_pads(size, kernel.shape[:2], strides, "SAME")
    height, width = (-(-n // s) for n, s in zip(size, strides, strict=True))
    # Padded to whole strides, the input falls into s₀·s₁ phases, and every view is a dense slice of one. The
    # transpose of a strided slice scatters with gaps; that of a dense one costs a third of it.
    phases_shape = [n + (k - 1) // s for n, k, s in zip((height, width), kernel.shape, strides, strict=False)]
    pads = [(low, n * s - low - m) for (low, _), n, s, m in zip(pads, phases_shape, strides, size, strict=True)]
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
    blocks = padded.reshape(batch, phases_shape[0], strides[0], phases_shape[1], strides[1], channels)
    phases = [
        [phase.reshape(batch, *phases_shape, channels) for phase in lax.split(rows, (1,) * strides[1], axis=4)]
        for rows in lax.split(blocks, (1,) * strides[0], axis=2)
    ]
    patches = [
        phases[i % strides[0]][j % strides[1]][
            :, i // strides[0] : i // strides[0] + height, j // strides[1] : j // strides[1] + width
        ]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class Conv(nn.Module):
    """A convolution with "SAME" padding and a bias.

    Attributes:
      features: F, the number of filters.
      kernel_size: (h, w).
      strides: (vertical, horizontal).
      conv_fn: `conv_matmul` or `conv_lax`, equal in value and derivatives.
      kernel_init: initialiser of the kernel [h, w, C, F]; the bias starts at zero.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    conv_fn: ConvFn = conv_matmul
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, inputs.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return self.conv_fn(inputs, kernel, self.strides) + bias.reshape(1, 1, 1, -1)


class BatchStatNorm(nn.Module):
    """Normalises by the statistics of the batch it is given, always; it keeps no running averages.

    The support set and the query set are each normalised by themselves. At test time a prediction
    then depends on the other queries beside it: the setting is transductive, and results say so.

    Attributes:
      scale: whether to multiply by a learned γ, initially 1.
      offset: whether to add a learned β, initially 0.
      epsilon: added to the variance.

    References:
      Ioffe and Szegedy, 2015, Algorithm 1. https://arxiv.org/abs/1502.03167
    """

    scale: bool = False
    offset: bool = True
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, ..., C] -> [B, ..., C]; statistics over every axis but the last."""
        axes = tuple(range(inputs.ndim - 1))
        centred = inputs - jnp.mean(inputs, axes, keepdims=True)
        multiplier = lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + self.epsilon)
        channels, broadcast = inputs.shape[-1:], (1,) * len(axes) + (-1,)
        if self.scale:
            multiplier = multiplier * self.param("scale", nn.initializers.ones, channels).reshape(broadcast)
        outputs = centred * multiplier
        if self.offset:
            outputs = outputs + self.param("offset", nn.initializers.zeros, channels).reshape(broadcast)
        return outputs


def max_pool(inputs: jax.Array, window: Sequence[int] = (2, 2)) -> jax.Array:
    """Maximum over windows that do not overlap; a remainder at the border is dropped.

    Written as a reshape and a maximum, whose second derivative is cheap on every backend.

    Args:
      inputs: [B, H, W, C].
      window: (h, w).

    Returns:
      [B, ⌊H / h⌋, ⌊W / w⌋, C].
    """
    batch, height, width, channels = inputs.shape
    rows, columns = height // window[0], width // window[1]
    cropped = inputs[:, : rows * window[0], : columns * window[1]]
    return cropped.reshape(batch, rows, window[0], columns, window[1], channels).max((2, 4))
