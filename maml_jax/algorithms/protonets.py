"""ProtoNets: classify by the distance to the mean embedding of each class.

Snell, Swersky and Zemel, 2017, Prototypical networks for few-shot learning. https://arxiv.org/abs/1703.05175
"""

from maml_jax.inner.embedding import class_means, embed, squared_distances
from maml_jax.inner.learner import feed_forward
from maml_jax.types import LossFn, MetaLearner, Model, check_classes, check_integer, check_model


def protonets(embedding: Model, loss_fn: LossFn, *, way: int) -> MetaLearner:
    """Builds ProtoNets: the outputs are -|f(x) - c_n|² with c_n the mean embedding of class n.

    It is the linear classifier with weights 2 c_n and biases -|c_n|², up to a term that all classes share. The
    embedding does not depend on N, so parameters that were trained with one `way` can be tested with another.
    Support and query set go through the embedding separately, in training as in `predict`.

    Args:
      embedding: a network from inputs [S, ...] to embeddings [S, D], such as `models.conv4(way=None)`; its parameters
        are the meta-parameters.
      loss_fn: `(outputs, targets) -> scalar` on the query set, such as `losses.cross_entropy`.
      way: N, the number of classes. Every class has at least one support example; if labels are traced this is not
        checked, and a class without one makes the outputs not a number.

    Returns:
      A `MetaLearner` with task parameters {"params": θ, "prototypes": [N, D]}. The distance is squared and not
      divided by D.

    Raises:
      ValueError: if `way` is not a positive integer or `embedding` not a `Model`; when it is used, if embeddings are no
        [S, D] or labels do not fit.

    References:
      Snell et al., 2017, equations 1 and 2, section 2.4 for the linear classifier, and Algorithm 1.
    """
    check_model(embedding)
    way = check_integer("way", way, at_least=1)

    def read(meta_params, support, key):
        check_classes(way, support.targets)
        embedded = embed(embedding, meta_params, support.inputs, key)
        return {"params": meta_params, "prototypes": class_means(embedded, support.targets, way)}

    def predict(task_params, inputs, key):
        embedded = embed(embedding, task_params["params"], inputs, key)
        return -squared_distances(embedded, task_params["prototypes"])

    return feed_forward(embedding.init, read, predict, loss_fn)
