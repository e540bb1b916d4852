"""Masked images in the user's own calls: what ``Probe.masked`` puts in place of the pixel inputs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lvlm_probe.errors import ImageError, MaskError
from lvlm_probe.images import ImagePath, PixelPath
from lvlm_probe.images.baselines import make_baselines
from lvlm_probe.images.clips import step_of
from lvlm_probe.images.processor import by_prompt, with_settings
from lvlm_probe.images.processor_step import image_processor_of
from lvlm_probe.models.anatomy import Anatomy
from lvlm_probe.models.drivers import Driver
from lvlm_probe.recording.handed_images import Handed, hand_over
from lvlm_probe.recording.processor_watch import ProcessorWatch
from lvlm_probe.recording.prompt_clips import ClipFinder, ClipRow
from lvlm_probe.replaying.isolation import outside_modes
from lvlm_probe.trace.clips import Clip

if TYPE_CHECKING:
    from PIL import Image


class Masking:
    """The state of one ``Probe.masked`` block."""

    def __init__(
        self,
        processor: object | None,
        watch: ProcessorWatch,
        clips: ProcessorWatch,
        anatomy: Anatomy,
        mask: torch.Tensor,
        *,
        images: Any,
        image: int | None,
        clip: int | None,
        baseline: str | Image.Image,
        mode: Literal["fast", "exact"],
        space: Literal["image", "pixels"] = "image",
    ) -> None:
        self.processor, self.watch, self.clips, self.anatomy = processor, watch, clips, anatomy
        self.mask, self.space = mask, space
        self._given = hand_over(images) if images is not None else None
        self.image, self.clip, self.baseline, self.mode = image, clip, baseline, mode
        self._paths: list[tuple[dict[str, torch.Tensor], Any, tuple[Clip, ...]]] = []
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

    @outside_modes
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
        path, clips = self._path(pixels)
        mask, target = self._mask_for(path, clips)
        made = path.apply(mask, image=target, mode=self.mode)
        changed = dict(inputs)
        for name in path.pixel_keys:
            if name in changed:
                value, given = made[name], changed[name]
                value = value.reshape(given.shape) if by_prompt(value, given) else value
                changed[name] = value.to(device=given.device, dtype=given.dtype)
        return changed

    def _mask_for(self, path: Any, clips: Sequence[Clip]) -> tuple[torch.Tensor, int | Clip | None]:
        """The mask as one of a batch, and what it lies on; ``None`` is all images."""
        mask, number = self.mask, self.clip
        if number is None and self.image is None and len(clips) == 1 and clips[0].frames == path.n_images:
            number = 0  # a video and nothing else
        if number is not None and not 0 <= number < len(clips):
            raise MaskError(f"clip={number}, but this call has {len(clips)} video(s), counted from 0")
        if number is not None and mask.ndim in (2, 3):
            return (mask if mask.ndim == 3 else mask[None])[None], clips[number]
        if self.image is not None or path.n_images == 1:
            if mask.ndim == 3 and mask.shape[0] == 1:
                return mask, self.image
            if mask.ndim == 2:
                return mask[None], self.image
        elif mask.ndim == 2:
            return mask.expand(path.n_images, *mask.shape)[None], None
        elif mask.ndim == 3 and mask.shape[0] == path.n_images:
            return mask[None], None
        of_clips = ", or clip=k with (t, row, col)" if clips else ""
        raise MaskError(
            f"mask of shape {tuple(mask.shape)} for a call with {path.n_images} image(s): give (row, col) for all "
            f"of them, ({path.n_images}, row, col) for one each, or image=k with (row, col){of_clips}"
        )

    def _path(self, pixels: dict[str, torch.Tensor]) -> tuple[Any, tuple[Clip, ...]]:
        for known, path, clips in self._paths:
            if known.keys() == pixels.keys() and all(_alike(known[name], value) for name, value in pixels.items()):
                return path, clips
        dtype = next(value.dtype for value in pixels.values() if value.is_floating_point())
        found = self._of_clips(pixels) if self.space == "image" else None
        path, clips = (self._make_path(pixels, dtype), ()) if found is None else self._clip_path(found, pixels, dtype)
        # Copies: the same tensor with other values in it is another image.
        self._paths.append(({name: value.detach().clone() for name, value in pixels.items()}, path, clips))
        return path, clips

    def _of_clips(self, pixels: dict[str, torch.Tensor]) -> ClipRow | None:
        """Images and clips of the call, as one prompt; ``None`` where it has no clips."""
        try:
            finder = ClipFinder(self.processor, self.watch, self.clips, pixels, self.anatomy.is_pixel_name)
            found = finder.find(1, given=self._given)
        except LookupError as error:
            raise ImageError(f"masked(): the video of this call is not known: {error}") from error
        return None if found is None else found[0]

    def _clip_path(
        self, row: ClipRow, pixels: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[ImagePath, tuple[Clip, ...]]:
        step, _ = step_of(self.processor, row.call, row.clips)
        path = ImagePath.from_processor(step, row.images, reference=pixels, dtype=dtype)
        return self._over_baseline(path, row.clips), row.clips

    def _make_path(self, pixels: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
        if self.space == "pixels":
            if not isinstance(self.baseline, str):
                raise ImageError("masked(space='pixels') has no image to lay another one over; name a kind")
            return PixelPath(pixels, dtype=dtype).with_baseline_kind(self.baseline)
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
        return self._over_baseline(path)

    def _over_baseline(self, path: ImagePath, clips: Sequence[Clip] = ()) -> ImagePath:
        kinds = self.baseline if isinstance(self.baseline, str) else [self.baseline] * path.n_images
        return path.with_baseline(make_baselines(path.images, kinds, clips=clips))

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
