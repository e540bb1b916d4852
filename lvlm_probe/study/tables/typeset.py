"""A table set for print, as a page of matplotlib's in the style of booktabs: no LaTeX is needed.

Everything is measured in points before it is drawn, so that the page is as large as the table and no larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lvlm_probe.drawing import wrap_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rank = Literal["best", "second"] | None
_INK, _GREY, _RULE = "#111111", "#5a5a5a", "#b5bac2"
_POINTS, _SMALL, _STEP = 8.0, 6.4, 13.2
"""Size of the letters, of those of intervals and notes, and from line to line."""
_GAP = 14.0
"""Points between two columns."""
_BESIDE = 6.0
"""Points between a value and its interval."""
_FINE = 720.0
"""Dots per inch that texts are measured at: at a screen's, letters are moved to whole dots."""
_NARROWEST = 252.0
"""Points: a column of a journal, for title and notes of a narrow table."""


@dataclass(frozen=True)
class Printed:
    """A cell in print: the text, what stands behind it small (an interval), and its rank."""

    text: str
    beside: str = ""
    rank: Rank = None


@dataclass(frozen=True)
class Line:
    """A row of cells; ``begins`` a group, before which a rule is drawn."""

    cells: Sequence[Printed]
    begins: bool = False


def set_table(
    title: str,
    columns: Sequence[str],
    lines: Sequence[Line],
    *,
    labels: int,
    notes: Sequence[str],
) -> Figure:
    """The table with its title above and its notes below.

    Args:
        title: what it shows.
        columns: headings.
        lines: its rows.
        labels: how many of the first columns are texts, set flush left.
        notes: sentences below it.
    """
    return _Page(title, columns, lines, labels, notes).drawn


class _Page:
    """Points from the upper left corner."""

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        lines: Sequence[Line],
        labels: int,
        notes: Sequence[str],
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.drawn = Figure(figsize=(1, 1), dpi=_FINE)
        self._renderer = FigureCanvasAgg(self.drawn).get_renderer()
        self._labels = labels
        self._widths = [
            (
                max(self._wide(line.cells[place].text, bold=True) for line in lines) if lines else 0.0,
                max(self._wide(line.cells[place].beside, _SMALL) for line in lines) if lines else 0.0,
            )
            for place in range(len(columns))
        ]
        spans = [
            max(self._wide(name, bold=True), text + (_BESIDE + beside if beside else 0))
            for name, (text, beside) in zip(columns, self._widths, strict=True)
        ]
        self._lefts = [sum(spans[:place]) + _GAP * place for place in range(len(spans))]
        self._spans = spans
        self._width = max(_NARROWEST, sum(spans) + _GAP * (len(spans) - 1))
        self._parts: list[tuple[float, float, str, dict[str, Any]]] = []
        self._rules: list[tuple[float, float, float, float, str]] = []
        height = self._fill(title, columns, lines, notes)
        self._draw(height)

    def _wide(self, text: str, size: float | None = None, *, bold: bool = False) -> float:
        from matplotlib.font_manager import FontProperties

        if not text:
            return 0.0
        font = FontProperties(size=size or _POINTS, weight="bold" if bold else "normal")
        width, _, _ = self._renderer.get_text_width_height_descent(text, font, ismath=False)
        return float(width) * 72 / _FINE

    def _wrapped(self, text: str, size: float, *, bold: bool = False) -> Iterator[str]:
        return wrap_words(text, 0.97 * self._width, lambda line: self._wide(line, size, bold=bold))

    def _rule(self, y: float, width: float, colour: str = _INK) -> None:
        self._rules.append((0.0, self._width, y, width, colour))

    def _fill(self, title: str, columns: Sequence[str], lines: Sequence[Line], notes: Sequence[str]) -> float:
        y = 0.0
        for text in self._wrapped(title, _POINTS * 1.1, bold=True):
            y += _STEP
            self._parts.append((0.0, y, text, {"size": _POINTS * 1.1, "weight": "bold"}))
        y += 0.6 * _STEP
        self._rule(y, 1.0)
        y += _STEP
        for place, name in enumerate(columns):
            self._heading(place, y, name)
        y += 0.45 * _STEP
        self._rule(y, 0.6)
        before: Sequence[Printed] = ()
        for number, line in enumerate(lines):
            if line.begins and number:
                y += 0.4 * _STEP
                self._rule(y, 0.4, _RULE)
            y += _STEP
            for place, cell in enumerate(line.cells):
                # A label stands where it changes.
                same = place < self._labels - 1 and not line.begins and before and before[place] == cell
                if not same:
                    self._cell(place, y, cell)
            before = line.cells
        y += 0.45 * _STEP
        self._rule(y, 1.0)
        y += 0.3 * _STEP
        for note in notes:
            for text in self._wrapped(note, _SMALL):
                y += 1.35 * _SMALL
                self._parts.append((0.0, y, text, {"size": _SMALL, "color": _GREY}))
            y += 0.3 * _SMALL
        return y

    def _heading(self, place: int, y: float, name: str) -> None:
        left = self._lefts[place]
        at, flush = (left, "left") if place < self._labels else (left + self._spans[place], "right")
        self._parts.append((at, y, name, {"ha": flush, "weight": "bold"}))

    def _cell(self, place: int, y: float, cell: Printed) -> None:
        style: dict[str, Any] = {"weight": "bold"} if cell.rank == "best" else {}
        if place < self._labels:
            self._parts.append((self._lefts[place], y, cell.text, style))
            return
        right = self._lefts[place] + self._spans[place]
        beside = self._widths[place][1]
        if cell.beside:
            self._parts.append((right, y, cell.beside, {"ha": "right", "size": _SMALL, "color": _GREY}))
        end = right - (beside + _BESIDE if beside else 0)
        self._parts.append((end, y, cell.text, {**style, "ha": "right"}))
        if cell.rank == "second":
            self._rules.append((end - self._wide(cell.text), end, y + 0.22 * _POINTS, 0.6, _INK))

    def _draw(self, height: float) -> None:
        from matplotlib.lines import Line2D

        edge = 0.8 * _POINTS
        wide, high = self._width + 2 * edge, height + 2 * edge
        self.drawn.set_dpi(100)
        self.drawn.set_size_inches(wide / 72, high / 72)
        for x, y, text, style in self._parts:
            given = {"size": _POINTS, "color": _INK, "va": "baseline", **style}
            self.drawn.text((edge + x) / wide, 1 - (edge + y) / high, text, parse_math=False, **given)
        for start, end, y, width, colour in self._rules:
            at = 1 - (edge + y) / high
            ends = [(edge + start) / wide, (edge + end) / wide]
            self.drawn.add_artist(
                Line2D(ends, [at, at], linewidth=width, color=colour, transform=self.drawn.transFigure)
            )
