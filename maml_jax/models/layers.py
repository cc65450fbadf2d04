"""Layers for networks whose weights differ from task to task."""

import functools
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
    # Padded to whole strides, the input falls into s₀ phases of rows, in which s₁ neighbouring columns lie together:
    # every view is made of dense slices. The transpose of a strided slice would scatter with gaps, at three times
    # the cost.
    phase = [n + (k - 1) // s for n, k, s in zip((height, width), kernel.shape, strides, strict=False)]
    pads = [(low, n * s - low - m) for (low, _), n, s, m in zip(pads, phase, strides, size, strict=True)]
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0))).reshape(batch, phase[0], strides[0], phase[1], -1)
    phases = [rows.squeeze(2) for rows in lax.split(padded, (1,) * strides[0], axis=2)]
    patches = [
        phases[i % strides[0]][
            :,
            i // strides[0] : i // strides[0] + height,
            j // strides[1] : j // strides[1] + width,
            : min(strides[1], kernel.shape[1] - j) * channels,
        ]
        for i in range(kernel.shape[0])
        for j in range(0, kernel.shape[1], strides[1])
    ]
    rows = jnp.concatenate(patches, axis=-1).reshape(batch * height * width, -1)
    return _product(rows, kernel.reshape(rows.shape[1], -1)).reshape(batch, height, width, -1)


def _product(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """`rows` [N, K] @ `kernel` [K, F], so written that the gradient of the kernel is the faster product on a CPU.

    It contracts over N, the major axis of both its operands, and the left one of them is packed again as the
    product goes: the smaller one had better stand there. JAX puts the cotangent [N, F] on the left, and XLA
    exchanges the two where the result is transposed next. A barrier before that transpose prevents it.
    """
    if rows.shape[1] < kernel.shape[1]:
        return rows @ kernel
    return lax.dot_general(rows, _barrier_to_derivatives(kernel.T), (((1,), (1,)), ((), ())))


@jax.custom_jvp
def _barrier_to_derivatives(array: jax.Array) -> jax.Array:
    """The identity. XLA moves nothing across it in tangents and cotangents; equal values are still computed once."""
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardise(inputs: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Subtracts the mean of every channel and divides by its standard deviation.

    Its derivative is written out, with m = (variance + ε)^(-1/2) and means over every axis but the last,

        dx̂ = m (dx - mean(dx) - x̂ mean(x̂ dx)),    dm = -m² mean(x̂ dx),

    which reads and writes the activations fewer times than the one that follows from the steps of the
    computation; it is differentiated in turn as it stands.

    Args:
      inputs: x, [..., C].
      epsilon: ε, added to the variance.

    Returns:
      x̂ [..., C] and m, [1, ..., C].

    References:
      Ioffe and Szegedy, 2015, Algorithm 1 and the derivatives in section 3. https://arxiv.org/abs/1502.03167
    """
    centred = inputs - _channel_mean(inputs)
    multiplier = lax.rsqrt(_channel_mean(jnp.square(centred)) + epsilon)
    return centred * multiplier, multiplier


@standardise.defjvp
def _standardise_jvp(epsilon, primals, tangents):
    (inputs,), (tangent,) = primals, tangents
    outputs, multiplier = standardise(inputs, epsilon)
    along = multiplier * _channel_mean(outputs * tangent)
    tangent_out = multiplier * tangent - multiplier * _channel_mean(tangent) - outputs * along
    return (outputs, multiplier), (tangent_out, -multiplier * along)


def _channel_mean(inputs):
    return jnp.mean(inputs, tuple(range(inputs.ndim - 1)), keepdims=True)


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
        outputs = standardise(inputs, self.epsilon)[0]
        channels, broadcast = inputs.shape[-1:], (1,) * (inputs.ndim - 1) + (-1,)
        if self.scale:
            outputs = outputs * self.param("scale", nn.initializers.ones, channels).reshape(broadcast)
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
