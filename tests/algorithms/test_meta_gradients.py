"""The meta-gradient of every algorithm of the catalogue: finite differences, and mixed against reverse mode.

The network is smooth and has a normalisation, and all numbers are float64. Closed forms are in the files of the
algorithms.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads

from maml_jax import (
    CATALOGUE,
    Batch,
    Episode,
    Problem,
    anil,
    boil,
    cavia,
    losses,
    maml,
    maml_plus_plus,
    meta_curvature,
    meta_sgd,
    mixed_mode,
    mldg,
    models,
    with_context,
)
from maml_jax.types import learner_at

WAY, NUM_DOMAINS = 3, 3
NETWORK = models.mlp(features=(5, WAY), activation=jnp.tanh, norm=models.BatchStatNorm)
SMALL = {
    "num_inner_steps": 2,
    "num_context": 2,
    "num_classes": WAY,
    "num_units": 4,
    "num_slots": 6,
    "slot_size": 3,
    "num_reads": 1,
    "num_latent": 2,
    "num_latent_steps": 1,
    "num_finetuning_steps": 1,
    "num_hidden": 4,
    "train_embedding": True,
}
ELSEWHERE = {
    "fomaml": "its gradient leaves a part of the derivative out; see the test below",
    "reptile": "θ − φ is defined to be its gradient; see the test below",
    "imaml": "its gradient is exact only where the inner problem is solved, as in its own file",
    "meta-lstm": "the inner gradients that it reads are constants to its derivative; see its own file",
    "memory-module": "it picks neighbours, so its loss jumps; see its own file",
}
"""Algorithms whose gradient is not the derivative of their loss at any point."""


def is_norm(name):
    return "norm" in name


def is_head(name):
    return name.startswith("dense_1")


def built(name):
    entry = CATALOGUE[name]
    known = {name for name in entry.hyperparameters.__dataclass_fields__ if name in SMALL}
    settings = {name: SMALL[name] for name in known}
    if name == "pretrained-classifier":
        settings["head"] = "linear"
    problem = Problem(NETWORK, losses.cross_entropy, head=is_head, norm=is_norm, embedding=NETWORK, way=WAY)
    return learner_at(entry.build(problem, entry.hyperparameters(**settings)), jnp.int32(0))


def episode_of(*, domains=False, seed=0):
    support_key, query_key, key = jax.random.split(jax.random.key(seed), 3)
    targets = jnp.tile(jnp.arange(WAY), 2)
    shape = (NUM_DOMAINS, len(targets)) if domains else (len(targets),)
    support = Batch(jax.random.normal(support_key, (*shape, 4)), jnp.broadcast_to(targets, shape))
    return Episode(support, Batch(jax.random.normal(query_key, (len(targets), 4)), targets), key)


def start(learner, episode):
    """Meta-parameters that are not where anything is zero or equal."""
    meta_params = learner.init(jax.random.key(7), episode.support.inputs)
    leaves, structure = jax.tree.flatten(meta_params)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    moved = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in ELSEWHERE])
def test_the_meta_gradient_agrees_with_finite_differences(name, x64):
    learner, episode = built(name), episode_of(domains="domains" in CATALOGUE[name].settings)
    loss = jax.jit(lambda meta_params: learner.objective(meta_params, episode)[0])
    check_grads(loss, (start(learner, episode),), order=1, modes=["rev"], rtol=1e-6, eps=1e-5)


@pytest.mark.parametrize("name", ["fomaml", "reptile"])
def test_without_derivatives_of_the_inner_loop_it_is_the_gradient_beside_a_fixed_adaptation(name, x64):
    # FOMAML: φ_K = θ + c with c constant, so the gradient is that of L_Q(θ + c).
    # Reptile: that of ½‖θ − φ_K‖² with φ_K constant.
    learner, episode = built(name), episode_of()
    theta = start(learner, episode)
    adapted, _ = learner.adapt(theta, episode.support)
    change = jax.tree.map(jnp.subtract, adapted, theta)

    def loss(params):
        if name == "reptile":
            return 0.5 * optax.tree.norm(jax.tree.map(jnp.subtract, params, adapted), squared=True)
        outputs = learner.predict(jax.tree.map(jnp.add, params, change), episode.query.inputs)
        return losses.cross_entropy(outputs, episode.query.targets)

    check_grads(jax.jit(loss), (theta,), order=1, modes=["rev"], rtol=1e-6, eps=1e-5)
    found, _ = jax.grad(learner.objective, has_aux=True)(theta, episode)
    chex.assert_trees_all_close(found, jax.grad(loss)(theta), rtol=1e-10, atol=1e-12)


DESCENT = {"inner_optimizer": optax.sgd(0.3), "num_inner_steps": 3}
RATES = {"inner_lr": 0.3, "num_inner_steps": 3}
MODE_MATTERS = {
    "maml": functools.partial(maml, **DESCENT),
    "maml with Adam": functools.partial(maml, inner_optimizer=optax.adam(0.1, eps_root=1e-8), num_inner_steps=3),
    "anil": functools.partial(anil, head=is_head, **DESCENT),
    "boil": functools.partial(boil, head=is_head, **DESCENT),
    "meta-sgd": functools.partial(meta_sgd, **RATES),
    "meta-curvature": functools.partial(meta_curvature, **RATES),
    "maml++: rates": functools.partial(maml_plus_plus, **RATES),
    "maml++: weights of the steps": functools.partial(
        maml_plus_plus, **RATES, learn_rates=False, step_weights=jnp.array([0.2, 0.3, 0.5])
    ),
    "maml++: parameters of the steps": functools.partial(maml_plus_plus, **RATES, learn_rates=False, per_step=is_norm),
    "maml++: everything": functools.partial(
        maml_plus_plus, **RATES, step_weights=jnp.array([0.2, 0.3, 0.5]), per_step=is_norm
    ),
    "mldg": functools.partial(mldg, inner_optimizer=optax.sgd(0.3)),
}


@pytest.mark.parametrize("name", [*MODE_MATTERS, "cavia"])
def test_mixed_mode_equals_reverse_over_reverse(name, x64):
    network, builder = NETWORK, MODE_MATTERS.get(name)
    if name == "cavia":  # a normalisation after the first layer would take its context out again
        network = with_context(models.mlp(features=(5, WAY), activation=jnp.tanh))
        builder = functools.partial(cavia, num_context=2, **DESCENT)
    episode = episode_of(domains=name == "mldg")
    learners = [builder(network, losses.cross_entropy, inner_grad=grad) for grad in (mixed_mode, jax.value_and_grad)]
    meta_params = start(learners[0], episode)
    mixed, reverse = (jax.jit(jax.grad(each.objective, has_aux=True))(meta_params, episode)[0] for each in learners)
    chex.assert_trees_all_close(mixed, reverse, rtol=1e-9, atol=1e-12)
    assert optax.tree.norm(mixed) > 0
