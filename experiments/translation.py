"""Translation into English from few sentences (MetaNMT, Gu et al., 2018, https://arxiv.org/abs/1808.08437).

A small network learns from several languages at once, and is then fine-tuned on a few hundred sentence pairs of a
language that it has never seen. `fomaml` is MetaNMT: one language an episode, an inner step of a fresh Adam, a
meta-gradient of first order. `pretrained` trains on as many pairs without inner steps, and with --num-meta-steps 0 it
is a network from scratch. The state of each is selected by a validation language.

The text is captions of photographs in 13 languages. The paper has Europarl, whose preparation was not published, so its
BLEU cannot be compared. After a training, `python -m experiments.translation translate RUN --text ...` translates.
"""

import dataclasses
import functools
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

from experiments import (
    bleu,
    common,
    figures,
    finetuning,
    intervals,
    low_resource,
    own_language,
    parallel_text,
    runs,
    seeds,
)
from experiments.cli import Precision, RunConfig, check_counts, check_seed, flag, main, with_defaults
from experiments.common import Training
from experiments.low_resource import Protocol, over_draws
from experiments.own_language import Network
from experiments.parallel_text import Corpus, Subwords, Text, TextSettings
from experiments.runs import RunError, console, stored_config
from maml_jax import Batch, InnerDescent, MetaLearner, NoHyperparameters, inner, losses, models, processes
from maml_jax.algorithms.maml_plus_plus import switch_at
from maml_jax.models import TASK_VECTORS, Lexicon, Sentences, Translator
from maml_jax.tasks import domains
from maml_jax.types import (
    ArrayTree,
    Episode,
    InnerInfo,
    LearnerOrSchedule,
    PRNGKey,
    check_integer,
    check_not_negative,
    check_positive,
    combine,
    partition,
)

VALIDATION_STEPS, VALIDATION_SUBSETS = 100, 2
"""Most steps of a fine-tuning on the validation language, and its draws."""
HEADS = 4
"""Heads of the attention of the transformer."""


@dataclasses.dataclass(frozen=True)
class AdamSteps(InnerDescent):
    """Hyperparameters of an inner loop of a fresh Adam."""

    inner_lr: float = 1e-3
    """Rate of the inner optimiser."""
    num_inner_steps: int = 1
    """Inner steps in training, each on pairs of its own; 1 in the authors' code."""
    inner_optimizer: Literal["adam", "sgd"] = "adam"
    """Inner optimiser; its state is new in every episode."""
    eps_root: float = 0.0
    """Added to Adam's second moments; 1e-8 for an exact meta-gradient, which is not finite where a gradient is 0."""

    def __post_init__(self) -> None:
        """Raises ValueError for a wrong rate or count."""
        super().__post_init__()
        check_not_negative("eps_root", self.eps_root)

    def rule(self) -> optax.GradientTransformation:
        """The inner optimiser."""
        if self.inner_optimizer == "sgd":
            return optax.sgd(self.inner_lr)
        return optax.adam(self.inner_lr, eps_root=self.eps_root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """The settings of one run. The paper's are those of a network that is a hundred times larger."""

    experiment: ClassVar[str] = "translation"

    sources: tuple[str, ...] = ("de", "fr", "es", "gn", "ay", "qu")
    """The languages that are trained on."""
    held_out: tuple[str, ...] = ("pt", "cs")
    """The languages of the test. Portuguese is near some of the sources, Czech is far from all."""
    validation: str = "uk"
    """The language that selects the state; it is neither trained on nor tested."""
    source_pairs: int = 12_000
    """Pairs of each source language, at most."""
    pool_lines: int = 4_000
    """The last lines of train.*, which the few sentences are drawn from. No training pair is of these lines."""
    max_subwords: int = 20
    """Training pairs have fewer subwords on each side. Sources of dev and test are cut to fewer than twice as many."""
    source_subwords: int = 6_000
    """Subwords of all source sides together, held-out languages included."""
    target_subwords: int = 1_500
    """Subwords of English."""
    shot: int = 32
    """Pairs of an inner step."""
    query_shot: int = 64
    """Pairs of the query set. Pretraining has only these."""
    network: Literal["transformer", "gru"] = "transformer"
    """A transformer of --depth layers on each side, or gated recurrent units with attention."""
    width: int = 64
    """Size of all vectors in the network; 512 in the paper."""
    depth: int = 2
    """Layers of the encoder and of the decoder; 6 in the paper."""
    lexical: bool = False
    """Whether source subwords are made of universal ones (universal lexical representation)."""
    vector_size: int = 64
    """Size of the fixed vectors that subwords get from the text of their language, with --lexical."""
    pretrain_steps: int = 0
    """The first meta-steps, which are pretraining: the loss of the query pairs without inner steps."""
    meta_batch_size: int = 2
    """Episodes per meta-step, each of one language; 1 in the authors' code."""
    num_meta_steps: int = 3470
    """Outer updates. A run may be continued with a larger number."""
    eval_episodes: Annotated[int, tyro.conf.Suppress] = 2
    val_every: int = 200
    """Meta-steps between validations; a checkpoint is written at each."""
    log_every: int = 20
    """Meta-steps in one compiled call, and between lines of metrics.jsonl; it divides --val-every."""
    sizes: tuple[int, ...] = (200, 600, 1350)
    """Sentence pairs of a held-out language that are fine-tuned on."""
    validation_pairs: int = 600
    """Sentence pairs of the validation language that are fine-tuned on, in two draws of at most 100 steps each."""
    num_subsets: int = 5
    """Draws of each size."""
    dev_pairs: int = 500
    """The first lines of val.*, which stop a fine-tuning."""
    finetune_lr: float = 5e-4
    """Rate of the Adam of the fine-tuning."""
    finetune_steps: int = 200
    """Most steps of a fine-tuning, a multiple of 20; the best of every 20 on the dev pairs is tested."""
    finetune_batch: int = 32
    """Pairs of a step of the fine-tuning."""
    beam: int = 4
    """Width of a beam search. It translates with the first draw of each size; all draws are translated greedily."""
    data_dir: Path | None = None
    """Directory or zip with files train.LANGUAGE, val.LANGUAGE, test.LANGUAGE, line i of each a translation of line i
    of the .en file; by default captions13.zip in $MAML_JAX_PACKS."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        positive = (
            "source_pairs", "pool_lines", "width", "depth", "vector_size", "num_subsets", "dev_pairs",
            "validation_pairs", "finetune_batch", "beam",
        )  # fmt: skip
        least = {"max_subwords": 3, "source_subwords": 8, "target_subwords": 8, "finetune_steps": finetuning.EVERY}
        check_counts(self, **dict.fromkeys(positive, 1), **least, pretrain_steps=0)
        check_positive("--finetune-lr", self.finetune_lr)
        for size in self.sizes:
            check_integer("--sizes", size, at_least=1)
        for name in ("sources", "held_out", "sizes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{flag(name)} {' '.join(map(str, values))} must be one or more, each once")
        if sorted(self.sizes) != list(self.sizes):
            raise ValueError(f"--sizes {' '.join(map(str, self.sizes))} must be in increasing order")
        if self.network == "transformer" and self.width % HEADS:
            raise ValueError(f"--width {self.width} must be a multiple of {HEADS}, the heads of the attention")
        if self.lexical and self.vector_size >= min(self.source_subwords, self.target_subwords):
            raise ValueError(
                f"--vector-size {self.vector_size} must be smaller than --source-subwords {self.source_subwords} and "
                f"--target-subwords {self.target_subwords}"
            )
        if self.finetune_steps % finetuning.EVERY:
            raise ValueError(f"--finetune-steps {self.finetune_steps} must be a multiple of {finetuning.EVERY}")
        roles = {"--sources": self.sources, "--held-out": self.held_out, "--validation": (self.validation,)}
        seen = {parallel_text.ENGLISH: "the target language"}
        for role, names in roles.items():
            for name in names:
                if name in seen:
                    raise ValueError(f"{role} {name} is {seen[name]} too; a language has one part in a run")
                seen[name] = role
        if self.pretrain_steps and self.algorithm == "pretrained":
            raise ValueError("--pretrain-steps is for methods with inner steps; pretrained has none")
        if self.pretrain_steps and self.pretrain_steps >= self.num_meta_steps:
            raise ValueError(
                f"--pretrain-steps {self.pretrain_steps} leave no step of --num-meta-steps {self.num_meta_steps} to "
                f"{self.algorithm}; choose fewer, or the method pretrained"
            )


METHODS = {
    "fomaml": Config(algorithm="fomaml", hyperparameters=AdamSteps()),
    "maml": Config(algorithm="maml", hyperparameters=AdamSteps(eps_root=1e-8)),
    "pretrained": Config(algorithm="pretrained", hyperparameters=NoHyperparameters(), num_meta_steps=5200),
}


def about() -> dict[str, str]:
    """A line on each method for --help."""
    return {
        "fomaml": "MetaNMT: first order, one fresh Adam step. No published number fits these data.",
        "maml": "The same with the exact meta-gradient.",
        "pretrained": "Multilingual pretraining, without inner steps.",
    }


def with_paper_defaults(config: Config) -> Config:
    """Fills in what depends on other settings."""
    parts = [config.algorithm, *["lexical"] * config.lexical, *["gru"] * (config.network == "gru"), str(config.seed)]
    return with_defaults(config, {"run_dir": Path(f"runs/translation-{'-'.join(parts)}")})


def text_of(config: Config) -> Text:
    """Reads the text of some settings, once in a process.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the text does not fit the settings.
    """
    settings = TextSettings(
        path=Corpus.find(config.data_dir).path,
        length=config.max_subwords,
        test_length=2 * config.max_subwords,
        vector_size=config.vector_size if config.lexical else None,
        **{
            name: getattr(config, name)
            for name in (
                "sources", "held_out", "validation", "source_pairs", "pool_lines", "dev_pairs", "source_subwords",
                "target_subwords",
            )
        },
    )  # fmt: skip
    text = parallel_text.read(settings)
    needed = dict.fromkeys(config.held_out, ("--sizes", config.sizes[-1]))
    needed[config.validation] = "--validation-pairs", config.validation_pairs
    for language, (name, count) in needed.items():
        found = len(text.languages[language].pool.source)
        if found < count:
            raise ValueError(
                f"{count} pairs of {language} are wanted and the last {config.pool_lines:,} lines have {found} of at "
                f"most {config.max_subwords - 1} subwords; keep more by --pool-lines, or choose fewer by {name}"
            )
    return text


def make_translator(config: Config, keys: np.ndarray | None) -> Translator:
    """The network; `keys` [M, Q] are those of a lexical representation."""
    sizes = {"source_vocabulary": config.source_subwords, "target_vocabulary": config.target_subwords}
    sizes |= {"width": config.width, "lexicon": None if keys is None else Lexicon(keys)}
    if config.network == "gru":
        return models.gru_translator(**sizes)
    return models.transformer_translator(depth=config.depth, heads=HEADS, **sizes)


def make_learner(config: Config, translator: Translator) -> LearnerOrSchedule:
    """MAML of first or second order with data of its own for each inner step, or its pretraining."""
    is_pretrained = config.algorithm == "pretrained"
    num_inner_steps = 0 if is_pretrained else config.hyperparameters.num_inner_steps
    rule = optax.identity() if is_pretrained else config.hyperparameters.rule()
    learner = inner.gradient_based(
        translator.model,
        losses.masked_cross_entropy,
        rule=lambda _: rule,
        num_inner_steps=num_inner_steps,
        start=_start,
        where=finetuning.adapts,
        inner_grad=inner.first_order if config.algorithm == "fomaml" else inner.mixed_mode,
        data_per_step=True,
    )
    if not config.pretrain_steps:
        return learner

    def without_inner_steps(meta_params: ArrayTree, episode: Episode) -> tuple[jax.Array, InnerInfo]:
        outputs = translator.model.apply(_start(meta_params), episode.query.inputs)
        return losses.masked_cross_entropy(outputs, episode.query.targets), InnerInfo(jnp.zeros(num_inner_steps))

    before = learner._replace(objective=without_inner_steps)
    return lambda step: switch_at(config.pretrain_steps, step, before, learner)


def _start(meta_params: ArrayTree) -> ArrayTree:
    """Where a task starts: its own vectors of subwords are 0, and are not meta-learned."""
    own, others = partition(meta_params, lambda name, _: name.endswith(TASK_VECTORS))
    return combine(jax.lax.stop_gradient(own), others)


def _model_inputs(config: Config) -> ArrayTree:
    """Inputs of which only the shapes matter."""
    length = config.max_subwords
    vectors = np.zeros((1, length, config.vector_size), np.float32) if config.lexical else None
    return Sentences(np.zeros((1, length), np.int32), vectors), np.zeros((1, length), np.int32)


def _episode(sample_episode: Any, vectors: jax.Array | None, key: PRNGKey) -> Episode:
    """An episode of one language, with the vectors [languages, V, Q] of its subwords."""

    def convert(batch: Batch) -> Batch:
        (source, language), target = batch
        found = None if vectors is None else vectors[language[..., None], source]
        return finetuning.as_batch(parallel_text.Pairs(source, target), found)

    episode = sample_episode(key)
    return episode._replace(support=convert(episode.support), query=convert(episode.query))


class Setup(NamedTuple):
    """What is trained, with the network that translates."""

    text: Text
    translator: Translator
    training: Training


def setup_of(config: Config) -> Setup:
    """What is trained, and how it is validated, at settings without gaps; the same for all seeds."""
    return _setup_of(dataclasses.replace(config, seed=0, seeds=1, run_dir=None))


@functools.lru_cache(maxsize=2)
def _setup_of(config: Config) -> Setup:
    text = text_of(config)
    translator = make_translator(config, text.keys)
    examples = [
        Batch((pairs.source, np.full(len(pairs.source), place, np.int32)), pairs.target)
        for place, pairs in enumerate(text.sources.values())
    ]
    sampler = domains.make_single_domain_sampler(
        examples,
        num_inner_steps=getattr(config.hyperparameters, "num_inner_steps", 0),
        shot=config.shot,
        query_shot=config.query_shot,
    )
    vectors = None if text.vectors is None else jnp.asarray(text.vectors)
    validation = [text.languages[config.validation]]
    jobs = finetuning.jobs_of(validation, (config.validation_pairs,), VALIDATION_SUBSETS, text.keys)

    def validate(params: ArrayTree) -> float:
        tuned = finetuning.fine_tune_all(translator, fine_tuning(config, VALIDATION_STEPS), params, validation, jobs)
        return -float(np.mean(tuned.loss))

    training = Training(
        make_learner(config, translator),
        jax.tree_util.Partial(_episode, sampler, vectors),
        validate,
        inputs=_model_inputs(config),
        keep=functools.partial(keep_text, text=text),
    )
    return Setup(text, translator, training)


def fine_tuning(config: Config, steps: int) -> finetuning.FineTuning:
    """A fine-tuning of at most so many steps."""
    return finetuning.FineTuning(rate=config.finetune_lr, steps=steps, batch_size=config.finetune_batch)


def training_of(config: Config) -> Training:
    """What is trained, and how it is validated."""
    return setup_of(config).training


def keep_text(run_dir: Path, text: Text) -> None:
    """Writes the subwords, and the vectors of the English ones, into a run directory, so that it needs no other file.

    Process 0 does it for all processes.

    Raises:
      RunError: if the run was made with another text, or other subwords.
      ProcessError: in the other processes, if process 0 raises.
    """
    with processes.watchdog("keeping the text", runs.PROCESS_TIMEOUT_SECONDS):
        processes.on_process_zero(lambda: _keep(run_dir / "text", text))


def _keep(directory: Path, text: Text) -> None:
    directory.mkdir(exist_ok=True)
    contents = {f"{side}.model": model for side, model in text.subwords._asdict().items()}
    contents["sha256"] = text.digest.encode()
    if text.keys is not None:
        stream = io.BytesIO()
        np.save(stream, text.keys)
        contents["keys.npy"] = stream.getvalue()
    for name, content in contents.items():
        file = directory / name
        if not file.exists():
            partial = file.with_name(file.name + ".partial")
            partial.write_bytes(content)
            partial.replace(file)
        elif file.read_bytes() != content:
            raise RunError(
                f"{file} is not what the text gives now; choose another --run-dir, or the text and the versions of "
                "sentencepiece and scipy that the run was begun with"
            )


def test(config: Config, setup: Setup, states: dict[str, tuple[int, ArrayTree]]) -> dict[str, Any]:
    """Fine-tunes and tests parameters on the held-out languages.

    Args:
      config: the settings.
      setup: what was trained.
      states: by name the step and the parameters. The first one gives the metrics, and is tested by beam search too.
    """
    rows, examples, first = [], [], next(iter(states))
    protocol = Protocol(
        languages=config.held_out,
        sizes=config.sizes,
        num_subsets=config.num_subsets,
        how=fine_tuning(config, config.finetune_steps),
        max_length=2 * config.max_subwords,
    )
    for state, (step, params) in states.items():
        beam = config.beam if state == first else 1
        found, translated = low_resource.evaluate(protocol, setup.text, setup.translator, params, beam=beam)
        rows += [{"state": state, "step": step} | row for row in found]
        examples = examples or translated
    chosen = [row for row in rows if row["state"] == first and row["pairs"]]
    metrics = {name: over_draws([row[name] for row in chosen]) for name in ("nll", "bleu")}
    return {"metrics": metrics, "evaluations": rows, "examples": examples}


def states_of(config: Config, setup: Setup, trained: runs.Trained) -> dict[str, tuple[int, ArrayTree]]:
    """The selected state, and the last one if it is another."""
    states = {"selected": (trained.best_step, trained.params)}
    if trained.best_step < config.num_meta_steps:
        training = setup.training
        blank = common.blank_state(training.learner, training.optimizer(config, None), training.inputs)
        last = common.load_state(config.run_dir / "checkpoints", blank)["state"]
        states["last"] = (int(last.step), last.params)
    return states


def pairs_seen(settings: Mapping[str, Any], step: int) -> int:
    """Sentence pairs whose gradient has been taken by a meta-step, with settings by name."""
    num_inner_steps, query_shot = settings.get("num_inner_steps", 0), settings["query_shot"]
    pretrained = min(step, settings["pretrain_steps"])
    per_episode = pretrained * query_shot + (step - pretrained) * (num_inner_steps * settings["shot"] + query_shot)
    return settings["meta_batch_size"] * per_episode


def run(config: Config) -> dict[str, Any]:
    """Trains, fine-tunes and tests, and returns the content of results.json.

    With several seeds it is the content of seeds.json.
    """
    config = with_paper_defaults(config)
    if config.seeds > 1:
        return seeds.run_seeds(run, training_of, config)
    setup = setup_of(config)
    with runs.open_run(config.run_dir, config) as run_dir:
        keep_text(run_dir, setup.text)
        trained = common.train(run_dir, config, setup.training)
        protocol = {
            "split": "held-out languages; their pairs are of other lines than the training pairs",
            "fine_tuning": f"Adam, at most {config.finetune_steps} steps, the best of every {finetuning.EVERY} on dev",
            "selection": f"least dev loss of {config.validation}, fine-tuned on {config.validation_pairs} pairs for at "
            f"most {VALIDATION_STEPS} steps, mean of {VALIDATION_SUBSETS} draws",
            "selected_step": trained.best_step,
            "pairs_trained": pairs_seen(runs.as_json(config), config.num_meta_steps),
            "bleu": bleu.signature(),
            "test_sentences": len(setup.text.languages[config.held_out[0]].references),
            "interval": "95 % over draws of the pairs, Student's t; they share test sentences and dev pairs",
        }
        results = runs.finish(
            run_dir,
            "translation",
            config,
            trained,
            protocol,
            lambda: test(config, setup, states_of(config, setup, trained)),
        )
        if jax.process_index() == 0:
            drawn = run_dir / "figures"
            figures.learning_curves(drawn / "learning_curve.png", {config.algorithm: [runs.curve(run_dir)]})
            figures.low_resource(drawn / "bleu.png", {"": {config.algorithm: results["evaluations"]}})
    show(results)
    return results


def _load(run_dir: Path) -> tuple[Config, Network]:
    """The settings of a run, and its network with the selected parameters."""
    experiment = runs.experiment_of(run_dir).__name__.removeprefix("experiments.")
    if experiment != Config.experiment:
        raise RunError(f"{run_dir} is a run of {experiment}; name one of {Config.experiment}")
    config = stored_config(METHODS, run_dir)
    directory = run_dir / "text"
    try:
        subwords = Subwords(*((directory / f"{side}.model").read_bytes() for side in Subwords._fields))
        keys = np.load(directory / "keys.npy", allow_pickle=False) if config.lexical else None
    except FileNotFoundError as error:
        raise RunError(
            f"there is no {error.filename}; repeat the command of the run, which writes it before the training"
        ) from error
    except (EOFError, ValueError) as error:
        raise RunError(f"{directory / 'keys.npy'} is damaged ({error}); choose another run") from error
    translator = make_translator(config, keys)
    params = common.load_params(config.run_dir, config, make_learner(config, translator), _model_inputs(config))
    return config, Network(subwords, translator, params, keys, 2 * config.max_subwords)


def load(run_dir: str | Path) -> tuple[MetaLearner, ArrayTree]:
    """The learner, as it is after the pretraining, and the selected parameters of a run."""
    config, network = _load(Path(run_dir))
    return make_learner(dataclasses.replace(config, pretrain_steps=0), network.translator), network.params


def show(results: dict[str, Any]) -> None:
    """Prints the dev loss and BLEU of every held-out language and number of sentences."""
    searched = f"beam {results['config']['beam']}, first draw"
    count = results["protocol"]["test_sentences"]
    table = Table(title=f"{results['algorithm']}: {count:,} test sentences, mean over draws, dev loss in nats a token")
    for heading in ("state", "language", "pairs", "dev loss", "BLEU, greedy", "the same, first draw", searched):
        table.add_column(heading, justify="right")
    for row in results["evaluations"]:
        means = [over_draws([row[name]]) for name in ("nll", "bleu")]
        firsts = [row["bleu"][0], row["bleu_beam"][0]] if "bleu_beam" in row else []
        cells = [
            intervals.format_mean(m["mean"][0], m["ci95"][0], digits=d) for m, d in zip(means, (3, 2), strict=True)
        ]
        cells += [intervals.format_mean(value) for value in firsts]
        table.add_row(f"{row['state']} ({row['step']:,})", row["language"], str(row["pairs"]), *cells)
    console.print(table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate:
    """What to translate."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The directory of a run of this experiment."""
    text: tuple[str, ...]
    """Sentences, each in quotes."""
    pairs: Path | None = None
    """A file with a sentence, a tab and its English in each line. The network is fine-tuned on it first; a tenth of the
    pairs, at least one, stop the fine-tuning. Without it, the network translates as it was trained."""
    seed: int = 0
    """Which pairs stop the fine-tuning."""
    precision: Precision = "float32"
    """Precision of matrix products, on devices that have a choice."""

    def __post_init__(self) -> None:
        """Raises ValueError for a seed that cannot be."""
        check_seed(self.seed)


def translate(config: Translate) -> list[str]:
    """Translates sentences with the network of a run, which may be fine-tuned on pairs first.

    Raises:
      FileNotFoundError: if there is no file of pairs.
      RunError: if there is no such run.
      ValueError: if there are too few pairs, or a sentence is empty or too long.
    """
    pairs = None if config.pairs is None else parallel_text.read_pairs(config.pairs)
    settings, network = _load(config.run)
    own_language.check_sentences(network, config.text)  # before the fine-tuning, which takes minutes
    if pairs is not None:
        how = fine_tuning(settings, settings.finetune_steps)
        network = own_language.adapted(network, *pairs, how, vocabulary=settings.source_subwords, seed=config.seed)
    lines = own_language.translations(network, config.text, beam=settings.beam)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return lines


def _main() -> None:
    if sys.argv[1:2] == ["translate"]:
        del sys.argv[1]
        about_it = "Translates sentences into English with the network of a run."
        main(Translate, translate, about_it, subcommand="translate")
    else:
        main(METHODS, run, __doc__, about=about())


if __name__ == "__main__":
    _main()
