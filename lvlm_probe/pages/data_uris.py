"""Images and grids as text that a page can carry: data URIs and base64."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

LONG_SIDE = 1024
"""Longest side of an embedded image, in pixels."""

_MAX_CELLS = 160  # a map finer than this along a side is averaged down: the page draws it smoothly anyway
_MAX_SEEN = 168
_DRAWING_COLOURS = 4096  # an image with more colours is no drawing, and PNG not worth trying


def shrink(image: Image.Image, long_side: int = LONG_SIDE) -> Image.Image:
    """Return the image as RGB on white, no side longer than `long_side`."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(ground, layer)
    image = image.convert("RGB")
    scale = long_side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def data_uri(image: Image.Image, *, quality: int = 84) -> str:
    """Return the image as a ``data:`` URI: JPEG, or PNG where that is no larger (drawings, plain areas)."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality, optimize=True, progressive=True)
    kind, buffer = "jpeg", jpeg
    if image.getcolors(_DRAWING_COLOURS) is not None:
        png = io.BytesIO()
        image.save(png, "PNG")
        if png.tell() <= jpeg.tell():
            kind, buffer = "png", png
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def encode_values(values: np.ndarray) -> dict[str, object]:
    """Return a map, ``(row, col)`` in [0, 1], as ``{w, h, data}``: little-endian 16-bit integers in base64.

    Values outside [0, 1] are clipped and NaN becomes 0. A side of more than 160 cells is averaged down.
    """
    grid = np.clip(np.nan_to_num(np.asarray(values, dtype=np.float32)), 0.0, 1.0)
    grid = _reduce(grid, _MAX_CELLS)
    height, width = grid.shape
    packed = np.round(grid * 65535).astype("<u2").tobytes()
    return {"w": width, "h": height, "data": base64.b64encode(packed).decode()}


def encode_seen(seen: np.ndarray) -> dict[str, object] | None:
    """Return the cells the model sees, ``(row, col)`` bool, as ``{w, h, data}`` of packed bits; None if it sees all."""
    grid = np.asarray(seen, dtype=bool)
    if grid.all():
        return None
    coarse = _reduce(grid.astype(np.float32), _MAX_SEEN) >= 0.5
    return packed_bits(coarse)


def packed_bits(cells: np.ndarray) -> dict[str, object]:
    """Return cells, ``(row, col)`` bool, as ``{w, h, data}`` of packed bits."""
    height, width = cells.shape
    return {"w": width, "h": height, "data": base64.b64encode(np.packbits(cells.ravel()).tobytes()).decode()}


def _reduce(grid: np.ndarray, most: int) -> np.ndarray:
    """Average a grid down by area so that no side has more than `most` cells."""
    height, width = grid.shape
    if max(height, width) <= most:
        return grid
    scale = most / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(grid, mode="F").resize(size, Image.Resampling.BOX), dtype=np.float32)
