"""Collected rows as points of a trace.

Where the image stands in the prompt as image tokens, and where a decoder reads an encoder that was given them, rows
are ``decoder.attention``: a column is an image token. Where it reaches the decoder by cross-attention alone, columns
are the keys of that, which have no place in the prompt. They are ``decoder.cross_attention``, and what part of the
image each key stands for, once that is known, goes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from lvlm_probe.attention.tap import Rows
from lvlm_probe.trace.records import PointRecord

if TYPE_CHECKING:
    from lvlm_probe.trace.records import RowCapture

DECODER_ATTENTION = "decoder.attention"
DECODER_TEXT_MASS = "decoder.attention_text_mass"
CROSS = "decoder.cross_attention"
KEY_BOX = "decoder.cross_attention_key_box"
KEY_IMAGE = "decoder.cross_attention_key_image"


def attention_points(
    rows: Rows, row: int, *, steps: int, image_tokens: int, heads: Literal["mean", "all"], decoder: str
) -> dict[str, PointRecord]:
    """The points of one row of the batch, by name.

    Args:
        rows: of the whole batch.
        row: which.
        steps: number of answer tokens; later passes were for a longer answer beside it.
        image_tokens: number of image tokens in this row's prompt.
        heads: how the rows were collected.
        decoder: path of the decoder.
    """
    layers = tuple(layer.index for layer in rows.layers)
    reduce = "head_mean" if heads == "mean" else "none"
    values = rows.values[row][:steps]
    if rows.valid is None:
        return {CROSS: PointRecord(values, ("step", "layer", "head", "key"), layers, reduce, decoder)}
    axes = ("step", "layer", "head", "image_token")
    mass = rows.text_mass[row][:steps]
    return {
        DECODER_ATTENTION: PointRecord(values[..., :image_tokens], axes, layers, reduce, decoder),
        DECODER_TEXT_MASS: PointRecord(mass, axes[:3], layers, reduce, decoder),
    }


def place_keys(row: RowCapture, boxes: np.ndarray, images: np.ndarray) -> None:
    """Enter the places of the keys of cross-attention: boxes ``(key, 4)``, and the image of each, -1 for none.

    In a batch there may be more keys than the row has alone: those of images that fill it up, which come last.
    """
    rows = row.points.get(CROSS)
    if rows is None:
        return
    more = int(rows.values.shape[-1]) - len(boxes)
    if more < 0:
        row.notes.append(f"no boxes for the keys of cross-attention: {len(boxes)} were placed, {-more} too many")
        return
    row.points = {
        **row.points,
        KEY_BOX: PointRecord(np.pad(boxes, ((0, more), (0, 0))).astype(np.float32), ("key", "channel")),
        KEY_IMAGE: PointRecord(np.pad(images, (0, more), constant_values=-1).astype(np.int32), ("key",)),
    }
