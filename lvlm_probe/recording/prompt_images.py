"""The original images behind the pixel inputs of one ``generate()`` call, row by row of its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from lvlm_probe.errors import ImageError
from lvlm_probe.images.processor import (
    OWN_CALL,
    BlackBox,
    as_rgb,
    compare_reference,
    named_outputs,
    whole_numbers,
    with_settings,
)
from lvlm_probe.images.processor_step import image_processor_of, watched_method
from lvlm_probe.recording.handed_images import hand_over
from lvlm_probe.recording.processor_watch import ProcessorCall, ProcessorWatch, describe_call
from lvlm_probe.recording.prompt_clips import ClipFinder
from lvlm_probe.trace.clips import Clip
from lvlm_probe.trace.image_files import encode_image
from lvlm_probe.trace.records import ImageRecord

_ORIENTATION = 0x0112  # EXIF


class NotRecorded(Exception):
    """This call is not recorded; the message is the sentence the user reads."""


@dataclass(frozen=True)
class RowImages:
    images: list[Image.Image] | None = None
    call: dict[str, Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    """What the batch was fed and a row of these images alone would not be: local crops of another row's."""
    tokens_per_image: list[int] | None = None
    records: list[ImageRecord] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    clips: tuple[Clip, ...] = ()
    """Which of the images are frames."""


def encoded(row: RowImages, on_error: Callable[[str, BaseException], None]) -> RowImages:
    """The row with its images as files; without any where one cannot be made into a file: the answer is known all the
    same."""
    try:
        return replace(row, records=[ImageRecord(*encode_image(image), *image.size) for image in row.images or []])
    except Exception as error:
        on_error("images", error)
        return RowImages(notes=(f"no image is kept, for it cannot be encoded: {type(error).__name__}: {error}",))


@dataclass(frozen=True)
class PromptImages:
    rows: list[RowImages]
    notes: list[str]


class ImageFinder:
    """Finds the images of a ``generate()`` call: from ``images=``, or from the processor call that made its inputs.

    Args:
        processor: what was attached.
        watch: the processor calls seen so far.
        inputs: the tensors given to ``generate()``.
        given: the user's ``images=``.
        image_token_id: for dividing a flat list of images among the prompts of a batch.
        is_pixel_name: whether an input carries the image, so that a mask has to reach it.
        clips: the calls of its video processor seen so far.

    Attributes:
        notes: sentences for the trace.
        cautions: what the user is warned of, ``(kind, sentence)``.
    """

    def __init__(
        self,
        processor: object | None,
        watch: ProcessorWatch,
        inputs: Mapping[str, Any],
        *,
        given: Any,
        image_token_id: int | None,
        is_pixel_name: Callable[[str], bool] = lambda name: False,
        clips: ProcessorWatch | None = None,
    ) -> None:
        # Some image processors return a mask of patches under the name that the prompt's mask has (Kosmos-2.5).
        mine = {name: v for name, v in inputs.items() if name != "attention_mask" or is_pixel_name(name)}
        self._processor, self._watch, self._inputs = processor, watch, mine
        self._is_pixel_name = is_pixel_name
        self._given, self._image_token_id = given, image_token_id
        self._clips = None if clips is None else ClipFinder(processor, watch, clips, mine, is_pixel_name)
        self.notes: list[str] = []
        self.cautions: list[tuple[str, str]] = []

    def find(self, batch: int, on_error: Callable[[str, BaseException], None]) -> PromptImages:
        """The images of each of ``batch`` prompts; none where the search fails, which ``on_error`` is told.

        Raises:
            NotRecorded: which image belongs to which prompt cannot be told.
        """
        ours = OWN_CALL.set(True)  # the processor is asked again, and that is no call of the user's
        try:
            return self._find(batch)
        except NotRecorded:
            raise
        except Exception as error:
            on_error("images", error)
            return self._without(batch, "images", f"no image is kept: {type(error).__name__}: {error}", warn=False)
        finally:
            OWN_CALL.reset(ours)

    def _with_clips(self, batch: int) -> PromptImages | None:
        """The images of prompts that hold videos; ``None`` where none does."""
        if self._clips is None:
            return None
        try:
            found = self._clips.find(batch, given=self._given)
        except (LookupError, ImageError) as error:
            raise NotRecorded(f"the prompt holds a video, and {error}; nothing is recorded") from error
        if found is None:
            return None
        rows = [RowImages(row.images, row.call, inputs=row.inputs, notes=row.notes, clips=row.clips) for row in found]
        return PromptImages(rows, [])

    def _find(self, batch: int) -> PromptImages:
        if (found := self._with_clips(batch)) is not None:
            return found
        image_processor = image_processor_of(self._processor)
        call = self._watch.find(self._inputs)
        if self._given is not None:
            handed = hand_over(self._given)
            own = ProcessorCall(handed.images, handed.groups, {}, why=handed.why)
            call = own if call is None else replace(call, images=own.images, groups=own.groups, why=own.why, shares=())
        if call is None or call.images is None:
            return self._unknown(batch, image_processor, call)
        if image_processor is not None:
            try:
                image_processor, _ = with_settings(image_processor, call.config)
                if self._given is not None:
                    self.notes += self._compared(call, image_processor)
                elif beside := self._beside(call):
                    raise ImageError(
                        f"the model was also fed {', '.join(beside)}, which the attached processor does not return, so "
                        f"that a mask would not reach it; attach the whole processor that made the inputs"
                    )
            except ImageError as error:
                told = "the images given as images= are not the ones the pixel inputs were made from: "
                return self._without(batch, "images", f"{told if self._given is not None else ''}{error}")
        groups = self._groups(call, batch)
        rows, start = [], 0
        for count in groups:
            rows.append(self._row_images(call, call.images[start : start + count], image_processor, single=batch == 1))
            start += count
        return PromptImages(rows, [])

    def _unknown(self, batch: int, image_processor: Any, call: ProcessorCall | None) -> PromptImages:
        if image_processor is None:
            note = "no processor was attached and no images= were given: masks live in pixel-input space"
            return PromptImages([RowImages() for _ in range(batch)], [note])
        if watched_method(self._processor) is None:
            note = (
                f"{type(self._processor).__name__} has no preprocess() that could be watched, and no images= were "
                f"given: masks live in pixel-input space"
            )
            return PromptImages([RowImages() for _ in range(batch)], [note])
        if call is not None:
            why = (
                f"the image was given to the processor as {call.why}, which cannot be brought back to an image; "
                f"give it PIL images or uint8 arrays, or pass images="
            )
            return self._without(batch, "unreadable", why)
        return self._without(batch, *self._watch.why(self._inputs))

    def _without(self, batch: int, kind: str, why: str, *, warn: bool = True) -> PromptImages:
        why = why.rstrip(".")
        if warn:
            self.cautions.append((kind, f"a trace without its image: {why}"))
        return PromptImages([RowImages() for _ in range(batch)], [f"{why}: masks live in pixel-input space"])

    def _beside(self, call: ProcessorCall) -> list[str]:
        """Images that the model was fed and this call did not make."""
        fed = (name for name, value in self._inputs.items() if value.is_floating_point() and value.ndim >= 3)
        return sorted(name for name in fed if self._is_pixel_name(name) and name not in call.names)

    def _compared(self, call: ProcessorCall, image_processor: Any) -> list[str]:
        """Notes on how the pixel inputs differ from what the processor makes of the images given as ``images=``.

        Raises:
            ImageError: by more than another backend explains, or it makes none of them.
        """
        name = getattr(image_processor, "processor_name", None) or type(image_processor).__name__

        def run(images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
            return _outputs(image_processor, _nested(images, call.groups), call.kwargs)

        images = call.images or []
        try:
            made = run(images)
        except Exception as error:
            raise ImageError(f"{name} makes no pixel inputs of them alone ({type(error).__name__}: {error})") from error
        return compare_reference(run, images, made, self._inputs, name, because=" (another backend or dtype)")

    def _groups(self, call: ProcessorCall, batch: int) -> tuple[int, ...]:
        """How many images each row of the batch has."""
        assert call.images is not None
        if call.groups is not None and len(call.groups) == batch:
            return call.groups
        if batch == 1:
            return (len(call.images),)
        if len(call.shares) == batch:
            return call.shares
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
            f"{len(call.images)} images for a batch of {batch} prompts: which belongs to which cannot be told; "
            "nest them in the processor call, images=[[first, second], [third]], or record one prompt at a time. "
            "Nothing is recorded"
        )

    def _tokens_per_image(self, images: Sequence[Image.Image], kwargs: Mapping[str, Any]) -> list[int] | None:
        """Image tokens of each image: what the processor makes of it alone, else what it says it would make."""
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
        """How many image tokens the processor writes for a prompt of nothing but this image; 0 where it cannot."""
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

    def _row_images(
        self, call: ProcessorCall, images: Sequence[Image.Image], image_processor: Any, *, single: bool
    ) -> RowImages:
        if image_processor is None:
            return RowImages(images=[image.convert("RGB") for image in images])
        if not images:
            return RowImages(images=[])
        description, lost = describe_call(image_processor, call)
        if lost:
            self.notes.append(
                f"processor arguments that cannot be stored and are left out on replay: {', '.join(lost)}"
            )
        if any(image.mode != "RGB" or image.getexif().get(_ORIENTATION, 1) != 1 for image in images):
            # Transparency, palettes, rotation: the trace keeps the image in the RGB that the processor saw.
            images, _, notes = as_rgb(BlackBox(image_processor, dict(call.kwargs), call.structure), images)
            self.notes += notes
        inputs: dict[str, torch.Tensor] = {}
        absent: frozenset[str] = frozenset()
        if not single:
            # Rows of one batch share padding; what one row alone would have been given comes from the processor again.
            given = _nested(images, (len(images),) if call.structure == "nested" else None)
            inputs = _outputs(image_processor, given, call.kwargs)
            absent = call.names - inputs.keys()
        tokens = self._tokens_per_image(images, call.kwargs) if len(images) > 1 else None
        return RowImages(list(images), description, dict(call.kwargs), inputs, absent, tokens)


def _outputs(image_processor: Any, images: Any, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    made = named_outputs(image_processor, image_processor(images=images, return_tensors="pt", **kwargs))
    whole = {name: value if isinstance(value, torch.Tensor) else whole_numbers(value) for name, value in made.items()}
    return {name: value for name, value in whole.items() if value is not None}


def _nested(images: Sequence[Image.Image], groups: Sequence[int] | None) -> list[Any]:
    """Images in the nesting of the processor call: flat, or one list per prompt."""
    if groups is None:
        return list(images)
    ends = list(itertools.accumulate(groups))
    return [list(images[end - count : end]) for count, end in zip(groups, ends, strict=True)]
