"""Random changes to images, against what they must leave alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from key_use import keys_by_use

from maml_jax.tasks import few_shot
from maml_jax.tasks.augment import augmented
from maml_jax.types import Batch, Episode

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 8, 8, 3)).astype(np.uint8)


def of_constant(image, num=400):
    """A task distribution of one image, many times."""
    support = Batch(jnp.broadcast_to(image, (num, *image.shape)), jnp.zeros(num, jnp.int32))
    return lambda key: Episode(support, Batch(support.inputs[:2], support.targets[:2]), key)


def test_nothing_changes_if_nothing_is_asked_for():
    plain = few_shot.make_sampler(IMAGES, way=3, shot=2, query_shot=1)
    same = augmented(plain, flip=False, max_shift=0, jitter=0.0)
    key = jax.random.key(1)
    chex.assert_trees_all_equal(same(key), plain(jax.random.split(key)[0]))


def test_half_of_the_images_are_reflected():
    image = jnp.arange(48.0).reshape(4, 4, 3) / 48
    episode = augmented(of_constant(image), max_shift=0, jitter=0.0)(jax.random.key(0))
    inputs, image = np.asarray(episode.support.inputs), np.asarray(image)
    reflected = np.all(inputs == image[:, ::-1], (1, 2, 3))
    kept = np.all(inputs == image, (1, 2, 3))
    assert np.all(reflected ^ kept)
    assert 150 < int(reflected.sum()) < 250  # 200 ± 5 standard deviations


def test_shifts_are_uniform_and_repeat_the_border():
    image = jnp.arange(16.0).reshape(4, 4, 1) / 16
    episode = augmented(of_constant(image), flip=False, max_shift=1, jitter=0.0)(jax.random.key(0))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    possible = [padded[row : row + 4, column : column + 4] for row in range(3) for column in range(3)]
    counts = [int(np.all(np.asarray(episode.support.inputs) == window, (1, 2, 3)).sum()) for window in possible]
    assert sum(counts) == 400
    assert min(counts) > 15
    assert max(counts) < 80


def test_colours_change_by_hand():
    """With one pixel, contrast and saturation do nothing to a grey image; brightness stays in its range."""
    image = jnp.full((1, 1, 3), 0.5)
    values = augmented(of_constant(image), flip=False, max_shift=0, jitter=0.4)(jax.random.key(0)).support.inputs
    chex.assert_trees_all_close(values[..., 0], values[..., 2])
    assert 0.3 <= values.min() < 0.32
    assert 0.68 < values.max() <= 0.7
    # Saturation keeps the mean over the channels of a pixel; one pixel has no contrast between pixels.
    image = jnp.array([[[0.2, 0.3, 0.4]]])
    one = augmented(of_constant(image), flip=False, max_shift=0, jitter=0.3)(jax.random.key(0)).support.inputs
    ratio = one.mean(-1) / image.mean()
    assert jnp.all((ratio >= 0.69) & (ratio <= 1.31))
    spread = (one[..., 2] - one[..., 0]) / ratio / 0.2
    assert spread.max() > 1.3
    assert spread.min() < 0.7


def test_contrast_changes_the_distance_from_the_mean():
    # Two grey pixels: brightness multiplies their mean, and saturation does nothing to them.
    image = jnp.array([[[0.4] * 3], [[0.6] * 3]])
    pixels = augmented(of_constant(image), flip=False, max_shift=0, jitter=0.3)(jax.random.key(0)).support.inputs[
        ..., 0
    ]
    contrast = (pixels[:, 1, 0] - pixels[:, 0, 0]) / pixels.mean((1, 2)) / 0.4
    assert 0.7 <= contrast.min() < 0.72
    assert 1.28 < contrast.max() <= 1.3001


def test_the_query_set_is_changed_as_the_support_set_is_and_on_its_own():
    support = of_constant(jnp.arange(48.0).reshape(4, 4, 3) / 48)(None).support
    changed = augmented(lambda key: Episode(support, support, key), max_shift=0, jitter=0.0)(jax.random.key(0))
    reflected = [np.any(batch.inputs != support.inputs, (1, 2, 3)) for batch in (changed.support, changed.query)]
    assert all(150 < flips.sum() < 250 for flips in reflected)
    assert 150 < np.sum(reflected[0] != reflected[1]) < 250


def test_images_are_changed_each_on_its_own_and_targets_are_not():
    sampler = augmented(few_shot.make_sampler(IMAGES, way=3, shot=2, query_shot=1))
    episode = jax.jit(sampler)(jax.random.key(3))
    plain = few_shot.make_sampler(IMAGES, way=3, shot=2, query_shot=1)(jax.random.split(jax.random.key(3))[0])
    chex.assert_trees_all_equal(episode.support.targets, plain.support.targets)
    assert jnp.all((episode.support.inputs >= 0) & (episode.support.inputs <= 1))
    twice = augmented(of_constant(jnp.arange(48.0).reshape(4, 4, 3) / 48, 2), max_shift=1)(jax.random.key(0))
    assert jnp.any(twice.support.inputs[0] != twice.support.inputs[1])
    batches = augmented(few_shot.make_batch_sampler(IMAGES, batch_size=4))(jax.random.key(0))
    assert batches.query.inputs.shape == (0, 8, 8, 3)


def test_the_data_are_arguments_of_a_compiled_program():
    sampler = augmented(few_shot.make_sampler(IMAGES, way=3, shot=2, query_shot=1))
    leaves = jax.tree.leaves(sampler)
    assert any(leaf.size == IMAGES.size for leaf in leaves)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_shift": -1}, "max_shift must be an integer of at least 0, got -1"),
        ({"jitter": 1.0}, r"jitter=1.0 must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        augmented(of_constant(jnp.zeros((1, 1, 3))), **settings)


@pytest.mark.parametrize("inputs", [jnp.full((2, 4, 4, 1), 200, jnp.uint8), jnp.zeros((2, 4))])
def test_what_is_no_floating_image_is_refused(inputs):
    batch = Batch(inputs, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=rf"augmented changes floating images .*, got {inputs.dtype}\[2, 4"):
        augmented(lambda key: Episode(batch, batch, key))(jax.random.key(0))


def test_the_changes_of_an_image_are_independent():
    drawn, divided = keys_by_use(
        lambda: augmented(of_constant(jnp.ones((4, 4, 3)) / 2), max_shift=1, jitter=0.3)(jax.random.key(0))
    )
    assert len(set(drawn)) == len(drawn)
    assert not set(drawn) & divided
    # Two pixels in the colours of one line: brightness, contrast and saturation can be told apart.
    image = jnp.array([[[0.3, 0.4, 0.5]], [[0.5, 0.6, 0.7]]])
    pixels = augmented(of_constant(image), flip=False, max_shift=0, jitter=0.2)(jax.random.key(0)).support.inputs
    pixels = np.asarray(pixels)[:, :, 0]
    brightness = pixels.mean((1, 2)) / 0.5
    contrast = (pixels[:, 1].mean(-1) - pixels[:, 0].mean(-1)) / brightness / 0.2
    saturation = (pixels[:, 0, 2] - pixels[:, 0, 0]) / brightness / contrast / 0.2
    for changes in (brightness, contrast, saturation):
        assert 0.79 < changes.min() < 0.82
        assert 1.18 < changes.max() < 1.21
    correlation = np.corrcoef([brightness, contrast, saturation])
    np.testing.assert_allclose(correlation, np.eye(3), atol=5 / np.sqrt(len(pixels)))
