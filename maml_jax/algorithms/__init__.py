"""Meta-learning algorithms: one file, one builder, one paper. `CATALOGUE` lists them."""

from maml_jax.algorithms.catalogue import CATALOGUE as CATALOGUE
from maml_jax.algorithms.catalogue import Entry as Entry
from maml_jax.algorithms.catalogue import Problem as Problem
from maml_jax.algorithms.maml import InnerDescent as InnerDescent
from maml_jax.algorithms.maml import fomaml as fomaml
from maml_jax.algorithms.maml import maml as maml
from maml_jax.algorithms.pretrained import pretrained as pretrained
from maml_jax.algorithms.reptile import reptile as reptile

__all__ = ["CATALOGUE", "Entry", "InnerDescent", "Problem", "fomaml", "maml", "pretrained", "reptile"]
