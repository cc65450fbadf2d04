"""Meta-steps per second on sinusoids, with the settings of the MAML paper, and what bounds them.

The library's training loop, sampling included, is compared with two loops in Python: one jitted meta-step at a time
on tasks sampled on the host, and plain PyTorch in a loop over tasks, if it is installed.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from maml_jax import (
    Batch,
    Episode,
    MetaLearner,
    init_meta_state,
    losses,
    make_meta_step,
    make_train_loop,
    maml,
    models,
)
from maml_jax.cost import count_flops
from maml_jax.tasks import sinusoid
from maml_jax.types import task_keys

OURS, SAMPLING = "one compiled loop", "its sampling alone"


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """MAML on sinusoids: Finn et al., 2017, section 5.1."""

    meta_batch_size: int = 25
    """Tasks of a meta-step."""
    shot: int = 10
    """Support points of a task. The number of query points is the same."""
    features: tuple[int, ...] = (40, 40, 1)
    """Widths of the network's layers."""
    inner_steps: int = 1
    """Inner steps."""
    inner_lr: float = 0.001
    """Learning rate of the inner gradient descent."""
    outer_lr: float = 1e-3
    """Learning rate of Adam."""
    steps_per_call: int = 2000
    """Meta-steps in one timed call of the compiled loop."""
    python_steps: int = 50
    """Meta-steps in one timed call of the loops in Python."""
    chunk_size: tuple[int, ...] = (1, 5, 25)
    """Tasks that are vmapped together, in addition to the library's default."""


SHORT = Config(short=True, max_repetitions=5, max_seconds=5.0, chunk_size=())


def make_learner(config: Config) -> MetaLearner:
    """MAML on a multilayer perceptron."""
    return maml(
        models.mlp(features=config.features),
        losses.mean_squared_error,
        inner_optimizer=optax.sgd(config.inner_lr),
        num_inner_steps=config.inner_steps,
    )


class Loop(NamedTuple):
    """A compiled training loop.

    Attributes:
      call: runs it.
      program: the optimised HLO.
      flops: floating-point operations of one meta-step.
      compile_seconds: seconds of compilation.
    """

    call: Callable[[], Any]
    program: str
    flops: float
    compile_seconds: float


def prepare_loop(config: Config, chunk_size: int | None) -> Loop:
    """Compiles `make_train_loop`."""
    learner, optimizer = make_learner(config), optax.adam(config.outer_lr)
    sample_episode = sinusoid.make_sampler(shot=config.shot, query_shot=config.shot)
    key = jax.random.key(0)
    state = init_meta_state(learner, optimizer, key, jnp.zeros((config.shot, 1)))
    loop = make_train_loop(
        learner,
        optimizer,
        sample_episode,
        meta_batch_size=config.meta_batch_size,
        num_steps=config.steps_per_call,
        chunk_size=chunk_size,
    )
    args = (state, key, *loop.data)
    flops = count_flops(loop.jitted, *args) / config.steps_per_call
    compiled, compile_seconds = common.compile_of(loop.jitted, *args)
    return Loop(common.stepping(compiled, *args), compiled.as_text(), flops, compile_seconds)


def compiled_loop(config: Config, chunk_size: int | None) -> dict[str, Any]:
    """Times a training loop. The row includes the number of operations in a meta-step of the compiled program."""
    loop = prepare_loop(config, chunk_size)
    return timed(loop.call, config.steps_per_call, config) | {
        "compile_seconds": loop.compile_seconds,
        "flops_per_step": loop.flops,
        "ops_per_step": count_ops(loop.program) / config.steps_per_call,
    }


def sampling_alone(config: Config) -> dict[str, Any]:
    """Times a compiled loop that only draws the tasks of every meta-step, in the same way as the training loop."""
    sample_episode = sinusoid.make_sampler(shot=config.shot, query_shot=config.shot)

    @jax.jit
    def loop(key):
        def draw(total, step):
            keys = task_keys(jax.random.fold_in(key, step), config.meta_batch_size)
            episodes = jax.vmap(sample_episode)(keys)
            return total + sum(jnp.sum(leaf) for leaf in jax.tree.leaves((episodes.support, episodes.query))), None

        return jax.lax.scan(draw, 0.0, jnp.arange(config.steps_per_call))[0]

    key = jax.random.key(0)
    compiled, compile_seconds = common.compile_of(loop, key)
    row = timed(lambda: compiled(key), config.steps_per_call, config)
    ops = count_ops(compiled.as_text()) / config.steps_per_call
    return row | {"compile_seconds": compile_seconds, "ops_per_step": ops}


def timed(call: Callable[[], Any], num_steps: int, config: Config) -> dict[str, Any]:
    """Times a call that takes `num_steps` meta-steps. Returns seconds per meta-step and meta-steps per second."""
    timing = common.measure(call, config)
    per_step = common.Timing(*(value / num_steps for value in timing[:3]), timing.repetitions)
    return {"seconds_per_step": per_step, "steps_per_second": 1 / per_step.median, "compile_seconds": 0.0}


_FREE_OPS = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "while", "call"}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?[\])}] ([\w\-]+)\((.*)$", re.MULTILINE)


def count_ops(program: str) -> int:
    """Counts the operations that a compiled program starts. Those in a loop count once per iteration.

    Args:
      program: optimised HLO. A fusion is one operation. Instructions that only name or regroup buffers are free.

    Raises:
      ValueError: if the program contains a loop of unknown length.
    """
    bodies = dict(_COMPUTATION.findall(program))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", program, re.MULTILINE)[1]

    def count(name: str) -> int:
        total = 0
        for opcode, rest in _INSTRUCTION.findall(bodies[name]):
            if opcode == "while":
                length = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
                if length is None:
                    raise ValueError(
                        "the program contains a loop of unknown length; use a scan, or a fori_loop with constant bounds"
                    )
                total += int(length[1]) * count(re.search(r"body=%?([\w.\-]+)", rest)[1])
            elif opcode == "call":
                total += count(re.search(r"to_apply=%?([\w.\-]+)", rest)[1])
            else:
                total += opcode not in _FREE_OPS
        return total

    return count(entry)


def sample_on_host(rng: np.random.Generator, config: Config) -> Episode:
    """Draws a meta-batch with NumPy, as a data loader does."""
    shape = (config.meta_batch_size, 1, 1)
    amplitude, phase = rng.uniform(*sinusoid.AMPLITUDES, shape), rng.uniform(*map(float, sinusoid.PHASES), shape)
    inputs = rng.uniform(*sinusoid.INPUTS, (config.meta_batch_size, 2 * config.shot, 1))
    batch = Batch(inputs.astype(np.float32), (amplitude * np.sin(inputs - phase)).astype(np.float32))
    return Episode(
        *(jax.tree.map(lambda x, s=part: x[:, s], batch) for part in np.split(np.arange(2 * config.shot), 2))
    )


def jitted_steps(config: Config) -> dict[str, Any]:
    """Times one jitted meta-step at a time, on tasks sampled on the host and vmapped together."""
    learner, optimizer = make_learner(config), optax.adam(config.outer_lr)
    rng = np.random.default_rng(0)
    episodes = sample_on_host(rng, config)
    state = init_meta_state(learner, optimizer, jax.random.key(0), episodes.support.inputs[0])
    step = make_meta_step(learner, optimizer, chunk_size=config.meta_batch_size)
    compiled, compile_seconds = common.compile_of(step.jitted, state, episodes)

    def call():
        nonlocal state
        for _ in range(config.python_steps):
            state, info = compiled(state, sample_on_host(rng, config))
        return info

    return timed(call, config.python_steps, config) | {"compile_seconds": compile_seconds}


def torch_loop(config: Config) -> dict[str, Any] | None:
    """Times plain PyTorch, one task after the other. Returns None if it is not installed, or JAX has an accelerator."""
    if jax.default_backend() != "cpu":
        return None
    try:
        import torch
    except ImportError:
        return None
    rng = np.random.default_rng(0)
    sizes = [1, *config.features]
    weights = [torch.randn(*shape) * 0.1 for pair in itertools.pairwise(sizes) for shape in (pair, pair[1:])]
    weights = [weight.requires_grad_() for weight in weights]
    outer = torch.optim.Adam(weights, lr=config.outer_lr)

    def loss(weights, inputs, targets):
        hidden = inputs
        for index in range(0, len(weights), 2):
            hidden = torch.addmm(weights[index + 1], hidden if index == 0 else torch.relu(hidden), weights[index])
        return torch.nn.functional.mse_loss(hidden, targets)

    def step():
        outer.zero_grad()
        tasks = jax.tree.map(torch.from_numpy, sample_on_host(rng, config))
        for task in range(config.meta_batch_size):
            adapted = weights
            for _ in range(config.inner_steps):
                support_loss = loss(adapted, tasks.support.inputs[task], tasks.support.targets[task])
                grads = torch.autograd.grad(support_loss, adapted, create_graph=True)
                adapted = [w - config.inner_lr * g for w, g in zip(adapted, grads, strict=True)]
            (loss(adapted, tasks.query.inputs[task], tasks.query.targets[task]) / config.meta_batch_size).backward()
        outer.step()

    return timed(lambda: [step() for _ in range(config.python_steps)], config.python_steps, config)


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes sinusoid.json and sinusoid.png, and returns the content."""
    rows = {OURS: compiled_loop(config, None)}
    for chunk_size in config.chunk_size:
        rows[f"{OURS}, chunks of {chunk_size}"] = compiled_loop(config, chunk_size)
    rows[SAMPLING] = sampling_alone(config)
    rows["JAX, a jitted step at a time, sampled on the host"] = jitted_steps(config)
    if (row := torch_loop(config)) is not None:
        rows["PyTorch, a loop over tasks"] = row
    content = {"rows": rows}
    common.show(tables(content))
    common.write_results("sinusoid", config, content)
    draw(config, rows)
    return content


def draw(config: Config, rows: dict[str, Any]) -> None:
    """Draws a point for each loop."""
    with common.figure("sinusoid", config, width=7) as (axes,):
        values = {name: row["steps_per_second"] for name, row in rows.items() if name != SAMPLING}
        common.draw_points(axes, values, "meta-steps a second")


def tables(content: dict[str, Any]) -> list[common.Table]:
    """The speeds, and the operations of the compiled loops."""
    rows = content["rows"]
    fastest = rows[OURS]["steps_per_second"]
    bounds = [
        f"{name}: {row['flops_per_step'] / 1e6:.2f} MFLOP and {row['ops_per_step']:.0f} XLA instructions a meta-step, "
        f"{row['flops_per_step'] * row['steps_per_second'] / 1e9:.1f} GFLOP/s."
        for name, row in rows.items()
        if "flops_per_step" in row
    ]
    share = rows[SAMPLING]["seconds_per_step"].median / rows[OURS]["seconds_per_step"].median
    bounds.append(f"Sampling is {rows[SAMPLING]['ops_per_step']:.0f} of the operations and {share:.0%} of the time.")
    return [
        common.Table(
            "Training on sinusoids",
            ["", "meta-steps/s", "times slower", "ms a step (quartiles)", "compile s"],
            [
                [
                    name,
                    f"{row['steps_per_second']:.0f}",
                    f"{fastest / row['steps_per_second']:.1f}",
                    row["seconds_per_step"],
                    f"{row['compile_seconds']:.1f}",
                ]
                for name, row in rows.items()
            ],
            "\n".join(bounds),
        )
    ]


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
