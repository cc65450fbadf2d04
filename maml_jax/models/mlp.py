"""Fully connected networks."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from maml_jax.models.from_flax import from_linen
from maml_jax.models.layers import BatchStatNorm
from maml_jax.types import Model


class MLP(nn.Module):
    """Dense layers with a nonlinearity between them; see `mlp`."""

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array]
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer
    norm: Callable[[], nn.Module] | None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[S, ...] -> [S, features[-1]]."""
        hidden = inputs.reshape(inputs.shape[0], -1)
        for index, width in enumerate(self.features):
            name = f"dense_{index}"
            hidden = nn.Dense(width, kernel_init=self.kernel_init, bias_init=self.bias_init, name=name)(hidden)
            if index + 1 < len(self.features):
                if self.norm is not None:
                    hidden = self.norm(name=f"norm_{index}")(hidden)
                hidden = self.activation(hidden)
        return hidden


def mlp(
    *,
    features: Sequence[int],
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal(),
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
    norm: Callable[..., nn.Module] | None = None,
) -> Model:
    """A multilayer perceptron on flattened inputs.

    Args:
      features: widths of the layers, the last being the number of outputs: (40, 40, 1) for the
        sinusoids of the MAML paper.
      activation: applied after every layer but the last.
      kernel_init: initialiser of each kernel [D, width].
      bias_init: initialiser of each bias [width].
      norm: a flax module class or partial, put before every activation; None for none.

    Returns:
      A `Model` from inputs [S, ...] to outputs [S, features[-1]].
    """
    return from_linen(MLP(tuple(features), activation, kernel_init, bias_init, norm))


def omniglot_mlp(*, way: int) -> Model:
    """The fully connected Omniglot network: 256-128-64-64, each normalised, then a linear layer.

    Args:
      way: N, the number of outputs.

    Returns:
      A `Model` from inputs [S, 28, 28, 1] to outputs [S, N].

    References:
      Finn et al., 2017, section 5.2, "no conv"; weights truncated normal of scale 0.01 as in the
      authors' code. https://arxiv.org/abs/1703.03400
    """
    return mlp(
        features=(256, 128, 64, 64, way),
        kernel_init=nn.initializers.truncated_normal(0.01),
        norm=BatchStatNorm,
    )
