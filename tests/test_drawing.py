"""Overlays against the same drawing with whole arrays and Pillow's filters; figures read back from their files."""

from __future__ import annotations

import itertools
import json
import re
import threading
import unicodedata
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
import report_samples
import torch
from matplotlib import colormaps
from PIL import Image, ImageFilter
from torch.nn import functional

import lvlm_probe as probe
from lvlm_probe import drawing
from lvlm_probe.drawing import Mark, Panel, overlay
from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import figure
from lvlm_probe.metrics.verdict import Verdict

RNG = np.random.default_rng(5)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def whole(image: Image.Image, values: np.ndarray, seen: np.ndarray, *, alpha: float, contour: bool) -> np.ndarray:
    """The overlay in one piece: torch's bilinear interpolation, matplotlib's colours, Pillow's rank filters."""
    width, height = image.size
    grid = torch.from_numpy(values)[None, None].double()
    fine = functional.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
    value = fine / fine.max()
    colours = 255 * colormaps["inferno"](0.25 + 0.75 * value)[..., :3]
    opacity = (alpha * value**0.75)[..., None]
    drawn = np.asarray(image, dtype=float) * (1 - opacity) + colours * opacity
    if contour:
        region = value >= 0.5
        line = min(25, max(1, round(max(region.shape) / 400)))
        mask = Image.fromarray(region.astype(np.uint8) * 255)
        inner = region & ~(np.asarray(mask.filter(ImageFilter.MinFilter(2 * line + 1))) > 0)
        outer = ~region & (np.asarray(mask.filter(ImageFilter.MaxFilter(2 * line + 1))) > 0)
        for where, level in ((inner, 255), (outer, 20)):
            drawn[where] = 0.25 * drawn[where] + 0.75 * level
    unseen = Image.fromarray(np.where(seen, 0, 255).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    hidden = np.asarray(unseen) > 0
    grey = 0.35 * drawn.mean(axis=2, keepdims=True) + 0.65 * 150
    period = max(8, round(max(width, height) / 48))
    rows, cols = np.mgrid[:height, :width]
    stripe = ((rows + cols) % period) < max(1, period // 6)
    drawn = np.where(hidden[..., None], np.where(stripe[..., None], 0.55 * grey, grey), drawn)
    drawn[(np.asarray(unseen.filter(ImageFilter.FIND_EDGES)) > 0) & hidden] = 40
    return drawn


@pytest.mark.quick
@pytest.mark.parametrize(
    ("size", "grid"), [((90, 60), (6, 9)), ((641, 1203), (32, 32)), ((1500, 900), (7, 5)), ((40, 40), (1, 1))]
)
def test_strips_give_what_whole_arrays_give(size: tuple[int, int], grid: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(drawing.overlays, "_STRIP", 7 * size[0])  # many strips, and one that is not full
    image, values = picture(*size), RNG.random(grid)
    seen = RNG.random(grid) > 0.25
    values[~seen] = 0
    for contour in (True, False):
        drawn = np.asarray(overlay(image, values, seen=seen, alpha=0.8, contour=contour)).astype(float)
        wanted = np.clip(np.rint(whole(image, values, seen, alpha=0.8, contour=contour)), 0, 255)
        off = np.abs(drawn - wanted).max(axis=2)
        # Rounding to float32 decides between two colours, or sides of the outline, on few pixels.
        assert np.mean(off > 1) < 2e-3


def test_a_large_image_takes_the_memory_of_the_image(tmp_path) -> None:
    code = """
import resource, sys
import numpy as np
from PIL import Image
from lvlm_probe.drawing import overlay
values = np.random.default_rng(0).random((32, 32))
seen = values > 0.1
overlay(Image.new("RGB", (64, 64)), values, seen=seen)  # what is imported and allocated once
image = Image.effect_noise((5000, 4000), 80).convert("RGB")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
overlay(image, values, seen=seen)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (3 * 5000 * 4000))
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3  # the result is 1; with the image itself this is 4


def test_every_overlay_says_whether_it_was_checked() -> None:
    image, values = Image.new("RGB", (400, 300), "white"), np.zeros((3, 4))
    found = {}
    for verdict in ("holds up", "do not trust", "not checked"):
        drawn = np.asarray(overlay(image, values, contour=False, mark=Mark(verdict)))
        marked = (drawn != 255).any(axis=2)
        rows, cols = np.nonzero(marked)
        assert rows.max() == 299 and cols.min() == 0  # the lower left corner
        assert rows.min() > 250 and cols.max() < 200
        found[verdict] = tuple(drawn[299, 0])
    assert len(set(found.values())) == 3
    assert np.array_equal(np.asarray(overlay(image, values)), np.asarray(image))
    small = np.asarray(overlay(Image.new("RGB", (60, 40), "white"), values, mark=Mark("not checked")))
    assert 0 < (small != 255).any(axis=2).mean() < 0.25  # a sign instead of words


def levels(image: Image.Image) -> int:
    """Different colours in the middle row."""
    return len({tuple(pixel) for pixel in np.asarray(image)[image.height // 2]})


@pytest.mark.quick
def test_few_cells_are_drawn_as_blocks_and_counted() -> None:
    image = Image.new("RGB", (300, 200), "white")
    few, many = RNG.random((2, 3)), RNG.random((5, 5))
    plain = overlay(image, few, contour=False)
    assert levels(plain) == 3 and levels(overlay(image, many, contour=False)) > 20
    pixels = np.asarray(plain)
    for row, col in np.ndindex(2, 3):  # each cell is of one colour, up to its border
        cell = pixels[100 * row : 100 * row + 100, 100 * col : 100 * col + 100]
        assert (cell == cell[50, 50]).all()
    # Where few lie along one side alone, they look like many along it just as well.
    assert levels(overlay(image, RNG.random((16, 4)), contour=False)) == 4
    marked = {
        name: np.asarray(overlay(image, values, contour=False, mark=Mark("holds up")))
        for name, values in (("few", np.zeros((2, 3))), ("many", np.zeros((9, 9))))
    }
    wide = {name: int((pixels != 255).any(axis=2).any(axis=0).sum()) for name, pixels in marked.items()}
    assert wide["few"] > 1.5 * wide["many"]  # the number of cells stands beside the verdict

    def said(values: np.ndarray) -> str:
        drawn = drawing.figure([Panel(image, values, mark=Mark("holds up"))], width="column")
        return " ".join(text.get_text() for text in drawn.texts)

    assert "2 × 3 cells" in said(few) and "cells" not in said(many)


@pytest.mark.quick
def test_a_map_of_few_cells_says_so() -> None:
    few = probe.Heatmap(np.eye(2, 3), (300, 200), method="tmm")
    assert few.coarse is not None and "only 2 × 3 cells" in few.coarse
    assert probe.Heatmap(np.eye(5), (300, 200), method="tmm").coarse is None
    assert probe.Heatmap(None, (300, 200), reason="nothing").coarse is None


def test_an_estimated_map_says_by_how_much_it_may_be_off() -> None:
    def said(**diagnostics: object) -> str | None:
        return probe.Heatmap(np.eye(5), (300, 200), method="rise", provenance={"diagnostics": diagnostics}).uncertainty

    errors = {"standard_error_mean": 0.07, "standard_error_max": 0.123}
    by_masks = said(**errors)
    assert by_masks is not None and "7 % of its peak on average and 12 % at most" in by_masks
    assert (
        said(**errors, bound_max=0.001)
        == f"{by_masks}; tokens that the server does not list may shift it by at most under 1 %"
    )
    assert said() is None and said(unit=0.5) is None
    for value in (float("nan"), float("inf"), -1.0, "7 %", None):  # anybody may have written the file
        assert said(**{**errors, "standard_error_max": value}) is None


class Scored:
    deletion, insertion = 0.12, 0.91

    def __init__(self, trusted: bool) -> None:
        self.verdict = Verdict(trusted, () if trusted else ("tied",))


@pytest.fixture(scope="module")
def heats(demo, tmp_path_factory):
    """Two methods and two words of one answer, and the whole of another."""
    model, processor = demo
    found = []
    for number, scene in enumerate(probe.demo.scenes(2, kinds=["pair"])):
        with (
            probe.attach(model, processor) as p,
            p.record(tmp_path_factory.mktemp("figure"), question=scene.question) as r,
        ):
            inputs = processor.apply_chat_template(
                scene.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            model.generate(**inputs)
        replay = probe.replay(r.traces[0], model, processor)
        words = [word.text for word in replay.words if word.text.isalpha()]
        chosen = ([words[-1]], [words[1]]) if number == 0 else (None,)
        found += [probe.explain(replay, method=m, tokens=t) for m in ("center", "input_gradient") for t in chosen]
    return found


def texts(figure) -> list[str]:
    return [item.get_text() for item in figure.texts]


def test_words_beside_each_other_and_methods_below(heats) -> None:
    drawn = figure(heats[:4], scores=[Scored(True), Scored(False), None, None], width="text")
    said = texts(drawn)
    assert said[0] == heats[0].trace.question
    assert {"center", "input_gradient", heats[0].selection.text, heats[1].selection.text} <= set(said)
    assert said.count(heats[0].selection.text) >= 1
    assert any(one.startswith("del. 0.12") and one.endswith("holds up") for one in said)
    assert any(one.endswith("do not trust") for one in said)
    assert said.count("not checked") == 2
    panels = [axes for axes in drawn.axes if axes.images and not axes.axison]
    assert len(panels) == 4
    places = sorted((round(-a.get_position().y0, 3), round(a.get_position().x0, 3)) for a in panels)
    assert len({row for row, _ in places}) == len({col for _, col in places}) == 2
    assert drawn.get_figwidth() == drawing.WIDTHS["text"]
    assert any("half of it" in one for one in said)
    assert not any("half of it" in one for one in texts(figure(heats[:4], contour=False)))


def test_nothing_overlaps_and_nothing_leaves_the_page(heats) -> None:
    for chosen, width in ((heats[:4], "text"), (heats[:1], "column"), (heats, "text"), (heats[:2], 2.2)):
        drawn = figure(chosen, width=width)
        renderer = drawn.canvas.get_renderer()
        page = drawn.bbox
        boxes = [item.get_window_extent(renderer) for item in drawn.texts]
        panels = [axes.get_window_extent(renderer) for axes in drawn.axes if not axes.axison]
        for box in boxes:
            assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1
            assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1
            inner = box.shrunk(0.9, 0.9)
            assert not any(inner.overlaps(one) for one in panels)


@pytest.mark.parametrize("alpha", [0.8, 0.3])
def test_the_colour_bar_has_the_colours_of_the_maps(alpha) -> None:
    """On white, the highest value of a map and of the bar are one colour, whatever the opacity."""
    white = Image.new("RGB", (64, 64), "white")
    drawn = drawing.figure([Panel(white, np.ones((4, 4)))], alpha=alpha, contour=False, colormap="viridis")
    panel, bar = (np.asarray(axes.images[0].get_array(), dtype=float) for axes in drawn.axes)
    assert np.abs(panel[20, 20, :3] - bar[0, -1, :3]).max() <= 2
    assert np.abs(bar[0, 0, :3] - 255).max() <= 2


@pytest.mark.parametrize("ending", ["pdf", "svg", "png", "tiff"])
def test_files_carry_their_provenance(heats, tmp_path, ending) -> None:
    path = tmp_path / f"figure.{ending}"
    heats[0].figure(path, score=Scored(True), width="column", dpi=100)
    data = path.read_bytes()
    trace_id = heats[0].provenance["trace_id"]
    if ending in ("png", "tiff"):
        opened = Image.open(path)
        assert opened.width == pytest.approx(350, abs=1)
        told = opened.info["lvlm_probe"] if ending == "png" else opened.tag_v2[270]
        assert json.loads(told)["heatmaps"][0]["provenance"]["trace_id"] == trace_id
    else:
        assert trace_id.encode() in data
    if ending == "pdf":
        assert b"/TrueType" in data or b"/Type0" in data  # letters, not outlines
        assert b"/Type3" not in data
    if ending == "svg":
        assert re.search(rb"<text[^>]*>[^<]*holds up", data)
    before = data
    heats[0].figure(path, score=Scored(True), width="column", dpi=100)
    assert path.read_bytes() == before  # the same figure is the same file, and replaces it


def test_an_svg_with_signs_that_xml_has_not_can_be_read(tmp_path) -> None:
    """A model may say any byte; XML 1.0 has no control characters, and no U+FFFE."""
    odd = "re\x00d \x1b[31m \ufffe x"
    panels = [Panel(picture(30, 20), None, row=odd, col=odd, question=odd, answer=[(odd, True)], reason=odd)]
    data = drawing.figure_bytes(drawing.figure(panels), "a.svg", provenance="{}")
    texts = "".join(ElementTree.fromstring(data).itertext())
    assert "re\ufffdd" in texts and "no map" in texts


def test_a_pdf_leaves_out_byte_order_marks(tmp_path) -> None:
    """They show nothing, stand in the vocabularies of most models, and matplotlib's PDF has no glyph of them."""
    odd = "\ufeffred"
    panels = [Panel(picture(30, 20), None, row=odd, col=odd, question=odd, answer=[(odd, True)], reason="\ufeff")]
    for ending in drawing.FORMATS:
        assert drawing.figure_bytes(drawing.figure(panels), f"a.{ending}", provenance="{}")


def test_a_map_that_is_none_says_why(heats) -> None:
    panel = Panel(picture(30, 20), None, col="tam", reason="the answer has no words")
    drawn = drawing.figure([panel])
    assert "no words" in " ".join(item.get_text() for axes in drawn.axes for item in axes.texts)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"width": "huge"}, "'column' or 'text'"),
        ({"width": 0.1}, "0.5 to 100 inches"),
        ({"colormap": "infernoo"}, "no colour map"),
        ({"scores": [None] * 3}, "2 heatmaps but 3 scores"),
        ({"images": []}, "2 heatmaps but 0 images"),
        ({"out": "figure.jpg"}, "saved as pdf, svg, png, tiff"),
        ({"alpha": 2}, "alpha"),
    ],
)
def test_refusals(heats, wrong, said) -> None:
    with pytest.raises(ExplainError, match=re.escape(said)):
        figure(heats[:2], **wrong)
    with pytest.raises(ExplainError, match="at least one"):
        figure([])


def test_figures_of_two_threads_do_not_meet(heats, tmp_path) -> None:
    figure(heats[:1], out=tmp_path / "alone.svg", width="column")
    wanted = (tmp_path / "alone.svg").read_bytes()
    threads = [
        threading.Thread(target=figure, args=(heats[:1],), kwargs={"out": tmp_path / f"{n}.svg", "width": "column"})
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((tmp_path / f"{n}.svg").read_bytes() == wanted for n in range(4))


def words_from_left(figure, words) -> list[list[str]]:
    """The words of an answer as they are drawn: lines from the top, each from left to right."""
    renderer = figure.canvas.get_renderer()
    known = set(words)
    lines: dict[int, list[tuple[float, str]]] = {}
    for item in figure.texts:
        if item.get_text() in known and item.get_verticalalignment() == "top":
            box = item.get_window_extent(renderer)
            lines.setdefault(round(item.get_position()[1] * 1e4), []).append((box.x0, item.get_text()))
    return [[text for _, text in sorted(lines[y])] for y in sorted(lines, reverse=True)]


@pytest.mark.parametrize(
    ("answer", "drawn"),
    [
        (["The", " star", " is", " red", "."], [["The", "star", "is", "red", "."]]),
        (["النجمة", " الحمراء", " كبيرة", "."], [[".", "كبيرة", "الحمراء", "النجمة"]]),
        (["The", " sign", " says", " שלום", " גדול", " in", " red", "."],
         [["The", "sign", "says", "גדול", "שלום", "in", "red", "."]]),
        (["הכוכב", " הוא", " red", " star", " 12", " נכון", "."],
         [[".", "נכון", "red", "star", "12", "הוא", "הכוכב"]]),
        (["הכוכב", " הוא", " 12", ",", " 13"], [["13", ",", "12", "הוא", "הכוכב"]]),
        (["图", "片", "里", "有", "红色", "的"], [["图", "片", "里", "有", "红色", "的"]]),
        ([], []),
    ],
)  # fmt: skip
def test_words_are_drawn_in_the_order_of_their_script(answer, drawn) -> None:
    """As the bidirectional algorithm of Unicode has it: the same orders as a browser's (test_report_browser)."""
    panel = Panel(
        Image.new("RGB", (64, 64)), np.ones((4, 4)), answer=[(word, number == 1) for number, word in enumerate(answer)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that no font here has
        made = drawing.figure([panel], width="text")
        assert words_from_left(made, [word.strip() for word in answer]) == drawn
        boxes = [item.get_window_extent() for item in made.texts if item.get_verticalalignment() == "top"]
        if answer and unicodedata.bidirectional(answer[0][0]) in ("R", "AL"):
            assert max(box.x1 for box in boxes[: len(answer)]) == pytest.approx(made.bbox.x1, abs=3), "from the right"


def test_long_answers_of_the_right_break_into_lines_from_the_top() -> None:
    words = [f"כוכב{number}" for number in range(40)]
    panel = Panel(Image.new("RGB", (64, 64)), np.ones((4, 4)), answer=[(f" {word}", False) for word in words])
    lines = words_from_left(drawing.figure([panel], width="column"), words)
    assert len(lines) > 2 and [word for line in lines for word in reversed(line)] == words


@pytest.mark.parametrize("ending", ["pdf", "svg", "png"])
def test_curves_of_a_score_with_their_verdict(tmp_path, ending) -> None:
    score = report_samples.score(deletion=-3.5, insertion=0.8, reasons=("no",))
    path = tmp_path / f"curves.{ending}"
    drawn = score.plot(path, dpi=100)
    axes = drawn.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["deletion -3.50"].get_ydata(), score.deletion_curve)
    np.testing.assert_allclose(lines["insertion 0.80"].get_xdata(), score.fractions)
    said = " ".join(texts(drawn))
    assert "do not trust" in said and "deletion -3.5 is below 0" in said
    data = path.read_bytes()
    assert (
        (json.loads(Image.open(path).info["lvlm_probe"])["deletion"] == -3.5)
        if ending == "png"
        else b"deletion" in data
    )
    renderer, page = drawn.canvas.get_renderer(), drawn.bbox
    boxes = [*(item.get_window_extent(renderer) for item in drawn.texts), axes.get_tightbbox(renderer)]
    assert all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1 for box in boxes)
    assert not any(box.overlaps(boxes[-1]) for box in boxes[:-1])


def test_a_figure_says_what_numbers_outside_0_to_1_mean() -> None:
    heat = report_samples.heat()
    usual, wild = (figure([heat], scores=[report_samples.score(insertion=value)]) for value in (0.9, 28.3))
    told = "above 1 likelier than with the whole image"
    assert told in " ".join(texts(wild)) and told not in " ".join(texts(usual))
    renderer = wild.canvas.get_renderer()
    boxes = [item.get_window_extent(renderer) for item in wild.texts]
    assert min(box.y0 for box in boxes) >= -1
    assert not any(one.shrunk(0.9, 0.9).overlaps(two) for one, two in itertools.combinations(boxes, 2))


def test_a_score_without_curves_says_why_there_is_nothing_to_draw() -> None:
    nothing = report_samples.score(deletion=float("nan"), insertion=float("nan"), reasons=("nothing was selected",))
    with pytest.raises(ExplainError, match="no curves to draw: nothing was selected"):
        nothing.plot()
    with pytest.raises(ExplainError, match="'column' or 'text'"):
        report_samples.score().plot(width="huge")
    with pytest.raises(ExplainError, match="saved as pdf"):
        report_samples.score().plot("curves.docx")


def test_figures_name_the_image_of_several_and_a_prompt_as_a_prompt() -> None:
    several = report_samples.trace(question=None, images=[report_samples.picture((90, 60), seed) for seed in range(10)])
    drawn = figure([report_samples.heat(several, image_index=index) for index in (7, 2)])
    said = texts(drawn)
    assert {"red · image 8 of 10", "red · image 3 of 10"} <= set(said)
    assert any(one.startswith("Prompt: USER:") for one in said)
    assert not any("</s>" in one for one in said), "special tokens are no words"
