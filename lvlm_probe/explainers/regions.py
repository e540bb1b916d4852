"""From values per token to a heatmap on the picture: where image tokens and encoder tokens are, and how they are drawn.

Every method that looks inside the model ends with one number per token. ``paint`` lays them on a grid over the original
picture, each cell the area-weighted mean of the tokens whose boxes it meets, so that merged patches, windows, tiles and
crops all come back to the pixels they were cut from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lvlm_probe.boxes.image_tokens import token_places
from lvlm_probe.boxes.painting import shared_with_cells
from lvlm_probe.errors import ExplainError, ImageError
from lvlm_probe.images import PixelPath

if TYPE_CHECKING:
    from lvlm_probe.explainers.registry import Outcome, Problem

__all__ = ["ImageTokens", "finish", "image_tokens", "paint", "pitch"]


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one picture in the prompt.

    Attributes:
        positions: ``(token,)`` int64, places in the prompt; of cross-attention, places among its keys.
        boxes: ``(token, 4)`` float32, ``x0, y0, x1, y1`` in pixels of the original picture; an empty box (all 0) for a
            token that stands for no pixel.
        size: ``(width, height)`` of the picture.
        cross: they are the keys of cross-attention.
    """

    positions: torch.Tensor
    boxes: np.ndarray
    size: tuple[int, int]
    cross: bool = False


def image_tokens(problem: Problem, *, cross: bool = False) -> ImageTokens:
    """The image tokens of the problem's picture, as recorded or, failing that, traced now.

    Args:
        cross: where the prompt holds none, the keys of cross-attention will do.

    Raises:
        ExplainError: The prompt has no image tokens, or which part of the picture each stands for is not known.
    """
    layout = problem.trace.layout
    if len(layout.image_positions) == 0:
        if cross:
            return _cross_keys(problem)
        raise ExplainError(
            "the prompt holds no image tokens (the picture reaches this model another way, by cross-attention for "
            "instance), so nothing can be drawn per token; use a method that works through masks, like 'igos++'"
        )
    boxes = layout.patch_box
    if problem.live and isinstance(problem.replay.path, PixelPath):
        boxes = None  # without a processor the replay's picture is its pixel inputs, not the one that boxes refer to
    if boxes is None and problem.live:
        try:
            boxes = token_places(problem.replay, layout.image_positions).boxes
        except ImageError as error:
            raise ExplainError(
                f"which part of the picture each image token stands for is not known ({error}); use a method that "
                f"works through masks, like 'igos++' or 'integrated_gradients'"
            ) from error
    if boxes is None:
        raise ExplainError(
            "this trace holds no boxes of its image tokens (recorded with boxes=False, or a layout that is not "
            "known); explain a replay instead of the trace: probe.replay(trace, model, processor)"
        )
    mine = layout.image_index == problem.image
    return ImageTokens(
        torch.from_numpy(np.asarray(layout.image_positions)[mine].astype(np.int64)),
        np.asarray(boxes, dtype=np.float32)[mine],
        problem.replay.image_sizes[problem.image],
    )


def _cross_keys(problem: Problem) -> ImageTokens:
    rows = getattr(problem.trace, "attention", None)
    boxes, images = (None, None) if rows is None else (rows.key_box, rows.key_image)
    if problem.live and (boxes is None or isinstance(problem.replay.path, PixelPath)):
        try:
            places = token_places(problem.replay, problem.trace.layout.image_positions)
        except ImageError as error:
            raise ExplainError(
                f"the prompt holds no image tokens, and which part of the picture each key of cross-attention stands "
                f"for is not known ({error}); use a method that works through masks, like 'igos++'"
            ) from error
        boxes, images = places.boxes, places.images
    if boxes is None or images is None:
        raise ExplainError(
            "the prompt holds no image tokens, and this trace holds no boxes of cross-attention's keys; explain a "
            "replay instead of the trace: probe.replay(trace, model, processor)"
        )
    mine = np.flatnonzero(images == problem.image)
    size = problem.replay.image_sizes[problem.image]
    return ImageTokens(torch.from_numpy(mine), np.asarray(boxes, dtype=np.float32)[mine], size, cross=True)


def pitch(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """The grid ``(row, col)`` over a picture of ``size = (width, height)`` with cells as large as a token's box."""
    extent = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    if len(extent) == 0:
        raise ExplainError("none of the tokens stands for a part of the picture")
    wide, high = np.median(extent[:, 2] - extent[:, 0]), np.median(extent[:, 3] - extent[:, 1])
    return max(1, round(size[1] / float(high))), max(1, round(size[0] / float(wide)))


def paint(
    values: torch.Tensor, boxes: np.ndarray, size: tuple[int, int], shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay one value per token on a grid over the picture.

    Args:
        values: ``(token,)``.
        boxes: ``(token, 4)``, ``x0, y0, x1, y1`` in pixels.
        size: ``(width, height)`` of the picture.
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
    total = torch.einsum("n,nr,nc->rc", values.detach().double().cpu(), down, across)
    met = area > 1e-9 * max(size)
    return torch.where(met, total / area.clamp(min=1e-12), 0.0), met


def finish(
    grid: torch.Tensor,
    met: torch.Tensor,
    params: Mapping[str, object],
    *,
    diagnostics: Mapping[str, object] | None = None,
) -> Outcome:
    """An outcome from a painted grid: scaled from its smallest to its largest value, 0 where no token is.

    Raises:
        ExplainError: Values are not finite.
    """
    from lvlm_probe.explainers.registry import Outcome

    if not bool(torch.isfinite(grid).all()):
        raise ExplainError("the method gave values that are not finite; replay on a model in float32")
    low, high = float(grid[met].min()), float(grid[met].max())
    if high <= low:
        return Outcome(None, params, reason="the method gives every region of the picture the same value")
    scaled = torch.where(met, (grid - low) / (high - low), 0.0)
    return Outcome(scaled.clamp(0, 1), params, diagnostics=diagnostics or {})
