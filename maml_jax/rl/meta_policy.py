"""The objective of a meta-policy, and the outer updates of meta-reinforcement learning.

Finn, Abbeel and Levine, 2017, Algorithm 3 and section 5.3: the adapted policy acts once more, and its surrogate is
differentiated through the inner steps. https://arxiv.org/abs/1703.03400
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml_jax import parallel
from maml_jax.outer import OuterRule, optax_step
from maml_jax.rl.rollout import returns_of
from maml_jax.rl.surrogates import masked_mean, ratio_surrogate
from maml_jax.types import (
    ArrayTree,
    Episode,
    LossFn,
    MetaInfo,
    MetaLearner,
    at_least_float32,
    check_integer,
    check_learner,
    check_optimizer,
    check_positive,
)


class PolicyInfo(NamedTuple):
    """What the objective of a meta-policy reports about one task.

    Attributes:
      returns: [K+1], the mean returns before each update and after the last, under the policies that acted.
      kl: KL(policy that acted after the last update ‖ adapted policy now), a mean over time steps, in nats.
      entropy: of the adapted policy, a mean over time steps, in nats.
      support_loss: [K], the inner loss before each update.
    """

    returns: jax.Array
    kl: jax.Array
    entropy: jax.Array
    support_loss: jax.Array


def meta_policy(learner: MetaLearner, query_loss_fn: LossFn = ratio_surrogate) -> MetaLearner:
    """The learner with an objective for reinforcement learning: its value and gradient are those of `query_loss_fn` at
    φ_K, and its info is a `PolicyInfo`.

    Args:
      learner: takes K inner steps, each with data of its own.
      query_loss_fn: a surrogate from this package.

    Returns:
      A `MetaLearner` for episodes of `make_sampler`.

    Raises:
      ValueError: if `learner` is not a `MetaLearner`.

    References:
      Finn et al., 2017, Algorithm 3 and section 5.3. https://arxiv.org/abs/1703.03400
    """
    check_learner(learner)

    def objective(meta_params: ArrayTree, episode: Episode) -> tuple[jax.Array, PolicyInfo]:
        task_params, info = learner.adapt(meta_params, episode.support, key=episode.key)
        outputs, targets = learner.predict(task_params, episode.query.inputs), episode.query.targets
        return query_loss_fn(outputs, targets), PolicyInfo(
            returns_of(episode.support, episode.query),
            masked_mean(targets.policy.kl(outputs), targets.mask),
            masked_mean(outputs.entropy(), targets.mask),
            info.support_loss,
        )

    return learner._replace(objective=objective)


def clipped_epochs(
    optimizer: optax.GradientTransformation,
    *,
    num_epochs: int,
    max_kl: float | None = None,
    num_minibatches: int = 1,
    prepare: Callable[[Episode], Episode] | None = None,
) -> OuterRule:
    """The outer rule of proximal policy optimisation: several optax steps on the same episodes.

    No trajectory is drawn between the steps, so the objective should be a `clipped_surrogate`.

    Args:
      optimizer: the outer optax optimiser.
      num_epochs: how often the episodes are gone through.
      max_kl: the mean KL from the policy that acted, in nats, above which no further step is taken; None for no bound.
        The objective's info must have a field `kl`. A step that is not taken does not advance a schedule of
        `optimizer`.
      num_minibatches: parts of the meta-batch, in a new order each epoch, that one step each is taken on.
      prepare: `(episodes) -> episodes`, before the first step, such as a standardisation over all of them.

    Returns:
      An `OuterRule` whose info is a `MetaInfo`. Loss, norm and the objective's info are those before the first step,
      but `kl` is measured before the last step. With minibatches each is that of one minibatch.

    Raises:
      ValueError: if a count is wrong, `max_kl` not positive, or `optimizer` no optimiser; and when it is used, if
        the tasks do not divide into the minibatches, or the objective reports no KL for a bound.

    References:
      Schulman et al., 2017, algorithm 1. https://arxiv.org/abs/1707.06347
    """
    check_optimizer("optimizer", optimizer)
    num_epochs = check_integer("num_epochs", num_epochs, at_least=1)
    num_minibatches = check_integer("num_minibatches", num_minibatches, at_least=1)
    if max_kl is not None:
        check_positive("max_kl", max_kl)

    def init(params: ArrayTree) -> ArrayTree:
        # Only the order of the minibatches is drawn from it. No seed of a user's gives this key.
        key = jax.random.fold_in(jax.random.key(0), 2**32 - 1)
        return {"optimizer": optimizer.init(params), "key": jax.random.key_data(key)}

    def update(gradient_fn: Any, params: ArrayTree, episodes: Episode, state: ArrayTree) -> tuple:
        num_tasks = len(jax.tree.leaves(episodes)[0])
        if num_tasks % num_minibatches:
            raise ValueError(
                f"num_minibatches={num_minibatches} does not divide the {num_tasks} tasks of a meta-batch; choose a "
                "divisor"
            )
        episodes = episodes if prepare is None else prepare(episodes)
        key, order_key = jax.random.split(jax.random.wrap_key_data(state["key"]))

        def step(carry, index):
            params, opt_state, may_go_on, order = carry
            epoch, part = index // num_minibatches, index % num_minibatches
            if num_minibatches > 1:
                fresh = jax.random.permutation(jax.random.fold_in(order_key, epoch), num_tasks)
                order = jnp.where(part == 0, fresh, order)
                chosen = jax.lax.dynamic_slice_in_dim(
                    order, part * (num_tasks // num_minibatches), num_tasks // num_minibatches
                )
                batch = jax.tree.map(lambda x: x[chosen], episodes)
            else:
                batch = episodes
            (loss, info), grads = gradient_fn(params, batch)
            if max_kl is not None:
                may_go_on &= ~(_kl_of(info) > max_kl)  # what is not finite goes to the optimiser
            new = optax_step(optimizer, gradient_fn, params, batch, loss, grads, opt_state)
            params, opt_state = jax.tree.map(lambda a, b: jnp.where(may_go_on, a, b), new, (params, opt_state))
            return (params, opt_state, may_go_on, order), (loss, optax.tree.norm(at_least_float32(grads)), info)

        start = (params, state["optimizer"], jnp.bool_(True), jnp.arange(num_tasks))
        (params, opt_state, _, _), steps = jax.lax.scan(step, start, jnp.arange(num_epochs * num_minibatches))
        # Those of the first step, but not finite if those of any step are not.
        loss, grad_norm = (values[0] + 0.0 * jnp.sum(values) for values in steps[:2])
        info, last = (jax.tree.map(lambda x, step=step: x[step], steps[2]) for step in (0, -1))
        if hasattr(info, "kl"):
            info = info._replace(kl=last.kl)
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((steps[:2], params))])
        state = {"optimizer": opt_state, "key": jax.random.key_data(key)}
        return params, state, MetaInfo(loss, grad_norm, jnp.all(finite), info)

    return OuterRule(init, update, looks_at_episodes=prepare is not None)


def _kl_of(info: Any) -> jax.Array:
    """The divergence that an objective reports."""
    if not hasattr(info, "kl"):
        raise ValueError(
            f"the objective reports {type(info).__name__}, which has no kl; wrap the learner in rl.meta_policy, whose "
            "objective does"
        )
    return info.kl


def trust_region(
    learner: MetaLearner,
    *,
    max_kl: float = 0.01,
    num_cg_steps: int = 10,
    damping: float = 1e-5,
    num_backtracks: int = 15,
    backtrack: float = 0.8,
    metric_stride: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> OuterRule:
    """The outer rule of trust-region policy optimisation: a natural-gradient step within a bound on the KL.

    The direction solves (F + damping) x = g by conjugate gradients, where g is the meta-gradient and F the Fisher
    matrix of the adapted policies with respect to θ, through the inner steps: F = mean over tasks of Jᵀ H J, with the
    derivative J of the adapted policy's outputs and the Hessian H of the KL with respect to the outputs. The step is
    −x times √(2 max_kl / xᵀFx). This factor is multiplied by `backtrack` until the objective falls and the mean KL is
    within the bound. If no attempt is accepted, θ stays.

    Args:
      learner: from `meta_policy`.
      max_kl: the bound on the mean KL from the policies that acted to the adapted policies after the step, in nats.
      num_cg_steps: steps of conjugate gradients.
      damping: added to the Fisher matrix.
      num_backtracks: how many lengths are tried.
      backtrack: the factor from one length to the next.
      metric_stride: the Fisher matrix sees every so many time steps, of the support sets as of the query set. It is
        then that of policies which adapted to less data; objective and KL are still those of all. With 7 a step takes
        a quarter of the time.
      mesh: that of the training program, or None.

    Returns:
      An `OuterRule` whose info is a `MetaInfo` before the update, except for the `kl` in the objective's info, which is
      that after it: 0 if no step was accepted.

    Raises:
      ValueError: if a number is out of its range, `learner` is not a `MetaLearner`, or its objective reports no KL.

    References:
      Schulman et al., 2015, appendix C. https://arxiv.org/abs/1502.05477
    """
    check_learner(learner)
    for name, value in {"max_kl": max_kl, "damping": damping, "backtrack": backtrack}.items():
        check_positive(name, value)
    if backtrack >= 1.0:
        raise ValueError(f"backtrack={backtrack} must be below 1, so that the steps become shorter")
    num_cg_steps = check_integer("num_cg_steps", num_cg_steps, at_least=1)
    num_backtracks = check_integer("num_backtracks", num_backtracks, at_least=1)
    metric_stride = check_integer("metric_stride", metric_stride, at_least=1)

    def over_tasks(function: Callable[[ArrayTree, Episode], ArrayTree]) -> Callable[[ArrayTree, Episode], ArrayTree]:
        def each(params, episodes):
            return jax.lax.map(lambda episode: function(params, episode), episodes)

        return each if mesh is None else parallel.each_task(each, mesh, gather=False)

    def adapted_outputs(params: ArrayTree, episode: Episode) -> ArrayTree:
        task_params, _ = learner.adapt(params, episode.support, key=episode.key)
        return learner.predict(task_params, episode.query.inputs)

    def mean_kl(old: ArrayTree, new: ArrayTree, mask: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(masked_mean)(old.kl(new), mask))

    def measure(params: ArrayTree, episodes: Episode) -> tuple[jax.Array, jax.Array]:
        losses, info = over_tasks(learner.objective)(params, episodes)
        return jnp.mean(at_least_float32(losses)), jnp.mean(at_least_float32(_kl_of(info)))

    def fisher_product(params: ArrayTree, episodes: Episode) -> Callable[[ArrayTree], ArrayTree]:
        seen = episodes._replace(
            support=jax.tree.map(lambda x: x[:, :, ::metric_stride], episodes.support),
            query=jax.tree.map(lambda x: x[:, ::metric_stride], episodes.query),
        )
        mask = seen.query.targets.mask
        outputs, pull = jax.vjp(lambda params: over_tasks(adapted_outputs)(params, seen), params)
        # J v is the derivative of u -> Jᵀ u along v. Forward mode would not pass a `custom_vjp` of the policy.
        _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], jax.tree.map(jnp.zeros_like, outputs))

        def product(vector: ArrayTree) -> ArrayTree:
            slope = jax.grad(lambda new: mean_kl(outputs, new, mask))
            _, curved = jax.jvp(slope, (outputs,), push(optax.tree.cast_like(vector, params)))
            return optax.tree.cast_like(pull(curved)[0], vector)

        return product

    def update(gradient_fn: Any, params: ArrayTree, episodes: Episode, state: ArrayTree) -> tuple:
        (loss, info), grads = gradient_fn(params, episodes)
        product = fisher_product(params, episodes)
        # Steps beyond the rounding of the residual would divide zeros.
        tolerance = 10.0 * float(jnp.finfo(loss.dtype).eps)
        direction, _ = jax.scipy.sparse.linalg.cg(
            lambda vector: optax.tree.cast_like(optax.tree.add_scale(product(vector), damping, vector), vector),
            at_least_float32(grads),
            maxiter=num_cg_steps,
            tol=tolerance,
        )
        curvature = optax.tree.vdot(direction, product(direction))
        # Where the objective is flat there is no direction, and no step.
        length = jnp.where(curvature > 0, jnp.sqrt(2.0 * max_kl / jnp.where(curvature > 0, curvature, 1.0)), 0.0)

        def at(attempt: jax.Array) -> ArrayTree:
            return optax.tree.cast_like(optax.tree.add_scale(params, -length * backtrack**attempt, direction), params)

        def is_accepted(tried_loss: jax.Array, kl: jax.Array) -> jax.Array:
            return (tried_loss < loss) & (kl <= max_kl)

        attempt, accepted, kl = _search(lambda n: measure(at(n), episodes), is_accepted, num_backtracks, loss)
        new = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), at(attempt), params)
        grad_norm = optax.tree.norm(at_least_float32(grads))
        computed = (loss, grad_norm, curvature, direction, new)
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(computed)])
        info = info._replace(kl=jnp.where(accepted, kl, 0.0))
        return new, state, MetaInfo(loss, grad_norm, jnp.all(finite), info)

    return OuterRule(lambda params: (), update, looks_at_episodes=True)


def _search(
    measure: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    is_accepted: Callable[[jax.Array, jax.Array], jax.Array],
    num_attempts: int,
    loss: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tries attempts 0, 1, ... until one is accepted: the last attempt, whether it was accepted, and its KL.

    Args:
      measure: `(attempt) -> (loss, kl)`.
      is_accepted: `(loss, kl) -> bool`.
      num_attempts: how many there are.
      loss: that before the update, for its dtype.
    """

    def is_refused(search: tuple) -> jax.Array:
        attempt, *measured = search
        return (attempt < 0) | (~is_accepted(*measured) & (attempt < num_attempts - 1))

    def shorten(search: tuple) -> tuple:
        return search[0] + 1, *measure(search[0] + 1)

    start = (jnp.int32(-1), loss, jnp.zeros_like(loss))
    attempt, *measured = jax.lax.while_loop(is_refused, shorten, start)
    return attempt, is_accepted(*measured), measured[1]
