"""Few-shot classification of handwritten characters.

Trains one of the algorithms, keeps the state with the best validation accuracy and tests it. Without flags this is
MAML, 5-way 1-shot, with the paper's settings: 60,000 meta-steps, which take about 50 minutes on two cores of a CPU and
about seven minutes on a large GPU, two of them for compilation. With --num-meta-steps 1000 it takes two minutes on a
CPU. The method, --way and --shot choose others. --way and --shot are those of validation and of the first test. Methods
whose parameters do not depend on the number of classes are tested in all four published settings.
"""

import functools

import numpy as np

from experiments import classification
from experiments.classification import DataSet, make_learner, make_network, make_tester
from experiments.cli import main
from experiments.omniglot_recipes import METHODS, SETTINGS, Config, about, with_paper_defaults
from maml_jax.tasks import omniglot

__all__ = ["METHODS", "SETTINGS", "make_learner", "make_network", "make_tester", "with_paper_defaults"]


def examples(config: Config, split: str) -> np.ndarray:
    """The drawings of a split, uint8 [C, 20, 28, 28, 1]."""
    return omniglot.load(split, config.data_dir, config.split_by)


def turned(config: Config, split: str) -> dict[str, bool]:
    """How the classes of a split are rotated, as `few_shot.make_sampler` takes it."""
    return {
        "rotations": config.rotations and not config.rotated_classes and config.network != "features",
        "rotated_classes": config.rotated_classes and (split == "train" or config.rotated_test_classes),
    }


DATA = DataSet(
    name="omniglot",
    title="Omniglot",
    methods=METHODS,
    with_paper_defaults=with_paper_defaults,
    examples=examples,
    split_by=("split_by",),
    input_shape=lambda config: (28, 28, 1),
    turned=turned,
    augmented=lambda config, sample_episode: sample_episode,
    settings=SETTINGS,
)


run = functools.partial(classification.run, DATA)
load = functools.partial(classification.load, DATA)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
