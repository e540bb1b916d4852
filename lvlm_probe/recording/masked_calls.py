"""Masked images in the user's own calls: what ``Probe.masked`` puts in place of the pixel inputs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from lvlm_probe.errors import ImageError, MaskError
from lvlm_probe.images import ImagePath, PixelPath, make_baseline
from lvlm_probe.images.processor import with_settings
from lvlm_probe.images.processor_step import image_processor_of
from lvlm_probe.models.anatomy import Anatomy
from lvlm_probe.models.drivers import Driver
from lvlm_probe.recording.handed_images import Handed, hand_over
from lvlm_probe.recording.processor_watch import ProcessorWatch

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Masking"]


class Masking:
    """The state of one ``Probe.masked`` block."""

    def __init__(
        self,
        processor: object | None,
        watch: ProcessorWatch,
        anatomy: Anatomy,
        mask: torch.Tensor,
        *,
        images: Any,
        image: int | None,
        baseline: str | Image.Image,
        mode: Literal["fast", "exact"],
        space: Literal["picture", "pixels"] = "picture",
    ) -> None:
        self.processor, self.watch, self.anatomy = processor, watch, anatomy
        self.mask, self.space = mask, space
        self._given = hand_over(images) if images is not None else None
        self.image, self.baseline, self.mode = image, baseline, mode
        self._paths: list[tuple[dict[str, torch.Tensor], Any]] = []
        if "torch._dynamo" in sys.modules:  # a compiled model must not take the processor into its graph
            self.replace = torch.compiler.disable(self.replace)  # type: ignore[method-assign]

    def of_generate(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A ``generate`` call with masked pixels."""
        if isinstance(model, Driver):
            return model.with_pixels(args, kwargs, self.replace(model.arguments(args, kwargs)))
        return args, self.replace(kwargs)

    def of_forward(self, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward call with masked pixels."""
        if isinstance(model, Driver):
            raise MaskError(
                f"masked(): the forward of {type(model.original).__name__} takes its images in a way of its own; "
                f"call generate() in the block, or use replay.log_probs(mask), which is differentiable"
            )
        return self.replace(kwargs)

    def replace(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same model inputs with masked pixels."""
        pixels = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and self.anatomy.is_pixel_name(name)
        }
        if not any(value.is_floating_point() for value in pixels.values()):
            raise ImageError(
                "masked(): this call has no pixel inputs; pass the processor's outputs on: model(**inputs)"
            )
        path = self._path(pixels)
        made = path.apply(self._mask_for(path), image=self.image, mode=self.mode)
        changed = dict(inputs)
        for name in path.pixel_keys:
            if name in changed:
                changed[name] = made[name].to(device=changed[name].device, dtype=changed[name].dtype)
        return changed

    def _mask_for(self, path: Any) -> torch.Tensor:
        mask = self.mask
        if self.image is not None or path.n_images == 1:
            if mask.ndim == 3 and mask.shape[0] == 1:
                return mask
            if mask.ndim == 2:
                return mask[None]
        elif mask.ndim == 2:
            return mask.expand(path.n_images, *mask.shape)[None]
        elif mask.ndim == 3 and mask.shape[0] == path.n_images:
            return mask[None]
        raise MaskError(
            f"mask of shape {tuple(mask.shape)} for a call with {path.n_images} image(s): give (row, col) for all "
            f"of them, ({path.n_images}, row, col) for one each, or image=k with (row, col)"
        )

    def _path(self, pixels: dict[str, torch.Tensor]) -> Any:
        for known, path in self._paths:
            if known.keys() == pixels.keys() and all(_alike(known[name], value) for name, value in pixels.items()):
                return path
        dtype = next(value.dtype for value in pixels.values() if value.is_floating_point())
        path = self._make_path(pixels, dtype)
        # Copies: the same tensor with other values in it is another image.
        self._paths.append(({name: value.detach().clone() for name, value in pixels.items()}, path))
        return path

    def _make_path(self, pixels: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
        if self.space == "pixels":
            if not isinstance(self.baseline, str):
                raise ImageError("masked(space='pixels') has no image to lay another one over; name a kind")
            return PixelPath(pixels, dtype=dtype).with_baseline_kind(self.baseline)
        if any("video" in name for name in pixels):
            raise MaskError(
                "masked() lays no mask over a video yet: record the answer, and replay it: "
                "probe.replay(trace, model, processor).log_probs(mask, image=replay.clips[0])"
            )
        image_processor = image_processor_of(self.processor)
        if image_processor is None:
            raise self._unknown("no processor was attached: attach(model, processor)")
        call = self.watch.find(pixels)
        known = self._given
        if known is None:
            if call is None:
                raise self._unknown(self.watch.why(pixels)[1])
            known = Handed(call.images, call.groups, call.why)
        if known.images is None:
            raise self._unknown(f"the image was given as {known.why}, which cannot be brought back to an image")
        image_processor, _ = with_settings(image_processor, None if call is None else call.config)
        path = ImagePath.from_processor(
            image_processor,
            known.images,
            call_kwargs={} if call is None else call.kwargs,
            structure="flat" if known.groups is None else "nested",
            reference=pixels,
            because=" (another backend or dtype)",
            dtype=dtype,
        )
        floating = {name for name, value in pixels.items() if value.is_floating_point() and value.ndim >= 3}
        if beside := sorted(floating - path.inputs.keys()):
            raise ImageError(
                f"masked(): the model is also fed {', '.join(beside)}, which the attached processor does not return, "
                f"so that the mask would not reach it; attach the whole processor that made the inputs"
            )
        return path.with_baseline([make_baseline(picture, self.baseline) for picture in path.images])

    @staticmethod
    def _unknown(why: str) -> ImageError:
        return ImageError(
            f"masked(): the image of this call is not known, so that a mask cannot be laid on it: {why}. Give it, "
            f"masked(mask, images=[image]), or mask what the processor made of it instead, masked(mask, "
            f"space='pixels')"
        )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and torch.equal(one, other)
