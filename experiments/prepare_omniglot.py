"""Prepares the Omniglot drawings, once, for python -m experiments.omniglot.

Downloads the two zips of https://github.com/brendenlake/omniglot (16 MB), or takes them from a directory; writes them
as the dataset omniglot/3.0.0 of tensorflow-datasets, without tensorflow; and verifies all 32,460 drawings. It takes
half a minute.

On a machine with network: python -m experiments.prepare_omniglot

Without network, with the zips in directory Z: python -m experiments.prepare_omniglot --zips Z
"""

import dataclasses
from pathlib import Path

from experiments import common
from experiments.runs import console
from maml_jax.tasks import omniglot, omniglot_builder


@dataclasses.dataclass(frozen=True)
class Config:
    """Where from and where to."""

    data_dir: Path | None = None
    """The tensorflow-datasets directory to write omniglot/3.0.0 to; what is there is never overwritten.
    By default $TFDS_DATA_DIR, else ~/tensorflow_datasets. Give the experiment the same --data-dir."""
    zips: Path | None = None
    """A directory that holds images_background.zip and images_evaluation.zip.
    By default they are downloaded."""
    npz: Path | None = None
    """Also write all images to this .npz file, 1 MB, to carry to other machines.
    The experiment takes it as its --data-dir, and needs no tensorflow-datasets then.
    If the data are prepared already and --zips is not given, nothing else is done."""


def run(config: Config) -> None:
    """Prepares, verifies, and writes the `.npz` if asked to."""
    import tensorflow_datasets as tfds  # heavy, and not needed for --help

    tfds.disable_progress_bar()
    data_dir = config.data_dir or omniglot.default_data_dir()
    prepared = omniglot.prepared_dir(data_dir)
    if config.npz and not config.zips and prepared.exists():
        images = omniglot.read_tfds(data_dir)
        console.print(f"{prepared} was there, and is verified")
    else:
        console.print(f"preparing {prepared} from {config.zips or omniglot_builder.URL}")
        images = omniglot_builder.prepare(data_dir, config.zips)
        console.print(f"prepared and verified; use it with: python -m experiments.omniglot --data-dir {data_dir}")
    if config.npz:
        omniglot.save_npz(images, config.npz)
        console.print(f"wrote {config.npz}; use it with: python -m experiments.omniglot --data-dir {config.npz}")


if __name__ == "__main__":
    common.main(Config, run, __doc__)
