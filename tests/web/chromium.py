"""A headless Chromium, and pages in it at a width and in a colour scheme."""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path
from typing import Any


def start_chromium() -> Any:
    """Start a headless Chromium with the driver that comes with it; whoever starts it quits it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in paths.items() if path is None]
    assert not missing, f"{', '.join(missing)} not found; `make test-web` installs what is missing"
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths["chromium"])
    for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        # Chromium's sandbox is not for root, as whom containers run.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(str(paths["chromedriver"])))


class Browser:
    """Opens pages, and says what a person would see and hear of them."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
        """Open a page in a window of a width in pixels, for someone who prefers a light or a dark scheme."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(page.as_uri())
        assert self.run("return document.documentElement.dataset.ready") == "true"
        # Charts are drawn when their width is known, before the next frame.
        self.driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 0))")

    def run(self, script: str, *arguments: object) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """Find elements by CSS."""
        return list(self.driver.find_elements("css selector", selector))

    def wait_for(self, selector: str) -> list[Any]:
        """Find elements that an event makes, which comes after the click that asks for it."""
        from selenium.webdriver.support.ui import WebDriverWait

        return list(WebDriverWait(self.driver, 30).until(lambda _: self.all(selector)))

    def one(self, selector: str) -> Any:
        """Find the only element of its kind."""
        (element,) = self.all(selector)
        return element

    def choose(self, selector: str, value: str) -> None:
        """Choose an option by its value."""
        from selenium.webdriver.support.ui import Select

        Select(self.one(selector)).select_by_value(value)

    def console(self) -> list[str]:
        """Return what the page wrote to the console since the last call; errors of the page are among it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, path: Path) -> Path:
        """Take a picture of the whole page."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return document.documentElement.clientWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]))
        return path
