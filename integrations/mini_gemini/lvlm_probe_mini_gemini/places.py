"""Where image tokens lie in the picture. The crops are cut inside the model, so the rule is stated here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lvlm_probe.models.families import Places
    from lvlm_probe.replaying import Replay

__all__ = ["square_boxes", "token_boxes"]


def square_boxes(side: int, grid: int, whole: bool) -> np.ndarray:
    """Boxes of one picture's tokens on its padded square, as shares of its side.

    Args:
        side: tokens along one side of a view.
        grid: crops along one side of the square.
        whole: the whole square is the first view.

    Returns:
        ``(token, 4)`` float64, ``x0, y0, x1, y1`` in 0..1, in the order of the model's tokens.
    """
    row, col = (part.reshape(-1) for part in np.indices((side, side)))
    cell = np.stack([col, row, col + 1, row + 1], axis=1) / side
    crop = [(cell + np.asarray([left, top, left, top])) / grid for top in range(grid) for left in range(grid)]
    return np.concatenate([cell, *crop] if whole else crop)


def token_boxes(replay: Replay, positions: np.ndarray) -> Places | None:
    """Places of the image tokens at ``positions`` of the prompt, see ``lvlm_probe.models.families.TokenBoxes``.

    The padded square is laid back over the picture; a token in its padding has no place. Whether the answer was given
    with all views or with one (``aux``) shows in the number of tokens. ``None``: it fits neither.
    """
    from lvlm_probe.models.families import Places

    config: Any = replay.model.config
    sizes = replay.image_sizes
    per_picture, rest = divmod(len(positions), len(sizes))
    if rest or not sizes:
        return None
    if per_picture == config.image_tokens("full"):
        shares = square_boxes(config.grid_side, config.image_grid, config.image_global)
    elif per_picture == config.image_tokens("none"):
        shares = square_boxes(config.grid_side, 1, False)
    else:
        return None
    boxes, images = [], []
    for picture, (width, height) in enumerate(sizes):
        side = max(width, height)
        box = shares * side - np.tile([(side - width) // 2, (side - height) // 2], 2)
        box = box.clip(0, np.tile([width, height], 2))
        seen = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])
        boxes.append(np.where(seen[:, None], box, 0.0))
        images.append(np.where(seen, picture, -1))
    return Places(np.concatenate(boxes).astype(np.float32), np.concatenate(images).astype(np.int64))
