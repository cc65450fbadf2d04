"""The tutorials run, what they claim holds, and their committed outputs say nothing about a machine."""

import ast
import copy
import inspect
import re
import types

import pytest

from experiments import tutorials

nbformat = pytest.importorskip("nbformat", reason="the tutorials are notebooks; pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="pip install nbclient to run the tutorials")
pytest.importorskip("ipykernel", reason="pip install ipykernel to run the tutorials")

SMALLER = {
    "your_own_loss": {"NUM_META_STEPS = 1000": "NUM_META_STEPS = 500"},
    "your_own_model": {},
    "your_own_environment": {"NUM_META_STEPS = 100": "NUM_META_STEPS = 30"},
    "first_against_second_order": {"STEPS_PER_CALL, NUM_CALLS = 250": "STEPS_PER_CALL, NUM_CALLS = 125"},
}
"""What a tutorial has, and what its test has instead. The assertions are the same."""
SLOW = pytest.mark.slow
MOST_BYTES = 200_000  # of one notebook, its figures included


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def no_settings(tmp_path, monkeypatch):
    """A kernel without the settings of the user, which draws into the notebook."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)


def resolve(node, namespace):
    """What an expression such as `models.mlp` names; None if it begins with no import."""
    if isinstance(node, ast.Attribute):
        holder = resolve(node.value, namespace)
        return getattr(holder, node.attr) if isinstance(holder, types.ModuleType) else None
    return namespace.get(node.id) if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("name", tutorials.NOTEBOOKS)
def test_what_a_tutorial_names_of_the_library_is_there(name):
    nodes = list(ast.walk(ast.parse("\n".join(cell.source for cell in code_cells(tutorials.read(name))))))
    imports, namespace, calls = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)], {}, 0
    exec(compile(ast.Module(imports, []), name, "exec"), namespace)
    for node in nodes:
        resolve(node, namespace)
        called = resolve(node.func, namespace) if isinstance(node, ast.Call) else None
        if getattr(called, "__module__", "").startswith("maml_jax"):
            inspect.signature(called).bind_partial(**{word.arg: None for word in node.keywords if word.arg})
            calls += 1
    assert calls >= 5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "your_own_model" else SLOW) for name in tutorials.NOTEBOOKS]
)
def test_every_cell_runs_and_its_assertions_hold(name, no_settings):
    notebook = tutorials.read(name)
    assert sum(cell.source.count("assert") for cell in code_cells(notebook)) >= 3
    shortened = copy.deepcopy(notebook)
    for text, smaller in SMALLER[name].items():
        (cell,) = [cell for cell in code_cells(shortened) if text in cell.source]
        cell.source = cell.source.replace(text, smaller)
    executed = tutorials.execute(shortened)
    assert [cell.execution_count for cell in code_cells(executed)] == list(range(1, len(code_cells(executed)) + 1))
    # The committed outputs are those of these cells: of the same kinds, in the same places.
    for cell, committed in zip(code_cells(executed), code_cells(notebook), strict=True):
        kinds = [
            [
                (output.output_type, sorted(output.get("data", ())))
                for output in c.outputs
                if output.get("name") != "stderr"
            ]
            for c in (cell, committed)
        ]
        assert kinds[0] == kinds[1], cell.source


def test_a_cell_that_fails_fails_the_notebook(no_settings):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="1 \\+ 1 == 3"):
        tutorials.execute(notebook)


def test_all_notebooks_are_listed():
    assert {f"{name}.ipynb" for name in tutorials.NOTEBOOKS} == {file.name for file in tutorials.HERE.glob("*.ipynb")}


@pytest.mark.parametrize("name", tutorials.NOTEBOOKS)
def test_committed_outputs_are_complete_and_small_and_of_no_machine(name):
    file, notebook = tutorials.HERE / f"{name}.ipynb", tutorials.read(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert file.stat().st_size < MOST_BYTES
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert not any(cell.metadata for cell in notebook.cells)
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert not re.search(r"/(home|root|work|tmp|usr|opt|Users)\b", text)


@pytest.mark.parametrize("name", tutorials.NOTEBOOKS)
def test_a_tutorial_says_what_is_learned_and_what_to_read_next(name):
    cells = tutorials.read(name).cells
    assert cells[0].cell_type == cells[-1].cell_type == "markdown"
    assert "You will learn" in cells[0].source
    assert "## What to read next" in cells[-1].source
    for linked in re.findall(r"\]\((\w+\.ipynb)\)", "".join(cell.source for cell in cells)):
        assert (tutorials.HERE / linked).exists(), linked
