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
from maml_jax.types import ArrayTree

SURROGATES = {
    "policy_gradient": rl.policy_gradient,
    "ratio_surrogate": rl.ratio_surrogate,
    "loaded_dice": rl.loaded_dice,
}


@dataclasses.dataclass(frozen=True)
class Config(common.Settings):
    """Estimates of the gradient and of a product with the second derivative, one process for each horizon."""

    horizon: tuple[int, ...] = (5, 20)
    """Time steps of a trajectory."""
    num_states: int = 10
    """States of the process."""
    num_actions: int = 5
    """Actions of the process."""
    hidden_size: int = 16
    """Units of the policy network's hidden layer."""
    num_trajectories: int = 20
    """Trajectories of one estimate."""
    num_estimates: int = 20_000
    """Estimates whose mean and spread are reported."""


SHORT = Config(short=True, horizon=(5,), num_estimates=2000)


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


def measure(horizon: int, config: Config) -> list[dict[str, Any]]:
    """Bias and spread of every surrogate, by a table of logits and by a network."""
    mdp = random_mdps(config.num_states, config.num_actions).sample_task(jax.random.key(horizon))
    policies = {"table": (config.num_actions,), "network": (config.hidden_size, config.num_actions)}
    rows = []
    for kind, features in policies.items():
        policy = rl.categorical_policy(models.mlp(features=features))
        params = policy.init(jax.random.key(0), jnp.zeros((1, config.num_states)))

        def gradient(params, policy=policy):
            return jax.grad(lambda p: expected_return(policy, p, mdp, horizon)[0])(params)

        exact = tuple(map(flat, jax.jvp(gradient, (params,), (gradient(params),))))
        estimate = estimator(policy, params, mdp, horizon, config)
        keys = jax.random.split(jax.random.key(1), config.num_estimates)
        for name, loss in SURROGATES.items():
            many = jax.jit(
                lambda keys, loss=loss, one=estimate: jax.lax.map(lambda k: one(loss, k), keys, batch_size=100)
            )
            estimates = many(keys)
            for derivative, found, truth in zip(("gradient", "second derivative"), estimates, exact, strict=True):
                rows.append(
                    {"horizon": horizon, "policy": kind, "surrogate": name, "derivative": derivative}
                    | errors(found, truth)
                )
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
    rows = [row for horizon in config.horizon for row in measure(horizon, config)]
    content = {"config": dataclasses.asdict(config), "rows": rows}
    common.show(tables(content))
    common.write_results("surrogates", config, {"rows": rows})
    draw(config, rows)
    return content


def tables(content: dict[str, Any]) -> list[common.Table]:
    """One table for each derivative."""
    config, rows = content["config"], content["rows"]
    note = (
        "Bias and spread are relative to the norm of the exact vector. An estimate without bias would show a bias of "
        "about the number in parentheses, which is the noise of the mean."
    )
    return [
        common.Table(
            f"{derivative}, estimates from {config['num_trajectories']} trajectories",
            ["surrogate", "policy", "time steps", "bias (noise)", "spread of one estimate"],
            [
                [
                    row["surrogate"],
                    row["policy"],
                    row["horizon"],
                    f"{row['bias']:.3f} ({row['bias_of_noise']:.3f})",
                    f"{row['spread']:.2f}",
                ]
                for row in rows
                if row["derivative"] == derivative
            ],
            note,
        )
        for derivative in ("gradient", "second derivative")
    ]


def draw(config: Config, rows: list[dict[str, Any]]) -> None:
    """Draws bias and spread of the second derivative, for the network."""
    with common.figure("surrogates", config, columns=len(config.horizon), width=5.0) as drawn:
        for axes, horizon in zip(drawn, config.horizon, strict=True):
            chosen = [
                row
                for row in rows
                if (row["horizon"], row["policy"], row["derivative"]) == (horizon, "network", "second derivative")
            ]
            places = np.arange(len(chosen))
            axes.barh(places - 0.2, [row["bias"] for row in chosen], 0.4, label="bias")
            axes.barh(places + 0.2, [row["spread"] for row in chosen], 0.4, label="spread of one estimate", hatch="//")
            axes.set_yticks(places, [row["surrogate"] for row in chosen])
            axes.invert_yaxis()
            axes.set(title=f"{horizon} time steps", xlabel="relative to the exact second derivative", xscale="log")
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


if __name__ == "__main__":
    common.main(Config, run, __doc__, SHORT)
