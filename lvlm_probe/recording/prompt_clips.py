"""The clips behind the pixel inputs of one ``generate()`` call: frames as the video processor sampled them.

Frames become images of the prompt, after those that are no frames: what reads a trace needs no other road for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvlm_probe.images.clips import step_of
from lvlm_probe.images.processor import BlackBox, as_rgb
from lvlm_probe.recording.processor_watch import ProcessorCall, ProcessorWatch, describe_call
from lvlm_probe.trace.clips import Clip


def labels_of_frames(ids: Sequence[int], frames: np.ndarray, is_number: Callable[[int], bool]) -> np.ndarray:
    """What a processor writes around the frames of a clip, such as their times, which is nothing a user asked.

    That is all between two frames, and what equals it in front of the first and behind the last, numbers aside.

    Args:
        ids: tokens of the prompt.
        frames: positions of the clip's tokens in it, ascending.
        is_number: whether a token says a number only.

    Returns:
        which tokens, ``(token,)`` bool.
    """
    found = np.zeros(len(ids), bool)
    gaps = np.flatnonzero(np.diff(frames) > 1)
    if not len(gaps):
        return found
    first, last = int(frames[0]), int(frames[-1])
    found[first : last + 1] = True
    between = list(ids[int(frames[gaps[0]]) + 1 : int(frames[gaps[0] + 1])])

    def shared(place: int, step: int, label: Sequence[int]) -> int:
        """Tokens from ``place`` on, in one direction, that are the label's; a run of numbers equals another."""
        start, at = place, 0
        while at < len(label) and 0 <= place < len(ids):
            if is_number(label[at]) and is_number(ids[place]):
                while at < len(label) and is_number(label[at]):
                    at += 1
                while 0 <= place < len(ids) and is_number(ids[place]):
                    place += step
            elif label[at] == ids[place]:
                at, place = at + 1, place + step
            else:
                break
        return abs(place - start)

    found[first - shared(first - 1, -1, between[::-1]) : first] = True
    found[last + 1 : last + 1 + shared(last + 1, 1, between)] = True
    return found


@dataclass(frozen=True)
class ClipRow:
    """The images and clips of one prompt.

    Attributes:
        images: those that are no frames, then the frames of all clips, RGB.
        clips: which of them are frames.
        call: the processors' calls, as a trace keeps them.
        inputs: what the processors make of this row alone; empty where the batch is this row.
        notes: how images were brought to RGB.
    """

    images: list[Image.Image]
    clips: tuple[Clip, ...]
    call: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    notes: tuple[str, ...]


class ClipFinder:
    """Finds the clips of a ``generate()`` call by the processor calls that made its inputs.

    Args:
        processor: what was attached.
        images, clips: the calls of its image processor and of its video processor.
        inputs: the tensors given to ``generate()``.
        is_pixel_name: whether an input carries images.
    """

    def __init__(
        self,
        processor: Any,
        images: ProcessorWatch,
        clips: ProcessorWatch,
        inputs: Mapping[str, Any],
        is_pixel_name: Callable[[str], bool],
    ) -> None:
        self._processor, self._images, self._clips = processor, images, clips
        self._inputs, self._is_pixel_name = inputs, is_pixel_name
        self._fed_as: dict[str, list[Any]] = {}
        self._stills: ProcessorCall | None = None

    def find(self, batch: int, *, given: Any = None) -> list[ClipRow] | None:
        """The rows of the batch; ``None`` where its prompts hold no video.

        Args:
            batch: number of prompts.
            given: the user's ``images=``.

        Raises:
            LookupError: a prompt holds a video, and which frames it was made of is not known; the message says why.
        """
        call = self._found()
        if call is None:
            if any("video" in name and self._is_pixel_name(name) for name in self._inputs):
                raise LookupError(self._clips.why(self._inputs)[1].replace("pass images=", "record it alone"))
            return None
        if call.images is None:
            raise LookupError(f"it was given to the processor as {call.why}")
        if given is not None:
            raise LookupError("images= are given beside it; leave them out, for the processor's calls are known")
        stills_call = self._beside(call)
        if batch == 1:
            return [self._row(call, call.clips, call.images, stills_call, alone=False)]
        if stills_call is not None or len(call.clips) != batch:
            raise LookupError(
                f"which of {len(call.clips)} clips belongs to which of {batch} prompts cannot be told; record one "
                "prompt at a time"
            )
        return [
            self._row(call, (replace(clip, first=0),), call.images[clip.first : clip.images.stop], None, alone=True)
            for clip in call.clips
        ]

    def _found(self) -> ProcessorCall | None:
        """The call that made the clips, under the names of its outputs or without their ``_videos`` (InternVL)."""
        call = self._clips.find(self._inputs)
        if call is None:
            named = {f"{name}_videos": name for name in self._inputs if self._is_pixel_name(name)}
            call = self._clips.find({name: self._inputs[own] for name, own in named.items()})
            if call is not None:
                self._fed_as = {
                    name: [own, self._inputs[own].ndim] for name, own in named.items() if name in call.names
                }
        return call or self._behind_images()

    def _behind_images(self) -> ProcessorCall | None:
        """The call that made the clips, whose frames follow images under the images' own name (InternVL)."""
        for name, value in self._inputs.items():
            if not (self._is_pixel_name(name) and value.is_floating_point() and value.ndim > 2):
                continue
            for frames in self._clips.clip_frames:
                if not 0 < frames < len(value):
                    continue
                call = self._clips.find({f"{name}_videos": value[-frames:]})
                stills = None if call is None else self._images.find({name: value[:-frames]})
                if call is not None and stills is not None and stills.images is not None:
                    self._stills, self._fed_as = stills, {f"{name}_videos": [name, value.ndim]}
                    return call
        return None

    def _beside(self, call: ProcessorCall) -> ProcessorCall | None:
        """The call that made images beside the clips; ``None`` where there are none."""
        if self._stills is not None:
            return self._stills
        fed = [name for name, value in self._inputs.items() if value.is_floating_point() and value.ndim >= 2]
        made = call.names | {own for own, _ in self._fed_as.values()}
        if not any(self._is_pixel_name(name) and name not in made for name in fed):
            return None
        stills_call = self._images.find(self._inputs)
        if stills_call is None or stills_call.images is None:
            raise LookupError("which images stand beside it is not known; prepare them in the same call")
        return stills_call

    def _row(
        self,
        call: ProcessorCall,
        clips: Sequence[Clip],
        frames: Sequence[Image.Image],
        stills_call: ProcessorCall | None,
        *,
        alone: bool,
    ) -> ClipRow:
        stills = [] if stills_call is None else list(stills_call.images or [])
        placed = tuple(replace(clip, first=clip.first + len(stills)) for clip in clips)
        described, lost = describe_call(self._processor.video_processor, call)
        described |= {"fed_as": self._fed_as} if self._fed_as else {}
        description = {**described, "structure": "flat", "video": described}
        if stills_call is not None:
            of_images, more = describe_call(self._processor.image_processor, stills_call)
            description, lost = {**of_images, "video": described}, lost + more
        if lost:
            raise LookupError(f"processor arguments that a trace cannot keep: {', '.join(lost)}")
        step, _ = step_of(self._processor, description, placed)
        images, made, notes = as_rgb(BlackBox(step, {}, "flat"), [*stills, *frames])
        return ClipRow(images, placed, description, made if alone else {}, notes)
