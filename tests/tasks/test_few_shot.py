"""Images whose pixels tell class, example and place show exactly what a sampler did."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maml_jax.tasks.few_shot import make_sampler

CLASSES, EXAMPLES, SIZE = 7, 5, 3
PLACES = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)


def telling_images(classes=CLASSES, examples=EXAMPLES):
    """uint8 [C, n, 3, 3, 3]; the channels are the class, the example and the place of the pixel."""
    images = np.zeros((classes, examples, SIZE, SIZE, 3), np.uint8)
    images[..., 0] = np.arange(classes)[:, None, None, None]
    images[..., 1] = np.arange(examples)[:, None, None]
    images[..., 2] = PLACES
    return images


def told(batch):
    """Classes [..., S], examples [..., S] and places [..., S, 3, 3] of a batch, or of a meta-batch."""
    pixels = np.asarray(batch.inputs * 255).round().astype(int)
    return pixels[..., 0, 0, 0], pixels[..., 0, 0, 1], pixels[..., 2]


def sample_many(sample_episode, seed, count):
    return jax.jit(jax.vmap(sample_episode))(jax.random.split(jax.random.key(seed), count))


@st.composite
def geometries(draw):
    shot = draw(st.integers(1, EXAMPLES - 1))
    return draw(st.integers(1, CLASSES)), shot, draw(st.integers(1, EXAMPLES - shot))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(geometry=geometries(), seed=st.integers(0, 2**32 - 1))
def test_an_episode_has_distinct_classes_and_distinct_examples(geometry, seed):
    way, shot, query_shot = geometry
    sample_episode = make_sampler(telling_images(), way=way, shot=shot, query_shot=query_shot)
    episode = jax.jit(sample_episode)(jax.random.key(seed))
    chex.assert_shape(episode.support.inputs, (way * shot, SIZE, SIZE, 3))
    chex.assert_shape(episode.query.inputs, (way * query_shot, SIZE, SIZE, 3))
    classes_of_label = {}
    seen = []
    for batch, per_class in ((episode.support, shot), (episode.query, query_shot)):
        np.testing.assert_array_equal(batch.targets, np.repeat(np.arange(way), per_class))
        classes, examples, places = told(batch)
        for label, character in zip(batch.targets.tolist(), classes.tolist(), strict=True):
            classes_of_label.setdefault(label, set()).add(character)
        seen += zip(classes.tolist(), examples.tolist(), strict=True)
        np.testing.assert_array_equal(places, np.broadcast_to(PLACES, places.shape))
    assert all(len(classes) == 1 for classes in classes_of_label.values())
    assert len(set.union(*classes_of_label.values())) == way
    assert len(set(seen)) == way * (shot + query_shot), "an example was drawn twice"


def test_inputs_are_pixels_in_units_of_white():
    images = np.arange(2 * 2 * 8 * 8, dtype=np.uint8).reshape(2, 2, 8, 8, 1)
    episode = make_sampler(images, way=2, shot=1, query_shot=1)(jax.random.key(0))
    drawn = np.concatenate([episode.support.inputs, episode.query.inputs])
    assert drawn.dtype == np.float32
    assert episode.support.targets.dtype == episode.query.targets.dtype == np.int32
    # All 256 values, each once, for all four images are drawn; XLA may divide by multiplying with 1/255.
    np.testing.assert_allclose(np.sort(drawn.ravel()), np.arange(256) / 255, rtol=2e-7)
    assert drawn.max() <= 1


def test_it_is_a_pure_function_of_the_key_under_jit_and_vmap():
    sample_episode = make_sampler(telling_images(), way=3, shot=1, query_shot=2, rotations=True)
    keys = jax.random.split(jax.random.key(3), 4)
    one_by_one = [sample_episode(key) for key in keys]
    at_once = sample_many(sample_episode, 3, 4)
    for i, episode in enumerate([*one_by_one, sample_episode(keys[0])]):
        expected = jax.tree.map(lambda x, i=i % 4: x[i], at_once)
        chex.assert_trees_all_close(episode[:2], expected[:2], rtol=2e-7)
        np.testing.assert_array_equal(jax.random.key_data(episode.key), jax.random.key_data(expected.key))
    assert len({str(told(episode.support)[:2]) for episode in one_by_one}) > 1
    assert len({str(jax.random.key_data(key)) for key in [*keys, *at_once.key]}) == 8


def test_labels_are_given_anew_in_every_episode():
    episodes = sample_many(make_sampler(telling_images(), way=3, shot=1, query_shot=1), 0, 200)
    classes = told(episodes.support)[0]
    for character in range(CLASSES):
        labels = episodes.support.targets[classes == character]
        assert set(labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("population", "read"),
    [
        # Two classes of an episode, in order.
        ({"classes": 5, "examples": 2}, lambda e: told(e.support)[0]),
        # The support and the query example of a class.
        ({"classes": 2, "examples": 5}, lambda e: np.stack([told(e.support)[1][:, 0], told(e.query)[1][:, 0]], 1)),
    ],
    ids=["classes", "examples"],
)
def test_ordered_pairs_are_drawn_uniformly_without_replacement(population, read):
    count, drawn = 8000, 5
    episodes = sample_many(make_sampler(telling_images(**population), way=2, shot=1, query_shot=1), 1, count)
    found = np.zeros((drawn, drawn))
    np.add.at(found, tuple(read(episodes).T), 1)
    assert np.diag(found).sum() == 0
    # Each of the 20 ordered pairs is binomial(8000, 1/20), 400 ± 19.5: five standard deviations around it.
    p = 1 / (drawn * (drawn - 1))
    off_diagonal = found[~np.eye(drawn, dtype=bool)]
    assert np.abs(off_diagonal - count * p).max() < 5 * np.sqrt(count * p * (1 - p))


def test_the_classes_of_an_episode_draw_their_examples_independently():
    count = 8000
    episodes = sample_many(make_sampler(telling_images(), way=2, shot=1, query_shot=1), 2, count)
    found = np.zeros((EXAMPLES, EXAMPLES))
    np.add.at(found, tuple(told(episodes.support)[1].T), 1)
    p = 1 / EXAMPLES**2  # 320 ± 17.5 each
    assert np.abs(found - count * p).max() < 5 * np.sqrt(count * p * (1 - p))


def test_rotations_turn_a_class_as_one_and_every_class_by_its_own_angle():
    way, count = 3, 2000
    sample_episode = make_sampler(telling_images(), way=way, shot=2, query_shot=1, rotations=True)
    episodes = sample_many(sample_episode, 0, count)
    turned = np.stack([np.rot90(PLACES, k) for k in range(4)])

    def turns(batch):
        match = (told(batch)[2][..., None, :, :] == turned).all((-1, -2))  # [T, S, 4]
        assert (match.sum(-1) == 1).all(), "an image is not one of the four rotations"
        return match.argmax(-1)

    support, query = turns(episodes.support).reshape(count, way, 2), turns(episodes.query)
    np.testing.assert_array_equal(support[..., 0], support[..., 1])
    np.testing.assert_array_equal(support[..., 0], query)
    # Angles of two classes are independent: each of the 16 pairs is binomial(2000, 1/16), 125 ± 10.8.
    found = np.zeros((4, 4))
    np.add.at(found, (query[:, 0], query[:, 1]), 1)
    assert np.abs(found - count / 16).max() < 5 * np.sqrt(count * 15 / 256)
    # Classes are drawn before they are turned: never two rotations of one.
    classes = np.sort(told(episodes.query)[0], axis=1)
    assert (np.diff(classes, axis=1) > 0).all()


def test_a_whole_split_fits_into_one_episode():
    sampler = make_sampler(telling_images(), way=CLASSES, shot=2, query_shot=EXAMPLES - 2)
    episode = sampler(jax.random.key(5))
    classes, examples, _ = (
        np.concatenate(pair) for pair in zip(told(episode.support), told(episode.query), strict=True)
    )
    assert set(zip(classes.tolist(), examples.tolist(), strict=True)) == set(np.ndindex(CLASSES, EXAMPLES))


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (telling_images(), {"way": CLASSES + 1}, "way=8 exceeds the 7 classes"),
        (telling_images(), {"shot": 3, "query_shot": 3}, "shot=3 plus query_shot=3 exceeds the 5 examples"),
        (telling_images(), {"way": 0}, "must be positive, got 0, 1 and 1"),
        (telling_images(), {"shot": 0}, "must be positive, got 2, 0 and 1"),
        (telling_images(), {"query_shot": 0}, "must be positive, got 2, 1 and 0"),
        (telling_images().astype(np.float32), {}, r"must be uint8 .* got float32 \(7, 5, 3, 3, 3\)"),
        (telling_images()[..., 0], {}, r"got uint8 \(7, 5, 3, 3\)"),
        (telling_images()[..., :2, :], {"rotations": True}, "square images, got 3x2"),
    ],
)
def test_impossible_episodes_are_refused_when_the_sampler_is_made(images, changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(jnp.asarray(images), **({"way": 2, "shot": 1, "query_shot": 1} | changes))


def test_images_need_not_be_square_without_rotations():
    episode = make_sampler(telling_images()[..., :2, :], way=2, shot=1, query_shot=1)(jax.random.key(0))
    chex.assert_shape(episode.query.inputs, (2, 3, 2, 3))
