"""The images of a classification set of tensorflow-datasets, split by class, read without tensorflow.

The set must be prepared in the format array_record, which can be read in any order. Its own splits divide the examples
of every class and are put together; `load` divides the classes instead.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maml_jax.tasks.class_images import ClassImages, cached_classes, check_counts, default_cache_dir
from maml_jax.tasks.class_splits import check_split, make_split, read_split, write_split
from maml_jax.tasks.image_files import as_path, decode_images, pillow
from maml_jax.tasks.omniglot import default_data_dir, quiet_tfds
from maml_jax.types import check_integer

_AT_ONCE = 1000  # records; several times faster than one by one


def load(
    name: str,
    split: str,
    *,
    size: int,
    colour: bool = True,
    data_dir: str | os.PathLike | None = None,
    split_file: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    min_images: int = 1,
    parts: Sequence[str] = ("train", "validation", "test"),
) -> ClassImages:
    """Reads the images of one split; the next time they come from a cache.

    Images are treated, cached and verified as in `image_folder.load`. Examples without a label, which have the number
    -1, are not used. Without a split file the classes are divided by `make_split` with seed 0, and the division is
    written down as `<name>-<version>-split.json` in the cache folder, which is read from then on.

    Args:
      name: of the set, such as "cifar100", "name/config" or "name:1.0.0".
      split: "train", "val" or "test", disjoint sets of classes.
      size: H, the height and width of the images.
      colour: whether the images have 3 channels, RGB, and not 1, grey.
      data_dir: the data directory of tensorflow-datasets; by default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      split_file: which classes belong to which split; see `image_folder.write_split`. Classes that it does not name are
        not used.
      cache_dir: where the cache is; by default `$XDG_CACHE_HOME/maml_jax/images`, else `~/.cache/maml_jax/images`.
      min_images: how many images every class must have.
      parts: the splits that the set itself has and that are read, as far as they exist.

    Returns:
      The classes of the split, sorted by name, with uint8 images [n_c, size, size, 3 or 1] in the order of the records.

    Raises:
      FileNotFoundError: if the set is not there or not prepared.
      ModuleNotFoundError: if tensorflow-datasets or Pillow is not installed.
      OSError: if a file cannot be read, or the cache cannot be written.
      ValueError: if an argument has no possible value, the set has another format, no image or no label, or is damaged,
        or a class is missing or too small.
    """
    split, min_images = check_split(split), check_integer("min_images", min_images, at_least=1)
    data_dir = default_data_dir() if data_dir is None else as_path("data_dir", data_dir)
    cache_dir = default_cache_dir() if cache_dir is None else as_path("cache_dir", cache_dir)
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise ValueError(f"parts must be a list of names such as ['train', 'test'], got {parts!r}")
    if len(set(parts)) < len(parts):
        raise ValueError(f"parts={list(parts)} names one twice, whose images would be in a class twice; name each once")
    builder = _find(name, data_dir)
    image, label = _features(builder)
    names = _names(builder, label)
    chosen = [part for part in parts if part in builder.info.splits]
    if not chosen:
        raise ValueError(f"{builder.data_dir} has none of the parts {list(parts)}; it has {list(builder.info.splits)}")
    members = _members(builder, names, cache_dir, None if split_file is None else as_path("split_file", split_file))
    if not members[split]:
        raise ValueError(f"the split of {builder.data_dir} has no classes in {split!r}; give another split_file")

    def make() -> tuple[dict[str, int], Iterator[np.ndarray]]:
        pillow()
        records: dict[str, list[tuple[str, int]]] = {of_class: [] for of_class in sorted(members[split])}
        for part in chosen:
            for index, example in _examples(builder, image, part):
                number = example[label]
                if number >= len(names):
                    raise ValueError(f"record {index} of {part!r} in {builder.data_dir} has the unknown label {number}")
                if number >= 0 and names[number] in records:
                    records[names[number]].append((part, index))
        counts = {of_class: len(found) for of_class, found in records.items()}
        if empty := [of_class for of_class, count in counts.items() if not count]:
            raise ValueError(
                f"{len(empty)} of {len(counts)} classes of {builder.data_dir} have no image in {chosen}, such as "
                f"{empty[0]!r}; read more parts, or leave these classes out by a split_file (in the experiments "
                "--split-file)"
            )
        check_counts(counts, min_images, str(builder.data_dir))
        return counts, decode_images(_contents(builder, image, records), size, colour)

    classes = cached_classes(
        cache_dir,
        f"{builder.name}-{split}",
        {"source": _fingerprint(builder), "parts": chosen, "classes": sorted(members[split])},
        make,
        size=size,
        colour=colour,
    )
    counts = {of_class: len(images) for of_class, images in zip(*classes, strict=True)}
    check_counts(counts, min_images, str(builder.data_dir))
    return classes


def _find(name: str, data_dir: Path) -> Any:
    """The builder of a prepared set."""
    try:
        import tensorflow_datasets as tfds  # slow to import
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading sets of tensorflow-datasets needs the package; install it with `pip install "
            "tensorflow-datasets importlib_resources pillow`"
        ) from error
    if not isinstance(name, str):
        raise ValueError(f"name must be that of a set of tensorflow-datasets, got {name!r}")
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"there is no data directory {data_dir}; give data_dir (in the experiments --data-dir) or set TFDS_DATA_DIR"
        )
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        there = data_dir / name.split("/")[0].split(":")[0]
        raise FileNotFoundError(
            f"{there} is there but holds no set {name!r} that is prepared to the end; prepare it again, or name its "
            "config or version"
            if there.exists()
            else f"there is no set {name!r} in {data_dir}; prepare it there with `tfds build {name} "
            "--file_format=array_record`, which needs tensorflow"
        ) from None
    except Exception as error:  # a malformed name or damaged metadata; tensorflow-datasets and protobuf share no class
        raise ValueError(
            f"the set {name!r} in {data_dir} cannot be opened ({type(error).__name__}: {_first_line(error)}); correct "
            "its name or prepare it again"
        ) from error
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{builder.data_dir} is prepared as {builder.info.file_format.value}, which can only be read with "
            "tensorflow; prepare it with `--file_format=array_record`"
        )
    return builder


def _features(builder: Any) -> tuple[str, str]:
    """The names of the image and of the label: the supervised keys, else the only ones of their kinds."""
    import tensorflow_datasets as tfds

    def only(kind: str, expected: type) -> str:
        features = builder.info.features
        found = sorted(key for key, feature in features.items() if type(feature) is expected)
        supervised = [key for key in builder.info.supervised_keys or () if key in found]
        if len(supervised or found) != 1:
            raise ValueError(
                f"{builder.data_dir} has {len(found)} {kind} features {found}, and must have one, or name one in its "
                f"supervised keys; its features are {sorted(features)}"
            )
        return (supervised or found)[0]

    if not isinstance(builder.info.features, tfds.features.FeaturesDict):
        raise ValueError(f"{builder.data_dir} has no features with names, and so no image; choose another set")
    image, label = only("image", tfds.features.Image), only("label", tfds.features.ClassLabel)
    if builder.info.features[image].np_dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{builder.data_dir} has images of {builder.info.features[image].np_dtype}; choose a set of uint8"
        )
    return image, label


def _names(builder: Any, label: str) -> list[str]:
    """The names of the classes; numbers if they have none."""
    feature = builder.info.features[label]
    names = feature.names or [str(number) for number in range(feature.num_classes or 0)]
    if len(set(names)) != feature.num_classes:
        raise ValueError(
            f"{builder.data_dir} has {len(set(names))} names of {feature.num_classes} classes; prepare it again"
        )
    return names


def _members(builder: Any, names: Sequence[str], cache_dir: Path, split_file: Path | None) -> dict[str, list[str]]:
    """The classes of every split, from a file that is made if none is given."""
    if split_file is None:
        split_file = cache_dir / f"{builder.info.full_name.replace('/', '-')}-split.json"
        if not split_file.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # made by another process in the meantime, and the same
                write_split(split_file, make_split(names))
    members = read_split(split_file)
    if missing := sorted({of_class for split in members.values() for of_class in split} - set(names)):
        raise ValueError(
            f"{len(missing)} classes of the split file {split_file} are not in {builder.data_dir}, such as "
            f"{missing[0]!r}; correct their names"
        )
    return members


def _examples(builder: Any, image: str, part: str, indices: Sequence[int] | None = None) -> Iterator[tuple[int, dict]]:
    """The examples of a part of the set, all or those with some indices; images are bytes as they are stored."""
    import tensorflow_datasets as tfds

    with quiet_tfds():
        try:
            source = builder.as_data_source(part, decoders={image: tfds.decode.SkipDecoding()})
            indices = range(len(source)) if indices is None else indices
            for start in range(0, len(indices), _AT_ONCE):
                batch = indices[start : start + _AT_ONCE]
                yield from zip(batch, source.__getitems__(batch), strict=True)
        except (GeneratorExit, ModuleNotFoundError):
            raise
        except Exception as error:  # tensorflow-datasets, array_record and protobuf share no class
            raise ValueError(
                f"the set at {builder.data_dir} is damaged ({type(error).__name__}: {_first_line(error)}); prepare it "
                "again"
            ) from error


def _contents(builder: Any, image: str, records: dict[str, list[tuple[str, int]]]) -> Iterator[tuple[str, bytes]]:
    """What every image is called in messages, and its bytes, class after class."""
    for found in records.values():
        for part in dict.fromkeys(part for part, _ in found):
            for index, example in _examples(builder, image, part, [index for of, index in found if of == part]):
                yield f"record {index} of {part!r} in {builder.data_dir}", example[image]


def _fingerprint(builder: Any) -> str:
    """A checksum of the place of the set and of the names, sizes and times of its files."""
    directory = Path(builder.data_dir)
    files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in directory.iterdir())
    return hashlib.sha256(json.dumps([str(directory.resolve()), files]).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
