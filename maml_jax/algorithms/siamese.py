"""Siamese networks: learn whether two images show the same class, and compare a query with every support example.

Koch, Zemel and Salakhutdinov, 2015, Siamese neural networks for one-shot image recognition.
https://www.cs.toronto.edu/~rsalakhu/papers/oneshot1.pdf
"""

import jax
import jax.numpy as jnp

from maml_jax.inner.embedding import embed, embedding_size
from maml_jax.inner.learner import observed_once
from maml_jax.types import MetaLearner, Model, all_examples, check_classes, check_integer, check_model


def siamese(embedding: Model, *, way: int) -> MetaLearner:
    """Builds Siamese networks: the logit that two images have one class is w · |f(a) - f(b)| + c.

    The objective is the logistic loss over all pairs of different examples of an episode, support and query together.
    Pairs of one class and pairs of two have the same weight in total, however many they are; a kind without a pair
    counts as zero. Labels of the episode serve only to tell whether two examples have the same class. The output for
    class n is the mean logit of a query with the support examples of the class, so parameters that were trained with
    one `way` can be tested with another.

    Koch et al. train on random pairs of images of 105x105, with a larger network. The published few-shot numbers are a
    re-implementation of Vinyals et al., 2016, whose training and test with several examples are not described.

    Args:
      embedding: a network from inputs [S, ...] to embeddings [S, D].
      way: N, the number of classes of a support set. Every class has at least one support example; if labels are traced
        this is not checked, and a class without one has the output NaN.

    Returns:
      A `MetaLearner` with meta-parameters {"embedding": θ, "weights": w [D], "offset": c}. The weights start at -8/D
      and the offset at 2: with weights near zero all pairs start alike, and learning is slow.

    Raises:
      ValueError: if `way` is not a positive integer or `embedding` not a `Model`; when it is used, if embeddings are no
        [S, D] or labels do not fit.

    References:
      Koch et al., 2015, section 3.1 for the distance and 3.2 for the loss.
    """
    check_model(embedding)
    way = check_integer("way", way, at_least=1)

    def init(key, inputs):
        params = embedding.init(key, inputs)
        size = embedding_size(embedding, params, inputs)
        return {"embedding": params, "weights": jnp.zeros(size) - 8.0 / size, "offset": jnp.zeros(()) + 2.0}

    def logits(params, embedded, others):
        gaps = jnp.abs(embedded[:, None] - others[None])
        return gaps @ params["weights"] + params["offset"]

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        check_classes(way, support.targets)
        embedded = embed(embedding, meta_params["embedding"], support.inputs, key)
        is_class = jax.nn.one_hot(support.targets, way, dtype=bool)
        task_params = {"params": meta_params, "support": embedded, "one_hot": is_class}
        return task_params, observed_once(task_params, observe_fn)

    def predict(task_params, inputs):
        params = task_params["params"]
        pairs = logits(params, embed(embedding, params["embedding"], inputs), task_params["support"])
        is_class = task_params["one_hot"].astype(pairs.dtype)
        return pairs @ is_class / jnp.sum(is_class, 0)[None]

    def objective(meta_params, episode):
        check_classes(way, episode.support.targets)
        inputs, targets = all_examples(episode)
        embedded = embed(embedding, meta_params["embedding"], inputs, episode.key)
        first, second = jnp.triu_indices(len(targets), k=1)
        is_same = targets[first] == targets[second]
        pairs = logits(meta_params, embedded, embedded)[first, second]
        loss = jax.nn.softplus(jnp.where(is_same, -pairs, pairs))
        same, different = (
            jnp.sum(jnp.where(chosen, loss, 0.0)) / jnp.maximum(jnp.sum(chosen), 1) for chosen in (is_same, ~is_same)
        )
        return 0.5 * (same + different), observed_once(meta_params, None)

    return MetaLearner(init, adapt, predict, objective)
