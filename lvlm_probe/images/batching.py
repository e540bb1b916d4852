"""Joining, as an image processor does it: the images of several prompts in one tensor.

Most put them one after the other along the first axis. Others pack them along another one (MiniCPM-V lays all patches
of a batch side by side), or return indices into what was joined (Molmo2), which go on counting from prompt to prompt.
The processor is asked: what it makes of the same images given twice is compared with what it makes of them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-2  # normalised levels: a batch may be resized by another kernel than a single image


@dataclass(frozen=True)
class Joint:
    """How copies of one input are joined.

    Attributes:
        axis: along which.
        offset: what is added to the non-negative entries of each further copy (negative ones mark padding).
    """

    axis: int = 0
    offset: int = 0

    @property
    def plain(self) -> bool:
        """One after the other along the first axis, as they are."""
        return self == Joint()

    def join(self, stacked: Tensor, copies: int) -> Tensor:
        """What the model is fed, from ``copies`` copies that were put together along the first axis."""
        if copies == 1 or stacked.ndim == 0 or self.plain:
            return stacked  # split and joined again it would be the same, and backward costs a full copy per part
        parts = stacked.tensor_split(copies)
        if self.offset:
            parts = tuple(torch.where(part >= 0, part + k * self.offset, part) for k, part in enumerate(parts))
        return torch.cat(parts, dim=self.axis)


def joints_of(once: Mapping[str, Tensor], twice: Mapping[str, Tensor]) -> dict[str, Joint]:
    """The joints that are not plain, of the outputs for some images ``once`` and for the same ones ``twice``."""
    found = {name: _joint(value, twice[name]) for name, value in once.items() if name in twice}
    return {name: joint for name, joint in found.items() if joint is not None and not joint.plain}


def _joint(once: Tensor, twice: Tensor) -> Joint | None:
    for axis in range(once.ndim):
        if twice.shape != (*once.shape[:axis], 2 * once.shape[axis], *once.shape[axis + 1 :]):
            continue
        first, second = twice.tensor_split(2, dim=axis)
        if once.is_floating_point():
            if torch.allclose(first, once, atol=_ROUNDING) and torch.allclose(second, once, atol=_ROUNDING):
                return Joint(axis)
        elif torch.equal(first, once):
            counted = once >= 0
            steps = (second - once)[counted].unique() if once.dtype != torch.bool else counted.new_zeros(1).long()
            if torch.equal(second[~counted], once[~counted]) and len(steps) <= 1:
                return Joint(axis, int(steps[0]) if len(steps) else 0)
    return None
