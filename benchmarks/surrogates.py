"""Bias and variance of the surrogates' derivatives, against the exact ones of a random Markov decision process.

A surrogate's derivatives are estimated from N trajectories, very often. The exact ones come from the expected return,
which dynamic programming computes. What a meta-gradient needs of an inner step is the product of its second derivative
with the outer gradient; the exact gradient stands for that.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from maml_jax import Model, models, rl
from maml_jax.rl.rollout import as_batch
from maml_jax.tasks.tabular_mdp import TabularMDP, action_values, random_mdps
from maml_jax.types import ArrayTree, check_integer

SURROGATES = {
    "policy_gradient": rl.policy_gradient,
    "ratio_surrogate": rl.ratio_surrogate,
    "loaded_dice": rl.loaded_dice,
}

DERIVATIVES = ("gradient", "second derivative")


@dataclasses.dataclass(frozen=True)
class Config(common.Output):
    """Estimates of the gradient and of a product with the second derivative."""

    horizon: tuple[int, ...] = (5, 20)
    """Time steps of a trajectory."""
    num_processes: int = 3
    """Random processes, the same at every horizon."""
    num_states: int = 10
    """States of a process."""
    num_actions: int = 5
    """Actions of a process."""
    hidden_size: int = 16
    """Units of the policy network's hidden layer."""
    num_trajectories: int = 20
    """Trajectories of one estimate."""
    num_estimates: int = 10_000
    """Estimates whose mean and spread are reported, for every process."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number that cannot be."""
        if not self.horizon:
            raise ValueError("--horizon needs at least one number of time steps")
        for horizon in self.horizon:
            check_integer("--horizon", horizon, at_least=1)
        least = {"num_processes": 1, "num_states": 1, "num_actions": 2, "hidden_size": 1, "num_trajectories": 1}
        for name, smallest in (least | {"num_estimates": 2}).items():
            check_integer(f"--{name.replace('_', '-')}", getattr(self, name), at_least=smallest)


SHORT = Config(short=True, horizon=(5,), num_processes=1, num_estimates=2000)


def expected_return(policy: Model, params: ArrayTree, mdp: TabularMDP, horizon: int) -> tuple[jax.Array, jax.Array]:
    """The expected return from state 0, and the values [H, S] of the policy."""
    states = jnp.eye(len(mdp.mean_rewards))
    probabilities = jax.nn.softmax(policy.apply(params, states).logits)

    def back_up(following, _):
        value = jnp.sum(probabilities * action_values(mdp, following), -1)
        return value, value

    end = jnp.zeros_like(mdp.mean_rewards[:, 0])
    _, values = jax.lax.scan(back_up, end, length=horizon, reverse=True)
    return values[0, 0], values


def estimator(policy: Model, params: ArrayTree, mdp: TabularMDP, horizon: int, config: Config) -> Callable:
    """Makes `(loss, key) -> (gradient, product)`, flat: one estimate from N trajectories.

    The advantages are the returns that followed minus the exact values of the policy, without discount.
    """
    environment = random_mdps(config.num_states, config.num_actions)
    (_, values), exact = jax.value_and_grad(lambda p: expected_return(policy, p, mdp, horizon), has_aux=True)(params)

    def advantages(trajectories):
        to_go = jnp.cumsum(trajectories.reward[::-1], 0)[::-1]
        return to_go - jnp.einsum("hns,hs->hn", trajectories.observation, values)

    def estimate(loss, key):
        trajectories = rl.rollout(
            environment,
            lambda observation: policy.apply(params, observation),
            mdp,
            key,
            num_trajectories=config.num_trajectories,
            horizon=horizon,
        )
        batch = as_batch(trajectories, advantages)

        def surrogate(params):
            return -horizon * loss(policy.apply(params, batch.inputs), batch.targets)

        return tuple(map(flat, jax.jvp(jax.grad(surrogate), (params,), (exact,))))

    return estimate


def flat(tree: ArrayTree) -> jax.Array:
    """All numbers of a pytree in one vector."""
    return jax.flatten_util.ravel_pytree(tree)[0]


def measure(horizon: int, process: int, config: Config) -> list[dict[str, Any]]:
    """Bias and spread of every surrogate in one process, by a table of logits and by a network."""
    mdp = random_mdps(config.num_states, config.num_actions).sample_task(jax.random.key(process))
    policies = {"table": (config.num_actions,), "network": (config.hidden_size, config.num_actions)}
    rows = []
    for kind, features in policies.items():
        policy = rl.categorical_policy(models.mlp(features=features))
        params = policy.init(jax.random.key(100 + process), jnp.zeros((1, config.num_states)))

        def gradient(params, policy=policy):
            return jax.grad(lambda p: expected_return(policy, p, mdp, horizon)[0])(params)

        exact = tuple(map(flat, jax.jvp(gradient, (params,), (gradient(params),))))
        estimate = estimator(policy, params, mdp, horizon, config)
        keys = jax.random.split(jax.random.key(1), config.num_estimates)
        for name, loss in SURROGATES.items():

            def many(keys, loss=loss, estimate=estimate):
                return jax.lax.map(lambda key: estimate(loss, key), keys, batch_size=100)

            about = {"horizon": horizon, "process": process, "policy": kind, "surrogate": name}
            for derivative, found, truth in zip(DERIVATIVES, jax.jit(many)(keys), exact, strict=True):
                rows.append(about | {"derivative": derivative} | errors(found, truth))
    return rows


def errors(estimates: jax.Array, exact: jax.Array) -> dict[str, float]:
    """Bias, its standard error, and spread of estimates [M, P], relative to the norm of the exact vector [P]."""
    found, size = np.asarray(estimates, np.float64), np.linalg.norm(exact)
    spread = np.sqrt(np.sum(np.var(found, axis=0, ddof=1)))
    return {
        "bias": float(np.linalg.norm(found.mean(0) - exact) / size),
        "bias_of_noise": float(spread / np.sqrt(len(found)) / size),
        "spread": float(spread / size),
    }


def run(config: Config) -> dict[str, Any]:
    """Measures, prints, writes surrogates.json and surrogates.png, and returns the content."""
    processes = range(config.num_processes)
    rows = [row for horizon in config.horizon for process in processes for row in measure(horizon, process, config)]
    content = {"config": dataclasses.asdict(config), "rows": rows}
    common.show(tables(content))
    common.write_results("surrogates", config, {"rows": rows})
    draw(config, rows)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """One table for each derivative."""
    config, rows = content["config"], content["rows"]
    note = (
        "Bias and spread are relative to the norm of the exact vector: the mean over the processes, with the smallest "
        "and the largest in parentheses. 'Noise of the bias' is the mean of the measured bias of an estimator without "
        "bias."
    )
    return [
        common.Table(
            f"{derivative}, estimates from {config['num_trajectories']} trajectories, processes: "
            f"{config['num_processes']}",
            ["surrogate", "policy", "time steps", "bias", "noise of the bias", "spread of one estimate"],
            [
                [
                    *key,
                    over_processes([row["bias"] for row in group], 3),
                    f"{np.mean([row['bias_of_noise'] for row in group]):.3f}",
                    over_processes([row["spread"] for row in group], 2),
                ]
                for key, group in grouped(rows, derivative).items()
            ],
            note,
        )
        for derivative in DERIVATIVES
    ]


def grouped(rows: list[dict[str, Any]], derivative: str) -> dict[tuple, list[dict[str, Any]]]:
    """The rows of one derivative by surrogate, policy and horizon, the processes together."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["horizon"], row["policy"] == "network")):
        if row["derivative"] == derivative:
            found.setdefault((row["surrogate"], row["policy"], row["horizon"]), []).append(row)
    return found


def over_processes(values: list[float], digits: int) -> str:
    """The mean with the smallest and the largest value."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def draw(config: Config, rows: list[dict[str, Any]]) -> None:
    """Draws bias and spread of the second derivative of the network, a point for every process."""
    groups = grouped(rows, "second derivative")
    with common.figure("surrogates", config, columns=len(config.horizon), width=5.0) as drawn:
        for axes, horizon in zip(drawn, config.horizon, strict=True):
            for place, name in enumerate(SURROGATES):
                group = groups[name, "network", horizon]
                for row in group:
                    axes.plot(row["bias"], place, "o", color="C0")
                    axes.plot(row["bias_of_noise"], place, "|", color="C0", markersize=16)
                    axes.plot(row["spread"], place, "s", color="C1")
            axes.plot([], [], "o", color="C0", label="bias")
            axes.plot([], [], "|", color="C0", markersize=16, label="bias by noise alone")
            axes.plot([], [], "s", color="C1", label="spread of one estimate")
            axes.set_yticks(range(len(SURROGATES)), list(SURROGATES))
            axes.set_ylim(len(SURROGATES) - 0.5, -0.5)
            axes.set(
                title=f"second derivative of a network, {horizon} time steps",
                xlabel="relative to the exact one; a point for each process",
                xscale="log",
            )
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
