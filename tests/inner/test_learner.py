import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import Quadratic, half_mse, linear_model, make_episode

from maml_jax import (
    Model,
    anil,
    boil,
    cavia,
    first_order,
    fomaml,
    gradient_based,
    imaml,
    inner_loop,
    maml,
    maml_plus_plus,
    meta_curvature,
    meta_lstm,
    meta_sgd,
    pretrained,
    reptile,
    with_context,
)
from maml_jax.inner import feed_forward

THETA = jnp.array([0.5, -1.0, 2.0, 0.1])


def test_start_rule_and_init_may_be_learned(x64):
    # Meta-SGD: φ_1 = θ − r ⊙ ∇L_S(θ), so ∂L_Q/∂r = −∇L_S(θ) ⊙ ∇L_Q(φ_1) and ∂L_Q/∂θ = (I − A diag r) ∇L_Q(φ_1).
    episode, theta, rates = make_episode(jax.random.key(0)), THETA.astype(jnp.float64), jnp.linspace(0.1, 0.4, 4)
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)

    def init(key, inputs):
        return {"start": linear_model.init(key, inputs), "rates": rates}

    def rule(meta_params):
        return optax.stateless(lambda grads, _: -meta_params["rates"] * grads)

    learner = gradient_based(
        linear_model, half_mse, rule=rule, num_inner_steps=1, init=init, start=lambda meta_params: meta_params["start"]
    )
    assert learner.init(jax.random.key(0), episode.support.inputs).keys() == {"start", "rates"}
    grads, _ = jax.grad(learner.objective, has_aux=True)({"start": theta, "rates": rates}, episode)
    phi = theta - rates * support.gradient(theta)
    expected = {
        "start": query.gradient(phi) - support.hessian @ (rates * query.gradient(phi)),
        "rates": -support.gradient(theta) * query.gradient(phi),
    }
    chex.assert_trees_all_close(grads, expected, rtol=1e-11)


def test_complex_parameters_are_refused():
    # JAX's gradient of |z|² is 2 z*: a step against it would ascend in the imaginary part.
    with pytest.raises(ValueError, match=r"dtype complex64 .* split complex numbers into two parts"):
        inner_loop(lambda z, _: jnp.sum(jnp.abs(z) ** 2), optax.sgd(0.25), jnp.array([1.0 + 2.0j]), None, num_steps=1)


def is_first(name):
    """Whether a parameter of a network is a weight."""
    return name.endswith("weight")


WITH_A_QUERY_LOSS = {
    maml: {"inner_optimizer": optax.sgd(0.1)},
    fomaml: {"inner_optimizer": optax.sgd(0.1)},
    anil: {"inner_optimizer": optax.sgd(0.1), "head": is_first},
    boil: {"inner_optimizer": optax.sgd(0.1), "head": lambda name: not is_first(name)},
    meta_sgd: {"inner_lr": 0.1},
    meta_curvature: {"inner_lr": 0.1},
    maml_plus_plus: {"inner_lr": 0.1},
    cavia: {"inner_optimizer": optax.sgd(0.1), "num_context": 2},
    imaml: {"inner_optimizer": optax.sgd(0.1), "strength": 2.0, "num_cg_steps": 2},
    meta_lstm: {},
}


def built(builder, query_loss_fn=None, *, loss_fn=half_mse, num_inner_steps=2, **settings):
    """An affine learner of two inner steps."""
    model = Model(
        init=lambda key, inputs: {"weight": jax.random.normal(key, inputs.shape[-1:]), "offset": jnp.zeros(())},
        apply=lambda params, inputs: inputs @ params["weight"] + params["offset"],
    )
    model = with_context(model) if builder is cavia else model
    settings = WITH_A_QUERY_LOSS[builder] | settings
    return builder(model, loss_fn, query_loss_fn, num_inner_steps=num_inner_steps, **settings)


def by_name(builder):
    return builder.__name__


@pytest.mark.parametrize("builder", [maml, fomaml, meta_sgd, meta_curvature, maml_plus_plus, imaml], ids=by_name)
def test_only_the_chosen_parameters_adapt(builder):
    episode = make_episode(jax.random.key(0))
    for chosen, other in (("weight", "offset"), ("offset", "weight")):
        learner = built(builder, where=lambda name, chosen=chosen: name == chosen)
        meta_params = learner.init(jax.random.key(0), episode.support.inputs)
        start = meta_params if "weight" in meta_params else meta_params["params"]
        adapted = learner.adapt(meta_params, episode.support)[0]
        adapted = adapted if "weight" in adapted else adapted["params"]
        chex.assert_trees_all_equal(adapted[other], start[other])
        assert jnp.all(adapted[chosen] != start[chosen])


@pytest.mark.parametrize("builder", [reptile, pretrained], ids=by_name)
def test_only_the_chosen_parameters_of_a_learner_without_a_query_loss_adapt(builder):
    episode = make_episode(jax.random.key(0))
    model = Model(
        init=lambda key, inputs: {"weight": jnp.ones(inputs.shape[-1:]), "offset": jnp.zeros(())},
        apply=lambda params, inputs: inputs @ params["weight"] + params["offset"],
    )
    settings = {"inner_optimizer": optax.sgd(0.1), "num_inner_steps": 2}
    learner = builder(model, half_mse, where=lambda name: name == "weight", **settings)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    adapted = learner.adapt(params, episode.support)[0]
    assert adapted["offset"] == 0
    assert jnp.all(adapted["weight"] != 1)


@pytest.mark.parametrize("builder", [maml, anil, boil, meta_sgd, meta_curvature, maml_plus_plus, cavia], ids=by_name)
def test_the_inner_gradient_is_the_one_asked_for(builder):
    episode = make_episode(jax.random.key(0))
    exact, cut = built(builder), built(builder, inner_grad=first_order)
    params = exact.init(jax.random.key(1), episode.support.inputs)
    (of_exact, _), (of_cut, _) = (jax.grad(x.objective, has_aux=True)(params, episode) for x in (exact, cut))
    differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), of_exact, of_cut)
    assert max(map(float, jax.tree.leaves(differences))) > 1e-3


OF_STEPS = [maml, fomaml, anil, boil, meta_sgd, meta_curvature]


@pytest.mark.parametrize("builder", OF_STEPS, ids=by_name)
def test_each_step_may_have_data_of_its_own(builder):
    first, second = (make_episode(jax.random.key(seed)).support for seed in (0, 1))
    learner, one_step = built(builder, data_per_step=True), built(builder, num_inner_steps=1)
    params = learner.init(jax.random.key(0), first.inputs)
    found, _ = learner.adapt(params, jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second))
    half_way, _ = one_step.adapt(params, first)
    half_way = params | {"params": half_way} if "params" in params else half_way
    chex.assert_trees_all_close(found, one_step.adapt(half_way, second)[0], rtol=1e-5)


@pytest.mark.parametrize("builder", [maml, fomaml, meta_sgd, meta_curvature], ids=by_name)
def test_the_support_set_is_cut_into_the_microbatches_asked_for(builder):
    # A loss that is a sum tells: the mean over three parts is a third of the whole.
    episode, adapted = make_episode(jax.random.key(0)), []
    for settings in ({"num_microbatches": 3}, {"loss_fn": lambda outputs, targets: jnp.sum(outputs) / 3}):
        learner = built(builder, num_inner_steps=1, **{"loss_fn": lambda outputs, targets: jnp.sum(outputs)} | settings)
        adapted.append(learner.adapt(learner.init(jax.random.key(0), episode.support.inputs), episode.support)[0])
    chex.assert_trees_all_close(*adapted, rtol=1e-5)


@pytest.mark.parametrize(
    ("builder", "settings"),
    [(builder, {}) for builder in WITH_A_QUERY_LOSS] + [(maml_plus_plus, {"step_weights": jnp.array([0.3, 0.7])})],
)
def test_the_query_set_may_have_a_loss_of_its_own(builder, settings):
    episode = make_episode(jax.random.key(0))
    one, other = (
        built(builder, query_loss_fn, **settings)
        for query_loss_fn in (None, lambda outputs, targets: 3.0 * half_mse(outputs, targets))
    )
    params = one.init(jax.random.key(1), episode.support.inputs)
    losses = [float(learner.objective(params, episode)[0]) for learner in (one, other)]
    assert losses[0] > 0
    assert losses[1] == pytest.approx(3.0 * losses[0], rel=1e-5)
    adapted = [learner.adapt(params, episode.support)[0] for learner in (one, other)]
    chex.assert_trees_all_close(*adapted, rtol=1e-6)  # the inner loss is the same


def test_losses_and_inner_gradients_are_checked_when_the_learner_is_built():
    settings = {"inner_optimizer": optax.sgd(1.0), "num_inner_steps": 1}
    with pytest.raises(ValueError, match=r"loss_fn must be a function such as losses\.cross_entropy, got None"):
        maml(linear_model, None, **settings)
    with pytest.raises(ValueError, match=r"query_loss_fn must be a function such as .* got 3"):
        maml(linear_model, half_mse, 3, **settings)
    with pytest.raises(ValueError, match=r"inner_grad must be a function such as .* got 'x'"):
        maml(linear_model, half_mse, inner_grad="x", **settings)
    with pytest.raises(ValueError, match=r"loss_fn must be a function such as .* got 'mse'"):
        reptile(linear_model, "mse", **settings)
    with pytest.raises(ValueError, match=r"query_loss_fn must be a function such as .* got 'mse'"):
        imaml(linear_model, half_mse, "mse", strength=1.0, num_cg_steps=1, **settings)


@pytest.mark.parametrize("builder", WITH_A_QUERY_LOSS, ids=by_name)
def test_an_empty_query_set_is_refused(builder):
    episode = make_episode(jax.random.key(0))
    empty = episode._replace(query=jax.tree.map(lambda leaf: leaf[:0], episode.query))
    learner = built(builder)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    with pytest.raises(ValueError, match="the query set of the episode is empty"):
        learner.objective(params, empty)


def test_an_empty_query_set_of_one_pass_and_of_losses_after_every_step_is_refused():
    episode = make_episode(jax.random.key(0))
    empty = episode._replace(query=jax.tree.map(lambda leaf: leaf[:0], episode.query))
    one_pass = feed_forward(lambda key, inputs: THETA, lambda theta, *_: theta, lambda theta, x, _: x @ theta, half_mse)
    for learner in (one_pass, built(maml_plus_plus, step_weights=jnp.ones(2) / 2)):
        params = learner.init(jax.random.key(0), episode.support.inputs)
        with pytest.raises(ValueError, match="the query set of the episode is empty"):
            learner.objective(params, empty)


def test_data_of_every_step_have_examples_and_no_microbatches():
    settings = {"inner_optimizer": optax.sgd(0.1), "num_inner_steps": 2, "data_per_step": True}
    nothing = jax.tree.map(lambda leaf: jnp.stack([leaf[:0]] * 2), make_episode(jax.random.key(0)).support)
    with pytest.raises(ValueError, match="the support set is empty"):
        maml(linear_model, half_mse, **settings).adapt(THETA, nothing)
    with pytest.raises(ValueError, match="num_microbatches=2 divides a support set that all steps share"):
        maml(linear_model, half_mse, num_microbatches=2, **settings)


@pytest.mark.parametrize("builder", [maml, imaml], ids=by_name)
def test_steps_on_an_empty_support_set_are_refused(builder):
    episode = make_episode(jax.random.key(0))
    nothing = jax.tree.map(lambda leaf: leaf[:0], episode.support)
    learner = built(builder)
    params = learner.init(jax.random.key(0), episode.support.inputs)
    with pytest.raises(ValueError, match="the support set is empty, so the inner steps would change nothing"):
        learner.adapt(params, nothing)


def test_counts_are_checked_when_the_learner_is_built():
    with pytest.raises(ValueError, match="num_microbatches must be an integer of at least 1, got 0"):
        maml(linear_model, half_mse, inner_optimizer=optax.sgd(1.0), num_inner_steps=1, num_microbatches=0)
    with pytest.raises(ValueError, match=r"^num_steps must be an integer of at least 0, got -1"):
        inner_loop(lambda params, _: params.sum(), optax.sgd(1.0), THETA, None, num_steps=-1)


def test_one_pass_reads_the_support_set_and_has_two_keys(x64):
    # θ is the identity; the task parameters are the support inputs and a number, the outputs another.
    def draw(key):
        return jnp.zeros(()) if key is None else jax.random.normal(key)

    learner = feed_forward(
        lambda key, inputs: jnp.ones(()),
        lambda theta, support, key: theta * support.inputs.sum() + draw(key),
        lambda task_params, inputs, key: task_params + draw(key) + inputs[:, 0],
        half_mse,
    )
    episode, key = make_episode(jax.random.key(0)), jax.random.key(1)
    theta = learner.init(jax.random.key(0), episode.support.inputs)
    total = episode.support.inputs.sum()
    of_read, of_query = (jax.random.normal(jax.random.fold_in(key, n)) for n in (0, 1))
    adapted, info = learner.adapt(theta, episode.support, key=key, observe_fn=lambda task_params: 2.0 * task_params)
    np.testing.assert_allclose(adapted, total + of_read, rtol=1e-12)
    np.testing.assert_allclose(info.observed, [2.0 * adapted], rtol=1e-12)
    assert info.support_loss.shape == (0,)
    np.testing.assert_allclose(learner.adapt(theta, episode.support)[0], total, rtol=1e-12)
    inputs, targets = episode.query
    np.testing.assert_allclose(learner.predict(adapted, inputs), adapted + inputs[:, 0], rtol=1e-12)
    for episode_key, noise in ((None, 0.0), (key, of_read + of_query)):
        loss, _ = learner.objective(theta, episode._replace(key=episode_key))
        np.testing.assert_allclose(loss, half_mse(total + noise + inputs[:, 0], targets), rtol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": optax.sgd(0.1)}, "rule must be a function"),
        ({"start": THETA}, "start must be a function"),
        ({"init": THETA}, "init must be a function"),
    ],
)
def test_parts_that_are_no_functions_are_refused_when_the_learner_is_built(wrong, message):
    settings = {"rule": lambda params: optax.sgd(0.1), "num_inner_steps": 1} | wrong
    with pytest.raises(ValueError, match=message):
        gradient_based(linear_model, half_mse, **settings)


def test_a_rule_returns_an_optimiser():
    learner = gradient_based(linear_model, half_mse, rule=lambda params: 0.1, num_inner_steps=1)
    with pytest.raises(ValueError, match=r"what `rule` returns must be an optax transformation .*, got 0\.1"):
        learner.adapt(THETA, make_episode(jax.random.key(0)).support)


def test_sets_without_inputs_and_targets_are_refused():
    learner = maml(linear_model, half_mse, inner_optimizer=optax.sgd(0.1), num_inner_steps=1)
    episode = make_episode(jax.random.key(0))
    for name in ("support", "query"):
        with pytest.raises(ValueError, match=rf"the {name} set is a tuple without inputs and targets; make it"):
            learner.objective(THETA, episode._replace(**{name: tuple(getattr(episode, name))}))


@pytest.mark.parametrize("builder", [maml, reptile], ids=by_name)
def test_what_is_reported_has_no_state_of_the_inner_optimiser(builder):
    episode = make_episode(jax.random.key(0))
    rule = optax.sgd(0.1, momentum=0.9)
    learner = builder(linear_model, half_mse, inner_optimizer=rule, num_inner_steps=2)
    assert learner.adapt(THETA, episode.support)[1].opt_state is None
    assert learner.objective(THETA, episode)[1].opt_state is None
