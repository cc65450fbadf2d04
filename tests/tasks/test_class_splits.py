"""Splits of classes are disjoint, the same everywhere, and checked when they are read."""

import pytest
from photographs import write_json

from maml_jax.tasks.class_splits import make_split, read_split, write_split

NAMES = [f"class {i}" for i in range(100)]


def test_a_split_has_every_class_once_in_the_proportions_of_mini_imagenet():
    split = make_split(NAMES)
    assert [len(names) for names in split.values()] == [64, 16, 20]
    assert sorted(name for names in split.values() for name in names) == sorted(NAMES)
    assert all(names == sorted(names) for names in split.values())


def test_a_split_depends_on_names_and_seed_alone():
    assert make_split(NAMES) == make_split(NAMES[::-1])
    assert make_split(NAMES) != make_split(NAMES, seed=1)
    # Written down, so that no version changes it.
    assert make_split(list("abcdefghij"), fractions=(0.5, 0.2, 0.3)) == {
        "train": ["c", "e", "f", "g", "h"],
        "val": ["a", "b"],
        "test": ["d", "i", "j"],
    }


def test_a_class_that_is_added_does_not_mix_the_others():
    before, after = make_split(NAMES), make_split([*NAMES, "another"])
    moved = sum(len(set(before[name]) - set(after[name])) for name in before)
    assert moved <= 2  # one over each border


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "b", "a"], {}, "names has the class 'a' twice"),
        ("abcdef", {}, "names must be a list of names of classes"),
        (["a", 1], {}, "names must be a list of names of classes"),
        (["a", "b"], {}, "2 classes are too few for fractions=.*: 'val' would be empty"),
        (NAMES, {"fractions": (0.5, 0.5)}, "fractions must be three numbers"),
        (NAMES, {"fractions": (0.5, 0.6, -0.1)}, "fractions must be three numbers"),
        (NAMES, {"fractions": (0.5, 0.5, 0.5)}, "with the sum 1"),
        (NAMES, {"seed": 0.5}, "seed must be an integer of at least 0, got 0.5"),
    ],
)
def test_what_cannot_be_split_is_refused(names, options, message):
    with pytest.raises(ValueError, match=message):
        make_split(names, **options)


def test_a_split_may_have_no_validation():
    assert make_split(["a", "b"], fractions=(0.5, 0, 0.5))["val"] == []


def test_counts_that_are_both_rounded_up_do_not_exceed_the_classes():
    split = make_split([f"class {n}" for n in range(7)], fractions=(0.0, 0.5, 0.5))
    assert [len(split[name]) for name in ("train", "val", "test")] == [0, 4, 3]


def test_a_split_is_written_once_and_read_back(tmp_path):
    write_split(tmp_path / "split.json", make_split(NAMES))
    assert read_split(tmp_path / "split.json") == make_split(NAMES)
    with pytest.raises(FileExistsError, match=r"split\.json exists and is not overwritten"):
        write_split(tmp_path / "split.json", make_split(NAMES, seed=1))
    assert read_split(tmp_path / "split.json") == make_split(NAMES)
    with pytest.raises(ValueError, match="split has the class 'a' in two splits"):
        write_split(tmp_path / "other.json", {"train": ["a"], "val": [], "test": ["a"]})
    assert [file.name for file in tmp_path.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["a"], "val": ["b"]}, r'must be \{"train": \[names of classes\]'),
        ({"train": ["a"], "val": "b", "test": []}, r"'val' of the split file .*s\.json must be a list of names"),
        ({"train": ["a", "a"], "val": [], "test": []}, r"'train' of the split file .* has the class 'a' twice"),
        ({"train": ["a"], "val": ["a"], "test": []}, r"s\.json has the class 'a' in two splits; leave it in one"),
        ([], r"s\.json must be"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_split(write_json(tmp_path / "s.json", content))


def test_a_missing_file_and_one_that_is_no_json_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no split file .*s\.json; make one"):
        read_split(tmp_path / "s.json")
    for content in (b"\xff", b"{", b"[" * 100_000):
        (tmp_path / "s.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"the split file .*s\.json is no JSON"):
            read_split(tmp_path / "s.json")
