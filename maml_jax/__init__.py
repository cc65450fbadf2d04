"""maml_jax: functional learning to learn in JAX, with exact meta-gradients of pure functions."""

from maml_jax import checkpoint as checkpoint
from maml_jax import cost as cost
from maml_jax import losses as losses
from maml_jax import models as models
from maml_jax import parallel as parallel
from maml_jax import portable as portable
from maml_jax import processes as processes
from maml_jax import rl as rl
from maml_jax import tasks as tasks
from maml_jax._version import __version__ as __version__
from maml_jax.algorithms import CATALOGUE as CATALOGUE
from maml_jax.algorithms import ContextDescent as ContextDescent
from maml_jax.algorithms import DomainSplits as DomainSplits
from maml_jax.algorithms import DrawnRates as DrawnRates
from maml_jax.algorithms import Entry as Entry
from maml_jax.algorithms import ExternalMemory as ExternalMemory
from maml_jax.algorithms import ImplicitDescent as ImplicitDescent
from maml_jax.algorithms import InnerDescent as InnerDescent
from maml_jax.algorithms import LatentDescent as LatentDescent
from maml_jax.algorithms import LearnedOptimizer as LearnedOptimizer
from maml_jax.algorithms import LearnedRates as LearnedRates
from maml_jax.algorithms import MAMLPlusPlus as MAMLPlusPlus
from maml_jax.algorithms import Matching as Matching
from maml_jax.algorithms import NeighbourMemory as NeighbourMemory
from maml_jax.algorithms import NoHyperparameters as NoHyperparameters
from maml_jax.algorithms import PretrainedHead as PretrainedHead
from maml_jax.algorithms import Problem as Problem
from maml_jax.algorithms import RecurrentUnits as RecurrentUnits
from maml_jax.algorithms import ReptileDescent as ReptileDescent
from maml_jax.algorithms import RidgeHead as RidgeHead
from maml_jax.algorithms import RunHyperparameters as RunHyperparameters
from maml_jax.algorithms import RunInfo as RunInfo
from maml_jax.algorithms import SequenceInfo as SequenceInfo
from maml_jax.algorithms import SetStatistics as SetStatistics
from maml_jax.algorithms import anil as anil
from maml_jax.algorithms import boil as boil
from maml_jax.algorithms import cavia as cavia
from maml_jax.algorithms import ensemble as ensemble
from maml_jax.algorithms import erm as erm
from maml_jax.algorithms import fomaml as fomaml
from maml_jax.algorithms import hypergradient as hypergradient
from maml_jax.algorithms import imaml as imaml
from maml_jax.algorithms import leo as leo
from maml_jax.algorithms import lstm as lstm
from maml_jax.algorithms import maml as maml
from maml_jax.algorithms import maml_plus_plus as maml_plus_plus
from maml_jax.algorithms import mann as mann
from maml_jax.algorithms import matching_networks as matching_networks
from maml_jax.algorithms import memory_module as memory_module
from maml_jax.algorithms import meta_curvature as meta_curvature
from maml_jax.algorithms import meta_lstm as meta_lstm
from maml_jax.algorithms import meta_sgd as meta_sgd
from maml_jax.algorithms import mldg as mldg
from maml_jax.algorithms import multi_step_weights as multi_step_weights
from maml_jax.algorithms import neural_statistician as neural_statistician
from maml_jax.algorithms import pretrained as pretrained
from maml_jax.algorithms import pretrained_classifier as pretrained_classifier
from maml_jax.algorithms import protonets as protonets
from maml_jax.algorithms import r2d2 as r2d2
from maml_jax.algorithms import replace_inner_state as replace_inner_state
from maml_jax.algorithms import reptile as reptile
from maml_jax.algorithms import siamese as siamese
from maml_jax.algorithms import switch_at as switch_at
from maml_jax.algorithms import training_run as training_run
from maml_jax.algorithms import with_context as with_context
from maml_jax.evaluate import evaluate as evaluate
from maml_jax.evaluate import evaluate_objective as evaluate_objective
from maml_jax.inner import check_inner_grad as check_inner_grad
from maml_jax.inner import checkpointed as checkpointed
from maml_jax.inner import first_order as first_order
from maml_jax.inner import gradient_based as gradient_based
from maml_jax.inner import inner_loop as inner_loop
from maml_jax.inner import mixed_mode as mixed_mode
from maml_jax.inner import proximal_solution as proximal_solution
from maml_jax.outer import OuterRule as OuterRule
from maml_jax.outer import gradient_step as gradient_step
from maml_jax.outer import init_meta_state as init_meta_state
from maml_jax.outer import make_meta_step as make_meta_step
from maml_jax.outer import make_train_loop as make_train_loop
from maml_jax.outer import pmap_meta_step as pmap_meta_step
from maml_jax.portable import LearnerConfig as LearnerConfig
from maml_jax.portable import classify as classify
from maml_jax.portable import load_learner as load_learner
from maml_jax.portable import save_learner as save_learner
from maml_jax.types import Batch as Batch
from maml_jax.types import Environment as Environment
from maml_jax.types import Episode as Episode
from maml_jax.types import Evaluation as Evaluation
from maml_jax.types import InnerInfo as InnerInfo
from maml_jax.types import MetaInfo as MetaInfo
from maml_jax.types import MetaLearner as MetaLearner
from maml_jax.types import MetaState as MetaState
from maml_jax.types import Model as Model

__all__ = [
    "CATALOGUE",
    "Batch",
    "ContextDescent",
    "DomainSplits",
    "DrawnRates",
    "Entry",
    "Environment",
    "Episode",
    "Evaluation",
    "ExternalMemory",
    "ImplicitDescent",
    "InnerDescent",
    "InnerInfo",
    "LatentDescent",
    "LearnedOptimizer",
    "LearnedRates",
    "LearnerConfig",
    "MAMLPlusPlus",
    "Matching",
    "MetaInfo",
    "MetaLearner",
    "MetaState",
    "Model",
    "NeighbourMemory",
    "NoHyperparameters",
    "OuterRule",
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
    "check_inner_grad",
    "checkpoint",
    "checkpointed",
    "classify",
    "cost",
    "ensemble",
    "erm",
    "evaluate",
    "evaluate_objective",
    "first_order",
    "fomaml",
    "gradient_based",
    "gradient_step",
    "hypergradient",
    "imaml",
    "init_meta_state",
    "inner_loop",
    "leo",
    "load_learner",
    "losses",
    "lstm",
    "make_meta_step",
    "make_train_loop",
    "maml",
    "maml_plus_plus",
    "mann",
    "matching_networks",
    "memory_module",
    "meta_curvature",
    "meta_lstm",
    "meta_sgd",
    "mixed_mode",
    "mldg",
    "models",
    "multi_step_weights",
    "neural_statistician",
    "parallel",
    "pmap_meta_step",
    "portable",
    "pretrained",
    "pretrained_classifier",
    "processes",
    "protonets",
    "proximal_solution",
    "r2d2",
    "replace_inner_state",
    "reptile",
    "rl",
    "save_learner",
    "siamese",
    "switch_at",
    "tasks",
    "training_run",
    "with_context",
]
