import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import losses


def test_mean_squared_error_is_the_mean_over_every_element():
    outputs, targets = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, 2.0], [3.0, 1.0]])
    chex.assert_trees_all_close(losses.mean_squared_error(outputs, targets), (1.0 + 0 + 0 + 9.0) / 4)


def test_cross_entropy_is_the_mean_negative_log_probability():
    outputs = jnp.array([[0.0, jnp.log(3.0)], [jnp.log(4.0), 0.0]])  # probabilities (1/4, 3/4) and (4/5, 1/5)
    expected = -(jnp.log(3 / 4) + jnp.log(1 / 5)) / 2
    chex.assert_trees_all_close(losses.cross_entropy(outputs, jnp.array([1, 1])), expected, rtol=1e-6)


def test_cross_entropy_of_equal_scores_is_log_n():
    chex.assert_trees_all_close(losses.cross_entropy(jnp.zeros((4, 5)), jnp.arange(4)), jnp.log(5.0), rtol=1e-6)


def test_cross_entropy_survives_large_scores():
    value, grads = jax.value_and_grad(losses.cross_entropy)(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    chex.assert_trees_all_close(value, 2e4)
    chex.assert_trees_all_close(grads, jnp.array([[1.0, -1.0]]))


@pytest.mark.parametrize("target", [-1, 2])
def test_cross_entropy_of_a_class_that_does_not_exist_is_not_a_number(target):
    assert jnp.isnan(losses.cross_entropy(jnp.zeros((3, 2)), jnp.array([0, target, 1])))


def test_the_derivatives_of_cross_entropy_need_no_scatter():
    def product(outputs, direction):
        gradient = jax.grad(lambda outputs: losses.cross_entropy(outputs, jnp.arange(3)))
        return jax.jvp(gradient, (outputs,), (direction,))

    jaxpr = str(jax.make_jaxpr(product)(jnp.ones((3, 5)), jnp.ones((3, 5))))
    assert "exp" in jaxpr
    assert "gather" not in jaxpr
    assert "scatter" not in jaxpr


def test_masked_cross_entropy_is_the_mean_over_the_targets_that_count():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = jnp.array([[1, 4, 0], [0, 2, 0]])
    counted = jnp.array([scores[0, 0], scores[0, 1], scores[1, 1]])
    expected = losses.cross_entropy(counted, jnp.array([1, 4, 2]))
    np.testing.assert_allclose(losses.masked_cross_entropy(scores, targets), expected, rtol=1e-6)
    everything = losses.masked_cross_entropy(scores, targets, ignored=3)
    np.testing.assert_allclose(everything, losses.cross_entropy(scores, targets), rtol=1e-6)
    assert losses.masked_cross_entropy(scores, jnp.zeros((2, 3), int)) == 0.0
    assert np.isnan(losses.masked_cross_entropy(scores, targets.at[0, 0].set(5)))
    gradient = jax.grad(losses.masked_cross_entropy)(scores, targets)
    np.testing.assert_array_equal(np.any(gradient != 0.0, axis=-1), targets != 0)


def test_masked_cross_entropy_of_half_precision_does_not_overflow():
    scores = jnp.zeros((128, 64, 2), jnp.float16).at[..., 0].set(12.0)
    found = losses.masked_cross_entropy(scores, jnp.ones((128, 64), int))
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found, 12.0, rtol=1e-3)


def test_accuracy_is_the_share_of_right_answers():
    outputs = jnp.array([[3.0, 1, 2], [0, 1, 2], [5, 4, 3], [0, 9, 1]])
    value = losses.accuracy(outputs, jnp.array([0, 2, 1, 1]))
    assert value == 0.75
    assert value.dtype == outputs.dtype


@pytest.mark.parametrize("target", [-1, 3])
def test_accuracy_of_a_class_that_there_is_not_is_no_number(target):
    assert jnp.isnan(losses.accuracy(jnp.eye(3), jnp.array([0, 1, target])))


def test_accuracy_of_half_precision_has_all_its_digits():
    outputs = jnp.eye(3, dtype=jnp.bfloat16)
    value = losses.accuracy(outputs, jnp.array([0, 1, 0]))
    chex.assert_trees_all_equal(value, jnp.float32(2 / 3))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 2)])
def test_mean_squared_error_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"outputs \(3, 1\) and targets \(.*reshape the targets"):
        losses.mean_squared_error(jnp.zeros((3, 1)), jnp.zeros(shape))


@pytest.mark.parametrize("loss_fn", [losses.cross_entropy, losses.masked_cross_entropy, losses.accuracy])
def test_class_losses_refuse_one_hot_and_misplaced_targets(loss_fn):
    with pytest.raises(ValueError, match=rf"{loss_fn.__name__} takes integer .* float32; .* targets.argmax\(-1\)"):
        loss_fn(jnp.zeros((3, 5)), jnp.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"outputs \(3, 5\) and targets \(4,\); the model's last axis"):
        loss_fn(jnp.zeros((3, 5)), jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"outputs \(\) and targets \(\)"):
        loss_fn(jnp.zeros(()), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize(
    ("dtype", "num_classes"), [(jnp.uint8, 256), (jnp.uint8, 300), (jnp.int8, 128), (jnp.int8, 200)]
)
def test_narrow_labels_are_those_of_int32(dtype, num_classes):
    wide = jnp.array([0, 5, 100 % num_classes])
    outputs = 10 * jax.nn.one_hot(wide, num_classes) + jax.random.normal(jax.random.key(0), (3, num_classes))
    for function in (losses.cross_entropy, losses.accuracy, losses.masked_cross_entropy, losses.large_margin_cosine()):
        value = function(outputs, wide.astype(dtype))
        assert jnp.isfinite(value)
        chex.assert_trees_all_equal(value, function(outputs, wide))


def test_a_number_that_no_narrow_label_can_have_ignores_none():
    targets, outputs = jnp.array([156, 255], jnp.uint8), jax.random.normal(jax.random.key(0), (2, 300))
    expected = losses.cross_entropy(outputs, targets)
    for ignored in (-100, -1):
        chex.assert_trees_all_close(losses.masked_cross_entropy(outputs, targets, ignored=ignored), expected)


@pytest.mark.parametrize("function", [losses.mean_squared_error, losses.cross_entropy, losses.accuracy])
def test_outputs_that_are_several_arrays_are_refused(function):
    with pytest.raises(ValueError, match="takes one array of outputs, got a tuple; choose an array of it"):
        function((jnp.ones((2, 3)), ()), jnp.zeros(2, int))
