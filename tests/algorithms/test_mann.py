import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from maml_jax import Batch, Episode, Model, evaluate, init_meta_state, losses, make_train_loop
from maml_jax.algorithms.mann import ExternalMemory, RecurrentUnits, lstm, mann

WAY, DIM = 2, 3
SMALL = {"num_units": 5, "num_slots": 4, "slot_size": 3, "num_reads": 2, "usage_decay": 0.6}
EVERY_LEARNER = pytest.mark.parametrize("name", ["mann", "lstm"])

flatten = Model(lambda key, inputs: {}, lambda params, inputs: inputs.reshape(len(inputs), -1))
smooth = Model(
    lambda key, inputs: {"kernel": jax.random.normal(key, (DIM, 4))},
    lambda params, inputs: jnp.tanh(inputs @ params["kernel"]),
)


def build(name, embedding=flatten, loss_fn=losses.cross_entropy, way=WAY, **kwargs):
    if name == "lstm":
        return lstm(embedding, loss_fn, way=way, **{"num_units": 5, **kwargs})
    return mann(embedding, loss_fn, way=way, **{**SMALL, **kwargs})


def make_episode(seed=0, support=(0, 1), query=(1, 0, 0, 1)):
    rng = np.random.default_rng(seed)

    def batch(targets):
        return Batch(jnp.asarray(rng.normal(size=(len(targets), DIM))), jnp.array(targets))

    return Episode(batch(support), batch(query), jax.random.key(seed))


def make_params(learner, seed=0):
    """Large weights and biases, so that gates, keys and cosines differ between slots, heads and steps."""
    params = learner.init(jax.random.key(seed), make_episode().support.inputs)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(100 + seed), len(leaves))
    return treedef.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_by_hand(params, hidden, cell, inputs):
    gates = np.concatenate([inputs, hidden]) @ params["kernel"] + params["bias"]
    write, forget, new, output = np.split(gates, 4)
    cell = sigmoid(forget) * cell + sigmoid(write) * np.tanh(new)
    return sigmoid(output) * np.tanh(cell), cell


class LSTMByHand:
    def __init__(self, params):
        self.params = jax.tree.map(np.asarray, params)
        self.hidden, self.cell = np.zeros(5), np.zeros(5)

    def step(self, x, label):
        self.hidden, self.cell = lstm_by_hand(
            self.params["controller"], self.hidden, self.cell, np.concatenate([x, label])
        )
        return self.hidden @ self.params["output"]["kernel"] + self.params["output"]["bias"]

    def state(self):
        return self.hidden, self.cell


class MANNByHand:
    """Equations 2 to 8 of the paper, slot by slot and head by head."""

    def __init__(self, params, decay=SMALL["usage_decay"]):
        self.params, self.decay = jax.tree.map(np.asarray, params), decay
        self.num_slots, self.size, self.num_reads = SMALL["num_slots"], SMALL["slot_size"], SMALL["num_reads"]
        self.hidden, self.cell = np.zeros(5), np.zeros(5)
        self.memory = np.full((self.num_slots, self.size), 1e-6)
        self.reads = np.zeros((self.num_reads, self.size))
        self.read_weights = np.zeros((self.num_reads, self.num_slots))
        self.usage = np.zeros(self.num_slots)
        self.read_weights[:, 0] = self.usage[0] = 1.0

    def head(self, name, j):
        return self.hidden @ self.params[name]["kernel"][j] + self.params[name]["bias"][j]

    def step(self, x, label):
        self.hidden, self.cell = lstm_by_hand(
            self.params["controller"], self.hidden, self.cell, np.concatenate([x, label, *self.reads])
        )
        slots = sorted(range(self.num_slots), key=lambda i: (self.usage[i], i))
        write_weights = np.zeros_like(self.read_weights)
        for j in range(self.num_reads):
            gate = sigmoid(self.head("gate", j)[0])
            for i in range(self.num_slots):
                write_weights[j, i] = gate * self.read_weights[j, i] + (1 - gate) * (i == slots[j])
        self.memory[slots[0]] = 0.0
        for j in range(self.num_reads):
            for i in range(self.num_slots):
                self.memory[i] += write_weights[j, i] * np.tanh(self.head("write", j))
        for j in range(self.num_reads):
            key = np.tanh(self.head("key", j))
            cosines = [key @ row / np.sqrt((key @ key) * (row @ row) + 1e-6) for row in self.memory]
            self.read_weights[j] = np.exp(cosines) / np.exp(cosines).sum()
            self.reads[j] = sum(w * row for w, row in zip(self.read_weights[j], self.memory, strict=True))
        self.usage = self.decay * self.usage
        for j in range(self.num_reads):
            self.usage += self.read_weights[j] + write_weights[j]
        return (
            np.concatenate([self.hidden, *self.reads]) @ self.params["output"]["kernel"] + self.params["output"]["bias"]
        )

    def state(self):
        return (self.hidden, self.cell), self.memory, self.reads.reshape(-1), self.read_weights, self.usage


BY_HAND = {"mann": MANNByHand, "lstm": LSTMByHand}


def run_by_hand(name, params, inputs, targets):
    """The network after the sequence, and its outputs [L, N]."""
    network, label, outputs = BY_HAND[name](params), np.zeros(WAY), []
    for x, target in zip(np.asarray(inputs), np.asarray(targets), strict=True):
        outputs.append(network.step(x, label))
        label = np.eye(WAY)[target]
    return network, np.stack(outputs)


@EVERY_LEARNER
def test_every_step_equals_the_equations_by_hand(x64, name):
    learner = build(name)
    params = make_params(learner)
    support, query, _ = make_episode(1, support=(0, 1, 1, 0, 1, 0, 0, 1), query=(0, 1, 1))
    for length in (2, 5, 8):
        read = jax.tree.map(lambda x, length=length: x[:length], support)
        task_params, info = jax.jit(learner.adapt)(params, read)
        network, _ = run_by_hand(name, params, *read)
        for value, expected in zip(
            jax.tree.leaves(task_params["state"]), jax.tree.leaves(network.state()), strict=True
        ):
            np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-13)
        np.testing.assert_array_equal(task_params["label"], np.eye(WAY)[read.targets[-1]])
        chex.assert_shape(info.support_loss, (0,))
    expected = [run_by_hand(name, params, *support)[0].step(x, np.eye(WAY)[1]) for x in np.asarray(query.inputs)]
    outputs = jax.jit(learner.predict)(task_params, query.inputs)
    np.testing.assert_allclose(outputs, np.stack(expected), rtol=1e-11)


def test_the_sequence_by_hand_visits_all_branches(x64):
    # What makes the test above tell: gates on both sides, and different slots are the least used one.
    learner = build("mann")
    support = make_episode(1, support=(0, 1, 1, 0, 1, 0, 0, 1)).support
    network, label, least, gates = MANNByHand(make_params(learner)), np.zeros(WAY), [], []
    for x, target in zip(np.asarray(support.inputs), np.asarray(support.targets), strict=True):
        least.append(int(np.argmin(network.usage)))
        network.step(x, label)
        gates.append([network.head("gate", j)[0] for j in range(2)])
        label = np.eye(WAY)[target]
    assert len(set(least)) >= 3
    assert np.max(gates) > 0.5
    assert np.min(gates) < -0.5


def captured(outputs, targets):
    """In place of a loss, what it is given."""
    return {"outputs": outputs, "targets": targets}


@EVERY_LEARNER
def test_the_objective_is_the_loss_of_every_step_of_one_order_of_support_and_query(x64, name):
    # Of all orders of the six examples exactly one explains the outputs. It is not that of the episode.
    params = make_params(build(name))
    orders = []
    for seed in range(3):
        episode = make_episode(seed)
        inputs, targets = (jnp.concatenate(x) for x in zip(episode.support, episode.query, strict=True))
        seen, _ = jax.jit(build(name, loss_fn=captured).objective)(params, episode)
        chex.assert_shape(seen["outputs"], (6, WAY))
        found = [
            order
            for order in map(list, itertools.permutations(range(6)))
            if np.array_equal(targets[np.array(order)], seen["targets"])
            and np.allclose(run_by_hand(name, params, inputs[np.array(order)], seen["targets"])[1], seen["outputs"])
        ]
        assert len(found) == 1
        orders += found
        value, info = jax.jit(build(name).objective)(params, episode)
        np.testing.assert_allclose(value, losses.cross_entropy(seen["outputs"], seen["targets"]), rtol=1e-12)
        chex.assert_shape(info.support_loss, (0,))
    assert list(range(6)) not in orders
    assert len({tuple(order) for order in orders}) > 1


def accuracy_by_counting(outputs, targets, num_instances):
    right = [[] for _ in range(len(targets))]
    counts = dict.fromkeys(range(WAY), 0)
    for output, target in zip(np.asarray(outputs), np.asarray(targets).tolist(), strict=True):
        right[counts[target]].append(np.argmax(output) == target)
        counts[target] += 1
    return [np.mean(right[i]) for i in range(num_instances)]


@pytest.mark.parametrize("query", [(1, 0, 0, 1, 1, 0, 1, 0), (1, 1, 1, 1, 0, 1, 1)])
def test_instances_are_counted_within_the_sequence(x64, query):
    params = make_params(build("lstm"))
    params["output"]["bias"] *= 0.0  # else the larger one is always predicted
    num_instances = (2 + len(query)) // WAY
    values = []
    objective = jax.jit(build("lstm", loss_fn=captured).objective)
    for seed in range(8):
        seen, info = objective(params, make_episode(seed, query=query))
        expected = accuracy_by_counting(seen["outputs"], seen["targets"], num_instances)
        np.testing.assert_allclose(info.instance_accuracy, expected)
        values.append(info.instance_accuracy)
    assert jnp.std(jnp.stack(values)) > 0.1


@EVERY_LEARNER
def test_gradient_agrees_with_finite_differences(x64, name):
    learner = build(name, smooth)
    params = learner.init(jax.random.key(1), make_episode().support.inputs)
    gradient = jax.jit(jax.grad(learner.objective, has_aux=True))(params, make_episode())[0]
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    check_grads(jax.jit(lambda params: learner.objective(params, make_episode())[0]), (params,), order=1, modes=["rev"])


@EVERY_LEARNER
def test_mapping_over_episodes_is_a_loop(x64, name):
    learner = build(name, smooth)
    params = make_params(learner)
    gradient = jax.jit(jax.value_and_grad(learner.objective, has_aux=True))
    episodes = [make_episode(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *episodes)
    mapped = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(params, stacked)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *[gradient(params, episode) for episode in episodes])
    chex.assert_trees_all_close(mapped, looped, rtol=1e-9, atol=1e-12)


@EVERY_LEARNER
def test_the_order_comes_from_the_key_and_is_the_given_one_without(name):
    learner = build(name)
    params = make_params(learner)
    support = make_episode(support=(0, 1, 1, 0, 1, 0)).support
    adapt = jax.jit(learner.adapt)
    states = [adapt(params, support, key=jax.random.key(seed))[0]["state"] for seed in (0, 0, 1)]
    chex.assert_trees_all_equal(states[0], states[1])
    first, other = (jax.tree.leaves(state)[0] for state in states[1:])
    assert jnp.max(jnp.abs(first - other)) > 1e-3
    without = [adapt(params, support)[0]["state"] for _ in range(2)]
    chex.assert_trees_all_equal(*without)
    moved = adapt(params, jax.tree.map(lambda x: x[::-1], support))[0]["state"]
    assert jnp.max(jnp.abs(jax.tree.leaves(moved)[0] - jax.tree.leaves(without[0])[0])) > 1e-3


@EVERY_LEARNER
def test_a_query_does_not_depend_on_the_others(x64, name):
    learner = build(name, smooth)
    params = make_params(learner)
    support, query, _ = make_episode(3)
    task_params, _ = jax.jit(learner.adapt)(params, support)
    predict = jax.jit(learner.predict)
    together = predict(task_params, query.inputs)
    chex.assert_trees_all_close(predict(task_params, query.inputs[::-1])[::-1], together, rtol=1e-12)
    others = predict(task_params, query.inputs.at[1:].set(5.0))
    chex.assert_trees_all_close(together[0], others[0], rtol=1e-12)


@EVERY_LEARNER
def test_adaptation_observes_once(name):
    learner = build(name)
    params = make_params(learner)
    support, query, _ = make_episode()

    @jax.jit
    def adapt(params):
        return learner.adapt(params, support, observe_fn=lambda task: learner.predict(task, query.inputs))

    task_params, info = adapt(params)
    chex.assert_trees_all_close(info.observed, jax.jit(learner.predict)(task_params, query.inputs)[None], rtol=1e-5)
    assert jax.eval_shape(learner.adapt, params, support)[1].observed is None


@EVERY_LEARNER
def test_parameters_without_an_embedding_start_as_documented(name):
    learner = build(name)
    params = learner.init(jax.random.key(0), jnp.zeros((4, 3, 2, 1)))  # flattened to 6
    assert params["embedding"] == {}
    names = {"mann": {"controller", "key", "write", "gate", "output"}, "lstm": {"controller", "output"}}[name]
    assert set(params) == names | {"embedding"}
    num_reads = SMALL["num_reads"] * SMALL["slot_size"] if name == "mann" else 0
    chex.assert_shape(params["controller"]["kernel"], (6 + WAY + num_reads + 5, 20))
    chex.assert_shape(params["output"]["kernel"], (5 + num_reads, WAY))
    if name == "mann":
        kernel = params["write"]["kernel"]
        chex.assert_shape(kernel, (2, 5, 3))
        assert jnp.max(jnp.abs(kernel[0] - kernel[1])) > 0.1  # heads are drawn apart
        assert jnp.sqrt(6 / 8) * 0.7 < jnp.max(jnp.abs(kernel)) < jnp.sqrt(6 / 8)  # Glorot of one head


@EVERY_LEARNER
def test_the_type_of_the_parameters_decides(name, x64):
    learner = build(name, smooth)
    params = learner.init(jax.random.key(0), make_episode().support.inputs)
    for dtype in (jnp.float32, jnp.float64):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        task_params, _ = jax.eval_shape(learner.adapt, cast, make_episode().support)
        grads, _ = jax.eval_shape(jax.grad(learner.objective, has_aux=True), cast, make_episode())
        assert {leaf.dtype for leaf in jax.tree.leaves((task_params, grads))} == {jnp.dtype(dtype)}


@EVERY_LEARNER
def test_a_stochastic_embedding_draws_from_the_key(name):
    def apply(params, inputs, *, key=None):
        return inputs if key is None else inputs + jax.random.normal(key, inputs.shape)

    # All examples of a class are the same, and one class: no order matters.
    same = Batch(jnp.ones((4, DIM)), jnp.zeros(4, int))
    episodes = [Episode(same, same, jax.random.key(seed)) for seed in (0, 0, 1)]
    for stochastic, distinct in ((True, 2), (False, 1)):
        learner = build(name, Model(lambda key, inputs: {}, apply, stochastic=stochastic), captured, way=1)
        params, objective, adapt = make_params(learner), jax.jit(learner.objective), jax.jit(learner.adapt)
        values = [float(jnp.sum(objective(params, episode)[0]["outputs"])) for episode in episodes]
        assert len(set(values)) == distinct
        adapted = [adapt(params, same, key=key)[0]["state"] for key in (None, None, jax.random.key(0))]
        chex.assert_trees_all_equal(adapted[0], adapted[1])
        change = jnp.max(jnp.abs(jax.tree.leaves(adapted[0])[0] - jax.tree.leaves(adapted[2])[0]))
        assert (change > 1e-3) == stochastic


@functools.cache
def blob_sampler(num_per_class):
    """Two clusters at places of their own in every episode; which of them has label 0 is random too."""

    def sample_episode(key):
        centre_key, noise_key, episode_key = jax.random.split(key, 3)
        centre = jax.random.normal(centre_key, (DIM,))
        centres = 2.0 * jnp.stack([centre, -centre]) / jnp.linalg.norm(centre)
        targets = jnp.tile(jnp.arange(WAY), num_per_class)
        inputs = centres[targets] + 0.2 * jax.random.normal(noise_key, (2 * num_per_class, DIM))
        half = 2 * (num_per_class // 2)
        return Episode(Batch(inputs[:half], targets[:half]), Batch(inputs[half:], targets[half:]), episode_key)

    return sample_episode


@EVERY_LEARNER
def test_it_learns_to_bind_labels(name):
    # Without the labels that came before, no one does better than one half.
    learner = build(name, num_units=24, **({"num_slots": 8, "slot_size": 8} if name == "mann" else {}))
    optimizer, sample_episode = optax.adam(1e-2), blob_sampler(6)
    state = init_meta_state(learner, optimizer, jax.random.key(0), sample_episode(jax.random.key(0)).support.inputs)
    train = make_train_loop(learner, optimizer, sample_episode, meta_batch_size=16, num_steps=250, chunk_size=16)
    state, info = train(state, jax.random.key(1))
    instances = info.objective.instance_accuracy[-20:].mean(0)
    chex.assert_shape(instances, (6,))
    assert instances[0] < 0.85  # of a sequence of two classes, half are known when the other one has been seen
    assert instances[2:].min() > 0.9
    accuracy = evaluate(
        learner, state.params, sample_episode, jax.random.key(2), metric_fn=losses.accuracy, num_episodes=100
    ).mean
    chex.assert_shape(accuracy, (1,))
    assert accuracy[0] > 0.85


@EVERY_LEARNER
def test_an_episode_without_a_key_is_refused(name):
    learner = build(name)
    with pytest.raises(ValueError, match=r"key of the episode, which is None; set it with episode\._replace\(key="):
        learner.objective(make_params(learner), make_episode()._replace(key=None))


@EVERY_LEARNER
def test_labels_that_do_not_fit_are_refused(name):
    learner = build(name)
    params, episode = make_params(learner), make_episode()
    with pytest.raises(ValueError, match=r"the support set has no example of class 1 of way=2"):
        learner.adapt(params, episode.support._replace(targets=jnp.zeros(2, int)))
    with pytest.raises(ValueError, match=r"the support set has the label 2"):
        learner.objective(params, make_episode(support=(0, 1, 2)))
    with pytest.raises(ValueError, match=r"the episode has the label 7"):
        learner.objective(params, make_episode(query=(0, 7)))


@EVERY_LEARNER
def test_what_is_no_model_or_no_embedding_is_refused(name):
    with pytest.raises(ValueError, match=r"must be a maml_jax\.Model, got Dense"):
        build(name, nn.Dense(1))
    with pytest.raises(ValueError, match=r"the embedding must return \[S, D\]"):
        build(name, Model(lambda key, inputs: {}, lambda params, x: x)).init(jax.random.key(0), jnp.zeros((2, 2, 2)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_units": 0}, r"num_units must be an integer of at least 1, got 0"),
        ({"num_slots": 2.5}, r"num_slots must be an integer of at least 1, got 2\.5"),
        ({"slot_size": 0}, r"slot_size must be an integer of at least 1"),
        ({"num_reads": 0}, r"num_reads must be an integer of at least 1"),
        ({"num_slots": 3, "num_reads": 4}, r"num_slots=3 is less than num_reads=4"),
        ({"usage_decay": 1.5}, r"usage_decay=1\.5 must be a number from 0 to 1"),
        ({"usage_decay": float("nan")}, r"usage_decay=nan must be a number from 0 to 1"),
        ({"usage_decay": jnp.array(5.0)}, r"usage_decay=5\.0 must be a number from 0 to 1"),
        ({"usage_decay": None}, "usage_decay=None must be a number from 0 to 1"),
    ],
)
def test_wrong_hyperparameters_are_refused(wrong, message):
    for make in (ExternalMemory, functools.partial(mann, flatten, losses.cross_entropy, way=2)):
        with pytest.raises(ValueError, match=message):
            make(**wrong)


def test_wrong_hyperparameters_of_the_lstm_are_refused():
    for make in (RecurrentUnits, functools.partial(lstm, flatten, losses.cross_entropy, way=2)):
        with pytest.raises(ValueError, match=r"num_units must be an integer of at least 1, got -1"):
            make(num_units=-1)
    for name in ("mann", "lstm"):
        with pytest.raises(ValueError, match=r"way must be an integer of at least 1, got 0"):
            build(name, way=0)
