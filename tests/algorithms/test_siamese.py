import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classes import WAY, draw_episode, embedding, permuted
from jax.test_util import check_grads

from maml_jax import siamese


@pytest.fixture
def drawn(x64):
    episode, learner = draw_episode(), siamese(embedding, way=WAY)
    params = learner.init(jax.random.key(1), episode.support.inputs)
    weights = jax.random.normal(jax.random.key(2), params["weights"].shape, jnp.float64)
    return learner, params | {"weights": weights, "offset": jnp.asarray(0.3, jnp.float64)}, episode


def logit(params, a, b):
    return float(np.abs(a - b) @ params["weights"] + params["offset"])


def test_the_loss_by_hand(drawn):
    learner, params, episode = drawn
    both = [np.concatenate(leaves) for leaves in zip(episode.support, episode.query, strict=True)]
    features = np.asarray(embedding.apply(params["embedding"], both[0]))
    losses = {True: [], False: []}
    for i, j in itertools.combinations(range(len(features)), 2):
        is_same = bool(both[1][i] == both[1][j])
        value = logit(params, features[i], features[j])
        losses[is_same].append(np.log1p(np.exp(-value if is_same else value)))
    expected = (np.mean(losses[True]) + np.mean(losses[False])) / 2
    assert len(losses[True]) != len(losses[False])
    assert learner.objective(params, episode)[0] == pytest.approx(expected, rel=1e-10)


def test_labels_that_are_no_indices_are_refused(drawn):
    learner, params, episode = drawn
    one_hot = episode._replace(
        support=episode.support._replace(targets=jax.nn.one_hot(episode.support.targets, WAY)),
        query=episode.query._replace(targets=jax.nn.one_hot(episode.query.targets, WAY)),
    )
    with pytest.raises(ValueError, match=r"must be integer class indices .* pass targets\.argmax"):
        learner.objective(params, one_hot)


def test_a_class_has_the_mean_logit_of_its_pairs(drawn):
    learner, params, episode = drawn
    task_params, _ = learner.adapt(params, episode.support)
    outputs = learner.predict(task_params, episode.query.inputs)
    support, query = (np.asarray(embedding.apply(params["embedding"], batch.inputs)) for batch in episode[:2])
    for m, n in itertools.product(range(len(query)), range(WAY)):
        pairs = [logit(params, query[m], s) for s, t in zip(support, episode.support.targets, strict=True) if t == n]
        assert outputs[m, n] == pytest.approx(np.mean(pairs), rel=1e-10)


def test_the_order_of_the_support_set_does_not_matter(drawn):
    learner, params, episode = drawn
    mixed = episode._replace(support=permuted(episode.support))
    chex.assert_trees_all_close(learner.objective(params, mixed)[0], learner.objective(params, episode)[0], rtol=1e-12)


def test_one_example_of_each_class_makes_no_equal_pair_and_no_nan(drawn):
    learner, params, _ = drawn
    episode = draw_episode(shot=1)
    alone = episode._replace(query=jax.tree.map(lambda x: x[:0], episode.query))
    features = np.asarray(embedding.apply(params["embedding"], alone.support.inputs))
    unequal = [np.log1p(np.exp(logit(params, a, b))) for a, b in itertools.combinations(features, 2)]
    # A kind without a pair counts as zero: half of the mean over the other one is left.
    assert learner.objective(params, alone)[0] == pytest.approx(np.mean(unequal) / 2, rel=1e-10)


def test_finite_differences(drawn):
    learner, params, episode = drawn
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


def test_at_the_start_a_larger_distance_is_a_smaller_logit(x64):
    # -8 in all and 2: the mean of |a - b| in [0, 1] then decides between logits of 2 and -6.
    params = siamese(embedding, way=WAY).init(jax.random.key(0), draw_episode().support.inputs)
    size = len(params["weights"])
    chex.assert_trees_all_close(params["weights"], jnp.full(size, -8.0 / size))
    assert params["offset"] == 2.0
