"""MAML++: learned rates per layer and step, a loss at every step, normalisation parameters per step, annealing.

Every part works without the others: `maml_plus_plus` takes rates, step weights and per-step parameters independently,
and `multi_step_weights` and `switch_at` serve any learner that depends on the meta-step.

Antoniou, Edwards and Storkey, 2019, How to train your MAML. https://arxiv.org/abs/1810.09502
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from maml_jax.algorithms.maml import LearnedRates
from maml_jax.inner.gradients import mixed_mode
from maml_jax.inner.learner import gradient_based
from maml_jax.types import (
    ArrayTree,
    InnerGradFn,
    LossFn,
    MetaLearner,
    Model,
    at_least_float32,
    check_function,
    check_integer,
    check_not_negative,
    check_query,
    combine,
    partition,
    select,
)


def maml_plus_plus(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    inner_lr: float,
    num_inner_steps: int,
    learn_rates: bool = True,
    step_weights: jax.Array | None = None,
    per_step: Callable[[str], bool] | None = None,
    where: Callable[[str], bool] | None = None,
    inner_grad: InnerGradFn = mixed_mode,
) -> MetaLearner:
    """Builds the learner of MAML++: min E[Σ_k w_k L_Q(φ_k)] with φ_{k+1} = φ_k − α_k ∘ ∇L_S(φ_k).

    Without learned rates, weights and per-step parameters it is MAML.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      inner_lr: the initial value of all rates.
      num_inner_steps: K ≥ 0. A learner with more steps than the trained one uses the last rates and parameters.
      learn_rates: whether the rate of each parameter array and step is learned. Otherwise its gradient is zero; an
        outer optimiser with weight decay needs a mask that leaves it out.
      step_weights: w [K], the weights of the query losses after each step; None for only the last one. Those of
        `multi_step_weights` depend on the meta-step, so the learner is a function of it: `lambda step:
        maml_plus_plus(..., step_weights=multi_step_weights(step, K, 5000))`. Only training takes the function;
        `evaluate` takes a learner without weights.
      per_step: `(name) -> bool`, parameters of which every φ_k has its own, such as scales and offsets of
        normalisations. They are meta-learned and do not adapt. The paper uses set k for the support pass of step k
        and for the query pass after it; here φ_k has set k in both, so there are K + 1 sets. The paper also keeps
        running statistics of every step; the models here, as the authors' code, normalise by those of the batch.
      where: `(name) -> bool`, the other parameters that adapt; by default all.
      inner_grad: how the inner gradient is differentiated.

    Returns:
      A `MetaLearner` with the meta-parameters {"params": θ, "rates": α}. Leaves of α are [max(1, K)], and None for
      parameters that do not adapt; the leaves of θ that `per_step` names have a leading axis [K+1].

    Raises:
      ValueError: if `model` is not a `Model`, `inner_lr` not a number of at least 0, a count not an integer in its
        range, or `step_weights` not K weights; when it is used, if `per_step` or `where` selects no parameter.

    References:
      Antoniou et al., 2019, section 4: multi-step loss, per-step normalisation weights, per-layer per-step rates.
    """
    check_not_negative("inner_lr", inner_lr)
    num_inner_steps = check_integer("num_inner_steps", num_inner_steps, at_least=0)
    for name, names in {"where": where, "per_step": per_step}.items():
        if names is not None:
            check_function(name, names, 'lambda name: name.startswith("norm")')
    step_weights = None if step_weights is None else jnp.asarray(step_weights)
    if step_weights is not None and (num_inner_steps == 0 or jnp.shape(step_weights) != (num_inner_steps,)):
        raise ValueError(
            f"step_weights must have one weight for each of num_inner_steps={num_inner_steps} steps, at least one, got "
            f"shape {jnp.shape(step_weights)}"
        )
    is_stepped = per_step or (lambda name: False)

    def adapts(name):
        return not is_stepped(name) and (where is None or where(name))

    def init(key, inputs):
        params = model.init(key, inputs)
        select(params, per_step)  # refuses names that no parameter has
        rates = jax.tree.map(lambda x: jnp.full(max(1, num_inner_steps), inner_lr, x.dtype), select(params, adapts)[0])
        return {"params": _map_named(partial(_repeat, num_inner_steps + 1), params, is_stepped), "rates": rates}

    def start(meta_params):
        return _map_named(lambda x: x[0], meta_params["params"], is_stepped)

    def rule(meta_params):
        rates, stepped = meta_params["rates"], partition(meta_params["params"], lambda name, _: is_stepped(name))[0]
        rates = rates if learn_rates else jax.lax.stop_gradient(rates)

        def update(grads, count, params=None):
            def of_leaf(grad, rate, values):
                if values is None:
                    return -_at(rate, count) * grad
                wide = at_least_float32(values)  # the difference is added to the set before, and must give the next one
                return _at(wide, count + 1) - _at(wide, count)

            return jax.tree.map(of_leaf, grads, rates, stepped), count + 1

        return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)

    learner = gradient_based(
        model,
        loss_fn,
        query_loss_fn,
        rule=rule,
        num_inner_steps=num_inner_steps,
        init=init,
        start=start,
        where=lambda name: is_stepped(name) or adapts(name),
        inner_grad=inner_grad,
    )
    if step_weights is None:
        return learner

    def objective(meta_params, episode):
        check_query(episode)
        key = None if episode.key is None else jax.random.fold_in(episode.key, num_inner_steps)

        @jax.checkpoint
        def query_loss(task_params):
            outputs = model.call(task_params, episode.query.inputs, key)
            return (query_loss_fn or loss_fn)(outputs, episode.query.targets)

        # The parameters of every step and not its loss, because the loss before the first step has no weight.
        _, info = learner.adapt(meta_params, episode.support, key=episode.key, observe_fn=lambda params: params)
        query_losses = jax.lax.map(query_loss, jax.tree.map(lambda x: x[1:], info.observed))
        return jnp.sum(step_weights * query_losses), info._replace(observed=None)

    return learner._replace(objective=objective)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values[index]`; the last one beyond the end."""
    return jnp.asarray(values)[jnp.minimum(index, len(values) - 1)]


def _repeat(count: int, x: jax.Array) -> jax.Array:
    return jnp.repeat(x[None], count, axis=0)


def _map_named(function: Callable, params: ArrayTree, named: Callable[[str], bool]) -> ArrayTree:
    """Maps the leaves whose name is `named`."""
    chosen, others = partition(params, lambda name, _: named(name))
    return combine(jax.tree.map(function, chosen), others)


def multi_step_weights(step: jax.Array, num_inner_steps: int, num_annealing_steps: int) -> jax.Array:
    """The weights of the query losses after each inner step, annealed towards the last one.

    All start at 1/K. Those before the last fall linearly over `num_annealing_steps`, to no less than 0.03/K, and the
    last takes the rest. From then on the last has all weight. (The authors' code anneals once an epoch of 500
    meta-steps.)

    Args:
      step: the meta-step.
      num_inner_steps: K ≥ 1.
      num_annealing_steps: meta-steps of the annealing; in the authors' settings 10 epochs of 500 for Omniglot and 15
        for miniImageNet.

    Returns:
      w [K], with sum 1.

    Raises:
      ValueError: if a count is not a positive integer.
    """
    check_integer("num_inner_steps", num_inner_steps, at_least=1)
    check_integer("num_annealing_steps", num_annealing_steps, at_least=1)
    remaining = 1.0 - step / num_annealing_steps
    # A compiled quotient may round to below one at the end.
    early = jnp.where(step < num_annealing_steps, jnp.maximum(remaining, 0.03), 0.0) / num_inner_steps
    weights = jnp.full(num_inner_steps, early)
    return weights.at[-1].set(1.0 - early * (num_inner_steps - 1))


def switch_at(boundary: int, step: jax.Array, before: MetaLearner, after: MetaLearner) -> MetaLearner:
    """One learner until a meta-step and another from then on, in one compiled program.

    Derivative-order annealing switches from `first_order` to an exact inner gradient. Only the objective of the present
    learner is computed, unless the step is vmapped, as with several seeds in one program: then both are, and one is
    kept. Both learners must have the same meta-parameters and the same info.

    Args:
      boundary: the first meta-step of `after`.
      step: the meta-step, traced.
      before: the learner of the first meta-steps.
      after: the other one; it also gives `init`, `adapt` and `predict`.

    Returns:
      A `MetaLearner` for this step.

    Raises:
      TypeError: from the objective, if the two have another info.

    References:
      Antoniou et al., 2019, section 4: derivative-order annealing.
    """

    def objective(meta_params, episode):
        return jax.lax.cond(step < boundary, before.objective, after.objective, meta_params, episode)

    return after._replace(objective=objective)


def ensemble(learner: MetaLearner) -> MetaLearner:
    """Adapts several meta-parameters to each support set, and predicts the mean of their outputs.

    A result of an ensemble is not that of one model, and must say the number of members.

    Args:
      learner: the algorithm of every member.

    Returns:
      A `MetaLearner` whose meta-parameters and task parameters have a leading axis [M]. Its objective is the mean over
      the members, without interaction, and the `support_loss` of its info is [M, K]. Its `init` gives one member,
      M = 1; stack trained states for more.

    References:
      Antoniou et al., 2019, section 5: the five best checkpoints in validation.
    """

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        def adapt_one(meta_params):
            keep = None if observe_fn is None else lambda task_params: task_params
            return learner.adapt(meta_params, support, key=key, observe_fn=keep)

        task_params, info = jax.vmap(adapt_one)(meta_params)
        if observe_fn is not None:
            at_steps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), info.observed)
            info = info._replace(observed=jax.lax.map(observe_fn, at_steps))
        return task_params, info

    def predict(task_params, inputs):
        outputs = jax.vmap(learner.predict, in_axes=(0, None))(task_params, inputs)
        return jax.tree.map(lambda x: jnp.mean(x, 0), outputs)

    def objective(meta_params, episode):
        losses, info = jax.vmap(learner.objective, in_axes=(0, None))(meta_params, episode)
        return jnp.mean(losses), info

    def init(key, inputs):
        return jax.tree.map(lambda x: x[None], learner.init(key, inputs))

    return MetaLearner(init, adapt, predict, objective)


@dataclasses.dataclass(frozen=True)
class MAMLPlusPlus(LearnedRates):
    """Hyperparameters of MAML++; a part is turned off by 0 or False."""

    learn_rates: bool = True
    """Whether the inner rate of each layer and step is learned."""
    num_multi_step: int = 5000
    """Meta-steps over which the losses before the last inner step lose their weight; 0 for only the last loss."""
    num_first_order: int = 0
    """First meta-steps that are first order; 25,000 in the paper, none in the authors' settings for Omniglot."""
    per_step_norm: bool = True
    """Whether each inner step has scales and offsets of the normalisation of its own."""

    def __post_init__(self):
        """Raises ValueError for a wrong rate or count."""
        super().__post_init__()
        check_integer("num_multi_step", self.num_multi_step, at_least=0)
        check_integer("num_first_order", self.num_first_order, at_least=0)
