"""Painting: values per token as a grid over the image, and the intervals and spans that this takes.

Every method that looks inside the model ends with one number per token. ``paint`` lays them on a grid over the original
image, each cell the area-weighted mean of the tokens whose boxes it meets, so that merged patches, windows, tiles and
crops all come back to the pixels they were cut from.

A token of a clip stands for a tube, a box that lasts for some frames. It is a box with a third axis, ``x0, y0, t0, x1,
y1, t1`` with times in frames from the clip's first, in a clip of ``(width, height, frames)``; grids over it are
``(t, row, col)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.trace.clips import Clip

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


def have_extent(boxes: np.ndarray) -> np.ndarray:
    """Which boxes or tubes are of a part of the image or clip, ``(token,)`` bool: no padding, no newlines."""
    half = boxes.shape[1] // 2
    there: np.ndarray = np.all(boxes[:, half:] > boxes[:, :half], axis=1)
    return there


def tubes(boxes: np.ndarray, frames: np.ndarray, clip: Clip) -> np.ndarray:
    """Boxes that last for some frames, ``(token, 6)`` float32; all 0 where a box has no extent.

    Args:
        boxes: ``(token, 4)``, ``x0, y0, x1, y1`` in pixels.
        frames: ``(token, 2)``, numbers of the first and the last frame among the images of the prompt.
    """
    times = np.stack([frames[:, 0], frames[:, 1] + 1], axis=1).clip(clip.first, clip.images.stop) - clip.first
    found = np.concatenate([boxes[:, :2], times[:, :1], boxes[:, 2:], times[:, 1:]], axis=1).astype(np.float32)
    found[~have_extent(boxes)] = 0
    return found


def pitch(boxes: np.ndarray, size: tuple[int, ...]) -> tuple[int, ...]:
    """The grid over an image or a clip with cells as large as a token's box or tube.

    Args:
        boxes: ``(token, 4)``, or ``(token, 6)`` of a clip.
        size: ``(width, height)`` of the image, or ``(width, height, frames)``.

    Returns:
        ``(row, col)``, or ``(t, row, col)``.

    Raises:
        ExplainError: none of the tokens has a place.
    """
    extent = boxes[have_extent(boxes)]
    if len(extent) == 0:
        raise ExplainError("none of the tokens stands for a part of the image")
    edges = np.median(extent[:, len(size) :] - extent[:, : len(size)], axis=0)
    return tuple(max(1, round(min(whole / float(edge), _FINEST))) for whole, edge in zip(size, edges, strict=True))[
        ::-1
    ]


def paint(
    values: torch.Tensor, boxes: np.ndarray, size: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay one value per token on a grid over the image or the clip.

    Args:
        values: ``(token,)``.
        boxes: ``(token, 4)``, ``x0, y0, x1, y1`` in pixels; of a clip ``(token, 6)``.
        size: ``(width, height)`` of the image, or ``(width, height, frames)``.
        shape: ``(row, col)`` of the grid, or ``(t, row, col)``.

    Returns:
        the grid, float64, each cell the mean of the tokens it meets, weighted by the area and time they share, and
        which cells meet any, bool. Where views overlap (tiles, an overview) that is the mean over the views that cover
        a cell, each of the same weight: a view's tokens share the whole cell between them.
    """
    box, axes = np.asarray(boxes, dtype=np.float64), len(size)
    across, down, *lasting = (
        torch.from_numpy(shared_with_cells(box[:, axis], box[:, axes + axis], size[axis], cells))
        for axis, cells in enumerate(reversed(shape))
    )
    given = values.detach().cpu().double()
    if not lasting:
        area = torch.einsum("nr,nc->rc", down, across)
        total = torch.einsum("n,nr,nc->rc", given, down, across)
    else:  # step by step: a token lasts for few of them
        area, total = torch.zeros(2, *shape, dtype=torch.float64)
        for step, share in enumerate(lasting[0].T):
            live = share > 0
            at = down[live] * share[live, None], across[live]
            area[step] = torch.einsum("nr,nc->rc", *at)
            total[step] = torch.einsum("n,nr,nc->rc", given[live], *at)
    met = area > 1e-9 * max(size)
    return torch.where(met, total / area.clamp(min=1e-12), 0.0), met
