"""Pretraining: one classifier for all training classes, and what can be done with its features for new classes.

It is the baseline that a meta-learner has to beat. The features are compared by nearest neighbours or centroids, or
they get a new last layer, or the whole network is fine-tuned.

Vinyals et al., 2016, section 4.1, https://arxiv.org/abs/1606.04080; Ravi and Larochelle, 2017, section 5.1; Chen et
al., 2019, A closer look at few-shot classification. https://arxiv.org/abs/1904.04232
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.embedding import class_means, embed, embedding_size, unit_length
from maml_jax.inner.gradients import first_order
from maml_jax.inner.learner import observed_once
from maml_jax.inner.loop import inner_loop
from maml_jax.inner.steps import step_keys
from maml_jax.types import (
    ArrayTree,
    LossFn,
    MetaLearner,
    Model,
    PRNGKey,
    all_examples,
    check_classes,
    check_integer,
    check_model,
    check_optimizer,
    check_positive,
)

Head = Literal["neighbour", "centroid", "linear", "fine-tuned"]
"""How new classes are classified; see `pretrained_classifier`."""


def pretrained_classifier(
    embedding: Model,
    loss_fn: LossFn,
    *,
    num_classes: int,
    way: int,
    head: Head = "centroid",
    inner_optimizer: optax.GradientTransformation | None = None,
    num_inner_steps: int = 0,
) -> MetaLearner:
    """Builds the pretraining baseline: min over θ, W, b of the loss of f_θ(x) W + b on all training classes.

    Training takes batches with global labels, such as those of `few_shot.make_batch_sampler`. Support and query set
    are training examples alike, and the query set may be empty. `adapt` and `predict` never use W and b. All heads
    have the same meta-parameters, so one training serves them all:

    - "neighbour": the output for a class is the largest cosine with one of its support embeddings.
    - "centroid": the output is the cosine with the mean of its support embeddings of unit length.
    - "linear": a new last layer, zero at first, is trained on the support set for K steps. The features stay.
    - "fine-tuned": the same, and the whole network is trained with it.

    Args:
      embedding: a network from inputs [S, ...] to embeddings [S, D].
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, such as `losses.cross_entropy`.
      num_classes: C, the number of training classes.
      way: N, the number of new classes. Every class has at least one support example; if labels are traced this is not
        checked, and a class without one has the output NaN ("centroid") or −∞ ("neighbour").
      head: one of the four.
      inner_optimizer: the rule that trains a new last layer, for "linear" and "fine-tuned".
      num_inner_steps: K ≥ 0, its steps. With K = 0 all outputs are zero.

    Returns:
      A `MetaLearner` with meta-parameters {"embedding": θ, "kernel": W [D, C], "bias": b [C]}. Its `info` has K steps
      for "linear" and "fine-tuned", and none for the others.

    Raises:
      ValueError: if a count is out of its range, the head is unknown or lacks its `inner_optimizer`, or `embedding` is
        not a `Model`; when it is used, if embeddings are no [S, D] or labels do not fit.

    References:
      Vinyals et al., 2016, section 4.1, for the neighbours and fine-tuning; Chen et al., 2019, "Baseline", for the
      linear layer.
    """
    check_model(embedding)
    num_classes = check_integer("num_classes", num_classes, at_least=1)
    way = check_integer("way", way, at_least=1)
    num_inner_steps = check_integer("num_inner_steps", num_inner_steps, at_least=0)
    if head not in get_args(Head):
        raise ValueError(f"head={head!r} is unknown; choose one of {', '.join(get_args(Head))}")
    iterates = head in ("linear", "fine-tuned")
    if iterates:
        check_optimizer("inner_optimizer", inner_optimizer)

    def init(key, inputs):
        embedding_key, head_key = jax.random.split(key)
        params = embedding.init(embedding_key, inputs)
        size = embedding_size(embedding, params, inputs)
        kernel = jax.nn.initializers.glorot_uniform()(head_key, (size, num_classes))
        return {"embedding": params, "kernel": kernel, "bias": jnp.zeros(num_classes)}

    def affine(params: ArrayTree, embedded: jax.Array) -> jax.Array:
        return embedded @ params["kernel"] + params["bias"][None]

    def outputs(params: ArrayTree, inputs: ArrayTree, key: PRNGKey | None = None) -> jax.Array:
        return affine(params, embed(embedding, params["embedding"], inputs, key))

    def objective(meta_params, episode):
        inputs, targets = all_examples(episode)
        return loss_fn(outputs(meta_params, inputs, episode.key), targets), observed_once(meta_params, None)

    def compare(meta_params, support, *, key=None, observe_fn=None):
        check_classes(way, support.targets)
        embedded = unit_length(embed(embedding, meta_params["embedding"], support.inputs, key))
        if head == "centroid":
            embedded, targets = unit_length(class_means(embedded, support.targets, way)), jnp.arange(way)
        else:
            targets = support.targets
        one_hot = jax.nn.one_hot(targets, way, dtype=bool)
        task_params = {"params": meta_params, "references": embedded, "one_hot": one_hot}
        return task_params, observed_once(task_params, observe_fn)

    def cosines(task_params, inputs):
        embedded = unit_length(embed(embedding, task_params["params"]["embedding"], inputs))
        pairs = embedded @ task_params["references"].T
        return jnp.max(pairs[:, :, None], axis=1, initial=-jnp.inf, where=task_params["one_hot"][None])

    def train(meta_params, support, *, key=None, observe_fn=None):
        check_classes(way, support.targets)
        kernel = jnp.zeros_like(meta_params["kernel"], shape=(len(meta_params["kernel"]), way))
        start = {"kernel": kernel, "bias": jnp.zeros_like(meta_params["bias"], shape=(way,))}
        if head == "linear":  # the features are computed once
            support = support._replace(inputs=embed(embedding, meta_params["embedding"], support.inputs, key))
        else:
            start["embedding"] = meta_params["embedding"]

        def loss(params, batch, *keys):
            scores = affine(params, batch.inputs) if head == "linear" else outputs(params, batch.inputs, *keys)
            return loss_fn(scores, batch.targets)

        def complete(params):
            return meta_params | params

        params, info = inner_loop(
            loss,
            inner_optimizer,
            start,
            support,
            num_steps=num_inner_steps,
            per_step=step_keys(key, num_inner_steps) if embedding.stochastic and head == "fine-tuned" else None,
            inner_grad=first_order,
            observe_fn=observe_fn and (lambda params: observe_fn(complete(params))),
        )
        return complete(params), info._replace(opt_state=None)

    if iterates:
        return MetaLearner(init, train, outputs, objective)
    return MetaLearner(init, compare, cosines, objective)


@dataclasses.dataclass(frozen=True)
class PretrainedHead:
    """Hyperparameters of the test of a pretrained network."""

    num_classes: int | None = None
    """Training classes; None for all of the training split."""
    batch_size: int = 256
    """Images of a training batch."""
    head: Head = "centroid"
    """How new classes are classified: by the nearest example, the nearest class mean, a new last layer, or by
    fine-tuning the whole network with one."""
    inner_lr: float = 0.01
    """Rate of the gradient descent that trains a new last layer. Its momentum is 0.9."""
    num_inner_steps: int = 100
    """Steps of that gradient descent, each on the whole support set."""
    finetuning_lr: float = 0.001
    """The rate when the whole network is fine-tuned. It was chosen on the validation characters of Omniglot from
    0.0001, 0.001, 0.003 and 0.01."""
    num_finetuning_steps: int = 15
    """The steps when the whole network is fine-tuned."""

    @property
    def num_head_steps(self) -> int:
        """The gradient steps that fit the head at test, if it is fitted so."""
        return self.num_finetuning_steps if self.head == "fine-tuned" else self.num_inner_steps

    def __post_init__(self):
        """Raises ValueError for a number that is out of its range."""
        check_positive("inner_lr", self.inner_lr)
        check_positive("finetuning_lr", self.finetuning_lr)
        if self.num_classes is not None:
            check_integer("num_classes", self.num_classes, at_least=1)
        check_integer("batch_size", self.batch_size, at_least=1)
        check_integer("num_inner_steps", self.num_inner_steps, at_least=0)
        check_integer("num_finetuning_steps", self.num_finetuning_steps, at_least=0)

    def rule(self) -> optax.GradientTransformation:
        """Gradient descent with momentum."""
        return optax.sgd(self.finetuning_lr if self.head == "fine-tuned" else self.inner_lr, momentum=0.9)
