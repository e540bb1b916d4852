"""Calls of the user's processor: the original images behind the pixel inputs of a ``generate()`` call.

The image processor's ``preprocess`` is watched on the instance. What it was given and what it returned belong to the
user, who may draw on the image, turn the page of a file, or add noise to the tensors in place; so images are copied
when the call is made, and of the tensors nothing is kept but a hash per row, in the dtype they had and in half
precision.

A call is recognised later by those hashes, row by row: inputs may have been cast, moved, joined with those of other
calls, repeated, put into another order, or filled up with zeros to the longest of a batch. Images are kept up to
``KEPT_BYTES``; of calls whose images had to go a digest stays, so that the reason can be told.
"""

from __future__ import annotations

import copy
import json
import logging
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.images.clips import NOT_REPEATED
from lvlm_probe.images.processor import NOT_KEPT, named_outputs, processor_settings
from lvlm_probe.process import lock
from lvlm_probe.recording.handed_images import (
    Handed,
    hand_over,
    hand_over_clips,
    image_bytes,
    look_of,
    same_image,
)
from lvlm_probe.recording.recognition import Prints, cover, digest, prints_of, readings, shares_of
from lvlm_probe.trace.clips import Clip

_log = logging.getLogger("lvlm_probe")

KEPT_BYTES = 512 << 20
"""Bytes of images (and of hashes) that a watch holds: some 500 images of 640 x 480, or 10 of 12 megapixels. The
latest call is held whatever its size."""

_SAMPLED: ContextVar[list[tuple[Any, Any]] | None] = ContextVar("lvlm_probe_sampled", default=None)

_DIGESTS = 4096  # of calls whose images were let go: 32 bytes each


@dataclass(frozen=True)
class ProcessorCall:
    """One call of an image processor, or several whose outputs were joined.

    Attributes:
        images, groups: as in ``Handed``.
        kwargs: keyword arguments of the call that a replay needs.
        names: the outputs it returned.
        config: the processor's own settings at the call, JSON; ``None`` where they are not known.
        shares: number of images of each call that was joined.
        why, clips: as in ``Handed``.
    """

    images: list[Image.Image] | None
    groups: tuple[int, ...] | None
    kwargs: dict[str, Any]
    names: frozenset[str] = frozenset()
    config: dict[str, Any] | None = None
    shares: tuple[int, ...] = ()
    why: str = ""
    clips: tuple[Clip, ...] = ()

    @property
    def structure(self) -> str:
        """``"nested"`` when images were given in one list per prompt, else ``"flat"``."""
        return "flat" if self.groups is None else "nested"


@dataclass(frozen=True)
class _Part:
    """Outputs that stand for ``images`` of a call: all of them, those of one prompt, or one."""

    call: _Kept
    prints: dict[str, Prints]
    images: slice
    groups: tuple[int, ...] | None


@dataclass(eq=False)
class _Kept:
    call: ProcessorCall
    settings: str
    parts: list[_Part] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    size: int = 0


class ProcessorWatch:
    """The calls of one image processor. Any number of threads may use it at once."""

    def __init__(self, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._budget = kept_bytes
        self._lock = lock()
        self._calls: deque[_Kept] = deque()  # oldest first
        self._bytes = 0
        self._kept_images: dict[int, tuple[Any, Image.Image, int]] = {}  # by id: look, image, in how many calls
        self._looks: dict[Any, list[int]] = {}
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()
        self._returned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._seen = self._dropped = 0
        self._missed = ""

    # ------------------------------------------------------------------ what is kept

    def observe(
        self,
        image_processor: Any,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        on_error: Callable[[Exception], None],
    ) -> Any:
        """Call ``method``, the user's own, and remember it. What goes wrong here is told to ``on_error`` alone."""
        try:
            handed = hand_over(args[0] if args else kwargs.get("images"))
        except Exception as error:
            self._miss(error, on_error)
            return method(*args, **kwargs)
        result = method(*args, **kwargs)
        try:
            self.add(handed, kwargs, named_outputs(image_processor, result), image_processor)
        except Exception as error:
            self._miss(error, on_error)
        return result

    def observe_clips(
        self,
        video_processor: Any,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        on_error: Callable[[Exception], None],
    ) -> Any:
        """As ``observe``, for a call of a video processor: what is remembered are the frames that it sampled."""
        sampled: list[tuple[Any, Any]] = []
        seen = _SAMPLED.set(sampled)
        try:
            result = method(*args, **kwargs)
        finally:
            _SAMPLED.reset(seen)
        try:
            given = args[0] if args else kwargs.get("videos")
            videos, metadata = sampled[-1] if sampled else _unsampled(given, kwargs)
            handed = hand_over_clips(videos, [None] * len(videos) if metadata is None else metadata)
            self.add(handed, kwargs, named_outputs(video_processor, result), video_processor)
        except Exception as error:
            self._miss(error, on_error)
        return result

    @staticmethod
    def sampled(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the method by which a video processor decodes and samples videos, and note what it returns."""
        result = method(*args, **kwargs)
        if (notes := _SAMPLED.get()) is not None and isinstance(result, tuple) and len(result) == 2:
            notes.append(result)
        return result

    def _miss(self, error: Exception, on_error: Callable[[Exception], None]) -> None:
        _log.debug("a processor call could not be kept", exc_info=error)
        self._missed = f"{type(error).__name__}: {error}"
        on_error(error)

    def add(
        self, images: Any, kwargs: Mapping[str, Any], result: Mapping[str, Any], image_processor: Any = None
    ) -> None:
        """Remember one call; results without tensors cannot be recognised later and are dropped.

        Args:
            images: its images, or what ``hand_over`` made of them before the call.
            kwargs: its keyword arguments.
            result: its outputs by name.
            image_processor: whose settings count.
        """
        handed = images if isinstance(images, Handed) else hand_over(images)
        outputs = {name: tensor for name, value in result.items() if (tensor := _tensor(value)) is not None}
        if not any(value.is_floating_point() for value in outputs.values()):
            return
        prints = {name: prints_of(value) for name, value in outputs.items()}
        moment = NOT_REPEATED if handed.clips else NOT_KEPT
        kept = {name: _copied(value) for name, value in kwargs.items() if name not in moment}
        config = processor_settings(image_processor)
        call = ProcessorCall(
            handed.images, handed.groups, kept, frozenset(result), config, why=handed.why, clips=handed.clips
        )
        settings = json.dumps([config, kept], sort_keys=True, default=repr)
        with self._lock:
            self._seen += 1
            self._returned.update((id(value), value) for value in result.values() if isinstance(value, torch.Tensor))
            entry = _Kept(call, settings)
            if handed.images is not None:
                shared = [self._share(image, entry) for image in handed.images]
                entry.call = replace(call, images=shared)
            entry.parts = _parts(entry, outputs, prints)
            entry.size = sum(len(rows) for each in prints.values() for _, rows in each.values())
            self._calls.append(entry)
            self._bytes += entry.size
            while self._bytes > self._budget and len(self._calls) > 1:
                self._forget()

    def _share(self, image: Image.Image, entry: _Kept) -> Image.Image:
        """The image, or an equal one that is held already: one image is often asked many questions."""
        look = look_of(image)
        for number in self._looks.get(look, []):
            _, known, count = self._kept_images[number]
            if known is image or same_image(known, image):
                self._kept_images[number] = look, known, count + 1
                entry.images.append(number)
                return known
        number = id(image)
        self._kept_images[number] = look, image, 1
        self._looks.setdefault(look, []).append(number)
        self._bytes += image_bytes(image)
        entry.images.append(number)
        return image

    def _forget(self) -> None:
        entry = self._calls.popleft()
        self._bytes -= entry.size
        self._dropped += 1
        for number in entry.images:
            look, image, count = self._kept_images[number]
            if count > 1:
                self._kept_images[number] = look, image, count - 1
                continue
            del self._kept_images[number]
            self._looks[look].remove(number)
            if not self._looks[look]:
                del self._looks[look]
            self._bytes -= image_bytes(image)
        for name, prints in entry.parts[0].prints.items():
            for dtype, rows in prints.items():
                self._forgotten[digest(name, dtype, rows)] = None
        while len(self._forgotten) > _DIGESTS:
            self._forgotten.popitem(last=False)

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def clip_frames(self) -> list[int]:
        """Numbers of frames of the calls that are held, the latest first."""
        with self._lock:
            counts = [sum(clip.frames for clip in entry.call.clips) for entry in reversed(self._calls)]
        return list(dict.fromkeys(counts))

    # ------------------------------------------------------------------ what is found

    def find(self, inputs: Mapping[str, Any]) -> ProcessorCall | None:
        """The call that made these model inputs, or all those that did, as one; ``None`` where part of the inputs was
        made by none. Of calls that made the same the latest."""
        with self._lock:
            parts = [part for entry in reversed(self._calls) for part in entry.parts]
        names = {name for part in parts for name in part.prints}
        given = {name: value for name, value in inputs.items() if name in names and isinstance(value, torch.Tensor)}
        if not any(value.is_floating_point() for value in given.values()):
            return None
        for filled in (False, True):
            for rows in readings(given, filled):
                if found := cover(rows, parts, filled):
                    return _joined(found)
        return None

    def why(self, inputs: Mapping[str, Any]) -> tuple[str, str]:
        """The reason why ``find`` found none: a word for the kind, and a sentence with the way out."""
        floating = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        with self._lock:
            names = {name for entry in self._calls for name in entry.call.names}
            again = [name for name, value in floating.items() if self._returned.get(id(value)) is value]
            gone = any(
                digest(name, value.dtype, rows) in self._forgotten
                for name, value in floating.items()
                for rows in prints_of(value, (value.dtype,)).values()
            )
            seen, dropped = self._seen, self._dropped
        if self._missed:
            return "watch", f"a call of the attached processor could not be watched ({self._missed}); pass images="
        if not seen:
            return "before", (
                "the attached processor has made nothing since attach(): the pixel inputs were prepared before it, or "
                "in another process (a DataLoader worker, a server); prepare them after attach() and in this process, "
                "or pass images="
            )
        if gone:
            return "forgotten", (
                f"these inputs were prepared more than {len(self)} processor calls ago, and images are held up to "
                f"{self._budget >> 20} MiB; prepare fewer prompts ahead, or pass images="
            )
        if names and not names & floating.keys():
            return "names", (
                f"the model was fed {', '.join(sorted(floating))}, which the attached processor does not return (it "
                f"returns {', '.join(sorted(names))}): attach the whole processor that made the inputs"
            )
        if again:
            return "changed", (
                f"{', '.join(again)} was changed in place after the processor returned it, so that no image makes "
                f"these inputs"
            )
        older = f", more than {len(self)} calls ago" if dropped else ""
        return "unknown", (
            f"the pixel inputs are not what the attached processor returned in any of its {seen} call(s) since "
            f"attach(): they were changed after the call, or prepared before attach(), in another process{older}; "
            f"prepare them after attach() and in this process, or pass images="
        )


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)  # a dict of sizes may be changed for the next call
    except Exception:
        return value


def _parts(entry: _Kept, outputs: Mapping[str, torch.Tensor], prints: dict[str, Prints]) -> list[_Part]:
    """The whole call, and each of its prompts or images where the outputs can be divided among them."""
    call = entry.call
    count = len(call.images) if call.images is not None else 0
    parts = [_Part(entry, prints, slice(0, count), call.groups)]
    if count < 2:
        return parts
    units = [call.groups] if call.groups is not None and len(call.groups) > 1 else []
    for sizes in (*units, *([] if call.clips else [(1,) * count])):
        shares = {name: shares_of(value, len(sizes), outputs) for name, value in outputs.items()}
        if any(share is None for share in shares.values()):
            continue
        start = 0
        for number, size in enumerate(sizes):
            own = {
                name: {dtype: (tail, rows[share[number]]) for dtype, (tail, rows) in prints[name].items()}
                for name, share in shares.items()
                if share is not None
            }
            groups = None if call.groups is None else (size,)
            parts.append(_Part(entry, own, slice(start, start + size), groups))
            start += size
        break
    return parts


def _joined(parts: Sequence[_Part]) -> ProcessorCall | None:
    """The calls behind these parts as one; ``None`` where their settings differ, for no one call makes all of it."""
    first = parts[0].call
    if any(part.call.settings != first.settings for part in parts):
        return None
    if len({part.groups is None for part in parts}) > 1:
        return None
    names = frozenset(name for part in parts for name in part.call.call.names)
    lost = next((part.call.call.why for part in parts if part.call.call.images is None), None)
    images = [image for part in parts for image in (part.call.call.images or [])[part.images]]
    groups = None if parts[0].groups is None else tuple(size for part in parts for size in part.groups or ())
    shares = tuple(part.images.stop - part.images.start for part in parts)
    return replace(
        first.call,
        images=None if lost is not None else images,
        groups=groups,
        names=names,
        shares=shares,
        why=lost or "",
        clips=_counted(clip for part in parts for clip in _clips_in(part)),
    )


def _clips_in(part: _Part) -> list[Clip]:
    return [clip for clip in part.call.call.clips if part.images.start <= clip.first < part.images.stop]


def _counted(clips: Iterable[Clip]) -> tuple[Clip, ...]:
    """Clips one after another, from image 0 on."""
    made: list[Clip] = []
    for clip in clips:
        made.append(replace(clip, first=made[-1].images.stop if made else 0))
    return tuple(made)


def _unsampled(videos: Any, kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The clips that a video processor was given, of one that samples none."""
    if kwargs.get("do_sample_frames"):
        raise ImageError("which frames this video processor samples cannot be seen")
    if isinstance(videos, np.ndarray | torch.Tensor):
        clips = [videos] if videos.ndim == 4 else list(videos)
    else:
        flat = list(videos)
        of_frames = isinstance(flat[0], Image.Image) or getattr(flat[0], "ndim", 0) == 3
        clips = [flat] if of_frames else flat
    metadata = kwargs.get("video_metadata")
    return clips, [metadata] if isinstance(metadata, Mapping) else metadata


def _tensor(value: Any) -> torch.Tensor | None:
    """A result as the tensor that ProcessorMixin will make of it (it asks for tensors after joining with the text)."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(part, torch.Tensor) for part in value):
            return torch.stack(list(value))  # not by way of NumPy, which has no bfloat16
        array = np.asarray(value)
    except (RuntimeError, TypeError, ValueError):  # of unequal shapes
        return None
    return torch.as_tensor(array) if array.dtype.kind in "iufb" else None


# ---------------------------------------------------------------------------------------------------- description


def describe_call(image_processor: Any, call: ProcessorCall) -> tuple[dict[str, Any], list[str]]:
    """A processor call as JSON for the trace, and the names of arguments that JSON cannot hold."""
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in call.kwargs.items():
        try:
            kept[name] = json.loads(json.dumps(_plain(value)))
        except (TypeError, ValueError):
            lost.append(name)
    name = getattr(image_processor, "processor_name", None) or type(image_processor).__name__
    description = {
        "class": name,
        "kwargs": kept,
        "structure": call.structure,
        "backend": "pil" if name.endswith("Pil") else str(getattr(image_processor, "backend", "") or ""),
        "config": processor_settings(image_processor) if call.config is None else call.config,
    }
    return description, lost


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if hasattr(value, "value"):  # an enumeration, PILImageResampling among them
        return value.value
    if isinstance(value, int | float | str | bool) or value is None:
        return value
    raise TypeError(type(value).__name__)
