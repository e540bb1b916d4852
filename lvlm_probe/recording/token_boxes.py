"""Token boxes of a recorded batch row: what they depend on, and how they enter its record."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.models.families import Places
from lvlm_probe.recording.attention_points import place_keys

if TYPE_CHECKING:
    from lvlm_probe.trace.records import RowCapture

BoxCache = dict[tuple[Any, ...], Places | str]
"""Places of image tokens that are known already, or why they have none; finding out runs the processor and the model's
encoder."""


def in_order(images: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """The image of every token, ``(token,)``: one without pixels (a newline, a mark where an image begins) belongs to
    the image that the prompt says, or goes with the token in front of it.

    Args:
        images: as in ``Places``.
        fallback: by the prompt; it counts where it says of each token with pixels what these do, or none has some.
    """
    placed = np.flatnonzero(images >= 0)
    if np.array_equal(fallback[placed], images[placed]):
        return fallback
    before = np.searchsorted(placed, np.arange(len(images)), side="right") - 1
    result: np.ndarray = images[placed[before.clip(min=0)]].astype(np.int64)
    return result


def place(row: RowCapture, places: Places | str) -> None:
    """Enter places into what is recorded of one batch row: of its image tokens, or else of cross-attention's keys; or
    the reason why there are none.
    """
    if isinstance(places, str):
        row.notes.append(f"no boxes for the image tokens: {places}")
        return
    if len(row.image_positions) == 0:
        place_keys(row, places.boxes, places.images)
        return
    row.patch_box, row.image_index = places.boxes, in_order(places.images, row.image_index)
    if row.clips and places.frames is not None:
        row.patch_frames = np.stack([in_order(each, row.image_index) for each in places.frames.T], axis=1)


def box_key(row: RowCapture) -> tuple[Any, ...]:
    """All that the boxes of a row depend on: the processor with its settings, and the image by its size alone."""
    sizes = tuple((image.width, image.height) for image in row.images)
    shapes = tuple(sorted((name, tuple(value.shape)) for name, value in row.model_kwargs.items()))
    call = row.processor_call or {}
    names = ("class", "structure", "kwargs", "config", "video")
    settings = json.dumps(
        [[call.get(name) for name in names], *((clip.first, clip.frames) for clip in row.clips)], sort_keys=True
    )
    return sizes, shapes, settings, row.image_index.tobytes()
