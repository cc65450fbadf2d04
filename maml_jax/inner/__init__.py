"""The inner loop and how it is differentiated."""

from maml_jax.inner.gradients import check_inner_grad as check_inner_grad
from maml_jax.inner.gradients import checkpointed as checkpointed
from maml_jax.inner.gradients import first_order as first_order
from maml_jax.inner.gradients import mixed_mode as mixed_mode
from maml_jax.inner.learner import gradient_based as gradient_based
from maml_jax.inner.loop import adapt_only as adapt_only
from maml_jax.inner.loop import inner_loop as inner_loop

__all__ = [
    "adapt_only",
    "check_inner_grad",
    "checkpointed",
    "first_order",
    "gradient_based",
    "inner_loop",
    "mixed_mode",
]
