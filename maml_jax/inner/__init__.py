"""The inner loop and how it is differentiated."""

from maml_jax.inner.gradients import check_inner_grad as check_inner_grad
from maml_jax.inner.gradients import checkpointed as checkpointed
from maml_jax.inner.gradients import first_order as first_order
from maml_jax.inner.gradients import mixed_mode as mixed_mode
from maml_jax.inner.implicit import conjugate_gradients as conjugate_gradients
from maml_jax.inner.implicit import proximal_solution as proximal_solution
from maml_jax.inner.learner import gradient_based as gradient_based
from maml_jax.inner.loop import inner_loop as inner_loop

__all__ = [
    "check_inner_grad",
    "checkpointed",
    "conjugate_gradients",
    "first_order",
    "gradient_based",
    "inner_loop",
    "mixed_mode",
    "proximal_solution",
]
