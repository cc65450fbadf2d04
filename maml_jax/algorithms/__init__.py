"""Meta-learning algorithms: one file, one builder, one paper. `CATALOGUE` lists them."""

from maml_jax.algorithms.anil import anil as anil
from maml_jax.algorithms.boil import boil as boil
from maml_jax.algorithms.catalogue import CATALOGUE as CATALOGUE
from maml_jax.algorithms.catalogue import Entry as Entry
from maml_jax.algorithms.catalogue import Problem as Problem
from maml_jax.algorithms.cavia import ContextDescent as ContextDescent
from maml_jax.algorithms.cavia import cavia as cavia
from maml_jax.algorithms.cavia import with_context as with_context
from maml_jax.algorithms.classifier import PretrainedHead as PretrainedHead
from maml_jax.algorithms.classifier import pretrained_classifier as pretrained_classifier
from maml_jax.algorithms.hypergradient import RunHyperparameters as RunHyperparameters
from maml_jax.algorithms.hypergradient import RunInfo as RunInfo
from maml_jax.algorithms.hypergradient import hypergradient as hypergradient
from maml_jax.algorithms.hypergradient import training_run as training_run
from maml_jax.algorithms.imaml import ImplicitDescent as ImplicitDescent
from maml_jax.algorithms.imaml import imaml as imaml
from maml_jax.algorithms.leo import LatentDescent as LatentDescent
from maml_jax.algorithms.leo import leo as leo
from maml_jax.algorithms.maml import InnerDescent as InnerDescent
from maml_jax.algorithms.maml import LearnedRates as LearnedRates
from maml_jax.algorithms.maml import fomaml as fomaml
from maml_jax.algorithms.maml import maml as maml
from maml_jax.algorithms.maml_plus_plus import MAMLPlusPlus as MAMLPlusPlus
from maml_jax.algorithms.maml_plus_plus import ensemble as ensemble
from maml_jax.algorithms.maml_plus_plus import maml_plus_plus as maml_plus_plus
from maml_jax.algorithms.maml_plus_plus import multi_step_weights as multi_step_weights
from maml_jax.algorithms.maml_plus_plus import switch_at as switch_at
from maml_jax.algorithms.mann import ExternalMemory as ExternalMemory
from maml_jax.algorithms.mann import RecurrentUnits as RecurrentUnits
from maml_jax.algorithms.mann import SequenceInfo as SequenceInfo
from maml_jax.algorithms.mann import lstm as lstm
from maml_jax.algorithms.mann import mann as mann
from maml_jax.algorithms.matching import Matching as Matching
from maml_jax.algorithms.matching import matching_networks as matching_networks
from maml_jax.algorithms.memory_module import NeighbourMemory as NeighbourMemory
from maml_jax.algorithms.memory_module import memory_module as memory_module
from maml_jax.algorithms.meta_curvature import meta_curvature as meta_curvature
from maml_jax.algorithms.meta_lstm import LearnedOptimizer as LearnedOptimizer
from maml_jax.algorithms.meta_lstm import meta_lstm as meta_lstm
from maml_jax.algorithms.meta_sgd import DrawnRates as DrawnRates
from maml_jax.algorithms.meta_sgd import meta_sgd as meta_sgd
from maml_jax.algorithms.mldg import DomainSplits as DomainSplits
from maml_jax.algorithms.mldg import NoHyperparameters as NoHyperparameters
from maml_jax.algorithms.mldg import erm as erm
from maml_jax.algorithms.mldg import mldg as mldg
from maml_jax.algorithms.pretrained import pretrained as pretrained
from maml_jax.algorithms.protonets import protonets as protonets
from maml_jax.algorithms.r2d2 import RidgeHead as RidgeHead
from maml_jax.algorithms.r2d2 import r2d2 as r2d2
from maml_jax.algorithms.reptile import ReptileDescent as ReptileDescent
from maml_jax.algorithms.reptile import replace_inner_state as replace_inner_state
from maml_jax.algorithms.reptile import reptile as reptile
from maml_jax.algorithms.siamese import siamese as siamese
from maml_jax.algorithms.statistician import SetStatistics as SetStatistics
from maml_jax.algorithms.statistician import neural_statistician as neural_statistician

__all__ = [
    "CATALOGUE",
    "ContextDescent",
    "DomainSplits",
    "DrawnRates",
    "Entry",
    "ExternalMemory",
    "ImplicitDescent",
    "InnerDescent",
    "LatentDescent",
    "LearnedOptimizer",
    "LearnedRates",
    "MAMLPlusPlus",
    "Matching",
    "NeighbourMemory",
    "NoHyperparameters",
    "PretrainedHead",
    "Problem",
    "RecurrentUnits",
    "ReptileDescent",
    "RidgeHead",
    "RunHyperparameters",
    "RunInfo",
    "SequenceInfo",
    "SetStatistics",
    "anil",
    "boil",
    "cavia",
    "ensemble",
    "erm",
    "fomaml",
    "hypergradient",
    "imaml",
    "leo",
    "lstm",
    "maml",
    "maml_plus_plus",
    "mann",
    "matching_networks",
    "memory_module",
    "meta_curvature",
    "meta_lstm",
    "meta_sgd",
    "mldg",
    "multi_step_weights",
    "neural_statistician",
    "pretrained",
    "pretrained_classifier",
    "protonets",
    "r2d2",
    "replace_inner_state",
    "reptile",
    "siamese",
    "switch_at",
    "training_run",
    "with_context",
]
