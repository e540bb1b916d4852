"""Which image token belongs to which image, as far as its place in the prompt tells, and intervals on the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lvlm_probe.errors import ImageError

__all__ = ["image_spans", "shared_with_cells", "source_span"]


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
