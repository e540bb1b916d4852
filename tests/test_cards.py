"""What a notebook and one line show of the objects that a user holds."""

from __future__ import annotations

import copy
import dataclasses
import html
import html.parser
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples
import torch
from trace_samples import sample_capture

import lvlm_probe as probe
from lvlm_probe import causal
from lvlm_probe.cards import answer_html, in_one_line
from lvlm_probe.pages.shell import Page
from lvlm_probe.trace import write

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def things(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each, from a real run."""
    model, processor = demo
    scene = probe.demo.scenes(1)[0]
    folder = tmp_path_factory.mktemp("runs")
    with probe.attach(model, processor) as p, p.record(folder, question=scene.question) as recording:
        inputs = processor.apply_chat_template(
            scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generate(**inputs)
    replay = probe.replay(recording.traces[0], model, processor)
    heat = probe.explain(replay, method="center")
    score = probe.evaluate(heat, replay, steps=4)
    return {
        "recording": recording,
        "replay": replay,
        "selection": probe.select_tokens(replay),
        "heat": heat,
        "score": score,
        "store": probe.open_store(folder),
        "report": probe.report([heat], scores=[score], out=folder / "report.html"),
        "comparison": probe.compare([heat], scores=[score], out=folder / "compare.html"),
        "trace": recording.traces[0],
    }


class Tags(html.parser.HTMLParser):
    """Opened and closed tags balance, as far as a card is concerned."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.names: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        if tag not in ("br", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "line", "shown"),
    [
        ("recording", r"<Recording to '.*': 1 file>", ["1 trace file", "the last"]),
        ("replay", r"<Replay of '.*' \(.*\) on Llava.*, baseline blur>", ["baseline blur", "backward passes"]),
        ("selection", r"<TokenSelection llr: .*>", ["tokens selected", "underline"]),
        ("score", r"<Score deletion .*>", ["deletion", "<svg", "<polyline"]),
        ("store", r"TraceStore\('.*', 1 file\)", ["<table>", "complete"]),
        ("heat", r"<Heatmap center of .*>", ["not checked", "data:image/png"]),
    ],
)
def test_every_object_has_a_line_and_a_card(things: Any, name: str, line: str, shown: list[str]) -> None:
    thing = things[name]
    assert re.fullmatch(line, repr(thing)) and " object at 0x" not in repr(thing)
    page = thing._repr_html_()
    tags = Tags(page)
    assert not tags.stack and "script" not in tags.names
    assert all(one in page for one in shown), page
    answer = things["trace"].answer.strip()
    if name in ("recording", "replay", "store"):
        assert re.sub(r"<[^>]*>", "", page).count(html.escape(answer)) >= 1 and things["trace"].question in page


def test_arrays_are_told_by_their_shape(things: Any) -> None:
    rows = things["trace"].attention
    assert repr(rows).startswith(f"AttentionRows(values=float32 {rows.values.shape}, layers=(0, 1")
    assert "image_positions=int64 (" in repr(things["trace"].layout)
    for thing in (rows, things["trace"].layout, sample_capture().rows[0], *sample_capture().rows[0].images):
        assert len(repr(thing)) < 3000 and "\n" not in repr(thing)


def test_one_line_of_anything() -> None:
    @dataclasses.dataclass
    class Thing:
        array: Any
        tensor: Any
        many: Any
        text: str
        data: bytes
        left_out: int = dataclasses.field(default=1, repr=False)

    told = in_one_line(
        Thing(np.zeros((2, 3)), torch.zeros(4, dtype=torch.bfloat16), list(range(100)), "x" * 100, b"123")
    )
    assert told == (
        "Thing(array=float64 (2, 3), tensor=bfloat16 (4,), many=[0, 1, 2, 3, 4, 5, 6, 7, … (100 in all)], "
        f"text='{'x' * 60}…', data=3 bytes)"
    )


def test_one_line_of_what_holds_a_heatmap_without_values() -> None:
    @dataclasses.dataclass
    class Holding:
        heat: Any

    told = in_one_line(Holding(probe.Heatmap(None, (300, 200), reason="nothing to explain")))
    assert told.startswith("Holding(heat=") and "nothing to explain" in told


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    capture = sample_capture()
    capture.rows[0].tokens[1], capture.rows[0].question = HOSTILE, HOSTILE
    write(capture, tmp_path)
    selection = samples.selection((1,), tokens=(HOSTILE, "<b>"), llr=(0.1, 3.0), skipped={0: HOSTILE})
    score = samples.score(reasons=(HOSTILE,))
    for thing in (probe.open_store(tmp_path), selection, score):
        page = thing._repr_html_()
        assert "<script" not in page and html.escape(HOSTILE) in page


def test_words_of_an_answer_keep_their_spaces_and_their_direction() -> None:
    page = answer_html(
        ["图", "片", " red", ",", " שלום", "</s>"], [False] * 5 + [True], llr=[0, 0, 6, 0, 0, 9], marked=[2]
    )
    assert page.startswith('<p dir="auto"')
    assert re.sub(r"<[^>]*>", "", page) == "图片 red, שלום"
    assert page.count("background") == 1 and page.count("underline") == 1
    against = answer_html(["no", " image"], [False] * 2, llr=[float("-inf"), float("nan")])
    assert "rgba(0,114,178,0.45)" in against and against.count("background") == 1 and "-9.00 nats" in against


def test_a_card_ends_after_two_thousand_words() -> None:
    page = answer_html([f" w{number}" for number in range(2003)], [False] * 2003)
    assert "w1999<" in page and "w2000<" not in page and "… (3 more words)" in page


# ------------------------------------------------------------------------------------------------------------- pages


def test_a_written_page_is_a_path_in_every_way(things: Any) -> None:
    page, comparison = things["report"], things["comparison"]
    path = Path(str(page))
    assert isinstance(page, Path) and isinstance(page, os.PathLike)
    assert page == path and hash(page) == hash(path) and str(page) == os.fspath(page) == f"{page}"
    assert page.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    assert pickle.loads(pickle.dumps(page)) == path
    assert page.parent / page.name == path and page.with_suffix(".txt").suffix == ".txt"
    with open(page, encoding="utf-8") as file:
        assert file.read(9) == "<!doctype"
    assert os.fspath(comparison) == str(comparison) == str(comparison.path)
    assert Path(comparison).is_file() and "Comparison of 1 methods" in repr(comparison)


def test_a_notebook_shows_the_page_and_survives_without_frames(things: Any) -> None:
    shown = things["report"]._repr_html_()
    tags = Tags(shown)
    assert not tags.stack and tags.names == ["p", "a", "iframe"]
    inside = html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1])
    assert inside == things["report"].read_text(encoding="utf-8")
    assert 'sandbox="allow-scripts allow-downloads"' in shown, "no access to the notebook's own origin"
    outside = re.sub(r'srcdoc="[^"]*"', "", shown)
    verdict = things["score"].verdict
    assert ("the map holds up" if verdict.trusted else "do not trust this map") in outside and "report.html" in outside
    assert "1 method on 1 answer<" in things["comparison"]._repr_html_()


def test_what_is_no_page_shows_nothing_and_a_large_one_its_link(tmp_path: Path) -> None:
    page = Page(tmp_path / "a b&c.html")
    assert page._repr_html_() is None and Page(tmp_path)._repr_html_() is None
    page.write_text("x" * 9_000_000)
    assert "<iframe" not in page._repr_html_() and "a%20b%26c.html" in page._repr_html_()


# --- equal ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What verbs return, of one answer."""
    scene, folder = probe.demo.scenes(1)[0], tmp_path_factory.mktemp("results")
    answer = probe.ask(*demo, scene.image, scene.question, out=folder)
    replay, trace = answer.replay, answer.trace
    heat = answer.explain("yellow", method="occlusion", size=4, check=False)
    nothing = probe.Heatmap(None, heat.image_size, reason="no words")
    return {
        "answer": answer,
        "replay": replay,
        "trace": trace,
        "heatmap": heat,
        "heatmap of nothing": nothing,
        "score": probe.evaluate(heat, replay, steps=3, center=False),
        "score of nothing": probe.evaluate(answer.explain("is", method="occlusion", size=2, check=False), replay),
        "selection": heat.selection,
        "plan": probe.plan(replay, method="rise", seconds=False),
        "lens": causal.logit_lens(replay),
        "effect": causal.knockout(replay, heat, top=0.3, draws=1),
        "region": probe.evidence.region(replay, heat),
        "check": probe.sanity.weights(replay, heat, stages=1, draws=1),
        "attention": trace.attention,
        "layout": trace.layout,
        "edit": probe.edit(replay, heat),
    }


def test_what_is_copied_or_pickled_is_equal(results: dict[str, Any]) -> None:
    for name, one in results.items():
        if name in ("answer", "replay"):
            with pytest.raises(probe.errors.ReplayError, match=r"cannot be pickled.*send its trace"):
                pickle.dumps(one)
            continue
        for other in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other == one, name
            assert one != results["trace" if name == "plan" else "plan"], name


def test_what_holds_something_else_is_another(results: dict[str, Any]) -> None:
    heat, score, layout = results["heatmap"], results["score"], results["layout"]
    for other in (1 - heat.values, heat.values[:2], None):
        assert dataclasses.replace(heat, values=other, seen=None, reason="none") != heat
    assert len({heat, pickle.loads(pickle.dumps(heat)), results["heatmap of nothing"]}) == 2
    zeros = dataclasses.replace(heat, values=np.zeros_like(heat.values), seen=None)
    assert len({zeros, dataclasses.replace(zeros, values=-zeros.values)}) == 1  # 0 and −0 are one number
    assert math.isnan(score.center_gain) and dataclasses.replace(score, center_gain=0.5) != score
    assert dataclasses.replace(layout, patch_box=layout.patch_box + 1) != layout
    assert dataclasses.replace(layout, patch_box=None) != layout


def test_a_copy_of_an_answer_explains_on_its_own(results: dict[str, Any]) -> None:
    answer = results["answer"]
    other, count = copy.deepcopy(answer), len(answer.explained)
    assert other.explained == answer.explained and other.trace == answer.trace
    other.explain("cross", method="center", check=False)
    assert (len(answer.explained), len(other.explained)) == (count, count + 1)
    mask = torch.full((3, 3), 0.5)
    assert torch.equal(copy.deepcopy(results["replay"]).log_probs(mask), results["replay"].log_probs(mask))
