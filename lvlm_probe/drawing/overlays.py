"""Overlays: a heatmap over its image, with what was found when it was checked.

An overlay is made in strips of rows, so that it takes the memory of the image and little more: a grid is brought to the
pixels of a strip, coloured by the colour map's own table, laid over the image by its value, outlined and hatched.

No map is drawn without its verdict: every overlay says whether the heatmap was checked, and what came of it (``Mark``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvlm_probe.errors import ExplainError

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

Verdicts = Literal["holds up", "do not trust", "not checked"]
MARK_COLOURS: Mapping[str, tuple[int, int, int]] = {
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
    """The mark of a score; ``None`` was not checked. Raises ``ExplainError`` for what is no score."""
    if score is None:
        return Mark("not checked")
    if not hasattr(score, "verdict"):
        raise ExplainError(f"a score is what evaluate() returns, or None; got a {type(score).__name__}")
    return Mark("holds up" if score.verdict.trusted else "do not trust", score.deletion, score.insertion)


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
    pencil.rectangle((*at, wide - 1, drawn.height - 1), fill=MARK_COLOURS[mark.verdict])
    pencil.text((at[0] + pad - left, at[1] + pad - top), text, font=font, fill=(255, 255, 255))
