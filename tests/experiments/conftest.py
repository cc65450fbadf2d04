"""Runs in miniature, without what most of their tests do not need."""

import pytest
from made_up_languages import write_corpus

from experiments import common, devices, figures

WHOLE = ("test_common", "test_seeds", "test_sinusoid")
"""Files whose runs are those of a user. What the others leave out is a fifth of the time of a run of MAML."""


@pytest.fixture(autouse=True, scope="module")
def _runs_are_on_one_device_and_count_no_operations(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] not in WHOLE:
            patch.setattr(devices, "mesh_for", lambda *counts: None)
            patch.setattr(common, "flops_of_a_meta_step", lambda *args: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def _figures_of_runs_are_drawn_once():
    """In each file of tests the first run draws its figures. Those of later runs are empty: they take half the time."""
    drawn, save = set(), figures.save

    def save_once(figure, file):
        if file.parent.name != "figures" or file.name not in drawn:
            save(figure, file)
            drawn.add(file.name)
            return
        figures.plt.close(figure)
        file.parent.mkdir(parents=True, exist_ok=True)
        for suffix in {file.suffix, ".pdf"}:
            file.with_suffix(suffix).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", save_once)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A directory with a text in made-up languages."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


class TrainingReached(Exception):
    """What a run does before its training is done."""


@pytest.fixture
def reached(monkeypatch):
    """A context in which a run must reach its training, and ends there."""

    def train(run_dir, config, training):
        raise TrainingReached

    monkeypatch.setattr(common, "train", train)
    return pytest.raises(TrainingReached)
