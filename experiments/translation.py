"""Translation into English from few sentences (MetaNMT, Gu et al., 2018).

A small network learns from several languages at once, and is then fine-tuned on a few hundred sentence pairs of a
language that it has never seen. `fomaml` is MetaNMT: one language an episode, an inner step of a fresh Adam, a
meta-gradient of first order. `pretrained` trains on the same pairs without inner steps, and with --num-meta-steps 0 it
is a network from scratch. All are stopped on a validation language, which is fine-tuned like the held-out ones.

The text is captions of photographs in 13 languages. The paper has Europarl, whose preparation was not published, so its
BLEU cannot be compared. After a training, `python -m experiments.translation translate RUN --text ...` translates.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

from experiments import bleu, common, figures, finetuning, lexical, parallel_text, runs, seeds
from experiments.cli import RunConfig, flag, main, with_defaults
from experiments.common import Training
from experiments.parallel_text import Corpus, Subwords, Text, TextSettings
from experiments.runs import RunError, console, stored_config
from maml_jax import Batch, InnerDescent, MetaLearner, NoHyperparameters, inner, losses, models
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
)

VALIDATION = finetuning.FineTuning(steps=100)
VALIDATION_SIZE, VALIDATION_SUBSETS = 600, 2
"""How the validation language is fine-tuned."""
NUM_EXAMPLES = 3
"""Sentences of each language whose translations are shown."""


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
    """Pairs of each source language."""
    pool_lines: int = 4_000
    """The last lines of train.*, which the few sentences are drawn from, and whose English no training sees."""
    max_subwords: int = 20
    """Training pairs have fewer subwords on each side. Those of the test are cut at twice as many."""
    source_subwords: int = 6_000
    """Subwords of all source sides together, held-out languages included."""
    target_subwords: int = 1_500
    """Subwords of English."""
    shot: int = 32
    """Pairs of an inner step."""
    query_shot: int = 64
    """Pairs of the query set. Pretraining has these alone."""
    network: Literal["transformer", "gru"] = "transformer"
    """A transformer of --depth layers on each side, or gated recurrent units with attention."""
    width: int = 64
    """Of all vectors in the network; 512 in the paper."""
    depth: int = 2
    """Layers of the encoder and of the decoder; 6 in the paper."""
    lexical: bool = False
    """Whether source subwords are made of universal ones (universal lexical representation)."""
    vector_size: int = 64
    """Size of the vectors of subwords by their text, with --lexical."""
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
    """Width of the beam search, which is reported beside greedy translation."""
    data_dir: Path | None = None
    """Directory or zip with files train.LANGUAGE, val.LANGUAGE, test.LANGUAGE, line i of each a translation of line i
    of the .en file; by default captions13.zip in $MAML_JAX_PACKS."""

    def __post_init__(self) -> None:
        """Raises ValueError, before anything expensive, for a setting that cannot be."""
        super().__post_init__()
        least = {
            "source_pairs": 1, "pool_lines": 1, "max_subwords": 3, "source_subwords": 8, "target_subwords": 8,
            "width": 1, "depth": 1, "vector_size": 1, "pretrain_steps": 0, "num_subsets": 1, "dev_pairs": 1,
            "finetune_steps": finetuning.EVERY, "finetune_batch": 1, "beam": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            check_integer(flag(name), getattr(self, name), at_least=smallest)
        check_positive("--finetune-lr", self.finetune_lr)
        for size in self.sizes:
            check_integer("--sizes", size, at_least=1)
        for name in ("sources", "held_out", "sizes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{flag(name)} {' '.join(map(str, values))} must be one or more, each once")
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
    return with_defaults(config, {"run_dir": Path(f"runs/translation-{config.algorithm}-{config.seed}")})


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
    needed = {language: max(config.sizes) for language in config.held_out} | {config.validation: VALIDATION_SIZE}
    for language, count in needed.items():
        found = len(text.languages[language].pool.source)
        if found < count:
            raise ValueError(
                f"{count} pairs of {language} are wanted and the last {config.pool_lines:,} lines have {found} of at "
                f"most {config.max_subwords - 1} subwords; keep more by --pool-lines, or choose smaller --sizes"
            )
    return text


def make_translator(config: Config, keys: np.ndarray | None) -> Translator:
    """The network; `keys` [M, Q] are those of a lexical representation."""
    sizes = {"source_vocabulary": config.source_subwords, "target_vocabulary": config.target_subwords}
    sizes |= {"width": config.width, "lexicon": None if keys is None else Lexicon(keys)}
    if config.network == "gru":
        return models.gru_translator(**sizes)
    return models.transformer_translator(depth=config.depth, **sizes)


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

    def of_leaf(path, leaf):
        is_own = jax.tree_util.keystr(path, simple=True, separator="/").endswith(TASK_VECTORS)
        return jax.lax.stop_gradient(leaf) if is_own else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, meta_params)


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
        return Batch((Sentences(source, found), target[..., :-1]), target[..., 1:])

    episode = sample_episode(key)
    return episode._replace(support=convert(episode.support), query=convert(episode.query))


class Setup(NamedTuple):
    """What is trained, with the network that translates."""

    text: Text
    translator: Translator
    training: Training


def setup_of(config: Config) -> Setup:
    """What is trained, and how it is validated, at settings without gaps."""
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
        query_shot=config.query_shot or config.shot,
    )
    vectors = None if text.vectors is None else jnp.asarray(text.vectors)
    validation = [text.languages[config.validation]]
    jobs = finetuning.jobs_of(validation, (VALIDATION_SIZE,), VALIDATION_SUBSETS, text.keys)
    how = VALIDATION._replace(rate=config.finetune_lr, batch_size=config.finetune_batch)

    def validate(params: ArrayTree) -> float:
        tuned = finetuning.fine_tune_all(translator, how, params, validation, jobs)
        return -float(np.mean(np.min(tuned.losses, axis=1)))

    training = Training(
        make_learner(config, translator),
        jax.tree_util.Partial(_episode, sampler, vectors),
        validate,
        inputs=_model_inputs(config),
    )
    return Setup(text, translator, training)


def training_of(config: Config) -> Training:
    """What is trained, and how it is validated, at settings without gaps."""
    return setup_of(config).training


def keep_text(run_dir: Path, text: Text) -> None:
    """Writes the subwords, and the vectors of the English ones, into a run directory, so that it can be used alone.

    Raises:
      RunError: if the run was made with others.
    """
    directory = run_dir / "text"
    directory.mkdir(exist_ok=True)
    for name, content in {"source.model": text.subwords.source, "target.model": text.subwords.target}.items():
        file = directory / name
        if not file.exists():
            partial = file.with_name(file.name + ".partial")
            partial.write_bytes(content)
            partial.replace(file)
        elif file.read_bytes() != content:
            raise RunError(
                f"{file} holds other subwords than the text gives now; choose another --run-dir, or the text and the "
                "version of sentencepiece that made it"
            )
    if text.keys is not None and not (directory / "keys.npy").exists():
        with open(directory / "keys.partial", "wb") as stream:
            np.save(stream, text.keys)
        (directory / "keys.partial").replace(directory / "keys.npy")


def test(config: Config, setup: Setup, states: dict[str, tuple[int, ArrayTree]]) -> dict[str, Any]:
    """Fine-tunes and tests parameters on the held-out languages.

    Args:
      config: the settings.
      setup: what was trained.
      states: by name the step and the parameters. The first one gives the metrics, and is tested by beam search too.
    """
    rows, examples, first = [], [], next(iter(states))
    for state, (step, params) in states.items():
        beams = tuple(dict.fromkeys((1, config.beam))) if state == first else (1,)
        found, translated = _tested(config, setup, params, beams)
        rows += [{"state": state, "step": step} | row for row in found]
        examples = examples or translated
    chosen = [row for row in rows if row["state"] == first and row["pairs"]]
    metrics = {
        name: runs.mean_and_interval(np.concatenate([row[name] for row in chosen]))
        for name in ("nll", "bleu", "bleu_beam")
        if name in chosen[0]
    }
    return {"metrics": metrics, "evaluations": rows, "examples": examples}


def _tested(config: Config, setup: Setup, params: ArrayTree, beams: tuple[int, ...]) -> tuple[list[dict], list[dict]]:
    """A row for every held-out language and number of pairs, and some sentences before and after the fine-tuning."""
    text, translator = setup.text, setup.translator
    languages = [text.languages[name] for name in config.held_out]
    jobs = finetuning.jobs_of(languages, config.sizes, config.num_subsets, text.keys)
    how = finetuning.FineTuning(config.finetune_lr, config.finetune_steps, finetuning.EVERY, config.finetune_batch)
    tuned = finetuning.fine_tune_all(translator, how, params, languages, jobs)
    per_language = len(config.sizes) * config.num_subsets
    first_jobs = jax.tree.map(lambda x: x[::per_language], jobs)
    untuned = jax.tree.map(lambda x: np.stack([np.asarray(x)] * len(languages)), params)

    def translate_all(params: ArrayTree, jobs: finetuning.Job, beam: int) -> list[list[str]]:
        found = finetuning.translate_all(
            translator, params, languages, jobs, max_length=2 * config.max_subwords, beam=beam
        )
        counts = [len(languages[place].references) for place in jobs.language]
        return [
            parallel_text.decode(text.subwords.target, tokens[:count])
            for tokens, count in zip(found, counts, strict=True)
        ]

    before, after = (
        {beam: translate_all(*given, beam) for beam in beams} for given in ((untuned, first_jobs), (tuned.params, jobs))
    )
    losses_of, steps = np.asarray(tuned.losses), np.asarray(tuned.step)
    rows, examples = [], []
    for place, (name, language) in enumerate(zip(config.held_out, languages, strict=True)):
        first = place * per_language
        scores = _scores(language.references, {beam: [before[beam][place]] for beam in beams})
        rows.append({"language": name, "pairs": 0, "nll": losses_of[first, :1].tolist()} | scores)
        for number, size in enumerate(config.sizes):
            part = slice(first + number * config.num_subsets, first + (number + 1) * config.num_subsets)
            scores = _scores(language.references, {beam: after[beam][part] for beam in beams})
            found = {"nll": losses_of[part].min(axis=1).tolist(), "stopped_at": steps[part].tolist()}
            rows.append({"language": name, "pairs": size} | found | scores)
        sources = parallel_text.decode(text.subwords.source, language.test.source[:NUM_EXAMPLES])
        last = after[beams[-1]][first + per_language - 1]
        shown = zip(sources, language.references, before[beams[-1]][place], last, strict=False)
        names = "source", "reference", "before", "after"
        examples += [{"language": name} | dict(zip(names, lines, strict=True)) for lines in shown]
    return rows, examples


def _scores(references: tuple[str, ...], translations: dict[int, list[list[str]]]) -> dict[str, list[float]]:
    """BLEU of the translations of each fine-tuning by width of the beam, and the mean greedy one of resamples."""
    counts = {beam: [bleu.counts(lines, references) for lines in each] for beam, each in translations.items()}
    scores = {beam: [bleu.score(one.sum(0)) for one in each] for beam, each in counts.items()}
    resampled = np.mean([bleu.resampled(one) for one in counts[1]], axis=0).round(3).tolist()
    found = {"bleu": scores.pop(1), "resampled_bleu": resampled}
    return found | ({"bleu_beam": next(iter(scores.values()))} if scores else {})


def states_of(config: Config, setup: Setup, trained: runs.Trained) -> dict[str, tuple[int, ArrayTree]]:
    """The selected state, and of pretraining the last one too, which has had as much work as the other methods."""
    states = {"selected": (trained.best_step, trained.params)}
    if config.algorithm == "pretrained" and trained.best_step < config.num_meta_steps:
        training = setup.training
        init_key = runs.streams(config.seed).init
        start = common.initial_state(
            training.learner, training.optimizer(config, None), training.inputs, init_key, None
        )
        last = common.load_state(config.run_dir / "checkpoints", start)["state"]
        states["last"] = (int(last.step), last.params)
    return states


def pairs_of_a_meta_step(config: Config, step: int) -> int:
    """Sentence pairs whose gradient is taken in a meta-step."""
    num_inner_steps = getattr(config.hyperparameters, "num_inner_steps", 0) if step >= config.pretrain_steps else 0
    return config.meta_batch_size * (num_inner_steps * config.shot + (config.query_shot or config.shot))


def run(config: Config) -> dict[str, Any]:
    """Trains, fine-tunes and tests, and returns the content of results.json.

    With several seeds it is the content of seeds.json.
    """
    config = with_paper_defaults(config)
    if config.seeds > 1:
        return seeds.run_seeds(run, training_of, config)
    setup = setup_of(config)
    with runs.open_run(config.run_dir, config) as run_dir:
        if jax.process_index() == 0:
            keep_text(run_dir, setup.text)
        trained = common.train(run_dir, config, setup.training)
        protocol = {
            "split": "held-out languages; their English is in no training",
            "fine_tuning": f"Adam, at most {config.finetune_steps} steps, the best of every {finetuning.EVERY} on dev",
            "selection": f"least dev loss of {config.validation}, fine-tuned on {VALIDATION_SIZE} pairs",
            "selected_step": trained.best_step,
            "pairs_trained": sum(pairs_of_a_meta_step(config, step) for step in range(config.num_meta_steps)),
            "bleu": bleu.signature(),
            "test_sentences": len(setup.text.languages[config.held_out[0]].references),
            "interval": "95 % over fine-tunings, Student's t; they share test sentences and dev pairs",
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
            figures.low_resource(drawn / "bleu.png", {config.algorithm: results["evaluations"]})
    show(results)
    return results


def _load(run_dir: Path) -> tuple[Config, Subwords, np.ndarray | None, Translator, ArrayTree]:
    """The settings, subwords, keys, network and selected parameters of a run."""
    config = stored_config(METHODS, run_dir)
    directory = run_dir / "text"
    try:
        subwords = Subwords(*((directory / f"{side}.model").read_bytes() for side in Subwords._fields))
        keys = np.load(directory / "keys.npy", allow_pickle=False) if config.lexical else None
    except FileNotFoundError as error:
        raise RunError(f"{run_dir} holds no {error.filename}; the run has not started its training") from error
    translator = make_translator(config, keys)
    params = common.load_params(config.run_dir, config, make_learner(config, translator), _model_inputs(config))
    return config, subwords, keys, translator, params


def load(run_dir: str | Path) -> tuple[LearnerOrSchedule, ArrayTree]:
    """The learner and the selected parameters of a run."""
    config, _, _, translator, params = _load(Path(run_dir))
    plain = dataclasses.replace(config, pretrain_steps=0)
    learner = make_learner(plain, translator)
    assert isinstance(learner, MetaLearner)
    return learner, params


def show(results: dict[str, Any]) -> None:
    """Prints the dev loss and BLEU of every held-out language and number of sentences."""
    config = results["config"]
    table = Table(
        title=f"{results['algorithm']}: {results['protocol']['test_sentences']:,} test sentences, mean over subsets"
    )
    headings = ("state", "language", "pairs", "dev loss, nats a token", "BLEU, greedy", f"BLEU, beam {config['beam']}")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in results["evaluations"]:
        columns = {"nll": 3, "bleu": 2, "bleu_beam": 2}
        cells = [_cell(row[name], digits) if name in row else "" for name, digits in columns.items()]
        table.add_row(f"{row['state']} ({row['step']:,})", row["language"], str(row["pairs"]), *cells)
    console.print(table)


def _cell(values: list[float], digits: int = 2) -> str:
    """A mean with its 95 % interval, if there are several."""
    if len(values) < 2:
        return runs.format_mean(values[0], digits=digits)
    found = runs.mean_and_interval(np.array(values))
    return runs.format_mean(found["mean"][0], found["ci95"][0], digits=digits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translate:
    """What to translate."""

    run: tyro.conf.Positional[Path]
    """The directory of a run of this experiment."""
    text: tuple[str, ...]
    """Sentences, each in quotes."""
    pairs: Path | None = None
    """A file with a sentence, a tab and its English in each line. The network is fine-tuned on it first; a tenth of the
    pairs, at least one, stop the fine-tuning. Without it, the network translates as it was trained."""
    seed: int = 0
    """Of the fine-tuning."""


def translate(config: Translate) -> list[str]:
    """Translates sentences with the network of a run, which may be fine-tuned on pairs first.

    Raises:
      RunError: if there is no such run.
      ValueError: if there are too few pairs, or a sentence is empty.
    """
    settings, subwords, keys, translator, params = _load(config.run)
    if not config.text or not all(line.strip() for line in config.text):
        raise ValueError(
            '--text holds no words; give one or more sentences, each in quotes: --text "um homem" "um cão"'
        )
    length = 2 * settings.max_subwords
    vectors = None
    if config.pairs is None and keys is not None:
        raise ValueError("a run with --lexical knows a language by its pairs; give some by --pairs")
    if config.pairs is not None:
        left, right = parallel_text.read_pairs(config.pairs)
        pairs = parallel_text.pairs_of(subwords, left, right, length, cut=False)
        order = np.random.default_rng(config.seed).permutation(len(pairs.source))
        num_dev = max(1, len(order) // 10)
        if len(order) < 10:
            raise ValueError(
                f"{config.pairs} holds {len(order)} pairs of at most {length - 1} subwords; a fine-tuning needs at "
                "least 10"
            )
        dev, few = (jax.tree.map(lambda x, rows=rows: x[rows], pairs) for rows in (order[:num_dev], order[num_dev:]))
        own = None
        if keys is not None:
            encoded = parallel_text.encode(subwords.source, [*left, *config.text])
            own = lexical.word_vectors(encoded, settings.source_subwords, settings.vector_size)
        language = parallel_text.Language(few, dev, dev, (), own)
        jobs = finetuning.jobs_of([language], (len(few.source),), 1, keys)
        how = finetuning.FineTuning(settings.finetune_lr, settings.finetune_steps, batch_size=settings.finetune_batch)
        tuned = finetuning.fine_tune_all(translator, how, params, [language], jobs)
        losses_of = np.asarray(tuned.losses[0])
        console.print(
            f"fine-tuned on {len(few.source)} pairs for {int(tuned.step[0])} steps: loss on {num_dev} others "
            f"{losses_of[0]:.3f} before, {losses_of.min():.3f} after, nats a token"
        )
        params = jax.tree.map(lambda x: x[0], tuned.params)
        vectors = None if jobs.vectors is None else jobs.vectors[0]
    source = parallel_text.pairs_of(subwords, config.text, [""] * len(config.text), length, cut=True).source
    found = finetuning.translated(translator, params, source, vectors, max_length=length, beam=settings.beam)
    lines = parallel_text.decode(subwords.target, found)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return lines


def _main() -> None:
    if sys.argv[1:2] == ["translate"]:
        del sys.argv[1]
        main(Translate, translate, "Translates sentences into English with the network of a run.")
    else:
        main(METHODS, run, __doc__, about=about())


if __name__ == "__main__":
    _main()
