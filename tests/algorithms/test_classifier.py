import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from classes import WAY, draw_episode, embedding, permuted
from jax.test_util import check_grads

from maml_jax import Episode, Model, PretrainedHead, losses, pretrained_classifier

NUM_CLASSES = 7


def built(head="centroid", num_inner_steps=3, network=embedding, rate=0.5, **arguments):
    return pretrained_classifier(
        network,
        losses.cross_entropy,
        num_classes=NUM_CLASSES,
        way=WAY,
        head=head,
        inner_optimizer=optax.sgd(rate),
        num_inner_steps=num_inner_steps,
        **arguments,
    )


@pytest.fixture
def drawn(x64):
    episode = draw_episode()
    return built().init(jax.random.key(1), episode.support.inputs), episode


def outputs(head, params, episode):
    learner = built(head)
    return learner.predict(learner.adapt(params, episode.support)[0], episode.query.inputs)


def test_the_objective_is_the_loss_on_all_training_classes(drawn):
    params, episode = drawn
    logits = embedding.apply(params["embedding"], episode.support.inputs) @ params["kernel"] + params["bias"][None]
    batch = episode._replace(query=jax.tree.map(lambda x: x[:0], episode.query))
    chex.assert_shape(logits, (6, NUM_CLASSES))
    expected = losses.cross_entropy(logits, episode.support.targets)
    chex.assert_trees_all_close(built().objective(params, batch)[0], expected, rtol=1e-12)
    # Both sets are training examples alike: one example of the support set may as well be a query.
    moved = Episode(*(jax.tree.map(lambda x, part=part: x[part], episode.support) for part in (slice(5), slice(5, 6))))
    chex.assert_trees_all_close(built().objective(params, moved)[0], expected, rtol=1e-12)


def test_neighbours_and_centroids_by_hand(drawn):
    params, episode = drawn

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    support, query = (unit(np.asarray(embedding.apply(params["embedding"], b.inputs))) for b in episode[:2])
    targets = np.asarray(episode.support.targets)
    nearest = np.stack([(query @ support[targets == n].T).max(1) for n in range(WAY)], 1)
    centres = unit(np.stack([support[targets == n].mean(0) for n in range(WAY)]))
    chex.assert_trees_all_close(outputs("neighbour", params, episode), jnp.array(nearest), rtol=1e-9)
    chex.assert_trees_all_close(outputs("centroid", params, episode), jnp.array(query @ centres.T), rtol=1e-9)


def test_a_new_last_layer_by_hand(drawn):
    # Softmax regression from zero by gradient descent; the features stay.
    params, episode = drawn
    support, query = (np.asarray(embedding.apply(params["embedding"], b.inputs)) for b in episode[:2])
    one_hot = np.eye(WAY)[np.asarray(episode.support.targets)]
    kernel, bias = np.zeros((support.shape[1], WAY)), np.zeros(WAY)
    for _ in range(3):
        scores = np.exp(support @ kernel + bias)
        residual = (scores / scores.sum(1, keepdims=True) - one_hot) / len(one_hot)
        kernel, bias = kernel - 0.5 * support.T @ residual, bias - 0.5 * residual.sum(0)
    chex.assert_trees_all_close(outputs("linear", params, episode), jnp.array(query @ kernel + bias), rtol=1e-9)
    task_params, info = built("linear").adapt(params, episode.support)
    chex.assert_trees_all_equal(task_params["embedding"], params["embedding"])
    assert info.support_loss[0] == pytest.approx(np.log(WAY), rel=1e-9)


def test_fine_tuning_changes_all_layers_from_the_second_step_on(drawn):
    # The new layer is zero at first, so the gradient of the features is zero in the first step.
    params, episode = drawn
    one, two = (built("fine-tuned", num_inner_steps=k).adapt(params, episode.support)[0] for k in (1, 2))
    chex.assert_trees_all_equal(one["embedding"], params["embedding"])
    for before, after in zip(*map(jax.tree.leaves, (params["embedding"], two["embedding"])), strict=True):
        assert jnp.all(before != after)
    frozen = built("linear", num_inner_steps=1).adapt(params, episode.support)[0]
    chex.assert_trees_all_close(one["kernel"], frozen["kernel"], rtol=1e-12)


@pytest.mark.parametrize("head", ["neighbour", "centroid", "linear", "fine-tuned"])
def test_the_old_head_and_the_order_of_the_support_set_do_not_matter(drawn, head):
    params, episode = drawn
    expected = outputs(head, params, episode)
    other = params | {"kernel": params["kernel"] + 1.0, "bias": params["bias"] - 2.0}
    mixed = episode._replace(support=permuted(episode.support))
    chex.assert_trees_all_close(outputs(head, other, mixed), expected, rtol=1e-9, atol=1e-12)


def test_finite_differences(drawn):
    params, episode = drawn
    check_grads(jax.jit(lambda params: built().objective(params, episode)[0]), (params,), order=1, modes=["rev"])


def test_fine_tuning_has_a_rate_and_steps_of_its_own():
    for head, expected in (("linear", 0.5), ("fine-tuned", 0.25)):
        rule = PretrainedHead(head=head, inner_lr=0.5, finetuning_lr=0.25).rule()
        updates, _ = rule.update(jnp.ones(1), rule.init(jnp.ones(1)))
        chex.assert_trees_all_close(updates, jnp.array([-expected]))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="head='svm' is unknown; choose one of neighbour, centroid, linear"):
        built("svm")
    with pytest.raises(ValueError, match="inner_optimizer must be an optax transformation"):
        pretrained_classifier(embedding, losses.cross_entropy, num_classes=3, way=3, head="linear")
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        PretrainedHead(num_classes=0)


def test_the_rule_of_a_new_layer_has_momentum():
    for head, rate in (("linear", 0.5), ("fine-tuned", 0.25)):
        rule = PretrainedHead(head=head, inner_lr=0.5, finetuning_lr=0.25).rule()
        state = rule.init(jnp.ones(1))
        for expected in (rate, 1.9 * rate):
            updates, state = rule.update(jnp.ones(1), state)
            chex.assert_trees_all_close(updates, jnp.array([-expected]), rtol=1e-6)


@pytest.mark.parametrize("head", ["neighbour", "centroid", "linear", "fine-tuned"])
def test_the_key_of_an_adaptation_reaches_the_embedding(drawn, head):
    def apply(params, inputs, *, key=None):
        embedded = embedding.apply(params, inputs)
        return embedded if key is None else embedded * jax.random.uniform(key, embedded.shape)

    params, episode = drawn
    learner = built(head, num_inner_steps=2, network=Model(embedding.init, apply, stochastic=True), rate=0.1)
    scores = [
        learner.predict(learner.adapt(params, episode.support, key=key)[0], episode.query.inputs)
        for key in (None, jax.random.key(1), jax.random.key(2))
    ]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.combinations(scores, 2))


def test_every_step_of_fine_tuning_has_a_key_of_its_own(drawn):
    used = set()

    def apply(params, inputs, *, key=None):
        if key is not None:
            jax.debug.callback(lambda data: used.add(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return embedding.apply(params, inputs)

    params, episode = drawn
    learner = built("fine-tuned", num_inner_steps=5, network=Model(embedding.init, apply, stochastic=True), rate=0.1)
    jax.block_until_ready(learner.adapt(params, episode.support, key=jax.random.key(1))[0])
    jax.effects_barrier()
    assert len(used) == 5
