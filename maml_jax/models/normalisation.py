"""Normalisation by the statistics of a batch, and by statistics of the training images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype
from jax import lax

from maml_jax.types import ArrayTree, Model


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardise(inputs: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Subtracts the mean of every channel and divides by its standard deviation.

    Its derivative is written out, with m = (variance + ε)^(-1/2) and means over every axis but the last,

        dx̂ = m (dx - mean(dx) - x̂ mean(x̂ dx)),    dm = -m² mean(x̂ dx).

    This form reads and writes the activations fewer times than the derivative of the individual steps. Higher
    derivatives are those of this form.

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
    projection = multiplier * _channel_mean(outputs * tangent)
    tangent_out = multiplier * tangent - multiplier * _channel_mean(tangent) - outputs * projection
    return (outputs, multiplier), (tangent_out, -multiplier * projection)


def _channel_mean(inputs):
    return jnp.mean(inputs, tuple(range(inputs.ndim - 1)), keepdims=True)


class _Norm(nn.Module):
    """What the two normalisations share: everything but the statistics."""

    scale: bool = False
    offset: bool = True
    epsilon: float = 1e-3
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[B, ..., C] -> [B, ..., C]."""
        outputs = self._normalise(inputs.astype(jnp.promote_types(jnp.float32, inputs.dtype)))
        channels, broadcast = inputs.shape[-1:], (1,) * (inputs.ndim - 1) + (-1,)
        params = []
        if self.scale:
            params.append(self.param("scale", nn.initializers.ones, channels, self.param_dtype))
            outputs = outputs * params[-1].reshape(broadcast)
        if self.offset:
            params.append(self.param("offset", nn.initializers.zeros, channels, self.param_dtype))
            outputs = outputs + params[-1].reshape(broadcast)
        return outputs.astype(canonicalize_dtype(inputs, *params, dtype=self.dtype))

    def _normalise(self, inputs: jax.Array) -> jax.Array:
        raise NotImplementedError


class BatchStatNorm(_Norm):
    """Normalises by the statistics of its own batch, in training and at test time. It keeps no running averages.

    The support set and the query set are normalised separately. A prediction at test time therefore depends on
    the other queries of its batch. This setting is transductive, and results must say so. `PopulationNorm` is the
    inductive counterpart.

    Attributes:
      scale: whether to multiply by a learned γ, initially 1.
      offset: whether to add a learned β, initially 0.
      epsilon: added to the variance.
      dtype: dtype of the outputs. With None, inputs and parameters are promoted. Statistics are computed in
        float32 or in the dtype of the inputs, whichever is wider.
      param_dtype: dtype of the initial parameters.

    References:
      Ioffe and Szegedy, 2015, Algorithm 1. https://arxiv.org/abs/1502.03167
    """

    def _normalise(self, inputs):
        return standardise(inputs, self.epsilon)[0]


_STATISTICS = ("population_mean", "population_variance")


class PopulationNorm(_Norm):
    """Normalises by fixed statistics, the parameters "population_mean" and "population_variance", [C] each.

    A prediction depends only on its own input, so the setting is inductive. The other parameters are those of
    `BatchStatNorm`. A network trained with `BatchStatNorm` becomes inductive when it is built again with
    `norm=PopulationNorm` and `fill_population_statistics` adds the statistics of training images to its parameters.

    The gradient of the statistics is zero. An optimiser with weight decay still changes them. `init` takes their
    values from its inputs.

    Attributes:
      scale: whether to multiply by a learned γ, initially 1.
      offset: whether to add a learned β, initially 0.
      epsilon: added to the variance.
      dtype: dtype of the outputs. With None, inputs and parameters are promoted.
      param_dtype: dtype of the initial parameters. Statistics have at least float32.

    References:
      Ioffe and Szegedy, 2015, Algorithm 2. https://arxiv.org/abs/1502.03167
    """

    def _normalise(self, inputs):
        dtype, channels = jnp.promote_types(jnp.float32, self.param_dtype), inputs.shape[-1]

        def statistic(name, values):
            initial = self.param(name, lambda key: _channel_mean(values).reshape(channels).astype(dtype))
            return lax.stop_gradient(initial).reshape((1,) * (inputs.ndim - 1) + (channels,))

        centred = inputs - statistic(_STATISTICS[0], inputs)
        return centred * lax.rsqrt(statistic(_STATISTICS[1], jnp.square(centred)) + self.epsilon)


def fill_population_statistics(model: Model, params: ArrayTree, inputs: jax.Array) -> ArrayTree:
    """Computes the statistics of every `PopulationNorm` of a network in one forward pass.

    The statistics of a layer are those of its input when the layers before it use their own new statistics. On
    these `inputs` the network then equals the same network with `BatchStatNorm`.

    Args:
      model: a network with `PopulationNorm`, from `from_linen` or a builder of this package such as `conv4`.
      params: its parameters, or those of the same network with `BatchStatNorm`. Old statistics are ignored.
      inputs: training images [B, ...], all in one batch.

    Returns:
      `params` with "population_mean" and "population_variance" in every `PopulationNorm`.

    Raises:
      ValueError: if the model has no `PopulationNorm`, or if `params` lacks a parameter or has an unknown one.
    """
    key = jax.random.key(0)  # Nothing is drawn from it, because no other parameter is missing.
    expected = flatten_dict(jax.eval_shape(model.init, key, inputs))
    learned = {path for path in expected if path[-1] not in _STATISTICS}
    if len(learned) == len(expected):
        raise ValueError("the model has no PopulationNorm to fill; build it with norm=maml_jax.models.PopulationNorm")
    given = {path: leaf for path, leaf in flatten_dict(params).items() if path[-1] not in _STATISTICS}
    if missing := learned - given.keys():
        raise ValueError(
            f"params lacks {sorted('/'.join(path) for path in missing)}; give the parameters of the same network "
            "with BatchStatNorm or PopulationNorm"
        )
    return model.init(key, inputs, unflatten_dict(given))
