import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode

from maml_jax import (
    CATALOGUE,
    Batch,
    Episode,
    MAMLPlusPlus,
    Model,
    Problem,
    ensemble,
    evaluate,
    first_order,
    fomaml,
    init_meta_state,
    losses,
    make_train_loop,
    maml,
    maml_plus_plus,
    meta_curvature,
    meta_sgd,
    mixed_mode,
    models,
    multi_step_weights,
    switch_at,
)
from maml_jax.cost import temporary_bytes
from maml_jax.tasks import sinusoid
from maml_jax.types import learner_at

THETA = jnp.array([0.5, -1.0, 2.0, 0.1])
RATES = jnp.array([0.1, 0.3, 0.2])
TWO_PARTS = Model(
    init=lambda key, inputs: {"w": jax.random.normal(key, inputs.shape[1:]), "scale": jnp.ones(())},
    apply=lambda params, inputs: params["scale"] * (inputs @ params["w"]),
)


def gradient(learner, meta_params, episode):
    return jax.jit(jax.grad(learner.objective, has_aux=True))(meta_params, episode)[0]


def test_without_its_parts_it_is_maml(x64):
    episode = make_episode(jax.random.key(0))
    ours = maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3, learn_rates=False)
    plain = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=3)
    meta_params = ours.init(jax.random.key(0), episode.support.inputs)
    grads = gradient(ours, meta_params, episode)
    chex.assert_trees_all_close(grads["params"], gradient(plain, meta_params["params"], episode), rtol=1e-12)
    chex.assert_trees_all_equal(grads["rates"], jnp.zeros(3))


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_rates_of_each_step_on_linear_regression(x64, inner_grad):
    # P_k = I − α_k A: ∂L_Q/∂θ = P_0 P_1 P_2 ∇L_Q(φ_3) and ∂L_Q/∂α_k = −∇L_S(φ_k)ᵀ P_{k+1} .. P_2 ∇L_Q(φ_3).
    episode = make_episode(jax.random.key(1))
    support, query = Quadratic.of(episode.support), Quadratic.of(episode.query)
    learner = maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3, inner_grad=inner_grad)
    phis = [THETA.astype(jnp.float64)]
    for rate in RATES:
        phis.append(phis[-1] - rate * support.gradient(phis[-1]))
    after, of_rates = query.gradient(phis[-1]), []
    for rate, phi in zip(RATES[::-1], phis[-2::-1], strict=True):
        of_rates.append(-support.gradient(phi) @ after)
        after = (jnp.eye(4) - rate * support.hessian) @ after
    grads = gradient(learner, {"params": phis[0], "rates": RATES.astype(jnp.float64)}, episode)
    chex.assert_trees_all_close(grads, {"params": after, "rates": jnp.stack(of_rates[::-1])}, rtol=1e-12)


def test_the_objective_is_the_weighted_sum_of_the_losses_of_the_steps(x64):
    episode = make_episode(jax.random.key(2))
    weights = jnp.array([0.2, 0.3, 0.5])
    learner = maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3, step_weights=weights)
    meta_params = {"params": THETA.astype(jnp.float64), "rates": RATES.astype(jnp.float64)}
    phi, expected = meta_params["params"], 0.0
    for rate, weight in zip(RATES, weights, strict=True):
        phi = phi - rate * Quadratic.of(episode.support).gradient(phi)
        expected += weight * half_mse(linear_model.apply(phi, episode.query.inputs), episode.query.targets)
    loss, info = learner.objective(meta_params, episode)
    chex.assert_trees_all_close(loss, expected, rtol=1e-12)
    chex.assert_shape(info.support_loss, (3,))
    assert info.observed is None
    check_grads(lambda p: learner.objective(p, episode)[0], (meta_params,), order=1, modes=["rev"])


def test_the_query_loss_before_the_first_step_is_no_part_of_the_objective(x64):
    # The derivative of a norm is not finite at zero, where the parameters start.
    episode = make_episode(jax.random.key(2))
    learner = maml_plus_plus(
        linear_model,
        half_mse,
        lambda outputs, targets: jnp.linalg.norm(outputs),
        inner_lr=ALPHA,
        num_inner_steps=3,
        step_weights=jnp.array([0.2, 0.3, 0.5]),
    )
    grads = gradient(learner, {"params": jnp.zeros(4), "rates": RATES.astype(jnp.float64)}, episode)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_weights_are_annealed_to_the_last_step():
    np.testing.assert_allclose(multi_step_weights(0, 5, 100), np.full(5, 0.2), rtol=1e-6)
    np.testing.assert_allclose(multi_step_weights(50, 5, 100), [0.1] * 4 + [0.6], rtol=1e-6)
    np.testing.assert_allclose(multi_step_weights(99, 5, 100), [0.006] * 4 + [0.976], rtol=1e-6)  # 0.03 / K
    for late in (100, 10_000):
        np.testing.assert_array_equal(multi_step_weights(late, 5, 100), [0, 0, 0, 0, 1])
    np.testing.assert_allclose(multi_step_weights(7, 1, 100), [1.0])
    for end in (41, 47, 55):  # a compiled quotient of 41 and 41 is less than one
        late = jax.jit(lambda step, end=end: multi_step_weights(step, 5, end))(jnp.int32(end))
        np.testing.assert_array_equal(late, [0, 0, 0, 0, 1])


def test_each_step_has_parameters_of_its_own(x64):
    # φ_k has scale s_k: the support pass of step k uses s_k, and the query pass s_K.
    episode = make_episode(jax.random.key(3))
    learner = maml_plus_plus(TWO_PARTS, half_mse, inner_lr=ALPHA, num_inner_steps=2, per_step=lambda n: n == "scale")
    drawn = learner.init(jax.random.key(0), episode.support.inputs)
    assert drawn["params"]["scale"].shape == (3,)
    assert drawn["rates"]["scale"] is None
    scales = jnp.array([1.0, 0.7, 1.3])
    meta_params = {"params": {"w": THETA, "scale": scales}, "rates": {"w": RATES[:2], "scale": None}}
    meta_params = jax.tree.map(jnp.float64, meta_params)

    def by_hand(scales):
        w = meta_params["params"]["w"]
        for rate, scale in zip(RATES[:2], scales[:2], strict=True):
            inputs, targets = episode.support
            w = w - rate * jax.grad(lambda w, s=scale: half_mse(s * (inputs @ w), targets))(w)  # noqa: B023
        return half_mse(scales[2] * (episode.query.inputs @ w), episode.query.targets)

    loss, _ = learner.objective(meta_params, episode)
    chex.assert_trees_all_close(loss, by_hand(meta_params["params"]["scale"]), rtol=1e-12)
    grads = gradient(learner, meta_params, episode)["params"]["scale"]
    chex.assert_trees_all_close(grads, jax.grad(by_hand)(meta_params["params"]["scale"]), rtol=1e-12)
    assert jnp.all(grads != 0)


def test_parameters_of_each_step_are_not_sums_of_rounded_differences():
    learner = maml_plus_plus(TWO_PARTS, half_mse, inner_lr=ALPHA, num_inner_steps=2, per_step=lambda n: n == "scale")
    scales = jnp.array([1.0, 1e-3, 5e-4], jnp.bfloat16)
    meta_params = {"params": {"w": THETA, "scale": scales}, "rates": {"w": RATES[:2], "scale": None}}
    support = make_episode(jax.random.key(3)).support
    _, info = learner.adapt(meta_params, support, observe_fn=lambda params: params["scale"])
    chex.assert_trees_all_equal(info.observed, scales)


def test_more_steps_than_trained_use_the_last_rates_and_parameters(x64):
    episode = make_episode(jax.random.key(4))

    def build(num_inner_steps):
        return maml_plus_plus(
            TWO_PARTS, half_mse, inner_lr=ALPHA, num_inner_steps=num_inner_steps, per_step=lambda n: n == "scale"
        )

    meta_params = {
        "params": {"w": THETA, "scale": jnp.array([1.0, 0.7, 1.3])},
        "rates": {"w": RATES[:2], "scale": None},
    }
    meta_params = jax.tree.map(jnp.float64, meta_params)
    longer = {
        "params": {"w": THETA, "scale": jnp.array([1.0, 0.7, 1.3, 1.3, 1.3])},
        "rates": {"w": RATES[jnp.array([0, 1, 1, 1])], "scale": None},
    }
    chex.assert_trees_all_close(
        build(4).adapt(meta_params, episode.support)[0],
        build(4).adapt(jax.tree.map(jnp.float64, longer), episode.support)[0],
        rtol=1e-12,
    )


def test_the_order_of_the_derivative_changes_within_one_program():
    sample = sinusoid.make_sampler(shot=5, query_shot=5)
    model = models.mlp(features=(8, 1))
    keywords = {"inner_optimizer": optax.sgd(0.05), "num_inner_steps": 2}
    exact = maml(model, losses.mean_squared_error, **keywords)
    first = fomaml(model, losses.mean_squared_error, **keywords)
    optimizer = optax.sgd(0.01)

    def train(learner, num_steps, state=None):
        state = init_meta_state(exact, optimizer, jax.random.key(0), jnp.zeros((5, 1))) if state is None else state
        loop = make_train_loop(learner, optimizer, sample, meta_batch_size=4, num_steps=num_steps, chunk_size=2)
        return loop(state, jax.random.key(1))[0]

    annealed = train(lambda step: switch_at(3, step, first, exact), 6)
    chex.assert_trees_all_close(annealed, train(exact, 3, train(first, 3)), rtol=1e-5)
    assert not np.allclose(annealed.params["dense_0"]["kernel"], train(exact, 6).params["dense_0"]["kernel"], rtol=1e-5)


def test_of_two_learners_only_the_present_one_is_computed():
    computed = []

    def learner(number):
        def apply(params, inputs):
            jax.debug.callback(lambda: computed.append(number))
            return inputs @ params

        return maml(Model(linear_model.init, apply), half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=0)

    episode = make_episode(jax.random.key(0))
    both = jax.jit(lambda step: switch_at(3, step, learner(1), learner(2)).objective(THETA, episode)[0])
    for step in (2, 3):
        both(jnp.int32(step)).block_until_ready()
        jax.effects_barrier()
    assert computed == [1, 2]


def test_losses_after_every_step_need_no_more_memory_with_more_steps():
    model = models.mlp(features=(64, 64, 1))
    queries = Batch(jnp.ones((500, 1)), jnp.ones((500, 1)))
    episode = Episode(jax.tree.map(lambda x: x[:2], queries), queries)

    def temporaries(num_steps):
        learner = maml_plus_plus(
            model,
            losses.mean_squared_error,
            inner_lr=0.01,
            num_inner_steps=num_steps,
            step_weights=jnp.ones(num_steps) / num_steps,
        )
        params = learner.init(jax.random.key(0), episode.support.inputs)
        return temporary_bytes(jax.grad(learner.objective, has_aux=True), params, episode)

    # The activations of a query pass would be 2 · 500 · 64 numbers a step, 20 times the parameters of a step.
    few, many = temporaries(4), temporaries(24)
    activations = 2 * 500 * 64 * 4
    assert many - few < 0.5 * 20 * activations


def test_the_order_may_be_that_of_the_inner_gradient(x64):
    episode = make_episode(jax.random.key(5))
    learner = maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3, inner_grad=first_order)
    plain = fomaml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=3)
    meta_params = learner.init(jax.random.key(0), episode.support.inputs)
    chex.assert_trees_all_close(
        gradient(learner, meta_params, episode)["params"], gradient(plain, meta_params["params"], episode), rtol=1e-6
    )


def test_an_ensemble_predicts_the_mean_of_its_members():
    sample = sinusoid.make_sampler(shot=5, query_shot=5)
    model = models.mlp(features=(8, 1))
    learner = maml(model, losses.mean_squared_error, inner_optimizer=optax.sgd(0.05), num_inner_steps=2)
    members = [model.init(jax.random.key(seed), jnp.zeros((5, 1))) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    episode = sample(jax.random.key(9))
    inputs = episode.query.inputs

    def observed(learner, params):
        return learner.adapt(params, episode.support, observe_fn=lambda task: learner.predict(task, inputs))[1].observed

    together = observed(ensemble(learner), stacked)
    chex.assert_trees_all_close(together, sum(observed(learner, params) for params in members) / 3, rtol=1e-5)
    chex.assert_shape(together, (3, 5, 1))

    def error(learner, params):
        return evaluate(
            learner, params, sample, jax.random.key(1), metric_fn=losses.mean_squared_error, num_episodes=4
        ).mean

    loss, info = ensemble(learner).objective(stacked, episode)
    chex.assert_shape(info.support_loss, (3, 2))
    one = ensemble(learner).init(jax.random.key(0), episode.support.inputs)
    chex.assert_trees_all_equal(one, jax.tree.map(lambda x: x[None], members[0]))
    assert float(loss) == pytest.approx(sum(float(learner.objective(p, episode)[0]) for p in members) / 3, rel=1e-5)
    same = jax.tree.map(lambda x: jnp.stack([x, x]), members[0])
    chex.assert_trees_all_close(error(ensemble(learner), same), error(learner, members[0]), rtol=1e-5)


def test_every_member_of_an_ensemble_gets_the_key():
    model = Model(
        linear_model.init,
        lambda params, inputs, *, key=None: (
            inputs @ params if key is None else inputs @ params + jax.random.uniform(key)
        ),
        stochastic=True,
    )
    learner = maml(model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=2)
    members, key = jnp.array([[0.5, -1.0, 2.0, 0.1], [0.1, 0.2, 0.3, 0.4]]), jax.random.key(3)
    support = make_episode(jax.random.key(0)).support
    adapted, _ = ensemble(learner).adapt(members, support, key=key)
    expected = jnp.stack([learner.adapt(params, support, key=key)[0] for params in members])
    chex.assert_trees_all_close(adapted, expected, rtol=1e-5)
    assert jnp.max(jnp.abs(adapted - ensemble(learner).adapt(members, support)[0])) > 1e-3


@pytest.mark.parametrize(("num_steps", "shape"), [(5, (1,)), (5, ()), (5, (4,)), (0, (0,)), (0, (1,))])
def test_there_is_a_weight_for_each_step(num_steps, shape):
    with pytest.raises(ValueError, match="one weight for each of num_inner_steps"):
        maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=num_steps, step_weights=jnp.ones(shape))


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
def test_weights_are_annealed_over_a_positive_number_of_steps(counts):
    with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
        multi_step_weights(jnp.int32(0), *counts)


def test_weights_may_be_a_list_of_numbers():
    objectives = [
        maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=2, step_weights=weights).objective
        for weights in ([0.25, 0.75], jnp.array([0.25, 0.75]))
    ]
    learner = maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=2)
    episode = make_episode(jax.random.key(0))
    params = learner.init(jax.random.key(1), episode.support.inputs)
    chex.assert_trees_all_equal(*(objective(params, episode) for objective in objectives))


@pytest.mark.parametrize("name", ["where", "per_step"])
def test_a_name_in_place_of_a_function_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a function such as .*, got 'norm'"):
        maml_plus_plus(linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=1, **{name: "norm"})


def test_names_that_no_parameter_has_are_refused():
    learner = maml_plus_plus(
        models.mlp(features=(2,)), half_mse, inner_lr=ALPHA, num_inner_steps=1, per_step=lambda name: "nrom" in name
    )
    with pytest.raises(ValueError, match=r"`where` selects none of the parameters \['dense_0/bias', "):
        learner.init(jax.random.key(0), jnp.ones((3, 2)))


@pytest.mark.parametrize("inner_lr", [-0.1, float("nan"), optax.sgd(0.1), None])
@pytest.mark.parametrize("builder", [maml_plus_plus, meta_sgd, meta_curvature])
def test_a_rate_is_no_negative_number(builder, inner_lr):
    with pytest.raises(ValueError, match=r"inner_lr=.* must be a number of at least 0"):
        builder(linear_model, half_mse, inner_lr=inner_lr, num_inner_steps=1)


@pytest.mark.parametrize("step", [0, 3])
def test_the_entry_of_the_catalogue_has_every_part(x64, step):
    model, sample = models.mlp(features=(4, 1), param_dtype=jnp.float64), sinusoid.make_sampler(shot=5, query_shot=5)
    problem = Problem(model, losses.mean_squared_error, norm=lambda name: name.endswith("bias"))
    settings = MAMLPlusPlus(inner_lr=0.1, num_inner_steps=3, num_multi_step=4, num_first_order=2)
    of_catalogue = CATALOGUE["maml++"].build(problem, settings)(jnp.int32(step))
    episode = sample(jax.random.key(0))
    params = of_catalogue.init(jax.random.key(1), episode.support.inputs)

    def gradient(learner):
        return jax.grad(learner.objective, has_aux=True)(params, episode)[0]

    first, exact = (
        gradient(
            maml_plus_plus(
                model,
                losses.mean_squared_error,
                inner_lr=0.1,
                num_inner_steps=3,
                step_weights=multi_step_weights(jnp.int32(step), 3, 4),
                per_step=problem.norm,
                inner_grad=inner_grad,
            )
        )
        for inner_grad in (first_order, mixed_mode)
    )
    expected, other = (first, exact) if step < 2 else (exact, first)
    found = gradient(of_catalogue)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)
    assert optax.tree.norm(optax.tree.sub(found, other)) > 1e-3 * optax.tree.norm(found)


OFF = {"learn_rates": False, "num_multi_step": 0, "per_step_norm": False, "num_first_order": 0}
PARTS = {
    "learn_rates": (True, {"learn_rates": True}),
    "num_multi_step": (100, {"step_weights": multi_step_weights(5, 3, 100)}),
    "per_step_norm": (True, {"per_step": lambda name: "norm" in name}),
    "num_first_order": (6, {"inner_grad": first_order}),
}
"""For each part of the catalogue's MAML++ its value when it is on, and the arguments of the builder at meta-step 5."""


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_entry_of_the_catalogue_works_alone(x64, part):
    model = models.mlp(features=(4, 1), activation=jnp.tanh, norm=models.BatchStatNorm, param_dtype=jnp.float64)
    problem = Problem(model, losses.mean_squared_error, norm=lambda name: "norm" in name)
    rates, (value, arguments) = {"inner_lr": 0.1, "num_inner_steps": 3}, PARTS[part]
    learners = {
        "the entry": CATALOGUE["maml++"].build(problem, MAMLPlusPlus(**rates, **OFF | {part: value})),
        "the builder": maml_plus_plus(model, losses.mean_squared_error, **rates, **{"learn_rates": False} | arguments),
        "no part": CATALOGUE["maml++"].build(problem, MAMLPlusPlus(**rates, **OFF)),
    }
    episode = sinusoid.make_sampler(shot=5, query_shot=5)(jax.random.key(0))
    grads = {}
    for name, learner in learners.items():
        learner = learner_at(learner, jnp.int32(5))
        grads[name] = gradient(learner, learner.init(jax.random.key(1), episode.support.inputs), episode)
    chex.assert_trees_all_close(grads["the entry"], grads["the builder"], rtol=1e-9, atol=1e-12)
    norms = [optax.tree.norm(grads[name]) for name in ("the entry", "no part")]
    assert abs(norms[0] - norms[1]) > 1e-6 * norms[1]


def test_the_query_passes_draw_with_a_key_of_their_own():
    drawn = {"support": set(), "query": set()}

    def apply(params, inputs, *, key=None):
        part = "support" if len(inputs) == 2 else "query"
        jax.debug.callback(lambda data: drawn[part].add(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return inputs @ params

    model = Model(lambda key, inputs: jnp.ones(inputs.shape[1]), apply, stochastic=True)
    learner = maml_plus_plus(
        model, losses.mean_squared_error, inner_lr=0.1, num_inner_steps=3, step_weights=jnp.ones(3) / 3
    )
    support, query = (Batch(jnp.ones((n, 4)), jnp.ones(n)) for n in (2, 5))
    meta_params = learner.init(jax.random.key(0), support.inputs)
    jax.block_until_ready(learner.objective(meta_params, Episode(support, query, jax.random.key(1))))
    jax.effects_barrier()
    assert (len(drawn["support"]), len(drawn["query"])) == (3, 1)
    assert not drawn["support"] & drawn["query"]


def test_parameters_of_each_step_learn_where_rates_do_not(x64):
    episode, rates = make_episode(jax.random.key(3)), {"w": RATES[:2], "scale": None}
    meta_params = {"params": {"w": THETA, "scale": jnp.array([1.0, 0.7, 1.3])}, "rates": rates}
    meta_params = jax.tree.map(jnp.float64, meta_params)
    settings = {"inner_lr": ALPHA, "num_inner_steps": 2, "per_step": lambda name: name == "scale"}
    fixed, learned = (
        gradient(maml_plus_plus(TWO_PARTS, half_mse, learn_rates=learn, **settings), meta_params, episode)
        for learn in (False, True)
    )
    chex.assert_trees_all_close(fixed["params"], learned["params"], rtol=1e-12)
    chex.assert_trees_all_equal(fixed["rates"]["w"], jnp.zeros(2))
    assert jnp.all(learned["rates"]["w"] != 0)


def test_of_two_learners_the_later_one_adapts_and_predicts():
    settings = {"inner_optimizer": optax.sgd(ALPHA), "num_inner_steps": 1}
    before = maml(linear_model, half_mse, **settings)
    after = maml(Model(lambda key, inputs: THETA, lambda params, inputs: 2.0 * inputs @ params), half_mse, **settings)
    support = make_episode(jax.random.key(0)).support
    both = switch_at(3, jnp.int32(0), before, after)
    chex.assert_trees_all_equal(both.init(jax.random.key(0), support.inputs), THETA)
    chex.assert_trees_all_equal(both.adapt(THETA, support)[0], after.adapt(THETA, support)[0])
    chex.assert_trees_all_equal(both.predict(THETA, support.inputs), after.predict(THETA, support.inputs))


def test_the_weights_of_the_steps_need_not_have_the_sum_one(x64):
    episode, params = make_episode(jax.random.key(2)), {"params": THETA, "rates": RATES}
    params = jax.tree.map(jnp.float64, params)
    once, twice = (
        maml_plus_plus(
            linear_model, half_mse, inner_lr=ALPHA, num_inner_steps=3, step_weights=factor * jnp.array([0.2, 0.3, 0.5])
        ).objective(params, episode)[0]
        for factor in (1.0, 2.0)
    )
    chex.assert_trees_all_close(twice, 2.0 * once, rtol=1e-12)
