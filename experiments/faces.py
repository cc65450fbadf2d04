"""Verification in unseen domains: are two images of the same person, seen in a way that training never saw?

An embedding is trained on several domains, and tested by the cosines of pairs of images in domains that are held out.
Characters of Omniglot are the identities by default, and six renderings of them the domains; no face is needed. "orl"
are photographs of 40 people in the same renderings, and "folder" any folder DOMAIN/PERSON/IMAGE. MLDG holds out a
source domain in every meta-step, with the losses of MFR (Guo et al., 2020) or CDT (Faraki et al., 2021), and ERM trains
on all source domains at once with the same losses. Nobody who is tested was trained on.

The papers published neither code nor images, so no number of theirs can be compared with ours.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table
from scipy import ndimage

from experiments import common, figures, intervals, packs, runs, seeds, verification
from experiments.cli import RunConfig, check_counts, flag, main, with_defaults
from experiments.common import Training
from experiments.domains import rotate
from experiments.runs import console, stored_config
from maml_jax import CATALOGUE, DomainSplits, MetaLearner, Model, NoHyperparameters, erm, losses, mldg, models
from maml_jax.tasks import domains, image_files, omniglot
from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import ArrayTree, check_not_negative, check_positive

SIZE = 28
"""Height and width of all images."""
RENDERINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda images: images,
    "inverted": lambda images: 255 - images,
    "thick": lambda images: _thick(images),
    "turned": lambda images: rotate(images, 20.0),
    "edges": lambda images: _thick(images) - images,
    "coarse": lambda images: images[..., ::2, ::2, :].repeat(2, -3).repeat(2, -2),
}
"""The domains of characters and of ORL: what is done to uint8 images [..., H, W, 1]."""
HELD_OUT = ("edges", "coarse")
SPLIT_SEED = 0
"""Seed of the choice of identities, which is the same in every run."""
SHARES = {"train": 0.6, "val": 0.15}
"""The shares of the identities that are trained and validated on; the others are tested."""
MAX_TEST_IMAGES = 6
"""Images of an identity in the test, chosen at random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The settings of one run. None is published for these data."""

    experiment: ClassVar[str] = "faces"

    data: Literal["characters", "orl", "folder"] = "characters"
    """Characters of Omniglot as identities, photographs of 40 people, or your own folder DOMAIN/PERSON/IMAGE."""
    held_out: tuple[str, ...] = ()
    """The domains that are tested and never seen in training. By default edges and coarse; of a folder the last."""
    losses: Literal["mfr", "cdt"] = "mfr"
    """Hard pairs, soft classification and domain alignment; or triplets, soft classification and the triplets of one
    domain under the distances of another."""
    across_weight: float = 1.0
    """Weight of the loss between domains: of the alignment (mfr) or of the triplets under other distances (cdt)."""
    scale: float = 16.0
    """The soft classification multiplies cosines by it; 64 in MFR."""
    positive_threshold: float = 0.9
    """Pairs of one person below this cosine are hard, with --losses mfr."""
    negative_threshold: float = 0.1
    """Pairs of two people above this cosine are hard, with --losses mfr."""
    margin: float = 0.3
    """Margin of the triplet losses, with --losses cdt."""
    identities: int = 16
    """Identities of each source domain in a meta-step; at most 6 with --data orl."""
    shot: int = 2
    """Images of each identity in a meta-step, in each source domain."""
    query_shot: Annotated[int | None, tyro.conf.Suppress] = None
    meta_batch_size: int = 1
    """Episodes per meta-step. Each has a split of the source domains of its own."""
    num_meta_steps: int = 4000
    """Outer updates. A run may be continued with a larger number."""
    network: Literal["mlp", "conv4"] = "mlp"
    """One hidden layer of 256 units, or four convolutions of 32 filters; an embedding of 64 numbers after each."""
    eval_episodes: Annotated[int | None, tyro.conf.Suppress] = None
    val_every: int = 500
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 50
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""
    data_dir: Path | None = None
    """The folder DOMAIN/PERSON/IMAGE; for characters the tensorflow-datasets directory or the .npz made from it, by
    default $TFDS_DATA_DIR; for orl the directory of orl_faces_56x46.npz, by default $MAML_JAX_PACKS."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(self, identities=2, shot=2)
        for name in ("across_weight", "margin"):
            check_not_negative(flag(name), getattr(self, name))
        check_positive("--scale", self.scale)
        for name in ("positive_threshold", "negative_threshold"):
            if not -1.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{flag(name)} {getattr(self, name)} must be a cosine, in [-1, 1]")
        if self.data == "folder" and self.data_dir is None:
            raise ValueError("--data folder needs the folder by --data-dir")
        if self.data != "folder":
            for name in self.held_out:
                if name not in RENDERINGS:
                    raise ValueError(f"--held-out {name} is no domain; choose among {', '.join(RENDERINGS)}")


METHODS = {
    "erm": Config(algorithm="erm", hyperparameters=NoHyperparameters()),
    "mldg": Config(algorithm="mldg", hyperparameters=DomainSplits(inner_lr=0.1)),
}


def about() -> dict[str, str]:
    """A line on each method for --help."""
    return {
        name: f"{CATALOGUE[name].title} ({CATALOGUE[name].reference}) with the losses of --losses." for name in METHODS
    }


def with_paper_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    if not config.held_out:
        names = folder_domains(config.data_dir)[-1:] if config.data == "folder" else HELD_OUT
        config = dataclasses.replace(config, held_out=tuple(names))
    name = f"{config.data}-{config.losses}-{config.algorithm}-{config.seed}"
    return with_defaults(config, {"run_dir": Path(f"runs/faces-{name}")})


class Examples(NamedTuple):
    """The images of one experiment: of each domain a list of identities, each uint8 [n, SIZE, SIZE, 1].

    Attributes:
      train: by source domain.
      val: the same, of other identities.
      test: by held-out domain, of other identities again.
    """

    train: dict[str, list[np.ndarray]]
    val: dict[str, list[np.ndarray]]
    test: dict[str, list[np.ndarray]]


def _thick(images: np.ndarray) -> np.ndarray:
    """Lines that are one pixel wider on each side."""
    size = (1,) * (images.ndim - 3) + (3, 3, 1)
    return ndimage.grey_dilation(images, size=size)


def rendered(images: np.ndarray, held_out: Sequence[str]) -> Examples:
    """Identities [I, n, SIZE, SIZE, 1] in the renderings that are the domains.

    The training identities are divided over the source domains, so that no one is in two of them.

    Raises:
      ValueError: if no source domain is left.
    """
    sources = [name for name in RENDERINGS if name not in held_out]
    if not sources:
        raise ValueError(f"--held-out {' '.join(held_out)} leaves no source domain; hold out fewer")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    ends = np.cumsum([int(share * len(images)) for share in SHARES.values()])
    train, val, test = np.split(order, ends)
    return Examples(
        {
            name: list(RENDERINGS[name](images[part]))
            for name, part in zip(sources, np.array_split(train, len(sources)), strict=True)
        },
        {name: list(RENDERINGS[name](images[val])) for name in sources},
        {name: list(RENDERINGS[name](images[test])) for name in held_out},
    )


def folder_domains(directory: Path) -> list[str]:
    """The names of the domains of a folder, sorted.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it has fewer than two domains.
    """
    found = [folder.name for folder in image_files.list_folder(directory).folders]
    if len(found) < 2:
        raise ValueError(f"{directory} holds {len(found)} folders; it needs one for each of at least two domains")
    return found


def of_folder(directory: Path, held_out: Sequence[str]) -> Examples:
    """The images of a folder DOMAIN/PERSON/IMAGE, grey and resized.

    A person is trained on, validated on or tested, whatever the domain. The test has all people of a held-out domain
    who are in no source domain. If they are less than a fifth, others are taken out of the source domains. A fifth of
    the people of each source domain are validated on.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if a domain does not exist or has too few people, a person has one image, or an image cannot be read.
    """
    names = folder_domains(directory)
    for name in held_out:
        if name not in names:
            raise ValueError(f"--held-out {name} is no domain of {directory}; choose among {', '.join(names)}")
    sources = [name for name in names if name not in held_out]
    if not sources:
        raise ValueError(f"--held-out {' '.join(held_out)} leaves no source domain of {directory}; hold out fewer")
    people = {name: _people_of(directory / name) for name in names}
    rng, of_sources = np.random.default_rng(SPLIT_SEED), set().union(*(people[name] for name in sources))
    test, val = {person for name in held_out for person in people[name]} - of_sources, set()
    for chosen, of_part in ((test, held_out), (val, sources)):
        for name in of_part:
            missing = max(2, len(people[name]) // 5) - len(people[name].keys() & chosen)
            left = sorted(people[name].keys() - test - val)
            chosen.update(rng.permutation(left)[: max(0, missing)])
    parts = {
        "train": {name: people[name].keys() - test - val for name in sources},
        "val": {name: people[name].keys() & val for name in sources},
        "test": {name: people[name].keys() & test for name in held_out},
    }
    for part, of_domains in parts.items():
        for name, found in of_domains.items():
            if len(found) < 2:
                raise ValueError(
                    f"{directory / name} holds {len(people[name])} people, of whom {len(found)} are left for {part}; "
                    "training, validation and test need at least 2 people each, and nobody is in two of them"
                )
    return Examples(
        *(
            {name: [people[name][person] for person in sorted(found)] for name, found in of_domains.items()}
            for of_domains in parts.values()
        )
    )


def _people_of(domain: Path) -> dict[str, np.ndarray]:
    """The images of each person of a domain."""
    found = {}
    for person in image_files.list_folder(domain).folders:
        files = image_files.image_files(person)
        if len(files) < 2:
            raise ValueError(f"{person} holds one image; a person needs at least two, or remove the folder")
        contents = ((str(file), file.read_bytes()) for file in files)
        found[person.name] = np.stack(list(image_files.decode_images(contents, SIZE, colour=False)))
    if not found:
        raise ValueError(f"{domain} holds no folder of a person; every domain needs some")
    return found


def examples_of(config: Config) -> Examples:
    """Reads the data of some settings without gaps."""
    if config.data == "folder":
        found = of_folder(config.data_dir, config.held_out)
    else:
        found = rendered(_identities(config), config.held_out)
    smallest = min(map(len, found.train.values()))
    if config.identities > smallest:
        raise ValueError(
            f"--identities {config.identities} exceeds the {smallest} training identities of a source domain of "
            f"{config.data}; choose a smaller number"
        )
    fewest = min(len(images) for people in found.train.values() for images in people)
    if config.shot > fewest:
        raise ValueError(
            f"--shot {config.shot} exceeds the {fewest} images of a training identity of {config.data}; choose a "
            "smaller number"
        )
    num_sources, num_meta_test = len(found.train), getattr(config.hyperparameters, "num_held_out", 0)
    if num_meta_test >= num_sources:
        raise ValueError(
            f"--num-held-out {num_meta_test} leaves none of the {num_sources} source domains for meta-train; choose a "
            "smaller number, or let --held-out have fewer domains"
        )
    if num_sources < 2 and (config.losses == "cdt" or config.across_weight):
        without = "" if config.losses == "cdt" else ", or set --across-weight 0"
        raise ValueError(
            f"--held-out leaves the one source domain {next(iter(found.train))}, and the losses between domains need "
            f"two; let it have fewer domains{without}"
        )
    if config.losses == "mfr" and config.across_weight and num_sources - num_meta_test < 2:
        raise ValueError(
            f"--num-held-out {num_meta_test} leaves one of the {num_sources} source domains for meta-train, where the "
            "loss between domains needs two; choose a smaller number, let --held-out have fewer domains, or set "
            "--across-weight 0"
        )
    return found


def _identities(config: Config) -> np.ndarray:
    """The images [I, n, SIZE, SIZE, 1] of the characters or people that are rendered."""
    if config.data == "characters":
        return np.concatenate([omniglot.load(split, config.data_dir) for split in ("train", "val", "test")])
    data = packs.load("faces", config.data_dir, remedy="--data-dir or $MAML_JAX_PACKS")
    fitted = packs.fitted(data.images, (SIZE, SIZE, 1))
    return np.stack([fitted[data.labels == label] for label in np.unique(data.labels)])


def make_model(config: Config) -> Model:
    """The embedding; its normalisation sees one image at a time."""
    norm = functools.partial(nn.GroupNorm, num_groups=1)
    if config.network == "mlp":
        return models.mlp(features=(256, 64), norm=norm)
    return models.conv4(way=64, features=32, norm=norm)


def make_learner(config: Config) -> MetaLearner:
    """MLDG or ERM with the losses of the settings."""
    soft = losses.soft_classification(config.scale)
    weight = config.across_weight
    if config.losses == "mfr":
        thresholds = {name: getattr(config, name) for name in ("positive_threshold", "negative_threshold")}
        pairs = losses.hard_pair_attention(**thresholds)
        across_fn, held_out_fn = lambda outputs, targets: weight * losses.domain_alignment(outputs), None
    else:
        pairs, crossed = losses.triplet(config.margin), losses.cross_domain_triplet(config.margin)

        def held_out_fn(outputs, targets, train_outputs, train_targets):
            each = jax.vmap(lambda x, y: crossed(x, y, train_outputs, train_targets))
            return weight * jnp.mean(each(outputs, targets))

        def across_fn(outputs, targets):
            # Every domain under the distances of each other one.
            count = len(targets)
            others = (jnp.arange(count)[:, None] + jnp.arange(1, count)[None, :]) % count
            each = jax.vmap(lambda x, y, other: crossed(x, y, outputs[other], targets[other]))
            return weight * jnp.mean(each(outputs, targets, others))

    def loss_fn(outputs, targets):
        return pairs(outputs, targets) + soft(outputs, targets)

    model, settings = make_model(config), config.hyperparameters
    if config.algorithm == "erm":
        return erm(model, loss_fn, across_fn=across_fn)
    return mldg(
        model,
        loss_fn,
        inner_optimizer=settings.rule(),
        beta=settings.beta,
        num_held_out=settings.num_held_out,
        # The distances of CDT are those of other domains, and only the meta-test domains have triplets under them.
        across_fn=across_fn if config.losses == "mfr" else None,
        held_out_fn=held_out_fn,
        inner_grad=settings.inner_grad,
    )


def images_per_identity(identities: Sequence[np.ndarray]) -> int:
    """The images of every identity in a test: as many as the one with the fewest has, at most `MAX_TEST_IMAGES`."""
    return min(MAX_TEST_IMAGES, *map(len, identities))


def embed(learner: MetaLearner | None, params: ArrayTree, identities: Sequence[np.ndarray]) -> np.ndarray:
    """[I, n, C], the embeddings of as many images of every identity; the pixels without a learner.

    The images are chosen at random, and are the same in every call.
    """
    count = images_per_identity(identities)
    # Drawings of a character are stored in the order of their pixels, and the first ones would be too much alike.
    rng = np.random.default_rng(SPLIT_SEED)
    images = np.stack([images[rng.permutation(len(images))[:count]] for images in identities])
    flat = images.reshape(-1, *images.shape[2:])
    if learner is None:
        return np.asarray(scale_pixels(flat)).reshape(*images.shape[:2], -1)
    return np.asarray(_embed(learner, params, flat)).reshape(*images.shape[:2], -1)


@functools.partial(jax.jit, static_argnums=0)
def _embed(learner: MetaLearner, params: ArrayTree, images: jax.Array) -> jax.Array:
    return jax.lax.map(lambda image: learner.predict(params, scale_pixels(image[None]))[0], images, batch_size=500)


def validation_pairs(learner: MetaLearner | None, params: ArrayTree, examples: Examples) -> list[verification.Pairs]:
    """The pairs of the validation identities of each source domain."""
    return [verification.pairs_of(embed(learner, params, people)) for people in examples.val.values()]


def validation_score(learner: MetaLearner, params: ArrayTree, examples: Examples) -> float:
    """The mean over source domains of the true accept rate at a false accept rate of 1 %, on unseen identities."""
    rates = [
        verification.true_accept_rates(pairs, verification.threshold_at(pairs, 0.01)).mean()
        for pairs in validation_pairs(learner, params, examples)
    ]
    return float(np.mean(rates))


def training_of(config: Config, examples: Examples | None = None) -> Training:
    """What is trained, and how it is validated, at settings without gaps."""
    learner, examples = make_learner(config), examples or examples_of(config)
    sampler = domains.make_identity_sampler(
        list(examples.train.values()), num_identities=config.identities, num_images=config.shot
    )
    images = [people for part in examples for people in part.values()]
    return Training(
        learner,
        sampler,
        lambda params: validation_score(learner, params, examples),
        data_digest=runs.digest(images),
    )


def test(config: Config, learner: MetaLearner, params: ArrayTree, examples: Examples) -> dict[str, Any]:
    """The true accept rates in every held-out domain, with those of the pixels beside them."""
    found: dict[str, Any] = {"evaluations": []}
    for name, of_method in {"embedding": learner, "pixels": None}.items():
        thresholds = [verification.best_threshold(p) for p in validation_pairs(of_method, params, examples)]
        for domain, people in examples.test.items():
            pairs = verification.pairs_of(embed(of_method, params, people))
            row = verification.tested(pairs, float(np.mean(thresholds)))
            row |= {"images_per_identity": images_per_identity(people)}
            found["evaluations"].append({"by": name, "domain": domain, "identities": len(people)} | row)
    first = found["evaluations"][0]["metrics"]
    return {"metrics": {name: first[name] for name in ("tar_at_0.01", "tar_at_0.001")}} | found


def run(config: Config) -> dict[str, Any]:
    """Trains, tests the state with the best validation score, and returns the content of results.json.

    With several seeds it is the content of seeds.json.
    """
    config = with_paper_defaults(config)
    if config.seeds > 1:
        return seeds.run_seeds(run, training_of, config)
    examples = examples_of(config)
    training = training_of(config, examples)
    with runs.open_run(config.run_dir, config, training.data_digest) as run_dir:
        trained = common.train(run_dir, config, training)
        protocol = {
            "data": config.data,
            "sources": list(examples.train),
            "held_out": list(config.held_out),
            "training_identities": sum(map(len, examples.train.values())),
            "episodes": sum(map(len, examples.test.values())),
            "split": "unseen identities in held-out domains",
            "selection": "highest true accept rate on unseen identities of the source domains",
            "selected_step": trained.best_step,
            "interval": "95 % over identities, Student's t",
            "normalisation": "each image alone",
        }
        results = runs.finish(
            run_dir,
            "faces",
            config,
            trained,
            protocol,
            lambda: test(config, training.learner, trained.params, examples),
        )
        if jax.process_index() == 0:
            drawn = run_dir / "figures"
            figures.roc(drawn / "roc.png", curves_of({config.algorithm: [results]}))
            figures.learning_curves(drawn / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]})
    show(results)
    return results


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner and the selected parameters of a run."""
    config = stored_config(METHODS, Path(run_dir))
    learner = make_learner(config)
    inputs = np.zeros((1, 1, SIZE, SIZE, 1), np.float32)
    return learner, common.load_params(config.run_dir, config, learner, inputs)


def curves_of(groups: dict[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, np.ndarray]]:
    """By domain and label, the mean over seeds of the true accept rates at `verification.ROC_POINTS`."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for label, results in groups.items():
        for index, row in enumerate(results[0]["evaluations"]):
            name = label if row["by"] == "embedding" else row["by"]
            found.setdefault(row["domain"], {})[name] = np.mean([r["evaluations"][index]["roc"] for r in results], 0)
    return found


def show(results: dict[str, Any]) -> None:
    """Prints the true accept rates in every held-out domain."""
    config = results["config"]
    table = Table(title=f"{results['algorithm']}, losses of {config['losses']}, {config['data']}: verification in %")
    for heading in ("domain", "identities", "by", "TAR at FAR 1 %", "TAR at FAR 0.1 %", "balanced accuracy"):
        table.add_column(heading, justify="right")
    for row in results["evaluations"]:
        metrics = row["metrics"]
        rates = [
            intervals.format_mean(
                metrics[f"tar_at_{rate:g}"]["mean"][0], metrics[f"tar_at_{rate:g}"]["ci95"][0], scale=100
            )
            for rate in verification.FALSE_ACCEPT_RATES
        ]
        accuracy = f"{100 * metrics['balanced_accuracy']:.2f}"
        table.add_row(row["domain"], str(row["identities"]), row["by"], *rates, accuracy)
    console.print(table)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
