"""Boxes and points that an answer holds: where it says a thing is, how sure it is, and whether its map looks there.

Families write coordinates in ways of their own, and relative to things of their own (``CONVENTIONS``):

| answer | order | convention |
| --- | --- | --- |
| ``<|box_start|>(x,y),(x,y)<|box_end|>``, ``<box>(x,y),(x,y)</box>`` (Qwen-VL, Qwen2-VL) | x y x y | ``1000`` |
| ``<box>[[x, y, x, y]]</box>`` (InternVL), ``<box>x y x y</box>`` (MiniCPM-V) | x y x y | ``1000`` |
| ``<|det|>[[x, y, x, y]]<|/det|>`` (DeepSeek-VL2) | x y x y | ``999`` |
| ``"bbox_2d": [x, y, x, y]``, ``"point_2d": [x, y]`` (Qwen2.5-VL) | x y x y | ``model pixels`` |
| the same (Qwen3-VL and later) | x y x y | ``1000`` |
| ``"box_2d": [y, x, y, x]`` (Gemma) | y x y x | ``1000`` |
| ``<loc_12><loc_40>…`` (Florence-2), the middles of a thousand bins | x y x y | ``bins`` |
| the same, six or more that are no boxes: the corners of a quad or polygon, its box around it | x y x y … | ``bins`` |
| ``<object><patch_index_0044><patch_index_0863></object>`` (Kosmos-2), two cells | x y x y | ``cells`` |
| ``<loc0123><loc0456>…`` (PaliGemma) | y x y x | ``1024`` |
| ``<point x="6.2" y="40.1">``, ``<points x1= y1= x2= …>`` (Molmo) | x y | ``100`` |
| ``[0.1, 0.25, 0.3, 0.5]``, decimals of at most 1 | x y x y | ``1`` |
| any other list of four numbers, ``"bbox": [10, 20, 60, 80]`` | x y x y | not told: ``boxes=`` says it |

Where nothing tells the convention it is asked for, never guessed: a box of whole numbers may be of the original's
pixels, of the resized image's, or thousandths.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvlm_probe.cards import equal, in_one_line
from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers import explain
from lvlm_probe.files import json_ready, record_of
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics.localization import boxes_to_mask, energy_in_region, iou, pointing_game, whole_pixels
from lvlm_probe.words import tokens_at

if TYPE_CHECKING:
    from lvlm_probe.replaying import ReplayLike
    from lvlm_probe.trace import Trace

Convention = Literal["1", "100", "999", "1000", "1024", "bins", "cells", "pixels", "model pixels"]
CONVENTIONS: dict[str, str] = {
    "1": "shares of the image, 0 to 1",
    "100": "per cent of the image",
    "999": "0 to 999 over the image, both ends included",
    "1000": "thousandths of the image",
    "1024": "1,024ths of the image",
    "bins": "the middle of one of a thousand bins",
    "cells": "columns and rows of 32 × 32 cells, the first and the last one of the box",
    "pixels": "pixels of the original image",
    "model pixels": "pixels of the image as the processor resized it",
}
POINT = 0.025
"""Half a side of the square around a point that counts as the point, as a share of the image's longer side."""
LOOKS_THERE = 0.25
"""Of the way from chance to the whole map in the box, from which a map looks where the answer says. A map that knows
nothing of the box has its area's share of the energy there, 0 on this scale; one that lies inside it has 1."""
LOOKS_ELSEWHERE = 0.05
"""Of the same way, up to which it looks elsewhere: maps of values on documents whose boxes are known have 0.01 in the
mean in another value's box, and 0.2 in their own (``tests/benchmarks/bench_documents.py``)."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_PAIR = rf"\({_NUMBER},{_NUMBER}\)"
_TWO, _FOUR = (rf"\[{_NUMBER}{rf',{_NUMBER}' * more}\]" for more in (1, 3))
_FOURS = [re.compile(form) for form in (rf"{_PAIR}\s*,?\s*{_PAIR}", _FOUR, r"\s*(\d+) (\d+) (\d+) (\d+)\s*")]
_LABEL = re.compile(r'"(?:label|name|text|text_content|caption)"\s*:\s*"((?:[^"\\]|\\.)*)"')
_THOUSANDTHS_JSON = re.compile(r"qwen(?!2_5)")
_CELLS = 32  # of a side of Kosmos-2's grid
_LONGEST = 200_000
"""Characters of an answer that are looked at."""


@dataclass(frozen=True, repr=False)
class AnswerBox:
    """A box or a point that an answer holds.

    Attributes:
        kind: ``"box"`` or ``"point"``.
        pixels: ``(left, top, right, bottom)``, or ``(x, y)``, in pixels of the original image; not cut off at its edge.
        label: what the answer says is there; empty where it does not say.
        numbers: as they stand in the answer, in the order x, y; of a polygon all of them, of cells column and row.
        convention: what they are relative to: a name in ``CONVENTIONS``.
        image: number of the image.
        image_size: its ``(width, height)``, pixels.
        tokens: the answer's tokens that hold the numbers.
        log_p: log P of these tokens, given the answer before them: their sum, nats; ``None`` where not recorded.
        llr: their log-likelihood ratio against the baseline image, nats; ``None`` where not recorded.
        fault: why it is no box in the image, as a sentence; ``None`` where it is one.
    """

    __repr__, __eq__ = in_one_line, equal

    kind: Literal["box", "point"]
    pixels: tuple[float, ...]
    label: str
    numbers: tuple[float, ...]
    convention: str
    image: int
    image_size: tuple[int, int]
    tokens: tuple[int, ...]
    log_p: float | None = None
    llr: float | None = None
    fault: str | None = None

    @property
    def p(self) -> float | None:
        """P(box): the probability of the very numbers. A box a pixel off is as good, and is not counted in."""
        return None if self.log_p is None else math.exp(self.log_p)

    @property
    def region(self) -> tuple[float, float, float, float]:
        """The box, or a small square around the point (``POINT``), in pixels."""
        if self.kind == "box":
            left, top, right, bottom = self.pixels
            return left, top, right, bottom
        (x, y), half = self.pixels, POINT * max(self.image_size)
        return x - half, y - half, x + half, y + half

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**record_of(self), "p": self.p}

    def __str__(self) -> str:
        place = ", ".join(f"{value:.0f}" for value in self.pixels)
        sure = "" if self.p is None else f", P {self.p:.2g}"
        return f"{self.label or self.kind}: ({place}){sure}{f'; {self.fault}' if self.fault else ''}"


@dataclass(frozen=True, repr=False)
class BoxCheck:
    """Whether the map of a box looks where the box says.

    Attributes:
        box: the box.
        energy: share of the map's sum in it, 0 to 1.
        area: the box's share of the image: what a map has there by chance.
        iou: of the box and as many of the map's highest pixels.
        pointing: whether the map's highest value lies in it, 0 to 1.
    """

    __repr__, __eq__ = in_one_line, equal

    box: AnswerBox
    energy: float
    area: float
    iou: float
    pointing: float

    @property
    def lift(self) -> float:
        """(energy − area) / (1 − area): 0 as by chance, 1 with the whole map in the box."""
        return (self.energy - self.area) / (1 - self.area) if self.area < 1 else math.nan

    @property
    def verdict(self) -> Literal["agrees", "partly", "elsewhere", "cannot say"]:
        """``agrees`` from ``LOOKS_THERE`` on, ``elsewhere`` up to ``LOOKS_ELSEWHERE``: about as much as by chance."""
        if math.isnan(self.lift):
            return "cannot say"
        return "agrees" if self.lift >= LOOKS_THERE else "partly" if self.lift > LOOKS_ELSEWHERE else "elsewhere"

    @property
    def sentence(self) -> str:
        """The verdict with its figures."""
        said = {
            "agrees": "It says here, and it looks here",
            "partly": "It says here, and it looks here only in part",
            "elsewhere": "It says here, it looks there",
            "cannot say": "Nothing can be said of a box over the whole image, or a map that points nowhere",
        }[self.verdict]
        if self.verdict == "cannot say":
            return f"{said}."
        what = self.box.label or f"the {self.box.kind}"
        share = f"{100 * self.area:.2g} % of the image (IoU {self.iou:.2f})"
        return f"{said}: {100 * self.energy:.0f} % of the map lies in {what}, which is {share}."

    def __str__(self) -> str:
        return self.sentence

    def attached(self, heat: Heatmap) -> Heatmap:
        """The heatmap with this in its provenance, ``["box"]``, where ``write`` keeps it and ``report`` shows it."""
        record = {"verdict": self.verdict, "sentence": self.sentence, "energy": self.energy, "area": self.area}
        record |= {"iou": self.iou, "pointing": self.pointing, **self.box.to_dict()}
        return dataclasses.replace(heat, provenance={**heat.provenance, "box": json_ready(record)})


# -------------------------------------------------------------------------------------------------------------- reading


@naming_arguments
def answer_boxes(trace: Trace, *, boxes: Convention | None = None, image: int = 0) -> list[AnswerBox]:
    """The boxes and points that a recorded answer holds, in its order; no model is needed.

    Args:
        trace: the recorded answer (or a replay's ``trace``).
        boxes: what the numbers are relative to (``CONVENTIONS``), where the answer does not tell; where given, of all.
        image: the image that they are in, where the prompt has several.

    Raises:
        ExplainError: the answer does not tell what its numbers are relative to, there is no such convention or image,
            or the trace does not tell the size of the resized image.
    """
    if boxes is not None and boxes not in CONVENTIONS:
        told = ", ".join(f"{name!r} ({what})" for name, what in CONVENTIONS.items())
        raise ExplainError(f"boxes is one of {told}; got {boxes!r}")
    if not 0 <= image < len(trace.images):
        raise ExplainError(f"image={image}, but the trace holds {len(trace.images)} image(s), counted from 0")
    pieces = [str(piece) for piece in trace.tokens]
    text = "".join(pieces)[:_LONGEST]
    size = trace.images[image].size
    family = str((trace.model.get("config") or {}).get("model_type", ""))  # type: ignore[union-attr]
    found = []
    for one in _found(text, family):
        convention = boxes or one.convention
        if convention is None:
            raise ExplainError(
                f"the answer holds {one.text[:60]!r} and does not say what these numbers are relative to: say it, "
                "boxes='pixels' (of the original image), 'model pixels' (of the resized one), '1000' (thousandths), … "
                "(command line: --boxes)"
            )
        numbers = one.numbers
        pixels = _in_pixels(numbers, convention, size, lambda: _model_size(trace, image))
        tokens = tokens_at(pieces, one.spans)
        log_p, llr = known_of(trace, tokens)
        found.append(
            AnswerBox(
                kind="point" if len(numbers) == 2 else "box",
                pixels=pixels,
                label=one.label,
                numbers=numbers,
                convention=convention,
                image=image,
                image_size=size,
                tokens=tuple(tokens),
                log_p=log_p,
                llr=llr,
                fault=_fault(pixels, size),
            )
        )
    return found


@dataclass(frozen=True)
class _Found:
    """Numbers in an answer: in the order x, y; where each stands, and by what convention, if the format tells."""

    start: int
    text: str
    numbers: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]
    label: str
    convention: str | None


def _found(text: str, family: str) -> list[_Found]:
    """Every box and point, in order; of two readings of the same text that of the more telling format."""
    taken: list[_Found] = []
    for read in _FORMATS:
        for one in read(text, family):
            if all(one.start >= other.start + len(other.text) or one.start + len(one.text) <= other.start
                   for other in taken):  # fmt: skip
                taken.append(one)
    return sorted(taken, key=lambda one: one.start)


def _made(
    match: re.Match[str], groups: Sequence[int], label: str, convention: str | None, *, swapped: bool = False
) -> _Found:
    order = [(1, 0, 3, 2)[k] if swapped else k for k in range(len(groups))]
    spans = tuple(match.span(groups[k]) for k in order)
    numbers = tuple(float(match[groups[k]]) for k in order)
    return _Found(match.start(), match[0], numbers, spans, label.strip(), convention)


def _tagged(text: str, _family: str) -> Iterator[_Found]:
    """Boxes between tags of their own: Qwen-VL, Qwen2-VL, InternVL, MiniCPM-V and DeepSeek-VL2."""
    for opens, closes, ref, convention in (
        ("<|box_start|>", "<|box_end|>", ("<|object_ref_start|>", "<|object_ref_end|>"), "1000"),
        ("<box>", "</box>", ("<ref>", "</ref>"), "1000"),
        ("<|det|>", "<|/det|>", ("<|ref|>", "<|/ref|>"), "999"),
    ):
        label, end = "", 0
        for tag in re.finditer(f"{re.escape(opens)}(.*?)(?:{re.escape(closes)}|$)", text, re.DOTALL):
            between = text[end : tag.start()].rstrip()
            if between:  # several boxes of one label follow each other
                named = between.endswith(ref[1]) and ref[0] in between
                label = between[: -len(ref[1])].rpartition(ref[0])[2] if named else ""
            end = tag.end()
            inside = tag.span(1)
            fours = [match for form in _FOURS for match in form.finditer(text, *inside)]
            for match in fours:
                yield _made(match, (1, 2, 3, 4), label, convention)
            for match in () if fours else re.compile(_PAIR).finditer(text, *inside):
                yield _made(match, (1, 2), label, convention)


def _locations(text: str, _family: str) -> Iterator[_Found]:
    """Florence-2, whose label goes before, and PaliGemma, whose label follows."""
    for run in re.finditer(r"(?:<loc_\d+>){4,}", text):
        label = re.search(r"([^<>]*)$", text[: run.start()])
        told = "" if label is None else label[1]
        fours = list(re.compile(r"<loc_(\d+)>" * 4).finditer(text, *run.span()))
        count = run[0].count("<loc_")
        boxes = all(int(one[1]) <= int(one[3]) and int(one[2]) <= int(one[4]) for one in fours)
        if count % 2 == 0 and count > 4 and not (boxes and count % 4 == 0):  # the corners of a quad, or of a polygon
            polygon = re.compile(r"<loc_(\d+)>" * count).match(text, run.start())
            assert polygon is not None
            yield _made(polygon, range(1, count + 1), told, "bins")
            continue
        for match in fours:
            yield _made(match, (1, 2, 3, 4), told, "bins")
    for match in re.finditer(r"<loc(\d{4})>" * 4, text):
        label = re.match(r"([^<;]*)", text[match.end() :])
        yield _made(match, (1, 2, 3, 4), "" if label is None else label[1], "1024", swapped=True)


def _cells(text: str, _family: str) -> Iterator[_Found]:
    """Kosmos-2: the first and the last of 32 × 32 cells, counted along the rows; several boxes of one phrase."""
    for tag in re.finditer(r"(?:<phrase>([^<]*)</phrase>)?<object>(.*?)(?:</object>|$)", text, re.DOTALL):
        for match in re.compile(r"<patch_index_(\d{4})><patch_index_(\d{4})>").finditer(text, *tag.span(2)):
            numbers = tuple(float(part) for group in (1, 2) for part in divmod(int(match[group]), _CELLS)[::-1])
            spans = (match.span(1), match.span(2))
            yield _Found(match.start(), match[0], numbers, spans, (tag[1] or "").strip(), "cells")


def _percent(text: str, _family: str) -> Iterator[_Found]:
    """Molmo: one point, or several in one tag."""
    for tag in re.finditer(r"<points?\s([^>]*)>(.*?)(?:</points?>|$)", text, re.DOTALL):
        label = re.search(r'alt="([^"]*)"', tag[1])
        told = (label[1] if label else tag[2]).strip()
        pattern = re.compile(r'x(\d*)\s*=\s*"\s*([\d.]+)\s*"\s*y\1\s*=\s*"\s*([\d.]+)\s*"')
        for match in pattern.finditer(text, tag.start(1), tag.end(1)):
            yield _made(match, (2, 3), told, "100")


def _named(text: str, family: str) -> Iterator[_Found]:
    """JSON of Qwen2.5-VL and its successors, which mean different things by one key, and of Gemma."""
    convention = "model pixels" if "qwen2_5" in family else "1000" if _THOUSANDTHS_JSON.search(family) else None
    for key, pattern, groups in (("bbox_2d", _FOUR, (1, 2, 3, 4)), ("point_2d", _TWO, (1, 2))):
        for match in re.finditer(rf'"{key}"\s*:\s*{pattern}', text):
            yield _made(match, groups, _label(text, match), convention)
    for match in re.finditer(rf'"box_2d"\s*:\s*{_FOUR}', text):  # of Google's models, whatever others make of it
        yield _made(match, (1, 2, 3, 4), _label(text, match), "1000", swapped=True)


def _plain(text: str, _family: str) -> Iterator[_Found]:
    """Four numbers in brackets, and two behind a key that says "point"."""
    for pattern, groups in ((_FOUR, (1, 2, 3, 4)), (rf'"point"\s*:\s*{_TWO}', (1, 2))):
        for match in re.finditer(pattern, text):
            parts = [match[group] for group in groups]
            unit = any("." in part for part in parts) and all(0 <= float(part) <= 1 for part in parts)
            yield _made(match, groups, _label(text, match), "1" if unit else None)


_FORMATS: tuple[Callable[[str, str], Iterator[_Found]], ...] = (_tagged, _locations, _cells, _percent, _named, _plain)


def _label(text: str, match: re.Match[str]) -> str:
    """What the JSON object around a match calls it."""
    start = text.rfind("{", 0, match.start())
    stop = text.find("}", match.end())
    if start < 0 or "}" in text[start : match.start()]:
        return ""
    found = _LABEL.search(text[start : stop if stop >= 0 else len(text)])
    if found is None:
        return ""
    try:
        return str(json.loads(f'"{found[1]}"'))
    except ValueError:
        return found[1]


def known_of(trace: Trace, tokens: Sequence[int]) -> tuple[float | None, float | None]:
    """log P of tokens, given the answer before them, and their ratio: sums, nats; ``None`` where not recorded."""
    log_p, llr = (
        None if values is None else float(np.asarray(values, np.float64)[list(tokens)].sum())
        for values in (trace.log_probs, trace.llr)
    )
    return log_p, llr


_WHOLES = {"bins": 1000.0, "cells": float(_CELLS)}


def _in_pixels(
    numbers: Sequence[float], convention: str, size: tuple[int, int], model_size: Callable[[], tuple[int, int]]
) -> tuple[float, ...]:
    if len(numbers) > 4:  # around a polygon
        xs, ys = numbers[::2], numbers[1::2]
        numbers = (min(xs), min(ys), max(xs), max(ys))
    if convention == "pixels":
        return tuple(numbers)
    whole = model_size() if convention == "model pixels" else (_WHOLES.get(convention) or float(convention),) * 2
    shifts = (0.5 if convention == "bins" else 0.0,) * 4
    if convention == "cells":  # from middle to middle, but of a row or column of them from edge to edge
        thin = numbers[0] == numbers[2] or numbers[1] == numbers[3]
        shifts = (0.0, 0.0, 1.0, 1.0) if thin else (0.5,) * 4
    return tuple((number + shifts[k]) / whole[k % 2] * size[k % 2] for k, number in enumerate(numbers))


def _model_size(trace: Trace, image: int) -> tuple[int, int]:
    """(width, height) of an image as the processor of a Qwen model has resized it. Raises ``ExplainError``."""
    config: Any = trace.model.get("config") or {}
    patch = (config.get("vision_config") or {}).get("patch_size")
    grid = trace.model_kwargs.get("image_grid_thw")
    if grid is None or not isinstance(patch, int) or grid.ndim != 2 or not image < len(grid):
        raise ExplainError(
            "these boxes are in pixels of the resized image, and the trace does not tell its size (no image_grid_thw): "
            "say what they are relative to, boxes='pixels', '1000', …"
        )
    _, rows, cols = (int(count) for count in grid[image])
    return cols * patch, rows * patch


def _fault(pixels: Sequence[float], size: tuple[int, int]) -> str | None:
    width, height = size
    if len(pixels) == 2:
        inside = 0 <= pixels[0] <= width and 0 <= pixels[1] <= height
        return None if inside else f"the point lies outside the image of {width} × {height} pixels"
    left, top, right, bottom = pixels
    if not (left < right and top < bottom):
        return "the box is empty: its right or bottom edge does not come after its left or top one"
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return f"the box lies outside the image of {width} × {height} pixels"
    return None


# ------------------------------------------------------------------------------------------------------ maps, drawings


@naming_arguments
def box_maps(replay: ReplayLike, boxes: Sequence[AnswerBox], **options: Any) -> list[Heatmap]:
    """One map for each box, of the tokens of its numbers, which carries whether it looks there.

    Args:
        replay: the recorded answer on its model.
        boxes: of ``answer_boxes``.
        **options: of ``lvlm_probe.explain``: method, seed, progress, search_dtype and parameters.

    Raises:
        ExplainError: as ``explain``.
    """
    made = []
    for box in boxes:
        heat = explain(replay, tokens=list(box.tokens), image=box.image, **options)
        made.append(heat if heat.values is None or box.fault else check_box(box, heat).attached(heat))
    return made


@naming_arguments
def check_box(box: AnswerBox, heat: Heatmap) -> BoxCheck:
    """Compare a box with a map: does the answer look where it says? No model is run.

    Args:
        box: of ``answer_boxes``.
        heat: of the same image: the map of the box's own tokens, or of the word that it is of.

    Raises:
        ExplainError: the box is none in the image, or the map has no values or is of another image.
    """
    if box.fault:
        raise ExplainError(f"{box.label or 'this box'} cannot be compared with a map: {box.fault}")
    if (heat.image_index, tuple(heat.image_size)) != (box.image, tuple(box.image_size)):
        raise ExplainError(
            f"the box is in image {box.image} and the map of image {heat.image_index}, or of another size"
        )
    inside = boxes_to_mask([whole_pixels(box.region)], heat.image_size)
    area = float(inside.mean())
    return BoxCheck(box, energy_in_region(heat, inside), area, iou(heat, inside), pointing_game(heat, inside))


@naming_arguments
def draw_boxes(image: Image.Image, boxes: Sequence[AnswerBox]) -> Image.Image:
    """The image, RGB, with the boxes and points drawn on it: label and P(box), each in a colour of its own."""
    from matplotlib.font_manager import findfont

    drawn = image.convert("RGB").copy()
    pen = ImageDraw.Draw(drawn)
    line = max(2, round(max(image.size) / 250))
    size = max(11, round(max(image.size) / 45))
    font = ImageFont.truetype(findfont("DejaVu Sans"), size)  # labels are in any language
    for number, box in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        left, top, right, bottom = box.region
        if box.fault and not (left < right and top < bottom):
            continue
        shape = pen.rectangle if box.kind == "box" else pen.ellipse
        shape((left - 1, top - 1, right + 1, bottom + 1), outline=(20, 20, 20), width=line + 2)
        shape((left, top, right, bottom), outline=colour, width=line)
        told = box.label + ("" if box.p is None else f"  P {box.p:.2g}")
        wide = pen.textbbox((0, 0), told, font=font)
        y = top - 1.5 * size if top > 1.5 * size else bottom + 2
        x = max(0.0, min(left, image.width - wide[2] - 0.6 * size))
        pen.rectangle((x, y, x + wide[2] + 0.6 * size, y + 1.4 * size), fill=colour)
        pen.text((x + 0.3 * size, y + 0.1 * size), told, fill=(255, 255, 255), font=font)
    return drawn


_COLOURS = ("#c4401c", "#0072b2", "#00795a", "#8a4fa3", "#7a5c00", "#a3195b")
