import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import Quadratic, half_mse, linear_model, make_episode

from maml_jax import inner_loop, proximal_solution
from maml_jax.inner import conjugate_gradients

THETA = jnp.array([0.5, -1.0, 2.0, 0.1])
STRENGTH = 0.7


def loss(params, support):
    return half_mse(linear_model.apply(params, support.inputs), support.targets)


def solve(theta, support, strength=STRENGTH, num_steps=2000, num_cg_steps=4, rule=None, **settings):
    rule = optax.sgd(0.3) if rule is None else rule
    return proximal_solution(
        loss, rule, theta, support, strength=strength, num_steps=num_steps, num_cg_steps=num_cg_steps, **settings
    )


def closed_form(theta, support, strength=STRENGTH):
    """φ* = (A + λI)⁻¹ (b + λθ)."""
    quadratic = Quadratic.of(support)
    return jnp.linalg.solve(quadratic.hessian + strength * jnp.eye(4), quadratic.offset + strength * theta)


def test_solution_and_derivatives_are_those_of_the_closed_form(x64):
    support, theta = make_episode(jax.random.key(0)).support, THETA.astype(jnp.float64)
    weights = jnp.array([1.0, -2.0, 0.5, 3.0])

    def scalar(solution):
        return lambda theta, support, strength: jnp.sum(weights * jnp.sin(solution(theta, support, strength)))

    args = theta, support, jnp.float64(STRENGTH)
    ours = jax.value_and_grad(scalar(lambda *args: solve(*args)[0]), (0, 1, 2))(*args)
    exact = jax.value_and_grad(scalar(closed_form), (0, 1, 2))(*args)
    chex.assert_trees_all_close(ours, exact, rtol=1e-8, atol=1e-10)


def test_forward_mode_too(x64):
    support, theta = make_episode(jax.random.key(0)).support, THETA.astype(jnp.float64)
    tangent = jnp.arange(4.0)
    ours = jax.jvp(lambda theta: solve(theta, support)[0], (theta,), (tangent,))
    exact = jax.jvp(lambda theta: closed_form(theta, support), (theta,), (tangent,))
    chex.assert_trees_all_close(ours, exact, rtol=1e-8)


def test_the_derivative_does_not_depend_on_the_path(x64):
    support, theta = make_episode(jax.random.key(1)).support, THETA.astype(jnp.float64)
    jacobians = [
        jax.jacrev(lambda theta, rule=rule: solve(theta, support, rule=rule)[0])(theta)
        for rule in (optax.sgd(0.3), optax.sgd(0.1, momentum=0.9))
    ]
    chex.assert_trees_all_close(*jacobians, rtol=1e-8)


def test_it_converges_as_steps_grow(x64):
    support, theta = make_episode(jax.random.key(2)).support, THETA.astype(jnp.float64)
    exact = closed_form(theta, support)
    errors = [float(jnp.linalg.norm(solve(theta, support, num_steps=n)[0] - exact)) for n in (0, 5, 20, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]


def test_each_conjugate_gradient_step_brings_the_derivative_closer(x64):
    support, theta = make_episode(jax.random.key(3)).support, THETA.astype(jnp.float64)
    exact = jax.jacrev(lambda theta: closed_form(theta, support))(theta)
    errors = [
        float(jnp.linalg.norm(jax.jacrev(lambda theta, n=n: solve(theta, support, num_cg_steps=n)[0])(theta) - exact))
        for n in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_damping_adds_to_the_strength_of_the_derivative_alone(x64):
    support, theta = make_episode(jax.random.key(0)).support, THETA.astype(jnp.float64)
    chex.assert_trees_all_close(solve(theta, support, damping=5.0)[0], closed_form(theta, support), rtol=1e-8)
    jacobian = jax.jacrev(lambda theta: solve(theta, support, damping=5.0)[0])(theta)
    expected = jnp.linalg.inv(jnp.eye(4) + Quadratic.of(support).hessian / (STRENGTH + 5.0))
    chex.assert_trees_all_close(jacobian, expected, rtol=1e-8)


def test_with_the_penalty_last_the_steps_are_without_it_and_the_derivative_is_that_of_a_solution(x64):
    support, theta = make_episode(jax.random.key(0)).support, THETA.astype(jnp.float64)
    rate, damping = 0.3, 5.0
    quadratic = Quadratic.of(support)

    def ours(theta):
        return solve(theta, support, num_steps=3, penalty_last=True, damping=damping, observe_fn=lambda phi: phi)

    path = [theta]
    for _ in range(3):
        path.append(path[-1] - rate * (quadratic.hessian @ path[-1] - quadratic.offset))
    after = path[-1] - rate * STRENGTH * (path[-1] - theta)
    phi, info = ours(theta)
    chex.assert_trees_all_close(phi, after, rtol=1e-12)
    chex.assert_trees_all_close(info.observed, jnp.stack([*path[:-1], after]), rtol=1e-12)
    chex.assert_trees_all_close(info.support_loss, jnp.stack([loss(phi, support) for phi in path[:-1]]), rtol=1e-12)
    expected = jnp.linalg.inv(jnp.eye(4) + quadratic.hessian / (STRENGTH + damping))
    chex.assert_trees_all_close(jax.jacrev(lambda theta: ours(theta)[0])(theta), expected, rtol=1e-8)


@pytest.mark.parametrize("num_steps", [0, 1])
def test_with_the_penalty_last_it_changes_nothing_where_no_step_was_taken(num_steps):
    support = make_episode(jax.random.key(0)).support
    phi, info = solve(THETA, support, num_steps=num_steps, penalty_last=True, observe_fn=lambda phi: phi)
    assert bool(jnp.all(phi == THETA)) == (num_steps == 0)
    chex.assert_shape(info.observed, (num_steps + 1, 4))
    chex.assert_trees_all_equal(info.observed[-1], phi)


@pytest.mark.parametrize("as_number", [float, jnp.float32])
def test_parameters_of_several_dtypes_keep_them(as_number):
    theta = {"body": jnp.array([0.5, -1.0], jnp.bfloat16), "head": jnp.array([2.0, 0.1])}

    def total(theta):
        phi, _ = proximal_solution(
            lambda phi, support: jnp.sum((phi["body"] * phi["head"] - support) ** 2),
            optax.sgd(0.1), theta, jnp.ones(2), strength=as_number(2.0), num_steps=5, num_cg_steps=2,
            damping=as_number(0.5),
        )  # fmt: skip
        return jnp.sum(phi["head"]) + jnp.sum(phi["body"].astype(jnp.float32)), phi

    grads, phi = jax.grad(total, has_aux=True)(theta)
    chex.assert_trees_all_equal_dtypes(theta, grads, phi)
    chex.assert_tree_all_finite(grads)


def test_memory_does_not_grow_with_the_inner_steps():
    support = make_episode(jax.random.key(4), dim=200, num_support=50).support

    def temporaries(num_steps):
        def objective(theta):
            return jnp.sum(solve(theta, support, num_steps=num_steps)[0] ** 2)

        compiled = jax.jit(jax.grad(objective)).lower(jnp.ones(200)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Each step records its loss, a number of four bytes; its parameters would be 800.
    assert temporaries(500) - temporaries(10) < 490 * 20


def test_what_is_reported_is_the_support_loss_without_the_proximal_term(x64):
    support, theta = make_episode(jax.random.key(5)).support, THETA.astype(jnp.float64)
    _, info = proximal_solution(
        loss,
        optax.sgd(0.3),
        theta,
        support,
        strength=STRENGTH,
        num_steps=3,
        num_cg_steps=2,
        observe_fn=lambda phi: loss(phi, support),
    )
    chex.assert_shape(info.observed, (4,))
    chex.assert_trees_all_close(info.support_loss, info.observed[:-1], rtol=1e-10)


@pytest.mark.parametrize("penalty_last", [False, True])
def test_integers_may_be_observed_while_the_derivative_is_taken(penalty_last):
    support = make_episode(jax.random.key(5)).support

    def observe(phi):
        return {"count": jnp.sum(phi > 0), "signs": phi > 0, "phi": phi}

    def objective(theta):
        phi, info = solve(theta, support, num_steps=3, penalty_last=penalty_last, observe_fn=observe)
        return jnp.sum(phi**2), info.observed

    gradient, observed = jax.grad(objective, has_aux=True)(THETA)
    plain = jax.grad(lambda theta: jnp.sum(solve(theta, support, num_steps=3, penalty_last=penalty_last)[0] ** 2))
    chex.assert_trees_all_equal(gradient, plain(THETA))
    chex.assert_trees_all_equal_dtypes(observed, jax.eval_shape(observe, THETA))
    chex.assert_trees_all_equal(observed["signs"], observed["phi"] > 0)
    chex.assert_trees_all_equal(observed["count"], jnp.sum(observed["phi"] > 0, axis=1))


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_missing_proximal_term_is_an_error(strength):
    support = make_episode(jax.random.key(0)).support
    with pytest.raises(ValueError, match=r"strength=.* must be positive and finite: without the proximal term"):
        solve(THETA, support, strength=strength)


@pytest.mark.parametrize("damping", [-1.0, float("inf")])
def test_a_damping_that_cannot_be_is_an_error(damping):
    with pytest.raises(ValueError, match=f"damping={damping} must be a number of at least 0"):
        solve(THETA, make_episode(jax.random.key(0)).support, damping=damping)


@pytest.mark.parametrize("eigenvalues", [(1.0, -0.5, 3.0), (2.0, 1e-7, 3.0), (1.0, 0.0, 3.0), (-1.0, -2.0, -4.0)])
def test_conjugate_gradients_take_the_iterate_with_the_smallest_residual(eigenvalues, x64):
    diagonal, target = jnp.array(eigenvalues), jnp.array([1.0, 1.4, 0.9])

    # The iterates u_k minimise ½ uᵀAu − bᵀu, or are its stationary point, over the span of b, Ab, ..., A^(k−1) b.
    iterates = [jnp.zeros(3)]
    for k in (1, 2):
        basis = jnp.linalg.qr(jnp.stack([diagonal**i * target for i in range(k)], axis=1))[0]
        iterates.append(basis @ jnp.linalg.lstsq(basis.T @ (diagonal[:, None] * basis), basis.T @ target)[0])
    residuals = [float(jnp.linalg.norm(target - diagonal * u)) for u in iterates]
    ours = conjugate_gradients(lambda u: diagonal * u, target, 2)
    chex.assert_trees_all_close(ours, iterates[int(np.argmin(residuals))], rtol=1e-9)


def test_conjugate_gradients_survive_a_direction_without_curvature(x64):
    diagonal, target = jnp.array([1.0, -1.0]), jnp.array([1.0, 1.0])
    chex.assert_trees_all_equal(conjugate_gradients(lambda u: diagonal * u, target, 3), jnp.zeros(2))


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_eigenvalues(x64):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    matrix = basis @ np.diag([1.0, 1.0, 2.0, 2.0, 5.0, 5.0]) @ basis.T
    target = {"a": jnp.asarray(rng.normal(size=2)), "b": jnp.asarray(rng.normal(size=4))}

    def operator(tree):
        product = matrix @ jnp.concatenate([tree["a"], tree["b"]])
        return {"a": product[:2], "b": product[2:]}

    for num_steps in (3, 10):  # further steps, with a residual of zero or nearly so, do no harm
        solution = conjugate_gradients(operator, target, num_steps)
        chex.assert_trees_all_close(operator(solution), target, rtol=1e-9)
    chex.assert_trees_all_equal(
        conjugate_gradients(operator, jax.tree.map(jnp.zeros_like, target), 3), jax.tree.map(jnp.zeros_like, target)
    )


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e20, jnp.float32),
        (3e38, jnp.float32),
        (1e-23, jnp.float32),
        (200.0, jnp.float16),
        (1e-4, jnp.float16),
        (1e-200, jnp.float64),
        (1e200, jnp.float64),
    ],
)
def test_squares_in_conjugate_gradients_neither_overflow_nor_vanish(scale, dtype, request):
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    target = jnp.array([1.0, -0.5, 0.25], dtype) * jnp.asarray(scale, dtype)
    solution = conjugate_gradients(lambda u: 2 * u, target, 3)
    assert solution.dtype == dtype
    chex.assert_trees_all_close(solution, target / 2, rtol=1e-3)


def test_a_product_of_conjugate_gradients_fits_into_float16_if_the_operator_does():
    target = jnp.array([1e-4, -5e-5], jnp.float16)
    solution = conjugate_gradients(lambda u: (2e5 * u.astype(jnp.float32)).astype(jnp.float16), target, 1)
    chex.assert_trees_all_close(solution.astype(jnp.float32), target.astype(jnp.float32) / 2e5, atol=1e-7)
    assert jnp.isfinite(solution).all()


def test_what_is_not_finite_is_no_zero_after_conjugate_gradients():
    bad = jnp.array([jnp.nan, 1.0])
    for operator, target in (
        (lambda u: u, bad),
        (lambda u: u, jnp.array([jnp.inf, 1.0])),
        (lambda u: u * bad, jnp.ones(2)),
    ):
        assert not jnp.isfinite(conjugate_gradients(operator, target, 3)).all()


def test_the_step_on_the_penalty_alone_has_a_fresh_state_of_the_rule(x64):
    # The first step of momentum is that of gradient descent: −α λ (φ − θ).
    support, theta = make_episode(jax.random.key(0)).support, THETA.astype(jnp.float64)
    rule = optax.sgd(0.1, momentum=0.9)
    before, _ = inner_loop(loss, rule, theta, support, num_steps=3)
    found, _ = solve(theta, support, num_steps=3, rule=rule, penalty_last=True)
    chex.assert_trees_all_close(found, before - 0.1 * STRENGTH * (before - theta), rtol=1e-12)


def test_one_conjugate_gradient_step_goes_along_the_cotangent(x64):
    # From u = 0 the first direction is v itself, and the step minimises ½ uᵀBu − vᵀu: u = (vᵀv / vᵀBv) v.
    support, theta = make_episode(jax.random.key(0)).support, THETA.astype(jnp.float64)
    matrix = jnp.eye(4) + Quadratic.of(support).hessian / STRENGTH
    v = jnp.array([1.0, -2.0, 0.5, 3.0])
    _, pullback = jax.vjp(lambda theta: solve(theta, support, num_cg_steps=1)[0], theta)
    chex.assert_trees_all_close(pullback(v)[0], (v @ v) / (v @ matrix @ v) * v, rtol=1e-10)
