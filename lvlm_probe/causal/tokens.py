"""Which image tokens lie under the hot area of a heatmap, and which positions of the answer look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lvlm_probe.boxes.image_tokens import ImageTokens, image_tokens
from lvlm_probe.boxes.painting import shared_with_cells
from lvlm_probe.errors import ExplainError
from lvlm_probe.images import PixelPath
from lvlm_probe.kinds import naming_arguments

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace.clips import Clip

Queries = Literal["tokens", "answer", "text"]


def placed_tokens(replay: Replay, target: int | Clip) -> ImageTokens:
    """The image tokens of an image, by its number, or of a clip that stand for a part of it.

    Raises:
        ExplainError: the prompt holds no image tokens, or nobody knows where they belong in the image.
    """
    layout = replay.trace.layout  # type: ignore[union-attr]
    if isinstance(target, int) and not 0 <= target < replay.n_images:
        raise ExplainError(f"image={target}, but the prompt has {replay.n_images} image(s), counted from 0")
    if len(layout.image_positions) == 0:
        raise ExplainError(
            f"the prompt of {type(replay.model).__name__} holds no image tokens (the image comes in another way, by "
            f"cross-attention for example), so there is nothing to cut or to patch"
        )
    if isinstance(replay.path, PixelPath):
        raise ExplainError(
            "without the processor a heatmap lies over the model's pixel inputs, and image tokens over the image: "
            "replay(trace, model, processor), with the processor attached when it prepared the inputs"
        )
    found = image_tokens(replay, target).placed
    if len(found) == 0:
        what = f"image {target}" if isinstance(target, int) else "the video"
        raise ExplainError(f"no image token stands for a part of {what}")
    return found


@naming_arguments
def token_heat(values: np.ndarray, boxes: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Mean heat of each token's box or tube, cells weighted by the area, and time, that they share with it.

    Args:
        values: ``(row, col)`` over the whole image, or ``(t, row, col)`` over the whole clip.
        boxes: ``(image_token, 4)`` ``x0, y0, x1, y1`` in pixels, each of some area; of a clip ``(image_token, 6)``
            tubes, ``x0, y0, t0, x1, y1, t1``, times in frames.
        size: ``(width, height)`` of the image, pixels, or ``(width, height, frames)``.

    Returns:
        ``(image_token,)`` float64.
    """
    low, high = np.split(boxes.astype(np.float64), 2, axis=1)
    axes = zip(low.T, high.T, size, values.shape[::-1], strict=True)
    across, down, *later = (_shared(*axis) for axis in axes)
    steps = np.asarray(values, dtype=np.float64).reshape(-1, *values.shape[-2:])
    when = later[0] if later else np.ones((len(boxes), 1))
    heat: np.ndarray = np.einsum("ts,tr,src,tc->t", when, down, steps, across, optimize=True)
    return heat


def _shared(low: np.ndarray, high: np.ndarray, size: int, cells: int) -> np.ndarray:
    """Share of each interval that falls into each of ``cells`` equal parts of ``[0, size]``, ``(interval, cell)``."""
    overlap = shared_with_cells(low, high, size, cells)
    shares: np.ndarray = overlap / overlap.sum(axis=1, keepdims=True)
    return shares


def query_positions(replay: Replay, selection: TokenSelection, queries: Queries | Sequence[int]) -> np.ndarray:
    """Positions in the teacher-forced sequence that a knockout makes blind, ascending.

    Args:
        queries: ``"tokens"``: those that predict the explained tokens; ``"answer"``: those that predict any token of
            the answer up to the last explained one; ``"text"``: all text after the first image token up to there, the
            question included; or positions.

    Raises:
        ExplainError: a position is outside the sequence, or an image token's.
    """
    # The position that predicts answer token t; what comes after the last explained token cannot matter to it.
    predict = replay.prompt_length - 1 + np.asarray(sorted(selection.indices))
    images = replay.trace.layout.image_positions  # type: ignore[union-attr]
    if queries == "tokens":
        return predict
    if queries == "answer":
        return np.arange(replay.prompt_length - 1, predict[-1] + 1)
    if queries == "text":
        return np.setdiff1d(np.arange(images.min() + 1, predict[-1] + 1), images)
    if isinstance(queries, str):
        raise ExplainError(f"queries is 'tokens', 'answer', 'text' or a sequence of positions; got {queries!r}")
    chosen = np.unique(np.asarray(queries, dtype=np.int64))
    last = replay.length - 1
    if chosen.size == 0 or chosen[0] < 0 or chosen[-1] > last or np.isin(chosen, images).any():
        raise ExplainError(f"query positions are text positions from 0 to {last}; got {list(queries)[:8]}")
    return chosen
