"""Which module may import which, and what importing the library must not do."""

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import maml_jax

ROOT = Path(maml_jax.__file__).parent
MODULES = {
    ".".join(("maml_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# Each part of the library and the parts that it may import when it is loaded, itself apart.
ALLOWED = {
    "types": set(),
    "losses": {"types"},
    "inner": {"types", "losses"},
    "algorithms": {"types", "losses", "inner"},
    "models": {"types"},
    "tasks": {"types"},
    "parallel": {"types"},
    "processes": set(),
    "meta_gradient": {"types"},
    "outer": {"types", "parallel", "meta_gradient"},
    "evaluate": {"types", "parallel"},
    "checkpoint": {"types", "processes"},
    "cost": {"types", "inner", "meta_gradient"},
    "portable": {"types", "losses", "models", "algorithms", "_version"},
    "rl": {"types", "inner", "models", "parallel", "outer"},
    "_version": set(),
}


def part(module):
    """`maml_jax.inner.loop` -> `inner`."""
    return module.split(".")[1] if module.count(".") else ""


def imports(node, *, inside_functions):
    """Absolute names of the modules that are imported at module level, or only within functions."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (
                f"{child.module}.{alias.name}" if f"{child.module}.{alias.name}" in MODULES else child.module
                for alias in child.names
            )
        elif is_function and inside_functions:
            yield from imports(child, inside_functions=True)
        elif not is_function:
            yield from imports(child, inside_functions=inside_functions)


def imported(module, *, inside_functions):
    return set(imports(ast.parse(MODULES[module].read_text()), inside_functions=inside_functions))


@pytest.mark.parametrize("module", [module for module in MODULES if module != "maml_jax"])
def test_imports_point_one_way(module):
    own = part(module)
    assert own in ALLOWED, f"{module} belongs to no part of the design; say in ALLOWED what it may import"
    ours = {name for name in imported(module, inside_functions=True) if name.split(".")[0] == "maml_jax"}
    parts = {part(name) for name in ours} - {own}
    assert parts <= ALLOWED[own], f"{module} imports {sorted(parts - ALLOWED[own])}"


@pytest.mark.parametrize("module", MODULES)
def test_the_library_imports_no_program_and_loads_data_libraries_late(module):
    anywhere = {name.split(".")[0] for name in imported(module, inside_functions=True)}
    on_import = {name.split(".")[0] for name in imported(module, inside_functions=False)}
    assert not anywhere & {"experiments", "benchmarks", "tests", "tensorflow"}
    assert not on_import & {"tensorflow_datasets", "PIL", "tyro", "matplotlib", "torch"}
    if part(module) != "models":
        assert "flax" not in anywhere


def test_algorithms_do_not_import_each_other_in_circles():
    # Reptile and pretraining are FOMAML with one field replaced; FOMAML knows neither. The catalogue knows all.
    allowed = {"maml_jax.algorithms.maml"}
    for module in MODULES:
        if module.startswith("maml_jax.algorithms.") and module != "maml_jax.algorithms.catalogue":
            siblings = {name for name in imported(module, inside_functions=True) if part(name) == "algorithms"}
            assert siblings <= allowed - {module}


def test_importing_the_library_touches_no_device_and_no_tensorflow():
    # A platform that does not exist makes the first use of any device fail.
    code = """
import sys
import maml_jax
late = {"tensorflow", "tensorflow_datasets", "torch", "matplotlib", "PIL"} & set(sys.modules)
assert not late, late
import jax
try:
    jax.devices()
except RuntimeError as error:
    assert "no_such_platform" in str(error), error
else:
    raise AssertionError("the platform should not exist")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, cwd=ROOT.parent, check=True)


def test_every_public_name_is_listed_and_exists():
    assert sorted(maml_jax.__all__) == sorted(set(maml_jax.__all__))
    missing = [name for name in maml_jax.__all__ if not hasattr(maml_jax, name)]
    assert not missing


def test_the_library_is_typed_and_requires_what_it_imports():
    assert (ROOT / "py.typed").exists()
    setup = configparser.ConfigParser()
    setup.read(ROOT.parent / "setup.cfg")
    required = {re.split(r"[><=\[]", line)[0] for line in setup["options"]["install_requires"].split()}
    required |= {"maml_jax", "orbax"} if "orbax-checkpoint" in required else {"maml_jax"}
    for module in MODULES:
        names = {name.split(".")[0] for name in imported(module, inside_functions=False)}
        assert names - sys.stdlib_module_names <= required, module
