"""Makes the pictures of the viewer and the demo: python docs/screenshots.py RUN (needs Chromium)."""

import os
import sys
import tempfile
from pathlib import Path

from fastflowgrpo.config import parse_demo
from fastflowgrpo.demonstration.examples import demo_prompts
from fastflowgrpo.demonstration.generation import Demo
from fastflowgrpo.viewing.contents import named_runs
from fastflowgrpo.viewing.export import export

DOCS = Path(__file__).resolve().parent
# Images below the window are not loaded yet.
SETTLED = "return [...document.images].every(i => i.complete || i.getBoundingClientRect().top > innerHeight)"


def main(run: str) -> None:
    """Save the pictures beside this file."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from support.browser import open_browser

    browser = open_browser()
    with tempfile.TemporaryDirectory() as folder:
        viewer_pictures(browser, run, Path(folder) / "site")
        demo_picture(browser, run, folder)
    browser.quit()


def viewer_pictures(browser, run, site):
    """The page Evolution, and an image that training has improved."""
    from support.browser import emulate, find, wait_for

    export(named_runs([Path(run)]), site)
    emulate(browser, width=1180, height=860)
    browser.get(f"{site.as_uri()}/index.html")
    find(browser, ".u-over")
    wait_for(browser, lambda: browser.execute_script(SETTLED))
    browser.save_screenshot(str(DOCS / "view_evolution.png"))
    browser.get(f"{site.as_uri()}/index.html#gallery")
    for option in ("position", "better"):
        find(browser, f".controls option[value={option}]")[0].click()
    find(browser, ".card button")[0].click()
    wait_for(browser, lambda: browser.execute_script(SETTLED))
    browser.save_screenshot(str(DOCS / "view_image.png"))


def demo_picture(browser, run, folder):
    """The demo's images of an example that says where things are."""
    from support.browser import emulate, find, wait_for

    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
    from fastflowgrpo.demonstration.page import build_page, launch

    config = parse_demo(["--run", run])
    examples, known = demo_prompts(config)
    page = build_page(Demo.load(config, known), config, examples)
    url, _ = launch(page, config)
    emulate(browser, width=1500, height=960)
    browser.get(url)
    example = next(button for button in find(browser, "button.gallery-item") if "left of" in button.text)
    example.click()
    wait_for(browser, lambda: find(browser, "textarea")[0].get_attribute("value") == example.text)
    find(browser, "button.primary")[0].click()
    wait_for(browser, lambda: len(find(browser, ".thumbnail-item img")) == 2 * config.num_images)
    wait_for(browser, lambda: browser.execute_script(SETTLED))
    browser.save_screenshot(str(DOCS / "demo.png"))
    page.close()


if __name__ == "__main__":
    main(sys.argv[1])
