"""How alike are two heatmaps of one image? Rank correlation, structural similarity, difference, overlap at the top.

Cells that either map does not see are left out: both are 0 there, and would agree for no reason.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.scores import whole_rule
from lvlm_probe.extras import require
from lvlm_probe.files import record_of
from lvlm_probe.heatmap import HeatGrid, resample
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.trace.clips import images_of

TOP_SHARE = 0.2
"""Share of the cells that counts as the top of a map."""

_SSIM_WINDOW = 7


@dataclass(frozen=True)
class Similarity:
    """Likeness of two heatmaps.

    Attributes:
        rank_correlation: Spearman's ρ over cells, −1 to 1, ties by average ranks; NaN where a map is constant.
        absolute_rank_correlation: |ρ|, as Adebayo et al. (2018) report it too: a map turned upside down is as similar.
        ssim: Structural similarity (Wang et al., 2004), both maps scaled to a maximum of 1, 7 × 7 windows, of a video
            step by step; ``None`` without scikit-image or on fewer than 7 cells a side.
        difference: Mean absolute difference, both maps scaled to a maximum of 1; 0 to 1.
        top_iou: Intersection over union of the two maps' highest fifths; cells tied at the border
            share the places that are left.
    """

    rank_correlation: float
    absolute_rank_correlation: float
    ssim: float | None
    difference: float
    top_iou: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready, NaN as ``None``."""
        return record_of(self)


@naming_arguments
def compare_maps(first: HeatGrid, second: HeatGrid) -> Similarity:
    """Compares two heatmaps of one image, or of one video, on the first one's grid; needs scipy.

    Raises:
        ExplainError: One has no values, or they are of images of different size, or of different videos.
        ProbeError: scipy is missing.
    """
    for heat in (first, second):
        if heat.values is None:
            raise ExplainError(f"there is nothing to compare: a heatmap has no values, because {heat.reason}")
    if tuple(first.image_size) != tuple(second.image_size):
        raise ExplainError(
            f"heatmaps of one image are compared; these are of images of {tuple(first.image_size)} and "
            f"{tuple(second.image_size)} pixels"
        )
    if first.axes != second.axes or len(images_of(first.target)) != len(images_of(second.target)):
        raise ExplainError(
            "heatmaps of one video are compared; these are of different ones, or one is of an image: of a video give "
            "one frame, heat.frame(3)"
        )
    assert first.values is not None and first.seen is not None and second.seen is not None
    left = np.asarray(first.values, dtype=np.float64)
    right = on_grid(np.asarray(second.values), left.shape)
    seen = first.seen & (on_grid(second.seen.astype(np.float32), left.shape) > 0)
    if not seen.any():
        raise ExplainError("there is nothing to compare: no cell is seen in both heatmaps")
    rho = spearman(left[seen], right[seen])
    scaled = [np.where(seen, values / max(float(values.max()), 1e-12), 0.0) for values in (left, right)]
    return Similarity(
        rank_correlation=rho,
        absolute_rank_correlation=abs(rho),
        ssim=_ssim(scaled[0], scaled[1], seen),
        difference=float(np.abs(scaled[0] - scaled[1])[seen].mean()),
        top_iou=_top_iou(left[seen], right[seen]),
    )


def grid_of(grid: int | Sequence[int]) -> tuple[int, int]:
    """A grid given as a number of cells or as ``(rows, columns)``. Raises ``ExplainError``."""
    pair = tuple(grid) if isinstance(grid, Iterable) else (grid, grid)
    if len(pair) != 2 or not all(whole_rule(edge)[1] for edge in pair):
        raise ExplainError(f"grid is a number of cells or (rows, columns), both at least 1; got {grid!r}")
    return int(pair[0]), int(pair[1])


def on_grid(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Brings a map to ``(row, col)`` or ``(t, row, col)`` = ``shape``, float64: linear up, average down, each axis for
    itself."""
    values = np.asarray(values, dtype=np.float32)
    if values.ndim == 3:
        flat = values.reshape(len(values), -1)
        steps = on_grid(flat, (shape[0], flat.shape[1])).reshape(shape[0], *values.shape[1:])
        return np.stack([on_grid(step, shape[1:]) for step in steps])
    rows, cols = shape
    if values.shape != shape:
        values = resample(resample(values, (rows, values.shape[1])), (rows, cols))
    return values.astype(np.float64)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two equally long vectors, by scipy; NaN where one is constant."""
    stats = require("scipy.stats", extra="stats", purpose="a rank correlation")
    # scipy warns of constant input, which here is a result.
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(stats.spearmanr(first, second).statistic)


def _ssim(first: np.ndarray, second: np.ndarray, seen: np.ndarray) -> float | None:
    if min(first.shape[-2:]) < _SSIM_WINDOW or importlib.util.find_spec("skimage") is None:
        return None
    metrics: Any = require("skimage.metrics", extra="superpixels", purpose="structural similarity")
    local = np.empty_like(first)
    for step in np.ndindex(first.shape[:-2]):  # of a video each by itself
        _, local[step] = metrics.structural_similarity(
            first[step], second[step], win_size=_SSIM_WINDOW, data_range=1.0, full=True
        )
    return float(local[seen].mean())


def _top_iou(first: np.ndarray, second: np.ndarray) -> float:
    wanted = max(1, round(TOP_SHARE * first.size))
    left, right = _membership(first, wanted), _membership(second, wanted)
    return float(np.minimum(left, right).sum() / np.maximum(left, right).sum())


def _membership(values: np.ndarray, wanted: int) -> np.ndarray:
    """Probability of each cell to be among the ``wanted`` highest when ties are broken at random."""
    threshold = np.partition(values, -wanted)[-wanted]
    above, tied = values > threshold, values == threshold
    return above + tied * (wanted - above.sum()) / tied.sum()
