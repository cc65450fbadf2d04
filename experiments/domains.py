"""Domain generalisation (MLDG paper): train on some domains, test on one that is never seen.

Two data sets. "rotated-omniglot" has handwritten characters as classes and six angles as domains. "pacs" has seven
classes of objects in four domains, from photographs to sketches, at 32x32 pixels. MLDG is compared with ERM, which
trains on all source domains at once. For both, validation examples of the source domains select the state.

The network is small and trained from scratch. The paper fine-tunes an AlexNet, pretrained on ImageNet, on PACS at its
full size, so its accuracies are no reference for the ones here.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tyro
from rich.table import Table
from scipy import ndimage

from experiments import common, figures, intervals, packs, runs, seeds
from experiments.cli import RunConfig, check_counts, main, methods, with_defaults
from experiments.common import Training
from experiments.runs import console, stored_config
from maml_jax import CATALOGUE, Batch, Problem, losses, models
from maml_jax.tasks import domains, omniglot
from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import ArrayTree, MetaLearner

DataSet = Literal["rotated-omniglot", "pacs"]
DOMAINS: dict[DataSet, tuple[str, ...]] = {
    "rotated-omniglot": ("0", "15", "30", "45", "60", "75"),
    "pacs": ("art_painting", "cartoon", "photo", "sketch"),
}
"""The domains of each data set; those of rotated Omniglot are angles in degrees."""
INPUT_SHAPES: dict[DataSet, tuple[int, ...]] = {"rotated-omniglot": (28, 28, 1), "pacs": (32, 32, 3)}
PACS_CLASSES = 7
PACS_VALIDATION_SHARE = 0.1
NUM_DRAWINGS = {"train": 10, "val": 3, "test": 7}
"""Of the 20 drawings of a character; one is in the same part at every angle."""
SPLIT_SEED = 0
"""Seed of the choice of characters and of the parts of both data sets, which are the same in every run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The settings of one run. Of the numbers, only the weight of MLDG is the authors'."""

    experiment: ClassVar[str] = "domains"

    data: DataSet = "rotated-omniglot"
    """Characters at six angles, or the photographs, paintings, cartoons and sketches of PACS."""
    held_out: str | None = None
    """The domain that is tested and never seen in training: 0, 15, 30, 45, 60 or 75 (degrees); or art_painting,
    cartoon, photo or sketch. By default the last."""
    num_characters: int = 50
    """Classes of rotated-omniglot."""
    shot: int = 16
    """Examples of each source domain in an episode."""
    query_shot: Annotated[int | None, tyro.conf.Suppress] = None
    meta_batch_size: int = 1
    """Episodes per meta-step. Each has a split of the source domains of its own."""
    num_meta_steps: int = 2000
    """Outer updates. A run may be continued with a larger number."""
    network: Literal["conv4", "mlp"] = "conv4"
    """Four convolutions, or one fully connected hidden layer."""
    features: int = 32
    """Filters of each convolution, or units of the hidden layer."""
    eval_episodes: Annotated[int | None, tyro.conf.Suppress] = None
    val_every: int = 100
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 50
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""
    data_dir: Path | None = None
    """For rotated-omniglot the tensorflow-datasets directory that holds omniglot/3.0.0, or the .npz made from it; by
    default $TFDS_DATA_DIR, else ~/tensorflow_datasets. For pacs the directory that holds pacs_32.npz; by default
    $MAML_JAX_PACKS."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(self, num_characters=2, features=1)
        names = DOMAINS[self.data]
        if self.held_out is not None and self.held_out not in names:
            raise ValueError(
                f"--held-out {self.held_out} is no domain of {self.data}; choose one of {', '.join(names)}"
            )
        num_meta_test, num_sources = getattr(self.hyperparameters, "num_held_out", 0), len(names) - 1
        if num_meta_test >= num_sources:
            raise ValueError(
                f"--num-held-out {num_meta_test} leaves none of the {num_sources} source domains of {self.data} for "
                "meta-train; choose a smaller number"
            )


METHODS = methods("domains", Config)


def about() -> dict[str, str]:
    """A line on each method for --help."""
    return {name: f"{CATALOGUE[name].title} ({CATALOGUE[name].reference})." for name in METHODS}


def with_paper_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    config = with_defaults(config, {"held_out": DOMAINS[config.data][-1]})
    name = f"{config.data}-{config.held_out}-{config.algorithm}-{config.seed}"
    return with_defaults(config, {"run_dir": Path(f"runs/domains-{name}")})


class Examples(NamedTuple):
    """The examples of one experiment: uint8 inputs [n, H, W, channels] and int32 targets [n] in each batch.

    Attributes:
      train: a batch of each source domain.
      val: the same, of other examples.
      test: the held-out domain.
    """

    train: list[Batch]
    val: list[Batch]
    test: Batch


def sources(config: Config) -> list[str]:
    """The names of the source domains."""
    return [name for name in DOMAINS[config.data] if name != config.held_out]


def rotate(images: np.ndarray, degrees: float) -> np.ndarray:
    """Turns uint8 images [..., H, W, channels] about their centres, by linear interpolation; new corners are 0."""
    return ndimage.rotate(images, degrees, axes=(-3, -2), reshape=False, order=1)


def rotated_omniglot(config: Config) -> Examples:
    """Characters of split "train" of Omniglot as classes, at the angles that are the domains.

    The parts are made of different drawings. All training drawings of a character are in every source domain.
    """
    images = omniglot.load("train", config.data_dir)
    if config.num_characters > len(images):
        raise ValueError(f"--num-characters {config.num_characters} exceeds the {len(images)} characters of the split")
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = images[rng.choice(len(images), config.num_characters, replace=False)]
    # Every character has its drawings in an order of its own.
    order = rng.permuted(np.tile(np.arange(chosen.shape[1]), (len(chosen), 1)), axis=1)
    drawings = np.take_along_axis(chosen, order[:, :, None, None, None], axis=1)
    ends = np.cumsum(list(NUM_DRAWINGS.values()))
    parts = dict(zip(NUM_DRAWINGS, np.split(drawings, ends[:-1], axis=1), strict=True))

    def domain(angle: str, part: str) -> Batch:
        turned = rotate(parts[part], float(angle))
        labels = np.repeat(np.arange(len(turned), dtype=np.int32), turned.shape[1])
        return Batch(turned.reshape(-1, *turned.shape[2:]), labels)

    return Examples(
        [domain(angle, "train") for angle in sources(config)],
        [domain(angle, "val") for angle in sources(config)],
        domain(config.held_out, "test"),
    )


def pacs(config: Config) -> Examples:
    """PACS at 32x32 pixels: all of the held-out domain, and the others divided at random into two parts.

    Raises:
      FileNotFoundError: if there is no pacs_32.npz.
      ValueError: if its content is another.
    """
    remedy = (
        "--data-dir or $MAML_JAX_PACKS. Its arrays are images uint8 [n, 32, 32, 3], domains [n] and labels [n], which "
        "index domain_names and class_names"
    )
    file = packs.find("pacs_32.npz", config.data_dir, remedy=remedy)
    arrays = ("images", "domains", "labels", "domain_names", "class_names")
    images, of_domain, labels, names, classes = runs.read_npz(file, arrays).values()
    if tuple(names) != DOMAINS["pacs"] or len(classes) != PACS_CLASSES or images.shape[1:] != INPUT_SHAPES["pacs"]:
        raise ValueError(
            f"{file} holds domains {', '.join(names)}, {len(classes)} classes and images {images.shape}; it must hold "
            f"{', '.join(DOMAINS['pacs'])}, {PACS_CLASSES} classes and [n, 32, 32, 3]"
        )
    for name, indices, count in (("domains", of_domain, len(names)), ("labels", labels, PACS_CLASSES)):
        is_index = indices.shape == (len(images),) and np.issubdtype(indices.dtype, np.integer)
        if not is_index or images.dtype != np.uint8 or set(np.unique(indices)) - set(range(count)):
            raise ValueError(
                f"{file} holds {images.dtype} images {list(images.shape)} and {indices.dtype} {name} "
                f"{list(indices.shape)}; it must hold uint8 images and as many {name}, integers below {count}"
            )
    rng = np.random.default_rng(SPLIT_SEED)
    train, val, test = [], [], None
    for index, name in enumerate(DOMAINS["pacs"]):
        # Drawn for every domain, so that a domain is divided in the same way whichever is held out.
        places = rng.permutation(np.flatnonzero(of_domain == index))
        num_val = int(PACS_VALIDATION_SHARE * len(places))
        parts = [
            Batch(images[part], labels[part].astype(np.int32)) for part in (places, places[num_val:], places[:num_val])
        ]
        if name == config.held_out:
            test = parts[0]
        else:
            train.append(parts[1])
            val.append(parts[2])
    return Examples(train, val, test)


READERS: dict[DataSet, Callable[[Config], Examples]] = {"rotated-omniglot": rotated_omniglot, "pacs": pacs}


def make_learner(config: Config) -> MetaLearner:
    """The algorithm on a network whose normalisation sees one example at a time.

    With statistics of a batch, the test would adapt the network to the held-out domain. The convolutions have stride
    2 on drawings, and are followed by pooling on photographs.
    """
    way = config.num_characters if config.data == "rotated-omniglot" else PACS_CLASSES
    norm = functools.partial(nn.GroupNorm, num_groups=1)
    if config.network == "mlp":
        model = models.mlp(features=(config.features, way), norm=norm)
    else:
        model = models.conv4(way=way, features=config.features, pooling=config.data == "pacs", norm=norm)
    return CATALOGUE[config.algorithm].build(Problem(model, losses.cross_entropy), config.hyperparameters)


@functools.partial(jax.jit, static_argnums=0)
def is_right(learner: MetaLearner, params: ArrayTree, examples: Batch) -> jax.Array:
    """[n], 1 for every example that is classified correctly, else 0. Each is classified on its own."""

    def of_one(example: Batch) -> jax.Array:
        one = jax.tree.map(lambda leaf: leaf[None], example)
        return losses.accuracy(learner.predict(params, scale_pixels(one.inputs)), one.targets)

    return jax.lax.map(of_one, examples, batch_size=100)


def score(learner: MetaLearner, params: ArrayTree, batch: Batch) -> np.ndarray:
    """[n], 1 for every example that is classified correctly, else 0."""
    return np.asarray(is_right(learner, jax.tree.map(np.asarray, params), batch), np.float64)


def training_of(config: Config, examples: Examples | None = None) -> Training:
    """What is trained, and how it is validated, at settings without gaps."""
    learner, examples = make_learner(config), examples or READERS[config.data](config)
    validation = joined(examples.val)
    return Training(
        learner,
        domains.make_sampler(examples.train, batch_size=config.shot),
        lambda params: float(score(learner, params, validation).mean()),
        data_digest=digest_of(examples),
    )


def digest_of(examples: Examples) -> str:
    """The checksum of the data of a run."""
    return runs.digest_of_batches((*examples.train, *examples.val, examples.test))


def joined(batches: list[Batch]) -> Batch:
    """All examples of several batches."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def run(config: Config) -> dict:
    """Trains, tests the state with the best validation accuracy, and returns the content of results.json.

    With several seeds it is the content of seeds.json.
    """
    config = with_paper_defaults(config)
    if config.seeds > 1:
        return seeds.run_seeds(run, training_of, config)
    examples = READERS[config.data](config)
    training, validation = training_of(config, examples), joined(examples.val)

    def test(params: ArrayTree) -> dict:
        return {
            "metrics": {"accuracy": intervals.mean_and_interval(score(training.learner, params, examples.test))},
            "source_validation": {"accuracy": intervals.mean_and_interval(score(training.learner, params, validation))},
        }

    with runs.open_run(config.run_dir, config, training.data_digest) as run_dir:
        trained = common.train(run_dir, config, training)
        what = "test drawings" if config.data == "rotated-omniglot" else "all examples"
        protocol = {
            "data": config.data,
            "held_out": config.held_out,
            "sources": sources(config),
            "shot": config.shot,
            "examples": len(examples.test.targets),
            "split": f"{what} of the held-out domain",
            "selection": "highest accuracy on validation examples of the source domains",
            "validation_examples": len(validation.targets),
            "selected_step": trained.best_step,
            "interval": "95 % over examples, Student's t",
            "normalisation": "each example alone",
        }
        results = runs.finish(run_dir, "domains", config, trained, protocol, lambda: test(trained.params))
        if jax.process_index() == 0:
            figures.learning_curves(
                run_dir / "figures" / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]}
            )
    show(results)
    return results


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner and the selected parameters of a run."""
    config = stored_config(METHODS, Path(run_dir))
    learner = make_learner(config)
    inputs = np.zeros((1, 1, *INPUT_SHAPES[config.data]), np.float32)
    return learner, common.load_params(config.run_dir, config, learner, inputs)


def show(results: dict) -> None:
    """Prints the accuracy on the held-out domain and on validation examples of the source domains."""
    protocol = results["protocol"]
    table = Table(title=f"{results['algorithm']}, {protocol['data']}: accuracy in %")
    for heading in ("domain", "examples", "accuracy"):
        table.add_column(heading, justify="right")
    rows = {
        f"{protocol['held_out']} (held out)": (protocol["examples"], results["metrics"]),
        "source domains, validation": (protocol["validation_examples"], results["source_validation"]),
    }
    for name, (count, metrics) in rows.items():
        accuracy = metrics["accuracy"]
        table.add_row(name, str(count), intervals.format_mean(accuracy["mean"][0], accuracy["ci95"][0], scale=100))
    console.print(table)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
