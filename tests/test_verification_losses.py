"""The losses of verification against loops written by hand, finite differences, and their limits."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml_jax import losses

IDENTITIES = np.array([0, 1, 0, 2, 1, 2, 0])
rng = np.random.default_rng(0)
EMBEDDINGS = rng.normal(size=(7, 4))
DOMAINS = rng.normal(size=(3, 7, 4)) + np.array([0.0, 0.5, -1.0])[:, None, None]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def pairs(identities, *, same):
    return [
        (i, j) for i, j in itertools.combinations(range(len(identities)), 2) if (identities[i] == identities[j]) == same
    ]


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def hard_pairs_by_hand(positive, negative):
    e = unit(EMBEDDINGS)
    hard = [(i, j) for i, j in pairs(IDENTITIES, same=True) if e[i] @ e[j] < positive]
    confusing = [(i, j) for i, j in pairs(IDENTITIES, same=False) if e[i] @ e[j] > negative]
    return mean(np.sum((e[i] - e[j]) ** 2) / 2 for i, j in hard) - mean(
        np.sum((e[i] - e[j]) ** 2) / 2 for i, j in confusing
    )


@pytest.mark.parametrize(("positive", "negative"), [(1.0, -1.0), (0.4, 0.1), (-1.0, 0.2), (0.3, 1.0), (-1.0, 1.0)])
def test_hard_pair_attention_is_that_of_a_loop(positive, negative, x64):
    loss = losses.hard_pair_attention(positive_threshold=positive, negative_threshold=negative)
    np.testing.assert_allclose(loss(EMBEDDINGS, IDENTITIES), hard_pairs_by_hand(positive, negative), atol=1e-12)


def soft_classification_by_hand(scale):
    e, found = unit(EMBEDDINGS), []
    weights = [unit(e[identity == IDENTITIES].mean(0)) for identity in range(3)]
    for embedding, identity in zip(e, IDENTITIES, strict=True):
        logits = [scale * embedding @ weight for weight in weights]
        found.append(np.log(sum(np.exp(logit) for logit in logits)) - logits[identity])
    return mean(found)


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_soft_classification_is_that_of_a_loop(scale, x64):
    found = losses.soft_classification(scale)(EMBEDDINGS, IDENTITIES)
    np.testing.assert_allclose(found, soft_classification_by_hand(scale), rtol=1e-12)
    # The numbers of the identities do not matter.
    np.testing.assert_allclose(found, losses.soft_classification(scale)(EMBEDDINGS, 7 - 3 * IDENTITIES), rtol=1e-12)


def test_domain_alignment_is_that_of_a_loop(x64):
    centres = [unit(domain).mean(0) for domain in DOMAINS]
    middle = sum(centres) / 3
    expected = mean(np.sum((centre - middle) ** 2) for centre in centres)
    np.testing.assert_allclose(losses.domain_alignment(DOMAINS), expected, rtol=1e-12)


def triplets(identities):
    return [
        (a, p, n)
        for a, p, n in itertools.product(range(len(identities)), repeat=3)
        if a != p and identities[a] == identities[p] != identities[n]
    ]


def test_triplet_is_that_of_a_loop(x64):
    e = unit(EMBEDDINGS)
    expected = mean(
        max(0.0, np.sum((e[a] - e[p]) ** 2) - np.sum((e[a] - e[n]) ** 2) + 0.3) for a, p, n in triplets(IDENTITIES)
    )
    assert expected > 0
    np.testing.assert_allclose(losses.triplet(0.3)(EMBEDDINGS, IDENTITIES), expected, rtol=1e-12)


def metric_by_hand(embeddings, *, same, shrinkage):
    e = unit(embeddings)
    differences = np.array([e[i] - e[j] for i, j in pairs(IDENTITIES, same=same)])
    covariance = differences.T @ differences / len(differences)
    return (1 - shrinkage) * covariance * 4 / np.trace(covariance) + shrinkage * np.eye(4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_cross_domain_triplet_is_that_of_a_loop(shrinkage, x64):
    e, found = unit(EMBEDDINGS), []
    for domain in DOMAINS:
        positive, negative = (metric_by_hand(domain, same=same, shrinkage=shrinkage) for same in (True, False))
        for a, p, n in triplets(IDENTITIES):
            near, far = e[a] - e[p], e[a] - e[n]
            found.append(max(0.0, near @ positive @ near - far @ negative @ far + 0.3))
    loss = losses.cross_domain_triplet(0.3, shrinkage)
    targets = np.tile(IDENTITIES, (3, 1))
    np.testing.assert_allclose(loss(EMBEDDINGS, IDENTITIES, DOMAINS, targets), mean(found), rtol=1e-10)


def test_the_metric_of_the_identity_gives_the_plain_triplet_loss(x64):
    targets = np.tile(IDENTITIES, (3, 1))
    found = losses.cross_domain_triplet(0.3, 1.0)(EMBEDDINGS, IDENTITIES, DOMAINS, targets)
    np.testing.assert_allclose(found, losses.triplet(0.3)(EMBEDDINGS, IDENTITIES), rtol=1e-12)


@pytest.mark.parametrize("same", [True, False])
def test_a_metric_without_a_pair_is_the_identity(same, x64):
    # A domain in which no two examples are of one identity, or all are.
    domain_targets = np.zeros(len(IDENTITIES), int) if not same else np.arange(len(IDENTITIES))
    e = unit(DOMAINS[0])
    other = np.array([e[i] - e[j] for i, j in pairs(domain_targets, same=not same)])
    covariance = other.T @ other / len(other)
    metrics = {not same: covariance * 4 / np.trace(covariance), same: np.eye(4)}
    e, found = unit(EMBEDDINGS), []
    for a, p, n in triplets(IDENTITIES):
        near, far = e[a] - e[p], e[a] - e[n]
        found.append(max(0.0, near @ metrics[True] @ near - far @ metrics[False] @ far + 0.3))
    loss = losses.cross_domain_triplet(0.3, 0.0)
    value = loss(EMBEDDINGS, IDENTITIES, DOMAINS[:1], domain_targets[None])
    np.testing.assert_allclose(value, mean(found), rtol=1e-9)


def test_large_margin_cosine_moves_the_right_class_by_the_margin(x64):
    cosines = np.tanh(rng.normal(size=(7, 3)))
    moved = cosines - 0.35 * np.eye(3)[IDENTITIES]
    found = losses.large_margin_cosine(30.0, 0.35)(cosines, IDENTITIES)
    np.testing.assert_allclose(found, losses.cross_entropy(30.0 * moved, jnp.array(IDENTITIES)), rtol=1e-12)
    plain = losses.large_margin_cosine(1.0, 0.0)(cosines, IDENTITIES)
    np.testing.assert_allclose(plain, losses.cross_entropy(jnp.array(cosines), jnp.array(IDENTITIES)), rtol=1e-12)


OF_EMBEDDINGS = {
    "hard_pair_attention": lambda x: losses.hard_pair_attention(positive_threshold=0.4, negative_threshold=0.1)(
        x, IDENTITIES
    ),
    "soft_classification": lambda x: losses.soft_classification(8.0)(x, IDENTITIES),
    "domain_alignment": lambda x: losses.domain_alignment(jnp.stack([x, jnp.sin(x)])),
    "triplet": lambda x: losses.triplet(0.3)(x, IDENTITIES),
    "cross_domain_triplet": lambda x: losses.cross_domain_triplet(0.3)(
        x, IDENTITIES, jnp.stack([jnp.cos(x), x[::-1]]), np.tile(IDENTITIES, (2, 1))
    ),
    "large_margin_cosine": lambda x: losses.large_margin_cosine()(jnp.tanh(x), IDENTITIES),
}


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_derivatives_are_those_of_finite_differences(name, x64):
    loss, direction = OF_EMBEDDINGS[name], jnp.asarray(rng.normal(size=EMBEDDINGS.shape))
    step = 1e-5
    for function in (loss, lambda x: jnp.vdot(jnp.cos(jnp.arange(28.0).reshape(7, 4)), jax.grad(loss)(x))):
        function = jax.jit(function)
        _, exact = jax.jvp(function, (jnp.asarray(EMBEDDINGS),), (direction,))
        difference = (function(EMBEDDINGS + step * direction) - function(EMBEDDINGS - step * direction)) / (2 * step)
        np.testing.assert_allclose(difference, exact, rtol=1e-6, atol=1e-9)
        assert abs(exact) > 1e-4


OF_PAIRS = {
    "hard_pair_attention": losses.hard_pair_attention(positive_threshold=0.4, negative_threshold=0.1),
    "soft_classification": losses.soft_classification(8.0),
    "triplet": losses.triplet(0.3),
    "cross_domain_triplet": lambda x, y: losses.cross_domain_triplet(0.3)(x, y, x[None], y[None]),
}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_order_and_scale_of_the_embeddings_do_not_matter(name, x64):
    loss, order = OF_PAIRS[name], rng.permutation(7)
    expected = loss(EMBEDDINGS, IDENTITIES)
    scales = np.exp(rng.normal(size=(7, 1)))
    np.testing.assert_allclose(loss((scales * EMBEDDINGS)[order], IDENTITIES[order]), expected, rtol=1e-10)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize(
    ("embeddings", "identities"),
    [
        (EMBEDDINGS[:2], np.array([0, 0])),  # one pair, and nobody else
        (EMBEDDINGS[:2], np.array([0, 1])),
        (EMBEDDINGS[:1], np.array([0])),
        (np.zeros((4, 3)), np.array([0, 0, 1, 1])),
        (np.ones((4, 3)), np.array([0, 0, 1, 1])),  # all covariances are zero
    ],
)
def test_values_and_derivatives_are_finite_where_there_is_little(name, embeddings, identities):
    loss = jax.jit(jax.value_and_grad(lambda x: OF_PAIRS[name](x, identities)))
    value, grad = loss(jnp.asarray(embeddings, jnp.float32))
    chex.assert_tree_all_finite((value, grad))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_embeddings_of_half_precision_may_be_long(name):
    directions = np.sign(EMBEDDINGS).repeat(200, 1)  # their squared length, 144 a number, exceeds float16
    half, single = (
        jax.grad(OF_PAIRS[name])(jnp.asarray(12.0 * directions, dtype), IDENTITIES) for dtype in ("float16", "float32")
    )
    # A gradient of half precision has 11 bits.
    chex.assert_trees_all_close(half.astype(jnp.float32), single, atol=1e-3 * float(jnp.max(jnp.abs(single))) + 1e-7)


def test_equal_domains_are_aligned_and_well_separated_identities_cost_nothing():
    domain = jnp.asarray(EMBEDDINGS, jnp.float32)
    np.testing.assert_allclose(losses.domain_alignment(jnp.stack([domain, 3.0 * domain])), 0.0, atol=1e-6)
    apart = jnp.asarray(np.eye(3, dtype=np.float32)[IDENTITIES])
    assert losses.triplet(0.3)(apart, IDENTITIES) == 0.0
    assert losses.soft_classification(64.0)(apart, IDENTITIES) < 1e-6
    hard = losses.hard_pair_attention(positive_threshold=0.9, negative_threshold=0.1)
    assert hard(apart, IDENTITIES) == 0.0


def test_with_a_threshold_of_one_equal_embeddings_are_no_pair():
    # The cosine of a vector with itself rounds to one or to less.
    for seed in range(8):
        x = jax.random.normal(jax.random.key(seed), (5,))
        found = losses.hard_pair_attention(positive_threshold=1.0, negative_threshold=1.0)(
            jnp.stack([x, x, -x]), jnp.zeros(3, int)
        )
        chex.assert_trees_all_close(found, 2.0, rtol=1e-6)


def test_which_pairs_are_hard_is_not_differentiated(x64):
    # Just above and below the threshold the loss jumps, and its derivative is that of the chosen pairs alone.
    loss = losses.hard_pair_attention(positive_threshold=1.0, negative_threshold=-1.0)
    grad = jax.grad(loss)(jnp.asarray(EMBEDDINGS), IDENTITIES)
    by_distance = jax.grad(lambda x: mean_distance(x, same=True) - mean_distance(x, same=False))(
        jnp.asarray(EMBEDDINGS)
    )
    np.testing.assert_allclose(grad, by_distance, rtol=1e-10, atol=1e-12)


def mean_distance(x, *, same):
    e = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    chosen = pairs(IDENTITIES, same=same)
    return sum(jnp.sum((e[i] - e[j]) ** 2) / 2 for i, j in chosen) / len(chosen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.triplet()(EMBEDDINGS, IDENTITIES[:5]), r"outputs \(7, 4\) and targets \(5,\)"),
        (lambda: losses.triplet()(EMBEDDINGS, IDENTITIES * 1.0), "integer identities, got dtype float"),
        (lambda: losses.soft_classification()(DOMAINS, IDENTITIES), r"outputs \(3, 7, 4\) and targets \(7,\)"),
        (lambda: losses.domain_alignment(EMBEDDINGS), r"embeddings \[D, B, C\].*got \(7, 4\)"),
        (
            lambda: losses.cross_domain_triplet()(EMBEDDINGS, IDENTITIES, EMBEDDINGS, IDENTITIES),
            r"embeddings \[D, B, C\].*got \(7, 4\)",
        ),
        *(
            (partial(losses.large_margin_cosine(), jnp.zeros(outputs), jnp.zeros(targets, int)), "large_margin_cosine")
            for outputs, targets in (((1, 3), (5,)), ((3, 3), (3, 3)), ((5, 3), (4,)))
        ),
        (partial(losses.triplet, -0.1), "margin=-0.1 must be a number of at least 0"),
        (partial(losses.soft_classification, 0.0), "scale=0.0 must be a positive number"),
        (partial(losses.large_margin_cosine, -1.0), "scale=-1.0 must be a positive number"),
        (partial(losses.large_margin_cosine, margin=-0.1), "margin=-0.1 must be a number of at least 0"),
        (partial(losses.cross_domain_triplet, -0.1), "margin=-0.1 must be a number of at least 0"),
        (partial(losses.cross_domain_triplet, 0.3, 1.5), r"shrinkage=1.5 must be in \[0, 1\]"),
        (partial(losses.cross_domain_triplet, 0.3, None), r"shrinkage=None must be in \[0, 1\]"),
        (
            partial(losses.hard_pair_attention, positive_threshold=1.5, negative_threshold=0.0),
            "positive_threshold=1.5 must be a cosine",
        ),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("spread", [0.0, 1e-4, 3e-4, 1e-3])
@pytest.mark.parametrize("per_identity", [3, 4])
def test_domains_whose_pairs_nearly_coincide_give_the_metric_of_float64(spread, per_identity):
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(3), per_identity)
    domain = np.repeat(rng.normal(size=(3, 16)), per_identity, 0) + spread * rng.normal(size=(3 * per_identity, 16))
    outputs = rng.normal(size=(3 * per_identity, 16))
    loss = losses.cross_domain_triplet(0.3, 0.1)

    def value(dtype):
        arrays = jnp.asarray(outputs, dtype), identities, jnp.asarray(domain, dtype)[None], identities[None]
        return float(loss(*arrays))

    with jax.enable_x64(True):
        expected = value(jnp.float64)
    # Equal pairs have no direction in either precision; the identity takes their place.
    # Unit vectors in float32 differ by 1e-7 from those in float64, a thousandth of the smallest spread.
    np.testing.assert_allclose(value(jnp.float32), expected, rtol=1e-2)
