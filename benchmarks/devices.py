"""Meta-steps per second on 1, 2, 4 and 8 devices, and the time of the all-reduce between them.

On a CPU the devices are virtual and share its cores, and each number of them has processes of its own. Beyond the
number of cores the benchmark shows what it costs, or gains, to divide the work of a core further. It checks the model
of SCALING.md.

A network too wide for one device has its parameters divided too, over a second axis of the mesh. For this the benchmark
compares the meta-gradient with that of one device and reports the bytes of a device, which are counted and not timed.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from experiments.runs import RunError, num_cores
from maml_jax import MetaLearner, init_meta_state, losses, make_meta_step, make_train_loop, maml, models, parallel
from maml_jax.cost import count_flops
from maml_jax.meta_gradient import meta_gradient
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
    meshes: tuple[tuple[int, int], ...] = ((1, 1), (4, 1), (1, 4), (2, 2))
    """Meshes of tasks times model for the wide network: the first divides the tasks of a meta-batch, the second the
    parameters. The first mesh is the one that the others are compared with."""
    width: int = 2048
    """Units of each of the two hidden layers of the wide network."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything is measured, for a setting without a value."""
        super().__post_init__()
        common.check_not_empty(self, "devices", "workload")


SHORT = Config(short=True, max_repetitions=5, max_seconds=8.0, filters=16, width=256)
NUM_TASKS = 32
ROUNDS = 3
"""How often every number of devices of a CPU takes its turn."""


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


def time_on(count: int, config: Config) -> dict[str, dict[str, Any]]:
    """Times every workload on the first `count` devices of this process.

    Returns:
      By workload "seconds" of every call, "compile_seconds", "all_reduce_seconds" (None on one device), "flops" and
      "parameters".
    """
    found = {}
    for name in config.workload:
        learner, sample, num_steps = workload(name, config)
        optimizer, mesh = optax.adam(1e-3), mesh_of(count)
        episodes = jax.eval_shape(jax.vmap(sample), jax.random.split(jax.random.key(1), NUM_TASKS))
        inputs = jnp.zeros(episodes.support.inputs.shape[1:])
        state = init_meta_state(learner, optimizer, jax.random.key(0), inputs)
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
        if mesh is not None:
            args = parallel.replicate(args, mesh)
        compiled, compile_seconds = common.compile_of(loop.jitted, *args)
        call = common.stepping(compiled, *args)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        found[name] = {
            "seconds": [second / num_steps for second in common.measure_alternately({name: call}, config)[name]],
            "compile_seconds": compile_seconds,
            "all_reduce_seconds": all_reduce(parameters + 1, count, config),
            "flops": count_flops(make_meta_step(learner, optimizer).jitted, state, episodes),
            "parameters": parameters,
        }
    return found


def in_own_process(count: int, config: Config) -> dict[str, dict[str, Any]]:
    """`time_on` in a process that has `count` virtual devices of a CPU.

    XLA divides products over one thread per core, or per device if there are more, also those that are not used. A
    process with more devices would be another program.

    Raises:
      RunError: if the process fails.
    """
    code = "import sys; from benchmarks import devices; devices.answer(sys.argv[1], int(sys.argv[2]))"
    settings = json.dumps(dataclasses.asdict(config), default=str)
    done = subprocess.run(
        [sys.executable, "-c", code, settings, str(count)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(count)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RunError(f"the process with {count} devices failed; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def answer(settings: str, count: int) -> None:
    """What a process of `in_own_process` does: it prints the times as a line of JSON."""
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(settings).items()}
    jax.config.update("jax_default_matmul_precision", "float32")
    if jax.device_count() != count:
        raise RuntimeError(f"this process has {jax.device_count()} devices and not {count}")
    print(json.dumps(time_on(count, Config(**stored))))


def run_workloads(config: Config) -> dict[str, dict[str, Any]]:
    """The rows of every workload, with times from rounds in which every number of devices takes its turn."""
    is_cpu = jax.default_backend() == "cpu"
    num_rounds = ROUNDS if is_cpu else 1  # an accelerator is steadier, and its programs take long to compile
    part = dataclasses.replace(
        config,
        max_seconds=config.max_seconds / num_rounds,
        max_repetitions=-(-config.max_repetitions // num_rounds),
    )
    time = in_own_process if is_cpu else time_on
    rounds = [{count: time(count, part) for count in config.devices} for _ in range(num_rounds)]
    content = {}
    for name in config.workload:
        rows = []
        for count in config.devices:
            of_count = [found[count][name] for found in rounds]
            seconds = [second for one in of_count for second in one["seconds"]]
            firsts = [statistics.median(found[config.devices[0]][name]["seconds"]) for found in rounds]
            ratios = [first / statistics.median(one["seconds"]) for first, one in zip(firsts, of_count, strict=True)]
            reduced = [one["all_reduce_seconds"] for one in of_count if one["all_reduce_seconds"] is not None]
            rows.append(
                {
                    "devices": count,
                    "seconds": common.summarise(seconds),
                    "steps_per_second": common.summarise([1 / second for second in seconds]),
                    "times_first": common.summarise(ratios),
                    "compile_seconds": of_count[0]["compile_seconds"],
                    "all_reduce_seconds": common.summarise(reduced) if reduced else None,
                }
            )
        first = rounds[0][config.devices[0]][name]
        content[name] = {"tasks": NUM_TASKS, "parameters": first["parameters"], "flops": first["flops"], "rows": rows}
    return content


def all_reduce(size: int, num_devices: int, config: Config) -> float | None:
    """Seconds of the mean over devices of a float32 vector of `size` numbers, the median. None on a single device."""
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
    return timing.median / config.all_reduces


MODEL_AXIS = "model"
WIDE_TASKS, WIDE_INNER_STEPS, WIDE_INPUTS = 4, 2, 784


def run_meshes(config: Config) -> list[dict[str, Any]]:
    """Computes one meta-gradient of a wide network on every mesh, and returns a row for each.

    The meta-gradient is the library's, without a change: the meta-batch is divided by its first axis, every kernel by
    one of its axes, and XLA divides the computation between them, Hessian products included. Layers alternate between
    columns and rows of their kernels, so that only every second one has to add up over devices.

    Raises:
      RunError: if a meta-gradient differs from that on the first mesh by more than rounding.
    """
    model = models.mlp(features=(config.width, config.width, 10))
    learner = maml(model, losses.cross_entropy, inner_optimizer=optax.sgd(0.1), num_inner_steps=WIDE_INNER_STEPS)
    episodes = common.random_episodes(num_tasks=WIDE_TASKS, way=10, shot=1, query_shot=1, shape=(WIDE_INPUTS,))
    params = model.init(jax.random.key(0), episodes.support.inputs[0])
    specs = {
        "dense_0": {"kernel": jax.P(None, MODEL_AXIS), "bias": jax.P(MODEL_AXIS)},
        "dense_1": {"kernel": jax.P(MODEL_AXIS, None), "bias": jax.P()},
        "dense_2": {"kernel": jax.P(MODEL_AXIS, None), "bias": jax.P()},
    }

    # One vmap over all tasks: chunks would be scanned one after another, and a scan is not divided over devices.
    def gradient(params, episodes):
        return meta_gradient(learner, params, episodes, chunk_size=WIDE_TASKS)[1]

    rows, reference = [], None
    for num_task_parts, num_model_parts in config.meshes:
        mesh = jax.make_mesh(
            (num_task_parts, num_model_parts),
            (parallel.AXIS, MODEL_AXIS),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=jax.devices()[: num_task_parts * num_model_parts],
        )
        of_params = jax.tree.map(lambda spec, mesh=mesh: jax.sharding.NamedSharding(mesh, spec), specs)
        of_episodes = jax.sharding.NamedSharding(mesh, jax.P(parallel.AXIS))
        jitted = jax.jit(gradient, in_shardings=(of_params, of_episodes), out_shardings=of_params)
        compiled, _ = common.compile_of(jitted, params, episodes)
        found = compiled(jax.device_put(params, of_params), jax.device_put(episodes, of_episodes))
        found = jax.device_get(found)
        reference = found if reference is None else reference
        distance = float(optax.tree.norm(optax.tree.sub(found, reference)) / optax.tree.norm(reference))
        if not distance <= 1e-4:
            raise RunError(
                f"the meta-gradient on {num_task_parts}x{num_model_parts} devices differs from that on "
                f"{'x'.join(map(str, config.meshes[0]))} by {distance:.1e} of its norm, more than rounding explains"
            )
        memory, text = compiled.memory_analysis(), compiled.as_text()
        rows.append(
            {
                "task_parts": num_task_parts,
                "model_parts": num_model_parts,
                "argument_bytes": memory.argument_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "distance": distance,
                "all_reduces": text.count(" all-reduce("),
                "all_gathers": text.count(" all-gather("),
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            }
        )
    return rows


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes devices.json and devices.png, and returns the content."""
    jax.config.update("jax_num_cpu_devices", max(*config.devices, *(a * b for a, b in config.meshes)))
    given, available = config, jax.device_count()
    config = dataclasses.replace(
        config,
        devices=tuple(n for n in config.devices if n <= available),
        meshes=tuple((a, b) for a, b in config.meshes if a * b <= available),
    )
    processors = num_cores() if jax.default_backend() == "cpu" else jax.device_count()
    content = {
        "processors": processors,
        "workloads": run_workloads(config),
        "meshes": run_meshes(config),
    }
    common.show(tables(content))
    common.write_results("devices", given, content)
    draw(config, content)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """One table per workload. The model is that of SCALING.md, given the time on one device and of the all-reduce."""
    found = [
        common.Table(
            f"{name}, {found['tasks']} tasks of {found['flops'] / found['tasks'] / 1e6:.2f} MFLOP, "
            f"{found['parameters']} parameters",
            [
                "devices",
                "ms a meta-step (quartiles)",
                "model ms",
                "speed, times one device",
                "all-reduce ms",
                "compile s",
            ],
            [
                [
                    row["devices"],
                    row["seconds"],
                    f"{1e3 * model_seconds(row, found['rows'][0], content['processors']):.4g}",
                    common.times(row["times_first"]),
                    row["all_reduce_seconds"] or "",
                    f"{row['compile_seconds']:.1f}",
                ]
                for row in found["rows"]
            ],
        )
        for name, found in content["workloads"].items()
    ]
    return [*found, _mesh_table(content["meshes"])] if content.get("meshes") else found


def _mesh_table(rows: list[dict[str, Any]]) -> common.Table:
    return common.Table(
        f"Parameters divided too: an MLP of {rows[0]['parameters'] / 1e6:.1f} million parameters, {WIDE_TASKS} tasks, "
        f"{WIDE_INNER_STEPS} inner steps",
        [
            "tasks x model",
            "arguments MB a device",
            "results MB",
            "temporaries MB",
            "distance of the meta-gradient",
            "all-reduces",
            "all-gathers",
        ],
        [
            [
                f"{row['task_parts']} x {row['model_parts']}",
                *(f"{row[name] / 1e6:.1f}" for name in ("argument_bytes", "output_bytes", "temporary_bytes")),
                f"{row['distance']:.1e}",
                row["all_reduces"],
                row["all_gathers"],
            ]
            for row in rows
        ],
        "Bytes are those of one device, counted by the compiler. Collectives are those in the text of the program, "
        "where one inside a loop counts once. The distance is relative to the norm of the meta-gradient on the first "
        "mesh.",
    )


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
