"""ImagePath: masks on the original images, through the unmodified image processor, to the model's pixel inputs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lvlm_probe.errors import ImageError, MaskError, ProbeError, ProbeWarning, ProcessorRefused
from lvlm_probe.images.baselines import BLUR_LADDER, Baseline, make_baseline
from lvlm_probe.images.batching import Joint, joints_of
from lvlm_probe.images.composite import composite
from lvlm_probe.images.composite_path import composited
from lvlm_probe.images.masks import MaskedImages, expand_masks
from lvlm_probe.images.parity import (
    REFUSE_LEVELS,
    SHARP_LEVELS,
    WARN_LEVELS,
    ParityReport,
    backend_of,
    level_errors,
    versions,
)
from lvlm_probe.images.positions import Geometry
from lvlm_probe.images.processor import BlackBox, as_rgb, compare_reference
from lvlm_probe.images.tracing import check_same_layout, pattern
from lvlm_probe.images.whitening import Whitening
from lvlm_probe.trace.clips import Clip


class ImagePath(MaskedImages):
    """The differentiable road from masks over one prompt's images to the model's inputs.

    Build it with :meth:`from_processor`. A mask is 1 where the original pixel is kept and 0 where the
    baseline's stands.
    """

    def __init__(
        self,
        processor: BlackBox,
        images: Sequence[Image.Image],
        baselines: Sequence[Baseline],
        inputs: dict[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        notes: tuple[str, ...] = (),
        geometry: Geometry | None = None,
        report: ParityReport | None = None,
    ) -> None:
        self._processor = processor
        self.images = list(images)
        self.baselines = tuple(baselines)
        self._notes = notes
        self._geometry = geometry
        self._report = report
        self._device, self._dtype = device, dtype
        self._raw = inputs
        self._raw_baseline = processor(self.baseline_images)
        check_same_layout(inputs, self._raw_baseline, name=processor.name)
        self.inputs = self._place(inputs)
        self.baseline_inputs = self._place(self._raw_baseline)
        self._blended = inputs, self._raw_baseline
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}
        self._joints: dict[str, Joint] | None = None
        self._whitening: Whitening | None = None

    @classmethod
    def from_processor(
        cls,
        image_processor: Callable[..., Any],
        images: Sequence[Image.Image],
        *,
        call_kwargs: Mapping[str, Any] | None = None,
        structure: Literal["flat", "nested"] = "flat",
        baseline: Sequence[Image.Image] | None = None,
        reference: Mapping[str, Tensor] | None = None,
        because: str = "",
        notes: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ImagePath:
        """Watch an image processor as a black box. Costs one processor call for the images and one for the baselines;
        the geometry is traced at the first :meth:`apply` of a mask.

        Args:
            image_processor: called as ``image_processor(images=..., return_tensors="pt", **call_kwargs)``. A full
                processor is taken by its ``image_processor``.
            images: the images of one prompt, in order.
            call_kwargs: what the user's own call passed to the image processor.
            structure: ``"nested"`` calls it with ``[[image, ...]]``, as families with several prompts a batch want.
            baseline: one image per image, of the same size; default: blurred (:func:`make_baseline`).
            reference: the inputs that the user's own run fed to the model. Another shape is an error, and so are
                values that another implementation of the processor would not give; a smaller difference is a note in
                the report and a warning.
            because: what is known to differ from that run, for the note.
            notes: further sentences for the report.
            device, dtype: where the model's inputs live; floating tensors are cast at the very end.

        Raises:
            ImageError: no image, not PIL images, a baseline of another size, or ``reference`` is not what the processor
                makes of these images.
            ProcessorRefused: two runs on images of one size give differently shaped outputs.
        """
        processor = BlackBox(image_processor, dict(call_kwargs or {}), structure)
        if not images:
            raise ImageError(f"{processor.name}: no image was given, so there is nothing to mask.")
        for image in images:
            if not isinstance(image, Image.Image):
                raise ImageError(
                    f"{processor.name}: masks are laid over PIL images; got {type(image).__name__}. Use "
                    "PIL.Image.open or PIL.Image.fromarray."
                )
        rgb, inputs, converted = as_rgb(processor, images)
        path_notes = [*notes, *converted]
        if reference is not None:
            path_notes += compare_reference(processor, rgb, inputs, reference, processor.name, because=because)
        baselines = tuple(
            [make_baseline(image) for image in rgb]
            if baseline is None
            else [Baseline(_checked_size(own, image), "image") for own, image in _pairs(baseline, rgb)]
        )
        return cls(
            processor,
            rgb,
            baselines,
            inputs,
            device=torch.device(device) if device is not None else torch.device("cpu"),
            dtype=dtype,
            notes=tuple(path_notes),
        )

    # -- what goes in ------------------------------------------------------------------------------------------------

    @property
    def baseline_images(self) -> list[Image.Image]:
        return [baseline.image for baseline in self.baselines]

    @property
    def pixel_keys(self) -> tuple[str, ...]:
        """Names of the inputs that a mask changes (traces the processor if that has not been done)."""
        return tuple(self._traced().keys)

    @property
    def report(self) -> ParityReport:
        """Parity of the fast path with the real processor on these images (computed once, at the first mask)."""
        if self._report is None:
            self._report = self._check(self._traced())
        return self._report

    def with_baseline(
        self,
        images: Sequence[Image.Image | Baseline] | str,
        *,
        strength: float = BLUR_LADDER[0],
        seed: int = 0,
    ) -> ImagePath:
        """The same images over another baseline; geometry and report are shared. One processor call.

        Args:
            images: one baseline per image, or a kind that :func:`make_baseline` draws with ``strength`` and ``seed``.
        """
        if isinstance(images, str):
            made = tuple(
                make_baseline(image, images, strength=strength, seed=seed + index)
                for index, image in enumerate(self.images)
            )
        else:
            made = tuple(
                own
                if isinstance(own, Baseline) and own.image.size == image.size
                else Baseline(_checked_size(own.image if isinstance(own, Baseline) else own, image), "image")
                for own, image in _pairs(images, self.images)
            )
        return ImagePath(
            self._processor,
            self.images,
            made,
            self._raw,
            device=self._device,
            dtype=self._dtype,
            notes=self._notes,
            geometry=self._geometry,
            report=self._report,
        )

    # -- what comes out ----------------------------------------------------------------------------------------------

    def apply(
        self, mask: Tensor | None, *, image: int | Clip | None = None, mode: Literal["fast", "exact"] = "fast"
    ) -> dict[str, Tensor]:
        """The model's inputs for a batch of masks.

        Args:
            mask: ``(batch, row, col)`` or ``(batch, image, row, col)`` in [0, 1] over the original image(s), any
                resolution; ``None``: the unmasked images, one copy.
            image: put a ``(batch, row, col)`` mask on this image, or ``(batch, t, row, col)`` on this clip, and leave
                the others whole.
            mode: ``"fast"`` blends the processor's own outputs at traced positions; ``"exact"`` runs the real processor
                on the real 8-bit composite, one call per mask, with the fast path's gradient.

        Returns:
            every input, repeated ``batch`` times along its first axis, copy after copy. Pixel inputs are differentiable
            in ``mask``.

        Raises:
            MaskError: wrong shape, dtype or range.
            ProcessorRefused: masks cannot be carried through this processor; the message says why.
        """
        if mask is None:
            return dict(self.inputs)
        if mode not in ("fast", "exact"):
            raise MaskError(f"mode must be 'fast' or 'exact'; got {mode!r}.")
        full = expand_masks(mask, self.n_images, image)
        self.report  # noqa: B018  (refuses here, before any number is used)
        wanted = full.requires_grad and torch.is_grad_enabled()
        fast = {key: self._blend(full, key) for key in self.pixel_keys} if mode == "fast" or wanted else {}
        real = self._real(full) if mode == "exact" else {}
        batch = full.shape[0]
        out: dict[str, Tensor] = {}
        for key, value in self.inputs.items():
            if key in real:
                out[key] = _ValueOf.apply(fast[key], real[key]) if wanted else real[key]
            elif key in fast:
                out[key] = fast[key]
            else:
                out[key] = value.repeat(batch, *[1] * (value.ndim - 1)) if value.ndim else value
        return out

    def joined(self, inputs: Mapping[str, Tensor], copies: int) -> dict[str, Tensor]:
        """What :meth:`apply` returned for ``copies`` masks, joined as the processor joins several prompts.

        The first call with more than one copy runs the processor once.
        """
        if copies == 1:
            return dict(inputs)
        if self._joints is None:
            try:
                self._joints = joints_of(self._raw, self._processor(self.images, prompts=2))
            except ImageError:  # it takes one prompt at a time
                self._joints = {}
        return {key: self._joints.get(key, Joint()).join(value, copies) for key, value in inputs.items()}

    def seen(self, image: int = 0, shape: tuple[int, int] | None = None) -> Tensor:
        """Where the model looks at all: bool ``(height, width)`` of the image, or of a grid of ``shape``.

        False: no pixel-input element sees any pixel of that cell (margins of a centre crop).
        """
        seen = self._traced().seen(image)
        return seen.clone() if shape is None else _met(_met(seen, shape[0]).T, shape[1]).T

    def coordinates(self, key: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Source of every element of one pixel input: column and row in pixels of the original image, image index, and
        whether it is live (not padding), each of that input's own shape."""
        geometry = self._traced().keys.get(key)
        if geometry is None:
            raise ImageError(
                f"{self._processor.name}: {key!r} is no pixel input; those are {', '.join(self.pixel_keys)}."
            )
        return tuple(geometry.expand(t) for t in (geometry.x, geometry.y, geometry.image, geometry.live))  # type: ignore[return-value]

    # -- inside ------------------------------------------------------------------------------------------------------

    def _place(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    def _traced(self) -> Geometry:
        if self._geometry is None:
            started = time.perf_counter()
            try:
                self._geometry, self._fresh = self._processor.geometry(self.image_sizes, self._raw)
            except ProcessorRefused as refusal:
                if not hasattr(self._processor.call, "normalize"):
                    raise
                try:
                    self._geometry = self._whitened()
                except ProbeError:
                    raise refusal from None
            self._seconds = time.perf_counter() - started
        elif self._whitening is None and any(key.whitened for key in self._geometry.keys.values()):
            self._whitened()  # the geometry is another view's, and the statistics are of the baseline
        return self._geometry

    def _whitened(self) -> Geometry:
        """The geometry of a processor that normalises each image by its own statistics, before it does."""
        plain = self._processor.without_normalisation()
        original, baseline = plain(self.images), plain(self.baseline_images)
        geometry, self._fresh = plain.geometry(self.image_sizes, original)
        geometry = geometry.as_whitened()
        self._whitening = whitening = Whitening(self._processor, self.images, self.baseline_images)
        for key, known in geometry.keys.items():
            whitening.fit(original[key], self._raw[key], known.slope != 0)
        self._blended = original, baseline
        return geometry

    def _blend(self, full: Tensor, key: str) -> Tensor:
        geometry = self._traced()
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        if key not in self._ends:
            first, last = (end[key].to(self._device, wide) for end in self._blended)
            self._ends[key] = first, last
        original, baseline = self._ends[key]
        dtype = self._dtype or self._raw[key].dtype
        if self._whitening is None:
            return composite(full, geometry, key, original=original, baseline=baseline, dtype=dtype)
        plain = composite(full, geometry, key, original=original, baseline=baseline, dtype=wide)
        made = self._whitening.normalised(plain, geometry.keys[key].slope != 0, full).to(dtype)
        # A mask of ones (or zeros) gives what the processor itself makes of the image, to the last bit.
        masks = full.detach().to(made.device)
        real = made.detach().unflatten(0, (len(masks), -1))
        for value, end in ((1.0, self.inputs), (0.0, self.baseline_inputs)):
            even = (masks == value).flatten(1).all(1)
            real = torch.where(even.reshape(-1, *[1] * made.ndim), end[key].to(real), real)
        return _ValueOf.apply(made, real.flatten(0, 1))

    def _real(self, full: Tensor) -> dict[str, Tensor]:
        runs = [self._processor(composited(masks, self.images, self.baseline_images)) for masks in full.detach()]
        for run in runs:
            check_same_layout(self._raw, run, name=self._processor.name)
        joined = {key: torch.cat([run[key] for run in runs]) for key in self.pixel_keys}
        return self._place(joined)

    def _check(self, geometry: Geometry) -> ParityReport:
        started = time.perf_counter()
        name = self._processor.name
        again = self._processor(self.images)
        check_same_layout(self._raw, again, name=name)
        if any(not torch.equal(value, again[key]) for key, value in self._raw.items()):
            raise ProcessorRefused(
                f"{name}: two runs on the same image give different outputs, so it is random (cropping, augmentation "
                "or dithering). Switch that off in the processor, or attach without it (masks then live in "
                "pixel-input space)."
            )
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(1, self.n_images, 9, 9, generator=generator, dtype=torch.float32)
        fast, real = self._both_ways(geometry, mask, self.images, self.baseline_images, self._blended)
        if self._whitening is not None:
            deviation = self._whitening.statistics(mask)[1].reshape(-1)
            for key, value in fast.items():
                scale = deviation.reshape(-1, *[1] * (value.ndim - 1))  # a grey level is 1 / deviation
                fast[key] = self._whitening.normalised(value, geometry.keys[key].slope != 0, mask) * scale
                real[key] = real[key] * scale
        mean, largest = level_errors(fast, real, geometry)
        if mean > REFUSE_LEVELS and not (mean <= SHARP_LEVELS and self._right_on_ramps(geometry)):
            raise ProcessorRefused(
                f"{name}: on a half-masked image the traced path is {mean:.1f} of 255 levels off in the mean, so a "
                "pixel's value does not depend on its source pixels alone (normalisation per image, thresholds, "
                "cropping by content). Attach without a processor (masks then live in pixel-input space)."
            )
        notes = self._notes
        if mean > WARN_LEVELS:
            notes = (*notes, f"the fast path is {mean:.1f} levels off in the mean; use mode='exact' for final scores")
        report = ParityReport(
            engine="traced",
            processor=name,
            backend=backend_of(self._processor.call),
            mean_error=mean,
            max_error=largest,
            deterministic=True,
            coverage=tuple(float(geometry.seen(k).float().mean()) for k in range(self.n_images)),
            pixel_keys=tuple(geometry.keys),
            runs=geometry.runs if self._fresh else 0,
            seconds=self._seconds + time.perf_counter() - started,
            versions=versions(),
            notes=notes,
        )
        for note in notes:
            warnings.warn(f"{name}: {note}.", ProbeWarning, stacklevel=4)
        return report

    def _both_ways(
        self,
        geometry: Geometry,
        mask: Tensor,
        images: Sequence[Image.Image],
        baselines: Sequence[Image.Image],
        ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pixel inputs under one mask, ``(1, image, row, col)``: by the traced path between the processor's outputs for
        images and baselines (``ends``), and by the processor on the composite."""
        real = self._processor(composited(mask[0], images, baselines))
        check_same_layout(self._raw, real, name=self._processor.name)
        original, baseline = ends
        fast = {
            key: composite(
                mask, geometry, key, original=original[key].float(), baseline=baseline[key].float(), dtype=torch.float32
            )
            for key in geometry.keys
        }
        return fast, real

    def _right_on_ramps(self, geometry: Geometry) -> bool:
        """Whether the traced path is the processor's function on images of these sizes without edges. It is then their
        resampling that makes the difference on sharp ones of few pixels, whose overshoot is clipped."""
        if self._whitening is not None:
            return False
        across, down = (
            [Image.fromarray(pattern(size, axis, "ramp")).convert("RGB") for size in self.image_sizes]
            for axis in (0, 1)
        )
        rows, cols = (max(1, min(9, min(size[axis] for size in self.image_sizes) // 2)) for axis in (1, 0))
        mask = torch.rand(1, self.n_images, rows, cols, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        ends = self._processor(across), self._processor(down)
        mean, _ = level_errors(*self._both_ways(geometry, mask, across, down, ends), geometry)
        return mean <= WARN_LEVELS

    _fresh, _seconds = False, 0.0


class _ValueOf(torch.autograd.Function):
    """Value of the second tensor, bit for bit; gradient of the first."""

    @staticmethod
    def forward(ctx, fast, real):  # type: ignore[no-untyped-def]
        return real.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def _pairs(baselines: Sequence[Any], images: Sequence[Image.Image]) -> list[tuple[Any, Image.Image]]:
    if len(baselines) != len(images):
        raise ImageError(
            f"{len(baselines)} baseline image(s) were given for {len(images)} image(s); give one for each."
        )
    return list(zip(baselines, images, strict=True))


def _checked_size(baseline: object, image: Image.Image) -> Image.Image:
    if not isinstance(baseline, Image.Image):
        raise ImageError(f"a baseline is a PIL image; got {type(baseline).__name__}.")
    if baseline.size != image.size:
        raise ImageError(
            f"the baseline is {baseline.width}x{baseline.height}, the image {image.width}x{image.height}; "
            "make_baseline(image, baseline) scales it."
        )
    return baseline.convert("RGB")


def _met(flags: Tensor, cells: int) -> Tensor:
    """Whether any row in each of so many even stretches is set, ``(cells, col)`` bool."""
    rows = len(flags)
    return torch.stack([flags[k * rows // cells : -(-(k + 1) * rows // cells)].any(0) for k in range(cells)])
