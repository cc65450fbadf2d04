"""MLDG: learn parameters whose gradient step on some domains also lowers the loss on other domains.

Every meta-step splits the source domains anew into meta-train and meta-test domains. This imitates the shift to a
domain that is never seen in training. The parameters are deployed as they are; nothing adapts to the new domain.
The baseline `erm` trains on all source domains at once.

Li, Yang, Song and Hospedales, 2018, Learning to generalize: meta-learning for domain generalization.
https://arxiv.org/abs/1710.03463
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.gradients import first_order, mixed_mode
from maml_jax.inner.learner import observed_once
from maml_jax.inner.loop import inner_loop
from maml_jax.types import (
    ArrayTree,
    Batch,
    InnerGradFn,
    InnerInfo,
    LossFn,
    MetaLearner,
    Model,
    ObjectiveFn,
    PRNGKey,
    check_integer,
    check_model,
    check_not_negative,
    check_optimizer,
    check_positive,
)

AcrossFn = Callable[[ArrayTree, ArrayTree], jax.Array]
"""`(outputs [D, B, ...], targets [D, B, ...]) -> scalar`, a loss of several domains together."""
HeldOutFn = Callable[[ArrayTree, ArrayTree, ArrayTree, ArrayTree], jax.Array]
"""`(outputs, targets, train_outputs, train_targets) -> scalar`, a loss of meta-test domains [V, B, ...] in view of the
meta-train domains [D − V, B, ...]."""


def mldg(
    model: Model,
    loss_fn: LossFn,
    *,
    inner_optimizer: optax.GradientTransformation,
    beta: float | jax.Array = 1.0,
    num_held_out: int = 1,
    across_fn: AcrossFn | None = None,
    held_out_fn: HeldOutFn | None = None,
    where: Callable[[str], bool] | None = None,
    inner_grad: InnerGradFn = mixed_mode,
) -> MetaLearner:
    """Builds MLDG: min_θ F(θ) + β G(θ − α∇F(θ)), with a new split of the source domains in every episode.

    F is the mean loss over the meta-train domains, and G that over the meta-test domains. With gradient descent of
    rate α the meta-gradient is ∇F(θ) + β (I − α∇²F(θ)) ∇G(θ − α∇F(θ)). The means are those of the paper. The authors'
    code sums over domains. With V of D domains held out, its rate α corresponds to (D − V) α here, and its weight β to
    β V / (D − V).

    The support set of an episode holds the source domains, [D, B, ...]: B examples of each of D domains, as
    `tasks.domains.make_sampler` draws them. The query set is not used in training. Each domain is a batch of its own
    to `loss_fn` and to the model, so a normalisation by batch statistics sees one domain at a time. The key of the
    episode draws the meta-test domains, uniformly and without replacement. A stochastic model draws from it too.

    Args:
      model: the network; its parameters are the meta-parameters θ.
      loss_fn: `(outputs, targets) -> scalar`, a mean over the batch of one domain.
      inner_optimizer: the step from θ on the meta-train domains, for example `optax.sgd(0.5)`; see
        `inner.inner_loop` for the rules that need an `eps_root`.
      beta: β ≥ 0, the weight of G. With β = 0 the objective is F.
      num_held_out: the number of meta-test domains; 1 ≤ `num_held_out` < D.
      across_fn: a loss of all meta-train domains together, such as `losses.domain_alignment`, which is added to F.
      held_out_fn: a loss of the meta-test domains in view of the meta-train domains, at the same parameters, which is
        added to G.
      where: `(name) -> bool`, the parameters that take the step, by their path such as "norm_0/offset"; by default
        all. See `inner.inner_loop`.
      inner_grad: how ∇F is differentiated: `mixed_mode`, `checkpointed` or `jax.value_and_grad` (exact), or
        `first_order`, which leaves out α∇²F.

    Returns:
      A `MetaLearner`. `init` takes inputs [D, B, ...]. `adapt` returns θ whatever the support set is, and observes
      once. The info of `objective` has F(θ) as `support_loss` [1].

    Raises:
      ValueError: if `inner_optimizer` is not an optax transformation, `model` not a `Model`, `num_held_out` not a
        positive integer, or `beta` negative or not finite. The objective raises it if the episode has no key, its
        support set is not [D, B, ...], or D is too small.

    References:
      Li et al., 2018, Algorithm 1 and equation 1. https://arxiv.org/abs/1710.03463
    """
    check_optimizer("inner_optimizer", inner_optimizer)
    num_held_out = check_integer("num_held_out", num_held_out, at_least=1)
    check_not_negative("beta", beta)
    outputs_of = _outputs_by_domain(model)

    def train_loss(params, domains, key):
        return _total_loss(loss_fn, across_fn, outputs_of(params, domains, key), domains.targets)

    def objective(meta_params, episode):
        num_domains = _count_domains(episode.support)
        if num_held_out >= num_domains:
            raise ValueError(
                f"num_held_out={num_held_out} leaves none of the {num_domains} domains of the episode for meta-train; "
                "hold out fewer, or give more source domains"
            )
        if episode.key is None:
            raise ValueError(
                "MLDG draws the meta-test domains from the key of the episode, which is None; set it with "
                "episode._replace(key=jax.random.key(...)), a different one for every episode"
            )
        split_key, train_key, test_key = jax.random.split(episode.key, 3)
        order = jax.random.permutation(split_key, num_domains)
        meta_test = jax.tree.map(lambda x: jnp.asarray(x)[order[:num_held_out]], episode.support)
        meta_train = jax.tree.map(lambda x: jnp.asarray(x)[order[num_held_out:]], episode.support)
        stepped, info = inner_loop(
            lambda params, domains: train_loss(params, domains, train_key),
            inner_optimizer,
            meta_params,
            meta_train,
            num_steps=1,
            where=where,
            inner_grad=inner_grad,
        )
        outputs = outputs_of(stepped, meta_test, test_key)
        test_loss = _total_loss(loss_fn, None, outputs, meta_test.targets)
        if held_out_fn is not None:
            # Drawn as in F, so that a stochastic model gives the meta-train domains the same noise in both.
            in_view_of = outputs_of(stepped, meta_train, train_key), meta_train.targets
            test_loss += held_out_fn(outputs, meta_test.targets, *in_view_of)
        return info.support_loss[0] + beta * test_loss, info._replace(opt_state=None)

    return _without_adaptation(model, objective)


def erm(model: Model, loss_fn: LossFn, *, across_fn: AcrossFn | None = None) -> MetaLearner:
    """Builds empirical risk minimisation: min_θ of the mean loss over all source domains.

    It is the baseline of MLDG on the same episodes, which the paper calls "Deep-All". It needs no key unless the
    model draws from one.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over the batch of one domain.
      across_fn: a loss of all source domains together, which is added.

    Returns:
      A `MetaLearner` as that of `mldg`; in training the `support_loss` of its `info` is empty, [0].

    Raises:
      ValueError: if `model` is not a `Model`. The objective raises it if the support set is not [D, B, ...].

    References:
      Li et al., 2018, the baseline "Deep-All" of the experiments.
    """
    outputs_of = _outputs_by_domain(model)

    def objective(meta_params, episode):
        outputs = outputs_of(meta_params, episode.support, episode.key)
        return _total_loss(loss_fn, across_fn, outputs, episode.support.targets), InnerInfo(jnp.zeros(0))

    return _without_adaptation(model, objective)


@dataclasses.dataclass(frozen=True)
class DomainSplits:
    """Hyperparameters of MLDG."""

    inner_lr: float = 0.5
    """Rate of the gradient step on the meta-train domains, for a loss that is a mean over the batch."""
    beta: float = 1.0
    """Weight of the loss on the meta-test domains after that step."""
    num_held_out: int = 1
    """Source domains that are meta-test domains in a meta-step; the others are meta-train domains."""
    first_order: bool = False
    """Leave out the second derivatives of the loss on the meta-train domains."""

    def __post_init__(self):
        """Raises ValueError for a rate, a weight or a number of domains that cannot be."""
        check_positive("inner_lr", self.inner_lr)
        check_not_negative("beta", self.beta)
        check_integer("num_held_out", self.num_held_out, at_least=1)

    def rule(self) -> optax.GradientTransformation:
        """Gradient descent."""
        return optax.sgd(self.inner_lr)

    @property
    def inner_grad(self) -> InnerGradFn:
        """How the gradient of that step is differentiated."""
        return first_order if self.first_order else mixed_mode


@dataclasses.dataclass(frozen=True)
class NoHyperparameters:
    """For the algorithms that have none."""


def _count_domains(support: Batch) -> int:
    """D, the size of the first axis of a support set [D, B, ...]."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(support)]
    if len({shape[:2] for shape in shapes}) != 1 or len(shapes[0]) < 2:
        raise ValueError(
            "every leaf of the support set has domains and examples as its leading axes [D, B, ...], got shapes "
            f"{', '.join(map(str, shapes))}; draw episodes with tasks.domains.make_sampler, or stack one batch of "
            "every source domain"
        )
    if 0 in shapes[0][:2]:
        raise ValueError(
            f"the support set has {shapes[0][0]} domains of {shapes[0][1]} examples; give one or more of each"
        )
    return shapes[0][0]


def _outputs_by_domain(model: Model) -> Callable[[ArrayTree, Batch, PRNGKey | None], ArrayTree]:
    """`(params, domains, key) -> outputs [D, B, ...]`; every domain is a batch, and draws with a key of its own."""

    def outputs(params, domains, key):
        num_domains = _count_domains(domains)
        keys = None if key is None else jax.random.split(key, num_domains)
        return jax.vmap(lambda inputs, key: model.call(params, inputs, key))(domains.inputs, keys)

    return outputs


def _total_loss(loss_fn: LossFn, across_fn: AcrossFn | None, outputs: ArrayTree, targets: ArrayTree) -> jax.Array:
    """The mean of the losses of the domains, plus that of all of them together."""
    # Over the first axis only: a loss that is no scalar is then refused by those who differentiate it.
    total = jnp.mean(jax.vmap(loss_fn)(outputs, targets), 0)
    return total if across_fn is None else total + across_fn(outputs, targets)


def _without_adaptation(model: Model, objective: ObjectiveFn) -> MetaLearner:
    """A learner that is deployed as it was trained."""
    check_model(model)

    def init(key, inputs):
        return model.init(key, jax.tree.map(lambda x: x[0], inputs))

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        return meta_params, observed_once(meta_params, observe_fn)

    return MetaLearner(init, adapt, model.apply, objective)
