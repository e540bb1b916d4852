"""Fields of answers and their places: on a page drawn here, where the place of every value is known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from toy_replay import ToyReplay

import lvlm_probe as probe
from lvlm_probe.errors import ExplainError
from lvlm_probe.evidence import export, fields, locate, region
from lvlm_probe.evidence.regions import first_that, polygons_of
from lvlm_probe.heatmap import Heatmap

SIZE, GRID = (300, 400), (8, 6)  # of the page, pixels; cells of 50 × 50
PIECES = ['{"', "shop", '": "', "Corner", " Café", '", "', "total", '": ', "12.", "40", "}"]
PLACES = {"shop": [(0, 1), (0, 2)], "total": [(6, 4)]}
"""The cells, (row, col), in which the receipt has each value."""


def receipt() -> Image.Image:
    """A receipt with a shop's name at the top, and the total in the lower right."""
    page = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(page)
    pen.text((55, 15), "Corner Café", fill="black", font_size=16)
    for row, (what, price) in enumerate((("tea", "4.20"), ("cake", "8.20"))):
        pen.text((20, 120 + 40 * row), what, fill="black", font_size=14)
        pen.text((210, 120 + 40 * row), price, fill="black", font_size=14)
    pen.text((20, 315), "TOTAL", fill="black", font_size=16)
    pen.text((205, 315), "12.40", fill="black", font_size=16)
    return page


@pytest.fixture
def read() -> ToyReplay:
    """A reader whose every token hangs on the cells that its value stands in, and on no other."""
    weights = torch.full((len(PIECES), *GRID), 1.0 / (GRID[0] * GRID[1]))
    for steps, name in (((3, 4), "shop"), ((8, 9), "total")):
        for step in steps:
            weights[step] = 0.0
            for row, col in PLACES[name]:
                weights[step, row, col] = 1.0 / len(PLACES[name])
    count = len(PIECES)
    toy = ToyReplay(weights, original=[0.9] * count, base=[0.01] * count, tokens=PIECES, size=SIZE)
    toy.trace.tokens, toy.trace.words, toy.trace.llr = PIECES, toy.words, toy.llr.numpy()
    toy.trace.images = [receipt()]
    return toy


# ---------------------------------------------------------------- fields


@pytest.mark.quick
def test_every_leaf_of_a_json_answer_is_a_field_with_its_tokens(read: ToyReplay) -> None:
    shop, total = fields(read.trace)
    assert (shop.name, shop.value, shop.tokens) == ("shop", "Corner Café", (3, 4))
    assert (total.name, total.value, total.tokens) == ("total", "12.40", (8, 9))
    assert total.log_p == pytest.approx(2 * np.log(0.9)) and total.p == pytest.approx(0.81)
    assert total.llr == pytest.approx(2 * np.log(0.9 / 0.01))


def test_a_value_has_the_bytes_that_begin_its_first_character() -> None:
    said = SimpleNamespace(tokens=['{"', "a", '":"', "", "", "猫", '"}'], log_probs=np.arange(7.0), llr=None, words=[])
    (field,) = fields(said)
    assert (field.value, field.tokens, field.log_p) == ("猫", (3, 4, 5), 12.0)


def _of(text: str) -> list[tuple[str, str]]:
    words = [SimpleNamespace(text=word, start=k, stop=k + 1) for k, word in enumerate(text.split())]
    tokens = text.split() if "{" not in text and "[" not in text else list(text)
    return [
        (one.name, one.value) for one in fields(SimpleNamespace(tokens=tokens, words=words, log_probs=None, llr=None))
    ]


def test_json_of_any_shape_and_what_is_none() -> None:
    nested = '{"a": {"b": [1, {"c": "x"}], "d": null}, "e": "", "f": true, "g": -1.5e3}'
    assert _of(f"Here it is:\n```json\n{nested}\n```") == [
        ("a.b[0]", "1"), ("a.b[1].c", "x"), ("a.d", "null"), ("f", "true"), ("g", "-1.5e3")
    ]  # fmt: skip
    assert _of('{"quoted": "say \\"hi\\""}') == [("quoted", 'say \\"hi\\"')]
    assert _of('{"cut": "off", "then": "noth') == [("cut", "off")]
    assert _of("no JSON here") == [("", "no"), ("", "JSON"), ("", "here")]
    assert _of("[" * 200) == [("", "[" * 200)]


# ---------------------------------------------------------------- regions


def test_outlines_enclose_exactly_the_cells_and_part_what_touches_at_a_corner() -> None:
    generator = np.random.default_rng(0)
    for _ in range(60):
        rows, cols = generator.integers(1, 7, 2)
        cells = generator.random((rows, cols)) < generator.random()
        rings, boxes = polygons_of(cells, (int(cols) * 4, int(rows) * 4))
        signed = [sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(r, (*r[1:], r[0]), strict=True)) / 2 for r in rings]
        assert sum(signed) == 16 * cells.sum()
        assert len(boxes) == sum(area > 0 for area in signed) == _parts(cells)
        for (row, col), inside in np.ndenumerate(cells):
            assert _inside(rings, 4 * col + 2, 4 * row + 2) == inside


def test_parts_that_touch_at_a_corner_are_not_joined_whichever_is_met_first() -> None:
    cells = np.array([[1, 0, 0], [1, 0, 1], [1, 1, 0]], bool)
    for turned in (cells, cells[::-1], cells[:, ::-1], cells[::-1, ::-1], cells.T):
        assert len(polygons_of(turned, (3, 3))[1]) == 2


def _parts(cells: np.ndarray) -> int:
    left, parts = set(map(tuple, np.argwhere(cells).tolist())), 0
    while left:
        waiting, parts = [left.pop()], parts + 1
        while waiting:
            row, col = waiting.pop()
            near = left & {(row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)}
            left -= near
            waiting += near
    return parts


def _inside(rings: Any, x: float, y: float) -> bool:
    crossed = 0
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, (*ring[1:], ring[0]), strict=True):
            crossed += (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
    return bool(crossed % 2)


@pytest.mark.quick
def test_a_search_finds_the_edge_in_few_questions() -> None:
    for edge, most in itertools.product((1, 2, 3, 7, 64, 100), (100, 128)):
        asked: list[int] = []

        def holds(number: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number >= edge

        assert first_that(holds, most) == edge and len(asked) <= 2 * most.bit_length() + 2
    assert first_that(lambda number: False, 100) is None


def _heat(read: ToyReplay, name: str, **options: Any) -> Heatmap:
    (one,) = (one for one in fields(read.trace) if one.name == name)
    return probe.explain(read, tokens=list(one.tokens), method="occlusion", progress=False, **options)


def test_the_region_is_that_of_the_score_by_passes_and_by_its_curve(read: ToyReplay) -> None:
    # The map ranks the cell of the total first; its four quarters (the map's cells) carry a quarter of the score each.
    cells = np.zeros((16, 12), np.float32)
    cells[12:14, 8:10] = [[1.0, 0.9], [0.8, 0.7]]
    heat = Heatmap(cells, SIZE, selection=_heat(read, "total").selection, provenance={"trace_id": "toy"})
    for keep, count in ((0.2, 1), (0.45, 2), (0.7, 3), (0.99, 4)):
        found = region(read, heat, keep=keep)
        assert int(found.cells.sum()) == count and found.kept >= keep
        assert found.area == pytest.approx(count / 192)
    assert found.box == (200, 300, 250, 350) and found.boxes == (found.box,)
    assert found.polygons == (((200.0, 300.0), (250.0, 300.0), (250.0, 350.0), (200.0, 350.0)),)
    score = probe.evaluate(heat, read, steps=192, progress=False)
    free = region(score, heat, keep=0.99)
    assert free.passes == 0 and np.array_equal(free.cells, found.cells)
    assert free.kept == pytest.approx(found.kept)
    assert 0 < region(read, heat, keep=0.99).passes <= 2 * 8 + 2


def test_the_region_of_a_contrast_keeps_the_contrast(demo: tuple[Any, Any], tmp_path: Path) -> None:
    scene = probe.demo.scenes(1, kinds=["pair"])[0]
    answer = probe.ask(*demo, scene.image, scene.question, out=tmp_path)
    options = {"method": "occlusion", "size": 6, "progress": False}
    heat = probe.explain(answer.replay, tokens="green", against="yellow", **options)
    score = probe.evaluate(heat, answer.replay, steps=heat.values.size, progress=False)
    found, free = region(answer.replay, heat), region(score, heat)
    assert free.passes == 0 and found.kept >= 0.9 and free.kept >= 0.9
    point = np.isclose(score.fractions, found.cells.sum() / heat.seen.sum()).argmax()
    assert found.kept == pytest.approx(score.insertion_curve[point], abs=1e-4)
    said = probe.explain(answer.replay, tokens="green", **options)
    with pytest.raises(ExplainError, match="other words"):
        region(score, said)


def test_what_has_no_region_says_why(read: ToyReplay) -> None:
    heat = _heat(read, "total")
    with pytest.raises(ExplainError, match="a share of the score"):
        region(read, heat, keep=0)
    with pytest.raises(ExplainError, match="other words"):
        region(probe.evaluate(_heat(read, "shop"), read, progress=False), heat)
    with pytest.raises(ExplainError, match="another grid"):
        region(probe.evaluate(heat, read, grid=4, progress=False), heat)
    with pytest.raises(ExplainError, match="no values: nothing"):
        region(read, Heatmap(None, SIZE, reason="nothing"))


# ---------------------------------------------------------------- places


@pytest.fixture
def places(read: ToyReplay) -> list[Any]:
    return locate(read, method="occlusion", progress=False)


def test_every_value_is_found_where_it_stands(read: ToyReplay, places: list[Any]) -> None:
    for place in places:
        cells = PLACES[place.field.name]
        left, top = min(col for _, col in cells) * 50, cells[0][0] * 50
        right, bottom = (max(col for _, col in cells) + 1) * 50, (cells[0][0] + 1) * 50
        assert place.page == 0 and place.trusted and place.region.kept >= 0.9
        true = np.zeros(SIZE[::-1], bool)
        true[top:bottom, left:right] = True
        assert probe.metrics.pointing_game(place.heat, true) == 1
        x0, y0, x1, y1 = place.region.box
        assert x0 < (left + right) / 2 < x1 and y0 < (top + bottom) / 2 < y1
        assert place.region.area < 0.15
    assert str(places[1]).startswith("total: 12.40: page 1, ")
    (only,) = locate(read, names=["total"], method="occlusion", progress=False)
    assert only.field == places[1].field
    with pytest.raises(ExplainError, match="no field 'tip'; it has shop, total"):
        locate(read, names=["tip"])


def test_a_report_draws_the_place(places: list[Any], tmp_path: Path) -> None:
    page = probe.report([place.attached() for place in places], out=tmp_path / "report.html").read_text("utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    for drawn, place in zip(data["samples"][0]["maps"], places, strict=True):
        left, top, right, bottom = place.region.box
        assert drawn["box"] == pytest.approx([left / SIZE[0], top / SIZE[1], right / SIZE[0], bottom / SIZE[1]])
        assert [line["title"] for line in drawn["sanity"]] == [f"{place.field}, P 0.81"]


class TwoPages(ToyReplay):
    """A reader of two pages, whose second one has all values."""

    pages_taken_away = 0

    def log_probs(self, mask: Any = None, *, image: int | None = None, **options: Any) -> torch.Tensor:
        self.pages_taken_away += mask.shape == (1, 1, 1)
        if image == 0:
            return self.original_log_probs.double().expand(len(mask), -1)
        return super().log_probs(mask, image=image, **options)


def test_the_page_is_the_one_that_the_value_hangs_on(read: ToyReplay) -> None:
    pages = TwoPages(read.weights, original=[0.9] * 11, base=[0.01] * 11, tokens=PIECES, size=SIZE)
    pages.trace, pages.n_images, pages.image_sizes = read.trace, 2, [SIZE, SIZE]
    (place,) = locate(pages, names=["total"], method="occlusion", progress=False)
    assert place.page == place.region.image == 1
    assert place.without == pytest.approx((0.0, 2 * np.log(0.9 / 0.01)), abs=1e-5)
    pages.pages_taken_away = 0
    values = locate(pages, method="random", progress=False)
    assert len(values) == 2 and all(one.page == 1 for one in values) and values[1].without == place.without
    assert pages.pages_taken_away == 2  # each page once for both values


def test_files_that_other_tools_read(places: list[Any], tmp_path: Path) -> None:
    box = places[1].region.box
    plain = json.loads(export(places, tmp_path / "all.json").read_text("utf-8"))
    assert [one["value"] for one in plain] == ["Corner Café", "12.40"]
    assert plain[1]["region"]["box"] == list(box) and plain[1]["trusted"] is True and plain[1]["p"] is not None
    coco = json.loads(export(places, tmp_path / "coco.json", format="coco", files=["receipt.png"]).read_text("utf-8"))
    (image,) = coco["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("receipt.png", *SIZE)
    second = coco["annotations"][1]
    assert second["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    assert {one["id"]: one["name"] for one in coco["categories"]}[second["category_id"]] == "total"
    assert all(len(ring) >= 8 and len(ring) % 2 == 0 for ring in second["segmentation"])
    w3c = json.loads(export(places, tmp_path / "w3c.json", format="w3c").read_text("utf-8"))
    target = w3c["items"][1]["target"]
    left, top, wide, high = map(int, target["selector"][0]["value"].removeprefix("xywh=pixel:").split(","))
    assert left <= box[0] and top <= box[1] and left + wide >= box[2] and top + high >= box[3]
    ElementTree.fromstring(target["selector"][1]["value"])
    assert w3c["@context"] == "http://www.w3.org/ns/anno.jsonld" and w3c["items"][1]["body"][0]["value"] == "12.40"


def test_docling_reads_each_value_its_name_and_its_box(places: list[Any], tmp_path: Path) -> None:
    written = json.loads(export(places, tmp_path / "bill.json", format="docling").read_text("utf-8"))
    left, top, right, bottom = places[1].region.box
    stands = {
        "page_no": 1,
        "bbox": {"l": left, "t": top, "r": right, "b": bottom, "coord_origin": "TOPLEFT"},
        "charspan": [0, len("12.40")],
    }
    assert written["texts"][1] == {
        "self_ref": "#/texts/1", "parent": {"$ref": "#/body"}, "children": [], "label": "text", "prov": [stands],
        "text": "12.40", "orig": "12.40",
    }  # fmt: skip
    assert written["pages"] == {"1": {"page_no": 1, "size": {"width": SIZE[0], "height": SIZE[1]}}}
    graph = written["key_value_items"][0]["graph"]
    by_id = {cell["cell_id"]: cell for cell in graph["cells"]}
    pairs = {by_id[e["source_cell_id"]]["text"]: by_id[e["target_cell_id"]] for e in graph["links"]}
    assert list(pairs) == ["shop", "total"] and pairs["total"]["prov"] == stands
    assert pairs["total"]["item_ref"] == {"$ref": "#/texts/1"}
    plain = [dataclasses.replace(place, field=dataclasses.replace(place.field, name="")) for place in places]
    assert json.loads(export(plain, tmp_path / "b", format="docling").read_text("utf-8"))["key_value_items"] == []


def test_docling_core_itself_takes_the_file(places: list[Any], tmp_path: Path) -> None:
    docling = pytest.importorskip("docling_core.types.doc")
    read = docling.DoclingDocument.load_from_json(export(places, tmp_path / "bill.json", format="docling"))
    items = [item for item, _ in read.iterate_items()]
    assert [item.text for item in items[:2]] == ["Corner Café", "12.40"]
    (stands,) = items[1].prov
    assert stands.bbox.to_top_left_origin(SIZE[1]).as_tuple() == places[1].region.box
    assert read.pages[stands.page_no].size.as_tuple() == SIZE
    graph = items[2].graph
    assert [(graph.cells[e.source_cell_id].text, graph.cells[e.target_cell_id].text) for e in graph.links] == [
        ("shop", "Corner Café"), ("total", "12.40")
    ]  # fmt: skip
    assert "12.40" in read.export_to_markdown()


def test_hocr_is_xml_whatever_the_values_are(places: list[Any], tmp_path: Path) -> None:
    hostile = dataclasses.replace(places[0], field=dataclasses.replace(places[0].field, value="<b>&\"' </span>"))
    page = export([hostile, places[1]], tmp_path / "page.hocr", files=['a"b.png'])
    words = [one for one in ElementTree.parse(page).iter() if one.get("class") == "ocrx_word"]
    assert [word.text for word in words] == ["<b>&\"' </span>", "12.40"]
    assert words[1].get("title", "").startswith("bbox ") and "x_wconf 81" in words[1].get("title", "")
    odd = dataclasses.replace(
        places[0], field=dataclasses.replace(places[0].field, name="a\x00", value="\x1b[1m\ud800")
    )
    other = export([odd], tmp_path / "odd.hocr", files=["a\x07.png"])
    assert "\ufffd[1m\ufffd" in "".join(ElementTree.parse(other).getroot().itertext())
    with pytest.raises(ExplainError, match="exists"):
        export(places, page)
    export(places, page, overwrite=True)
    with pytest.raises(ExplainError, match="the file is named by its path; got a NoneType"):
        export(places, None)  # type: ignore[arg-type]
    with pytest.raises(ExplainError, match="format is one of"):
        export(places, tmp_path / "x", format="pdf")  # type: ignore[arg-type]
    with pytest.raises(ExplainError, match="one for each"):
        export(places, tmp_path / "y.json", files=[])


def test_a_value_without_a_place_says_so(read: ToyReplay, tmp_path: Path) -> None:
    read.weights[8:10] = 0.0  # nothing on the page changes it
    read.weights[8:10, 0, 0] = 1e-12
    (place,) = locate(read, names=["total"], method="occlusion", progress=False)
    assert place.region is None and place.reason and "no place" in str(place)
    assert json.loads(export([place], tmp_path / "a.json").read_text("utf-8"))[0]["region"] is None
    assert json.loads(export([place], tmp_path / "b.json", format="coco").read_text("utf-8"))["annotations"] == []
