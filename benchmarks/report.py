"""Generates the tables of benchmarks/README.md and README.md from the result files."""

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks import (
    breakdown,
    common,
    devices,
    memory,
    meta_step,
    methods,
    navigation,
    orders,
    peers,
    sinusoid,
    surrogates,
)
from experiments.intervals import markdown_table

HERE = Path(__file__).parent
TABLES = {
    "meta_step": meta_step.tables,
    "breakdown": breakdown.tables,
    "memory": memory.tables,
    "sinusoid": sinusoid.tables,
    "devices": devices.tables,
    "peers": peers.tables,
    "methods": methods.tables,
    "methods_sinusoid": methods.tables,
    "orders": orders.tables,
    "navigation": navigation.tables,
    "surrogates": surrogates.tables,
}


def section(name: str, content: dict[str, Any]) -> str:
    """The tables of the result file of that name in Markdown, after the command, the device and the versions."""
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    parts = [
        f"`{content['command']}` on {content['device']}; {versions}.",
        f"![the figure of these tables](results/{name}.png)",
    ]
    for table in TABLES[name](content):
        cells = [[str(cell) for cell in row] for row in table.rows]
        parts += [f"{table.title}:", markdown_table(list(table.columns), cells), *table.note.splitlines()]
    return "\n\n".join(parts)


def speed(content: dict[str, Any]) -> str:
    """The times of the peers, for the README of the project."""
    steps = sorted({row["inner_steps"] for row in content["rows"]})
    by = {(row["implementation"], row["inner_steps"]): row for row in content["rows"]}

    def cell(name, count):
        if (name, count) not in by:
            return ""
        row = by[name, count]
        ratio = row["times_ours"]
        shown = f"{ratio.median:.0f} times, one call" if ratio.repetitions == 1 else f"{ratio.median:.2f} times"
        return f"{1e3 * row['seconds'].median:,.0f} ms, {shown}"

    header = ["", *(f"{count} inner step{'s' if count > 1 else ''}" for count in steps)]
    names = dict.fromkeys(row["implementation"] for row in content["rows"])
    return markdown_table(header, [[name, *(cell(name, count) for count in steps)] for name in names])


def fill(readme: Path, sections: dict[str, str]) -> None:
    """Replaces the text between `<!-- NAME -->` and `<!-- end -->` for each NAME.

    Raises:
      ValueError: if the file does not have exactly one such place for a name. The file is then unchanged.
    """
    text = readme.read_text()
    for name, content in sections.items():
        filled = f"<!-- {name} -->\n\n{content}\n\n<!-- end -->"
        text, places = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, new=filled: new, text, flags=re.DOTALL)
        if places != 1:
            raise ValueError(
                f"{readme} has {places} places for {name} and must have one: <!-- {name} --> ... <!-- end -->"
            )
    readme.write_text(text)


def write(readme: Path, project_readme: Path | None, results_dir: Path) -> None:
    """Generates the tables of every benchmark that has a result file, and the table in the project's README."""
    found = {file.stem: common.read_results(file) for name in TABLES if (file := results_dir / f"{name}.json").exists()}
    fill(readme, {name: section(name, content) for name, content in found.items()})
    if project_readme is not None and "peers" in found:
        fill(project_readme, {"speed": speed(found["peers"])})


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__).parse_args()
    write(HERE / "README.md", HERE.parent / "README.md", HERE / "results")
