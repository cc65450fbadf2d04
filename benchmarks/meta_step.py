"""Time, operations and memory of one meta-step, on the shapes of Omniglot.

python -m benchmarks.meta_step            vary each setting alone
python -m benchmarks.meta_step --short    the comparison with one vmap over lax.conv, and a few rows
python -m benchmarks.meta_step --cross    every combination of the settings
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from benchmarks import common
from experiments.common import mesh_for
from maml_jax import adapt_only, first_order, init_meta_state, losses, make_meta_step, maml, mixed_mode, models
from maml_jax.cost import count_flops
from maml_jax.models.layers import conv_lax, conv_matmul

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
    on_mesh: bool = False


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The sweep. Each setting is varied alone, from the first value of the others."""

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
    """How the inner gradient is differentiated; crossed with --inner-steps in any case."""
    inner_steps: tuple[int, ...] = (1, 5, 20)
    """Inner steps."""
    meta_batch_size: tuple[int, ...] = (32, 8)
    """Tasks of a meta-step."""
    shot: tuple[int, ...] = (1, 5)
    """Support examples per class."""
    convolution: tuple[Literal["conv_matmul", "conv_lax"], ...] = ("conv_matmul", "conv_lax")
    """How convolutions are computed."""
    chunk_size: tuple[int, ...] = (1, 2, 4, 8, 32)
    """Tasks that are vmapped together; those that do not divide the meta-batch are left out."""
    cross: bool = False
    """Run every combination of the settings."""
    matmul_size: int = 2048
    """Side of the square float32 matrices whose product gives the peak of the machine."""


SHORT = Config(
    short=True,
    max_repetitions=5,
    max_seconds=3.0,
    inner_steps=(1, 5),
    meta_batch_size=(32,),
    shot=(1,),
    convolution=("conv_matmul",),
    chunk_size=(1, 4),
)


def cases(config: Config) -> Iterator[Case]:
    """The cases of a sweep, without repetition."""
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
        # A convolution differs most where tasks are vmapped together.
        combinations += [base | {"convolution": name, "chunk_size": 4} for name in config.convolution[1:]]
    seen = set()
    for combination in combinations:
        case = Case(**fixed, **combination)
        if case.meta_batch_size % case.chunk_size == 0 and case not in seen:
            seen.add(case)
            yield case


def run_case(case: Case, config: common.Settings) -> dict[str, Any]:
    """Compiles and times one case; returns its row of the result file."""
    model = models.conv4(way=case.way, features=case.filters, conv_fn=CONVOLUTIONS[case.convolution])
    learner = maml(
        model,
        losses.cross_entropy,
        inner_optimizer=adapt_only(optax.sgd(0.4), lambda name: "norm" not in name),
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
    flops = count_flops(step, state, episodes)
    compiled, compile_seconds = common.compile_of(step, state, episodes)
    timing = common.measure(common.stepping(compiled, state, episodes), config)
    return dataclasses.asdict(case) | {
        "devices": mesh.size if mesh else 1,
        "seconds": timing,
        "compile_seconds": compile_seconds,
        "flops": flops,
        "flops_per_second": flops / timing.median,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def matmul_peak(config: Config) -> dict[str, Any]:
    """Operations a second of a large float32 matrix product, what this machine can do at best."""
    size = config.matmul_size
    matrix = jnp.ones((size, size))
    compiled, _ = common.compile_of(jnp.matmul, matrix, matrix)
    timing = common.measure(lambda: compiled(matrix, matrix), dataclasses.replace(config, max_repetitions=30))
    return {"size": size, "seconds": timing, "flops_per_second": 2 * size**3 / timing.lower}


def headline(config: Config) -> dict[str, dict[str, Any]]:
    """The exact meta-step as the library does it, and the same objective as one vmap over `lax.conv`."""
    base = Case(
        way=config.way, query_shot=config.query_shot, filters=config.filters, meta_batch_size=config.meta_batch_size[0]
    )
    one_vmap = dataclasses.replace(base, convolution="conv_lax", chunk_size=base.meta_batch_size)
    return {
        "library default": run_case(base, config),
        "library default, a mesh of all devices": run_case(dataclasses.replace(base, on_mesh=True), config),
        "one vmap over lax.conv": run_case(one_vmap, config),
    }


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes meta_step.json and meta_step.png, and returns the content."""
    peak = matmul_peak(config)
    compared = headline(config)
    rows = [run_case(case, config) for case in cases(config)]
    slow, fast = (compared[name]["seconds"].median for name in ("one vmap over lax.conv", "library default"))
    content = {"matmul_peak": peak, "headline": compared, "speed_up": slow / fast, "rows": rows}
    common.show(tables(content))
    common.write_results("meta_step", config, content)
    draw(config, rows)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """The comparison and the sweep."""
    peak = content["matmul_peak"]["flops_per_second"]

    def costs(row):
        return [
            row["seconds"],
            f"{row['compile_seconds']:.1f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops_per_second'] / peak:.0%}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
        ]

    columns = ["ms (quartiles)", "compile s", "GFLOP", "of peak", "temporaries MB"]
    names = ["derivative", "inner_steps", "meta_batch_size", "shot", "convolution", "chunk_size"]
    return [
        common.Table(
            "One exact meta-step",
            ["", "tasks", "devices", *columns],
            [[name, row["meta_batch_size"], row["devices"], *costs(row)] for name, row in content["headline"].items()],
            f"One vmap over lax.conv takes {content['speed_up']:.1f} times as long as the library on one device.\n"
            f"The peak is that of a product of float32 matrices of side {content['matmul_peak']['size']}, "
            f"{peak / 1e9:.0f} GFLOP/s. Temporaries are those of one device.",
        ),
        common.Table(
            "The sweep",
            [*(name.replace("_", " ") for name in names), *columns],
            [[*(row[name] for name in names), *costs(row)] for row in content["rows"]],
        ),
    ]


def draw(config: Config, rows: list[dict[str, Any]]) -> None:
    """Time against inner steps for each derivative, and against chunk size for each convolution."""
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
        left.set(xlabel="inner steps", ylabel="seconds a meta-step")
        right.set(xlabel="tasks vmapped together", ylabel="seconds a meta-step", xscale="log", yscale="log")
        left.legend()
        right.legend()


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
