"""From a picture to the pixel inputs of every vision tower.

For each tower the picture is laid on a square of a colour of that tower's, resized by Pillow (bicubic, with its
antialiasing, on 8-bit values) to the tower's input, and normalised with the tower's mean and standard deviation. So
each tower sees the picture with margins and rounding of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images

from lvlm_probe_cambrian.configuration import MAX_TOWERS
from lvlm_probe_cambrian.padding import image_token_count

__all__ = ["CambrianImageProcessor", "expand_to_square", "tower_settings"]

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_HALF = [0.5, 0.5, 0.5]

# Kind of tower: mean, standard deviation, and the mean that its margins are coloured with. SigLIP's margins have the
# colour of CLIP's mean in the published model, not of its own.
_NORMALISATION: dict[str, tuple[list[float], list[float], list[float]]] = {
    "siglip_vision_model": (_HALF, _HALF, _CLIP_MEAN),
    "clip_vision_model": (_CLIP_MEAN, _CLIP_STD, _CLIP_MEAN),
    "dinov2": (_IMAGENET_MEAN, _IMAGENET_STD, _IMAGENET_MEAN),
    "convnext": (_CLIP_MEAN, _CLIP_STD, _CLIP_MEAN),
}


def tower_settings(kind: str, size: int) -> dict[str, Any]:
    """How pictures are prepared for one tower.

    Args:
        kind: of the tower, one of ``configuration.TOWERS``.
        size: side of its input, pixels.

    Returns:
        ``size``, ``image_mean`` and ``image_std`` of values in [0, 1], and ``pad_color``, 8-bit RGB.
    """
    mean, std, margin = _NORMALISATION[kind]
    return {
        "size": size,
        "image_mean": list(mean),
        "image_std": list(std),
        "pad_color": [int(value * 255) for value in margin],
    }


def expand_to_square(image: Image.Image, color: Sequence[int]) -> Image.Image:
    """The picture in the middle of a square of its longer side; an odd pixel of margin goes below or to the right."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(color))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


class CambrianImageProcessor(BaseImageProcessor):
    """Makes ``pixel_values_0`` … of pictures, one for each tower, and ``image_sizes``.

    Args:
        towers: per tower what ``tower_settings`` gives; by default those of the published 8B and 13B models.
        image_grid: side of the grid of image tokens over the padded square.
    """

    model_input_names = [*(f"pixel_values_{tower}" for tower in range(MAX_TOWERS)), "image_sizes"]  # noqa: RUF012

    def __init__(self, towers: Sequence[Mapping[str, Any]] | None = None, image_grid: int = 24, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if towers is None:
            sizes = {"siglip_vision_model": 384, "clip_vision_model": 336, "dinov2": 378, "convnext": 1024}
            towers = [tower_settings(kind, size) for kind, size in sizes.items()]
        if not 1 <= len(towers) <= MAX_TOWERS:
            raise ValueError(f"there are 1 to {MAX_TOWERS} towers, not {len(towers)}")
        self.towers = [dict(tower) for tower in towers]
        self.image_grid = image_grid
        self.model_input_names = [*(f"pixel_values_{tower}" for tower in range(len(self.towers))), "image_sizes"]

    def preprocess(self, images: Any, return_tensors: str | None = None, **_unused: Any) -> BatchFeature:
        """Pixel inputs of one or several pictures.

        Args:
            images: pictures, nested or not: PIL images, or 8-bit arrays ``(row, col, 3)`` or ``(3, row, col)``.

        Returns:
            ``pixel_values_t`` ``(image, 3, S_t, S_t)`` float32, and ``image_sizes`` ``(image, 2)`` int64: width and
            height of each picture before it was padded.

        Raises:
            ValueError: something else than a picture.
        """
        pictures = [_rgb(image) for image in make_flat_list_of_images(images)]
        data: dict[str, Any] = {
            f"pixel_values_{number}": np.stack([_normalised(picture, tower) for picture in pictures])
            for number, tower in enumerate(self.towers)
        }
        data["image_sizes"] = np.array([picture.size for picture in pictures], dtype=np.int64)
        return BatchFeature(data, tensor_type=return_tensors)

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of a picture of ``(width, height)`` in the prompt, newlines included."""
        return image_token_count(self.image_grid, size)

    def to_dict(self) -> dict[str, Any]:
        settings: dict[str, Any] = super().to_dict()
        settings.pop("model_input_names", None)  # follows from the towers
        return settings


def _normalised(picture: Image.Image, tower: Mapping[str, Any]) -> np.ndarray:
    """``(3, S, S)`` float32."""
    side = int(tower["size"])
    square = expand_to_square(picture, tower["pad_color"]).resize((side, side), Image.Resampling.BICUBIC)
    mean, std = (np.array(tower[name], np.float32) for name in ("image_mean", "image_std"))
    values = (np.asarray(square, np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _rgb(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    values = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if values.dtype != np.uint8 or values.ndim != 3 or 3 not in (values.shape[0], values.shape[2]):
        raise ValueError(
            f"pictures are PIL images or 8-bit arrays with three channels, which are resized as such; got "
            f"{values.dtype} of shape {values.shape}"
        )
    if values.shape[2] != 3:
        values = values.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values))
