"""Does a heatmap point at a region that is known, and at a time? Pointing game, energy, IoU, average precision.

A region is a mask, an array ``(row, col)`` of bools, or boxes, a *list* of ``(left, top, right, bottom)`` in pixels of
the image. The heatmap is brought bilinearly to the region's own pixels first (``heatmap.resample``, as masks are), so
the region decides the resolution. Ties count by expectation (pointing game, IoU: what breaking them at random gives on
average) or enter together (average precision). None of these needs a model; none says what the model used, only where
the heatmap points.

**Of a video** the truth is a tube, a region in each frame: a mask ``(frame, row, col)``, or boxes by frame, ``{4:
[box], 5: [box]}``, the frames counted from the clip's first; or frames alone, ``range(4, 6)``. The heatmap's steps
are brought to the frames as masks are. ``tube_pointing``, ``tube_energy`` and ``tube_iou`` are the pointing game,
energy and IoU over time and space; ``temporal_pointing`` and ``temporal_iou`` judge the mean of the heatmap in each
frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from lvlm_probe.errors import ExplainError
from lvlm_probe.explainers.scores import check_rules, whole_rule
from lvlm_probe.heatmap import HeatGrid, Heatmap, resample
from lvlm_probe.kinds import naming_arguments

Boxes = Sequence[Sequence[float]]
BoxesByFrame = Mapping[int, Boxes]
Region = np.ndarray | Boxes
Tube = np.ndarray | BoxesByFrame
Frames = np.ndarray | Sequence[int] | range


class OfVideo(Protocol):
    """The heatmap of a video, as ``probe.video.explain`` returns it."""

    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def by_frame(self) -> np.ndarray: ...
    @property
    def over_time(self) -> np.ndarray: ...


def whole_pixels(box: Sequence[float]) -> tuple[int, int, int, int]:
    """The pixels that a box touches, ``(left, top, right, bottom)``: its edges, moved outward."""
    left, top, right, bottom = box
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)


@naming_arguments
def boxes_to_mask(boxes: Boxes, size: tuple[int, int]) -> np.ndarray:
    """The union of boxes as a mask.

    Args:
        boxes: ``(left, top, right, bottom)`` each, in pixels, right and bottom exclusive. A box with fractions takes
            every pixel it touches; what lies outside the image is cut off.
        size: ``(width, height)`` of the image, pixels.

    Returns:
        ``(row, col)`` bool, ``height × width``.

    Raises:
        ExplainError: A box is not four finite numbers, is empty, or lies outside the image altogether; or they look
            like shares of the image, of which all would be its first pixel.
    """
    check_rules("boxes_to_mask", size=_size_rule(size))
    width, height = size
    edges = np.asarray([edge for box in boxes for edge in (box if np.ndim(box) else ())])
    if edges.dtype.kind == "f" and edges.size and edges.min() >= 0 and edges.max() <= 1 and (edges % 1).any():
        raise ExplainError(
            f"boxes are in pixels of the image, and {boxes[0]!r} looks like shares of it: multiply by its width and "
            f"height, {width} and {height}"
        )
    mask = np.zeros((height, width), dtype=bool)
    for box in boxes:
        try:
            left, top, right, bottom = (float(edge) for edge in box)
        except (TypeError, ValueError) as error:
            raise ExplainError(f"a box is (left, top, right, bottom) in pixels; got {box!r}") from error
        # Written so that NaN fails too.
        if not (left < right and top < bottom and math.isfinite(right - left) and math.isfinite(bottom - top)):
            raise ExplainError(f"a box is (left, top, right, bottom) with left < right and top < bottom; got {box!r}")
        left, top, right, bottom = whole_pixels((left, top, right, bottom))
        rows, cols = slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))
        if rows.start >= rows.stop or cols.start >= cols.stop:
            raise ExplainError(f"the box {box!r} lies outside the image of {width} × {height} pixels")
        mask[rows, cols] = True
    return mask


@naming_arguments
def pointing_game(heat: Heatmap | np.ndarray, region: Region, *, tolerance: int = 0) -> float:
    """1 when the highest value lies in the region, 0 when not; between, when tied maxima lie on both sides.

    Args:
        heat: The heatmap, or its values ``(row, col)``.
        region: Mask or boxes.
        tolerance: Distance in pixels (a square's half side) by which a maximum may miss the region; 15 is customary on
            photographs (Zhang et al., 2018).

    Returns:
        The probability of a hit; NaN for a constant heatmap, which points nowhere, and for no region.
    """
    values, inside = _aligned(heat, region)
    check_rules("pointing_game", tolerance=whole_rule(tolerance, 0))
    if tolerance > 0:
        side, wide = 2 * tolerance + 1, torch.from_numpy(inside)[None, None].float()
        # A square's maximum is that of its columns' maxima: 2 · side comparisons per pixel instead of side².
        wide = functional.max_pool2d(wide, (side, 1), stride=1, padding=(tolerance, 0))
        wide = functional.max_pool2d(wide, (1, side), stride=1, padding=(0, tolerance))
        inside = wide[0, 0].numpy() > 0
    return _pointing(values, inside)


@naming_arguments
def energy_in_region(heat: Heatmap | np.ndarray, region: Region) -> float:
    """Share of the heatmap's sum that lies in the region, 0 to 1; NaN for a heatmap of zeros.

    Raises ``ExplainError`` for one with values below 0.
    """
    return _energy(*_aligned(heat, region))


@naming_arguments
def iou(heat: Heatmap | np.ndarray, region: Region) -> float:
    """Intersection over union of the region and as many of the highest pixels as the region has; NaN for no region."""
    return _iou(*_aligned(heat, region))


@naming_arguments
def soft_iou(heat: Heatmap | np.ndarray, region: Region) -> float:
    """Intersection over union without a threshold: Σ min(h, g) / Σ max(h, g) over pixels (Ruzicka similarity).

    The heatmap h is divided by its highest value first, so that its scale does not count; g is 1 in the region. On maps
    of zeros and ones this is the ordinary IoU. ``human_agreement`` has it for two graded maps.

    Returns:
        0 to 1; NaN for no region, or a heatmap of zeros.
    """
    values, inside = _aligned(heat, region)
    _not_negative(values)
    if values.max() <= 0 or not inside.any():
        return float("nan")
    values, target = values / values.max(), inside.astype(np.float64)
    return float(np.minimum(values, target).sum() / np.maximum(values, target).sum())


@naming_arguments
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


# ------------------------------------------------------------------------------------------------------------ of videos


@naming_arguments
def tube_mask(boxes: BoxesByFrame, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Boxes by frame as a mask.

    Args:
        boxes: frame, counted from the clip's first → boxes as ``boxes_to_mask`` takes them; frames left out have none.
        frames: of the clip.
        size: ``(width, height)`` of a frame, pixels.

    Returns:
        ``(frame, row, col)`` bool.

    Raises:
        ExplainError: there is no such frame, or as ``boxes_to_mask``.
    """
    check_rules("tube_mask", frames=whole_rule(frames), size=_size_rule(size))
    mask = np.zeros((frames, size[1], size[0]), dtype=bool)
    for frame, region in boxes.items():
        if not (isinstance(frame, (int, np.integer)) and 0 <= frame < frames):
            raise ExplainError(f"frame {frame!r} of a video of {frames} frames, counted from 0")
        mask[frame] = boxes_to_mask(region, size)
    return mask


@naming_arguments
def tube_pointing(heat: OfVideo | np.ndarray, tube: Tube) -> float:
    """1 when the highest value of all frames lies in the tube, 0 when not; between, when tied maxima lie on both sides.

    Args:
        heat: the heatmap of a video, or its values by frame, ``(frame, row, col)``.
        tube: mask, or boxes by frame.

    Returns:
        the probability of a hit; NaN for a constant heatmap, which points nowhere, and for no tube.
    """
    return _pointing(*_aligned_in_time(heat, tube))


@naming_arguments
def tube_energy(heat: OfVideo | np.ndarray, tube: Tube) -> float:
    """Share of the heatmap's sum over all frames that lies in the tube, 0 to 1; NaN for a heatmap of zeros."""
    return _energy(*_aligned_in_time(heat, tube))


@naming_arguments
def tube_iou(heat: OfVideo | np.ndarray, tube: Tube) -> float:
    """Intersection over union of the tube and as many of all frames' highest pixels as it has; NaN for no tube."""
    return _iou(*_aligned_in_time(heat, tube))


@naming_arguments
def temporal_pointing(heat: OfVideo | np.ndarray, frames: Frames) -> float:
    """1 when the frame with the highest mean is one of ``frames``, 0 when not; between, when tied frames are both.

    Args:
        heat: the heatmap of a video, or its curve ``(frame,)``.
        frames: numbers counted from the clip's first, or a mask ``(frame,)`` of bools.

    Returns:
        the probability of a hit; NaN for a heatmap that is the same at all times, and for no frames.
    """
    return _pointing(*_over_time(heat, frames))


@naming_arguments
def temporal_iou(heat: OfVideo | np.ndarray, frames: Frames) -> float:
    """Intersection over union of ``frames`` and as many of the frames with the highest means; NaN for no frames.

    The threshold is the truth's own length, as ``iou`` takes the region's own area: no level has to be chosen, and a
    heatmap gains nothing by being wide. Arguments as for ``temporal_pointing``.
    """
    return _iou(*_over_time(heat, frames))


def _size_rule(size: tuple[int, int]) -> tuple[object, bool, str]:
    return size, len(size) == 2 and all(whole_rule(edge)[1] for edge in size), "(width, height), both at least 1"


def as_mask(given: np.ndarray, name: str = "a region") -> np.ndarray:
    """Bools of an array that stands for a mask: bools already, or zeros and one other value, of any shape.

    Args:
        given: the array.
        name: what the error calls it.

    Raises:
        ExplainError: it is graded, holds labels, is empty or not of finite numbers.
    """
    mask = np.asarray(given)
    if mask.dtype == bool and mask.size:
        return mask
    if not (mask.size and np.issubdtype(mask.dtype, np.number) and np.isfinite(mask).all()):
        raise ExplainError(
            f"{name} as an array is a mask of bools, or of zeros and one other number; got {mask.dtype} "
            f"of shape {mask.shape}"
        )
    inside = mask != 0
    if inside.any() and np.ptp(chosen := mask[inside]):
        raise ExplainError(
            f"{name} as an array is a mask, bools or zeros and one other value; this one has {chosen.min()} to "
            f"{chosen.max()} in it. Say which are inside (mask > 0.5, labels == 3); boxes are given as a list"
        )
    return inside


def _aligned_in_time(heat: OfVideo | np.ndarray, tube: Tube) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(heat, np.ndarray):
        if isinstance(tube, Mapping):
            raise ExplainError(
                "boxes are in pixels of a frame, whose size a bare array does not tell: give the heatmap, or a mask, "
                "tube_mask(boxes, frames, (width, height))"
            )
        values = _finite(heat)
    else:
        values = _of_video(heat).by_frame
    if isinstance(tube, Mapping):
        assert not isinstance(heat, np.ndarray)
        inside = tube_mask(tube, len(values), heat.image_size)
    else:
        inside = as_mask(tube, "a tube")
    if inside.ndim != 3 or values.ndim != 3 or len(inside) != len(values):
        raise ExplainError(
            f"heatmap and tube are (frame, row, col), of as many frames; got {values.shape} and {inside.shape}"
        )
    same = values.shape == inside.shape
    found = values if same else np.stack([resample(np.asarray(each, np.float32), inside.shape[1:]) for each in values])
    return found.astype(np.float64), inside


def _over_time(heat: OfVideo | np.ndarray, frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    curve = _finite(heat) if isinstance(heat, np.ndarray) else _of_video(heat).over_time
    if curve.ndim != 1:
        raise ExplainError(f"a curve over time is (frame,); got shape {curve.shape}")
    given = np.asarray(frames)
    if given.dtype == bool:
        if given.shape != curve.shape:
            raise ExplainError(f"a mask of frames has one bool for each of {len(curve)}; got shape {given.shape}")
        return curve.astype(np.float64), given
    inside = np.zeros(len(curve), dtype=bool)
    wrong = [each for each in given.reshape(-1).tolist() if not (isinstance(each, int) and 0 <= each < len(curve))]
    if wrong:
        raise ExplainError(f"frame {wrong[0]!r} of a video of {len(curve)} frames, counted from 0")
    inside[given.reshape(-1).astype(int)] = True
    return curve.astype(np.float64), inside


def _of_video(heat: OfVideo) -> OfVideo:
    if isinstance(heat, HeatGrid) and heat.axes[0] != "t":
        raise ExplainError(
            "this is a heatmap of an image, which has no time: judge it by pointing_game, energy_in_region or iou"
        )
    return heat


# --------------------------------------------------------------------------------------------------------------- inside


def _pointing(values: np.ndarray, inside: np.ndarray) -> float:
    if values.max() == values.min() or not inside.any():
        return float("nan")
    highest = values.max()
    return float(inside[values >= highest - 1e-6 * abs(highest)].mean())


def _energy(values: np.ndarray, inside: np.ndarray) -> float:
    _not_negative(values)
    total = float(values.sum())
    return float(values[inside].sum()) / total if total > 0 else float("nan")


def _iou(values: np.ndarray, inside: np.ndarray) -> float:
    wanted = int(inside.sum())
    if wanted == 0:
        return float("nan")
    threshold = np.partition(values.reshape(-1), -wanted)[-wanted]
    above, tied = values > threshold, values == threshold
    # Of the tied pixels a random subset fills up the area; its expected part inside is its share inside.
    hits = (inside & above).sum() + (wanted - above.sum()) * inside[tied].mean()
    return float(hits / (2 * wanted - hits))


def _aligned(heat: Heatmap | np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(heat, HeatGrid) and heat.axes[0] == "t":
        raise ExplainError(
            "this is a heatmap of a video: judge it by tube_pointing, tube_energy, tube_iou, temporal_pointing or "
            "temporal_iou, or one frame of it, heat.frame(3)"
        )
    if isinstance(heat, Heatmap):
        heat.known_values()
    inside = _mask(heat, region)
    if isinstance(heat, Heatmap):
        width, height = heat.image_size
        # A region of the image's own proportions, give or take the rounding of a resize.
        if abs(inside.shape[0] * width - inside.shape[1] * height) > max(width, height, *inside.shape):
            raise ExplainError(f"the region {inside.shape} is not of the image's proportions {(height, width)}")
        grid = np.asarray(heat.values)
    else:
        grid = _finite(heat)
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
    return as_mask(mask)


def _finite(heat: np.ndarray) -> np.ndarray:
    """The values of a bare array, float32."""
    values = np.asarray(heat)
    if not (values.size and values.dtype.kind in "biuf" and np.isfinite(values).all()):
        raise ExplainError(f"a heatmap as an array has finite numbers; got {values.dtype} of shape {values.shape}")
    return values.astype(np.float32)


def _not_negative(values: np.ndarray) -> None:
    if values.min() < 0:
        raise ExplainError(
            f"shares of a heatmap are of values that are not negative; got {values.min():.3g}: give its positive part, "
            f"or use pointing_game, iou or average_precision, which look at the order alone"
        )
