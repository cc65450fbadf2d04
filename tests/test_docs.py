"""The documentation builds without a network, its links and its code work, and it has every public name."""

import dataclasses
import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import maml_jax
from experiments import common, runs, sinusoid
from maml_jax import models, rl, tasks

ROOT = Path(maml_jax.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES_WITH_CODE = [
    page for page in (DOCS / "idea.md", *sorted((DOCS / "how-to").glob("*.md"))) if "```python" in page.read_text()
]


SMALLER = {
    "your_images": {
        "size=32": "size=16",
        "(2, 32, 32, 3)": "(2, 16, 16, 3)",
        "features=32": "features=4",
        "num_steps=20": "num_steps=5",
        "num_episodes=600": "num_episodes=20",
    },
    "reinforcement_learning": {
        "NUM_META_STEPS = 100": "NUM_META_STEPS = 2",
        '"num_trajectories": 20': '"num_trajectories": 4',
    },
    "evaluate": {"num_steps=300": "num_steps=20", "num_episodes=600": "num_episodes=100"},
    "choose": {"(0.003, 0.01)": "(0.01,)", "num_steps=100": "num_steps=10", "num_episodes=100": "num_episodes=10"},
}
"""What the code of a page has, and what its test has instead."""


def load(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class References(HTMLParser):
    """What a page loads by itself, what it links to, and the anchors that it has."""

    def __init__(self, page):
        super().__init__()
        self.loaded, self.linked, self.anchors, self.classes = [], [], set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        self.classes |= set((attrs.get("class") or "").split())
        if attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("href") and not {"next", "prev", "canonical"} & {attrs.get("rel")}:
            self.loaded.append(attrs["href"])
        if tag == "a" and attrs.get("href"):
            self.linked.append(attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers", "nbformat"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install -e '.[docs]' to build the documentation")
    directory = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"  # a proxy that does not exist: to load anything would fail
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)
    # Without --quiet, which would hide the warnings from --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def pages(site):
    return {page: References(page) for page in sorted(site.rglob("*.html"))}


def test_pages_load_nothing_from_elsewhere(site, pages):
    assert len(pages) > 20
    for page, references in pages.items():
        external = [url for url in references.loaded if urlsplit(url).scheme not in ("", "data") or url[:2] == "//"]
        assert not external, (page, external)
        # For these, scripts of the theme would load something when the page is shown.
        assert not references.classes & {"mermaid", "arithmatex"}, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_a_browser_shows_every_page_without_an_error(site, pages, browser):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    address, problems = "", []
    shown = browser.new_page(viewport={"width": 390, "height": 844})
    shown.on("pageerror", lambda error: problems.append((shown.url, str(error))))
    shown.on("response", lambda response: response.status < 400 or problems.append((shown.url, response.url)))
    shown.on("request", lambda request: request.url.startswith((address, "data:")) or problems.append(request.url))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        for page in pages:
            shown.goto(address + page.relative_to(site).as_posix(), wait_until="load")
            broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
            problems += [(page, image) for image in shown.evaluate(broken)]
            # A table or a line of code scrolls by itself. The page of a telephone does not.
            if not shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth"):
                problems.append((page, "is wider than the screen"))
        shown.close()
        server.shutdown()
    assert not problems


def test_internal_links_resolve(site, pages):
    num_checked = 0
    for page, references in pages.items():
        if page.name == "404.html":  # its links are absolute, as it is shown for any address
            continue
        for url in references.loaded + references.linked:
            parts = urlsplit(url)
            if parts.scheme or url.startswith("//"):
                continue
            target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)} links to {url}"
            if parts.fragment and target.suffix == ".html":
                anchors = pages[target].anchors | {"__tabbed"}
                assert unquote(parts.fragment) in anchors, f"{page.relative_to(site)} links to {url}"
            num_checked += 1
    assert num_checked > 500


def test_links_between_files_of_the_repository_resolve():
    files = [
        *ROOT.glob("*.md"),
        *(file for folder in ("docs", "experiments", "benchmarks") for file in (ROOT / folder).rglob("*.md")),
    ]
    num_checked = 0
    for file in files:
        for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
            if not urlsplit(link).scheme and urlsplit(link).path:
                assert (file.parent / unquote(urlsplit(link).path)).exists(), (
                    f"{file.relative_to(ROOT)} links to {link}"
                )
                num_checked += 1
    assert num_checked > 100


def test_every_public_name_is_in_the_api(site, pages):
    anchors = set().union(*(found.anchors for page, found in pages.items() if page.parent == site / "api"))
    wanted = {f"maml_jax.{name}" for name in maml_jax.__all__}
    for module in (models, rl, tasks):
        wanted |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert not wanted - anchors
    # A builder is documented, and not the module in which it is.
    text = (site / "api" / "learners.html").read_text(encoding="utf-8")
    assert "Builds MAML: " in text
    assert "Hessians included. FOMAML is" not in text


def test_tutorials_and_results_are_pages_with_figures(site):
    tutorial = (site / "experiments" / "tutorials" / "your_own_loss.html").read_text(encoding="utf-8")
    assert re.search(r'<img [^>]*src="your_own_loss_\d+.png"', tutorial)
    assert "Equal meta-steps" in (site / "experiments" / "RESULTS.html").read_text(encoding="utf-8")
    assert "init_meta_state" in (site / "index.html").read_text(encoding="utf-8")  # the first example of the README


def test_a_section_is_included_by_its_heading(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]' to build the documentation")
    hooks = load("hooks")
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n## B\ntext [x](y/z.md#t) [w](https://w.org) [a](#a)\n```\n## no heading\n```\n### C\nc\n## D\nd\n"
    )
    expected = "text [x](../y/z.md#t) [w](https://w.org) [a](#a)\n```\n## no heading\n```\n### C\nc"
    assert hooks.section(page, "B", "../") == expected
    with pytest.raises(hooks.PluginError, match=r"page\.md has 0 headings 'E'"):
        hooks.section(page, "E")


def test_figures_are_those_of_the_script(tmp_path):
    load("draw").main(tmp_path)
    drawn, committed = ({file.name for file in place.iterdir()} for place in (tmp_path, DOCS / "figures"))
    assert drawn == committed
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    assert all(f"figures/{name}" in text for name in drawn)


def test_the_picture_of_the_documentation_has_both_answers(browser, tmp_path):
    photograph = load("photograph").photograph
    photograph(browser, tmp_path / "page.png")
    with PIL.Image.open(tmp_path / "page.png") as taken, PIL.Image.open(DOCS / "playground.png") as committed:
        assert taken.width == committed.width
        assert taken.height == pytest.approx(committed.height, rel=0.1)  # fonts differ


def test_commands_and_flags_exist():
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    modules = set(re.findall(r"python -m ((?:experiments|benchmarks|maml_jax)[\w.]*)", text))
    assert len(modules) >= 3
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    files = [
        file for folder in ("experiments", "benchmarks", "maml_jax/algorithms") for file in (ROOT / folder).glob("*.py")
    ]
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    flags = set(re.findall(r"--([a-z][a-z0-9-]+)", text)) - {"help"}
    assert len(flags) >= 5
    # A field of a configuration, or an argument of a parser.
    written = {flag: rf"^    {flag.replace('-', '_')}: |add_argument\(\s*\"--{flag}\"" for flag in flags}
    unknown = [flag for flag, pattern in written.items() if not re.search(pattern, sources, re.MULTILINE)]
    assert not unknown
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def draw_images(directory):
    """Ten classes of images of one colour each."""
    generator = np.random.default_rng(0)
    for index in range(10):
        (directory / f"class_{index}").mkdir(parents=True)
        for image in range(6):
            colour = np.array([25 * index, 255 - 25 * index, 10 * index])
            pixels = np.clip(colour + generator.normal(0, 10, (20, 20, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(directory / f"class_{index}" / f"{image}.png")


def train_a_run(run_dir):
    settings = {"num_meta_steps": 1, "val_every": 1, "log_every": 1, "meta_batch_size": 1}
    config = sinusoid.with_paper_defaults(dataclasses.replace(sinusoid.METHODS["maml"], run_dir=run_dir, **settings))
    with runs.open_run(run_dir, config):
        learner = sinusoid.make_learner(config, inner_lr=0.001, num_inner_steps=1)
        training = common.Training(learner, tasks.sinusoid.make_sampler(shot=10, query_shot=10))
        return common.train(run_dir, config, training)


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if page.stem == "your_images":
        draw_images(tmp_path / "my_pool")
    trained = train_a_run(tmp_path / "runs" / "my_run") if page.stem == "runs" else None
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    found = {}
    replaced = set()
    for block in blocks:
        for text, smaller in SMALLER.get(page.stem, {}).items():
            replaced |= {text} if text in block else set()
            block = block.replace(text, smaller)
        exec(block, found)
    assert replaced == set(SMALLER.get(page.stem, {}))
    if page.stem == "idea":
        assert jnp.isfinite(found["loss"])
    if page.stem == "your_images":
        assert found["tested"].mean[-1] > 0.9  # colours are easy
        assert {len(found[split].names) for split in ("train", "val", "test")} == {6, 2}
    if page.stem == "your_own_parts":
        assert found["result"].mean[-1] < 4.0  # to predict zero would be 4.3
        assert bool(found["info"].finite.all())
        assert found["with_dropout"].stochastic
    if page.stem == "runs":
        assert found["state"].step == 150
        assert found["result"].mean.shape == (11,)
        np.testing.assert_array_equal(
            found["params"]["dense_0"]["kernel"], trained.params["dense_0"]["kernel"], strict=True
        )
    if page.stem == "devices":
        assert found["mesh"].size == 8
        assert bool(found["info"].finite.all())
    if page.stem == "evaluate":
        assert found["result"].mean.shape == (11,)
        assert found["difference"].shape == (100,)
    if page.stem == "reinforcement_learning":
        assert bool(found["info"].finite.all())
        assert found["rl"].returns_of(found["support"], found["query"]).shape == (4,)
    if page.stem == "choose":
        assert len(found["rows"]) == 2
        first, second = (next(row[4] for row in found["rows"] if row[0] == title) for title in ("FOMAML", "MAML"))
        assert 1.5 < second / first < 4
