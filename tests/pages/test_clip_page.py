"""The page of a video: all frames stand on it, one is shown large, and nothing of an answer becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import find, settle
from toy_clip import ToyClip, tube_weights

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError, ReportError

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
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3  # question, answer, and the label of its heatmap
    data = json.loads(text[text.index('id="clips">') + 11 :].split("</script>")[0])
    assert len(data[0]["plain"]) == len(data[0]["across"]) == 6


@pytest.mark.quick
def test_a_heatmap_without_values_says_why(tmp_path: Path) -> None:
    toy = ToyClip(tube_weights(2, 1, slice(0, 1), slice(0, 1), slice(0, 1)), original=(0.5,), base=(0.5,))
    nothing = probe.video.explain(toy, tokens=[0], progress=False)
    text = probe.report(nothing, out=tmp_path / "none.html").read_text(encoding="utf-8")
    assert "No map to show." in text and "plays no part" in text
    with pytest.raises(ExplainError, match="no values"):
        nothing.save(tmp_path / "none.gif")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An answer of two words, each with a map of its own, and what it needs of time."""
    toy = ToyClip(tube_weights(4, 4, slice(1, 2), slice(0, 1), slice(2, 4)), tokens=["red", " left"],
                  original=(0.9, 0.8), base=(0.01, 0.02))  # fmt: skip
    heats = [probe.video.explain(toy, method="random", size=4, tokens=t, progress=False) for t in ([0, 1], [0], [1])]
    llr = {"blur": 4.0, "first_frame": 2.0, "middle_frame": 3.0, "shuffled_frames": 2.0}
    needs = probe.video.Order(llr, "red left", (1.5, 2.5), 0.01, "toy")
    return probe.report(heats, orders=needs, out=tmp_path_factory.mktemp("words") / "video.html")


def test_an_answer_of_several_heatmaps_is_one_section(words: Path) -> None:
    text = words.read_text(encoding="utf-8")
    assert text.count('<section class="clip"') == 1 and text.count('class="panel"') == 3
    assert re.findall(r'data-panels="([\d ]+)"><mark>(\w+)', text) == [("1 0", "red"), ("2 0", "left")]
    assert re.findall(r'data-panel="\d">([^<]+)<', text) == ["red left", "red", "left"]
    assert "This answer needs the order of frames." in text
    assert "(+1.50 to +2.50 in 2 orders)" in text


def test_an_order_is_of_an_answer_on_the_page(heat: Any, tmp_path: Path) -> None:
    llr = {"blur": 4.0, "first_frame": 2.0, "middle_frame": 3.0, "shuffled_frames": 2.0}
    with pytest.raises(ReportError, match="an order is of another"):
        probe.report(heat[0], orders=[probe.video.Order(llr, "a", trace_id="another")], out=tmp_path / "a.html")
    with pytest.raises(ReportError, match=r"what probe\.video\.order"):
        probe.report(heat[0], orders=["order"], out=tmp_path / "a.html")  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("browser")
def test_a_word_leads_to_its_frames(words: Path, show: Any) -> None:
    driver = show(words)
    panels = driver.find_elements("css selector", ".panel")
    assert [panel.is_displayed() for panel in panels] == [True, False, False]
    driver.find_elements("css selector", ".said .of")[1].click()
    settle(driver)
    assert [panel.is_displayed() for panel in panels] == [False, False, True]
    assert find(driver, ".choose button[aria-pressed=true]").text == "left"
    driver.find_elements("css selector", ".choose button")[0].click()
    settle(driver)
    assert [panel.is_displayed() for panel in panels] == [True, False, False]


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
