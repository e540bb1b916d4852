"""Clips: the frames of a video among a prompt's images, through the unmodified video processor.

A video processor samples frames, and then does with each what an image processor does with an image; some lay frames in
pairs into one patch. Every element of what it returns still comes from one frame. So a clip needs no road of its own:
its frames are images of the prompt, ``ClipStep`` shows them to the video processor with the sampling left out, and the
geometry that is traced through it tells frame, column and row of each element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvlm_probe.errors import ImageError, MaskError
from lvlm_probe.images.processor import named_outputs, processor_settings, with_settings
from lvlm_probe.trace.clips import Clip

NOT_REPEATED = (
    "videos", "return_tensors", "device", "do_sample_frames", "video_metadata", "return_metadata", "input_data_format",
)  # fmt: skip
"""Arguments of a video processor's call that are of the moment: what it was given, and how it was sampled."""


def video_processor_of(processor: object | None) -> Any:
    """The video processor inside a processor; ``None`` where there is none."""
    found = getattr(processor, "video_processor", None)
    return found if callable(getattr(found, "preprocess", None)) else None


class ClipStep:
    """The video processor of one prompt, and the image processor where it has images beside clips, called as an image
    processor is: with the images and then the frames of all clips, one after another.

    Args:
        video_processor: the user's own.
        clips: of the prompt, in order; the first comes right after the images that are no frames.
        call: keyword arguments of the user's call of the video processor.
        image_processor: the user's own; needed where a clip is not the first image.
        image_call: keyword arguments of its call.
        nested: it is given one list of images per prompt.
        fed_as: outputs of the video processor that the processor around it hands on under another name, with the number
            of axes that are left (InternVL lays the frames of all clips one after another, behind the images).
    """

    def __init__(
        self,
        video_processor: Callable[..., Any],
        clips: Sequence[Clip],
        call: Mapping[str, Any],
        *,
        image_processor: Callable[..., Any] | None = None,
        image_call: Mapping[str, Any] | None = None,
        nested: bool = False,
        fed_as: Mapping[str, tuple[str, int]] | None = None,
    ) -> None:
        self.clips = tuple(clips)
        self.geometry_owner = video_processor
        self.processor_name = type(video_processor).__name__
        self.backend = str(getattr(video_processor, "backend", "") or "unknown")
        self._images = image_processor
        self._calls = {name: value for name, value in call.items() if name not in NOT_REPEATED}, dict(image_call or {})
        self._nested, self._fed_as = nested, dict(fed_as or {})
        # What has been traced is known by all that it depends on (``BlackBox``): not by when frames are shown.
        settings = [processor_settings(each) for each in (video_processor, image_processor)]
        layout = [(clip.first, clip.frames) for clip in self.clips]
        self.geometry_key = [settings, layout, *self._calls, nested, self._fed_as]

    def __call__(self, images: Sequence[Image.Image], **_kwargs: Any) -> dict[str, Any]:
        still, whole = self.clips[0].first, self.clips[-1].images.stop
        prompts = [images[start : start + whole] for start in range(0, len(images), whole)]
        call, image_call = self._calls
        made: dict[str, Any] = {}
        if still and self._images is not None:
            stills = [list(prompt[:still]) for prompt in prompts]
            given: list[Any] = stills if self._nested else [image for prompt in stills for image in prompt]
            made |= named_outputs(self._images, self._images(images=given, return_tensors="pt", **image_call))
        videos = [_stacked(prompt[clip.first : clip.images.stop]) for prompt in prompts for clip in self.clips]
        metadata = [_metadata(clip) for clip in self.clips] * len(prompts)
        out = self.geometry_owner(
            videos=videos, do_sample_frames=False, video_metadata=metadata, return_tensors="pt", **call
        )
        found = named_outputs(self.geometry_owner, out)
        found.pop("video_metadata", None)
        for name, (other, axes) in self._fed_as.items():
            value = found.pop(name)
            frames = value.flatten(0, value.ndim - axes)
            found[other] = _joined(made[other], frames, len(prompts)) if other in made else frames
        return {**made, **found}


def step_of(processor: Any, call: Mapping[str, Any], clips: Sequence[Clip]) -> tuple[ClipStep, dict[str, Any]]:
    """The step of a recorded prompt, with the settings that the processors had then.

    Args:
        processor: the user's own.
        call: the recorded call of the image processor, and under ``video`` that of the video processor.
        clips: of the prompt.

    Returns:
        the step, and which settings are others now, as they were recorded.

    Raises:
        ImageError: there is no such processor, or it cannot be had with those settings.
    """
    videos = video_processor_of(processor)
    if videos is None:
        raise ImageError(
            f"{type(processor).__name__} has no video processor (transformers' own need torchvision: pip install "
            "'lvlm-probe[torchvision]'); give the processor that made the inputs"
        )
    of_video: Mapping[str, Any] = call.get("video") or {}
    present, changed = with_settings(videos, of_video.get("config"))
    image_processor = None
    if clips[0].first:
        image_processor, others = with_settings(processor.image_processor, call.get("config"))
        changed = {**others, **changed}
    try:
        fed_as = {name: (str(other), int(axes)) for name, (other, axes) in (of_video.get("fed_as") or {}).items()}
        step = ClipStep(
            present,
            clips,
            of_video.get("kwargs") or {},
            image_processor=image_processor,
            image_call=call.get("kwargs"),
            nested=call.get("structure") == "nested",
            fed_as=fed_as,
        )
    except (AttributeError, TypeError, ValueError) as error:  # a trace may come from anyone
        raise ImageError(f"the recorded call of the video processor makes no sense ({error})") from error
    return step, changed


def _joined(stills: Tensor, frames: Tensor, prompts: int) -> Tensor:
    """Images and then frames of each prompt, under one name."""
    each = [rows.unflatten(0, (prompts, -1)) for rows in (stills, frames)]
    return torch.cat(each, dim=1).flatten(0, 1)


def _stacked(frames: Sequence[Image.Image]) -> np.ndarray:
    """Frames in one array, ``(frame, row, col, channel)`` uint8."""
    arrays = np.stack([np.asarray(frame) for frame in frames])
    return arrays if arrays.ndim == 4 else arrays[..., None]


def _metadata(clip: Clip) -> dict[str, Any]:
    return {
        "total_num_frames": clip.total or clip.frames,
        "fps": clip.fps,
        "duration": clip.duration,
        "frames_indices": list(clip.indices or range(clip.frames)),
    }


def over_frames(mask: Tensor, clip: Clip, n_images: int) -> Tensor:
    """A mask over a clip as one on all images of the prompt, those that are none of its frames kept whole.

    Args:
        mask: ``(batch, t, row, col)``; steps of time need not be frames: between the middles of two steps the mask is
            interpolated.
        clip: the clip.
        n_images: of the prompt.

    Returns:
        ``(batch, image, row, col)``, differentiable in ``mask``.

    Raises:
        MaskError: it has no time axis, or the prompt no such clip.
    """
    if mask.ndim != 4:
        raise MaskError(f"a mask over a clip is (batch, t, row, col); got {tuple(mask.shape)}.")
    if clip.images.stop > n_images:
        raise MaskError(f"the prompt has {n_images} images, and no frames {clip.first} to {clip.images.stop - 1}.")
    frames = mask if mask.shape[1] == clip.frames else _in_time(mask, clip.frames)
    before, after = clip.first, n_images - clip.images.stop
    whole = [mask.new_ones(len(mask), count, *mask.shape[2:]) for count in (before, after)]
    return torch.cat([whole[0], frames, whole[1]], dim=1) if before or after else frames


def _in_time(mask: Tensor, frames: int) -> Tensor:
    steps = mask.shape[1]
    at = ((torch.arange(frames, dtype=torch.float64) + 0.5) / frames * steps - 0.5).clamp(0, steps - 1)
    low = at.floor().long().clamp(max=max(steps - 2, 0))
    part = (at - low).to(mask)[:, None, None]
    high = (low + 1).clamp(max=steps - 1)
    return torch.lerp(mask[:, low.to(mask.device)], mask[:, high.to(mask.device)], part)
