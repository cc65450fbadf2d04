"""iMAML: the meta-gradient of a regularised inner problem, from nothing but its solution.

Rajeswaran, Finn, Kakade and Levine, 2019, Meta-learning with implicit gradients. https://arxiv.org/abs/1909.04630
"""

import dataclasses
from collections.abc import Callable

import jax
import optax

from maml_jax.algorithms.maml import InnerDescent
from maml_jax.inner.implicit import check_strength, proximal_solution
from maml_jax.types import (
    LossFn,
    MetaLearner,
    Model,
    check_function,
    check_integer,
    check_model,
    check_not_negative,
    check_optimizer,
    check_query,
    check_support,
    combine,
    select,
)


def imaml(
    model: Model,
    loss_fn: LossFn,
    query_loss_fn: LossFn | None = None,
    *,
    inner_optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    strength: float,
    num_cg_steps: int,
    damping: float | jax.Array = 0.0,
    penalty_last: bool = False,
    where: Callable[[str], bool] | None = None,
) -> MetaLearner:
    """Builds iMAML: min_θ E[L_Q(φ*)] with φ* = argmin_φ L_S(φ) + λ/2 ‖φ − θ‖².

    The inner problem is solved by K steps of `inner_optimizer` from θ. The meta-gradient (I + ∇²L_S(φ*)/λ)⁻¹ ∇L_Q(φ*)
    takes memory that does not depend on K. It is exact if φ_K is a solution and the conjugate gradients converge.

    This is the paper's method. The authors' code differs: its K steps are on L_S without the proximal term, one step on
    only that term follows (`penalty_last=True`), and the system is damped. For λ = 2 the meta-gradient of their code is
    half of what is computed here with `damping=22`.

    Args:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for the support set.
      query_loss_fn: the same for the query set; by default `loss_fn`.
      inner_optimizer: any optax transformation; it minimises the regularised problem.
      num_inner_steps: K ≥ 0.
      strength: λ > 0.
      num_cg_steps: conjugate-gradient steps, at least 1.
      damping: δ ≥ 0. The meta-gradient is (I + ∇²L_S(φ*)/(λ + δ))⁻¹ ∇L_Q(φ*), exact for δ = 0; see
        `proximal_solution`.
      penalty_last: whether the K steps are on L_S, and one on only the proximal term follows; see `proximal_solution`.
      where: `(name) -> bool`, the parameters that adapt; by default all. The others are learned through the implicit
        derivative too.

    Returns:
      A `MetaLearner`. `adapt` gives φ_K and an `InnerInfo`; what is observed are constants to a gradient. A stochastic
      model is deterministic in the inner problem, which must be one problem, and draws in the query pass.

    Raises:
      ValueError: if `strength` is not positive, `damping` negative, `inner_optimizer` not an optax transformation,
        `model` not a `Model`, a loss not a function, or a count not an integer in its range.

    References:
      Rajeswaran et al., 2019, Algorithms 1 and 2.
    """
    check_optimizer("inner_optimizer", inner_optimizer)
    num_inner_steps = check_integer("num_inner_steps", num_inner_steps, at_least=0)
    check_integer("num_cg_steps", num_cg_steps, at_least=1)
    check_strength(strength)
    check_not_negative("damping", damping)
    check_model(model)
    check_function("loss_fn", loss_fn, "losses.cross_entropy")
    check_function("query_loss_fn", query_loss_fn or loss_fn, "losses.cross_entropy")

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        if num_inner_steps:
            check_support(support)
        adapting, fixed = select(meta_params, where)

        def support_loss(adapting, support):
            return loss_fn(model.apply(combine(adapting, fixed), support.inputs), support.targets)

        adapting, info = proximal_solution(
            support_loss,
            inner_optimizer,
            adapting,
            support,
            strength=strength,
            num_steps=num_inner_steps,
            num_cg_steps=num_cg_steps,
            damping=damping,
            penalty_last=penalty_last,
            observe_fn=None if observe_fn is None else lambda adapting: observe_fn(combine(adapting, fixed)),
        )
        return combine(adapting, fixed), info

    def objective(meta_params, episode):
        check_query(episode)
        task_params, info = adapt(meta_params, episode.support)
        key = None if episode.key is None else jax.random.fold_in(episode.key, num_inner_steps)
        outputs = model.call(task_params, episode.query.inputs, key)
        return (query_loss_fn or loss_fn)(outputs, episode.query.targets), info

    return MetaLearner(model.init, adapt, model.apply, objective)


@dataclasses.dataclass(frozen=True)
class ImplicitDescent(InnerDescent):
    """Hyperparameters of a proximal inner problem."""

    strength: float = 2.0
    """Weight λ of the squared distance to the initialisation, λ/2 ‖φ − θ‖²."""
    num_cg_steps: int = 5
    """Conjugate-gradient steps of the meta-gradient."""
    damping: float = 0.0
    """Added to λ in the conjugate gradients, for stability: 0 in the paper. In the authors' code it is in effect
    λ + 20, which is 22 for λ = 2. Their meta-gradient is half of ours with that value."""
    penalty_last: bool = False
    """Whether the inner steps leave out the proximal term, and one step on only that term follows, as in the authors'
    code."""

    def __post_init__(self):
        """Raises ValueError for a strength that is not positive, a negative damping, or a count that is too small."""
        super().__post_init__()
        check_strength(self.strength)
        check_not_negative("damping", self.damping)
        check_integer("num_cg_steps", self.num_cg_steps, at_least=1)
