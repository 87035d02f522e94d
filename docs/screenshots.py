"""Makes the pictures of the viewer for README and docs/view.md: python docs/screenshots.py RUN (needs Chromium)."""

import sys
import tempfile
import time
from pathlib import Path

from fastflowgrpo.viewing.contents import named_runs
from fastflowgrpo.viewing.export import export

ROOT = Path(__file__).resolve().parents[1]


def main(run: str) -> None:
    """Save the page Evolution, and an image that training has improved."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.browser import emulate, open_browser

    browser = open_browser()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        export(named_runs([Path(run)]), site)
        emulate(browser, width=1180, height=860)
        browser.get(f"{site.as_uri()}/index.html")
        time.sleep(1)  # for the images
        browser.save_screenshot(str(ROOT / "docs/view_evolution.png"))
        browser.get(f"{site.as_uri()}/index.html#gallery")
        for option in ("position", "better"):
            browser.find_element("css selector", f".controls option[value={option}]").click()
        browser.find_element("css selector", ".card button").click()
        time.sleep(1)
        browser.save_screenshot(str(ROOT / "docs/view_image.png"))
    browser.quit()


if __name__ == "__main__":
    main(sys.argv[1])
