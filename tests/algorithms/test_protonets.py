import chex
import jax
import jax.numpy as jnp
import pytest
from classes import WAY, draw_episode, embedding, identity
from jax.test_util import check_grads

from maml_jax import losses, protonets


@pytest.fixture
def drawn(x64):
    episode = draw_episode()
    learner = protonets(embedding, losses.cross_entropy, way=WAY)
    return learner, learner.init(jax.random.key(1), episode.support.inputs), episode


def test_it_is_a_linear_classifier(drawn):
    # -|x - c|² = 2 c·x - c·c - x·x, and the last term is the same for all classes.
    learner, params, episode = drawn
    task_params, _ = learner.adapt(params, episode.support)
    features = embedding.apply(params, episode.query.inputs)
    centres = jnp.stack(
        [embedding.apply(params, episode.support.inputs[episode.support.targets == n]).mean(0) for n in range(WAY)]
    )
    linear = features @ (2 * centres.T) - jnp.sum(centres**2, 1)[None]
    chex.assert_trees_all_close(
        jax.nn.log_softmax(learner.predict(task_params, episode.query.inputs)), jax.nn.log_softmax(linear), rtol=1e-12
    )
    value, _ = learner.objective(params, episode)
    chex.assert_trees_all_close(value, losses.cross_entropy(linear, episode.query.targets), rtol=1e-12)


def test_the_distance_is_squared_and_not_divided_by_the_size(x64):
    episode = draw_episode(shot=1)
    learner = protonets(identity, losses.cross_entropy, way=WAY)
    task_params, _ = learner.adapt({}, episode.support)
    by_hand = [
        [-sum((float(a) - float(b)) ** 2 for a, b in zip(x, c, strict=True)) for c in episode.support.inputs]
        for x in episode.query.inputs
    ]
    chex.assert_trees_all_close(learner.predict(task_params, episode.query.inputs), jnp.array(by_hand), rtol=1e-12)


def test_classes_of_unequal_size_have_their_own_mean(x64):
    episode = draw_episode(shot=2)
    kept = jax.tree.map(lambda x: x[:4], episode.support)  # the classes 0, 1, 2, 0
    task_params, _ = protonets(identity, losses.cross_entropy, way=WAY).adapt({}, kept)
    expected = jnp.stack([(kept.inputs[0] + kept.inputs[3]) / 2, kept.inputs[1], kept.inputs[2]])
    chex.assert_trees_all_close(task_params["prototypes"], expected, rtol=1e-12)


def test_parameters_do_not_depend_on_the_way(drawn):
    _, params, _ = drawn
    learner, episode = protonets(embedding, losses.cross_entropy, way=5), draw_episode(way=5)
    task_params, _ = learner.adapt(params, episode.support)
    chex.assert_shape(learner.predict(task_params, episode.query.inputs), (15, 5))


def test_finite_differences(drawn):
    learner, params, episode = drawn
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


@pytest.mark.parametrize("way", [0, 2.5, True])
def test_a_wrong_way_is_refused(way):
    with pytest.raises(ValueError, match=f"way must be an integer of at least 1, got {way}"):
        protonets(embedding, losses.cross_entropy, way=way)
