"""Puts pages of the repository into the site, so that nothing is written twice.

- Markdown pages and figures of experiments/ and benchmarks/ keep their paths, so their links to each other work.
- Notebooks become pages.
- Links are those of the repository. On the site, docs/ is the root, and notebooks are pages.
- In a page of docs/, a line `→ [HEADING](FILE#ANCHOR)` becomes that section of a file of the repository.
"""

import base64
import re
from pathlib import Path, PurePosixPath

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COPIED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/SCALING.md",
    "benchmarks/results/*.png",
    "experiments/GUIDE.md",
    "experiments/PROVENANCE.md",
    "experiments/RESULTS.md",
    "experiments/figures/*.png",
    "experiments/launch/*",
)
"""Files of the repository that the site has at the same path."""
NOTEBOOKS = "experiments/tutorials/*.ipynb"

_SECTION = re.compile(r"^→ \[(.+)\]\((?:\.\./)*([^)#]+)#[^)]+\)$", re.MULTILINE)
_FENCE = re.compile(r"^(?:```|~~~)")
_LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of the repository and the notebooks."""
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted(ROOT.glob(NOTEBOOKS)):
        for file, content in notebook_pages(path).items():
            files.append(File.generated(config, file, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the repository into those of the site, and fills in the sections of other files."""
    depth = page.file.src_uri.count("/")
    if Path(config.docs_dir, page.file.src_uri).is_file():
        markdown = markdown.replace("](../" + "../" * depth, "](" + "../" * depth).replace(".ipynb)", ".md)")
    else:
        markdown = markdown.replace("](" + "../" * depth + "docs/", "](" + "../" * depth)
    return _SECTION.sub(lambda match: section(ROOT / match[2], match[1], "../" * depth), markdown)


def section(file: Path, heading: str, to_root: str = "") -> str:
    """The text of a section of a Markdown file, without its heading.

    Args:
      file: a file of the repository.
      heading: the text of the heading.
      to_root: the way to the root of the site, which is put before relative links.

    Raises:
      PluginError: if the file has not exactly one such heading.
    """
    found, level, is_code = [], 0, False
    num_found = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        is_code ^= bool(_FENCE.match(line))
        title = None if is_code else re.match(r"(#+) (.*)", line)
        if title and title[2].strip() == heading:
            num_found, level = num_found + 1, len(title[1])
            continue
        if title and len(title[1]) <= level:
            level = 0
        if level:
            found.append(line)
    if num_found != 1:
        raise PluginError(f"{file.name} has {num_found} headings {heading!r}; a page of docs/ includes that section")
    folder = file.parent.relative_to(ROOT).as_posix() + "/" if file.is_relative_to(ROOT) and file.parent != ROOT else ""
    return _LINK.sub(lambda match: f"]({to_root}{folder}{match[1]})", "\n".join(found)).strip()


def notebook_pages(path: Path) -> dict[str, str | bytes]:
    """A notebook as a Markdown page, and its figures, by their path in the site."""
    folder, name = PurePosixPath(path.parent.relative_to(ROOT).as_posix()), path.stem
    parts: list[str] = []
    figures: dict[str, str | bytes] = {}
    for index, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source.replace(".ipynb)", ".md)"))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        text = ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                figure = f"{name}_{index}.png"
                figures[str(folder / figure)] = base64.b64decode(data["image/png"])
                parts.append(f"![figure of the cell above]({figure})")
            else:
                text += output.get("text", "") + data.get("text/plain", "")
        if text:
            parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"This page is the notebook `{path.relative_to(ROOT).as_posix()}` with its outputs.")
    return {str(folder / f"{name}.md"): "\n\n".join(parts) + "\n", **figures}
