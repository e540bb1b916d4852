"""What number formats hold, and in which one sums are made on a device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_FIRST, _MOST = 12, 96
"""Exponents of the power of two that a score in half precision is multiplied by: at first, and at most."""
_FINE = 6
"""Exponents as near as that are not told apart."""
_SMALL = 2.0**-7
"""A scaled gradient that is nowhere larger has lost parts to float16's smallest number, 2⁻²⁴, on its way."""


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


def differentiate_scaled(
    backward: Callable[[torch.Tensor], torch.Tensor], rows: int, *, together: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate scores in half precision, where small gradients would be rounded to nothing on their way.

    Each score is multiplied by a power of two, a smaller one where it is too much and a larger one where next to
    nothing arrives, and its gradient divided by it: a row's gradient does not depend on the others in its batch.

    Args:
        backward: ``(row,)`` float32 factors of the scores, on the CPU → gradients ``(row, ...)`` of the scaled scores.
        rows: how many there are.
        together: all rows have one factor.

    Returns:
        gradients ``(row, ...)``, not finite where none is, and the factors ``(row,)`` that they were found with.
    """
    exponents, kept = [_FIRST] * rows, torch.empty(0)
    fits, too_much, unsettled = [-1] * rows, [2 * _MOST] * rows, set(range(rows))
    while unsettled:
        scales = torch.tensor([2.0**exponent for exponent in exponents])
        scaled = backward(scales)
        gradient = scaled / scales.to(scaled).reshape(-1, *[1] * (scaled.ndim - 1))
        kept = kept if kept.numel() else gradient.clone()
        peaks = scaled.abs().flatten(1).amax(dim=1).tolist()
        if together:
            peaks = [max(peaks) if all(map(math.isfinite, peaks)) else math.inf] * rows
        for row in sorted(unsettled):
            tried = exponents[row]
            if math.isfinite(peaks[row]):
                fits[row], kept[row] = tried, gradient[row]
                larger = 0 if peaks[row] >= _SMALL else max(2 * tried, _FINE)
            else:
                too_much[row] = tried
                larger = tried
            if fits[row] < 0:
                following, ended = tried // 2, tried == 0
            else:
                following = min(larger, (fits[row] + too_much[row]) // 2, _MOST)
                ended = following < fits[row] + _FINE
            if ended:
                unsettled.remove(row)
                following = max(fits[row], 0)
            exponents[row] = following
    return kept, torch.tensor([2.0**exponent for exponent in exponents])
