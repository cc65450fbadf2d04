"""A meta-step of 2D navigation: collection, the exact meta-gradient, and a trust-region step.

PyTorch is measured beside it if it is installed, written as its ports of MAML write it. The benchmark first checks in
float64 that both have the same advantages, meta-gradient and trust-region step on the same trajectories.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.peers import by_path, check, distance
from experiments import navigation
from experiments.devices import mesh_for
from experiments.runs import num_cores
from maml_jax import init_meta_state, make_train_loop, rl
from maml_jax.meta_gradient import meta_gradient
from maml_jax.types import task_keys

OURS = "maml_jax"
PEER = "PyTorch, a loop over tasks"
CHECKED_CG_STEPS = 4
"""Conjugate-gradient steps of the compared trust-region steps. With ten, rounding is amplified beyond any tolerance."""


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """The settings of the MAML paper: 20 goals, 20 trajectories of 100 time steps before and after the update."""

    max_seconds: float = 60.0
    """Seconds of rounds. A call longer than a quarter of it only runs in the first."""
    meta_batch_size: int = 20
    """Goals of a meta-step."""
    num_trajectories: int = 20
    """Trajectories before the update, and after it."""
    horizon: int = 100
    """Time steps of a trajectory."""
    metric_stride: int = 7
    """The row "thinned" has a metric on every so many time steps."""
    tolerance: float = 1e-6
    """Largest distance in float64 of what is compared with PyTorch, relative to the norm of ours."""


SHORT = Config(short=True, max_repetitions=2, max_seconds=10.0, meta_batch_size=4, num_trajectories=5, horizon=20)


def settings_of(config: Config, *, stride: int = 1) -> navigation.Config:
    """The settings of `experiments.navigation`; the metric sees every time step by default."""
    changes = {"meta_batch_size": config.meta_batch_size, "shot": config.num_trajectories, "horizon": config.horizon}
    return dataclasses.replace(navigation.METHODS["maml"], metric_stride=stride, **changes)


def start_of(settings: navigation.Config) -> tuple[Any, Any]:
    """The learner and its initial parameters."""
    learner = navigation.meta_learner_of(settings)
    return learner, learner.init(jax.random.key(0), jnp.zeros((1, 2)))


def training(settings: navigation.Config, mesh: Any) -> tuple[Callable, float]:
    """Compiles a meta-step. Returns a call that takes one, and the seconds of compilation."""
    learner, _ = start_of(settings)
    rule = navigation.outer_rule_of(settings, learner, mesh)
    state = init_meta_state(learner, rule, jax.random.key(0), inputs=jnp.zeros((1, 2)))
    loop = make_train_loop(
        learner,
        rule,
        navigation.sampler_of(settings),
        meta_batch_size=settings.meta_batch_size,
        num_steps=1,
        mesh=mesh,
    )
    args = (state, jax.random.key(1), *loop.data)
    compiled, seconds = common.compile_of(loop.jitted, *args)
    return common.stepping(compiled, *args), seconds


def collection(settings: navigation.Config) -> tuple[Callable, float]:
    """Compiles the collection of all trajectories of a meta-step, on one device."""
    _, params = start_of(settings)
    sample_episode = navigation.sampler_of(settings)
    keys = task_keys(jax.random.key(1), settings.meta_batch_size)
    compiled, seconds = common.compile_of(jax.vmap(sample_episode, (0, None)), keys, params)
    return lambda: compiled(keys, params), seconds


def in_torch(settings: navigation.Config) -> tuple[dict[str, Callable], Any] | None:
    """The calls of PyTorch and their module, or None if it is not installed, or JAX has an accelerator."""
    if jax.default_backend() != "cpu":
        return None
    try:
        import torch

        from benchmarks import torch_navigation
    except ImportError:
        return None
    torch.set_num_threads(num_cores())
    peer = peer_settings(torch_navigation, settings)
    weights = torch_navigation.as_weights(by_path(start_of(settings)[1]))
    rng = np.random.default_rng(0)

    def goals():
        return rng.uniform(-0.5, 0.5, (settings.meta_batch_size, 2))

    def collect():
        return torch_navigation.collected(weights, goals(), rng, peer)

    def iterate():
        nonlocal weights
        weights = torch_navigation.step(weights, collect(), peer)

    return {"collection": collect, "iteration": iterate}, torch_navigation


def peer_settings(torch_navigation: Any, settings: navigation.Config) -> Any:
    """The same settings for PyTorch."""
    return torch_navigation.Settings(
        settings.shot, settings.horizon, settings.hyperparameters.inner_lr, settings.max_kl
    )


def distances(torch_navigation: Any, settings: navigation.Config) -> dict[str, float]:
    """How far PyTorch is from ours in float64 on the same trajectories.

    Returns:
      The distances of the advantages, of the meta-gradient and of the change by one trust-region step, each relative to
      the norm of ours.
    """
    import torch

    def in_torch(array):
        return torch.from_numpy(np.array(array))

    def trajectories(batch):
        targets = batch.targets
        leaves = (batch.inputs, targets.action, targets.advantage, targets.mask, *targets.policy)
        return torch_navigation.Trajectories(*map(in_torch, leaves))

    with jax.enable_x64(True):
        learner, params = start_of(settings)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        keys = task_keys(jax.random.key(2), settings.meta_batch_size)
        episodes = jax.jit(jax.vmap(navigation.sampler_of(settings), (0, None)))(keys, params)
        gradient_fn = functools.partial(meta_gradient, learner)
        rule = rl.trust_region(learner, max_kl=settings.max_kl, num_cg_steps=CHECKED_CG_STEPS)
        _, grads = jax.jit(gradient_fn)(params, episodes)
        stepped, _, _ = jax.jit(lambda p, e: rule.update(gradient_fn, p, e, ()))(params, episodes)
        change = jax.tree.map(jnp.subtract, stepped, params)
        query = episodes.query
        ours = {
            "advantages": {"all": np.asarray(query.targets.advantage)},
            "meta-gradient": by_path(grads),
            "trust-region step": by_path(change),
        }

    weights = torch_navigation.as_weights(by_path(params))
    # Ours stops at a relative residual, the ports at an absolute one: here both take all steps.
    peer = peer_settings(torch_navigation, settings)
    peer = peer._replace(num_cg_steps=CHECKED_CG_STEPS, residual_tolerance=0.0)
    data = [
        (
            trajectories(jax.tree.map(lambda leaf, task=task: leaf[task, 0], episodes.support)),
            trajectories(jax.tree.map(lambda leaf, task=task: leaf[task], query)),
        )
        for task in range(settings.meta_batch_size)
    ]
    _, grads, _ = torch_navigation.gradient_and_product(weights, data, peer)
    stepped = torch_navigation.step(weights, data, peer)
    parts = torch.split(grads, [weight.numel() for weight in weights.values()])
    tasks = [jax.tree.map(lambda leaf, task=task: np.asarray(leaf[task]), query) for task in range(len(data))]
    of_tasks = [
        torch_navigation.advantages(inputs, targets.reward, targets.mask, peer.discount) for inputs, targets in tasks
    ]
    theirs = {
        "advantages": {"all": np.stack(of_tasks)},
        "meta-gradient": {
            name: part.reshape(weights[name].shape).numpy() for name, part in zip(weights, parts, strict=True)
        },
        "trust-region step": {name: (stepped[name] - weights[name]).detach().numpy() for name in weights},
    }
    return {name: distance(theirs[name], ours[name]) for name in ours}


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes navigation.json and navigation.png, and returns the content.

    Raises:
      RunError: if PyTorch has other advantages, another meta-gradient or another step.
    """
    whole, thinned = settings_of(config), settings_of(config, stride=config.metric_stride)
    mesh = mesh_for(config.meta_batch_size)
    compiled = {
        OURS: training(whole, mesh),
        f"{OURS}, one device": training(whole, None),
        f"{OURS}, thinned metric": training(thinned, mesh),
    }
    iterations = {name: call for name, (call, _) in compiled.items()}
    collections = {f"{OURS}, one device": collection(whole)[0]}
    found = None
    if (peer := in_torch(whole)) is not None:
        calls, module = peer
        found = distances(module, whole)
        check(found, config.tolerance)
        iterations[PEER], collections[PEER] = calls["iteration"], calls["collection"]
    seconds = common.measure_alternately(iterations, config)
    collecting = common.measure_alternately(collections, config)
    steps = 2 * config.meta_batch_size * config.num_trajectories * config.horizon
    rows = [
        {
            "implementation": name,
            "seconds": common.summarise(values),
            "times_ours": common.summarise([a / b for a, b in zip(values, seconds[OURS], strict=False)]),
            "compile_seconds": compiled[name][1] if name in compiled else 0.0,
            "collection_seconds": common.summarise(collecting[name]) if name in collecting else None,
            "environment_steps_per_second": steps / common.summarise(collecting[name]).median
            if name in collecting
            else None,
        }
        for name, values in seconds.items()
    ]
    content = {"rows": rows, "environment_steps": steps, "distances": found}
    common.show(tables({"config": dataclasses.asdict(config)} | content))
    common.write_results("navigation", config, content)
    draw(config, rows)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """The times of a meta-step and of its collection."""
    config, found = content["config"], content["distances"]
    note = "The metric of the trust region sees every time step, but for the row that says otherwise."
    if found is not None:
        note += "\nIn float64 on the same trajectories PyTorch differs from maml_jax by " + ", ".join(
            f"{value:.0e} ({name})" for name, value in found.items()
        )
        note += ", relative to its norm."
    return [
        common.Table(
            f"{config['meta_batch_size']} goals, {config['num_trajectories']} trajectories of {config['horizon']} time "
            f"steps before and after the update: {content['environment_steps']:,} environment steps",
            ["", "ms a meta-step (quartiles)", "times ours (quartiles)", "compile s", "collection alone, ms",
             "environment steps/s"],
            [
                [
                    row["implementation"],
                    row["seconds"],
                    common.times(row["times_ours"]),
                    f"{row['compile_seconds']:.1f}",
                    row["collection_seconds"] or "",
                    f"{row['environment_steps_per_second']:,.0f}" if row["environment_steps_per_second"] else "",
                ]
                for row in content["rows"]
            ],
            note,
        )
    ]  # fmt: skip


def draw(config: Config, rows: list[dict[str, Any]]) -> None:
    """Draws a bar for each implementation."""
    with common.figure("navigation", config, width=6) as (axes,):
        common.draw_bars(axes, {row["implementation"]: row["seconds"].median for row in rows}, "seconds a meta-step")


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
