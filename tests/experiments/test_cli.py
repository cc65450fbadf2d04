"""The command line: one subcommand for each method, with its own flags."""

import contextlib
import dataclasses
import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    bandits,
    classification,
    cli,
    domains,
    faces,
    hyperparameters,
    images,
    navigation,
    omniglot,
    sinusoid,
    translation,
)
from experiments.commands import EXPERIMENTS
from experiments.runs import RunError
from maml_jax import CATALOGUE, ReptileDescent


@pytest.mark.parametrize("module", [domains, omniglot, sinusoid])
def test_every_algorithm_that_fits_an_experiment_appears_in_it(module):
    experiment = module.__name__.split(".")[-1]
    fitting = {name for name, entry in CATALOGUE.items() if experiment in entry.settings}
    assert fitting <= set(module.METHODS)
    for name in fitting:
        assert module.METHODS[name].hyperparameters == CATALOGUE[name].settings[experiment]


@pytest.mark.parametrize(
    "arguments",
    [
        ["reptile", "--inner-lr", "0.5", "--way", "20"],
        ["--algorithm", "reptile", "--inner-lr", "0.5", "--way", "20"],
        ["--way", "20", "--algorithm=reptile", "--inner-lr", "0.5"],
        ["--way", "20", "--inner-lr", "0.5", "--algorithm", "reptile"],
    ],
)
def test_the_method_is_a_subcommand_or_a_flag(arguments):
    config = cli.parse(omniglot.METHODS, "", arguments)
    assert (config.algorithm, config.way, config.hyperparameters.inner_lr) == ("reptile", 20, 0.5)


WITH_METHODS = EXPERIMENTS.values()


@pytest.mark.parametrize("module", WITH_METHODS, ids=lambda module: module.__name__)
def test_a_method_without_flags_has_its_defaults(module):
    for config in module.METHODS.values():
        assert cli._ungrouped(cli._grouped(config), module.METHODS) == config
    first = next(iter(module.METHODS))
    assert cli.parse({first: module.METHODS[first]}, "", []) == module.METHODS[first]


def test_no_experiment_with_methods_is_forgotten():
    folder = Path(cli.__file__).parent
    named = {file.stem for file in folder.glob("*.py") if "main(METHODS" in file.read_text()}
    assert named == {module.__name__.split(".")[-1] for module in WITH_METHODS}


def test_a_setting_that_cannot_be_is_named_by_its_flag():
    with pytest.raises(ValueError, match=r"^--inner-lr -1\.0 must be a positive number"):
        cli.parse(omniglot.METHODS, "", ["maml", "--inner-lr", "-1"])
    for name in ("--outer-lr-end", "--outer-half-life"):
        with pytest.raises(ValueError, match=f"^{name} .* has no effect with --outer-schedule constant; leave it at"):
            cli.parse(omniglot.METHODS, "", ["maml", name, "0.0005" if name == "--outer-lr-end" else "5"])
    # The end of a method's own schedule is no mistake of the user.
    for name, module in {"maml++": omniglot, "rl2": bandits, "maml": bandits}.items():
        assert module.METHODS[name].outer_lr_end > 0
        assert cli.parse(module.METHODS, "", [name, "--outer-schedule", "halved"]).outer_schedule == "halved"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (omniglot, ["maml", "--network", "mlp", "--filters", "9"], "--filters 9 has no effect with --network mlp"),
        (omniglot, ["maml", "--network", "mlp", "--pooling"], "--pooling has no effect with --network mlp"),
        (
            omniglot,
            ["maml", "--rotated-test-classes"],
            "no effect with --no-rotated-classes; .* or choose --rotated-classes$",
        ),
        (sinusoid, ["maml", "--inner-lr-grid", "0.1"], "--inner-lr-grid 0.1 has no effect with --no-tune-inner-lr"),
        (sinusoid, ["reptile", "--carry-state"], "--carry-state has no effect with --inner-optimizer sgd"),
        (omniglot, ["protonets", "--network", "pixels"], "--network pixels leaves protonets without parameters"),
        (omniglot, ["maml++", "--adapt-norm"], "--adapt-norm has no effect with --per-step-norm"),
        (images, ["maml", "--network", "resnet12", "--norm-scale"], "no effect with --network resnet12"),
        (omniglot, ["leo", "--no-rotations"], "--no-rotations has no effect with --network features"),
        (omniglot, ["reptile", "--no-rotations"], "--no-rotations has no effect with --rotated-classes; leave it at"),
        (domains, ["mldg", "--data", "pacs", "--num-characters", "10"], "no effect with --data pacs"),
        (sinusoid, ["meta-sgd", "--tune-inner-lr"], "no effect with meta-sgd, whose rates are learned"),
        (omniglot, ["leo", "--train-embedding"], "--train-embedding has no effect with --network features"),
        (images, ["leo", "--augment"], "--augment has no effect with --network features"),
        (images, ["leo", "--stream"], "or choose --network conv4 or --network multi-scale or --network resnet12$"),
        (translation, ["fomaml", "--vector-size", "32"], "--vector-size 32 has no effect with --no-lexical"),
        (translation, ["fomaml", "--network", "gru", "--depth", "6"], "--depth 6 has no effect with --network gru"),
        (faces, ["erm", "--margin", "0.4"], "--margin 0.4 has no effect with --losses mfr"),
        (navigation, ["maml", "--outer-clip", "1"], "--outer-clip 1.0 has no effect with --outer-rule trust-region"),
        (omniglot, ["maml", "--pooling", "--flatten"], "--flatten has no effect with --pooling"),
        (omniglot, ["mann", "--inductive"], "--inductive has no effect with --network pixels"),
        (images, ["leo", "--stream"], "--stream has no effect with --network features"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        cli.parse(module.METHODS, "", arguments)


@pytest.mark.parametrize("schedule", ["constant", "halved"])
def test_an_outer_rate_may_be_below_an_end_that_nothing_reads(schedule):
    for name, method in bandits.METHODS.items():
        rate = method.outer_lr_end / 10 or 1e-4
        arguments = [name, "--outer-schedule", schedule, "--outer-lr", str(rate)]
        assert cli.parse(bandits.METHODS, "", arguments).outer_lr == rate


def test_a_tilde_is_the_home_directory_in_every_experiment():
    assert hyperparameters.Config(run_dir=Path("~/run")).run_dir == Path("~/run").expanduser()


@pytest.mark.parametrize("setting", ["outer-rule clipped", "outer-lr 0.1", "on-nonfinite skip", "meta-batch-size 3"])
def test_random_parameters_have_no_flags_of_an_outer_update(setting, capsys):
    arguments = f"--{setting}".split()
    with pytest.raises(SystemExit):
        cli.parse(navigation.METHODS, "", ["random", *arguments])
    assert arguments[0] in capsys.readouterr().err
    extra = ["--outer-rule", "clipped"] if setting != "outer-rule clipped" else []
    cli.parse(navigation.METHODS, "", ["maml", *extra, *arguments])


def test_random_parameters_are_not_trained():
    with pytest.raises(ValueError, match="--num-meta-steps 5 does not fit random, whose parameters are not trained"):
        cli.parse(navigation.METHODS, "", ["random", "--num-meta-steps", "5"])


def test_a_learned_optimiser_is_tested_with_the_steps_of_its_training():
    for arguments, expected in (([], 12), (["--num-inner-steps", "8"], 8), (["--eval-inner-steps", "3"], 3)):
        config = images.with_paper_defaults(cli.parse(images.METHODS, "", ["meta-lstm", *arguments]))
        assert config.eval_inner_steps == expected


def test_what_cannot_be_trained_is_refused_before_a_run_begins():
    leo = cli.parse(omniglot.METHODS, "", ["leo", "--network", "conv4", "--pretrained-run", "None"])
    with pytest.raises(RunError, match="leo takes the features of a pretrained network"):
        classification.check_trainable(omniglot.DATA, omniglot.with_paper_defaults(leo))
    for module, needed in ((omniglot, 12), (images, 3)):  # Omniglot has rotations as classes
        data = dataclasses.replace(module.DATA, examples=lambda config, split: [np.zeros((5, 28, 28, 1), np.uint8)] * 3)
        for given in (needed - 1, needed):
            arguments = ["pretrained-classifier", "--num-classes", str(given)]
            config = module.with_paper_defaults(cli.parse(module.METHODS, "", arguments))
            refused = pytest.raises(RunError, match=f"--num-classes {given} is smaller than the {needed} training")
            with refused if given < needed else contextlib.nullcontext():
                classification.check_trainable(data, config)


def test_an_interruption_ends_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as ended, cli.mistakes_in_one_paragraph():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "a training goes on from its last checkpoint with the same command" in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """A shell may have started the tests with interruptions ignored, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interruption_that_a_garbage_collection_swallows_is_raised_again(capsys, interruptible):
    armed, start = [], time.monotonic()

    def callback(phase, info):
        if armed:
            armed.pop()
            signal.raise_signal(signal.SIGINT)

    def collect_and_wait():
        armed.append(True)
        gc.collect()
        time.sleep(60)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(SystemExit) as ended, cli.mistakes_in_one_paragraph():
            collect_and_wait()
    finally:
        gc.callbacks.remove(callback)
    assert ended.value.code == 130
    assert time.monotonic() - start < 30  # it ends the wait
    assert "Exception ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.2, 2.0, 3.0])
def test_an_interruption_of_the_start_has_no_traceback(tmp_path, seconds, interruptible):
    """Of the imports, which it ends by the signal, or later with the documented code."""
    long = ["--num-meta-steps", "1000000", "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "experiments.sinusoid", *long]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in said
    assert "Exception ignored" not in said


STOPPED = """
import atexit, os
from experiments import cli, sinusoid
def run(config):
    atexit.register(os.abort)  # in place of threads that crash while Python ends
    raise KeyboardInterrupt
cli.main(sinusoid.METHODS, run, "")
"""


def test_a_stopped_process_has_its_exit_status_whatever_happens_while_python_ends(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(Path(cli.__file__).parents[1])))}
    command = [sys.executable, "-m", "stopped", "maml"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "stopped; a training goes on" in done.stderr


def test_a_device_without_memory_ends_in_a_paragraph(capsys):
    with pytest.raises(SystemExit) as ended, cli.mistakes_in_one_paragraph():
        jnp.zeros(1 << 60, jnp.int8).block_until_ready()
    assert ended.value.code == 2
    assert "with a smaller --chunk-size" in capsys.readouterr().err
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), cli.mistakes_in_one_paragraph():
        raise jax.errors.JaxRuntimeError("INTERNAL: this is a fault of the program")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unknown backend: cuda")])
def test_a_platform_without_a_device_is_named(error, monkeypatch):
    def fail():
        raise error

    cli.check_devices()
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(RunError, match=f"JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms}"):
        cli.check_devices()


def test_a_mistake_is_explained_by_the_help_of_the_method(capsys):
    with pytest.raises(SystemExit):
        cli.parse(omniglot.METHODS, "", ["boil", "--inner-lrr", "1"], program="python -m experiments.omniglot")
    said = capsys.readouterr().err
    assert "--inner-lr FLOAT" in said
    assert "run python -m experiments.omniglot boil --help" in said


def test_without_a_method_it_is_maml():
    assert cli.parse(omniglot.METHODS, "", ["--way", "20"]).algorithm == "maml"
    assert cli.parse(sinusoid.METHODS, "", []) == sinusoid.METHODS["maml"]


@pytest.mark.parametrize("arguments", [["--algorithm", "nope"], ["nope"], ["--algorithm"]])
def test_an_unknown_method_is_refused(arguments):
    with pytest.raises(ValueError, match=r"there is no method .* here; choose one of maml, fomaml, reptile"):
        cli.parse(omniglot.METHODS, "", arguments)


def test_no_line_of_a_help_text_begins_with_a_flag():
    # tyro breaks the paragraph there.
    root = Path(cli.__file__).parents[1]
    files = [file for folder in ("experiments", "benchmarks") for file in (root / folder).glob("*.py")]
    assert len(files) > 40
    assert not [file.name for file in files if re.search(r"^ *--[a-z]", file.read_text(), re.MULTILINE)]


@pytest.mark.parametrize(("module", "published"), [(omniglot, "98.7 ± 0.4"), (sinusoid, "0.67 / 0.38 / 0.35")])
def test_help_lists_the_methods_with_their_published_numbers(module, published, capsys):
    def help_of(*arguments):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.parse(module.METHODS, "", [*arguments, "--help"], about=module.about())
        return re.sub(r"[\s│]+", " ", capsys.readouterr().out)

    assert published in help_of()
    assert "--inner-lr FLOAT" not in help_of()  # the flags are those of a method
    assert "--inner-lr FLOAT" in help_of("fomaml")
    assert "--algorithm" not in help_of("fomaml")


@pytest.mark.parametrize(
    "arguments",
    [
        ["anil", "--adapt-norm"],
        ["protonets", "--adapt-norm"],
        ["protonets", "--eval-inner-steps", "3"],
        ["pretrained-classifier", "--num-inner-steps", "7"],
        ["pretrained-classifier", "--train-way", "7"],
    ],
)
def test_a_method_has_no_flag_that_it_does_not_read(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.parse(omniglot.METHODS, "", arguments)
    assert f"Unrecognized options: {arguments[1]}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.parse(omniglot.METHODS, "", [arguments[0], "--help"])
    assert f"{arguments[1]} " not in capsys.readouterr().out
    assert cli.parse(omniglot.METHODS, "", ["maml", "--adapt-norm"]).adapt_norm


@pytest.mark.parametrize("arguments", [["--help"], ["maml", "--help"]])
def test_no_line_of_a_help_is_wider_than_the_terminal(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.parse(navigation.METHODS, navigation.__doc__, arguments, about=navigation.about())
    usage, *lines = capsys.readouterr().out.splitlines()
    assert "usage" in usage
    assert max(map(len, lines)) <= 80


def test_a_rate_that_is_left_out_is_that_of_the_recipe():
    for module, name in ((images, "reptile"), (sinusoid, "reptile"), (omniglot, "reptile")):
        config = module.with_paper_defaults(cli.parse(module.METHODS, "", [name, "--inner-lr", "None"]))
        expected = module.with_paper_defaults(module.METHODS[name])
        assert config.hyperparameters == expected.hyperparameters
    steps = images.with_paper_defaults(cli.parse(images.METHODS, "", ["maml", "--num-inner-steps", "None"]))
    assert steps.hyperparameters.num_inner_steps == 5
    with pytest.raises(ValueError, match="inner_lr=None must be a positive number"):
        ReptileDescent(inner_lr=None).rule()


def test_a_tilde_in_a_path_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = cli.parse(omniglot.METHODS, "", ["leo", "--run-dir=~/run", "--pretrained-run=~/features"])
    assert (config.run_dir, config.pretrained_run) == (tmp_path / "run", tmp_path / "features")


@pytest.mark.parametrize("run_dir", ["", ".", "./"])
def test_a_run_directory_that_is_empty_is_refused(run_dir):
    with pytest.raises(ValueError, match="--run-dir is empty or the current directory; name a directory"):
        cli.parse(sinusoid.METHODS, "", ["maml", "--run-dir", run_dir])


def test_a_package_that_is_missing_ends_in_one_paragraph(capsys):
    with pytest.raises(SystemExit, match=r"^2$"), cli.mistakes_in_one_paragraph():
        raise ModuleNotFoundError("install it with `pip install pillow`")
    assert "error: install it with `pip install pillow`" in capsys.readouterr().err


def test_a_home_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"--run-dir ~nosuchuser/run: .*; name the directory without ~"):
        dataclasses.replace(omniglot.METHODS["maml"], run_dir=Path("~nosuchuser/run"))


def test_help_may_be_cut_off():
    line = f"{sys.executable} -m experiments.sinusoid maml --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.stderr) == (f"{128 + signal.SIGPIPE}\n", "")
