"""Tests trained learners on data sets of several kinds, with unbalanced episodes of many sizes: Meta-Dataset in small.

An episode has 5 to 20 classes and 1 to 20 support images of each, more of one class than of another. All learners see
the same episodes, of characters, digits, faces, objects, traffic signs, textures and photographs, whatever they were
trained on. The result is an accuracy for each learner and data set, and the average of the learner's ranks.

Methods whose parameters do not depend on the number of classes are tested as they are. A learner with a last layer of N
outputs uses the first ones, which are exchangeable because training shuffles the labels, in tasks of up to N classes.
Give --ways 5 for tasks that a learner of 5 classes can do. What cannot be tested is listed with the reason.

The episodes follow section 3.2 of Triantafillou et al., 2020, https://arxiv.org/abs/1903.03096, with smaller bounds:
see `maml_jax.tasks.variable`. Omniglot has no hierarchy of alphabets here.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit

from experiments import classification, figures, intervals, packs, runs
from experiments.cli import OptionalPath, Precision, check_run_dir, check_seed, main
from experiments.runs import RunError, console
from maml_jax import CATALOGUE, Model, ensemble, losses
from maml_jax.algorithms.classifier import Head, PretrainedHead, pretrained_classifier
from maml_jax.portable import build_learner, load_learner
from maml_jax.tasks import variable
from maml_jax.types import (
    ArrayTree,
    Batch,
    MetaLearner,
    PRNGKey,
    check_integer,
    learner_at,
    predict_beside_support,
)

MIN_EXAMPLES = 10
"""Classes with fewer images, or fewer groups of near copies, are left out: nine of the traffic signs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tested on what."""

    experiment: ClassVar[str] = "cross_domain"
    learners: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN-OR-FILE [RUN-OR-FILE ...]", help_behavior_hint="(required)"),
    ]
    """Run directories of experiments.omniglot or images, and files of experiments.export (.npz)."""
    data_sets: tuple[packs.Name, ...] = packs.NAMES
    """The data sets. All but Omniglot are read from --packs-dir."""
    ways: tuple[int, ...] = (5, 10, 20)
    """The numbers of classes that an episode may have. More of them take longer: each has programs of its own."""
    episodes: int = 600
    """Episodes of each data set."""
    heads: tuple[Head, ...] = ("neighbour", "centroid", "linear")
    """How a pretrained classifier is tested; fine-tuned is slow."""
    seed: int = 0
    """Seed of the episodes."""
    packs_dir: OptionalPath = None
    """The directory of the packs; by default $MAML_JAX_PACKS."""
    data_dir: OptionalPath = None
    """Where Omniglot is, as in experiments.omniglot; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""
    run_dir: OptionalPath = None
    """Where results.json and the figure are written; by default runs/cross-domain-SEED."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        if not self.learners:
            raise ValueError("no learner is given; name run directories or .npz files")
        for name in ("learners", "data_sets", "ways", "heads"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name.replace('_', '-')} must hold something, and nothing twice")
        check_run_dir(self.run_dir)
        check_integer("--episodes", self.episodes, at_least=2)
        check_seed(self.seed)
        for way in self.ways:
            check_integer("--ways", way, at_least=2)


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      label: its name in the table.
      source: the run directory or file; None for the baseline.
      algorithm: its name in the catalogue, or "pixels".
      input_shape: [H, W, channels].
      training: what it was trained on.
      normalisation: how the test normalises.
      way: N, the number of classes of its training; None if the parameters do not depend on it.
      is_fixed: whether an episode must have exactly N classes. Otherwise it may have fewer.
      at: `(way) -> (learner, params)`, always the same learner for one way.
      is_stochastic: whether `adapt` gets the key of the episode.
      one_query_at_a_time: whether each query has only the support set beside it.
      reason: why it cannot be tested at all; None if it can.
    """

    label: str
    source: str | None
    algorithm: str
    input_shape: tuple[int, int, int]
    training: str
    normalisation: str
    way: int | None
    is_fixed: bool
    at: Callable[[int], tuple[MetaLearner, ArrayTree]]
    is_stochastic: bool = False
    one_query_at_a_time: bool = False
    reason: str | None = None

    def refusal(self, ways: Sequence[int]) -> str | None:
        """Why it cannot be tested on episodes of these numbers of classes; None if it can."""
        if self.reason is not None or self.way is None:
            return self.reason
        if self.is_fixed:
            return None if set(ways) == {self.way} else f"{self.way} ways only"
        return None if max(ways) <= self.way else f"up to {self.way} ways only"


def methods_of(path: Path, heads: Sequence[Head] = ("centroid",), name: str | None = None) -> list[Method]:
    """The rows of a run directory or of a file.

    Args:
      path: the run directory or file.
      heads: those of a pretrained classifier that are tested.
      name: what it is called in the table; by default its `short_names`.

    Raises:
      FileNotFoundError: if there is neither.
      RunError: if the directory is no run of an experiment that classifies images, or holds no selected parameters.
      ValueError: if the file cannot be used.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; give a run directory, or an .npz file of experiments.export")
    (name,) = short_names([path]) if name is None else (name,)
    return _methods_of_run(path, heads, name) if path.is_dir() else _methods_of_file(path, heads, name)


def short_names(paths: Sequence[Path]) -> list[str]:
    """What run directories and files are called: their names, with as many of their folders as tell them apart."""
    plain = [path if path.is_dir() else path.with_suffix("") for path in paths]
    for depth in range(1, max(len(path.parts) for path in plain) + 1):
        names = ["/".join(path.parts[-depth:]) for path in plain]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _methods_of_run(run_dir: Path, heads: Sequence[Head], name: str) -> list[Method]:
    module = runs.experiment_of(run_dir)
    if not hasattr(module, "DATA"):
        raise RunError(f"{run_dir} is a run of {module.__name__}, which does not classify images of new classes")
    data, config = module.DATA, runs.stored_config(module.METHODS, run_dir)
    shot = config.train_shot or config.shot
    of_classes = f"{config.train_way or config.way}-way {shot}-shot"
    if config.algorithm == "pretrained-classifier":
        of_classes = "all training classes"
    rows = functools.partial(
        _rows,
        path=run_dir,
        name=name,
        algorithm=config.algorithm,
        heads=heads,
        input_shape=data.input_shape(config),
        training=f"{data.title}, {of_classes}, {config.num_meta_steps} meta-steps",
        normalisation=classification.normalisation(config),
        way=config.way,
        one_query_at_a_time=config.inductive,
    )
    if config.network == "features":
        return rows(build=None, expected=None, params=None, reason="takes embeddings and no images")
    _, params = classification.load(data, run_dir)

    def build(way: int, head: Head | None) -> MetaLearner:
        learner = classification.make_tester(config, way, **({} if head is None else {"head": head}))
        return ensemble(learner) if config.ensemble > 1 else learner

    def expected(way: int) -> MetaLearner:
        learner = classification.make_learner(config, way=way, population=config.population)
        return learner_at(learner, config.num_meta_steps)

    return rows(build=build, expected=expected, params=params)


def _methods_of_file(file: Path, heads: Sequence[Head], name: str) -> list[Method]:
    _, params, config = load_learner(file)

    def build(way: int, head: Head | None) -> MetaLearner:
        changed: dict[str, Any] = {"way": way}
        if head is not None:
            changed["hyperparameters"] = dict(config.hyperparameters) | {"head": head}
            changed["inner_steps"] = PretrainedHead(**changed["hyperparameters"]).num_head_steps
        return build_learner(dataclasses.replace(config, **changed))

    def expected(way: int) -> MetaLearner:
        inner_steps = config.hyperparameters.get("num_inner_steps") if config.inner_steps is not None else None
        return build_learner(dataclasses.replace(config, way=way, inner_steps=inner_steps))

    return _rows(
        path=file,
        name=name,
        algorithm=config.algorithm,
        heads=heads,
        input_shape=config.input_shape,
        training=config.made_by or "not stated",
        normalisation="statistics of training images" if config.norm == "population" else "transductive",
        way=config.way,
        one_query_at_a_time=False,
        build=build,
        expected=expected,
        params=params,
    )


def _rows(
    *,
    path: Path,
    name: str,
    algorithm: str,
    heads: Sequence[Head],
    way: int,
    build: Callable[[int, Head | None], MetaLearner] | None,
    expected: Callable[[int], MetaLearner] | None,
    params: ArrayTree,
    **described: Any,
) -> list[Method]:
    """The rows of one training: one for each head of a pretrained classifier, else one.

    Args:
      path: the run directory or file.
      name: what it is called in the table.
      algorithm: its name in the catalogue.
      heads: those of a pretrained classifier that are tested.
      way: the number of classes of the training.
      build: `(way, head) -> learner` of the test.
      expected: `(way) -> learner` whose parameters have the shapes that `build` needs.
      params: the trained parameters.
      **described: other attributes of `Method`.
    """
    entry, methods = CATALOGUE[algorithm], []
    for head in heads if algorithm == "pretrained-classifier" else (None,):

        @functools.cache
        def at(number: int, head: Head | None = head) -> tuple[MetaLearner, ArrayTree]:
            learner = build(number, head)
            if entry.any_way or number == way:
                return learner, params
            return learner, first_columns(params, expected(number), described["input_shape"], way, number)

        methods.append(
            Method(
                label=f"{entry.title}{'' if head is None else f', {head}'} ({name})",
                source=str(path),
                algorithm=algorithm,
                way=None if entry.any_way else way,
                is_fixed=entry.classifies,
                at=at,
                is_stochastic=entry.classifies,
                **described,
            )
        )
    return methods


def first_columns(
    params: ArrayTree, learner: MetaLearner, input_shape: tuple[int, ...], trained_way: int, way: int
) -> ArrayTree:
    """The parameters of a learner of N classes, for a task of fewer.

    Of every axis that counts classes the first entries stay, as if the last layer had never had the other outputs.

    Args:
      params: those of the learner of N classes; with a leading axis for the members of an ensemble.
      learner: the same method for the smaller number of classes.
      input_shape: [H, W, channels].
      trained_way: N.
      way: the smaller number.

    Raises:
      ValueError: if `way` is larger than N, or the parameters differ in anything but axes that count classes.
    """
    if way > trained_way:
        raise ValueError(
            f"way={way} exceeds the {trained_way} outputs of the last layer; train with --way {way}, or give smaller "
            "--ways"
        )
    inputs = jax.ShapeDtypeStruct((way, *input_shape), jnp.float32)
    wanted = jax.eval_shape(learner.init, jax.random.key(0), inputs)

    def cut(leaf, want):
        extra = jnp.ndim(leaf) - len(want.shape)
        sizes = list(zip(jnp.shape(leaf)[extra:], want.shape, strict=True))
        if wrong := [size for size in sizes if size[0] != size[1] and size != (trained_way, way)]:
            raise ValueError(f"an axis of {wrong[0][0]} entries cannot be cut to {wrong[0][1]}; it counts no classes")
        return leaf[(slice(None),) * extra + tuple(slice(size) for size in want.shape)]

    return jax.tree.map(cut, params, wanted)


def pixels(input_shape: tuple[int, int, int]) -> Method:
    """The baseline without training: the support image with the largest cosine of the pixels."""
    identity = Model(lambda key, inputs: {}, lambda params, inputs: inputs.reshape(len(inputs), -1))

    @functools.cache
    def at(way: int) -> tuple[MetaLearner, ArrayTree]:
        learner = pretrained_classifier(identity, losses.cross_entropy, num_classes=1, way=way, head="neighbour")
        return learner, learner.init(jax.random.key(0), jnp.zeros((1, *input_shape)))

    height, width, channels = input_shape
    kind = f"{height}x{width} {'grey' if channels == 1 else 'colour'}"
    return Method(f"nearest pixels, {kind}", None, "pixels", input_shape, "nothing", "none", None, False, at)


@functools.partial(jax.jit, static_argnums=(0, 1))
def accuracy(
    learner: MetaLearner,
    one_query_at_a_time: bool,
    params: ArrayTree,
    support: Batch,
    query: Batch,
    key: PRNGKey | None,
) -> jax.Array:
    """The share of queries that are classified correctly; not a number if an output is not."""
    task_params, _ = learner.adapt(params, support, key=key)
    if one_query_at_a_time:
        outputs = predict_beside_support(learner.predict, task_params, support.inputs, query.inputs)
    else:
        outputs = learner.predict(task_params, query.inputs)
    return losses.accuracy(outputs, query.targets)


def score(method: Method, selection: variable.Selection, images: np.ndarray) -> jax.Array:
    """The accuracy of a method on one episode. Each combination of shapes is compiled once."""
    learner, params = method.at(len(selection.classes))
    support, query, key = selection.episode(images)
    return accuracy(learner, method.one_query_at_a_time, params, support, query, key if method.is_stochastic else None)


def ranks(accuracies: np.ndarray) -> np.ndarray:
    """The ranks of methods on one data set; those that the episodes do not tell apart share a rank.

    The best method opens a group. In the order of their means, the next ones belong to it until one is worse: the 95 %
    interval of the mean difference to the best one, over the same episodes by Student's t, does not hold 0. That one
    opens the next group. Each method of a group has the mean of the places of the group.

    Args:
      accuracies: [R, E], of R methods on the same E episodes.

    Returns:
      [R], 1 for the best.
    """
    num_methods, num_episodes = accuracies.shape
    order = np.argsort(-accuracies.mean(1), kind="stable")
    quantile = stdtrit(num_episodes - 1, 0.975)
    found, start = np.zeros(num_methods), 0
    while start < num_methods:
        gaps = accuracies[order[start]] - accuracies[order[start:]]
        is_worse = gaps.mean(1) > quantile * gaps.std(1, ddof=1) / np.sqrt(num_episodes)
        size = int(is_worse.argmax()) if is_worse.any() else len(is_worse)
        found[order[start : start + size]] = start + (size + 1) / 2
        start += size
    return found


def as_metric(accuracies: np.ndarray) -> dict[str, Any]:
    """The mean and its 95 % interval over episodes [E], by Student's t, in lists of one number.

    An episode whose outputs are not finite counts as 0, because nothing in it is classified, and is counted.
    """
    content = intervals.mean_and_interval(np.nan_to_num(accuracies, nan=0.0))
    bad = int(np.isnan(accuracies).sum())
    return content | ({"num_nonfinite": [bad]} if bad else {})


def run(config: Config) -> dict:
    """Tests every method on every data set, and returns the content of results.json.

    A finished test is shown and not repeated.

    Raises:
      RunError: if no learner can be tested, or the directory holds a test of other learners or settings.
    """
    config = dataclasses.replace(config, run_dir=config.run_dir or Path(f"runs/cross-domain-{config.seed}"))
    given = zip(config.learners, short_names(config.learners), strict=True)
    methods = [method for path, name in given for method in methods_of(path, config.heads, name)]
    if all(method.reason is not None for method in methods):
        raise RunError(f"none of the learners can be tested: {methods[0].label} {methods[0].reason}")
    methods += [pixels(shape) for shape in dict.fromkeys(m.input_shape for m in methods if m.reason is None)]
    data_sets = {name: packs.load(name, config.packs_dir, config.data_dir) for name in config.data_sets}
    selectors = {
        name: variable.make_selector(data.labels, groups=data.groups, min_examples=MIN_EXAMPLES, ways=config.ways)
        for name, data in data_sets.items()
    }
    learners = digest_of(methods)
    data_digest = runs.digest(
        [data.images[data.labels == label] for label in np.unique(data.labels)] for data in data_sets.values()
    )
    with runs.open_run(config.run_dir, config, data_digest) as run_dir:
        if (results := runs.read_results(run_dir)) is not None:
            if results.get("learners_sha256") != learners:
                raise RunError(
                    f"{run_dir} holds a test of other learners: those at {', '.join(map(str, config.learners))} have "
                    "changed since; choose another --run-dir"
                )
            draw(run_dir / "figures" / "accuracy.png", results)
            show(results)
            return results
        found, seconds = {}, 0.0
        for name, data in data_sets.items():
            file = run_dir / f"measured_{name}.json"
            kept = runs.read_record(file) if file.exists() else {}
            if kept.get("learners_sha256") != learners:
                start = time.perf_counter()
                accuracies = measure(config, name, data, selectors[name], methods)
                kept = {"learners_sha256": learners, "seconds": time.perf_counter() - start}
                kept["accuracies"] = {str(index): values.tolist() for index, values in accuracies.items()}
                runs.write_json(file, kept)
            # null, which stands for a number that is not finite, becomes NaN
            found[name] = {int(index): np.asarray(values, np.float64) for index, values in kept["accuracies"].items()}
            seconds += kept["seconds"]
        results = summary(config, methods, data_sets, selectors, found)
        results |= {"learners_sha256": learners, "versions": runs.versions(), "seconds": {"eval": seconds}}
        results = runs.finite(results | {"device": runs.device_name()})
        runs.write_json(run_dir / "results.json", results)
        for name in data_sets:
            (run_dir / f"measured_{name}.json").unlink()
        draw(run_dir / "figures" / "accuracy.png", results)
    show(results)
    return results


def digest_of(methods: Sequence[Method]) -> str:
    """A checksum of the parameters of the methods that can be tested."""
    params = (method.at(method.way or 2)[1] for method in methods if method.reason is None)
    return runs.digest([np.asarray(leaf)[None] for leaf in jax.tree.leaves(of_method)] for of_method in params)


def measure(
    config: Config, name: packs.Name, data: packs.DataSet, selector: variable.Selector, methods: Sequence[Method]
) -> dict[int, np.ndarray]:
    """The accuracies [E] on the episodes of one data set, by the index of the method, of those that can be tested."""
    key = jax.random.fold_in(runs.streams(config.seed).test, packs.NAMES.index(name))
    selections = [selector(jax.random.fold_in(key, index)) for index in range(config.episodes)]
    images, accuracies = {}, {}
    for index, method in enumerate(methods):
        if method.refusal(selector.ways) is None:
            start, shape = time.perf_counter(), method.input_shape
            images[shape] = images[shape] if shape in images else packs.fitted(data.images, shape)
            scores = [score(method, selection, images[shape]) for selection in selections]
            accuracies[index] = np.asarray(scores, np.float64)
            metric = as_metric(accuracies[index])
            mean = intervals.format_mean(metric["mean"][0], metric["ci95"][0], scale=100)
            said = f"{name}: {method.label}: {mean} % in {time.perf_counter() - start:.0f} s"
            console.print(said, highlight=False, markup=False)
    return accuracies


def summary(
    config: Config,
    methods: Sequence[Method],
    data_sets: dict[packs.Name, packs.DataSet],
    selectors: dict[packs.Name, variable.Selector],
    found: dict[packs.Name, dict[int, np.ndarray]],
) -> dict[str, Any]:
    """What results.json says of the test: the protocol, the data sets and a record for each method."""
    complete = [index for index in range(len(methods)) if all(index in of_set for of_set in found.values())]
    places = {
        name: dict(zip(complete, ranks(np.nan_to_num([of_set[index] for index in complete])), strict=True))
        for name, of_set in found.items()
        if complete
    }
    records = []
    for index, method in enumerate(methods):
        record = {
            "label": method.label,
            "source": method.source,
            "algorithm": method.algorithm,
            "training": method.training,
            "normalisation": method.normalisation,
            "input_shape": list(method.input_shape),
            "average_rank": float(np.mean([of[index] for of in places.values()])) if index in complete else None,
            "data_sets": {},
        }
        for name, of_set in found.items():
            if index not in of_set:
                record["data_sets"][name] = {"not_tested": method.refusal(selectors[name].ways)}
                continue
            rank = {"rank": places[name][index]} if index in complete else {}
            record["data_sets"][name] = {"accuracy": as_metric(of_set[index])} | rank
        records.append(record)
    return {
        "experiment": config.experiment,
        "config": runs.as_json(config),
        "protocol": {
            "episodes": config.episodes,
            "way": "uniform over the listed ways",
            "shot": "1 to 20, unbalanced, at most 200 support images; as Triantafillou et al., 2020, section 3.2, "
            "with smaller bounds",
            "query": "balanced",
            "min_examples": MIN_EXAMPLES,
            "images": "grey by luminance or three equal channels, resized to the learner's input, never inverted",
            "ranks": "by data set, among the methods tested on all; equal if the paired 95 % interval holds 0",
            "not_finite": "an episode whose outputs are not finite counts as accuracy 0",
        },
        "data_sets": {
            name: {
                "about": data.about,
                "classes": len(selectors[name].classes),
                "images": int(np.isin(data.labels, selectors[name].classes).sum()),
                "ways": list(selectors[name].ways),
                "query_shot": selectors[name].query_shot,
                "chance": float(np.mean([1 / way for way in selectors[name].ways])),
            }
            for name, data in data_sets.items()
        },
        "methods": records,
        "seed": config.seed,
    }


def cell_text(cell: dict) -> str:
    """The accuracy of one method on one data set in %, or why there is none."""
    if (accuracy := cell.get("accuracy")) is None:
        return cell["not_tested"]
    text = intervals.format_mean(accuracy["mean"][0], accuracy["ci95"][0], digits=1, scale=100)
    return text + (f" ({accuracy['num_nonfinite'][0]} not finite)" if "num_nonfinite" in accuracy else "")


def show(results: dict) -> None:
    """Prints a row for each method: the accuracy on each data set in %, and the average rank."""
    protocol, names = results["protocol"], list(results["data_sets"])
    caption = "* transductive: the queries of an episode are normalised together"
    is_starred = [record["normalisation"] == "transductive" for record in results["methods"]]
    title = f"accuracy in %, {protocol['episodes']} episodes of each data set"
    table = Table(title=title, caption=caption if any(is_starred) else None)
    for header in ("method", *names, "average rank"):
        table.add_column(header, justify="left" if header == "method" else "right", overflow="fold")
    for record, star in zip(results["methods"], is_starred, strict=True):
        cells = [cell_text(record["data_sets"][name]) for name in names]
        rank = "–" if record["average_rank"] is None else f"{record['average_rank']:.2f}"
        table.add_row(escape(record["label"]) + "*" * star, *cells, rank)
    console.print(table)


def draw(file: Path, results: dict) -> None:
    """Draws the accuracy of every method on every data set, with its interval."""
    names = list(results["data_sets"])
    tested = [r for r in results["methods"] if any("accuracy" in cell for cell in r["data_sets"].values())]
    figure = Figure(figsize=(3.5 + 1.4 * len(names), 4.5), layout="constrained")
    axes = figure.subplots()
    for index, record in enumerate(tested):
        shift = 0.7 * ((index + 0.5) / len(tested) - 0.5)
        points = [
            (place + shift, 100 * cell["accuracy"]["mean"][0], 100 * cell["accuracy"]["ci95"][0])
            for place, cell in enumerate(record["data_sets"][name] for name in names)
            if "accuracy" in cell
        ]
        axes.errorbar(
            *zip(*points, strict=True),
            fmt=figures.MARKERS[index % len(figures.MARKERS)],
            color=f"C{index % 10}",
            markersize=5,
            capsize=2,
            label=figures.plain(record["label"]),
        )
    for place, name in enumerate(names):
        chance = 100 * results["data_sets"][name]["chance"]
        label = "chance" if place == 0 else None
        axes.plot([place - 0.5, place + 0.5], [chance, chance], color="0.4", linestyle=":", label=label)
        if place:
            axes.axvline(place - 0.5, color="0.85", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="accuracy, %", ylim=(0, 100), xlim=(-0.5, len(names) - 0.5))
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figures.save(figure, file)


if __name__ == "__main__":
    main(Config, run, __doc__)
