"""Inputs and targets that name their domain and example show exactly what the sampler drew."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from key_use import assert_every_key_has_one_purpose

from maml_jax import Batch
from maml_jax.tasks.domains import make_identity_sampler, make_sampler, make_single_domain_sampler
from maml_jax.tasks.pixels import scale_pixels

COUNTS, BATCH_SIZE, EPISODES = (5, 3, 8), 4, 2000


def telling_domains(counts=COUNTS):
    """Inputs uint8 [n_d, 2, 1, 1], the domain and the example; targets int32 [n_d], both in one number."""
    return [
        Batch(
            np.stack([np.full(n, d), np.arange(n)], 1).astype(np.uint8)[..., None, None],
            (100 * d + np.arange(n)).astype(np.int32),
        )
        for d, n in enumerate(counts)
    ]


@pytest.fixture(scope="module")
def episodes():
    sample_episode = make_sampler(telling_domains(), batch_size=BATCH_SIZE)
    return jax.jit(jax.vmap(sample_episode))(jax.random.split(jax.random.key(0), EPISODES))


def test_shapes_and_dtypes(episodes):
    chex.assert_shape(episodes.support, [(EPISODES, 3, BATCH_SIZE, 2, 1, 1), (EPISODES, 3, BATCH_SIZE)])
    chex.assert_shape(episodes.query, [(EPISODES, 0, BATCH_SIZE, 2, 1, 1), (EPISODES, 0, BATCH_SIZE)])
    chex.assert_type([*episodes.support], [np.float32, np.int32])
    chex.assert_shape(episodes.key, (EPISODES,))


def test_examples_stay_in_their_domain_and_keep_their_targets(episodes):
    pixels = np.asarray(episodes.support.inputs * 255).round().astype(int)[..., 0, 0]
    np.testing.assert_array_equal(pixels[..., 0], np.broadcast_to(np.arange(3)[:, None], pixels.shape[:-1]))
    np.testing.assert_array_equal(100 * pixels[..., 0] + pixels[..., 1], episodes.support.targets)


def test_every_example_of_a_domain_has_the_same_probability(episodes):
    examples = np.asarray(episodes.support.targets) % 100
    for d, n in enumerate(COUNTS):
        found = np.bincount(examples[:, d].ravel(), minlength=n)
        assert len(found) == n
        # Each count is binomial: within five standard deviations.
        mean = EPISODES * BATCH_SIZE / n
        assert np.abs(found - mean).max() < 5 * np.sqrt(mean * (1 - 1 / n))


def test_the_examples_of_an_episode_are_independent(episodes):
    examples = (np.asarray(episodes.support.targets) % 100).reshape(EPISODES, -1)
    correlations = np.corrcoef(examples.T)
    # Each is 0 ± 1 / sqrt(2000).
    assert np.abs(correlations[np.triu_indices(len(correlations), 1)]).max() < 5 / np.sqrt(EPISODES)


def test_every_key_has_one_purpose():
    assert_every_key_has_one_purpose(make_sampler(telling_domains(), batch_size=BATCH_SIZE), jax.random.key(1))


def test_pairs_and_features_are_domains_too():
    features = [(np.arange(3.0, dtype=np.float32)[:, None] + 10 * d, np.arange(3.0)[:, None]) for d in range(2)]
    episode = make_sampler(features, batch_size=2)(jax.random.key(0))
    assert set(np.asarray(episode.support.inputs[1]).ravel().tolist()) <= {10.0, 11.0, 12.0}
    chex.assert_shape(episode.support.targets, (2, 2, 1))


def test_the_data_are_arguments_of_the_program():
    # Another sampler of the same settings and shapes runs the same program on its own data.
    chex.clear_trace_counter()
    draw = jax.jit(chex.assert_max_traces(lambda sample_episode, key: sample_episode(key), n=1))
    ones, zeros = ([Batch(np.full((n, 2), value, np.uint8), np.zeros(n, int)) for n in COUNTS] for value in (255, 0))
    for domains, value in ((ones, 1.0), (zeros, 0.0)):
        episode = draw(make_sampler(domains, batch_size=BATCH_SIZE), jax.random.key(0))
        assert (episode.support.inputs == value).all()


def test_only_pixels_are_scaled():
    inputs = {"pixels": jnp.array([0, 255], jnp.uint8), "features": jnp.array([3.0]), "tokens": jnp.array([7])}
    scaled = scale_pixels(inputs)
    np.testing.assert_array_equal(scaled["pixels"], [0.0, 1.0])
    chex.assert_trees_all_equal({**scaled, "pixels": 0}, {**inputs, "pixels": 0})


ONE = Batch(np.zeros((4, 2), np.float32), np.zeros(4, np.int32))


@pytest.mark.parametrize(
    ("domains", "batch_size", "message"),
    [
        ([ONE], 0, r"batch_size must be an integer of at least 1, got 0"),
        ([], 2, r"domains is empty; give the examples of at least one domain"),
        ([ONE, ONE._replace(targets=np.zeros(3, np.int32))], 2, r"domain 1 have the shapes \(4, 2\), \(3,\); inputs"),
        ([Batch(np.zeros((0, 2)), np.zeros(0))], 2, r"domain 0 have the shapes .* at least one example"),
        ([ONE, ONE._replace(inputs=np.zeros((4, 3), np.float32))], 2, r"an example of domain 1 is .*\(3,\).* give all"),
        ([ONE, ONE._replace(inputs=np.zeros((4, 2), np.uint8))], 2, r"an example of domain 1 is .*uint8.* give all"),
    ],
)
def test_mistakes_are_refused_when_the_sampler_is_made(domains, batch_size, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(domains, batch_size=batch_size)


def telling_identities(num_identities, counts):
    """Identities of a domain as features [n, 2]: the identity and the image."""
    return [
        np.stack([np.full(n, i), np.arange(n)], 1).astype(np.float32)
        for i, n in zip(range(num_identities), counts, strict=True)
    ]


def test_identities_have_different_images_and_labels_of_their_own():
    people = [telling_identities(4, [3, 5, 3, 4]), [100 + x for x in telling_identities(3, [3, 3, 3])]]
    sample_episode = make_identity_sampler(people, num_identities=3, num_images=3)
    keys = jax.random.split(jax.random.key(0), 200)
    episodes = jax.jit(jax.vmap(sample_episode))(keys)
    chex.assert_shape(episodes.support, [(200, 2, 9, 2), (200, 2, 9)])
    chex.assert_shape(episodes.query, [(200, 0, 9, 2), (200, 0, 9)])
    inputs, targets = map(np.asarray, episodes.support)
    assert np.all((inputs[:, 1] >= 100) & (inputs[:, 0] < 100).all())
    for domain in range(2):
        for episode in range(200):
            who, which = inputs[episode, domain].T
            labels = targets[episode, domain]
            for label in range(3):
                assert len(set(who[labels == label])) == 1  # one identity a label
                assert len(set(which[labels == label])) == 3  # and no image twice
            assert len(set(who)) == 3
    assert set(np.unique(inputs[:, 0, :, 0])) == {0, 1, 2, 3}
    assert not np.array_equal(jax.random.key_data(episodes.key), jax.random.key_data(keys))


def test_no_two_choices_of_identities_and_images_depend_on_each_other():
    people = telling_identities(4, [3, 3, 3, 3])
    sample_episode = make_identity_sampler([people, people], num_identities=2, num_images=2)
    assert_every_key_has_one_purpose(sample_episode, jax.random.key(0))


def test_domains_draw_independently():
    people = telling_identities(4, [3, 3, 3, 3])
    sample_episode = make_identity_sampler([people, people], num_identities=2, num_images=2)
    inputs = jax.jit(jax.vmap(sample_episode))(jax.random.split(jax.random.key(0), 300)).support.inputs
    same = np.mean(np.all(np.asarray(inputs[:, 0]) == np.asarray(inputs[:, 1]), axis=(1, 2)))
    assert same < 0.03


@pytest.mark.parametrize(
    ("people", "settings", "message"),
    [
        ([], {}, "domains is empty"),
        ([telling_identities(2, [3, 3])], {"num_images": 1}, "num_images must be an integer of at least 2, got 1"),
        ([telling_identities(2, [3, 3]), telling_identities(1, [3])], {}, "domain 1: "),
        ([telling_identities(2, [3, 1])], {}, "domain 0: "),
        (
            [np.zeros((2, 2, 3)), np.zeros((2, 2, 4))],
            {},
            r"an image of domain 1 is float32\[4\] and one of domain 0 float32\[3\]; give all domains",
        ),
        ([np.zeros((2, 2, 3)), np.zeros((2, 2, 3), np.float16)], {}, r"an image of domain 1 is float16\[3\] and"),
    ],
)
def test_identities_that_do_not_suffice_are_refused(people, settings, message):
    with pytest.raises(ValueError, match=message):
        make_identity_sampler(people, **{"num_identities": 2, "num_images": 2} | settings)


def test_an_episode_of_a_single_domain_has_a_batch_for_every_step():
    sample_episode = make_single_domain_sampler(telling_domains(), num_inner_steps=3, shot=2, query_shot=4)
    found = jax.jit(jax.vmap(sample_episode))(jax.random.split(jax.random.key(0), EPISODES))
    chex.assert_shape(found.support, [(EPISODES, 3, 2, 2, 1, 1), (EPISODES, 3, 2)])
    chex.assert_shape(found.query, [(EPISODES, 4, 2, 1, 1), (EPISODES, 4)])
    targets = np.concatenate([np.asarray(found.support.targets).reshape(EPISODES, -1), found.query.targets], axis=1)
    domain, example = targets // 100, targets % 100
    assert np.all(domain == domain[:, :1])
    pixels = np.round(255 * np.asarray(found.query.inputs))[..., 0, 0]
    np.testing.assert_array_equal(pixels, np.stack([domain[:, 6:], example[:, 6:]], axis=-1))
    np.testing.assert_allclose(np.bincount(domain[:, 0]) / EPISODES, 1 / 3, atol=0.04)
    for place, count in enumerate(COUNTS):
        drawn = example[domain[:, 0] == place]
        np.testing.assert_allclose(np.bincount(drawn.ravel()) / drawn.size, 1 / count, atol=0.03)
        # The examples of an episode are independent of each other.
        np.testing.assert_allclose(np.mean(drawn[:, 0] == drawn[:, 6]), 1 / count, atol=0.06)
    assert_every_key_has_one_purpose(sample_episode, jax.random.key(1))


def test_an_episode_without_inner_steps_has_an_empty_support_set():
    sample_episode = make_single_domain_sampler(telling_domains(), num_inner_steps=0, shot=2, query_shot=4)
    episode = sample_episode(jax.random.key(0))
    assert episode.support.targets.shape == (0, 2)
    assert episode.query.targets.shape == (4,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_inner_steps": -1}, "num_inner_steps"), ({"shot": 0}, "shot"), ({"query_shot": 0}, "query_shot")],
)
def test_counts_of_a_single_domain_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"{message} must be an integer of at least"):
        make_single_domain_sampler(telling_domains(), **{"num_inner_steps": 1, "shot": 1, "query_shot": 1} | settings)


def test_a_domain_is_a_pair():
    images = np.zeros((2, 2, 4, 4, 1))
    for domains, index in ([images], 0), ([Batch(images, np.zeros(2)), images[0]], 1):
        with pytest.raises(ValueError, match=f"domain {index} must be a pair of inputs and targets, got ndarray"):
            make_sampler(domains, batch_size=1)
