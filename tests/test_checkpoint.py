import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from maml_jax import MetaState, checkpoint, models

TREE = {
    "state": MetaState({"w": jnp.arange(6.0).reshape(2, 3)}, optax.adam(0.1).init(jnp.ones(2)), jnp.int32(7)),
    "key": jax.random.key(5),
}


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path / "made" / "on the way", 7, TREE)
    restored = checkpoint.restore(tmp_path / "made" / "on the way", 7, TREE)
    assert jax.random.key_data(restored.pop("key")).tolist() == jax.random.key_data(TREE["key"]).tolist()
    chex.assert_trees_all_equal(restored, {"state": TREE["state"]})
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, {"state": TREE["state"]})


@pytest.mark.parametrize("model", [models.from_linen(nn.Dense(2)), models.from_nnx(lambda r: nnx.Linear(3, 2, rngs=r))])
def test_parameters_of_both_kinds_of_models_come_back(tmp_path, model):
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    checkpoint.save(tmp_path, 0, params)
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 0, params), params)


def test_shapes_are_enough_to_restore(tmp_path):
    checkpoint.save(tmp_path, 1, TREE["state"])
    abstract = jax.eval_shape(lambda: TREE["state"])
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 1, abstract), TREE["state"])


def test_the_newest_by_number_is_the_latest_and_old_ones_go(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (2, 9, 10):
        checkpoint.save(tmp_path, step, {"w": jnp.full(2, float(step))})
        assert checkpoint.latest(tmp_path) == step
    assert {entry.name for entry in tmp_path.iterdir()} == {"9", "10"}
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 9, {"w": jnp.zeros(2)}), {"w": jnp.full(2, 9.0)})


def test_a_checkpoint_that_was_not_finished_is_not_the_latest(tmp_path):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    (tmp_path / "4.orbax-checkpoint-tmp-0").mkdir()
    (tmp_path / "5").touch()
    assert checkpoint.latest(tmp_path) == 3


def test_a_step_is_not_overwritten(tmp_path):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="3 already exists"):
        checkpoint.save(tmp_path, 3, {"w": jnp.zeros(2)})
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 3, {"w": jnp.zeros(2)}), {"w": jnp.ones(2)})


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_is_kept(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep={keep} .* keep at least 1"):
        checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)}, keep=keep)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 8"):
        checkpoint.restore(tmp_path, 8, {"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        ({"w": jnp.zeros(3)}, r"w: stored float32\[2\], wanted float32\[3\]"),
        ({"w": jnp.zeros(2, jnp.int32)}, r"w: stored float32\[2\], wanted int32\[2\]"),
        ({"v": jnp.zeros(2)}, r"v: stored None, wanted float32\[2\]; w: stored float32\[2\], wanted None"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_difference(tmp_path, like, difference):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=difference + r"\. Restore with the configuration that it was saved with"):
        checkpoint.restore(tmp_path, 3, like)
