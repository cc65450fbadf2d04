"""What every algorithm of the catalogue promises; a new one joins by being listed."""

import dataclasses
import functools
import re
import typing
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from key_use import keys_by_use

from maml_jax import (
    CATALOGUE,
    Batch,
    Episode,
    InnerDescent,
    MetaState,
    Model,
    Problem,
    check_inner_grad,
    checkpointed,
    evaluate,
    init_meta_state,
    losses,
    make_meta_step,
    make_train_loop,
    mixed_mode,
    models,
    parallel,
)
from maml_jax.tasks import sinusoid
from maml_jax.types import learner_at

NUM_STEPS, WAY, BLOB_SIZE = 2, 3, 4
EVERY_ALGORITHM = pytest.mark.parametrize("name", CATALOGUE)


def build(name, model, num_inner_steps=NUM_STEPS, loss_fn=None, way=WAY, **hyperparameters):
    entry = CATALOGUE[name]
    if iterates(name):
        hyperparameters["num_inner_steps"] = num_inner_steps
    if name == "pretrained-classifier":
        hyperparameters |= {"num_classes": WAY, "head": "linear"}
    hyperparameters = SMALL.get(name, {}) | hyperparameters
    known = {field.name for field in dataclasses.fields(entry.hyperparameters)}
    hyperparameters = {field: value for field, value in hyperparameters.items() if field in known}
    problem = Problem(model, loss_fn or loss_of(name), head=is_head, embedding=model, way=way)
    return learner_at(entry.build(problem, entry.hyperparameters(**hyperparameters)), jnp.int32(0))


# Networks of their own in a size that compiles in no time.
SMALL = {
    "mann": {"num_units": 16, "num_slots": 12, "slot_size": 8, "num_reads": 2},
    "lstm": {"num_units": 16},
    "neural-statistician": {"num_context": 4, "num_latent": 3, "num_hidden": 16},
    "leo": {"num_latent": 4, "num_latent_steps": 1, "num_finetuning_steps": 1, "train_embedding": True},
}
NEEDS_KEY = {"mldg", "mann", "lstm", "leo", "neural-statistician"}
DRAWS_AN_ORDER = {"mann", "lstm", "memory-module"}
"""Their `adapt` draws the order of the support set from its key."""


def classifies(name):
    return CATALOGUE[name].classifies


def loss_of(name):
    return losses.cross_entropy if classifies(name) else losses.mean_squared_error


def is_head(name):
    """Some of the parameters of every model here, and not all."""
    return name.endswith(("weight", "kernel", "0"))


def iterates(name):
    """Whether the algorithm takes inner steps whose number is a hyperparameter."""
    return "num_inner_steps" in {field.name for field in dataclasses.fields(CATALOGUE[name].hyperparameters)}


def mesh_of(num_devices):
    return None if num_devices == 1 else parallel.task_mesh(jax.devices()[:num_devices])


class Affine(NamedTuple):
    weight: jax.Array
    bias: jax.Array


def affine_init(key, inputs):
    """Three outputs for blobs, one for sinusoids, beside which CAVIA has a context."""
    num_outputs = 3 if inputs.shape[-1] == BLOB_SIZE else 1
    return jax.random.normal(key, (inputs.shape[-1], num_outputs)), jnp.zeros(num_outputs)


STRUCTURES = {
    "nested dictionary": lambda w, b: {"layer": {"weight": w, "bias": b}},
    "tuple": lambda w, b: (w, b),
    "list in a tuple": lambda w, b: ([w], b),
    "named tuple": Affine,
}


def affine_model(structure):
    """A model whose parameters are (weight, bias) in any container."""

    def apply(params, inputs):
        shapes = {leaf.ndim: leaf for leaf in jax.tree.leaves(params)}
        return inputs @ shapes[2] + shapes[1].reshape(1, -1)

    return Model(lambda key, inputs: structure(*affine_init(key, inputs)), apply)


def of_domains(name):
    """Whether the support set of an episode has a batch of every domain, [D, B, ...]."""
    return "domains" in CATALOGUE[name].settings


def sample_blobs(key, shot):
    """Three classes of points [4]. Two coordinates tell them apart, and the noise of the other two is larger."""
    centres = jnp.array([[1.0, 0.0, 0.0, 0.0], [-0.5, 0.8, 0.0, 0.0], [-0.5, -0.8, 0.0, 0.0]])
    deviations = jnp.array([[0.2, 0.2, 3.0, 3.0]])
    noise_key, episode_key = jax.random.split(key)
    targets = jnp.tile(jnp.arange(WAY), 2 * shot)
    noise = jax.random.normal(noise_key, (len(targets), BLOB_SIZE))
    both = Batch(centres[targets] + deviations * noise, targets)
    support = jax.tree.map(lambda x: x[: WAY * shot], both)
    return Episode(support, jax.tree.map(lambda x: x[WAY * shot :], both), episode_key)


def sampler(name, shot=5):
    """Blobs to classify, or sinusoids; the domains of an episode are three of them, beside the query set of another."""
    if classifies(name):
        return functools.partial(sample_blobs, shot=shot)
    sample_episode = sinusoid.make_sampler(shot=shot, query_shot=shot)

    def sample_domains(key):
        support_key, query_key = jax.random.split(key)
        support = jax.vmap(sample_episode)(jax.random.split(support_key, 3)).support
        return sample_episode(query_key)._replace(support=support)

    return sample_domains if of_domains(name) else sample_episode


def episode(name, seed=0):
    return sampler(name)(jax.random.key(seed))


@EVERY_ALGORITHM
@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_pytree_of_parameters_keeps_its_structure_and_types(name, structure):
    learner = build(name, affine_model(STRUCTURES[structure]))
    meta_params = learner.init(jax.random.key(0), episode(name).support.inputs)
    task_params, _ = jax.eval_shape(learner.adapt, meta_params, episode(name).support)
    outputs = jax.eval_shape(learner.predict, task_params, episode(name).query.inputs)
    (loss, _), grads = jax.eval_shape(jax.value_and_grad(learner.objective, has_aux=True), meta_params, episode(name))
    chex.assert_trees_all_equal_structs(meta_params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(meta_params, grads)
    if iterates(name):  # the others keep features of the support set
        init = affine_model(STRUCTURES[structure]).init
        network = jax.eval_shape(init, jax.random.key(0), episode(name).support.inputs)
        adapted = task_params
        if name == "cavia":  # its network has the context as further inputs
            adapted, network = task_params["params"], meta_params
        if name == "pretrained-classifier":  # and a new last layer
            adapted = task_params["embedding"]
        chex.assert_trees_all_equal_structs(adapted, network)
        chex.assert_trees_all_equal_shapes_and_dtypes(adapted, network)
    chex.assert_shape(loss, ())
    targets = episode(name).query.targets
    chex.assert_shape(outputs, (*targets.shape, WAY) if classifies(name) else targets.shape)


def another(value):
    """A value of a hyperparameter that differs from the given one."""
    if isinstance(value, str):
        return {"sgd": "adam", "adam": "sgd", "linear": "centroid", "fine-tuned": "centroid"}[value]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 or 0.5


@EVERY_ALGORITHM
def test_every_hyperparameter_has_an_effect(name):
    entry, example = CATALOGUE[name], episode(name)
    few = {
        "reptile": {"batch_size": 4, "inner_optimizer": "adam"},
        "memory-module": {"num_slots": 4, "num_neighbours": 2},
        "meta-sgd": {"inner_lr_max": 0.1},
    }
    base = SMALL.get(name, {}) | few.get(name, {}) | {"num_inner_steps": NUM_STEPS}
    if name == "pretrained-classifier":
        base |= {"num_classes": WAY, "head": "linear"}
    fields = {field.name for field in dataclasses.fields(entry.hyperparameters)}
    model = affine_model(STRUCTURES["nested dictionary"])
    problem = Problem(
        model,
        loss_of(name),
        head=is_head,
        norm=lambda name: name.endswith("bias"),
        embedding=model,
        way=WAY,
    )

    def program(settings):
        """Everything that a learner computes, as text."""

        def everything(step, key):
            learner = learner_at(entry.build(problem, settings), step)
            meta_params = learner.init(key, example.support.inputs)
            gradient = jax.grad(learner.objective, has_aux=True)(meta_params, example)
            task_params, info = learner.adapt(meta_params, example.support, key=key)
            return meta_params, gradient, learner.predict(task_params, example.query.inputs), info

        jaxpr = jax.make_jaxpr(everything)(jnp.int32(5), jax.random.key(0))
        return re.sub(" at 0x[0-9a-f]+", "", str(jaxpr))  # where a function lies in memory

    settings = entry.hyperparameters(**{field: value for field, value in base.items() if field in fields})
    unchanged = program(settings)
    for field in fields:
        if field in ("finetuning_lr", "num_finetuning_steps") and name == "pretrained-classifier":
            finetuned = dataclasses.replace(settings, head="fine-tuned")
            changed = dataclasses.replace(finetuned, **{field: another(getattr(settings, field))})
            assert program(changed) != program(finetuned), field
        elif (name, field) != ("pretrained-classifier", "batch_size"):  # its experiment draws the batches
            changed = dataclasses.replace(settings, **{field: another(getattr(settings, field))})
            assert program(changed) != unchanged, field


@EVERY_ALGORITHM
def test_float64_parameters_stay_float64(name, x64):
    learner = build(name, affine_model(Affine))
    meta_params = learner.init(jax.random.key(0), episode(name).support.inputs)
    task_params, _ = jax.eval_shape(learner.adapt, meta_params, episode(name).support)
    grads, _ = jax.eval_shape(jax.grad(learner.objective, has_aux=True), meta_params, episode(name))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((meta_params, task_params, grads))}
    assert {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)} == {jnp.dtype("float64")}


@EVERY_ALGORITHM
def test_the_objective_is_the_same_with_and_without_jit(name):
    learner = build(name, affine_model(Affine))
    meta_params = learner.init(jax.random.key(0), episode(name).support.inputs)
    jitted, _ = jax.jit(learner.objective)(meta_params, episode(name))
    plain, _ = learner.objective(meta_params, episode(name))
    chex.assert_trees_all_close(jitted, plain, rtol=1e-5, atol=1e-6)


@EVERY_ALGORITHM
@pytest.mark.parametrize("num_steps", [0, 3])
def test_adaptation_reports_every_step_and_takes_a_key(name, num_steps):
    num_steps = num_steps if iterates(name) else 2 if name == "leo" else 0
    learner = build(name, affine_model(Affine), num_inner_steps=num_steps)
    support = episode(name).support
    observed = episode(name).query if of_domains(name) else support
    meta_params = learner.init(jax.random.key(0), support.inputs)

    def adapt(key):
        return learner.adapt(
            meta_params, support, key=key, observe_fn=lambda task_params: learner.predict(task_params, observed.inputs)
        )

    with_key, without = adapt(jax.random.key(1)), adapt(None)
    _, info = without
    chex.assert_trees_all_equal(with_key, adapt(jax.random.key(1)) if name in DRAWS_AN_ORDER else without)
    chex.assert_equal(len(info.observed), num_steps + 1)
    if not iterates(name):
        return
    chex.assert_shape(info.support_loss, (num_steps,))
    by_hand = jax.vmap(loss_of(name), in_axes=(0, None))(info.observed[:-1], support.targets)
    chex.assert_trees_all_close(info.support_loss, by_hand, rtol=1e-5)


@EVERY_ALGORITHM
@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_a_support_set_of_numpy_may_be_a_constant_of_the_program(name, key):
    settings = {"batch_size": 2} if name == "reptile" else {}
    learner, support = build(name, affine_model(Affine), **settings), episode(name).support
    params, constants = learner.init(jax.random.key(1), support.inputs), jax.tree.map(np.asarray, support)
    found = jax.make_jaxpr(lambda params: learner.adapt(params, constants, key=key)[0])(params)
    expected = jax.make_jaxpr(lambda params, support: learner.adapt(params, support, key=key)[0])(params, support)
    assert found.out_avals == expected.out_avals


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in DRAWS_AN_ORDER])
def test_the_order_of_the_support_set_does_not_matter(name, x64):
    # Iterating methods take all examples in each step here; Reptile's mini-batches go through them in order.
    learner, example = build(name, affine_model(Affine)), episode(name)
    meta_params = learner.init(jax.random.key(0), example.support.inputs)
    axis = 1 if of_domains(name) else 0
    order = jax.random.permutation(jax.random.key(1), example.support.targets.shape[axis])
    assert jnp.any(order != jnp.arange(len(order)))
    mixed = jax.tree.map(lambda x: jnp.take(x, order, axis), example.support)

    def outputs(support):
        task_params, _ = learner.adapt(meta_params, support)
        return learner.predict(task_params, example.query.inputs)

    found, expected = outputs(mixed), outputs(example.support)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)
    others = example.support._replace(inputs=example.support.inputs + 1.0)
    assert name in ("mldg", "erm") or jnp.max(jnp.abs(outputs(others) - expected)) > 1e-6


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_meta_step_is_not_traced_twice(num_devices):
    name = "reptile"
    learner = build(name, affine_model(Affine))
    chex.clear_trace_counter()
    counted = learner._replace(objective=chex.assert_max_traces(learner.objective, n=1))
    optimizer = optax.adam(1e-3)
    mesh = mesh_of(num_devices)
    state = init_meta_state(learner, optimizer, jax.random.key(0), episode(name).support.inputs)
    step = make_meta_step(counted, optimizer, chunk_size=2, mesh=mesh)
    for seed in range(3):
        state, info = step(state, jax.vmap(sampler(name))(jax.random.split(jax.random.key(seed), 4)))
    assert state.step == 3
    assert info.finite


@EVERY_ALGORITHM
def test_one_device_and_two_take_the_same_path_that_is_traced_once(name):
    # With a larger epsilon a gradient that is zero but for rounding takes no step, as that of a bias of ProtoNets.
    learner, optimizer = build(name, affine_model(Affine)), optax.adam(1e-2, eps=1e-3)

    def results(num_devices):
        mesh = mesh_of(num_devices)
        state = init_meta_state(learner, optimizer, jax.random.key(0), episode(name).support.inputs)
        # The same shapes are traced once. Where the chunk size is given, that is once for the derivative alone.
        chex.clear_trace_counter()
        counted = learner._replace(objective=chex.assert_max_traces(learner.objective, n=1))
        settings = {"meta_batch_size": 4, "num_steps": 2, "chunk_size": 2, "mesh": mesh}
        loop = make_train_loop(counted, optimizer, sampler(name), **settings)
        for _ in range(2):
            state, info = loop(state, jax.random.key(1))
        evaluation = evaluate(
            learner,
            state.params,
            sampler(name),
            jax.random.key(2),
            metric_fn=loss_of(name),
            num_episodes=4,
            chunk_size=2,
            mesh=mesh,
        )
        return jax.device_get((state, info, evaluation))

    _, info, _ = found = results(2)
    assert info.finite.all()
    assert (info.grad_norm > 0).all()
    chex.assert_trees_all_close(found, results(1), rtol=1e-4, atol=1e-5)


def noisy_model():
    """An affine model that adds noise to its outputs: other keys give other outputs, and no key gives no noise."""
    affine = affine_model(Affine)

    def apply(params, inputs, *, key=None):
        outputs = affine.apply(params, inputs)
        return outputs if key is None else outputs + jax.random.normal(key, outputs.shape)

    return Model(affine.init, apply, stochastic=True)


WITHOUT_WHERE = {"anil", "cavia", "pretrained-classifier"}
"""What adapts is the head, the context, or a new last layer."""
ADAPT_WITHOUT_CHANCE = {"imaml", "mldg", "erm"}
"""The inner problem of iMAML is one problem; MLDG and ERM do not adapt."""


@EVERY_ALGORITHM
def test_the_key_of_the_episode_reaches_the_model(name):
    affine = affine_model(Affine)
    learner = build(name, noisy_model())
    without_noise = build(name, Model(affine.init, lambda *args, key=None: affine.apply(*args), stochastic=True))
    meta_params = learner.init(jax.random.key(0), episode(name).support.inputs)

    @jax.jit
    def objective(key):
        return learner.objective(meta_params, episode(name)._replace(key=key))[0]

    first = jax.random.key(0) if name in NEEDS_KEY else None
    values = [float(objective(key)) for key in (first, first, jax.random.key(1), jax.random.key(2))]
    assert values[0] == values[1]
    assert len(set(values)) == 3
    # A learner that draws itself has other objectives too if its model gets no key.
    plain = jax.jit(without_noise.objective)(meta_params, episode(name)._replace(key=jax.random.key(1)))[0]
    assert abs(float(plain) - values[2]) > 1e-3


@EVERY_ALGORITHM
def test_the_key_of_an_adaptation_reaches_the_model(name):
    learner = build(name, noisy_model())
    meta_params = learner.init(jax.random.key(0), episode(name).support.inputs)

    @jax.jit
    def adapted(key):
        return learner.adapt(meta_params, episode(name).support, key=key)[0]

    first, second = (jax.tree.leaves(adapted(jax.random.key(seed))) for seed in (0, 1))
    is_same = all(bool(jnp.all(a == b)) for a, b in zip(first, second, strict=True))
    assert is_same == (name in ADAPT_WITHOUT_CHANCE)


@EVERY_ALGORITHM
def test_passes_over_different_examples_draw_with_different_keys(name):
    affine, drawn = affine_model(Affine), set()

    def note(data, inputs):
        drawn.add((tuple(np.asarray(data).tolist()), np.asarray(inputs).tobytes()))

    def apply(params, inputs, *, key=None):
        if key is not None:
            jax.debug.callback(note, jax.random.key_data(key), inputs)
        return affine.apply(params, inputs)

    learner = build(name, Model(affine.init, apply, stochastic=True))
    given = episode(name)
    meta_params = learner.init(jax.random.key(0), given.support.inputs)
    jax.block_until_ready(learner.objective(meta_params, given._replace(key=jax.random.key(1)))[0])
    jax.effects_barrier()
    keys = [key for key, _ in drawn]
    assert keys
    assert len(set(keys)) == len(keys), "one key was used for two batches"


@EVERY_ALGORITHM
@pytest.mark.parametrize("part", ["objective", "adapt"])
def test_no_two_random_choices_of_a_learner_depend_on_each_other(name, part):
    affine, of_model = affine_model(Affine), set()

    def apply(params, inputs, *, key=None):
        if key is not None:
            jax.debug.callback(lambda data: of_model.add(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return affine.apply(params, inputs)

    draws = {"reptile": {"batch_size": 2}, "leo": {"dropout_rate": 0.5}, "matching": {"num_reads": 2}}
    learner = build(name, Model(affine.init, apply, stochastic=True), **draws.get(name, {}))
    given = episode(name)
    meta_params = learner.init(jax.random.key(0), given.support.inputs)
    if part == "objective":
        drawn, divided = keys_by_use(lambda: learner.objective(meta_params, given._replace(key=jax.random.key(1)))[0])
    else:
        drawn, divided = keys_by_use(lambda: learner.adapt(meta_params, given.support, key=jax.random.key(1))[0])
    assert len(set(drawn)) == len(drawn), "the learner draws from one key twice"
    assert not set(drawn) & of_model, "the learner and the model draw from one key"
    assert not (set(drawn) | of_model) & divided, "a key is drawn from and divided"


@pytest.mark.parametrize("name", [name for name in CATALOGUE if iterates(name) and name not in WITHOUT_WHERE])
def test_only_the_parameters_that_the_problem_names_adapt(name):
    entry, given = CATALOGUE[name], episode(name)
    settings = {"num_inner_steps": NUM_STEPS} | ({"per_step_norm": False} if name == "maml++" else {})
    model = affine_model(STRUCTURES["nested dictionary"])
    # BOIL adapts all but the head, here the bias.
    problem = Problem(model, loss_of(name), head=lambda name: name == "none", where=lambda name: name.endswith("bias"))
    learner = learner_at(entry.build(problem, entry.hyperparameters(**settings)), jnp.int32(0))
    meta_params = learner.init(jax.random.key(0), given.support.inputs)
    _, info = learner.adapt(meta_params, given.support, observe_fn=lambda params: params["layer"])
    chex.assert_trees_all_equal(info.observed["weight"][0], info.observed["weight"][-1])
    assert jnp.all(info.observed["bias"][0] != info.observed["bias"][-1])


def test_inner_gradients_of_the_networks_are_differentiated_exactly(x64):
    batch = Batch(jax.random.normal(jax.random.key(0), (6, 8, 8, 1)), jnp.arange(6) % 3)
    for model in (models.mlp(features=(4, 3), activation=jnp.tanh), models.conv4(way=3, features=2)):
        params = jax.tree.map(jnp.float64, model.init(jax.random.key(1), batch.inputs))

        def loss(params, batch, model=model):
            return losses.cross_entropy(model.apply(params, batch.inputs), batch.targets)

        assert check_inner_grad(loss, params, batch, inner_grad=mixed_mode, rtol=1e-7) < 1e-7
        # A derivative rule that mixed mode cannot use would make it fall back to `checkpointed`, which agrees too.
        assert "remat" not in str(jax.make_jaxpr(mixed_mode(loss))(params, batch))
        assert "remat" in str(jax.make_jaxpr(checkpointed(loss))(params, batch))


@pytest.mark.parametrize("name", [name for name in CATALOGUE if iterates(name)])
@pytest.mark.parametrize("num_steps", [-1, 0.5])
def test_a_wrong_number_of_steps_is_refused(name, num_steps):
    with pytest.raises(ValueError, match=f"at least 0, got {num_steps}"):
        build(name, affine_model(Affine), num_inner_steps=num_steps)


@EVERY_ALGORITHM
def test_integer_parameters_are_refused(name):
    model = Model(lambda key, inputs: {"w": jnp.ones((1, 1), int)}, lambda params, inputs: inputs * params["w"])
    learner = build(name, model)
    with pytest.raises(ValueError, match=r"\['w'\](\[0\])? has dtype int32 .* use floating parameters"):
        init_meta_state(learner, optax.sgd(0.1), jax.random.key(0), jnp.zeros((5, 1)))


@pytest.mark.parametrize("name", [name for name in CATALOGUE if not classifies(name)])
def test_outputs_that_do_not_fit_the_loss_are_refused(name):
    learner = build(name, models.mlp(features=(2,)))
    meta_params = learner.init(jax.random.key(0), episode(name).support.inputs)
    with pytest.raises(ValueError, match=r"outputs \(\d+, 2\) and targets \(\d+, 1\); reshape the targets"):
        learner.objective(meta_params, episode(name))


@pytest.mark.parametrize("name", [name for name in CATALOGUE if classifies(name)])
@pytest.mark.parametrize("shape", [(), (0,), (2, 2)])
def test_embeddings_that_are_no_vectors_are_refused(name, shape):
    features = Model(lambda key, inputs: {"w": jnp.ones(1)}, lambda params, inputs: jnp.ones((len(inputs), *shape)))
    learner = build(name, features)

    def use():
        meta_params = learner.init(jax.random.key(0), episode(name).support.inputs)
        return learner.adapt(meta_params, episode(name).support)

    with pytest.raises(ValueError, match=r"the embedding must return \[S, D\] with D of at least 1, got shape"):
        use()


@pytest.mark.parametrize("name", [name for name in CATALOGUE if classifies(name)])
def test_labels_that_do_not_fit_are_refused(name):
    learner, support = build(name, affine_model(Affine)), episode(name).support
    meta_params = learner.init(jax.random.key(0), support.inputs)
    wrong = {
        "label 3, which is none of 0..2": support.targets.at[0].set(3),
        "no example of class 1 of way=3": jnp.where(support.targets == 1, 0, support.targets),
        "integer class indices": support.targets.astype(jnp.float32),
    }
    for message, targets in wrong.items():
        with pytest.raises(ValueError, match=message):
            learner.adapt(meta_params, support._replace(targets=targets))
    with pytest.raises(ValueError, match="2 examples of way=3 classes"):
        learner.adapt(meta_params, jax.tree.map(lambda x: x[:2], support))
    entry, incomplete = CATALOGUE[name], Problem(affine_model(Affine), losses.cross_entropy)
    with pytest.raises(ValueError, match=r"Problem\(..., embedding=..., way=...\)"):
        learner_at(entry.build(incomplete, entry.hyperparameters()), jnp.int32(0))


@EVERY_ALGORITHM
def test_a_network_that_is_no_model_is_refused(name):
    with pytest.raises(ValueError, match=r"model must be a maml_jax\.Model, got function"):
        build(name, lambda params, inputs: inputs)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if classifies(name)])
def test_an_episode_without_classes_is_refused(name):
    with pytest.raises(ValueError, match="way must be an integer of at least 1, got 0"):
        build(name, affine_model(Affine), way=0)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if not classifies(name)])
def test_an_empty_support_set_is_refused(name):
    if name == "pretrained":
        pytest.skip("it trains on the query set")
    learner, full = build(name, affine_model(Affine)), episode(name)
    meta_params = learner.init(jax.random.key(0), full.support.inputs)
    empty = jax.tree.map(lambda x: x[:, :0] if of_domains(name) else x[:0], full.support)
    with pytest.raises(ValueError, match=r"the support set is empty|of 0 examples; give one or more"):
        learner.objective(meta_params, full._replace(support=empty))


@EVERY_ALGORITHM
def test_a_record_checks_its_numbers(name):
    record = CATALOGUE[name].hyperparameters
    for field, kind in typing.get_type_hints(record).items():
        kinds = {kind, *typing.get_args(kind)}
        for value in [-1] * (int in kinds) + [-1.0, float("nan"), float("inf")] * (float in kinds):
            with pytest.raises(ValueError, match=rf"{field}(=| must be .*, got ){value}"):
                record(**{field: value})


class OneConvolution(nn.Module):
    """What conv4 is made of. It is traced in a fraction of the time."""

    @nn.compact
    def __call__(self, inputs):
        hidden = nn.relu(models.BatchStatNorm()(nn.Conv(4, (3, 3), strides=4)(inputs)))
        return nn.Dense(3)(hidden.mean((1, 2)))


ONE_CONVOLUTION = models.from_linen(OneConvolution())


@EVERY_ALGORITHM
def test_a_meta_step_lowers_for_cuda_and_tpu(name):
    # No accelerator is needed to see that one program serves all: StableHLO is made for each platform.
    network = models.conv4(way=3, features=4) if name == "maml" else ONE_CONVOLUTION
    learner, optimizer = build(name, network, loss_fn=losses.cross_entropy), optax.adam(1e-3)
    axes = (3, 3) if of_domains(name) else (3,)
    images = jax.ShapeDtypeStruct((2, *axes, 28, 28, 1), jnp.float32)
    batch = Batch(images, jax.ShapeDtypeStruct((2, *axes), jnp.int32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    params = jax.eval_shape(learner.init, jax.random.key(0), jnp.zeros((*axes, 28, 28, 1)))
    state = MetaState(params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32))
    step = make_meta_step(learner, optimizer)
    exported = jax.export.export(step.jitted, platforms=("cuda", "tpu"))(state, Episode(batch, batch, keys))
    assert exported.platforms == ("cuda", "tpu")
    assert "stablehlo.dot_general" in exported.mlir_module()


LEARN_ELSEWHERE = {"mann", "lstm", "memory-module", "neural-statistician", "meta-lstm", "leo"}
"""Slow ones, whose own tests have them learn."""


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in LEARN_ELSEWHERE])
def test_it_learns(name):
    # Sinusoids: the query loss after adaptation, on tasks that were not trained on, falls below that of the initial
    # parameters, and below 4.3: the variance of a sinusoid of amplitude U[0.1, 5] is E[A²] / 2 = 4.25.
    # Blobs: the share of errors halves.
    # Two steps of 0.02 go about as far as the solution of a proximal problem of strength 1 / (2 · 0.02).
    further = {"strength": 25.0} if name == "imaml" else {}
    network = {"features": (16, 3)} if classifies(name) else {"features": (32, 32, 1), "activation": jnp.tanh}
    learner = build(name, models.mlp(**network), inner_lr=0.02, **further)
    optimizer = optax.adam(5e-3)
    sample_episode = sampler(name, shot=10)
    train = make_train_loop(learner, optimizer, sample_episode, meta_batch_size=8, num_steps=400, chunk_size=8)
    state = init_meta_state(learner, optimizer, jax.random.key(0), episode(name).support.inputs)

    def errors(outputs, targets):
        return 1.0 - losses.accuracy(outputs, targets)

    def score(params):
        return evaluate(
            learner,
            params,
            sample_episode,
            jax.random.key(2),
            metric_fn=errors if classifies(name) else losses.mean_squared_error,
            num_episodes=200,
            chunk_size=200,
        ).mean[-1]

    before = score(state.params)
    state, _ = train(state, jax.random.key(1))
    after = score(state.params)
    assert after < (0.5 if classifies(name) else 0.85) * before
    assert after < (0.2 if classifies(name) else 4.25)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_and_finite_is_refused(rate):
    with pytest.raises(ValueError, match=r"inner_lr=.* must be a positive number"):
        InnerDescent(inner_lr=rate)


@EVERY_ALGORITHM
def test_published_settings_build_learners(name):
    entry = CATALOGUE[name]
    assert entry.settings
    for settings in entry.settings.values():
        assert isinstance(settings, entry.hyperparameters)
        assert dataclasses.is_dataclass(settings)
        assert type(settings).__dataclass_params__.frozen
