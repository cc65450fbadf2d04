"""Losses and metrics: pure functions of outputs and targets."""

from maml_jax.losses.supervised import accuracy as accuracy
from maml_jax.losses.supervised import cross_entropy as cross_entropy
from maml_jax.losses.supervised import masked_cross_entropy as masked_cross_entropy
from maml_jax.losses.supervised import mean_squared_error as mean_squared_error
from maml_jax.losses.verification import cross_domain_triplet as cross_domain_triplet
from maml_jax.losses.verification import domain_alignment as domain_alignment
from maml_jax.losses.verification import hard_pair_attention as hard_pair_attention
from maml_jax.losses.verification import large_margin_cosine as large_margin_cosine
from maml_jax.losses.verification import soft_classification as soft_classification
from maml_jax.losses.verification import triplet as triplet

__all__ = [
    "accuracy",
    "cross_domain_triplet",
    "cross_entropy",
    "domain_alignment",
    "hard_pair_attention",
    "large_margin_cosine",
    "masked_cross_entropy",
    "mean_squared_error",
    "soft_classification",
    "triplet",
]
