"""LEO: adapt a low-dimensional code of every class by gradients, and decode it to the weights of a classifier.

An encoder with a relation network turns the support set into a Gaussian code of every class. Gradient steps on the
codes are followed by a few on the weights that they decode to.

Rusu, Rao, Sygnowski, Vinyals, Pascanu, Osindero and Hadsell, 2019, Meta-learning with latent embedding optimization.
https://arxiv.org/abs/1807.05960
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml_jax.inner.embedding import class_means, embed, embedded_like, unit_length
from maml_jax.inner.gradients import mixed_mode
from maml_jax.inner.loop import inner_loop
from maml_jax.inner.steps import step_keys
from maml_jax.types import (
    ArrayTree,
    InnerGradFn,
    InnerInfo,
    LossFn,
    MetaLearner,
    Model,
    PRNGKey,
    at_least_float32,
    check_classes,
    check_integer,
    check_model,
    check_not_negative,
    check_positive,
    check_query,
    holds_for,
)


def leo(
    embedding: Model,
    loss_fn: LossFn,
    *,
    way: int,
    num_latent: int = 64,
    num_latent_steps: int = 5,
    num_finetuning_steps: int = 5,
    latent_lr: float = 1.0,
    finetuning_lr: float = 0.001,
    kl_weight: float = 0.756143,
    encoder_penalty_weight: float = 5.756821e-6,
    l2_weight: float = 3.623413e-10,
    orthogonality_weight: float = 0.188103,
    dropout_rate: float = 0.0,
    train_embedding: bool = False,
    inner_grad: InnerGradFn = mixed_mode,
) -> MetaLearner:
    """Builds LEO: a linear classifier f(x) Wᵀ whose weights W [N, D] are decoded from codes z [N, L] and adapted.

    E and G are linear maps and r is a relation network. The code of class n is Gaussian; its mean μ_n and the number
    s_n behind its deviation are

        (μ_n, s_n) = mean of r([E f(x_i), E f(x_j)]) over the examples i of class n and all examples j.

    The weights that a code decodes to are Gaussian too, with (m_n, u_n) = G z_n. The inner loops are

        z ← z − α ∘ ∇_z L_S(W(z)), and then W ← W − η ∘ ∇_W L_S(W),

    with learned rates α [L] and η [D]. Both are differentiated exactly. The networks have no biases; r has three
    layers of 2L units, with a ReLU after the first two. Nothing depends on N but the deviation of the weights, so
    parameters that were trained with one `way` can be tested with another.

    `adapt` takes the means of both Gaussians; with a key only a stochastic embedding draws. The objective draws from
    them, once a class for the codes and at every decoding for the weights, with dropout of the embeddings wherever they
    are used. It is

        L_Q(W) + β KL(q(z | S) ‖ N(0, I)) + γ |sg(z') − z|² + λ₁ (|E|² + |r|² + |G|²) / 2 + λ₂ |C − I|²

    with z' the code after its steps, sg the stopped gradient, and C the cosines of the rows of G. KL and the distance
    of the codes are means over the N·L entries of the codes, and |C − I|² is a mean over L·L entries.

    The penalties are scaled as in the authors' code, for which the weights were published: the paper has sums and
    norms in place of these means. The code estimates KL from one sample, and draws a code for every example; here the
    KL is exact, and a class has one code. Deviations are as in the code: max(exp(s) − 1, 10⁻¹⁰) for codes, and
    max(exp(u) − 1 + √(2 / (N + D)), 10⁻¹⁰) for weights.

    The paper takes features of a pretrained network, of unit length; `inner.unit_length` scales them.

    Args:
      embedding: a network from inputs [S, ...] to embeddings [S, D]. For features it is the identity.
      loss_fn: `(outputs, targets) -> scalar`, a mean over one batch, for both sets, such as `losses.cross_entropy`.
      way: N, the number of classes. Every class has at least one support example; if labels are traced this is not
        checked, and a class without one makes the outputs not a number.
      num_latent: L, the size of a code.
      num_latent_steps: gradient steps on the codes.
      num_finetuning_steps: gradient steps on the weights.
      latent_lr: the initial value of the rates α.
      finetuning_lr: the initial value of the rates η.
      kl_weight: β.
      encoder_penalty_weight: γ.
      l2_weight: λ₁.
      orthogonality_weight: λ₂. The defaults of these four are the published ones for 1-shot miniImageNet; those of
        other settings differ by orders of magnitude.
      dropout_rate: the probability that an entry of an embedding is dropped in the objective; published is 0.307651.
      train_embedding: whether the embedding learns too. Otherwise its gradient is zero; an outer optimiser with weight
        decay needs a mask that leaves it out.
      inner_grad: how the inner gradients are differentiated.

    Returns:
      A `MetaLearner` with task parameters {"params": those of the embedding, "weights": W}. The meta-parameters are
      {"embedding", "encoder" [D, L], "relation": three of [2L, 2L], "decoder" [L, 2D], "latent_rates" [L],
      "weight_rates" [D]}. `info` of `adapt` covers the steps of both loops, one after another.

    Raises:
      ValueError: if `embedding` is not a `Model` or a number is out of range; when it is used, if embeddings are no [S,
        D], labels do not fit, or the objective is given an episode without a key.

    References:
      Rusu et al., 2019, Algorithm 1 and section 2.3; for the published numbers https://github.com/deepmind/leo.
    """
    settings = LatentDescent(  # which checks the numbers
        num_latent=num_latent,
        num_latent_steps=num_latent_steps,
        num_finetuning_steps=num_finetuning_steps,
        latent_lr=latent_lr,
        finetuning_lr=finetuning_lr,
        kl_weight=kl_weight,
        encoder_penalty_weight=encoder_penalty_weight,
        l2_weight=l2_weight,
        orthogonality_weight=orthogonality_weight,
        dropout_rate=dropout_rate,
        train_embedding=train_embedding,
    )
    check_model(embedding)
    way = check_integer("way", way, at_least=1)

    def init(key, inputs):
        embedding_key, *keys = jax.random.split(key, 6)
        params = embedding.init(embedding_key, inputs)
        features = embedded_like(embedding, params, inputs)
        return {"embedding": params} | _init_codes(keys, features, settings)

    def loss_of_weights(weights, support, key=None):
        features = dropout(key, support["features"], dropout_rate)
        return loss_fn(features @ weights.T, support["targets"])

    def loss_of_latents(latents, support, key=None):
        decoder_key, dropout_key = _split(key, 2)
        return loss_of_weights(decode(support["decoder"], latents, way, decoder_key), support, dropout_key)

    def embed_all(meta_params, inputs, key):
        params = meta_params["embedding"]
        return embed(embedding, params if train_embedding else jax.lax.stop_gradient(params), inputs, key)

    def classify(meta_params, features, targets, key=None, observe_fn=None):
        """Both inner loops, on the means without a key and with samples and dropout with one."""
        check_classes(way, targets)
        encoder_key, latent_key, decoder_key, latents_key, weights_key = _split(key, 5)
        support = {"features": features, "targets": targets, "decoder": meta_params["decoder"]}

        def task_params(weights):
            return {"params": meta_params["embedding"], "weights": weights}

        def descend(loss, rates, params, key, num_steps, to_weights):
            return inner_loop(
                loss,
                optax.stateless(lambda grads, params: -rates[None] * grads),
                params,
                support,
                num_steps=num_steps,
                per_step=step_keys(key, num_steps),
                inner_grad=inner_grad,
                observe_fn=observe_fn and (lambda params: observe_fn(task_params(to_weights(params)))),
            )

        code = encode(meta_params, dropout(encoder_key, features, dropout_rate), targets, way)
        start = _draw(code, latent_key)
        latents, first = descend(
            loss_of_latents,
            meta_params["latent_rates"],
            start,
            latents_key,
            num_latent_steps,
            lambda latents: decode(meta_params["decoder"], latents, way),
        )
        weights, second = descend(
            loss_of_weights,
            meta_params["weight_rates"],
            decode(meta_params["decoder"], latents, way, decoder_key),
            weights_key,
            num_finetuning_steps,
            lambda weights: weights,
        )
        # Decoding the last code is not a step: the last observation of the first loop is the first of the second.
        observed = jax.tree.map(lambda a, b: jnp.concatenate([a[:-1], b]), first.observed, second.observed)
        info = InnerInfo(jnp.concatenate([first.support_loss, second.support_loss]), observed)
        return task_params(weights), info, (code, start, latents)

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        features = embed_all(meta_params, support.inputs, key)
        task_params, info, _ = classify(meta_params, features, support.targets, observe_fn=observe_fn)
        return task_params, info

    def predict(task_params, inputs):
        return embed(embedding, task_params["params"], inputs) @ task_params["weights"].T

    def objective(meta_params, episode):
        if episode.key is None:
            raise ValueError("the objective of LEO draws samples; give the episode a key, as Episode(..., key=key)")
        check_query(episode)
        support_key, query_key, classify_key, dropout_key = jax.random.split(episode.key, 4)
        features = embed_all(meta_params, episode.support.inputs, support_key)
        task_params, info, (code, start, latents) = classify(
            meta_params, features, episode.support.targets, classify_key
        )
        queries = dropout(dropout_key, embed_all(meta_params, episode.query.inputs, query_key), dropout_rate)
        loss = loss_fn(queries @ task_params["weights"].T, episode.query.targets)
        return loss + _penalties(settings, meta_params, code, start, latents), info

    return MetaLearner(init, adapt, predict, objective)


class Gaussian(NamedTuple):
    """A Gaussian with independent entries.

    Attributes:
      mean: [..., L].
      deviation: [..., L], standard deviations.
    """

    mean: jax.Array
    deviation: jax.Array


def encode(meta_params: ArrayTree, features: jax.Array, targets: jax.Array, way: int) -> Gaussian:
    """The codes [N, L] of the classes: the relation network on all pairs of support examples, averaged by class.

    Args:
      meta_params: of `leo`; "encoder" and "relation" are used.
      features: [S, D].
      targets: class indices [S].
      way: N.
    """
    codes = features @ meta_params["encoder"]
    first, second, third = meta_params["relation"]
    # The first layer on [left, right] for all pairs is a sum of two products with one code each.
    left, right = jnp.split(first, 2)
    hidden = jax.nn.relu((codes @ left)[:, None] + (codes @ right)[None])
    pairs = jax.nn.relu(hidden @ second) @ third
    return _gaussian(class_means(jnp.mean(pairs, 1), targets, way), 0.0)


def decode(decoder: jax.Array, latents: jax.Array, way: int, key: PRNGKey | None = None) -> jax.Array:
    """The weights [N, D] that codes stand for: their means, or a draw with a key.

    Args:
      decoder: G, [L, 2D].
      latents: codes [N, L].
      way: the number of classes that the deviation of the weights depends on.
      key: of the draw.
    """
    num_features = decoder.shape[1] // 2
    return _draw(_gaussian(latents @ decoder, math.sqrt(2.0 / (way + num_features))), key)


def kl_to_standard(code: Gaussian) -> jax.Array:
    """KL(code ‖ N(0, I)), the mean over all entries, in nats."""
    variance = jnp.square(code.deviation)
    return jnp.mean(0.5 * (jnp.square(code.mean) + variance - 1.0) - jnp.log(code.deviation))


def orthogonality_penalty(decoder: jax.Array) -> jax.Array:
    """The mean of (C − I)², with C the cosines of all pairs of the rows of the decoder [L, 2D]."""
    rows = unit_length(decoder)
    return jnp.mean(jnp.square(rows @ rows.T - jnp.eye(len(decoder), dtype=decoder.dtype)))


def _penalties(
    settings: "LatentDescent", meta_params: ArrayTree, code: Gaussian, start: jax.Array, latents: jax.Array
) -> jax.Array:
    """What the objective adds to the query loss, for the codes [N, L] at the start and after their steps."""
    kernels = [meta_params["encoder"], *meta_params["relation"], meta_params["decoder"]]
    return (
        settings.kl_weight * kl_to_standard(code)
        + settings.encoder_penalty_weight * jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - start))
        + settings.l2_weight * 0.5 * optax.tree.norm(at_least_float32(kernels), squared=True)
        + settings.orthogonality_weight * orthogonality_penalty(meta_params["decoder"])
    )


def _init_codes(keys: Sequence[PRNGKey], features: jax.ShapeDtypeStruct, settings: "LatentDescent") -> ArrayTree:
    """The meta-parameters but those of the embedding, for five keys and the shape of features [S, D]."""
    encoder_key, decoder_key, *relation_keys = keys
    num_features, dtype, num_latent = features.shape[1], jnp.result_type(features.dtype, 0.0), settings.num_latent

    def kernel(key, *shape):
        return jax.nn.initializers.glorot_uniform()(key, shape, dtype)

    return {
        "encoder": kernel(encoder_key, num_features, num_latent),
        "relation": [kernel(key, 2 * num_latent, 2 * num_latent) for key in relation_keys],
        "decoder": kernel(decoder_key, num_latent, 2 * num_features),
        "latent_rates": jnp.full(num_latent, settings.latent_lr, dtype),
        "weight_rates": jnp.full(num_features, settings.finetuning_lr, dtype),
    }


def dropout(key: PRNGKey | None, features: jax.Array, rate: float) -> jax.Array:
    """Features with entries set to zero at a rate and the others divided by 1 − rate; unchanged without a key."""
    if key is None or rate == 0:
        return features
    keep = jax.random.bernoulli(key, 1.0 - rate, features.shape)
    return jnp.where(keep, features / (1.0 - rate), 0.0)


def _gaussian(parameters: jax.Array, offset: float) -> Gaussian:
    """Means and deviations from the two halves of [..., 2L]."""
    mean, logarithm = jnp.split(parameters, 2, -1)
    return Gaussian(mean, jnp.maximum(jnp.exp(logarithm) - (1.0 - offset), 1e-10))


def _draw(gaussian: Gaussian, key: PRNGKey | None) -> jax.Array:
    """A sample, or the mean without a key."""
    if key is None:
        return gaussian.mean
    mean, deviation = gaussian
    return mean + deviation * jax.random.normal(key, mean.shape, mean.dtype)


def _split(key: PRNGKey | None, num: int) -> list[PRNGKey | None]:
    return [None] * num if key is None else list(jax.random.split(key, num))


@dataclasses.dataclass(frozen=True)
class LatentDescent:
    """Hyperparameters of gradient descent on codes and then on the weights that they decode to.

    The defaults are the numbers of the authors' code for 1-shot miniImageNet. Its rates of 1.0 and 0.001 are for losses
    that are summed over the classes. Losses here are means, so the same steps need N times these rates: 5.0 and 0.005
    for five classes.
    """

    num_latent: int = 64
    """Size of the code of a class."""
    num_latent_steps: int = 5
    """Gradient steps on the codes."""
    num_finetuning_steps: int = 5
    """Gradient steps on the weights of the classifier, after those on the codes."""
    latent_lr: float = 1.0
    """Initial value of the learned rates of the codes."""
    finetuning_lr: float = 0.001
    """Initial value of the learned rates of the weights."""
    kl_weight: float = 0.756143
    """Weight of the KL divergence of the codes from a standard normal distribution, a mean over their entries."""
    encoder_penalty_weight: float = 5.756821e-6
    """Weight of the squared distance between codes before and after their steps, a mean over their entries."""
    l2_weight: float = 3.623413e-10
    """Weight of half the sum of the squared weights of encoder, relation network and decoder."""
    orthogonality_weight: float = 0.188103
    """Weight of the squared cosines between different rows of the decoder, a mean over all pairs."""
    dropout_rate: float = 0.307651
    """Probability that an entry of an embedding is dropped in training."""
    train_embedding: bool = False
    """Whether the embedding is trained too; the paper takes features of a pretrained network."""

    def __post_init__(self):
        """Raises ValueError for a number that is out of range."""
        check_integer("num_latent", self.num_latent, at_least=1)
        check_integer("num_latent_steps", self.num_latent_steps, at_least=0)
        check_integer("num_finetuning_steps", self.num_finetuning_steps, at_least=0)
        check_positive("latent_lr", self.latent_lr)
        check_positive("finetuning_lr", self.finetuning_lr)
        for name in ("kl_weight", "encoder_penalty_weight", "l2_weight", "orthogonality_weight"):
            check_not_negative(name, getattr(self, name))
        if not holds_for(self.dropout_rate, lambda x: (x >= 0) & (x < 1)):
            raise ValueError(f"dropout_rate={self.dropout_rate} must be at least 0 and below 1")
