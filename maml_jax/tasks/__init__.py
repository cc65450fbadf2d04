"""Task distributions: functions from a key to an episode."""

from maml_jax.tasks import augment as augment
from maml_jax.tasks import bandits as bandits
from maml_jax.tasks import domains as domains
from maml_jax.tasks import drawings as drawings
from maml_jax.tasks import few_shot as few_shot
from maml_jax.tasks import image_folder as image_folder
from maml_jax.tasks import mazes as mazes
from maml_jax.tasks import navigation as navigation
from maml_jax.tasks import omniglot as omniglot
from maml_jax.tasks import sinusoid as sinusoid
from maml_jax.tasks import streaming as streaming
from maml_jax.tasks import tabular_mdp as tabular_mdp
from maml_jax.tasks import tfds_classes as tfds_classes
from maml_jax.tasks import variable as variable

__all__ = [
    "augment",
    "bandits",
    "domains",
    "drawings",
    "few_shot",
    "image_folder",
    "mazes",
    "navigation",
    "omniglot",
    "sinusoid",
    "streaming",
    "tabular_mdp",
    "tfds_classes",
    "variable",
]
