"""Pages in headless Chromium: opened at a size, clicked, photographed."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

OWN = ("file://", "data:", "chrome://", "about:")  # the page, its pictures, and the browser's own start page
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_page_load_timeout(300)
    yield browser
    browser.quit()


@pytest.fixture
def show(driver: Any) -> Iterator[Any]:
    """Opens a page at a size; afterwards there must be no complaint in the console and no request to anywhere."""

    def open_page(path: Path, *, width: int = 1280, height: int = 1000, dark: bool = False) -> Any:
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
        driver.get(path.as_uri())
        settle(driver)
        return driver

    driver.get_log("browser")
    driver.get_log("performance")
    yield open_page
    assert driver.get_log("browser") == []
    assert [url for url in requests(driver) if not url.startswith(OWN)] == []


def requests(driver: Any) -> list[str]:
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def settle(driver: Any) -> None:
    """Waits until the page has drawn what it was last told to draw."""
    driver.set_script_timeout(300)
    driver.execute_async_script(
        """
        const done = arguments[0];
        const frames = (n) => (n ? requestAnimationFrame(() => frames(n - 1)) : setTimeout(done, 120));
        const wait = () => (document.documentElement.dataset.ready === "true" ? frames(3) : setTimeout(wait, 20));
        wait();
        """
    )


def pixels(driver: Any, ref: str = "view") -> np.ndarray:
    """A canvas of the page, ``(row, col, channel)`` float."""
    uri = driver.execute_script(f"return document.querySelector('[data-ref={ref}]').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(float)


def find(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def text(driver: Any, ref: str) -> str:
    return str(driver.execute_script(f"return document.querySelector('[data-ref={ref}]').textContent"))
