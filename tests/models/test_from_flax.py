import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from linear_regression import half_mse, make_episodes

from maml_jax import init_meta_state, make_meta_step, maml
from maml_jax.models import from_linen, from_nnx


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(2)(inputs))


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 3, rngs=rngs)
        self.second = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.second(jnp.tanh(self.first(inputs)))[:, 0]


def test_linen_parameters_are_the_params_collection():
    module, inputs = nn.Dense(2), jnp.ones((3, 4))
    model = from_linen(module)
    params = model.init(jax.random.key(0), inputs)
    chex.assert_trees_all_equal(params, module.init(jax.random.key(0), inputs)["params"])
    chex.assert_trees_all_equal(model.apply(params, inputs), module.apply({"params": params}, inputs))


def test_linen_modules_with_running_averages_are_refused():
    with pytest.raises(ValueError, match=r"Normalised keeps .* \['batch_stats'\].*Use maml_jax.models.BatchStatNorm"):
        from_linen(Normalised()).init(jax.random.key(0), jnp.ones((3, 4)))


class Averaged(nn.Module):
    """The usual network with running averages: its mode is an argument whose default is training."""

    @nn.compact
    def __call__(self, inputs, train=True):
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(inputs))
        return nn.Dropout(0.5, deterministic=not train)(hidden)


AVERAGES = {"batch_stats": {"BatchNorm_0": {"mean": jnp.array([0.5, -1.0]), "var": jnp.array([4.0, 0.25])}}}


def test_a_trained_network_keeps_its_frozen_running_averages():
    module, inputs = Averaged(), jax.random.normal(jax.random.key(1), (3, 4))
    model = from_linen(module, frozen=AVERAGES)
    params = model.init(jax.random.key(0), inputs)
    assert set(params) == {"Dense_0", "BatchNorm_0"}
    found = model.apply(params, inputs)
    hidden = np.asarray(inputs) @ np.asarray(params["Dense_0"]["kernel"])
    normalised = (hidden - np.array([0.5, -1.0])) / np.sqrt(np.array([4.0, 0.25]) + 1e-5)
    np.testing.assert_allclose(found, normalised, rtol=1e-5)
    # One example does not depend on the others, and given parameters are kept.
    chex.assert_trees_all_close(model.apply(params, inputs[:1]), found[:1])
    kept = model.init(jax.random.key(7), inputs, {"Dense_0": params["Dense_0"]})
    chex.assert_trees_all_equal(kept["Dense_0"], params["Dense_0"])


def test_a_frozen_normalisation_is_meta_learned():
    norm = nn.BatchNorm(use_running_average=True)
    averages = {"batch_stats": {"layers_1": AVERAGES["batch_stats"]["BatchNorm_0"]}}
    model = from_linen(nn.Sequential([nn.Dense(2), norm, nn.Dense(1), lambda x: x[:, 0]]), frozen=averages)
    learner = maml(model, half_mse, inner_optimizer=optax.sgd(0.1), num_inner_steps=2)
    episodes = make_episodes(jax.random.key(0), num_tasks=4)
    optimizer = optax.sgd(0.1)
    state = init_meta_state(learner, optimizer, jax.random.key(1), episodes.support.inputs[0])
    before = jax.tree.map(jnp.copy, state.params)
    state, info = make_meta_step(learner, optimizer)(state, episodes)
    assert jnp.isfinite(info.loss)
    moved = jax.tree.map(lambda old, new: bool(jnp.any(old != new)), before, state.params)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize(
    ("module", "frozen", "message"),
    [
        (Averaged(), {"params": {}}, 'frozen holds "params"'),
        (Averaged(), {"batch_stats": {}}, "of batch_stats/BatchNorm_0/mean, frozen has no such variable and Averaged"),
        (
            Averaged(),
            AVERAGES | {"cache": {"x": jnp.ones(3)}},
            r"of cache/x, frozen has \(3,\) and Averaged has no such",
        ),
        (
            Averaged(),
            {"batch_stats": {"BatchNorm_0": {"mean": jnp.ones(1), "var": jnp.ones(2)}}},
            r"of batch_stats/BatchNorm_0/mean, frozen has \(1,\) and Averaged has \(2,\)",
        ),
        (nn.Dense(2), AVERAGES, r"of batch_stats/BatchNorm_0/mean, frozen has \(2,\) and Dense has no such variable"),
        (Normalised(), AVERAGES, r"Normalised changes a variable in a call, .*use_running_average=True"),
    ],
)
def test_frozen_variables_are_those_of_the_module_and_stay(module, frozen, message):
    with pytest.raises(ValueError, match=message):
        from_linen(module, frozen=frozen).init(jax.random.key(0), jnp.ones((3, 4)))


def test_given_parameters_are_kept_and_the_others_drawn():
    model, inputs = from_linen(nn.Sequential([nn.Dense(3), nn.Dense(2)])), jnp.ones((3, 4))
    pretrained = {"layers_0": {"kernel": jnp.full((4, 3), 7.0), "bias": jnp.zeros(3)}}
    first, other = (model.init(jax.random.key(seed), inputs, pretrained) for seed in (0, 1))
    chex.assert_trees_all_equal_shapes(first, model.init(jax.random.key(0), inputs))
    chex.assert_trees_all_equal(first["layers_0"], pretrained["layers_0"])
    assert jnp.any(first["layers_1"]["kernel"] != other["layers_1"]["kernel"])
    # A training loop donates its state; the pretrained parameters outlive it.
    jax.jit(lambda params: jax.tree.map(lambda x: x + 1.0, params), donate_argnums=0)(first)
    chex.assert_tree_all_finite(pretrained)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel": jnp.ones((4, 3))}, r"params has kernel of shape \(4, 3\), and Dense has \(4, 2\)"),
        ({"weight": jnp.ones(1)}, r"params has weight of shape \(1,\), and Dense has no such parameter"),
    ],
)
def test_given_parameters_must_be_those_of_the_module(given, message):
    with pytest.raises(ValueError, match=message):
        from_linen(nn.Dense(2)).init(jax.random.key(0), jnp.ones((3, 4)), given)


class HardCoded(nn.Module):
    """Dropout that knows no other mode."""

    @nn.compact
    def __call__(self, inputs):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(64)(inputs))


class WithTrain(nn.Module):
    @nn.compact
    def __call__(self, inputs, train=False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(64)(inputs))


class WithTraining(nn.Module):
    @nn.compact
    def __call__(self, inputs, training):
        return nn.Dropout(0.5)(nn.Dense(64)(inputs), deterministic=not training)


class WithDeterministic(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, deterministic=True):
        return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(64)(inputs))


class Latent(nn.Module):
    """Noise that is drawn without `nn.Dropout`."""

    @nn.compact
    def __call__(self, inputs, train=False):
        hidden = nn.Dense(64)(inputs)
        return hidden + jax.random.normal(self.make_rng("noise"), hidden.shape) if train else hidden


STOCHASTIC = [HardCoded, WithTrain, WithTraining, WithDeterministic]


@pytest.mark.parametrize("module", STOCHASTIC)
def test_linen_dropout_draws_from_the_key_and_is_the_identity_without_one(module):
    model, inputs = from_linen(module(), rngs=("dropout",)), jnp.ones((3, 4))
    assert model.stochastic
    params = model.init(jax.random.key(0), inputs)
    chex.assert_trees_all_equal(params, HardCoded().init(jax.random.key(0), inputs)["params"])
    identity = nn.Dense(64).apply({"params": params["Dense_0"]}, inputs)
    chex.assert_trees_all_equal(model.apply(params, inputs), identity)
    chex.assert_trees_all_equal(model.call(params, inputs), identity)
    draws = [model.call(params, inputs, jax.random.key(seed)) for seed in (0, 0, 1)]
    chex.assert_trees_all_equal(draws[0], draws[1])
    assert jnp.any(draws[0] != draws[2])
    for draw in draws:
        assert jnp.all((draw == 0) | (jnp.abs(draw - 2 * identity) < 1e-5))
        assert 0.3 < jnp.mean(draw == 0) < 0.7  # 192 draws: standard error 0.036


def test_dropout_that_is_called_with_keywords_is_the_identity_without_a_key():
    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return nn.Dropout(0.5, deterministic=False)(inputs=inputs)

    model, inputs = from_linen(Keyword(), rngs=("dropout",)), jnp.ones((3, 4))
    chex.assert_trees_all_equal(model.apply(model.init(jax.random.key(0), inputs), inputs), inputs)


def test_every_stream_has_its_own_key():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, inputs, train):
            return [jax.random.normal(self.make_rng(name)) if train else 0.0 for name in ("a", "b")]

    model = from_linen(Two(), rngs=("a", "b"))
    first, second = model.apply(model.init(jax.random.key(0), None), None, key=jax.random.key(1))
    assert first != second


@pytest.mark.parametrize("module", [*STOCHASTIC[:2], WithDeterministic, Latent])
def test_dropout_without_rngs_is_refused(module):
    with pytest.raises(
        ValueError, match=r'draws from .*rngs=\(\) does not name.*from_linen\(module, rngs=\("dropout",\)'
    ):
        from_linen(module()).init(jax.random.key(0), jnp.ones((3, 4)))


@pytest.mark.parametrize("rngs", [("dropout",), ("noise",)])
def test_a_stream_must_be_named_and_only_drawn_from_with_a_key(rngs):
    class Always(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return inputs + jax.random.normal(self.make_rng("noise"))

    with pytest.raises(ValueError, match=r'needs PRNG for "noise".*needs an argument `train`'):
        from_linen(Always(), rngs=rngs).init(jax.random.key(0), jnp.ones((3, 4)))


def test_dropout_that_never_drops_needs_no_rngs():
    module = nn.Sequential([nn.Dense(2), nn.Dropout(0.5, deterministic=True), nn.Dropout(0.0, deterministic=False)])
    model, inputs = from_linen(module), jnp.ones((3, 4))
    params = model.init(jax.random.key(0), inputs)
    assert not model.stochastic
    chex.assert_trees_all_equal(model.apply(params, inputs), inputs @ params["layers_0"]["kernel"])


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_mode_without_a_default_is_evaluation(rate):
    class Trained(nn.Module):
        @nn.compact
        def __call__(self, inputs, train):
            return nn.Dropout(rate, deterministic=not train)(nn.Dense(2)(inputs))

    inputs = jnp.ones((3, 4))
    models = [from_linen(Trained(), rngs=("dropout",))]
    if rate:
        with pytest.raises(ValueError, match="Name every stream"):
            from_linen(Trained()).init(jax.random.key(0), inputs)
    else:
        models.append(from_linen(Trained()))
    for model in models:
        params = model.init(jax.random.key(0), inputs)
        chex.assert_trees_all_equal(model.apply(params, inputs), inputs @ params["Dense_0"]["kernel"])


def test_a_class_is_no_module():
    with pytest.raises(ValueError, match=r"must be a flax\.linen module, got <class .*; of a class make an instance"):
        from_linen(HardCoded)


def test_a_string_is_no_sequence_of_names():
    with pytest.raises(ValueError, match=r'got \'dropout\'; write rngs=\("dropout",\)'):
        from_linen(HardCoded(), rngs="dropout")


def test_a_function_of_rngs_draws_fresh_parameters():
    model = from_nnx(TwoLayers)
    inputs = jax.random.normal(jax.random.key(2), (5, 4))
    first, again, other = (model.init(jax.random.key(seed), inputs) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert jnp.any(first.first.kernel[...] != other.first.kernel[...])
    chex.assert_trees_all_equal(model.apply(first, inputs), TwoLayers(nnx.Rngs(jax.random.key(0)))(inputs))


def test_a_module_gives_its_present_parameters():
    module = TwoLayers(rngs=nnx.Rngs(3))
    model = from_nnx(module)
    inputs = jax.random.normal(jax.random.key(2), (5, 4))
    donated = model.init(jax.random.key(0), inputs)
    jax.jit(lambda params: jax.tree.map(lambda x: 2 * x, params), donate_argnums=0)(donated)
    params = model.init(jax.random.key(0), inputs)
    chex.assert_trees_all_equal(model.apply(params, inputs), module(inputs))
    doubled = jax.tree.map(lambda x: 2 * x, params)
    chex.assert_trees_all_close(
        model.apply(doubled, inputs),
        2 * jnp.tanh(2 * module.first(inputs)) @ module.second.kernel[...][:, 0],
        rtol=1e-5,
    )


@pytest.mark.parametrize("source", ["function", "module"])
def test_nnx_models_meta_learn_and_leave_their_module_alone(source):
    # The meta-step donates its state; a second run from the same model must find the parameters intact.
    model = from_nnx(TwoLayers if source == "function" else TwoLayers(nnx.Rngs(0)))
    learner = maml(
        model,
        half_mse,
        inner_optimizer=optax.sgd(0.1),
        num_inner_steps=2,
        where=lambda name: name.startswith("second"),
    )
    optimizer = optax.adam(0.01)
    episodes = make_episodes(jax.random.key(1), 2)
    step = make_meta_step(learner, optimizer)

    def run():
        state = init_meta_state(learner, optimizer, jax.random.key(0), episodes.support.inputs[0])
        adapted, _ = learner.adapt(state.params, jax.tree.map(lambda x: x[0], episodes.support))
        chex.assert_trees_all_equal(adapted.first, state.params.first)
        assert jnp.any(adapted.second.kernel[...] != state.params.second.kernel[...])
        before = jax.tree.map(jnp.copy, state.params)
        after = step(state, episodes)[0].params
        assert all(jnp.any(new != old) for new, old in zip(*map(jax.tree.leaves, (after, before)), strict=True))
        return after

    chex.assert_trees_all_equal(run(), run())


class BatchNormalised(nnx.Module):
    def __init__(self, rngs, use_running_average=False):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=use_running_average, rngs=rngs)
        self.dropouts = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, inputs):
        return [dropout(self.norm(self.linear(inputs))) for dropout in self.dropouts]


@pytest.mark.parametrize("built", [False, True])
def test_nnx_variables_that_change_are_refused(built):
    model = from_nnx(BatchNormalised(rngs=nnx.Rngs(0)) if built else BatchNormalised)
    with pytest.raises(ValueError, match=r"BatchNormalised changes .* kind \['BatchStat'\].*use_running_average=True"):
        model.init(jax.random.key(0), jnp.ones((2, 4)))


def test_nnx_arrays_that_change_are_refused():
    class Counting(nnx.Module):
        def __init__(self, rngs):
            del rngs
            self.calls = jnp.zeros(())

        def __call__(self, inputs):
            self.calls = self.calls + 1
            return inputs * self.calls

    with pytest.raises(ValueError, match=r"Counting changes .* kind \['array'\]"):
        from_nnx(Counting).init(jax.random.key(0), jnp.ones(2))


def test_nnx_variables_that_do_not_change_are_constants():
    model = from_nnx(functools.partial(BatchNormalised, use_running_average=True))
    inputs = jax.random.normal(jax.random.key(1), (2, 4))
    params = model.init(jax.random.key(0), inputs)
    assert set(params) == {"linear", "norm"}
    assert set(params.norm) == {"bias", "scale"}
    # Means are zero and variances one at the start, and no mode turns to the statistics of the batch.
    expected = inputs @ params.linear.kernel[...] / jnp.sqrt(1 + 1e-5)
    for outputs in model.apply(params, inputs):
        chex.assert_trees_all_close(outputs, expected, rtol=1e-5)
    for outputs in model.apply(params, inputs, key=jax.random.key(2)):
        assert jnp.all((outputs == 0) | (jnp.abs(outputs - 2 * expected) < 1e-5))


class WithConstants(nnx.Module):
    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(4, width, rngs=rngs)
        self.array = jnp.full((1, width), 2.0)
        self.variable = nnx.Variable(jnp.full((1, width), 3.0))

    def __call__(self, inputs):
        return self.linear(inputs) * self.array * self.variable[...]


def test_arrays_of_a_constructor_are_constants():
    model, inputs = from_nnx(functools.partial(WithConstants, 3)), jnp.ones((2, 4))
    params = jax.jit(model.init)(jax.random.key(0), inputs)
    assert not model.stochastic
    assert set(params) == {"linear"}
    expected = 6 * inputs @ params.linear.kernel[...]
    chex.assert_trees_all_close(jax.jit(model.apply)(params, inputs), expected, rtol=1e-6)


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(2, 3, rngs=rngs))

    def __call__(self, inputs):
        return self.rnn(inputs)


def test_recurrent_cells_have_meta_gradients():
    model, inputs = from_nnx(Recurrent), jax.random.normal(jax.random.key(1), (4, 5, 2))
    targets = jax.random.normal(jax.random.key(2), (4, 5, 3))

    @jax.jit
    def run(key):
        params = model.init(key, inputs)

        def loss(params, inputs, targets):
            return jnp.mean(jnp.square(model.apply(params, inputs) - targets))

        def meta_loss(params, inputs, targets):
            adapted = jax.tree.map(lambda x, dx: x - 0.1 * dx, params, jax.grad(loss)(params, inputs, targets))
            return loss(adapted, inputs, targets)

        # Two tasks of two sequences each.
        tasks = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (inputs, targets))
        gradient = jax.vmap(jax.grad(meta_loss), (None, 0, 0))(params, *tasks)
        return params, model.apply(params, inputs), gradient

    params, outputs, gradient = run(jax.random.key(0))
    _, cell, _ = nnx.split(Recurrent(rngs=nnx.Rngs(jax.random.key(0))), nnx.Param, ...)
    chex.assert_trees_all_close(params, cell, rtol=1e-5)
    expected = Recurrent(rngs=nnx.Rngs(jax.random.key(0)))(inputs)
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-6)
    assert all(jnp.all(jnp.any(leaf.reshape(2, -1) != 0, axis=1)) for leaf in jax.tree.leaves(gradient))


class Noisy(nnx.Module):
    """Two dropouts, and noise from a stream of its own."""

    def __init__(self, rngs):
        self.dropouts = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.noise = rngs.noise.fork()
        self.deterministic = True

    def __call__(self, inputs):
        noise = 0.0 if self.deterministic else jax.random.normal(self.noise(), inputs.shape)
        return [dropout(inputs) for dropout in self.dropouts], noise


@pytest.mark.parametrize("built", [False, True])
def test_nnx_dropout_draws_from_the_key_and_is_the_identity_without_one(built):
    model, inputs = from_nnx(Noisy(rngs=nnx.Rngs(0)) if built else Noisy), jnp.ones((8, 16))
    assert model.stochastic
    params = model.init(jax.random.key(0), inputs)
    dropped, noise = model.call(params, inputs)
    chex.assert_trees_all_equal(dropped, [inputs, inputs])
    assert noise == 0.0
    apply = jax.jit(lambda key: model.call(params, inputs, key))
    first, again, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    (one, two), noise = first
    # 128 draws each: none of these arrays is the same as another.
    assert jnp.any(one != two)
    assert jnp.any(one != other[0][0])
    assert jnp.any(noise != other[1])
    for mask in (one, two):
        assert set(jnp.unique(mask).tolist()) == {0.0, 2.0}


class Streams(nnx.Module):
    """Noise from two streams, in every mode."""

    def __init__(self, rngs):
        self.first, self.second, self.variable = rngs.a.fork(), rngs.b.fork(), nnx.Variable(jnp.ones(()))

    def __call__(self, inputs):
        del inputs
        return jnp.stack([jax.random.normal(self.first()), jax.random.normal(self.second()), self.variable[...]])


def test_nnx_streams_of_different_names_have_different_keys():
    model = from_nnx(Streams(rngs=nnx.Rngs(a=0, b=1)))
    first, second, _ = model.apply(model.init(jax.random.key(0), None), None, key=jax.random.key(1))
    assert first != second


def test_nnx_models_are_pure():
    module = Streams(rngs=nnx.Rngs(0))
    model = from_nnx(module)
    params = model.init(jax.random.key(0), None)
    before = model.apply(params, None)
    chex.assert_trees_all_equal(model.apply(params, None), before)
    module.variable[...] = jnp.full((), 2.0)
    chex.assert_trees_all_equal(model.apply(params, None), before)
    assert module.first.count[...] == 0


def test_a_linen_module_that_takes_more_than_its_inputs_is_refused():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, inputs, mask, *others, train, **more):
            return nn.Dense(1)(inputs * mask)

    with pytest.raises(ValueError, match=r"Masked has the arguments \['mask'\] beside its inputs"):
        from_linen(Masked())
