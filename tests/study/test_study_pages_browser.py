"""Pages of a study as a person uses them: in headless Chromium, thousands of samples from a folder, words clicked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import study_samples

pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")


from lvlm_probe.study.pages import write_page

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.browser,
]

MANY = 2000


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of twelve samples, a folder of two thousand, and a page of sets of three."""
    out = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        study_samples.open_without_files(patch)
        sets = study_samples.results(out, 9)
        roles = ("original", "counterfactual question", "counterfactual image")
        answers = tuple(
            {
                **record,
                "set": str(int(record["sample"]) // 3),
                "role": roles[int(record["sample"]) % 3],
                "picture": record["picture"] if int(record["sample"]) % 3 == 2 else str(int(record["sample"]) // 3),
                "true_answer": "red" if int(record["sample"]) % 3 == 0 else "blue",
            }
            for record in sets.answers
        )
        return {
            "one": write_page(study_samples.results(out, 12), out / "one.html"),
            "folder": write_page(study_samples.results(out, MANY, models=("only",), methods=("m",)), out / "many"),
            "sets": write_page(dataclasses.replace(sets, answers=answers), out / "sets.html", by="groups"),
        }


def wait_for(browser: Any, condition: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 300).until(lambda _: browser.execute_script(f"return {condition}"))


def drawn(browser: Any) -> None:
    """Waits until the first row has its words and its maps."""
    wait_for(browser, "document.querySelector('.row')?.dataset.drawn !== undefined")


def texts(browser: Any, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector
    )


def choose(browser: Any, select: str, value: str) -> None:
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        select,
        value,
    )


def pixels(browser: Any) -> list[int]:
    """Of the canvases of the first row: a sum that changes with what is drawn."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.row:first-child canvas')].map((canvas) => {"
        " const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        " let sum = 0; for (let i = 0; i < data.length; i++) sum = (31 * sum + data[i]) | 0; return sum; })"
    )


def test_a_click_on_a_word_turns_all_columns_to_it(pages: dict[str, Path], show: Any) -> None:
    browser = show(pages["one"])
    drawn(browser)
    assert texts(browser, ".row:first-child .name") == ["first", "second"]
    assert texts(browser, ".row:first-child .caption") == ["map of the underlined words"] * 2
    before = pixels(browser)
    assert texts(browser, ".row:first-child .said .k") == ["red", "red"]
    browser.execute_script("document.querySelector('.row:first-child .said .word:has(.k)').click()")
    wait_for(browser, "document.querySelector('.row').dataset.drawn === 'red'")
    assert texts(browser, ".row:first-child .caption") == ["map of “red” · LLR +3.40"] * 2
    assert all(now != then for now, then in zip(pixels(browser), before, strict=True))
    pressed = "document.querySelectorAll('.row:first-child .word[aria-pressed=true]').length"
    assert browser.execute_script(f"return {pressed}") == 2
    # A word that nobody explains: its ratio, and the answer's map.
    browser.execute_script("document.querySelector('.row:first-child .said .word').click()")
    wait_for(browser, "document.querySelector('.row').dataset.drawn === 'The'")
    assert all(
        "LLR +0.05" in text and "whole answer’s map" in text for text in texts(browser, ".row:first-child .caption")
    )
    assert pixels(browser) == before
    browser.execute_script("document.querySelector('.row:first-child .said .word').click()")
    wait_for(browser, "document.querySelector('.row').dataset.drawn === ''")
    assert texts(browser, ".row:first-child .caption") == ["map of the underlined words"] * 2


def test_models_and_methods_change_places(pages: dict[str, Path], show: Any) -> None:
    browser = show(pages["one"])
    browser.execute_script("document.querySelector('#by button[value=methods]').click()")
    drawn(browser)
    assert texts(browser, ".row:first-child .name") == ["igos++", "center"]
    assert len(texts(browser, ".row:first-child .said")) == 1  # one model's answer, once
    browser.execute_script("document.querySelector('.row:first-child .said .word:has(.k)').click()")
    wait_for(browser, "document.querySelector('.row').dataset.drawn === 'red'")
    with_map, without = texts(browser, ".row:first-child .caption")
    assert with_map.startswith("map of “red”") and "no map of this word alone is stored" in without
    browser.execute_script("document.querySelector('.row:first-child .doubt').click()")
    assert texts(browser, ".row:first-child .cell details li") == ["too many ties", "it is only a test"]
    shown = texts(browser, ".row:first-child .pair")
    choose(browser, "model", "1")
    drawn(browser)
    assert texts(browser, ".row:first-child .pair") == shown == ["del 0.50 · ins 0.40"] * 2


def test_thousands_open_from_a_folder(pages: dict[str, Path], show: Any) -> None:
    browser = show(pages["folder"])
    drawn(browser)
    assert texts(browser, "#count") == [f"{MANY} samples"]
    assert 5 <= len(texts(browser, ".row")) < 100
    choose(browser, "sort", "gain")
    browser.execute_script("document.getElementById('turn').click()")
    drawn(browser)
    question = "What colour is carousel {}?"
    assert texts(browser, ".row:first-child .scene .question") == [question.format(MANY - 1)]
    assert browser.execute_script("return document.querySelector('.row img').naturalWidth") > 0
    for _ in range(3):
        rows = len(texts(browser, ".row"))
        browser.execute_script("scrollTo(0, document.body.scrollHeight)")
        wait_for(browser, f"document.querySelectorAll('.row').length > {rows}")
    # By its place: more rows are made below it as it comes into sight.
    browser.execute_script("document.querySelector('.row:nth-child(40)').scrollIntoView()")
    wait_for(browser, "document.querySelector('.row:nth-child(40)').dataset.drawn !== undefined")
    # Rows far behind have given their pixels back.
    assert browser.execute_script("return document.querySelector('.row canvas').width") == 0
    assert (
        browser.execute_script("return [...document.querySelectorAll('.row canvas')].filter((c) => c.width).length")
        < 60
    )
    browser.execute_script("scrollTo(0, 0)")
    drawn(browser)
    assert browser.execute_script("return document.querySelector('.row canvas').width") > 0


def test_sort_filter_and_search(pages: dict[str, Path], show: Any) -> None:
    browser = show(pages["folder"])
    choose(browser, "group", "odd")
    assert texts(browser, "#count") == [f"{MANY // 2} of {MANY} samples"]
    choose(browser, "right", "wrong")
    wrong = [n for n in range(MANY) if n % 2 and n % 3 == 0]
    assert texts(browser, "#count") == [f"{len(wrong)} of {MANY} samples"]
    choose(browser, "sort", "deletion")
    choose(browser, "from", "0.2")
    choose(browser, "to", "0.3")
    kept = [n for n in wrong if 0.2 <= round(0.5 - 0.5 * n / MANY, 4) <= 0.3]
    assert texts(browser, "#count") == [f"{len(kept)} of {MANY} samples"]
    assert texts(browser, ".row:first-child .question") == [f"What colour is carousel {kept[-1]}?"]
    for select in ("group", "right", "from", "to"):
        choose(browser, select, "")
    browser.execute_script(
        "const f = document.getElementById('search'); f.value = 'CAROUSEL 1234?'; f.dispatchEvent(new Event('input'))"
    )
    wait_for(browser, "document.querySelectorAll('.row').length === 1")
    assert texts(browser, ".row .question") == ["What colour is carousel 1234?"]


def test_sets_stand_side_by_side_with_what_changed(pages: dict[str, Path], show: Any) -> None:
    browser = show(pages["sets"], width=1400)
    drawn(browser)
    assert texts(browser, "#count") == ["3 sets"]
    assert texts(browser, ".row:first-child .name") == ["original", "counterfactual question", "counterfactual image"]
    assert texts(browser, ".row:first-child ins") == ["1", "2"] and texts(browser, ".row:first-child del") == ["0", "0"]
    said = texts(browser, ".row:first-child .changes li")
    assert said[0] == "the same answer as the original, though the true answer is another"
    assert any("of the map on the changed" in one or "differ nearly everywhere" in one for one in said)
    choose(browser, "right", "fooled")
    assert texts(browser, "#count") == ["3 sets"]
    choose(browser, "right", "right")
    assert texts(browser, "#count") == ["0 of 3 sets"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["one", "sets"])
def test_on_a_phone_nothing_sticks_out(pages: dict[str, Path], show: Any, name: str, dark: bool) -> None:
    browser = show(pages[name], width=390, height=844, dark=dark)
    drawn(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.row:first-child .cell')].slice(0, 2)"
        ".map((one) => { const b = one.getBoundingClientRect(); return [b.top, b.width]; })"
    )
    assert boxes[0][0] == boxes[1][0] and boxes[0][1] > 150
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in ground[4:-1].split(",")) < 150) is dark
