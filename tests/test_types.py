"""The checks that every builder shares."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml_jax import rl
from maml_jax.types import check_optimizer, check_positive


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
