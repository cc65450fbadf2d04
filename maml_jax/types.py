"""The records and function signatures that the rest of the library is written in.

A meta-learner turns a few examples of a task into a function for that task. It is described by four
pure functions, each about one episode; batching over episodes, differentiation, the outer update and
the placement on devices are added from outside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

ArrayTree = chex.ArrayTree
PRNGKey = chex.PRNGKey


class Batch(NamedTuple):
    """Examples of one task: two pytrees whose leaves share their leading axis, one entry an example."""

    inputs: ArrayTree
    targets: ArrayTree


class Episode(NamedTuple):
    """One draw of a task. A meta-batch is an `Episode` whose leaves have one more leading axis [T, ...].

    Attributes:
      support: the examples that adapt, [S, ...].
      query: the examples that score, [M, ...].
      key: the randomness that belongs to this draw (dropout, latent samples, rollouts), or None.
    """

    support: Batch
    query: Batch
    key: PRNGKey | None = None


class Model(NamedTuple):
    """A pair of pure functions, `init(key, inputs) -> params` and `apply(params, inputs) -> outputs`."""

    init: Callable[[PRNGKey, ArrayTree], ArrayTree]
    apply: Callable[[ArrayTree, ArrayTree], ArrayTree]


class LossFn(Protocol):
    """`(outputs, targets) -> scalar`, the mean loss of one batch."""

    def __call__(self, outputs: ArrayTree, targets: ArrayTree) -> jax.Array: ...


class ObserveFn(Protocol):
    """`(task_params) -> pytree`, evaluated before the first and after every inner step."""

    def __call__(self, task_params: ArrayTree) -> ArrayTree: ...


class SampleEpisodeFn(Protocol):
    """A task distribution: `(key) -> Episode`, pure and traceable."""

    def __call__(self, key: PRNGKey) -> Episode: ...


class InnerGradFn(Protocol):
    """A transform with the signature of `jax.value_and_grad`.

    It computes the same value and gradient as `jax.value_and_grad`; what it decides is what an outer
    `jax.grad` sees when it differentiates that gradient once more.
    """

    def __call__(
        self, fun: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]: ...


class InitFn(Protocol):
    """`(key, inputs) -> meta_params`, where inputs [S, ...] show the shape of one support set."""

    def __call__(self, key: PRNGKey, inputs: ArrayTree) -> ArrayTree: ...


class AdaptFn(Protocol):
    """`(meta_params, support, *, key=None, observe_fn=None) -> (task_params, info)`."""

    def __call__(
        self,
        meta_params: ArrayTree,
        support: Batch,
        *,
        key: PRNGKey | None = None,
        observe_fn: ObserveFn | None = None,
    ) -> tuple[ArrayTree, Any]: ...


class PredictFn(Protocol):
    """`(task_params, inputs) -> outputs`."""

    def __call__(self, task_params: ArrayTree, inputs: ArrayTree) -> ArrayTree: ...


class ObjectiveFn(Protocol):
    """`(meta_params, episode) -> (scalar, info)`, what `jax.grad` is taken of."""

    def __call__(self, meta_params: ArrayTree, episode: Episode) -> tuple[jax.Array, Any]: ...


class MetaLearner(NamedTuple):
    """A meta-learning algorithm: four pure functions about ONE episode."""

    init: InitFn
    adapt: AdaptFn
    predict: PredictFn
    objective: ObjectiveFn


class InnerInfo(NamedTuple):
    """What happened while adapting to one support set.

    Attributes:
      support_loss: [K], the support loss before each inner step.
      observed: the values of `observe_fn`, stacked to [K+1, ...]; None without one.
    """

    support_loss: jax.Array
    observed: ArrayTree = None


class MetaState(NamedTuple):
    """All that the next meta-step needs.

    Attributes:
      params: the meta-parameters θ.
      opt_state: the state of the outer optimiser.
      step: int32 scalar, the number of meta-steps taken.
    """

    params: ArrayTree
    opt_state: ArrayTree
    step: jax.Array


class MetaInfo(NamedTuple):
    """What a meta-step reports: scalars, or [num_steps] from a training loop.

    Attributes:
      loss: the mean objective over the meta-batch, before the update.
      grad_norm: the Euclidean norm of the meta-gradient.
    """

    loss: jax.Array
    grad_norm: jax.Array


class Evaluation(NamedTuple):
    """A metric at every inner step, K+1 values from before the first to after the last.

    Attributes:
      mean: [K+1], over the episodes.
      ci95: [K+1], half-width of the 95 % interval, 1.96 standard errors of the mean.
      per_episode: [E, K+1].
    """

    mean: jax.Array
    ci95: jax.Array
    per_episode: jax.Array


def check_floating(params: ArrayTree) -> None:
    """Raises ValueError naming the first leaf of `params` that is not a floating array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path) or '(the only leaf)'} has dtype {jnp.result_type(leaf)} and "
                "cannot be adapted by gradients; use floating parameters, and keep integers in the model's closure"
            )
