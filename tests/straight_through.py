"""Exact gradients of a torchvision-backed image processor, to compare with.

The unmodified processor runs under autograd on a float composite, with one function replaced: ``resize`` computes its
value on rounded 8-bit pixels, as it does for a user, and its gradient in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


@contextmanager
def straight_through_resize() -> Iterator[None]:
    from torchvision.transforms.v2 import functional as tv

    resize = tv.resize

    def replacement(image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        smooth = resize(image, *args, **kwargs)
        if not image.is_floating_point():
            return smooth
        value = resize(image.detach().round().clamp(0, 255).byte(), *args, **kwargs)
        return smooth + (value.to(smooth) - smooth).detach()

    tv.resize = replacement
    try:
        yield
    finally:
        tv.resize = resize


def exact_inputs(
    processor: Any, structure: str, image: Image.Image, baseline: Image.Image, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The processor's outputs for one mask ``(row, col)``, differentiable in it."""
    fine = F.interpolate(mask[None, None], size=(image.height, image.width), mode="bilinear", align_corners=False)[0]
    top, bottom = (torch.from_numpy(np.asarray(i, dtype=np.float32)).permute(2, 0, 1) for i in (image, baseline))
    blend = bottom + (top - bottom) * fine
    blend = blend + (blend.round() - blend).detach()
    given: Sequence[Any] = [[blend]] if structure == "nested" else [blend]
    with straight_through_resize():
        return dict(processor(images=given, return_tensors="pt"))
