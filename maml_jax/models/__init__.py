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
from maml_jax.models.translation import PAD as PAD
from maml_jax.models.translation import TASK_VECTORS as TASK_VECTORS
from maml_jax.models.translation import UNIVERSAL_VECTORS as UNIVERSAL_VECTORS
from maml_jax.models.translation import Lexicon as Lexicon
from maml_jax.models.translation import Sentences as Sentences
from maml_jax.models.translation import Translator as Translator
from maml_jax.models.translation import gru_translator as gru_translator
from maml_jax.models.translation import transformer_translator as transformer_translator

__all__ = [
    "MLP",
    "PAD",
    "TASK_VECTORS",
    "UNIVERSAL_VECTORS",
    "BatchStatNorm",
    "Conv4",
    "Lexicon",
    "MultiScale",
    "PopulationNorm",
    "RecurrentModel",
    "ResNet12",
    "Sentences",
    "Translator",
    "conv4",
    "fill_population_statistics",
    "from_linen",
    "from_nnx",
    "gru",
    "gru_translator",
    "mlp",
    "multi_scale",
    "omniglot_mlp",
    "resnet12",
    "transformer_translator",
]
