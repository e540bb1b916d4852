"""CompositePath: masks on the original images, as real 8-bit images, for an engine that takes images alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lvlm_probe.errors import ImageError
from lvlm_probe.images.masks import MaskedImages
from lvlm_probe.images.parity import ParityReport

Seen = Callable[[int, tuple[int, int] | None], Tensor]
"""Pixels (or cells of a grid) of an image that reach the model, bool ``(row, col)``."""


def composited(masks: Tensor, images: Sequence[Image.Image], baselines: Sequence[Image.Image]) -> list[Image.Image]:
    """The images that masks make of images and their baselines, 8 bit, RGB.

    Args:
        masks: one per image, ``(image, row, col)`` in [0, 1]; 1 keeps the image.
        images, baselines: RGB, of one size each.
    """
    out = []
    for mask, image, baseline in zip(masks, images, baselines, strict=True):
        fine = F.interpolate(
            mask[None, None].float().cpu(), size=(image.height, image.width), mode="bilinear", align_corners=False
        )[0, 0, :, :, None].numpy()
        first, last = (np.asarray(one, dtype=np.float32) for one in (baseline, image))
        blend = np.rint(first + (last - first) * fine).clip(0, 255).astype(np.uint8)
        out.append(Image.fromarray(blend))
    return out


class CompositePath(MaskedImages):
    """Masks over the images of a prompt whose processor is elsewhere.

    What a processor there leaves out of an image (a centre crop) is known where somebody here says so; else all of it
    counts as seen.

    Attributes:
        images: of the prompt, RGB.
        baseline_images: one per image, of its size.
        report: of the composites, which are exact.
    """

    def __init__(
        self, images: Sequence[Image.Image], baselines: Sequence[Image.Image], *, seen: Seen | None = None
    ) -> None:
        self._seen = seen
        self.images = [image.convert("RGB") for image in images]
        self.baseline_images = [image.convert("RGB") for image in baselines]
        for image, baseline in zip(self.images, self.baseline_images, strict=True):
            if image.size != baseline.size:
                raise ImageError(f"a baseline of {baseline.size} pixels for an image of {image.size}")
        self.report = ParityReport(
            engine="composites",
            processor="the server's",
            backend="elsewhere",
            mean_error=0.0,
            max_error=0.0,
            deterministic=True,
            coverage=(1.0,) * len(self.images),
            pixel_keys=(),
            runs=0,
            seconds=0.0,
            versions={},
            notes=("images are masked as 8-bit images before the server's own processor sees them",),
        )

    def with_baseline(self, images: Sequence[Image.Image]) -> CompositePath:
        """The same images over another baseline, one per image."""
        return CompositePath(self.images, images, seen=self._seen)

    def seen(self, image: int = 0, shape: tuple[int, int] | None = None) -> Tensor:
        """What reaches the model, ``(row, col)``; True everywhere where nobody here knows what the processor does."""
        return super().seen(image, shape) if self._seen is None else self._seen(image, shape)

    def composites(self, masks: Tensor) -> list[Image.Image]:
        """The images of one mask per image, ``(image, row, col)``."""
        return composited(masks, self.images, self.baseline_images)
