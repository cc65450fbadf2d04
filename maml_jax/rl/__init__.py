"""Reinforcement learning: a task is a Markov decision process, and a policy adapts to it from what it has tried."""

from maml_jax.rl.advantages import AdvantageFn as AdvantageFn
from maml_jax.rl.advantages import Trajectories as Trajectories
from maml_jax.rl.advantages import discounted_returns as discounted_returns
from maml_jax.rl.advantages import generalised_advantages as generalised_advantages
from maml_jax.rl.advantages import linear_advantages as linear_advantages
from maml_jax.rl.advantages import linear_baseline as linear_baseline
from maml_jax.rl.distributions import Categorical as Categorical
from maml_jax.rl.distributions import Normal as Normal
from maml_jax.rl.environments import from_gymnax as from_gymnax
from maml_jax.rl.maml_policy import maml_policy as maml_policy
from maml_jax.rl.meta_policy import PolicyInfo as PolicyInfo
from maml_jax.rl.meta_policy import clipped_epochs as clipped_epochs
from maml_jax.rl.meta_policy import meta_policy as meta_policy
from maml_jax.rl.meta_policy import trust_region as trust_region
from maml_jax.rl.policies import categorical_policy as categorical_policy
from maml_jax.rl.policies import normal_policy as normal_policy
from maml_jax.rl.policies import scaled_start as scaled_start
from maml_jax.rl.rollout import collect as collect
from maml_jax.rl.rollout import make_sampler as make_sampler
from maml_jax.rl.rollout import mean_return as mean_return
from maml_jax.rl.rollout import returns_of as returns_of
from maml_jax.rl.rollout import rollout as rollout
from maml_jax.rl.surrogates import Transition as Transition
from maml_jax.rl.surrogates import clipped_surrogate as clipped_surrogate
from maml_jax.rl.surrogates import loaded_dice as loaded_dice
from maml_jax.rl.surrogates import policy_gradient as policy_gradient
from maml_jax.rl.surrogates import ratio_surrogate as ratio_surrogate
from maml_jax.rl.trials import RecurrentPolicy as RecurrentPolicy
from maml_jax.rl.trials import Trial as Trial
from maml_jax.rl.trials import TrialInfo as TrialInfo
from maml_jax.rl.trials import TrialTargets as TrialTargets
from maml_jax.rl.trials import associative_policy as associative_policy
from maml_jax.rl.trials import gru_policy as gru_policy
from maml_jax.rl.trials import make_trial_sampler as make_trial_sampler
from maml_jax.rl.trials import rl2 as rl2
from maml_jax.rl.trials import run_trial as run_trial
from maml_jax.rl.trials import standardise_advantages as standardise_advantages

__all__ = [
    "AdvantageFn",
    "Categorical",
    "Normal",
    "PolicyInfo",
    "RecurrentPolicy",
    "Trajectories",
    "Transition",
    "Trial",
    "TrialInfo",
    "TrialTargets",
    "associative_policy",
    "categorical_policy",
    "clipped_epochs",
    "clipped_surrogate",
    "collect",
    "discounted_returns",
    "from_gymnax",
    "generalised_advantages",
    "gru_policy",
    "linear_advantages",
    "linear_baseline",
    "loaded_dice",
    "make_sampler",
    "make_trial_sampler",
    "maml_policy",
    "mean_return",
    "meta_policy",
    "normal_policy",
    "policy_gradient",
    "ratio_surrogate",
    "returns_of",
    "rl2",
    "rollout",
    "run_trial",
    "scaled_start",
    "standardise_advantages",
    "trust_region",
]
