"""Painting: values per token as a grid over the image, and the intervals and spans that this takes.

Every method that looks inside the model ends with one number per token. ``paint`` lays them on a grid over the original
image, each cell the area-weighted mean of the tokens whose boxes it meets, so that merged patches, windows, tiles and
crops all come back to the pixels they were cut from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lvlm_probe.errors import ExplainError, ImageError

__all__ = ["image_spans", "paint", "pitch", "shared_with_cells", "source_span"]

_FINEST = 1024
"""Cells of a side at most: more than any model has tokens along one. Boxes may come from a stranger's file, and may be
as small there as numbers get."""


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


def pitch(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """The grid ``(row, col)`` over an image of ``size = (width, height)`` with cells as large as a token's box."""
    extent = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    if len(extent) == 0:
        raise ExplainError("none of the tokens stands for a part of the image")
    wide, high = np.median(extent[:, 2] - extent[:, 0]), np.median(extent[:, 3] - extent[:, 1])
    rows, cols = size[1] / float(high), size[0] / float(wide)
    return max(1, round(min(rows, _FINEST))), max(1, round(min(cols, _FINEST)))


def paint(
    values: torch.Tensor, boxes: np.ndarray, size: tuple[int, int], shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay one value per token on a grid over the image.

    Args:
        values: ``(token,)``.
        boxes: ``(token, 4)``, ``x0, y0, x1, y1`` in pixels.
        size: ``(width, height)`` of the image.
        shape: ``(row, col)`` of the grid.

    Returns:
        the grid ``(row, col)`` float64, each cell the mean of the tokens it meets, weighted by the area they share, and
        which cells meet any, bool. Where views overlap (tiles, an overview) that is the mean over the views that cover
        a cell, each of the same weight: a view's tokens share the whole cell between them.
    """
    box = np.asarray(boxes, dtype=np.float64)
    across = torch.from_numpy(shared_with_cells(box[:, 0], box[:, 2], size[0], shape[1]))
    down = torch.from_numpy(shared_with_cells(box[:, 1], box[:, 3], size[1], shape[0]))
    area = torch.einsum("nr,nc->rc", down, across)
    total = torch.einsum("n,nr,nc->rc", values.detach().cpu().double(), down, across)
    met = area > 1e-9 * max(size)
    return torch.where(met, total / area.clamp(min=1e-12), 0.0), met
