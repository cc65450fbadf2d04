"""The cost of a function without running it: floating-point operations and temporary memory.

Both are deterministic. Operations are counted on the jaxpr, with the body of a scan multiplied by its length. Memory
is the buffer assignment of XLA.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.inner.gradients import first_order, mixed_mode
from maml_jax.meta_gradient import meta_gradient
from maml_jax.types import ArrayTree, Episode, MetaLearner

# Primitives by their cost, and those whose cost is unknown. All others, such as data movement, are free.
_ARITHMETIC, _REDUCTIONS, _WINDOW_REDUCTIONS, _CUMULATIONS, _UNKNOWN = map(
    str.split,
    (
        "add add_any sub mul div rem neg abs sign max min floor ceil round clamp pow integer_pow square sqrt rsqrt "
        "cbrt exp exp2 expm1 log log1p logistic tanh sinh cosh asinh acosh atanh sin cos tan asin acos atan atan2 "
        "erf erfc erf_inv lgamma digamma",
        "reduce_sum reduce_max reduce_min reduce_prod",
        "reduce_window_sum reduce_window_max reduce_window_min",
        "cumsum cumprod cummax cummin cumlogsumexp",
        "lu qr householder_product geqrf eigh eig svd schur hessenberg tridiagonal_solve fft "
        "ragged_dot_general custom_linear_solve reduce reduce_window select_and_scatter select_and_scatter_add",
    ),
)


class Cost(NamedTuple):
    """The cost of one call of a function.

    Attributes:
      flops: floating-point operations; see `count_flops`.
      temporary_bytes: bytes; see `temporary_bytes`.
    """

    flops: int
    temporary_bytes: int


def cost_of(function: Callable, *args: Any) -> Cost:
    """Returns the operations and the temporary memory of `function(*args)`. The function is compiled and not run.

    For example, an exact meta-gradient compared with one of first order:

    >>> from functools import partial
    >>> import jax, jax.numpy as jnp, optax
    >>> from maml_jax import Batch, Episode, fomaml, losses, maml, models
    >>> from maml_jax.cost import cost_of
    >>> model = models.mlp(features=(40, 40, 1))
    >>> episode = Episode(*2 * [Batch(jnp.ones((10, 1)), jnp.ones((10, 1)))])
    >>> params = model.init(jax.random.key(0), episode.support.inputs)
    >>> exact, first = (
    ...     build(model, losses.mean_squared_error, inner_optimizer=optax.sgd(0.01), num_inner_steps=5)
    ...     for build in (maml, fomaml)
    ... )
    >>> costs = [cost_of(jax.grad(learner.objective, has_aux=True), params, episode) for learner in (exact, first)]
    >>> round(costs[0].flops / costs[1].flops, 1)
    2.9

    Args:
      function: traceable, jitted or not.
      args: its positional arguments: arrays, or `jax.ShapeDtypeStruct`s in place of them.

    Returns:
      A `Cost`.

    Raises:
      ValueError: if the operations cannot be counted; see `count_flops`.
    """
    return Cost(count_flops(function, *args), temporary_bytes(function, *args))


def temporary_bytes(function: Callable, *args: Any) -> int:
    """Returns the bytes that the compiled `function(*args)` needs in addition to its arguments and results.

    XLA assigns all temporary buffers at compile time, so the number is the exact peak. With several devices it is the
    peak of one of them.

    Args:
      function: traceable, jitted or not.
      args: its positional arguments: arrays, or `jax.ShapeDtypeStruct`s in place of them.
    """
    # Buffers are assigned before machine code is generated. On a CPU the latter takes most of the time to compile.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*args).compile(options).memory_analysis().temp_size_in_bytes


def count_flops(function: Callable, *args: Any) -> int:
    """Counts the floating-point operations of `function(*args)`. The function is traced and not run.

    - An elementwise operation, such as an addition, a multiplication or an exponential, counts 1 per element.
    - A matrix product or a convolution counts 2 per term, a multiplication and an addition. Terms on padding are free.
    - A Cholesky factorisation of [n, n] counts n³ / 3, and a triangular system with m right sides n² m.
    - A reduction of n elements to one counts n − 1.
    - Comparison, selection, conversion, data movement, integer arithmetic and random bits are free.
    - A scan counts its length times its body, a `cond` its most expensive branch, and `shard_map` all devices.
    - Operations that no result depends on are not counted, as XLA removes them.

    `compiled.cost_analysis()` agrees for functions without a scan. It counts the body of a scan only once.

    Args:
      function: traceable, jitted or not.
      args: its positional arguments: arrays, or `jax.ShapeDtypeStruct`s in place of them.

    Raises:
      ValueError: if the function contains a `while_loop`, whose length is only known when it runs, or one of the
        primitives that are listed as unknown: factorisations but Cholesky's, FFTs and general reductions.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def inner_grad_costs(
    build: Callable[..., MetaLearner], params: ArrayTree, episodes: Episode, *, chunk_size: int | None = None
) -> dict[str, Cost]:
    """Compares the costs of one meta-gradient for three ways to differentiate the inner gradient.

    Args:
      build: `build(inner_grad=...) -> MetaLearner`, such as `partial(maml, model, loss_fn, inner_optimizer=...,
        num_inner_steps=...)`.
      params: meta-parameters θ.
      episodes: leaves [T, ...].
      chunk_size: as in `meta_gradient.meta_gradient`.

    Returns:
      Costs by name: "first_order", "mixed_mode" and "reverse_over_reverse" of the meta-gradient, and "forward" of one
      prediction for the support set and one for the query set of every task.
    """

    def gradient(inner_grad):
        return lambda params, episodes: meta_gradient(
            build(inner_grad=inner_grad), params, episodes, chunk_size=chunk_size
        )

    learner = build(inner_grad=first_order)
    support = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), episodes.support)
    task_params, _ = jax.eval_shape(learner.adapt, params, support)

    def forward(task_params, episodes):
        predict = partial(learner.predict, task_params)
        return jax.lax.map(lambda episode: (predict(episode.support.inputs), predict(episode.query.inputs)), episodes)

    costs = {"forward": cost_of(forward, task_params, episodes)}
    transforms = {
        "first_order": first_order,
        "mixed_mode": mixed_mode,
        "reverse_over_reverse": jax.value_and_grad,
    }
    return costs | {name: cost_of(gradient(transform), params, episodes) for name, transform in transforms.items()}


def _count(jaxpr: Any, is_needed: list[bool]) -> tuple[int, list[bool]]:
    """Returns the operations for the needed results of a jaxpr, and which of its arguments these depend on."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # that of a ClosedJaxpr
    needed = {var for var, needs in zip(jaxpr.outvars, is_needed, strict=True) if needs and not _is_literal(var)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        outputs = [var in needed for var in eqn.outvars]
        if any(outputs):
            flops, inputs = _count_equation(eqn, outputs)
            total += flops
            needed |= {var for var, needs in zip(eqn.invars, inputs, strict=True) if needs and not _is_literal(var)}
    return total, [var in needed for var in jaxpr.invars]


def _is_literal(var: Any) -> bool:
    return hasattr(var, "val")


def _count_equation(eqn: Any, outputs: list[bool]) -> tuple[int, list[bool]]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _count_scan(eqn, outputs)
    if name == "cond":
        counts = [_count(branch, outputs) for branch in params["branches"]]
        depends = map(any, zip(*(inputs for _, inputs in counts), strict=True))
        return max(flops for flops, _ in counts), [True, *depends]
    if name == "while":
        raise ValueError(
            "the operations of a while_loop cannot be counted before it runs; count its body, or use a scan or a "
            "fori_loop with constant bounds"
        )
    if name == "custom_linear_solve":  # runs its solver, and not the operator that this was derived from
        lengths = params["const_lengths"]
        before, own = lengths.matvec + lengths.vecmat, lengths.solve
        flops, inputs = _count(params["jaxprs"].solve, outputs)
        unused = [False] * lengths.transpose_solve
        return flops, [False] * before + inputs[:own] + unused + inputs[own:]
    called = [value for value in jax.tree.leaves(params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
    if called and not name.startswith("scatter"):
        if len(called) > 1 or name in _UNKNOWN:
            raise ValueError(f"the operations of the primitive {name!r} are not known to this counter")
        flops, inputs = _count(called[0], outputs)
        return flops * (params["mesh"].size if name == "shard_map" else 1), inputs
    return _primitive_flops(eqn), [True] * len(eqn.invars)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _count_scan(eqn: Any, outputs: list[bool]) -> tuple[int, list[bool]]:
    if "num_consts" in eqn.params:
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:  # from jax 0.12 on
        num_consts, num_carry, _ = map(len, eqn.params["ft_in"].unpack())
    carry, stacked = outputs[:num_carry], outputs[num_carry:]
    while True:  # An iteration must also compute what the next one needs of the carry.
        flops, inputs = _count(eqn.params["jaxpr"], carry + stacked)
        of_next = inputs[num_consts : num_consts + num_carry]
        needed = [a or b for a, b in zip(carry, of_next, strict=True)]
        if needed == carry:
            return eqn.params["length"] * flops, inputs
        carry = needed


def _primitive_flops(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    inputs, output = [var.aval for var in eqn.invars], eqn.outvars[0].aval
    if name in _UNKNOWN:
        raise ValueError(f"the operations of the primitive {name!r} are not known to this counter")
    if not jnp.issubdtype(output.dtype, jnp.inexact):
        return 0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * output.size * prod(inputs[0].shape[axis] for axis in contracted)
    if name == "cholesky":
        return output.size * output.shape[-1] // 3
    if name == "triangular_solve":
        return output.size * inputs[0].shape[-1]
    if name == "conv_general_dilated":
        return _conv_flops(params, *inputs, output)
    if name in _ARITHMETIC:
        return output.size
    if name in _REDUCTIONS:
        return inputs[0].size - output.size
    if name in _WINDOW_REDUCTIONS:
        return output.size * (prod(params["window_dimensions"]) - 1)
    if name in _CUMULATIONS:
        return output.size
    if name == "scatter-add":
        return inputs[2].size
    return 0


def _conv_flops(params: dict[str, Any], inputs: Any, kernel: Any, output: Any) -> int:
    numbers = params["dimension_numbers"]
    terms = 1
    for axis in range(len(params["padding"])):
        size = inputs.shape[numbers.lhs_spec[2 + axis]]
        stride, low = params["window_strides"][axis], params["padding"][axis][0]
        spread, reach = params["lhs_dilation"][axis], params["rhs_dilation"][axis]
        starts = stride * np.arange(output.shape[numbers.out_spec[2 + axis]]) - low
        positions = starts[:, None] + reach * np.arange(kernel.shape[numbers.rhs_spec[2 + axis]])
        # Padding, and the zeros that `lhs_dilation` inserts between the inputs, take no operation.
        terms *= int(np.sum((positions >= 0) & (positions < spread * size) & (positions % spread == 0)))
    features, channels = (kernel.shape[axis] for axis in numbers.rhs_spec[:2])
    return 2 * output.shape[numbers.out_spec[0]] * features * channels * terms
