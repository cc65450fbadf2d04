"""First against second order: what the exact meta-gradient costs, what it gains, and how far the two differ.

MAML and FOMAML train for the same number of meta-steps from the same parameters on the same tasks, in turns. On the
way both are tested, and both meta-gradients are computed at the parameters of MAML, on tasks that neither has seen. The
short form (--short) only trains on sinusoids, for a thousand meta-steps.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import common
from experiments.devices import mesh_for
from experiments.intervals import format_mean
from experiments.runs import RunError, flag, streams
from maml_jax import (
    MetaLearner,
    Model,
    evaluate,
    first_order,
    init_meta_state,
    losses,
    make_train_loop,
    maml,
    mixed_mode,
    models,
    parallel,
)
from maml_jax.cost import Cost, cost_of
from maml_jax.meta_gradient import meta_gradient
from maml_jax.tasks import few_shot, omniglot, sinusoid
from maml_jax.types import ArrayTree, Episode, LossFn, MetaState, SampleEpisodeFn, check_integer, task_keys

ORDERS = {"second order": mixed_mode, "first order": first_order}


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The trainings. The defaults take more than an hour on two cores of a CPU."""

    workload: tuple[Literal["sinusoid", "omniglot"], ...] = ("sinusoid", "omniglot")
    """sinusoid: an MLP of 40 and 40 units, 10 support and 10 query points. omniglot: conv4, 5-way 1-shot."""
    inner_steps: tuple[int, ...] = (1, 5, 10)
    """Inner steps, in training and in the test."""
    sinusoid_inner_lr: tuple[float, ...] = (0.001, 0.001, 0.001)
    """Inner rate on sinusoids for each number of --inner-steps: that behind the table of the MAML paper. At the 0.01 of
    its text some trainings of ten steps diverge."""
    omniglot_inner_lr: tuple[float, ...] = (2.0, 0.4, 0.4)
    """Inner rate on Omniglot for each number of --inner-steps. 2.0 is the paper's 0.4 for a sum over five classes. Five
    steps of 0.4 are as long as one of 2.0."""
    sinusoid_steps: int = 10_000
    """Meta-steps of each training on sinusoids, a multiple of --parts."""
    omniglot_steps: int = 5000
    """Meta-steps of each training on Omniglot, a multiple of --parts."""
    sinusoid_seeds: int = 3
    """Trainings on sinusoids with each order."""
    omniglot_seeds: int = 1
    """Trainings on Omniglot with each order."""
    parts: int = 20
    """Compiled calls of a training. Before the first and after each both are tested, and their meta-gradients
    compared."""
    sinusoid_tasks: int = 25
    """Tasks of a meta-step on sinusoids."""
    omniglot_tasks: int = 16
    """Tasks of a meta-step on Omniglot."""
    omniglot_query_shot: int = 1
    """Query examples per class on Omniglot."""
    sinusoid_compared_tasks: int = 256
    """Fresh tasks on which the two meta-gradients are compared, on sinusoids."""
    omniglot_compared_tasks: int = 32
    """The same on Omniglot."""
    eval_episodes: int = 600
    """Test tasks at the end of a training."""
    curve_episodes: int = 100
    """Test tasks, others than those of the end, at each point of the learning curves."""
    features: tuple[int, ...] = (40, 40, 1)
    """Widths of the layers of the MLP."""
    filters: int = 64
    """Filters of each convolution."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything is trained, for settings that do not fit together."""
        super().__post_init__()
        common.check_not_empty(self, "workload", "inner_steps")
        counts = ("seeds", "steps", "tasks", "compared_tasks")
        for name in ("parts", *(f"{workload}_{of}" for workload in ("sinusoid", "omniglot") for of in counts)):
            check_integer(flag(name), getattr(self, name), at_least=1)
        for name in ("eval_episodes", "curve_episodes"):
            check_integer(flag(name), getattr(self, name), at_least=2)
        for name in ("sinusoid", "omniglot"):
            rates, steps = getattr(self, f"{name}_inner_lr"), getattr(self, f"{name}_steps")
            if len(rates) != len(self.inner_steps):
                raise ValueError(
                    f"--{name}-inner-lr has {len(rates)} rates and --inner-steps {len(self.inner_steps)} numbers; give "
                    "one rate for each"
                )
            if steps % self.parts:
                raise ValueError(f"--{name}-steps {steps} is no multiple of --parts {self.parts}; choose one")


SHORT = Config(
    short=True,
    workload=("sinusoid",),
    inner_steps=(1, 5),
    sinusoid_inner_lr=(0.001, 0.001),
    omniglot_inner_lr=(2.0, 0.4),
    sinusoid_steps=1000,
    sinusoid_seeds=1,
    parts=5,
    eval_episodes=100,
)


class Workload(NamedTuple):
    """A task distribution and how it is trained and tested.

    Attributes:
      model: the network.
      loss_fn: of the support and of the query set.
      metric_fn: of the test.
      metric: what the metric is called.
      samplers: the task distributions of "train" and "test".
      inner_lr: the inner rate for each number of inner steps.
      num_steps: meta-steps of a training.
      num_tasks: tasks of a meta-step.
      num_seeds: trainings with each order.
      num_compared: fresh tasks on which the two meta-gradients are compared.
    """

    model: Model
    loss_fn: LossFn
    metric_fn: LossFn
    metric: str
    samplers: dict[str, SampleEpisodeFn]
    inner_lr: tuple[float, ...]
    num_steps: int
    num_tasks: int
    num_seeds: int
    num_compared: int


def workload(name: str, config: Config) -> Workload:
    """Makes a workload.

    Raises:
      RunError: if Omniglot is not prepared on this machine.
    """
    if name == "sinusoid":
        return Workload(
            models.mlp(features=config.features),
            losses.mean_squared_error,
            losses.mean_squared_error,
            "mean squared error",
            {
                "train": sinusoid.make_sampler(shot=10, query_shot=10),
                "test": sinusoid.make_sampler(shot=10, query_shot=100),
            },
            config.sinusoid_inner_lr,
            config.sinusoid_steps,
            config.sinusoid_tasks,
            config.sinusoid_seeds,
            config.sinusoid_compared_tasks,
        )

    def sampler(split, query_shot):
        try:
            images = omniglot.load(split)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            raise RunError(f"{error}. Without Omniglot, run with --workload sinusoid and a --results-dir") from error
        return few_shot.make_sampler(images, way=5, shot=1, query_shot=query_shot, rotations=split == "train")

    return Workload(
        models.conv4(way=5, features=config.filters),
        losses.cross_entropy,
        losses.accuracy,
        "accuracy",
        {split: sampler(split, config.omniglot_query_shot) for split in ("train", "test")},
        config.omniglot_inner_lr,
        config.omniglot_steps,
        config.omniglot_tasks,
        config.omniglot_seeds,
        config.omniglot_compared_tasks,
    )


def learner_of(work: Workload, inner_steps: int, inner_lr: float, order: str) -> MetaLearner:
    """MAML with one of the two orders. As in the authors' code, the offsets of the normalisation do not adapt."""
    return maml(
        work.model,
        work.loss_fn,
        inner_optimizer=optax.sgd(inner_lr),
        num_inner_steps=inner_steps,
        where=lambda name: "norm" not in name,
        inner_grad=ORDERS[order],
    )


class Alignment(NamedTuple):
    """How the two meta-gradients at one point differ.

    Attributes:
      cosine: of the angle between the exact one and that of first order, on the same tasks.
      norm_ratio: the norm of first order, divided by the exact norm.
      noise_cosine: of the angle between two exact ones on different tasks. If it is smaller than `cosine`, the choice
        of tasks changes the meta-gradient more than the order does.
    """

    cosine: jax.Array
    norm_ratio: jax.Array
    noise_cosine: jax.Array


def alignment_fn(
    learners: dict[str, MetaLearner], mesh: jax.sharding.Mesh | None
) -> Callable[[ArrayTree, Episode, Episode], Alignment]:
    """A jitted `(params, episodes, other_episodes) -> Alignment`."""

    def gradient_of(order: str) -> Callable[[ArrayTree, Episode], ArrayTree]:
        def gradient(params, episodes):
            return meta_gradient(learners[order], params, episodes)[1]

        return gradient if mesh is None else parallel.mean_over_tasks(gradient, mesh)

    def compare(params, episodes, other_episodes):
        exact, first = (gradient_of(order)(params, episodes) for order in ORDERS)
        other = gradient_of("second order")(params, other_episodes)
        norms = [optax.tree.norm(tree) for tree in (exact, first, other)]
        return Alignment(
            optax.tree.vdot(exact, first) / (norms[0] * norms[1]),
            norms[1] / norms[0],
            optax.tree.vdot(exact, other) / (norms[0] * norms[2]),
        )

    return jax.jit(compare)


def train_in_turns(work: Workload, inner_steps: int, inner_lr: float, config: Config) -> dict[str, Any]:
    """Trains both orders with every seed, and returns the row of the result file for one number of inner steps."""
    learners = {order: learner_of(work, inner_steps, inner_lr, order) for order in ORDERS}
    mesh, optimizer, part = mesh_for(work.num_tasks), optax.adam(1e-3), work.num_steps // config.parts
    inputs = jnp.zeros(jax.eval_shape(work.samplers["train"], jax.random.key(0)).support.inputs.shape)

    def start(seed: int) -> tuple[MetaState, jax.Array]:
        keys = streams(seed)
        started = init_meta_state(learners["second order"], optimizer, keys.init, inputs), keys.train
        return started if mesh is None else parallel.replicate(started, mesh)

    programs, compile_seconds = {}, {}
    for order, learner in learners.items():
        loop = make_train_loop(
            learner,
            optimizer,
            work.samplers["train"],
            meta_batch_size=work.num_tasks,
            num_steps=part,
            mesh=mesh,
            donate=False,  # both orders start from one state
        )
        compiled, compile_seconds[order] = common.compile_of(loop.jitted, *start(0), *loop.data)
        programs[order] = partial(_call, compiled, loop.data)
    sample = jax.jit(lambda key: jax.vmap(work.samplers["train"])(task_keys(key, work.num_compared)))
    compare = alignment_fn(learners, mesh_for(work.num_compared))

    trainings, seconds = [], {order: [] for order in ORDERS}
    for seed in range(work.num_seeds):
        state, key = start(seed)
        states, keys = dict.fromkeys(ORDERS, state), streams(seed)
        found, curves = [], {order: [] for order in ORDERS}
        for number in range(config.parts + 1):
            if number:
                for order, program in programs.items():
                    begin = time.perf_counter()
                    states[order], _ = jax.block_until_ready(program(states[order], key))
                    seconds[order].append((time.perf_counter() - begin) / part)
            fresh = map(sample, jax.random.split(jax.random.fold_in(keys.val, number)))
            found.append(compare(jax.device_get(states["second order"].params), *fresh))
            for order, learner in learners.items():
                curves[order].append(score(work, learner, states[order].params, keys.tune, config.curve_episodes))
        trainings.append(
            {
                "seed": seed,
                "scores": {
                    order: score(work, learners[order], states[order].params, keys.test, config.eval_episodes)
                    for order in ORDERS
                },
                "meta_steps": [part * number for number in range(config.parts + 1)],
                "curves": curves,
                **{name: [float(getattr(each, name)) for each in found] for name in Alignment._fields},
            }
        )
    ratios = {order: [a / b for a, b in zip(seconds[order], seconds["first order"], strict=True)] for order in ORDERS}
    return {
        "inner_steps": inner_steps,
        "inner_lr": inner_lr,
        "trainings": trainings,
        "orders": {
            order: {
                "seconds": common.summarise(seconds[order]),
                "times_first_order": common.summarise(ratios[order]),
                "compile_seconds": compile_seconds[order],
                **cost_on_one_device(work, learner)._asdict(),
            }
            for order, learner in learners.items()
        },
    }


def _call(compiled: Callable, data: tuple, state: MetaState, key: jax.Array) -> Any:
    return compiled(state, key, *data)


def score(
    work: Workload, learner: MetaLearner, params: ArrayTree, key: jax.Array, num_episodes: int
) -> dict[str, float]:
    """The metric on test tasks after the last inner step, its 95 % interval over them, and how many are not finite."""
    found = evaluate(
        learner,
        jax.device_get(params),
        work.samplers["test"],
        key,
        metric_fn=work.metric_fn,
        num_episodes=num_episodes,
        mesh=mesh_for(num_episodes),
    )
    return {
        "mean": float(found.mean[-1]),
        "ci95": float(found.ci95[-1]),
        "num_nonfinite": int(found.num_nonfinite[-1]),
        "finite_median": float(found.finite_median[-1]),
    }


def cost_on_one_device(work: Workload, learner: MetaLearner) -> Cost:
    """The counted cost of one meta-gradient of a training, on one device."""
    key = jax.random.key(0)
    episodes = jax.eval_shape(lambda key: jax.vmap(work.samplers["train"])(task_keys(key, work.num_tasks)), key)
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), episodes.support.inputs)
    params = jax.eval_shape(learner.init, key, inputs)
    return cost_of(lambda params, episodes: meta_gradient(learner, params, episodes)[1], params, episodes)


def run(config: Config) -> dict[str, Any]:
    """Trains, prints, writes orders.json and orders.png, and returns the content."""
    works = {name: workload(name, config) for name in config.workload}
    content: dict[str, Any] = {"workloads": {}}
    for name, work in works.items():
        rows: list[dict[str, Any]] = []
        content["workloads"][name] = {
            "metric": work.metric,
            "meta_steps": work.num_steps,
            "tasks": work.num_tasks,
            "compared_tasks": work.num_compared,
            "eval_episodes": config.eval_episodes,
            "rows": rows,
        }
        for inner_steps, inner_lr in zip(config.inner_steps, work.inner_lr, strict=True):
            rows.append(train_in_turns(work, inner_steps, inner_lr, config))
            common.console.print(f"{name}: trained with {inner_steps} inner steps")
            # An interrupted run keeps what is finished, beside the complete results of an earlier one.
            partial = common.write_results("orders", config, content, suffix="_partial")
    common.write_results("orders", config, content)
    partial.unlink()
    common.show(tables(content))
    draw(config, content)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """For each workload, the two orders side by side, and how their meta-gradients differ."""
    found = []
    for name, of_workload in content["workloads"].items():
        found += [_comparison(name, of_workload), _alignment(name, of_workload)]
    return found


def _comparison(name: str, found: dict[str, Any]) -> common.Table:
    def cells(row: dict[str, Any], order: str) -> list[Any]:
        scores = [training["scores"][order] for training in row["trainings"]]
        return [
            row["inner_steps"],
            f"{row['inner_lr']:g}",
            order,
            ", ".join(_score_cell(score, found["eval_episodes"]) for score in scores),
            row["orders"][order]["seconds"],
            common.times(row["orders"][order]["times_first_order"]),
            f"{row['orders'][order]['flops'] / 1e9:.3g}",
            f"{row['orders'][order]['temporary_bytes'] / 1e6:.3g}",
            f"{row['orders'][order]['compile_seconds']:.1f}",
        ]

    return common.Table(
        f"{name}, {found['meta_steps']} meta-steps of {found['tasks']} tasks",
        [
            "inner steps",
            "inner rate",
            "meta-gradient",
            f"{found['metric']}, each seed",
            "ms a meta-step (quartiles)",
            "times first order",
            "GFLOP",
            "temporaries MB",
            "compile s",
        ],
        [cells(row, order) for row in found["rows"] for order in ORDERS],
        f"The {found['metric']} is the mean of {found['eval_episodes']} test tasks after the last inner step, with its "
        "95 % interval over these tasks. GFLOP and temporaries are those of one meta-gradient on one device.",
    )


def _score_cell(score: dict[str, Any], num_episodes: int) -> str:
    """The mean and interval of a score; if tasks are not finite, how many, and the median of the others."""
    if score["num_nonfinite"]:
        median = format_mean(score["finite_median"], digits=3)
        return f"{score['num_nonfinite']} of {num_episodes} not finite (median of the others {median})"
    return format_mean(score["mean"], score["ci95"], digits=3)


def _alignment(name: str, found: dict[str, Any]) -> common.Table:
    def cells(row: dict[str, Any]) -> list[Any]:
        def mean(field: str, at: slice) -> float:
            return _mean(value for training in row["trainings"] for value in training[field][at])

        return [
            row["inner_steps"],
            f"{mean('cosine', slice(0, 1)):.3f}",
            f"{mean('cosine', slice(1, None)):.3f}",
            f"{min((v for t in row['trainings'] for v in t['cosine'][1:] if v is not None), default=math.nan):.3f}",
            f"{mean('cosine', slice(-1, None)):.3f}",
            f"{mean('norm_ratio', slice(1, None)):.2f}",
            f"{mean('noise_cosine', slice(1, None)):.3f}",
        ]

    return common.Table(
        f"{name}, the two meta-gradients on the same {found['compared_tasks']} fresh tasks",
        [
            "inner steps",
            "cosine at the start",
            "mean of training",
            "lowest of training",
            "at the end",
            "norm of first order / exact",
            "cosine of exact ones on other tasks",
        ],
        [cells(row) for row in found["rows"]],
        "The last column compares two exact meta-gradients on different tasks. Where it is the smaller one, the draw "
        "of the tasks changes the meta-gradient more than the order does. What is not finite is left out.",
    )


def _mean(values: Iterable[float | None]) -> float:
    """The mean of the numbers that are finite. NaN if there are none."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _number(value: float | None) -> float:
    """Numbers that are not finite are null in a result file."""
    return math.nan if value is None else value


def draw(config: Config, content: dict[str, Any]) -> None:
    """Plots score, time and memory against inner steps, and score and cosine along training, in a column a workload."""
    names = list(content["workloads"])
    with common.figure("orders", config, columns=len(names)) as panels:
        drawing = panels[0].figure
        for axes in panels:
            axes.remove()
        drawing.set_size_inches(1 + 4.5 * len(names), 15)
        columns = drawing.subplots(5, len(names), squeeze=False).T
        for column, (name, found) in zip(columns, content["workloads"].items(), strict=True):
            _draw_column(column, name, found)


def _draw_column(column: Sequence[Any], name: str, found: dict[str, Any]) -> None:
    title = {"sinusoid": "Sinusoids", "omniglot": "Omniglot, 5-way 1-shot"}[name]
    scores, curves, seconds, memory, cosine = column
    scores.set_title(f"{title}\n{found['meta_steps']:,} meta-steps of {found['tasks']} tasks")
    _draw_against_inner_steps(scores, seconds, memory, found)
    _draw_along_training(curves, cosine, found)
    for axes in (scores, curves, cosine):
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    for axes in column:
        axes.grid(alpha=0.3)


def _draw_against_inner_steps(scores: Any, seconds: Any, memory: Any, found: dict[str, Any]) -> None:
    steps = [row["inner_steps"] for row in found["rows"]]
    places = range(len(steps))
    styles = {"second order": ("C0", "o", -0.04), "first order": ("C1", "s", 0.04)}
    for line, (order, (colour, marker, shift)) in enumerate(styles.items(), 1):
        label = f"{order} ({'MAML' if order == 'second order' else 'FOMAML'})"
        of_rows = [[training["scores"][order] for training in row["trainings"]] for row in found["rows"]]
        means = [_mean(score["mean"] for score in of_row) for of_row in of_rows]
        scores.plot([place + shift for place in places], means, color=colour, label=label)
        for place, of_row in zip(places, of_rows, strict=True):
            scores.errorbar(
                [place + shift] * len(of_row),
                [_number(score["mean"]) for score in of_row],
                yerr=[_number(score["ci95"]) for score in of_row],
                color=colour,
                marker=marker,
                linestyle="none",
                capsize=3,
            )
            if missing := sum(math.isnan(_number(score["mean"])) for score in of_row):
                scores.annotate(
                    f"{missing} of {len(of_row)} not finite",
                    (place, 1.0),
                    xytext=(0, -11 * line),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    color=colour,
                    fontsize="small",
                    ha="center",
                )
        times = [row["orders"][order]["seconds"] for row in found["rows"]]
        spread = [[1e3 * (t.median - t.lower) for t in times], [1e3 * (t.upper - t.median) for t in times]]
        seconds.errorbar(
            places, [1e3 * t.median for t in times], yerr=spread, color=colour, marker=marker, capsize=3, label=label
        )
        megabytes = [row["orders"][order]["temporary_bytes"] / 1e6 for row in found["rows"]]
        memory.plot(places, megabytes, color=colour, marker=marker, label=label)
    for axes in (scores, seconds, memory):
        axes.set_xticks(places, steps)
        axes.set_xlim(-0.3, len(steps) - 0.7)
        axes.set_xlabel("inner steps")
    scores.set_ylabel(f"test {found['metric']}\n({'higher' if found['metric'] == 'accuracy' else 'lower'} is better)")
    seconds.set(ylabel="ms a meta-step", ylim=(0, None))
    memory.set(ylabel="temporaries of a\nmeta-gradient, MB", ylim=(0, None))


def _draw_along_training(curves: Any, cosine: Any, found: dict[str, Any]) -> None:
    is_bounded = found["metric"] == "accuracy"
    typical = "mean" if is_bounded else "finite_median"  # one task with a huge error would hide all others
    for index, row in enumerate(found["rows"]):
        for order, dashes in (("second order", "-"), ("first order", "--")):
            tested = [[score[typical] for score in training["curves"][order]] for training in row["trainings"]]
            _plot_along(curves, index, row, tested, dashes)
        for field, dashes in (("cosine", "-"), ("noise_cosine", ":")):
            _plot_along(cosine, index, row, [training[field] for training in row["trainings"]], dashes)
    curves.plot([], [], color="grey", linestyle="--", label="first order")
    cosine.plot([], [], color="grey", linestyle=":", label="exact, other tasks")
    curves.set(xlabel="meta-steps", ylabel=f"test {found['metric']}\n({'mean' if is_bounded else 'median'} over tasks)")
    if not is_bounded:
        curves.set_yscale("log")
        curves.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        curves.yaxis.set_major_formatter("{x:g}")
        curves.yaxis.set_minor_locator(NullLocator())
    cosine.set(xlabel="meta-steps", ylabel="cosine of first order\nand exact meta-gradient", ylim=(None, 1.03))


def _plot_along(
    axes: Any, index: int, row: dict[str, Any], of_trainings: Sequence[Sequence[float | None]], dashes: str
) -> None:
    """Plots the mean over the trainings of a row against their meta-steps.

    Solid lines are in the legend, and have a band from the smallest to the largest training.
    """
    steps, by_step = row["trainings"][0]["meta_steps"], list(zip(*of_trainings, strict=True))
    label = f"{row['inner_steps']} inner step{'s' if row['inner_steps'] > 1 else ''}" if dashes == "-" else None
    mean, color = [_mean(values) for values in by_step], f"C{index + 2}"
    axes.plot(steps, mean, color=color, linestyle=dashes, label=label)
    if dashes == "-" and len(of_trainings) > 1:
        finite = [[value for value in map(_number, values) if math.isfinite(value)] for values in by_step]
        ends = ([function(values, default=math.nan) for values in finite] for function in (min, max))
        axes.fill_between(steps, *ends, color=color, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
