"""The list of all algorithms, from which experiments make their command lines and tests their cases.

Builders have the arguments that their papers ask for. An entry makes them alike: it builds a learner from a problem
and one record of hyperparameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from maml_jax.algorithms.anil import anil
from maml_jax.algorithms.boil import boil
from maml_jax.algorithms.cavia import ContextDescent, cavia, with_context
from maml_jax.algorithms.classifier import PretrainedHead, pretrained_classifier
from maml_jax.algorithms.imaml import ImplicitDescent, imaml
from maml_jax.algorithms.leo import LatentDescent, leo
from maml_jax.algorithms.maml import InnerDescent, fomaml, maml
from maml_jax.algorithms.maml_plus_plus import MAMLPlusPlus, maml_plus_plus, multi_step_weights, switch_at
from maml_jax.algorithms.mann import ExternalMemory, RecurrentUnits, lstm, mann
from maml_jax.algorithms.matching import Matching, matching_networks
from maml_jax.algorithms.memory_module import NeighbourMemory, memory_module
from maml_jax.algorithms.meta_curvature import meta_curvature
from maml_jax.algorithms.meta_lstm import LearnedOptimizer, meta_lstm
from maml_jax.algorithms.meta_sgd import DrawnRates, meta_sgd
from maml_jax.algorithms.mldg import DomainSplits, NoHyperparameters, erm, mldg
from maml_jax.algorithms.pretrained import pretrained
from maml_jax.algorithms.protonets import protonets
from maml_jax.algorithms.r2d2 import RidgeHead, r2d2
from maml_jax.algorithms.reptile import ReptileDescent, reptile
from maml_jax.algorithms.siamese import siamese
from maml_jax.algorithms.statistician import SetStatistics, neural_statistician
from maml_jax.inner.embedding import unit_length
from maml_jax.inner.gradients import first_order, mixed_mode
from maml_jax.types import InnerGradFn, LossFn, MetaLearner, Model, check_model


class Problem(NamedTuple):
    """What an experiment gives to an algorithm.

    Attributes:
      model: the network.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch.
      where: `(name) -> bool`, the parameters that an inner loop adapts; None for all.
      head: `(name) -> bool`, the parameters of the last layer, for the algorithms that treat it differently.
      norm: `(name) -> bool`, scales and offsets of normalisations; None if there are none.
      embedding: the network without its last layer, [S, ...] to [S, D], for the classifiers that compare embeddings.
      way: N, the number of classes of an episode, for the same.
      takes_context: whether `model` takes a context beside its inputs, for CAVIA; otherwise the two are concatenated.
    """

    model: Model
    loss_fn: LossFn
    where: Callable[[str], bool] | None = None
    head: Callable[[str], bool] | None = None
    norm: Callable[[str], bool] | None = None
    embedding: Model | None = None
    way: int | None = None
    takes_context: bool = False


class Entry(NamedTuple):
    """One algorithm of the catalogue.

    Attributes:
      title: its name in tables and figures.
      reference: authors and year.
      build: `(problem, hyperparameters) -> MetaLearner`, or a function from the meta-step to one.
      hyperparameters: a frozen dataclass; its fields become the flags of the algorithm.
      settings: the hyperparameters by experiment ("sinusoid", "omniglot", "images", "domains"): the published ones
        where a paper has the experiment, else ours. An experiment offers the algorithms that have settings for it.
      classifies: whether it is for classification only; then its problem has an `embedding` and a `way`.
      any_way: whether the parameters do not depend on the number of classes, so that one training can be tested with
        any number.
    """

    title: str
    reference: str
    build: Callable[[Problem, Any], MetaLearner | Callable[[jax.Array], MetaLearner]]
    hyperparameters: type
    settings: Mapping[str, Any]
    classifies: bool = False
    any_way: bool = False


def _build(
    builder: Callable[..., MetaLearner],
    *,
    of_problem: tuple[str, ...] = ("where",),
    of_settings: tuple[str, ...] = ("num_inner_steps",),
    has_rule: bool = True,
) -> Callable[[Problem, Any], MetaLearner]:
    """The `build` of an entry: calls `builder` with named parts of the problem and of the hyperparameters."""

    def build(problem: Problem, settings: Any) -> MetaLearner:
        arguments = {name: getattr(problem, name) for name in of_problem}
        if arguments.get("head", True) is None:
            raise ValueError(
                "the problem does not say which parameters are its last layer; pass Problem(..., head=...)"
            )
        arguments |= {name: getattr(settings, name) for name in of_settings}
        if has_rule:
            arguments["inner_optimizer"] = settings.rule()
        return builder(problem.model, problem.loss_fn, **arguments)

    return build


def _build_classifier(
    builder: Callable[..., MetaLearner], *of_settings: str, takes_loss: bool = True
) -> Callable[[Problem, Any], MetaLearner]:
    """The `build` of an entry that classifies by embeddings."""

    def build(problem: Problem, settings: Any) -> MetaLearner:
        if problem.embedding is None or problem.way is None:
            raise ValueError("the problem has no embedding or no way; pass Problem(..., embedding=..., way=...)")
        loss = (problem.loss_fn,) if takes_loss else ()
        arguments = {name: getattr(settings, name) for name in of_settings}
        return builder(problem.embedding, *loss, way=problem.way, **arguments)

    return build


def _meta_sgd(problem: Problem, settings: DrawnRates) -> MetaLearner:
    return _build(functools.partial(meta_sgd, inner_lr=settings.rates), has_rule=False)(problem, settings)


def _cavia(problem: Problem, settings: ContextDescent) -> MetaLearner:
    build = _build(cavia, of_problem=(), of_settings=("num_inner_steps", "num_context"))
    return build(problem if problem.takes_context else problem._replace(model=with_context(problem.model)), settings)


def _maml_plus_plus(problem: Problem, settings: MAMLPlusPlus) -> MetaLearner | Callable[[jax.Array], MetaLearner]:
    def build(step_weights: jax.Array | None = None, inner_grad: InnerGradFn = mixed_mode) -> MetaLearner:
        return maml_plus_plus(
            problem.model,
            problem.loss_fn,
            inner_lr=settings.inner_lr,
            num_inner_steps=settings.num_inner_steps,
            learn_rates=settings.learn_rates,
            step_weights=step_weights,
            per_step=problem.norm if settings.per_step_norm else None,
            where=problem.where,
            inner_grad=inner_grad,
        )

    def at(step: jax.Array) -> MetaLearner:
        weights = None
        if settings.num_multi_step and settings.num_inner_steps:
            weights = multi_step_weights(step, settings.num_inner_steps, settings.num_multi_step)
        exact = build(weights)
        if not settings.num_first_order:
            return exact
        return switch_at(settings.num_first_order, step, build(weights, first_order), exact)

    return at if settings.num_multi_step or settings.num_first_order else build()


def _pretrained_classifier(problem: Problem, settings: PretrainedHead) -> MetaLearner:
    steps = {"inner_optimizer": settings.rule(), "num_inner_steps": settings.num_head_steps}
    builder = functools.partial(pretrained_classifier, **steps)
    return _build_classifier(builder, "num_classes", "head")(problem, settings)


def _leo(problem: Problem, settings: LatentDescent) -> MetaLearner:
    """LEO on embeddings of unit length, as those of its paper are; its first rates are for these."""

    def unit(embedding: Model, *arguments: Any, **keywords: Any) -> MetaLearner:
        check_model(embedding)

        def apply(params, inputs, **key):
            return unit_length(embedding.apply(params, inputs, **key))

        return leo(embedding._replace(apply=apply), *arguments, **keywords)

    return _build_classifier(unit, *(field.name for field in dataclasses.fields(LatentDescent)))(problem, settings)


def _neural_statistician(problem: Problem, settings: SetStatistics) -> Callable[[jax.Array], MetaLearner]:
    def at(step: jax.Array) -> MetaLearner:
        builder = functools.partial(neural_statistician, alpha=settings.alpha(step))
        names = "num_context", "num_latent", "num_hidden", "sample_dropout"
        return _build_classifier(builder, *names, takes_loss=False)(problem, settings)

    return at


def _classifier(
    title: str,
    reference: str,
    build: Callable,
    hyperparameters: type,
    any_way: bool = True,
    photographs: Mapping[str, Any] | None = MappingProxyType({}),
) -> Entry:
    """The entry of a classifier, at its default hyperparameters but for those of `photographs`; None without these."""
    settings = {"omniglot": hyperparameters()}
    if photographs is not None:
        settings["images"] = hyperparameters(**photographs)
    return Entry(title, reference, build, hyperparameters, settings, classifies=True, any_way=any_way)


# Rates are for mean losses; the code of Finn et al. sums the cross-entropy over the classes, at rates of 0.4 and 0.01.
_FINN = {
    "sinusoid": InnerDescent(inner_lr=1e-3),
    "omniglot": InnerDescent(inner_lr=2.0, num_inner_steps=None),
    "images": InnerDescent(inner_lr=0.05, num_inner_steps=5),
}

CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {
        "maml": Entry("MAML", "Finn et al., 2017", _build(maml), InnerDescent, _FINN),
        "fomaml": Entry("FOMAML", "Finn et al., 2017", _build(fomaml), InnerDescent, _FINN),
        "reptile": Entry(
            "Reptile",
            "Nichol et al., 2018",
            _build(reptile, of_settings=("num_inner_steps", "batch_size", "carry_state")),
            ReptileDescent,
            {
                "sinusoid": ReptileDescent(inner_lr=5e-3, num_inner_steps=10),
                "omniglot": ReptileDescent(
                    inner_lr=None, num_inner_steps=None, inner_optimizer="adam", batch_size=None, carry_state=True
                ),
                "images": ReptileDescent(
                    inner_lr=1e-3, num_inner_steps=8, inner_optimizer="adam", batch_size=10, carry_state=True
                ),
            },
        ),
        "anil": Entry("ANIL", "Raghu et al., 2020", _build(anil, of_problem=("head",)), InnerDescent, _FINN),
        "boil": Entry(
            "BOIL",
            "Oh et al., 2021",
            _build(boil, of_problem=("head", "where")),
            InnerDescent,
            {
                "sinusoid": _FINN["sinusoid"],
                "omniglot": InnerDescent(inner_lr=0.5),
                "images": InnerDescent(inner_lr=0.5),
            },
        ),
        "meta-sgd": Entry(
            "Meta-SGD",
            "Li et al., 2017",
            _meta_sgd,
            DrawnRates,
            {
                "sinusoid": DrawnRates(),
                "omniglot": DrawnRates(inner_lr=2.0),
                "images": DrawnRates(inner_lr=0.05),
            },
        ),
        "maml++": Entry(
            "MAML++",
            "Antoniou et al., 2019",
            _maml_plus_plus,
            MAMLPlusPlus,
            # One step for sinusoids, as the other methods: with five the rates grow until the inner loop diverges.
            {
                "sinusoid": MAMLPlusPlus(),
                "omniglot": MAMLPlusPlus(inner_lr=0.1, num_inner_steps=5),
                "images": MAMLPlusPlus(inner_lr=0.01, num_inner_steps=5, num_multi_step=7500),
            },
        ),
        "imaml": Entry(
            "iMAML",
            "Rajeswaran et al., 2019",
            _build(imaml, of_settings=("num_inner_steps", "strength", "num_cg_steps", "damping", "penalty_last")),
            ImplicitDescent,
            # Not for sinusoids: the meta-gradient does not see the inner steps, and nothing keeps them stable there.
            {"omniglot": ImplicitDescent(inner_lr=0.1, num_inner_steps=None)},
        ),
        "cavia": Entry(
            "CAVIA",
            "Zintgraf et al., 2019",
            _cavia,
            ContextDescent,
            {
                "sinusoid": ContextDescent(inner_lr=1.0),
                "omniglot": ContextDescent(inner_lr=1.0, num_inner_steps=2, num_context=100),
                "images": ContextDescent(inner_lr=1.0, num_inner_steps=2, num_context=100),
            },
        ),
        "meta-curvature": Entry(
            "Meta-Curvature",
            "Park and Oliva, 2019",
            _build(meta_curvature, of_settings=("inner_lr", "num_inner_steps"), has_rule=False),
            InnerDescent,
            _FINN,
        ),
        "meta-lstm": Entry(
            "meta-learner LSTM",
            "Ravi and Larochelle, 2017",
            _build(meta_lstm, of_settings=("num_inner_steps", "num_units"), has_rule=False),
            LearnedOptimizer,
            {"omniglot": LearnedOptimizer(), "images": LearnedOptimizer(num_inner_steps=None)},
        ),
        "pretrained": Entry(
            "pretrained on all tasks",
            "Finn et al., 2017",
            _build(pretrained),
            InnerDescent,
            {"sinusoid": _FINN["sinusoid"]},
        ),
        "mldg": Entry(
            "MLDG",
            "Li et al., 2018",
            _build(mldg, of_settings=("beta", "num_held_out", "inner_grad")),
            DomainSplits,
            # The rate is ours, for a small network from scratch.
            {"domains": DomainSplits(inner_lr=0.02)},
        ),
        "erm": Entry(
            "ERM on all source domains",
            "Li et al., 2018",
            _build(erm, of_problem=(), of_settings=(), has_rule=False),
            NoHyperparameters,
            {"domains": NoHyperparameters()},
        ),
        "protonets": _classifier("ProtoNets", "Snell et al., 2017", _build_classifier(protonets), NoHyperparameters),
        "matching": _classifier(
            "matching networks",
            "Vinyals et al., 2016",
            _build_classifier(matching_networks, "scale", "num_reads"),
            Matching,
        ),
        "r2d2": _classifier(
            "R2-D2",
            "Bertinetto et al., 2019",
            _build_classifier(r2d2, "strength", "learn_strength", "scale"),
            RidgeHead,
            photographs={"scale": 1e-4},
        ),
        "siamese": _classifier(
            "Siamese networks", "Koch et al., 2015", _build_classifier(siamese, takes_loss=False), NoHyperparameters
        ),
        "leo": _classifier(
            "LEO",
            "Rusu et al., 2019",
            _leo,
            LatentDescent,
        ),
        "mann": _classifier(
            "MANN",
            "Santoro et al., 2016",
            _build_classifier(mann, "num_units", "num_slots", "slot_size", "num_reads", "usage_decay"),
            ExternalMemory,
            any_way=False,
            photographs=None,
        ),
        "lstm": _classifier(
            "LSTM",
            "Santoro et al., 2016",
            _build_classifier(lstm, "num_units"),
            RecurrentUnits,
            any_way=False,
            photographs=None,
        ),
        "memory-module": _classifier(
            "memory module",
            "Kaiser et al., 2017",
            _build_classifier(memory_module, "key_size", "num_slots", "num_neighbours", "margin", takes_loss=False),
            NeighbourMemory,
            photographs=None,
        ),
        "neural-statistician": _classifier(
            "neural statistician", "Edwards and Storkey, 2017", _neural_statistician, SetStatistics, photographs=None
        ),
        "pretrained-classifier": _classifier(
            "pretrained on all classes", "Vinyals et al., 2016", _pretrained_classifier, PretrainedHead
        ),
    }
)
"""Every algorithm by the name that the command lines use."""
