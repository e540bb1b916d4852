"""The gradient of a patch embedding as one matrix product.

Vision transformers cut a picture into patches by a convolution whose stride is its kernel. Each pixel then enters one
patch only, and the gradient to the pixels is that of the patches times the weights, laid side by side. torch's CPU
kernels go the way of any convolution there, at a third of the speed (``tests/benchmarks/bench_engine.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from lvlm_probe.hooks import HookSet
from lvlm_probe.models.wrappers import every_module

__all__ = ["patch_gradients"]


@contextmanager
def patch_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Passes in the block differentiate patch embeddings on the CPU so. What they compute forward stays the same to the
    last bit; their weights must be frozen."""
    with HookSet() as hooks:
        for module in every_module(model) if torch.is_grad_enabled() else ():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) and _cuts_patches(module):
                hooks.shadow(module, "forward", _embedding(module))
        yield


def _cuts_patches(module: torch.nn.Conv2d | torch.nn.Conv3d) -> bool:
    return (
        type(module) in (torch.nn.Conv2d, torch.nn.Conv3d)
        and "forward" not in vars(module)  # accelerate brings the weights of such a module when they are needed
        and module.stride == module.kernel_size
        and not isinstance(module.padding, str)
        and not any(module.padding)
        and max(module.dilation) == module.groups == 1
        and module.weight.device.type == "cpu"
        and not module.weight.requires_grad
    )


def _embedding(module: torch.nn.Conv2d | torch.nn.Conv3d) -> Callable[..., torch.Tensor]:
    axes = len(module.kernel_size)

    def forward(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        pixels = args[0] if len(args) == 1 and not kwargs else kwargs.get("input")
        plain = pixels is None or pixels.ndim != axes + 2 or not pixels.requires_grad
        if plain or torch.is_autocast_enabled("cpu"):
            return original(*args, **kwargs)
        return _Patches.apply(pixels, original, module.weight)

    return forward


class _Patches(torch.autograd.Function):
    """A convolution whose stride is its kernel; differentiable in the pixels."""

    @staticmethod
    def forward(ctx: Any, pixels: torch.Tensor, original: Any, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.weight, ctx.edges = weight.detach(), pixels.shape[2:]
        return original(pixels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, _, *kernel = weight_shape = ctx.weight.shape
        batch, grid, axes = len(gradient), gradient.shape[2:], len(kernel)
        columns = gradient.reshape(batch, out, -1).transpose(1, 2).reshape(-1, out)
        pixels = (columns @ ctx.weight.reshape(out, -1)).reshape(batch, *grid, *weight_shape[1:])
        # (batch, patches…, channel, kernel…) to (batch, channel, patch, kernel, patch, kernel, …)
        order = [0, axes + 1, *(place for axis in range(axes) for place in (1 + axis, axes + 2 + axis))]
        covered = [patches * edge for patches, edge in zip(grid, kernel, strict=True)]
        pixels = pixels.permute(order).reshape(batch, weight_shape[1], *covered)
        # Pixels beyond the last whole patch enter none.
        missing = [edge - there for edge, there in zip(ctx.edges, covered, strict=True)]
        if any(missing):
            pixels = functional.pad(pixels, [part for edge in reversed(missing) for part in (0, edge)])
        return pixels, None, None
