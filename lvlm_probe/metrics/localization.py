"""Does a heatmap point at a region that is known? Pointing game, energy, IoU, soft IoU, average precision.

A region is a mask, an array ``(row, col)`` of bools, or boxes, a *list* of ``(left, top, right, bottom)`` in pixels of
the image. The heatmap is brought bilinearly to the region's own pixels first (``heatmap.resample``, as masks are), so
the region decides the resolution. Ties count by expectation (pointing game, IoU: what breaking them at random gives on
average) or enter together (average precision). None of these needs a model; none says what the model used, only where
the heatmap points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import Heatmap, resample

__all__ = ["average_precision", "boxes_to_mask", "energy_in_region", "iou", "pointing_game", "soft_iou"]

Region = np.ndarray | Sequence[Sequence[float]]


def boxes_to_mask(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """The union of boxes as a mask.

    Args:
        boxes: ``(left, top, right, bottom)`` each, in pixels, right and bottom exclusive. A box with fractions takes
            every pixel it touches; what lies outside the image is cut off.
        size: ``(width, height)`` of the image, pixels.

    Returns:
        ``(row, col)`` bool, ``height × width``.

    Raises:
        ExplainError: A box is not four finite numbers, is empty, or lies outside the image altogether.
    """
    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    for box in boxes:
        try:
            left, top, right, bottom = (float(edge) for edge in box)
        except (TypeError, ValueError) as error:
            raise ExplainError(f"a box is (left, top, right, bottom) in pixels; got {box!r}") from error
        # Written so that NaN fails too.
        if not (left < right and top < bottom and math.isfinite(right - left) and math.isfinite(bottom - top)):
            raise ExplainError(f"a box is (left, top, right, bottom) with left < right and top < bottom; got {box!r}")
        rows = slice(max(0, math.floor(top)), min(height, math.ceil(bottom)))
        cols = slice(max(0, math.floor(left)), min(width, math.ceil(right)))
        if rows.start >= rows.stop or cols.start >= cols.stop:
            raise ExplainError(f"the box {box!r} lies outside the image of {width} × {height} pixels")
        mask[rows, cols] = True
    return mask


def pointing_game(heat: Heatmap | np.ndarray, region: Region, *, tolerance: int = 0) -> float:
    """1 when the highest value lies in the region, 0 when not; between, when tied maxima lie on both sides.

    Args:
        heat: The heatmap, or its values ``(row, col)``.
        region: Mask or boxes.
        tolerance: Distance in pixels (a square's half side) by which a maximum may miss the region; 15 is customary on
            photographs (Zhang et al., 2018).

    Returns:
        The probability of a hit; NaN for a constant heatmap, which points nowhere.
    """
    values, inside = _aligned(heat, region)
    if values.max() == values.min():
        return float("nan")
    if tolerance > 0:
        wide = functional.max_pool2d(
            torch.from_numpy(inside)[None, None].float(), 2 * tolerance + 1, stride=1, padding=tolerance
        )
        inside = wide[0, 0].numpy() > 0
    return float(inside[values >= values.max() * (1 - 1e-6)].mean())


def energy_in_region(heat: Heatmap | np.ndarray, region: Region) -> float:
    """Share of the heatmap's sum that lies in the region, 0 to 1; NaN for a heatmap of zeros."""
    values, inside = _aligned(heat, region)
    total = float(values.sum())
    return float(values[inside].sum()) / total if total > 0 else float("nan")


def iou(heat: Heatmap | np.ndarray, region: Region) -> float:
    """Intersection over union of the region and as many of the highest pixels as the region has; NaN for no region."""
    values, inside = _aligned(heat, region)
    wanted = int(inside.sum())
    if wanted == 0:
        return float("nan")
    threshold = np.partition(values.reshape(-1), -wanted)[-wanted]
    above, tied = values > threshold, values == threshold
    # Of the tied pixels a random subset fills up the area; its expected part inside is its share inside.
    hits = (inside & above).sum() + (wanted - above.sum()) * inside[tied].mean()
    return float(hits / (2 * wanted - hits))


def soft_iou(heat: Heatmap | np.ndarray, region: Region) -> float:
    """Intersection over union without a threshold: Σ min(h, g) / Σ max(h, g) over pixels (Ruzicka similarity).

    The heatmap h is divided by its highest value first, so that its scale does not count; g is 1 in the region. On maps
    of zeros and ones this is the ordinary IoU. ``human_agreement`` has it for two graded maps.

    Returns:
        0 to 1; NaN for no region, or a heatmap of zeros.
    """
    values, inside = _aligned(heat, region)
    if values.max() <= 0 or not inside.any():
        return float("nan")
    values, target = values / values.max(), inside.astype(np.float64)
    return float(np.minimum(values, target).sum() / np.maximum(values, target).sum())


def average_precision(heat: Heatmap | np.ndarray, region: Region) -> float:
    """Pixel-wise average precision: how well the values tell pixels of the region from the others.

    AP = Σ_n (R_n − R_{n−1}) P_n, with precision P_n and recall R_n of "value ≥ t_n" at every distinct value t_n,
    descending; no interpolation, and tied pixels enter together (as scikit-learn's ``average_precision_score``). A
    constant heatmap gives the region's share of the image.

    Returns:
        0 to 1; NaN for no region.
    """
    values, inside = _aligned(heat, region)
    total = int(inside.sum())
    if total == 0:
        return float("nan")
    order = np.argsort(-values, axis=None, kind="stable")
    ranked = values.reshape(-1)[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(ranked)), ranked.size - 1)
    hits = np.cumsum(inside.reshape(-1)[order])[last_of_tie]
    precision, recall = hits / (last_of_tie + 1), hits / total
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _aligned(heat: Heatmap | np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(heat, Heatmap) and heat.values is None:
        raise ExplainError(f"this heatmap has no values: {heat.reason}")
    inside = _mask(heat, region)
    if isinstance(heat, Heatmap):
        width, height = heat.image_size
        # A region of the image's own proportions, give or take the rounding of a resize.
        if abs(inside.shape[0] * width - inside.shape[1] * height) > max(width, height, *inside.shape):
            raise ExplainError(f"the region {inside.shape} is not of the image's proportions {(height, width)}")
        grid = np.asarray(heat.values)
    else:
        grid = np.asarray(heat, dtype=np.float32)
    if inside.ndim != 2 or grid.ndim != 2:
        raise ExplainError(f"heatmap and region are (row, col); got {grid.shape} and {inside.shape}")
    return (grid if grid.shape == inside.shape else resample(grid, inside.shape)).astype(np.float64), inside


def _mask(heat: Heatmap | np.ndarray, region: Region) -> np.ndarray:
    if isinstance(region, (list, tuple)):
        if not isinstance(heat, Heatmap):
            raise ExplainError(
                "boxes are in pixels of the image, whose size a bare array does not tell: give the Heatmap, or a "
                "mask, boxes_to_mask(boxes, (width, height))"
            )
        single = len(region) == 4 and all(np.ndim(edge) == 0 for edge in region)
        return boxes_to_mask([region] if single else region, heat.image_size)  # type: ignore[list-item]
    mask = np.asarray(region)
    if mask.ndim == 2 and mask.shape[1] == 4 and mask.dtype != bool and mask.max(initial=0) > 1:
        raise ExplainError(
            f"an array is a mask, and one of {mask.shape} with values up to {mask.max()} looks like boxes: give boxes "
            f"as a list (boxes.tolist()), a mask as bools"
        )
    return mask.astype(bool)
