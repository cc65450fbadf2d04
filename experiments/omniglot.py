"""Few-shot classification of handwritten characters.

Trains one of the algorithms, keeps the state with the best validation accuracy and tests it. Without flags this is
MAML, 5-way 1-shot, with the paper's settings; the method, --way and --shot choose others. --way and --shot are those of
validation and of the first test. Methods whose parameters do not depend on the number of classes are tested in all
four published settings.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from rich.table import Table

from experiments import common, figures, runs
from experiments.cli import main, replace_known, stored_config
from experiments.omniglot_recipes import METHODS, SETTINGS, Config, about, with_paper_defaults
from experiments.runs import RunError, console
from maml_jax import CATALOGUE, Model, Problem, ensemble, evaluate, evaluate_objective, losses, models
from maml_jax.algorithms.classifier import Head
from maml_jax.inner import observed_once, unit_length
from maml_jax.tasks import few_shot, omniglot
from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import (
    ArrayTree,
    Evaluation,
    LearnerOrSchedule,
    MetaLearner,
    SampleEpisodeFn,
    learner_at,
)


def make_network(config: Config, way: int | None, *, population: bool = False) -> Model:
    """The network; without `way` its embedding.

    Args:
      config: the settings.
      way: the number of outputs, or None.
      population: whether it normalises by statistics that are parameters.
    """
    norm = models.PopulationNorm if population else models.BatchStatNorm
    norm = functools.partial(norm, scale=True) if config.norm_scale else norm
    if config.network == "mlp":
        return models.omniglot_mlp(way=way, norm=norm)
    if config.network == "multi-scale":
        return models.multi_scale(features=(config.filters,) * 4, norm=norm)
    if config.network in ("pixels", "features"):
        return Model(lambda key, inputs: {}, small_pixels if config.network == "pixels" else lambda params, x: x)
    flatten = True if config.pooling or config.flatten or way is None else None
    return models.conv4(way=way, features=config.filters, pooling=config.pooling, flatten=flatten, norm=norm)


def small_pixels(params: ArrayTree, images: jax.Array) -> jax.Array:
    """Images [S, 28, 28, 1] at 20x20, as vectors [S, 400]."""
    return jax.image.resize(images, (len(images), 20, 20, 1), "linear").reshape(len(images), -1)


def make_learner(
    config: Config, *, way: int | None = None, population: bool = False, **hyperparameters: Any
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
        head=lambda name: name.startswith("head" if config.network == "conv4" else "dense_4"),
        norm=lambda name: "norm" in name,
        embedding=make_network(config, None, population=population) if embeds else None,
        way=way,
    )
    return CATALOGUE[config.algorithm].build(problem, replace_known(config.hyperparameters, **hyperparameters))


def make_tester(config: Config, way: int | None = None, **hyperparameters: Any) -> MetaLearner:
    """The learner of validation and test, which does not depend on the meta-step."""
    hyperparameters = {"num_inner_steps": config.eval_inner_steps} | hyperparameters
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


def make_sampler(config: Config, split: str, way: int, shot: int) -> SampleEpisodeFn:
    """The task distribution of a split."""
    has_rotated_classes = config.rotated_classes and (split == "train" or config.rotated_test_classes)
    try:
        if config.network == "features":
            features = features_of(config, split, has_rotated_classes)
            return few_shot.make_sampler(features, way=way, shot=shot, query_shot=config.query_shot)
        images = omniglot.load(split, config.data_dir, config.split_by)
        if split == "train" and config.algorithm == "pretrained-classifier":
            return few_shot.make_batch_sampler(
                images, batch_size=config.hyperparameters.batch_size, rotated_classes=config.rotated_classes
            )
        return few_shot.make_sampler(
            images,
            way=way,
            shot=shot,
            query_shot=config.query_shot,
            rotations=config.rotations and not config.rotated_classes,
            rotated_classes=has_rotated_classes,
        )
    except ValueError as error:
        raise RunError(f"split {split!r} of Omniglot: {error}") from error


@functools.lru_cache(maxsize=3)
def features_of(config: Config, split: str, rotated_classes: bool) -> np.ndarray:
    """The embeddings of unit length of all drawings of a split by the network of `--pretrained-run`.

    Args:
      config: the settings.
      split: "train", "val" or "test".
      rotated_classes: whether the four rotations of a class are four classes.

    Returns:
      [C, n, D], or [4C, n, D].

    Raises:
      RunError: if there is no such run, or it is none of a pretrained classifier on the same characters.
    """
    if not (Path(config.pretrained_run) / "config.json").exists():
        raise RunError(
            f"there is no run in {config.pretrained_run}; make it with `python -m experiments.omniglot "
            f"pretrained-classifier --split-by {config.split_by} --run-dir {config.pretrained_run}`, or name another "
            "one with --pretrained-run"
        )
    source = with_paper_defaults(stored_config(METHODS, Path(config.pretrained_run)))
    if (source.algorithm, source.split_by) != ("pretrained-classifier", config.split_by):
        raise RunError(
            f"{config.pretrained_run} is a run of {source.algorithm} with --split-by {source.split_by}; give a run of "
            f"pretrained-classifier with --split-by {config.split_by}"
        )
    _, params = load(source.run_dir)
    network = make_network(source, None, population=source.population)
    images = omniglot.load(split, config.data_dir, config.split_by)
    if rotated_classes:
        images = np.concatenate([np.rot90(images, turns, (2, 3)) for turns in range(4)])

    @jax.jit
    def embed_class(params, drawings):
        return unit_length(network.apply(params["embedding"], scale_pixels(drawings)))

    return np.stack([embed_class(params, drawings) for drawings in images])


def make_samplers(config: Config) -> dict[str, SampleEpisodeFn]:
    """The task distributions of training, of validation and of the first test."""
    sizes = {"train": (config.train_way, config.train_shot)}
    return {
        split: make_sampler(config, split, *sizes.get(split, (config.way, config.shot)))
        for split in ("train", "val", "test")
    }


def with_statistics(config: Config) -> Callable[[ArrayTree], ArrayTree]:
    """`(params) -> params` for the test: with --population it adds the statistics of training images."""
    if not config.population or config.network in ("pixels", "features"):
        return lambda params: params
    embeds = CATALOGUE[config.algorithm].classifies
    network = make_network(config, None if embeds else config.way, population=True)
    sample = few_shot.make_batch_sampler(
        omniglot.load("train", config.data_dir, config.split_by),
        batch_size=1000,
        rotated_classes=config.rotations or config.rotated_classes,
    )
    images = sample(runs.streams(config.seed).tune).support.inputs

    @jax.jit
    def fill(params, images):
        if isinstance(params, dict) and "embedding" in params:
            return params | {"embedding": models.fill_population_statistics(network, params["embedding"], images)}
        return models.fill_population_statistics(network, params, images)

    return lambda params: fill(params, images)


def tests(config: Config) -> Iterator[tuple[dict[str, Any], MetaLearner, SampleEpisodeFn]]:
    """What a training is tested on: a description, the learner, the tasks. The first is that of --way and --shot."""
    entry = CATALOGUE[config.algorithm]
    own, settings = (config.way, config.shot), []
    if entry.classifies:
        settings = SETTINGS if entry.any_way else [(config.way, 1), (config.way, 5)]
    heads = get_args(Head) if config.algorithm == "pretrained-classifier" else (None,)
    for way, shot in dict.fromkeys([own, *settings]):
        sampler = make_sampler(config, "test", way, shot)
        for head in sorted(heads, key=lambda head: head != getattr(config.hyperparameters, "head", None)):
            described = {"way": way, "shot": shot} | ({} if head is None else {"head": head})
            yield described, make_tester(config, way, **({} if head is None else {"head": head})), sampler


def run(config: Config) -> dict:
    """Trains, tests the state with the best validation accuracy, and returns the content of results.json."""
    config = with_paper_defaults(config)
    learner = make_learner(config)
    tester = make_tester(config)
    samplers = make_samplers(config)
    complete = with_statistics(config)
    keys = runs.streams(config.seed)
    mesh = common.mesh_for(config.eval_episodes)

    def score(params: ArrayTree, sample_episode: SampleEpisodeFn, key: jax.Array, learner: MetaLearner) -> Evaluation:
        return evaluate(
            learner,
            params,
            sample_episode,
            key,
            metric_fn=losses.accuracy,
            num_episodes=config.eval_episodes,
            mesh=mesh,
            one_query_at_a_time=config.inductive,
            stochastic=CATALOGUE[config.algorithm].classifies,  # the order of the support set, if it matters
        )

    def test(params: ArrayTree) -> dict:
        params, evaluations = complete(params), []
        for described, learner, sample_episode in tests(config):
            of_members = ensemble(learner) if config.ensemble > 1 else learner
            accuracy = runs.as_metric(score(params, sample_episode, keys.test, of_members))
            evaluations.append(described | {"metrics": {"accuracy": accuracy}})
        tested = {"metrics": evaluations[0]["metrics"]}
        if config.algorithm in ("mann", "lstm"):
            tested["instances"] = instance_accuracy(params)
        return tested | ({"evaluations": evaluations} if len(evaluations) > 1 else {})

    def instance_accuracy(params: ArrayTree) -> dict[str, list[float]]:
        """The accuracy on the 1st, 2nd, ... image of a class in a sequence as long as those of the training."""
        sequences = make_sampler(config, "test", config.way, config.train_shot)
        found = evaluate_objective(learner, params, sequences, keys.test, num_episodes=config.eval_episodes, mesh=mesh)
        return {name: np.asarray(getattr(found, name)[1].instance_accuracy).tolist() for name in ("mean", "ci95")}

    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(
            run_dir,
            config,
            learner,
            samplers["train"],
            validate=lambda params: float(score(complete(params), samplers["val"], keys.val, tester).mean[-1]),
            num_best=config.ensemble,
        )
        protocol = {
            "way": config.way,
            "shot": config.shot,
            "query_shot": config.query_shot,
            "episodes": config.eval_episodes,
            "split": "test",
            "split_by": config.split_by,
            "selection": "highest validation accuracy on split val",
            "selected_step": trained.best_step,
            "ensemble": config.ensemble if config.ensemble == 1 else len(jax.tree.leaves(trained.params)[0]),
            "normalisation": normalisation(config),
        }
        results = runs.finish(run_dir, "omniglot", config, trained, protocol, lambda: test(trained.params))
        if jax.process_index() == 0:
            figures.learning_curves(run_dir / "figures" / "learning_curve.png", {config.algorithm: run_dir})
    show(results)
    return results


def normalisation(config: Config) -> str:
    """How the test normalises, for the protocol of the results."""
    if config.network == "pixels":
        return "none"
    if config.population:
        return "statistics of training images"
    return "each query with the support set" if config.inductive else "transductive"


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner of the test protocol and the selected parameters of a run; an ensemble if the run has one."""
    config = stored_config(METHODS, Path(run_dir))
    learner = make_tester(config)
    inputs = np.zeros((config.way * config.shot, 28, 28, 1), np.float32)
    if config.network == "features":
        inputs = jax.eval_shape(make_sampler(config, "val", config.way, config.shot), jax.random.key(0)).support.inputs
    params = common.load_params(config.run_dir, config, make_learner(config), inputs)
    return ensemble(learner) if config.ensemble > 1 else learner, with_statistics(config)(params)


def show(results: dict) -> None:
    """Prints the test accuracy: after every inner step, and in every setting if there are several."""
    protocol, accuracy = results["protocol"], results["metrics"]["accuracy"]
    title = (
        f"{results['algorithm']}, Omniglot {{}}: accuracy in % on {protocol['episodes']} test episodes, queries per "
    )
    title += f"class: {protocol['query_shot']}"
    last = len(accuracy["mean"]) - 1
    if last or "evaluations" not in results:
        table = Table("inner steps", "accuracy", title=title.format(f"{protocol['way']}-way {protocol['shot']}-shot"))
        for step in sorted({step for step in (0, 1, 2, 3, 4, 5, 10, 20) if step < last} | {last}):
            table.add_row(str(step), runs.format_mean(accuracy["mean"][step], accuracy["ci95"][step], scale=100))
        console.print(table)
    if evaluations := results.get("evaluations"):
        table = Table("task", "accuracy", title=title.format("after the last step"))
        for evaluation in evaluations:
            accuracy = evaluation["metrics"]["accuracy"]
            task = f"{evaluation['way']}-way {evaluation['shot']}-shot"
            task = ", ".join([task, *filter(None, [evaluation.get("head")])])
            table.add_row(task, runs.format_mean(accuracy["mean"][-1], accuracy["ci95"][-1], scale=100))
        console.print(table)
    if instances := results.get("instances"):
        table = Table("image of its class in a sequence", "accuracy", title=title.format("sequences"))
        for number, (mean, ci95) in enumerate(zip(instances["mean"], instances["ci95"], strict=True), 1):
            table.add_row(str(number), runs.format_mean(mean, ci95, scale=100))
        console.print(table)


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
