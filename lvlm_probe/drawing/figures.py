"""Figures for print: maps of several answers as panels with their verdicts, and the curves of a score."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from lvlm_probe.drawing.overlays import MARK_COLOURS, Mark, Scored, cells_of, colour_bar, mark_of, overlay
from lvlm_probe.errors import ExplainError
from lvlm_probe.escaping import drawable
from lvlm_probe.files import write_whole
from lvlm_probe.kinds import is_whole
from lvlm_probe.process import lock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png", "tiff", "tif")

WIDTHS: Mapping[str, float] = {"column": 3.5, "text": 7.2}
"""Widths of a figure in inches: one column (89 mm) and the whole page (183 mm) of most journals."""

_FRAME = 0.9
"""Least width of a video's frame in a figure, inches."""

_SAVING = lock()
"""What files are made of stands in matplotlib's settings alone, which all threads share."""


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
        ExplainError: no panels, no such width, a number out of its range, or no room for the panels.
    """
    if not panels:
        raise ExplainError("a figure shows heatmaps: give at least one")
    _check(font_size=font_size, dpi=dpi, columns=1 if columns is None else columns)
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
            0, 0, drawable(text), fontsize=self._points, weight=look.get("weight", "normal"), parse_math=False,
            fontfamily=self._families,
        )  # fmt: skip
        probe.set_figure(self._drawn)
        extent = probe.get_window_extent(self._drawn.canvas.get_renderer())  # type: ignore[attr-defined]
        return float(extent.width) / float(self._drawn.dpi)

    def text(self, x: float, y: float, text: str, **look: Any) -> None:
        height = self._drawn.get_figheight()
        look = {"fontsize": self._points, "parse_math": False, "fontfamily": self._families, **look}
        self._drawn.text(x / self._width, 1 - y / height, drawable(text), **look)

    def axes(self, x: float, y: float, wide: float, high: float) -> Axes:
        height = self._drawn.get_figheight()
        if not (wide > 0 and high > 0):
            raise ExplainError("the figure has no room for its panels: give it width, fewer columns or smaller letters")
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
        colour = np.asarray(MARK_COLOURS[panel.mark.verdict]) / 255
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
            reason = drawable(f"no map: {panel.reason or 'none'}")
            axes.text(
                0.5, 0.5, "\n".join(self.wrapped(reason, 0.9 * wide)), ha="center",
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
    _check(font_size=font_size)
    drawn = _blank(width)
    sheet = _Sheet(drawn, [], font_size)
    line, inches = sheet.line, drawn.get_figwidth()
    verdict = mark_of(score).verdict
    told = [(str(verdict), MARK_COLOURS[verdict])]
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


_RANGES: Mapping[str, tuple[int, int, str]] = {
    "font_size": (1, 100, "points"), "dpi": (10, 10_000, "pixels per inch"), "columns": (1, 100, "panels side by side"),
}  # fmt: skip


def _check(**numbers: float) -> None:
    """Raise ``ExplainError`` for a number out of its range."""
    for name, value in numbers.items():
        low, high, of = _RANGES[name]
        if not low <= value <= high or (name == "columns" and not is_whole(value)):
            raise ExplainError(f"{name} is {low} to {high:,} {of}; got {value!r}")


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
        ExplainError: another ending, or ``dpi`` out of its range.
    """
    import matplotlib

    ending = Path(name).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise ExplainError(f"a figure is saved as {', '.join(FORMATS[:-1])}; got {name!r}")
    _check(dpi=dpi)
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
    write_whole(target, content)
