import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from maml_jax import Batch, Episode, Model, evaluate, init_meta_state, losses, make_train_loop, models
from maml_jax.algorithms.memory_module import NeighbourMemory, memory_module

WAY, DIM, KEY_SIZE = 3, 4, 3
MARGIN = 0.3

identity = Model(lambda key, inputs: {}, lambda params, inputs: inputs)
smooth = Model(
    lambda key, inputs: {"kernel": jax.random.normal(key, (DIM, 5))},
    lambda params, inputs: jnp.tanh(inputs @ params["kernel"]),
)


def build(embedding=identity, way=WAY, **kwargs):
    return memory_module(embedding, way=way, **{"key_size": KEY_SIZE, "margin": MARGIN, **kwargs})


def make_batch(seed, targets):
    return Batch(jnp.asarray(np.random.default_rng(seed).normal(size=(len(targets), DIM))), jnp.array(targets))


def make_episode(seed=0, support=(2, 0, 1, 1, 0, 2), query=(1, 0, 0, 2, 2, 1, 0, 1, 2), key=None):
    return Episode(make_batch(seed, support), make_batch(seed + 1000, query), key)


def make_params(learner, seed=0):
    params = learner.init(jax.random.key(seed), make_episode().support.inputs)
    return {**params, "projection": jax.random.normal(jax.random.key(seed), params["projection"].shape)}


def unit(x):
    return x / np.linalg.norm(x)


def keys_of(params, inputs):
    """q(x), for the learner without an embedding."""
    return [unit(x @ np.asarray(params["projection"])) for x in np.asarray(inputs)]


def in_rounds(batch, priority=lambda i, label: label):
    """Indices in the order of the stream: by the number of the showing, then by a priority."""
    shown, order = {}, []
    for i, label in enumerate(np.asarray(batch.targets).tolist()):
        order.append((shown.get(label, 0), priority(i, label), i))
        shown[label] = shown.get(label, 0) + 1
    return [i for _, _, i in sorted(order)]


def joined(episode):
    return Batch(*(jnp.concatenate(x) for x in zip(episode.support, episode.query, strict=True)))


class MemoryByHand:
    """The memory as a list of entries, the newest last, and a log of what the loss is made of."""

    def __init__(self, num_slots=8192, num_neighbours=256):
        self.num_slots, self.num_neighbours = num_slots, num_neighbours
        self.entries, self.pairs, self.events = [], [], []

    def show(self, query, label):
        near = sorted(self.entries, key=lambda entry: -entry["key"] @ query)
        pool = near[: self.num_neighbours]
        right = [entry for entry in pool if entry["label"] == label]
        if not right:  # the teacher: the newest one
            right = [entry for entry in self.entries if entry["label"] == label][-1:]
            self.events += ["teacher"] * len(right)
        wrong = [entry for entry in pool if entry["label"] != label]
        pair = (right[0]["key"], wrong[0]["key"]) if right and wrong else None
        self.pairs.append((query, pair))
        if near and near[0]["label"] == label:
            self.entries = [entry for entry in self.entries if entry is not near[0]]
            self.entries.append({"key": unit(near[0]["key"] + query), "label": label})
            self.events.append("averaged")
        else:
            if len(self.entries) == self.num_slots:
                self.entries.pop(0)
                self.events.append("overwritten")
            self.entries.append({"key": query, "label": label})
            self.events.append("written")

    def losses(self, margin=MARGIN):
        return [max(0.0, q @ pair[1] - q @ pair[0] + margin) if pair else 0.0 for q, pair in self.pairs]

    def predict(self, query, way=WAY):
        return [
            max((e["key"] @ query for e in self.entries if e["label"] == label), default=-2.0) for label in range(way)
        ]


def read_by_hand(params, batch, order=None, **kwargs):
    memory, queries = MemoryByHand(**kwargs), keys_of(params, batch.inputs)
    for i in in_rounds(batch) if order is None else order:
        memory.show(queries[i], int(batch.targets[i]))
    return memory


def entries_of(task_params):
    """The entries of the memory, sorted."""
    keys, values = np.asarray(task_params["keys"]), np.asarray(task_params["values"])
    return sorted((int(v.argmax()), *k) for k, v in zip(keys, values, strict=True) if v.any())


SIZES = pytest.mark.parametrize(("num_slots", "num_neighbours"), [(8192, 256), (8, 256), (5, 2), (1, 1)])


@SIZES
def test_the_memory_and_the_loss_equal_a_list_by_hand(x64, num_slots, num_neighbours):
    learner = build(num_slots=num_slots, num_neighbours=num_neighbours)
    kwargs = {"num_slots": num_slots, "num_neighbours": num_neighbours}
    params, events = make_params(learner), []
    adapt, predict, objective = map(jax.jit, (learner.adapt, learner.predict, learner.objective))
    rng = np.random.default_rng(0)
    for seed in range(6):
        support = np.concatenate([np.arange(WAY), rng.integers(0, WAY, 12)])
        episode = make_episode(seed, rng.permutation(support), rng.integers(0, WAY, 9))
        task_params, info = adapt(params, episode.support)
        memory = read_by_hand(params, episode.support, **kwargs)
        expected = sorted((entry["label"], *entry["key"]) for entry in memory.entries)
        np.testing.assert_allclose(entries_of(task_params), expected, rtol=1e-9)
        chex.assert_shape(info.support_loss, (0,))
        outputs = predict(task_params, episode.query.inputs)
        expected = [memory.predict(q) for q in keys_of(params, episode.query.inputs)]
        np.testing.assert_allclose(outputs, expected, rtol=1e-9)

        value, info = objective(params, episode)
        stream = read_by_hand(params, joined(episode), **kwargs)
        np.testing.assert_allclose(value, np.mean(stream.losses()), rtol=1e-9)
        chex.assert_shape(info.support_loss, (0,))
        events += stream.events
    # What makes this test tell.
    assert ("overwritten" in events) == (num_slots <= 8)
    assert ("teacher" in events) == (num_neighbours < num_slots <= 8)
    assert min(events.count("averaged"), events.count("written")) > 5


def test_the_loss_of_a_stream_by_hand(x64):
    # Keys on a circle: class 0 at 0° and 40°, class 1 at 90° and 60°, in the order 0°, 90°, 40°, 60°.
    angles = np.deg2rad([0.0, 90.0, 40.0, 60.0])
    inputs = jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1) * jnp.array([[2.0], [0.5], [3.0], [1.0]])
    episode = Episode(Batch(inputs[:2], jnp.array([0, 1])), Batch(inputs[2:], jnp.array([0, 1])))
    learner = build(way=2, key_size=2)
    params = {"embedding": {}, "projection": jnp.eye(2)}
    # 40° is nearer to 0° than to 90°, and moves that key to 20°. 60° is nearer to 90° than to 20°.
    third = np.cos(np.deg2rad(50)) - np.cos(np.deg2rad(40)) + MARGIN
    fourth = np.cos(np.deg2rad(40)) - np.cos(np.deg2rad(30)) + MARGIN
    assert min(third, fourth) > 0.1
    value, _ = jax.jit(learner.objective)(params, episode)
    np.testing.assert_allclose(value, (third + fourth) / 4, rtol=1e-10)
    assert jax.jit(build(way=2, key_size=2, margin=0.05).objective)(params, episode)[0] == 0.0
    task_params, _ = jax.jit(learner.adapt)(params, joined(episode))
    ends = np.deg2rad([20.0, 75.0])
    np.testing.assert_allclose(
        entries_of(task_params), [(i, np.cos(a), np.sin(a)) for i, a in enumerate(ends)], rtol=1e-10
    )


@pytest.mark.parametrize("num_neighbours", [1, 256])
def test_an_empty_slot_is_no_neighbour(x64, num_neighbours):
    # One class. Its second example is further than 90° from the first, and that is its nearest key all the same: there
    # is no key of another class, and no loss.
    batch = Batch(jnp.array([[1.0, 0.0], [-0.6, 0.8], [0.0, 1.0]]), jnp.zeros(3, int))
    learner = build(way=1, key_size=2, num_neighbours=num_neighbours)
    params = {"embedding": {}, "projection": jnp.eye(2)}
    task_params, _ = jax.jit(learner.adapt)(params, jax.tree.map(lambda x: x[:2], batch))
    np.testing.assert_allclose(entries_of(task_params), [(0, np.sqrt(0.2), np.sqrt(0.8))], rtol=1e-10)
    episode = Episode(Batch(batch.inputs[:1], batch.targets[:1]), Batch(batch.inputs[1:], batch.targets[1:]))
    assert jax.jit(learner.objective)(params, episode)[0] == 0.0


def test_keys_are_constants_in_the_gradient(x64):
    learner = build(smooth, num_slots=6, num_neighbours=3)
    params, episode = make_params(learner), make_episode(2)
    batch = joined(episode)

    def queries(params):
        q = smooth.apply(params["embedding"], batch.inputs) @ params["projection"]
        return q / jnp.linalg.norm(q, axis=1, keepdims=True)

    memory, order = MemoryByHand(6, 3), in_rounds(batch)
    for i in order:
        memory.show(np.asarray(queries(params))[i], int(batch.targets[i]))
    pairs = [(i, pair) for i, (_, pair) in zip(order, memory.pairs, strict=True) if pair]

    def by_hand(params):
        q = queries(params)
        return sum(jnp.maximum(0.0, q[i] @ (wrong - right) + MARGIN) for i, (right, wrong) in pairs) / len(order)

    value, gradient = jax.jit(jax.value_and_grad(learner.objective, has_aux=True))(params, episode)
    np.testing.assert_allclose(value[0], by_hand(params), rtol=1e-9)
    chex.assert_trees_all_close(gradient, jax.grad(by_hand)(params), rtol=1e-8, atol=1e-12)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_gradient_agrees_with_finite_differences(x64):
    # The keys are constants in the gradient, so the loss is made of constant keys: the first support example of each
    # of two classes does not depend on the parameters, for it is zero but for a constant feature.
    fixed = Model(
        lambda key, inputs: jax.random.normal(key, (DIM, KEY_SIZE)),
        lambda params, inputs: jnp.where(inputs[:, :1] > 9, inputs[:, :KEY_SIZE] - 10, jnp.tanh(inputs @ params)),
    )
    support = Batch(jnp.array([[11.0, 10.2, 10.0, 0.0], [10.5, 10.0, 11.0, 0.0]]), jnp.array([0, 1]))
    learner = build(fixed, way=2, margin=1.5)

    @jax.jit
    def objective(weights, query):
        # The projection is constant, because the keys depend on it.
        return learner.objective({"embedding": weights, "projection": jnp.eye(KEY_SIZE)}, Episode(support, query))[0]

    for seed, target in ((0, 0), (1, 1)):
        query = make_batch(seed, (target,))
        weights = jax.random.normal(jax.random.key(seed), (DIM, KEY_SIZE))
        assert objective(weights, query) > 0.1
        check_grads(functools.partial(objective, query=query), (weights,), order=1, modes=["rev"])


def test_mapping_over_episodes_is_a_loop(x64):
    learner = build(smooth, num_slots=6)
    params = make_params(learner)
    gradient = jax.jit(jax.value_and_grad(learner.objective, has_aux=True))
    episodes = [make_episode(seed, key=jax.random.key(seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *episodes)
    mapped = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(params, stacked)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *[gradient(params, episode) for episode in episodes])
    chex.assert_trees_all_close(mapped, looped, rtol=1e-9, atol=1e-12)


def test_only_the_order_within_a_class_matters(x64):
    learner = build(num_slots=5)
    params, episode = make_params(learner), make_episode(4)
    objective = jax.jit(learner.objective)
    value, _ = objective(params, episode)

    def permuted(order):
        order = jnp.array(order)
        return episode._replace(support=jax.tree.map(lambda x: x[order], episode.support))

    # The classes are 2, 0, 1, 1, 0, 2. Interleaved in another way, nothing changes.
    np.testing.assert_allclose(objective(params, permuted([1, 4, 2, 0, 3, 5]))[0], value, rtol=1e-12)
    # The two examples of a class exchanged, it does.
    assert abs(objective(params, permuted([5, 4, 3, 2, 1, 0]))[0] - value) > 1e-4


def test_with_a_key_the_classes_of_a_round_come_in_an_order_of_its_own(x64):
    # Every value that a key gives is that of some order in rounds, here of 2 classes and 3 rounds.
    learner = build(way=2, num_slots=2)
    params, episode = make_params(learner), make_episode(3, support=(1, 0), query=(0, 1, 0, 1))
    batch = joined(episode)
    values = {}
    for swaps in np.ndindex(2, 2, 2):
        rounds = np.reshape(in_rounds(batch), (3, 2))
        order = np.concatenate([pair[:: -1 if swap else 1] for pair, swap in zip(rounds, swaps, strict=True)])
        values[swaps] = np.mean(read_by_hand(params, batch, order, num_slots=2).losses())
    keys = jax.random.split(jax.random.key(0), 200)
    mapped = jax.jit(jax.vmap(lambda key: learner.objective(params, episode._replace(key=key))[0]))(keys)
    possible = np.array(list(values.values()))
    distance = np.abs(np.asarray(mapped)[:, None] - possible[None])
    assert distance.min(1).max() < 1e-12
    assert len(np.unique(np.round(possible, 9))) >= 4
    assert (distance.min(0) < 1e-12).all()  # every order occurs
    without = jax.jit(learner.objective)(params, episode)[0]
    np.testing.assert_allclose(without, values[0, 0, 0], rtol=1e-12)


def test_adapting_with_a_key_draws_an_order_and_is_repeatable(x64):
    learner = build(num_slots=4)
    params, support = make_params(learner), make_episode(5).support
    adapt = jax.jit(lambda key: learner.adapt(params, support, key=key)[0])
    chex.assert_trees_all_equal(adapt(jax.random.key(0)), adapt(jax.random.key(0)))
    found = {str(np.round(entries_of(adapt(jax.random.key(seed))), 6)) for seed in range(10)}
    assert len(found) > 1


def test_more_slots_and_neighbours_than_examples_change_nothing(x64):
    params, episode = make_params(build()), make_episode(6)
    results = []
    for num_slots in (15, 8192):
        learner = build(num_slots=num_slots, num_neighbours=num_slots)
        task_params, _ = jax.jit(learner.adapt)(params, episode.support)
        chex.assert_shape(task_params["keys"], (6, KEY_SIZE))
        outputs = jax.jit(learner.predict)(task_params, episode.query.inputs)
        results.append((jax.jit(learner.objective)(params, episode)[0], outputs))
    chex.assert_trees_all_equal(*results)


def test_prediction_takes_the_best_key_of_each_class_and_none_is_minus_two(x64):
    # 30 examples of two classes, and one slot: the memory holds the last label only.
    learner = build(num_slots=1)
    params, episode = make_params(learner), make_episode(7)
    task_params, _ = learner.adapt(params, episode.support)
    outputs = np.asarray(learner.predict(task_params, episode.query.inputs))
    assert (outputs[:, :2] == -2).all()
    assert (np.abs(outputs[:, 2]) <= 1).all()
    # An example of the support set that was not averaged is found again: its cosine is one.
    learner = build()
    support = jax.tree.map(lambda x: x[:3], episode.support)
    task_params, _ = learner.adapt(params, support)
    outputs = learner.predict(task_params, support.inputs)
    np.testing.assert_allclose(np.max(outputs, 1), 1.0, rtol=1e-9)
    np.testing.assert_array_equal(np.argmax(outputs, 1), support.targets)


def test_adaptation_observes_once():
    learner = build()
    params, episode = make_params(learner), make_episode()

    @jax.jit
    def adapt(params):
        return learner.adapt(
            params, episode.support, observe_fn=lambda task: learner.predict(task, episode.query.inputs)
        )

    task_params, info = adapt(params)
    outputs = jax.jit(learner.predict)(task_params, episode.query.inputs)
    chex.assert_trees_all_close(info.observed, outputs[None], rtol=1e-5)
    assert jax.eval_shape(learner.adapt, params, episode.support)[1].observed is None


def test_the_type_of_the_parameters_decides(x64):
    learner = build(smooth)
    params = learner.init(jax.random.key(0), make_episode().support.inputs)
    chex.assert_shape(params["projection"], (5, KEY_SIZE))
    for dtype in (jnp.float32, jnp.float64):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        task_params, _ = jax.eval_shape(learner.adapt, cast, make_episode().support)
        grads, _ = jax.eval_shape(jax.grad(learner.objective, has_aux=True), cast, make_episode())
        assert {leaf.dtype for leaf in jax.tree.leaves((task_params, grads))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_any_integer_label_will_do(x64, dtype):
    learner, episode = build(), make_episode()
    cast = episode.support._replace(targets=episode.support.targets.astype(dtype))
    params = make_params(learner)
    adapt = jax.jit(learner.adapt)
    chex.assert_trees_all_equal(adapt(params, cast)[0], adapt(params, episode.support)[0])


def test_a_stochastic_embedding_draws_from_the_key():
    def apply(params, inputs, *, key=None):
        return inputs if key is None else inputs + jax.random.normal(key, inputs.shape)

    # Two examples of different classes are written in any order, and only the third has a loss: no order matters.
    episode = make_episode(support=(0, 1), query=(0,))
    for stochastic in (True, False):
        learner = build(Model(lambda key, inputs: {}, apply, stochastic=stochastic), way=2, margin=2.0)
        params, objective, adapt = make_params(learner), jax.jit(learner.objective), jax.jit(learner.adapt)
        values = [
            float(objective(params, episode._replace(key=key))[0]) for key in (None, None, *jax.random.split(KEY))
        ]
        assert values[0] == values[1]
        assert len(set(values)) == (3 if stochastic else 1)
        entries = [entries_of(adapt(params, episode.support, key=key)[0]) for key in (None, KEY)]
        assert np.allclose(*entries) == (not stochastic)


KEY = jax.random.key(8)


def blob_sampler(shot, way=4, dim=8):
    """Classes are places in two of the features; the others are noise and larger."""

    def sample_episode(key):
        centre_key, noise_key, episode_key = jax.random.split(key, 3)
        centres = jax.random.normal(centre_key, (way, dim)).at[:, 2:].set(0.0)
        targets = jnp.tile(jnp.arange(way), 2 * shot)
        scale = jnp.where(jnp.arange(dim) < 2, 0.1, 1.0)
        inputs = centres[targets] + scale[None] * jax.random.normal(noise_key, (len(targets), dim))
        half = way * shot
        return Episode(Batch(inputs[:half], targets[:half]), Batch(inputs[half:], targets[half:]), episode_key)

    return sample_episode


def test_it_learns_what_tells_classes_apart():
    # Cosines of the raw features are dominated by noise.
    learner = build(models.mlp(features=(16, 8), activation=jnp.tanh), way=4, key_size=8, margin=0.1)
    optimizer, sample_episode = optax.adam(3e-3), blob_sampler(2)
    state = init_meta_state(learner, optimizer, jax.random.key(0), sample_episode(KEY).support.inputs)
    train = make_train_loop(learner, optimizer, sample_episode, meta_batch_size=8, num_steps=200, chunk_size=8)

    def accuracy(params):
        return evaluate(
            learner,
            params,
            sample_episode,
            jax.random.key(2),
            metric_fn=losses.accuracy,
            num_episodes=200,
            chunk_size=50,
        ).mean[0]

    before = accuracy(state.params)
    state, info = train(state, jax.random.key(1))
    assert info.finite.all()
    assert before < 0.6
    assert accuracy(state.params) > 0.75


def test_labels_that_do_not_fit_are_refused():
    learner = build()
    params, episode = make_params(learner), make_episode()
    for call in (lambda s: learner.adapt(params, s), lambda s: learner.objective(params, Episode(s, episode.query))):
        with pytest.raises(ValueError, match=r"the support set has no example of class 1 of way=3"):
            call(episode.support._replace(targets=jnp.array([0, 0, 2, 2, 0, 2])))
        with pytest.raises(ValueError, match=r"integer class indices \[S\]"):
            call(episode.support._replace(targets=jnp.zeros((6, 3))))
    with pytest.raises(ValueError, match=r"the episode has the label 7"):
        learner.objective(params, make_episode(query=(0, 7)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key_size": 0}, r"key_size must be an integer of at least 1, got 0"),
        ({"num_slots": 0}, r"num_slots must be an integer of at least 1, got 0"),
        ({"num_neighbours": 1.5}, r"num_neighbours must be an integer of at least 1, got 1\.5"),
        ({"margin": 0.0}, r"margin=0\.0 must be a positive number"),
    ],
)
def test_wrong_hyperparameters_are_refused(wrong, message):
    for make in (NeighbourMemory, functools.partial(memory_module, identity, way=2)):
        with pytest.raises(ValueError, match=message):
            make(**wrong)


def test_what_is_no_model_no_embedding_or_no_way_is_refused():
    with pytest.raises(ValueError, match=r"must be a maml_jax\.Model, got Dense"):
        build(nn.Dense(1))
    with pytest.raises(ValueError, match=r"the embedding must return \[S, D\]"):
        build().init(jax.random.key(0), jnp.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match=r"way must be an integer of at least 1, got 0"):
        build(way=0)
