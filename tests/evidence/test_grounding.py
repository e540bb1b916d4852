"""Boxes that an answer holds, by family, from answers written by hand; and maps that look there, or elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import report_samples
import torch
from PIL import Image
from toy_replay import ToyReplay
from trace_samples import sample_capture

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.evidence import answer_boxes, box_maps, check_box, draw_boxes
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.trace import open_trace
from lvlm_probe.trace.writer import write

SIZE = (400, 200)


def answered(text: str, family: str = "", *, every: int = 3, **changes: Any) -> Any:
    """A trace of an answer whose tokens are ``every`` characters long, each of log P −0.1 and ratio 2."""
    pieces = [text[start : start + every] for start in range(0, len(text), every)] or [""]
    facts: dict[str, Any] = {
        "tokens": pieces,
        "images": [Image.new("RGB", SIZE)],
        "model": {"config": {"model_type": family, "vision_config": {"patch_size": 14}}},
        "model_kwargs": {},
        "log_probs": np.full(len(pieces), -0.1, np.float32),
        "llr": np.full(len(pieces), 2.0, np.float32),
    }
    return SimpleNamespace(**{**facts, **changes})


GRID = {"image_grid_thw": torch.tensor([[1, 10, 20]])}  # 140 rows, 280 columns of 14 pixels

CASES = [
    # the answer, the family, label, what is written (x y x y), its place in an image of 400 × 200, the convention
    (
        "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
        "qwen2_vl", "the dog", (100, 200, 300, 400), (40, 40, 120, 80), "1000",
    ),
    ("<ref>a cat</ref><box>(5,10),(250,500)</box>", "qwen", "a cat", (5, 10, 250, 500), (2, 2, 100, 100), "1000"),
    ("<ref>sign</ref><box>[[10, 20, 30, 40]]</box>", "internvl", "sign", (10, 20, 30, 40), (4, 4, 12, 8), "1000"),
    ("<ref>sign</ref><box>10 20 30 40</box>", "minicpmv", "sign", (10, 20, 30, 40), (4, 4, 12, 8), "1000"),
    ("<|ref|>x<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>", "deepseek", "x", (0, 0, 999, 999), (0, 0, 400, 200), "999"),
    (
        '```json\n[{"bbox_2d": [28, 14, 140, 70], "label": "a \\"b\\""}]\n```',
        "qwen2_5_vl", 'a "b"', (28, 14, 140, 70), (40, 20, 200, 100), "model pixels",
    ),
    ('[{"bbox_2d": [28, 14, 140, 70]}]', "qwen3_vl", "", (28, 14, 140, 70), (11.2, 2.8, 56, 14), "1000"),
    ('{"point_2d": [500, 500], "label": "nose"}', "qwen3_vl", "nose", (500, 500), (200, 100), "1000"),
    ('{"box_2d": [100, 250, 500, 750]}', "gemma3", "", (250, 100, 750, 500), (100, 20, 300, 100), "1000"),
    ("car<loc_10><loc_20><loc_29><loc_39>", "florence2", "car", (10, 20, 29, 39), (4.2, 4.1, 11.8, 7.9), "bins"),
    (
        "<loc0256><loc0128><loc0512><loc1024> cat",
        "paligemma", "cat", (128, 256, 1024, 512), (50, 50, 400, 100), "1024",
    ),
    (  # a quad of text: its four corners clockwise, here of a line that climbs a little
        "</s><s>TOTAL 7.45<loc_100><loc_210><loc_300><loc_190><loc_302><loc_240><loc_102><loc_260></s>",
        "florence2", "TOTAL 7.45", (100, 210, 300, 190, 302, 240, 102, 260), (40.2, 38.1, 121, 52.1), "bins",
    ),
    (
        "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>.",
        "kosmos-2", "a snowman", (12, 1, 31, 26), (156.25, 9.375, 393.75, 165.625), "cells",
    ),
    (
        "<object><patch_index_0005><patch_index_0005></object>",
        "kosmos-2", "", (5, 0, 5, 0), (62.5, 0, 75, 6.25), "cells",
    ),
    ('<point x="63.5" y="44.5" alt="the mat">mat</point>', "molmo", "the mat", (63.5, 44.5), (254, 89), "100"),
    ("It is at [0.1, 0.25, 0.3, 0.5].", "llava", "", (0.1, 0.25, 0.3, 0.5), (40, 50, 120, 100), "1"),
]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("text", "family", "label", "numbers", "pixels", "convention"), CASES)
def test_an_answer_of_every_family(
    text: str, family: str, label: str, numbers: tuple[float, ...], pixels: tuple[float, ...], convention: str
) -> None:
    trace = answered(text, family, model_kwargs=GRID if convention == "model pixels" else {})
    (box,) = answer_boxes(trace)
    assert (box.label, box.numbers, box.convention, box.fault) == (label, numbers, convention, None)
    assert box.pixels == pytest.approx(pixels)
    assert box.kind == ("point" if len(numbers) == 2 else "box")
    written = "".join(trace.tokens[token] for token in box.tokens)
    digits = re.findall(r"\d+", "".join(re.findall(r"<patch_index_\d+>", text))) or [f"{n:g}" for n in numbers]
    assert all(number in written for number in digits)
    assert box.log_p == pytest.approx(-0.1 * len(box.tokens)) and box.p == pytest.approx(math.exp(box.log_p))
    assert box.llr == pytest.approx(2.0 * len(box.tokens))


def test_several_boxes_stand_in_the_order_of_the_answer() -> None:
    text = "<ref>cats</ref><box>(0,0),(10,10)</box><box>(20,20),(30,30)</box> and <box>(40,40),(50,50)</box>"
    assert [box.label for box in answer_boxes(answered(text))] == ["cats", "cats", ""]
    text = '<points x1="10" y1="20" x2="30.5" y2="40" alt="cups">cups</points>'
    assert [box.numbers for box in answer_boxes(answered(text))] == [(10, 20), (30.5, 40)]
    text = "car<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8>dog<loc_9><loc_9><loc_10><loc_10>"
    assert [box.label for box in answer_boxes(answered(text, "florence2"))] == ["car", "car", "dog"]
    text = "a line" + "".join(f"<loc_{place}>" for place in (10, 10, 20, 10, 20, 15, 10, 15))
    text += "b" + "".join(f"<loc_{place}>" for place in (5, 9, 6, 9, 5, 8))
    found = answer_boxes(answered(text, "florence2"))
    assert [(box.label, len(box.numbers)) for box in found] == [("a line", 8), ("b", 6)]
    text = (
        "<phrase> two dogs</phrase><object><patch_index_0000><patch_index_0033></delimiter_of_multi_objects/>"
        "<patch_index_0066><patch_index_1023></object> play"
    )
    found = answer_boxes(answered(text, "kosmos-2"))
    assert [(box.label, box.numbers) for box in found] == [
        ("two dogs", (0, 0, 1, 1)), ("two dogs", (2, 2, 31, 31))
    ]  # fmt: skip
    assert answer_boxes(answered("Nothing (1,2),(3,4) of the kind, in [1, 2, 3] rows of [1, 2, 3, 4, 5].")) == []


def test_cells_and_quads_stand_where_the_models_own_processors_put_them() -> None:
    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor
    from transformers.models.kosmos2.processing_kosmos2 import patch_index_to_coordinate

    generator = np.random.default_rng(0)
    for first, last in [(7, 7), (3, 99), (64, 70), *np.sort(generator.integers(0, 1024, (20, 2))).tolist()]:
        text = f"<object><patch_index_{first:04}><patch_index_{last:04}></object>"
        (box,) = answer_boxes(answered(text, "kosmos-2"))
        edges = np.array(patch_index_to_coordinate(first, last, 32)) * (*SIZE, *SIZE)
        assert box.pixels == pytest.approx(tuple(edges))
    own = Florence2PostProcessor({}, SimpleNamespace(all_special_tokens=[]))
    for _ in range(20):
        left, top, wide, high, lean = (int(value) for value in generator.integers(20, 300, 5))
        corners = [left, top + lean, left + wide, top, left + wide, top + high, left, top + lean + high]
        text = "So<loc_" + "><loc_".join(map(str, corners)) + ">"
        (read,) = own.parse_ocr_from_text_and_spans(text, None, SIZE)
        (box,) = answer_boxes(answered(text, "florence2"))
        xs, ys = read["quad_box"][::2], read["quad_box"][1::2]
        around = (min(xs), min(ys), max(xs), max(ys))  # in whole pixels, cut off
        assert box.pixels == pytest.approx(around, abs=1) and box.label == read["text"]


def test_only_the_tokens_of_the_numbers_count() -> None:
    text = "a [0.5, 0.25, 0.75, 0.5] b"
    trace = answered(text, every=1)
    trace.log_probs = np.array([-5.0 if piece in "ab[], " else -0.5 for piece in text], np.float32)
    (box,) = answer_boxes(trace)
    assert "".join(trace.tokens[token] for token in box.tokens) == "0.50.250.750.5"
    assert box.log_p == pytest.approx(-0.5 * len(box.tokens))


def test_what_is_not_told_is_asked_for() -> None:
    trace = answered('{"name": "sun", "bbox": [10, 20, 60, 80]}', "llava")
    with pytest.raises(ExplainError, match=r"10, 20, 60, 80.*boxes='pixels'"):
        answer_boxes(trace)
    (box,) = answer_boxes(trace, boxes="pixels")
    assert box.pixels == (10, 20, 60, 80) and box.label == "sun"
    (box,) = answer_boxes(trace, boxes="100")
    assert box.pixels == pytest.approx((40, 40, 240, 160))
    with pytest.raises(ExplainError, match="does not say what these numbers"):
        answer_boxes(answered('{"bbox_2d": [1, 2, 3, 4]}', "llava"))
    with pytest.raises(ExplainError, match="no image_grid_thw"):
        answer_boxes(answered('{"bbox_2d": [1, 2, 3, 4]}', "qwen2_5_vl"))
    with pytest.raises(ExplainError, match="boxes is one of '1'"):
        answer_boxes(trace, boxes="inches")  # type: ignore[arg-type]
    with pytest.raises(ExplainError, match="1 image"):
        answer_boxes(trace, image=1)


def test_a_box_that_is_none_says_why() -> None:
    def fault(*numbers: float) -> str | None:
        (box,) = answer_boxes(answered(str([*numbers])), boxes="pixels")
        return box.fault

    assert fault(10, 10, 60, 60) is None
    assert "empty" in str(fault(60, 10, 60, 60)) and "empty" in str(fault(10, 60, 60, 10))
    assert "outside" in str(fault(500, 10, 600, 60)) and "outside" in str(fault(-40, 10, -5, 60))


@pytest.mark.parametrize(("place", "verdict"), [((1, 1), "agrees"), ((3, 3), "elsewhere")])
def test_a_map_looks_where_the_answer_says_or_elsewhere(place: tuple[int, int], verdict: str) -> None:
    pieces = ["at ", "[", "0.25", ", 0.25", ", 0.50", ", 0.50", "]"]
    weights = torch.zeros(len(pieces), 4, 4)
    weights[:, *place] = 1.0  # the cell that decides every token
    toy = ToyReplay(weights, original=[0.9] * len(pieces), base=[0.01] * len(pieces), tokens=pieces)
    trace = answered("".join(pieces), tokens=pieces, images=[toy.image()])
    (box,) = answer_boxes(trace)
    assert box.tokens == (2, 3, 4, 5) and box.pixels == (16, 16, 32, 32)
    (heat,) = box_maps(toy, [box], method="occlusion", progress=False)
    assert heat.selection.indices == box.tokens
    assert heat.provenance["box"]["verdict"] == verdict
    check = check_box(box, heat)
    assert check.area == pytest.approx(1 / 16)
    if verdict == "elsewhere":
        assert check.pointing == 0 and check.sentence.startswith("It says here, it looks there: 0 % of the map")
    else:
        assert check.pointing == 1 and check.lift > 0.5
    again = dataclasses.replace(box, image_size=(9, 9))
    with pytest.raises(ExplainError, match="another size"):
        check_box(again, heat)


def test_a_map_of_one_value_has_the_boxs_area_in_it_and_none_over_it() -> None:
    (box,) = answer_boxes(answered("[0.0, 0.0, 0.5, 0.5]"))
    even = Heatmap(np.ones((8, 8), np.float32), SIZE)
    check = check_box(box, even)
    assert check.energy == pytest.approx(check.area) == 0.25
    assert check.lift == pytest.approx(0, abs=1e-6)
    for brighter, verdict in ((1.1, "elsewhere"), (1.5, "partly"), (3.0, "agrees")):  # lifts of 0.02, 0.11 and 0.33
        values = np.ones((8, 8), np.float32)
        values[:4, :4] *= brighter
        assert check_box(box, Heatmap(values / values.max(), SIZE)).verdict == verdict


def test_boxes_are_drawn_where_they_are() -> None:
    boxes = answer_boxes(answered("[0.25, 0.25, 0.75, 0.75]"))
    drawn = np.asarray(draw_boxes(Image.new("RGB", SIZE, "white"), boxes))
    assert (drawn[50, 150] != 255).any() and (drawn[100, 100] != 255).any()
    assert (drawn[100, 200] == 255).all() and (drawn[180, 380] == 255).all()


def _first_map(page: Path) -> dict[str, Any]:
    text = page.read_text("utf-8")
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return data["samples"][0]["maps"][0]  # type: ignore[no-any-return]


def test_the_page_draws_the_box_and_says_the_verdict(tmp_path: Path) -> None:
    heat = report_samples.heat(report_samples.trace("a"))
    (box,) = answer_boxes(answered("[0.25, 0.25, 0.5, 0.5]", images=[Image.new("RGB", heat.image_size)]))
    shown = check_box(box, heat).attached(heat)
    drawn = _first_map(probe.report([shown], out=tmp_path / "page.html"))
    assert drawn["box"] == pytest.approx([0.25, 0.25, 0.5, 0.5])
    assert [line["reason"] for line in drawn["sanity"]] == [check_box(box, heat).sentence]
    for record in (3, {"pixels": "x"}, {"pixels": [1, 2, float("inf"), 4]}, {"pixels": [1], "verdict": "agrees"}):
        other = dataclasses.replace(heat, provenance={**heat.provenance, "box": record})
        drawn = _first_map(probe.report([other], out=tmp_path / "other.html", overwrite=True))
        assert drawn["box"] is None


def test_it_works_offline_on_a_stored_trace(tmp_path: Path) -> None:
    pieces = ["<box>", "(0", ",", "0", "),", "(500", ",", "500", ")", "</box>"]
    capture = sample_capture()
    row = dataclasses.replace(
        capture.rows[0], tokens=pieces, token_ids=np.arange(10), special=np.zeros(10, bool),
        log_probs=np.full(10, -0.01, np.float32), top_log_probs=None, top_tokens=None, baseline_log_probs=None,
        points={},
    )  # fmt: skip
    trace = open_trace(write(dataclasses.replace(capture, rows=[row]), tmp_path))
    (box,) = answer_boxes(trace)
    assert box.pixels == (0, 0, 12, 9) and box.tokens == (1, 3, 5, 7) and box.llr is None
