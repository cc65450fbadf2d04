"""Small sets that are prepared here, without network and without tensorflow, come back by class."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from photographs import encoded, pixels, write_json

from maml_jax.tasks import omniglot
from maml_jax.tasks.class_splits import make_split
from maml_jax.tasks.tfds_classes import load

tfds = pytest.importorskip("tensorflow_datasets", reason="install the extra [experiments]")
OMNIGLOT = os.environ.get("TFDS_DATA_DIR")
NAMES = [f"class {i}" for i in range(8)]
COUNTS = [3, 1, 4, 2, 5, 1, 2, 3]
PARTS = ("train", "validation", "test")


def prepare(data_dir, name, features, examples, supervised_keys=None, file_format="array_record"):
    """Writes a set; `examples` maps a part of it to a list of examples."""

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="small",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised_keys,
            )

        def _split_generators(self, dl_manager):
            return {part: enumerate(of_part) for part, of_part in examples.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Small.name = name
    with contextlib.redirect_stdout(io.StringIO()):
        Small(data_dir=data_dir).download_and_prepare(file_format=file_format)


def image_feature():
    return tfds.features.Image(shape=(None, None, 3), encoding_format="png")


def drawn():
    """All images of every class, in no order, over the three parts; one has no label."""
    everything = [(c, i) for c in range(len(NAMES)) for i in range(COUNTS[c])]
    order = np.random.default_rng(0).permutation(len(everything))
    return [everything[i] for i in order]


NO_LABEL = drawn()[3]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    # The class labels are not sorted, as they need not be.
    label = tfds.features.ClassLabel(names=NAMES[::-1])
    examples = [
        {"image": io.BytesIO(encoded(pixels(c, i))), "label": NAMES[c], "coarse": f"{c % 2}"} for c, i in drawn()
    ]
    features = {"image": image_feature(), "label": label, "coarse": tfds.features.ClassLabel(names=["0", "1"])}
    examples[3]["label"] = -1  # as the test sets of contests have it
    parts = {"train": examples[:9], "test": examples[9:], "again": examples[:5]}
    for of_part in parts.values():
        for example in of_part:
            example["image"] = io.BytesIO(example["image"].getvalue())
    prepare(directory, "small", features, parts, ("image", "label"))
    one = {"image": io.BytesIO(encoded(pixels(0, 0))), "label": "a"}
    numbered = [{"image": io.BytesIO(encoded(pixels(c, 0))), "label": c} for c in (1, 0)]
    of_one = {"image": image_feature(), "label": tfds.features.ClassLabel(names=["a"])}
    prepare(directory, "numbers", {**of_one, "label": tfds.features.ClassLabel(num_classes=2)}, {"test": numbered})
    prepare(directory, "no_label", {"image": image_feature()}, {"train": [{"image": one["image"]}]})
    prepare(directory, "no_image", {"label": of_one["label"]}, {"train": [{"label": "a"}]})
    both = {"first": of_one["label"], "second": of_one["label"], "image": image_feature()}
    two = {"first": "a", "second": "a", "image": io.BytesIO(one["image"].getvalue())}
    prepare(directory, "two_labels", both, {"train": [two]})
    return directory


def told(images):
    """Class and number of every image."""
    return images[:, 0, 0, 0] // 20, images[:, 0, 0, 1] // 10


def test_every_class_has_all_its_images_from_all_parts_once(data_dir, tmp_path):
    seen = {}
    for split in ("train", "val", "test"):
        for _ in range(2):  # the second time from the cache
            found = load("small", split, size=8, data_dir=data_dir, cache_dir=tmp_path)
        assert found.names == tuple(sorted(make_split(NAMES)[split]))
        seen.update(zip(*found, strict=True))
    assert sorted(seen) == NAMES
    for c, name in enumerate(NAMES):
        classes, numbers = told(seen[name])
        assert set(classes) == {c}
        assert sorted(numbers) == [i for i in range(COUNTS[c]) if (c, i) != NO_LABEL]
        np.testing.assert_array_equal(seen[name][0], pixels(c, numbers[0]))


def test_the_split_is_written_down_and_read_from_then_on(data_dir, tmp_path):
    load("small", "val", size=8, data_dir=data_dir, cache_dir=tmp_path)
    file = tmp_path / "small-1.0.0-split.json"
    assert json.loads(file.read_text()) == make_split(NAMES)
    write_json(file, {"train": ["class 1"], "val": ["class 4"], "test": []})
    assert load("small", "val", size=8, data_dir=data_dir, cache_dir=tmp_path).names == ("class 4",)
    given = write_json(tmp_path / "given.json", {"train": ["class 2"], "val": [], "test": ["class 0"]})
    options = {"data_dir": data_dir, "cache_dir": tmp_path, "split_file": given}
    assert load("small", "train", size=8, **options).names == ("class 2",)
    with pytest.raises(ValueError, match=r"small/1\.0\.0 has no classes in 'val'"):
        load("small", "val", size=8, **options)
    write_json(given, {"train": ["class 9"], "val": [], "test": []})
    with pytest.raises(ValueError, match=r"1 classes of the split file .*given\.json are not in .*, such as 'class 9'"):
        load("small", "train", size=8, **options)


def test_parts_are_chosen_and_small_classes_refused(data_dir, tmp_path):
    everything = write_json(tmp_path / "s.json", {"train": NAMES, "val": [], "test": []})
    options = {"size": 8, "data_dir": data_dir, "cache_dir": tmp_path, "split_file": everything}
    assert sum(map(len, load("small", "train", **options).images)) == sum(COUNTS) - 1
    with pytest.raises(ValueError, match=r"of 8 classes of .*small/1\.0\.0 have no image in \['again'\].* split_file"):
        load("small", "train", **options, parts=["again"])
    with pytest.raises(ValueError, match=r"2 of 8 classes of .* have fewer than 2 images, such as 'class 1' with 1"):
        load("small", "train", **options, min_images=2)
    with pytest.raises(ValueError, match=r"has none of the parts \['val'\]; it has \['"):
        load("small", "train", **options, parts=["val"])
    with pytest.raises(ValueError, match=r"parts=\['test', 'test'\] names one twice"):
        load("small", "train", **options, parts=["test", "test"])
    with pytest.raises(ValueError, match=r"parts must be a list of names"):
        load("small", "train", **options, parts="train")


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("small", "label.labels.txt", "class 7\n", "class 6\n", r"small/1\.0\.0 has 7 names of 8 classes"),
        ("numbers", "features.json", '"2"', '"1"', r"record \d of 'test' in .*numbers/1\.0\.0 has the unknown label 1"),
    ],
)
def test_classes_that_do_not_fit_are_refused(data_dir, tmp_path, name, file, old, new, message):
    shutil.copytree(data_dir / name, tmp_path / name)
    path = tmp_path / name / "1.0.0" / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    split = write_json(tmp_path / "s.json", {"train": ["0"], "val": [], "test": []})
    with pytest.raises(ValueError, match=message):
        load(name, "train", size=8, data_dir=tmp_path, cache_dir=tmp_path / "cache", split_file=split)


def test_classes_without_names_are_called_by_their_numbers(data_dir, tmp_path):
    both = write_json(tmp_path / "s.json", {"train": ["1", "0"], "val": [], "test": []})
    found = load("numbers", "train", size=8, data_dir=data_dir, cache_dir=tmp_path, split_file=both)
    assert found.names == ("0", "1")
    np.testing.assert_array_equal(np.concatenate(found.images), [pixels(0, 0), pixels(1, 0)])


def test_grey_and_another_size(data_dir, tmp_path):
    found = load("small", "val", size=5, colour=False, data_dir=data_dir, cache_dir=tmp_path)
    assert {images.shape[1:] for images in found.images} == {(5, 5, 1)}


def test_it_loads_no_tensorflow(data_dir, tmp_path):
    code = f"""
import sys
from maml_jax.tasks.tfds_classes import load
load("small", "val", size=8, data_dir={str(data_dir)!r}, cache_dir={str(tmp_path)!r})
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothere", FileNotFoundError, r"there is no set 'nothere' in .*; prepare it there with `tfds build nothere"),
        ("small:2.0.0", FileNotFoundError, r"small is there but holds no set 'small:2\.0\.0' that is prepared"),
        ("small/config", FileNotFoundError, r"small is there but holds no set 'small/config'"),
        ("no name", ValueError, r"the set 'no name' in .* cannot be opened"),
        ("", ValueError, r"the set '' in .* cannot be opened"),
        (5, ValueError, r"name must be that of a set of tensorflow-datasets, got 5"),
        ("no_label", ValueError, r"no_label/1\.0\.0 has 0 label features \[\].*; its features are \['image'\]"),
        ("no_image", ValueError, r"no_image/1\.0\.0 has 0 image features"),
        ("two_labels", ValueError, r"two_labels/1\.0\.0 has 2 label features \['first', 'second'\], and must have one"),
    ],
)
def test_what_is_no_such_set_is_refused(data_dir, tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        load(name, "train", size=8, data_dir=data_dir, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_directory_and_a_wrong_split_are_refused(data_dir, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"there is no data directory .*none; give data_dir \(in the experiments --data-dir\)",
    ):
        load("small", "train", size=8, data_dir=tmp_path / "none")
    with pytest.raises(ValueError, match=r"unknown split 'validation'; choose one of train, val, test"):
        load("small", "validation", size=8, data_dir=data_dir)


def test_another_format_is_refused(data_dir, tmp_path):
    copy = tmp_path / "small" / "1.0.0"
    copy.mkdir(parents=True)
    for file in (data_dir / "small" / "1.0.0").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    info = json.loads((copy / "dataset_info.json").read_text())
    write_json(copy / "dataset_info.json", {**info, "fileFormat": "tfrecord"})
    with pytest.raises(
        ValueError, match=r"small/1\.0\.0 is prepared as tfrecord, which can only be read with tensorflow"
    ):
        load("small", "train", size=8, data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_30_damaged_sets_are_named(data_dir, tmp_path):
    rng = np.random.default_rng(0)
    copy = tmp_path / "small" / "1.0.0"
    copy.mkdir(parents=True)
    intact = {file.name: file.read_bytes() for file in (data_dir / "small" / "1.0.0").iterdir()}
    refused = 0
    for trial in range(30):
        for name, content in intact.items():
            (copy / name).write_bytes(content)
        name = sorted(intact)[trial % len(intact)]
        damaged = intact[name][: rng.integers(len(intact[name]))] if trial % 2 else rng.bytes(rng.integers(1, 200))
        (copy / name).write_bytes(damaged)
        try:
            found = load("small", "val", size=8, data_dir=tmp_path, cache_dir=tmp_path / f"cache {trial}")
        except (ValueError, OSError) as error:
            refused += 1
            message = str(error)
        else:
            message = f"{tmp_path}"
            numbers = [str(number) for number in range(len(NAMES))]  # if the names are lost
            assert found.names in [tuple(make_split(names)["val"]) for names in (NAMES, numbers)]
        assert str(tmp_path) in message
    assert refused > 10


@pytest.mark.skipif(not OMNIGLOT, reason="set TFDS_DATA_DIR to a data directory with omniglot/3.0.0")
def test_omniglot(tmp_path):
    names = omniglot.splits()["val"][:3]
    split_file = write_json(tmp_path / "s.json", {"train": names, "val": [], "test": []})
    found = load("omniglot", "train", size=105, colour=False, split_file=split_file, cache_dir=tmp_path)
    assert found.names == tuple(sorted(names))
    images = omniglot.load("val", Path(OMNIGLOT))
    for name, of_class in zip(*found, strict=True):
        small = sorted(omniglot.downscale_to_28(image[..., 0]).tobytes() for image in of_class)
        assert small == [image.tobytes() for image in images[names.index(name)]]
