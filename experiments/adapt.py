"""Classifies images of your own from a few examples of each class, with a trained MAML, ProtoNets or another learner.

There is one folder of examples for each class. All images are made like those of the training, and their size and
format do not matter. After a training on photographs (experiments.images) they are resized, whatever their aspect
ratio. After one on Omniglot they are drawings: turned grey, padded to a square, scaled to 28x28, and the ink becomes
light on a dark background, so a photograph should show the drawing and little else. ProtoNets take any number of
classes of at least 2, MAML takes exactly as many as it was trained with. The network of a run must be conv4 or
multi-scale, and its ensemble 1, so LEO, MANN, the LSTM and MAML++ cannot be used at their published settings. A run
with statistics of training images (--population) reads these images; a file does not.

A confidence is a softmax of the outputs. Centroids and neighbours of a pretrained classifier and the memory module
have cosines as outputs, so their confidences are close to each other, and only their order says something.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from rich.markup import escape
from rich.table import Table

from experiments import runs
from experiments.cli import Precision, main
from experiments.export import config_of_run
from experiments.runs import RunError, console, messages_to_stderr
from maml_jax.portable import INK, PHOTOGRAPH, LearnerConfig, Portable, build_learner, classify, load_learner
from maml_jax.tasks import drawings, image_files, image_folder
from maml_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is classified from which examples."""

    learner: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-OR-FILE")]
    """The directory of a run of experiments.omniglot or images, or a file of experiments.export (.npz)."""
    support: Path
    """The folder of the examples: one folder for each class, each with one or more images."""
    query: Path
    """What to classify: an image, a folder of images, or a folder with folders of images that are named after the
    classes; then the accuracy is printed too. Images may be of any size."""
    ink: drawings.Ink = "auto"
    """Of drawings: whether the ink is darker or lighter than the background; "auto" decides by the border of each
    image."""
    one_at_a_time: bool = True
    """Whether each image is classified with only the examples beside it. Otherwise all go through the network together,
    and with normalisation by batch statistics the answers depend on each other."""
    json: bool = False
    """Print JSON in place of a table."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""


class Queries(NamedTuple):
    """What to classify.

    Attributes:
      files: the names of the files.
      images: uint8 [M, H, W, C].
      classes: the true class of each file, or None if they are not known.
    """

    files: list[Path]
    images: np.ndarray
    classes: list[str] | None


def run(config: Config) -> dict:
    """Classifies, prints, and returns what `--json` prints."""
    with messages_to_stderr(config.json):
        learner_config = open_config(config.learner)
        read_images = reader_of(learner_config, config.ink)
        files = image_files.class_files(config.support, at_least=2)
        names, images = list(files), [read_images(of_class) for of_class in files.values()]
        check_way(learner_config, names, config.support)
        queries = read_queries(config.query, names, read_images)
        loaded = open_learner(config.learner, way=len(names))
        answers = answer(loaded, names, drawings.as_batch(images), queries, one_at_a_time=config.one_at_a_time)
    if config.json:
        print(json.dumps(answers, indent=1))
    else:
        show(answers, config.query)
    return answers


def open_config(path: Path) -> LearnerConfig:
    """The configuration of a run directory or of a file.

    Raises:
      FileNotFoundError: if there is neither.
      RunError: if the directory is no run of experiments.omniglot or experiments.images, or the learner takes other
        images.
      ValueError: if the file cannot be used.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; give the directory of a run of experiments.omniglot or experiments.images, or an "
            ".npz file that experiments.export made"
        )
    config = config_of_run(path) if path.is_dir() else load_learner(path).config
    height, width, channels = config.input_shape
    if height != width or channels not in {INK: (1,), PHOTOGRAPH: (1, 3)}.get(config.input_values, ()):
        raise RunError(
            f"{path} takes images of shape {list(config.input_shape)} ({config.input_values}), and only square "
            f"drawings ({INK}) and photographs ({PHOTOGRAPH}) can be read"
        )
    return config


def reader_of(config: LearnerConfig, ink: drawings.Ink) -> Callable[[Sequence[Path]], np.ndarray]:
    """The function that reads image files as the learner was trained with them, into uint8 [M, H, W, C].

    Raises:
      RunError: if the ink of photographs is named.
    """
    size, _, channels = config.input_shape
    if config.input_values == INK:
        return functools.partial(drawings.read_images, size=size, ink=ink)
    if ink != "auto":
        raise RunError(f"--ink {ink} is for drawings, and this {config.algorithm} takes photographs; leave it out")
    return functools.partial(image_folder.read_images, size=size, colour=channels == 3)


def open_learner(path: Path, way: int) -> Portable:
    """The learner of a run directory or of a file, for tasks of `way` classes."""
    if not path.is_dir():
        return load_learner(path, way=way)
    config = config_of_run(path)
    learner = build_learner(config, way=way)
    return Portable(learner, runs.load(path).params, dataclasses.replace(config, way=way))


def check_way(config: LearnerConfig, names: list[str], support: Path) -> None:
    """Raises RunError if the learner cannot tell that many classes apart."""
    if not config.any_way and len(names) != config.way:
        raise RunError(
            f"{support} has {len(names)} classes, and this {config.algorithm} takes exactly {config.way}, because its "
            f"last layer has {config.way} outputs. Give it {config.way} class folders, or use ProtoNets"
        )


def read_queries(path: Path, names: list[str], read_images: Callable[[Sequence[Path]], np.ndarray]) -> Queries:
    """Reads a file, a folder of files or a folder of class folders.

    Args:
      path: its name.
      names: the classes of the examples.
      read_images: what reads files.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      RunError: if a class folder is named after no class of the examples.
      ValueError: if a folder has no image, or a file is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}; give --query an image or a folder of images")
    classes = None
    if not path.is_dir():
        files = [path]
    elif any(entry.is_dir() for entry in path.iterdir() if not entry.name.startswith(".")):
        by_class = image_files.class_files(path)
        if unknown := sorted(by_class.keys() - set(names)):
            raise RunError(
                f"the folder {path / unknown[0]} is named after none of the classes {', '.join(names)}; rename it, or "
                "give --query a folder of images"
            )
        files = [file for found in by_class.values() for file in found]
        classes = [name for name, found in by_class.items() for _ in found]
    else:
        files = image_files.image_files(path)
    return Queries(files, read_images(files), classes)


def answer(loaded: Portable, names: list[str], support: Batch, queries: Queries, *, one_at_a_time: bool = True) -> dict:
    """The probability of every class for every query, as a record for JSON.

    Raises:
      RunError: if a probability is not finite.
    """
    inputs = drawings.as_inputs(queries.images)
    probabilities = np.asarray(classify(loaded, support, inputs, one_at_a_time=one_at_a_time), np.float64)
    if not np.isfinite(probabilities).all():
        raise RunError(
            f"the outputs of {loaded.config.algorithm} are not finite: its inner steps diverge on these examples; give "
            "other examples or another learner"
        )
    answers = {
        "algorithm": loaded.config.algorithm,
        "classes": names,
        "examples": np.bincount(support.targets).tolist(),
        "one_at_a_time": one_at_a_time,
        "queries": [
            {
                "file": str(file),
                "predicted": names[of_file.argmax()],
                "confidence": float(of_file.max()),
                "probabilities": dict(zip(names, of_file.tolist(), strict=True)),
            }
            for file, of_file in zip(queries.files, probabilities, strict=True)
        ],
    }
    if queries.classes is not None:
        for query, name in zip(answers["queries"], queries.classes, strict=True):
            query["class"] = name
        answers["accuracy"] = float(np.mean([query["class"] == query["predicted"] for query in answers["queries"]]))
    return answers


def show(answers: dict, query: Path) -> None:
    """Prints a row for each file: the predicted class, and the probability of each class in %.

    If there is no room for a column for each class, the three with the highest probability are shown.
    """
    names, counts = answers["classes"], answers["examples"]
    is_known = "accuracy" in answers
    has_columns = sum(max(len(name), 5) + 3 for name in names) <= console.width // 2
    shots = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    entry = "one image at a time" if answers["one_at_a_time"] else "all images together"
    table = Table(title=f"{answers['algorithm']}, {len(names)} classes, examples per class: {shots}, {entry}")
    for header in ("file", *["class"] * is_known, "predicted"):
        table.add_column(header, overflow="fold")
    for header in names if has_columns else ["confidence in %"]:
        table.add_column(escape(header), justify="right" if has_columns else "left", overflow="fold")
    for one in answers["queries"]:
        file = Path(one["file"])
        percent = {name: f"{100 * value:.1f}" for name, value in one["probabilities"].items()}
        percent[one["predicted"]] = f"[bold]{percent[one['predicted']]}[/]"
        style = "bold red" if is_known and one["class"] != one["predicted"] else "bold"
        cells = [escape(str(file.relative_to(query) if query.is_dir() else file))]
        if is_known:
            cells.append(escape(one["class"]))
        cells.append(f"[{style}]{escape(one['predicted'])}[/]")
        if has_columns:
            cells += percent.values()
        else:
            best = sorted(names, key=one["probabilities"].get, reverse=True)[:3]
            cells.append(", ".join(f"{escape(name)} {percent[name]}" for name in best))
        table.add_row(*cells)
    console.print(table)
    if is_known:
        right = sum(one["class"] == one["predicted"] for one in answers["queries"])
        console.print(f"accuracy {100 * answers['accuracy']:.1f} %: {right} of {len(answers['queries'])}")


if __name__ == "__main__":
    main(Config, run, __doc__)
