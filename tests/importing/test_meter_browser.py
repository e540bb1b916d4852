"""The meter's page as a person uses it: thousands of answers, sorted, filtered and searched in headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")

from test_meter import TOP, reading, surprised

from lvlm_probe.importing.meter import Reading, ranked
from lvlm_probe.pages.prior import write_page

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.browser,
]


@pytest.fixture(scope="module")
def answers() -> list[Reading]:
    generator = np.random.default_rng(0)
    picture = Image.new("RGB", (88, 66), (20, 90, 200))
    return ranked(
        [
            reading(
                generator.normal(0.5, 1.0, 6).tolist(), source=f"line {n}", question=f"Question {n}?", thumbnail=picture
            )
            for n in range(3000)
        ]
    )


@pytest.fixture(scope="module")
def page(answers: list[Reading], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(answers, tmp_path_factory.mktemp("page") / "meter.html")


def shown(browser: Any) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#answers .question')].map((one) => one.textContent)"
    )


def wait_for(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 300).until(lambda _: browser.execute_script(f"return {condition}"))


def test_rows_come_as_they_are_scrolled_to(page: Path, answers: list[Reading], show: Any) -> None:
    browser = show(page)
    first = shown(browser)
    assert first == [one.question for one in answers[: len(first)]]
    assert 10 <= len(first) < 400
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    wait_for(browser, f"document.querySelectorAll('#answers li').length > {len(first)}")
    assert browser.execute_script("return document.querySelector('#answers img').naturalWidth") > 0


def test_sort_filter_and_search(page: Path, answers: list[Reading], show: Any) -> None:
    browser = show(page)
    browser.execute_script("document.getElementById('turn').click()")
    assert shown(browser)[0] == answers[-1].question
    browser.execute_script(
        "const s = document.getElementById('sort'); s.value = 'place'; s.dispatchEvent(new Event('change'));"
        "document.getElementById('turn').click()"
    )
    assert shown(browser)[:3] == ["Question 0?", "Question 1?", "Question 2?"]  # 2 before 10
    browser.execute_script("document.querySelector('#bands button:nth-child(2)').click()")
    habit = [one.question for one in answers if one.origin == "habit"]
    assert browser.execute_script("return document.getElementById('count').textContent") == (
        f"{len(habit)} of 3000 answers"
    )
    assert set(shown(browser)) <= set(habit)
    browser.execute_script(
        "document.querySelector('#bands button').click(); const f = document.getElementById('search');"
        "f.value = 'QUESTION 1234?'; f.dispatchEvent(new Event('input'))"
    )
    wait_for(browser, "document.querySelectorAll('#answers li').length === 1")
    assert shown(browser) == ["Question 1234?"]


def test_a_worst_word_leads_to_its_answer(show: Any, tmp_path: Path) -> None:
    answers = ranked(
        [
            surprised(source=f"line {n}", question=f"Q{n}?", top_log_probs=[*TOP[:3], n / 10, *TOP[4:]])
            for n in range(30)
        ]
    )
    browser = show(write_page(answers, tmp_path / "meter.html"))
    words = "return [...document.querySelectorAll('#worst button')].map((one) => one.textContent)"
    shown_words = browser.execute_script(words)
    assert len(shown_words) == 12 and shown_words[0] == "cat 7.3 nats behind “dog”"
    assert "“cat” 7.3 nats behind “dog”" in browser.execute_script(
        "return document.querySelector('#answers .drop').textContent"
    )
    browser.execute_script("document.querySelector('#worst li:nth-child(2) button').click()")
    assert shown(browser) == ["Q28?"]
    wavy = "return getComputedStyle(document.querySelector('#answers .unlikely')).textDecorationStyle"
    assert browser.execute_script(wavy) == "wavy"
    widths = "return [...document.querySelectorAll('#answers .meter rect')].map((one) => +one.getAttribute('width'))"
    assert browser.execute_script(widths) == pytest.approx([100, 100 / 3, 100 / 3, 100 / 3])


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_sticks_out(page: Path, show: Any, dark: bool) -> None:
    browser = show(page, width=390, height=800, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in ground[4:-1].split(","))
    assert (lightness < 150) is dark
