"""Every test runs with eight virtual devices and without silent rank promotion."""

import gc
import importlib.util
import os
import shutil
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of the tests is compilation. These flags make it three times as fast and the programs slower.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# Processes of one run, and later runs, share compiled programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Programs without the lines of their source are lowered faster.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects that stay. Looking for cycles among them as often as by default takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)


SLOW_FILES = (
    "test_distributed", "test_omniglot", "test_report", "test_kill", "test_images", "test_tutorials",
    "test_accelerator", "test_benchmarks", "test_conformance", "test_compare", "test_show", "test_docs", "test_seeds",
    "test_cross_domain", "test_streaming", "test_playground", "test_translation",
)  # fmt: skip
"""Files that take long. They come first, so that no worker starts one when the others have nothing left to do."""


MOST_BYTES = 2 * 2**30
"""What a worker may hold between files."""


def pytest_collection_modifyitems(items):
    """Puts the tests of `SLOW_FILES` first, and leaves the order otherwise."""
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True, scope="module")
def _few_programs_are_kept():
    """Frees the compiled programs of a large process after the last test of a file. The next one uses some of them."""
    yield
    if resident_bytes() > MOST_BYTES:
        jax.clear_caches()


def resident_bytes():
    """The memory of this process; infinite where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("inf")
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def browser():
    """A headless Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if importlib.util.find_spec("playwright") is None or program is None:
        pytest.skip("needs playwright and Chromium: `pip install playwright` and `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield
