"""The settings of the Omniglot experiment, and the published recipe of every method."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from experiments import published
from experiments.classification import ClassificationConfig
from experiments.cli import flag, methods, with_defaults
from experiments.runs import as_json
from maml_jax import CATALOGUE
from maml_jax.tasks import omniglot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ClassificationConfig):
    """The settings of one run. Rates are for losses that are means over the batch."""

    experiment: ClassVar[str] = "omniglot"

    query_shot: int | None = None
    """Query examples per class; by default as many as --shot, as in the paper."""
    num_meta_steps: int | None = 60_000
    """Outer updates, by default those of the recipe: of the paper, or ours where it gives none for a few-shot
    setting. A run with a constant rate may be continued with a larger number."""
    meta_batch_size: int | None = None
    """Episodes per meta-step; by default those of MAML's paper, 32, or 16 with more than 5 classes."""
    eval_inner_steps: int | None = None
    """Inner steps in validation and test; by default the paper's, 3, or 5 with more than 5 classes."""
    network: Literal["conv4", "mlp", "multi-scale", "pixels", "features"] = "conv4"
    """Four convolutions; the fully connected network of the "no conv" rows of MAML; that of R2-D2, whose embedding
    joins two depths; the pixels themselves at 20x20, for MANN; or the embeddings of --pretrained-run, for LEO."""
    filters: int = 64
    """Filters of each convolution."""
    pooling: bool = False
    """Whether conv4 has stride 1 and a 2x2 maximum in each block, and not stride 2."""
    split_by: omniglot.SplitBy = "character"
    """Which characters are for training: random ones, as in the MAML paper, or those of other alphabets than in the
    test, as in that of ProtoNets. The latter is harder."""
    rotations: bool = True
    """Turn every class of every episode by a random multiple of 90 degrees."""
    rotated_classes: bool = False
    """In training, make the four rotations of a character four classes, and do not turn the characters of validation
    and test, as Reptile does. It replaces --rotations."""
    rotated_test_classes: bool = False
    """With --rotated-classes, make the four rotations of a character four classes in validation and test too."""
    data_dir: Path | None = None
    """The tensorflow-datasets directory that holds omniglot/3.0.0, or the .npz made from it; by default
    $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


METHODS = methods("omniglot", Config)
# What is peculiar to the recipes of their papers.
METHODS["reptile"] = dataclasses.replace(
    METHODS["reptile"],
    train_shot=10,
    query_shot=1,
    meta_batch_size=5,
    num_meta_steps=None,
    outer_optimizer="sgd",
    outer_lr=1.0,
    outer_schedule="linear",
    eval_inner_steps=50,
    adapt_norm=True,
    norm_scale=True,
    flatten=True,
    rotated_classes=True,
)
# The paper describes the network of MAML, with stride 2; the authors' settings have pooling in its place.
METHODS["maml++"] = dataclasses.replace(
    METHODS["maml++"],
    meta_batch_size=8,
    num_meta_steps=50_000,
    outer_schedule="cosine",
    outer_lr_end=1e-5,
    eval_inner_steps=5,
    norm_scale=True,
    ensemble=5,
)
METHODS["imaml"] = dataclasses.replace(METHODS["imaml"], num_meta_steps=20_000)
METHODS["cavia"] = dataclasses.replace(METHODS["cavia"], eval_inner_steps=5)
# The networks that compare embeddings are trained and tested as ProtoNets are.
_PROTONETS = {
    "train_way": 60,
    "query_shot": 5,
    "meta_batch_size": 1,
    "num_meta_steps": 20_000,
    "outer_schedule": "halved",
    "pooling": True,
    "norm_scale": True,
    "population": True,
    "split_by": "alphabet",
    "rotated_classes": True,
    "rotated_test_classes": True,
    "val_every": 500,
}
METHODS["protonets"] = dataclasses.replace(METHODS["protonets"], **_PROTONETS)
# How matching networks were trained is not published; the rate is that of R2-D2.
METHODS["matching"] = dataclasses.replace(METHODS["matching"], **_PROTONETS | {"outer_lr": 5e-3})
METHODS["r2d2"] = dataclasses.replace(METHODS["r2d2"], **_PROTONETS | {"network": "multi-scale", "outer_lr": 5e-3})
METHODS["siamese"] = dataclasses.replace(METHODS["siamese"], **_PROTONETS | {"train_way": 20, "outer_half_life": 4_000})
METHODS["pretrained-classifier"] = dataclasses.replace(
    METHODS["pretrained-classifier"],
    **_PROTONETS | {"train_way": None, "num_meta_steps": 4_000, "eval_inner_steps": 100},
)
# Sequences of 50 images: 10 of each of 5 classes.
_MANN = {
    "network": "pixels",
    "train_shot": 5,
    "query_shot": 5,
    "meta_batch_size": 16,
    "chunk_size": 16,
    "num_meta_steps": 100_000,
    "rotated_classes": True,
    "rotated_test_classes": True,
    "val_every": 2000,
}
METHODS["mann"] = dataclasses.replace(METHODS["mann"], **_MANN)
METHODS["lstm"] = dataclasses.replace(METHODS["lstm"], **_MANN)
METHODS["leo"] = dataclasses.replace(
    METHODS["leo"],
    **_PROTONETS
    | {
        "network": "features",
        "pretrained_run": Path("runs/omniglot-pretrained-classifier-5w1s-0"),
        "train_way": 5,
        "query_shot": 15,
        "meta_batch_size": 12,
        "num_meta_steps": 100_000,
        "outer_clip": 0.1,
        "outer_schedule": "constant",
        "val_every": 1000,
    },
)
METHODS["meta-lstm"] = dataclasses.replace(
    METHODS["meta-lstm"], filters=32, query_shot=15, meta_batch_size=2, num_meta_steps=75_000, eval_inner_steps=8
)
# Sets of five drawings, in a far smaller network than the published one and without its dilated images.
METHODS["neural-statistician"] = dataclasses.replace(
    METHODS["neural-statistician"],
    **_PROTONETS
    | {
        "train_way": 20,
        "train_shot": 5,
        "pooling": False,
        "query_shot": 1,
        "split_by": "character",
        "outer_schedule": "constant",
        "num_meta_steps": 40_000,
    },
)
# Every class is shown six times. The rate is that of ProtoNets; the authors have 1e-4, without normalisation. The test
# characters are not rotated, as in the authors' code.
METHODS["memory-module"] = dataclasses.replace(METHODS["memory-module"], **_PROTONETS | {"rotated_test_classes": False})
SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))
"""Way and shot of the published tables."""


def about() -> dict[str, str]:
    """A line on each method for --help, with its published accuracies."""
    lines = {}
    for name in METHODS:
        numbers = [
            f"{way}-way {shot}-shot {accuracy}"
            for (algorithm, network, way, shot), accuracy in published.OMNIGLOT.items()
            if (algorithm, network) == (name, METHODS[name].network)
        ]
        entry = CATALOGUE[name]
        line = f"{entry.title} ({entry.reference})."
        if numbers:
            line += f" Published accuracy, % (sources: experiments/RESULTS.md): {', '.join(numbers)}."
        if entry.settings["omniglot"] == CATALOGUE["maml"].settings["omniglot"]:
            line += published.SUMMED_LOSS.format(code=0.4, ours=2.0)
        if by_way := defaults_by_way(name):
            line += f" Defaults for up to 5 classes or for more: {', '.join(by_way)}."
        lines[name] = line
    return lines


def defaults_by_way(name: str) -> list[str]:
    """The flags whose default depends on the number of classes, such as "--eval-inner-steps 3 or 5"."""
    few, many = (as_json(with_paper_defaults(dataclasses.replace(METHODS[name], way=way))) for way in (5, 20))
    unset = {setting for setting, value in as_json(METHODS[name]).items() if value is None} - {"train_way"}
    if not hasattr(METHODS[name].hyperparameters, "num_inner_steps"):
        unset -= {"eval_inner_steps"}
    return [f"{flag(key)} {few[key]} or {many[key]}" for key in few if key in unset and few[key] != many[key]]


def with_paper_defaults(config: Config) -> Config:
    """Fills in what was left to the paper's settings, which depend on the number of classes."""
    many = config.way > 5
    of_reptile = {
        "num_meta_steps": 200_000 if many else 100_000,
        "inner_lr": 5e-4 if many else 1e-3,
        "batch_size": 20 if many else 10,
        "num_inner_steps": 10 if many else 5,
    }
    steps_of_imaml = 25 if many else 16
    of_imaml = {"num_inner_steps": steps_of_imaml, "eval_inner_steps": steps_of_imaml}
    num_characters = len(omniglot.splits(config.split_by)["train"])
    return with_defaults(
        config,
        {
            "train_way": config.way,
            "train_shot": config.shot,
            "query_shot": config.shot,
            "num_meta_steps": METHODS[config.algorithm].num_meta_steps,
            "meta_batch_size": 16 if many else 32,
            "num_inner_steps": 5 if many else 1,
            "eval_inner_steps": 5 if many else 3,
            "num_classes": num_characters * (4 if config.rotated_classes else 1),
            "run_dir": Path(f"runs/omniglot-{config.algorithm}-{config.way}w{config.shot}s-{config.seed}"),
        }
        | {"reptile": of_reptile, "imaml": of_imaml}.get(config.algorithm, {}),
    )
