"""Meta-learning algorithms: one file, one builder, one paper."""

from collections.abc import Callable
from types import MappingProxyType

from maml_jax.algorithms.maml import fomaml as fomaml
from maml_jax.algorithms.maml import maml as maml
from maml_jax.algorithms.pretrained import pretrained as pretrained
from maml_jax.algorithms.reptile import reptile as reptile
from maml_jax.types import MetaLearner

CATALOGUE: MappingProxyType[str, Callable[..., MetaLearner]] = MappingProxyType(
    {"maml": maml, "fomaml": fomaml, "reptile": reptile, "pretrained": pretrained}
)
"""Every builder by its name, each called as
`builder(model, loss_fn, *, inner_optimizer, num_inner_steps) -> MetaLearner`."""

__all__ = ["CATALOGUE", "fomaml", "maml", "pretrained", "reptile"]
