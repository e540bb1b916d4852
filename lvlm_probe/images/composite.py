"""The differentiable composite: ``baseline + m * (original - baseline)`` on the processor's own outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvlm_probe.images.positions import Geometry


def composite(
    mask: Tensor, geometry: Geometry, key: str, *, original: Tensor, baseline: Tensor, dtype: torch.dtype
) -> Tensor:
    """Pixel inputs of masked images: ``baseline + m * (original - baseline)``, ``m`` the mask at each element's source.

    Args:
        mask: ``(batch, image, row, col)`` in [0, 1]; 1 keeps the original pixel.
        original, baseline: the processor's own outputs, in the dtype of the arithmetic (float32 or float64).
        dtype: dtype of the result.

    Returns:
        ``(batch * n, ...)`` for a tensor ``(n, ...)``, copy after copy; bit-equal to ``original`` where the mask is 1
        everywhere and to ``baseline`` where it is 0. Differentiable once, in ``mask``.
    """
    height, width = mask.shape[-2:]
    forward, backward = geometry.sampler(key, height, width, device=original.device, dtype=original.dtype)
    cells = mask.to(original).reshape(mask.shape[0], -1)
    return _Composite.apply(cells, forward, backward, original, baseline, geometry.keys[key], dtype)


class _Composite(torch.autograd.Function):
    """One fused node, because autograd's own graph would keep several copies of the pixel inputs per mask."""

    @staticmethod
    def forward(ctx, cells, forward, backward, original, baseline, geometry, dtype):  # type: ignore[no-untyped-def]
        batch = cells.shape[0]
        with torch.autocast(original.device.type, enabled=False):  # the user's autocast is for the model
            sampled = forward @ cells.t().contiguous()
        ctx.backward_matrix, ctx.geometry = backward, geometry
        ctx.original, ctx.baseline = original, baseline
        first, last = baseline.reshape(geometry.view), original.reshape(geometry.view)
        out = torch.empty((batch, *geometry.view), dtype=dtype, device=original.device)
        for row in range(batch):
            weight = sampled[:, row].contiguous()
            # Bilinear weights add up to 1 only within rounding: a mask of ones must give the original bit for bit.
            weight = weight.masked_fill_(weight > 1 - 2e-6, 1.0).reshape(geometry.spatial)
            if dtype == original.dtype:
                torch.lerp(first, last, weight, out=out[row])
            else:
                out[row].copy_(torch.lerp(first, last, weight))
        return out.reshape(batch * geometry.shape[0], *geometry.shape[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        geometry = ctx.geometry
        difference = (ctx.original - ctx.baseline).reshape(geometry.view)
        grad = grad.reshape(-1, *geometry.view)
        sampled = grad.new_empty((math.prod(geometry.spatial), grad.shape[0]), dtype=difference.dtype)
        product = torch.empty_like(difference)
        for row in range(grad.shape[0]):
            torch.mul(grad[row].to(difference.dtype), difference, out=product)
            per_position = product.sum(geometry.repeated_axes, keepdim=True) if geometry.repeated_axes else product
            sampled[:, row] = per_position.reshape(-1)
        with torch.autocast(sampled.device.type, enabled=False):
            cells = (ctx.backward_matrix @ sampled).t()
        return cells, None, None, None, None, None, None
