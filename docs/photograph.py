"""Photographs the page of the playground with its example: `python docs/photograph.py [FILE]`.

It needs Chromium and `pip install -e ".[experiments,browser]"`.
"""

import shutil
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from playwright.sync_api import Browser, sync_playwright

from experiments import playground


def photograph(browser: Browser, file: Path) -> None:
    """Opens the page with the learners of the repository, asks for the example and writes a PNG of what is shown."""
    server = playground.Server(playground.Config(port=0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.goto(server.address)
        page.get_by_text("Show an example").click()
        page.wait_for_selector(".verdict")
        page.screenshot(path=file, full_page=True)
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        photograph(chromium, Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("playground.png"))
        chromium.close()
