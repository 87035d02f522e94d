"""A headless Chromium for the tests and the screenshots of the viewer and the demo."""

import json
import shutil
from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = ("chromium", "chromium-browser", "google-chrome"), "chromedriver"
NONE = "no browser: apt-get install chromium chromium-driver"


def find_browser() -> tuple[str, str] | None:
    """The paths of Chromium and its driver; None if they are not installed."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    driver = shutil.which(DRIVER)
    return (found, driver) if found and driver else None


def open_browser(width: int = 1280, height: int = 900) -> webdriver.Chrome:
    """Start a browser whose window has this size.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = find_browser()
    if paths is None:
        raise FileNotFoundError(NONE)
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    switches = ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", "disable-dev-shm-usage", "no-first-run")
    for switch in (*switches, "disable-background-networking", f"window-size={width},{height}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))


def emulate(browser: webdriver.Chrome, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
    """Set the colour scheme that the page sees, and the size of its window."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requests_of(browser: webdriver.Chrome) -> list[str]:
    """The addresses that the browser has asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]


def find(browser: webdriver.Chrome, selector: str) -> list[WebElement]:
    """The elements of a selector, once there are some."""
    return wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, selector))


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """The texts of these elements, once there are some.

    What has `content-visibility: auto`, as a card has, is without text until the frame after next is drawn.
    """
    find(browser, selector)
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    return wait_for(browser, lambda: [element.text for element in find(browser, selector)])


def wait_for(browser: webdriver.Chrome, condition: Callable) -> Any:
    """The value of a condition once it holds; the page may replace elements while it is asked."""
    wait = WebDriverWait(browser, 20, 0.02, [StaleElementReferenceException])
    return wait.until(lambda _: condition())
