"""Networks as pairs of pure functions. The only part of the library that imports flax."""

from maml_jax.models.conv4 import Conv4 as Conv4
from maml_jax.models.conv4 import conv4 as conv4
from maml_jax.models.from_flax import from_linen as from_linen
from maml_jax.models.from_flax import from_nnx as from_nnx
from maml_jax.models.mlp import MLP as MLP
from maml_jax.models.mlp import mlp as mlp
from maml_jax.models.mlp import omniglot_mlp as omniglot_mlp
from maml_jax.models.multi_scale import MultiScale as MultiScale
from maml_jax.models.multi_scale import multi_scale as multi_scale
from maml_jax.models.normalisation import BatchStatNorm as BatchStatNorm
from maml_jax.models.normalisation import PopulationNorm as PopulationNorm
from maml_jax.models.normalisation import fill_population_statistics as fill_population_statistics
from maml_jax.models.recurrent import RecurrentModel as RecurrentModel
from maml_jax.models.recurrent import gru as gru
from maml_jax.models.resnet12 import ResNet12 as ResNet12
from maml_jax.models.resnet12 import resnet12 as resnet12

__all__ = [
    "MLP",
    "BatchStatNorm",
    "Conv4",
    "MultiScale",
    "PopulationNorm",
    "RecurrentModel",
    "ResNet12",
    "conv4",
    "fill_population_statistics",
    "from_linen",
    "from_nnx",
    "gru",
    "mlp",
    "multi_scale",
    "omniglot_mlp",
    "resnet12",
]
