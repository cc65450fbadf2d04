import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import ALPHA, Quadratic, half_mse, linear_model, make_episode

from maml_jax import first_order, inner_loop, losses, maml, mixed_mode, models
from maml_jax.cost import count_flops

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


def test_a_rule_that_wants_the_gradient_gets_it(episode):
    def update(updates, state, params=None, *, grad, **extra):
        return jax.tree.map(lambda g: -ALPHA * g, grad), state

    rule = optax.GradientTransformationExtraArgs(lambda params: (), update)
    found, _ = adapt(episode, 2, rule=optax.chain(optax.scale(0.0), rule))
    chex.assert_trees_all_close(found, adapt(episode, 2)[0], rtol=1e-6)


def test_a_rule_that_wants_the_parameters_gets_them(episode):
    rule = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(ALPHA))
    params, _ = adapt(episode, 1, rule=rule)
    grads = jax.grad(loss)(THETA, episode.support)
    chex.assert_trees_all_close(params, jax.tree.map(lambda p, g: p - ALPHA * (g + 0.5 * p), THETA, grads), rtol=1e-5)


@pytest.mark.parametrize("num_steps", [-1, 2.0, None, True])
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


@pytest.mark.parametrize("returned", [lambda value: (value, value), lambda value: None, lambda value: {"loss": value}])
def test_a_loss_that_is_no_array_is_refused(episode, returned):
    with pytest.raises(ValueError, match=r"must be a scalar, got a (tuple|dict|NoneType)"):
        inner_loop(
            lambda params, batch: returned(loss(params, batch)), optax.sgd(0.1), THETA, episode.support, num_steps=1
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
def test_parameters_that_do_not_adapt_keep_their_values_and_an_exact_meta_gradient(x64, rule):
    episode = make_episode(jax.random.key(1))
    theta = jax.tree.map(lambda x: x.astype(jnp.float64), THETA)

    def objective(params, inner_grad):
        phi, _ = inner_loop(
            loss, rule, params, episode.support, num_steps=3, where=lambda name: name == "head", inner_grad=inner_grad
        )
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


def test_every_parameter_is_named_by_its_path():
    names = []
    params = (THETA, [jnp.ones(1)])
    inner_loop(
        lambda params, support: jnp.sum(params[1][0]),
        optax.sgd(0.1),
        params,
        None,
        num_steps=1,
        where=lambda name: names.append(name) is None,
    )
    assert set(names) == {"0/body/w", "0/head", "1/0"}


def test_adapting_everything_is_the_default(episode):
    rule = optax.sgd(ALPHA, momentum=0.9)
    chex.assert_trees_all_equal(adapt(episode, 3, rule=rule, where=lambda name: True), adapt(episode, 3, rule=rule))


def test_no_inner_gradient_is_computed_for_what_does_not_adapt(episode):
    """The inner gradient of the head of a linear network is a product less than that of both."""

    def flops(where):
        return count_flops(
            lambda params: inner_loop(loss, optax.sgd(ALPHA), params, episode.support, num_steps=1, where=where)[0],
            THETA,
        )

    assert flops(lambda name: name == "head") < flops(None)


def test_the_rule_and_the_observer_see_their_parameters(episode):
    seen = []

    def update(updates, state, params):
        seen.append((jax.tree.map(jnp.shape, updates), jax.tree.map(jnp.shape, params)))
        return updates, state

    rule = optax.GradientTransformation(lambda params: (), update)
    _, info = inner_loop(
        loss,
        rule,
        THETA,
        episode.support,
        num_steps=2,
        where=lambda name: name == "head",
        observe_fn=lambda params: params["body"]["w"],
    )
    head = {"body": {"w": None}, "head": THETA["head"].shape}
    assert all(of_updates == of_params == head for of_updates, of_params in seen)
    chex.assert_trees_all_equal(info.observed, jnp.stack([THETA["body"]["w"]] * 3))


def test_adapting_nothing_is_refused(episode):
    with pytest.raises(ValueError, match=r"selects none of the parameters \['body/w', 'head'\]"):
        inner_loop(loss, optax.sgd(0.1), THETA, episode.support, num_steps=1, where=lambda name: "haed" in name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"where": "head"}, r"`where` must be a function such as .*, got 'head'"),
        ({"inner_grad": "first_order"}, r"inner_grad must be a function such as .*, got 'first_order'"),
    ],
)
def test_a_name_in_place_of_a_function_is_refused(episode, wrong, message):
    with pytest.raises(ValueError, match=message):
        inner_loop(loss, optax.sgd(0.1), THETA, episode.support, num_steps=1, **wrong)


@pytest.fixture
def minibatches(x64):
    """Three mini-batches of their own, [3, 2, ...], and float64 parameters."""
    batches = make_episode(jax.random.key(4)).support
    return jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), batches), jax.tree.map(jnp.float64, THETA)


def test_every_step_gets_its_own_data(minibatches):
    batches, theta = minibatches

    def of_step(params, support, batch):
        assert support is None
        return loss(params, batch)

    def by_scan(theta, batches):
        return inner_loop(of_step, optax.sgd(ALPHA), theta, None, num_steps=3, per_step=batches)

    def by_hand(theta, batches):
        losses = []
        for k in range(3):
            value, grads = jax.value_and_grad(loss)(theta, jax.tree.map(lambda x, k=k: x[k], batches))
            theta = jax.tree.map(lambda p, g: p - ALPHA * g, theta, grads)
            losses.append(value)
        return theta, jnp.stack(losses)

    params, info = by_scan(theta, batches)
    chex.assert_trees_all_close((params, info.support_loss), by_hand(theta, batches), rtol=1e-12)
    # The derivative reaches the parameters and the data of every step.
    ours, expected = (
        jax.grad(lambda *args, f=f: optax.tree.norm(f(*args)[0], squared=True), (0, 1))(theta, batches)
        for f in (by_scan, by_hand)
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-10)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(ours[1]))


def test_data_of_the_wrong_number_of_steps_are_refused(minibatches):
    batches, theta = minibatches
    with pytest.raises(
        ValueError, match=r"per_step\.inputs must hold one entry for each of the 2 steps, got shape \(3, 2"
    ):
        inner_loop(lambda p, s, b: loss(p, b), optax.sgd(ALPHA), theta, None, num_steps=2, per_step=batches)


@pytest.mark.parametrize("inner_grad", [mixed_mode, jax.value_and_grad])
def test_microbatches_give_the_gradient_of_the_whole_batch(x64, inner_grad):
    episode, theta = make_episode(jax.random.key(1)), jax.tree.map(jnp.float64, THETA)

    def objective(theta, support, num_microbatches):
        phi, info = inner_loop(
            loss,
            optax.sgd(ALPHA, momentum=0.9),
            theta,
            support,
            num_steps=3,
            num_microbatches=num_microbatches,
            inner_grad=inner_grad,
        )
        return loss(phi, episode.query), (phi, info)

    whole, parts = (jax.value_and_grad(objective, (0, 1), has_aux=True)(theta, episode.support, n) for n in (1, 3))
    chex.assert_trees_all_close(parts, whole, rtol=1e-11)


def test_a_part_of_the_support_set_may_have_no_entries(episode):
    support = {"batch": episode.support, "none": jnp.zeros((len(episode.support.targets), 0))}

    def loss(params, support):
        batch = support["batch"]
        return jnp.mean(jnp.square(batch.inputs @ params - batch.targets)) + jnp.sum(support["none"])

    params = jnp.zeros(episode.support.inputs.shape[1])
    whole, parts = (
        inner_loop(loss, optax.sgd(0.1), params, support, num_steps=1, num_microbatches=number)[0] for number in (1, 2)
    )
    chex.assert_trees_all_close(whole, parts, rtol=1e-5)


def test_sums_over_microbatches_are_not_in_half_precision():
    phi, _ = inner_loop(
        lambda params, support: params.sum() * support.mean(),
        optax.sgd(1.0),
        jnp.zeros(1, jnp.bfloat16),
        jnp.ones((512, 1), jnp.bfloat16),
        num_steps=1,
        num_microbatches=512,
    )
    assert phi.dtype == jnp.bfloat16
    assert phi[0] == -1.0


def test_an_observation_may_be_a_number_of_python(episode):
    _, info = adapt(episode, 2, observe_fn=lambda params: 1.5)
    np.testing.assert_array_equal(info.observed, [1.5, 1.5, 1.5])


def test_microbatches_need_the_memory_of_one():
    model = models.mlp(features=(64, 64, 1), activation=jnp.tanh)
    shapes = [jax.ShapeDtypeStruct((512, 1), jnp.float32)] * 2
    params = jax.eval_shape(model.init, jax.random.key(0), shapes[0])

    def temporaries(num_microbatches):
        def objective(params, inputs, targets):
            phi, _ = inner_loop(
                lambda p, batch: losses.mean_squared_error(model.apply(p, batch[0]), batch[1]),
                optax.sgd(0.1),
                params,
                (inputs, targets),
                num_steps=3,
                num_microbatches=num_microbatches,
            )
            return optax.tree.norm(phi, squared=True)

        return jax.jit(jax.grad(objective)).lower(params, *shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(1) / 4


def test_a_support_set_that_does_not_divide_into_microbatches_is_refused(episode):
    with pytest.raises(
        ValueError, match=r"support\.inputs must hold a multiple of num_microbatches=4 examples, got shape"
    ):
        adapt(episode, 1, num_microbatches=4)


RULES_WITH_EXTRA_ARGUMENTS = {
    "polyak": lambda: optax.polyak_sgd(max_learning_rate=0.5),
    "plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)),
    "lbfgs without a line search": lambda: optax.lbfgs(0.1, linesearch=None),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=4)
    ),
}


@pytest.mark.parametrize("name", RULES_WITH_EXTRA_ARGUMENTS)
def test_rules_that_want_the_value_or_the_function_get_them(x64, name):
    episode, theta = make_episode(jax.random.key(1)), jax.tree.map(jnp.float64, THETA)
    rule = RULES_WITH_EXTRA_ARGUMENTS[name]()
    expected, opt_state = theta, rule.init(theta)
    for _ in range(2):
        value, grads = jax.value_and_grad(loss)(expected, episode.support)
        updates, opt_state = optax.with_extra_args_support(rule).update(
            grads, opt_state, expected, value=value, grad=grads, value_fn=lambda p: loss(p, episode.support)
        )
        expected = optax.apply_updates(expected, updates)
    for num_microbatches in (1, 2):
        params, _ = adapt(episode, 2, theta, rule=rule, num_microbatches=num_microbatches)
        chex.assert_trees_all_close(params, expected, rtol=1e-10)
    if name != "backtracking":  # its number of trials is a while loop, which reverse mode does not differentiate
        gradients = [
            jax.grad(lambda p, t=t: loss(adapt(episode, 2, p, rule=rule, inner_grad=t)[0], episode.query))(theta)
            for t in (mixed_mode, jax.value_and_grad)
        ]
        chex.assert_trees_all_close(*gradients, rtol=1e-9)
        chex.assert_tree_all_finite(gradients)


# The second moment of an input that is always zero is exactly zero, where √v has no finite derivative.
SAFE = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": optax.lion(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
    "clip": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
    "schedule": optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
    "adam with eps_root": optax.adam(0.1, eps_root=1e-8),
    "adamw with eps_root": optax.adamw(0.1, eps_root=1e-8),
    "nadam with eps_root": optax.nadam(0.1, eps_root=1e-8),
    "rmsprop": optax.rmsprop(0.1),
}
UNSAFE = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "nadam": optax.nadam(0.1),
    "radam": optax.radam(0.1),
    "radam with eps_root": optax.radam(0.1, eps_root=1e-8),
    "rmsprop without eps_in_sqrt": optax.rmsprop(0.1, eps_in_sqrt=False),
}


# Their derivative is 0 / 0 where the whole gradient is zero.
UNSAFE_WHERE_ALL_IS_ZERO = {
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "polyak_sgd": optax.polyak_sgd(0.5),
}


@pytest.mark.parametrize("name", [*SAFE, *UNSAFE_WHERE_ALL_IS_ZERO])
def test_the_docstring_says_which_rules_are_safe_where_the_support_set_is_fitted(name):
    def fitted(params, batch):
        return jnp.mean(jnp.square(batch.inputs @ params))

    rule, support = (SAFE | UNSAFE_WHERE_ALL_IS_ZERO)[name], make_episode(jax.random.key(1)).support
    grads = jax.grad(lambda p: inner_loop(fitted, rule, p, support, num_steps=2)[0].sum())(jnp.zeros(4))
    assert bool(jnp.isfinite(grads).all()) == (name in SAFE)


@pytest.mark.parametrize("name", [*SAFE, *UNSAFE])
def test_the_docstring_says_which_rules_are_safe(name):
    episode = make_episode(jax.random.key(1))
    dead = episode.support._replace(inputs=episode.support.inputs.at[:, 0].set(0.0))
    grads = jax.grad(lambda p: loss(inner_loop(loss, (SAFE | UNSAFE)[name], p, dead, num_steps=8)[0], episode.query))(
        THETA
    )
    finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))
    assert finite == (name in SAFE)


def test_the_loss_function_that_a_rule_gets_is_that_of_all_microbatches():
    # The update is the gradient times the loss, evaluated through `value_fn`.
    def update(grads, state, params, *, value_fn, **extra):
        return jax.tree.map(lambda g: -0.1 * value_fn(params) * g, grads), state

    rule = optax.GradientTransformationExtraArgs(lambda params: (), update)
    support = make_episode(jax.random.key(0)).support
    whole, parts = (
        inner_loop(
            lambda params, batch: half_mse(batch.inputs @ params, batch.targets),
            rule,
            jnp.ones(4),
            support,
            num_steps=2,
            num_microbatches=n,
        )[0]
        for n in (1, 3)
    )
    chex.assert_trees_all_close(parts, whole, rtol=1e-5)


def test_no_steps_need_no_loop(episode):
    with jax.disable_jit():
        params, info = adapt(episode, 0, observe_fn=lambda params: params["head"])
    chex.assert_trees_all_equal(params, THETA)
    chex.assert_trees_all_equal((info.support_loss, info.observed), (jnp.zeros(0), THETA["head"][None]))
    assert jax.tree.structure(info.opt_state) == jax.tree.structure(optax.sgd(ALPHA).init(THETA))


def test_an_inner_loss_of_integers_is_refused(episode):
    with pytest.raises(ValueError, match="the inner loss has dtype int32 and no gradient; return a floating number"):
        inner_loop(lambda params, batch: jnp.int32(0), optax.sgd(ALPHA), THETA, episode.support, num_steps=1)


def test_steps_may_go_on_from_the_state_of_an_earlier_call(episode):
    rule = optax.sgd(ALPHA, momentum=0.9)
    whole, of_whole = adapt(episode, 4, rule=rule)
    half_way, first = adapt(episode, 2, rule=rule)
    found, last = adapt(episode, 2, half_way, rule=rule, opt_state=first.opt_state)
    chex.assert_trees_all_close((found, last.opt_state), (whole, of_whole.opt_state), rtol=1e-5)
    chex.assert_trees_all_equal(adapt(episode, 0, rule=rule, opt_state=first.opt_state)[1].opt_state, first.opt_state)
