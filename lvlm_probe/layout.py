"""Which image token belongs to which image, and which part of the picture it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvlm_probe.errors import ImageError

__all__ = ["image_spans", "shared_with_cells", "source_span", "token_boxes"]


def image_spans(positions: np.ndarray, n_images: int, tokens_per_image: Sequence[int] | None = None) -> np.ndarray:
    """The image each image token belongs to.

    Args:
        positions: ``(N,)`` positions of the image tokens in the prompt, ascending.
        n_images: number of images in the prompt.
        tokens_per_image: their token counts, where the processor can tell.

    Returns:
        ``(N,)`` int64. By the counts if they fit, else by runs of adjacent tokens, else in equal shares.

    Raises:
        ImageError: none of the three fits.
    """
    count = len(positions)
    if n_images == 1:
        return np.zeros(count, np.int64)
    if tokens_per_image is not None and sum(tokens_per_image) == count:
        return np.repeat(np.arange(len(tokens_per_image)), tokens_per_image).astype(np.int64)
    runs = np.cumsum(np.diff(positions, prepend=positions[:1]) > 1)
    if count and runs[-1] + 1 == n_images:
        return runs.astype(np.int64)
    if count % n_images == 0:
        return np.repeat(np.arange(n_images), count // n_images).astype(np.int64)
    raise ImageError(f"{count} image tokens cannot be divided among {n_images} images")


def token_boxes(path: Any, image_index: np.ndarray) -> np.ndarray:
    """The part of the original picture each image token stands for.

    Read off the traced geometry: a token's patch (or merged group of patches) covers the pixels its elements look at.
    Serves the layouts where tokens follow the pixel inputs in order: one grid per image, and flattened patches in merge
    order.

    Args:
        path: the ``ImagePath`` of the prompt.
        image_index: ``(N,)`` the image of each token.

    Returns:
        ``(N, 4)`` float32 ``x0, y0, x1, y1`` in pixels of the original image.

    Raises:
        ImageError: tokens do not follow the pixel inputs in a way that can be told.
    """
    boxes = np.zeros((len(image_index), 4), np.float32)
    if not hasattr(path, "coordinates"):
        raise ImageError("there is no processor to trace")
    key = path.pixel_keys[0]
    x, y, owner, live = (np.asarray(part) for part in path.coordinates(key))
    for image, (width, height) in enumerate(path.image_sizes):
        tokens = np.flatnonzero(image_index == image)
        mine = (owner == image) & live
        groups = _patch_groups(mine, len(tokens)) if x.ndim == 2 else _grid_groups(mine, len(tokens))
        for token, group in zip(tokens, groups, strict=True):
            keep = mine[group]
            if not keep.any():
                continue
            boxes[token] = _box(x[group][keep], y[group][keep], width, height)
    return boxes


def _patch_groups(mine: np.ndarray, tokens: int) -> list[Any]:
    """Flattened patches ``(patch, element)``: consecutive groups of patches are merged into one token."""
    rows = np.flatnonzero(mine.any(axis=1))
    if tokens == 0 or len(rows) == 0 or len(rows) % tokens:
        raise ImageError(f"{len(rows)} patches do not form {tokens} tokens")
    size = len(rows) // tokens
    return [np.s_[rows[start : start + size]] for start in range(0, len(rows), size)]


def _grid_groups(mine: np.ndarray, tokens: int) -> list[Any]:
    """A picture ``(..., channel, row, col)``: tokens are the cells of a grid over it, row by row."""
    flat = mine.reshape(-1, *mine.shape[-3:])
    entries = np.flatnonzero(flat.any(axis=(1, 2, 3)))
    if len(entries) != 1:
        raise ImageError(
            f"one image is spread over {len(entries)} views; how their tokens are ordered is not known here"
        )
    lead = np.unravel_index(entries[0], mine.shape[:-3]) if mine.ndim > 3 else ()
    height, width = mine.shape[-2:]
    rows = round(math.sqrt(tokens * height / width))
    if rows == 0 or tokens % rows or abs(tokens / rows / rows - width / height) > 0.26:
        raise ImageError(f"{tokens} tokens form no grid over {width}×{height} inputs")
    cols = tokens // rows
    ys = np.linspace(0, height, rows + 1).round().astype(int)
    xs = np.linspace(0, width, cols + 1).round().astype(int)
    return [
        (*lead, slice(None), slice(ys[r], ys[r + 1]), slice(xs[c], xs[c + 1])) for r in range(rows) for c in range(cols)
    ]


def _box(x: np.ndarray, y: np.ndarray, width: int, height: int) -> tuple[float, float, float, float]:
    x0, x1 = source_span(x, width)
    y0, y1 = source_span(y, height)
    return x0, y0, x1, y1


def source_span(values: np.ndarray, size: int) -> tuple[float, float]:
    """From the first to the last source position, and half a step beyond: elements have an extent of their own."""
    distinct = np.unique(values.round(3))
    low, high = float(distinct[0]), float(distinct[-1])
    half = (high - low) / max(1, len(distinct) - 1) / 2 if len(distinct) > 1 else 0.5
    return max(0.0, low - half), min(float(size), high + half)


def shared_with_cells(low: np.ndarray, high: np.ndarray, size: int, cells: int) -> np.ndarray:
    """Length that each interval shares with each of ``cells`` equal parts of ``[0, size]``, ``(interval, cell)``."""
    edges = np.linspace(0, size, cells + 1)
    shared: np.ndarray = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return shared.clip(min=0)
