"""Tutorials as notebooks, committed with their outputs.

`python -m experiments.tutorials` runs them all and stores their new outputs, without anything about the machine. It
needs nbclient and ipykernel.
"""

import copy
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOTEBOOKS = ("your_own_loss", "your_own_model", "first_against_second_order", "your_own_environment")
"""The tutorials in the order of reading."""


def read(name: str) -> Any:
    """Reads a tutorial.

    Args:
      name: one of `NOTEBOOKS`.

    Returns:
      A notebook of nbformat.
    """
    import nbformat

    return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def execute(notebook: Any, *, timeout_seconds: float = 600) -> Any:
    """Runs every cell of a notebook in a new kernel.

    Args:
      notebook: a notebook of nbformat. It is not changed.
      timeout_seconds: how long one cell may take.

    Returns:
      The notebook with new outputs. Its metadata only name the language.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell raises. The message shows the cell and the traceback.
    """
    import nbclient

    executed = copy.deepcopy(notebook)
    nbclient.NotebookClient(
        executed,
        timeout=timeout_seconds,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": HERE}},
    ).execute()
    executed.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in executed.cells:
        cell.metadata = {}
    return executed


def main() -> None:
    """Runs every tutorial and writes it atomically."""
    import nbformat

    for name in NOTEBOOKS:
        file = HERE / f"{name}.ipynb"
        executed = execute(read(name))
        partial = file.with_name(f"{file.name}.partial")
        nbformat.write(executed, partial)
        os.replace(partial, file)
        print(file.name)
