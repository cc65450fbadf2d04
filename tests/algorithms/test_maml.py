import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from jax.test_util import check_grads
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode, make_episodes

from maml_jax import InnerDescent, Model, first_order, fomaml, losses, maml, meta_sgd, mixed_mode, models


def meta_gradient(learner, params, episode):
    return jax.jit(jax.grad(learner.objective, has_aux=True))(params, episode)[0]


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_maml_meta_gradient_on_linear_regression(x64, num_steps, inner_grad):
    # Each step multiplies φ − a by P = I − αA, so the meta-gradient is P^K ∇L_Q(φ_K).
    episode = make_episode(jax.random.key(0))
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    theta = jnp.array([0.5, -1.0, 2.0, 0.1])
    learner = maml(
        linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=num_steps, inner_grad=inner_grad
    )
    phi, _ = learner.adapt(theta, episode.support)
    chex.assert_trees_all_close(phi, support.descend(theta, ALPHA, num_steps), rtol=1e-12, atol=1e-12)
    expected = support.contraction(ALPHA, num_steps) @ query.gradient(phi)
    chex.assert_trees_all_close(meta_gradient(learner, theta, episode), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_fomaml_meta_gradient_on_linear_regression(x64, num_steps):
    # Inner gradients are constants: ∂φ/∂θ = I and ∇L_Q(φ_K) is all that remains.
    episode = make_episode(jax.random.key(0))
    theta = jnp.array([0.5, -1.0, 2.0, 0.1])
    learner = fomaml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=num_steps)
    expected = Quadratic.of(episode.query).gradient(Quadratic.of(episode.support).descend(theta, ALPHA, num_steps))
    first = meta_gradient(learner, theta, episode)
    chex.assert_trees_all_close(first, expected, rtol=1e-12, atol=1e-12)

    exact = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=num_steps)
    difference = jnp.linalg.norm(meta_gradient(exact, theta, episode) - first) / jnp.linalg.norm(first)
    if num_steps == 0:
        assert difference == 0
    else:
        assert difference > 0.1  # the smallest eigenvalue of αA is what separates them


def test_fomaml_is_maml_with_first_order_gradients():
    episode = make_episode(jax.random.key(1))
    theta = jnp.ones(4)
    kwargs = {"inner_optimizer": optax.sgd(ALPHA, momentum=0.5), "num_inner_steps": 3}
    chex.assert_trees_all_equal(
        meta_gradient(fomaml(linear_model, half_mse, **kwargs), theta, episode),
        meta_gradient(maml(linear_model, half_mse, inner_grad=first_order, **kwargs), theta, episode),
    )


def test_without_inner_steps_maml_trains_on_the_query_set():
    model = models.mlp(features=(8, 1))
    episode = make_episode(jax.random.key(2))
    episode = jax.tree.map(lambda x: x.reshape(len(x), -1), episode)
    params = model.init(jax.random.key(3), episode.support.inputs)
    learner = maml(model, losses.mean_squared_error, inner_optimizer=optax.sgd(0.1), num_inner_steps=0)

    def query_loss(params):
        return losses.mean_squared_error(model.apply(params, episode.query.inputs), episode.query.targets)

    # Two programs of the same operations, which XLA may fuse differently.
    chex.assert_trees_all_close(
        meta_gradient(learner, params, episode), jax.grad(query_loss)(params), rtol=1e-6, atol=1e-7
    )


def test_meta_gradient_of_a_network_agrees_with_finite_differences(x64):
    model = models.mlp(features=(5, 1), activation=jnp.tanh)
    episode = jax.tree.map(lambda x: x.reshape(len(x), -1), make_episode(jax.random.key(4), dim=2))
    params = model.init(jax.random.key(5), episode.support.inputs)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    learner = maml(model, losses.mean_squared_error, inner_optimizer=optax.sgd(0.5), num_inner_steps=3)
    check_grads(jax.jit(lambda params: learner.objective(params, episode)[0]), (params,), order=1, modes=["rev"])


def test_a_vmap_over_episodes_equals_a_loop():
    episodes = make_episodes(jax.random.key(6), 3)
    theta = jnp.ones(4)
    learner = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2)
    gradient = jax.jit(lambda episode: jax.grad(learner.objective, has_aux=True)(theta, episode)[0])
    one_by_one = [gradient(jax.tree.map(lambda x, i=i: x[i], episodes)) for i in range(3)]
    chex.assert_trees_all_close(jax.vmap(gradient)(episodes), jnp.stack(one_by_one), rtol=1e-5)


def test_a_step_size_inside_the_learner_is_learned_to_first_order_too(x64):
    # φ_1 = θ − α∇L_S(θ): ∂L_Q(φ_1)/∂α = −∇L_S(θ)·∇L_Q(φ_1), and stopping ∇L_S leaves that alone.
    episode = make_episode(jax.random.key(7))
    theta = jnp.array([0.5, -1.0, 2.0, 0.1])
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)

    def objective(alpha):
        learner = fomaml(linear_model, half_mse, inner_optimizer=optax.sgd(alpha), num_inner_steps=1)
        return learner.objective(theta, episode)[0]

    expected = -support.gradient(theta) @ query.gradient(support.descend(theta, ALPHA, 1))
    chex.assert_trees_all_close(jax.grad(objective)(ALPHA), expected, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [-1, 1.5])
@pytest.mark.parametrize("builder", [maml, fomaml])
def test_a_wrong_number_of_steps_is_refused_when_the_learner_is_built(builder, num_steps):
    with pytest.raises(ValueError, match=rf"at least 0, got {num_steps}"):
        builder(linear_model, half_mse, inner_optimizer=optax.sgd(0.1), num_inner_steps=num_steps)


def test_the_query_loss_may_differ_from_the_support_loss(x64):
    episode = make_episode(jax.random.key(0))
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    theta = jnp.array([0.5, -1.0, 2.0, 0.1])
    learner = maml(
        linear_model,
        half_mse,
        lambda outputs, targets: 3.0 * half_mse(outputs, targets),
        inner_optimizer=optax.sgd(ALPHA),
        num_inner_steps=2,
    )
    phi = support.descend(theta, ALPHA, 2)
    expected = 3.0 * support.contraction(ALPHA, 2) @ query.gradient(phi)
    chex.assert_trees_all_close(meta_gradient(learner, theta, episode), expected, rtol=1e-12)


def drop(key, inputs):
    """Dropout of half of the features, as a mask that the test can make again."""
    return inputs if key is None else 2.0 * inputs * jax.random.bernoulli(key, 0.5, inputs.shape)


dropout_model = Model(
    linear_model.init, lambda params, inputs, *, key=None: drop(key, inputs) @ params, stochastic=True
)


def test_dropout_draws_anew_in_every_inner_step_and_in_the_query_pass(x64):
    # Step k uses fold_in(key, k), the query pass fold_in(key, K): written out as linear regression on masked inputs.
    key, theta = jax.random.key(9), jnp.array([0.5, -1.0, 2.0, 0.1])
    episode = make_episode(jax.random.key(0))._replace(key=key)
    learner = maml(dropout_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=3)

    def masked(batch, k):
        return Quadratic.of(batch._replace(inputs=drop(jax.random.fold_in(key, k), batch.inputs)))

    phi, derivative = theta, jnp.eye(4)
    for k in range(3):
        step = masked(episode.support, k)
        phi, derivative = step.descend_once(phi, ALPHA), step.contraction(ALPHA, 1) @ derivative
    expected = derivative.T @ masked(episode.query, 3).gradient(phi)
    chex.assert_trees_all_close(learner.adapt(theta, episode.support, key=key)[0], phi, rtol=1e-12)
    chex.assert_trees_all_close(meta_gradient(learner, theta, episode), expected, rtol=1e-11)


def test_all_microbatches_of_a_step_draw_with_the_key_of_the_step(x64):
    key, theta = jax.random.key(9), jnp.array([0.5, -1.0, 2.0, 0.1])
    support = jax.tree.map(lambda x: x[:4], make_episode(jax.random.key(0)).support)
    learner = maml(dropout_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2, num_microbatches=2)
    phi = theta
    for k in range(2):
        of_step = jax.random.fold_in(key, k)
        parts = [jax.tree.map(lambda x, part=part: x[part], support) for part in (slice(2), slice(2, 4))]
        masked = [Quadratic.of(part._replace(inputs=drop(of_step, part.inputs))) for part in parts]
        phi = phi - ALPHA * (masked[0].gradient(phi) + masked[1].gradient(phi)) / 2
    chex.assert_trees_all_close(learner.adapt(theta, support, key=key)[0], phi, rtol=1e-12)


def test_steps_with_data_of_their_own_draw_with_their_own_keys(x64):
    key, theta = jax.random.key(9), jnp.array([0.5, -1.0, 2.0, 0.1])
    batches = [make_episode(jax.random.key(seed)).support for seed in (0, 1)]
    learner = maml(dropout_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2, data_per_step=True)
    phi = theta
    for k, batch in enumerate(batches):
        phi = Quadratic.of(batch._replace(inputs=drop(jax.random.fold_in(key, k), batch.inputs))).descend_once(
            phi, ALPHA
        )
    support = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    chex.assert_trees_all_close(learner.adapt(theta, support, key=key)[0], phi, rtol=1e-12)


def test_a_stochastic_model_is_deterministic_without_a_key(x64):
    episode, theta = make_episode(jax.random.key(0)), jnp.array([0.5, -1.0, 2.0, 0.1])
    kwargs = {"inner_optimizer": optax.sgd(ALPHA), "num_inner_steps": 2}
    with_dropout, without = (maml(model, half_mse, **kwargs) for model in (dropout_model, linear_model))
    chex.assert_trees_all_equal(meta_gradient(with_dropout, theta, episode), meta_gradient(without, theta, episode))
    chex.assert_trees_all_equal(
        with_dropout.predict(theta, episode.query.inputs), without.predict(theta, episode.query.inputs)
    )


def test_what_is_no_optimiser_or_no_model_is_refused_when_the_learner_is_built():
    with pytest.raises(ValueError, match=r"inner_optimizer must be an optax transformation .* got 0\.01"):
        maml(linear_model, half_mse, inner_optimizer=0.01, num_inner_steps=1)
    with pytest.raises(
        ValueError, match=r"must be a maml_jax\.Model, got Dense; wrap a flax module with models\.from_linen"
    ):
        maml(nn.Dense(1), half_mse, inner_optimizer=optax.sgd(0.1), num_inner_steps=1)


def test_layers_may_have_inner_rules_of_their_own(x64):
    # With a rate for each layer it is Meta-SGD whose rates are equal within a layer.
    model = models.mlp(features=(5, 1), activation=jnp.tanh, param_dtype=jnp.float64)
    episode = jax.tree.map(lambda x: x.reshape(len(x), -1), make_episode(jax.random.key(8), dim=2))
    params = model.init(jax.random.key(9), episode.support.inputs)
    rates = {"dense_0": 0.1, "dense_1": 0.02}
    by_layer = optax.partition(
        {name: optax.sgd(rate) for name, rate in rates.items()},
        lambda params: {name: jax.tree.map(lambda _, n=name: n, layer) for name, layer in params.items()},
    )
    ours = maml(model, losses.mean_squared_error, inner_optimizer=by_layer, num_inner_steps=3)
    other = meta_sgd(model, losses.mean_squared_error, inner_lr=0.0, num_inner_steps=3)
    per_parameter = {name: jax.tree.map(lambda x, r=rates[name]: jnp.full_like(x, r), params[name]) for name in params}
    expected = meta_gradient(other, {"params": params, "rates": per_parameter}, episode)["params"]
    chex.assert_trees_all_close(meta_gradient(ours, params, episode), expected, rtol=1e-12)


def test_rules_by_layer_work_beside_parameters_that_do_not_adapt():
    model = models.mlp(features=(5, 1))
    episode = jax.tree.map(lambda x: x.reshape(len(x), -1), make_episode(jax.random.key(8), dim=2))
    params = model.init(jax.random.key(9), episode.support.inputs)
    rules = {"kernel": optax.adam(0.1, eps_root=1e-8), "bias": optax.sgd(0.1, momentum=0.9)}
    by_kind = optax.partition(
        rules, lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params)
    )
    learner = maml(
        model,
        losses.mean_squared_error,
        inner_optimizer=by_kind,
        num_inner_steps=3,
        where=lambda name: name != "dense_0/kernel",
    )
    task_params, _ = learner.adapt(params, episode.support)
    chex.assert_trees_all_equal(task_params["dense_0"]["kernel"], params["dense_0"]["kernel"])
    assert jnp.all(task_params["dense_1"]["kernel"] != params["dense_1"]["kernel"])
    chex.assert_tree_all_finite(meta_gradient(learner, params, episode))


def test_the_rule_of_the_record_is_plain_gradient_descent():
    rule, grads = InnerDescent(inner_lr=0.25).rule(), jnp.array([1.0, -2.0])
    state = rule.init(grads)
    for _ in range(2):  # with momentum the second update would be larger
        updates, state = rule.update(grads, state)
        chex.assert_trees_all_equal(updates, -0.25 * grads)
