"""The comparison page as a person sees it: in headless Chromium, on a desk and on a phone, light and dark."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
from PIL import Image

pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")


from lvlm_probe.pages.comparison import compare

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heats, scores = [], []
    for number in range(2):
        trace = samples.trace(f"trace-{number}")
        for name in ("igos++", "integrated_gradients", "gradcam", "tmm", "iia", "attention", "rollout", "tam", "rise"):
            heats.append(samples.heat(trace, method=name))
            scores.append(samples.score(reasons=("too many ties",) if name == "tam" else ()))
    return compare(heats, scores=scores, out=tmp_path_factory.mktemp("page") / "compare.html").path


def _box(driver: Any, selector: str) -> dict[str, float]:
    return driver.execute_script(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return {left: b.left, right: b.right, top: b.top, width: b.width}",
        selector,
    )


def _settled(driver: Any) -> None:
    assert driver.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")


@pytest.mark.browser
def test_on_a_desk_methods_stand_in_columns_that_can_be_scrolled_to(page: Path, show: Any) -> None:
    browser = show(page, width=1280, height=900)
    _settled(browser)
    first, second = (_box(browser, f"tbody tr:first-child td:nth-of-type({n})") for n in (1, 2))
    assert first["top"] == second["top"] and first["right"] <= second["left"] + 1
    assert _box(browser, "tbody tr:first-child td img")["width"] > 140
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    before, last = (_box(browser, place) for place in (".scene", "tbody tr:first-child td:last-child"))
    assert last["right"] > 1280
    browser.execute_script("document.querySelector('.scenes').scrollLeft = 9999")
    assert _box(browser, ".scene")["left"] == before["left"]  # the answer stays in sight
    assert _box(browser, "tbody tr:first-child td:last-child")["right"] <= 1280


@pytest.mark.browser
def test_on_a_phone_the_methods_of_a_scene_stand_in_two_columns(page: Path, show: Any) -> None:
    browser = show(page, width=390, height=844)
    _settled(browser)
    boxes = [_box(browser, f"tbody tr:first-child td:nth-of-type({n})") for n in (1, 2, 3)]
    assert boxes[0]["top"] == boxes[1]["top"] < boxes[2]["top"]
    assert boxes[0]["width"] > 150
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_dark_by_the_system_and_by_the_button(page: Path, show: Any) -> None:
    def ground(browser: Any) -> str:
        return browser.execute_script("return getComputedStyle(document.querySelector('.scene')).backgroundColor")

    light = ground(show(page))
    browser = show(page, dark=True)
    dark = ground(browser)
    assert light != dark
    browser.find_element("id", "theme").click()
    assert ground(browser) == light
    browser.execute_script("localStorage.clear()")


@pytest.mark.browser
def test_each_heatmap_can_be_saved_with_its_verdict_and_there_is_a_colour_bar(page: Path, show: Any) -> None:
    browser = show(page)
    _settled(browser)
    assert _box(browser, ".bar img")["width"] > 100
    saved = browser.execute_script(
        "const saved = []; HTMLAnchorElement.prototype.click = function () { saved.push([this.href, this.download]); };"
        "document.querySelectorAll('.save').forEach((button) => button.click()); return saved;"
    )
    assert len(saved) == 18 and saved[0][1].startswith("igos++ red.") and len({name for _, name in saved}) == 9
    for (uri, _), colour in ((saved[0], (0, 114, 178)), (saved[7], (213, 94, 0))):
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")
        corner = np.asarray(image)[-4:, :4].reshape(-1, 3).mean(axis=0)
        assert np.abs(corner - colour).max() < 30, "the verdict's plate"
