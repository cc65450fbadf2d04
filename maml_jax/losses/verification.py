"""Losses for verification: whether two examples show the same identity.

The outputs are embeddings and the targets identities. Embeddings are brought to unit length, so their scale does not
matter. No identity needs an output of its own, so identities that were never seen can be tested. Neither of the two
papers below published code; each docstring says which reading of its paper was taken.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maml_jax.losses.supervised import check_class_scores, cross_entropy
from maml_jax.types import at_least_float32, check_not_negative, check_positive, holds_for, wide_integers

VerificationLoss = Callable[[jax.Array, jax.Array], jax.Array]
"""`(outputs [B, C], targets [B]) -> scalar`, embeddings and the integer identities of B examples."""


def hard_pair_attention(*, positive_threshold: float, negative_threshold: float) -> VerificationLoss:
    """Builds the loss that draws hard positive pairs together and pushes hard negative pairs apart.

    With unit embeddings e, (1 / 2|P|) Σ_P |e_i − e_j|² − (1 / 2|N|) Σ_N |e_i − e_j|². P are the pairs of one identity
    whose cosine is below `positive_threshold`, and N those of two identities whose cosine is above
    `negative_threshold`. Which pairs are hard is not differentiated. A sum over no pair is 0.

    The paper pairs a gallery image with a probe image of the same person; here all pairs of the batch are used.

    Args:
      positive_threshold: a cosine in [−1, 1]; with 1 every pair of one identity counts whose embeddings differ.
      negative_threshold: a cosine in [−1, 1]; with −1 every pair of two identities counts.

    Returns:
      The loss, in [−2, 2].

    Raises:
      ValueError: if a threshold is no cosine; and when it is used, if the shapes do not fit.

    References:
      Guo et al., 2020, MFR, section 3.3. https://arxiv.org/abs/2003.07733
    """
    for name, value in {"positive_threshold": positive_threshold, "negative_threshold": negative_threshold}.items():
        if not holds_for(value, lambda x: abs(x) <= 1):
            raise ValueError(f"{name}={value} must be a cosine, in [-1, 1]")

    def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        unit = _unit(outputs, targets)
        cosine = unit @ unit.T
        seen = jax.lax.stop_gradient(cosine)
        same, pairs = _same(targets), _pairs(len(targets))
        # |a - b|² / 2 of unit vectors is one minus their cosine.
        half_distance = 1.0 - cosine
        # The cosine of equal embeddings may round to less than one.
        largest = jnp.minimum(positive_threshold, 1 - 4 * jnp.finfo(seen.dtype).eps)
        positive = _mean_of(half_distance, pairs & same & (seen < largest))
        return positive - _mean_of(half_distance, pairs & ~same & (seen > negative_threshold))

    return loss


def soft_classification(scale: float = 64.0) -> VerificationLoss:
    """Builds the cross-entropy of the identities of a batch, whose class weights are the means of their embeddings.

    The weight of an identity is the mean of its unit embeddings, at unit length again. The logits are `scale` times the
    cosines between an embedding and the weights. The weights carry gradient; the paper does not say whether they do.

    Args:
      scale: s > 0, the inverse temperature.

    Returns:
      The loss, in nats per example.

    Raises:
      ValueError: if `scale` is not positive; and when it is used, if the shapes do not fit.

    References:
      Guo et al., 2020, MFR, section 3.3. https://arxiv.org/abs/2003.07733
    """
    check_positive("scale", scale)

    def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        unit = _unit(outputs, targets)
        same = _same(targets).astype(unit.dtype)
        weights = _to_unit_length(same @ unit)
        # An identity with m examples has m equal columns, each of which counts 1/m.
        logits = scale * unit @ weights.T - jnp.log(jnp.sum(same, 0))[None]
        of_identity = scale * jnp.sum(unit * weights, -1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - of_identity)

    return loss


def domain_alignment(outputs: jax.Array) -> jax.Array:
    """The mean over D domains of the squared distance between the mean embedding of the domain and that of all.

    With unit embeddings, c_d their mean in domain d and c the mean of c_d: (1/D) Σ_d |c_d − c|². The paper multiplies
    the difference by the scale of its classification, which makes this term outweigh the others; give it a weight
    instead.

    Args:
      outputs: embeddings [D, B, C] of B examples of each domain.

    Returns:
      A scalar in [0, 1]; 0 if all domains have the same mean.

    Raises:
      ValueError: if the embeddings are not [D, B, C].

    References:
      Guo et al., 2020, MFR, section 3.3. https://arxiv.org/abs/2003.07733
    """
    if jnp.ndim(outputs) != 3:
        raise ValueError(
            f"domain_alignment takes embeddings [D, B, C], B examples of each of D domains, got {jnp.shape(outputs)}"
        )
    centres = jnp.mean(_to_unit_length(outputs), 1)
    return jnp.mean(jnp.sum(jnp.square(centres - jnp.mean(centres, 0, keepdims=True)), -1))


def triplet(margin: float = 0.3) -> VerificationLoss:
    """Builds the triplet loss: the mean of max(0, |a − p|² − |a − n|² + m) over all triplets of a batch.

    a and p are different examples of one identity, and n is one of another identity. All are unit embeddings.

    Args:
      margin: m ≥ 0, in squared distance, of which 4 is the largest.

    Returns:
      The loss; 0 for a batch without a triplet.

    Raises:
      ValueError: if the margin is negative; and when it is used, if the shapes do not fit.

    References:
      Schroff, Kalenichenko and Philbin, 2015, FaceNet, equation 3. https://arxiv.org/abs/1503.03832
    """
    check_not_negative("margin", margin)

    def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        unit = _unit(outputs, targets)
        distance = 2.0 - 2.0 * unit @ unit.T
        return _hinge_over_triplets(distance, distance, targets, margin)

    return loss


def cross_domain_triplet(
    margin: float = 0.3, shrinkage: float = 0.1
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Builds the triplet loss of one domain under the distances of another.

    Domain j has the covariance S⁺ of the differences of its positive pairs, and S⁻ of its negative pairs. A triplet of
    domain i then costs max(0, d_{S⁺}(a, p) − d_{S⁻}(a, n) + m) with d_S(x, y) = (x − y)ᵀ S (x − y). The loss is a mean
    over all triplets of domain i, and over all domains j.

    The reading taken: a covariance is about zero, because every difference also occurs with the other sign. With fewer
    pairs than dimensions it is singular, so it is scaled to the trace C of the identity and shrunk to it,
    (1 − ε) S + ε I. With ε = 1 the loss is `triplet`. The gradient passes through the covariances
    and their scale, so it is large where the positive pairs of a domain nearly coincide; clip it in training.

    Args:
      margin: m ≥ 0.
      shrinkage: ε in [0, 1].

    Returns:
      `(outputs [B, C], targets [B], metric_outputs [D, B', C], metric_targets [D, B']) -> scalar`, the embeddings and
      identities of the triplets, and those of the domains that give the distances. A domain without a positive or
      without a negative pair gives the identity in its place, and so does one whose pairs differ by rounding only.

    Raises:
      ValueError: if the margin is negative or `shrinkage` not in [0, 1]; and when it is used, if the shapes do not fit.

    References:
      Faraki et al., 2021, cross-domain similarity learning (CDT), section 3. https://arxiv.org/abs/2103.07503
    """
    check_not_negative("margin", margin)
    if not holds_for(shrinkage, lambda x: (x >= 0) & (x <= 1)):
        raise ValueError(f"shrinkage={shrinkage} must be in [0, 1]")

    def metrics_of(outputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        unit = _unit(outputs, targets)
        same, pairs = _same(targets), _pairs(len(targets))
        # Differences do not change when a mean is taken off, but their products then round less.
        of_identity = unit - same.astype(unit.dtype) @ unit / jnp.sum(same, 1, keepdims=True)
        centred = unit - jnp.mean(unit, 0, keepdims=True)
        return tuple(
            _shrunk(_covariance(vectors, pairs & chosen), shrinkage)
            for vectors, chosen in ((of_identity, same), (centred, ~same))
        )

    def loss(outputs: jax.Array, targets: jax.Array, metric_outputs: jax.Array, metric_targets: jax.Array) -> jax.Array:
        if jnp.ndim(metric_outputs) != 3:
            raise ValueError(
                "cross_domain_triplet takes embeddings [D, B, C] of the domains that give the distances, got "
                f"{jnp.shape(metric_outputs)}"
            )
        unit = _unit(outputs, targets)

        def under(positive: jax.Array, negative: jax.Array) -> jax.Array:
            return _hinge_over_triplets(_distances(unit, positive), _distances(unit, negative), targets, margin)

        return jnp.mean(jax.vmap(under)(*jax.vmap(metrics_of)(metric_outputs, metric_targets)))

    return loss


def large_margin_cosine(scale: float = 30.0, margin: float = 0.35) -> VerificationLoss:
    """Builds the cross-entropy of s (cos θ − m) for the right class and s cos θ for the others.

    Unlike the others it needs an output for each identity. The cosines are those between an embedding and the weight
    of a class, both at unit length, which the model computes.

    Args:
      scale: s > 0.
      margin: m ≥ 0, a difference of cosines.

    Returns:
      `(outputs [..., N], targets [...]) -> scalar`, in nats per example; the outputs are cosines.

    Raises:
      ValueError: if `scale` is not positive or `margin` negative; and when it is used, if the shapes do not fit.

    References:
      Wang et al., 2018, CosFace, equation 4. https://arxiv.org/abs/1801.09414
    """
    check_positive("scale", scale)
    check_not_negative("margin", margin)

    def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        check_class_scores(outputs, targets, "large_margin_cosine")
        classes = jnp.arange(outputs.shape[-1]).reshape((1,) * jnp.ndim(targets) + (-1,))
        is_target = wide_integers(targets)[..., None] == classes
        return cross_entropy(scale * (outputs - margin * is_target), targets)

    return loss


def _unit(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The embeddings [B, C] at unit length, after a check of the shapes."""
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise ValueError(f"the targets must be integer identities, got dtype {jnp.result_type(targets)}")
    if jnp.ndim(outputs) != 2 or jnp.shape(outputs)[:1] != jnp.shape(targets):
        raise ValueError(
            f"a loss of verification takes embeddings [B, C] and identities [B], got outputs {jnp.shape(outputs)} and "
            f"targets {jnp.shape(targets)}"
        )
    return _to_unit_length(outputs)


def _to_unit_length(vectors: jax.Array) -> jax.Array:
    """Vectors [..., C] of unit length, in at least float32; a zero stays zero, with a derivative of zero."""
    vectors = at_least_float32(vectors)
    square = jnp.sum(jnp.square(vectors), -1, keepdims=True)
    return jnp.where(square > 0, vectors * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _same(targets: jax.Array) -> jax.Array:
    """[B, B], whether two examples have the same identity."""
    return targets[:, None] == targets[None, :]


def _pairs(count: int) -> jax.Array:
    """[B, B], each pair of different examples once."""
    return jnp.triu(jnp.ones((count, count), bool), 1)


def _mean_of(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """The mean of the chosen values; 0 if there is none."""
    return jnp.sum(jnp.where(chosen, values, 0.0)) / jnp.maximum(jnp.sum(chosen), 1)


def _hinge_over_triplets(positive: jax.Array, negative: jax.Array, targets: jax.Array, margin: float) -> jax.Array:
    """The mean of max(0, positive[a, p] − negative[a, n] + margin) over all triplets, from distances [B, B]."""
    same = _same(targets)
    other_example = ~jnp.eye(len(targets), dtype=bool)
    chosen = (same & other_example)[:, :, None] & ~same[:, None, :]
    return _mean_of(jax.nn.relu(positive[:, :, None] - negative[:, None, :] + margin), chosen)


def _covariance(unit: jax.Array, chosen: jax.Array) -> jax.Array:
    """The mean of the outer products of the differences of the chosen pairs, [C, C].

    Σ w_ij (e_i − e_j)(e_i − e_j)ᵀ = 2 Eᵀ (diag(Σ_j w_ij) − w) E for a symmetric w, so no difference is stored.
    """
    weights = chosen.astype(unit.dtype)
    weights = (weights + weights.T) / 2.0
    laplacian = jnp.diag(jnp.sum(weights, 1)) - weights
    return 2.0 * unit.T @ laplacian @ unit / jnp.maximum(jnp.sum(weights), 1.0)


def _shrunk(covariance: jax.Array, shrinkage: float) -> jax.Array:
    """The covariance [C, C] at the trace of the identity, mixed with the identity; the identity if it is rounding."""
    size, trace = len(covariance), jnp.trace(covariance)
    identity = jnp.eye(size, dtype=covariance.dtype)
    is_positive = trace > (8 * jnp.finfo(covariance.dtype).eps) ** 2  # of vectors of unit length
    scaled = jnp.where(is_positive, covariance * (size / jnp.where(is_positive, trace, 1.0)), identity)
    return (1.0 - shrinkage) * scaled + shrinkage * identity


def _distances(unit: jax.Array, metric: jax.Array) -> jax.Array:
    """(x − y)ᵀ S (x − y) of all pairs, [B, B]."""
    product = unit @ metric @ unit.T
    own = jnp.diag(product)
    return own[:, None] + own[None, :] - 2.0 * product
