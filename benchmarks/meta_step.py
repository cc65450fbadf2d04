"""Time, operations and memory of one meta-step, on the shapes of Omniglot.

The sweep varies one setting at a time. With --cross it runs every combination of the settings. With --short it
compares the library's default with one vmap over lax.conv, and has only a few rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import common
from experiments.devices import matmul_algorithm, mesh_for
from experiments.runs import RunError
from maml_jax import first_order, init_meta_state, losses, make_meta_step, maml, mixed_mode, models
from maml_jax.cost import count_flops
from maml_jax.models.layers import conv_lax, conv_matmul
from maml_jax.types import ArrayTree

OURS, ONE_VMAP, PEAK = "library default", "one vmap over lax.conv", "matrix product"
DERIVATIVES = {"first_order": first_order, "mixed_mode": mixed_mode, "reverse_over_reverse": jax.value_and_grad}
CONVOLUTIONS = {"conv_matmul": conv_matmul, "conv_lax": conv_lax}


@dataclasses.dataclass(frozen=True)
class Case:
    """One meta-step: Adam on the mean over tasks of MAML's objective, with conv4 at stride 2 and fixed offsets."""

    way: int = 5
    shot: int = 1
    query_shot: int = 15
    filters: int = 64
    meta_batch_size: int = 32
    inner_steps: int = 1
    derivative: Literal["first_order", "mixed_mode", "reverse_over_reverse"] = "mixed_mode"
    convolution: Literal["conv_matmul", "conv_lax"] = "conv_matmul"
    chunk_size: int | None = None
    on_mesh: bool = True
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The sweep. It varies one setting at a time and keeps the first value of the others."""

    way: int = 5
    """Classes of an episode."""
    query_shot: int = 15
    """Query examples per class."""
    filters: int = 64
    """Filters of each convolution."""
    derivative: tuple[Literal["first_order", "mixed_mode", "reverse_over_reverse"], ...] = (
        "mixed_mode",
        "reverse_over_reverse",
        "first_order",
    )
    """How the inner gradient is differentiated. Every value is combined with every value of --inner-steps."""
    inner_steps: tuple[int, ...] = (1, 5, 20)
    """Inner steps."""
    meta_batch_size: tuple[int, ...] = (32, 8)
    """Tasks of a meta-step."""
    shot: tuple[int, ...] = (1, 5)
    """Support examples per class."""
    convolution: tuple[Literal["conv_matmul", "conv_lax"], ...] = ("conv_matmul", "conv_lax")
    """How convolutions are computed."""
    chunk_size: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Tasks that are vmapped together. Sizes that exceed the tasks of a device are left out."""
    precision: tuple[Literal["float32", "tensorfloat32", "bfloat16"], ...] = ("float32", "tensorfloat32", "bfloat16")
    """Precisions of matrix products, for the library's default only. The others are compared with the first."""
    cross: bool = False
    """Run every combination of the settings."""
    matmul_size: int = 2048
    """Size of the square float32 matrices whose product measures the peak of the machine."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything is measured, for a setting without a value."""
        super().__post_init__()
        swept = ("derivative", "inner_steps", "meta_batch_size", "shot", "convolution", "chunk_size")
        common.check_not_empty(self, *swept)


SHORT = Config(
    short=True,
    max_repetitions=5,
    max_seconds=3.0,
    inner_steps=(1, 5),
    meta_batch_size=(32,),
    shot=(1,),
    convolution=("conv_matmul",),
    chunk_size=(1, 4),
    precision=("float32",),
)


def cases(config: Config, num_devices: int) -> Iterator[Case]:
    """Yields the cases of a sweep on `num_devices` devices, each once."""
    fixed = {"way": config.way, "query_shot": config.query_shot, "filters": config.filters}
    swept = {
        name: getattr(config, name)
        for name in ("derivative", "inner_steps", "meta_batch_size", "shot", "convolution", "chunk_size")
    }
    if config.cross:
        combinations = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    else:
        base = {name: values[0] for name, values in swept.items()}
        pairs = itertools.product(config.derivative, config.inner_steps)
        combinations = [base | {"derivative": derivative, "inner_steps": steps} for derivative, steps in pairs]
        combinations += [base | {name: value} for name, values in swept.items() for value in values[1:]]
        # The convolutions differ most when tasks are vmapped together.
        combinations += [base | {"convolution": name, "chunk_size": 4} for name in config.convolution[1:]]

    def tasks_of_a_device(meta_batch_size: int) -> int:
        """With as many devices as `mesh_for` takes."""
        return meta_batch_size // max(n for n in range(1, num_devices + 1) if meta_batch_size % n == 0)

    if config.chunk_size[0] > tasks_of_a_device(config.meta_batch_size[0]):
        raise RunError(
            f"--chunk-size {config.chunk_size[0]} is more tasks than one of {num_devices} devices has of "
            f"--meta-batch-size {config.meta_batch_size[0]}; choose a smaller one"
        )
    seen = set()
    for combination in combinations:
        case = Case(**fixed, **combination)
        if case.chunk_size <= tasks_of_a_device(case.meta_batch_size) and case not in seen:
            seen.add(case)
            yield case


class Prepared(NamedTuple):
    """A compiled case.

    Attributes:
      call: takes one meta-step.
      row: its row of the result file, without the times.
      program: the optimised HLO.
    """

    call: Callable[[], Any]
    row: dict[str, Any]
    program: str


def prepare(case: Case) -> Prepared:
    """Compiles one case."""
    model = models.conv4(way=case.way, features=case.filters, conv_fn=CONVOLUTIONS[case.convolution])
    learner = maml(
        model,
        losses.cross_entropy,
        inner_optimizer=optax.sgd(0.4),
        where=lambda name: "norm" not in name,
        num_inner_steps=case.inner_steps,
        inner_grad=DERIVATIVES[case.derivative],
    )
    optimizer = optax.adam(1e-3)
    episodes = common.random_episodes(
        num_tasks=case.meta_batch_size, way=case.way, shot=case.shot, query_shot=case.query_shot
    )
    state = init_meta_state(learner, optimizer, jax.random.key(0), episodes.support.inputs[0])
    mesh = mesh_for(case.meta_batch_size) if case.on_mesh else None
    state, episodes = common.place(state, episodes, mesh)
    step = make_meta_step(learner, optimizer, chunk_size=case.chunk_size, mesh=mesh)
    with jax.default_matmul_precision(matmul_algorithm(case.precision)):
        flops = count_flops(step.jitted, state, episodes)
        compiled, compile_seconds = common.compile_of(step.jitted, state, episodes)
    row = dataclasses.asdict(case) | {
        "devices": mesh.size if mesh else 1,
        "compile_seconds": compile_seconds,
        "flops": flops,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    return Prepared(common.stepping(compiled, state, episodes), row, compiled.as_text())


def run_cases(named: dict[str, Case], reference: str, config: Config) -> dict[str, dict[str, Any]]:
    """Times cases in turns, together with the matrix product that measures the peak of the machine.

    Args:
      named: the cases by name.
      reference: the name of the case whose time the others are compared with. Any other string: no comparison.
      config: the limits on repetitions and seconds, and the size of the matrix product.

    Returns:
      A row for each case, by name.
    """
    prepared = {name: prepare(case) for name, case in named.items()}
    matrix = jnp.ones((config.matmul_size, config.matmul_size))
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    calls = {name: case.call for name, case in prepared.items()} | {PEAK: lambda: product(matrix, matrix)}
    seconds = common.measure_alternately(calls, config)
    peak = 2 * config.matmul_size**3 / common.summarise(seconds[PEAK]).median
    rows = {}
    for name, case in prepared.items():
        timing = common.summarise(seconds[name])
        rows[name] = case.row | {
            "seconds": timing,
            "times_reference": common.ratios(seconds[name], seconds[reference]) if reference in seconds else None,
            "flops_per_second": case.row["flops"] / timing.median,
            # One product uses all cores of a CPU, and one of several accelerators.
            "matmul_flops_per_second": peak * (1 if jax.default_backend() == "cpu" else case.row["devices"]),
        }
    return rows


def headline(config: Config) -> dict[str, dict[str, Any]]:
    """Times the exact meta-step with the library's defaults, and the same objective as one vmap over `lax.conv`."""
    base = Case(
        way=config.way, query_shot=config.query_shot, filters=config.filters, meta_batch_size=config.meta_batch_size[0]
    )
    one_device = dataclasses.replace(base, on_mesh=False)
    one_vmap = dataclasses.replace(one_device, convolution="conv_lax", chunk_size=base.meta_batch_size)
    return run_cases({OURS: base, f"{OURS}, one device": one_device, ONE_VMAP: one_vmap}, OURS, config)


def sweep(config: Config) -> list[dict[str, Any]]:
    """Returns the rows of the sweep. Cases that only differ in the derivative are timed in turns."""
    groups: dict[Case, list[Case]] = {}
    for case in cases(config, jax.device_count()):
        groups.setdefault(dataclasses.replace(case, derivative="first_order"), []).append(case)
    rows = []
    for group in groups.values():
        rows += run_cases({case.derivative: case for case in group}, "first_order", config).values()
    return rows


def precisions(config: Config) -> list[dict[str, Any]]:
    """Times the exact meta-step in each precision, and compares its meta-gradient with that of the first."""
    base = Case(
        way=config.way, query_shot=config.query_shot, filters=config.filters, meta_batch_size=config.meta_batch_size[0]
    )
    named = {precision: dataclasses.replace(base, precision=precision) for precision in config.precision}
    rows = run_cases(named, config.precision[0], config)
    gradients = {name: first_gradient(case) for name, case in named.items()}
    for name, row in rows.items():
        difference = optax.tree.norm(optax.tree.sub(gradients[name], gradients[config.precision[0]]))
        row["gradient_distance"] = float(difference / optax.tree.norm(gradients[config.precision[0]]))
    return list(rows.values())


def first_gradient(case: Case) -> ArrayTree:
    """The meta-gradient of the first step times (1 - b1), which is Adam's first moment after that step."""
    return optax.tree.get(prepare(case).call()[0].opt_state, "mu")


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes meta_step.json and meta_step.png, and returns the content."""
    compared = headline(config)
    rows = sweep(config)
    content = {
        "matmul_size": config.matmul_size,
        "headline": compared,
        "speed_up": compared[ONE_VMAP]["times_reference"].median,
        "precisions": precisions(config) if len(config.precision) > 1 else [],
        "rows": rows,
    }
    common.show(tables(content))
    common.write_results("meta_step", config, content)
    draw(config, rows)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """The comparison with one vmap, the precisions and the sweep."""
    # Not the products beside the rows of the sweep, which run slower after programs that use much memory.
    peak = content["headline"][OURS]["matmul_flops_per_second"]

    def costs(row, peak=peak):
        return [
            row["seconds"],
            common.times(row["times_reference"]) if row["times_reference"] else "",
            f"{row['compile_seconds']:.1f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops_per_second'] / peak:.0%}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
        ]

    columns = ["ms (quartiles)", "times {}", "compile s", "GFLOP", "of peak", "temporaries MB"]

    def times(reference):
        return [column.format(reference) for column in columns]

    once = ", called once," if content["headline"][ONE_VMAP]["times_reference"].repetitions == 1 else ""
    names = ["derivative", "inner_steps", "meta_batch_size", "shot", "convolution", "chunk_size"]
    peaks = sorted(row["matmul_flops_per_second"] / 1e9 for row in content["headline"].values())
    found = [
        common.Table(
            "One exact meta-step",
            ["", "tasks", "devices", *times("the default")],
            [
                [name, row["meta_batch_size"], row["devices"], *costs(row, row["matmul_flops_per_second"])]
                for name, row in content["headline"].items()
            ],
            f"One vmap over lax.conv{once} takes {content['speed_up']:.0f} times as long as the library.\n"
            f"The peak is that of a product of float32 matrices of side {content['matmul_size']}, taken in turns with "
            f"the programs: {peaks[0]:.0f} GFLOP/s here. Temporaries are those of one device.",
        )
    ]
    if content["precisions"]:
        found.append(
            common.Table(
                "Precision of matrix products",
                ["", *times(content["precisions"][0]["precision"]), "distance of the meta-gradient"],
                [[row["precision"], *costs(row), f"{row['gradient_distance']:.1e}"] for row in content["precisions"]],
                "The distance is relative to the norm of the meta-gradient in the first precision.",
            )
        )
    return [
        *found,
        common.Table(
            "The sweep",
            [*(name.replace("_", " ") for name in names), *times("first order")],
            [[*(row[name] for name in names), *costs(row)] for row in content["rows"]],
        ),
    ]


def draw(config: Config, rows: list[dict[str, Any]]) -> None:
    """Plots time against inner steps for each derivative, and against chunk size for each convolution."""
    base = {name: getattr(config, name)[0] for name in ("meta_batch_size", "shot", "convolution", "chunk_size")}

    def curve(axes, x, label, **fixed):
        chosen = sorted(
            (row for row in rows if all(row[name] == value for name, value in fixed.items())), key=lambda row: row[x]
        )
        if chosen:
            axes.plot([row[x] for row in chosen], [row["seconds"].median for row in chosen], "o-", label=label)

    with common.figure("meta_step", config, columns=2) as (left, right):
        for derivative in config.derivative:
            curve(left, "inner_steps", derivative, derivative=derivative, **base)
        del base["chunk_size"], base["convolution"]
        for convolution in config.convolution:
            curve(
                right,
                "chunk_size",
                convolution,
                convolution=convolution,
                derivative=config.derivative[0],
                inner_steps=config.inner_steps[0],
                **base,
            )
        left.set(xlabel="inner steps", ylabel="seconds a meta-step", xticks=config.inner_steps, ylim=(0, None))
        right.set(xlabel="tasks vmapped together", ylabel="seconds a meta-step", xscale="log", yscale="log")
        right.set_xticks(config.chunk_size, config.chunk_size)
        right.minorticks_off()
        left.legend()
        right.legend()


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
