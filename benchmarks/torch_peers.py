"""The meta-step of `benchmarks.peers` written with PyTorch: plain loops, torch.func, higher and TorchOpt.

Each follows the example of MAML in its own documentation. All share the network and the outer step.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import higher
import numpy as np
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

from experiments.runs import num_cores

Weights = dict[str, Tensor]


class Problem(NamedTuple):
    """One meta-batch and the initial parameters, as NumPy arrays in the layouts of JAX.

    Attributes:
      params: parameters of `models.conv4`, by path. "norm_i/offset" are not adapted.
      support: images [T, S, 28, 28, 1] and labels [T, S].
      query: images [T, M, 28, 28, 1] and labels [T, M].
      inner_lr: learning rate of the inner gradient descent.
      inner_steps: K.
      outer_lr: learning rate of Adam.
    """

    params: dict[str, np.ndarray]
    support: tuple[np.ndarray, np.ndarray]
    query: tuple[np.ndarray, np.ndarray]
    inner_lr: float
    inner_steps: int
    outer_lr: float


class Peer(NamedTuple):
    """One implementation.

    Attributes:
      step: takes a meta-step and returns the mean loss.
      gradient: returns the meta-gradient of the last step, by path, in the layouts of JAX.
    """

    step: Callable[[], Tensor]
    gradient: Callable[[], dict[str, np.ndarray]]


def use_all_cores() -> None:
    """Gives PyTorch one thread per core of this process."""
    torch.set_num_threads(num_cores())


def _to_torch(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    if array.ndim >= 4:  # kernels [h, w, C, F] -> [F, C, h, w], images [..., H, W, C] -> [..., C, H, W]
        tensor = tensor.permute(3, 2, 0, 1) if array.shape[:2] == (3, 3) else tensor.movedim(-1, -3)
    return (tensor if tensor.is_floating_point() else tensor.long()).contiguous()


def network(weights: Weights, inputs: Tensor) -> Tensor:
    """`models.conv4` at stride 2: [S, 1, 28, 28] -> [S, N]."""
    hidden = inputs
    for index in range(4):
        # If the size is even, "SAME" only pads at the end.
        padding = (1, 1, 1, 1) if hidden.shape[-1] % 2 else (0, 1, 0, 1)
        hidden = F.conv2d(F.pad(hidden, padding), weights[f"conv_{index}/kernel"], weights[f"conv_{index}/bias"], 2)
        hidden = F.batch_norm(hidden, None, None, bias=weights[f"norm_{index}/offset"], training=True, eps=1e-3)
        hidden = F.relu(hidden)
    return hidden.mean((-2, -1)) @ weights["head/kernel"] + weights["head/bias"]


def loss(weights: Weights, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy of one batch."""
    return F.cross_entropy(network(weights, batch[0]), batch[1])


class Setting:
    """A `Problem` as tensors. Its parameters are leaves, and Adam updates them."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.weights = {name: _to_torch(value).requires_grad_() for name, value in problem.params.items()}
        self.adapted = [name for name in self.weights if "norm" not in name]
        self.support = tuple(map(_to_torch, problem.support))
        self.query = tuple(map(_to_torch, problem.query))
        self.num_tasks = len(self.support[0])
        self.outer = torch.optim.Adam(self.weights.values(), lr=problem.outer_lr)

    def tasks(self) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Yields the support and query set of one task after the other."""
        yield from zip(zip(*self.support, strict=True), zip(*self.query, strict=True), strict=True)

    def peer(self, backward: Callable[[], Tensor]) -> Peer:
        """Makes a `Peer` of a function that sets the gradients of `weights` and returns the mean loss."""

        def step() -> Tensor:
            self.outer.zero_grad()
            mean_loss = backward()
            self.outer.step()
            return mean_loss

        def gradient() -> dict[str, np.ndarray]:
            grads = {name: weight.grad for name, weight in self.weights.items()}
            return {name: (g.permute(2, 3, 1, 0) if g.ndim == 4 else g).numpy() for name, g in grads.items()}

        return Peer(step, gradient)


class AdaptedModule(nn.Module):
    """A module that only contains the parameters that adapt, as higher and TorchOpt require."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.names = {name.replace("/", "_"): name for name in setting.adapted}
        for attribute, name in self.names.items():
            parameter = nn.Parameter(setting.weights[name].detach())
            self.register_parameter(attribute, parameter)
            setting.weights[name] = parameter
        setting.outer = torch.optim.Adam(setting.weights.values(), lr=setting.problem.outer_lr)
        self.fixed = {name: weight for name, weight in setting.weights.items() if name not in setting.adapted}

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of one batch."""
        adapted = {name: getattr(self, attribute) for attribute, name in self.names.items()}
        return loss(adapted | self.fixed, batch)


def plain_loops(problem: Problem) -> Peer:
    """`torch.autograd.grad(create_graph=True)`, one task after the other."""
    setting = Setting(problem)

    def backward() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for support, query in setting.tasks():
            weights = dict(setting.weights)
            for _ in range(problem.inner_steps):
                adapted = [weights[name] for name in setting.adapted]
                grads = torch.autograd.grad(loss(weights, support), adapted, create_graph=True)
                for name, weight, grad in zip(setting.adapted, adapted, grads, strict=True):
                    weights[name] = weight - problem.inner_lr * grad
            task_loss = loss(weights, query) / setting.num_tasks
            task_loss.backward()
            total += task_loss.detach()
        return total

    return setting.peer(backward)


def torch_func(problem: Problem) -> Peer:
    """`torch.func.grad` inside `torch.vmap` over the tasks."""
    setting = Setting(problem)

    def task_loss(weights, support, query):
        fixed = {name: weight for name, weight in weights.items() if name not in setting.adapted}
        adapted = {name: weights[name] for name in setting.adapted}
        for _ in range(problem.inner_steps):
            grads = torch.func.grad(lambda adapted: loss(adapted | fixed, support))(adapted)
            adapted = {name: adapted[name] - problem.inner_lr * grads[name] for name in adapted}
        return loss(adapted | fixed, query)

    def backward() -> Tensor:
        losses = torch.vmap(task_loss, (None, 0, 0))(setting.weights, setting.support, setting.query)
        losses.mean().backward()
        return losses.detach().mean()

    return setting.peer(backward)


def with_higher(problem: Problem) -> Peer:
    """`higher.innerloop_ctx`, one task after the other."""
    setting = Setting(problem)
    module = AdaptedModule(setting)
    inner = torch.optim.SGD(module.parameters(), lr=problem.inner_lr)

    def backward() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for support, query in setting.tasks():
            with higher.innerloop_ctx(module, inner, copy_initial_weights=False) as (adapted, rule):
                for _ in range(problem.inner_steps):
                    rule.step(adapted(support))
                task_loss = adapted(query) / setting.num_tasks
                task_loss.backward()
            total += task_loss.detach()
        return total

    return setting.peer(backward)


def with_torchopt(problem: Problem) -> Peer:
    """`torchopt.MetaSGD` on the module. The state of both is restored after each task."""
    setting = Setting(problem)
    module = AdaptedModule(setting)
    inner = torchopt.MetaSGD(module, lr=problem.inner_lr)

    def backward() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        before = [torchopt.extract_state_dict(part, by="reference") for part in (module, inner)]
        for support, query in setting.tasks():
            for _ in range(problem.inner_steps):
                inner.step(module(support))
            task_loss = module(query) / setting.num_tasks
            task_loss.backward()
            total += task_loss.detach()
            for part, state in zip((module, inner), before, strict=True):
                torchopt.recover_state_dict(part, state)
        return total

    return setting.peer(backward)


PEERS = {
    "PyTorch, plain loops": plain_loops,
    "torch.func": torch_func,
    "higher": with_higher,
    "TorchOpt": with_torchopt,
}
