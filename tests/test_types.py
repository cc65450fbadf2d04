"""The checks that every builder shares."""

from fractions import Fraction
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maml_jax import models, rl
from maml_jax.types import (
    check_floating,
    check_optimizer,
    check_positive,
    combine,
    named_leaves,
    select,
    wide_integers,
)


@pytest.mark.parametrize("number", [1, 0.5, Fraction(1, 2), np.float32(2.0), np.int8(3), np.arange(1, 3), jnp.ones(2)])
def test_positive_numbers_of_any_kind_pass(number):
    check_positive("rate", number)


@pytest.mark.parametrize(
    "number",
    [0, -1.0, float("nan"), float("inf"), 10**400, True, np.array(True), "1", np.array("1"), None, 1j, np.zeros(0),
     np.array([1.0, 0.0])],
)  # fmt: skip
def test_what_is_no_positive_number_is_refused(number):
    with pytest.raises(ValueError, match=r"rate=.* must be a positive number"):
        check_positive("rate", number)


def test_numbers_in_half_precision_and_traced_ones_pass():
    check_positive("rate", jnp.bfloat16(0.5))
    jax.eval_shape(lambda rate: check_positive("rate", rate), 1.0)


def test_an_outer_rule_is_no_inner_optimiser():
    with pytest.raises(ValueError, match="inner_optimizer must be an optax transformation"):
        check_optimizer("inner_optimizer", rl.clipped_epochs(optax.sgd(1.0), num_epochs=1))


def test_the_names_of_an_nnx_model_are_those_of_the_linen_one():
    inputs = jnp.ones((2, 3))
    linen = models.from_linen(nn.Dense(1)).init(jax.random.key(0), inputs)
    model = models.from_nnx(lambda rngs: nnx.Linear(3, 1, rngs=rngs))
    params = model.init(jax.random.key(0), inputs)
    assert set(named_leaves(params)) == set(named_leaves(linen)) == {"kernel", "bias"}
    adapting, fixed = select(params, lambda name: not name.endswith("bias"))
    assert set(named_leaves(adapting)) == {"kernel"}
    assert set(named_leaves(fixed)) == {"bias"}
    chex.assert_trees_all_equal(combine(adapting, fixed), params)


def test_names_are_fields_and_numbers():
    class Layer(NamedTuple):
        value: jax.Array
        parts: list

    assert list(named_leaves({"a": Layer(jnp.ones(1), [jnp.ones(2), jnp.ones(3)])})) == [
        "a/value",
        "a/parts/0",
        "a/parts/1",
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(2), "activation": jax.nn.relu}, r"parameter \['activation'\] is a .* and no array"),
        ({"w": "relu"}, r"parameter \['w'\] is a str and no array"),
        ({"w": jnp.arange(2)}, r"parameter \['w'\] has dtype int32"),
    ],
)
def test_parameters_that_cannot_adapt_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        check_floating(params)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.int32, jnp.uint32])
def test_integers_are_wide_enough_for_any_number_of_classes(dtype):
    wide = wide_integers(jnp.array([0, 100], dtype))
    assert jnp.iinfo(wide.dtype).bits == 32
    assert wide.tolist() == [0, 100]
