"""The list of all algorithms, from which experiments make their command lines and tests their cases.

Builders have the arguments that their papers ask for. An entry makes them alike: it builds a learner from a problem
and one record of hyperparameters.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from maml_jax.algorithms.maml import InnerDescent, fomaml, maml
from maml_jax.algorithms.pretrained import pretrained
from maml_jax.algorithms.reptile import reptile
from maml_jax.types import LossFn, MetaLearner, Model


class Problem(NamedTuple):
    """What an experiment gives to an algorithm.

    Attributes:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch.
      where: `(name) -> bool`, the parameters that an inner loop adapts; None for all.
    """

    model: Model
    loss_fn: LossFn
    where: Callable[[str], bool] | None = None


class Entry(NamedTuple):
    """One algorithm of the catalogue.

    Attributes:
      title: its name in tables and figures.
      reference: authors and year.
      build: `(problem, hyperparameters) -> MetaLearner`.
      hyperparameters: a frozen dataclass; its fields become the flags of the algorithm.
      settings: the published hyperparameters by experiment ("sinusoid", "omniglot"). An experiment offers the
        algorithms that have settings for it.
    """

    title: str
    reference: str
    build: Callable[[Problem, Any], MetaLearner]
    hyperparameters: type
    settings: Mapping[str, Any]


def _by_descent(builder: Callable[..., MetaLearner]) -> Callable[[Problem, InnerDescent], MetaLearner]:
    def build(problem: Problem, hyperparameters: InnerDescent) -> MetaLearner:
        return builder(
            problem.model,
            problem.loss_fn,
            inner_optimizer=hyperparameters.rule(problem.where),
            num_inner_steps=hyperparameters.num_inner_steps,
        )

    return build


# Rates are for mean losses; the code of Finn et al. sums the cross-entropy over the classes, at a rate of 0.4.
_FINN = {"sinusoid": InnerDescent(inner_lr=1e-3), "omniglot": InnerDescent(inner_lr=2.0, num_inner_steps=None)}

CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {
        "maml": Entry("MAML", "Finn et al., 2017", _by_descent(maml), InnerDescent, _FINN),
        "fomaml": Entry("FOMAML", "Finn et al., 2017", _by_descent(fomaml), InnerDescent, _FINN),
        "reptile": Entry(
            "Reptile",
            "Nichol et al., 2018",
            _by_descent(reptile),
            InnerDescent,
            {"sinusoid": InnerDescent(inner_lr=5e-3, num_inner_steps=10), "omniglot": _FINN["omniglot"]},
        ),
        "pretrained": Entry(
            "pretrained on all tasks",
            "Finn et al., 2017",
            _by_descent(pretrained),
            InnerDescent,
            {"sinusoid": _FINN["sinusoid"]},
        ),
    }
)
"""Every algorithm by the name that the command lines use."""
