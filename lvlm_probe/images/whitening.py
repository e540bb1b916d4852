"""Image processors that normalise each image by its own mean and standard deviation (Pix2Struct, Kosmos-2.5).

There a pixel's value depends on the whole image, and so on the whole mask. What the processor does before that is
traced as ever. The statistics of a masked image follow from the mask: with
``x = B + m (I - B)`` at every pixel, ``mean(x)`` and ``mean(x^2)`` are sums over ``m`` and ``m^2``, differentiable in
the mask. A question that the processor draws above the image (``header_text``) counts among the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lvlm_probe.errors import ProcessorRefused
from lvlm_probe.images.processor import BlackBox
from lvlm_probe.models.precision import sum_dtype

_AGREE = 1e-3
"""Of a standard deviation: how far a processor's outputs may be from those that its statistics predict."""


class Whitening:
    """The statistics by which one prompt's images are normalised, as functions of masks on them.

    Args:
        processor: the processor.
        images, baselines: of the prompt, of equal sizes.
    """

    def __init__(self, processor: BlackBox, images: Sequence[Image.Image], baselines: Sequence[Image.Image]) -> None:
        self._name = processor.name
        # Statistics are sums over B less its mean: squares of small numbers, which float32 can subtract.
        self._centers: list[float] = []
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []  # of each image: of x - B, 2 B (x - B) and (x - B)^2
        self._fixed: list[tuple[float, float, int]] = []  # sum of B, of B^2, and how many values
        self._corners: list[tuple[int, int]] = []  # where the image begins in the frame that is normalised
        self.correction = 1.0
        for image, baseline in zip(images, baselines, strict=True):
            whole, ground = _frame(processor, image), _frame(processor, baseline)
            rise = whole - ground
            shown = _shown_height(image, whole)
            self._centers.append(float(ground.mean()))
            ground -= self._centers[-1]
            self._sums.append((rise.sum(0), 2 * (ground * rise).sum(0), (rise * rise).sum(0)))
            self._fixed.append((float(ground.sum()), float((ground * ground).sum()), ground.numel()))
            self._corners.append((whole.shape[1] - shown, shown))

    def statistics(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each masked image, ``(batch, image)`` each, in the number format of the masks'
        device (``sum_dtype``); differentiable.

        Args:
            masks: ``(batch, image, row, col)``.
        """
        means, deviations = [], []
        for place, ((first, cross, square), (total, squares, count)) in enumerate(
            zip(self._sums, self._fixed, strict=True)
        ):
            start, height = self._corners[place]
            mask = masks[:, place : place + 1].to(sum_dtype(masks.device))
            fine = F.interpolate(mask, size=(height, first.shape[1]), mode="bilinear", align_corners=False)[:, 0]
            rows = slice(start, start + height)
            at = [values[rows].to(fine.device, fine.dtype) for values in (first, cross, square)]
            mean = (total + (fine * at[0]).sum((1, 2))) / count
            second = (squares + (fine * at[1]).sum((1, 2)) + (fine * fine * at[2]).sum((1, 2))) / count
            deviation = (second - mean * mean).clamp_min(0.0)
            # An even image has no deviation; its square root has no slope there.
            deviation = torch.where(deviation > 0, deviation, 1.0).sqrt() * (deviation > 0)
            means.append(self._centers[place] + mean)
            deviations.append((self.correction * deviation).clamp_min(count**-0.5))
        return torch.stack(means, dim=1), torch.stack(deviations, dim=1)

    def normalised(self, plain: Tensor, live: Tensor, masks: Tensor) -> Tensor:
        """Pixel inputs of masked images, from those without normalisation.

        Args:
            plain: ``(batch * image, ...)``.
            live: ``(image, ...)``: which elements are pixels.
            masks: ``(batch, image, row, col)``.
        """
        mean, deviation = self.statistics(masks)
        shape = (-1, *[1] * (plain.ndim - 1))
        mean, deviation = (v.reshape(shape).to(plain) for v in (mean, deviation))
        shown = live.to(plain.device).repeat(len(masks), *[1] * (plain.ndim - 1))
        return torch.where(shown, (plain - mean) / deviation, plain)

    def fit(self, plain: Tensor, normalised: Tensor, live: Tensor) -> None:
        """Hold the statistics against what the processor makes of the whole images.

        Implementations divide by N or by N - 1, which ``correction`` makes up for.

        Raises:
            ProcessorRefused: they are not those that it normalises by.
        """
        if plain.shape[0] != len(self._sums) or not bool(live.any()):
            raise _unknown(self._name)
        whole = torch.ones(1, len(self._sums), 1, 1, dtype=torch.float64)
        mean, deviation = (v.reshape(-1, *[1] * (plain.ndim - 1)) for v in self.statistics(whole))
        spread = (plain.double() - mean)[live]
        self.correction = float((spread / deviation.expand_as(plain)[live]).norm() / normalised.double()[live].norm())
        made = self.normalised(plain.double(), live, whole)
        if float((made - normalised.double())[live].abs().max()) > _AGREE:
            raise _unknown(self._name)


def _unknown(name: str) -> ProcessorRefused:
    return ProcessorRefused(
        f"{name} normalises each image by statistics of its own, which are not the mean and the standard deviation of "
        "its pixels; a mask cannot be carried through it. Attach without a processor (masks then live in pixel-input "
        "space)."
    )


def _frame(processor: BlackBox, image: Image.Image) -> Tensor:
    """What the processor normalises, float64 ``(channel, row, col)``: the image, below a question drawn above it."""
    pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    call: Any = processor.call
    header = processor.settings.get("header_text")
    if header is not None and hasattr(call, "render_header"):
        given: Any = pixels if type(call).__name__.endswith("Pil") else torch.from_numpy(pixels.copy())
        text = header if isinstance(header, str) else header[0]
        fonts = {name: processor.settings.get(name) for name in ("font_bytes", "font_path")}
        pixels = np.asarray(call.render_header(given, text, **fonts))
    return torch.from_numpy(np.array(pixels, dtype=np.float64))


def _shown_height(image: Image.Image, frame: Tensor) -> int:
    """Rows of the frame that show the image, which is as wide as the frame."""
    return min(frame.shape[1], int(image.height * (frame.shape[2] / image.width)))
