"""The training loop of the experiments."""

import contextlib
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import devices
from experiments.nonfinite import check_finite, check_selected
from experiments.progress import progress_bar
from experiments.runs import (
    PROCESS_TIMEOUT_SECONDS,
    TEST_TIMEOUT_SECONDS,
    RunError,
    Trained,
    console,
    metrics_log,
    on_signal,
    read_log,
    read_record,
    read_results,
    results_before,
    streams,
)
from experiments.tracking import OFF, profiled, trackers
from maml_jax import checkpoint, parallel, processes, replace_inner_state
from maml_jax.cost import count_flops
from maml_jax.meta_gradient import default_chunk_size
from maml_jax.outer import OuterRule, StateProgram, init_meta_state, make_meta_step, make_train_loop
from maml_jax.tasks import streaming
from maml_jax.types import ArrayTree, LearnerOrSchedule, MetaInfo, MetaState, SampleEpisodeFn, draw_episode, learner_at

SAVE_SECONDS = 60.0
"""A checkpoint is written after a compiled call if the last one is older than this, besides those of validations."""
UNTRAINED = np.finfo(np.float32).min
"""The score of initial parameters, below that of any validation."""
STOP_SECONDS = 25.0
"""How long a compiled call may go on after SIGTERM or SIGINT. Clusters kill a job 30 s or more after the signal."""


def outer_optimizer(config: Any, updates_per_step: int = 1) -> optax.GradientTransformation:
    """The optimiser of the meta-parameters, with the rate and the schedule of `config`.

    Args:
      config: the settings.
      updates_per_step: how many updates of the optimiser a meta-step has.
    """
    start, end, num_steps = config.outer_lr, config.outer_lr_end, max(1, config.num_meta_steps) * updates_per_step
    rates = {
        "constant": lambda: start,
        "linear": lambda: optax.linear_schedule(start, end, num_steps),
        "cosine": lambda: optax.cosine_decay_schedule(start, num_steps, alpha=end / start),
        "halved": lambda: optax.exponential_decay(
            start, config.outer_half_life * updates_per_step, 0.5, staircase=True
        ),
    }
    optimizer = {"adam": optax.adam, "sgd": optax.sgd}[config.outer_optimizer](rates[config.outer_schedule]())
    if (bound := getattr(config, "outer_clip", None)) is not None:
        optimizer = optax.chain(optax.clip(bound), optimizer)
    if getattr(getattr(config, "hyperparameters", None), "carry_state", False):
        optimizer = replace_inner_state(optimizer)
    # Outermost, so that a step that is left out also leaves the state of the inner optimiser as it is.
    if getattr(config, "on_nonfinite", "stop") == "skip":
        optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=np.iinfo(np.int32).max)
    return optimizer


class Member(NamedTuple):
    """One seed of a training.

    Attributes:
      run_dir: claimed by `open_run`.
      config: a `cli.RunConfig`.
      training: what is trained. Its validation is that of this seed.
    """

    run_dir: Path
    config: Any
    training: "Training"


class Training(NamedTuple):
    """What an experiment trains.

    Attributes:
      learner: the algorithm.
      sample_episode: the task distribution.
      validate: `(params) -> score`, larger is better; None if the last state is selected.
      num_best: M, how many validated parameters are kept. Those that are returned have a leading axis [M] if M > 1, or
        as many as there were validations.
      make_optimizer: `(mesh) -> optimiser or outer rule`, for a mesh that the tasks are divided over, or None; by
        default the optimiser of the settings.
      inputs: inputs of one support set, of which only shapes and dtypes matter; by default those that `sample_episode`
        draws. A task distribution that depends on the parameters needs them.
      data_digest: a checksum of the data, see `runs.digest`; None if the settings say everything.
      monitor: `(params) -> {name: number}`, what else is logged at a validation; None for nothing.
      keep: `(run_dir) -> None`, writes what the run needs besides its settings into a directory that is claimed.
    """

    learner: LearnerOrSchedule
    sample_episode: SampleEpisodeFn
    validate: Callable[[ArrayTree], float] | None = None
    num_best: int = 1
    make_optimizer: Callable[[jax.sharding.Mesh | None], optax.GradientTransformation | OuterRule] | None = None
    inputs: ArrayTree = None
    data_digest: str | None = None
    monitor: Callable[[ArrayTree], Mapping[str, float]] | None = None
    keep: Callable[[Path], None] | None = None

    def optimizer(self, config: Any, mesh: jax.sharding.Mesh | None) -> optax.GradientTransformation | OuterRule:
        """The outer optimiser or rule at some settings."""
        return outer_optimizer(config) if self.make_optimizer is None else self.make_optimizer(mesh)


def train(run_dir: Path, config: Any, training: Training) -> Trained:
    """`train_together` with one seed."""
    (trained,) = train_together([Member(run_dir, config, training)], training)
    return trained


def train_together(members: Sequence[Member], training: Training) -> list[Trained]:
    """Trains for `config.num_meta_steps`, or goes on from the newest undamaged checkpoints.

    Several seeds are one program, vmapped over them and divided over the devices; each has its own directory, with what
    a run of one seed writes. With one seed the tasks of a meta-batch are divided over the devices.

    Every `config.val_every` steps the states are validated and checkpointed; between validations they are checkpointed
    every `SAVE_SECONDS`. With `validate` the parameters with the highest scores are returned, else the last. The result
    does not depend on interruptions. On SIGTERM and SIGINT, to one process or all, the compiled call is finished and
    its state is checkpointed; if that takes more than `STOP_SECONDS`, the process ends without, and the run resumes
    from the checkpoint before.

    Args:
      members: the seeds. Their settings differ only in the seed and the directory.
      training: what is trained. Each member has a validation of its own.

    Returns:
      What each seed has trained.

    Raises:
      RunError: if the loss, the meta-gradient or the parameters cease to be finite. The last checkpoint stays. With
        `config.on_nonfinite` "skip" only if that happens in every step of a compiled call, or in
        `nonfinite.MOST_SKIPPED` calls of one step. Also if there were validations and none was finite, or the training
        is to end where it was stopped without one.
      SystemExit: after a signal, with the code 128 plus its number.
    """
    config, is_alone = members[0].config, len(members) == 1
    keys = [streams(member.config.seed) for member in members]
    # An outer update may be made on a part of the meta-batch, which is divided over the devices too.
    minibatches = getattr(getattr(config, "hyperparameters", None), "minibatches", 1)
    mesh = devices.mesh_for(config.meta_batch_size // minibatches if is_alone else len(members))
    optimizer = training.optimizer(config, mesh if is_alone else None)
    now = starting_point(members, training, optimizer, mesh)
    for member in members:
        check_validated(member, now.step)
    with processes.watchdog("the look at earlier results", PROCESS_TIMEOUT_SECONDS):
        processes.on_process_zero(lambda: check_not_lost([member.run_dir for member in members], now.step))
    train_key = keys[0].train if is_alone else jnp.stack([k.train for k in keys])
    programs: dict[int, Program] = {}
    saved_at = time.monotonic() if now.step else -math.inf  # the first finite state is kept at once
    tracking, num_calls = getattr(config, "tracking", OFF), 0
    is_skipped = getattr(config, "on_nonfinite", "stop") == "skip"
    with contextlib.ExitStack() as stack:
        sinks = [
            (
                stack.enter_context(metrics_log(member.run_dir, now.step)),
                stack.enter_context(trackers(member.run_dir, member.config, now.step)),
            )
            for member in members
        ]
        show = stack.enter_context(progress_bar(config.num_meta_steps))
        requested = stack.enter_context(stop_requests(lambda: now.step))
        while now.step < config.num_meta_steps:
            boundary = min(config.num_meta_steps, (now.step // config.val_every + 1) * config.val_every)
            num_steps = min(config.log_every, boundary - now.step)
            with processes.watchdog(f"the meta-steps after step {now.step}", PROCESS_TIMEOUT_SECONDS):
                if num_steps not in programs:
                    start = time.perf_counter()
                    programs[num_steps] = program_of(training, optimizer, config, mesh, num_steps, now.state, train_key)
                    now.seconds["compile"] += time.perf_counter() - start
                # The second call, because the first has what is made once; the first if there is no other.
                is_traced = num_calls == 1 or (num_calls == 0 and now.step + num_steps == config.num_meta_steps)
                with profiled(members[0].run_dir / "profile", tracking.profile and is_traced):
                    start = time.perf_counter()
                    now.state, info = programs[num_steps].run(now.state, train_key)
                    info = jax.tree.map(np.asarray, info)
                    elapsed = time.perf_counter() - start
                num_calls += 1
            infos = [now.of_member(info, index) for index in range(len(members))]
            for index, (of_seed, member) in enumerate(zip(infos, members, strict=True)):
                in_a_row = now.count(index, "notfinite_count") if is_skipped else 0
                check_finite(of_seed, now.step, member.run_dir, config, is_skipped=is_skipped, num_in_a_row=in_a_row)
            now.seconds["train"] += elapsed / len(members)
            now.step += num_steps
            records = [record_of(of_seed, now.step, elapsed / len(members), is_skipped) for of_seed in infos]
            if now.step == boundary:
                now.validate(records)
            # Before the checkpoint: a resumed run drops what was logged after it, and cannot make up for a gap.
            for (log, track), record in zip(sinks, records, strict=True):
                log(record)
                track(record)
            # Agreed upon, because saving takes all processes, and each has a clock of its own.
            with processes.watchdog(f"the decision to go on after step {now.step}", PROCESS_TIMEOUT_SECONDS):
                signalled = processes.largest(requested[0] if requested else 0)
                is_due = processes.largest(int(time.monotonic() - saved_at > SAVE_SECONDS)) > 0
            is_leaving = signalled > 0
            if now.step == boundary or is_leaving or is_due:
                now.save()
                saved_at = time.monotonic()
            means = {name: float(np.mean([record[name] for record in records])) for name in records[0]}
            # The log of a seed has its share of the time; what is shown is the speed of all together.
            show(means | {"step": now.step, "steps_per_second": num_steps / elapsed})
            if is_leaving:
                goes_on = "resumes from there" if now.step < config.num_meta_steps else "does the test"
                console.print(f"stopped after step {now.step}; the same command {goes_on}")
                raise SystemExit(128 + signalled)
        with processes.watchdog("the end of training", PROCESS_TIMEOUT_SECONDS):
            signalled = processes.largest(requested[0] if requested else 0)
        if signalled:  # while the last checkpoint was written
            console.print(f"stopped after step {now.step}; the same command does the test")
            raise SystemExit(128 + signalled)
    if now.step == 0:
        now.keep_initial()
    for index, (member, best) in enumerate(zip(members, now.best, strict=True)):
        check_selected(best, member.run_dir, config)
        if is_skipped:
            num_skipped = now.count(index, "total_notfinite")
            console.print(
                f"{num_skipped} meta-gradients were not finite and left out in {member.run_dir}", markup=False
            )
    one_state = now.of_member(now.state, 0)
    execution = execution_of(training, optimizer, config, mesh, programs, one_state, len(members))
    return [Trained(selected(best), int(best["step"][0]), dict(now.seconds), dict(execution)) for best in now.best]


def check_not_lost(run_dirs: Sequence[Path], step: int) -> None:
    """Raises RunError if a run would start anew beside results that it has; `step` is where all of them start."""
    files = [file for run_dir in run_dirs for file in (run_dir / "results.json", *results_before(run_dir))]
    for file in () if step else sorted(files):
        if file.exists() and (found := read_record(file).get("meta_steps", 0)) > 0:
            raise RunError(
                f"{file} has the results after {found} meta-steps, and there is no checkpoint of them. Put the "
                "checkpoints back; to train again, choose another --run-dir or move the results away"
            )


@dataclasses.dataclass
class Progress:
    """How far a training of several seeds, or of one, is.

    Attributes:
      members: the seeds.
      state: of the training; of several seeds with an axis for them.
      best: the best states so far, one record a seed.
      step: meta-steps taken.
      seconds: of compilation and of training.
    """

    members: Sequence[Member]
    state: MetaState
    best: list[dict[str, Any]]
    step: int
    seconds: dict[str, float]

    def of_member(self, tree: ArrayTree, index: int) -> ArrayTree:
        """The part of a seed; the whole if there is one seed."""
        return tree if len(self.members) == 1 else jax.tree.map(lambda leaf: leaf[index], tree)

    def params(self, index: int) -> ArrayTree:
        """The parameters of a seed on the host, because validation may use other devices than training."""
        return jax.tree.map(np.asarray, self.of_member(self.state.params, index))

    def validate(self, records: Sequence[dict[str, float]]) -> None:
        """Scores every seed, keeps its best states, and adds the score, and what else is logged, to its record."""
        for index, member in enumerate(self.members):
            training, params = member.training, self.params(index)
            with processes.watchdog(f"the validation after step {self.step}", TEST_TIMEOUT_SECONDS):
                if training.validate is not None:
                    score = records[index]["val"] = training.validate(params)
                    self.best[index] = keep_best(self.best[index], params, score, self.step)
                if training.monitor is not None:
                    records[index] |= training.monitor(params)

    def count(self, index: int, name: str) -> int:
        """A number of meta-steps that the outer optimiser of a seed has counted, by its name in `optax`."""
        return int(optax.tree.get(self.of_member(self.state, index).opt_state, name))

    def save(self) -> None:
        """Writes a checkpoint of every seed. Without a validation the state that is saved is the selected one."""
        train_seconds = np.asarray(self.seconds["train"], np.float32)
        for index, member in enumerate(self.members):
            if member.training.validate is None:
                self.best[index] = keep_best(self.best[index], self.params(index), 0.0, self.step, always=True)
            checkpoints = member.run_dir / "checkpoints"
            if len(self.members) > 1 and checkpoint.exists(checkpoints, self.step):
                continue  # of several seeds, some had saved this step when the process was killed
            state = self.of_member(self.state, index)
            content = {"state": state, "best": self.best[index], "train_seconds": train_seconds}
            checkpoint.save(checkpoints, self.step, content)

    def keep_initial(self) -> None:
        """Selects and saves the initial parameters, the result of no training, unless that was done before."""
        if np.isfinite(self.best[0]["score"][0]):
            return
        for index in range(len(self.members)):
            self.best[index] = keep_best(self.best[index], self.params(index), UNTRAINED, 0, always=True)
        self.save()


def starting_point(
    members: Sequence[Member],
    training: Training,
    optimizer: optax.GradientTransformation | OuterRule,
    mesh: jax.sharding.Mesh | None,
) -> Progress:
    """The newest undamaged checkpoints, or the initial states."""
    config, is_alone = members[0].config, len(members) == 1
    keys = [streams(member.config.seed) for member in members]
    inputs = training.inputs
    if inputs is None:
        inputs = jax.eval_shape(training.sample_episode, keys[0].train).support.inputs
    over = mesh if is_alone else None
    with processes.watchdog("the start of training", PROCESS_TIMEOUT_SECONDS):
        starts = [initial_state(training.learner, optimizer, inputs, k.init, over) for k in keys]
        saved = load_states([member.run_dir / "checkpoints" for member in members], starts, training.num_best)
    states = [record["state"] for record in saved]
    state = states[0] if is_alone else jax.tree.map(lambda *leaves: np.stack(list(map(np.asarray, leaves))), *states)
    step = int(states[0].step)
    if 0 < step < config.num_meta_steps:
        resumed = members[0].run_dir if is_alone else members[0].run_dir.parent
        console.print(f"resuming {resumed} from step {step}", markup=False)
    seconds = {"compile": 0.0, "train": float(saved[0]["train_seconds"])}
    return Progress(members, state, [record["best"] for record in saved], step, seconds)


def execution_of(
    training: Training,
    optimizer: optax.GradientTransformation | OuterRule,
    config: Any,
    mesh: jax.sharding.Mesh | None,
    programs: Mapping[int, "Program"],
    state: MetaState,
    num_seeds: int,
) -> dict[str, Any]:
    """How a training was executed, for results.json.

    Args:
      training: what was trained.
      optimizer: its outer optimiser or rule.
      config: its settings.
      mesh: what the tasks, or the seeds, were divided over.
      programs: by their number of meta-steps. Without any, nothing was trained by this call.
      state: of one seed.
      num_seeds: how many were trained together.
    """
    execution = {"seeds": num_seeds} if num_seeds > 1 else {}
    if programs:  # what was trained by another call had devices of its own
        num_devices = 1 if mesh is None else mesh.size
        execution |= {"devices": num_devices, "temporary_bytes": programs[max(programs)].temporary_bytes}
        execution["chunk_size"] = config.chunk_size or chosen_chunk_size(
            training.learner, state, training.sample_episode, config, num_devices if num_seeds == 1 else 1
        )
    flops = flops_of_a_meta_step(training.learner, optimizer, state, training.sample_episode, config)
    return execution | {"flops": flops}


class Program(NamedTuple):
    """The compiled program of several meta-steps.

    Attributes:
      run: `(state, key) -> (state, info)`; with several seeds, states and keys have a leading axis of seeds.
      temporary_bytes: its temporary memory on one device; None with several seeds, or if the tasks are streamed.
    """

    run: Callable[[MetaState, jax.Array], Any]
    temporary_bytes: int | None = None


def program_of(
    training: Training,
    optimizer: optax.GradientTransformation | OuterRule,
    config: Any,
    mesh: jax.sharding.Mesh | None,
    num_steps: int,
    state: MetaState,
    key: jax.Array,
) -> Program:
    """The program of `num_steps` meta-steps; see `train_together`.

    Args:
      training: what is trained.
      optimizer: its outer optimiser or rule.
      config: the settings.
      mesh: what the tasks are divided over or, with several keys, the seeds.
      num_steps: meta-steps of one call.
      state: the state of one seed, or of several, which then have a leading axis.
      key: the key of the training of one seed, or [seeds].
    """
    learner, sample_episode, is_alone = training.learner, training.sample_episode, key.ndim == 0
    sizes = {"meta_batch_size": config.meta_batch_size, "num_steps": num_steps}
    placed = {"chunk_size": config.chunk_size, "mesh": mesh if is_alone else None}
    if is_alone and streaming.is_streamed(sample_episode) and jax.process_count() == 1:
        meta_step = make_meta_step(learner, optimizer, **placed)
        return Program(streaming.make_train_loop(meta_step, sample_episode, **sizes))
    loop = make_train_loop(learner, optimizer, sample_episode, **sizes, **placed, donate=is_alone)
    if not is_alone:
        return Program(over_seeds(loop, mesh, state, key))
    compiled = loop.lower(state, key).compile()
    temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
    return Program(lambda state, key: compiled(state, key, *loop.data), temporary_bytes)


def check_validated(member: Member, step: int) -> None:
    """Raises RunError if a training is to end where it was stopped, at a meta-step without a validation."""
    if step != member.config.num_meta_steps or member.training.validate is None:
        return
    if any(record["step"] == step and "val" not in record for record in read_log(member.run_dir)):
        raise RunError(
            f"{member.run_dir} was stopped at meta-step {step}, where it has no validation, so it cannot end there; "
            "give a larger --num-meta-steps"
        )


def record_of(info: MetaInfo, step: int, elapsed: float, is_skipped: bool) -> dict[str, float]:
    """A line of metrics.jsonl: means over the meta-steps of a compiled call that were finite, NaN if none was."""

    def mean_of_finite(values: np.ndarray) -> np.ndarray:
        return values[info.finite].mean(0) if info.finite.any() else np.full(values.shape[1:], np.nan)

    record = {
        "step": step,
        "loss": float(mean_of_finite(info.loss)),
        "grad_norm": float(mean_of_finite(info.grad_norm)),
        "steps_per_second": len(info.loss) / elapsed,
    }
    for name in ("reward", "returns", "kl", "entropy"):  # of reinforcement learning
        if (values := getattr(info.objective, name, None)) is not None:
            means = mean_of_finite(np.asarray(values))
            record |= {f"return_{k}": float(x) for k, x in enumerate(means)} if means.ndim else {name: float(means)}
    return record | ({"skipped": int(np.sum(~np.isfinite(info.grad_norm)))} if is_skipped else {})


def over_seeds(
    loop: StateProgram, mesh: jax.sharding.Mesh | None, states: MetaState, keys: jax.Array
) -> Callable[[MetaState, jax.Array], Any]:
    """Compiles the loop for states and keys with a leading axis of seeds, divided over the devices of a mesh."""

    def run(data: tuple, states_and_keys: tuple[MetaState, jax.Array]) -> Any:
        return jax.vmap(lambda state, key: loop.jitted(state, key, *data))(*states_and_keys)

    program = jax.jit(run if mesh is None else parallel.each_task(run, mesh, gather=False))
    compiled = program.lower(loop.data, (states, keys)).compile()
    return lambda states, keys: compiled(loop.data, (states, keys))


def initial_state(
    learner: LearnerOrSchedule,
    optimizer: optax.GradientTransformation | OuterRule,
    inputs: ArrayTree,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None,
) -> MetaState:
    """The state at step 0, on all devices of the mesh; of `inputs` only shapes and dtypes matter."""
    state = jax.jit(_draw_state(learner, optimizer, inputs))(key)
    return state if mesh is None else parallel.replicate(state, mesh)


def blank_state(
    learner: LearnerOrSchedule, optimizer: optax.GradientTransformation | OuterRule, inputs: ArrayTree
) -> MetaState:
    """A state for `load_state` to fill if there is a checkpoint. Its parameters are zeros, and nothing is compiled."""
    state = jax.eval_shape(_draw_state(learner, optimizer, inputs), jax.random.key(0))
    return state._replace(params=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.params))


def _draw_state(
    learner: LearnerOrSchedule, optimizer: optax.GradientTransformation | OuterRule, inputs: ArrayTree
) -> Callable[[jax.Array], MetaState]:
    inputs = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), inputs)
    return lambda key: init_meta_state(learner, optimizer, key, inputs)


def load_state(checkpoints: Path, state: MetaState, num_best: int = 1) -> dict[str, Any]:
    """`load_states` with one seed."""
    (record,) = load_states([checkpoints], [state], num_best)
    return record


def load_states(directories: Sequence[Path], states: Sequence[MetaState], num_best: int = 1) -> list[dict[str, Any]]:
    """The newest undamaged checkpoints of the same step, or what a run starts from.

    Args:
      directories: of the checkpoints of each seed; they need not exist.
      states: the state at step 0 of each seed, or a `blank_state` where there is a checkpoint.
      num_best: M, see `Training`.

    Returns:
      For each seed "state", "best" (with "params", "score" and "step", leaves [M, ...], the highest score first) and
      "train_seconds".
    """

    def start_of(state: MetaState) -> dict[str, Any]:
        best = {
            "params": jax.tree.map(lambda x: np.stack([np.asarray(x)] * num_best), state.params),
            "score": np.full(num_best, -math.inf, np.float32),
            "step": np.zeros(num_best, np.int32),
        }
        return {"state": state, "best": best, "train_seconds": np.asarray(0.0, np.float32)}

    starts = [start_of(state) for state in states]
    found = [checkpoint.restore_latest(*pair) for pair in zip(directories, starts, strict=True)]
    for directory, one in zip(directories, found, strict=True):
        if one is not None and one.damaged:
            console.print(f"checkpoints {list(one.damaged)} in {directory} are damaged and left out", markup=False)
    if None in found:
        return starts
    step = min(one.step for one in found)
    try:
        return [
            one.tree if one.step == step else checkpoint.restore(directory, step, start)
            for one, directory, start in zip(found, directories, starts, strict=True)
        ]
    except FileNotFoundError as error:
        raise RunError(
            f"{error}, where the last of the seeds is; train the seeds that are behind by the same command with the "
            "--seed and the --run-dir of one, and without --seeds"
        ) from None


def load_params(
    run_dir: Path,
    config: Any,
    learner: LearnerOrSchedule,
    inputs: ArrayTree,
    optimizer: optax.GradientTransformation | OuterRule | None = None,
) -> ArrayTree:
    """The parameters that a run has selected so far.

    Args:
      run_dir: the directory of the run.
      config: its settings.
      learner: the algorithm.
      inputs: inputs of one support set; only shapes and dtypes matter.
      optimizer: the outer optimiser or rule of the training; by default that of the settings.

    Raises:
      RunError: if the run has no checkpoint, none of a validated state, or results of more meta-steps than its newest.
    """
    optimizer = outer_optimizer(config) if optimizer is None else optimizer
    blank = blank_state(learner, optimizer, inputs)
    record = load_state(run_dir / "checkpoints", blank, getattr(config, "ensemble", 1))
    best = record["best"]
    if not np.isfinite(best["score"][0]):
        raise RunError(
            f"{run_dir} holds no checkpoint of a validated state; train longer, up to the first validation after "
            "--val-every meta-steps, or name another directory"
        )
    step, results = int(record["state"].step), read_results(run_dir)
    if results is not None and step < results.get("meta_steps", 0):
        raise RunError(
            f"{run_dir} holds the results after {results['meta_steps']} meta-steps, and its newest undamaged "
            f"checkpoint is of {step}; repeat the command of the run, which goes on from there"
        )
    return selected(best)


def chosen_chunk_size(
    learner: LearnerOrSchedule,
    state: MetaState,
    sample_episode: SampleEpisodeFn,
    config: Any,
    num_devices: int,
) -> int:
    """The chunk size that was chosen for the tasks of one of the devices that the meta-batch is divided over."""
    keys = jax.random.split(jax.random.key(0), config.meta_batch_size // num_devices)
    episodes = jax.eval_shape(jax.vmap(lambda key: draw_episode(sample_episode, key, state.params)), keys)
    return default_chunk_size(learner_at(learner, jnp.int32(0)), state.params, episodes)


def flops_of_a_meta_step(
    learner: LearnerOrSchedule,
    optimizer: optax.GradientTransformation | OuterRule,
    state: MetaState,
    sample_episode: SampleEpisodeFn,
    config: Any,
) -> int | None:
    """The operations of a meta-step without sampling; None if they cannot be counted."""
    keys = jax.random.split(jax.random.key(0), config.meta_batch_size)
    episodes = jax.eval_shape(jax.vmap(lambda key: draw_episode(sample_episode, key, state.params)), keys)
    with contextlib.suppress(ValueError):
        return count_flops(make_meta_step(learner, optimizer, chunk_size=1).jitted, state, episodes)
    return None


@contextlib.contextmanager
def stop_requests(reached: Callable[[], int]) -> Iterator[list[int]]:
    """Collects the numbers of SIGTERM and SIGINT that this process receives.

    A second signal ends the process at once, and so does the first after `STOP_SECONDS`. Its exit code is 128 plus the
    number of the signal.

    Args:
      reached: `() -> int`, the meta-step that the process has reached, for the message.
    """
    requested: list[int] = []

    def give_up() -> None:
        console.print(
            f"the compiled call or the validation after step {reached()} takes too long; stopped without it. The same "
            "command resumes from the last checkpoint. In a new run a smaller --log-every makes calls shorter"
        )
        os._exit(128 + requested[0])

    def handle(number: int) -> None:
        if requested:
            os._exit(128 + number)
        requested.append(number)
        timer.start()
        console.print("stopping after this compiled call; interrupt again to stop at once")

    timer = threading.Timer(STOP_SECONDS, give_up)
    timer.daemon = True
    try:
        with on_signal(handle):
            yield requested
    finally:
        timer.cancel()


def keep_best(
    best: dict[str, Any], params: ArrayTree, score: float, step: int, *, always: bool = False
) -> dict[str, Any]:
    """The best states so far, the highest score first, as host arrays, because the training state is donated.

    Args:
      best: "params", "score" and "step", leaves [M, ...].
      params: the present parameters.
      score: theirs; of equal scores the older one stays in front.
      step: the meta-step.
      always: whether the present parameters take the first place whatever their score.
    """
    score = np.float32(score)
    place = 0 if always else int(np.sum(~(best["score"] < score)))
    new = {"params": params, "score": score, "step": np.int32(step)}
    return jax.tree.map(
        lambda old, x: np.concatenate([old[:place], np.asarray(x)[None], old[place:]])[: len(old)], best, new
    )


def selected(best: dict[str, Any]) -> ArrayTree:
    """The parameters that were kept: one state if M = 1, else those of a validation, [m, ...]."""
    if len(best["score"]) == 1:
        return jax.tree.map(lambda x: np.asarray(x)[0], best["params"])
    count = max(1, int(np.sum(best["score"] > UNTRAINED)))
    return jax.tree.map(lambda x: np.asarray(x)[:count], best["params"])
