"""Two learners that algorithms share: one takes gradient steps, one reads the support set in a single pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.gradients import mixed_mode
from maml_jax.inner.loop import inner_loop
from maml_jax.inner.steps import step_keys
from maml_jax.types import (
    ArrayTree,
    Batch,
    InitFn,
    InnerGradFn,
    InnerInfo,
    LossFn,
    MetaLearner,
    Model,
    ObserveFn,
    PRNGKey,
    check_function,
    check_integer,
    check_model,
    check_optimizer,
    check_query,
    check_support,
)


def gradient_based(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    rule: Callable[[ArrayTree], optax.GradientTransformation],
    num_inner_steps: int,
    init: InitFn | None = None,
    start: Callable[[ArrayTree], ArrayTree] = lambda meta_params: meta_params,
    where: Callable[[str], bool] | None = None,
    inner_grad: InnerGradFn = mixed_mode,
    num_microbatches: int = 1,
    data_per_step: bool = False,
) -> MetaLearner:
    """Builds a learner that takes K steps of a rule from a start, both of which may be meta-learned.

    The objective is L_Q(φ_K) with φ_0 = start(θ) and φ_{k+1} = φ_k + rule(θ)(∇L_S(φ_k)).

    If the model is stochastic and there is a key, inner step k draws with `fold_in(key, k)` and the query pass of
    the objective with `fold_in(key, K)`. All microbatches of a step draw with the same key. Without a key, and in
    `predict`, the model is deterministic.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, the mean loss of a support set.
      query_loss_fn: the mean loss of a query set; by default `loss_fn`.
      rule: `(meta_params) -> optax transformation`, the inner optimiser.
      num_inner_steps: K ≥ 0.
      init: `(key, inputs) -> meta_params`; by default those of the model.
      start: `(meta_params) -> params`, where the inner loop starts.
      where: `(name) -> bool`, the parameters of `start` that adapt; by default all. See `inner_loop`.
      inner_grad: how the inner gradient is differentiated.
      num_microbatches: parts of the support set whose gradients are computed one after another; see `inner_loop`.
      data_per_step: whether the support set has leaves [K, S, ...], of which inner step k sees entry k. Without, all
        steps see the whole support set [S, ...].

    Returns:
      A `MetaLearner`. `adapt` gives φ_K and an `InnerInfo`.

    Raises:
      ValueError: if a count is not an integer in its range, `model` is not a `Model`, a loss, `rule`, `start`, `init`
        or `inner_grad` not a function, or microbatches are asked for of data per step; from `adapt`, if there are inner
        steps and no support example, or `rule` returns no optimiser; from the objective, if the query set is empty.
    """
    num_inner_steps = check_integer("num_inner_steps", num_inner_steps, at_least=0)
    num_microbatches = check_integer("num_microbatches", num_microbatches, at_least=1)
    check_model(model)
    check_function("loss_fn", loss_fn, "losses.cross_entropy")
    check_function("query_loss_fn", query_loss_fn or loss_fn, "losses.cross_entropy")
    check_function("inner_grad", inner_grad, "maml_jax.mixed_mode or maml_jax.first_order")
    check_function("rule", rule, "lambda meta_params: optax.sgd(0.1)")
    check_function("start", start, 'lambda meta_params: meta_params["start"]')
    init = model.init if init is None else init
    check_function("init", init, "model.init")
    if data_per_step and num_microbatches > 1:
        raise ValueError(
            f"num_microbatches={num_microbatches} divides a support set that all steps share; with data_per_step take "
            "more steps instead"
        )

    def support_loss(params, shared, of_step=(None, None)):
        own, key = of_step
        batch = own if data_per_step else shared
        return loss_fn(model.call(params, batch.inputs, key), batch.targets)

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        if num_inner_steps:
            check_support(support, axis=1 if data_per_step else 0)
        keys = step_keys(key, num_inner_steps) if model.stochastic else None
        optimizer = rule(meta_params)
        check_optimizer("what `rule` returns", optimizer)
        task_params, info = inner_loop(
            support_loss,
            optimizer,
            start(meta_params),
            None if data_per_step else support,
            num_steps=num_inner_steps,
            where=where,
            per_step=(support if data_per_step else None, keys) if data_per_step or keys is not None else None,
            num_microbatches=num_microbatches,
            inner_grad=inner_grad,
            observe_fn=observe_fn,
        )
        return task_params, info._replace(opt_state=None)

    def objective(meta_params, episode):
        check_query(episode)
        task_params, info = adapt(meta_params, episode.support, key=episode.key)
        query_key = None if episode.key is None else jax.random.fold_in(episode.key, num_inner_steps)
        outputs = model.call(task_params, episode.query.inputs, query_key)
        return (query_loss_fn or loss_fn)(outputs, episode.query.targets), info

    return MetaLearner(init, adapt, model.apply, objective)


def feed_forward(
    init: InitFn,
    read: Callable[[ArrayTree, Batch, PRNGKey | None], ArrayTree],
    predict: Callable[[ArrayTree, ArrayTree, PRNGKey | None], ArrayTree],
    loss_fn: LossFn,
) -> MetaLearner:
    """Builds a learner that reads the support set in one pass, without inner steps.

    The objective is L_Q(read(θ, S)). With a key, `read` draws from `fold_in(key, 0)` and the query pass of the
    objective from `fold_in(key, 1)`. `predict` of the learner draws nothing.

    Args:
      init: `(key, inputs) -> meta_params`.
      read: `(meta_params, support, key) -> task_params`; the key may be None.
      predict: `(task_params, inputs, key) -> outputs`; the key may be None.
      loss_fn: `(outputs, targets) -> scalar`, the mean loss of a query set.

    Returns:
      A `MetaLearner`. Its info has an empty `support_loss`, [0], and observes once.

    Raises:
      ValueError: from the objective, if the query set is empty.
    """

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        task_params = read(meta_params, support, None if key is None else jax.random.fold_in(key, 0))
        return task_params, observed_once(task_params, observe_fn)

    def objective(meta_params, episode):
        check_query(episode)
        task_params, info = adapt(meta_params, episode.support, key=episode.key)
        query_key = None if episode.key is None else jax.random.fold_in(episode.key, 1)
        outputs = predict(task_params, episode.query.inputs, query_key)
        return loss_fn(outputs, episode.query.targets), info

    return MetaLearner(init, adapt, lambda task_params, inputs: predict(task_params, inputs, None), objective)


def observed_once(task_params: ArrayTree, observe_fn: ObserveFn | None) -> InnerInfo:
    """The info of a learner that does not iterate: no loss [0], and one observation [1, ...] if there is a function.

    Args:
      task_params: what the learner adapts to.
      observe_fn: `(task_params) -> pytree`, or None.
    """
    observed = None if observe_fn is None else jax.tree.map(lambda x: jnp.asarray(x)[None], observe_fn(task_params))
    return InnerInfo(jnp.zeros(0), observed)
