"""The notebook widget: traitlets and maps in Python, and the script in a real browser, on a stub of its model."""

from __future__ import annotations

import base64
import json
import sys

import numpy as np
import pytest
from browser import find, settle

import lvlm_probe as probe
from lvlm_probe.pages.shell import asset


@pytest.fixture(scope="module")
def answered(demo, tmp_path_factory):
    """A trace, a map of its selected words, and a function that makes one of a word."""
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    answer = probe.ask(model, processor, scene.image, scene.question, out=tmp_path_factory.mktemp("traces"))

    def explain(word):
        return probe.explain(answer.replay, tokens=(word.start, word.stop), method="center")

    return answer.trace, probe.explain(answer.replay, method="center"), explain


@pytest.mark.quick
def test_without_anywidget_the_extra_is_named(answered, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(probe.ProbeError, match=r"pip install 'lvlm-probe\[widget\]'"):
        probe.widget(answered[0])


def test_a_click_shows_a_map_and_makes_it_where_it_is_missing(answered):
    pytest.importorskip("anywidget", reason="anywidget is not installed: pip install 'lvlm-probe[widget]'")
    trace, heat, explain = answered
    asked = []
    widget = probe.widget(trace, heat, explain=lambda word: asked.append(word) or explain(word))
    assert [word["text"] for word in widget.words] == [word.text for word in trace.words]
    assert [w["llr"] for w in widget.words] == pytest.approx(
        [float(trace.llr[w.start : w.stop].sum()) for w in trace.words]
    )
    assert widget.word == -1 and widget.heat is heat and set(widget.maps) == {"-1"} and not asked
    seen = []
    widget.observe(lambda change: seen.append(change["new"]), "word")
    widget.word = 3
    assert seen == [3] and [word.text for word in asked] == ["yellow"]
    assert widget.heat.selection.text == "yellow" and set(widget.maps) == {"-1", "3"}
    assert widget.maps["3"].startswith("data:image/") and "Not checked." in widget.status
    widget.word = -1
    widget.word = 3
    assert len(asked) == 1, "a map is made once"
    import traitlets

    with pytest.raises(traitlets.TraitError, match="there is no word 99"):
        widget.word = 99
    html = widget._repr_mimebundle_()[0]["text/html"]
    assert html == widget.heat._repr_html_() and "img" in html


def test_what_cannot_be_shown_is_said(answered):
    pytest.importorskip("anywidget", reason="anywidget is not installed: pip install 'lvlm-probe[widget]'")
    trace, heat, _ = answered

    def refuses(word):
        raise probe.ProbeError("no memory left")

    def breaks(word):
        raise ZeroDivisionError

    widget = probe.widget(trace)
    widget.word = 0
    assert widget.heat is None and widget.status.startswith("No map of “The” was given")
    assert (
        "The cross is" in widget._repr_html_().replace("</span>", "").replace('<span style="">', "")
        or "The" in widget._repr_html_()
    )
    widget = probe.widget(trace, explain=refuses)
    widget.word = 0
    assert widget.status == "No map of “The”: no memory left"
    widget = probe.widget(trace, explain=breaks)
    with pytest.raises(ZeroDivisionError):
        widget.word = 1
    assert widget.status == "No map of “cross”: ZeroDivisionError"
    with pytest.raises(probe.ProbeError, match="1 heatmaps but 2 scores"):
        probe.widget(trace, heat, scores=[None, None])
    other = type(heat)(**{**vars(heat), "provenance": {**heat.provenance, "trace_id": "other"}})
    with pytest.raises(probe.ProbeError, match="heatmaps of its trace"):
        probe.widget(trace, other)
    for unlike in (other, None, "red"):
        widget = probe.widget(trace, explain=lambda word, found=unlike: found)
        widget.word = 0
        assert widget.heat is None and widget.status.startswith("No map of “The”: widget() shows heatmaps of its trace")


STUB = """<!doctype html><meta charset="utf-8"><title>widget</title><style>%s</style><body><div id="at"></div>
<script type="module">
const data = %s, heard = {};
window.model = {
  get: (name) => data[name],
  set: (name, value) => { data[name] = value; (heard[`change:${name}`] ?? []).forEach((act) => act()); },
  save_changes: () => { window.saved = (window.saved ?? 0) + 1; },
  on: (name, act) => (heard[name] ??= []).push(act),
  off: (name, act) => { heard[name] = heard[name].filter((one) => one !== act); },
};
window.heard = heard;
const { default: widget } = await import("data:text/javascript;base64,%s");
window.end = widget.render({ model, el: document.getElementById("at") });
document.documentElement.dataset.ready = "true";
</script>"""


@pytest.mark.browser
def test_the_script_in_a_browser(answered, show, tmp_path):
    trace, heat, _ = answered
    from lvlm_probe.pages.data_uris import data_uri
    from lvlm_probe.pages.widget import answer_words

    words, tail = answer_words(trace)
    words[1]["text"] = "<img src=x onerror=alert(1)>"  # what a model said is text
    plain, mapped = data_uri(trace.image), data_uri(heat.preview())
    data = {"question": trace.question, "words": words, "tail": tail, "image": plain, "maps": {"3": mapped},
            "word": -1, "status": ""}  # fmt: skip
    page = tmp_path / "widget.html"
    source = base64.b64encode(asset("widget.js").encode()).decode()
    page.write_text(STUB % (asset("widget.css"), json.dumps(data), source), encoding="utf-8")
    browser = show(page)
    picture = find(browser, ".lvlm-probe-widget img")
    buttons = browser.find_elements("css selector", ".lvlm-probe-widget button")
    assert [button.text for button in buttons] == [word["text"] for word in words]
    assert picture.get_attribute("src") == plain
    assert [button.get_attribute("class") for button in buttons] == ["", "", "", "mapped", ""]
    assert "rgba(238, 104, 32" in buttons[3].value_of_css_property("background-color"), "yellow is the image's doing"
    buttons[3].click()
    settle(browser)
    assert browser.execute_script("return [model.get('word'), window.saved]") == [3, 1]
    assert picture.get_attribute("src") == mapped and buttons[3].get_attribute("aria-pressed") == "true"
    browser.execute_script(
        "model.set('maps', {...model.get('maps'), '0': arguments[0]}); model.set('status', 'made')", plain
    )
    assert buttons[0].get_attribute("class") == "mapped" and find(browser, "[role=status]").text == "made"
    browser.execute_script("model.set('word', 0)")  # as from the kernel
    assert buttons[0].get_attribute("aria-pressed") == "true" and picture.get_attribute("src") == plain
    buttons[0].click()
    assert browser.execute_script("return model.get('word')") == -1, "a second click takes it back"
    browser.execute_script("end()")
    assert browser.execute_script("return Object.values(heard).flat().length") == 0
    drawn = np.frombuffer(base64.b64decode(browser.get_screenshot_as_base64()), np.uint8)
    assert len(drawn) > 1000
