"""Fills in the tables of benchmarks/README.md from the result files, so that no number there is typed by hand.

python -m benchmarks.report
"""

import re
from pathlib import Path
from typing import Any

from benchmarks import common, devices, memory, meta_step, peers, sinusoid
from experiments.report import markdown_table

HERE = Path(__file__).parent
TABLES = {
    "meta_step": meta_step.tables,
    "memory": memory.tables,
    "sinusoid": sinusoid.tables,
    "devices": devices.tables,
    "peers": peers.tables,
}


def section(content: dict[str, Any]) -> str:
    """The tables of one benchmark in Markdown, and what they were measured with and on."""
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    parts = [f"`{content['command']}` on {content['device']}; {versions}.", f"![](results/{content['benchmark']}.png)"]
    for table in TABLES[content["benchmark"]](content):
        cells = [[str(cell) for cell in row] for row in table.rows]
        parts += [f"{table.title}:", markdown_table(list(table.columns), cells), *table.note.splitlines()]
    return "\n\n".join(parts)


def write(readme: Path, results_dir: Path) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end -->` for each NAME that has a result file.

    Raises:
      ValueError: if the text has no place for a benchmark.
    """
    text = readme.read_text()
    for name in TABLES:
        file = results_dir / f"{name}.json"
        if not file.exists():
            continue
        filled = f"<!-- {name} -->\n\n{section(common.read_results(file))}\n\n<!-- end -->"
        text, places = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, new=filled: new, text, flags=re.DOTALL)
        if places != 1:
            raise ValueError(f"{readme} has {places} places for {name}, lines <!-- {name} --> and <!-- end -->")
    readme.write_text(text)


if __name__ == "__main__":
    write(HERE / "README.md", HERE / "results")
