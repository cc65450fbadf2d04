"""What the experiments on trials share: the settings, the training on whole trials, the test."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

from experiments import common, devices, figures, intervals, runs, seeds
from experiments.cli import RunConfig, flag, with_defaults
from experiments.common import Training
from experiments.runs import RunError, stored_config
from maml_jax import checkpoint, models, parallel, rl
from maml_jax.types import (
    ArrayTree,
    Environment,
    MetaLearner,
    PRNGKey,
    check_integer,
    check_not_negative,
    check_positive,
    named_leaves,
)

TITLES = {"rl2": "RL²", "maml": "MAML"}
"""The methods in tables and figures."""
TEST_CHUNK = 500
"""Trials of the test that are vmapped together."""


@dataclasses.dataclass(frozen=True)
class TrialTraining:
    """Hyperparameters of proximal policy optimisation on whole trials."""

    discount: float = 0.99
    """Discount of a time step, over the whole trial."""
    decay: float = 0.95
    """The decay λ of the generalised advantages; 0.3 in the RL² paper."""
    clip: float = 0.2
    """The change of the ratio of probabilities beyond which nothing is gained. The RL² paper has a trust region
    instead."""
    epochs: int = 4
    """How often the trials of a meta-step are gone through."""
    minibatches: int = 2
    """Parts of the trials that one update each is made on; it divides --meta-batch-size."""
    entropy_weight: float = 0.02
    """Weight of the entropy of the policy in the objective."""
    value_weight: float = 0.5
    """Weight of half the squared error of the values in the objective."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number that cannot be."""
        for name in ("epochs", "minibatches"):
            check_integer(flag(name), getattr(self, name), at_least=1)
        for name in ("discount", "decay", "entropy_weight", "value_weight"):
            check_not_negative(flag(name), getattr(self, name))
        for name in ("discount", "decay"):
            if getattr(self, name) > 1.0:
                raise ValueError(f"{flag(name)} {getattr(self, name)} must be at most 1")
        check_positive("--clip", self.clip)


@dataclasses.dataclass(frozen=True)
class RecurrentTraining(TrialTraining):
    """Hyperparameters of RL²: a gated recurrent unit, trained by proximal policy optimisation on whole trials."""

    hidden_size: int = 64
    """Units of the recurrent layer; 256 in the RL² paper."""
    memory: int | None = None
    """Time steps that units remember at the start, at most (Tallec & Ollivier, 2018); None for about two."""
    associate: bool = False
    """Bind rewards to observations and actions by products of the inputs, unlike the RL² paper."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number that cannot be."""
        super().__post_init__()
        check_integer("--hidden-size", self.hidden_size, at_least=1)
        if self.memory is not None:
            check_integer("--memory", self.memory, at_least=2)


@dataclasses.dataclass(frozen=True)
class DescentTraining(TrialTraining):
    """Hyperparameters of MAML within a trial: an inner step after every reward, trained on whole trials."""

    inner_lr: float = 2.0
    """All rates of the inner steps at the start."""
    baseline: float = 0.5
    """What a reward is compared with at the start; it is learned."""
    learn_rates: bool = True
    """Learn a rate for each parameter. Otherwise all rates stay at --inner-lr, as in MAML."""
    learn_temperature: bool = True
    """Learn a temperature of the policy that acts; the inner loss is computed without it. Otherwise it is 1, as in
    MAML."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number that cannot be."""
        super().__post_init__()
        check_positive("--inner-lr", self.inner_lr)
        if not math.isfinite(self.baseline):
            raise ValueError(f"--baseline {self.baseline} must be a finite number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig(RunConfig):
    """The settings of one run."""

    shot: Annotated[int, tyro.conf.Suppress] = 1
    query_shot: Annotated[int | None, tyro.conf.Suppress] = None
    meta_batch_size: int = 2000
    """Trials per meta-step, each of a new task."""
    num_meta_steps: int = 1000
    """Outer updates. A run with a constant rate may be continued with a larger number."""
    outer_lr: float = 4e-3
    """Rate of the outer optimiser."""
    outer_schedule: Literal["constant", "linear", "cosine", "halved"] = "linear"
    """How the outer rate falls: to --outer-lr-end over --num-meta-steps, or by half every --outer-half-life steps. A
    finished linear or cosine run cannot be continued with more steps."""
    outer_lr_end: float = 4e-4
    """The outer rate at the end of a linear or cosine schedule."""
    outer_clip: Annotated[float | None, tyro.conf.Suppress] = None
    max_norm: float = 0.5
    """The Euclidean norm that bounds the meta-gradient."""
    start_run: Path | None = None
    """A run of the same experiment, on easier tasks for example, whose selected policy is the start of this one."""
    chunk_size: int | None = None
    """Trials that are differentiated together; by default all of --meta-batch-size."""
    eval_episodes: int = 20_000
    """Tasks of the test, and at most 2,000 of them in each validation."""
    val_every: int = 100
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 10
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_positive("--max-norm", self.max_norm)
        minibatches = self.hyperparameters.minibatches
        if self.meta_batch_size % minibatches:
            raise ValueError(
                f"--minibatches {minibatches} does not divide --meta-batch-size {self.meta_batch_size}; choose a "
                "divisor"
            )


class Problem(NamedTuple):
    """What an experiment on trials is about.

    Attributes:
      environment: its tasks.
      num_actions: A.
      num_inputs: the numbers that the policy sees: those of the observation, the actions, and two more.
      num_episodes: E, of a trial.
      horizon: H, the most time steps of an episode.
    """

    environment: Environment
    num_actions: int
    num_inputs: int
    num_episodes: int
    horizon: int


class Outcome(NamedTuple):
    """What happened in each episode of n trials, leaves [n, E].

    Attributes:
      reward: the sum of the rewards.
      steps: the number of time steps.
      done: whether the environment ended the episode, rather than the horizon.
    """

    reward: np.ndarray
    steps: np.ndarray
    done: np.ndarray


Summary = Callable[[Problem, ArrayTree, rl.Trial], ArrayTree]
"""`(problem, task, trial) -> summary`, what is kept of a trial in a test."""


class Experiment(NamedTuple):
    """An experiment on trials.

    Attributes:
      methods: the settings of every method.
      run_name: `(config) -> str`, the name of its run directory.
      problem_of: `(config) -> Problem`, the same object for the same sizes.
      test: `(config, params) -> dict` with "metrics" and whatever else is reported.
      reward: `(config, params, seed, count) -> rewards` [count], the total reward in each of the first tasks of the
        test of this seed, by which runs are compared.
      show: `(results) -> None`, prints them.
      draw: `(directory, results) -> None`, draws them; or None.
      draw_behaviour: `(file, config, params, count, seed) -> None`, draws what the policy does; or None.
    """

    methods: Mapping[str, Any]
    run_name: Callable[[Any], str]
    problem_of: Callable[[Any], Problem]
    test: Callable[[Any, ArrayTree], dict[str, Any]]
    reward: Callable[[Any, ArrayTree, int, int], np.ndarray]
    show: Callable[[dict[str, Any]], None]
    draw: Callable[[Path, dict[str, Any]], None] | None = None
    draw_behaviour: Callable[[Path, Any, ArrayTree, int, int], None] | None = None


def with_paper_defaults(experiment: Experiment, config: TrialConfig) -> TrialConfig:
    """Fills in what depends on other settings."""
    run_dir = Path(f"runs/{type(config).experiment}-{config.algorithm}-{experiment.run_name(config)}-{config.seed}")
    return with_defaults(config, {"run_dir": run_dir, "chunk_size": config.meta_batch_size})


def make_policy(problem: Problem, settings: TrialTraining) -> rl.RecurrentPolicy:
    """The policy whose state adapts to the task: a gated recurrent unit, or a table of logits that descends."""
    if isinstance(settings, DescentTraining):
        return rl.maml_policy(
            models.mlp(features=(problem.num_actions,)),
            num_actions=problem.num_actions,
            observation_size=problem.num_inputs - problem.num_actions - 2,
            inner_lr=settings.inner_lr,
            baseline=settings.baseline,
            learn_rates=settings.learn_rates,
            learn_temperature=settings.learn_temperature,
        )
    sizes = {"num_actions": problem.num_actions, "hidden_size": settings.hidden_size, "memory": settings.memory}
    if settings.associate:
        return rl.associative_policy(observation_size=problem.num_inputs - problem.num_actions - 2, **sizes)
    return rl.gru_policy(**sizes)


def start_of(experiment: Experiment, config: TrialConfig) -> ArrayTree | None:
    """The parameters that `--start-run` has selected; None without it, and for a run that has checkpoints already.

    Args:
      experiment: of both runs.
      config: the settings, without gaps.

    Raises:
      RunError: if there is no such run, it is this one, or its policy has other parameters.
    """
    if config.start_run is None:
        return None
    if Path(config.start_run).resolve() == config.run_dir.resolve():
        raise RunError(f"--start-run {config.start_run} is the directory of this run too; choose another --run-dir")
    if checkpoint.latest(config.run_dir / "checkpoints") is not None:
        return None
    _, start = load(experiment, config.start_run)
    problem = experiment.problem_of(config)
    wanted = jax.eval_shape(
        make_policy(problem, config.hyperparameters).init, jax.random.key(0), jnp.zeros((1, problem.num_inputs))
    )
    here, there = ({name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (wanted, start))
    differing = [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in sorted(here.keys() | there.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise RunError(
            f"the policy of --start-run {config.start_run} has other parameters: {differing[0]}. Give both runs the "
            "same --hidden-size, --associate and observations"
        )
    return start


def training_of(config: TrialConfig, problem: Problem, start: ArrayTree | None = None) -> Training:
    """What is trained, at settings without gaps; the state with the largest reward of a trial is selected.

    Args:
      config: the settings.
      problem: what it is trained on.
      start: the parameters of the start; by default they are drawn.
    """
    settings = config.hyperparameters
    policy = make_policy(problem, settings)
    learner = rl.rl2(
        policy, clip=settings.clip, value_weight=settings.value_weight, entropy_weight=settings.entropy_weight
    )
    if start is not None:
        learner = learner._replace(init=lambda key, inputs: start)
    sampler = rl.make_trial_sampler(
        problem.environment,
        policy,
        num_episodes=problem.num_episodes,
        horizon=problem.horizon,
        discount=settings.discount,
        decay=settings.decay,
        # Values are then averages of rewards, whatever the length of a trial.
        reward_scale=1.0 / sum(settings.discount**t for t in range(problem.num_episodes * problem.horizon)),
    )
    updates = settings.epochs * settings.minibatches
    rule = rl.clipped_epochs(
        optax.chain(
            optax.clip_by_global_norm(config.max_norm), common.outer_optimizer(config, updates_per_step=updates)
        ),
        num_epochs=settings.epochs,
        num_minibatches=settings.minibatches,
        prepare=rl.standardise_advantages,
    )

    def validate(params: ArrayTree) -> float:
        found = outcome(config, problem, params, runs.streams(config.seed).val, min(2000, config.eval_episodes))
        return float(found.reward.sum(1).mean())

    inputs = jnp.zeros((1, problem.num_inputs))
    return Training(learner, sampler, validate, make_optimizer=lambda mesh: rule, inputs=inputs)


def keys_of_test(seed: int) -> tuple[PRNGKey, PRNGKey, PRNGKey]:
    """The keys of the test of a seed: for the most probable actions, for drawn ones, and for the strategies."""
    return tuple(jax.random.split(runs.streams(seed).test, 3))


def outcome(
    config: TrialConfig, problem: Problem, params: ArrayTree, key: PRNGKey, count: int, *, greedy: bool = False
) -> Outcome:
    """Goes through `count` trials of new tasks."""
    return through_trials(config, problem, params, key, count, of_episodes, greedy=greedy)


def greedy_reward(
    problem_of: Callable[[Any], Problem], config: TrialConfig, params: ArrayTree, seed: int, count: int
) -> np.ndarray:
    """The total reward in each of the first tasks of the test of a seed, by the most probable actions [count]."""
    key, *_ = keys_of_test(seed)
    return outcome(config, problem_of(config), params, key, count, greedy=True).reward.sum(1)


def of_episodes(problem: Problem, task: ArrayTree, trial: rl.Trial) -> Outcome:
    """What happened in each episode of one trial."""
    of_episode = (trial.episode[None] == jnp.arange(problem.num_episodes)[:, None]) * trial.mask[None]
    return Outcome(*(jnp.sum(of_episode * values[None], 1) for values in (trial.reward, trial.mask, trial.done)))


def through_trials(
    config: TrialConfig,
    problem: Problem,
    params: ArrayTree,
    key: PRNGKey,
    count: int,
    summary: Summary,
    *,
    greedy: bool = False,
) -> ArrayTree:
    """The summaries of `count` trials of new tasks, arrays of NumPy with a leading axis."""
    program = trials_program(problem, config.hyperparameters, count, greedy, summary)
    return jax.tree.map(np.asarray, program(params, jax.random.split(key, count)))


@functools.lru_cache(maxsize=8)
def trials_program(problem: Problem, settings: TrialTraining, count: int, greedy: bool, summary: Summary) -> Callable:
    """A compiled function of `(params, keys)`, divided over the devices."""
    policy = make_policy(problem, settings)

    def go_through(params, keys):
        def one(key):
            task_key, trial_key = jax.random.split(key)
            task = problem.environment.sample_task(task_key)
            trial = rl.run_trial(
                problem.environment,
                policy,
                params,
                task,
                trial_key,
                num_episodes=problem.num_episodes,
                horizon=problem.horizon,
                greedy=greedy,
            )
            return summary(problem, task, trial)

        return jax.lax.map(one, keys, batch_size=TEST_CHUNK)

    mesh = devices.mesh_of_any(count)
    return jax.jit(go_through) if mesh is None else parallel.each_task(go_through, mesh)


def run(experiment: Experiment, config: TrialConfig) -> dict[str, Any]:
    """Trains (or resumes, or finds finished) a run, tests it, prints, and returns the content of results.json.

    With several seeds it is the content of seeds.json.
    """
    config = with_paper_defaults(experiment, config)

    def to_train(config: TrialConfig) -> Training:
        return training_of(config, experiment.problem_of(config), start_of(experiment, config))

    if config.seeds > 1:
        return seeds.run_seeds(functools.partial(run, experiment), to_train, config)
    training = to_train(config)
    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(run_dir, config, training)
        protocol = {
            "episodes": config.eval_episodes,
            "split": "new tasks",
            "selection": "largest reward on other tasks",
            "selected_step": trained.best_step,
            "normalisation": "none",
        }
        name = type(config).experiment
        results = runs.finish(run_dir, name, config, trained, protocol, lambda: experiment.test(config, trained.params))
        if jax.process_index() == 0:
            drawn = run_dir / "figures"
            figures.learning_curves(drawn / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]})
            if experiment.draw is not None:
                experiment.draw(drawn, results)
            if experiment.draw_behaviour is not None:
                experiment.draw_behaviour(drawn / "behaviour.png", config, trained.params, 3, config.seed)
    experiment.show(results)
    return results


def load(experiment: Experiment, run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner and the selected parameters of a run."""
    config = with_paper_defaults(experiment, stored_config(experiment.methods, Path(run_dir)))
    training = training_of(config, experiment.problem_of(config))
    optimizer = training.optimizer(config, None)
    return training.learner, common.load_params(config.run_dir, config, training.learner, training.inputs, optimizer)


def reward_table(results: Mapping[str, Any], paper: Mapping[str, float], title: str) -> Table:
    """The total reward of the policy and of the strategies beside the published ones.

    Args:
      results: with "metrics" and "strategies".
      paper: the published rewards by strategy.
      title: of the table.
    """
    table = Table(title=title)
    for heading in ("", "parameter", "reward", "published"):
        table.add_column(heading, justify="right" if heading else "left")
    policy = TITLES[results["algorithm"]]
    rows = {
        f"{policy}, most probable action": ({}, results["metrics"]["reward"], paper.get(policy, "")),
        f"{policy}, drawn action": ({}, results["metrics"]["reward_of_draws"], ""),
        **{name: (found, found, paper.get(name, "")) for name, found in results["strategies"].items()},
    }
    for name, (settings, found, number) in rows.items():
        parameter = settings.get("parameter")
        shown = "" if parameter is None else f"{parameter:g}"
        table.add_row(name, shown, intervals.format_mean(found["mean"][0], found["ci95"][0], digits=3), str(number))
    return table
