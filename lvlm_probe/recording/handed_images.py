"""The images of a processor call as they were when it was made.

An image is the user's object: it may be drawn on, shrunk in place, turned to the next page of its file, closed, or
share its memory with a camera's buffer. What is handed over is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.images.processor import ARRAY
from lvlm_probe.trace.clips import MOST_FRAMES, MOST_PIXELS, Clip
from lvlm_probe.trace.image_files import open_image

_ORIENTATION = 0x0112  # EXIF


@dataclass(frozen=True)
class Handed:
    """Images that a processor was given, as they were at that moment.

    Attributes:
        images: copies, in order, flattened; ``None`` where one cannot be brought back to an image.
        groups: number of images per prompt when they were nested (``[[a, b], [c]]``), else ``None``.
        why: what could not be brought back to an image.
        clips: of a video processor's call, each with its frames counted from the first clip's first.
    """

    images: list[Image.Image] | None
    groups: tuple[int, ...] | None
    why: str = ""
    clips: tuple[Clip, ...] = ()


def hand_over(images: Any) -> Handed:
    """The images of a call as they are now: copies that nothing the user does afterwards can reach."""
    found, groups, why = _flattened(images)
    return Handed(None if found is None else [_kept_copy(image) for image in found], groups, why)


def hand_over_clips(videos: Sequence[Any], metadata: Sequence[Any]) -> Handed:
    """The frames of a video processor's call, as it sampled them.

    Args:
        videos: one per clip: a list of frames, or an array ``(frame, row, col, channel)`` or ``(frame, channel, row,
            col)``.
        metadata: what the processor knows of each (``fps``, ``total_num_frames``, ``frames_indices``, ``duration``);
            ``None`` where nothing is known.
    """
    kept: list[Image.Image] = []
    clips: list[Clip] = []
    pixels = 0
    for video, known in zip(videos, metadata, strict=True):
        if len(video) > MOST_FRAMES:
            return Handed(None, None, f"a clip of {len(video)} frames, and {MOST_FRAMES} are kept at most")
        frames = [_opened(frame) for frame in video]
        if lost := [frame for frame, image in zip(video, frames, strict=True) if image is None]:
            return Handed(None, None, f"a clip whose frames are {_told(lost[0])}, not uint8 images")
        found = [frame for frame in frames if frame is not None]
        pixels += sum(frame.width * frame.height for frame in found)
        if pixels > MOST_PIXELS:
            size = f"{len(found)} frames of {found[0].width} x {found[0].height}"
            return Handed(None, None, f"{size}, more than the {MOST_PIXELS // 10**6} million pixels that a trace keeps")
        clips.append(_clip(len(kept), len(found), known))
        kept += [_kept_copy(frame) for frame in found]
    return Handed(kept, tuple(clip.frames for clip in clips), clips=tuple(clips))


def _clip(first: int, frames: int, metadata: Any) -> Clip:
    """A clip with what is known of it; what makes no sense is not."""
    known: Mapping[str, Any] = metadata if isinstance(metadata, Mapping) else {}
    indices = known.get("frames_indices")
    indices = None if indices is None else tuple(int(index) for index in indices)
    numbers = {
        name: float(value) if isinstance(value := known.get(name), int | float) and 0 < value < 1e9 else None
        for name in ("fps", "duration")
    }
    total = known.get("total_num_frames")
    return Clip(
        first,
        frames,
        indices if indices is not None and len(indices) == frames and min(indices) >= 0 else None,
        numbers["fps"],
        int(total) if isinstance(total, int) and total > 0 else None,
        numbers["duration"],
    )


def flatten_images(images: Any) -> tuple[list[Image.Image] | None, tuple[int, ...] | None]:
    """Images in order, and their number per prompt when nested; images are ``None`` if one cannot be recovered."""
    found, groups, _ = _flattened(images)
    return found, groups


def _flattened(images: Any) -> tuple[list[Image.Image] | None, tuple[int, ...] | None, str]:
    groups: tuple[int, ...] | None = None
    if not isinstance(images, list | tuple):
        flat: list[Any] = _unstacked(images)
    elif images and all(isinstance(item, list | tuple) for item in images):
        groups = tuple(len(item) for item in images)
        flat = [image for item in images for image in item]
    else:
        flat = list(images)
    found = [_opened(item) for item in flat]
    lost = [item for item, image in zip(flat, found, strict=True) if image is None]
    if lost:
        return None, groups, _told(lost[0])
    return [image for image in found if image is not None], groups, ""


def _unstacked(images: Any) -> list[Any]:
    """A batch of images in one array as its images."""
    return list(images) if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4 else [images]


def _told(value: Any) -> str:
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"an array of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def _opened(value: Any) -> Image.Image | None:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str | bytes | Path):  # a file or its bytes, which processors open themselves
        with contextlib.suppress(ImageError):
            return open_image(value)
        return None
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy() if value.dtype == torch.uint8 else None
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        if value.ndim == 3 and {value.shape[0], value.shape[2]} <= {1, 3, 4}:
            return None  # rows or channels first: transformers guesses, and each of its processors otherwise
        first = value.ndim == 3 and value.shape[0] in (3, 4) and value.shape[2] not in (3, 4)
        if first:
            value = value.transpose(1, 2, 0)
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4)):
            image = Image.fromarray(np.ascontiguousarray(value))
            if image.mode == "RGBA":
                image.info[ARRAY] = "channels_first" if first else "channels_last"
            return image
    return None


def _kept_copy(image: Image.Image) -> Image.Image:
    """A copy of its own pixels, which still knows its file and which way up it is."""
    turned = _turned(image)
    made = image.copy()
    made.format = image.format
    made.filename = getattr(image, "filename", "")  # type: ignore[attr-defined]
    if _turned(made) != turned:
        made.getexif()[_ORIENTATION] = turned
    return made


def same_image(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images are equal in pixels, palette, transparency, which way up they are and being an array."""
    if _turned(one) != _turned(other) or any(one.info.get(k) != other.info.get(k) for k in ("transparency", ARRAY)):
        return False
    return one.getpalette() == other.getpalette() and one.tobytes() == other.tobytes()


def _turned(image: Image.Image) -> int:
    """Which way up it is; what cannot be read as EXIF turns nothing."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def image_bytes(image: Image.Image) -> int:
    """Memory that a decoded image takes."""
    deep = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2}
    return image.width * image.height * deep.get(image.mode, 4)


def look_of(image: Image.Image) -> tuple[Any, ...]:
    """A key that equal images have in common and few others do; cheap to have."""
    middle = image.height // 2
    return image.mode, image.size, image.crop((0, middle, image.width, middle + 1)).tobytes()
