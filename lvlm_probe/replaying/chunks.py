"""Masks in micro-batches: differentiable beyond what fits at once, and noise that does not depend on the grouping."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lvlm_probe.models.replica import duplicated
from lvlm_probe.replaying.micro_batches import in_micro_batches

if TYPE_CHECKING:
    from lvlm_probe.replaying import Replay

__all__ = ["Chunked", "noise_like", "noise_seeds"]


Run = Callable[[torch.Tensor, slice], torch.Tensor]
"""Log-probabilities of a micro-batch of masks, given it and its place among all."""


class Chunked(torch.autograd.Function):
    """More masks than fit at once, differentiable: each micro-batch is run again in backward, with the hooks of now."""

    @staticmethod
    def forward(ctx: Any, masks: torch.Tensor, player: Replay, run: Run, size: int) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(masks)
        ctx.player, ctx.run, ctx.size = player, run, size
        with player.replica.use() as model:
            ctx.model = duplicated(model, bare=False)
        return torch.cat(in_micro_batches(player, masks, size, run))

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (masks,) = ctx.saved_tensors
        player: Replay = ctx.player

        def one(chunk: torch.Tensor, part: slice) -> torch.Tensor:
            leaf = chunk.detach().requires_grad_(True)
            with torch.enable_grad():
                result = ctx.run(leaf, part)
            (gradient,) = torch.autograd.grad(result, leaf, upstream[part])
            player.passes.add(backward=len(chunk))
            return gradient

        with player.replica.instead(ctx.model):
            return (torch.cat(in_micro_batches(player, masks, ctx.size, one)), None, None, None)


def noise_seeds(count: int, noise: float, generator: torch.Generator | None) -> torch.Tensor:
    """One noise seed per mask, so that results do not depend on how masks are grouped into micro-batches."""
    if not noise:
        return torch.zeros(count, dtype=torch.long)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return torch.randint(2**62, (count,), generator=generator, device=generator.device).cpu()


def noise_like(pixels: torch.Tensor, deviation: float, seeds: torch.Tensor) -> torch.Tensor:
    """Gaussian noise for the pixel inputs of ``len(seeds)`` masks, shaped like ``pixels``, from one seed per mask."""
    rows = pixels.shape[0] // len(seeds)
    noise = torch.empty(len(seeds), rows, *pixels.shape[1:], dtype=torch.float32)
    for part, seed in zip(noise, seeds, strict=True):
        part.normal_(std=deviation, generator=torch.Generator().manual_seed(int(seed)))
    return noise.flatten(0, 1).to(pixels)
