"""Hyperparameters learned through a training run: the run by hand, and its derivative."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads

from maml_jax import (
    Batch,
    Episode,
    Model,
    evaluate,
    evaluate_objective,
    hypergradient,
    init_meta_state,
    losses,
    make_train_loop,
    models,
)
from maml_jax.algorithms.hypergradient import RunHyperparameters, default_segments, training_run
from maml_jax.cost import temporary_bytes
from maml_jax.inner.steps import mini_batches
from maml_jax.parallel import task_mesh

STEPS, LAYERS = 6, ("dense_0", "dense_1")


@pytest.fixture
def problem(x64):
    """A training run in float64: the model, data, where it starts, mini-batches, and hyperparameters."""
    model = models.mlp(features=(4, 3), activation=nn.tanh, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    data = Batch(jnp.asarray(rng.normal(size=(12, 5))), jnp.asarray(rng.integers(0, 3, 12)))
    start = RunHyperparameters(
        {name: jnp.asarray(rng.normal(-0.5, 0.3, STEPS)) for name in LAYERS},
        jnp.asarray(rng.normal(size=STEPS)),
        {name: jnp.asarray(rng.normal(-2.0, 0.3)) for name in LAYERS},
    )
    network = jax.jit(model.init)(jax.random.key(0), data.inputs)
    return model, data, network, mini_batches(jax.random.key(1), 12, STEPS, 4), start


def query_loss(problem, **settings):
    """`(hyperparameters) -> loss` after the run, jitted, on data that the run has not seen."""
    model, data, network, chosen, _ = problem
    rng = np.random.default_rng(1)
    query = Batch(jnp.asarray(rng.normal(size=(7, 5))), jnp.asarray(rng.integers(0, 3, 7)))

    def loss(hyperparameters):
        trained, _ = training_run(model, losses.cross_entropy, hyperparameters, network, data, chosen, **settings)
        return losses.cross_entropy(model.apply(trained, query.inputs), query.targets)

    return jax.jit(loss)


def gradient_of(problem, **settings):
    return jax.jit(jax.value_and_grad(query_loss(problem, **settings)))(problem[-1])


def distance(a, b):
    return optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b)


def test_the_training_set_may_be_of_numpy(problem):
    model, data, network, chosen, start = problem
    data, settings = jax.tree.map(np.asarray, data), {"num_segments": 1, "inner_grad": jax.value_and_grad}

    def train(hyperparameters):
        return training_run(model, losses.cross_entropy, hyperparameters, network, data, chosen, **settings)[0]

    chex.assert_trees_all_equal_shapes(jax.eval_shape(train, start), network)


def test_hypergradient_agrees_with_finite_differences(problem):
    check_grads(query_loss(problem, num_segments=3), (problem[-1],), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)
    _, gradient = gradient_of(problem, num_segments=3)
    assert all(np.all(np.abs(leaf) > 0) for leaf in jax.tree.leaves(gradient))


def test_one_device_and_two_take_the_same_path():
    model = models.mlp(features=(4, 3))

    def initial(names):
        rates = {name: jnp.full(STEPS, -1.0) for name in names}
        return RunHyperparameters(rates, jnp.zeros(STEPS), {name: jnp.float32(-3.0) for name in names})

    def sample(key):
        data_key, label_key, run_key = jax.random.split(key, 3)
        inputs, targets = jax.random.normal(data_key, (12, 5)), jax.random.randint(label_key, (12,), 0, 3)
        data = Batch(inputs, targets)
        return Episode(jax.tree.map(lambda x: x[:8], data), jax.tree.map(lambda x: x[8:], data), run_key)

    learner = hypergradient(
        model, losses.cross_entropy, initial=initial, num_inner_steps=STEPS, batch_size=4, num_segments=2
    )
    optimizer, found = optax.adam(0.1), []
    for mesh in (None, task_mesh(jax.devices()[:2])):
        loop = make_train_loop(learner, optimizer, sample, meta_batch_size=4, num_steps=3, mesh=mesh)
        state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((1, 5)))
        found.append(jax.device_get(loop(state, jax.random.key(1))))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-5)
    assert all(
        np.all(np.abs(leaf - start) > 1e-3)
        for leaf, start in zip(jax.tree.leaves(found[0][0].params), jax.tree.leaves(initial(LAYERS)), strict=True)
    )


def test_segments_and_mixed_mode_change_nothing_but_memory(problem):
    _, plain = gradient_of(problem, inner_grad=jax.value_and_grad)
    for num_segments in (1, 3):
        assert distance(gradient_of(problem, num_segments=num_segments)[1], plain) < 1e-13


def test_a_training_run_is_descent_with_momentum_on_the_penalised_loss(problem):
    # Maclaurin et al., Algorithm 1, in a loop of Python.
    model, data, network, chosen, start = problem
    found, support_loss = jax.jit(
        lambda start: training_run(model, losses.cross_entropy, start, network, data, chosen, num_segments=2)
    )(start)

    @jax.jit
    @jax.value_and_grad
    def loss(network, chosen):
        penalty = sum(
            jnp.exp(start.log_l2[name]) * sum(jnp.sum(x**2) for x in jax.tree.leaves(network[name])) for name in LAYERS
        )
        return losses.cross_entropy(model.apply(network, data.inputs[chosen]), data.targets[chosen]) + penalty / 2

    velocity = jax.tree.map(jnp.zeros_like, network)
    for k in range(STEPS):
        value, grads = loss(network, chosen[k])
        np.testing.assert_allclose(support_loss[k], value, rtol=1e-12)
        momentum = 1 / (1 + np.exp(-start.momentum_logits[k]))
        velocity = jax.tree.map(lambda v, g, m=momentum: m * v - (1 - m) * g, velocity, grads)
        rates = {name: np.exp(start.log_rates[name][k]) for name in LAYERS}
        network = {
            name: jax.tree.map(lambda w, v, rate=rates[name]: w + rate * v, network[name], velocity[name])
            for name in LAYERS
        }
    assert distance(found, network) < 1e-13


def test_truncation_keeps_the_run_and_the_last_derivatives(problem):
    full_loss, full = gradient_of(problem)
    loss, truncated = gradient_of(problem, truncation=2, num_segments=2)
    np.testing.assert_allclose(loss, full_loss, rtol=1e-13)
    for name in LAYERS:
        np.testing.assert_array_equal(truncated.log_rates[name][:-2], 0.0)
        np.testing.assert_allclose(truncated.log_rates[name][-2:], full.log_rates[name][-2:], rtol=1e-11)
        assert np.abs(truncated.log_l2[name]) > 0
    np.testing.assert_array_equal(truncated.momentum_logits[:-2], 0.0)
    np.testing.assert_allclose(truncated.momentum_logits[-2:], full.momentum_logits[-2:], rtol=1e-11)
    # The strength acts in every step, and only its effect in the last two is differentiated.
    assert all(np.abs(truncated.log_l2[name] - full.log_l2[name]) > 1e-3 * np.abs(full.log_l2[name]) for name in LAYERS)


@pytest.mark.parametrize(("steps", "segments"), [(400, 20), (100, 10), (50, 5), (7, 1), (1, 1), (12, 3)])
def test_segments_divide_the_steps(steps, segments):
    assert default_segments(steps) == segments


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_segments": 4}, "num_segments=4 does not divide the 6 differentiated steps; choose a divisor, such as 2"),
        ({"truncation": 7}, "truncation=7 exceeds num_inner_steps=6"),
        ({"truncation": 0}, "truncation must be an integer of at least 1, got 0"),
        ({"num_segments": 0}, "num_segments must be an integer of at least 1, got 0"),
        ({"num_inner_steps": 0}, "num_inner_steps must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    model = models.mlp(features=(4, 3))
    settings = {"initial": lambda layers: None, "num_inner_steps": STEPS, "batch_size": 4} | wrong
    with pytest.raises(ValueError, match=message):
        hypergradient(model, losses.cross_entropy, **settings)


def test_a_network_that_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"model must be a maml_jax\.Model, got function"):
        hypergradient(lambda x: x, losses.cross_entropy, initial=lambda layers: None, num_inner_steps=2, batch_size=2)


def test_a_run_without_a_key_is_refused():
    learner = hypergradient(
        models.mlp(features=(4, 3)), losses.cross_entropy, initial=lambda layers: None, num_inner_steps=2, batch_size=2
    )
    support = Batch(jnp.zeros((4, 5)), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match="a training run needs a key"):
        learner.adapt(None, support)


def test_a_run_is_evaluated_once_at_its_end():
    def initial(layers):
        strengths = dict.fromkeys(layers, jnp.float32(-9.0))
        return RunHyperparameters(dict.fromkeys(layers, jnp.zeros(2)), jnp.zeros(2), strengths)

    learner = hypergradient(
        models.mlp(features=(3,)), losses.cross_entropy, initial=initial, num_inner_steps=2, batch_size=5
    )

    def sample(key):
        inputs = jax.random.normal(key, (9, 4))
        batch = Batch(inputs, jnp.arange(9) % 3)
        return Episode(batch, batch, key)

    hyperparameters = learner.init(jax.random.key(0), jnp.zeros((9, 4)))
    settings = {"metric_fn": losses.cross_entropy, "num_episodes": 2}
    found = evaluate(learner, hyperparameters, sample, jax.random.key(1), stochastic=True, **settings)
    chex.assert_shape(found.mean, (1,))
    objective = evaluate_objective(learner, hyperparameters, sample, jax.random.key(1), num_episodes=2)
    chex.assert_trees_all_close(found.mean[0], objective.mean[0], rtol=1e-5)


def test_what_is_learned_and_trained_has_the_right_form():
    def build(model, initial):
        learner = hypergradient(model, losses.cross_entropy, initial=initial, num_inner_steps=2, batch_size=2)
        return learner.init(jax.random.key(0), jnp.zeros((4, 5)))

    with pytest.raises(ValueError, match=r"initial must return RunHyperparameters\(.*\), got a dict"):
        build(models.mlp(features=(3,)), lambda layers: {"log_rates": 0.0})
    flat = Model(lambda key, inputs: jnp.zeros((5, 3)), lambda params, inputs: inputs @ params)
    with pytest.raises(ValueError, match="must be a dictionary of layers, got a ShapeDtypeStruct"):
        build(flat, lambda layers: None)


def test_mini_batches_are_drawn_from_all_examples_whatever_the_targets():
    def loss(outputs, targets):
        return jnp.mean((outputs - targets["a"]) ** 2) + jnp.mean(targets["b"])

    def initial(layers):
        strengths = dict.fromkeys(layers, jnp.float32(-9.0))
        return RunHyperparameters(dict.fromkeys(layers, jnp.zeros(2)), jnp.zeros(2), strengths)

    learner = hypergradient(models.mlp(features=(1,)), loss, initial=initial, num_inner_steps=2, batch_size=5)
    inputs, column = jnp.zeros((9, 3)), jnp.zeros((9, 1))
    support = Batch(inputs, {"a": column, "b": column})
    jax.eval_shape(lambda key: learner.adapt(learner.init(key, inputs), support, key=key), jax.random.key(0))


def test_the_key_gives_the_weights_and_the_order_of_the_examples():
    # One step of a run whose weights do not depend on the key tells which examples were in its mini-batch.
    model = Model(lambda key, inputs: {"dense": jnp.zeros(6)}, lambda params, inputs: inputs @ params["dense"])
    start = RunHyperparameters({"dense": jnp.zeros(1)}, jnp.zeros(1), {"dense": jnp.float32(-9.0)})
    data = Batch(jnp.eye(6), jnp.ones(6))
    settings = {"initial": lambda layers: start, "num_inner_steps": 1, "batch_size": 2}
    learner = hypergradient(model, losses.mean_squared_error, **settings)
    keys = jax.random.split(jax.random.key(0), 30)
    networks, _ = jax.vmap(lambda key: learner.adapt(start, data, key=key))(keys)
    seen = networks["dense"] != 0.0
    np.testing.assert_array_equal(seen.sum(1), 2)
    assert np.all(seen.any(0))
    drawn = model._replace(init=lambda key, inputs: {"dense": jax.random.normal(key, (6,))})
    weights, _ = jax.vmap(
        lambda key: hypergradient(drawn, losses.mean_squared_error, **settings).adapt(start, data, key=key)
    )(keys)
    assert np.all(np.std(weights["dense"], 0) > 0.5)


def test_a_run_that_nothing_scores_is_refused():
    learner = hypergradient(
        models.mlp(features=(4, 3)), losses.cross_entropy, initial=lambda layers: None, num_inner_steps=2, batch_size=2
    )
    support, query = (Batch(jnp.zeros((n, 5)), jnp.zeros(n, jnp.int32)) for n in (4, 0))
    with pytest.raises(ValueError, match="the query set of the episode is empty"):
        learner.objective(None, Episode(support, query, jax.random.key(0)))


def test_the_objective_trains_on_the_support_set_and_is_scored_on_the_query_set(x64):
    rng = np.random.default_rng(0)
    batches = [Batch(jnp.asarray(rng.normal(size=(n, 5))), jnp.asarray(rng.integers(0, 3, n))) for n in (6, 4)]
    episode, model = Episode(*batches, jax.random.key(3)), models.mlp(features=(3,), param_dtype=jnp.float64)
    start = RunHyperparameters({"dense_0": jnp.zeros(3)}, jnp.zeros(3), {"dense_0": jnp.zeros(())})
    settings = {"initial": lambda layers: start, "num_inner_steps": 3, "batch_size": 4, "truncation": 1}
    settings["inner_grad"] = jax.value_and_grad
    learner = hypergradient(model, losses.cross_entropy, metric_fn=losses.accuracy, **settings)
    network, _ = learner.adapt(start, episode.support, key=episode.key)
    (loss, info), grads = jax.jit(jax.value_and_grad(learner.objective, has_aux=True))(start, episode)
    outputs = model.apply(network, episode.query.inputs)
    np.testing.assert_allclose(loss, losses.cross_entropy(outputs, episode.query.targets), rtol=1e-12)
    assert info.metric == losses.accuracy(outputs, episode.query.targets)
    np.testing.assert_array_equal(grads.momentum_logits != 0, [False, False, True])


def test_inputs_may_be_any_pytree(problem):
    model, data, _, _, start = problem

    def shifted(model):
        return Model(
            lambda key, inputs: model.init(key, inputs[0]),
            lambda params, inputs: model.apply(params, inputs[0] + inputs[1]),
        )

    settings = {"initial": lambda names: start, "num_inner_steps": STEPS, "batch_size": 4}
    plain, paired = (hypergradient(of, losses.cross_entropy, **settings) for of in (model, shifted(model)))
    pairs = data._replace(inputs=(data.inputs - 1.0, jnp.ones_like(data.inputs)))
    expected = plain.adapt(start, data, key=jax.random.key(0))[0]
    chex.assert_trees_all_close(paired.adapt(start, pairs, key=jax.random.key(0))[0], expected, rtol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"num_segments": 3}, {"truncation": 2}, {"truncation": 4, "num_segments": 2}])
def test_the_losses_of_all_mini_batches_are_in_the_order_of_the_steps(problem, settings):
    model, data, network, chosen, start = problem
    plain, found = (
        training_run(model, losses.cross_entropy, start, network, data, chosen, **kwargs)[1]
        for kwargs in ({}, settings)
    )
    assert plain.shape == (STEPS,)
    assert np.min(np.abs(np.diff(plain))) > 1e-3
    np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_the_info_of_the_objective_has_the_losses_of_the_run(problem):
    model, data, _, _, start = problem
    learner = hypergradient(
        model, losses.cross_entropy, initial=lambda names: start, num_inner_steps=STEPS, batch_size=4, num_segments=2
    )
    episode = Episode(data, data, jax.random.key(3))
    _, expected = learner.adapt(start, data, key=episode.key)
    _, info = learner.objective(start, episode)
    chex.assert_trees_all_close(info.support_loss, expected.support_loss, rtol=1e-12)
    assert info.metric is None


def test_only_the_first_states_of_segments_are_stored():
    steps, layers = 64, ("dense_0",)
    model = models.mlp(features=(1000,))
    data = Batch(jnp.ones((4, 8)), jnp.zeros(4, jnp.int32))

    def initial(names):
        rates = {name: jnp.zeros(steps) for name in names}
        return RunHyperparameters(rates, jnp.zeros(steps), {name: jnp.float32(-9.0) for name in names})

    def temporaries(num_segments):
        settings = {"initial": initial, "num_inner_steps": steps, "batch_size": 4, "num_segments": num_segments}
        learner = hypergradient(model, losses.cross_entropy, **settings)
        episode = Episode(data, data, jax.random.key(0))
        return temporary_bytes(jax.grad(learner.objective, has_aux=True), initial(layers), episode)

    # Eight segments of eight steps keep about 8 + 8 states, and one segment keeps 64.
    assert temporaries(8) < 0.5 * temporaries(1)


def test_a_network_of_nnx_is_trained_as_one_of_dictionaries(problem):
    plain, data, network, chosen, start = problem

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.dense_0 = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)
            self.dense_1 = nnx.Linear(4, 3, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, inputs):
            return self.dense_1(nn.tanh(self.dense_0(inputs)))

    model = models.from_nnx(Network)
    like = model.init(jax.random.key(0), data.inputs)
    same = jax.tree.structure(like).unflatten(jax.tree.leaves(network))
    found, _ = training_run(model, losses.cross_entropy, start, same, data, chosen)
    expected, _ = training_run(plain, losses.cross_entropy, start, network, data, chosen)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    chex.assert_trees_all_close(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-12)


@pytest.mark.parametrize("wrong", ["log_rates", "log_l2"])
def test_every_layer_has_rates_and_a_penalty(problem, wrong):
    model, data, _, _, start = problem
    without = start._replace(**{wrong: {"dense_0": getattr(start, wrong)["dense_0"]}})
    learner = hypergradient(
        model, losses.cross_entropy, initial=lambda names: without, num_inner_steps=STEPS, batch_size=4
    )
    message = rf"{wrong} of initial has the layers \['dense_0'\], and the network has \['dense_0', 'dense_1'\]"
    with pytest.raises(ValueError, match=message):
        learner.init(jax.random.key(0), data.inputs)


def test_the_inner_gradient_is_the_one_asked_for(problem):
    model, data, _, _, start = problem
    taken = []

    def recorded(fun, *args, **kwargs):
        taken.append(fun)
        return jax.value_and_grad(fun, *args, **kwargs)

    settings = {"initial": lambda names: start, "num_inner_steps": STEPS, "batch_size": 4, "truncation": 2}
    learner = hypergradient(model, losses.cross_entropy, inner_grad=recorded, **settings)
    jax.eval_shape(lambda start: learner.adapt(start, data, key=jax.random.key(0)), start)
    assert len(taken) == 2  # before the truncation and after it
