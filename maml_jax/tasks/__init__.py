"""Task distributions: functions from a key to an episode."""

from maml_jax.tasks import domains as domains
from maml_jax.tasks import few_shot as few_shot
from maml_jax.tasks import image_folder as image_folder
from maml_jax.tasks import omniglot as omniglot
from maml_jax.tasks import sinusoid as sinusoid

__all__ = ["domains", "few_shot", "image_folder", "omniglot", "sinusoid"]
