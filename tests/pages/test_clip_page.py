"""The page of a video: all frames stand on it, one is shown large, and nothing of an answer becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, DRIVER, find, settle
from toy_clip import ToyClip, tube_weights

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def heat() -> Any:
    toy = ToyClip(tube_weights(6, 4, slice(4, 5), slice(0, 1), slice(2, 4)), tokens=[f" {HOSTILE}"])
    toy.trace.question = f"What? {HOSTILE} {{{{data}}}}"
    return probe.video.explain(toy, method="input_gradient", size=4, progress=False), toy


@pytest.fixture(scope="module")
def page(heat: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shown, toy = heat
    score = probe.evaluate(shown, toy, progress=False)
    return probe.report(shown, scores=score, out=tmp_path_factory.mktemp("clip") / "video.html")


def test_every_frame_stands_on_the_page_without_scripts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    strip = text[text.index('<ol class="frames">') : text.index("</ol>")]
    assert re.findall(r"<span>([\d.]+ s)</span>", strip) == ["0.0 s", "0.5 s", "1.0 s", "1.5 s", "2.0 s", "2.5 s"]
    assert strip.count('<img src="data:image/') == 6
    assert "highest 0." in text and "at 2.0 s" in text
    assert "The map holds up." in text
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    data = json.loads(text[text.index('id="clips">') + 11 :].split("</script>")[0])
    assert len(data[0]["plain"]) == len(data[0]["across"]) == 6


def test_a_heatmap_without_values_says_why(tmp_path: Path) -> None:
    toy = ToyClip(tube_weights(2, 1, slice(0, 1), slice(0, 1), slice(0, 1)), original=(0.5,), base=(0.5,))
    nothing = probe.video.explain(toy, tokens=[0], progress=False)
    text = probe.report(nothing, out=tmp_path / "none.html").read_text(encoding="utf-8")
    assert "No map to show." in text and "plays no part" in text
    with pytest.raises(ExplainError, match="no values"):
        nothing.save(tmp_path / "none.gif")


@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium: apt-get install chromium chromium-driver")
@pytest.mark.xdist_group("browser")
def test_time_is_moved_through_and_the_heatmap_taken_away(page: Path, show: Any) -> None:
    driver = show(page)
    assert find(driver, ".when").text == "2.0 s"  # where it matters most
    heated = find(driver, ".large").get_attribute("src")
    assert heated == driver.find_elements("css selector", ".frames img")[4].get_attribute("src")
    find(driver, ".heat").click()
    settle(driver)
    assert find(driver, ".large").get_attribute("src") not in (heated, "")
    driver.find_elements("css selector", ".frames button")[1].click()
    settle(driver)
    assert find(driver, ".when").text == "0.5 s"
    assert find(driver, ".time").get_attribute("value") == "1"
    assert find(driver, ".frames button[aria-current=true]").get_attribute("data-frame") == "1"
    find(driver, ".play").click()
    assert find(driver, ".play").text == "Pause"
    find(driver, ".play").click()
    assert find(driver, ".play").text == "Play"
