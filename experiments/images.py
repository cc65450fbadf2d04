"""Few-shot classification of photographs: any folder or zip of classes, or a data set of tensorflow-datasets.

Trains one of the algorithms with the settings published for miniImageNet, as far as they are known. It keeps the state
with the best validation accuracy and tests it. Without flags this is MAML, 5-way 1-shot: four convolutions of 32
filters, 5 inner steps of rate 0.05, 4 tasks a meta-step, and 10 inner steps at test. On two cores of a CPU a thousand
meta-steps take most of an hour; pretrained-classifier is much faster. The directory holds train, val and test, as
folders or zips of class folders.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from experiments import classification, published
from experiments.classification import ClassificationConfig, DataSet, make_learner, make_tester
from experiments.cli import main, methods, recipe_of, with_defaults
from experiments.runs import console
from maml_jax import CATALOGUE
from maml_jax.tasks import image_folder, tfds_classes
from maml_jax.tasks.augment import augmented
from maml_jax.tasks.image_folder import ClassImages
from maml_jax.types import check_integer

__all__ = ["METHODS", "SETTINGS", "make_learner", "make_tester", "with_paper_defaults"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClassificationConfig):
    """The settings of one run. Rates are for losses that are means over the batch."""

    experiment: ClassVar[str] = "images"

    query_shot: int | None = 15
    """Query examples per class."""
    meta_batch_size: int | None = None
    """Episodes per meta-step; by default those of MAML's paper, 4, or 2 with more than one shot."""
    eval_inner_steps: int | None = 10
    """Inner steps in validation and test."""
    network: Literal["conv4", "resnet12", "multi-scale", "features"] = "conv4"
    """Four convolutions; a residual network of 12 layers; that of R2-D2, whose embedding joins two depths; or the
    embeddings of --pretrained-run, for LEO."""
    filters: int = 32
    """Filters of each convolution; of resnet12 those of the first block, which double from block to block."""
    pooling: bool = True
    """Whether conv4 has stride 1 and a 2x2 maximum in each block, and not stride 2."""
    outer_clip: float | None = 10.0
    """Every entry of the meta-gradient is bounded by this number before the outer optimiser."""
    data_dir: Path | None = None
    """The folder with train, val and test, each a folder or a zip of class folders; or one folder or zip of class
    folders with a --split-file; by default $MAML_JAX_IMAGES. With --tfds the tensorflow-datasets directory."""
    split_file: Path | None = None
    """A JSON file {"train": [class names], "val": [...], "test": [...]}, if the classes are not divided yet. For
    a data set of --tfds one is made and kept beside the cache."""
    tfds: str | None = None
    """The name of a data set of tensorflow-datasets, such as cifar100, in place of a folder."""
    size: int = 84
    """Height and width, in pixels, to which every image is resized once."""
    colour: bool = True
    """Whether images have three channels and not one."""
    augment: bool = False
    """Reflect, shift and recolour the training images at random."""
    leave_out_small: bool = False
    """Leave out classes with fewer than shot + query images. By default they are an error, and for a later published
    test the test is left out."""

    stream: bool = False
    """Leave the images on the host, for data larger than the device. Those of a meta-step are gathered ahead, except
    with --augment or --seeds."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_integer("--size", self.size, at_least=8)
        if self.size < 16 and (
            self.network in ("multi-scale", "resnet12") or (self.network == "conv4" and self.pooling)
        ):
            raise ValueError(f"--size {self.size} cannot be halved four times; choose at least 16")


METHODS = methods("images", Config)
METHODS["reptile"] = dataclasses.replace(
    METHODS["reptile"],
    train_shot=15,
    meta_batch_size=5,
    num_meta_steps=100_000,
    outer_optimizer="sgd",
    outer_lr=1.0,
    outer_schedule="linear",
    outer_clip=None,
    eval_inner_steps=50,
    adapt_norm=True,
    norm_scale=True,
)
METHODS["maml++"] = dataclasses.replace(
    METHODS["maml++"],
    filters=48,
    meta_batch_size=2,
    num_meta_steps=50_000,
    outer_schedule="cosine",
    outer_lr_end=1e-5,
    eval_inner_steps=5,
    norm_scale=True,
    ensemble=5,
)
# Their papers take as many steps in the test as in the training.
METHODS["boil"] = dataclasses.replace(METHODS["boil"], filters=64, eval_inner_steps=1)
METHODS["meta-sgd"] = dataclasses.replace(METHODS["meta-sgd"], eval_inner_steps=1)
METHODS["cavia"] = dataclasses.replace(METHODS["cavia"], meta_batch_size=16, eval_inner_steps=2)
# The networks that compare embeddings are trained and tested as ProtoNets are.
_PROTONETS = {
    "train_way": 20,
    "filters": 64,
    "meta_batch_size": 1,
    "num_meta_steps": 20_000,
    "outer_schedule": "halved",
    "outer_clip": None,
    "norm_scale": True,
    "population": True,
    "val_every": 500,
}
for _name in ("protonets", "matching", "siamese"):
    METHODS[_name] = dataclasses.replace(METHODS[_name], **_PROTONETS)
METHODS["r2d2"] = dataclasses.replace(
    METHODS["r2d2"], **_PROTONETS | {"network": "multi-scale", "train_way": 16, "outer_lr": 5e-3}
)
METHODS["pretrained-classifier"] = dataclasses.replace(
    METHODS["pretrained-classifier"],
    **_PROTONETS | {"train_way": None, "filters": 32, "num_meta_steps": 5_000, "eval_inner_steps": 100},
)
METHODS["leo"] = dataclasses.replace(
    METHODS["leo"],
    **_PROTONETS
    | {
        "network": "features",
        "pretrained_run": Path("runs/images-pretrained-classifier-5w1s-0"),
        "train_way": 5,
        "meta_batch_size": 12,
        "num_meta_steps": 100_000,
        "outer_clip": 0.1,
        "outer_schedule": "constant",
        "val_every": 1000,
    },
)
METHODS["meta-lstm"] = dataclasses.replace(
    METHODS["meta-lstm"], meta_batch_size=1, num_meta_steps=75_000, eval_inner_steps=None
)
SETTINGS = ((5, 1), (5, 5))
"""Way and shot of the published tables."""


def about() -> dict[str, str]:
    """A line on each method for --help, with its published accuracies on miniImageNet."""
    lines = {}
    for name in METHODS:
        entry, numbers = CATALOGUE[name], published.IMAGES.get(name)
        line = f"{entry.title} ({entry.reference})."
        if numbers:
            line += f" Published on miniImageNet, %: 1-shot {numbers[0]}, 5-shot {numbers[1] or 'unknown'}."
        if entry.settings["images"] == CATALOGUE["maml"].settings["images"]:
            line += published.SUMMED_LOSS.format(code=0.01, ours=0.05)
        lines[name] = line
    return lines


def with_paper_defaults(config: Config) -> Config:
    """Fills in what was left to the paper's settings, which depend on the number of shots."""
    learned_steps = 12 if config.shot == 1 else 5
    return with_defaults(
        config,
        {
            "num_inner_steps": learned_steps,
            **recipe_of(config, METHODS),
            "train_way": config.way,
            "train_shot": config.shot,
            "query_shot": 15,
            "meta_batch_size": 4 if config.shot == 1 else 2,
            "eval_inner_steps": _steps_of_test(config, learned_steps),
            "run_dir": Path(f"runs/images-{config.algorithm}-{config.way}w{config.shot}s-{config.seed}"),
        },
    )


def _steps_of_test(config: Config, learned_steps: int) -> int:
    """10, but for a learned optimiser as many inner steps as in training."""
    if config.algorithm != "meta-lstm":
        return 10
    return config.hyperparameters.num_inner_steps or learned_steps


@functools.lru_cache(maxsize=3)
def read_classes(config: Config, split: str) -> ClassImages:
    """The classes of a split, uint8 images [n_c, size, size, channels] each.

    Raises:
      FileNotFoundError: if the data are not there.
      ValueError: if they are damaged, or a class is too small.
    """
    if config.tfds:
        found = tfds_classes.load(
            config.tfds,
            split,
            size=config.size,
            colour=config.colour,
            data_dir=config.data_dir,
            split_file=config.split_file,
        )
    else:
        where = config.data_dir or os.environ.get("MAML_JAX_IMAGES")
        if where is None:
            raise FileNotFoundError(
                "no images are known; give the folder that holds train, val and test by --data-dir or $MAML_JAX_IMAGES"
            )
        found = image_folder.load(where, split, size=config.size, colour=config.colour, split_file=config.split_file)
    shots = {
        "train": config.train_shot or config.shot,
        "val": config.shot,
        "test": config.shot,
    }
    needed = 1 if is_pretraining(config, split) else shots[split] + config.query_shot
    if not config.leave_out_small:
        return image_folder.check_examples(found, needed)
    kept, num_small = image_folder.leave_out_small(found, needed)
    if num_small:
        console.print(f"split {split!r}: {num_small} classes with fewer than {needed} images are left out")
    return kept


def is_pretraining(config: Config, split: str) -> bool:
    """Whether batches of all classes are drawn from the split, and no episodes."""
    return split == "train" and config.algorithm == "pretrained-classifier"


def examples(config: Config, split: str) -> Sequence[np.ndarray]:
    """The images of every class of a split."""
    return list(read_classes(config, split).images)


DATA = DataSet(
    name="images",
    title="photographs",
    methods=METHODS,
    with_paper_defaults=with_paper_defaults,
    examples=examples,
    split_by=("tfds", "split_file", "size", "colour"),
    input_shape=lambda config: (config.size, config.size, 3 if config.colour else 1),
    turned=lambda config, split: {},
    augmented=lambda config, sampler: augmented(sampler, max_shift=config.size // 10) if config.augment else sampler,
    settings=SETTINGS,
    is_any_size=True,
)


def run(config: Config) -> dict:
    """Trains, tests the state with the best validation accuracy, and returns the content of results.json."""
    config = with_paper_defaults(config)
    if config.algorithm == "pretrained-classifier":
        config = with_defaults(config, {"num_classes": classification.num_training_classes(DATA, config)})
    return classification.run(DATA, config)


load = functools.partial(classification.load, DATA)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
