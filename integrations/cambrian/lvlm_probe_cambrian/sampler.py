"""The spatial vision aggregator (SVA; Tong et al., 2024, §4): cross-attention from a grid of queries to all towers.

Query (r, c) reads the window of each tower's token grid that lies over its cell, r_t × r_t tokens of tower t, and
nothing else; the tokens of all towers stand in one softmax. With g the mean token of the first tower::

    x   = W_in [q ; W_ctx g]
    k_t = W_k^t LN(f_t + e_t),   v_t = W_v^t LN(f_t + e_t)         e_t a learned position where the window has several
    x   = x + W_o softmax(W_q LN(x) [k_0 … k_T]ᵀ / √64 + mask) [v_0 … v_T]
    q   = q + W_2 GELU(W_1 LN(x))

Queries are independent of each other, so here they are one flat axis over all pictures of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lvlm_probe_cambrian.configuration import CambrianConfig
from lvlm_probe_cambrian.padding import valid_cells

__all__ = ["CrossAttention", "Readings", "SamplerLayer", "SamplerState", "VisionSampler", "readings"]


@dataclass(frozen=True)
class Readings:
    """What queries may read, all pictures' queries along the first axis.

    Attributes:
        context: ``(query, d)``, the global context g of each query's picture.
        windows: per tower ``(query, r_t * r_t, d)``, rows of the window one after the other.
        masks: per tower ``(query, r_t * r_t)`` bool, True where the cell may be read.
    """

    context: Tensor
    windows: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]

    def of(self, index: Tensor) -> Readings:
        """The same for some of the queries."""
        return Readings(
            self.context[index], tuple(part[index] for part in self.windows), tuple(part[index] for part in self.masks)
        )

    def to(self, *args: Any, **kwargs: Any) -> Readings:
        """The same on another device, as for a tensor."""
        return Readings(
            self.context.to(*args, **kwargs),
            tuple(part.to(*args, **kwargs) for part in self.windows),
            tuple(part.to(*args, **kwargs) for part in self.masks),
        )


def readings(features: Sequence[Tensor], context: Tensor, sizes: Sequence[tuple[int, int]], cells: int) -> Readings:
    """Windows of ``cells × cells`` queries per picture over the padded square.

    Args:
        features: per tower ``(image, S_t * S_t, d)``.
        context: ``(image, d)``.
        sizes: ``(width, height)`` of each picture.

    Cells of the padding are masked; a window of a tower without any other is left readable as a whole, as in the
    published model: those queries are in the padding and never become image tokens, or lie at its edge.
    """
    windows, masks = [], []
    for part in features:
        side = math.isqrt(part.shape[1])
        windows.append(_windows(part.unflatten(1, (side, side)), cells).flatten(0, 1))
        valid = torch.stack([valid_cells(side, size) for size in sizes])[..., None]
        mask = _windows(valid, cells)[..., 0].flatten(0, 1)
        masks.append((mask | ~mask.any(dim=1, keepdim=True)).to(part.device))
    return Readings(context.repeat_interleave(cells * cells, dim=0), tuple(windows), tuple(masks))


def _windows(maps: Tensor, cells: int) -> Tensor:
    """``(image, S, S, channel)`` to ``(image, cells * cells, r * r, channel)`` with r = S / cells."""
    size = maps.shape[1] // cells
    cut = maps.unflatten(1, (cells, size)).unflatten(3, (cells, size))
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class CrossAttention(nn.Module):
    """Multi-head attention of one query to the windows of all towers, with projections of its own for each tower.

    Args:
        channels: d.
        towers: their number.
        config: under ``attn_implementation="eager"`` weights are computed explicitly, otherwise in PyTorch's fused
            function; the same numbers up to rounding.
    """

    def __init__(self, channels: int, towers: int, config: CambrianConfig) -> None:
        super().__init__()
        self.heads, self.config = config.vision_heads, config
        self.q_proj = _normed(channels)
        for tower in range(towers):
            self.add_module(f"k_proj_{tower}", _normed(channels))
            self.add_module(f"v_proj_{tower}", _normed(channels))
        self.o_proj = nn.Linear(channels, channels, bias=False)

    def forward(self, query: Tensor, windows: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """``(query, d)`` and the windows and masks of ``Readings`` to ``(query, d)``."""
        values = self._heads(torch.cat([getattr(self, f"v_proj_{t}")(part) for t, part in enumerate(windows)], dim=1))
        if self.config._attn_implementation == "eager":
            out = (self.weights(query, windows, masks)[:, :, None].to(values.dtype) @ values)[:, :, 0]
        else:
            mask = torch.cat(list(masks), dim=1)[:, None, None]
            asked = self._heads(self.q_proj(query)[:, None])
            out = F.scaled_dot_product_attention(asked, self._keys(windows), values, attn_mask=mask)[:, :, 0]
        result: Tensor = self.o_proj(out.flatten(1))
        return result

    def weights(self, query: Tensor, windows: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Attention weights ``(query, head, key)``, keys of the towers one after the other; float32 or wider."""
        asked = self._heads(self.q_proj(query)[:, None])
        scores = (asked @ self._keys(windows).transpose(-1, -2))[:, :, 0] / math.sqrt(asked.shape[-1])
        scores = scores.masked_fill(~torch.cat(list(masks), dim=1)[:, None], -math.inf)
        return scores.softmax(dim=-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)

    def _keys(self, windows: Sequence[Tensor]) -> Tensor:
        return self._heads(torch.cat([getattr(self, f"k_proj_{t}")(part) for t, part in enumerate(windows)], dim=1))

    def _heads(self, value: Tensor) -> Tensor:
        """``(query, key, d)`` to ``(query, head, key, d / head)``."""
        return value.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """W_2 GELU(W_1 x), without biases."""

    def __init__(self, channels: int, outer: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, channels, bias=False)
        self.linear_2 = nn.Linear(channels, outer, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.linear_2(F.gelu(self.linear_1(hidden)))
        return result


class SamplerLayer(nn.Module):
    """One layer of the aggregator, see the module.

    Args:
        outer: channels of the queries: d, or those of the decoder.
        sides: side r_t of each tower's window.
    """

    def __init__(self, outer: int, sides: Sequence[int], config: CambrianConfig) -> None:
        super().__init__()
        channels = config.vision_hidden_size
        self.proj_context = nn.Linear(channels, channels, bias=False)
        self.proj_in = nn.Linear(outer + channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.proj_out = FeedForward(channels, outer)
        self.cross_attn = CrossAttention(channels, len(sides), config)
        self.positions = tuple(tower for tower, side in enumerate(sides) if side > 1)
        for tower in self.positions:
            self.register_parameter(f"pos_embed_{tower}", nn.Parameter(torch.zeros(sides[tower] ** 2, channels)))

    def forward(self, queries: Tensor, read: Readings) -> Tensor:
        """``(query, outer)`` to the same."""
        hidden, windows = self.entering(queries, read)
        hidden = hidden + self.cross_attn(hidden, windows, read.masks)
        result: Tensor = queries + self.proj_out(self.norm(hidden))
        return result

    def entering(self, queries: Tensor, read: Readings) -> tuple[Tensor, list[Tensor]]:
        """What enters the cross-attention: x ``(query, d)``, and the windows with their positions."""
        hidden = self.proj_in(torch.cat([queries, self.proj_context(read.context)], dim=-1))
        windows = [
            part + getattr(self, f"pos_embed_{tower}") if tower in self.positions else part
            for tower, part in enumerate(read.windows)
        ]
        return hidden, windows


class VisionSampler(nn.Module):
    """Layers of the aggregator, one after the other."""

    def __init__(self, depth: int, outer: int, sides: Sequence[int], config: CambrianConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SamplerLayer(outer, sides, config) for _ in range(depth)])

    def forward(self, queries: Tensor, read: Readings) -> Tensor:
        for layer in self.layers:
            queries = layer(queries, read)
        return queries


@dataclass(frozen=True)
class SamplerState:
    """What decoder layers need for another look at the towers in a pass that holds pictures.

    Attributes:
        positions: ``(query,)`` places of the image tokens, newlines excepted, in ``(batch * sequence)``.
        read: what each of them may read.
    """

    positions: Tensor
    read: Readings

    def to(self, *args: Any, **kwargs: Any) -> SamplerState:
        """The same on another device: accelerate asks it of what goes into a layer that lives elsewhere."""
        return SamplerState(self.positions.to(*args, **kwargs), self.read.to(*args, **kwargs))

    def update(self, sampler: VisionSampler, hidden: Tensor) -> Tensor:
        """``(batch, sequence, channel)`` with image tokens updated by ``sampler``; the rest as it is."""
        flat = hidden.flatten(0, 1)
        updated = sampler(flat[self.positions], self.read)
        return flat.index_copy(0, self.positions, updated.to(flat.dtype)).view_as(hidden)


def _normed(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels, bias=False))
