"""A meta-step of 2D navigation written with PyTorch: MAML with a trust region, as its PyTorch ports have it.

Collection is a loop over tasks and time steps, with all trajectories of a task in one array. The meta-gradient and the
Fisher products differentiate through the inner step by `create_graph`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Settings(NamedTuple):
    """What a meta-step needs; see `experiments.navigation`."""

    num_trajectories: int
    horizon: int
    inner_lr: float
    max_kl: float
    num_cg_steps: int = 10
    residual_tolerance: float = 1e-10
    damping: float = 1e-5
    backtrack: float = 0.8
    num_backtracks: int = 15
    discount: float = 0.99


class Trajectories(NamedTuple):
    """What a policy did, arrays [H, N, ...], with the mean and the logarithm of the deviation of the actions."""

    observation: Tensor
    action: Tensor
    advantage: Tensor
    mask: Tensor
    mean: Tensor
    log_std: Tensor


def policy(weights: Weights, observation: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the logarithm of the standard deviation of the actions."""
    hidden = observation
    for layer in range(3):
        hidden = hidden @ weights[f"network/dense_{layer}/kernel"] + weights[f"network/dense_{layer}/bias"]
        hidden = torch.relu(hidden) if layer < 2 else hidden
    return hidden, weights["log_std"].expand_as(hidden)


def log_prob(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """The log-densities of actions, summed over their two numbers."""
    return torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the time steps of the mask."""
    return (values * mask).sum() / mask.sum()


def collect(weights: Weights, goal: np.ndarray, rng: np.random.Generator, settings: Settings) -> Trajectories:
    """Lets the policy act in one task."""
    position = np.zeros((settings.num_trajectories, 2))
    going = np.ones(settings.num_trajectories)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("observation", "action", "reward", "mask", "mean")}
    dtype = weights["log_std"].dtype
    with torch.no_grad():
        std = weights["log_std"].exp().numpy()
        for _ in range(settings.horizon):
            mean = policy(weights, torch.as_tensor(position, dtype=dtype))[0].numpy()
            action = mean + std * rng.standard_normal(mean.shape)
            moved = position + 0.1 * np.clip(action, -1.0, 1.0)
            gap = moved - goal
            reward = -np.linalg.norm(gap, axis=-1) * going
            for name, value in zip(found, (position, action, reward, going, mean), strict=True):
                found[name].append(value)
            position = np.where(going[:, None] > 0, moved, position)
            going = going * ~np.all(np.abs(gap) < 0.01, axis=-1)
    arrays = {name: np.stack(values) for name, values in found.items()}
    advantage = advantages(arrays["observation"], arrays["reward"], arrays["mask"], settings.discount)
    kept = (arrays["observation"], arrays["action"], advantage, arrays["mask"], arrays["mean"])
    observation, action, advantage, mask, mean = (torch.as_tensor(array, dtype=dtype) for array in kept)
    return Trajectories(observation, action, advantage, mask, mean, weights["log_std"].detach().expand_as(mean))


def advantages(observation: np.ndarray, reward: np.ndarray, mask: np.ndarray, discount: float) -> np.ndarray:
    """Standardised returns to go minus a linear baseline."""
    to_go, following = np.zeros_like(reward), 0.0
    for time in reversed(range(len(reward))):
        following = reward[time] + discount * following
        to_go[time] = following
    observation = observation - (observation * mask[..., None]).sum((0, 1)) / mask.sum()
    time = np.broadcast_to(np.arange(len(reward))[:, None, None] / 100.0, (*mask.shape, 1))
    features = [observation, observation**2, time, time**2, time**3, np.ones_like(time)]
    rows = (np.concatenate(features, -1) * mask[..., None]).reshape(-1, 8)
    gram = rows.T @ rows + 1e-5 * np.eye(8)
    value = (rows @ np.linalg.lstsq(gram, rows.T @ to_go.reshape(-1), rcond=None)[0]).reshape(mask.shape)
    left = (to_go - value) * mask
    centred = (left - left.sum() / mask.sum()) * mask
    return centred / (np.sqrt((centred**2).sum() / mask.sum()) + 1e-8)


def adapt(weights: Weights, support: Trajectories, settings: Settings) -> Weights:
    """One step on the log-likelihood times the advantage."""
    likelihood = log_prob(*policy(weights, support.observation), support.action)
    loss = -masked_mean(likelihood * support.advantage, support.mask)
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    return {
        name: weight - settings.inner_lr * grad for (name, weight), grad in zip(weights.items(), grads, strict=True)
    }


def outer_loss(
    weights: Weights, support: Trajectories, query: Trajectories, settings: Settings
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The ratio surrogate of the adapted policy, and its outputs."""
    outputs = policy(adapt(weights, support, settings), query.observation)
    old = log_prob(query.mean, query.log_std, query.action)
    ratio = (log_prob(*outputs, query.action) - old).exp()
    return -masked_mean(ratio * query.advantage, query.mask), outputs


def loss_and_divergence(
    weights: Weights, support: Trajectories, query: Trajectories, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The surrogate of the adapted policy, and its KL from the one that acted."""
    loss, outputs = outer_loss(weights, support, query, settings)
    return loss.detach(), masked_mean(divergence((query.mean, query.log_std), outputs), query.mask).detach()


def divergence(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """KL(old ‖ new)."""
    first, second = (torch.distributions.Normal(mean, log_std.exp()) for mean, log_std in (old, new))
    return torch.distributions.kl_divergence(first, second).sum(-1)


Data = Sequence[tuple[Trajectories, Trajectories]]


def gradient_and_product(
    weights: Weights, data: Data, settings: Settings
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The mean loss, its gradient, and the product with the Fisher matrix, all flat."""
    total, mean_kl = 0.0, 0.0
    for support, query in data:
        loss, outputs = outer_loss(weights, support, query, settings)
        fixed = tuple(output.detach() for output in outputs)
        total = total + loss / len(data)
        mean_kl = mean_kl + masked_mean(divergence(fixed, outputs), query.mask) / len(data)
    leaves = list(weights.values())
    grads = flat(torch.autograd.grad(total, leaves, retain_graph=True))
    slope = flat(torch.autograd.grad(mean_kl, leaves, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        return flat(torch.autograd.grad(slope @ vector, leaves, retain_graph=True))

    return total.detach(), grads, product


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor, settings: Settings) -> Tensor:
    """Solves product(x) = target."""
    found, left = torch.zeros_like(target), target.clone()
    direction, size = left.clone(), left @ left
    for _ in range(settings.num_cg_steps):
        image = product(direction)
        step = size / (direction @ image)
        found, left = found + step * direction, left - step * image
        new_size = left @ left
        if new_size < settings.residual_tolerance:
            break
        direction, size = left + new_size / size * direction, new_size
    return found


def step(weights: Weights, data: Data, settings: Settings) -> Weights:
    """The longest step of the natural gradient whose KL is within the bound and that lowers the loss."""
    old_loss, grads, product = gradient_and_product(weights, data, settings)
    direction = conjugate_gradients(lambda v: product(v) + settings.damping * v, grads, settings)
    length = torch.sqrt(2.0 * settings.max_kl / (direction @ product(direction)))
    for attempt in range(settings.num_backtracks):
        moved = moved_by(weights, -length * settings.backtrack**attempt * direction)
        found = [loss_and_divergence(moved, *pair, settings) for pair in data]
        loss, kl = (torch.stack(values).mean() for values in zip(*found, strict=True))
        if loss < old_loss and kl <= settings.max_kl:
            return moved
    return weights


def moved_by(weights: Weights, change: Tensor) -> Weights:
    """The weights plus a flat vector."""
    parts = torch.split(change, [weight.numel() for weight in weights.values()])
    return {
        name: (weight.detach() + part.reshape(weight.shape)).requires_grad_()
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


def as_weights(params: dict[str, np.ndarray]) -> Weights:
    """Parameters by path as leaves of PyTorch."""
    return {name: torch.from_numpy(np.array(value)).requires_grad_() for name, value in params.items()}


def collected(weights: Weights, goals: np.ndarray, rng: np.random.Generator, settings: Settings) -> Data:
    """The trajectories before and after adaptation, for every goal."""
    data = []
    for goal in goals:
        support = collect(weights, goal, rng, settings)
        data.append((support, collect(adapt(weights, support, settings), goal, rng, settings)))
    return data
