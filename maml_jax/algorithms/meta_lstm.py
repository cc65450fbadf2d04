"""Meta-learner LSTM: learn an initialisation, and a recurrent network that turns gradients into updates.

A small LSTM reads the gradient of every parameter and the loss, and sets how much of the parameter is kept and how
far it moves along its gradient.

Ravi and Larochelle, 2017, Optimization as a model for few-shot learning. https://openreview.net/forum?id=rJY0-Kcll
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from maml_jax.inner.gradients import first_order
from maml_jax.inner.learner import gradient_based
from maml_jax.inner.recurrent import LSTMState, init_lstm, lstm_step
from maml_jax.types import ArrayTree, LossFn, MetaLearner, Model, PRNGKey, check_integer, select


def meta_lstm(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    num_inner_steps: int,
    num_units: int = 20,
    where: Callable[[str], bool] | None = None,
    num_microbatches: int = 1,
) -> MetaLearner:
    """Builds the meta-learner LSTM: min_{θ, W} E[L_Q(φ_K)] with φ_0 = θ and φ_{k+1} = f_k ∘ φ_k − i_k ∘ ∇L_S(φ_k).

    The gates come from two layers. The first is an LSTM of H units, whose input x_k is the gradient and the loss L_S,
    both as `preprocessed`; its output is h_k. The second is

        f_k = σ(w_f · [h_k, φ_k, f_{k-1}] + b_f),  i_k = σ(w_i · [h_k, φ_k, i_{k-1}] + b_i).

    Every coordinate of φ has its own states and gates, and all share the weights W. The first gates see zeros in
    place of earlier ones. With zero weights it is gradient descent with rate σ(b_i) and decay σ(b_f).

    Gradients and losses of the network are constants to the meta-gradient, which therefore has no Hessian. It passes
    through the gates and through the parameters in them.

    L_S is a mean over the batch. The authors' code divides the gradient of that mean by the batch size once more, so
    its input gates stand for rates that are S times smaller. In its gates, f_{k-1} and i_{k-1} are the values before
    the sigmoid; here they are the gates, as in the paper. Every step uses the complete support set.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      num_inner_steps: K ≥ 0. The paper takes 12 for one shot and 5 for five shots of miniImageNet.
      num_units: H, the size of the hidden state of the first layer.
      where: `(name) -> bool`, the parameters that adapt; by default all.
      num_microbatches: parts of the support set whose gradients are computed one after another.

    Returns:
      A `MetaLearner` with the meta-parameters {"params": θ, "learner": W}. All weights of W start uniform in
      [-0.01, 0.01], b_f in [4, 5] and b_i in [-5, -4].

    Raises:
      ValueError: if `model` is not a `Model`, or a count not an integer in its range.

    References:
      Ravi and Larochelle, 2017, section 3 for the gates and the constants, and Algorithm 1.
    """
    num_units = check_integer("num_units", num_units, at_least=1)

    def init(key, inputs):
        params_key, learner_key = jax.random.split(key)
        params = model.init(params_key, inputs)
        dtype = jnp.result_type(ravel_pytree(select(params, where)[0])[0], 0.0)
        return {"params": params, "learner": _init_learner(learner_key, num_units, dtype)}

    return gradient_based(
        model,
        loss_fn,
        query_loss_fn,
        rule=lambda meta_params: gated_descent(meta_params["learner"]),
        num_inner_steps=num_inner_steps,
        init=init,
        start=lambda meta_params: meta_params["params"],
        where=where,
        inner_grad=first_order,
        num_microbatches=num_microbatches,
    )


class GateState(NamedTuple):
    """What the learned rule carries between two steps; P is the number of coordinates that adapt.

    Attributes:
      lstm: the state of the first layer, [P, H] each.
      forget: [P], the forget gates of the step before.
      write: [P], its input gates.
    """

    lstm: LSTMState
    forget: jax.Array
    write: jax.Array


def gated_descent(learner: ArrayTree) -> optax.GradientTransformationExtraArgs:
    """The learned rule: the update is (f − 1) ∘ φ − i ∘ gradient, with gates from a coordinate-wise LSTM.

    Args:
      learner: W, the weights of both layers, as in the meta-parameters of `meta_lstm`.

    Returns:
      A transformation with the state `GateState`. It asks for the loss as `value`, which is a constant to it.
    """
    num_units = learner["lstm"]["bias"].size // 4

    def init(params):
        flat, _ = ravel_pytree(params)
        hidden = jnp.zeros((flat.size, num_units), learner["lstm"]["bias"].dtype)
        gate = hidden[:, 0]
        return GateState(LSTMState(hidden, hidden), gate, gate)

    def update(grads, state, params, *, value, **_):
        (gradient, _), (flat, unflatten) = ravel_pytree(grads), ravel_pytree(params)
        loss = jnp.broadcast_to(jax.lax.stop_gradient(value).astype(gradient.dtype), gradient.shape)
        inputs = jnp.concatenate([preprocessed(loss), preprocessed(gradient)], -1)
        lstm = lstm_step(learner["lstm"], state.lstm, inputs)

        def gate(weights, before):
            return jax.nn.sigmoid(jnp.column_stack([lstm.hidden, flat, before]) @ weights["kernel"] + weights["bias"])

        forget, write = gate(learner["forget"], state.forget), gate(learner["write"], state.write)
        return unflatten((forget - 1.0) * flat - write * gradient), GateState(lstm, forget, write)

    return optax.GradientTransformationExtraArgs(init, update)


def preprocessed(numbers: jax.Array, p: float = 10.0) -> jax.Array:
    """Magnitude and sign of numbers of any scale: (log|x| / p, sign x) if |x| ≥ e^-p, and otherwise (-1, e^p x).

    Args:
      numbers: x, [...].
      p: where the logarithm is cut off.

    Returns:
      [..., 2].

    References:
      Andrychowicz et al., 2016, appendix A. https://arxiv.org/abs/1606.04474
    """
    # The logarithm is -1 at e^-p, and e^p x is ±1 there, so that two bounds choose between the cases.
    logarithm = jnp.log(jnp.maximum(jnp.abs(numbers), math.exp(-p))) / p
    return jnp.stack([logarithm, jnp.clip(math.exp(p) * numbers, -1.0, 1.0)], -1)


def _init_learner(key: PRNGKey, num_units: int, dtype: jnp.dtype) -> ArrayTree:
    """Both layers, with the published distributions."""

    def uniform(key, shape, low, high):
        return jax.random.uniform(key, shape, dtype, low, high)

    lstm_key, forget_key, write_key, *bias_keys = jax.random.split(key, 5)
    shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda key: init_lstm(key, 4, num_units), key))
    keys = jax.random.split(lstm_key, len(shapes))
    lstm = [uniform(key, shape.shape, -0.01, 0.01) for key, shape in zip(keys, shapes, strict=True)]

    def gate(kernel_key, bias_key, low, high):
        kernel = uniform(kernel_key, (num_units + 2,), -0.01, 0.01)
        return {"kernel": kernel, "bias": uniform(bias_key, (), low, high)}

    return {
        "lstm": treedef.unflatten(lstm),
        "forget": gate(forget_key, bias_keys[0], 4.0, 5.0),
        "write": gate(write_key, bias_keys[1], -5.0, -4.0),
    }


@dataclasses.dataclass(frozen=True)
class LearnedOptimizer:
    """Hyperparameters of an inner loop whose steps are taken by a meta-learned LSTM."""

    num_inner_steps: int | None = 8
    """Inner steps, each on the complete support set; None for those of the paper: 12 for one shot and 5 for more."""
    num_units: int = 20
    """Units of the LSTM that reads the gradients."""

    def __post_init__(self):
        """Raises ValueError for a count that is out of range."""
        if self.num_inner_steps is not None:
            check_integer("num_inner_steps", self.num_inner_steps, at_least=0)
        check_integer("num_units", self.num_units, at_least=1)
