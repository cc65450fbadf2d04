"""Malformed settings, from the command line and from a file: each ends in an error that says what is wrong."""

import contextlib
import dataclasses
import io
import json
import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments import cli, mazes, runs
from experiments.commands import EXPERIMENTS
from maml_jax import CATALOGUE

MODULES = [module for name, module in EXPERIMENTS.items() if name != "hyperparameters"]
NOT_NUMBERS = ("", "x", "1e", "None ", "0x", "²", "1,5", "[]", "true", "inf inf")
NOT_IN_RANGE = {
    "meta_batch_size": ("0", "-3"),
    "num_meta_steps": ("-1",),
    "eval_episodes": ("0", "1", "-5"),
    "val_every": ("0", "999983"),  # a prime number, which --log-every does not divide
    "log_every": ("0", "-2", "999983"),
    "outer_lr": ("0", "-0.1", "nan", "inf"),
    "outer_lr_end": ("-1", "2", "nan"),
    "outer_clip": ("0", "-1", "nan"),
    "outer_half_life": ("0",),
    "chunk_size": ("0", "-1"),
    "seed": ("-1", "4294967296"),
    "seeds": ("0", "-2"),
    "inner_lr": ("0", "-1", "nan"),
    "num_inner_steps": ("-1",),
    "way": ("0", "1", "-5"),
    "filters": ("0",),
    "ensemble": ("0",),
    "train_shot": ("0",),
    "size": ("0", "7"),
    "num_characters": ("0",),
    "identities": ("0", "1"),
    "beam": ("0", "-1"),
    "num_subsets": ("0",),
    "finetune_steps": ("0", "30"),
    "hidden_size": ("0",),
    "num_pulls": ("0",),
    "num_episodes": ("0",),
}


def flags_of(config):
    """The settings of a method that take a value: of the run and of the hyperparameters."""
    fields = [*dataclasses.fields(config), *dataclasses.fields(config.hyperparameters)]
    values = dataclasses.asdict(config) | dataclasses.asdict(config.hyperparameters)
    names = [field.name for field in fields if field.name not in ("algorithm", "hyperparameters", "tracking")]
    return {name: values[name] for name in names if not isinstance(values[name], bool)}


def test_numbers_out_of_range_are_named():
    count = 0
    for module in MODULES:
        for config in module.METHODS.values():
            flags, of_method = flags_of(config), {field.name for field in dataclasses.fields(config.hyperparameters)}
            for name in NOT_IN_RANGE.keys() & flags.keys():
                if (module, name) == (mazes, "size"):  # of a maze, not of an image
                    continue
                # Nothing reads the end of a schedule that has none, so it may be above the start.
                is_read = name != "outer_lr_end" or config.outer_schedule in ("linear", "cosine")
                for text in NOT_IN_RANGE[name] if is_read else ("-1", "nan"):
                    value = float(text) if name in ("outer_lr", "outer_lr_end", "outer_clip", "inner_lr") else int(text)
                    with pytest.raises(ValueError, match=rf"{name.split('_')[-1]}.*{re.escape(str(value))}"):
                        dataclasses.replace(config.hyperparameters if name in of_method else config, **{name: value})
                    count += 1
    assert count > 1500


def error_of(arguments, methods):
    """What a command line with a mistake ends in, as one text; None if it is accepted."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.parse(methods, "", arguments)
        except ValueError as error:
            return str(error)
        except SystemExit as stopped:
            return said.getvalue() if stopped.code == 2 else None
    return None


@pytest.mark.parametrize("module", MODULES)
def test_command_lines_with_a_mistake_say_what_it_is(module):
    rng = random.Random(0)
    for name in rng.sample(sorted(module.METHODS), min(2, len(module.METHODS))):
        methods = {name: module.METHODS[name]}
        flags = flags_of(methods[name])
        numbers = sorted(flag for flag, value in flags.items() if isinstance(value, int | float))
        for flag in rng.sample(numbers, 3):
            error = error_of([name, cli.flag(flag), rng.choice(NOT_NUMBERS)], methods)
            assert error is not None
            assert cli.flag(flag) in error
        assert "nrecognized" in error_of([name, f"--{rng.choice(['wya', 'inner-rl', 'lr'])}", "3"], methods)
        assert "there is no method" in error_of([name + "x"], methods)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(content=JSON | st.binary(max_size=40), name=st.sampled_from(["config.json", "results.json"]))
def test_files_of_a_run_with_other_content_are_refused(tmp_path_factory, content, name):
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "config.json").write_text('{"experiment": "other"}' if name == "results.json" else "{}")
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (run_dir / name).write_bytes(data)
    with pytest.raises(runs.RunError, match=r"is a run of|is damaged"):
        runs.load(run_dir)


METHODS = [(module, name) for module in MODULES for name in module.METHODS]


@settings(max_examples=200, deadline=None)
@given(method=st.sampled_from(METHODS), value=JSON, data=st.data())
def test_settings_of_a_run_that_cannot_be_are_refused_or_load(tmp_path_factory, method, value, data):
    """A run with one setting replaced has another configuration, or one that is refused; nothing else happens."""
    module, name = method
    stored = runs.as_json(module.with_paper_defaults(module.METHODS[name]))
    stored |= {data.draw(st.sampled_from(sorted(stored))): value}
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "config.json").write_text(json.dumps(stored))
    with contextlib.suppress(runs.RunError):
        config = runs.stored_config(module.METHODS, run_dir)
        assert config.algorithm in module.METHODS


@settings(max_examples=120, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    log_every=st.integers(1, 50),
    times=st.integers(1, 20),
    # Not all settings fit all methods, so that only some are changed in each.
    numbers=st.fixed_dictionaries(
        {},
        optional={
            "way": st.integers(2, 30),
            "shot": st.integers(1, 20),
            "meta_batch_size": st.integers(1, 64),
            "eval_episodes": st.integers(2, 900),
            "outer_lr": st.floats(1e-6, 10),
            "seed": st.integers(0, 2**32 - 1),
        },
    ),
)
def test_settings_survive_the_way_to_a_file_and_back(tmp_path_factory, method, log_every, times, numbers):
    module, name = method
    config = dataclasses.replace(module.METHODS[name], log_every=log_every, val_every=times * log_every)
    numbers = {setting: value for setting, value in numbers.items() if hasattr(config, setting)}
    try:
        if "way" in numbers and config.train_way not in (None, numbers["way"]) and not CATALOGUE[name].any_way:
            numbers["train_way"] = None
        config = module.with_paper_defaults(dataclasses.replace(config, **numbers))
    except ValueError:
        assume(False)  # settings that do not fit each other, which other tests are about
    run_dir = tmp_path_factory.mktemp("run")
    with runs.open_run(run_dir, config):
        pass
    found = runs.stored_config(module.METHODS, run_dir)
    assert runs.as_json(found) == runs.as_json(config)
    with runs.open_run(run_dir, found):  # the same configuration, so it is resumed
        pass
