"""Hypergradients: learn the learning rates, momenta and penalties of a whole training run by its exact gradient.

The run is a task: its support set is the training set, its query set the held-out one, and its hyperparameters are the
meta-parameters. Memory stays small because the inner gradient is differentiated in mixed mode, and because only the
starting points of segments of the run are stored: with √K segments of √K steps it grows as √K. The paper stores
nothing and runs the training backwards instead, with the bits that momentum loses kept aside.

Maclaurin, Duvenaud and Adams, 2015, Gradient-based hyperparameter optimization through reversible learning.
https://arxiv.org/abs/1502.03492
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.gradients import mixed_mode
from maml_jax.inner.learner import observed_once
from maml_jax.inner.loop import inner_loop
from maml_jax.inner.steps import mini_batches
from maml_jax.types import (
    ArrayTree,
    Batch,
    InnerGradFn,
    InnerInfo,
    LossFn,
    MetaLearner,
    Model,
    at_least_float32,
    check_integer,
    check_model,
    check_query,
)


class RunHyperparameters(NamedTuple):
    """The hyperparameters of a training run of K steps, in a form in which every real number is allowed.

    Attributes:
      log_rates: by the name of a layer, [K], the natural logarithm of the learning rate of every step.
      momentum_logits: [K], the logit of the momentum of every step, log(γ / (1 − γ)).
      log_l2: by the name of a layer, a scalar, the natural logarithm of the strength of the L2 penalty.
    """

    log_rates: dict[str, jax.Array]
    momentum_logits: jax.Array
    log_l2: dict[str, jax.Array]


class Weights(NamedTuple):
    """What the inner loop adapts.

    Attributes:
      network: w, the parameters of the network, a dictionary of layers.
      velocity: v, a running mean of negative gradients, like `network`.
    """

    network: dict[str, ArrayTree]
    velocity: dict[str, ArrayTree]


class Steps(NamedTuple):
    """Mini-batches and hyperparameters of some of the steps of a training run, leaves [K, ...].

    Attributes:
      chosen: int [K, B], the examples of every mini-batch.
      rates: α, by layer.
      momentum: γ.
      l2: the strengths of the penalty, by layer.
    """

    chosen: jax.Array
    rates: dict[str, jax.Array]
    momentum: jax.Array
    l2: dict[str, jax.Array]


class RunInfo(NamedTuple):
    """What happened in a training run.

    Attributes:
      support_loss: [K], the loss of every mini-batch before its step, with the penalty.
      metric: `metric_fn` of the query set, after the last step; None without one.
    """

    support_loss: jax.Array
    metric: jax.Array | None


class RuleState(NamedTuple):
    """The number of steps that the rule has taken."""

    count: jax.Array


def scheduled_descent(steps: Steps) -> optax.GradientTransformation:
    """Gradient descent with momentum whose numbers are those of each step.

    v ← γ_k v − (1 − γ_k) g, then w ← w + α_k v with the rate of the layer. The parameters of the rule are `Weights`:
    the velocity is one of them, so that the next segment of a training run goes on with it.

    References:
      Maclaurin et al., 2015, Algorithm 1.
    """

    def init(params: Weights) -> RuleState:
        return RuleState(jnp.zeros((), jnp.int32))

    def update(grads: Weights, state: RuleState, params: Weights) -> tuple[Weights, RuleState]:
        momentum, rates = jax.tree.map(lambda x: x[state.count], (steps.momentum, steps.rates))
        velocity = jax.tree.map(lambda v, g: momentum * v - (1 - momentum) * g, params.velocity, grads.network)
        # By the path, because the network may be another mapping than a dictionary, such as a state of nnx.
        change = jax.tree.map_with_path(lambda path, v: rates[path[0].key] * v, velocity)
        return Weights(change, jax.tree.map(jnp.subtract, velocity, params.velocity)), RuleState(state.count + 1)

    return optax.GradientTransformation(init, update)


def training_run(
    model: Model,
    loss_fn: LossFn,
    hyperparameters: RunHyperparameters,
    network: dict[str, ArrayTree],
    training_set: Batch,
    chosen: jax.Array,
    *,
    num_segments: int = 1,
    truncation: int | None = None,
    inner_grad: InnerGradFn = mixed_mode,
) -> tuple[dict[str, ArrayTree], jax.Array]:
    """Trains a network, differentiably with respect to its hyperparameters.

    Args:
      model: the network. It gets no key, so a stochastic one, such as a network with dropout, is deterministic.
      loss_fn: `(outputs, targets) -> scalar`. Half the squared norm of the parameters of a layer, times the strength
        of the layer, is added to it.
      hyperparameters: those of K steps.
      network: where the run starts, a dictionary of layers.
      training_set: inputs and targets [S, ...].
      chosen: int [K, B], the examples of every mini-batch.
      num_segments: the number of parts into which the differentiated steps are divided; it divides their number.
        Only the state at the beginning of each is stored, and the part is computed again when it is differentiated.
      truncation: the number of last steps that are differentiated; None for all.
      inner_grad: how the gradient of a mini-batch is differentiated.

    Returns:
      The trained network, and the loss of every mini-batch [K].

    Raises:
      ValueError: if `num_segments` or `truncation` does not fit K.
    """
    num_steps = len(chosen)
    check_segments(num_steps, num_segments, truncation)
    training_set = jax.tree.map(jnp.asarray, training_set)

    def mini_batch_loss(weights: Weights, training_set: Batch, step: Steps) -> jax.Array:
        inputs, targets = jax.tree.map(lambda x: x[step.chosen], training_set)
        network = at_least_float32(weights.network)
        norms = {name: optax.tree.norm(layer, squared=True) for name, layer in network.items()}
        return loss_fn(model.apply(weights.network, inputs), targets) + 0.5 * optax.tree.vdot(step.l2, norms)

    def segment(weights: Weights, steps: Steps) -> tuple[Weights, jax.Array]:
        weights, info = inner_loop(
            mini_batch_loss,
            scheduled_descent(steps),
            weights,
            training_set,
            num_steps=len(steps.chosen),
            per_step=steps,
            inner_grad=inner_grad,
        )
        return weights, info.support_loss

    steps = Steps(
        chosen,
        jax.tree.map(jnp.exp, hyperparameters.log_rates),
        jax.nn.sigmoid(hyperparameters.momentum_logits),
        jax.tree.map(lambda x: jnp.broadcast_to(jnp.exp(x), (num_steps,)), hyperparameters.log_l2),
    )
    weights, num_constant = Weights(network, jax.tree.map(jnp.zeros_like, network)), 0
    found = []
    if truncation is not None and truncation < num_steps:
        num_constant = num_steps - truncation
        before = jax.tree.map(lambda x: jax.lax.stop_gradient(x[:num_constant]), steps)
        weights, support_loss = jax.lax.stop_gradient(segment(weights, before))
        found.append(support_loss)
    steps = jax.tree.map(lambda x: x[num_constant:], steps)
    if num_segments == 1:
        weights, support_loss = segment(weights, steps)
    else:
        steps = jax.tree.map(lambda x: x.reshape(num_segments, -1, *x.shape[1:]), steps)
        weights, support_loss = jax.lax.scan(jax.checkpoint(segment), weights, steps)
    return weights.network, jnp.concatenate([*found, support_loss.reshape(-1)])


def hypergradient(
    model: Model,
    loss_fn: LossFn,
    *,
    metric_fn: LossFn | None = None,
    initial: Callable[[Sequence[str]], RunHyperparameters],
    num_inner_steps: int,
    batch_size: int,
    num_segments: int = 1,
    truncation: int | None = None,
    inner_grad: InnerGradFn = mixed_mode,
) -> MetaLearner:
    """Builds a learner whose meta-parameters λ are the hyperparameters of a whole training run.

    The objective is L_Q(w_K(λ)), the loss of the query set after K steps of `training_run` on the support set. The key
    of the episode gives the initial weights and the order of the mini-batches.

    Args:
      model: the network; its parameters are a dictionary of layers. It gets no key, so a stochastic one is
        deterministic.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch.
      metric_fn: `(outputs, targets) -> scalar` of the query set after the run, for the info; None for none.
      initial: `(names of the layers) -> RunHyperparameters`, those before the first meta-step. With a rate of 0.1, a
        momentum of 0.9 and a penalty of 1e-4 for all K steps it returns `RunHyperparameters({name: jnp.full(K,
        jnp.log(0.1)) for name in names}, jnp.full(K, jnp.log(9.0)), {name: jnp.log(1e-4) for name in names})`.
      num_inner_steps: K, the mini-batches of a run.
      batch_size: B, their size.
      num_segments: the number of parts whose first state alone is stored; see `training_run`.
      truncation: the number of last steps that are differentiated; None for all.
      inner_grad: how the gradient of a mini-batch is differentiated.

    Returns:
      A `MetaLearner` with `RunHyperparameters` as meta-parameters. `adapt` gives the trained network and an
      `InnerInfo`, with the loss of every mini-batch [K] and one observation, after the run; `evaluate` needs
      `stochastic=True`. The info of `objective` is a `RunInfo`.

    Raises:
      ValueError: if `model` is not a `Model`, a count not a positive integer, `num_segments` does not divide the steps
        that are differentiated, or `truncation` exceeds `num_inner_steps`; from `init`, if the parameters of `model`
        are not a dictionary, or `initial` returns something else or other layers; from `adapt`, if there is no key;
        from `objective`, if there is no query example.

    References:
      Maclaurin et al., 2015, section 2.
    """
    check_model(model)
    num_inner_steps = check_integer("num_inner_steps", num_inner_steps, at_least=1)
    check_integer("batch_size", batch_size, at_least=1)
    check_segments(num_inner_steps, num_segments, truncation)

    def init(key, inputs):
        network = jax.eval_shape(model.init, key, inputs)
        if not isinstance(network, Mapping):
            raise ValueError(
                f"the parameters of the model must be a dictionary of layers, got a {type(network).__name__}; every "
                "layer has rates and a penalty of its own"
            )
        if not isinstance(hyperparameters := initial(sorted(network)), RunHyperparameters):
            raise ValueError(
                f"initial must return RunHyperparameters(log_rates, momentum_logits, log_l2), got a "
                f"{type(hyperparameters).__name__}"
            )
        for name in ("log_rates", "log_l2"):
            if sorted(of_layers := getattr(hyperparameters, name)) != sorted(network):
                raise ValueError(
                    f"{name} of initial has the layers {sorted(of_layers)}, and the network has {sorted(network)}; "
                    "give one entry for each name that initial is called with"
                )
        return hyperparameters

    def adapt(hyperparameters, support, *, key=None, observe_fn=None):
        if key is None:
            raise ValueError(
                "a training run needs a key for its weights and mini-batches; pass key= to adapt, and stochastic=True "
                "to evaluate"
            )
        weight_key, order_key = jax.random.split(key)
        network, support_loss = training_run(
            model,
            loss_fn,
            hyperparameters,
            model.init(weight_key, jax.tree.map(lambda x: x[:1], support.inputs)),
            support,
            mini_batches(order_key, len(jax.tree.leaves(support)[0]), num_inner_steps, batch_size),
            num_segments=num_segments,
            truncation=truncation,
            inner_grad=inner_grad,
        )
        return network, InnerInfo(support_loss, observed_once(network, observe_fn).observed)

    def objective(hyperparameters, episode):
        check_query(episode)
        network, (support_loss, *_) = adapt(hyperparameters, episode.support, key=episode.key)
        outputs = model.apply(network, episode.query.inputs)
        metric = None if metric_fn is None else metric_fn(outputs, episode.query.targets)
        return loss_fn(outputs, episode.query.targets), RunInfo(support_loss, metric)

    return MetaLearner(init, adapt, model.apply, objective)


def default_segments(num_steps: int) -> int:
    """The divisor of `num_steps` that is nearest to its square root."""
    divisors = [n for n in range(1, num_steps + 1) if num_steps % n == 0]
    return min(divisors, key=lambda n: abs(n - math.sqrt(num_steps)))


def check_segments(num_inner_steps: int, num_segments: int, truncation: int | None) -> None:
    """Raises ValueError unless the differentiated steps exist and the segments divide them.

    Args:
      num_inner_steps: K.
      num_segments: see `training_run`.
      truncation: see `training_run`.
    """
    check_integer("num_segments", num_segments, at_least=1)
    if truncation is not None and check_integer("truncation", truncation, at_least=1) > num_inner_steps:
        raise ValueError(
            f"truncation={truncation} exceeds num_inner_steps={num_inner_steps}; leave it out to differentiate all "
            "steps"
        )
    steps = truncation or num_inner_steps
    if steps % num_segments:
        raise ValueError(
            f"num_segments={num_segments} does not divide the {steps} differentiated steps; choose a divisor, such as "
            f"{default_segments(steps)}"
        )
