"""Neural statistician: learn a generative model of sets of images, and classify by what it infers from a set.

A statistic network maps a set to a Gaussian over a context, from which the images of the set can be generated. An
image belongs to the class whose context is most like the one inferred from only that image.

Edwards and Storkey, 2017, Towards a neural statistician. https://arxiv.org/abs/1606.02185
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maml_jax.inner.embedding import embed, embedded_like
from maml_jax.inner.learner import observed_once
from maml_jax.types import (
    ArrayTree,
    MetaLearner,
    Model,
    PRNGKey,
    at_least_float32,
    check_classes,
    check_integer,
    check_model,
    check_not_negative,
    holds_for,
)


def neural_statistician(
    embedding: Model,
    decoder: Model | None = None,
    *,
    way: int,
    num_context: int = 64,
    num_latent: int = 16,
    num_hidden: int = 256,
    alpha: float | jax.Array = 0.0,
    sample_dropout: float = 0.0,
) -> MetaLearner:
    """Builds a small neural statistician, whose sets are the support examples of each class.

    A context c ~ N(0, I) generates a set: for each image a latent z ~ p(z | c), and its pixels x ~ Bernoulli(p(z, c)).
    With approximate posteriors q(c | D) and q(z | x, c) the evidence of a set D is bounded from below by R − C − L,

        R = E Σ_x log p(x | z, c),  C = KL(q(c | D) ‖ N(0, I)),  L = E Σ_x KL(q(z | x, c) ‖ p(z | c)).

    The objective is −(1 + α) R + (C + L) / (1 + α), estimated with one sample of the contexts and of the latents,
    summed over the sets and divided by the number of images: with α = 0 it is the negative bound, in nats per image.
    Pixels are drawn anew as 0 or 1 each time, with the probabilities that `inputs` holds. Values outside of [0, 1] are
    drawn as 0 or 1. The query set is not used. Labels only group the images into sets, so the number of shots in
    training is the size of a set; the paper has 5.

    The statistic network is a layer on the embeddings, a mean over the set, to which the size of the set is appended,
    and two more layers. `adapt` infers q(c | D) for every class, from the probabilities of the pixels. The outputs of
    `predict` are −KL(q(c | D_n) ‖ q(c | x)), with a set of only the query image.

    The networks have dense layers with ELU and no normalisation. There is one layer of latents, as in the paper's
    model of Omniglot; that has 512 context variables, batch normalisation everywhere and a convolutional decoder.
    Nothing depends on N: parameters that were trained with one `way` can be tested with another.

    Args:
      embedding: a network from images [S, ...] to embeddings [S, D], shared by q(c | D) and q(z | x, c).
      decoder: a network from [S, num_latent + num_context], z beside c, to the logits of the pixels, [S, ...] of any
        shape with as many entries as an image; by default dense, with two hidden layers.
      way: N, the number of classes. Classes may have different numbers of support examples, at least one. If labels are
        traced this is not checked.
      num_context: the size of c.
      num_latent: the size of z.
      num_hidden: units of the hidden layers.
      alpha: α ≥ 0, a number or an array, for a schedule over the meta-steps. The paper halves it every epoch, from 1.
      sample_dropout: the probability that the objective leaves an example out of the mean of its set; one example of
        every set always stays. All images are generated nevertheless.

    Returns:
      A `MetaLearner` with task parameters {"params": the meta-parameters, "contexts": `Gaussian` [N, num_context]}. The
      info of its objective is an `Evidence`.

    Raises:
      ValueError: if a network is not a `Model` or a number is out of range; when it is used, if inputs are not one
        floating array, the networks' outputs or the labels do not fit, or the objective is given an episode without a
        key.

    References:
      Edwards and Storkey, 2017, section 3 for the model and the bound, section 5 for α, and section 5.3 for
      classification.
    """
    check_model(embedding)
    if decoder is not None:
        check_model(decoder)
    way = check_integer("way", way, at_least=1)
    SetStatistics(num_context, num_latent, num_hidden, sample_dropout=sample_dropout)  # it checks them
    check_not_negative("alpha", alpha)

    def init(key, inputs):
        embedding_key, *keys, decoder_key = jax.random.split(key, 6)
        _check_images(inputs)
        params = embedding.init(embedding_key, inputs)
        features = embedded_like(embedding, params, inputs)
        num_features, dtype = features.shape[1], jnp.result_type(features.dtype, 0.0)
        num_codes = num_latent + num_context
        widths = {
            "pooled": (num_features, num_hidden),
            "statistic": (num_hidden + 1, num_hidden, 2 * num_context),
            "inference": (num_features + num_context, num_hidden, num_hidden, 2 * num_latent),
            "prior": (num_context, num_hidden, num_hidden, 2 * num_latent),
        }
        networks = {name: _init_mlp(key, widths[name], dtype) for name, key in zip(widths, keys, strict=True)}
        if decoder is None:
            num_pixels = math.prod(inputs.shape[1:])
            networks["decoder"] = _init_mlp(decoder_key, (num_codes, num_hidden, num_hidden, num_pixels), dtype)
        else:
            networks["decoder"] = decoder.init(decoder_key, jnp.zeros((len(inputs), num_codes), dtype))
        return {"embedding": params, **networks}

    def generate(params, codes, key):
        """Logits of the pixels, [S, P]."""
        logits = _mlp(params, codes) if decoder is None else decoder.call(params, codes, key)
        return logits.reshape(len(codes), -1)

    def read(meta_params, inputs, key=None):
        _check_images(inputs)
        return embed(embedding, meta_params["embedding"], inputs, key)

    def adapt(meta_params, support, *, key=None, observe_fn=None):
        check_classes(way, support.targets)
        embedded = read(meta_params, support.inputs, key)
        members = jax.nn.one_hot(support.targets, way, dtype=embedded.dtype)
        task_params = {"params": meta_params, "contexts": infer_contexts(meta_params, embedded, members)}
        return task_params, observed_once(task_params, observe_fn)

    def predict(task_params, inputs):
        embedded = read(task_params["params"], inputs)
        alone = infer_contexts(task_params["params"], embedded)
        of_query = jax.tree.map(lambda x: x[:, None], alone)
        of_class = jax.tree.map(lambda x: x[None], task_params["contexts"])
        return -kl_divergence(of_class, of_query)

    def objective(meta_params, episode):
        if episode.key is None:
            raise ValueError(
                "the objective of the neural statistician draws samples; give the episode a key, as "
                "Episode(..., key=key)"
            )
        keys = jax.random.split(episode.key, 6)
        pixel_key, dropout_key, context_key, latent_key, embedding_key, decoder_key = keys
        inputs, targets = episode.support
        check_classes(way, targets)
        _check_images(inputs)
        # Uniform numbers of half precision are multiples of 2⁻⁷ or 2⁻¹⁰.
        images = jax.random.bernoulli(pixel_key, at_least_float32(inputs)).astype(inputs.dtype)
        embedded = read(meta_params, images, embedding_key)
        members = jax.nn.one_hot(targets, way, dtype=embedded.dtype)

        kept = _kept(dropout_key, targets, members, sample_dropout)
        contexts = infer_contexts(meta_params, embedded, members * kept[:, None])
        context = _draw(context_key, contexts)
        own_context = members @ context
        posterior = _gaussian(_mlp(meta_params["inference"], jnp.concatenate([embedded, own_context], -1)))
        prior = _gaussian(members @ _mlp(meta_params["prior"], context))
        latent = _draw(latent_key, posterior)
        logits = generate(meta_params["decoder"], jnp.concatenate([latent, own_context], -1), decoder_key)
        evidence = _evidence(contexts, posterior, prior, logits, images.reshape(len(images), -1))
        weight = jnp.asarray(1.0 + alpha, evidence.reconstruction.dtype)
        divergence = evidence.context_divergence + evidence.latent_divergence
        return divergence / weight - weight * evidence.reconstruction, evidence

    return MetaLearner(init, adapt, predict, objective)


class Gaussian(NamedTuple):
    """A Gaussian with independent entries.

    Attributes:
      mean: [..., C].
      log_variance: [..., C].
    """

    mean: jax.Array
    log_variance: jax.Array


class Evidence(NamedTuple):
    """The parts of the lower bound of the evidence, in nats per image.

    Attributes:
      reconstruction: R, the log-probability of the pixels.
      context_divergence: C, of the contexts from their prior.
      latent_divergence: L, of the latents from theirs.
    """

    reconstruction: jax.Array
    context_divergence: jax.Array
    latent_divergence: jax.Array

    @property
    def bound(self) -> jax.Array:
        """R − C − L."""
        return self.reconstruction - self.context_divergence - self.latent_divergence


def infer_contexts(meta_params: ArrayTree, embedded: jax.Array, members: jax.Array | None = None) -> Gaussian:
    """The statistic network q(c | D).

    Args:
      meta_params: of `neural_statistician`; "pooled" and "statistic" are used.
      embedded: embeddings [S, D].
      members: [S, N], 1 where an example is in a set and 0 elsewhere; None for S sets of one example each.

    Returns:
      Gaussians [N, num_context].
    """
    hidden = jax.nn.elu(_mlp(meta_params["pooled"], embedded))
    sizes = jnp.ones((len(hidden), 1), hidden.dtype)
    if members is not None:
        sizes = jnp.maximum(jnp.sum(members, 0), 1)[:, None]  # a NaN of an empty set would reach the others
        hidden = members.T @ hidden / sizes
    return _gaussian(_mlp(meta_params["statistic"], jnp.concatenate([hidden, sizes], -1)))


def kl_divergence(first: Gaussian, second: Gaussian) -> jax.Array:
    """KL(first ‖ second) [...] of Gaussians [..., C], in nats."""
    difference = first.log_variance - second.log_variance
    distance = jnp.square(first.mean - second.mean) * jnp.exp(-second.log_variance)
    return 0.5 * jnp.sum(jnp.exp(difference) - difference + distance - 1.0, -1)


def _evidence(
    contexts: Gaussian, posterior: Gaussian, prior: Gaussian, logits: jax.Array, pixels: jax.Array
) -> Evidence:
    """The parts of the bound, for contexts [N, num_context], latents [S, num_latent], logits and pixels [S, P]."""
    if logits.shape != pixels.shape:
        raise ValueError(
            f"the decoder must return a logit for each of the {pixels.shape[1]} entries of an image, got "
            f"{logits.shape[1]}"
        )
    standard = jax.tree.map(jnp.zeros_like, contexts)
    return Evidence(
        reconstruction=jnp.mean(jnp.sum(pixels * logits - jax.nn.softplus(logits), -1)),
        context_divergence=jnp.sum(kl_divergence(contexts, standard)) / len(pixels),
        latent_divergence=jnp.mean(kl_divergence(posterior, prior)),
    )


def _kept(key: PRNGKey, targets: jax.Array, members: jax.Array, rate: float) -> jax.Array:
    """Which examples [S] enter the mean of their class: 1 or 0, and 1 for at least one example of every class."""
    if rate == 0:
        return jnp.ones(len(targets), members.dtype)
    chance = jax.random.uniform(key, targets.shape)
    largest = jnp.max(jnp.where(members > 0, chance[:, None], -1.0), 0)
    return ((chance >= rate) | (chance == largest[targets])).astype(members.dtype)


def _draw(key: PRNGKey, gaussian: Gaussian) -> jax.Array:
    mean, log_variance = gaussian
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)


def _gaussian(parameters: jax.Array) -> Gaussian:
    return Gaussian(*jnp.split(parameters, 2, -1))


def _init_mlp(key: PRNGKey, widths: Sequence[int], dtype: jnp.dtype) -> list[ArrayTree]:
    """Dense layers with Glorot uniform kernels [I, O] and zero biases [O]."""
    pairs = list(itertools.pairwise(widths))
    kernel_init = jax.nn.initializers.glorot_uniform()
    return [
        {"kernel": kernel_init(key, pair, dtype), "bias": jnp.zeros(pair[1], dtype)}
        for key, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    ]


def _mlp(layers: list[ArrayTree], inputs: jax.Array) -> jax.Array:
    """Dense layers on [S, I], with an ELU between two of them."""
    for index, layer in enumerate(layers):
        inputs = (jax.nn.elu(inputs) if index else inputs) @ layer["kernel"] + layer["bias"][None]
    return inputs


def _check_images(inputs: jax.Array) -> None:
    if not (hasattr(inputs, "dtype") and jnp.ndim(inputs) > 1 and jnp.issubdtype(inputs.dtype, jnp.floating)):
        what = f"{inputs.dtype} {jnp.shape(inputs)}" if hasattr(inputs, "dtype") else type(inputs).__name__
        raise ValueError(
            f"the inputs of the neural statistician must be one floating array [S, ...] of pixels in [0, 1], got {what}"
        )


@dataclasses.dataclass(frozen=True)
class SetStatistics:
    """Hyperparameters of the neural statistician."""

    num_context: int = 64
    """Size of the context of a set. The paper has 512, in a larger network."""
    num_latent: int = 16
    """Size of the latent of an image."""
    num_hidden: int = 256
    """Units of the hidden layers."""
    initial_alpha: float = 1.0
    """Extra weight of the reconstruction in the first meta-step."""
    alpha_half_life: int = 300
    """Meta-steps after which that weight is halved, and halved again; one epoch in the paper."""
    sample_dropout: float = 0.5
    """Probability that an example is left out of the mean of its set in training."""

    def __post_init__(self):
        """Raises ValueError for a number that is out of range."""
        for name in ("num_context", "num_latent", "num_hidden", "alpha_half_life"):
            check_integer(name, getattr(self, name), at_least=1)
        if not holds_for(self.sample_dropout, lambda x: (x >= 0) & (x < 1)):
            raise ValueError(f"sample_dropout={self.sample_dropout} must be at least 0 and below 1")
        check_not_negative("initial_alpha", self.initial_alpha)

    def alpha(self, step: int | jax.Array) -> jax.Array:
        """α at a meta-step."""
        halvings = jnp.asarray(step) // self.alpha_half_life  # of integers, because a quotient may round to below one
        return self.initial_alpha * jnp.ldexp(1.0, -halvings)
