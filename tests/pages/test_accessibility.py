"""Every kind of page against the rules of axe-core, light and dark, with all its details open."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
import study_samples
from browser import settle
from PIL import Image

from lvlm_probe.importing.meter import ranked, read_answer
from lvlm_probe.pages import compare, prior, report
from lvlm_probe.study.pages import write_page

# The package carries axe-core's script, which is all that is used of it: it is read, not imported.
AXE = importlib.util.find_spec("axe_playwright_python")

pytestmark = [
    pytest.mark.skipif(AXE is None, reason="no axe-core: pip install axe-playwright-python"),
    pytest.mark.xdist_group("browser"),
    pytest.mark.browser,
]


def _report(folder: Path) -> Path:
    """Words of their own, doubts, a map not checked, several images, areas outside 0 to 1, no map, another script."""
    heats, scores = samples.page()
    several = samples.trace("several", images=[samples.picture((300, 200), seed) for seed in range(4)])
    heats += [samples.heat(several, image_index=2), samples.heat(several), samples.heat(samples.trace("wild"))]
    scores += [None, samples.score(reasons=("too many ties",)), samples.score(deletion=-3.5, insertion=28.3)]
    nothing, arabic = samples.trace("nothing"), samples.trace("arabic", question=None)
    heats += [samples.heat(nothing, samples.selection(())), samples.heat(arabic)]
    scores += [None, None]
    return report(heats, scores=scores, out=folder / "report.html")


def _comparison(folder: Path) -> Path:
    trace = samples.trace("one", images=[samples.picture((300, 200), seed) for seed in range(3)])
    methods = ["igos++", "gradcam", "tmm"]
    heats = [samples.heat(one, method=name) for one in (trace, samples.trace("two")) for name in methods]
    heats[2] = dataclasses.replace(heats[2], values=None, seen=None, reason="it has no gradient")
    scores = [samples.score(), samples.score(deletion=-3.5, reasons=("too many ties",)), None] * 2
    return compare(heats, scores=scores, out=folder / "compare.html").path


def _meter(folder: Path) -> Path:
    picture = Image.new("RGB", (88, 66), (20, 90, 200))
    pieces, log_probs = ["The", " red", " car", "."], [-0.1] * 4
    readings = [
        read_answer(
            pieces, [False] * 4, log_probs, [ratio] * 4, source="a.jsonl", id=None, question="?", thumbnail=picture
        )
        for ratio in (-1.0, 0.2, 4.0)
    ]
    return prior.write_page(ranked(readings), folder / "meter.html")


def _study(folder: Path, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        study_samples.open_without_files(patch)
        return write_page(study_samples.results(folder, 6), folder / "study.html", **options)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def page(kind: str) -> Path:
        if kind not in made:
            made[kind] = globals()[f"_{kind}"](tmp_path_factory.mktemp(kind))
        return made[kind]

    return page


def violations(browser: Any) -> list[str]:
    """What axe-core says against the page as it stands, a line for each."""
    assert AXE is not None and AXE.origin is not None
    browser.execute_script(Path(AXE.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    browser.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    found = browser.execute_async_script("axe.run(document).then(arguments[0])")
    assert len(found["passes"]) > 10
    return [f"{one['id']}: {node['html'][:200]}" for one in found["violations"] for node in one["nodes"]]


@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 1280), (True, 390)], ids=["light", "dark", "phone"])
@pytest.mark.parametrize("kind", ["report", "comparison", "meter", "study"])
def test_no_rule_is_broken(kind: str, dark: bool, width: int, pages: Any, show: Any) -> None:
    browser = show(pages(kind), dark=dark, width=width)
    assert violations(browser) == []
    count = browser.execute_script("return document.querySelectorAll('#samples button').length")
    for number in range(2, count + 1):
        browser.execute_script(f"location.hash = '{number}'")
        settle(browser)
        assert violations(browser) == [], f"sample {number}"


def test_what_is_wrong_is_found(tmp_path: Path, show: Any) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><html lang='en' data-ready='true'><title>t</title><main><img src='data:,'></main>")
    browser = show(page)
    browser.execute_script("document.querySelector('img').remove(); document.querySelector('main').append(new Image())")
    assert any(line.startswith("image-alt") for line in violations(browser))
