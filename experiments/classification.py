"""Few-shot classification on a data set: what the experiments on characters and on photographs share.

An experiment describes its data by a `DataSet`. Training, validation and test of every classifier of the catalogue
then follow from the settings.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import flax.linen as nn
import jax
import numpy as np
from rich.table import Table

from experiments import common, devices, figures, intervals, runs, seeds
from experiments.cli import RunConfig, check_counts, typed
from experiments.common import Training
from experiments.runs import RunError, console, replace_known, stored_config
from maml_jax import CATALOGUE, Model, Problem, ensemble, evaluate, evaluate_objective, losses, models
from maml_jax.algorithms.classifier import Head
from maml_jax.inner import observed_once, unit_length
from maml_jax.tasks import few_shot, streaming
from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import (
    ArrayTree,
    Evaluation,
    LearnerOrSchedule,
    MetaLearner,
    SampleEpisodeFn,
    learner_at,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationConfig(RunConfig):
    """Settings of few-shot classification. Rates are for losses that are means over the batch."""

    way: int = 5
    """Classes of an episode."""
    shot: int = 1
    """Support examples per class."""
    train_way: int | None = None
    """Classes of a training episode; by default as many as --way."""
    train_shot: int | None = None
    """Support examples per class in training; by default as many as --shot."""
    num_meta_steps: int = 60_000
    """Outer updates. A run with a constant or halved rate may be continued with a larger number."""
    eval_inner_steps: int | None = None
    """Inner steps in validation and test; by default the paper's."""
    network: str
    pretrained_run: Path | None = None
    """With --network features: the directory of a finished run of pretrained-classifier. Its embeddings, scaled to unit
    length, are the inputs, and its network is not trained further."""
    filters: int
    """Filters of each convolution."""
    pooling: bool
    """Whether conv4 has stride 1 and a 2x2 maximum in each block, and not stride 2."""
    adapt_norm: bool = False
    """Whether the inner loop also adapts the offsets and scales of the normalisation."""
    norm_scale: bool = False
    """Whether the normalisation has a scale beside its offset."""
    flatten: bool = False
    """Whether the last layer of conv4 sees all positions, and not their mean. With --pooling it always does."""
    inductive: bool = False
    """Whether validation and test classify one query at a time, with only the support set beside it. Without this and
    without --population the queries of an episode are normalised together, which is transductive."""
    population: bool = False
    """Whether validation and test normalise by the statistics of 1,000 training images. No prediction then depends on
    other queries, as with the running averages of other libraries."""
    ensemble: int = 1
    """States with the best validation accuracy whose outputs are averaged in the test; MAML++ publishes 5."""
    eval_episodes: int = 600
    """Episodes in each validation and in the test."""
    train_episodes: int = 100
    """Episodes of training classes in each validation. Their accuracy is logged as "train" and shows overfitting; it
    selects nothing. 0 leaves them out."""
    val_every: int = 1000
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 50
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(
            self, way=2, ensemble=1, filters=1, train_way=2, train_shot=1, eval_inner_steps=0, train_episodes=0
        )
        if self.train_episodes == 1:
            raise ValueError("--train-episodes 1 gives no interval; choose 0 or at least 2")
        if self.population and (self.inductive or self.ensemble > 1):
            raise ValueError("--population excludes --inductive and --ensemble; leave them out")
        if self.algorithm in ("mann", "lstm"):  # whose accuracy by instance is that of the sequence in training
            for name, unfit in {"ensemble": self.ensemble > 1, "population": self.population}.items():
                if unfit:
                    raise ValueError(f"{typed(name, getattr(self, name))} does not fit {self.algorithm}; leave it out")
        classifies = CATALOGUE[self.algorithm].classifies
        unfit = ("mlp",) if classifies else ("multi-scale", "pixels", "features")
        # The network of CAVIA takes a context.
        if self.network in unfit or (self.algorithm == "cavia" and self.network != "conv4"):
            raise ValueError(f"--network {self.network} does not fit {self.algorithm}; choose conv4")
        if self.network == "pixels" and self.algorithm == "protonets":
            raise ValueError(f"--network pixels leaves {self.algorithm} without parameters to train; choose conv4")
        if (self.network == "features") != (self.pretrained_run is not None):
            raise ValueError(
                "--network features and --pretrained-run belong together; give both, or another network and "
                "--pretrained-run None"
            )
        if self.train_way not in (None, self.way) and not CATALOGUE[self.algorithm].any_way:
            raise ValueError(
                f"--train-way {self.train_way} differs from --way {self.way}, and the parameters of {self.algorithm} "
                "depend on the number of classes; leave --train-way out"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """A data set as an experiment.

    Attributes:
      name: of the experiment, as in `python -m experiments.NAME`.
      title: in tables.
      methods: the settings of every algorithm.
      with_paper_defaults: `(config) -> config`, fills in settings that are None.
      examples: `(config, split) -> images`, uint8, as `few_shot.make_sampler` takes them.
      split_by: the settings that say which classes are in which split.
      input_shape: `(config) -> (H, W, channels)`.
      turned: `(config, split) -> arguments` of `few_shot.make_sampler` that say how classes are rotated.
      augmented: `(config, sample_episode) -> sample_episode`, for training.
      settings: way and shot of the published tables.
      is_any_size: whether it may be too small for some of them, which are then left out; otherwise that is an error.
    """

    name: str
    title: str
    methods: Mapping[str, Any]
    with_paper_defaults: Callable[[Any], Any]
    examples: Callable[[Any, str], Any]
    split_by: tuple[str, ...]
    input_shape: Callable[[Any], tuple[int, int, int]]
    turned: Callable[[Any, str], dict[str, bool]]
    augmented: Callable[[Any, SampleEpisodeFn], SampleEpisodeFn]
    settings: tuple[tuple[int, int], ...]
    is_any_size: bool = False


def make_network(config: Any, way: int | None, *, population: bool = False) -> Model:
    """The network; without `way` its embedding.

    Args:
      config: the settings.
      way: the number of outputs, or None.
      population: whether it normalises by statistics that are parameters.
    """
    norm: Callable[..., nn.Module] = models.PopulationNorm if population else models.BatchStatNorm
    norm = functools.partial(norm, scale=True) if config.norm_scale else norm
    if config.network == "mlp":
        return models.omniglot_mlp(way=way, norm=norm)
    if config.network == "multi-scale":
        return models.multi_scale(features=(config.filters,) * 4, norm=norm)
    if config.network == "resnet12":
        widths = tuple(config.filters * times for times in (1, 2, 4, 8))
        return models.resnet12(way=way, widths=widths, norm=functools.partial(norm, scale=True))
    if config.network in ("pixels", "features"):
        return Model(lambda key, inputs: {}, small_pixels if config.network == "pixels" else lambda params, x: x)
    flatten = True if config.pooling or config.flatten or way is None else None
    return models.conv4(
        way=way,
        features=config.filters,
        pooling=config.pooling,
        flatten=flatten,
        norm=norm,
        context_block=2 if config.algorithm == "cavia" else None,
    )


def small_pixels(params: ArrayTree, images: jax.Array) -> jax.Array:
    """Images [S, 28, 28, 1] at 20x20, as vectors [S, 400]."""
    return jax.image.resize(images, (len(images), 20, 20, 1), "linear").reshape(len(images), -1)


def make_learner(
    config: Any, *, way: int | None = None, population: bool = False, **hyperparameters: Any
) -> LearnerOrSchedule:
    """The algorithm on the network of the settings.

    Args:
      config: the settings.
      way: the number of classes of an episode; by default that of training.
      population: whether the network normalises by statistics that are parameters.
      **hyperparameters: replace those of the settings.
    """
    way = way or config.train_way or config.way
    embeds = CATALOGUE[config.algorithm].classifies
    problem = Problem(
        make_network(config, None if embeds else way, population=population),
        losses.cross_entropy,
        where=None if config.adapt_norm else lambda name: "norm" not in name,
        head=lambda name: name.startswith("dense_4" if config.network == "mlp" else "head"),
        norm=lambda name: "norm" in name,
        embedding=make_network(config, None, population=population) if embeds else None,
        way=way,
        takes_context=config.algorithm == "cavia",
    )
    return CATALOGUE[config.algorithm].build(problem, replace_known(config.hyperparameters, **hyperparameters))


def make_tester(config: Any, way: int | None = None, **hyperparameters: Any) -> MetaLearner:
    """The learner of validation and test, which does not depend on the meta-step; one for all seeds."""
    config = dataclasses.replace(config, seed=0, seeds=1, run_dir=None)
    return _make_tester(config, way, tuple(hyperparameters.items()))


@functools.lru_cache(maxsize=16)
def _make_tester(config: Any, way: int | None, hyperparameters: tuple[tuple[str, Any], ...]) -> MetaLearner:
    hyperparameters = {"num_inner_steps": config.eval_inner_steps} | dict(hyperparameters)
    learner = make_learner(config, way=way or config.way, population=config.population, **hyperparameters)
    learner = learner_at(learner, config.num_meta_steps)
    return observed_at_the_end(learner) if config.algorithm == "pretrained-classifier" else learner


def observed_at_the_end(learner: MetaLearner) -> MetaLearner:
    """The learner with one observation, after its last inner step.

    A curve over the steps that train a new last layer would cost far more than the steps.
    """

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        task_params, info = learner.adapt(meta_params, support, key=key)
        return task_params, info._replace(observed=observed_once(task_params, observe_fn).observed)

    return learner._replace(adapt=adapt)


def make_sampler(
    data: DataSet, config: Any, split: str, way: int, shot: int, *, to_train: bool = False
) -> SampleEpisodeFn:
    """The task distribution of a split.

    Args:
      data: the data set.
      config: the settings.
      split: "train", "val" or "test".
      way: classes of an episode.
      shot: support examples of a class.
      to_train: whether the learner is trained on it: with augmentation, and with batches for a pretrained classifier.

    Raises:
      RunError: if the split has too few classes, or a class has too few images.
    """
    turned = data.turned(config, split)
    source = source_of(config)
    try:
        if config.network == "features":
            features = features_of(data, config, split, turned.get("rotated_classes", False))
            return few_shot.make_sampler(features, way=way, shot=shot, query_shot=config.query_shot)
        images = data.examples(config, split)
        if to_train and config.algorithm == "pretrained-classifier":
            turned = {name: value for name, value in turned.items() if name == "rotated_classes"}
            sampler = source.make_batch_sampler(images, batch_size=config.hyperparameters.batch_size, **turned)
        else:
            sampler = source.make_sampler(images, way=way, shot=shot, query_shot=config.query_shot, **turned)
    except ValueError as error:
        own = "train_" if to_train and (way, shot) != (config.way, config.shot) else ""
        sizes = {own + "way": way, own + "shot": shot, "query_shot": config.query_shot}
        flags = " ".join(typed(name, size) for name, size in sizes.items())
        raise RunError(f"split {split!r} of {data.title}: {error} (with {flags})") from error
    return data.augmented(config, sampler) if to_train else sampler


@functools.lru_cache(maxsize=3)
def features_of(data: DataSet, config: Any, split: str, rotated_classes: bool) -> list[np.ndarray]:
    """The embeddings of unit length of all images of a split by the network of `--pretrained-run`.

    Args:
      data: the data set.
      config: the settings.
      split: "train", "val" or "test".
      rotated_classes: whether the four rotations of a class are four classes.

    Returns:
      For each class, or each rotation of each class, [n, D].

    Raises:
      RunError: if there is no such run, or it is none of a pretrained classifier that normalises by population
        statistics, on the same split of the same data.
    """
    wanted = " ".join(typed(name, getattr(config, name)) for name in data.split_by)
    if several := runs.seed_directories(Path(config.pretrained_run)):
        raise RunError(
            f"{config.pretrained_run} holds several seeds; name one of its directories {', '.join(several)} with "
            "--pretrained-run"
        )
    if not (Path(config.pretrained_run) / "config.json").exists():
        where = "" if config.data_dir is None else f" --data-dir {config.data_dir}"
        raise RunError(
            f"there is no run in {config.pretrained_run}; make it with `python -m experiments.{data.name} "
            f"pretrained-classifier {wanted}{where} --run-dir {config.pretrained_run}`, or name another one with "
            "--pretrained-run"
        )
    source = data.with_paper_defaults(stored_config(data.methods, Path(config.pretrained_run)))
    found = " ".join(typed(name, getattr(source, name)) for name in data.split_by)
    if (source.algorithm, found) != ("pretrained-classifier", wanted):
        raise RunError(
            f"{config.pretrained_run} is a run of {source.algorithm} with {found}; give a run of "
            f"pretrained-classifier with {wanted}"
        )
    if not source.population:
        raise RunError(
            f"{config.pretrained_run} has --no-population, so an embedding would depend on the other images; give a "
            "run with --population"
        )
    # The digest of a run is that of the classes that its own settings leave.
    runs.check_data(source.run_dir, digest_of(data, dataclasses.replace(source, data_dir=config.data_dir)))
    _, params = load(data, source.run_dir)
    network = make_network(source, None, population=source.population)
    images = data.examples(config, split)
    if rotated_classes:
        images = [np.rot90(of_class, turns, (1, 2)) for turns in range(4) for of_class in images]

    @jax.jit
    def embed_batch(params, batch):
        return unit_length(network.apply(params["embedding"], scale_pixels(batch)))

    # In batches of 500, because classes may have any size.
    together = np.concatenate(images)
    parts = [np.asarray(embed_batch(params, together[i : i + 500])) for i in range(0, len(together), 500)]
    return np.split(np.concatenate(parts), np.cumsum([len(of_class) for of_class in images])[:-1])


def digest_of(data: DataSet, config: Any) -> str:
    """A checksum of the images of the three splits, and of the network that embeds them if there is one."""
    checksum = runs.digest(data.examples(config, split) for split in ("train", "val", "test"))
    if config.network != "features":
        return checksum
    # As they are stored: the statistics of the normalisation are computed, and round differently on another device.
    params = selected_params(data, stored_config(data.methods, Path(config.pretrained_run)))
    return f"{checksum} {runs.digest([[np.asarray(leaf)[None] for leaf in jax.tree.leaves(params)]])}"


def source_of(config: Any) -> ModuleType:
    """Where samplers come from: `few_shot`, or `streaming` with --stream."""
    return streaming if getattr(config, "stream", False) else few_shot


def make_samplers(data: DataSet, config: Any) -> dict[str, SampleEpisodeFn]:
    """The task distributions of training, of validation and of the first test."""
    training = make_sampler(data, config, "train", config.train_way, config.train_shot, to_train=True)
    return {"train": training} | {
        split: make_sampler(data, config, split, config.way, config.shot) for split in ("val", "test")
    }


def with_statistics(data: DataSet, config: Any) -> Callable[[ArrayTree], ArrayTree]:
    """`(params) -> params` for the test: with --population it adds the statistics of training images."""
    if not config.population or config.network in ("pixels", "features"):
        return lambda params: params
    embeds = CATALOGUE[config.algorithm].classifies
    network = make_network(config, None if embeds else config.way, population=True)
    sample = source_of(config).make_batch_sampler(
        data.examples(config, "train"), batch_size=1000, rotated_classes=any(data.turned(config, "train").values())
    )
    images = sample(runs.streams(config.seed).tune).support.inputs

    @jax.jit
    def fill(params, images):
        if isinstance(params, dict) and "embedding" in params:
            return params | {"embedding": models.fill_population_statistics(network, params["embedding"], images)}
        return models.fill_population_statistics(network, params, images)

    return lambda params: fill(params, images)


def tested_settings(config: Any, settings: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Way and shot of every test, first those of --way and --shot.

    Args:
      config: the settings.
      settings: way and shot of the published tables.
    """
    entry = CATALOGUE[config.algorithm]
    if not entry.classifies:
        settings = []
    elif not entry.any_way:
        settings = [(config.way, 1), (config.way, 5)]
    return list(dict.fromkeys([(config.way, config.shot), *settings]))


def tests(
    data: DataSet, config: Any, say: Callable[[str], object]
) -> Iterator[tuple[dict[str, Any], MetaLearner, SampleEpisodeFn]]:
    """What a training is tested on: a description, the learner, the tasks. The first is that of --way and --shot.

    Published settings that a set of any size does not allow are left out, and passed to `say`.
    """
    heads = get_args(Head) if config.algorithm == "pretrained-classifier" else (None,)
    for way, shot in tested_settings(config, data.settings):
        try:
            sampler = make_sampler(data, config, "test", way, shot)
        except RunError as error:
            if not data.is_any_size or (way, shot) == (config.way, config.shot):
                raise
            say(f"the {way}-way {shot}-shot test is left out: {error}")
            continue
        for head in sorted(heads, key=lambda head: head != getattr(config.hyperparameters, "head", None)):
            described = {"way": way, "shot": shot} | ({} if head is None else {"head": head})
            yield described, make_tester(config, way, **({} if head is None else {"head": head})), sampler


def score(
    config: Any,
    learner: MetaLearner,
    params: ArrayTree,
    sample_episode: SampleEpisodeFn,
    key: jax.Array,
    num_episodes: int,
) -> Evaluation:
    """The accuracy on `num_episodes` episodes after every inner step."""
    return evaluate(
        learner,
        params,
        sample_episode,
        key,
        metric_fn=losses.accuracy,
        num_episodes=num_episodes,
        chunk_size=config.chunk_size,
        mesh=devices.mesh_of_any(num_episodes),
        one_query_at_a_time=config.inductive,
        stochastic=CATALOGUE[config.algorithm].classifies,  # the order of the support set, if it matters
    )


def training_of(data: DataSet, config: Any) -> Training:
    """What is trained, and how it is validated, at settings without gaps.

    Raises:
      RunError: for what would only fail at the first validation or in a test.
    """
    check_trainable(data, config)
    learner, tester = make_learner(config), make_tester(config)
    samplers = make_samplers(data, config)
    training, validation = samplers["train"], samplers["val"]
    del samplers  # that of the test would keep its images on the device
    say = functools.partial(console.print, markup=False)
    for _ in tests(data, config, say):
        pass
    devices.mesh_for(config.eval_episodes)
    complete = with_statistics(data, config)
    if config.population:
        check_population(config, learner, tester, complete, validation)
    key = runs.streams(config.seed).val

    def accuracy(params: ArrayTree, tasks: SampleEpisodeFn, num_episodes: int) -> float:
        return float(score(config, tester, complete(params), tasks, key, num_episodes).mean[-1])

    known = monitored_tasks(data, config, training, say)
    return Training(
        learner,
        training,
        lambda params: accuracy(params, validation, config.eval_episodes),
        config.ensemble,
        data_digest=digest_of(data, config),
        monitor=None if known is None else lambda params: {"train": accuracy(params, known, config.train_episodes)},
    )


def monitored_tasks(
    data: DataSet, config: Any, training: SampleEpisodeFn, say: Callable[[str], object]
) -> SampleEpisodeFn | None:
    """Tasks like those of the test from the training classes; None if they are not wanted or there are too few.

    Args:
      data: the data set.
      config: the settings.
      training: the task distribution of the training, whose images are used.
      say: is told why there are none.
    """
    if not config.train_episodes:
        return None
    try:
        tasks = make_sampler(data, config, "train", config.way, config.shot)
    except RunError as error:
        say(f"the accuracy on training classes is not logged: {error}")
        return None
    # All that a sampler holds is the images of the training classes: one copy is enough.
    return jax.tree.structure(tasks).unflatten(jax.tree.leaves(training))


def check_trainable(data: DataSet, config: Any) -> None:
    """Raises RunError if LEO has no trained features, or a classifier has fewer outputs than training classes."""
    if config.algorithm == "leo" and config.network != "features" and not config.hyperparameters.train_embedding:
        raise RunError(
            "leo takes the features of a pretrained network; give --network features and --pretrained-run, or "
            "--train-embedding"
        )
    if (given := getattr(config.hyperparameters, "num_classes", None)) is None:
        return
    if given < (needed := num_training_classes(data, config)):
        raise RunError(f"--num-classes {given} is smaller than the {needed} training classes; leave it out")


def num_training_classes(data: DataSet, config: Any) -> int:
    """The number of training classes; with rotations as classes there are four of each."""
    return len(data.examples(config, "train")) * (4 if data.turned(config, "train").get("rotated_classes") else 1)


def check_population(
    config: Any,
    learner: LearnerOrSchedule,
    tester: MetaLearner,
    complete: Callable[[ArrayTree], ArrayTree],
    sample_episode: SampleEpisodeFn,
) -> None:
    """Raises RunError if the statistics have no place among the parameters of the learner."""

    def adapted(key: jax.Array) -> ArrayTree:
        support = sample_episode(key).support
        params = complete(learner_at(learner, 0).init(key, support.inputs))
        return tester.adapt(params, support, key=key)[0]

    try:
        jax.eval_shape(adapted, jax.random.key(0))
    except (TypeError, ValueError) as error:
        raise RunError(
            f"--population does not fit {config.algorithm} ({error}); leave it out, or use --inductive"
        ) from error


def run(data: DataSet, config: Any) -> dict:
    """Trains, tests the state with the best validation accuracy, and returns the content of results.json.

    With several seeds it is the content of seeds.json.
    """
    config = data.with_paper_defaults(config)
    if config.seeds > 1:
        return seeds.run_seeds(functools.partial(run, data), functools.partial(training_of, data), config)
    training, complete = training_of(data, config), with_statistics(data, config)
    key = runs.streams(config.seed).test

    def test(params: ArrayTree) -> dict:
        params, evaluations = complete(params), []
        for described, learner, sample_episode in tests(data, config, lambda text: None):
            of_members = ensemble(learner) if config.ensemble > 1 else learner
            accuracy = runs.as_metric(score(config, of_members, params, sample_episode, key, config.eval_episodes))
            evaluations.append(described | {"metrics": {"accuracy": accuracy}})
        tested = {"metrics": evaluations[0]["metrics"]}
        if config.algorithm in ("mann", "lstm"):
            tested["instances"] = instance_accuracy(params)
        return tested | ({"evaluations": evaluations} if len(evaluations) > 1 else {})

    def instance_accuracy(params: ArrayTree) -> dict[str, list[float]]:
        """The accuracy on the 1st, 2nd, ... image of a class in a sequence as long as those of the training."""
        sequences = make_sampler(data, config, "test", config.way, config.train_shot)
        mesh = devices.mesh_for(config.eval_episodes)
        found = evaluate_objective(
            training.learner, params, sequences, key, num_episodes=config.eval_episodes, mesh=mesh
        )
        return {name: np.asarray(getattr(found, name)[1].instance_accuracy).tolist() for name in ("mean", "ci95")}

    with runs.open_run(config.run_dir, config, training.data_digest) as run_dir:
        trained = common.train(run_dir, config, training)
        protocol = {
            "way": config.way,
            "shot": config.shot,
            "query_shot": config.query_shot,
            "episodes": config.eval_episodes,
            "split": "test",
            **split_settings(data, config),
            "selection": "highest validation accuracy on split val",
            "selected_step": trained.best_step,
            "ensemble": config.ensemble if config.ensemble == 1 else len(jax.tree.leaves(trained.params)[0]),
            "normalisation": normalisation(config),
        }
        results = runs.finish(run_dir, data.name, config, trained, protocol, lambda: test(trained.params))
        if jax.process_index() == 0:
            figures.learning_curves(
                run_dir / "figures" / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]}
            )
    show(data, results)
    return results


def split_settings(data: DataSet, config: Any) -> dict[str, Any]:
    """The settings that say which classes are in which split, as they are stored."""
    return {name: value for name, value in runs.as_json(config).items() if name in data.split_by}


def normalisation(config: Any) -> str:
    """How the test normalises, for the protocol of the results."""
    if config.network == "pixels":
        return "none"
    if config.population or config.network == "features":  # those of a run that has --population
        return "statistics of training images"
    return "each query with the support set" if config.inductive else "transductive"


def selected_params(data: DataSet, config: Any) -> ArrayTree:
    """The selected parameters of a run as they are stored, without what `with_statistics` adds.

    Raises:
      RunError: as `common.load_params`, and with `--network features` as `features_of`.
    """
    inputs = np.zeros((config.way * config.shot, *data.input_shape(config)), np.float32)
    if config.network == "features":
        sampler = make_sampler(data, config, "val", config.way, config.shot)
        inputs = jax.eval_shape(sampler, jax.random.key(0)).support.inputs
    return common.load_params(config.run_dir, config, make_learner(config), inputs)


def load(data: DataSet, run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner of the test protocol and the selected parameters of a run; an ensemble if the run has one.

    Raises:
      RunError: if the run has --population and the images are not those of its training, or `--network features` and
        the run that embeds the images is not there or has other parameters than in its training.
    """
    config = stored_config(data.methods, Path(run_dir))
    learner, params = make_tester(config), selected_params(data, config)
    # The statistics of its normalisation are those of its training images, and so are the embeddings.
    if config.population or config.network == "features":
        runs.check_data(Path(run_dir), digest_of(data, config))
    return ensemble(learner) if config.ensemble > 1 else learner, with_statistics(data, config)(params)


def show(data: DataSet, results: dict) -> None:
    """Prints the test accuracy: after every inner step, and in every setting if there are several."""
    protocol, accuracy = results["protocol"], results["metrics"]["accuracy"]
    title = (
        f"{results['algorithm']}, {data.title} {{}}: accuracy in % on {protocol['episodes']} test episodes, queries "
        f"per class: {protocol['query_shot']}"
    )
    last = len(accuracy["mean"]) - 1
    if last or "evaluations" not in results:
        table = Table("inner steps", "accuracy", title=title.format(f"{protocol['way']}-way {protocol['shot']}-shot"))
        for step in sorted({step for step in (0, 1, 2, 3, 4, 5, 10, 20) if step < last} | {last}):
            table.add_row(str(step), intervals.format_metric(accuracy, step, scale=100))
        console.print(table)
    if evaluations := results.get("evaluations"):
        table = Table("task", "accuracy", title=title.format("after the last step"))
        for evaluation in evaluations:
            accuracy = evaluation["metrics"]["accuracy"]
            task = f"{evaluation['way']}-way {evaluation['shot']}-shot"
            task = ", ".join([task, *filter(None, [evaluation.get("head")])])
            table.add_row(task, intervals.format_metric(accuracy, scale=100))
        console.print(table)
    if instances := results.get("instances"):
        table = Table("image of its class in a sequence", "accuracy", title=title.format("sequences"))
        for number, (mean, ci95) in enumerate(zip(instances["mean"], instances["ci95"], strict=True), 1):
            table.add_row(str(number), intervals.format_mean(mean, ci95, scale=100))
        console.print(table)
