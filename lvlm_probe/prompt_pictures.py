"""The original pictures behind the pixel inputs of one ``generate()`` call, row by row of its batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from lvlm_probe.hooks import caution
from lvlm_probe.images.processor import BlackBox, as_rgb, named_outputs, whole_numbers
from lvlm_probe.recorded_path import image_processor_of
from lvlm_probe.watch import ProcessorCall, ProcessorWatch, describe_call, flatten_images

__all__ = ["NotRecorded", "PictureFinder", "PromptPictures", "RowPictures"]

# Mean difference of normalised pixel inputs: two backends stay below 0.03, two pictures are far above.
_BACKENDS_DIFFER = 0.1
_ORIENTATION = 0x0112  # EXIF


class NotRecorded(Exception):
    """This call is not recorded; the message is the sentence the user reads."""


@dataclass(frozen=True)
class RowPictures:
    images: list[Image.Image] | None = None
    call: dict[str, Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    """What the batch was fed and a row of these pictures alone would not be: local crops of another row's."""
    tokens_per_image: list[int] | None = None


@dataclass(frozen=True)
class PromptPictures:
    rows: list[RowPictures]
    notes: list[str]


class PictureFinder:
    """Finds the pictures of a ``generate()`` call: from ``images=``, or from the processor call that made its inputs.

    Args:
        processor: what was attached.
        watch: the processor calls seen so far.
        inputs: the tensors given to ``generate()``.
        given: the user's ``images=``.
        image_token_id: for dividing a flat list of pictures among the prompts of a batch.

    Attributes:
        notes: sentences for the trace.
    """

    def __init__(
        self, processor: object | None, watch: ProcessorWatch, inputs: Mapping[str, Any], *, given: Any,
        image_token_id: int | None,
    ) -> None:  # fmt: skip
        self._processor, self._watch, self._inputs = processor, watch, inputs
        self._given, self._image_token_id = given, image_token_id
        self.notes: list[str] = []

    def find(self, batch: int) -> PromptPictures:
        """The pictures of each of ``batch`` prompts.

        Raises:
            NotRecorded: which picture belongs to which prompt cannot be told.
        """
        image_processor = image_processor_of(self._processor)
        call = self._watch.find(self._inputs)
        if self._given is not None:
            images, groups = flatten_images(self._given)
            call = ProcessorCall(images, groups, call.kwargs if call else {}, call.outputs if call else {})
            if call.images and image_processor is not None and (why := self._doubt(call, image_processor)):
                caution(f"{why}; recording without them")
                return PromptPictures(
                    [RowPictures() for _ in range(batch)], [f"{why}: masks live in pixel-input space"]
                )
        if call is None or call.images is None:
            why = (
                "no processor was attached and no images= were given"
                if image_processor is None
                else "the pixel inputs come from no call of the attached processor (prepare them after attach(), or "
                "pass images= to record())"
            )
            return PromptPictures([RowPictures() for _ in range(batch)], [f"{why}: masks live in pixel-input space"])
        groups = self._groups(call, batch, image_processor)
        rows, start = [], 0
        for count in groups:
            rows.append(
                self._row_pictures(call, call.images[start : start + count], image_processor, single=batch == 1)
            )
            start += count
        return PromptPictures(rows, [])

    def _doubt(self, call: ProcessorCall, image_processor: Any) -> str:
        """Why these pictures are not used: they do not make the pixel inputs, up to the difference of two backends."""
        given = _nested(call.images or [], call.groups)
        try:
            made = image_processor(images=given, return_tensors="pt", **call.kwargs)
        except Exception as error:
            return (
                f"{type(image_processor).__name__} makes no pixel inputs of the pictures given as images= alone "
                f"({type(error).__name__}: {error})"
            )
        for name, value in made.items():
            fed = self._inputs.get(name)
            if (
                not isinstance(value, torch.Tensor)
                or not isinstance(fed, torch.Tensor)
                or not value.is_floating_point()
            ):
                continue
            if value.shape != fed.shape or float((value - fed.cpu().to(value.dtype)).abs().mean()) > _BACKENDS_DIFFER:
                return "the pictures given as images= are not the ones the pixel inputs were made from"
        return ""

    def _groups(self, call: ProcessorCall, batch: int, image_processor: Any) -> tuple[int, ...]:
        """How many pictures each row of the batch has."""
        assert call.images is not None
        if call.groups is not None and len(call.groups) == batch:
            return call.groups
        if batch == 1:
            return (len(call.images),)
        token = self._image_token_id
        counts = (self._inputs["input_ids"] == token).sum(1).tolist() if token is not None else []
        if len(call.images) == batch and all(counts):
            return (1,) * batch
        per_image = self._tokens_per_image(call.images, call.kwargs)
        if counts and per_image is not None:
            groups, start = [], 0
            for count in counts:
                end = start
                while end < len(per_image) and sum(per_image[start:end]) < count:
                    end += 1
                if sum(per_image[start:end]) != count:
                    break
                groups.append(end - start)
                start = end
            if len(groups) == batch and start == len(per_image):
                return tuple(groups)
        raise NotRecorded(
            f"{len(call.images)} pictures for a batch of {batch} prompts: which belongs to which cannot be told; "
            "nest them in the processor call, images=[[first, second], [third]], or record one prompt at a time. "
            "Nothing is recorded"
        )

    def _tokens_per_image(self, images: Sequence[Image.Image], kwargs: Mapping[str, Any]) -> list[int] | None:
        """Image tokens of each picture: what the processor makes of it alone, else what it says it would make."""
        if self._image_token_id is not None:
            counts = [self._placeholders(image, kwargs) for image in images]
            if all(counts):
                return counts
        count = getattr(self._processor, "_get_num_multimodal_tokens", None)
        if count is None:
            return None
        try:
            found = count(image_sizes=[(image.height, image.width) for image in images])
        except Exception:
            return None
        return None if found.num_image_tokens is None else [int(number) for number in found.num_image_tokens]

    def _placeholders(self, image: Image.Image, kwargs: Mapping[str, Any]) -> int:
        """How many image tokens the processor writes for a prompt of nothing but this picture; 0 where it cannot."""
        hub: Any = self._processor
        for name in ("image_token", "boi_token"):
            slot = getattr(hub, name, None)
            for given in ([image], [[image]]):
                if not isinstance(slot, str) or not callable(hub):
                    break
                try:
                    ids = hub(images=given, text=[slot], return_tensors="pt", **kwargs)["input_ids"]
                except Exception:  # families differ in what they take; the caller has other ways
                    continue
                if found := int((ids == self._image_token_id).sum()):
                    return found
        return 0

    def _row_pictures(
        self, call: ProcessorCall, images: Sequence[Image.Image], image_processor: Any, *, single: bool
    ) -> RowPictures:
        if image_processor is None:
            return RowPictures(images=[image.convert("RGB") for image in images])
        if not images:
            return RowPictures(images=[])
        description, lost = describe_call(image_processor, call.kwargs, call.structure)
        if lost:
            self.notes.append(
                f"processor arguments that cannot be stored and are left out on replay: {', '.join(lost)}"
            )
        if any(image.mode != "RGB" or image.getexif().get(_ORIENTATION, 1) != 1 for image in images):
            # Transparency, palettes, rotation: the trace keeps the picture in the RGB that the processor saw.
            images, _, notes = as_rgb(BlackBox(image_processor, dict(call.kwargs), call.structure), images)
            self.notes += notes
        inputs: dict[str, torch.Tensor] = {}
        absent: frozenset[str] = frozenset()
        if not single:
            # Rows of one batch share padding; what one row alone would have been given comes from the processor again.
            given = _nested(images, (len(images),) if call.structure == "nested" else None)
            made = named_outputs(image_processor, image_processor(images=given, return_tensors="pt", **call.kwargs))
            whole = {
                name: value if isinstance(value, torch.Tensor) else whole_numbers(value) for name, value in made.items()
            }
            inputs = {name: value for name, value in whole.items() if value is not None}
            absent = frozenset(call.outputs) - frozenset(made)
        tokens = self._tokens_per_image(images, call.kwargs) if len(images) > 1 else None
        return RowPictures(list(images), description, dict(call.kwargs), inputs, absent, tokens)


def _nested(images: Sequence[Image.Image], groups: Sequence[int] | None) -> list[Any]:
    """Pictures in the nesting of the processor call: flat, or one list per prompt."""
    if groups is None:
        return list(images)
    ends = list(itertools.accumulate(groups))
    return [list(images[end - count : end]) for count, end in zip(groups, ends, strict=True)]
