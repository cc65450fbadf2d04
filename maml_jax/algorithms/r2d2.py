"""R2-D2: the last layer is a ridge regression on the support set, solved in closed form and differentiated.

Bertinetto, Henriques, Torr and Vedaldi, 2019, Meta-learning with differentiable closed-form solvers.
https://arxiv.org/abs/1805.08136
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from maml_jax.inner.embedding import embed
from maml_jax.inner.learner import feed_forward
from maml_jax.types import (
    LossFn,
    MetaLearner,
    Model,
    check_classes,
    check_integer,
    check_model,
    check_positive,
)


def r2d2(
    embedding: Model,
    loss_fn: LossFn,
    *,
    way: int,
    strength: float = 50.0,
    learn_strength: bool = False,
    scale: float = 10.0,
) -> MetaLearner:
    """Builds R2-D2: outputs a·(x W) + b, with W = argmin mean_s |x_s W - y_s|² + λ|W|² and one-hot y.

    x is the embedding with a 1 appended, so that W [D + 1, N] has a row of biases. The factor a and the offset b are
    learned scalars. Embeddings do not depend on N, so parameters that were trained with one `way` can be tested with
    another.

    Args:
      embedding: a network from inputs [S, ...] to embeddings [S, D].
      loss_fn: `(outputs, targets) -> scalar` on the query set; `losses.cross_entropy` is the paper's.
      way: N, the number of classes. Every class has at least one support example. Under `jit` labels cannot be
        checked; the output of a class without an example is then b.
      strength: λ > 0. As in the authors' code the squared error is a mean over the support set; the sum of the paper
        has the same solution with S times this λ.
      learn_strength: whether λ is learned, as its logarithm.
      scale: the initial value of a. That of b is 0.

    Returns:
      A `MetaLearner` with meta-parameters {"embedding": θ, "scale": a, "offset": b, "log_strength": log λ}, the last
      one only if it is learned, and task parameters {"params": meta-parameters, "weights": W}.

    Raises:
      ValueError: if `way` is not a positive integer, `strength` or `scale` is not positive, or `embedding` not a
        `Model`; when it is used, if embeddings are no [S, D] or labels do not fit.

    References:
      Bertinetto et al., 2019, section 3.2. https://arxiv.org/abs/1805.08136
    """
    check_model(embedding)
    way = check_integer("way", way, at_least=1)
    RidgeHead(strength, scale=scale)  # it checks them

    def init(key, inputs):
        params = {"embedding": embedding.init(key, inputs), "scale": jnp.zeros(()) + scale, "offset": jnp.zeros(())}
        if learn_strength:
            params["log_strength"] = jnp.zeros(()) + math.log(strength)
        return params

    def with_one(params, inputs, key):
        embedded = embed(embedding, params["embedding"], inputs, key)
        return jnp.concatenate([embedded, jnp.ones_like(embedded[:, :1])], 1)

    def read(meta_params, support, key):
        check_classes(way, support.targets)
        inputs = with_one(meta_params, support.inputs, key)
        targets = jax.nn.one_hot(support.targets, way, dtype=inputs.dtype)
        size = jnp.sqrt(jnp.asarray(len(inputs), inputs.dtype))
        chosen = jnp.exp(meta_params["log_strength"]) if learn_strength else strength
        return {"params": meta_params, "weights": ridge_regression(inputs / size, targets / size, chosen)}

    def predict(task_params, inputs, key):
        params = task_params["params"]
        return params["scale"] * (with_one(params, inputs, key) @ task_params["weights"]) + params["offset"]

    return feed_forward(init, read, predict, loss_fn)


def ridge_regression(inputs: jax.Array, targets: jax.Array, strength: float | jax.Array) -> jax.Array:
    """argmin_W |X W - Y|² + λ|W|² by a Cholesky factorisation, differentiable in all three.

    It factorises the smaller of two matrices: X X' + λI [S, S], the Woodbury form, or X'X + λI [D, D].

    Args:
      inputs: X [S, D].
      targets: Y [S, N].
      strength: λ > 0.

    Returns:
      W [D, N].
    """
    num_examples, size = inputs.shape

    def solve(gram, right):
        return cho_solve(cho_factor(gram + strength * jnp.eye(len(gram), dtype=gram.dtype)), right)

    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # float32 on every device
    if num_examples <= size:
        return product(inputs.T, solve(product(inputs, inputs.T), targets))
    return solve(product(inputs.T, inputs), product(inputs.T, targets))


@dataclasses.dataclass(frozen=True)
class RidgeHead:
    """Hyperparameters of R2-D2."""

    strength: float = 50.0
    """Ridge penalty, for a squared error that is a mean over the support set."""
    learn_strength: bool = False
    """Whether the penalty is learned."""
    scale: float = 10.0
    """Initial value of the learned factor of the outputs."""

    def __post_init__(self):
        """Raises ValueError for a number that is not positive."""
        check_positive("strength", self.strength)
        check_positive("scale", self.scale)
