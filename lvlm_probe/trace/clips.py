"""Clips: which images of a prompt are frames of a video, and when each was shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm_probe.storage.encoding import JSON
from lvlm_probe.storage.reading import SealedFile
from lvlm_probe.trace.fields import Json

MOST_FRAMES = 1000
"""Frames of one clip: a trace has no more images."""
MOST_PIXELS = 100_000_000
"""Pixels of all frames of one call: 325 of 640 x 480, or 48 of 1920 x 1080. Traces keep frames as images, and a reader
trusts no file with more."""


@dataclass(frozen=True)
class Clip:
    """A run of a prompt's images that are the frames of one video, in order of time.

    Attributes:
        first: number of its first frame among the images of the prompt.
        frames: how many there are.
        indices: number of each frame in the video it was sampled from; ``None`` where that is not known.
        fps: frames per second of that video; ``None`` where that is not known.
        total: frames of that video.
        duration: its length in seconds; ``None`` where that is not known.
    """

    first: int
    frames: int
    indices: tuple[int, ...] | None = None
    fps: float | None = None
    total: int | None = None
    duration: float | None = None

    def __post_init__(self) -> None:
        if self.first < 0 or not 1 <= self.frames <= MOST_FRAMES:
            raise ValueError(f"a clip of {self.frames} frames from image {self.first} on")
        if self.indices is not None and (len(self.indices) != self.frames or min(self.indices) < 0):
            raise ValueError(f"{len(self.indices)} indices for a clip of {self.frames} frames")
        for name, value in (("fps", self.fps), ("total", self.total), ("duration", self.duration)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"a clip with {name} {value}")

    @property
    def images(self) -> range:
        """Numbers of its frames among the images of the prompt."""
        return range(self.first, self.first + self.frames)

    @property
    def times(self) -> tuple[float, ...] | None:
        """When each frame is shown, in seconds from the start of the video; ``None`` where that is not known."""
        if self.indices is None or self.fps is None:
            return None
        return tuple(index / self.fps for index in self.indices)

    def parts(self, steps: int) -> list[range]:
        """The frames, counted from its first, that each of some even steps in time has a part of."""
        ends = [(step * self.frames // steps, -(-(step + 1) * self.frames // steps)) for step in range(steps)]
        return [range(start, max(stop, start + 1)) for start, stop in ends]

    def spread(self, most: int) -> list[int]:
        """Its frames, counted from its first, or where there are more than ``most`` so many, evenly spaced."""
        shown = np.linspace(0, self.frames - 1, min(self.frames, most)).round().astype(int)
        found: list[int] = shown.tolist()
        return found

    def to_dict(self) -> dict[str, JSON]:
        """Plain JSON, without what is not known."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, record: Any) -> Clip:
        """The clip of ``to_dict``. Raises ``TypeError`` or ``ValueError`` for anything else."""
        if not isinstance(record, Mapping):
            raise TypeError(f"a clip is an object, not a {type(record).__name__}")
        whole = {name: record.get(name) for name in ("first", "frames", "total")}
        wide = {name: record.get(name) for name in ("fps", "duration")}
        indices = record.get("indices")
        if any(type(whole[name]) is not int for name in ("first", "frames")):
            raise TypeError("a clip has whole numbers as first and frames")
        if type(whole["total"]) not in (int, type(None)) or any(
            type(value) not in (int, float, type(None)) for value in wide.values()
        ):
            raise TypeError("a clip has numbers as total, fps and duration")
        if indices is not None and not (isinstance(indices, list) and all(type(index) is int for index in indices)):
            raise TypeError("the indices of a clip are a list of whole numbers")
        return cls(**whole, **wide, indices=None if indices is None else tuple(indices))  # type: ignore[arg-type]


def images_of(target: int | Clip) -> range:
    """Numbers, among the images of a prompt, of what is explained: one image, or the frames of a clip."""
    return range(target, target + 1) if isinstance(target, int) else target.images


@dataclass(frozen=True)
class ClipList(Json):
    """Clips, as a JSON object with the list of them: in order, not one image in two."""

    kind: str = "object"

    def put(self, trace: Any, value: tuple[Clip, ...]) -> None:
        super().put(trace, {"clips": [clip.to_dict() for clip in value]})

    def read(self, file: SealedFile, base: str, sizes: dict[str, int]) -> tuple[Clip, ...]:
        found = super().read(file, base, sizes).get("clips")
        key = f"{base}/{self.key}"
        try:
            clips = tuple(map(Clip.from_dict, found if isinstance(found, list) else [found]))
        except (TypeError, ValueError) as error:
            raise file.error(key, str(error)) from error
        stop = 0
        for clip in clips:
            if clip.first < stop or clip.images.stop > sizes["images"]:
                raise file.error(
                    key, f"a clip has the images {clip.first} to {clip.images.stop - 1} of {sizes['images']}"
                )
            stop = clip.images.stop
        return clips
