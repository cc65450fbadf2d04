"""Images whose pixels tell class, example and place show exactly what a sampler did."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from key_use import assert_every_key_has_one_purpose

from maml_jax.tasks.few_shot import make_batch_sampler, make_sampler

CLASSES, EXAMPLES, SIZE = 7, 5, 3
PLACES = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
TURNED = np.stack([np.rot90(PLACES, k) for k in range(4)])
COUNTS = (2, 5, 3, 4)  # of classes of unequal size


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


def turns_told(batch):
    """How often each image was turned, [..., S]."""
    match = (told(batch)[2][..., None, :, :] == TURNED).all((-1, -2))  # [..., S, 4]
    assert (match.sum(-1) == 1).all(), "an image is not one of the four rotations"
    return match.argmax(-1)


def telling_features(counts=COUNTS):
    """Float features [n_c, 2] for classes of unequal size: the class and the example."""
    return [np.stack([np.full(n, c), np.arange(n)], axis=1).astype(np.float32) for c, n in enumerate(counts)]


draw_all = jax.jit(lambda sample_episode, keys: jax.vmap(sample_episode)(keys))


def sample_many(sample_episode, seed, count):
    return draw_all(sample_episode, jax.random.split(jax.random.key(seed), count))


def assert_frequencies(found, probabilities):
    """Each of the `found` counts is binomial with its probability: within five standard deviations, or exactly 0."""
    total, probabilities = found.sum(), np.broadcast_to(probabilities, found.shape)
    np.testing.assert_allclose(probabilities.sum(), 1)
    deviation = np.abs(found - total * probabilities)
    np.testing.assert_array_less(deviation, 5 * np.sqrt(total * probabilities * (1 - probabilities)) + 1e-9)


def count_of(shape, *indices):
    found = np.zeros(shape, int)
    np.add.at(found, tuple(np.asarray(index, int) for index in indices), 1)
    return found


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
    episode = jax.jit(make_sampler(images, way=2, shot=1, query_shot=1))(jax.random.key(0))
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
    episodes = sample_many(make_sampler(telling_images(), way=2, shot=1, query_shot=1), 0, 8000)
    classes, labels = told(episodes.support)[0], episodes.support.targets
    # 1143 ± 31 of each. The bound is a little wider, because it takes the two labels of an episode as independent.
    assert_frequencies(count_of((CLASSES, 2), classes.ravel(), labels.ravel()), 1 / (2 * CLASSES))


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
    episodes = sample_many(make_sampler(telling_images(**population), way=2, shot=1, query_shot=1), 1, 8000)
    # Each of the 20 ordered pairs of different numbers is binomial(8000, 1/20), 400 ± 19.5.
    assert_frequencies(count_of((5, 5), *read(episodes).T), (1 - np.eye(5)) / 20)


def test_the_classes_of_an_episode_draw_their_examples_independently():
    episodes = sample_many(make_sampler(telling_images(), way=2, shot=1, query_shot=1), 2, 8000)
    examples = told(episodes.support)[1]
    assert_frequencies(count_of((EXAMPLES, EXAMPLES), *examples.T), 1 / EXAMPLES**2)  # 320 ± 17.5 each


def test_rotations_turn_a_class_as_one_and_every_class_by_its_own_angle():
    # 8 classes, because numbers drawn below 8 and below 4 with one key have their last two bits in common.
    num_classes, way, count = 8, 3, 4000
    sample_episode = make_sampler(telling_images(classes=num_classes), way=way, shot=2, query_shot=1, rotations=True)
    episodes = sample_many(sample_episode, 0, count)
    support, query = turns_told(episodes.support).reshape(count, way, 2), turns_told(episodes.query)
    np.testing.assert_array_equal(support[..., 0], support[..., 1])
    np.testing.assert_array_equal(support[..., 0], query)
    # Angles of two classes are independent: each of the 16 pairs is binomial(4000, 1/16), 250 ± 15.3.
    assert_frequencies(count_of((4, 4), query[:, 0], query[:, 1]), 1 / 16)
    # An angle is independent of the class and of the example: 125 ± 11.0 and 200 ± 13.8.
    classes, examples, _ = told(episodes.query)
    assert_frequencies(count_of((num_classes, 4), classes[:, 0], query[:, 0]), 1 / (4 * num_classes))
    assert_frequencies(count_of((EXAMPLES, 4), examples[:, 0], query[:, 0]), 1 / (4 * EXAMPLES))
    # Classes are drawn before they are turned: never two rotations of one.
    assert (np.diff(np.sort(classes, axis=1), axis=1) > 0).all()


def test_the_four_rotations_of_a_class_are_four_classes():
    sample_episode = make_sampler(telling_images(classes=2), way=2, shot=2, query_shot=1, rotated_classes=True)
    episodes = sample_many(sample_episode, 0, 8000)
    rotated = {}
    for name in ("support", "query"):
        batch = getattr(episodes, name)
        rotated[name] = told(batch)[0] + 2 * turns_told(batch)
    np.testing.assert_array_equal(rotated["support"], np.repeat(rotated["query"], 2, axis=1))
    # Each of the 56 ordered pairs of different rotated classes is binomial(8000, 1/56), 143 ± 11.8.
    assert_frequencies(count_of((8, 8), *rotated["query"].T), (1 - np.eye(8)) / 56)
    # Two rotations of one class draw their examples independently.
    same = told(episodes.query)[0][:, 0] == told(episodes.query)[0][:, 1]
    assert_frequencies(count_of((EXAMPLES, EXAMPLES), *told(episodes.query)[1][same].T), 1 / EXAMPLES**2)


def test_an_episode_may_have_all_rotations_of_all_classes():
    sample_episode = make_sampler(telling_images(classes=2), way=8, shot=1, query_shot=1, rotated_classes=True)
    support = jax.jit(sample_episode)(jax.random.key(0)).support
    assert set(zip(told(support)[0].tolist(), turns_told(support).tolist(), strict=True)) == set(np.ndindex(2, 4))


def test_classes_of_unequal_size_are_drawn_within_their_counts():
    episodes = sample_many(make_sampler(telling_features(), way=3, shot=1, query_shot=1), 0, 4000)
    support, query = (np.asarray(batch.inputs).reshape(-1, 2) for batch in (episodes.support, episodes.query))
    np.testing.assert_array_equal(support[:, 0], query[:, 0])
    # A class has each of the 3 labels with probability 1/4: 1000 ± 27, and the bound is a little wider here too.
    labels = np.asarray(episodes.support.targets).ravel()
    assert_frequencies(count_of((4, 3), support[:, 0], labels), 1 / 12)
    for c, n in enumerate(COUNTS):
        pairs = count_of((n, n), support[support[:, 0] == c, 1], query[support[:, 0] == c, 1])
        assert_frequencies(pairs, (1 - np.eye(n)) / (n * (n - 1)))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(2, 9), min_size=1, max_size=7), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_classes_of_any_size_give_episodes_of_the_shape_asked_for(counts, data, seed):
    way, shot = data.draw(st.integers(1, len(counts))), data.draw(st.integers(1, min(counts) - 1))
    if data.draw(st.booleans()):
        num_queries = data.draw(st.integers(1, sum(sorted(counts)[:way]) - way * shot))
        query = {"num_queries": num_queries}
    else:
        query = {"query_shot": data.draw(st.integers(1, min(counts) - shot))}
        num_queries = way * query["query_shot"]
    sample_episode = make_sampler(telling_features(counts), way=way, shot=shot, **query)
    episode = jax.jit(sample_episode)(jax.random.key(seed))
    chex.assert_shape(episode.support, [(way * shot, 2), (way * shot,)])
    chex.assert_shape(episode.query, [(num_queries, 2), (num_queries,)])
    drawn = np.concatenate([episode.support.inputs, episode.query.inputs]).astype(int)
    assert len(set(map(tuple, drawn))) == len(drawn), "an example was drawn twice"
    assert (drawn[:, 1] < np.asarray(counts)[drawn[:, 0]]).all(), "there is no such example"
    # A label is a class, and a class is a label.
    labels = np.concatenate([episode.support.targets, episode.query.targets])
    assert len(set(zip(labels.tolist(), drawn[:, 0].tolist(), strict=True))) == len(set(labels.tolist())) == way
    assert len(set(drawn[:, 0].tolist())) == way
    np.testing.assert_array_equal(episode.support.targets, np.repeat(np.arange(way), shot))


def test_queries_that_are_not_balanced_come_from_all_examples_left():
    counts = (3, 4)
    episodes = sample_many(make_sampler(telling_features(counts), way=2, shot=1, num_queries=2), 0, 8000)
    chex.assert_shape(episodes.query, [(8000, 2, 2), (8000, 2)])
    support, query = np.asarray(episodes.support.inputs, int), np.asarray(episodes.query.inputs, int)
    # Labels are those of the support set.
    label_of = np.where(support[:, :1, 0] == query[..., 0], 0, 1)
    np.testing.assert_array_equal(episodes.query.targets, label_of)
    assert not (support[:, :, None] == query[:, None]).all(-1).any(), "a support example is in the query set"
    # An ordered pair of examples is drawn if neither is in the support set, and then with probability 1/(5·4): in the
    # class of 3 that is (1/3)/20, in the class of 4 (2/4)/20, across the two (2/3)(3/4)/20.
    size = np.repeat(counts, counts)
    neither = np.where(size[:, None] == size, (size - 2) / size, 1 / 2)
    example = query[..., 1] + 3 * query[..., 0]
    assert_frequencies(count_of((7, 7), *example.T), neither / 20 * (1 - np.eye(7)))


def test_queries_may_be_all_examples_left():
    way, shot = len(COUNTS), 2
    sample_episode = make_sampler(telling_features(), way=way, shot=shot, num_queries=sum(COUNTS) - way * shot)
    episode = jax.jit(sample_episode)(jax.random.key(0))
    drawn = np.concatenate([episode.support.inputs, episode.query.inputs])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, np.concatenate(telling_features())))


def test_a_batch_has_uniform_examples_with_global_labels():
    images = [telling_images(examples=n)[c] for c, n in enumerate((1, 3, 2))]
    episodes = sample_many(make_batch_sampler(images, batch_size=2, rotated_classes=True), 0, 8000)
    chex.assert_shape(episodes.support, [(8000, 2, SIZE, SIZE, 3), (8000, 2)])
    chex.assert_shape(episodes.query, [(8000, 0, SIZE, SIZE, 3), (8000, 0)])
    chex.assert_trees_all_equal_dtypes(episodes.support, episodes.query)
    classes, examples, _ = told(episodes.support)
    turns = turns_told(episodes.support)
    np.testing.assert_array_equal(episodes.support.targets, classes + 3 * turns)
    # The two of a batch are independent, 222 ± 14.7 of each pair, and so are example and angle, 333 ± 17.9.
    example = np.array([0, 1, 4])[classes] + examples
    assert_frequencies(count_of((6, 6), *example.T), 1 / 36)
    assert_frequencies(count_of((6, 4), example[:, 0], turns[:, 0]), 1 / 24)
    assert_frequencies(count_of((4, 4), *turns.T), 1 / 16)


def test_a_batch_of_images_that_are_not_turned():
    support = make_batch_sampler(telling_images(), batch_size=30)(jax.random.key(0)).support
    np.testing.assert_array_equal(support.targets, told(support)[0])
    assert support.targets.dtype == np.int32
    assert (turns_told(support) == 0).all()


@pytest.mark.parametrize(
    "sample_episode",
    [
        make_sampler(telling_images(), way=3, shot=1, query_shot=2, rotations=True),
        make_sampler(telling_images(), way=3, shot=1, num_queries=2, rotations=True),
        make_batch_sampler(telling_images(), batch_size=3, rotated_classes=True),
    ],
    ids=["balanced", "not balanced", "batch"],
)
def test_no_key_has_two_purposes(sample_episode):
    assert_every_key_has_one_purpose(sample_episode, jax.random.key(0))


@pytest.mark.parametrize("rotations", [False, True])
def test_draws_of_earlier_versions_are_repeated(rotations):
    way, shot, query_shot = 4, 2, 2
    images, key = telling_images(), jax.random.key(11)

    def draw_distinct(key, population, count):
        order = list(range(population))
        partners = jax.random.randint(key, (count,), jnp.arange(count), population)
        for i, j in enumerate(partners.tolist()):
            order[i], order[j] = order[j], order[i]
        return order[:count]

    class_key, example_key, rotation_key, episode_key = jax.random.split(key, 4)
    classes = draw_distinct(class_key, CLASSES, way)
    turns = jax.random.randint(rotation_key, (way, 1, 1, 1, 1), 0, 4).ravel() if rotations else [0] * way
    drawn = []
    for label, class_example_key in enumerate(jax.random.split(example_key, way)):
        examples = images[classes[label], draw_distinct(class_example_key, EXAMPLES, shot + query_shot)]
        drawn.append(np.rot90(examples, int(turns[label]), axes=(1, 2)))
    drawn = jnp.stack(drawn).astype(jnp.float32) / 255.0

    sample_episode = make_sampler(images, way=way, shot=shot, query_shot=query_shot, rotations=rotations)
    episode = sample_episode(key)
    np.testing.assert_array_equal(episode.support.inputs, drawn[:, :shot].reshape(-1, SIZE, SIZE, 3))
    np.testing.assert_array_equal(episode.query.inputs, drawn[:, shot:].reshape(-1, SIZE, SIZE, 3))
    np.testing.assert_array_equal(jax.random.key_data(episode.key), jax.random.key_data(episode_key))


@pytest.mark.parametrize(
    "make",
    [
        lambda images, size: make_sampler(images, way=2, shot=1, query_shot=size),
        lambda images, size: make_sampler(images, way=2, shot=1, num_queries=size),
        lambda images, size: make_batch_sampler(images, batch_size=size),
    ],
    ids=["balanced", "not balanced", "batch"],
)
def test_data_are_arguments_of_programs_that_equal_samplers_share(make):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 100, 100, 1), np.uint8)
    key = jax.random.key(0)
    draw = jax.jit(lambda sample_episode, key: sample_episode(key).support.inputs.max())
    lowered = draw.lower(make(images, 2), key)
    assert len(lowered.as_text()) < images.nbytes / 2, "the program contains the images"
    assert draw(make(np.zeros_like(images), 2), key) == 0
    assert draw(make(np.full_like(images, 255), 2), key) == 1
    assert draw._cache_size() == 1
    draw(make(images, 3), key)
    assert draw._cache_size() == 2


@pytest.mark.parametrize(("shape", "dtype"), [((), jnp.float32), ((6,), jnp.bfloat16), ((2, 3, 3), jnp.float32)])
def test_floating_examples_of_any_shape_are_not_changed(shape, dtype):
    examples = jax.random.normal(jax.random.key(0), (3, 2, *shape), dtype)
    episode = jax.jit(make_sampler(examples, way=3, shot=1, query_shot=1))(jax.random.key(1))
    assert episode.support.inputs.dtype == episode.query.inputs.dtype == dtype
    drawn = np.concatenate([episode.support.inputs, episode.query.inputs]).astype(np.float32)
    np.testing.assert_array_equal(np.sort(drawn.ravel()), np.sort(np.asarray(examples, np.float32).ravel()))


def test_floating_images_are_turned_too():
    images = telling_images(classes=1).astype(np.float32) / 255
    sample_episode = make_sampler(images, way=4, shot=1, query_shot=1, rotated_classes=True)
    support = jax.jit(sample_episode)(jax.random.key(0)).support
    assert set(turns_told(support).tolist()) == {0, 1, 2, 3}


def test_a_whole_split_fits_into_one_episode():
    sample_episode = make_sampler(telling_images(), way=CLASSES, shot=2, query_shot=EXAMPLES - 2)
    episode = jax.jit(sample_episode)(jax.random.key(5))
    classes, examples, _ = (
        np.concatenate(pair) for pair in zip(told(episode.support), told(episode.query), strict=True)
    )
    assert set(zip(classes.tolist(), examples.tolist(), strict=True)) == set(np.ndindex(CLASSES, EXAMPLES))


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (telling_images(), {"way": CLASSES + 1}, "way=8 exceeds the 7 classes"),
        (telling_images(), {"way": 29, "rotated_classes": True}, "way=29 exceeds the 28 classes"),
        (telling_images(), {"shot": 3, "query_shot": 3}, "shot=3 plus query_shot=3 exceeds the 5 examples"),
        (telling_features((3, 1, 2)), {}, "shot=1 plus query_shot=1 exceeds the 1 examples of class 1; .* leave"),
        (
            telling_features((3, 1, 2)),
            {"shot": 2, "query_shot": None, "num_queries": 1},
            "shot=2 exceeds the 1 examples of class 1",
        ),
        # Classes 0 and 2 are the smallest two: 2 + 3 examples without the support set.
        (
            telling_features((3, 9, 4)),
            {"query_shot": None, "num_queries": 6},
            "num_queries=6 exceeds the 5 examples that the 2 smallest classes",
        ),
        # Both classes of an episode may be rotations of class 0.
        (
            [telling_images(examples=n)[0] for n in (2, 9)],
            {"query_shot": None, "num_queries": 3, "rotated_classes": True},
            "num_queries=3 exceeds the 2 examples",
        ),
        (telling_images(), {"query_shot": None}, "either query_shot or num_queries, got query_shot=None, num_q.*=None"),
        (telling_images(), {"num_queries": 1}, "either query_shot or num_queries, got query_shot=1, num_queries=1"),
        (telling_images(), {"rotations": True, "rotated_classes": True}, "rotations and rotated_classes exclude"),
        (telling_images(), {"way": 0}, "way must be an integer of at least 1, got 0"),
        (telling_images(), {"shot": 1.0}, "shot must be an integer of at least 1, got 1.0"),
        (telling_images(), {"query_shot": True}, "query_shot must be an integer of at least 1, got True"),
        (telling_images(), {"query_shot": None, "num_queries": 0}, "num_queries must be an integer of at least 1"),
        (telling_images().astype(np.uint16), {}, r"must be uint8 .* got uint16 \(7, 5, 3, 3, 3\); .*images / 65535"),
        (telling_images()[..., 0], {}, r"got uint8 \(7, 5, 3, 3\); give pixels three axes"),
        ({"a": np.zeros((3, 4))}, {}, r"got dict; of a dictionary pass list\(images.values\(\)\)"),
        (None, {}, "must be an array .* or a list of arrays .*, got NoneType"),
        (np.zeros(3), {}, r"must be \[classes, examples, ...\], got the shape \(3,\)"),
        (telling_images()[:0], {}, "there is no class"),
        ([], {}, "there is no class"),
        ([np.zeros((2, 3)), np.zeros((0, 3))], {}, "class 1 is empty"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], {}, r"class 1 is float64 \(2, 4\) and class 0 is float64 \(2, 3\)"),
        ([np.zeros((2, 3)), np.zeros((2, 3), np.uint8)], {}, "class 1 is uint8"),
        ([np.zeros(2), np.zeros(())], {}, r"class 1 is float64 \(\)"),
        ([np.zeros((2, 3)), np.full((3, 3), np.nan)], {"way": 2}, "a feature of class 1 is NaN or infinite"),
        (np.full((4, 2, 3), np.inf), {"way": 2}, "a feature of class 0 is NaN or infinite"),
        (np.full((4, 2, 3), 1e300), {"way": 2}, "a feature of class 0 is NaN or infinite"),
        (telling_images()[..., :2, :], {"rotations": True}, "square images, got 3x2"),
        (telling_images()[..., :2, :], {"rotated_classes": True}, "square images, got 3x2"),
        (telling_features(), {"rotations": True}, "square images, got 2;"),
    ],
)
def test_impossible_episodes_are_refused_when_the_sampler_is_made(images, changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(images, **({"way": 2, "shot": 1, "query_shot": 1} | changes))


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (telling_images(), {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        (telling_images().astype(np.int32), {}, "got int32"),
        (telling_features(), {"rotated_classes": True}, "square images"),
        ([], {}, "there is no class"),
    ],
)
def test_impossible_batches_are_refused_when_the_sampler_is_made(images, changes, message):
    with pytest.raises(ValueError, match=message):
        make_batch_sampler(images, **({"batch_size": 2} | changes))


def test_images_need_not_be_square_without_rotations():
    episode = make_sampler(telling_images()[..., :2, :], way=2, shot=1, query_shot=1)(jax.random.key(0))
    chex.assert_shape(episode.query.inputs, (2, 3, 2, 3))
