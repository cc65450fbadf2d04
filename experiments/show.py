"""Draws what adaptation does in a run: predictions before the first and after every inner step.

For sinusoids the curves, for images the support set and each query with the predicted class and its probability. A
learner without inner steps has one prediction. The episodes are the first ones of the test. For navigation the paths
before and after every update, and for mazes every walk.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.markup import escape

from experiments import classification, figures, pictures, runs
from experiments.cli import OptionalPath, Precision, check_seed, main
from experiments.retest import Run, image_sampler, open_run, sinusoid_learner
from experiments.runs import RunError, console
from maml_jax import CATALOGUE
from maml_jax.portable import outputs_by_step
from maml_jax.tasks import sinusoid as sinusoid_tasks
from maml_jax.types import ArrayTree, MetaLearner, SampleEpisodeFn, check_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is drawn."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The directory of a run of sinusoid, navigation or mazes, or of one that classifies images, also unfinished."""
    episodes: int = 3
    """Episodes; one figure each, as .png and as .pdf, or one row each of a figure of behaviour."""
    seed: int = 0
    """Seed of the episodes. Its episodes are the first ones of the test of a run with the same --seed; in navigation
    the goals are always the published ones."""
    out: OptionalPath = None
    """The directory for the figures; by default figures/ in the run directory."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        check_integer("--episodes", self.episodes, at_least=1)
        check_seed(self.seed)
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file; name a directory")


def run(config: Config) -> list[Path]:
    """Draws, prints what was written, and returns the files.

    Raises:
      RunError: if the run does not adapt, is no run directory or holds no checkpoint.
    """
    shown = open_run(config.run_dir)
    draw_behaviour = getattr(runs.experiment_of(config.run_dir), "draw_behaviour", None)
    if shown.data is None and shown.experiment != "sinusoid" and draw_behaviour is None:
        raise RunError(
            f"there are no pictures of runs of experiments.{shown.experiment}; give a run of experiments.sinusoid, "
            "experiments.navigation, experiments.mazes or of few-shot classification"
        )
    learner, params, _ = runs.load(config.run_dir)
    if draw_behaviour is not None:
        # The run itself has drawn behaviour.png, of its own seed and number of episodes.
        file = (config.out or config.run_dir / "figures") / f"behaviour_{config.seed}_{config.episodes}.png"
        draw_behaviour(file, shown.config, params, config.episodes, config.seed)
        console.print(f"figures: {escape(str(file))} and .pdf", highlight=False)
        return [file, file.with_suffix(".pdf")]
    draw = sinusoid_figure
    if shown.experiment == "sinusoid":
        learner = sinusoid_learner(shown, shown.config.eval_shots[0])
    else:
        draw = functools.partial(image_figure, samplers=image_samplers(shown))
    key = runs.streams(config.seed).test
    out = config.out or config.run_dir / "figures"
    written = []
    for index in range(config.episodes):
        files = [out / f"adaptation_{config.seed}_{index}{suffix}" for suffix in (".png", ".pdf")]
        words = draw(files, shown, learner, params, index, jax.random.fold_in(key, index))
        console.print(f"episode {index}: {words}", highlight=False)
        written += files
    console.print(f"figures: {escape(str(out))}/adaptation_{config.seed}_*.png and .pdf", highlight=False)
    return written


def course(values: Sequence[str]) -> str:
    """Numbers before the first and after the last inner step, in words."""
    if len(values) == 1:
        return values[0]
    return f"{values[0]} before, {values[-1]} after {len(values) - 1} step{'s' * (len(values) > 2)}"


def sinusoid_figure(
    files: Sequence[Path], shown: Run, learner: MetaLearner, params: ArrayTree, index: int, key: jax.Array
) -> str:
    """Draws a sinusoid.

    Args:
      files: the figures to write.
      shown: the run.
      learner: that of the test.
      params: the parameters that the run has selected.
      index: the number of the episode.
      key: the key of the episode.

    Returns:
      The errors in words.
    """
    config, shot = shown.config, shown.config.eval_shots[0]
    full = sinusoid_tasks.make_sampler(shot=shot, query_shot=config.eval_query_shot, oracle=True)(key)
    task = full.support.inputs[0, 1:]
    amplitude, phase = task.tolist()
    x = jnp.linspace(*sinusoid_tasks.INPUTS, 200)
    grid = jnp.concatenate([x[:, None], jnp.broadcast_to(task, (200, 2))], axis=1)

    def seen(inputs: jax.Array) -> jax.Array:
        return inputs if config.algorithm == "oracle" else inputs[:, :1]

    support, query = (batch._replace(inputs=seen(batch.inputs)) for batch in (full.support, full.query))
    predict = functools.partial(outputs_by_step, learner, params, support, one_at_a_time=False)
    of_support, of_query = (
        np.mean(np.square(np.asarray(predict(batch.inputs)) - np.asarray(batch.targets)), axis=(1, 2))
        for batch in (support, query)
    )
    title = f"sinusoid {index}: amplitude {amplitude:.1f}, phase {phase:.1f} radians, {shot} support points"
    pictures.adapting_curve(
        files,
        pictures.CurveTask(
            title=f"{figures.title(config.algorithm)}, {title}",
            x=np.asarray(x),
            true=amplitude * np.sin(np.asarray(x) - phase),
            support=(np.asarray(full.support.inputs[:, 0]), np.asarray(full.support.targets[:, 0])),
            predicted=np.asarray(predict(seen(grid)))[..., 0],
            support_error=of_support,
            query_error=of_query,
        ),
    )
    return f"mean squared error {course([f'{error:.3g}' for error in of_query])}"


def image_samplers(shown: Run) -> tuple[SampleEpisodeFn, SampleEpisodeFn]:
    """The episodes of the test, as the network sees them and as images."""
    config, data = shown.config, shown.data
    return classification.make_sampler(data, config, "test", config.way, config.shot), image_sampler(shown)


def image_figure(
    files: Sequence[Path],
    shown: Run,
    learner: MetaLearner,
    params: ArrayTree,
    index: int,
    key: jax.Array,
    *,
    samplers: tuple[SampleEpisodeFn, SampleEpisodeFn],
) -> str:
    """Draws an episode of images.

    Args:
      files: the figures to write.
      shown: the run.
      learner: that of the test.
      params: the parameters that the run has selected.
      index: the number of the episode.
      key: the key of the episode.
      samplers: as the network sees episodes, and as images.

    Returns:
      The accuracies in words.
    """
    config, data = shown.config, shown.data
    episode, images = (sampler(key) for sampler in samplers)
    outputs = outputs_by_step(
        learner,
        params,
        episode.support,
        episode.query.inputs,
        one_at_a_time=config.inductive,
        key=episode.key if CATALOGUE[config.algorithm].classifies else None,
    )
    labels = np.asarray(episode.query.targets)
    accuracies = [f"{100 * value:.0f} %" for value in (np.asarray(outputs).argmax(-1) == labels).mean(-1)]
    words = f"accuracy {course(accuracies)}"
    title = f"{data.title} episode {index}: {config.way}-way {config.shot}-shot"
    pictures.adapting_images(
        files,
        pictures.ImageTask(
            title=f"{figures.title(config.algorithm)}, {title}\n{words} on {len(labels)} queries",
            support_images=np.asarray(images.support.inputs),
            support_labels=np.asarray(images.support.targets),
            query_images=np.asarray(images.query.inputs),
            query_labels=labels,
            probabilities=np.asarray(jax.nn.softmax(outputs)),
            is_ink=shown.experiment == "omniglot",
        ),
    )
    return words


if __name__ == "__main__":
    main(Config, run, __doc__)
