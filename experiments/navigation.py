"""2D navigation by meta-reinforcement learning (MAML paper, section 5.3 and figure 4).

A point is to find a goal that it does not see. A policy is trained so that one policy-gradient step on 20 trajectories
changes it into one that goes there; at test it takes four. Where the text and the data behind the published curve
differ, the data are followed: the reward is minus the distance, not its square; an action is clipped to ±1 and moves
the point by a tenth of it; the rates are 0.5 and then 0.25.

Only the first update is trained. The rates of the later ones are chosen on validation goals, and so is the state: it is
the one with the largest mean return after 1, 2 and 3 updates.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

from experiments import common, devices, figures, intervals, published, runs, seeds
from experiments.cli import RunConfig, check_counts, flag, main, typed, with_defaults
from experiments.common import Training
from experiments.runs import console, stored_config
from maml_jax import (
    Batch,
    Episode,
    InnerDescent,
    MetaLearner,
    Model,
    NoHyperparameters,
    OuterRule,
    anil,
    fomaml,
    maml,
    models,
    parallel,
    rl,
)
from maml_jax.tasks.navigation import HORIZON, navigation, optimal_return
from maml_jax.types import ArrayTree, Environment, PRNGKey, check_positive

LATER_RATES = (0.05, 0.1, 0.15, 0.25, 0.5)
"""Rates of the updates after the first, relative to a first rate of 0.5, that are tried on validation goals."""
FIRST_RATES = (0.1, 0.25, 0.5, 1.0)
"""Rates of the first update that are tried on validation goals for a policy that was not trained to adapt."""
NUM_VALIDATION_GOALS = 40
SURROGATES = {
    "policy-gradient": rl.policy_gradient,
    "ratio": rl.ratio_surrogate,
    "loaded-dice": rl.loaded_dice,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The settings of one run."""

    experiment: ClassVar[str] = "navigation"

    shot: int = 20
    """Trajectories before each update and after the last, in training."""
    query_shot: Annotated[int | None, tyro.conf.Suppress] = None
    horizon: int = HORIZON
    """Time steps of a trajectory; it ends sooner where the goal is reached."""
    meta_batch_size: int = 20
    """Goals per meta-step."""
    num_meta_steps: int = 300
    """Outer updates; the authors' script has 100 with 40 goals each. A run may be continued with a larger number."""
    surrogate: Literal["policy-gradient", "ratio", "loaded-dice"] = "policy-gradient"
    """The inner loss. The authors' code has policy-gradient, the log-likelihood times the advantage, whose second
    derivative is biased. That of ratio is less so. That of loaded-dice is exact for unbiased advantages; those of here
    are standardised."""
    outer_rule: Literal["trust-region", "clipped"] = "trust-region"
    """The outer update: a step within a bound on the KL (the authors'), or several steps of the outer optimiser, with
    its --outer-lr, on a clipped ratio. Steps that --max-kl refuses do not count in the outer schedule."""
    max_kl: float = 0.01
    """The bound on the mean KL of the adapted policies, in nats. With --outer-rule clipped no further step is taken
    above it."""
    metric_stride: int = 7
    """The metric of the trust region sees every so many time steps. The authors' code sees all of them, at four times
    the cost of an update."""
    clip: float = 0.2
    """The change of the ratio beyond which nothing is gained, with --outer-rule clipped."""
    epochs: int = 5
    """Steps of the outer optimiser on the same trajectories, with --outer-rule clipped."""
    head_scale: float = 0.1
    """What the initial weights of the last layer are multiplied by; 1 in the authors' code. With 1 some seeds run away
    from the origin."""
    outer_optimizer: Annotated[Literal["adam", "sgd"], tyro.conf.Suppress] = "adam"
    eval_episodes: int = 600
    """Fresh goals of the test, besides the 40 published ones."""
    eval_shot: int = 40
    """Trajectories before each update and after the last, at test; the authors have 4,000 time steps, as many if none
    ends early."""
    eval_inner_steps: int = 4
    """Updates at test."""
    later_lr: float | None = None
    """Rate of the updates at test after the first; by default chosen on validation goals. The authors' is 0.25."""
    val_every: int = 50
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 10
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        check_counts(self, horizon=1, metric_stride=1, epochs=1, eval_shot=1, eval_inner_steps=1)
        if getattr(self.hyperparameters, "num_inner_steps", 1) is None:
            raise ValueError("--num-inner-steps None has no meaning here; give the number of updates in training")
        if self.algorithm == "random" and self.num_meta_steps:
            raise ValueError(
                f"--num-meta-steps {self.num_meta_steps} does not fit random, whose parameters are not trained; leave "
                "it at 0"
            )
        for name in ("max_kl", "clip", "head_scale", "later_lr"):
            if getattr(self, name) is not None:
                check_positive(flag(name), getattr(self, name))
        if self.later_lr is not None and self.eval_inner_steps == 1:
            raise ValueError(f"--later-lr {self.later_lr} has no effect with --eval-inner-steps 1; leave it out")
        clipped = ("clip", "epochs", "outer_lr", "outer_schedule", "outer_clip")
        for name in clipped if self.outer_rule == "trust-region" else ("metric_stride",):
            if getattr(self, name) != (default := getattr(Config, name)):
                raise ValueError(
                    f"{typed(name, getattr(self, name))} has no effect with --outer-rule {self.outer_rule}; leave it "
                    f"at {default}, or choose the other rule"
                )
        if self.on_nonfinite == "skip" and self.outer_rule == "trust-region":
            raise ValueError(
                "--on-nonfinite skip needs --outer-rule clipped; the trust region refuses such steps itself"
            )


DESCENT = InnerDescent(inner_lr=0.5, num_inner_steps=1)
METHODS = {
    "maml": Config(algorithm="maml", hyperparameters=DESCENT),
    "fomaml": Config(algorithm="fomaml", hyperparameters=DESCENT),
    "anil": Config(algorithm="anil", hyperparameters=DESCENT),
    "pretrained": Config(algorithm="pretrained", hyperparameters=NoHyperparameters()),
    "random": Config(algorithm="random", hyperparameters=NoHyperparameters(), num_meta_steps=0),
    "oracle": Config(algorithm="oracle", hyperparameters=NoHyperparameters()),
}
TEXTS = {
    "maml": "MAML, exact second order.",
    "fomaml": "MAML without second derivatives.",
    "anil": "Only the last layer adapts.",
    "pretrained": "One policy for all goals, adapted at test only.",
    "random": "Random parameters, adapted at test only.",
    "oracle": "Sees the goal, and does not adapt.",
}


TITLES = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "pretrained": "pretrained on all goals",
    "random": "random parameters",
    "oracle": "oracle (sees the goal)",
}
"""The methods in tables and figures."""


def about() -> dict[str, str]:
    """A line on each method for --help, with its published returns."""

    def line(name: str) -> str:
        returns = published.NAVIGATION.get(name)
        shown = f" Published return after 0, 1, ... updates: {' / '.join(map(str, returns))}." if returns else ""
        return TEXTS[name] + shown

    return {name: line(name) for name in METHODS}


def with_paper_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    return with_defaults(config, {"run_dir": Path(f"runs/navigation-{config.algorithm}-{config.seed}")})


def num_updates_of(config: Config) -> int:
    """The inner steps of training."""
    return getattr(config.hyperparameters, "num_inner_steps", 0)


def environment_of(config: Config) -> Environment:
    """2D navigation; for the oracle the goal is a part of the observation."""
    plain = navigation()
    if config.algorithm != "oracle":
        return plain

    def with_goal(goal, result):
        state, observation, *rest = result
        return state, jnp.concatenate([observation, goal]), *rest

    return plain._replace(
        reset=lambda goal, key: with_goal(goal, plain.reset(goal, key)),
        step=lambda goal, *arguments: with_goal(goal, plain.step(goal, *arguments)),
    )


def make_policy(config: Config) -> Model:
    """Two hidden layers of 100 ReLUs, means that are linear in them, and a standard deviation that is a parameter."""
    network = models.mlp(features=(100, 100, 2), kernel_init=nn.initializers.xavier_uniform())
    network = rl.scaled_start(network, lambda name: name == "dense_2/kernel", config.head_scale)
    return rl.normal_policy(network, action_size=2)


def learner_of(config: Config, rates: Sequence[float] | jax.Array, num_steps: int) -> MetaLearner:
    """The algorithm with `num_steps` inner steps of these rates [K], K ≥ num_steps, each with data of its own."""
    rates = jnp.asarray(rates, jnp.float32)
    builder: Callable[..., MetaLearner] = {
        "fomaml": fomaml,
        "anil": functools.partial(anil, head=lambda name: name.startswith("network/dense_2")),
    }.get(config.algorithm, maml)
    return builder(
        make_policy(config),
        SURROGATES[config.surrogate],
        inner_optimizer=optax.scale_by_schedule(lambda step: -rates[step]) if len(rates) else optax.sgd(1.0),
        num_inner_steps=num_steps,
        data_per_step=True,
    )


def sampler_of(config: Config) -> Callable[[PRNGKey, ArrayTree], Episode]:
    """Trajectories of the policies before and after the inner steps of training."""
    rates = [getattr(config.hyperparameters, "inner_lr", 0.0)] * num_updates_of(config)
    return rl.make_sampler(
        functools.partial(learner_of, config, rates),
        environment_of(config),
        num_updates=num_updates_of(config),
        num_trajectories=config.shot,
        horizon=config.horizon,
    )


def meta_learner_of(config: Config) -> MetaLearner:
    """The learner of training, with the objective of the outer rule."""
    rates = [getattr(config.hyperparameters, "inner_lr", 0.0)] * num_updates_of(config)
    outer = rl.ratio_surrogate if config.outer_rule == "trust-region" else rl.clipped_surrogate(config.clip)
    return rl.meta_policy(learner_of(config, rates, num_updates_of(config)), outer)


def outer_rule_of(config: Config, learner: MetaLearner, mesh: jax.sharding.Mesh | None) -> OuterRule:
    """The outer update."""
    if config.outer_rule == "clipped":
        optimizer = common.outer_optimizer(config, updates_per_step=config.epochs)
        return rl.clipped_epochs(optimizer, num_epochs=config.epochs, max_kl=config.max_kl)
    return rl.trust_region(learner, max_kl=config.max_kl, metric_stride=config.metric_stride, mesh=mesh)


def returns_at(
    config: Config, params: ArrayTree, goals: jax.Array, key: PRNGKey, rates: Sequence[float], num_trajectories: int
) -> np.ndarray:
    """The mean returns [G, K+1] at goals [G, 2] before each update and after the last, with rates [K]."""
    program = returns_program(of_program(config), len(goals), len(rates), num_trajectories)
    rates = jnp.array(rates, jnp.float32)
    return np.asarray(program((params, rates), (goals, jax.random.split(key, len(goals)))))


def of_program(config: Config) -> Config:
    """The settings without those on which no compiled program depends, so that it is not compiled again."""
    return dataclasses.replace(config, seed=0, seeds=1, run_dir=None, num_meta_steps=0, later_lr=None)


@functools.lru_cache(maxsize=8)
def returns_program(config: Config, num_goals: int, num_updates: int, num_trajectories: int) -> Callable:
    """A compiled function of `((params, rates), (goals, keys))`, divided over the devices."""

    def at(params_and_rates, goals_and_keys):
        params, rates = params_and_rates

        def at_one(goal_and_key):
            batches = collect(config, params, *goal_and_key, rates, num_updates, num_trajectories)
            return rl.returns_of(*batches)

        return jax.lax.map(at_one, goals_and_keys)

    mesh = devices.mesh_of_any(num_goals)
    return jax.jit(at) if mesh is None else parallel.each_task(at, mesh)


@functools.partial(jax.jit, static_argnames=("config", "num_updates", "num_trajectories"))
def collect(
    config: Config,
    params: ArrayTree,
    goal: jax.Array,
    key: PRNGKey,
    rates: jax.Array,
    num_updates: int,
    num_trajectories: int,
) -> tuple[Batch, Batch]:
    """What the policies before each update and after the last did at a goal [2]; see `rl.collect`."""
    return rl.collect(
        functools.partial(learner_of, config, rates),
        environment_of(config),
        params,
        goal,
        key,
        num_updates=num_updates,
        num_trajectories=num_trajectories,
        horizon=config.horizon,
        advantage_fn=rl.linear_advantages(),
    )


def draw_goals(key: PRNGKey, count: int) -> jax.Array:
    """Goals [count, 2] of the environment."""
    return jax.vmap(navigation().sample_task)(jax.random.split(key, count))


def fresh_goals(seed: int, count: int) -> tuple[jax.Array, PRNGKey]:
    """Goals [count, 2] of the test of a seed, and the key of the trajectories there."""
    goal_key, _, key = jax.random.split(runs.streams(seed).test, 3)
    return draw_goals(goal_key, count), key


def published_goals() -> jax.Array:
    """The 40 goals [40, 2] of the published curve, which the authors' code draws with numpy's seed 1."""
    return jnp.asarray(np.random.RandomState(1).uniform(-0.5, 0.5, (40, 2)), jnp.float32)


def rate_candidates(config: Config) -> list[list[float]]:
    """The rates [K] of the updates at test, of which one is chosen on validation goals."""
    trained = getattr(config.hyperparameters, "inner_lr", None)
    firsts = FIRST_RATES if trained is None else (trained,)
    more = config.eval_inner_steps - 1
    if config.algorithm == "oracle":
        return [[]]
    found = [
        (first, *[later] * more)
        for first in firsts
        for later in ((config.later_lr,) if config.later_lr else (first * rate / 0.5 for rate in LATER_RATES))
    ]
    return list(map(list, dict.fromkeys(found)))  # with one update all later rates are the same


def on_validation_goals(config: Config, params: ArrayTree) -> tuple[list[float], float]:
    """The best rates on validation goals, and the mean return after 1, 2 and 3 updates with them.

    A policy that does not adapt is scored as it is.
    """
    keys = jax.random.split(runs.streams(config.seed).val)
    goals = draw_goals(keys[0], NUM_VALIDATION_GOALS)
    scores = {}
    for rates in rate_candidates(config):
        found = returns_at(config, params, goals, keys[1], rates, config.shot)
        scores[tuple(rates)] = float(found[:, 1:4].mean() if rates else found.mean())
    best = max(scores, key=lambda rates: scores[rates] if math.isfinite(scores[rates]) else -math.inf)
    return list(best), scores[best]


def training_of(config: Config) -> Training:
    """What is trained, at settings without gaps."""
    learner = meta_learner_of(config)
    observation = jnp.zeros((1, 4 if config.algorithm == "oracle" else 2))
    return Training(
        learner,
        sampler_of(config),
        lambda params: on_validation_goals(config, params)[1],
        make_optimizer=lambda mesh: outer_rule_of(config, learner, mesh),
        inputs=observation,
    )


def test(config: Config, params: ArrayTree) -> dict[str, Any]:
    """The returns at the published goals and at fresh ones, with rates chosen on validation goals."""
    _, published_key, _ = jax.random.split(runs.streams(config.seed).test, 3)
    rates, _ = on_validation_goals(config, params)
    evaluations = []
    of_goals = {
        "published": (published_goals(), published_key),
        "fresh": fresh_goals(config.seed, config.eval_episodes),
    }
    for name, (goals, goals_key) in of_goals.items():
        found = returns_at(config, params, goals, goals_key, rates, config.eval_shot)
        evaluations.append(
            {
                "goals": name,
                "count": len(goals),
                "optimum": float(optimal_return(goals, config.horizon).mean()),
                "metrics": {"return": intervals.mean_and_interval(found)},
            }
        )
    std = np.exp(np.asarray(params["log_std"])).tolist()
    return {"metrics": evaluations[0]["metrics"], "evaluations": evaluations, "rates": rates, "policy_std": std}


def run(config: Config) -> dict[str, Any]:
    """Trains, tests, prints, and returns the content of results.json, or of seeds.json."""
    config = with_paper_defaults(config)
    if config.seeds > 1:
        return seeds.run_seeds(run, training_of, config)
    training = training_of(config)
    with runs.open_run(config.run_dir, config) as run_dir:
        trained = common.train(run_dir, config, training)
        protocol = {
            "episodes": config.eval_episodes,
            "shot": config.eval_shot,
            "split": "goals of the published curve, and fresh ones",
            "selection": "largest mean return after 1, 2 and 3 updates on validation goals",
            "selected_step": trained.best_step,
            "validation_goals": NUM_VALIDATION_GOALS,
            "later_rates": "chosen on validation goals" if config.later_lr is None else "given",
            "normalisation": "none",
        }
        results = runs.finish(run_dir, "navigation", config, trained, protocol, lambda: test(config, trained.params))
        if jax.process_index() == 0:
            drawn = run_dir / "figures"
            figures.returns(drawn / "returns.png", {TITLES[config.algorithm]: [results]}, published_returns([results]))
            draw_behaviour(drawn / "behaviour.png", config, trained.params, 4, config.seed, results["rates"])
            figures.learning_curves(drawn / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]})
    show(results)
    return results


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner of training and the selected parameters of a run."""
    config = stored_config(METHODS, Path(run_dir))
    training = training_of(config)
    optimizer = training.optimizer(config, None)
    params = common.load_params(config.run_dir, config, training.learner, training.inputs, optimizer)
    return training.learner, params


def draw_behaviour(
    file: Path, config: Config, params: ArrayTree, num_goals: int, seed: int, rates: Sequence[float] | None = None
) -> None:
    """Draws the paths of the policies before each update and after the last, at the first published goals.

    The rates are by default chosen on validation goals.
    """
    found, rates = [], jnp.array(on_validation_goals(config, params)[0] if rates is None else rates, jnp.float32)
    own_key = jax.random.fold_in(runs.streams(seed).test, 3)  # the test splits its stream into the keys 0, 1 and 2
    for index, goal in enumerate(published_goals()[:num_goals]):
        key = jax.random.fold_in(own_key, index)
        support, query = collect(of_program(config), params, goal, key, rates, len(rates), 10)
        batches = [jax.tree.map(lambda x, k=k: x[k], support) for k in range(len(rates))] + [query]
        found.append({"goal": np.asarray(goal), "paths": np.stack([positions(batch) for batch in batches])})
    figures.paths(file, found)


def positions(batch: Batch) -> np.ndarray:
    """The positions [H, N, 2] of trajectories, not a number after their end."""
    mask = np.asarray(batch.targets.mask)[..., None]
    return np.where(mask > 0, np.asarray(batch.inputs)[..., :2], np.nan)


def published_returns(results: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[float]]:
    """The published returns by title, of the methods that have results with the published horizon."""
    return {
        TITLES[result["algorithm"]]: published.NAVIGATION[result["algorithm"]]
        for result in results
        if result["algorithm"] in published.NAVIGATION and result["config"]["horizon"] == HORIZON
    }


def show(results: dict[str, Any]) -> None:
    """Prints the returns after every update."""
    count = len(results["metrics"]["return"]["mean"])
    table = Table(title=f"{TITLES[results['algorithm']]}, 2D navigation: mean return after each update")
    for heading in ("goals", "number", *map(str, range(count)), "optimum"):
        table.add_column(heading, justify="right")
    for evaluation in results["evaluations"]:
        metric = evaluation["metrics"]["return"]
        cells = [intervals.format_mean(*pair) for pair in zip(metric["mean"], metric["ci95"], strict=True)]
        table.add_row(evaluation["goals"], str(evaluation["count"]), *cells, f"{evaluation['optimum']:.2f}")
    for returns in published_returns([results]).values():
        table.add_row("published values", "40", *[*map(str, returns), *[""] * count][:count], "")
    console.print(table)
    console.print(
        f"rates {', '.join(f'{rate:g}' for rate in results['rates']) or 'none'}; standard deviation of the policy "
        + ", ".join(f"{std:.2f}" for std in results["policy_std"])
    )


if __name__ == "__main__":
    main(METHODS, run, __doc__, about=about())
