"""Episodes of variable way and shot keep what they promise."""

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from maml_jax.tasks import variable

LABELS = np.repeat(np.arange(100, 125), 20 + 2 * np.arange(25))
"""25 classes of 20, 22, ..., 68 examples, so that q = 10."""
KEYS = jax.random.split(jax.random.key(0), 300)


@pytest.fixture(scope="module")
def selector():
    return variable.make_selector(LABELS)


@pytest.fixture(scope="module")
def selections(selector):
    return [selector(key) for key in KEYS]


def fixed(alpha=0.0, beta=1.0, seed=0):
    """A generator whose draws of β and α are known, and which thins at random."""
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        random=lambda: 1.0 - beta,
        uniform=lambda low, high, count: np.full(count, alpha),
        multivariate_hypergeometric=rng.multivariate_hypergeometric,
    )


def test_an_episode_holds_the_right_number_of_different_examples_of_each_class(selections):
    for selection in selections:
        way, support, query = len(selection.classes), selection.support, selection.query
        assert len(set(selection.classes)) == way
        assert selection.shots.min() >= 1
        assert selection.shots.max() <= 20
        assert len(support) == selection.shots.sum() <= 200
        assert len(query) == 10 * way
        assert len(set(support) | set(query)) == len(support) + len(query)
        assert LABELS[support].tolist() == np.repeat(selection.classes, selection.shots).tolist()
        assert LABELS[query].tolist() == np.repeat(selection.classes, 10).tolist()


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=15), min_size=2, max_size=12),
    ways=st.sets(st.integers(2, 12), min_size=1),
    mean_shots=st.sets(st.integers(2, 9)),
    max_shot=st.integers(1, 9),
    max_query_shot=st.integers(1, 5),
    data=st.data(),
)
def test_any_data_set_and_any_bounds(sizes, ways, mean_shots, max_shot, max_query_shot, data):
    """`sizes` are those of the groups of every class."""
    ways = {way for way in ways if way <= len(sizes)} or {2}
    max_support = data.draw(st.integers(max(ways), 40))
    counts = [len(of_class) for of_class in sizes]
    groups = np.repeat(np.arange(sum(counts)), np.concatenate(sizes))
    labels = np.repeat(np.arange(len(sizes)), [sum(of_class) for of_class in sizes])
    order = np.random.default_rng(data.draw(st.integers(0, 100))).permutation(len(labels))
    labels, groups = labels[order], groups[order]
    select = variable.make_selector(
        labels,
        groups=groups,
        ways=ways,
        mean_shots={1, *mean_shots},
        max_shot=max_shot,
        max_support=max_support,
        max_query_shot=max_query_shot,
    )
    selection = select(KEYS[data.draw(st.integers(0, len(KEYS) - 1))])
    way, chosen = len(selection.classes), np.concatenate([selection.support, selection.query])
    assert way in ways
    assert selection.query_shot == min(max_query_shot, min(counts) // 2)
    assert len(set(selection.classes)) == way
    assert len(set(groups[chosen])) == len(chosen)
    assert 1 <= selection.shots.min() <= selection.shots.max() <= max_shot
    assert len(selection.support) == selection.shots.sum() <= max_support
    assert selection.shots.sum() in {way * mean for mean in {1, *mean_shots}}
    assert labels[selection.support].tolist() == np.repeat(selection.classes, selection.shots).tolist()
    assert labels[selection.query].tolist() == np.repeat(selection.classes, selection.query_shot).tolist()


def test_ways_are_uniform_and_classes_too(selections):
    ways = np.array([len(selection.classes) for selection in selections])
    counts = np.bincount(ways, minlength=21)
    assert counts[:5].sum() == 0
    assert stats.chisquare(counts[5:]).pvalue > 0.01
    drawn = np.bincount(np.concatenate([selection.classes for selection in selections]) - 100, minlength=25)
    assert stats.chisquare(drawn).pvalue > 0.01
    first = np.bincount([selection.classes[0] - 100 for selection in selections], minlength=25)
    assert stats.chisquare(first).pvalue > 0.01  # the label of a class says nothing of it


def test_support_sets_are_unbalanced_and_favour_large_classes(selections):
    large = [s for s in selections if len(s.support) >= 4 * len(s.classes)]
    assert np.mean([len(set(s.shots)) > 1 for s in large]) > 0.95
    of_small, of_large = (
        np.concatenate([s.shots[(s.classes < 108) if small else (s.classes >= 117)] for s in large]).mean()
        for small in (True, False)
    )
    assert of_large > 1.3 * of_small


def test_shots_by_hand():
    # q = 10; rooms 20 and 20, s = 40, shares 0.4 and 0.6 of the 38 beyond one a class: 15.2 and 22.8, of which the
    # floors plus one are 16 and 23, and 23 exceeds the room of 20. The sum of 36 is 2 · 18.
    counts = np.array([40, 60])
    selector = variable.make_selector(np.repeat([0, 1], counts), ways=[2], mean_shots=(1, 18))
    assert selector._shots(fixed(), counts).tolist() == [16, 20]
    # β = 0.3 asks for ⌈6⌉ + ⌈6⌉ = 12: 0.4 · 10 and 0.6 · 10 plus one each, 12 = 2 · 6.
    selector = variable.make_selector(np.repeat([0, 1], counts), ways=[2], mean_shots=(1, 6))
    assert selector._shots(fixed(beta=0.299), counts).tolist() == [5, 7]
    # The bound of the support set comes before the shares: 0.4 · 8 and 0.6 · 8 plus one each are 4 and 5.
    selector = variable.make_selector(np.repeat([0, 1], counts), ways=[2], mean_shots=(1, 4), max_support=10)
    assert selector._shots(fixed(), counts).sum() == 8


def test_the_shares_of_classes_of_one_size_differ_by_up_to_four_times():
    # α is uniform between log ½ and log 2: two weights of equal classes differ by a factor of four at most.
    counts = np.full(2, 10_000)
    settings = {"ways": [2], "mean_shots": range(1, 1001), "max_shot": 2000, "max_support": 2000}
    selector = variable.make_selector(np.repeat([0, 1], counts), **settings)
    rng = np.random.default_rng(0)
    shots = np.array([selector._shots(rng, counts) for _ in range(2000)])
    ratios = np.exp(np.abs(np.log(shots[shots.sum(1) > 400]) @ np.array([1.0, -1.0])))
    assert 3.5 < ratios.max() < 4.1
    # The absolute difference of two numbers that are uniform in an interval is a third of its length in the mean.
    assert np.log(ratios).mean() == pytest.approx(np.log(4) / 3, rel=0.08)


def test_thinning_removes_all_but_the_first_example_of_a_class_with_equal_probability():
    # Of 16 and 20 examples, 36 in all, 8 stay: the first ones and 6 of the other 15 + 19.
    counts = np.array([40, 60])
    selector = variable.make_selector(np.repeat([0, 1], counts), ways=[2], mean_shots=(1, 4))
    rng = fixed()
    shots = np.array([selector._shots(rng, counts) for _ in range(2000)])
    assert set(shots.sum(1)) == {8}
    assert shots.min() >= 1
    np.testing.assert_allclose(shots.mean(0), [1 + 15 * 6 / 34, 1 + 19 * 6 / 34], atol=0.1)


def test_there_are_few_combinations_of_shapes():
    selector = variable.make_selector(LABELS, ways=(5, 10, 20), mean_shots=(1, 3, 9))
    shapes = collections.Counter((len(s.classes), len(s.support), len(s.query)) for s in map(selector, KEYS))
    assert set(shapes) == {(way, way * mean, way * 10) for way in (5, 10, 20) for mean in (1, 3, 9)}


def test_an_episode_depends_on_its_key_alone(selector):
    first, other = selector(KEYS[0]), selector(KEYS[1])
    again = variable.make_selector(LABELS.tolist())(KEYS[0])
    for name in ("classes", "shots", "support", "query"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.key == again.key).all()
    assert not np.array_equal(first.query, other.query)
    assert first.key != other.key


def test_the_episode_has_the_chosen_examples_and_labels_from_zero(selector):
    selection = selector(KEYS[0])
    values = np.arange(len(LABELS), dtype=np.float32)[:, None]
    support, query, key = selection.episode(values)
    np.testing.assert_array_equal(support.inputs[:, 0], selection.support)
    np.testing.assert_array_equal(query.inputs[:, 0], selection.query)
    assert support.targets.dtype == query.targets.dtype == np.int32
    np.testing.assert_array_equal(selection.classes[support.targets], LABELS[selection.support])
    np.testing.assert_array_equal(selection.classes[query.targets], LABELS[selection.query])
    assert key == selection.key
    pixels = selection.episode(np.full((len(LABELS), 2, 2, 1), 51, np.uint8)).support.inputs
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, 0.2)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_too_few_examples_are_refused(selector, convert):
    selection = selector(KEYS[0])
    last = max(*selection.support, *selection.query)
    selection.episode(convert(np.zeros(last + 1, np.float32)))
    with pytest.raises(ValueError, match=f"example {last} is chosen and there are {last}; give one for each"):
        selection.episode(convert(np.zeros(last, np.float32)))


def test_an_episode_has_one_member_of_a_group():
    # Three classes of 6 groups of 1 to 3 members; the numbers of groups are the same in all classes.
    labels = np.repeat(np.arange(3), 12)
    groups = np.tile([7, 1, 1, 3, 3, 3, 4, 5, 5, 6, 6, 6], 3)
    selector = variable.make_selector(labels, groups=groups, ways=[2, 3])
    assert selector.query_shot == 3
    drawn = collections.Counter()
    for key in KEYS:
        selection = selector(key)
        examples = np.concatenate([selection.support, selection.query])
        pairs = set(zip(labels[examples], groups[examples], strict=True))
        assert len(pairs) == len(examples)
        drawn.update(examples.tolist())
    assert set(drawn) == set(range(36))


def test_small_classes_can_be_left_out():
    labels = np.repeat(np.arange(4), [9, 30, 10, 30])
    selector = variable.make_selector(labels, min_examples=10, ways=[2, 3, 4])
    assert selector.classes.tolist() == [1, 2, 3]
    assert (selector.ways, selector.query_shot) == ((2, 3), 5)
    selection = selector(KEYS[0])
    assert set(labels[selection.support]) == set(selection.classes.tolist()) <= {1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": [6]}, "none of the ways"),
        ({"ways": [1]}, "a way must be an integer of at least 2"),
        ({"ways": [2], "mean_shots": [2, 4]}, "must hold 1"),
        ({"ways": [2], "max_shot": 0}, "max_shot"),
        ({"ways": [2], "max_query_shot": 0}, "max_query_shot"),
        ({"ways": [3], "max_support": 2}, "max_support=2 is less than the way 3"),
        ({"ways": [2], "groups": [1, 2]}, "2 groups and 12 labels"),
        ({"ways": [2], "groups": [0] * 12}, "class 0 has 1 example"),
        ({"ways": [2], "min_examples": 1}, "min_examples"),
        ({"ways": [2], "min_examples": 5}, "leaves out all classes; the largest has 4"),
        ({"labels": np.zeros(4), "ways": [2]}, "vector of integers"),
        ({"labels": [], "ways": [2]}, "vector of integers"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        variable.make_selector(**{"labels": np.repeat(np.arange(3), 4)} | settings)
