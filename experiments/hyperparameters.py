"""Hyperparameters learned by gradients through a whole training run.

A network is trained on digits for hundreds of steps of stochastic gradient descent. The learning rate of every layer
in every step, the momentum of every step and the strength of the L2 penalty of every layer are learned: the gradient
of the loss on held-out digits after the last step is taken with respect to all of them. The run is a task whose
support set is the training set and whose query set is the held-out one, and its hyperparameters are the
meta-parameters. Each run starts from other weights and sees the mini-batches in another order.

Memory stays small because the inner gradient is differentiated in mixed mode, and because the steps are divided into
segments of which only the starting point is stored; everything else is computed a second time.

The result is compared with other ways to spend the same number of training runs: the best of a grid of constant rates,
the best of a grid of starting points of a linear decay to zero, and random search over ten numbers that describe a
schedule. Hyperparameters are chosen by the loss on held-out digits, and every method is scored on a third set of
digits, which no choice used.

Maclaurin, Duvenaud and Adams, 2015, Gradient-based hyperparameter optimization through reversible learning.
https://arxiv.org/abs/1502.03492
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from experiments import common, devices, figures, intervals, packs, runs
from experiments.cli import (
    Precision,
    check_counts,
    check_outer_lr_end,
    check_run_dir,
    check_seed,
    expand_home,
    flag,
    main,
)
from experiments.runs import RunError, console
from maml_jax import Batch, Episode, MetaLearner, Model, evaluate_objective, hypergradient, losses, mixed_mode, models
from maml_jax.algorithms.hypergradient import RunHyperparameters, check_segments, default_segments
from maml_jax.cost import count_flops, temporary_bytes
from maml_jax.parallel import each_task
from maml_jax.tasks.pixels import scale_pixels
from maml_jax.types import SampleEpisodeFn, check_integer

FILE = "mnist_t10k.npz"
"""The digits: `images` uint8 [10000, 28, 28] and `labels` [10000], the test set of MNIST."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one experiment."""

    experiment: ClassVar[str] = "hyperparameters"

    algorithm: Annotated[str, tyro.conf.Suppress] = "hypergradient"
    hyperparameters: Annotated[Any, tyro.conf.Suppress] = ()  # of an algorithm of the catalogue, which this is not
    num_inner_steps: int = 400
    """Mini-batches of one training run."""
    batch_size: int = 50
    """Digits of a mini-batch."""
    hidden: int = 50
    """Units of the hidden layer."""
    num_training: int = 6000
    """Digits that the network is trained on."""
    num_heldout: int = 2000
    """Digits that hyperparameters are chosen by."""
    num_test: int = 2000
    """Digits that only score."""
    initial_rate: float = 0.3
    """Learning rate of every layer and step before the first meta-step."""
    initial_momentum: float = 0.5
    """Momentum of every step before the first meta-step."""
    initial_l2: float = 1e-5
    """Strength of the L2 penalty of every layer before the first meta-step; for constant rates and the linear decay."""
    meta_batch_size: int = 2
    """Training runs whose hypergradients are averaged in a meta-step."""
    num_meta_steps: int = 100
    """Meta-steps. The other methods get as many training runs as these and their validations take."""
    outer_optimizer: Literal["adam", "sgd"] = "adam"
    """Optimiser of the hyperparameters."""
    outer_lr: float = 0.03
    """Rate of the outer optimiser. Rates and penalties are learned as logarithms, momenta as logits. With a large one,
    training runs become unstable and their hypergradients explode."""
    outer_lr_end: float = 0.0
    """Rate of the outer optimiser after the last meta-step, unless the schedule is constant."""
    outer_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate of the outer optimiser changes."""
    num_segments: int | None = None
    """Parts of a training run whose starting points are stored; by default about the square root of its steps."""
    truncation: int | None = None
    """Last steps that the hypergradient passes through; the hyperparameters of earlier steps stay as they are. By
    default all steps."""
    memory_steps: tuple[int, ...] = (50, 100, 200, 400, 800)
    """Lengths of training runs whose memory is compared; empty for none."""
    eval_episodes: int = 10
    """Training runs, each with its own weights and order, that score a method."""
    val_episodes: int = 4
    """Training runs of a validation. The hyperparameters with the lowest held-out loss in a validation are kept."""
    val_every: int = 10
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 5
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""
    chunk_size: int | None = None
    """Training runs of a device that are vmapped together; by default chosen for the device."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""
    seed: int = 0
    """Seed of the division of the digits, of the training runs and of the random search."""
    data_dir: Path | None = None
    """The folder that holds mnist_t10k.npz; by default $MAML_JAX_PACKS."""
    run_dir: Path | None = None
    """Where the run is kept, and resumed from; by default runs/hyperparameters-SEED."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        expand_home(self)
        check_run_dir(self.run_dir)
        positive = (
            "num_inner_steps", "batch_size", "hidden", "num_training", "num_heldout", "num_test", "meta_batch_size",
            "num_segments", "truncation", "val_every", "log_every", "chunk_size",
        )  # fmt: skip
        check_counts(self, **dict.fromkeys(positive, 1), num_meta_steps=0, eval_episodes=2, val_episodes=2)
        for num_steps in self.memory_steps:
            check_integer("--memory-steps", num_steps, at_least=1)
        check_seed(self.seed)
        for name in ("initial_rate", "initial_l2", "outer_lr"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{flag(name)} {value} must be a positive number; it is learned as its logarithm")
        check_outer_lr_end(self.outer_lr_end, self.outer_lr, self.outer_schedule)
        if not 0 < self.initial_momentum < 1:
            raise ValueError(f"--initial-momentum {self.initial_momentum} must be between 0 and 1; it starts a logit")
        if self.batch_size > self.num_training:
            raise ValueError(
                f"--batch-size {self.batch_size} exceeds --num-training {self.num_training}; choose a smaller one"
            )
        check_segments(self.num_inner_steps, self.num_segments or 1, self.truncation)
        if self.val_every % self.log_every:
            raise ValueError(f"--log-every {self.log_every} does not divide --val-every {self.val_every}")


METHODS = {"hypergradient": Config()}


def with_paper_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    if config.run_dir is not None:
        return config
    return dataclasses.replace(config, run_dir=Path(f"runs/hyperparameters-{config.seed}"))


# Schedules that are not learned


def schedule(layers: Sequence[str], rate: Any, momentum: Any, l2: float) -> RunHyperparameters:
    """The same rates in all layers.

    Args:
      layers: their names.
      rate: [K], positive.
      momentum: [K], in [0, 1).
      l2: the strength of the penalty, in all layers.
    """
    rate, momentum = np.asarray(rate, np.float32), np.clip(np.asarray(momentum, np.float32), 1e-6, None)
    return RunHyperparameters(
        {name: np.log(rate) for name in layers},
        np.log(momentum / (1 - momentum)),
        {name: np.float32(math.log(l2)) for name in layers},
    )


def constant(layers: Sequence[str], num_steps: int, *, rate: float, momentum: float, l2: float) -> RunHyperparameters:
    """One rate and one momentum for all steps and layers."""
    return schedule(layers, np.full(num_steps, rate), np.full(num_steps, momentum), l2)


def linear_decay(
    layers: Sequence[str], num_steps: int, *, rate: float, momentum: float, l2: float
) -> RunHyperparameters:
    """A rate that falls from `rate` by equal amounts, to `rate` / K in the last step."""
    return schedule(layers, rate * (1 - np.arange(num_steps) / num_steps), np.full(num_steps, momentum), l2)


def random_schedule(layers: Sequence[str], num_steps: int, rng: np.random.Generator) -> RunHyperparameters:
    """Draws a schedule of 3L + 4 numbers for L layers, ten for two.

    By layer: the first rate, the last rate relative to it, and the strength of the penalty. For all: the momentum of
    the first and of the last step, the length of a linear warm-up, and the exponent of the decay from the first to the
    last rate.
    """

    def log_uniform(low, high):
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    progress = np.arange(num_steps) / num_steps
    warm_up = np.minimum(1, (1 + np.arange(num_steps)) / max(1, rng.uniform(0, 0.2) * num_steps))
    decay = (1 - progress) ** rng.uniform(0.5, 2)
    rates = {}
    for name in layers:
        first, last = log_uniform(0.1, 3), log_uniform(1e-3, 1)
        rates[name] = np.float32(np.log(first * warm_up * (last + (1 - last) * decay)))
    start, end = (1 - log_uniform(0.02, 1) for _ in range(2))
    momentum = schedule([], [], start + (end - start) * progress, 1.0).momentum_logits
    return RunHyperparameters(rates, momentum, {name: np.float32(math.log(log_uniform(1e-6, 1e-2))) for name in layers})


class Candidate(NamedTuple):
    """Hyperparameters and the numbers that describe them in the results."""

    hyperparameters: RunHyperparameters
    description: dict[str, float]


RATES, MOMENTA = (0.03, 5.0), (0.0, 0.5, 0.9)
"""The grids: an interval of rates, divided evenly on a logarithmic scale, with each momentum."""


def candidates(method: str, layers: Sequence[str], config: Config, count: int) -> list[Candidate]:
    """What one of the other methods tries with `count` training runs."""
    if method == "random search":
        rng = np.random.default_rng(config.seed)
        drawn = [random_schedule(layers, config.num_inner_steps, rng) for _ in range(count)]
        return [Candidate(hyperparameters, {"draw": index}) for index, hyperparameters in enumerate(drawn)]
    make = {"constant rate": constant, "linear decay": linear_decay}[method]
    found = []
    for rate in np.geomspace(*RATES, -(-count // len(MOMENTA))):
        for momentum in MOMENTA:
            numbers = {"rate": float(rate), "momentum": momentum, "l2": config.initial_l2}
            found.append(Candidate(make(layers, config.num_inner_steps, **numbers), numbers))
    return found[:count]


BASELINES = ("constant rate", "linear decay", "random search")


# Data


def digits_model(hidden: int) -> Model:
    """A fully connected network on uint8 images, with one hidden layer."""
    model = models.mlp(features=(hidden, 10))

    return Model(
        lambda key, images: model.init(key, scale_pixels(images)),
        lambda params, images: model.apply(params, scale_pixels(images)),
    )


def load_digits(config: Config) -> dict[str, Batch]:
    """The digits "training", "heldout" and "test", which share no image: a random division of the file.

    Raises:
      FileNotFoundError: if the file is missing.
      RunError: if it is too small.
      ValueError: if it is damaged.
    """
    file = packs.find(FILE, config.data_dir)
    images, labels = runs.read_npz(file, ("images", "labels")).values()
    is_label = labels.shape == images.shape[:1] and np.isin(labels, range(10)).all()
    if images.dtype != np.uint8 or images.ndim != 3 or not is_label:
        raise RunError(
            f"{file} must hold uint8 images [n, height, width] and labels [n] from 0 to 9, got {images.dtype} "
            f"{list(images.shape)} and {list(labels.shape)}"
        )
    sizes = {"training": config.num_training, "heldout": config.num_heldout, "test": config.num_test}
    if sum(sizes.values()) > len(images):
        raise RunError(
            f"--num-training, --num-heldout and --num-test ask for {sum(sizes.values())} digits and {file} has "
            f"{len(images)}; choose smaller numbers"
        )
    order, parts, start = np.random.default_rng(config.seed).permutation(len(images)), {}, 0
    for name, size in sizes.items():
        chosen = order[start : start + size]
        parts[name] = Batch(images[chosen], labels[chosen].astype(np.int32))
        start += size
    return parts


def make_sampler(support: Batch, query: Batch) -> SampleEpisodeFn:
    """The distribution of training runs on `support` that `query` scores; they differ in their keys only."""
    return jax.tree_util.Partial(Episode, *jax.tree.map(jnp.asarray, (support, query)))


# The experiment


def make_learner(config: Config, **changes: Any) -> MetaLearner:
    """The learner of the settings."""
    differentiated = min(config.truncation or config.num_inner_steps, config.num_inner_steps)
    settings = {
        "num_inner_steps": config.num_inner_steps,
        "num_segments": config.num_segments or default_segments(differentiated),
        "truncation": config.truncation,
    } | changes
    return hypergradient(
        digits_model(config.hidden),
        losses.cross_entropy,
        metric_fn=losses.accuracy,
        initial=lambda layers: jax.tree.map(
            jnp.asarray,
            constant(
                layers,
                settings["num_inner_steps"],
                rate=config.initial_rate,
                momentum=config.initial_momentum,
                l2=config.initial_l2,
            ),
        ),
        batch_size=config.batch_size,
        **settings,
    )


def make_search(learner: MetaLearner, episode: Episode) -> Callable[[Sequence[Candidate]], Candidate]:
    """Returns a function of candidates, to the one with the lowest query loss after one training run.

    All candidates start from the same weights and see the same mini-batches. The runs are divided over the devices.
    """

    def losses_of(episode, stacked):
        return jax.lax.map(lambda hyperparameters: learner.objective(hyperparameters, episode)[0], stacked)

    programs: dict[int, Callable] = {}

    def search(tried: Sequence[Candidate]) -> Candidate:
        if len(tried) not in programs:
            mesh = devices.mesh_for(len(tried))
            programs[len(tried)] = jax.jit(losses_of) if mesh is None else each_task(losses_of, mesh)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(candidate.hyperparameters for candidate in tried))
        found = np.asarray(programs[len(tried)](episode, stacked))
        return tried[int(np.argmin(np.where(np.isfinite(found), found, np.inf)))]

    return search


def score(
    learner: MetaLearner, hyperparameters: RunHyperparameters, digits: dict[str, Batch], config: Config
) -> tuple[dict[str, Any], np.ndarray]:
    """Held-out loss, test loss and test accuracy over fresh training runs, each with its 95 % interval.

    Returns:
      The means and intervals, and the test loss of every run [E]. Run i is the same for all hyperparameters.
    """
    found, test_loss = {}, np.empty(0)
    for split in ("heldout", "test"):
        of_runs = evaluate_objective(
            learner,
            hyperparameters,
            make_sampler(digits["training"], digits[split]),
            runs.streams(config.seed).test,
            num_episodes=config.eval_episodes,
            mesh=devices.mesh_for(config.eval_episodes),
        )
        (loss, info), (loss_ci95, info_ci95) = of_runs.mean, of_runs.ci95
        found[f"{split}_loss"] = {"mean": float(loss), "ci95": float(loss_ci95)}
        found[f"{split}_accuracy"] = {"mean": float(info.metric), "ci95": float(info_ci95.metric)}
        test_loss = np.asarray(of_runs.per_episode[0])
    return found, test_loss


def compare(
    config: Config,
    learner: MetaLearner,
    learned: RunHyperparameters,
    learn_seconds: float,
    digits: dict[str, Batch],
) -> dict[str, Any]:
    """Tunes the other methods with as many training runs, and scores all."""
    layers = list(learned.log_l2)
    # Those of all meta-steps and validations.
    num_validations = -(-config.num_meta_steps // config.val_every)
    num_runs = config.num_meta_steps * config.meta_batch_size + num_validations * config.val_episodes
    episode = make_sampler(digits["training"], digits["heldout"])(runs.streams(config.seed).tune)
    search = make_search(learner, episode)
    start = constant(
        layers, config.num_inner_steps, rate=config.initial_rate, momentum=config.initial_momentum, l2=config.initial_l2
    )
    methods = {
        "before learning": {"hyperparameters": start, "runs": 0, "seconds": 0.0},
        "hypergradients": {"hyperparameters": learned, "runs": num_runs, "seconds": learn_seconds},
    }
    for name in BASELINES:
        begin = time.perf_counter()
        num_candidates = max(1, num_runs)
        best = search(candidates(name, layers, config, num_candidates))
        methods[name] = {
            "hyperparameters": best.hyperparameters,
            "runs": num_candidates,
            "seconds": time.perf_counter() - begin,
            "chosen": best.description,
        }
        console.print(f"{name}: {num_candidates} training runs in {methods[name]['seconds']:.0f} s")
    test_losses = {}
    for name, method in methods.items():
        scores, test_losses[name] = score(learner, method["hyperparameters"], digits, config)
        method |= scores
        method["hyperparameters"] = jax.tree.map(lambda x: np.asarray(x).tolist(), method["hyperparameters"])._asdict()
    for name in methods.keys() - {"hypergradients"}:
        more = intervals.mean_and_interval(test_losses[name] - test_losses["hypergradients"])
        methods[name]["test_loss_more"] = {measure: value[0] for measure, value in more.items()}
    test_loss = methods["hypergradients"]["test_loss"]
    return {
        "metrics": {"test_loss": {"mean": [test_loss["mean"]], "ci95": [test_loss["ci95"]]}},
        "methods": methods,
        "relative_flops": relative_flops(config, learned, episode),
        "memory": memory(config, layers, episode),
    }


def relative_flops(config: Config, hyperparameters: RunHyperparameters, episode: Episode) -> float:
    """The operations of a training run with its hypergradient, divided by those of one without."""
    objective = make_learner(config).objective
    return count_flops(jax.grad(objective, has_aux=True), hyperparameters, episode) / count_flops(
        lambda *args: objective(*args)[0], hyperparameters, episode
    )


WAYS = {"reverse over reverse": (jax.value_and_grad, False), "mixed mode": (mixed_mode, False),
        "mixed mode, segments": (mixed_mode, True)}  # fmt: skip
"""How a hypergradient is computed: the transform of the inner gradient, and whether there are segments."""


def memory(config: Config, layers: Sequence[str], episode: Episode) -> list[dict[str, Any]]:
    """Bytes of temporaries of a compiled hypergradient, for each length of the training run and each way."""
    rows = []
    for steps in config.memory_steps:
        hyperparameters = constant(layers, steps, rate=0.1, momentum=0.5, l2=1e-5)
        for way, (inner_grad, has_segments) in WAYS.items():
            segments = default_segments(steps) if has_segments else 1
            learner = make_learner(
                config, num_inner_steps=steps, num_segments=segments, truncation=None, inner_grad=inner_grad
            )
            gradient = jax.grad(learner.objective, has_aux=True)
            bytes_of_way = temporary_bytes(gradient, hyperparameters, episode)
            rows.append({"inner_steps": steps, "way": way, "segments": segments, "temporary_bytes": bytes_of_way})
    return rows


def run(config: Config) -> dict[str, Any]:
    """Learns the hyperparameters, compares them with others, and returns the content of results.json."""
    config = with_paper_defaults(config)
    digits = load_digits(config)
    with runs.open_run(config.run_dir, config, runs.digest_of_batches(digits.values())) as run_dir:
        learner, sampler = make_learner(config), make_sampler(digits["training"], digits["heldout"])

        def validate(hyperparameters: RunHyperparameters) -> float:
            found = evaluate_objective(
                learner,
                jax.device_get(hyperparameters),  # as in the scores, which then are the same program
                sampler,
                runs.streams(config.seed).val,
                num_episodes=config.val_episodes,
                mesh=devices.mesh_for(config.val_episodes),
            )
            return -float(found.mean[0])

        trained = common.train(run_dir, config, common.Training(learner, sampler, validate))
        protocol = {
            "training": config.num_training,
            "heldout": config.num_heldout,
            "test": config.num_test,
            "episodes": config.eval_episodes,
            "split": "test",
            "selection": "lowest held-out loss in a validation; of one training run for the other methods",
            "selected_step": trained.best_step,
            "normalisation": "none",
        }
        results = runs.finish(
            run_dir,
            "hyperparameters",
            config,
            trained,
            protocol,
            lambda: compare(config, learner, trained.params, sum(trained.seconds.values()), digits),
        )
        if jax.process_index() == 0:
            figures.learning_curves(
                run_dir / "figures" / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]}
            )
            figures.schedules(run_dir / "figures" / "schedules.png", results["methods"])
            figures.memory(run_dir / "figures" / "memory.png", results["memory"])
    show(results)
    return results


def format_more(method: dict[str, Any]) -> str:
    """How much larger the test loss is than that of hypergradients, with the 95 % interval paired by training run."""
    return intervals.format_mean(**method["test_loss_more"], digits=4) if "test_loss_more" in method else ""


def show(results: dict[str, Any]) -> None:
    """Prints the methods, the best on the test digits first, and the memory."""
    protocol, methods = results["protocol"], results["methods"]

    def loss_of(name: str) -> float:
        mean = methods[name]["test_loss"]["mean"]
        return math.inf if mean is None else mean

    table = Table(
        title=f"Loss after {results['config']['num_inner_steps']} mini-batches, in nats per digit; mean and 95 % "
        f"interval of {protocol['episodes']} training runs; test loss more by: than hypergradients"
    )
    for heading in ("", "held-out loss", "test loss", "more by", "right, %", "runs", "seconds"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for name in sorted(methods, key=loss_of):
        method = methods[name]
        table.add_row(
            name,
            *(intervals.format_mean(**method[metric], digits=4) for metric in ("heldout_loss", "test_loss")),
            format_more(method),
            intervals.format_mean(**method["test_accuracy"], scale=100),
            str(method["runs"]),
            f"{method['seconds']:.0f}",
        )
    console.print(table)
    console.print(
        f"A run with its hypergradient takes {results['relative_flops']:.1f} times the operations of one without.",
        highlight=False,
    )
    if results["memory"]:
        table = Table(title="Temporaries of a hypergradient, MB")
        for heading in ("mini-batches", *WAYS):
            table.add_column(heading, justify="right")
        by = {(row["inner_steps"], row["way"]): row["temporary_bytes"] / 1e6 for row in results["memory"]}
        for steps in dict.fromkeys(steps for steps, _ in by):
            table.add_row(str(steps), *(f"{by[steps, way]:.1f}" for way in WAYS))
        console.print(table)


if __name__ == "__main__":
    about = {"hypergradient": "Learns rates, momenta and penalties by their gradients (Maclaurin et al., 2015)."}
    main(METHODS, run, __doc__, about=about)
