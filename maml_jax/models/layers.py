"""Convolution and pooling that stay fast when every task has its own weights."""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax

ConvFn = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]
"""`(inputs [B, H, W, C], kernel [h, w, C, F], strides) -> outputs [B, H', W', F]`, padding "SAME"."""


def conv_lax(inputs: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolution by `lax.conv_general_dilated`, padding "SAME".

    Under a `vmap` over kernels it becomes a grouped convolution. The weight gradient of a grouped convolution is
    slow on most backends; see `conv_matmul`.

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
    kernel as a [h·w·C, F] matrix. Under a `vmap` over kernels this becomes a batched matrix product, and so do
    its first and second derivatives.

    Args:
      inputs: [B, H, W, C].
      kernel: [h, w, C, F].
      strides: (vertical, horizontal).

    Returns:
      [B, ⌈H / s₀⌉, ⌈W / s₁⌉, F].
    """
    batch, *size, channels = inputs.shape
    same_pads = lax.padtype_to_pads(size, kernel.shape[:2], strides, "SAME")
    height, width = (-(-n // s) for n, s in zip(size, strides, strict=True))
    # The input is padded to whole strides and split into s₀ phases of rows, in which s₁ neighbouring columns are
    # contiguous. Every view is then made of dense slices. The transpose of a strided slice would scatter with gaps,
    # which takes three times as long.
    phase_shape = [n + (k - 1) // s for n, k, s in zip((height, width), kernel.shape, strides, strict=False)]
    pads = [(low, n * s - low - m) for (low, _), n, s, m in zip(same_pads, phase_shape, strides, size, strict=True)]
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0))).reshape(
        batch, phase_shape[0], strides[0], phase_shape[1], strides[1] * channels
    )
    phases = [phase.squeeze(2) for phase in lax.split(padded, (1,) * strides[0], axis=2)]
    views = [
        phases[i % strides[0]][
            :,
            i // strides[0] : i // strides[0] + height,
            j // strides[1] : j // strides[1] + width,
            : min(strides[1], kernel.shape[1] - j) * channels,
        ]
        for i in range(kernel.shape[0])
        for j in range(0, kernel.shape[1], strides[1])
    ]
    filters, size = kernel.shape[-1], math.prod(kernel.shape[:-1])
    patches = jnp.concatenate(views, axis=-1).reshape(batch * height * width, size)
    return _product(patches, kernel.reshape(size, filters)).reshape(batch, height, width, filters)


def _product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """`rows` [N, K] @ `kernel` [K, F], arranged so that the kernel gradient is fast on a CPU.

    That gradient contracts over N, the leading axis of both operands. XLA repacks the left operand during the
    product, so the smaller one should be on the left. JAX puts the cotangent [N, F] on the left. Where the result
    is transposed next, XLA exchanges the two operands again; a barrier before that transpose prevents this.
    """
    if rows.shape[1] < kernel.shape[1]:
        return rows @ kernel
    return lax.dot_general(rows, _barrier_to_derivatives(kernel.T), (((1,), (1,)), ((), ())))


@jax.custom_jvp
def _barrier_to_derivatives(array: jax.Array) -> jax.Array:
    """The identity, with an optimisation barrier on its tangents and cotangents only.

    The value has no barrier, so XLA still computes equal values only once.
    """
    return array


@_barrier_to_derivatives.defjvp
def _barrier_jvp(primals, tangents):
    return primals[0], lax.optimization_barrier(tangents[0])


class Conv(nn.Module):
    """A convolution with "SAME" padding and a bias.

    Attributes:
      features: F, the number of filters.
      kernel_size: (h, w).
      strides: (vertical, horizontal).
      conv_fn: `conv_matmul` or `conv_lax`, which have the same values and derivatives.
      kernel_init: initialiser of the kernel [h, w, C, F]. The bias starts at zero.
      dtype: dtype of the computation and of the outputs. With None, inputs and parameters are promoted.
      param_dtype: dtype of the initial parameters.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    conv_fn: ConvFn = conv_matmul
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', F]."""
        kernel_shape = (*self.kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, kernel_shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return self.conv_fn(inputs, kernel, self.strides) + bias.reshape(1, 1, 1, -1)


def max_pool(inputs: jax.Array, window: Sequence[int] = (2, 2)) -> jax.Array:
    """Maximum over windows that do not overlap, NaN if one value is. A remainder at the border is dropped.

    It is a chain of `larger`, whose second derivative is cheap on every backend. Of equal values in a window the first
    gets the derivative.

    Args:
      inputs: [B, H, W, C].
      window: (h, w).

    Returns:
      [B, ⌊H / h⌋, ⌊W / w⌋, C].
    """
    batch, height, width, channels = inputs.shape
    rows, columns = height // window[0], width // window[1]
    cropped = inputs[:, : rows * window[0], : columns * window[1]]
    tiles = cropped.reshape(batch, rows, window[0], columns, window[1], channels)
    parts = [tiles[:, :, row, :, column] for row in range(window[0]) for column in range(window[1])]
    return functools.reduce(larger, parts)


def larger(first: jax.Array, second: jax.Array) -> jax.Array:
    """The larger of two values, NaN if one is. Of equal values the first gets the derivative.

    The derivative of `jnp.maximum` would compare the maximum with its operands. If a compiler computes these a second
    time, with another rounding, none may be equal, and the derivative is lost.
    """
    return jnp.where((second > first) | jnp.isnan(second), second, first)
