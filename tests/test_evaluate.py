import gc
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import ALPHA, half_mse, linear_model, make_episode

from maml_jax import (
    Batch,
    Episode,
    InnerInfo,
    MetaLearner,
    Model,
    evaluate,
    evaluate_objective,
    losses,
    maml,
    models,
    parallel,
    reptile,
)
from maml_jax.tasks import few_shot

NUM_STEPS = 3
LEARNER = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=NUM_STEPS)
THETA = jnp.array([0.5, -1.0, 2.0, 0.1])
KEY = jax.random.key(3)


def run(num_episodes=8, learner=LEARNER, **kwargs):
    return evaluate(learner, THETA, make_episode, KEY, metric_fn=half_mse, num_episodes=num_episodes, **kwargs)


def test_scores_against_a_direct_computation():
    evaluation = run()
    scores = np.zeros((8, NUM_STEPS + 1))
    for e in range(8):
        episode = make_episode(jax.random.fold_in(KEY, e))
        params = THETA
        for k in range(NUM_STEPS + 1):
            scores[e, k] = half_mse(linear_model.apply(params, episode.query.inputs), episode.query.targets)
            support = episode.support
            gradient = support.inputs.T @ (support.inputs @ params - support.targets) / len(support.targets)
            params = params - ALPHA * gradient
    chex.assert_trees_all_close(evaluation.per_episode, scores.astype(np.float32), rtol=1e-4)
    chex.assert_trees_all_close(evaluation.mean, scores.mean(0).astype(np.float32), rtol=1e-4)
    ci95 = 2.364624 * scores.std(0, ddof=1) / np.sqrt(8)  # the quantile 0.975 of Student's t with 7 degrees of freedom
    chex.assert_trees_all_close(evaluation.ci95, ci95.astype(np.float32), rtol=1e-4)


def test_more_steps_at_test_time_extend_the_curve():
    longer = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=NUM_STEPS + 4)
    curve = run(learner=longer).mean
    chex.assert_shape(curve, (NUM_STEPS + 5,))
    chex.assert_trees_all_close(curve[: NUM_STEPS + 1], run().mean, rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{"chunk_size": 3}, {"chunk_size": 8}, {"chunk_size": 100}])
def test_chunks_do_not_matter(kwargs):
    chex.assert_trees_all_close(run(**kwargs), run(), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_key_without_a_type_is_a_key(chunk_size):
    settings = {"metric_fn": half_mse, "num_episodes": 8, "chunk_size": chunk_size}
    found = evaluate(LEARNER, THETA, make_episode, jax.random.PRNGKey(3), **settings)
    chex.assert_trees_all_close(found, run(), rtol=1e-5)


def test_a_mesh_does_not_matter():
    mesh = parallel.task_mesh(jax.devices()[:4])
    chex.assert_trees_all_close(jax.device_get(run(mesh=mesh)), jax.device_get(run()), rtol=1e-5)


def test_an_episode_does_not_depend_on_how_many_there_are():
    chex.assert_trees_all_close(run(12).per_episode[:8], run(8).per_episode, rtol=1e-6)


def test_evaluating_again_does_not_trace_again():
    chex.clear_trace_counter()
    sampler = chex.assert_max_traces(make_episode, n=1)
    for seed in range(3):
        evaluation = evaluate(
            LEARNER, seed * THETA, sampler, jax.random.key(seed), metric_fn=half_mse, num_episodes=2, chunk_size=2
        )
    chex.assert_tree_all_finite(evaluation)


def test_parameters_on_one_device_and_on_all_have_one_program(caplog):
    mesh = parallel.task_mesh(jax.devices()[:2])
    settings = {"metric_fn": half_mse, "num_episodes": 4, "mesh": mesh}
    first = evaluate(LEARNER, THETA, make_episode, KEY, **settings)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        again = evaluate(LEARNER, parallel.replicate(THETA, mesh), make_episode, KEY, **settings)
    assert "Finished XLA compilation" not in caplog.text
    chex.assert_trees_all_equal(first, again)


@pytest.mark.parametrize("num_episodes", [1, 0])
def test_fewer_than_two_episodes_are_refused(num_episodes):
    with pytest.raises(ValueError, match=f"num_episodes must be an integer of at least 2, got {num_episodes}"):
        run(num_episodes)


def test_episodes_that_do_not_divide_over_a_mesh_are_refused():
    with pytest.raises(ValueError, match=r"num_episodes=7 does not divide over the 4 devices .* multiple of 4"):
        run(7, mesh=parallel.task_mesh(jax.devices()[:4]))
    with pytest.raises(ValueError, match=r"mesh 4 must be made by parallel\.task_mesh"):
        run(8, mesh=4)


@pytest.mark.parametrize("chunk_size", [0, -1, True, 2.5])
def test_a_chunk_size_that_is_no_positive_integer_is_refused(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be an integer of at least 1, got {chunk_size}"):
        run(chunk_size=chunk_size)


def test_a_chunk_is_one_vmap():
    # The number of predictions in the program does not change, but their leading axis is the chunk.
    shapes = []

    def metric(outputs, targets):
        shapes.append(jax.typeof(outputs).shape)
        return half_mse(outputs, targets)

    for chunk_size in (1, 4):
        program = jax.make_jaxpr(
            lambda theta, n=chunk_size: evaluate(
                LEARNER, theta, make_episode, KEY, metric_fn=metric, num_episodes=8, chunk_size=n
            )
        )(THETA)
        batched = f"f32[{chunk_size},5,4]" in str(program)  # the query inputs of a chunk
        assert batched == (chunk_size > 1)


def test_a_metric_may_be_a_tree_of_numbers():
    metrics = {"error": half_mse, "largest": lambda y, t: jnp.max(jnp.abs(y - t)), "constant": lambda y, t: 0.5}

    def every(outputs, targets):
        return {name: metric(outputs, targets) for name, metric in metrics.items()} | {"hits": outputs > targets}

    evaluation = evaluate(LEARNER, THETA, make_episode, KEY, metric_fn=every, num_episodes=8)
    assert evaluation.mean.keys() == metrics.keys() | {"hits"}
    errors = jax.tree.map(lambda of: of["error"], evaluation, is_leaf=lambda x: isinstance(x, dict))
    chex.assert_trees_all_close(errors, run(), rtol=1e-6)
    chex.assert_trees_all_equal(evaluation.mean["constant"], jnp.full(NUM_STEPS + 1, 0.5))
    chex.assert_shape(evaluation.mean["hits"], (NUM_STEPS + 1, 5))


def test_episodes_that_are_not_finite_are_counted_and_the_others_summarised():
    def sometimes(outputs, targets):
        error = half_mse(outputs, targets)
        return jnp.where(targets[0] > 0, error, jnp.where(targets[1] > 0, jnp.nan, jnp.inf))

    evaluation = evaluate(LEARNER, THETA, make_episode, KEY, metric_fn=sometimes, num_episodes=40)
    scores = np.asarray(evaluation.per_episode)
    bad = ~np.isfinite(scores)
    assert 0 < bad[:, 0].sum() < 40
    assert np.isnan(scores).any()
    assert np.isinf(scores).any()
    chex.assert_trees_all_equal(evaluation.num_nonfinite, bad.sum(0).astype(np.int32))
    assert not np.isfinite(evaluation.mean).any()
    others = scores[~bad[:, 0]]
    chex.assert_trees_all_close(evaluation.finite_mean, others.mean(0), rtol=1e-5)
    chex.assert_trees_all_close(evaluation.finite_median, np.median(others, axis=0), rtol=1e-5)


def test_a_diverged_model_does_not_score_by_chance():
    learner = maml(
        Model(lambda key, inputs: jnp.ones(2), lambda params, inputs: inputs * params[0]),
        losses.cross_entropy,
        inner_optimizer=optax.sgd(float("nan")),
        num_inner_steps=1,
    )

    def labelled(key):
        inputs = jax.random.normal(key, (4, 2))
        batch = Batch(inputs, jnp.argmax(inputs, -1))
        return Episode(batch, batch, key)

    evaluation = evaluate(learner, jnp.ones(2), labelled, KEY, metric_fn=losses.accuracy, num_episodes=3)
    assert evaluation.mean[0] == 1
    assert jnp.isnan(evaluation.mean[1])
    assert evaluation.num_nonfinite.tolist() == [0, 3]


def reports_its_key(meta_params, support, *, key=None, observe_fn=None):
    drawn = jnp.float32(-1.0) if key is None else jax.random.uniform(key)
    return drawn, InnerInfo(jnp.zeros(0), jax.tree.map(lambda x: x[None], observe_fn(drawn)))


def test_adapt_gets_the_key_of_the_episode_if_asked_to():
    learner = MetaLearner(None, reports_its_key, lambda task_params, inputs: task_params, None)

    def sample(key):
        return make_episode(key)._replace(key=jax.random.fold_in(key, 5))

    def scores(**kwargs):
        return evaluate(
            learner, THETA, sample, KEY, metric_fn=lambda outputs, targets: outputs, num_episodes=4, **kwargs
        ).per_episode

    keys = [jax.random.fold_in(jax.random.fold_in(KEY, e), 5) for e in range(4)]
    chex.assert_trees_all_equal(scores(stochastic=True)[:, 0], jnp.stack([jax.random.uniform(key) for key in keys]))
    chex.assert_trees_all_equal(scores(), jnp.full((4, 1), -1.0))


def test_a_learner_that_does_not_observe_is_named():
    blind = LEARNER._replace(adapt=lambda params, support, **kwargs: (params, InnerInfo(jnp.zeros(0))))
    with pytest.raises(ValueError, match=r"adapt returned no info\.observed; it must evaluate observe_fn"):
        run(learner=blind)
    with pytest.raises(ValueError, match=r"adapt returned no info\.observed"):
        run(learner=LEARNER._replace(adapt=lambda params, support, **kwargs: (params, None)))


def test_a_metric_without_a_number_is_refused():
    with pytest.raises(ValueError, match="metric_fn returned None, in which there is no number"):
        evaluate(LEARNER, THETA, make_episode, KEY, metric_fn=lambda outputs, targets: None, num_episodes=2)


def test_an_episode_without_queries_is_refused():
    def without_queries(key):
        drawn = make_episode(key)
        return drawn._replace(query=jax.tree.map(lambda x: x[:0], drawn.query))

    with pytest.raises(ValueError, match="the query set of an episode is empty, so there is nothing to score"):
        evaluate(LEARNER, THETA, without_queries, KEY, metric_fn=half_mse, num_episodes=2)


def test_queries_that_do_not_fit_beside_the_support_set_are_refused():
    def in_steps(key):
        drawn = make_episode(key)
        return drawn._replace(support=jax.tree.map(lambda x: jnp.stack(NUM_STEPS * [x]), drawn.support))

    rule = {"inner_optimizer": optax.sgd(ALPHA), "num_inner_steps": NUM_STEPS}
    learner = maml(linear_model, half_mse, data_per_step=True, **rule)
    settings = {"metric_fn": half_mse, "num_episodes": 2}
    with pytest.raises(ValueError, match=r"no place beside a support set of examples .*data_per_step"):
        evaluate(learner, THETA, in_steps, KEY, one_query_at_a_time=True, **settings)
    assert np.isfinite(evaluate(learner, THETA, in_steps, KEY, **settings).mean).all()


class Unhashable:
    """A function that cannot be the key of a cache."""

    __hash__ = None

    def __eq__(self, other):
        return self is other

    def __call__(self, task_params, inputs):
        return linear_model.apply(task_params, inputs)


def test_parts_that_cannot_be_hashed_work():
    chex.assert_trees_all_close(run(learner=LEARNER._replace(predict=Unhashable())), run(), rtol=1e-6)


def test_a_learner_may_be_built_from_numbers_that_are_arguments_of_one_program():
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def build(rate):
        return maml(linear_model, half_mse, inner_optimizer=optax.sgd(rate), num_inner_steps=NUM_STEPS)

    for rate in (0.1, 0.2, ALPHA):
        curve = run(learner=jax.tree_util.Partial(build, jnp.float32(rate)), chunk_size=8)
    chex.assert_trees_all_close(curve, run(chunk_size=8), rtol=1e-5)


def test_the_objective_and_its_info_may_be_evaluated():
    evaluation = evaluate_objective(LEARNER, THETA, make_episode, KEY, num_episodes=8)
    loss, info = evaluation.mean
    chex.assert_trees_all_close(loss, run().mean[-1], rtol=1e-5)
    chex.assert_shape(info.support_loss, (NUM_STEPS,))
    distance, _ = evaluate_objective(
        reptile(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=1),
        THETA,
        make_episode,
        KEY,
        num_episodes=8,
        mesh=parallel.task_mesh(jax.devices()[:2]),
    ).mean
    assert distance > 0


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8, 20])
def test_the_objective_of_a_learner_without_inner_steps_may_be_evaluated_in_chunks(chunk_size):
    learner = maml(linear_model, half_mse, inner_optimizer=optax.sgd(ALPHA), num_inner_steps=0)
    evaluation = evaluate_objective(learner, THETA, make_episode, KEY, num_episodes=8, chunk_size=chunk_size)
    loss, info = evaluation.per_episode
    episodes = [make_episode(jax.random.fold_in(KEY, i)) for i in range(8)]
    expected = jnp.stack([half_mse(linear_model.apply(THETA, e.query.inputs), e.query.targets) for e in episodes])
    chex.assert_trees_all_close(loss, expected, rtol=1e-5)
    chex.assert_shape(info.support_loss, (8, 0))


def test_tasks_may_depend_on_the_parameters():
    def on_policy(key, params):
        return make_episode(key)._replace(query=Batch(jnp.eye(4), params))

    # The targets are the predictions of θ before adaptation: the error before the first step is zero.
    mean = evaluate(LEARNER, THETA, on_policy, KEY, metric_fn=half_mse, num_episodes=4).mean
    assert mean[0] == 0
    assert jnp.all(mean[1:] > 0)


IMAGES = jax.random.randint(jax.random.key(0), (5, 6, 8, 8, 1), 0, 256).astype(jnp.uint8)


def test_one_query_at_a_time_sees_the_support_set_and_no_other_query():
    sampler = few_shot.make_sampler(IMAGES, way=3, shot=1, query_shot=2)
    model = models.mlp(features=(4, 3), norm=models.BatchStatNorm)
    learner = maml(model, losses.cross_entropy, inner_optimizer=optax.sgd(0.1), num_inner_steps=1)
    params = model.init(jax.random.key(1), jnp.zeros((3, 8, 8, 1)))
    together, single = (
        evaluate(
            learner, params, sampler, KEY, metric_fn=lambda y, t: y, num_episodes=2, one_query_at_a_time=alone
        ).per_episode
        for alone in (False, True)
    )
    assert jnp.max(jnp.abs(together - single)) > 1e-2  # batch statistics of the queries are shared by default
    for e in range(2):
        episode = sampler(jax.random.fold_in(KEY, e))
        _, info = learner.adapt(params, episode.support, observe_fn=lambda task_params: task_params)
        for k in range(2):
            task_params = jax.tree.map(lambda x, k=k: x[k], info.observed)
            expected = [
                model.apply(task_params, jnp.concatenate([episode.support.inputs, query[None]]))[-1]
                for query in episode.query.inputs
            ]
            chex.assert_trees_all_close(single[e, k], jnp.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_hundred_evaluations_with_fresh_learners_and_samplers_do_not_grow():
    def once(seed):
        # A learner and a sampler that close over arrays of their own; compiled in a few milliseconds.
        scale, table = jnp.full(3, float(seed)), jnp.full((4, 1), float(seed))
        learner = MetaLearner(None, reports_its_key, lambda task_params, inputs: inputs * scale[0], None)

        def sample(key):
            return Episode(Batch(table, table), Batch(table, table), key)

        for sampler in (sample, jax.tree_util.Partial(lambda table, key: sample(key), table)):
            evaluate(learner, THETA, sampler, KEY, metric_fn=half_mse, num_episodes=2, chunk_size=2)

    def count(seeds):
        for seed in seeds:
            once(seed)
        gc.collect()
        return len(jax.live_arrays())

    before = count(range(20))
    assert count(range(20, 100)) <= before


def test_the_arrays_and_keywords_of_a_sampler_are_arguments_of_one_program():
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def sample(shift, key, *, scale):
        return jax.tree.map(lambda x: scale * x + shift, make_episode(key))

    def of_sampler(sampler):
        return evaluate(LEARNER, THETA, sampler, KEY, metric_fn=half_mse, num_episodes=2, chunk_size=2).per_episode

    for scale in (1.0, 2.0, 3.0):
        found = of_sampler(jax.tree_util.Partial(sample, jnp.float32(0.5), scale=jnp.float32(scale)))
    expected = of_sampler(lambda key: jax.tree.map(lambda x: 3.0 * x + 0.5, make_episode(key)))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_a_schedule_is_no_learner():
    with pytest.raises(ValueError, match="evaluation also takes a Partial that returns one, and a schedule at a step"):
        run(learner=lambda step: LEARNER)


def test_the_statistics_of_half_precision_are_not_in_half_precision():
    learner = LEARNER._replace(
        objective=lambda params, episode: (episode.query.targets.mean().astype(jnp.bfloat16) + jnp.bfloat16(8), ())
    )
    found = evaluate_objective(learner, THETA, make_episode, KEY, num_episodes=300)
    (mean, _), (ci95, _), (scores, _) = found.mean, found.ci95, found.per_episode
    assert mean.dtype == ci95.dtype == jnp.float32
    np.testing.assert_allclose(mean, np.asarray(scores, np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(found.finite_mean[0], mean, rtol=1e-6)


def test_randomness_that_no_episode_has_is_an_error():
    with pytest.raises(ValueError, match="stochastic=True needs a key in every episode"):
        run(stochastic=True)


@pytest.mark.parametrize(("backend", "expected"), [("cpu", 1), ("gpu", 100)])
def test_a_chunk_has_by_default_one_episode_on_a_cpu_and_a_hundred_elsewhere(monkeypatch, backend, expected):
    found, module = [], importlib.import_module("maml_jax.evaluate")
    in_chunks = module._map_in_chunks
    monkeypatch.setattr(
        module, "_map_in_chunks", lambda function, xs, size: found.append(size) or in_chunks(function, xs, size)
    )
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    evaluate(LEARNER, THETA, make_episode, KEY, metric_fn=lambda y, t: half_mse(y, t), num_episodes=2)
    assert found == [expected]
