from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from maml_jax import Batch, Episode, losses, maml, meta_sgd, models, parallel
from maml_jax.cost import Cost, cost_of, count_flops, inner_grad_costs, temporary_bytes
from maml_jax.inner import first_order, mixed_mode
from maml_jax.meta_gradient import meta_gradient
from maml_jax.models.layers import conv_lax

A, B, SQUARE = jnp.ones((3, 5)), jnp.ones((5, 7)), jnp.ones((4, 4))
MATMUL, SQUARED = 2 * 3 * 5 * 7, 2 * 4**3


def xla_flops(function, *args):
    """XLA's own count, of the optimised program, or of the program as lowered."""
    lowered = jax.jit(function).lower(*args)
    return lowered.compile().cost_analysis()["flops"], lowered.cost_analysis()["flops"]


# By hand


@pytest.mark.parametrize(
    ("function", "args", "flops"),
    [
        (jnp.matmul, (A, B), MATMUL),
        (jax.vmap(jnp.matmul, (None, 0)), (A, jnp.ones((6, 5, 7))), 6 * MATMUL),
        (jnp.vdot, (jnp.ones(9), jnp.ones(9)), 18),
        (jnp.add, (A, A), 15),
        (lambda a: jnp.tanh(a) * 2 - a, (A,), 45),
        (jnp.sum, (A,), 14),
        (lambda a: jnp.sum(a, 1), (A,), 3 * 4),
        (jnp.cumsum, (jnp.ones(9),), 9),
        (lambda a: a.at[jnp.array([0, 2])].add(a[:2]), (A,), 2 * 5),
        (lambda a: lax.reduce_window(a, 0.0, lax.add, (1, 2), (1, 2), "VALID"), (SQUARE,), 8),
        (lambda a: lax.linalg.cholesky(a, symmetrize_input=False), (SQUARE,), 4**3 // 3),
        (lambda a: lax.linalg.triangular_solve(a, jnp.ones((4, 7)), left_side=True), (SQUARE,), 4 * 4 * 7),
        # Data movement, comparison, conversion and integers are free.
        (lambda a: jnp.where(a > 0, a.T, 1.0)[::-1].reshape(-1).astype(jnp.bfloat16), (SQUARE,), 0),
        (lambda n: n * n + n, (jnp.arange(4),), 0),
    ],
)
def test_counts_by_hand(function, args, flops):
    assert count_flops(function, *args) == flops


def test_reverse_mode_of_a_matmul_is_two_more():
    # d/dA Σ (AB)² = 2 (AB) Bᵀ: the product itself, 2(AB), one product for A, one for B. The squares and their sum are
    # not needed for the gradient.
    def sum_of_squares(a, b):
        return jnp.sum(jnp.square(a @ b))

    scaling = 21
    grad_a = count_flops(jax.grad(sum_of_squares), A, B)
    grad_both = count_flops(jax.grad(sum_of_squares, (0, 1)), A, B)
    assert grad_both - grad_a == MATMUL
    assert 2 * MATMUL + scaling <= grad_a <= 2 * MATMUL + 2 * scaling  # JAX multiplies the cotangent by 2 first


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_leaves_out_padding(stride):
    # 3x3 "SAME" on 6x6, terms of one axis. Stride 1: 3 at each of six positions, but 2 at both borders. Stride 2 only
    # pads at the end: 3, 3, 2.
    terms = {1: 16, 2: 8}[stride]
    inputs, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
    convolution = partial(conv_lax, strides=(stride, stride))
    assert count_flops(convolution, inputs, kernel) == 2 * 2 * 3 * 5 * terms**2


# Structure


def power(a, n):
    return lax.scan(lambda carry, _: (carry @ a, None), a, length=n)[0]


def test_scan_counts_every_iteration():
    assert count_flops(partial(power, n=1), SQUARE) == SQUARED
    assert count_flops(partial(power, n=10), SQUARE) == 10 * SQUARED
    assert count_flops(lambda a: lax.fori_loop(0, 7, lambda _, c: c @ a, a), SQUARE) == 7 * SQUARED


def test_nested_scans_multiply():
    def nested(a):
        return lax.scan(lambda carry, _: (power(carry, n=3), None), a, length=5)[0]

    assert count_flops(nested, SQUARE) == 5 * 3 * SQUARED


def test_xla_counts_a_scan_once_and_agrees_on_the_unrolled_loop():
    # This is why the library has its own counter.
    def unrolled(a):
        for _ in range(10):
            a = a @ SQUARE
        return a

    looped = partial(power, n=10)
    assert xla_flops(looped, SQUARE)[0] < 2 * SQUARED
    assert xla_flops(unrolled, SQUARE)[0] == count_flops(unrolled, SQUARE) == count_flops(looped, SQUARE)


def test_cond_counts_its_most_expensive_branch():
    def either(a):
        return lax.cond(a[0, 0] > 0, lambda a: a @ a @ a, lambda a: a + 1, a)

    assert count_flops(either, SQUARE) == 2 * SQUARED


def test_called_functions_are_counted():
    @jax.custom_vjp
    def product(a):
        return a @ a

    product.defvjp(lambda a: (a @ a, a), lambda a, bar: (bar @ a.T + a.T @ bar,))
    assert count_flops(jax.jit(product), SQUARE) == SQUARED
    assert count_flops(jax.checkpoint(lambda a: a @ a), SQUARE) == SQUARED
    # The gradient of the sum only needs the two products of the backward rule and their sum.
    assert count_flops(jax.grad(lambda a: jnp.sum(product(a))), SQUARE) == 2 * SQUARED + 16


def test_a_linear_solve_counts_its_solver():
    def solve(a, b):
        return lax.custom_linear_solve(lambda x: a @ x, b, lambda operator, b: operator(operator(b)), symmetric=True)

    vector = jax.ShapeDtypeStruct((4,), jnp.float32)
    product = 2 * 4 * 4
    assert count_flops(solve, SQUARE, vector) == 2 * product
    # The cotangent of the right-hand side goes through the same solver, that of the matrix is not asked for.
    assert count_flops(jax.grad(lambda b, a: jnp.sum(solve(a, b))), vector, SQUARE) == 2 * product


def test_unneeded_work_is_not_counted():
    def one_of_two(a):
        return jax.jit(lambda a: (a @ a, a @ a @ a))(a)[0]

    def carried_for_nothing(a):
        def body(carry, _):  # `a` is a constant of the scan
            used, unused = carry
            return (used + a, unused @ unused), unused @ a

        return lax.scan(body, (a, a), length=5)[0][0]

    def carried_for_the_next(a):
        def body(carry, _):
            first, second = carry
            return (first + second, second @ second), None

        return lax.scan(body, (a, a), length=5)[0][0]

    assert count_flops(one_of_two, SQUARE) == SQUARED
    assert count_flops(carried_for_nothing, SQUARE) == 5 * 16
    assert count_flops(carried_for_the_next, SQUARE) == 5 * (SQUARED + 16)


def test_shard_map_counts_all_devices():
    mesh = parallel.task_mesh(jax.devices()[:4])
    spread = jax.shard_map(lambda a: a * 2.0, mesh=mesh, in_specs=jax.P(parallel.AXIS), out_specs=jax.P(parallel.AXIS))
    assert count_flops(spread, jnp.ones(8)) == 8


def test_says_what_it_cannot_count():
    with pytest.raises(ValueError, match="while_loop"):
        count_flops(lambda a: lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c + a, a), SQUARE)
    with pytest.raises(ValueError, match="'qr'"):
        count_flops(jnp.linalg.qr, SQUARE)
    with pytest.raises(ValueError, match="'reduce'"):
        count_flops(lambda a: lax.reduce(a, np.float32(1), lambda x, y: x * y + x, (0,)), SQUARE)


# Against XLA, where there is no scan


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tasks", [None, 3])
def test_agrees_with_xla_on_convolutions_and_their_gradients(stride, tasks):
    def gradients(inputs, kernel, bars):
        outputs, pull = jax.vjp(partial(conv_lax, strides=(stride, stride)), inputs, kernel)
        return outputs, pull(bars)

    inputs, kernel, bars = (
        jnp.ones((2, 7, 6, 3)),
        jnp.ones((3, 3, 3, 5)),
        jnp.ones((2, *{1: (7, 6), 2: (4, 3)}[stride], 5)),
    )
    if tasks:  # per-task kernels make it a grouped convolution
        gradients = jax.vmap(gradients, (None, 0, None))
        kernel = jnp.stack([kernel] * tasks)
    assert count_flops(gradients, inputs, kernel, bars) == xla_flops(gradients, inputs, kernel, bars)[1]


def test_agrees_with_xla_on_a_network():
    model = models.mlp(features=(40, 40, 1))
    inputs = jnp.ones((10, 1))
    params = model.init(jax.random.key(0), inputs)
    by_hand = 10 * (2 * 40 + 2 * 40 * 40 + 2 * 40) + 10 * (2 * 40 + 2 * 40 + 1)  # products; biases and ReLUs
    assert count_flops(model.apply, params, inputs) == by_hand == xla_flops(model.apply, params, inputs)[1]


def sinusoid_episodes(num_tasks):
    batch = Batch(jnp.ones((num_tasks, 10, 1)), jnp.ones((num_tasks, 10, 1)))
    return Episode(batch, batch)


def build(num_inner_steps, **kwargs):
    model = models.mlp(features=(40, 40, 1))
    return maml(
        model,
        losses.mean_squared_error,
        inner_optimizer=optax.sgd(0.01),
        num_inner_steps=num_inner_steps,
        **kwargs,
    )


@pytest.mark.parametrize("inner_grad", [first_order, jax.value_and_grad, mixed_mode])
def test_agrees_with_xla_on_a_meta_gradient_of_one_step(inner_grad):
    learner = build(1, inner_grad=inner_grad)
    episodes = sinusoid_episodes(4)
    params = learner.init(jax.random.key(0), episodes.support.inputs[0])
    gradient = partial(meta_gradient, learner, chunk_size=4)
    # XLA also counts the comparisons and selections of the ReLUs, 2 to 4 % here.
    np.testing.assert_allclose(
        count_flops(gradient, params, episodes), xla_flops(gradient, params, episodes)[1], rtol=0.03
    )


# Meta-gradients


def test_flops_of_a_meta_step_do_not_depend_on_the_chunks_and_grow_linearly_with_steps():
    episodes = sinusoid_episodes(4)
    params = build(0).init(jax.random.key(0), episodes.support.inputs[0])

    def flops(steps, chunk_size):
        return count_flops(partial(meta_gradient, build(steps), chunk_size=chunk_size), params, episodes)

    # Both sum the gradients of four tasks. Four chunks take four additions per parameter, a vmap takes three.
    assert flops(5, 1) == pytest.approx(flops(5, 4), rel=0.005)
    assert flops(20, 4) - flops(10, 4) == 10 * (flops(2, 4) - flops(1, 4))


def test_inner_grad_costs():
    episodes = sinusoid_episodes(4)
    params = build(0).init(jax.random.key(0), episodes.support.inputs[0])
    few, many = (inner_grad_costs(partial(build, steps), params, episodes, chunk_size=4) for steps in (2, 20))
    model_flops = count_flops(build(0).predict, params, jnp.ones((10, 1)))
    assert few["forward"].flops == many["forward"].flops == 4 * 2 * model_flops
    assert few["first_order"].flops < few["reverse_over_reverse"].flops < few["mixed_mode"].flops
    # For each of 18 more steps and each of 4 tasks, mixed mode keeps the 1,761 parameters before it, and the loss.
    growth = {name: many[name].temporary_bytes - few[name].temporary_bytes for name in many}
    copies = 18 * 4 * (1761 + 1) * 4
    assert growth["mixed_mode"] <= 1.1 * copies
    # With ten points, the activations of one pass have half the size of the parameters. Both passes are kept.
    assert growth["reverse_over_reverse"] > 1.5 * growth["mixed_mode"]
    assert growth["forward"] == 0


def test_inner_grad_costs_of_meta_parameters_that_are_not_those_of_the_network():
    episodes = sinusoid_episodes(2)
    model = models.mlp(features=(4, 1))
    make = partial(meta_sgd, model, losses.mean_squared_error, inner_lr=0.1, num_inner_steps=1)
    meta_params = make().init(jax.random.key(0), episodes.support.inputs[0])
    costs = inner_grad_costs(make, meta_params, episodes)
    of_model = count_flops(model.apply, meta_params["params"], episodes.support.inputs[0])
    assert costs["forward"].flops == 2 * 2 * of_model
    assert costs["first_order"].flops < costs["mixed_mode"].flops


def test_temporaries_and_cost_of():
    a = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def two_products(a):
        return (a @ a) @ a

    assert temporary_bytes(two_products, a) == 64 * 64 * 4  # the first product
    assert cost_of(two_products, a) == Cost(2 * 2 * 64**3, 64 * 64 * 4)


def test_temporaries_are_those_of_the_program_that_runs():
    # `temporary_bytes` compiles with less optimisation of machine code, and so does everything in these tests.
    learner = build(5)
    episode = jax.tree.map(lambda x: x[0], sinusoid_episodes(1))
    params = learner.init(jax.random.key(0), episode.support.inputs)
    gradient = jax.grad(learner.objective, has_aux=True)
    compiled = jax.jit(gradient).lower(params, episode).compile({"xla_backend_optimization_level": 3})
    assert temporary_bytes(gradient, params, episode) == compiled.memory_analysis().temp_size_in_bytes


ELEMENTWISE = (
    *(jnp.abs, jnp.sign, jnp.floor, jnp.ceil, jnp.round, jnp.sqrt, jnp.cbrt, jnp.exp, jnp.exp2, jnp.expm1, jnp.log),
    *(jnp.log1p, jnp.tanh, jnp.sinh, jnp.cosh, jnp.arcsinh, jnp.arccosh, jnp.arctanh, jnp.sin, jnp.cos, jnp.tan),
    *(jnp.arcsin, jnp.arccos, jnp.arctan, jnp.negative, jnp.square, lax.rsqrt, lax.logistic, lax.erf, lax.erfc),
    *(lax.erf_inv, lax.lgamma, lax.digamma, lambda a: a**3, lambda a: lax.clamp(0.0, a, 1.0)),
)


def test_every_elementwise_operation_counts_one_per_element():
    assert [count_flops(function, A) for function in ELEMENTWISE] == [15] * len(ELEMENTWISE)
    for function in (lax.sub, lax.mul, lax.div, lax.rem, lax.max, lax.min, lax.pow, lax.atan2):
        assert count_flops(function, A, A) == 15


def test_every_reduction_counts_one_less_than_its_elements():
    for function in (jnp.max, jnp.min, jnp.prod):
        assert count_flops(lambda a, f=function: f(a, 1), A) == 3 * 4
    for function in (jnp.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp):
        assert count_flops(function, jnp.ones(9)) == 9
    for function, start in ((lax.max, -np.inf), (lax.min, np.inf)):
        pooled = partial(lax.reduce_window, init_value=start, computation=function, window_dimensions=(2, 2))
        assert count_flops(partial(pooled, window_strides=(2, 2), padding="VALID"), SQUARE) == 4 * 3


def test_factorisations_of_several_matrices_are_counted_for_each():
    matrices = jnp.ones((5, 4, 4))
    assert count_flops(lambda a: lax.linalg.cholesky(a, symmetrize_input=False), matrices) == 5 * 4**3 // 3
    solve = partial(lax.linalg.triangular_solve, left_side=True)
    assert count_flops(solve, matrices, jnp.ones((5, 4, 7))) == 5 * 4 * 4 * 7


def test_what_chooses_a_branch_and_what_only_one_of_them_takes_are_counted():
    def chosen(a):
        return lax.cond((a @ a)[0, 0] > 0, lambda a: a, lambda a: a + 1, a)

    def first(a, b):
        return a

    def second(a, b):
        return b

    assert count_flops(chosen, SQUARE) == SQUARED + 16
    for branches in ((first, second), (second, first)):
        assert count_flops(lambda a, of=branches: lax.cond(a[0, 0] > 0, *of, a, a @ a), SQUARE) == SQUARED


def test_inner_grad_costs_are_those_of_chunks_of_the_size_asked_for(monkeypatch):
    monkeypatch.setattr("maml_jax.cost.temporary_bytes", lambda *args: 0)
    episodes = sinusoid_episodes(4)
    episodes = episodes._replace(query=jax.tree.map(lambda x: x[:, :3], episodes.query))
    params = build(1).init(jax.random.key(0), episodes.support.inputs[0])
    in_chunks, at_once = (inner_grad_costs(partial(build, 1), params, episodes, chunk_size=size) for size in (1, 4))
    # Four chunks take one addition per parameter more than a vmap.
    for name in ("first_order", "mixed_mode", "reverse_over_reverse"):
        assert in_chunks[name].flops > at_once[name].flops
    # One prediction for the ten support examples of a task, and one for its three queries.
    assert 10 * at_once["forward"].flops == 4 * 13 * count_flops(build(0).predict, params, jnp.ones((10, 1)))
