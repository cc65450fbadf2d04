"""The inner loop and how it is differentiated."""

from maml_jax.inner.embedding import class_means as class_means
from maml_jax.inner.embedding import embed as embed
from maml_jax.inner.embedding import embedding_size as embedding_size
from maml_jax.inner.embedding import squared_distances as squared_distances
from maml_jax.inner.embedding import unit_length as unit_length
from maml_jax.inner.gradients import check_inner_grad as check_inner_grad
from maml_jax.inner.gradients import checkpointed as checkpointed
from maml_jax.inner.gradients import first_order as first_order
from maml_jax.inner.gradients import mixed_mode as mixed_mode
from maml_jax.inner.implicit import conjugate_gradients as conjugate_gradients
from maml_jax.inner.implicit import proximal_solution as proximal_solution
from maml_jax.inner.learner import feed_forward as feed_forward
from maml_jax.inner.learner import gradient_based as gradient_based
from maml_jax.inner.learner import observed_once as observed_once
from maml_jax.inner.loop import inner_loop as inner_loop
from maml_jax.inner.recurrent import LSTMState as LSTMState
from maml_jax.inner.recurrent import init_lstm as init_lstm
from maml_jax.inner.recurrent import lstm_step as lstm_step
from maml_jax.inner.recurrent import split_inputs as split_inputs

__all__ = [
    "LSTMState",
    "check_inner_grad",
    "checkpointed",
    "class_means",
    "conjugate_gradients",
    "embed",
    "embedding_size",
    "feed_forward",
    "first_order",
    "gradient_based",
    "init_lstm",
    "inner_loop",
    "lstm_step",
    "mixed_mode",
    "observed_once",
    "proximal_solution",
    "split_inputs",
    "squared_distances",
    "unit_length",
]
