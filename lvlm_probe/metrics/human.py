"""Do heatmaps look where people look? (Paper, A.2.) Soft IoU, rank correlation, AUC-Judd, NSS.

Human attention comes as a graded map of any resolution (VQA-HAT: where annotators sharpened a blurred image), or as
fixations, a mask of the pixels that were looked at. All maps are high = important, and those of a ``Heatmap`` always
are; a raw iGOS++ mask is low = important, and correlating that with human maps turns the sign of ρ.

**Grid.** Soft IoU and rank correlation are taken on one common grid over the image, 14 × 14 unless told otherwise, as
VQA-HAT was published with (Das et al., 2016); finer maps are averaged over its cells, coarser ones interpolated. The
paper names no grid, and both numbers depend on it. AUC-Judd and NSS are taken on the pixels of the human map.

**Error.** Neighbouring cells of a map move together, so an error of ρ computed over the cells of one image (Fisher's
1/√(n − 3)) would be far too small. The error to give is that of the mean over images, s/√n (``mean_and_error``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm_probe.errors import ExplainError
from lvlm_probe.files import record_of
from lvlm_probe.heatmap import HeatGrid, Heatmap
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics.similarity import grid_of, on_grid, spearman

Map = Heatmap | np.ndarray

GRID = 14


@dataclass(frozen=True)
class HumanAgreement:
    """Agreement of one heatmap with one human attention map.

    Attributes:
        soft_iou: Σ min / Σ max of the two maps, each divided by its highest value, on ``grid``; 0 to 1.
        rank_correlation: Spearman's ρ over the cells of ``grid``.
        auc_judd: Area under the ROC curve of telling fixated pixels from the others.
        nss: Mean of the standardised heatmap over fixated pixels, in standard deviations.
        grid: ``(row, col)`` of the first two.
        fixated: Share of the pixels that counted as fixated.
    """

    soft_iou: float
    rank_correlation: float
    auc_judd: float
    nss: float
    grid: tuple[int, int]
    fixated: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, NaN as ``None``."""
        return record_of(self)


@naming_arguments
def human_agreement(
    heat: Map,
    human: np.ndarray,
    *,
    fixations: np.ndarray | None = None,
    share: float = 0.2,
    grid: int | tuple[int, int] = GRID,
) -> HumanAgreement:
    """Compares a heatmap with a human attention map by all four measures; needs scipy.

    Over many images, ``mean_and_error([item.rank_correlation for item in …])`` gives the figure with its error.

    Args:
        heat: The heatmap, or its values ``(row, col)``.
        human: Human attention ``(row, col)`` over the whole image, at any resolution and scale, not negative.
        fixations: ``(row, col)`` bool, pixels that were looked at; by default the highest ``share`` of ``human``, as a
            graded map has none.
        share: See ``fixations``.
        grid: Cells ``n`` or ``(rows, columns)`` on which soft IoU and rank correlation are taken.

    Raises:
        ExplainError: A map is not ``(row, col)``, negative, not finite, of other proportions, or without values.
        ProbeError: scipy is missing.
    """
    values, target, cells = _both(heat, human, grid)
    looked_at = _top(_checked(human, "human attention"), share) if fixations is None else fixations
    return HumanAgreement(
        soft_iou=_soft_iou(values, target),
        rank_correlation=spearman(values.reshape(-1), target.reshape(-1)),
        auc_judd=auc_judd(heat, looked_at),
        nss=nss(heat, looked_at),
        grid=cells,
        fixated=float(np.mean(looked_at)),
    )


@naming_arguments
def rank_correlation(heat: Map, human: np.ndarray, *, grid: int | tuple[int, int] = GRID) -> float:
    """Spearman's ρ between two maps of one image over the cells of a common grid (Das et al., 2016); needs scipy.

    Returns:
        −1 to 1, ties by average ranks; NaN where a map is constant. It has no error of its own: see the module.
    """
    values, target, _ = _both(heat, human, grid)
    return spearman(values.reshape(-1), target.reshape(-1))


@naming_arguments
def auc_judd(heat: Map, fixations: np.ndarray) -> float:
    """AUC of Judd et al. (2009): how well the heatmap tells fixated pixels from all others; ½ is chance.

    Thresholds are the heatmap's values at fixated pixels. Between them the curve of hit rate (share of fixated pixels
    at or above) against false-alarm rate (share of the others) is straight, from (0, 0) to (1, 1). Pixels of equal
    value pass together, where the original breaks ties by adding a little noise.

    Args:
        heat: The heatmap, or its values ``(row, col)``; brought to the resolution of ``fixations``.
        fixations: ``(row, col)`` bool.

    Returns:
        0 to 1; NaN when no pixel is fixated, or every one.
    """
    values, looked_at = _on_fixations(heat, fixations)
    hits, others = np.sort(values[looked_at]), np.sort(values[~looked_at])
    if hits.size == 0 or others.size == 0:
        return math.nan
    thresholds = np.unique(hits)[::-1]
    hit_rate = 1 - np.searchsorted(hits, thresholds, side="left") / hits.size
    false_alarms = 1 - np.searchsorted(others, thresholds, side="left") / others.size
    x, y = np.concatenate([[0.0], false_alarms, [1.0]]), np.concatenate([[0.0], hit_rate, [1.0]])
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


@naming_arguments
def nss(heat: Map, fixations: np.ndarray) -> float:
    """Normalised scanpath saliency (Peters et al., 2005): mean of the standardised heatmap over fixated pixels.

    Standardised to mean 0 and standard deviation 1 (of the population) over all pixels; 0 is chance.

    Args:
        heat, fixations: As for ``auc_judd``.

    Returns:
        Standard deviations; NaN when no pixel is fixated or the heatmap is constant.
    """
    values, looked_at = _on_fixations(heat, fixations)
    if not looked_at.any() or np.ptp(values) == 0:
        return math.nan
    return float((values[looked_at].mean() - values.mean()) / values.std())


def _soft_iou(first: np.ndarray, second: np.ndarray) -> float:
    if first.max() <= 0 or second.max() <= 0:
        return math.nan
    left, right = first / first.max(), second / second.max()
    return float(np.minimum(left, right).sum() / np.maximum(left, right).sum())


def _top(human: np.ndarray, share: float) -> np.ndarray:
    if not 0 < share < 1:
        raise ExplainError(f"share of fixated pixels is between 0 and 1, both exclusive; got {share!r}")
    threshold = np.quantile(human, 1 - share)
    # On a map that is 0 nearly everywhere the threshold is 0, and its zeros are not fixated.
    return human >= threshold if threshold > 0 else human > 0


def _both(heat: Map, human: np.ndarray, grid: int | tuple[int, int]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    cells = grid_of(grid)
    values, target = _values(heat), _checked(human, "human attention")
    _same_proportions(heat, target.shape)
    return on_grid(values, cells), on_grid(target, cells), cells


def _on_fixations(heat: Map, fixations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    looked_at = np.asarray(fixations)
    if looked_at.ndim != 2 or looked_at.dtype != bool:
        raise ExplainError(
            f"fixations are a mask (row, col) of bools; got {looked_at.dtype} of shape {looked_at.shape}. A graded map "
            f"becomes one by a threshold; human_agreement(heat, map) takes its highest fifth"
        )
    _same_proportions(heat, looked_at.shape)
    return on_grid(_values(heat), (looked_at.shape[0], looked_at.shape[1])), looked_at


def _values(heat: Map) -> np.ndarray:
    if isinstance(heat, Heatmap):
        return np.asarray(heat.known_values(), dtype=np.float64)
    if isinstance(heat, HeatGrid):
        raise ExplainError("human attention is compared with heatmaps of images: give one frame, heat.frame(3)")
    return _checked(heat, "a heatmap")


def _checked(values: np.ndarray, name: str) -> np.ndarray:
    """As float64, scaled to a maximum of 1: none of the measures looks at scale, and resampling stays within [0, 1]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all() or array.min() < 0:
        raise ExplainError(f"{name} is (row, col), finite and not negative; got shape {array.shape}")
    return array / array.max() if array.max() > 0 else array


def _same_proportions(heat: Map, shape: Sequence[int]) -> None:
    if not isinstance(heat, Heatmap):
        return
    width, height = heat.image_size
    rows, cols = shape
    # Human maps are often kept on a square grid whatever the image; anything else has the image's proportions.
    if rows != cols and abs(rows * width - cols * height) > max(width, height, rows, cols):
        raise ExplainError(f"the human map {(rows, cols)} is not of the image's proportions {(height, width)}")
