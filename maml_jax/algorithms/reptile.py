"""Reptile: move the initialisation towards the parameters that each task ends at.

No derivative passes through the inner loop. The update is the gradient of a squared distance, so that Reptile
trains with `jax.grad` like every other algorithm.

Nichol, Achiam and Schulman, 2018, On first-order meta-learning algorithms.
https://arxiv.org/abs/1803.02999
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from maml_jax.algorithms.maml import InnerDescent
from maml_jax.inner.gradients import first_order
from maml_jax.inner.loop import inner_loop
from maml_jax.inner.steps import mini_batches, step_keys
from maml_jax.types import (
    Batch,
    LossFn,
    MetaLearner,
    Model,
    PRNGKey,
    at_least_float32,
    check_function,
    check_integer,
    check_model,
    check_optimizer,
    check_positive,
    check_support,
    select,
)


def reptile(
    model: Model,
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    batch_size: int | None = None,
    carry_state: bool = False,
    where: Callable[[str], bool] | None = None,
) -> MetaLearner:
    """Builds Reptile: the objective ½‖θ − stop_gradient(φ_K)‖², whose gradient is θ − φ_K.

    With `optax.sgd(ε)` as outer optimiser the meta-step is θ ← θ + ε (mean φ_K − θ), the batched
    version of the paper, and with one task in the meta-batch the serial version. The paper lets ε fall linearly to 0,
    as `optax.linear_schedule(1.0, 0.0, num_meta_steps)` does. Only the support set is used;
    with K = 1 and gradient descent the meta-gradient is α∇L_S(θ), and with K = 0 it is zero.

    Args:
      model: the network; its parameters are the meta-parameters θ.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch.
      inner_optimizer: any optax transformation; the paper's is `optax.adam(1e-3, b1=0)`.
      num_inner_steps: K ≥ 0. With K = 1 Reptile is training on all tasks at once.
      batch_size: examples of each inner step. They are drawn without replacement until the support set is used up,
        and then anew. Their order comes from the key of the episode in training, and from that of `adapt` otherwise.
        Without one it is the same in every call. A support set of at most so many examples is used whole, as it is
        with None.
      carry_state: whether the state of the inner optimiser is carried from task to task, as in the authors' code. It
        is then a part of the meta-parameters, and the outer optimiser must be wrapped in `replace_inner_state`: any
        other moves the state by its own rule, and no error says so. The authors' code computes the tasks of a
        meta-batch one after another and hands the state on between them. Here they are computed together: all start
        from one state, and the next state is the mean of theirs. With one task in the meta-batch both are the same.
      where: `(name) -> bool`, the parameters that adapt; by default all.

    Returns:
      A `MetaLearner`. The value of `objective` is a squared distance, not a loss. With `carry_state` the
      meta-parameters are {"params": θ, "inner_state": state}.

    Raises:
      ValueError: if `inner_optimizer` is not an optax transformation, `model` not a `Model`, `loss_fn` not a function,
        or a count not an integer in its range; from `init`, if a state with random keys or an array of integers were to
        be carried.

    References:
      Nichol et al., 2018, Algorithms 1 and 2, sections 4 and 6. https://arxiv.org/abs/1803.02999
    """
    check_optimizer("inner_optimizer", inner_optimizer)
    check_model(model)
    check_function("loss_fn", loss_fn, "losses.cross_entropy")
    num_inner_steps = check_integer("num_inner_steps", num_inner_steps, at_least=0)
    if batch_size is not None:
        batch_size = check_integer("batch_size", batch_size, at_least=1)

    def init(key, inputs):
        params = model.init(key, inputs)
        if not carry_state:
            return params
        state = inner_optimizer.init(select(params, where)[0])
        return {"params": params, "inner_state": jax.tree.map_with_path(_as_meta_parameter, state)}

    def loss(params, support, own):
        batch, key = own
        batch = support if batch is None else batch
        return loss_fn(model.call(params, batch.inputs, key), batch.targets)

    def run(meta_params, support, key=None, observe_fn=None):
        """The inner loop from the meta-parameters; (φ_K, or φ_K with the last state) and the info."""
        if num_inner_steps:
            check_support(support)
        params, state = meta_params, None
        if carry_state:
            first = jax.eval_shape(lambda params: inner_optimizer.init(select(params, where)[0]), meta_params["params"])
            state = jax.tree.map(_as_inner_state, meta_params["inner_state"], first)
            params = meta_params["params"]
        # Batches and the model draw with different keys.
        order_key, model_key = (key, None) if key is None or not model.stochastic else jax.random.split(key)
        batches = _draw_batches(support, batch_size, num_inner_steps, order_key)
        task_params, info = inner_loop(
            loss,
            inner_optimizer,
            params,
            support,
            num_steps=num_inner_steps,
            where=where,
            per_step=(batches, step_keys(model_key, num_inner_steps)),
            inner_grad=first_order,
            observe_fn=observe_fn,
            opt_state=state,
        )
        ended = {"params": task_params, "inner_state": info.opt_state} if carry_state else task_params
        return ended, info._replace(opt_state=None)

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        ended, info = run(meta_params, support, key, observe_fn)
        return ended["params"] if carry_state else ended, info

    def objective(meta_params, episode):
        ended, info = run(jax.lax.stop_gradient(meta_params), episode.support, episode.key)
        gap = at_least_float32(jax.tree.map(jnp.subtract, meta_params, ended))
        return 0.5 * optax.tree.norm(gap, squared=True), info

    return MetaLearner(init, adapt, model.apply, objective)


def _as_meta_parameter(path: tuple, leaf: jax.Array) -> jax.Array:
    """A part of the carried state as a meta-parameter, all of which are floating; so is a counter of steps.

    Raises:
      ValueError: if a mean over tasks of this part means nothing.
    """
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    if leaf.ndim or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise ValueError(
            f"carry_state=True cannot carry {jax.tree_util.keystr(path)} of the inner optimiser, {leaf.dtype} "
            f"{leaf.shape}, as a mean over tasks; use an inner optimiser without random keys, or carry_state=False"
        )
    return leaf.astype(jnp.float32)


def _as_inner_state(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A meta-parameter as the part of the state that it carries. The mean of equal counters may be no whole number."""
    return (jnp.round(leaf) if jnp.issubdtype(like.dtype, jnp.integer) else leaf).astype(like.dtype)


def _draw_batches(support: Batch, batch_size: int | None, num_steps: int, key: PRNGKey | None) -> Batch | None:
    """Mini-batches with leaves [K, B, ...], or None for the whole support set in each step."""
    size = len(jax.tree.leaves(support)[0])
    if batch_size is None or batch_size >= size:
        return None
    # Without a key an adaptation is the same every time, as that of a stochastic model is.
    chosen = mini_batches(jax.random.key(0) if key is None else key, size, num_steps, batch_size)
    return jax.tree.map(lambda x: jnp.asarray(x)[chosen], support)


def replace_inner_state(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The outer optimiser for `carry_state`: `optimizer` moves θ, and the inner state is replaced by its new value.

    Args:
      optimizer: any optax transformation.

    Returns:
      A transformation of the meta-parameters {"params": θ, "inner_state": state}.
    """
    parts = {"params": optimizer, "inner_state": optax.sgd(1.0)}
    return optax.partition(parts, lambda params: {name: name for name in parts})


@dataclasses.dataclass(frozen=True)
class ReptileDescent(InnerDescent):
    """Hyperparameters of the inner loop of Reptile."""

    inner_lr: float | None = 0.01
    """Rate of the inner optimiser, for a mean loss; None for the published one, if it depends on the task."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Inner optimiser; "adam" is without momentum (beta1 = 0), as in the paper."""
    batch_size: int | None = None
    """Examples of an inner step; None for the published number, if it depends on the task, or for all."""
    carry_state: bool = False
    """Whether the state of the inner optimiser is carried from task to task."""

    def __post_init__(self):
        """Raises ValueError for a wrong rate, count or name."""
        if self.inner_lr is None:
            dataclasses.replace(self, inner_lr=1.0)  # checks the others
            return
        super().__post_init__()
        if self.inner_optimizer not in ("sgd", "adam"):
            raise ValueError(f'inner_optimizer must be "sgd" or "adam", got {self.inner_optimizer!r}')
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, at_least=1)

    def rule(self) -> optax.GradientTransformation:
        """The inner optimiser.

        Raises:
          ValueError: if the rate is None.
        """
        check_positive("inner_lr", self.inner_lr)
        return optax.sgd(self.inner_lr) if self.inner_optimizer == "sgd" else optax.adam(self.inner_lr, b1=0.0)
