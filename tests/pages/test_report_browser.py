"""The report as a person sees it: opened, clicked and photographed in headless Chromium."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
from browser import find, pixels, settle, text
from PIL import Image

from lvlm_probe.pages import report

pytestmark = pytest.mark.xdist_group("browser")


def word(driver: Any, wanted: str) -> Any:
    return next(button for button in driver.find_elements("css selector", ".word") if button.text == wanted)


def slide(driver: Any, ref: str, value: float) -> None:
    driver.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
        find(driver, f"[data-ref={ref}]"),
        value,
    )
    settle(driver)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sample: the whole answer (red), and maps of ``carousel`` and ``park``."""
    heats, scores = samples.page()
    return report(heats, scores=scores, out=tmp_path_factory.mktemp("one") / "report.html")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty samples: trusted, doubted, unchecked, empty, half seen, and one without its trace."""
    heats, scores = [], []
    for i in range(50):
        heats.append(
            samples.heat(samples.trace(f"t{i}", question=f"Question {i}?", images=[samples.picture((320, 240), i)]))
        )
        scores.append(
            samples.score(deletion=0.1 + 0.01 * i, insertion=0.9 - 0.01 * i, reasons=("no",) if i > 30 else ())
        )
    heats[1] = samples.heat(samples.trace("t1"), samples.selection(()))
    scores[1] = scores[2] = None
    heats[3] = dataclasses.replace(heats[3], seen=np.pad(np.ones((24, 24), bool), ((0, 0), (4, 4))))
    heats[4] = dataclasses.replace(heats[4], trace=None)
    return report(heats, scores=scores, out=tmp_path_factory.mktemp("many") / "report.html")


def test_photograph(show: Any, one: Path, tmp_path: Path) -> None:
    driver = show(one)
    assert driver.save_screenshot(str(tmp_path / "report.png"))
    photograph = np.asarray(Image.open(tmp_path / "report.png").convert("RGB"))
    assert photograph.shape[0] >= 900
    assert photograph.shape[1] == 1280
    assert len(np.unique(photograph.reshape(-1, 3), axis=0)) > 5000


def test_heat_lies_where_the_map_is_high(show: Any, one: Path) -> None:
    driver = show(one)
    heat = pixels(driver)
    find(driver, "[data-mode=image]").click()
    settle(driver)
    bare = pixels(driver)
    change = np.abs(heat - bare).mean(axis=2)
    rows, cols = change.shape
    x, y = samples.SPOT
    assert change[int(y * rows), int(x * cols)] > 40
    assert change[int(0.9 * rows), int(0.9 * cols)] < 12
    original = np.asarray(samples.picture().resize((cols, rows))).astype(float)
    assert np.abs(bare - original).mean() < 6  # JPEG's doing


def test_a_clicked_word_shows_its_own_map(show: Any, one: Path) -> None:
    driver = show(one)
    whole = pixels(driver)
    word(driver, "carousel").click()
    settle(driver)
    assert find(driver, "[data-ref=view]").get_attribute("data-map") == "1"
    assert word(driver, "carousel").get_attribute("aria-pressed") == "true"
    assert find(driver, "[data-ref=maps] [aria-pressed=true]").text == "“carousel”"
    own = pixels(driver)
    rows, cols = own.shape[:2]
    change = np.abs(own - whole).mean(axis=2)
    assert change[int(0.74 * rows), int(0.18 * cols)] > 40  # the peak of its own map
    assert change[int(samples.SPOT[1] * rows), int(samples.SPOT[0] * cols)] > 40  # and the whole answer's has gone
    assert "0.70" in text(driver, "cards")

    driver.find_element("css selector", "body").send_keys("\ue00c")  # Escape
    settle(driver)
    np.testing.assert_array_equal(pixels(driver), whole)


def test_each_map_says_what_its_curves_watch(show: Any, tmp_path: Path) -> None:
    heats, scores = samples.page()
    scores[1] = samples.score(params={"score": "prob", "followed": "own", "own_score": "cat over dog"})
    driver = show(report(heats, scores=scores, out=tmp_path / "report.html"))
    for map_, watched in ((1, "“cat over dog”"), (0, "the probability of the explained words")):
        driver.find_elements("css selector", "[data-ref=maps] button")[map_].click()
        settle(driver)
        assert f"and watch {watched}. A good map" in " ".join(text(driver, "trialtext").split())


def test_a_word_without_a_map_says_how_to_get_one(show: Any, one: Path) -> None:
    driver = show(one)
    before = pixels(driver)
    word(driver, "bright").click()
    settle(driver)
    assert "No map of “bright”" in text(driver, "hint")
    assert "probe.explain(replay, tokens=(7, 8))" in text(driver, "hint")
    np.testing.assert_array_equal(pixels(driver), before)


def test_selected_words_are_underlined_and_words_are_coloured(show: Any, one: Path) -> None:
    driver = show(one)
    marked = driver.execute_script("return [...document.querySelectorAll('.word .k')].map((e) => e.textContent)")
    assert marked == ["red"]
    colours = driver.execute_script(
        "const words = [...document.querySelectorAll('.word')];"
        "return Object.fromEntries(words.map((word) => [word.textContent, word.style.background]))"
    )
    assert colours["is"] == ""  # ratio 0
    assert colours["the"].startswith("rgba(58, 110, 210")  # likelier without the picture
    red, park = (float(colours[w].rstrip(")").split(",")[-1]) for w in ("red", "park"))
    assert 0 < park < red <= 0.7


def test_hovered_word_tells_its_numbers(show: Any, one: Path) -> None:
    driver = show(one)
    driver.execute_script("arguments[0].focus()", word(driver, "carousel"))
    tip = find(driver, "#tip").text
    assert "86 %" in tip
    assert "23 %" in tip
    assert "+1.30 nats" in tip
    assert "3.7× likelier" in tip
    assert "“car” +0.90 · “ousel” +0.40" in tip
    assert "none of its pieces is over 1" in tip


def test_strength_slider(show: Any, one: Path) -> None:
    driver = show(one)
    slide(driver, "opacity", 100)
    strong = pixels(driver)
    slide(driver, "opacity", 0)
    none = pixels(driver)
    find(driver, "[data-mode=image]").click()
    settle(driver)
    np.testing.assert_array_equal(none, pixels(driver))
    assert np.abs(strong - none).max() > 60


def test_spotlight_keeps_what_matters(show: Any, one: Path) -> None:
    driver = show(one)
    find(driver, "[data-mode=image]").click()
    settle(driver)
    bare = pixels(driver)
    find(driver, "[data-mode=spotlight]").click()
    slide(driver, "opacity", 100)
    lit = pixels(driver)
    rows, cols = lit.shape[:2]
    at = int(samples.SPOT[1] * rows), int(samples.SPOT[0] * cols)
    np.testing.assert_allclose(lit[at], bare[at], atol=2)
    assert lit[-20:, -20:].mean() < 0.4 * bare[-20:, -20:].mean()
    assert not find(driver, "[data-ref=barbox]").is_displayed()


def test_values_are_read_with_the_keyboard(show: Any, one: Path) -> None:
    driver = show(one)
    view = find(driver, "[data-ref=view]")
    driver.execute_script("arguments[0].focus()", view)
    view.send_keys(*["\ue014"] * 5, *["\ue013"] * 5)  # right and up from the middle: (0.625, 0.375)
    said = text(driver, "readout")
    assert "pixel 562, 232" in said
    assert float(said.split()[1]) > 0.95


def test_slider_takes_the_picture_apart_along_the_curves(show: Any, one: Path) -> None:
    driver = show(one)
    slide(driver, "fraction", 0)
    whole, baseline = pixels(driver, "removed"), pixels(driver, "restored")
    slide(driver, "fraction", 100)
    np.testing.assert_array_equal(pixels(driver, "removed"), baseline)
    np.testing.assert_array_equal(pixels(driver, "restored"), whole)
    slide(driver, "fraction", 12)
    removed, restored = pixels(driver, "removed"), pixels(driver, "restored")
    np.testing.assert_allclose(removed + restored, whole + baseline, atol=2)  # what one has lost the other has
    at = int(samples.SPOT[1] * removed.shape[0]), int(samples.SPOT[0] * removed.shape[1])
    np.testing.assert_allclose(restored[at], whole[at], atol=2)
    np.testing.assert_allclose(removed[at], baseline[at], atol=2)
    assert text(driver, "removedtext") == f"words at {100 * (0.033 + 0.937 * np.interp(0.12, *curve())):.1f} %"


def curve() -> tuple[np.ndarray, np.ndarray]:
    score = samples.score()
    return score.fractions, score.deletion_curve


def test_curves_are_drawn_to_scale(show: Any, one: Path) -> None:
    driver = show(one)
    points = driver.execute_script(
        "const s = document.querySelector('.chart svg'); return [s.querySelector('.line.del').getAttribute('points'), "
        "...[...s.querySelectorAll('line.axis')].map((l) => [l.x1, l.x2, l.y1].map((v) => v.baseVal.value))]"
    )
    (left, right, zero), (_, _, one_) = points[1], points[3]
    found = np.array([[float(v) for v in pair.split(",")] for pair in points[0].split()])
    np.testing.assert_allclose((found[:, 0] - left) / (right - left), curve()[0], atol=1e-3)
    np.testing.assert_allclose((found[:, 1] - zero) / (one_ - zero), curve()[1], atol=1e-3)


def test_dark_and_light(show: Any, one: Path) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    driver = show(one)
    light = driver.execute_script(ground)
    driver = show(one, dark=True)
    dark = driver.execute_script(ground)
    assert (light, dark) == ("rgb(246, 244, 239)", "rgb(19, 18, 17)")
    find(driver, "#theme").click()
    assert driver.execute_script(ground) == light
    driver.execute_script("localStorage.clear(); delete document.documentElement.dataset.theme")


@pytest.mark.parametrize("width", [360, 768, 1024])
def test_no_sideways_scrolling(show: Any, one: Path, many: Path, width: int) -> None:
    for page in (one, many):
        driver = show(page, width=width, height=780)
        driver.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        assert driver.execute_script("const e = document.documentElement; return e.scrollWidth <= e.clientWidth")
    word(driver, "carousel").click()
    assert driver.execute_script(
        "const b = document.querySelector('#tip').getBoundingClientRect(); return b.left >= 0 && b.right <= innerWidth"
    )


def test_fifty_samples(show: Any, many: Path) -> None:
    driver = show(many, width=1440)
    buttons = driver.find_elements("css selector", "#samples button")
    assert len(buttons) == 50
    dots = driver.execute_script(
        "return [...document.querySelectorAll('#samples .dot')].map((e) => e.className.split(' ')[1])"
    )
    assert [dots[i] for i in (0, 1, 2, 40)] == ["trusted", "empty", "unchecked", "doubted"]
    driver.execute_script("arguments[0].click()", buttons[40])
    settle(driver)
    assert text(driver, "question") == "Question 40?"
    assert text(driver, "verdict") == "Do not trust this map:No."
    assert driver.execute_script("return location.hash") == "#41"
    assert driver.execute_script("return document.querySelectorAll('#samples [aria-current=true]').length") == 1


def test_an_empty_selection_shows_no_heat(show: Any, many: Path) -> None:
    driver = show(many)
    driver.execute_script("location.hash = '2'")
    settle(driver)
    assert "No map to show" in text(driver, "verdict")
    assert not find(driver, "[data-ref=tools]").is_displayed()
    assert not find(driver, "[data-ref=trial]").is_displayed()
    shown = pixels(driver)
    original = np.asarray(samples.picture().resize(shown.shape[1::-1])).astype(float)
    assert np.abs(shown - original).mean() < 6


def test_never_seen_is_hatched(show: Any, many: Path) -> None:
    driver = show(many)
    driver.execute_script("location.hash = '4'")
    settle(driver)
    assert find(driver, "[data-ref=unseen]").is_displayed()
    find(driver, "[data-mode=image]").click()
    settle(driver)
    shown = pixels(driver)
    original = np.asarray(samples.picture((320, 240), 3).resize(shown.shape[1::-1])).astype(float)
    change = np.abs(shown - original).mean(axis=2)
    cols = change.shape[1]
    assert change[:, : cols // 8 - 2].mean() > 25
    assert change[:, -cols // 8 + 2 :].mean() > 25
    assert change[:, cols // 8 + 2 : -cols // 8 - 2].mean() < 8
    slide(driver, "fraction", 100)  # the part the model never sees is neither removed nor restored
    removed = pixels(driver, "removed")
    slide(driver, "fraction", 0)
    moved = np.abs(removed - pixels(driver, "removed")).mean(axis=(0, 2))
    assert moved[: len(moved) // 10].max() == 0
    assert moved[len(moved) // 4 : -len(moved) // 4].mean() > 3


def test_without_its_trace_the_page_still_works(show: Any, many: Path) -> None:
    driver = show(many)
    driver.execute_script("location.hash = '5'")
    settle(driver)
    assert "without the trace" in find(driver, ".story").text
    assert pixels(driver).std() > 5  # the map, on a plain ground
    assert not find(driver, "[data-ref=pair]").is_displayed()


def test_provenance_is_there_and_can_be_copied(show: Any, one: Path) -> None:
    driver = show(one)
    driver.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    table = find(driver, "[data-ref=provenance]").text
    for fact in ("igos++", "sdpa", "20261123T051141.b1.h5", '"mask_size":32', "2.13.0"):
        assert fact in table
    copied = driver.execute_async_script(
        "const value = { writeText: async (text) => arguments[0](text) };"
        "Object.defineProperty(navigator, 'clipboard', { value });"
        "document.querySelector('[data-ref=copy]').click();"
    )
    facts = json.loads(copied)
    assert facts["map"]["seed"] == 0
    assert facts["sample"]["fingerprint"].startswith("9f3a")


def test_hostile_text_does_nothing(show: Any, tmp_path: Path) -> None:
    hostile = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
    recording = samples.trace(question=hostile, tokens=[hostile, *samples.PIECES[1:]], notes=[hostile])
    chosen = samples.selection(tokens=(hostile, *samples.PIECES[1:]))
    heats = [samples.heat(recording, chosen, method=hostile)]
    driver = show(report(heats, scores=[samples.score(reasons=(hostile,))], out=tmp_path / "r.html", title=hostile))
    assert driver.execute_script("return document.title") == hostile
    assert text(driver, "question") == hostile
    assert driver.execute_script("return document.querySelectorAll('main img[src=x]').length") == 0


def test_printed_page_opens_its_details(show: Any, one: Path) -> None:
    driver = show(one)
    printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000
    assert driver.execute_script("return [...document.querySelectorAll('details')].every((e) => e.open)")


@pytest.mark.parametrize(("trusted", "colour"), [(True, (0, 114, 178)), (False, (213, 94, 0)), (None, (90, 90, 90))])
def test_a_saved_map_says_whether_it_was_checked(show: Any, tmp_path: Path, trusted: Any, colour: Any) -> None:
    recording = samples.trace()
    score = None if trusted is None else samples.score(reasons=() if trusted else ("tied",))
    page = report([samples.heat(recording, samples.selection())], scores=[score], out=tmp_path / "r.html")
    driver = show(page)
    uri = driver.execute_script("return marked().toDataURL('image/png')")
    saved = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(int)
    view = pixels(driver)
    assert saved.shape == view.shape
    assert np.abs(saved[-2, 1] - colour).max() <= 2
    assert np.array_equal(saved[: saved.shape[0] // 2], view[: saved.shape[0] // 2])  # the rest is what is shown


# ------------------------------------------------------------------------------- directions of writing, several images

ARABIC = ["النجمة", " ال", "حمراء", " و", " كبيرة", "."]
MIXED = ["The", " sign", " says", " שלום", " גדול", " in", " red", "."]
HEBREW = ["הכוכב", " הוא", " red", " star", " 12", " נכון", "."]
CHINESE = ["图", "片", "里", "有", "红色", "的", "星", "。"]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (ARABIC, [".", "كبيرة", "و", "الحمراء", "النجمة"]),
        (MIXED, ["The", "sign", "says", "גדול", "שלום", "in", "red", "."]),
        (HEBREW, [".", "נכון", "red", "star", "12", "הוא", "הכוכב"]),
        (CHINESE, ["图", "片", "里", "有", "红色", "的", "星", "。"]),
    ],
    ids=["arabic", "mixed", "hebrew", "chinese"],
)
def test_words_stand_in_the_order_of_their_script(show: Any, tmp_path: Path, tokens: Any, expected: Any) -> None:
    """From left to right as a reader sees them, by where the browser puts them."""
    llr = [2.0] + [0.1] * (len(tokens) - 1)
    recording = samples.trace(tokens=tokens, llr=llr, log_probs=[-0.1] * len(tokens))
    chosen = samples.selection((0,), tokens=tuple(tokens), llr=tuple(llr), skipped={})
    driver = show(report([samples.heat(recording, chosen)], out=tmp_path / "r.html"))
    places = driver.execute_script(
        "return [...document.querySelectorAll('.answer .word')].map((w) => "
        "[w.getBoundingClientRect().left, w.textContent, w.getBoundingClientRect().top])"
    )
    assert max(top for *_, top in places) - min(top for *_, top in places) < 12, "one line, so that places compare"
    assert [text for _, text, _ in sorted(places)] == expected
    word(driver, expected[0]).send_keys("\ue007")  # Enter presses a word as it does a button
    assert expected[0] in text(driver, "hint")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images; the eighth and the third are explained."""
    recording = samples.trace(images=[samples.picture((320, 240), seed) for seed in range(10)])
    heats = [samples.heat(recording, image_index=index, values=samples.blob((0.2, 0.2))) for index in (7, 2)]
    return report(heats, scores=[samples.score(), None], out=tmp_path_factory.mktemp("several") / "report.html")


def test_several_images_are_all_shown_and_the_explained_ones_can_be_chosen(show: Any, several: Path) -> None:
    driver = show(several)
    strip = find(driver, "[data-ref=strip]")
    assert "Image 8 of 10" in strip.text
    assert len(strip.find_elements("css selector", "img")) == 10
    alt = [image.get_attribute("alt") for image in strip.find_elements("css selector", "span img")]
    assert len(alt) == 8 and all(one.endswith("not explained") for one in alt)
    third, eighth = strip.find_elements("css selector", "button")
    assert eighth.get_attribute("aria-pressed") == "true" and third.get_attribute("aria-pressed") == "false"
    before = pixels(driver)
    third.click()
    settle(driver)
    assert "Image 3 of 10" in find(driver, "[data-ref=strip]").text
    assert find(driver, "[data-ref=view]").get_attribute("data-map") == "1"
    assert np.abs(pixels(driver) - before).mean() > 1
    original = np.asarray(samples.picture((320, 240), 2).resize(before.shape[1::-1])).astype(float)
    assert np.abs(pixels(driver)[-100:] - original[-100:]).mean() < 12, "the third image, under its map"


def test_one_image_needs_no_strip(show: Any, one: Path) -> None:
    assert not find(show(one), "[data-ref=strip]").is_displayed()


def test_a_prompt_is_not_called_a_question(show: Any, tmp_path: Path) -> None:
    recording = samples.trace(question=None)
    driver = show(report([samples.heat(recording)], out=tmp_path / "r.html"))
    assert (text(driver, "asked"), text(driver, "question")) == ("Prompt", recording.prompt)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.5, 1.0), (0.0, 28.3), (-7.0, 60.0), (-0.2, 1.3), (0.0, 2.0)])
def test_labels_of_the_curves_overlap_nothing(show: Any, tmp_path: Path, low: float, high: float) -> None:
    fractions = np.linspace(0, 1, 33)
    wave = np.sin(np.pi * fractions) ** 2
    score = samples.score(
        deletion=low or 0.1,
        insertion=high,
        deletion_curve=tuple(1 - fractions + (low - 0.5) * wave),
        insertion_curve=tuple(fractions + (high - 0.5) * wave),
    )
    driver = show(report([samples.heat()], scores=[score], out=tmp_path / "r.html"))
    boxes = driver.execute_script(
        "const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };"
        "return {texts: [...document.querySelectorAll('.chart text, .keys span')].map(box),"
        " curves: [...document.querySelectorAll('.chart .line')].map(box)}"
    )
    everything = boxes["texts"] + boxes["curves"]
    for number, one in enumerate(boxes["texts"]):
        for other in everything[number + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] + 2 or other[3] <= one[1] + 2
            assert apart, (low, high, one, other)
    told = text(driver, "remarks")
    assert ("below 0" in told) == (low < 0) and ("above 1" in told) == (high > 1)


def test_a_notebook_shows_the_page_in_a_frame(show: Any, one: Path, tmp_path: Path) -> None:
    """As ``nbconvert`` writes a cell's output; the page's own policy and the frame's sandbox hold inside."""
    notebook = tmp_path / "notebook.html"
    notebook.write_text(
        f"<!doctype html><html data-ready='true'><meta charset=utf-8><body>{one._repr_html_()}", encoding="utf-8"
    )
    driver = show(notebook)
    driver.switch_to.frame(find(driver, "iframe"))
    settle(driver)
    assert text(driver, "verdict").startswith("The map holds up")
    word(driver, "carousel").click()
    settle(driver)
    assert find(driver, "[data-ref=view]").get_attribute("data-map") == "1"
    find(driver, "#theme").click()
    driver.switch_to.default_content()


def test_where_scripts_are_forbidden_a_notebook_still_says_what_was_found(show: Any, one: Path, tmp_path: Path) -> None:
    notebook = tmp_path / "strict.html"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"script-src 'none'; frame-src 'none'\">"
    notebook.write_text(f"<!doctype html><html data-ready='true'>{policy}<body>{one._repr_html_()}", encoding="utf-8")
    driver = show(notebook)
    said = find(driver, "body").text
    assert "2 × the map holds up, 1 × do not trust this map" in said
    assert find(driver, "a").get_attribute("href").endswith("report.html")
    driver.get_log("browser")  # that scripts are forbidden is told there
