import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint.save("~/run", 7, TREE)
    assert (tmp_path / "run" / "7").is_dir()
    assert checkpoint.latest("~/run") == 7
    chex.assert_trees_all_equal(checkpoint.restore("~/run", 7, TREE)["state"], TREE["state"])
    chex.assert_trees_all_equal(checkpoint.restore_latest("~/run", TREE).tree["state"], TREE["state"])


class Unsuitable:
    """A leaf that is no array."""


def bits(leaf):
    """The type of a leaf, its dtype, its shape and the bytes of its values."""
    is_key = jax.dtypes.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return type(leaf), array.dtype, array.shape, array.tobytes()


@pytest.mark.parametrize(
    ("leaf", "like"),
    [
        (0.1, 0.0),  # which float32 would round
        (2**40 + 1, 0),
        (True, False),
        (1 - 2j, 0j),
        (np.float32(0.1), np.float32(0)),
        (np.int64(2**40), np.int64(0)),
        (np.arange(3) / 3, np.zeros(3)),
        (np.array([True, False]), np.zeros(2, bool)),
        (jnp.array([0.1, jnp.nan], jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.bfloat16)),
        (jnp.float8_e4m3fn(0.1), jax.ShapeDtypeStruct((), jnp.float8_e4m3fn)),
        (jnp.zeros((0, 3)), jax.ShapeDtypeStruct((0, 3), jnp.float32)),
        (np.zeros((3, 0)), np.zeros((3, 0))),
        (jax.random.key(1, impl="rbg"), jax.random.key(0, impl="rbg")),
        (jax.random.split(jax.random.key(1), 3), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))),
    ],
    ids=str,
)
def test_every_kind_of_leaf_keeps_its_value_type_and_dtype(tmp_path, leaf, like):
    checkpoint.save(tmp_path, 0, {"leaf": leaf, "other": np.ones(1), "empty": {}})
    restored = checkpoint.restore(tmp_path, 0, {"leaf": like, "other": np.zeros(1), "empty": {}})
    assert bits(restored["leaf"]) == bits(leaf)
    assert restored["empty"] == {}


def test_float64_arrays_do_not_depend_on_x64_at_restoring(tmp_path, x64):
    saved = jnp.arange(3) / 3
    checkpoint.save(tmp_path, 0, saved)
    with jax.enable_x64(False):
        assert bits(checkpoint.restore(tmp_path, 0, saved)) == bits(saved)


def test_leaves_go_to_the_devices_of_like(tmp_path):
    mesh = jax.make_mesh((4,), ("tasks",))
    spread = jax.NamedSharding(mesh, jax.P("tasks"))
    tree = {"w": jnp.arange(8.0), "keys": jax.random.split(jax.random.key(0), 4)}
    checkpoint.save(tmp_path, 0, jax.device_put(tree, spread))
    for sharding in (spread, jax.sharding.SingleDeviceSharding(jax.devices()[3])):
        restored = checkpoint.restore(tmp_path, 0, jax.device_put(tree, sharding))
        assert jax.tree.map(bits, restored) == jax.tree.map(bits, tree)
        assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {sharding}


@pytest.mark.parametrize(
    "leaf", ["text", Unsuitable(), 2**70, jax.ShapeDtypeStruct((2,), jnp.float32), np.ones(2, ">f4"), jnp.uint4(3)]
)
def test_a_leaf_that_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, leaf):
    with pytest.raises(ValueError, match=r"the leaf \['a'\]\[1\], a .* cannot be stored.* leave it out or convert it"):
        checkpoint.save(tmp_path / "new", 0, {"a": (jnp.ones(2), leaf)})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tree", [{}, None, {"a": jnp.zeros((0, 3))}])
def test_a_tree_without_values_is_refused(tmp_path, tree):
    with pytest.raises(ValueError, match=r"holds no values.* save at least one array"):
        checkpoint.save(tmp_path / "new", 0, tree)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", [-1, 1.0, True, "3"])
def test_a_step_is_an_integer(tmp_path, step):
    for attempt in (checkpoint.save, checkpoint.restore):
        with pytest.raises(ValueError, match=f"step must be an integer of at least 0, got {step!r}"):
            attempt(tmp_path, step, {"w": jnp.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model", [models.from_linen(nn.Dense(2)), models.from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))]
)
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
    for name in ("²", "٣", "007", "-8", "6 "):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) == 3


@pytest.mark.parametrize("stage", ["rename", "write_text"])
def test_a_save_that_is_interrupted_leaves_no_checkpoint_and_can_be_repeated(tmp_path, monkeypatch, stage):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    with monkeypatch.context() as patch:
        patch.setattr(Path, stage, interrupt)  # after the values are written
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 4, {"w": jnp.zeros(2)})
    assert checkpoint.latest(tmp_path) == 3
    checkpoint.save(tmp_path, 4, {"w": jnp.zeros(2)})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["3", "4"]
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 4, {"w": jnp.ones(2)}), {"w": jnp.zeros(2)})


def test_a_step_is_not_overwritten(tmp_path):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"3 already exists and is not overwritten; delete it"):
        checkpoint.save(tmp_path, 3, {"w": jnp.zeros(2)})
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 3, {"w": jnp.zeros(2)}), {"w": jnp.ones(2)})


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_is_kept(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep must be an integer of at least 1, got {keep}"):
        checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)}, keep=keep)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 8"):
        checkpoint.restore(tmp_path, 8, {"w": jnp.ones(2)})


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        ({"w": jnp.zeros(3)}, r"\['w'\]: stored float32\[2\], wanted float32\[3\]"),
        ({"w": jnp.zeros(2, jnp.int32)}, r"\['w'\]: stored float32\[2\], wanted int32\[2\]"),
        ({"v": jnp.zeros(2)}, r"\['v'\]: stored None, wanted float32\[2\]; \['w'\]: stored float32\[2\], wanted None"),
        ({"w": 0.0}, r"\['w'\]: stored float32\[2\], wanted float"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_difference(tmp_path, like, difference):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    for attempt in (lambda: checkpoint.restore(tmp_path, 3, like), lambda: checkpoint.restore_latest(tmp_path, like)):
        with pytest.raises(ValueError, match=difference + r"\. Restore with the configuration that") as raised:
            attempt()
        assert not isinstance(raised.value, checkpoint.CheckpointError)  # it is whole


def test_a_key_of_another_kind_does_not_fit(tmp_path):
    checkpoint.save(tmp_path, 3, jax.random.key(0))
    with pytest.raises(ValueError, match=r"\(the only leaf\): stored key<fry>\[\], wanted key<rbg>\[\]"):
        checkpoint.restore(tmp_path, 3, jax.random.key(0, impl="rbg"))


# Damage


def damage(path, content):
    """Writes other content to a file; None deletes it."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def test_any_damage_of_any_file_is_noticed(tmp_path, capfd):
    tree = {"w": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(5), "n": 7}
    checkpoint.save(tmp_path / "whole", 3, tree)
    files = [file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*") if file.is_file()]
    for file in files:
        content = (tmp_path / "whole" / file).read_bytes()
        damaged = {None, content[: len(content) // 2], b"", b"[]"} - {content}
        for position in {0, len(content) // 3, len(content) // 2, len(content) - 1} if content else ():
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            damaged.add(bytes(flipped))
        for other in damaged:
            shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
            damage(tmp_path / "damaged" / file, other)
            with pytest.raises(checkpoint.CheckpointError, match=f"{tmp_path}/damaged/3 is damaged.*; delete it"):
                checkpoint.restore(tmp_path / "damaged", 3, tree)
            shutil.rmtree(tmp_path / "damaged")
    assert len(files) > 5
    assert capfd.readouterr() == ("", "")  # orbax, which prints tracebacks, is not given damaged files


def test_values_that_were_exchanged_for_those_of_another_checkpoint_are_noticed(tmp_path):
    for step in (3, 4):
        checkpoint.save(tmp_path, step, {"w": jnp.full(2, float(step))})
    shutil.copytree(tmp_path / "4", tmp_path / "3", dirs_exist_ok=True, ignore=lambda *_: ["sha256.json"])
    with pytest.raises(checkpoint.CheckpointError, match="3 is damaged"):
        checkpoint.restore(tmp_path, 3, {"w": jnp.zeros(2)})


def test_a_hidden_file_is_no_damage(tmp_path):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    (tmp_path / "3" / ".DS_Store").touch()
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 3, {"w": jnp.zeros(2)}), {"w": jnp.ones(2)})


def test_the_latest_undamaged_checkpoint_is_restored_and_the_others_are_reported(tmp_path):
    like = {"w": jnp.zeros(2)}
    assert checkpoint.restore_latest(tmp_path / "nowhere", like) is None
    assert checkpoint.restore_latest(tmp_path, like) is None
    for step in (2, 9, 10):
        checkpoint.save(tmp_path, step, {"w": jnp.full(2, float(step))}, keep=3)
    for expected, damaged in ((10, ()), (9, (10,)), (2, (10, 9))):
        restored = checkpoint.restore_latest(tmp_path, like)
        assert (restored.step, restored.damaged) == (expected, damaged)
        chex.assert_trees_all_equal(restored.tree, {"w": jnp.full(2, float(expected))})
        damage(tmp_path / str(expected) / "_METADATA", None)
    with pytest.raises(checkpoint.CheckpointError, match=rf"{tmp_path} is intact \(steps \[10, 9, 2\]\); delete"):
        checkpoint.restore_latest(tmp_path, like)


def test_only_a_damaged_checkpoint_is_replaced(tmp_path):
    for step in (3, 4):
        checkpoint.save(tmp_path, step, {"w": jnp.zeros(2)})
    damage(tmp_path / "4" / "manifest.ocdbt", b"")
    checkpoint.save(tmp_path, 4, {"w": jnp.ones(2)})
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 4, {"w": jnp.zeros(2)}), {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="4 already exists"):
        checkpoint.save(tmp_path, 4, {"w": jnp.ones(2)})


def test_a_checkpoint_that_cannot_be_read_for_now_is_not_damaged(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 3, {"w": jnp.zeros(2)})

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_checksums", fail)
    for use in (
        lambda: checkpoint.restore_latest(tmp_path, {"w": jnp.zeros(2)}),
        lambda: checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)}),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            use()
    monkeypatch.undo()
    assert checkpoint.restore_latest(tmp_path, {"w": jnp.ones(2)}).damaged == ()


def test_a_checkpoint_exists_if_it_is_not_damaged(tmp_path):
    assert not checkpoint.exists(tmp_path / "nowhere", 3)
    for step in (3, 4):
        checkpoint.save(tmp_path, step, {"w": jnp.zeros(2)})
    damage(tmp_path / "4" / "manifest.ocdbt", b"")
    assert [checkpoint.exists(tmp_path, step) for step in (2, 3, 4)] == [False, True, False]


def test_a_damaged_checkpoint_of_a_later_step_does_not_count_as_kept(tmp_path):
    for step in (2, 9):
        checkpoint.save(tmp_path, step, {"w": jnp.full(2, float(step))})
    damage(tmp_path / "9" / "_METADATA", None)
    checkpoint.save(tmp_path, 3, {"w": jnp.full(2, 3.0)}, keep=1)
    assert checkpoint.restore_latest(tmp_path, {"w": jnp.zeros(2)}).step == 3


# Two processes, of which one has the files


WORKER = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
from maml_jax import checkpoint, processes

directory, own = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[3], 2, own)
everywhere = jax.NamedSharding(jax.make_mesh((2,), ("tasks",)), jax.P())
make = lambda seed: jax.jit(lambda: (jnp.arange(3.0) + seed, jax.random.key(seed)), out_shardings=everywhere)()
tree = {"arrays": make(5), "float": 0.1, "host": np.arange(3) / 3, "none": np.zeros((0, 2))}
like = {"arrays": make(0), "float": 0.0, "host": np.zeros(3), "none": np.zeros((0, 2))}
for step in (3, 4):
    checkpoint.save(directory, step, tree)
if own == 0:
    os.remove(f"{directory}/4/_METADATA")
else:
    directory = "not/on/this/machine"
restored = checkpoint.restore_latest(directory, like)
assert (restored.step, restored.damaged) == (3, (4,)), restored
assert restored.tree["float"] == 0.1
assert restored.tree["none"].shape == (0, 2)
np.testing.assert_array_equal(restored.tree["host"], tree["host"])
array, key = restored.tree["arrays"]
assert array.sharding == key.sharding == everywhere
np.testing.assert_array_equal(array, tree["arrays"][0])
np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(tree["arrays"][1]))
try:
    checkpoint.restore(directory, 4, like)
except (checkpoint.CheckpointError, processes.ProcessError) as error:
    assert isinstance(error, processes.ProcessError) == (own == 1), error
    assert "4 is damaged" in str(error)
else:
    raise AssertionError("the damage was not noticed")
"""


def test_the_other_processes_receive_what_process_zero_has_read(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-W", "error", "-c", WORKER, str(tmp_path)]
    with (
        subprocess.Popen([*command, "1", address], env=environment, stderr=subprocess.PIPE, text=True) as other,
        subprocess.Popen([*command, "0", address], env=environment, stderr=subprocess.PIPE, text=True) as first,
    ):
        errors = [process.communicate(timeout=300)[1] for process in (first, other)]
        assert (first.returncode, other.returncode) == (0, 0), "\n".join(errors)
