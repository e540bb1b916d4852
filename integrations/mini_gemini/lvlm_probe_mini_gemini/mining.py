"""Views of one picture, the high-resolution encoder, and patch info mining (Mini-Gemini, section 3.1 and 3.2)."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextPreTrainedModel
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage

__all__ = ["ConvNextPyramid", "PatchInfoMining", "crops", "low_resolution_views", "resize"]


def resize(picture: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear, corners not aligned, no antialiasing: ``(batch, channel, row, col)`` to ``side × side``.

    Computed in float32 at least, given back in the dtype it came in.
    """
    if picture.shape[-2:] == (side, side):
        return picture
    exact = picture if picture.dtype == torch.float64 else picture.float()
    sized = nn.functional.interpolate(exact, size=(side, side), mode="bilinear", align_corners=False)
    return sized.to(picture.dtype)


def crops(picture: torch.Tensor, grid: int) -> torch.Tensor:
    """``(batch, channel, row, col)`` cut into ``grid × grid`` parts, row by row:
    ``(batch, crop, channel, row / grid, col / grid)``."""
    batch, channels, rows, cols = picture.shape
    parts = picture.reshape(batch, channels, grid, rows // grid, grid, cols // grid)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, channels, rows // grid, cols // grid)


def low_resolution_views(pixel_values: torch.Tensor, side: int, grid: int, whole: bool) -> torch.Tensor:
    """What the low-resolution encoder sees, a differentiable function of the high-resolution picture.

    Args:
        pixel_values: ``(batch, 3, S, S)``.
        side: the encoder's picture side.
        grid: crops along one side.
        whole: add the whole picture, scaled down from the crops' resolution, as the last view.

    Returns:
        ``(batch, view, 3, side, side)``: crops row by row, then the whole picture.
    """
    large = resize(pixel_values, side * grid)
    views = crops(large, grid)
    return torch.cat([views, resize(large, side)[:, None]], dim=1) if whole else views


class ConvNextPyramid(ConvNextPreTrainedModel):
    """A ConvNeXt whose four stages are all read, as one map at the first stage's resolution."""

    # It has no attention, so it runs under whatever the other parts are set to.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        sizes, depths = list(config.hidden_sizes), list(config.depths)
        self.stages = nn.ModuleList(
            ConvNextStage(config, before, after, stride=1 if number == 0 else 2, depth=depths[number])
            for number, (before, after) in enumerate(zip(sizes[:1] + sizes[:-1], sizes, strict=True))
        )
        self.post_init()

    @property
    def channels(self) -> int:
        """Channels of the map: those of all stages together."""
        return int(sum(self.config.hidden_sizes))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(batch, 3, S, S)`` → ``(batch, channel, S / 4, S / 4)``: later stages are enlarged bilinearly."""
        hidden = self.embeddings(pixel_values)
        maps: list[torch.Tensor] = []
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(resize(hidden, maps[0].shape[-1]) if maps else hidden)
        return torch.cat(maps, dim=1)


class PatchInfoMining(nn.Module):
    """One head of cross-attention from each low-resolution token to its own window of the high-resolution map.

    With x the tokens ``(N, C)`` and h the ``M × M`` cells that lie under each of them:
    ``x + softmax(W_q LN(x) (W_k LN(h))ᵀ / √C) W_v LN(h)``. No position embedding, no output projection.

    Args:
        low: channels of the low-resolution tokens, C.
        high: channels of the high-resolution map.
    """

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.key = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.value = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.scale = 1 / math.sqrt(low)

    def forward(self, tokens: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """Mine one view.

        Args:
            tokens: ``(batch, N, low)``, N a square number.
            picture: ``(batch, high, row, col)``, the part of the map that the view shows.

        Returns:
            ``(batch, N, low)``.
        """
        side = math.isqrt(tokens.shape[1])
        batch, channels, rows, cols = picture.shape
        cells = picture.reshape(batch, channels, side, rows // side, side, cols // side)
        windows = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, side * side, -1, channels)
        key = self.key(windows).transpose(-2, -1) * self.scale
        scores = torch.nan_to_num(self.query(tokens)[:, :, None] @ key)
        return tokens + (scores.softmax(dim=-1) @ self.value(windows))[:, :, 0]
