import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode

from maml_jax import adapt_only, first_order, inner_loop, losses, maml, mixed_mode, models

THETA = {"body": {"w": jnp.array([0.5, -1.0])}, "head": jnp.array([2.0, 0.1])}


def loss(params, batch):
    """The linear regression of `linear_regression.py`, its parameters in two pieces."""
    return half_mse(
        linear_model.apply(jnp.concatenate([params["body"]["w"], params["head"]]), batch.inputs), batch.targets
    )


@pytest.fixture(scope="module")
def episode():
    return make_episode(jax.random.key(0))


def adapt(episode, num_steps, params=THETA, **kwargs):
    rule = kwargs.pop("rule", optax.sgd(ALPHA))
    return inner_loop(loss, rule, params, episode.support, num_steps=num_steps, **kwargs)


def test_no_steps_return_the_parameters(episode):
    params, info = adapt(episode, 0, observe_fn=lambda params: params["head"][0])
    chex.assert_trees_all_equal(params, THETA)
    chex.assert_shape(info.support_loss, (0,))
    chex.assert_trees_all_equal(info.observed, jnp.array([2.0]))


def test_steps_follow_the_rule(episode):
    rule = optax.adam(0.1, b1=0.5)
    expected, opt_state, expected_losses = THETA, rule.init(THETA), []
    for _ in range(3):
        value, grads = jax.value_and_grad(loss)(expected, episode.support)
        updates, opt_state = rule.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
        expected_losses.append(value)
    params, info = adapt(episode, 3, rule=rule)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    chex.assert_trees_all_close(info.support_loss, jnp.stack(expected_losses), rtol=1e-5)
    assert info.observed is None


def test_observations_are_made_before_the_first_and_after_every_step(episode):
    num_steps = 4
    support = Quadratic.of(episode.support)
    start = jnp.concatenate([THETA["body"]["w"], THETA["head"]])
    _, info = adapt(
        episode, num_steps, observe_fn=lambda params: {"head": params["head"], "norm": optax.tree.norm(params)}
    )
    path = jnp.stack([support.descend(start, ALPHA, k) for k in range(num_steps + 1)])
    chex.assert_trees_all_close(info.observed["head"], path[:, 2:], rtol=1e-4)
    chex.assert_trees_all_close(info.observed["norm"], jnp.linalg.norm(path, axis=1), rtol=1e-4)


def test_a_rule_that_wants_the_parameters_gets_them(episode):
    rule = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(ALPHA))
    params, _ = adapt(episode, 1, rule=rule)
    grads = jax.grad(loss)(THETA, episode.support)
    chex.assert_trees_all_close(params, jax.tree.map(lambda p, g: p - ALPHA * (g + 0.5 * p), THETA, grads), rtol=1e-5)


@pytest.mark.parametrize("num_steps", [-1, 2.0, None])
def test_a_wrong_number_of_steps_is_refused(episode, num_steps):
    with pytest.raises(ValueError, match=f"at least 0, got {num_steps}"):
        adapt(episode, num_steps)


def test_integer_parameters_are_refused_by_name(episode):
    with pytest.raises(ValueError, match=r"\['body'\]\['w'\] has dtype int32 .* use floating parameters"):
        adapt(episode, 1, params={"body": {"w": jnp.arange(2)}, "head": jnp.ones(2)})


def test_a_loss_that_is_no_scalar_is_refused(episode):
    with pytest.raises(ValueError, match=r"scalar, got shape \(6,\); take the mean"):
        inner_loop(
            lambda params, batch: batch.inputs @ params, optax.sgd(0.1), jnp.ones(4), episode.support, num_steps=1
        )


def test_outputs_that_do_not_fit_the_loss_are_refused_with_both_shapes():
    model = models.mlp(features=(8, 2))
    batch = make_episode(jax.random.key(0)).support
    batch = batch._replace(targets=batch.targets[:, None])
    learner = maml(model, losses.mean_squared_error, inner_optimizer=optax.sgd(0.1), num_inner_steps=1)
    params = model.init(jax.random.key(0), batch.inputs)
    with pytest.raises(ValueError, match=r"outputs \(6, 2\) and targets \(6, 1\); reshape the targets or change"):
        learner.adapt(params, batch)


@pytest.mark.parametrize("rule", [optax.sgd(ALPHA), optax.adam(0.1, eps_root=1e-8)], ids=["sgd", "adam"])
def test_adapt_only_keeps_parameters_whose_meta_gradient_is_still_exact(x64, rule):
    episode = make_episode(jax.random.key(1))
    theta = jax.tree.map(lambda x: x.astype(jnp.float64), THETA)
    restricted = adapt_only(rule, lambda name: name == "head")

    def objective(params, inner_grad):
        phi, _ = inner_loop(loss, restricted, params, episode.support, num_steps=3, inner_grad=inner_grad)
        return loss(phi, episode.query), phi

    mixed, reverse, first = (
        jax.jit(jax.grad(lambda params, t=t: objective(params, t), has_aux=True))(theta)
        for t in (mixed_mode, jax.value_and_grad, first_order)
    )
    chex.assert_trees_all_equal(mixed[1]["body"], theta["body"])
    assert jnp.all(mixed[1]["head"] != theta["head"])
    chex.assert_trees_all_close(mixed[0], reverse[0], rtol=1e-11)
    # The frozen part still shapes how the head adapts: its exact gradient is not the first-order one.
    assert optax.tree.norm(mixed[0]["body"]) > 0
    assert jnp.linalg.norm(mixed[0]["body"]["w"] - first[0]["body"]["w"]) > 1e-3


def test_adapt_only_sees_every_parameter_by_its_path():
    names = []
    adapt_only(optax.sgd(0.1), lambda name: bool(names.append(name))).init((THETA, [jnp.ones(1)]))
    assert set(names) == {"0/body/w", "0/head", "1/0"}


def test_adapting_everything_is_the_rule_itself(episode):
    everything = adapt_only(optax.sgd(ALPHA, momentum=0.9), lambda name: True)
    chex.assert_trees_all_equal(
        adapt(episode, 3, rule=everything), adapt(episode, 3, rule=optax.sgd(ALPHA, momentum=0.9))
    )
