"""Does a heatmap point at a region that is known? Pointing game, energy in region, IoU at equal area.

The heatmap is brought bilinearly to the region's own pixels first (``heatmap.resample``, as masks are), so the region
``(row, col)`` bool decides the resolution. Ties count by expectation: the result is what breaking them at random gives
on average. None of these needs a model; none says what the model used, only where the heatmap points.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from lvlm_probe.errors import ExplainError
from lvlm_probe.heatmap import Heatmap, resample

__all__ = ["energy_in_region", "iou", "pointing_game"]


def pointing_game(heat: Heatmap | np.ndarray, region: np.ndarray, *, tolerance: int = 0) -> float:
    """1 when the highest value lies in the region, 0 when not; between, when tied maxima lie on both sides.

    Args:
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


def energy_in_region(heat: Heatmap | np.ndarray, region: np.ndarray) -> float:
    """Share of the heatmap's sum that lies in the region, 0 to 1; NaN for a heatmap of zeros."""
    values, inside = _aligned(heat, region)
    total = float(values.sum())
    return float(values[inside].sum()) / total if total > 0 else float("nan")


def iou(heat: Heatmap | np.ndarray, region: np.ndarray) -> float:
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


def _aligned(heat: Heatmap | np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.asarray(region, dtype=bool)
    if isinstance(heat, Heatmap):
        if heat.values is None:
            raise ExplainError(f"this heatmap has no values: {heat.reason}")
        width, height = heat.image_size
        # A region of the picture's own proportions, give or take the rounding of a resize.
        if abs(inside.shape[0] * width - inside.shape[1] * height) > max(width, height, *inside.shape):
            raise ExplainError(f"the region {inside.shape} is not of the picture's proportions {(height, width)}")
        grid = heat.values
    else:
        grid = np.asarray(heat, dtype=np.float32)
    if inside.ndim != 2 or grid.ndim != 2:
        raise ExplainError(f"heatmap and region are (row, col); got {grid.shape} and {inside.shape}")
    return (grid if grid.shape == inside.shape else resample(grid, inside.shape)).astype(np.float64), inside
