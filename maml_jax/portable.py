"""A trained classifier in one `.npz` file: its parameters, and the configuration that builds the learner again.

The file holds float32 arrays and a text in JSON, so it is read without running any code that it contains.

    learner, params, config = load_learner("omniglot_maml.npz")
    task_params, info = jax.jit(learner.adapt)(params, Batch(images, labels))
    outputs = learner.predict(task_params, new_images)
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax import losses, models
from maml_jax._version import __version__
from maml_jax.algorithms import CATALOGUE, Problem
from maml_jax.types import (
    ArrayTree,
    Batch,
    MetaLearner,
    Model,
    PRNGKey,
    check_classes,
    check_integer,
    check_positive,
    learner_at,
    predict_beside_support,
    values_of,
)

INK = "ink 1.0, background 0.0"
"""`LearnerConfig.input_values` of a learner of drawings, as `tasks.drawings` reads them."""
PHOTOGRAPH = "black 0.0, white 1.0"
"""`LearnerConfig.input_values` of a learner of photographs, red, green and blue or grey, as `tasks.image_folder` reads
them."""
FORMAT = 1
"""The version of the file's content that this library writes, and the newest that it reads."""

_NETWORKS = ("conv4", "multi-scale")
_NORMS = {"batch": models.BatchStatNorm, "population": models.PopulationNorm}
_CONFIG, _PARAMS = "config", "params/"
_LAST_STEP = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """All that is needed to build a trained classifier again. The loss is the cross-entropy.

    Attributes:
      algorithm: its name in `CATALOGUE`.
      hyperparameters: those of the training, as fields of `CATALOGUE[algorithm].hyperparameters`.
      way: N, the number of classes. If the entry of the catalogue has `any_way`, it may be changed when the learner
        is built.
      inner_steps: inner gradient steps at test, or those of the fine-tuning; None for an algorithm without them.
      network: "conv4", or "multi-scale", which has no last layer, for algorithms that classify by embeddings.
      features: filters of each convolution.
      pooling: the geometry of `models.conv4`.
      flatten: whether its last layer sees all positions.
      norm: "batch" for `models.BatchStatNorm`, "population" for `models.PopulationNorm`.
      norm_scale: whether the normalisation has a scale beside its offset.
      epsilon: what it adds to the variance.
      adapt_norm: whether the inner loop also adapts its offsets and scales.
      input_shape: the shape of one input, [H, W, C].
      input_values: what the numbers of an input mean, such as `INK` or `PHOTOGRAPH`.
      made_by: how the parameters were made, such as the command, for people.
      library: the version of maml_jax that wrote the file.
    """

    algorithm: str
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    way: int
    inner_steps: int | None = None
    network: str = "conv4"
    features: int = 64
    pooling: bool = False
    flatten: bool = False
    norm: str = "batch"
    norm_scale: bool = False
    epsilon: float = 1e-3
    adapt_norm: bool = False
    input_shape: tuple[int, ...] = (28, 28, 1)
    input_values: str = INK
    made_by: str = ""
    library: str = __version__

    def __post_init__(self) -> None:
        """Raises ValueError for a value that cannot be; the message names it and the remedy."""
        _check_choice("algorithm", self.algorithm, CATALOGUE)
        _check_choice("network", self.network, _NETWORKS)
        if self.network == "multi-scale" and not CATALOGUE[self.algorithm].classifies:
            raise ValueError(f'the network "multi-scale" has no last layer, which {self.algorithm} needs; use "conv4"')
        _check_choice("norm", self.norm, _NORMS)
        check_integer("way", self.way, at_least=2)
        check_integer("features", self.features, at_least=1)
        for name in ("pooling", "flatten", "norm_scale", "adapt_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("input_values", "made_by", "library"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float):
            raise ValueError(f"epsilon must be a positive number, got {self.epsilon!r}")
        check_positive("epsilon", self.epsilon)
        if not isinstance(self.input_shape, tuple | list) or len(self.input_shape) != 3:
            raise ValueError(f"input_shape must be [height, width, channels], got {self.input_shape!r}")
        for size in self.input_shape:
            check_integer("a size of input_shape", size, at_least=1)
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        if not isinstance(self.hyperparameters, Mapping):
            raise ValueError(f"hyperparameters must be a record with names, got {self.hyperparameters!r}")
        object.__setattr__(self, "hyperparameters", dict(self.hyperparameters))
        self._check_inner_steps(self._hyperparameters())

    @property
    def any_way(self) -> bool:
        """Whether the same parameters work for any number of classes."""
        return CATALOGUE[self.algorithm].any_way

    def _hyperparameters(self) -> Any:
        """The hyperparameters as the dataclass of the algorithm."""
        record = CATALOGUE[self.algorithm].hyperparameters
        known = [field.name for field in dataclasses.fields(record)]
        if unknown := sorted(set(self.hyperparameters) - set(known)):
            raise ValueError(
                f"{self.algorithm} has no hyperparameter {unknown[0]!r}; it has {', '.join(known) or 'none'}"
            )
        try:
            return record(**self.hyperparameters)
        except TypeError as error:
            raise ValueError(
                f"hyperparameters {dict(self.hyperparameters)} do not fit {self.algorithm}: {error}"
            ) from None

    def _check_inner_steps(self, hyperparameters: Any) -> None:
        if not hasattr(hyperparameters, "num_inner_steps"):
            if self.inner_steps is not None:
                raise ValueError(
                    f"{self.algorithm} takes no inner steps; inner_steps={self.inner_steps!r} must be None"
                )
            return
        check_integer("inner_steps", self.inner_steps, at_least=0)
        if hyperparameters.num_inner_steps is None:
            raise ValueError("hyperparameters must say num_inner_steps, the number of inner steps in training")


class Portable(NamedTuple):
    """A trained classifier.

    Attributes:
      learner: with the inner steps of the test.
      params: the meta-parameters, float32 arrays.
      config: how the learner was built.
    """

    learner: MetaLearner
    params: ArrayTree
    config: LearnerConfig


def build_learner(config: LearnerConfig, *, way: int | None = None) -> MetaLearner:
    """Builds the learner that a configuration describes, with the inner steps of the test.

    Its objective is the one at the end of training.

    Args:
      config: the configuration.
      way: another number of classes; by default `config.way`.

    Raises:
      ValueError: if the algorithm cannot have another number of classes.
    """
    return _build(_with_way(config, way), config.inner_steps)


def save_learner(file: str | Path, params: ArrayTree, config: LearnerConfig, *, overwrite: bool = False) -> None:
    """Writes a trained classifier to one file.

    The file is written under another name and renamed when it is complete.

    Args:
      file: a name that ends in `.npz`. Its directory is made.
      params: the meta-parameters, float32 arrays in the structure that the learner of `config` has.
      config: how to build the learner.
      overwrite: whether an existing file is replaced.

    Raises:
      OSError: if the file cannot be written.
      ValueError: if the name does not end in `.npz`, the file exists, or the parameters do not fit `config` or are
        not finite. Nothing is written then.
    """
    file = Path(file).expanduser()
    if file.suffix != ".npz":
        raise ValueError(f"{file} must end in .npz")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} already exists and is not overwritten; delete it, or pass overwrite=True")
    arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(params).items()}
    _check_arrays(arrays, config, "the parameters")
    # Hyperparameters may be numbers of numpy.
    record = {"format": FORMAT} | dataclasses.asdict(config)
    text = json.dumps(record, indent=1, allow_nan=False, default=lambda number: number.item())
    content = {_CONFIG: np.array(text)} | {_PARAMS + name: array for name, array in arrays.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".learner-") as scratch:
        np.savez_compressed(Path(scratch) / file.name, **content)
        os.replace(Path(scratch) / file.name, file)


def load_learner(file: str | Path, *, way: int | None = None) -> Portable:
    """Reads what `save_learner` wrote.

    Args:
      file: its name.
      way: N, another number of classes, for algorithms such as ProtoNets whose parameters do not depend on it.

    Returns:
      The learner, its parameters and the configuration, with `way` in it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, was written by a newer version, names an unknown algorithm or network, or its
        arrays do not fit its configuration; or if the algorithm cannot have another `way`.
    """
    file = Path(file).expanduser()
    config, arrays = _read(file)
    try:
        config = _as_config(config)
    except ValueError as error:
        raise ValueError(
            f"{file} cannot be used: {error}. Get the file again, or install the version of maml_jax that wrote it"
        ) from None
    _check_arrays(arrays, config, str(file))
    config = _with_way(config, way)
    structure = jax.tree.structure(_expected(config))
    params = jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in _named_leaves(_expected(config))])
    return Portable(build_learner(config), params, config)


def outputs_by_step(
    learner: MetaLearner,
    params: ArrayTree,
    support: Batch,
    inputs: jax.Array,
    *,
    one_at_a_time: bool = True,
    key: PRNGKey | None = None,
) -> jax.Array:
    """Adapts to a support set and gives the outputs for new inputs before the first and after every inner step.

    Programs are compiled once for each learner and each combination of shapes, and the most recent ones are kept.

    Args:
      learner: the algorithm.
      params: its meta-parameters.
      support: the examples of the task, [S, ...], with class indices [S].
      inputs: new inputs [M, ...].
      one_at_a_time: whether each input goes through the network with only the support set beside it, so that the
        outputs do not depend on the other inputs. Otherwise all go through together, which makes a difference for
        normalisation by batch statistics.
      key: for a learner whose `adapt` needs one.

    Returns:
      The outputs, [K+1, M, N]; K = 0 for a learner without inner steps.
    """
    return _program(learner, one_at_a_time)(params, support, inputs, key)


def classify(loaded: Portable, support: Batch, inputs: jax.Array, *, one_at_a_time: bool = True) -> jax.Array:
    """Adapts to a support set and classifies new inputs.

    Args:
      loaded: from `load_learner`.
      support: floating inputs [S, H, W, C] and class indices [S], with at least one example of every class.
      inputs: new floating inputs [M, H, W, C].
      one_at_a_time: see `outputs_by_step`.

    Returns:
      The probability of each class, [M, N], by softmax. Learners whose outputs are cosines, as those of
      `pretrained_classifier` by centroids or neighbours and of `memory_module`, give probabilities that are close to
      each other.

    Raises:
      ValueError: if the shapes, the dtypes or the labels do not fit the learner, or the numbers are no pixels in [0, 1]
        and it was trained on such; numbers that are traced are not looked at.
    """
    support, inputs = Batch(*map(jnp.asarray, support)), jnp.asarray(inputs)
    for name, images in (("the support set", support.inputs), ("inputs", inputs)):
        if jnp.shape(images)[1:] != loaded.config.input_shape or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating images of shape {list(loaded.config.input_shape)} "
                f"({loaded.config.input_values}), got {images.dtype}{list(jnp.shape(images))}"
            )
        if loaded.config.input_values in (INK, PHOTOGRAPH) and (values := values_of(images)) is not None:
            least, most = float(np.min(values, initial=0.0)), float(np.max(values, initial=0.0))
            if not (least >= 0.0 and most <= 1.0):
                raise ValueError(
                    f"{name} must hold pixels from 0 to 1 ({loaded.config.input_values}), got numbers from {least:g} "
                    f"to {most:g}; divide bytes by 255, as tasks.drawings.as_inputs does"
                )
    if jnp.shape(support.targets) != jnp.shape(support.inputs)[:1]:
        raise ValueError(
            f"the support set must have one class index for each of its {len(support.inputs)} images, got targets of "
            f"shape {list(jnp.shape(support.targets))}"
        )
    check_classes(loaded.config.way, support.targets)
    outputs = outputs_by_step(loaded.learner, loaded.params, support, inputs, one_at_a_time=one_at_a_time)
    return jax.nn.softmax(outputs[-1])


@functools.lru_cache(maxsize=32)
def _program(learner: MetaLearner, one_at_a_time: bool) -> Callable[..., jax.Array]:
    def outputs(params, support, inputs, key):
        def observe(task_params):
            if one_at_a_time:
                return predict_beside_support(learner.predict, task_params, support.inputs, inputs)
            return learner.predict(task_params, inputs)

        return learner.adapt(params, support, key=key, observe_fn=observe)[1].observed

    return jax.jit(outputs)


def _check_choice(name: str, value: Any, choices: Mapping[str, Any] | tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {name} {value!r}; this version knows {', '.join(sorted(choices))}")


def _with_way(config: LearnerConfig, way: int | None) -> LearnerConfig:
    """The configuration for another number of classes."""
    if way is None or way == config.way:
        return config
    if not config.any_way:
        raise ValueError(
            f"way={way!r} is not possible: the last layer of this {config.algorithm} has {config.way} outputs, so a "
            f"task must have {config.way} classes. ProtoNets take any number"
        )
    return dataclasses.replace(config, way=way)


def _build(config: LearnerConfig, inner_steps: int | None) -> MetaLearner:
    """The learner with a number of inner steps."""
    norm = functools.partial(_NORMS[config.norm], scale=config.norm_scale, epsilon=config.epsilon)
    takes_context = config.algorithm == "cavia"

    def network(way: int | None) -> Model:
        if config.network == "multi-scale":
            return models.multi_scale(features=(config.features,) * 4, norm=norm)
        return models.conv4(
            way=way,
            features=config.features,
            pooling=config.pooling,
            flatten=config.flatten,
            norm=norm,
            context_block=2 if takes_context else None,
        )

    classifies = CATALOGUE[config.algorithm].classifies
    problem = Problem(
        network(None if classifies else config.way),
        losses.cross_entropy,
        where=None if config.adapt_norm else lambda name: "norm" not in name,
        head=lambda name: name.startswith("head"),
        norm=lambda name: "norm" in name,
        embedding=network(None) if classifies else None,
        way=config.way,
        takes_context=takes_context,
    )
    hyperparameters = config._hyperparameters()
    if inner_steps is not None:
        # Fine-tuning has steps of its own.
        name = "num_finetuning_steps" if getattr(hyperparameters, "head", "") == "fine-tuned" else "num_inner_steps"
        hyperparameters = dataclasses.replace(hyperparameters, **{name: inner_steps})
    return learner_at(CATALOGUE[config.algorithm].build(problem, hyperparameters), jnp.int32(_LAST_STEP))


def _expected(config: LearnerConfig) -> ArrayTree:
    """The shapes and dtypes of the parameters, which may depend on the inner steps of the training."""
    inputs = jax.ShapeDtypeStruct((config.way, *config.input_shape), jnp.float32)
    with jax.enable_x64(False):  # files hold float32
        return jax.eval_shape(_build(config, None).init, jax.random.key(0), inputs)


def _named_leaves(params: ArrayTree) -> dict[str, Any]:
    """The leaves by their path, such as "conv_0/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(array: Any) -> str:
    """Such as "float32[2, 3]"."""
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"


def _check_arrays(arrays: Mapping[str, np.ndarray], config: LearnerConfig, owner: str) -> None:
    """Raises ValueError unless the arrays are finite and the parameters of the learner of `config`."""
    expected = _named_leaves(_expected(config))
    for name in sorted(arrays.keys() | expected.keys()):
        found, wanted = _describe(arrays.get(name)), _describe(expected.get(name))
        if found != wanted:
            raise ValueError(
                f"{owner}: the array {name!r} is {found}, and the configuration ({config.algorithm}, {config.network}, "
                f"way={config.way}, features={config.features}, norm={config.norm!r}) needs {wanted}; give the "
                "parameters and the configuration of the same training"
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{owner}: the array {name!r} has values that are not finite; train again")


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration as it is in the file, and the arrays by name."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; `save_learner` writes such a file")
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:  # closes a damaged file too
            content = {name: archive[name] for name in archive.files}
        stored = json.loads(str(content.pop(_CONFIG)[()]))
        if not isinstance(stored, dict) or not all(name.startswith(_PARAMS) for name in content):
            raise ValueError("it has other content")
    except Exception as error:  # zipfile, zlib and numpy share no class
        raise ValueError(
            f"{file} is damaged or was not written by save_learner ({type(error).__name__}: {error}); get it again"
        ) from error
    version = stored.pop("format", None)
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{file} has format {version}, and maml_jax {__version__} reads up to {FORMAT}; install a newer maml_jax"
        )
    if version != FORMAT or isinstance(version, bool):
        raise ValueError(f"{file} has the unknown format {version!r}, and maml_jax writes {FORMAT}; get it again")
    return stored, {name.removeprefix(_PARAMS): array for name, array in content.items()}


def _as_config(stored: dict[str, Any]) -> LearnerConfig:
    known = {field.name for field in dataclasses.fields(LearnerConfig)}
    if unknown := sorted(stored.keys() - known):
        raise ValueError(f"its configuration has the unknown field {unknown[0]!r}")
    if missing := sorted(known - stored.keys()):
        raise ValueError(f"its configuration lacks the field {missing[0]!r}")
    return LearnerConfig(**stored)
