import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from linear_regression import Quadratic, half_mse, linear_model, make_episode, make_episodes

from maml_jax import Batch, Episode, Model, evaluate, init_meta_state, losses, make_train_loop, models
from maml_jax.algorithms.meta_lstm import LearnedOptimizer, gated_descent, meta_lstm, preprocessed
from maml_jax.tasks import sinusoid

UNITS = 3
NUM_STEPS = 3


def fixed_gates(meta_params, forget_bias, write_bias):
    """Weights for which every gate is the sigmoid of its bias."""
    learner = jax.tree.map(jnp.zeros_like, meta_params["learner"])
    learner["forget"]["bias"] = learner["forget"]["bias"] + forget_bias
    learner["write"]["bias"] = learner["write"]["bias"] + write_bias
    return {**meta_params, "learner": learner}


def large_weights(meta_params, seed=3):
    """Weights of order one, so that each of them matters to the gates."""
    leaves, treedef = jax.tree.flatten(meta_params["learner"])
    rng = np.random.default_rng(seed)
    leaves = [leaf + rng.normal(scale=0.5, size=leaf.shape) for leaf in leaves]
    return {**meta_params, "learner": treedef.unflatten(leaves)}


def build(num_inner_steps=NUM_STEPS, model=linear_model, loss_fn=half_mse, **keywords):
    return meta_lstm(model, loss_fn, num_inner_steps=num_inner_steps, num_units=UNITS, **keywords)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_with_fixed_gates_it_is_gradient_descent_with_decay(x64, num_steps):
    # φ_{k+1} = f φ_k − i ∇L_S(φ_k), and with constant gradients ∂φ_K/∂θ = f^K: no Hessian.
    episode = make_episode(jax.random.key(0))
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    learner = build(num_steps)
    meta_params = fixed_gates(learner.init(jax.random.key(1), episode.support.inputs), 1.5, -0.7)
    forget, rate = 1 / (1 + np.exp(-1.5)), 1 / (1 + np.exp(0.7))
    phi, support_losses = meta_params["params"], []
    for _ in range(num_steps):
        support_losses.append(half_mse(episode.support.inputs @ phi, episode.support.targets))
        phi = forget * phi - rate * support.gradient(phi)
    task_params, info = learner.adapt(meta_params, episode.support)
    chex.assert_trees_all_close(task_params, phi, rtol=1e-12)
    chex.assert_trees_all_close(info.support_loss, jnp.asarray(support_losses).reshape(num_steps), rtol=1e-12)
    grads, _ = jax.grad(learner.objective, has_aux=True)(meta_params, episode)
    chex.assert_trees_all_close(grads["params"], forget**num_steps * query.gradient(phi), rtol=1e-12)


def unrolled(meta_params, episode, num_steps):
    """The objective written out, step by step and gate by gate."""
    theta, weights = meta_params["params"], meta_params["learner"]
    hidden = cell = np.zeros((theta.size, UNITS))
    forget = write = np.zeros(theta.size)

    def sigmoid(x):
        return 1 / (1 + jnp.exp(-x))

    def halves(x):
        return jnp.where(jnp.abs(x) >= np.exp(-10), jnp.log(jnp.abs(x)) / 10, -1.0), jnp.sign(x)

    def gate(layer, before):
        w = layer["kernel"]
        return sigmoid(hidden @ w[:UNITS] + w[UNITS] * theta + w[UNITS + 1] * before + layer["bias"])

    for _ in range(num_steps):
        residual = episode.support.inputs @ theta - episode.support.targets
        gradient = jax.lax.stop_gradient(episode.support.inputs.T @ residual / residual.size)
        loss = jax.lax.stop_gradient(0.5 * jnp.mean(residual**2)) * jnp.ones(theta.size)
        inputs = jnp.stack([*halves(loss), *halves(gradient)], 1)
        kernel, bias = weights["lstm"]["kernel"], weights["lstm"]["bias"]
        gates = [
            inputs @ kernel[:4, n * UNITS : (n + 1) * UNITS]
            + hidden @ kernel[4:, n * UNITS : (n + 1) * UNITS]
            + bias[None, n * UNITS : (n + 1) * UNITS]
            for n in range(4)
        ]
        cell = sigmoid(gates[1]) * cell + sigmoid(gates[0]) * jnp.tanh(gates[2])
        hidden = sigmoid(gates[3]) * jnp.tanh(cell)
        forget, write = gate(weights["forget"], forget), gate(weights["write"], write)
        theta = forget * theta - write * gradient
    return half_mse(episode.query.inputs @ theta, episode.query.targets)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_objective_and_meta_gradient_equal_those_of_a_loop_written_out(x64, num_steps):
    episode = make_episode(jax.random.key(2))
    learner = build(num_steps)
    meta_params = large_weights(learner.init(jax.random.key(1), episode.support.inputs))
    (value, _), grads = jax.jit(jax.value_and_grad(learner.objective, has_aux=True))(meta_params, episode)
    expected = jax.jit(jax.value_and_grad(lambda p: unrolled(p, episode, num_steps)))(meta_params)
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-9, atol=1e-14)
    if num_steps == 3:
        assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_finite_differences_where_the_gradient_of_the_network_is_constant(x64):
    # A support loss that is linear in θ and whose value does not change: nothing that is stopped depends on θ.
    def linear(outputs, targets):
        loss = jnp.mean(outputs * targets)
        return loss - jax.lax.stop_gradient(loss)

    episode = make_episode(jax.random.key(3))
    learner = meta_lstm(linear_model, linear, half_mse, num_inner_steps=NUM_STEPS, num_units=UNITS)
    meta_params = large_weights(learner.init(jax.random.key(1), episode.support.inputs))
    check_grads(jax.jit(lambda p: learner.objective(p, episode)[0]), (meta_params,), order=1, modes=["rev"])


def test_numbers_are_preprocessed_as_published():
    numbers = np.array([2.0, -0.5, np.exp(-9.9), -np.exp(-10.1), 1e-9, 0.0, -1e6])
    expected = [
        [np.log(2) / 10, 1],
        [np.log(0.5) / 10, -1],
        [-0.99, 1],
        [-1, -np.exp(-0.1)],
        [-1, 1e-9 * np.exp(10)],
        [-1, 0],
        [np.log(1e6) / 10, -1],
    ]
    np.testing.assert_allclose(preprocessed(jnp.asarray(numbers)), expected, rtol=1e-6)
    assert preprocessed(jnp.zeros((2, 3))).shape == (2, 3, 2)


def test_coordinates_share_the_weights(x64):
    episode, order = make_episode(jax.random.key(4)), np.array([2, 0, 3, 1])
    learner = build()
    meta_params = large_weights(learner.init(jax.random.key(1), episode.support.inputs))
    phi, _ = learner.adapt(meta_params, episode.support)
    permuted, _ = learner.adapt(
        {**meta_params, "params": meta_params["params"][order]},
        episode.support._replace(inputs=episode.support.inputs[:, order]),
    )
    chex.assert_trees_all_close(permuted, phi[order], rtol=1e-12)


def test_the_form_of_the_parameters_does_not_matter(x64):
    episode = make_episode(jax.random.key(5))
    nested = Model(
        init=lambda key, inputs: {"b": jnp.ones((2, 1)), "a": [jnp.ones(1), jnp.full(1, 0.5)]},
        apply=lambda params, inputs: inputs @ jnp.concatenate([*params["a"], params["b"][:, 0]]),
    )
    flat, tree = build(), build(model=nested)
    tree_params = large_weights(tree.init(jax.random.key(1), episode.support.inputs))
    params = tree_params["params"]
    flat_params = {**tree_params, "params": jnp.concatenate([*params["a"], params["b"][:, 0]])}
    expected = flat.objective(flat_params, episode)[0]
    chex.assert_trees_all_close(tree.objective(tree_params, episode)[0], expected, rtol=1e-12)


def test_initial_weights_have_the_published_distributions():
    learner = build()
    keys = jax.random.split(jax.random.key(0), 300)
    weights = jax.vmap(lambda key: learner.init(key, jnp.zeros((1, 4)))["learner"])(keys)
    ranges = {"forget": (4, 5), "write": (-5, -4)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        layer, name = (entry.key for entry in path)
        low, high = ranges[layer] if name == "bias" and layer in ranges else (-0.01, 0.01)
        assert low <= leaf.min() < low + 0.05 * (high - low), path
        assert high - 0.05 * (high - low) < leaf.max() <= high, path
    assert jnp.all(weights["forget"]["kernel"] != weights["write"]["kernel"])
    assert build().init(keys[0], jnp.zeros((1, 4)))["learner"]["lstm"]["kernel"].shape == (4 + UNITS, 4 * UNITS)


def test_parameters_that_do_not_adapt_are_left_and_still_learn(x64):
    model = Model(
        init=lambda key, inputs: {"weight": jnp.ones(inputs.shape[1:]), "offset": jnp.ones(())},
        apply=lambda params, inputs: inputs @ params["weight"] + params["offset"],
    )
    episode = make_episode(jax.random.key(6))
    learner = build(model=model, where=lambda name: name == "weight")
    meta_params = learner.init(jax.random.key(1), episode.support.inputs)
    task_params, _ = learner.adapt(meta_params, episode.support)
    assert task_params["offset"] == 1
    assert jnp.all(task_params["weight"] != 1)
    grads, _ = jax.grad(learner.objective, has_aux=True)(meta_params, episode)
    assert grads["params"]["offset"] != 0


def test_parts_of_the_support_set_and_many_episodes_give_what_one_gives(x64):
    episodes = make_episodes(jax.random.key(7), 3)
    learner, in_parts = build(), build(num_microbatches=2)
    meta_params = large_weights(learner.init(jax.random.key(1), episodes.support.inputs[0]))
    at_once, _ = jax.vmap(learner.objective, in_axes=(None, 0))(meta_params, episodes)
    each = [learner.objective(meta_params, jax.tree.map(lambda x, n=n: x[n], episodes))[0] for n in range(3)]
    chex.assert_trees_all_close(at_once, jnp.stack(each), rtol=1e-12)
    in_two, _ = jax.vmap(in_parts.objective, in_axes=(None, 0))(meta_params, episodes)
    chex.assert_trees_all_close(in_two, at_once, rtol=1e-10)


def test_weights_have_the_type_of_the_parameters(x64):
    single = linear_model._replace(init=lambda key, inputs: jnp.ones(inputs.shape[1:], jnp.float32))
    batch = Batch(jnp.ones((3, 4), jnp.float32), jnp.ones(3, jnp.float32))
    for model, dtype in ((single, "float32"), (linear_model, "float64")):
        learner = build(model=model)
        meta_params = learner.init(jax.random.key(0), batch.inputs)
        grads, _ = jax.eval_shape(jax.grad(learner.objective, has_aux=True), meta_params, Episode(batch, batch))
        assert {leaf.dtype for leaf in jax.tree.leaves((meta_params, grads))} == {jnp.dtype(dtype)}


def test_the_rule_is_an_optax_transformation():
    meta_params = build().init(jax.random.key(0), jnp.zeros((1, 4)))
    rule = gated_descent(meta_params["learner"])
    params = {"w": jnp.ones((2, 2)), "b": None}
    state = rule.init(params)
    updates, state = rule.update({"w": jnp.full((2, 2), 0.5), "b": None}, state, params, value=jnp.float32(1.0))
    chex.assert_trees_all_equal_shapes(updates, params)
    # f ≈ σ(4.5) and i ≈ σ(-4.5): a small step against the gradient, and a small decay.
    assert jnp.all((updates["w"] < 0) & (updates["w"] > -0.05))
    assert jnp.all(state.forget > 0.97)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_inner_steps": -1}, "num_inner_steps must be an integer of at least 0, got -1"),
        ({"num_inner_steps": 1, "num_units": 0}, "num_units must be an integer of at least 1, got 0"),
        ({"num_inner_steps": 1, "num_microbatches": 0}, "num_microbatches must be an integer of at least 1, got 0"),
    ],
)
def test_a_wrong_count_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        meta_lstm(linear_model, half_mse, **keywords)
    if "num_microbatches" not in keywords:
        with pytest.raises(ValueError, match=message):
            LearnedOptimizer(**keywords)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"model must be a maml_jax.Model, got function"):
        meta_lstm(lambda params, inputs: inputs, half_mse, num_inner_steps=1)


def test_it_learns_steps_for_sinusoids():
    # On tasks that were not trained on, four learned steps halve the query loss at the learned start, and end far
    # below where the initial network and steps end. These stay near the variance of a sinusoid, 4.25.
    network = models.mlp(features=(12, 12, 1), activation=jnp.tanh)
    learner = meta_lstm(network, losses.mean_squared_error, num_inner_steps=4, num_units=8)
    sample_episode, optimizer = sinusoid.make_sampler(shot=10, query_shot=10), optax.adam(2e-2)
    train = make_train_loop(learner, optimizer, sample_episode, meta_batch_size=8, num_steps=200, chunk_size=8)
    state = init_meta_state(learner, optimizer, jax.random.key(0), jnp.zeros((10, 1)))

    def curve(params):
        mean_squared_error = losses.mean_squared_error
        return evaluate(
            learner, params, sample_episode, jax.random.key(2), metric_fn=mean_squared_error, num_episodes=100
        ).mean

    before = curve(state.params)
    state, _ = train(state, jax.random.key(1))
    after = curve(state.params)
    assert before[-1] > 3.5
    assert after[-1] < 0.5 * after[0]
    assert after[-1] < 0.5 * before[-1]


def test_the_support_set_is_cut_into_the_microbatches_asked_for():
    # A loss that is a sum tells: the mean over three parts is a third of the whole.
    episode, reported = make_episode(jax.random.key(7)), []
    for number in (1, 3):
        learner = build(1, loss_fn=lambda outputs, targets: jnp.sum(outputs**2), num_microbatches=number)
        params = learner.init(jax.random.key(1), episode.support.inputs)
        reported.append(learner.adapt(params, episode.support)[1].support_loss)
    chex.assert_trees_all_close(3.0 * reported[1], reported[0], rtol=1e-5)
