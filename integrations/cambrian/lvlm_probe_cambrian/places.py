"""Where each image token of a Cambrian model lies in the picture, for ``lvlm_probe``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lvlm_probe.models.families import Places
from lvlm_probe_cambrian.padding import content_box

__all__ = ["grid_places", "token_boxes"]


def grid_places(grid: int, sizes: Sequence[tuple[int, int]]) -> Places:
    """Places of the image tokens of pictures, one picture after the other.

    Token (r, c) stands for cell (r, c) of a ``grid × grid`` over the padded square, cut to the picture. Newlines have
    no pixels, and neither has a cell that rounding has left wholly in the margin.

    Args:
        sizes: ``(width, height)`` of each picture, pixels.
    """
    boxes, images = [], []
    for image, (width, height) in enumerate(sizes):
        box = content_box(grid, (width, height))
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        cell = side / grid
        for row in range(box.top, box.bottom):
            for col in range(box.left, box.right):
                x, y = col * cell - left, row * cell - top
                found = max(x, 0.0), max(y, 0.0), min(x + cell, width), min(y + cell, height)
                inside = found[2] > found[0] and found[3] > found[1]
                boxes.append(found if inside else (0.0, 0.0, 0.0, 0.0))
                images.append(image if inside else -1)
            boxes.append((0.0, 0.0, 0.0, 0.0))
            images.append(-1)
    return Places(np.array(boxes, np.float32).reshape(-1, 4), np.array(images, np.int64))


def token_boxes(replay: Any, positions: np.ndarray) -> Places | None:
    """As ``lvlm_probe.models.families.TokenBoxes``. ``None`` where the prompt has another number of image tokens."""
    places = grid_places(replay.model.config.image_grid, replay.image_sizes)
    return places if len(places.images) == len(positions) else None
