"""What a meta-step of every gradient-based method costs, relative to FOMAML, on Omniglot or on sinusoids.

Each method has the settings with which `experiments.omniglot` or `experiments.sinusoid` trains it: network, inner
steps, support examples. All have the same number of tasks. They are timed in turns; operations are counted from the
program, and temporaries are what XLA allocates for one device.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import tyro

from benchmarks import common
from experiments import omniglot, sinusoid
from experiments.common import outer_optimizer
from experiments.figures import title
from maml_jax import CATALOGUE, init_meta_state, make_meta_step
from maml_jax.cost import count_flops, temporary_bytes

REFERENCE = "fomaml"

OF_RECIPES = (
    "Reptile trains with 10 examples per class. The meta-learner LSTM has 32 filters and 15 queries per class, the "
    "others 64 filters and one query. All use one device; a training uses all devices, and its ratios differ."
)


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """What is measured."""

    workload: Literal["omniglot", "sinusoid"] = "omniglot"
    """The experiment whose settings are used. The results of sinusoids have files of their own."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: all that take inner steps)")] = ()
    """The methods; FOMAML is measured in any case."""
    way: int = 5
    """Classes of an episode on Omniglot."""
    shot: int = 1
    """Support examples per class on Omniglot; methods that train with more keep their number."""
    num_tasks: int = 8
    """Tasks of a meta-step."""
    sinusoid_steps: int = 200
    """Meta-steps on sinusoids in one compiled call."""


SHORT = Config(short=True, methods=("maml", "fomaml", "anil"), num_tasks=2, max_repetitions=3, max_seconds=3.0)


def methods_of(config: Config) -> list[str]:
    """The methods that are measured, FOMAML first.

    Raises:
      ValueError: for a name that is no such method.
    """
    of_workload = {"omniglot": omniglot.METHODS, "sinusoid": sinusoid.METHODS}[config.workload]
    every = [name for name in of_workload if name in CATALOGUE and not CATALOGUE[name].classifies]
    if unknown := [name for name in config.methods if name not in every]:
        raise ValueError(f"--methods {unknown[0]} is none of {config.workload}; choose among {', '.join(every)}")
    return list(dict.fromkeys((REFERENCE, *(config.methods or every))))


def steps_of_call(config: Config) -> int:
    """The meta-steps of one call of a program."""
    return config.sinusoid_steps if config.workload == "sinusoid" else 1


def prepare(name: str, config: Config) -> tuple[Any, dict[str, Any]]:
    """Compiles a meta-step. Returns a call that takes it, and its row of the result file without times."""
    keys = jax.random.split(jax.random.key(0), config.num_tasks)
    if config.workload == "sinusoid":
        settings = sinusoid.with_paper_defaults(sinusoid.METHODS[name])
        training = sinusoid.training_of(settings)
        learner, episodes, shot = training.learner, jax.jit(jax.vmap(training.sample_episode))(keys), settings.shot
    else:
        method = omniglot.METHODS[name]
        settings = omniglot.with_paper_defaults(dataclasses.replace(method, way=config.way, shot=config.shot))
        learner, shot = omniglot.make_learner(settings), settings.train_shot
        episodes = common.random_episodes(
            num_tasks=config.num_tasks, way=config.way, shot=shot, query_shot=settings.query_shot
        )
        episodes = episodes._replace(key=keys)
    optimizer = outer_optimizer(settings)
    state = init_meta_state(learner, optimizer, jax.random.key(0), episodes.support.inputs[0])
    step = make_meta_step(learner, optimizer)
    # A meta-step of sinusoids is over in the time that a call takes to begin, so many of them are one call.
    num_steps = steps_of_call(config)

    def steps(state, episodes):
        if num_steps == 1:
            return step.jitted(state, episodes)
        return jax.lax.scan(lambda state, _: step.jitted(state, episodes), state, length=num_steps)

    compiled, compile_seconds = common.compile_of(jax.jit(steps, donate_argnums=0), state, episodes)
    row = {
        "method": name,
        "train_shot": shot,
        "inner_steps": settings.hyperparameters.num_inner_steps,
        "compile_seconds": compile_seconds,
        "flops": count_flops(step.jitted, state, episodes),
        "temporary_bytes": temporary_bytes(step.jitted, state, episodes),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }
    return common.stepping(compiled, state, episodes), row


def measure(config: Config) -> list[dict[str, Any]]:
    """The rows of all methods, with times and ratios to FOMAML."""
    names = methods_of(config)
    prepared = {name: prepare(name, config) for name in names}
    seconds = common.measure_alternately({name: call for name, (call, _) in prepared.items()}, config)
    reference, rows = prepared[REFERENCE][1], []
    num_steps = steps_of_call(config)
    for name in names:
        row = prepared[name][1]
        rows.append(
            row
            | {"seconds": common.summarise([second / num_steps for second in seconds[name]])}
            | {"times_fomaml": common.ratios(seconds[name], seconds[REFERENCE])}
            | {f"{key}_times_fomaml": row[key] / reference[key] for key in ("flops", "temporary_bytes")}
        )
    return rows


def tables(results: dict[str, Any]) -> list[common.Table]:
    """The table of a result file."""
    config = results["config"]
    is_sinusoid = config.get("workload") == "sinusoid"
    task = "sinusoids" if is_sinusoid else f"Omniglot {config['way']}-way {config['shot']}-shot"
    rows = [
        [
            title(row["method"]),
            row["inner_steps"],
            row["seconds"],
            common.times(row["times_fomaml"]),
            f"{row['flops'] / 1e9:.3g}",
            f"{row['flops_times_fomaml']:.2f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
            f"{row['temporary_bytes_times_fomaml']:.2f}",
        ]
        for row in results["rows"]
    ]
    return [
        common.Table(
            f"A meta-step of {config['num_tasks']} tasks, {task}",
            ("method", "inner steps", "ms (quartiles)", "x FOMAML", "GFLOP", "x FOMAML", "temporaries MB", "x FOMAML"),
            rows,
            f"All use one device. A call has {config['sinusoid_steps']} meta-steps." if is_sinusoid else OF_RECIPES,
        )
    ]


def run(config: Config) -> None:
    """Measures, prints and writes the results."""
    suffix = "_sinusoid" if config.workload == "sinusoid" else ""
    if not suffix and (config.way, config.shot) != (5, 1):  # the report reads the file of 5-way 1-shot
        suffix = f"_{config.way}-way_{config.shot}-shot"
    common.check_not_replaced("methods", config, suffix=suffix)
    file = common.write_results("methods", config, {"rows": measure(config)}, suffix=suffix)
    results = common.read_results(file)
    common.show(tables(results))
    with common.figure(f"methods{suffix}", config, columns=2) as (left, right):
        names = {title(row["method"]): row for row in results["rows"]}
        times = {name: row["times_fomaml"].median for name, row in names.items()}
        common.draw_points(left, times, "time of a meta-step, relative to FOMAML")
        flops = {name: row["flops_times_fomaml"] for name, row in names.items()}
        common.draw_points(right, flops, "FLOPs of a meta-step, relative to FOMAML")


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT, has_one_file=False)
