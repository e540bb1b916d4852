"""Which part of the image each image token stands for, where nothing but the processor is at hand.

Where tokens are made of equal parts of the pixel inputs, in order, their number says what part each was made of: of
flattened patches (the Qwen-VL families) as many rows each; of one tile per image (LLaVA 1.5, Gemma 3) squares of a
grid, row by row. Where the traced geometry says that these elements come from is the token's place. Other layouts
(several tiles, newline tokens, resamplers) cannot be told without the model, and are refused.
"""

from __future__ import annotations

import math

import numpy as np

from lvlm_probe.boxes.sign_code import extents
from lvlm_probe.errors import ImageError
from lvlm_probe.images import ImagePath
from lvlm_probe.models.families import Places


def boxes_in_order(path: ImagePath, tokens: int) -> Places:
    """Places of the image tokens of a prompt, made by its processor alone.

    Args:
        path: of the prompt's images.
        tokens: image tokens of all images together, in prompt order.

    Raises:
        ImageError: the pixel inputs are not so many equal parts.
    """
    if len(path.pixel_keys) != 1:
        raise ImageError(f"the images become several pixel inputs ({', '.join(path.pixel_keys)})")
    x, y, owner, live = (part.numpy() for part in path.coordinates(path.pixel_keys[0]))
    token = _token_of(x.shape, tokens, path.n_images)
    boxes, images = np.zeros((tokens, 4), np.float32), np.full(tokens, -1, np.int64)
    for image, size in enumerate(path.image_sizes):
        mine = live & (owner == image)
        for axis, source in enumerate((x, y)):
            which, low, high = extents(source[mine], token[mine])
            boxes[which, axis], boxes[which, axis + 2] = low.clip(0, size[axis]), high.clip(0, size[axis])
            images[which] = image
    return Places(boxes, images)


def _token_of(shape: tuple[int, ...], tokens: int, images: int) -> np.ndarray:
    """The token that each element of the pixel inputs becomes a part of, of the same shape."""
    refused = ImageError(
        f"{tokens} image tokens are no equal parts of pixel inputs of shape {tuple(shape)}: which token stands for "
        "what is known to the model alone"
    )
    if len(shape) == 2 and shape[0] % tokens == 0:  # a patch a row
        number = np.arange(shape[0]) // (shape[0] // tokens)
        return np.broadcast_to(number[:, None], shape)
    if len(shape) != 4 or shape[0] != images or tokens % images:
        raise refused
    height, width = shape[2:]
    each = tokens // images
    edge = math.isqrt(height * width // each)
    if edge < 1 or edge * edge * each != height * width or height % edge or width % edge:
        raise refused
    row, col = np.arange(height)[:, None] // edge, np.arange(width) // edge
    first = np.arange(images)[:, None, None, None] * each
    return np.broadcast_to(first + row * (width // edge) + col, shape)
