"""Metrics go where they are asked to, and nothing is imported otherwise."""

import contextlib
import dataclasses
import struct
import subprocess
import sys
import types

import pytest

from experiments import common, runs, sinusoid, tracking
from experiments.tracking import Tracking


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    tracking: Tracking = dataclasses.field(default_factory=Tracking)


RECORD = {"step": 3, "loss": 0.5, "val": 0.25}


def test_nothing_optional_is_imported():
    code = "import sys; from experiments import omniglot; print(sorted({'tensorboardX', 'wandb'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(("extra", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch, extra, package):
    monkeypatch.setitem(sys.modules, package, None)
    config = Config(tracking=Tracking(**{extra: True}))
    with (
        pytest.raises(runs.RunError, match=f"--{extra} needs the package {package}; install it with"),
        tracking.trackers(tmp_path, config, 0),
    ):
        pass


def test_tensorboard_gets_every_record(tmp_path, monkeypatch):
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, directory, purge_step):
            written.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with tracking.trackers(tmp_path, Config(tracking=Tracking(tensorboard=True)), 2) as track:
        track(RECORD)
    assert written == [(str(tmp_path / "tensorboard"), 3), ("loss", 0.5, 3), ("val", 0.25, 3)]
    assert closed == [True]


def events_of(file):
    """The events of a TensorBoard file: each has its length (8 bytes), 4 bytes of checksum, itself, and 4 more."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="pip install tensorboardX")
    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_tensorboard_files_hold_every_record(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    with tracking.trackers(tmp_path, Config(tracking=Tracking(tensorboard=True)), 2) as track:
        track(RECORD)
        track(RECORD | {"step": 6, "loss": 0.125})
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = events_of(file)
    values = [(value.tag, event.step, value.simple_value) for event in events for value in event.summary.value]
    assert values == [("loss", 3, 0.5), ("val", 3, 0.25), ("loss", 6, 0.125), ("val", 6, 0.25)]
    # What an interrupted run has written from step 3 on is hidden.
    assert [event.step for event in events if event.session_log.status == 1] == [3]


def test_weights_and_biases_gets_every_record_under_one_identity(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**arguments):
        started.append(arguments)
        return types.SimpleNamespace(log=lambda *a, **k: logged.append((a, k)), finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):  # a resumed run is the same run there
        with tracking.trackers(tmp_path, Config(tracking=Tracking(wandb=True)), 0) as track:
            track(RECORD)
    assert started[0] == started[1]
    assert started[0]["resume"] == "allow"
    assert started[0]["config"] == {"seed": 0}
    assert logged == [(({"loss": 0.5, "val": 0.25},), {"step": 3}), "end"] * 2


def test_a_profile_is_written_if_it_is_wanted(tmp_path):
    with tracking.profiled(tmp_path / "no", False):
        pass
    assert not (tmp_path / "no").exists()
    with tracking.profiled(tmp_path / "yes", True):
        sum(range(10))
    assert list((tmp_path / "yes").rglob("*.xplane.pb"))


def test_a_training_passes_every_record_on(tmp_path, monkeypatch):
    tracked = []

    @contextlib.contextmanager
    def trackers(run_dir, config, step):
        yield lambda record: tracked.append((run_dir.name, record))

    monkeypatch.setattr(common, "trackers", trackers)
    config = dataclasses.replace(
        sinusoid.METHODS["maml"], num_meta_steps=3, val_every=2, log_every=1, meta_batch_size=2, run_dir=tmp_path
    )
    config = sinusoid.with_paper_defaults(config)
    training = sinusoid.training_of(config)._replace(validate=lambda params: 0.5)
    members = [
        common.Member(tmp_path / name, dataclasses.replace(config, seed=seed), training)
        for seed, name in enumerate("ab")
    ]
    for member in members:
        member.run_dir.mkdir()
    common.train_together(members, training)
    for name in "ab":
        records = [record for of_run, record in tracked if of_run == name]
        assert records == runs.read_log(tmp_path / name)
        assert [record.get("val") for record in records] == [None, 0.5, 0.5]
