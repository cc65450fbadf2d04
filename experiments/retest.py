"""The test of a finished or unfinished run, made again: on how many episodes and with which seed, the caller says."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import classification, domains, navigation, runs, sinusoid
from experiments.classification import DataSet
from experiments.runs import RunError
from experiments.trials import Experiment
from maml_jax import evaluate, losses
from maml_jax.types import MetaLearner, SampleEpisodeFn


class Run(NamedTuple):
    """A run directory.

    Attributes:
      name: what it is called in tables: the directory's name, or its path if others have that name too.
      run_dir: where it is.
      experiment: such as "omniglot".
      config: its settings.
      data: what an experiment in few-shot classification says about its data; None in others.
      results: the content of results.json; None if it is not finished.
      trials: what an experiment on trials is about; None in others.
      group: the directory of several seeds that it is in, as it was given; None for a run of its own.
    """

    name: str
    run_dir: Path
    experiment: str
    config: Any
    data: DataSet | None
    results: dict[str, Any] | None
    trials: Experiment | None = None
    group: str | None = None


class Metric(NamedTuple):
    """How the scores of an experiment are printed.

    Attributes:
      name: of the scores.
      heading: of their table.
      higher_is_better: whether the larger of two scores is the better one.
      scale: the factor by which they are multiplied.
      unit: of differences.
    """

    name: str
    heading: str
    higher_is_better: bool = True
    scale: float = 1.0
    unit: str = ""

    def is_better(self, difference: float) -> bool:
        """Whether the first score is better, by its difference from the second."""
        return difference > 0 if self.higher_is_better else difference < 0


ACCURACY = Metric("accuracy", "After the last inner step: accuracy in %", scale=100.0, unit=" points")
ERROR = Metric("mse", "After the last inner step: mean squared error", higher_is_better=False)
RETURN = Metric("return", "After the last update: return")
REWARD = Metric("total reward", "Total reward")
METRICS = {
    "omniglot": ACCURACY,
    "images": ACCURACY,
    "domains": ACCURACY,
    "sinusoid": ERROR,
    "navigation": RETURN,
    "bandits": REWARD,
    "mdps": REWARD,
    "mazes": REWARD,
}
"""What runs are tested by, of the experiments whose tests are repeated here."""


ANY = "any"
"""In a protocol: what a test does not depend on."""


class Test(NamedTuple):
    """One test of a run.

    Attributes:
      task: what it is called in tables.
      protocol: by name, what must be the same in the test of another run for the two to be compared.
      metric: how scores are printed.
      score: `(number of episodes, seed) -> scores` [E, K+1], before the first and after every inner step.
      reported: the same test in results.json, with "mean" and "ci95"; None if the run is not finished.
      images: `() -> sampler` of the episodes as images, to see whether the data are the same too; None if there are no
        images.
      counted: what a score is of.
    """

    task: str
    protocol: dict[str, Any]
    metric: Metric
    score: Callable[[int, int], np.ndarray]
    reported: dict[str, Any] | None
    images: Callable[[], SampleEpisodeFn] | None = None
    counted: str = "episodes"


def open_run(run_dir: Path, name: str | None = None, group: str | None = None) -> Run:
    """The settings and results of a run directory; nothing in it is changed.

    Raises:
      RunError: if it is no run directory, or one of an experiment whose runs cannot be loaded.
    """
    module = runs.experiment_of(run_dir)
    config = module.with_paper_defaults(runs.stored_config(module.METHODS, run_dir))
    return Run(
        name or run_dir.name,
        run_dir,
        module.__name__.rpartition(".")[2],
        config,
        getattr(module, "DATA", None),
        runs.read_results(run_dir),
        getattr(module, "EXPERIMENT", None),
        group,
    )


def tests(run: Run) -> list[Test]:
    """The tests of a run; none in the experiments whose tests are not repeated here.

    Raises:
      RunError: if the run has no selected state.
    """
    if run.data is not None:
        return [classification_test(run)]
    if run.trials is not None:
        return [trial_test(run)]
    of_others = {
        "sinusoid": sinusoid_tests,
        "domains": lambda run: [domain_test(run)],
        "navigation": lambda run: [navigation_test(run)],
    }
    return of_others.get(run.experiment, lambda run: [])(run)


def image_sampler(run: Run) -> SampleEpisodeFn:
    """The test episodes of a run as images, whatever its network sees of them.

    Raises:
      RunError: if the images are not those that the run was made with.
    """
    config = run.config
    runs.check_data(run.run_dir, classification.digest_of(run.data, config))
    if config.network == "features":  # those of images that are not turned within an episode
        config = runs.replace_known(config, network="conv4", pretrained_run=None, rotations=False)
    return classification.make_sampler(run.data, config, "test", config.way, config.shot)


def fingerprint(sampler: SampleEpisodeFn) -> str:
    """A checksum of one episode, which tells data sets apart."""
    episode = sampler(jax.random.key(0))._replace(key=None)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(episode))).hexdigest()[:12]


def classification_test(run: Run) -> Test:
    """The test of a run with its own --way and --shot."""
    data, config = run.data, run.config

    def score(num_episodes: int, seed: int) -> np.ndarray:
        learner, params, _ = runs.load(run.run_dir)
        sampler = classification.make_sampler(data, config, "test", config.way, config.shot)
        found = classification.score(config, learner, params, sampler, runs.streams(seed).test, num_episodes)
        return np.asarray(found.per_episode)

    is_transductive = classification.normalisation(config) == "transductive"
    protocol = {
        **classification.split_settings(data, config),
        "way": config.way,
        "shot": config.shot,
        "query_shot": config.query_shot,
        "normalisation": "transductive" if is_transductive else "inductive",
        **data.turned(config, "test"),
    }
    task = f"{config.way}-way {config.shot}-shot"
    reported = run.results and run.results["metrics"]["accuracy"]
    return Test(task, protocol, ACCURACY, score, reported, images=lambda: image_sampler(run))


def sinusoid_tests(run: Run) -> list[Test]:
    """The tests of a run, one for each number of support points."""

    def of_shot(shot: int, sampler: SampleEpisodeFn) -> Test:
        def score(num_episodes: int, seed: int) -> np.ndarray:
            found = evaluate(
                sinusoid_learner(run, shot),
                runs.load(run.run_dir).params,
                sampler,
                runs.streams(seed).test,
                metric_fn=losses.mean_squared_error,
                num_episodes=num_episodes,
                chunk_size=sinusoid.EVAL_CHUNK_SIZE,
            )
            return np.asarray(found.per_episode)

        reported = sinusoid_evaluation(run, shot)
        protocol = {"shot": shot, "eval_query_shot": run.config.eval_query_shot}
        return Test(f"{shot} support points", protocol, ERROR, score, reported and reported["metrics"]["mse"])

    return [of_shot(shot, sampler) for shot, sampler in sinusoid.test_samplers(run.config).items()]


def sinusoid_evaluation(run: Run, shot: int) -> dict[str, Any] | None:
    """What a run has reported for a number of support points; None if it is not finished."""
    evaluations = [] if run.results is None else run.results["evaluations"]
    return next((evaluation for evaluation in evaluations if evaluation["shot"] == shot), None)


def sinusoid_learner(run: Run, shot: int) -> MetaLearner:
    """The learner of the test, at the rate that was chosen for this number of support points.

    Raises:
      RunError: if the rate is chosen in the test, and the run is not finished.
    """
    rate = run.config.hyperparameters.inner_lr
    if run.config.tune_inner_lr:
        if (reported := sinusoid_evaluation(run, shot)) is None:
            raise RunError(
                f"{run.run_dir} is not finished, and its rate at test is chosen at the end; run the command that "
                "started it again, and it goes on where it was"
            )
        rate = reported["inner_lr"]
    return sinusoid.make_tester(run.config, rate, run.config.eval_inner_steps)


def domain_test(run: Run) -> Test:
    """The test of a run on the domain that it has not seen; its "episodes" are single examples."""

    def score(num_episodes: int, seed: int) -> np.ndarray:
        learner, params, _ = runs.load(run.run_dir)
        examples = domains.READERS[run.config.data](run.config)
        runs.check_data(run.run_dir, domains.digest_of(examples))
        return domains.score(learner, params, examples.test)[:, None]

    names = ("data", "held_out", *(["num_characters"] if run.config.data == "rotated-omniglot" else []))
    protocol = {name: getattr(run.config, name) for name in names}
    reported = run.results and run.results["metrics"]["accuracy"]
    task = f"{run.config.data}, {run.config.held_out}"
    return Test(task, protocol, ACCURACY, score, reported, counted="examples")


def navigation_test(run: Run) -> Test:
    """The test of a run at fresh goals, with the rates that it has chosen on validation goals."""
    config = run.config

    def score(num_goals: int, seed: int) -> np.ndarray:
        params = runs.load(run.run_dir).params
        rates = run.results["rates"] if run.results else navigation.on_validation_goals(config, params)[0]
        return navigation.returns_at(config, params, *navigation.fresh_goals(seed, num_goals), rates, config.eval_shot)

    evaluations = run.results["evaluations"] if run.results else []
    reported = next((e["metrics"]["return"] for e in evaluations if e["goals"] == "fresh"), None)
    protocol = {name: getattr(config, name) for name in ("horizon", "eval_shot", "eval_inner_steps")}
    if config.algorithm == "oracle":  # which knows the goal and does not adapt
        protocol["eval_inner_steps"] = ANY
    return Test("fresh goals", protocol, RETURN, score, reported, counted="goals")


def trial_test(run: Run) -> Test:
    """The test of a run on new tasks."""
    config, experiment = run.config, run.trials
    problem = experiment.problem_of(config)

    def score(num_tasks: int, seed: int) -> np.ndarray:
        return experiment.reward(config, runs.load(run.run_dir).params, seed, num_tasks)[:, None]

    protocol = {"tasks": experiment.run_name(config), "horizon": problem.horizon, "episodes": problem.num_episodes}
    reported = run.results and run.results["metrics"].get("reward")
    return Test(experiment.run_name(config), protocol, REWARD, score, reported, counted="tasks")
