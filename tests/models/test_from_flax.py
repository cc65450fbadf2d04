import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from linear_regression import half_mse, make_episodes

from maml_jax import adapt_only, init_meta_state, make_meta_step, maml
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


def test_a_function_of_rngs_draws_fresh_parameters():
    model = from_nnx(TwoLayers)
    first, again, other = (model.init(jax.random.key(seed), None) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert jnp.any(first.first.kernel[...] != other.first.kernel[...])
    inputs = jax.random.normal(jax.random.key(2), (5, 4))
    chex.assert_trees_all_equal(model.apply(first, inputs), TwoLayers(nnx.Rngs(jax.random.key(0)))(inputs))


def test_a_module_gives_its_present_parameters():
    module = TwoLayers(nnx.Rngs(3))
    model = from_nnx(module)
    inputs = jax.random.normal(jax.random.key(2), (5, 4))
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
    rule = adapt_only(optax.sgd(0.1), lambda name: name.startswith("second"))
    learner, optimizer = maml(model, half_mse, inner_optimizer=rule, num_inner_steps=2), optax.adam(0.01)
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


@pytest.mark.parametrize("layer", [lambda rngs: nnx.BatchNorm(3, rngs=rngs), lambda rngs: nnx.Dropout(0.5, rngs=rngs)])
@pytest.mark.parametrize("built", [False, True])
def test_nnx_modules_with_other_variables_are_refused(layer, built):
    with pytest.raises(ValueError, match=r"(BatchNorm|Dropout) keeps .*(BatchStat|RngCount).*Leave out running"):
        from_nnx(layer(nnx.Rngs(0)) if built else layer)
