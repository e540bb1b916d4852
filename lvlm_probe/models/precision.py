"""What number formats hold, and in which one sums are made on a device."""

from __future__ import annotations

import torch


def epsilon_of(dtype: torch.dtype | str | None) -> float:
    """ε of a floating-point format, by its type or name; 0 for everything else."""
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return float(torch.finfo(kind).eps) if isinstance(kind, torch.dtype) and kind.is_floating_point else 0.0


def sum_dtype(device: torch.device) -> torch.dtype:
    """The format in which sums are made on a device: float64 on the CPU, float32 elsewhere.

    Apple's devices have no float64, and most graphics cards compute it at a thirtieth of the speed. What is brought to
    the CPU is widened there, ``.cpu().double()``, never before.
    """
    return torch.float64 if device.type == "cpu" else torch.float32
