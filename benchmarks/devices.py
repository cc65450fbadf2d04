"""Meta-steps per second on 1, 2, 4 and 8 devices, and the time of the all-reduce between them.

On a CPU the devices are virtual and share its cores. Beyond the number of cores the benchmark shows the cost of
dividing the tasks, and no speed-up. It checks the model of SCALING.md.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from maml_jax import MetaLearner, init_meta_state, losses, make_meta_step, make_train_loop, maml, models, parallel
from maml_jax.cost import count_flops
from maml_jax.tasks import few_shot, sinusoid


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The workloads, and the numbers of devices."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices, divisors of 32. Numbers that exceed the devices of an accelerator are left out."""
    workload: tuple[Literal["sinusoid", "omniglot"], ...] = ("sinusoid", "omniglot")
    """sinusoid: a small MLP and 32 tasks of 10 points. omniglot: conv4 and 32 tasks, 5-way 1-shot with 15 queries."""
    filters: int = 64
    """Filters of conv4."""
    sinusoid_steps: int = 200
    """Meta-steps in one compiled call of the sinusoid. A call of Omniglot is one meta-step."""
    all_reduces: int = 100
    """All-reduces in one compiled call."""


SHORT = Config(short=True, max_repetitions=5, max_seconds=8.0, filters=16)
NUM_TASKS = 32


def workload(name: str, config: Config) -> tuple[MetaLearner, Callable, int]:
    """Returns a learner, its task distribution, and the number of meta-steps in one call."""
    if name == "sinusoid":
        model = models.mlp(features=(40, 40, 1))
        learner = maml(model, losses.mean_squared_error, inner_optimizer=optax.sgd(1e-3), num_inner_steps=1)
        return learner, sinusoid.make_sampler(shot=10, query_shot=10), config.sinusoid_steps
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 28, 28, 1), np.uint8)
    model = models.conv4(way=5, features=config.filters)
    learner = maml(model, losses.cross_entropy, inner_optimizer=optax.sgd(0.4), num_inner_steps=1)
    return learner, few_shot.make_sampler(images, way=5, shot=1, query_shot=15), 1


def mesh_of(num_devices: int) -> jax.sharding.Mesh | None:
    """A mesh of the first devices, or None for a single device, as in the experiments."""
    return parallel.task_mesh(jax.devices()[:num_devices]) if num_devices > 1 else None


def run_workload(name: str, config: Config) -> dict[str, Any]:
    """Times the training loop on every number of devices, in turns. Returns a row for each, and common numbers."""
    learner, sample, num_steps = workload(name, config)
    optimizer = optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(1), NUM_TASKS)
    episodes = jax.eval_shape(jax.vmap(sample), keys)
    inputs = jnp.zeros(episodes.support.inputs.shape[1:])
    state = init_meta_state(learner, optimizer, jax.random.key(0), inputs)
    calls, compile_seconds = {}, {}
    for count in config.devices:
        mesh = mesh_of(count)
        loop = make_train_loop(
            learner,
            optimizer,
            sample,
            meta_batch_size=NUM_TASKS,
            num_steps=num_steps,
            # Tasks of an MLP are too small to be computed one by one.
            chunk_size=NUM_TASKS // count if name == "sinusoid" else None,
            mesh=mesh,
        )
        args = (state, jax.random.key(2), *loop.data)
        if mesh:
            args = jax.device_put(args, jax.sharding.NamedSharding(mesh, jax.P()))
        compiled, compile_seconds[count] = common.compile_of(loop.jitted, *args)
        calls[count] = common.stepping(compiled, *args)
    seconds = common.measure_alternately(calls, config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {
        "tasks": NUM_TASKS,
        "parameters": parameters,
        "flops": count_flops(make_meta_step(learner, optimizer).jitted, state, episodes),
        "rows": [
            {
                "devices": count,
                "seconds": common.summarise([second / num_steps for second in seconds[count]]),
                "steps_per_second": common.summarise([num_steps / second for second in seconds[count]]),
                "times_first": common.summarise(
                    [first / second for first, second in zip(seconds[config.devices[0]], seconds[count], strict=True)]
                ),
                "compile_seconds": compile_seconds[count],
                "all_reduce_seconds": all_reduce(parameters + 1, count, config),
            }
            for count in config.devices
        ],
    }


def all_reduce(size: int, num_devices: int, config: Config) -> common.Timing | None:
    """Seconds of the mean over devices of a float32 vector of `size` numbers. None on a single device."""
    if num_devices == 1:
        return None
    mesh = mesh_of(num_devices)

    def local(_, vector: jax.Array) -> jax.Array:
        def once(vector, _):
            return parallel.pmean(vector) + 1.0, None

        return jax.lax.scan(once, vector, length=config.all_reduces)[0]

    sharding = jax.sharding.NamedSharding(mesh, jax.P(parallel.AXIS))
    args = ((), jax.device_put(jnp.zeros((num_devices * size,)), sharding))
    compiled, _ = common.compile_of(parallel.each_task(local, mesh, gather=False), *args)
    timing = common.measure(lambda: compiled(*args), dataclasses.replace(config, max_seconds=2.0))
    return common.Timing(*(second / config.all_reduces for second in timing[:3]), timing.repetitions)


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes devices.json and devices.png, and returns the content."""
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    config = dataclasses.replace(config, devices=tuple(n for n in config.devices if n <= jax.device_count()))
    processors = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else jax.device_count()
    content = {
        "processors": processors,
        "workloads": {name: run_workload(name, config) for name in config.workload},
    }
    common.show(tables(content))
    common.write_results("devices", config, content)
    draw(config, content)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """One table per workload. The model is that of SCALING.md, given the time on one device and of the all-reduce."""
    return [
        common.Table(
            f"{name}, {found['tasks']} tasks of {found['flops'] / found['tasks'] / 1e6:.2f} MFLOP, "
            f"{found['parameters']} parameters",
            ["devices", "ms a meta-step (quartiles)", "model ms", "times first", "all-reduce ms", "compile s"],
            [
                [
                    row["devices"],
                    row["seconds"],
                    f"{1e3 * model_seconds(row, found['rows'][0], content['processors']):.4g}",
                    "{0.median:.2f} ({0.lower:.2f}-{0.upper:.2f})".format(row["times_first"]),
                    row["all_reduce_seconds"] or "",
                    f"{row['compile_seconds']:.1f}",
                ]
                for row in found["rows"]
            ],
        )
        for name, found in content["workloads"].items()
    ]


def model_seconds(row: dict[str, Any], first: dict[str, Any], processors: int) -> float:
    """t(n) of SCALING.md: the time on one device, divided by the processors in use, plus the all-reduce."""
    shared = min(row["devices"], processors) / min(first["devices"], processors)
    all_reduce_seconds = row["all_reduce_seconds"].median if row["all_reduce_seconds"] else 0.0
    return first["seconds"].median / shared + all_reduce_seconds


def draw(config: Config, content: dict[str, Any]) -> None:
    """Plots meta-steps per second against devices, with a panel for every workload."""
    with common.figure("devices", config, columns=len(content["workloads"])) as panels:
        for axes, (name, found) in zip(panels, content["workloads"].items(), strict=True):
            counts = [row["devices"] for row in found["rows"]]
            speeds = [row["steps_per_second"] for row in found["rows"]]
            median = np.array([speed.median for speed in speeds])
            spread = [median - [speed.lower for speed in speeds], [speed.upper for speed in speeds] - median]
            axes.errorbar(counts, median, yerr=spread, marker="o", capsize=3)
            axes.set(title=name, xlabel="devices", ylabel="meta-steps/s", xscale="log", ylim=(0, None))
            axes.set_xticks(counts, counts)
            axes.minorticks_off()


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
