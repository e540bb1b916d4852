"""Masks as users give them: checked, and brought to one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from lvlm_probe.errors import MaskError
from lvlm_probe.images.clips import over_frames
from lvlm_probe.trace.clips import Clip


class MaskedImages:
    """The images of a prompt that masks are laid over: what all roads from a mask to the model have.

    Attributes:
        images: in order; what the model is fed as images, where the originals are not known.
    """

    images: Sequence[Image.Image]

    @property
    def n_images(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """``(width, height)`` of each image, pixels."""
        return [image.size for image in self.images]

    def seen(self, image: int = 0, shape: tuple[int, int] | None = None) -> Tensor:
        """Pixels (or cells of a grid of ``shape``) of an image that reach the model, bool ``(row, col)``: all of it."""
        width, height = self.image_sizes[image]
        return torch.ones(shape or (height, width), dtype=torch.bool)


def expand_masks(mask: Tensor, n_images: int, image: int | Clip | None) -> Tensor:
    """Check masks and bring them to ``(batch, image, row, col)``.

    Args:
        mask: ``(batch, row, col)`` for one image, ``(batch, image, row, col)`` for all, ``(batch, t, row, col)`` for a
            clip; see ``over_frames``.
        n_images: of the prompt.
        image: which image or clip it is for, the others being kept whole; ``None``: all.

    Raises:
        MaskError: not a floating tensor of 3 or 4 axes in [0, 1], or it does not say which of several images it is for.
    """
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        raise MaskError(f"a mask is a floating-point tensor; got {getattr(mask, 'dtype', type(mask).__name__)}.")
    if mask.ndim not in (3, 4) or 0 in mask.shape:
        raise MaskError(f"a mask is (batch, row, col) or (batch, image, row, col), not empty; got {tuple(mask.shape)}.")
    low, high = torch.stack(mask.detach().aminmax()).tolist()  # one wait for the device
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise MaskError(f"a mask lies in [0, 1] (1 keeps the pixel); got values from {low:.4g} to {high:.4g}.")
    if isinstance(image, Clip):
        return over_frames(mask, image, n_images)
    if image is not None:
        if not 0 <= image < n_images:
            raise MaskError(f"image={image}, but the prompt has {n_images} image(s), numbered from 0.")
        if mask.ndim != 3:
            raise MaskError(f"with image=, a mask is (batch, row, col); got {tuple(mask.shape)}.")
        if n_images == 1:
            return mask[:, None]
        whole = torch.ones_like(mask)
        return torch.stack([mask if k == image else whole for k in range(n_images)], dim=1)
    if mask.ndim == 3:
        if n_images > 1:
            raise MaskError(
                f"the prompt has {n_images} images: give masks (batch, {n_images}, row, col), or image=k to mask one "
                "of them."
            )
        return mask[:, None]
    if mask.shape[1] != n_images:
        raise MaskError(
            f"the prompt has {n_images} image(s), the mask is for {mask.shape[1]} ({tuple(mask.shape)}); give (batch, "
            f"row, col) for one image, (batch, {n_images}, row, col) for all."
        )
    return mask
