"""Vision towers: what each kind gives as features, on a square grid of tokens.

SigLIP, CLIP and DINOv2 are transformers' own classes. ConvNeXt is made of transformers' stages; its model class sets
the epsilon of all norms but the last to 1e-6, where ConvNeXt-XXL has 1e-5, and returns the last stage alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, Dinov2Model, SiglipVisionModel
from transformers.models.convnext.modeling_convnext import (
    ConvNextEmbeddings,
    ConvNextPreTrainedModel,
    ConvNextStage,
)

__all__ = ["ConvNextStages", "feature_size", "image_size", "make_tower", "resample", "tower_features"]


class ConvNextStages(ConvNextPreTrainedModel):
    """A ConvNeXt that returns all its stages. Every norm has ``config.layer_norm_eps``."""

    _supports_sdpa = True  # there is no attention to choose an implementation for

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        widths = list(config.hidden_sizes)
        self.stages = nn.ModuleList(
            [
                ConvNextStage(config, before, width, stride=1 if number == 0 else 2, depth=depth)
                for number, (before, width, depth) in enumerate(
                    zip([widths[0], *widths[:-1]], widths, config.depths, strict=True)
                )
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
        self.post_init()

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """``(image, 3, S, S)`` to one map ``(image, channel, row, col)`` per stage, the finest first."""
        hidden = self.embeddings(pixel_values)
        maps = []
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return maps


_CLASSES: dict[str, Any] = {
    "siglip_vision_model": SiglipVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "dinov2": Dinov2Model,
    "convnext": ConvNextStages,
}


def make_tower(config: Any) -> nn.Module:
    """The tower of a configuration. SigLIP's pooling head is left out: nothing reads it."""
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    tower: nn.Module = _CLASSES[config.model_type](config)
    return tower


def image_size(config: Any) -> int:
    """Side of a tower's input, pixels."""
    size = config.image_size
    return int(size if isinstance(size, int) else size[0])


def feature_size(config: Any) -> int:
    """Channels of a tower's features."""
    return int(sum(config.hidden_sizes) if config.model_type == "convnext" else config.hidden_size)


def tower_features(tower: nn.Module, pixel_values: Tensor, *, grid: int, clip_layer: int) -> Tensor:
    """Features of a tower on a grid of tokens.

    SigLIP: all tokens after the last norm. CLIP: hidden state ``clip_layer`` without the class token. DINOv2: the last
    hidden state after its norm, without the class token. ConvNeXt: all stages, each resampled, side by side.

    Args:
        pixel_values: ``(image, 3, S, S)``.
        grid: side of the grid of tokens.

    Returns:
        ``(image, grid * grid, channel)``.
    """
    module: Any = tower
    kind = module.config.model_type
    pixel_values = pixel_values.to(module.dtype)
    if kind == "convnext":
        return torch.cat([resample(part, grid) for part in module(pixel_values)], dim=1).flatten(2).transpose(1, 2)
    if kind == "clip_vision_model":
        hidden = module(pixel_values, output_hidden_states=True).hidden_states[clip_layer][:, 1:]
    else:
        hidden = module(pixel_values).last_hidden_state
        hidden = hidden if kind == "siglip_vision_model" else hidden[:, 1:]
    side = round(hidden.shape[1] ** 0.5)
    square = hidden.transpose(1, 2).reshape(len(hidden), -1, side, side)
    result: Tensor = resample(square, grid).flatten(2).transpose(1, 2)
    return result


def resample(maps: Tensor, side: int) -> Tensor:
    """``(image, channel, row, col)`` resampled to ``side × side``: bilinear, in float32, no antialiasing."""
    if maps.shape[-2:] == (side, side):
        return maps
    wide = maps.double() if maps.dtype == torch.float64 else maps.float()
    return F.interpolate(wide, size=(side, side), mode="bilinear", align_corners=False).to(maps.dtype)
