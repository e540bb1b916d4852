"""Heatmaps over images, and figures of several for print.

An overlay is made in strips of rows, so that it takes the memory of the image and little more: a grid is brought to the
pixels of a strip, coloured by the colour map's own table, laid over the image by its value, outlined and hatched.

No map is drawn without its verdict: every overlay and every panel of a figure says whether the heatmap was checked, and
what came of it (``Mark``).
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvlm_probe.errors import ExplainError
from lvlm_probe.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dark ends of perceptually uniform maps vanish in shadows; opacity already says "little", so colour starts brighter.
_COLOUR_FLOOR = 0.25
_LINE = 25
"""Widest outline, pixels: on larger images it would hide what it surrounds."""
_STRIP = 1 << 19
"""Pixels of a strip: a few MB of float32 for each step."""
COARSE = 5
"""Cells along a side below which a map is drawn as blocks: bilinear between so few, it would look like one of many."""
_SIDES = ("Oranges", "Blues")
"""Colours of two maps that are drawn against each other: told apart by colour-blind readers, as are those of marks."""
_HALF = 0.5
"""The outline surrounds what is at least this share of the highest value."""

FORMATS = ("pdf", "svg", "png", "tiff", "tif")
WIDTHS: Mapping[str, float] = {"column": 3.5, "text": 7.2}
"""Widths of a figure in inches: one column (89 mm) and the whole page (183 mm) of most journals."""

_FRAME = 0.9
"""Least width of a video's frame in a figure, inches."""

_SAVING = threading.Lock()
"""What files are made of stands in matplotlib's settings alone, which all threads share."""

Verdicts = Literal["holds up", "do not trust", "not checked"]
_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "holds up": (0, 114, 178), "do not trust": (213, 94, 0), "not checked": (90, 90, 90),
}  # fmt: skip
"""Blue, vermilion and grey of the Okabe-Ito palette, which colour-blind readers tell apart."""


class _Judged(Protocol):
    @property
    def trusted(self) -> bool: ...


class Scored(Protocol):
    """What a figure shows of a score: what ``evaluate`` returns has it."""

    @property
    def deletion(self) -> float: ...
    @property
    def insertion(self) -> float: ...
    @property
    def verdict(self) -> _Judged: ...


@dataclass(frozen=True)
class Mark:
    """What was found when a heatmap was checked."""

    verdict: Verdicts
    deletion: float = math.nan
    insertion: float = math.nan

    def __str__(self) -> str:
        if math.isfinite(self.deletion) and math.isfinite(self.insertion):
            return f"del. {self.deletion:.2f}  ins. {self.insertion:.2f}  {self.verdict}"
        return self.verdict


def mark_of(score: Scored | None) -> Mark:
    """The mark of a score; ``None`` was not checked."""
    if score is None:
        return Mark("not checked")
    return Mark("holds up" if score.verdict.trusted else "do not trust", score.deletion, score.insertion)


# ------------------------------------------------------------------------------------------------------------- overlays


def overlay(
    image: Image.Image,
    values: np.ndarray,
    *,
    seen: np.ndarray | None = None,
    alpha: float = 0.8,
    colormap: str = "inferno",
    normalise: bool = True,
    contour: bool = True,
    mark: Mark | None = None,
    peak: float | None = None,
) -> Image.Image:
    """A heatmap over an image, at the image's own size, RGB.

    Args:
        image: any mode.
        values: ``(row, col)`` in [0, 1], a grid over the whole image; brought to pixels bilinearly. Of fewer than 5
            cells along a side, as blocks, and the mark says how many there are.
        seen: ``(row, col)`` bool; cells that never reach the model are greyed and hatched.
        alpha: opacity of the highest value, 0 to 1.
        colormap: name of a matplotlib colour map.
        normalise: stretch the values so that the highest is 1.
        contour: outline the region above half of the highest value.
        mark: drawn into the lower left corner.
        peak: the highest value of a map that this is a part of; by default that of ``values``.

    Raises:
        ExplainError: ``alpha`` is no share, or there is no such colour map.
    """
    if not 0 <= alpha <= 1:
        raise ExplainError(f"alpha is between 0 and 1; got {alpha!r}")
    table = _colours(colormap)
    width, height = image.size
    grid = _Grid(np.asarray(values), width, height)
    highest = grid.highest() if peak is None else peak
    scale = 1 / highest if normalise and highest > 0 else 1.0
    line = _line_of(image) if contour and highest > 0 and alpha > 0 else 0
    hidden = None if seen is None or bool(np.all(seen)) else _Cells(~np.asarray(seen, dtype=bool), width, height)

    def paint(pixels: np.ndarray, above: int, below: int, inside: slice) -> np.ndarray:
        around = grid.rows(above, below)
        pixels = _heated(pixels, around[inside] * scale, table, alpha)
        if line:
            region = around >= _HALF * highest
            outer = _dilated(region, line)[inside] & ~region[inside]
            inner = _dilated(~region, line)[inside] & region[inside]
            for where, level in ((inner, 255.0), (outer, 20.0)):
                pixels[where] = 0.25 * pixels[where] + 0.75 * level
        return pixels if hidden is None else _hatched(pixels, hidden, above + inside.start, above + inside.stop)

    drawn = _in_strips(image, line, paint)
    if mark is not None and alpha > 0:
        _stamp(drawn, mark, cells_of(np.shape(values)))
    return drawn


def difference(image: Image.Image, first: np.ndarray, second: np.ndarray, *, alpha: float = 0.85) -> Image.Image:
    """Two heatmaps against each other over an image, at the image's own size, RGB: orange where the first is higher,
    blue where the second is, the more opaque the further they are apart; outlined where that is more than a half.

    Args:
        image: any mode.
        first, second: ``(row, col)`` in [0, 1], grids over the whole image, each of any resolution; stretched so that
            its highest is 1.
        alpha: opacity of a difference of 1.
    """
    grids = [_Grid(np.asarray(values), *image.size) for values in (first, second)]
    scales = [1 / highest if highest > 0 else 1.0 for highest in (grid.highest() for grid in grids)]
    tables = [_colours(name) for name in _SIDES]
    line = _line_of(image)

    def paint(pixels: np.ndarray, above: int, below: int, inside: slice) -> np.ndarray:
        one, other = (grid.rows(above, below) * scale for grid, scale in zip(grids, scales, strict=True))
        for apart, table in zip((one - other, other - one), tables, strict=True):
            pixels = _heated(pixels, np.clip(apart[inside], 0, 1), table, alpha)
            region = apart >= _HALF
            rim = _dilated(region, line)[inside] & ~region[inside]
            pixels[rim] = 0.25 * pixels[rim] + 0.75 * 255
        return pixels

    return _in_strips(image, line, paint)


def _line_of(image: Image.Image) -> int:
    """Width of an outline, pixels."""
    return min(_LINE, max(1, round(max(image.size) / 400)))


def _in_strips(
    image: Image.Image, line: int, paint: Callable[[np.ndarray, int, int, slice], np.ndarray]
) -> Image.Image:
    """An image painted strip by strip, RGB.

    Args:
        line: rows beyond a strip that its outline depends on.
        paint: a strip's new pixels, from its pixels ``(row, col, channel)`` float32, the first row that it may look at,
            the one after the last, and which of these rows are the strip's.
    """
    width, height = image.size
    drawn = Image.new("RGB", image.size)
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        bottom = min(height, top + step)
        above, below = max(0, top - line), min(height, bottom + line)
        pixels = np.asarray(image.crop((0, top, width, bottom)).convert("RGB"), dtype=np.float32)
        pixels = paint(pixels, above, below, slice(top - above, bottom - above))
        drawn.paste(Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)), (0, top))
    return drawn


def _heated(pixels: np.ndarray, value: np.ndarray, table: np.ndarray, alpha: float) -> np.ndarray:
    """Lay colours over pixels ``(..., channel)``, the more opaque the higher the value ``(...)``."""
    opacity = (alpha * np.sqrt(value) * np.sqrt(np.sqrt(value)))[..., None]  # value ** 0.75
    index = ((_COLOUR_FLOOR + (1 - _COLOUR_FLOOR) * value) * len(table)).astype(np.intp).clip(0, len(table) - 1)
    heated: np.ndarray = pixels + (table[index] - pixels) * opacity
    return heated


def colour_bar(width: int = 256, *, alpha: float = 0.8, colormap: str = "inferno", ground: int = 255) -> Image.Image:
    """The colours of overlays from 0 to 1, over a ground of one grey level, ``width`` pixels by one."""
    plain = np.full((1, width, 3), float(ground), dtype=np.float32)
    bar = _heated(plain, np.linspace(0, 1, width, dtype=np.float32)[None], _colours(colormap), alpha)
    return Image.fromarray(np.rint(bar).astype(np.uint8))


def resample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings a grid to ``(row, col)`` = ``size`` as masks are brought to pixels: bilinear, cell centres, float32.

    Going down, cells are averaged over their area instead.
    """
    import torch
    from torch.nn import functional

    # In float64, so that cells of one value stay of one value: rounding would put tied pixels in an order.
    grid = torch.from_numpy(np.array(values, dtype=np.float32))[None, None].double()
    if size[0] <= grid.shape[2] and size[1] <= grid.shape[3]:
        return functional.adaptive_avg_pool2d(grid, size)[0, 0].float().numpy()
    fine = functional.interpolate(grid, size=size, mode="bilinear", align_corners=False)
    return fine[0, 0].clamp(0, 1).float().numpy()


def cells_of(shape: Sequence[int]) -> str | None:
    """How many cells a map of few has, ``"2 × 3 cells"``; ``None`` for one that is drawn smoothly."""
    return f"{shape[0]} × {shape[1]} cells" if min(shape) < COARSE else None


class _Grid:
    """A grid of values as the pixels of an image read it: bilinear between cell centres, or blocks where they are few;
    averaged where it is finer."""

    def __init__(self, values: np.ndarray, width: int, height: int) -> None:
        cells = values.astype(np.float64)
        if height <= cells.shape[0] and width <= cells.shape[1]:
            cells = resample(values, (height, width)).astype(np.float64)
        self._height, self._blocks = height, cells_of(values.shape) is not None
        left, right, share = self._between(np.arange(width), width, cells.shape[1])
        self._columns = (cells[:, left] * (1 - share) + cells[:, right] * share).astype(np.float32)

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Values of rows ``top`` to ``bottom``, ``(row, col)`` float32."""
        above, below, share = self._between(np.arange(top, bottom), self._height, len(self._columns))
        weight = share.astype(np.float32)[:, None]
        upper = self._columns[above]
        return upper + (self._columns[below] - upper) * weight

    def _between(self, at: np.ndarray, size: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The two cells that a pixel lies between, and the second one's share."""
        place = np.clip((at + 0.5) * cells / size - 0.5, 0, cells - 1)
        if self._blocks:
            place = np.rint(place)
        first = np.floor(place).astype(np.intp)
        return first, np.minimum(first + 1, cells - 1), place - first

    def highest(self) -> float:
        step = max(1, _STRIP // self._columns.shape[1])
        tops = range(0, self._height, step)
        return max(float(self.rows(top, min(self._height, top + step)).max()) for top in tops)


class _Cells:
    """A grid of cells as pixels, each pixel its nearest cell."""

    def __init__(self, cells: np.ndarray, width: int, height: int) -> None:
        self._cells, self.width, self.height = cells, width, height
        self._col = (np.arange(width) + 0.5) * cells.shape[1] // width

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """``(row, col)`` bool; rows beyond the image are False."""
        at = np.arange(top, bottom)
        row = ((at + 0.5) * len(self._cells) // self.height).astype(np.intp).clip(0, len(self._cells) - 1)
        found = self._cells[row][:, self._col.astype(np.intp)]
        found[(at < 0) | (at >= self.height)] = False
        return found


def _dilated(mask: np.ndarray, width: int) -> np.ndarray:
    """Whether any pixel of the square of ``2 · width + 1`` around each is set; beyond the mask nothing is."""
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (width, width)
        grown = np.moveaxis(np.pad(mask, pad), axis, 0)
        length = 1
        while length < 2 * width + 1:  # the union of two runs of a length is a run of up to twice that
            step = min(length, 2 * width + 1 - length)
            grown = grown[:-step] | grown[step:]
            length += step
        mask = np.moveaxis(grown, 0, axis)
    return mask


def _hatched(pixels: np.ndarray, hidden: _Cells, top: int, bottom: int) -> np.ndarray:
    where = hidden.rows(top, bottom)
    grey = 0.35 * pixels.mean(axis=2, keepdims=True) + 0.65 * 150
    period = max(8, round(max(hidden.width, hidden.height) / 48))
    stripe = (np.arange(top, bottom)[:, None] + np.arange(hidden.width)) % period < max(1, period // 6)
    result = np.where(where[..., None], np.where(stripe[..., None], 0.55 * grey, grey), pixels)
    # A thin edge, so that a grey image still shows where the model's view ends.
    around = np.pad(hidden.rows(top - 1, bottom + 1), ((0, 0), (1, 1)))
    result[where & _dilated(~around, 1)[1:-1, 1:-1]] = 40
    return result


def _colours(name: str) -> np.ndarray:
    """A colour map's table, ``(entry, channel)`` float32 in [0, 255]."""
    from matplotlib import colormaps

    try:
        colours = colormaps[name]
    except KeyError as error:
        raise ExplainError(f"matplotlib has no colour map {name!r}; try 'inferno', 'viridis' or 'cividis'") from error
    table: np.ndarray = 255.0 * colours(np.arange(colours.N))[:, :3]
    return table.astype(np.float32)


def _stamp(drawn: Image.Image, mark: Mark, cells: str | None = None) -> None:
    """The verdict in words on a plate, and how many cells there are where they are few; on a small image its sign."""
    size = min(28, max(10, round(min(drawn.size) / 28)))
    font = ImageFont.load_default(size)
    pencil = ImageDraw.Draw(drawn)
    # Pillow's own font has no "×".
    text = str(mark.verdict) if cells is None else f"{cells.replace('×', 'x')}, {mark.verdict}"
    if pencil.textlength(text, font=font) > (0.5 if cells is None else 0.9) * drawn.width:
        text = {"holds up": "ok", "do not trust": "!", "not checked": "?"}[mark.verdict]
    pad = max(2, size // 3)
    left, top, right, bottom = pencil.textbbox((0, 0), text, font=font)
    wide, high = right - left + 2 * pad, bottom - top + 2 * pad
    if wide > drawn.width or high > drawn.height:
        return
    at = (0, drawn.height - high)
    pencil.rectangle((*at, wide - 1, drawn.height - 1), fill=_COLOURS[mark.verdict])
    pencil.text((at[0] + pad - left, at[1] + pad - top), text, font=font, fill=(255, 255, 255))


# -------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Panel:
    """One map of a figure.

    Attributes:
        image: The image it lies over, RGB.
        values, seen: As in ``overlay``; ``values=None``: there is no map, and ``reason`` says why.
        row, col: Texts of its row and column.
        question: What was asked, if known.
        answer: Words of the answer with whether each is explained; punctuation of its own; white space in front of a
            word where there is some in the answer.
        mark: Its verdict.
        reason: Why there is no map.
        frames: Of a video, what is drawn in the place of ``image``: its frames in order of time, ``col`` saying when.
        curve: Of a video, the mean of the map at every frame, ``(frame,)``; drawn below.
        times: When each of these is, seconds; by number where that is not known.
        peak: As in ``overlay``.
    """

    image: Image.Image
    values: np.ndarray | None
    row: str = ""
    col: str = ""
    seen: np.ndarray | None = None
    question: str | None = None
    answer: Sequence[tuple[str, bool]] = ()
    mark: Mark = dataclasses.field(default_factory=lambda: Mark("not checked"))
    reason: str | None = None
    frames: Sequence[Panel] = ()
    curve: Sequence[float] = ()
    times: Sequence[float] | None = None
    peak: float | None = None


def figure(
    panels: Sequence[Panel],
    *,
    width: str | float = "text",
    columns: int | None = None,
    font_size: float = 8.0,
    alpha: float = 0.8,
    colormap: str = "inferno",
    contour: bool = True,
    dpi: float = 300,
) -> Figure:
    """Panels as a grid with question, answer, verdicts, a colour bar and a legend, for print.

    Panels of several rows *and* columns stand where their texts say; others follow each other.

    Args:
        panels: at least one.
        width: ``"column"`` (3.5 inches), ``"text"`` (7.2 inches) or a number of inches.
        columns: panels side by side, where their texts do not say; by default up to four.
        font_size: points.
        alpha, colormap, contour: as in ``overlay``.
        dpi: pixels per inch of the images in it.

    Raises:
        ExplainError: no panels, or no such width.
    """
    if not panels:
        raise ExplainError("a figure shows heatmaps: give at least one")
    drawn, grid = _blank(width), _placed(panels, columns)
    _Sheet(drawn, grid, font_size).fill(alpha=alpha, colormap=colormap, contour=contour, dpi=dpi)
    return drawn


def _placed(panels: Sequence[Panel], columns: int | None) -> list[list[Panel | None]]:
    rows, cols = (list(dict.fromkeys(getattr(panel, name) for panel in panels)) for name in ("row", "col"))
    if len(rows) > 1 and len(cols) > 1 and columns is None and len({(p.row, p.col) for p in panels}) == len(panels):
        known = {(panel.row, panel.col): panel for panel in panels}
        return [[known.get((row, col)) for col in cols] for row in rows]
    across = columns or (1 if any(panel.frames for panel in panels) else min(len(panels), 4))
    lines = [list(panels[at : at + across]) for at in range(0, len(panels), across)]
    return [[*line, *[None] * (across - len(line))] for line in lines]


_LOOKS: Mapping[bool, Mapping[str, str]] = {
    True: {"color": "#b3400a", "weight": "bold"}, False: {"color": "#111111", "weight": "normal"},
}  # fmt: skip
"""Of words that are explained, and of the others."""


_OUTSIDE = (
    "del., ins.: 0 is the baseline, 1 the whole image; below 0 the words are less likely than on the baseline, above 1 "
    "likelier than with the whole image"
)

_FURTHER_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans",
    "Microsoft YaHei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip
"""Fonts of scripts that matplotlib's own has no letters of, where they are installed."""


def _families() -> list[str]:
    import matplotlib
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return [*matplotlib.rcParams["font.family"], *(name for name in _FURTHER_FONTS if name in installed)]


class _Piece(NamedTuple):
    """A word of a line: its text, whether it is explained, the space in front of it and its width, inches."""

    text: str
    chosen: bool
    space: float
    size: float


def _direction(text: str) -> Literal["L", "R", ""]:
    """The direction of the first letter; empty where there is none."""
    for sign in text:
        kind = unicodedata.bidirectional(sign)
        if kind in ("L", "R", "AL"):
            return "L" if kind == "L" else "R"
    return ""


def _set_out(line: Sequence[_Piece], *, backwards: bool) -> Iterator[tuple[float, _Piece]]:
    """The words of a line from left to right, each with its place.

    As the bidirectional algorithm (UAX #9) does, on whole words: runs of the other direction than the line's are turned
    round; what has none (numbers, signs) goes with the run that is on both sides of it, else with the line, but a
    number behind letters of the other direction goes with them (W7).
    """
    own = "R" if backwards else "L"
    kinds = [_direction(piece.text) for piece in line]
    for at, kind in enumerate(kinds):
        if kind:
            continue
        before = kinds[at - 1] if at else own
        behind = next((found for found in kinds[at + 1 :] if found), own)
        number = any(unicodedata.bidirectional(sign) == "EN" for sign in line[at].text)
        kinds[at] = before if before == behind or (number and before == "L") else own  # type: ignore[call-overload]
    order: list[int] = []
    gaps: list[float] = []
    for kind, run in itertools.groupby(range(len(line)), key=lambda at: kinds[at]):
        members = list(run)
        shown = members if kind == own else members[::-1]
        gaps += [line[members[0]].space, *(line[max(pair)].space for pair in itertools.pairwise(shown))]
        order += shown
    if backwards:
        order, gaps = order[::-1], [0.0, *gaps[:0:-1]]
    left = 0.0
    for at, gap in zip(order, gaps, strict=True):
        yield left + gap, line[at]
        left += gap + line[at].size


class _Sheet:
    """Places everything of a figure, in inches from its top."""

    def __init__(self, drawn: Figure, grid: list[list[Panel | None]], font_size: float) -> None:
        self._drawn, self._grid, self._points = drawn, grid, font_size
        self.line = 1.35 * font_size / 72
        self._width = drawn.get_figwidth()
        self._families = _families()

    def fill(self, *, alpha: float, colormap: str, contour: bool, dpi: float) -> None:
        panels = [panel for line in self._grid for panel in line if panel is not None]
        rows = len({panel.row for panel in panels}) > 1 and len({panel.col for panel in panels}) > 1
        heads = self._shared(panels)
        left = 1.6 * self.line if rows and heads is not None else 0.0
        gap = 0.6 * self.line
        count = len(self._grid[0])
        side = (self._width - left - gap * (count - 1)) / count
        top = 0.4 * self.line
        boxes: list[tuple[Panel, float, float, float, float]] = []
        words: list[tuple[Panel, float, float, float]] = []
        if heads is not None:
            words.append((heads, 0.0, top, self._width))
            top += self._words(heads, 0.0, top, self._width, draw=False)
        for number, line in enumerate(self._grid):
            own = 0.0
            here = [(at, panel) for at, panel in enumerate(line) if panel is not None]
            together = self._shared([panel for _, panel in here]) if rows else None
            told: list[tuple[int, Panel]] = here if together is None else [(0, together)]
            for at, panel in told if heads is None else ():
                place, wide = (left + at * (side + gap), side) if together is None else (0.0, self._width)
                words.append((panel, place, top, wide))
                own = max(own, self._words(panel, place, top, wide, draw=False))
            top += own
            top += self.line if not rows or heads is None or number == 0 else 0.0  # titles
            tall = max(self._height(panel, side) for _, panel in here)
            for at, panel in here:
                high = self._height(panel, side)
                boxes.append((panel, left + at * (side + gap), top + (tall - high) / 2, side, high))
            top += tall + 1.5 * self.line
        bar = top + 0.3 * self.line
        areas = [area for panel in panels for area in (panel.mark.deletion, panel.mark.insertion)]
        notes = list(self.wrapped(_OUTSIDE, self._width)) if any(area < 0 or area > 1 for area in areas) else []
        height = bar + (2.6 + len(notes)) * self.line
        self._drawn.set_figheight(height)
        for panel, x, y, wide in words:
            self._words(panel, x, y, wide, draw=True)
        titled: set[str] = set()
        for panel, x, y, wide, high in boxes:
            self._panel(panel, x, y, wide, high, alpha=alpha, colormap=colormap, contour=contour, dpi=dpi)
            title = panel.col
            if not rows or heads is None or title not in titled:
                self.text(x + wide / 2, y - 0.25 * self.line, title, ha="center", va="bottom", weight="bold")
                titled.add(title)
            if left and x == left:
                self.text(0.8 * self.line, y + high / 2, panel.row, ha="center", va="center", rotation=90)
        self._legend(bar, alpha, colormap, contour)
        for number, note in enumerate(notes):
            self.text(0, bar + (2.4 + number) * self.line, note, va="top", color="#333333")

    def _shared(self, panels: Sequence[Panel]) -> Panel | None:
        """The panel whose question and answer stand once over all: where they are of one answer."""
        kinds = {(panel.question, "".join(word for word, _ in panel.answer)) for panel in panels}
        if len(kinds) > 1:
            return None
        marks = [any(flags) for flags in zip(*([flag for _, flag in p.answer] for p in panels), strict=False)]
        words = [(word, flag) for (word, _), flag in zip(panels[0].answer, marks, strict=True)]
        return dataclasses.replace(panels[0], answer=words)

    def _words(self, panel: Panel, x: float, y: float, wide: float, *, draw: bool) -> float:
        """Question and answer, words that are explained in colour; returns the height they take."""
        start = y
        backwards = _direction(panel.question or "") == "R"
        for line in self.wrapped(panel.question or "", wide):
            if draw:
                side = {"ha": "right"} if backwards else {}
                self.text(x + wide if backwards else x, y, line, va="top", color="#555555", **side)
            y += self.line
        return y - start + self._answer(panel.answer, x, y, wide, draw=draw)

    def _answer(self, answer: Sequence[tuple[str, bool]], x: float, y: float, wide: float, *, draw: bool) -> float:
        """The answer's words, in lines, in the order in which each line is read; returns the height."""
        if not answer:
            return 0.0
        backwards = _direction("".join(word for word, _ in answer)) == "R"
        lines: list[list[_Piece]] = [[]]
        at = 0.0
        for text, chosen in answer:
            word = text.strip()
            space = 0.28 * self.line if lines[-1] and text[:1].isspace() else 0.0
            size = self._measure(word, **_LOOKS[chosen])
            if lines[-1] and at + space + size > wide:
                lines.append([])
                at = space = 0.0
            lines[-1].append(_Piece(word, chosen, space, size))
            at += space + size
        for number, line in enumerate(lines):
            taken = sum(piece.space + piece.size for piece in line)
            for left, piece in _set_out(line, backwards=backwards):
                if draw:
                    from_left = left + (wide - taken if backwards else 0.0)
                    self.text(x + from_left, y + number * self.line, piece.text, va="top", **_LOOKS[piece.chosen])
        return (len(lines) + 0.15) * self.line

    def wrapped(self, text: str, wide: float) -> Iterator[str]:
        return wrap_words(text, wide, self._measure)

    def _measure(self, text: str, **look: Any) -> float:
        from matplotlib.text import Text

        probe = Text(
            0, 0, text, fontsize=self._points, weight=look.get("weight", "normal"), parse_math=False,
            fontfamily=self._families,
        )  # fmt: skip
        probe.set_figure(self._drawn)
        extent = probe.get_window_extent(self._drawn.canvas.get_renderer())  # type: ignore[attr-defined]
        return float(extent.width) / float(self._drawn.dpi)

    def text(self, x: float, y: float, text: str, **look: Any) -> None:
        height = self._drawn.get_figheight()
        look = {"fontsize": self._points, "parse_math": False, "fontfamily": self._families, **look}
        self._drawn.text(x / self._width, 1 - y / height, text, **look)

    def axes(self, x: float, y: float, wide: float, high: float) -> Axes:
        height = self._drawn.get_figheight()
        return self._drawn.add_axes((x / self._width, 1 - (y + high) / height, wide / self._width, high / height))

    def _height(self, panel: Panel, wide: float) -> float:
        """Of a panel of some width, inches."""
        if not panel.frames:
            return wide * panel.image.height / panel.image.width
        columns, _, high = self._film(panel, wide)
        return -(-len(panel.frames) // columns) * (high + 1.1 * self.line) + (5.4 * self.line if panel.curve else 0.0)

    def _film(self, panel: Panel, wide: float) -> tuple[int, float, float]:
        """Frames beside each other, and width and height of each, inches."""
        columns = min(len(panel.frames), max(2, min(6, int(wide / _FRAME))))
        side = (wide - (columns - 1) * 0.4 * self.line) / columns
        return columns, side, side * panel.image.height / panel.image.width

    def _frames(self, panel: Panel, x: float, y: float, wide: float, **look: Any) -> None:
        """The frames of a video, each with when it is shown, and below them the curve over time."""
        columns, side, high = self._film(panel, wide)
        row = high + 1.1 * self.line
        for number, frame in enumerate(panel.frames):
            left, top = x + number % columns * (side + 0.4 * self.line), y + number // columns * row
            self._map(frame, left, top, side, high, **look)
            self.text(
                left + side / 2, top + high + 0.1 * self.line, frame.col, ha="center", va="top", color="#555555",
                fontsize=0.85 * self._points,
            )  # fmt: skip
        if not panel.curve:
            return
        at = range(len(panel.curve)) if panel.times is None else panel.times
        left = 2.2 * self.line
        below = -(-len(panel.frames) // columns) * row + 0.3 * self.line
        axes = self.axes(x + left, y + below, wide - left - 0.2 * self.line, 3.2 * self.line)
        axes.plot(at, panel.curve, "-o", color="#0072b2", linewidth=1.2, markersize=2.5)
        axes.set_ylim(0, 1.1 * max(panel.curve) or 1)
        axes.locator_params(axis="y", nbins=2)
        axes.tick_params(labelsize=0.85 * self._points, length=2, pad=1)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        axes.set_xlabel("frame" if panel.times is None else "seconds", fontsize=0.85 * self._points, labelpad=1)
        axes.set_ylabel("mean", fontsize=0.85 * self._points, labelpad=1)

    def _panel(self, panel: Panel, x: float, y: float, wide: float, high: float, **look: Any) -> None:
        (self._frames(panel, x, y, wide, **look) if panel.frames else self._map(panel, x, y, wide, high, **look))
        colour = np.asarray(_COLOURS[panel.mark.verdict]) / 255
        cells = None if panel.values is None else cells_of(panel.values.shape)
        few = [cells] if cells else []
        texts = ("  ".join([str(panel.mark), *few]), "  ".join([panel.mark.verdict, *few]))
        # A narrow panel has room for less.
        text = next((one for one in texts if self._measure(one) <= wide), panel.mark.verdict)
        self.text(x + wide / 2, y + high + 0.2 * self.line, text, ha="center", va="top", color=colour)

    def _map(self, panel: Panel, x: float, y: float, wide: float, high: float, **look: Any) -> None:
        axes = self.axes(x, y, wide, high)
        dpi = look.pop("dpi")
        pixels = max(1, round(wide * dpi)), max(1, round(high * dpi))
        image = panel.image
        # At the size of print, so that outlines are as fine as print.
        image = image.resize(pixels, Image.Resampling.BICUBIC, reducing_gap=2.0)
        if panel.values is None:
            axes.imshow(np.asarray(image.convert("L").convert("RGB")), aspect="auto")
            axes.text(
                0.5, 0.5, "\n".join(self.wrapped(f"no map: {panel.reason or 'none'}", 0.9 * wide)), ha="center",
                va="center", fontsize=self._points, transform=axes.transAxes, parse_math=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip
        else:
            drawn = overlay(image, panel.values, seen=panel.seen, peak=panel.peak, **look)
            axes.imshow(np.asarray(drawn), aspect="auto")
        axes.set_axis_off()

    def _legend(self, y: float, alpha: float, colormap: str, contour: bool) -> None:
        wide = min(0.35 * self._width, 1.6)
        axes = self.axes(0.02 * self._width, y, wide, 0.45 * self.line)
        bar = colour_bar(alpha=alpha, colormap=colormap)
        axes.imshow(np.asarray(bar), aspect="auto", extent=(0, 1, 0, 1))
        axes.set_yticks([])
        axes.set_xticks([0, 0.5, 1])
        axes.tick_params(labelsize=0.85 * self._points, length=2, pad=1)
        text = "importance, share of the map's highest" + ("; outline: half of it" if contour else "")
        room = self._width - wide - 0.06 * self._width
        for number, line in enumerate(self.wrapped(text, room)):
            self.text(wide + 0.05 * self._width, y + (number - 0.15) * self.line, line, va="top", color="#333333")


def wrap_words(text: str, width: float, measure: Callable[[str], float]) -> Iterator[str]:
    """Yield the lines of a text that are as wide as they may be, by a measure of their width."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and measure(longer) > width:
            yield line
            longer = word
        line = longer
    if line:
        yield line


class Curved(Scored, Protocol):
    """What is drawn of a score's curves: what ``evaluate`` returns has it."""

    @property
    def fractions(self) -> Sequence[float]: ...
    @property
    def deletion_curve(self) -> Sequence[float]: ...
    @property
    def insertion_curve(self) -> Sequence[float]: ...
    @property
    def remarks(self) -> Sequence[str]: ...


def curve_figure(score: Curved, *, width: str | float = "column", font_size: float = 8.0) -> Figure:
    """Deletion and insertion with their areas, the verdict, and what areas outside 0 to 1 mean, for print.

    Args:
        score: its curves are finite.
        width: as in ``figure``.
        font_size: points.
    """
    drawn = _blank(width)
    sheet = _Sheet(drawn, [], font_size)
    line, inches = sheet.line, drawn.get_figwidth()
    verdict = mark_of(score).verdict
    told = [(str(verdict), _COLOURS[verdict])]
    told += [(one, (51, 51, 51)) for one in (*score.remarks, "dotted: no better than area")]
    under = [(text, colour) for said, colour in told for text in sheet.wrapped(said, inches)]
    left, top, high = 3.2 * line, 2.2 * line, 0.6 * inches
    drawn.set_figheight(top + high + (3.2 + len(under)) * line)
    axes = sheet.axes(left, top, inches - left - line, high)
    lines = [
        axes.plot(score.fractions, curve, color=colour, linewidth=1.4, label=f"{name} {area:.2f}")[0]
        for name, curve, area, colour in (
            ("insertion", score.insertion_curve, score.insertion, "#0072b2"),
            ("deletion", score.deletion_curve, score.deletion, "#d55e00"),
        )
    ]
    for rising in ([0, 1], [1, 0]):
        axes.plot([0, 1], rising, ":", color="#777777", linewidth=0.9)
    axes.legend(
        handles=lines, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=0.9 * font_size,
        borderaxespad=0.2, handlelength=1.4, columnspacing=1.0,
    )  # fmt: skip
    axes.margins(x=0)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.tick_params(labelsize=0.9 * font_size)
    axes.set_xlabel("share of the image, most important first", fontsize=font_size)
    axes.set_ylabel("score: 0 baseline, 1 whole image", fontsize=font_size)
    for number, (text, colour) in enumerate(under):
        sheet.text(0, top + high + (3.1 + number) * line, text, va="top", color=np.asarray(colour) / 255)
    return drawn


def _blank(width: str | float) -> Figure:
    """A figure of a width that belongs to no window. Raises ``ExplainError`` for no such width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inches = WIDTHS.get(width) if isinstance(width, str) else float(width)
    if inches is None or not 0.5 <= inches <= 100:
        raise ExplainError(f"a figure is 'column' or 'text' wide, or 0.5 to 100 inches; got {width!r}")
    drawn = Figure(figsize=(inches, inches))
    FigureCanvasAgg(drawn)
    return drawn


def figure_bytes(drawn: Figure, name: str, *, provenance: str, dpi: float = 300) -> bytes:
    """A figure as the bytes of a file, with its provenance in the file's own metadata.

    Args:
        drawn: the figure.
        name: the file's name, whose ending is one of ``FORMATS``.
        provenance: how it was made; kept as PDF subject, SVG description, PNG text ``lvlm_probe``, TIFF description.
        dpi: pixels per inch, for PNG and TIFF.

    Raises:
        ExplainError: another ending.
    """
    import matplotlib

    ending = Path(name).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise ExplainError(f"a figure is saved as {', '.join(FORMATS[:-1])}; got {name!r}")
    options: dict[str, Any]
    if ending == "pdf":
        options = {"metadata": {"Creator": "lvlm_probe", "Subject": provenance, "CreationDate": None}}
    elif ending == "svg":
        options = {"metadata": {"Creator": "lvlm_probe", "Description": provenance, "Date": None}}
    elif ending == "png":
        options = {"metadata": {"Software": "lvlm_probe", "lvlm_probe": provenance}}
    else:
        options = {"pil_kwargs": {"compression": "tiff_deflate", "description": provenance, "software": "lvlm_probe"}}
    buffer = io.BytesIO()
    # Letters stay letters: editors and journals want fonts, not outlines.
    with _SAVING, matplotlib.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "lvlm_probe"}):
        drawn.savefig(buffer, format=ending, dpi=dpi, **options)
    return buffer.getvalue()


def save_figure(drawn: Figure, path: str | os.PathLike[str], *, provenance: Mapping[str, Any], dpi: float) -> None:
    """Write a figure whole, with its provenance as JSON in the file's own metadata; missing folders are made.

    Args:
        drawn: the figure.
        path: the file; replaces what is there.
        provenance: JSON-ready, without NaN and infinity.
        dpi: pixels per inch, for PNG and TIFF.

    Raises:
        ExplainError: an ending that is not one of ``FORMATS``.
    """
    target = Path(path)
    told = json.dumps(provenance, ensure_ascii=True, allow_nan=False)
    content = figure_bytes(drawn, target.name, provenance=told, dpi=dpi)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, content)
