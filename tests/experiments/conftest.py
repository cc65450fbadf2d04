"""Runs in miniature, without what most of their tests do not need."""

import pytest

from experiments import common, devices

WHOLE = ("test_common", "test_seeds", "test_sinusoid")
"""Files whose runs are those of a user. What the others leave out is a fifth of the time of a run of MAML."""


@pytest.fixture(autouse=True, scope="module")
def _runs_are_on_one_device_and_count_no_operations(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in WHOLE:
            patch.setattr(devices, "mesh_for", lambda *counts: None)
            patch.setattr(common, "flops_of_a_meta_step", lambda *args: None)
        yield


class TrainingReached(Exception):
    """What a run does before its training is done."""


@pytest.fixture
def reached(monkeypatch):
    """A context in which a run must reach its training, and ends there."""

    def train(run_dir, config, training):
        raise TrainingReached

    monkeypatch.setattr(common, "train", train)
    return pytest.raises(TrainingReached)
