import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classes import SIZE, WAY, draw_episode, embedding, identity, permuted
from jax.test_util import check_grads

from maml_jax import Matching, losses, matching_networks


def built(**arguments):
    return matching_networks(embedding, losses.cross_entropy, way=WAY, **arguments)


def predictions(learner, params, episode, key=None):
    task_params, _ = learner.adapt(params, episode.support, key=key)
    return learner.predict(task_params, episode.query.inputs)


def test_full_context_in_single_precision_where_double_is_the_default(x64):
    episode = draw_episode()
    inputs = episode.support.inputs.astype(jnp.float32)
    learner = matching_networks(identity, losses.cross_entropy, way=WAY, num_reads=1)
    params = learner.init(jax.random.key(0), inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(params["context"])} == {jnp.dtype(jnp.float32)}
    task_params, _ = learner.adapt(params, episode.support._replace(inputs=inputs))
    assert jnp.isfinite(learner.predict(task_params, inputs)).all()


@pytest.mark.parametrize("scale", [None, 3.0])
def test_probabilities_by_hand(x64, scale):
    episode = draw_episode()
    learner = matching_networks(identity, losses.cross_entropy, way=WAY, scale=scale)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    support, queries = np.asarray(episode.support.inputs), np.asarray(episode.query.inputs)
    expected = np.zeros((len(queries), WAY))
    for row, x in zip(expected, queries, strict=True):
        cosines = [x @ s / np.sqrt((x @ x) * (s @ s)) for s in support]
        attention = np.exp((scale or 1.0) * np.array(cosines))
        for weight, target in zip(attention / attention.sum(), episode.support.targets, strict=True):
            row[target] += weight
    chex.assert_trees_all_close(jnp.exp(predictions(learner, params, episode)), jnp.array(expected), rtol=1e-10)


def test_equal_embeddings_give_uniform_probabilities(x64):
    episode = draw_episode(shot=1)
    same = episode._replace(support=episode.support._replace(inputs=jnp.ones_like(episode.support.inputs)))
    learner = built()
    params = learner.init(jax.random.key(0), episode.support.inputs)
    chex.assert_trees_all_close(predictions(learner, params, same), jnp.full((9, WAY), -jnp.log(WAY)), rtol=1e-12)


def test_a_large_factor_gives_the_nearest_neighbour(x64):
    episode = draw_episode()
    learner = matching_networks(identity, losses.cross_entropy, way=WAY, scale=1e6)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    unit = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (episode.query.inputs, episode.support.inputs)]
    nearest = episode.support.targets[jnp.argmax(unit[0] @ unit[1].T, 1)]
    chex.assert_trees_all_close(
        jnp.exp(predictions(learner, params, episode)), jax.nn.one_hot(nearest, WAY, dtype=jnp.float64), atol=1e-9
    )


def test_plain_cosines_of_positive_embeddings_have_a_bound(x64):
    # Five support examples and cosines in [0, 1]: no probability exceeds e / (e + 4).
    episode = draw_episode(shot=1, way=5)
    positive = jax.tree.map(lambda x: jnp.eye(5) if x.ndim == 2 else x, episode.support)
    learner = matching_networks(identity, losses.cross_entropy, way=5, scale=None)
    task_params, _ = learner.adapt({"embedding": {}}, positive)
    largest = jnp.exp(learner.predict(task_params, jnp.eye(5))).max()
    assert largest == pytest.approx(np.e / (np.e + 4), rel=1e-9)


def test_the_order_matters_with_full_context_only(x64):
    episode = draw_episode()
    mixed = episode._replace(support=permuted(episode.support), key=None)
    episode = episode._replace(key=None)
    for num_reads, same in ((0, True), (2, False)):
        learner = built(num_reads=num_reads)
        params = learner.init(jax.random.key(0), episode.support.inputs)
        values = [float(learner.objective(params, e)[0]) for e in (episode, mixed)]
        assert (values[0] == pytest.approx(values[1], rel=1e-12)) == same


def test_the_key_draws_the_order_of_full_context(x64):
    episode, learner = draw_episode(), built(num_reads=2)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    orders = [predictions(learner, params, episode, key) for key in (None, jax.random.key(1), jax.random.key(2))]
    assert not np.allclose(orders[0], orders[1])
    assert not np.allclose(orders[1], orders[2])


@pytest.mark.parametrize("num_reads", [1, 3])
def test_full_context_by_hand(x64, num_reads):
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def lstm(params, hidden, cell, inputs):
        gates = np.concatenate([inputs, hidden]) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
        write, forget, new, output = np.split(gates, 4)
        cell = sigmoid(forget) * cell + sigmoid(write) * np.tanh(new)
        return sigmoid(output) * np.tanh(cell), cell

    def run(params, sequence):
        hidden, cell, outputs = np.zeros(SIZE), np.zeros(SIZE), []
        for inputs in sequence:
            hidden, cell = lstm(params, hidden, cell, inputs)
            outputs.append(hidden)
        return np.array(outputs)

    episode = draw_episode(shot=1, query_shot=1)
    learner = matching_networks(identity, losses.cross_entropy, way=WAY, num_reads=num_reads)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    support = np.asarray(episode.support.inputs)
    context = params["context"]
    embedded = support + run(context["forward"], support) + run(context["backward"], support[::-1])[::-1]
    expected = []
    for query in np.asarray(episode.query.inputs):
        hidden, cell = np.zeros(SIZE), np.zeros(SIZE)
        for _ in range(num_reads):
            attention = np.exp(embedded @ hidden)
            read = attention / attention.sum() @ embedded
            hidden, cell = lstm(context["query"], hidden, cell, np.concatenate([query, read]))
            hidden = hidden + query
        cosines = embedded @ hidden / np.linalg.norm(embedded, axis=1) / np.linalg.norm(hidden)
        expected.append(10 * cosines - np.log(np.exp(10 * cosines).sum()))
    chex.assert_trees_all_close(predictions(learner, params, episode), jnp.array(expected), rtol=1e-9)


@pytest.mark.parametrize("arguments", [{"scale": None}, {"scale": 5.0}, {"num_reads": 2}])
def test_finite_differences(x64, arguments):
    episode, learner = draw_episode(), built(**arguments)
    params = learner.init(jax.random.key(1), episode.support.inputs)
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"scale=-1\.0 must be a positive number"):
        Matching(scale=-1.0)
    with pytest.raises(ValueError, match="num_reads must be an integer of at least 0, got -1"):
        built(num_reads=-1)


def test_with_a_key_the_examples_keep_their_labels(x64):
    # Of all orders of the three support examples exactly one explains the outputs.
    episode, learner = draw_episode(shot=1), built(num_reads=1)
    params = learner.init(jax.random.key(0), episode.support.inputs)

    @jax.jit
    def outputs(support, key=None):
        return learner.predict(learner.adapt(params, support, key=key)[0], episode.query.inputs)

    orders = [np.array(order) for order in itertools.permutations(range(WAY))]
    possible = [outputs(jax.tree.map(lambda x, order=order: x[order], episode.support)) for order in orders]
    for seed in range(4):
        found = outputs(episode.support, jax.random.key(seed))
        assert sum(np.allclose(found, each, rtol=1e-9) for each in possible) == 1
