"""PixelPath: masks in pixel-input space, for models attached without an image processor or without their images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lvlm_probe.errors import ImageError, MaskError, ProcessorRefused
from lvlm_probe.images.baselines import BLUR_LADDER, KINDS
from lvlm_probe.images.masks import MaskedImages, expand_masks
from lvlm_probe.images.parity import ParityReport, versions
from lvlm_probe.trace.clips import Clip


class PixelPath(MaskedImages):
    """The interface of :class:`~lvlm_probe.images.ImagePath` over ``pixel_values`` ``(image, channel, row, col)``.

    A mask covers what the model was fed, not the original image: what the processor cropped away is not there, and
    padding is masked like image. Baselines are drawn on the normalised values, whose black is not known:

    * ``"blur"``: Gaussian, sigma = ``strength`` x the long side (``inf``: mean per channel);
    * ``"mean"``: mean per channel; ``"blank"``: the lowest value of each channel;
    * ``"noise"``: uniform between each channel's lowest and highest value, from ``seed``.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        baseline: str = "blur",
        strength: float = BLUR_LADDER[0],
        seed: int = 0,
        key: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            inputs: what the model was fed; tensors other than ``key`` pass through unchanged.
            key: name of the images; by default that of the only input of four axes, or ``pixel_values``.
            baseline, strength, seed: see the class.

        Raises:
            ProcessorRefused: ``key`` is missing or not ``(image, 3, row, col)``: tiles and flattened patches have no
                image to lay a mask on without the processor that made them.
            ImageError: no such baseline.
        """
        self._raw = dict(inputs)
        if key is None:  # models that their authors publish beside the weights call it as they like
            found = [name for name, value in self._raw.items() if value.is_floating_point() and value.ndim == 4]
            key = found[0] if len(found) == 1 else "pixel_values"
        pixels = self._raw.get(key)
        if pixels is None or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.is_floating_point():
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self._raw.items()) or "none"
            raise ProcessorRefused(
                f"masks can be laid on pixel inputs only where they are images, {key} (image, channel, row, col); "
                f"these are: {shapes}. Give the processor: attach(model, processor), and the images: record(path, "
                "images=...) where the processor is not called while recording."
            )
        self._key = key
        self._device = torch.device(device) if device is not None else pixels.device
        self._dtype = dtype
        self._original = pixels.detach().to(self._device, torch.float32 if dtype != torch.float64 else dtype)
        self._blurred = _baseline(self._original, baseline, strength, seed)
        self.description = _description(baseline, strength, seed)
        self.inputs = self._place(self._original)
        self.baseline_inputs = self._place(self._blurred)
        self.images = [_viewable(image) for image in self._original]
        self.baseline_images = [
            _viewable(low, like=image) for low, image in zip(self._blurred, self._original, strict=True)
        ]

    def with_baseline_kind(self, kind: str, *, strength: float = BLUR_LADDER[0], seed: int = 0) -> PixelPath:
        """The same inputs over another baseline."""
        return PixelPath(
            self._raw,
            baseline=kind,
            strength=strength,
            seed=seed,
            key=self._key,
            device=self._device,
            dtype=self._dtype,
        )

    @property
    def pixel_keys(self) -> tuple[str, ...]:
        return (self._key,)

    @property
    def report(self) -> ParityReport:
        """There is no processor to compare with: the fast path is exact by definition."""
        return ParityReport(
            engine="pixel-input",
            processor="no processor",
            backend="none",
            mean_error=0.0,
            max_error=0.0,
            deterministic=True,
            coverage=(1.0,) * self.n_images,
            pixel_keys=self.pixel_keys,
            runs=0,
            seconds=0.0,
            versions=versions(),
            notes=("masks live in pixel-input space: what the processor cropped away is not there",),
        )

    def apply(
        self, mask: Tensor | None, *, image: int | Clip | None = None, mode: Literal["fast", "exact"] = "fast"
    ) -> dict[str, Tensor]:
        """As :meth:`ImagePath.apply <lvlm_probe.images.ImagePath.apply>`; both modes are the same here."""
        if mask is None:
            return dict(self.inputs)
        if mode not in ("fast", "exact"):
            raise MaskError(f"mode must be 'fast' or 'exact'; got {mode!r}.")
        full = expand_masks(mask, self.n_images, image).to(self._original)
        batch = full.shape[0]
        fine = F.interpolate(full, size=self._original.shape[-2:], mode="bilinear", align_corners=False)
        # Interpolation weights add up to 1 only within rounding: a mask of ones must give the original bit for bit.
        fine = torch.where(fine > 1 - 2e-6, fine + (1 - fine).detach(), fine)[:, :, None]
        blend = torch.lerp(self._blurred, self._original, fine).flatten(0, 1)
        out = {key: v.repeat(batch, *[1] * (v.ndim - 1)) if v.ndim else v for key, v in self.inputs.items()}
        out[self._key] = blend.to(self.inputs[self._key].dtype)
        return out

    def joined(self, inputs: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
        """As :meth:`ImagePath.joined <lvlm_probe.images.ImagePath.joined>`, with no processor to learn from: inputs are
        joined along the first axis."""
        return dict(inputs)

    def coordinates(self, key: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Column, row, image index and liveness of every element of ``pixel_values``."""
        if key != self._key:
            raise ImageError(f"{key!r} is no pixel input; that is {self._key}.")
        count, _, height, width = shape = self._original.shape
        x = (torch.arange(width, dtype=torch.float32) + 0.5).expand(shape)
        y = (torch.arange(height, dtype=torch.float32) + 0.5)[:, None].expand(shape)
        index = torch.arange(count, dtype=torch.int16)[:, None, None, None].expand(shape)
        return x, y, index, torch.ones(shape, dtype=torch.bool)

    def _place(self, pixels: Tensor) -> dict[str, Tensor]:
        placed: dict[str, Any] = {**self._raw, self._key: pixels.to(self._raw[self._key].dtype)}
        return {k: v.to(self._device, self._dtype if v.is_floating_point() else None) for k, v in placed.items()}


def _description(kind: str, strength: float, seed: int) -> dict[str, Any]:
    """The baseline in words, plain JSON, as ``make_baseline`` describes one on an image."""
    if kind == "noise":
        return {"kind": kind, "seed": int(seed)}
    if kind != "blur":
        return {"kind": kind}
    if math.isinf(strength):
        return {"kind": kind, "strength": None, "limit": "mean per channel"}
    return {"kind": kind, "strength": float(strength)}


def _baseline(pixels: Tensor, kind: str, strength: float, seed: int) -> Tensor:
    mean = pixels.mean(dim=(-2, -1), keepdim=True).expand_as(pixels).contiguous()
    low, high = pixels.amin(dim=(-2, -1), keepdim=True), pixels.amax(dim=(-2, -1), keepdim=True)
    if kind == "blur":
        if not strength > 0:
            raise ImageError(f"blur strength must be positive (sigma relative to the long side); got {strength!r}.")
        if math.isinf(strength):
            return mean
        sigma = strength * max(pixels.shape[-2:])
        rows, cols = (_gaussian(n, sigma).to(pixels) for n in pixels.shape[-2:])
        return rows @ pixels @ cols.t()
    if kind == "mean":
        return mean
    if kind == "blank":
        return low.expand_as(pixels).contiguous()
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        return low + (high - low) * torch.rand(pixels.shape, generator=generator, dtype=torch.float32).to(pixels)
    raise ImageError(f"no baseline {kind!r} in pixel-input space; choose one of {', '.join(KINDS)}.")


def _gaussian(length: int, sigma: float) -> Tensor:
    """Blur along one axis as a matrix ``(length, length)``; weights are renormalised at the borders."""
    apart = torch.arange(length)[:, None] - torch.arange(length)
    weights = torch.exp(-0.5 * (apart.double() / sigma) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def _viewable(pixels: Tensor, like: Tensor | None = None) -> Image.Image:
    """An image to look at: each channel stretched over its own range (of ``like``), since the normalisation is not
    known."""
    scale = pixels if like is None else like
    low, high = scale.amin(dim=(1, 2), keepdim=True), scale.amax(dim=(1, 2), keepdim=True)
    grey = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).round().clamp(0, 255).byte().cpu()
    return Image.fromarray(np.ascontiguousarray(grey.expand(3, -1, -1).permute(1, 2, 0).numpy()))
