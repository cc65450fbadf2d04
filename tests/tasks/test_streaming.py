"""Images that stay on the host give the episodes, and the training, of images on the device, bit for bit."""

import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maml_jax import (
    MetaState,
    Model,
    evaluate,
    init_meta_state,
    losses,
    make_meta_step,
    make_train_loop,
    maml,
    models,
    parallel,
)
from maml_jax.tasks import few_shot, streaming

SIZE = 4
COUNTS = (7, 9, 30, 8)
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8) for n in COUNTS]
EPISODES = {"way": 3, "shot": 2, "query_shot": 2}


def network():
    mlp = models.mlp(features=(8, 3))
    return Model(
        lambda key, x: mlp.init(key, x.reshape(len(x), -1)), lambda params, x: mlp.apply(params, x.reshape(len(x), -1))
    )


LEARNER = maml(network(), losses.cross_entropy, inner_optimizer=optax.sgd(0.1), num_inner_steps=2)
OPTIMIZER = optax.adam(1e-2)


def start():
    return init_meta_state(LEARNER, OPTIMIZER, jax.random.key(1), jnp.zeros((1, SIZE, SIZE, 3)))


def assert_same(a, b):
    """Equal to the last bit; keys are compared by their data."""
    a, b = (
        jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
        for tree in (a, b)
    )
    chex.assert_trees_all_equal(a, b)
    chex.assert_trees_all_equal_dtypes(a, b)


@pytest.mark.parametrize(
    "options",
    [
        EPISODES,
        {**EPISODES, "rotations": True},
        {"way": 10, "shot": 1, "query_shot": 1, "rotated_classes": True},
        {"way": 2, "shot": 1, "num_queries": 3},
    ],
    ids=["plain", "rotations", "rotated classes", "not balanced"],
)
def test_episodes_are_those_of_images_on_the_device(options):
    keys = jax.random.split(jax.random.key(0), 3)
    draw = jax.jit(lambda sample, keys: jax.vmap(sample)(keys))
    resident, streamed = few_shot.make_sampler(IMAGES, **options), streaming.make_sampler(IMAGES, **options)
    assert_same(draw(streamed, keys), draw(resident, keys))


def test_one_episode_without_jit():
    key = jax.random.key(0)
    assert_same(streaming.make_sampler(IMAGES, **EPISODES)(key), few_shot.make_sampler(IMAGES, **EPISODES)(key))


def test_batches_are_those_of_images_on_the_device():
    streamed, resident = (
        jax.jit(module.make_batch_sampler(IMAGES, batch_size=5, rotated_classes=True))(jax.random.key(3))
        for module in (streaming, few_shot)
    )
    assert_same(streamed, resident)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(2, 12), min_size=2, max_size=6),
    data=st.data(),
    floating=st.booleans(),
    key=st.integers(0),
)
def test_any_classes_and_any_shape(counts, data, floating, key):
    way, shot = data.draw(st.integers(1, len(counts))), data.draw(st.integers(1, min(counts) - 1))
    options = {"way": way, "shot": shot, "query_shot": data.draw(st.integers(1, min(counts) - shot))}
    numbers = [np.arange(n * 12).reshape(n, 2, 2, 3) for n in counts]
    images = [x.astype(np.float32 if floating else np.uint8) for x in numbers]
    key = jax.random.key(key % 2**32)
    episode = jax.jit(streaming.make_sampler(images, **options))(key)
    assert_same(episode, jax.jit(few_shot.make_sampler(images, **options))(key))
    chex.assert_shape(episode.query.inputs, (way * options["query_shot"], 2, 2, 3))


def test_features_of_float64_become_what_they_are_on_a_device():
    features = np.random.default_rng(0).normal(size=(4, 5, 3))
    ours, theirs = (module.make_sampler(features, way=2, shot=2, query_shot=1) for module in (streaming, few_shot))
    chex.assert_trees_all_equal(ours(jax.random.key(0)), theirs(jax.random.key(0)))


def test_memory_maps_and_one_array_are_read(tmp_path):
    stacked = np.stack([images[:7] for images in IMAGES])
    np.save(tmp_path / "images.npy", stacked)
    expected = jax.jit(few_shot.make_sampler(stacked, **EPISODES))(jax.random.key(0))
    for images in (stacked, np.load(tmp_path / "images.npy", mmap_mode="r")):
        assert_same(jax.jit(streaming.make_sampler(images, **EPISODES))(jax.random.key(0)), expected)


def test_only_the_images_of_the_episodes_are_read_once_for_a_meta_batch(monkeypatch):
    calls = []
    gather = streaming._Store.gather
    monkeypatch.setattr(
        streaming._Store, "gather", lambda self, indices: calls.append(np.shape(indices)) or gather(self, indices)
    )
    sample = streaming.make_sampler(IMAGES, **EPISODES)
    jax.block_until_ready(jax.jit(lambda keys: jax.vmap(sample)(keys))(jax.random.split(jax.random.key(0), 5)))
    assert calls == [(5, 12)]


def test_training_is_bit_for_bit_that_of_images_on_the_device():
    chunk_size = 1
    options = {"meta_batch_size": 2, "num_steps": 5}
    resident, streamed = few_shot.make_sampler(IMAGES, **EPISODES), streaming.make_sampler(IMAGES, **EPISODES)
    expected = make_train_loop(LEARNER, OPTIMIZER, resident, chunk_size=chunk_size, **options)(
        start(), jax.random.key(2)
    )
    waiting = make_train_loop(LEARNER, OPTIMIZER, streamed, chunk_size=chunk_size, **options)
    assert_same(waiting(start(), jax.random.key(2)), expected)
    meta_step = make_meta_step(LEARNER, OPTIMIZER, chunk_size=chunk_size)
    for ahead in (1, 9):
        ahead = streaming.make_train_loop(meta_step, streamed, ahead=ahead, **options)
        assert_same(ahead(start(), jax.random.key(2)), expected)


def test_a_run_that_is_resumed_draws_the_same_tasks():
    meta_step, sample = make_meta_step(LEARNER, OPTIMIZER), streaming.make_sampler(IMAGES, **EPISODES)
    loops = [streaming.make_train_loop(meta_step, sample, meta_batch_size=2, num_steps=n) for n in (5, 2, 3)]
    expected, info = loops[0](start(), jax.random.key(2))
    state, first = loops[1](start(), jax.random.key(2))
    state, second = loops[2](state, jax.random.key(2))
    assert_same(state, expected)
    assert_same(jax.tree.map(lambda *x: jnp.concatenate(x), first, second), info)


def test_devices_draw_what_one_device_draws():
    mesh = parallel.task_mesh(jax.devices()[:2])
    options = {"meta_batch_size": 4, "num_steps": 2}
    sample = streaming.make_sampler(IMAGES, **EPISODES)
    resident = few_shot.make_sampler(IMAGES, **EPISODES)
    loops = [make_train_loop(LEARNER, OPTIMIZER, sampler, mesh=mesh, **options) for sampler in (resident, sample)]
    loops.append(streaming.make_train_loop(make_meta_step(LEARNER, OPTIMIZER, mesh=mesh), sample, **options))
    # The second call begins with a state that is on both devices.
    expected, *found = [loop(loop(start(), jax.random.key(2))[0], jax.random.key(2)) for loop in loops]
    for state_and_info in found:
        chex.assert_trees_all_close(state_and_info, expected, rtol=1e-6)


def test_evaluation_takes_them():
    arguments = {"metric_fn": losses.accuracy, "num_episodes": 8}
    params = start().params
    found = [
        evaluate(LEARNER, params, module.make_sampler(IMAGES, **EPISODES), jax.random.key(4), **arguments)
        for module in (streaming, few_shot)
    ]
    np.testing.assert_array_equal(found[0].per_episode, found[1].per_episode)


def test_an_error_of_the_other_thread_is_raised_as_it_is():
    sample = streaming.make_sampler(IMAGES, **EPISODES)
    loop = streaming.make_train_loop(make_meta_step(LEARNER, OPTIMIZER), sample, meta_batch_size=2, num_steps=6)
    gather, calls = sample.func.store.gather, []

    def failing(indices):
        calls.append(indices)
        if len(calls) == 4:
            raise OSError(5, "Input/output error", "images.npy")
        return gather(indices)

    sample.func.store.gather = failing
    with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: 'images\.npy'"):
        loop(start(), jax.random.key(0))
    assert len(calls) <= 6


def test_images_are_gathered_while_the_meta_step_runs():
    sample, num_steps = streaming.make_sampler(IMAGES, **EPISODES), 5
    gather, begun = sample.func.store.gather, [threading.Event() for _ in range(num_steps)]

    def gather_and_tell(indices):
        next(event for event in begun if not event.is_set()).set()
        return gather(indices)

    def meta_step(state, episodes):
        later = begun[min(state.step + 1, num_steps - 1)]
        assert later.wait(timeout=30), "the images of the next meta-step wait for this one"
        return state._replace(step=state.step + 1), {"step": state.step}

    sample.func.store.gather = gather_and_tell
    loop = streaming.make_train_loop(meta_step, sample, meta_batch_size=2, num_steps=num_steps, ahead=1)
    _, info = loop(MetaState(None, None, np.int32(0)), jax.random.key(0))
    np.testing.assert_array_equal(info["step"], np.arange(num_steps))


@pytest.mark.parametrize("name", ["meta_batch_size", "num_steps", "ahead"])
def test_a_wrong_count_is_refused(name):
    sample = streaming.make_sampler(IMAGES, **EPISODES)
    counts = {"meta_batch_size": 2, "num_steps": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        streaming.make_train_loop(None, sample, **counts)


def test_a_sampler_of_another_kind_is_refused():
    sample = few_shot.make_sampler(IMAGES, **EPISODES)
    with pytest.raises(ValueError, match=r"sample_episode must come from streaming\.make_sampler"):
        streaming.make_train_loop(None, sample, meta_batch_size=2, num_steps=2)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES, {"way": 5, "shot": 1, "query_shot": 1}, "way=5 exceeds the 4 classes"),
        (IMAGES, {"way": 2, "shot": 5, "query_shot": 3}, "exceeds the 7 examples of class 0"),
        ([IMAGES[0], IMAGES[1][:0]], {"way": 2, "shot": 1, "query_shot": 1}, "class 1 is empty"),
        ([IMAGES[0], IMAGES[1][:, :2]], {"way": 2, "shot": 1, "query_shot": 1}, "class 1 is uint8"),
        ([x[:, :2] for x in IMAGES], {**EPISODES, "rotations": True}, "square images, got 2x4x3"),
        ([x[:, :2] for x in IMAGES], {**EPISODES, "rotated_classes": True}, "square images, got 2x4x3"),
    ],
)
def test_the_errors_are_those_of_few_shot(images, options, message):
    with pytest.raises(ValueError, match=message):
        streaming.make_sampler(images, **options)


def test_batches_that_cannot_be_turned_are_refused():
    with pytest.raises(ValueError, match="square images, got 2x4x3"):
        streaming.make_batch_sampler([x[:, :2] for x in IMAGES], batch_size=2, rotated_classes=True)
