"""The same meta-step in this library, in JAX as it is usually written, and in PyTorch's meta-learning libraries.

All implementations start from the same parameters and episodes. The benchmark first checks in float64 that all
compute the same meta-gradient. It then times them in turns in float32, so a drift in the speed of the machine does
not change their ratios.

It needs PyTorch, higher and TorchOpt: pip install -e '.[experiments,peers]'
"""

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from experiments.devices import mesh_for
from experiments.runs import RunError
from maml_jax import MetaState, losses, make_meta_step, maml, mixed_mode, models
from maml_jax.models.layers import conv_lax, conv_matmul
from maml_jax.types import ArrayTree, Episode

OURS = "maml_jax"


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """One exact meta-step of MAML with Adam: conv4 at stride 2, without adapting the offsets of the normalisation."""

    max_seconds: float = 60.0
    """Seconds of rounds for each number of inner steps. A call longer than a quarter of it only runs in the first."""
    meta_batch_size: int = 32
    """Tasks of a meta-step."""
    way: int = 5
    """Classes of an episode."""
    shot: int = 1
    """Support examples per class."""
    query_shot: int = 15
    """Query examples per class."""
    filters: int = 64
    """Filters of each convolution."""
    inner_lr: float = 0.4
    """Learning rate of the inner gradient descent on the mean cross-entropy."""
    outer_lr: float = 1e-3
    """Learning rate of Adam."""
    inner_steps: tuple[int, ...] = (1, 5)
    """Inner steps. One vmap over lax.conv is far slower and only measured with the first number."""
    checked_tasks: int = 4
    """Tasks in the comparison of meta-gradients in float64."""
    tolerance: float = 1e-4
    """Largest distance of a meta-gradient from ours in float64, relative to the norm of ours."""


SHORT = Config(short=True, max_repetitions=5, max_seconds=10.0, inner_steps=(1,))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One implementation of the meta-step in JAX."""

    inner_grad: Callable = mixed_mode
    conv_fn: Callable = conv_matmul
    one_vmap: bool = False
    on_mesh: bool = False


VARIANTS = {
    OURS: Variant(on_mesh=True),
    f"{OURS}, without a mesh": Variant(),
    "JAX, one vmap over lax.conv": Variant(jax.value_and_grad, conv_lax, one_vmap=True),
}


def by_path(tree: ArrayTree) -> dict[str, np.ndarray]:
    """Returns the leaves of a pytree as NumPy arrays, by paths such as "conv_0/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def in_jax(variant: Variant, inner_steps: int, episodes: Episode, config: Config) -> tuple[Callable, Callable, float]:
    """Compiles a meta-step in JAX, in the dtype of the episodes.

    Returns:
      A call that takes a meta-step; a call that takes the first one and returns its meta-gradient by path; and the
      seconds of compilation.
    """
    learner = maml(
        models.conv4(way=config.way, features=config.filters, conv_fn=variant.conv_fn),
        losses.cross_entropy,
        inner_optimizer=optax.sgd(config.inner_lr),
        where=lambda name: "norm" not in name,
        num_inner_steps=inner_steps,
        inner_grad=variant.inner_grad,
    )
    momentum = 0.9
    optimizer = optax.adam(config.outer_lr, b1=momentum)
    num_tasks = len(episodes.support.inputs)
    params = initial_params(learner.init, episodes)
    state = MetaState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    mesh = mesh_for(num_tasks) if variant.on_mesh else None
    state, episodes = common.place(state, episodes, mesh)
    chunk_size = num_tasks if variant.one_vmap else None
    step = make_meta_step(learner, optimizer, chunk_size=chunk_size, mesh=mesh)
    compiled, seconds = common.compile_of(step.jitted, state, episodes)
    call = common.stepping(compiled, state, episodes)

    def first_gradient():
        # After the first step, Adam's first moment is (1 - momentum) times the gradient.
        moment = optax.tree.get(call()[0].opt_state, "mu")
        return {name: leaf / (1 - momentum) for name, leaf in by_path(moment).items()}

    return call, first_gradient, seconds


def initial_params(init: Callable, episodes: Episode) -> ArrayTree:
    """Draws the common initial parameters in float32 and converts them to the dtype of the episodes."""
    inputs = episodes.support.inputs
    with jax.enable_x64(False):
        params = init(jax.random.key(0), jnp.zeros(inputs.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.astype(inputs.dtype), params)


def installed_peers() -> ModuleType:
    """The module of the peers.

    Raises:
      RunError: if a peer is not installed, or JAX does not run on the CPU, where the peers do.
    """
    if jax.default_backend() != "cpu":
        raise RunError(
            f"the peers run on the CPU and JAX on {jax.default_backend()}; set JAX_PLATFORMS=cpu to compare them"
        )
    try:
        return importlib.import_module("benchmarks.torch_peers")
    except ImportError as error:
        raise RunError(f"the peers are not installed ({error}); pip install -e '.[peers]'") from error


def in_torch(inner_steps: int, episodes: Episode, config: Config) -> dict[str, tuple[Callable, Callable]]:
    """Builds the meta-step of every peer.

    Returns:
      By name: a call that takes a meta-step, and one that takes the first and returns its meta-gradient by path.

    Raises:
      RunError: if a peer is not installed.
    """
    torch_peers = installed_peers()
    torch_peers.use_all_cores()
    model = models.conv4(way=config.way, features=config.filters)
    problem = torch_peers.Problem(
        by_path(initial_params(model.init, episodes)),
        *(tuple(map(np.asarray, batch)) for batch in (episodes.support, episodes.query)),
        config.inner_lr,
        inner_steps,
        config.outer_lr,
    )

    def both(make):
        peer = make(problem)

        def first_gradient():
            peer.step()
            return peer.gradient()

        return peer.step, first_gradient

    return {name: both(make) for name, make in torch_peers.PEERS.items()}


def distance(gradient: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Returns ‖gradient - reference‖ / ‖reference‖ over all leaves."""
    flat, flat_reference = (
        np.concatenate([np.ravel(leaves[name]) for name in sorted(reference)]) for leaves in (gradient, reference)
    )
    return float(np.linalg.norm(flat - flat_reference) / np.linalg.norm(flat_reference))


def check(distances: dict[str, float], tolerance: float) -> None:
    """Raises RunError that names the implementations whose meta-gradients differ from ours by over `tolerance`."""
    if wrong := {name: value for name, value in distances.items() if not value <= tolerance}:
        raise RunError(f"these meta-gradients are further than {tolerance} from that of {OURS}: {wrong}")


class Prepared(NamedTuple):
    """All implementations for one number of inner steps, by name, ours first.

    Attributes:
      steps: calls that take a meta-step.
      gradients: the meta-gradients of the first step, by path.
      compile_seconds: seconds of compilation, of the implementations in JAX.
    """

    steps: dict[str, Callable]
    gradients: dict[str, dict[str, np.ndarray]]
    compile_seconds: dict[str, float]

    def distances(self) -> dict[str, float]:
        """The distance of every meta-gradient from ours, relative to the norm of ours."""
        return {name: distance(gradient, self.gradients[OURS]) for name, gradient in self.gradients.items()}


def prepare(inner_steps: int, num_tasks: int, dtype: Any, config: Config) -> Prepared:
    """Takes the first step of every implementation, in float32, or in float64 if x64 is enabled."""
    episodes = common.random_episodes(
        num_tasks=num_tasks, way=config.way, shot=config.shot, query_shot=config.query_shot
    )
    episodes = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, episodes)
    prepared = Prepared({}, {}, {})
    for name, variant in VARIANTS.items():
        if not variant.one_vmap or inner_steps == config.inner_steps[0]:
            prepared.steps[name], first_gradient, seconds = in_jax(variant, inner_steps, episodes, config)
            prepared.compile_seconds[name] = seconds
            prepared.gradients[name] = first_gradient()
    for name, (step, first_gradient) in in_torch(inner_steps, episodes, config).items():
        prepared.steps[name] = step
        prepared.gradients[name] = first_gradient()
    return prepared


def compare(inner_steps: int, config: Config) -> list[dict[str, Any]]:
    """Checks and times all implementations for one number of inner steps.

    Returns:
      A row for each, ours first.

    Raises:
      RunError: if a meta-gradient differs from ours by more than the tolerance.
    """
    with jax.enable_x64(True):
        in_float64 = prepare(inner_steps, config.checked_tasks, jnp.float64, config).distances()
    check(in_float64, config.tolerance)
    prepared = prepare(inner_steps, config.meta_batch_size, jnp.float32, config)
    in_float32 = prepared.distances()
    seconds = common.measure_alternately(prepared.steps, config)
    return [
        {
            "inner_steps": inner_steps,
            "implementation": name,
            "seconds": common.summarise(values),
            "times_ours": common.ratios(values, seconds[OURS]),
            "compile_seconds": prepared.compile_seconds.get(name, 0.0),
            "distance_float64": in_float64[name],
            "distance_float32": in_float32[name],
        }
        for name, values in seconds.items()
    ]


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes peers.json and peers.png, and returns the content."""
    installed_peers()  # what is missing is said before anything is compiled
    rows = [row for steps in config.inner_steps for row in compare(steps, config)]
    content = {"config": dataclasses.asdict(config), "rows": rows}
    common.show(tables(content))
    common.write_results("peers", config, {"rows": rows})
    draw(config, rows)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """One table for each number of inner steps."""
    config, rows = content["config"], content["rows"]
    return [
        common.Table(
            f"{config['meta_batch_size']} tasks, {config['way']}-way {config['shot']}-shot, {config['query_shot']} "
            f"queries a class, inner steps: {steps}",
            [
                "",
                "ms (quartiles)",
                "times ours (quartiles)",
                "rounds",
                "compile s",
                "distance in float64",
                "in float32",
            ],
            [
                [
                    row["implementation"],
                    row["seconds"],
                    common.times(row["times_ours"]),
                    row["seconds"].repetitions,
                    f"{row['compile_seconds']:.1f}",
                    f"{row['distance_float64']:.1e}",
                    f"{row['distance_float32']:.1e}",
                ]
                for row in rows
                if row["inner_steps"] == steps
            ],
        )
        for steps in config["inner_steps"]
    ]


def draw(config: Config, rows: list[dict[str, Any]]) -> None:
    """Draws a point for each implementation: its time as a multiple of ours."""
    with common.figure("peers", config, columns=len(config.inner_steps), width=5.5) as drawn:
        for axes, steps in zip(drawn, config.inner_steps, strict=True):
            ratios = {row["implementation"]: row["times_ours"].median for row in rows if row["inner_steps"] == steps}
            common.draw_points(axes, ratios, f"time of a meta-step, as a multiple of {OURS}")
            axes.set(title=f"inner steps: {steps}")


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
