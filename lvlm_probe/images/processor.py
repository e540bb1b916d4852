"""The user's image processor as a function from images to named tensors, and the cache of what was traced of it."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lvlm_probe.errors import ImageError, ProcessorRefused
from lvlm_probe.geometry import Geometry, trace_geometry

__all__ = ["OWN_CALL", "BlackBox", "as_rgb", "compare_reference", "named_outputs", "one_prompt_more", "whole_numbers"]

OWN_CALL: ContextVar[bool] = ContextVar("lvlm_probe_own_call", default=False)
"""True while this package itself runs the user's image processor, so that a watcher on it can look away."""

_CACHED_SIZES = 4
# Geometry depends on nothing but the processor, its settings and the images' sizes, and a session that records a
# thousand images of one camera must trace once. The cache lives and dies with the user's processor object: weak keys,
# a few sizes each. It holds derived facts only, so that emptying it changes nothing but time.
_geometries: MutableMapping[object, OrderedDict[str, Geometry]] = weakref.WeakKeyDictionary()


class BlackBox:
    """The user's image processor as a function from images to named tensors."""

    def __init__(self, image_processor: Callable[..., Any], call_kwargs: dict[str, Any], structure: str) -> None:
        call = getattr(image_processor, "image_processor", None) or image_processor
        self.call: Callable[..., Any] = call
        self.name: str = getattr(call, "processor_name", None) or type(call).__name__
        if structure not in ("flat", "nested"):
            raise ImageError(f"structure must be 'flat' or 'nested'; got {structure!r}.")
        self._kwargs = {key: value for key, value in call_kwargs.items() if key not in ("images", "return_tensors")}
        self._nested = structure == "nested"

    def __call__(self, images: Sequence[Image.Image], *, prompts: int = 1) -> dict[str, Tensor]:
        """The outputs for one prompt's images, or for ``prompts`` prompts with the same ones each."""
        given: list[Any] = [list(images)] * prompts if self._nested else list(images) * prompts
        ours = OWN_CALL.set(True)
        try:
            out = self.call(images=given, return_tensors="pt", **self._kwargs)
        except Exception as error:
            sizes = ", ".join(f"{image.width}x{image.height} {image.mode}" for image in images)
            raise ImageError(
                f"{self.name} cannot process {sizes}: {type(error).__name__}: {error}. The same call fails outside "
                "the probe; change the image or the processor's settings."
            ) from error
        finally:
            OWN_CALL.reset(ours)
        return {
            key: tensor
            for key, value in named_outputs(self.call, out).items()
            if (tensor := self._tensor(key, value)) is not None
        }

    def _tensor(self, key: str, value: Any) -> Tensor | None:
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, np.ndarray) and value.dtype != object:
            return torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, (Tensor, np.ndarray)) for part in value):
            parts = [torch.as_tensor(part) for part in value]
            if any(part.shape != parts[0].shape for part in parts):
                raise ProcessorRefused(
                    f"{self.name}: {key!r} is a list of arrays of different shapes, which has no batch axis to repeat "
                    "masks along. Ask the processor to pad, or record one image per prompt."
                )
            return torch.stack(parts).cpu()
        return whole_numbers(value)  # anything else, names among them, is no input of a model

    def geometry(self, sizes: Sequence[tuple[int, int]], reference: Mapping[str, Tensor]) -> tuple[Geometry, bool]:
        """The geometry for images of these sizes, and whether it had to be traced now."""
        token = self._token(sizes, reference)
        try:
            known = _geometries.setdefault(self.call, OrderedDict())
        except TypeError:  # not hashable or not weakly referable: trace each time
            known = OrderedDict()
        if token in known:
            known.move_to_end(token)
            return known[token], False
        geometry = trace_geometry(self, sizes, reference, name=self.name)
        known[token] = geometry
        while len(known) > _CACHED_SIZES:
            known.popitem(last=False)
        return geometry, True

    def _token(self, sizes: Sequence[tuple[int, int]], reference: Mapping[str, Tensor]) -> str:
        # Settings are plain values; whatever can be called (a watcher on the instance) is none.
        settings = {name: value for name, value in getattr(self.call, "__dict__", {}).items() if not callable(value)}
        shapes = {key: list(value.shape) for key, value in reference.items()}
        state = [settings, self._kwargs, self._nested, [list(size) for size in sizes], shapes]
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()


def whole_numbers(value: Any) -> Tensor | None:
    """A list of whole numbers, nested or not, as a tensor; ``None`` for anything else."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    try:
        made = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):  # names, or rows of unequal length
        return None
    return None if made.is_floating_point() or made.is_complex() or made.dtype == torch.bool else made


def named_outputs(image_processor: Any, out: Any) -> dict[str, Any]:
    """What an image processor returned, by name; one that returns the pixels alone (Idefics) says what they are.
    A processor's own image step returns the texts that stand for the pictures beside it."""
    if isinstance(out, tuple):
        out = out[0]
    if not isinstance(out, Tensor):
        return dict(out) if isinstance(out, Mapping) or hasattr(out, "keys") else {}
    names = getattr(image_processor, "model_input_names", None) or ["pixel_values"]
    return {str(names[0]): out}


def one_prompt_more(made: Tensor, given: Tensor) -> bool:
    """Whether the processor around an image processor has put a first axis in front, the prompts, of which there is
    one (Idefics)."""
    return given.shape == (1, *made.shape)


def as_rgb(
    processor: BlackBox, images: Sequence[Image.Image]
) -> tuple[list[Image.Image], dict[str, Tensor], tuple[str, ...]]:
    """The images in the RGB that the processor sees (transparency, palettes, EXIF rotation), and its outputs for them.

    Composites are RGB. Processors differ in how they read other modes, so each plausible conversion is tried against
    the processor's output on the original itself.
    """
    truth = processor(images)
    special = [image.mode != "RGB" or image.getexif().get(0x0112, 1) != 1 for image in images]
    if not any(special):
        return list(images), truth, ()
    for convert, what in (
        (lambda image: image.convert("RGB"), "converted to RGB"),
        (_over_white, "laid over white"),
        (lambda image: ImageOps.exif_transpose(image).convert("RGB"), "turned upright (EXIF) and converted to RGB"),
        (lambda image: _over_white(ImageOps.exif_transpose(image)), "turned upright (EXIF) and laid over white"),
    ):
        candidate = [convert(image) if odd else image for image, odd in zip(images, special, strict=True)]
        out = processor(candidate)
        if out.keys() == truth.keys() and all(
            value.shape == out[key].shape and torch.equal(value, out[key]) for key, value in truth.items()
        ):
            modes = ", ".join(sorted({image.mode for image, odd in zip(images, special, strict=True) if odd}))
            return (
                candidate,
                out,
                (f"{modes} image {what}, as the processor does",) if what != "converted to RGB" else (),
            )
    modes = ", ".join(image.mode for image in images)
    raise ProcessorRefused(
        f"{processor.name}: no conversion to RGB gives what the processor makes of these images (mode {modes}), so a "
        "mask could not blend what the model sees. Call image.convert('RGB') before the processor."
    )


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def compare_reference(inputs: Mapping[str, Tensor], reference: Mapping[str, Tensor], name: str) -> list[str]:
    notes = []
    for key, value in inputs.items():
        if key not in reference:
            continue
        fed = torch.as_tensor(reference[key]).detach().cpu()
        if one_prompt_more(value, fed):
            fed = fed[0]
        if fed.shape != value.shape:
            raise ImageError(
                f"{name}: for these images {key!r} has shape {tuple(value.shape)}, but the model was run on "
                f"{tuple(fed.shape)}. These are not the images (or not the processor settings) of that run."
            )
        made = value.to(fed.dtype)
        if not torch.equal(made, fed):
            apart = float((made.double() - fed.double()).abs().max())
            notes.append(
                f"{key!r} differs by up to {apart:.3g} from what the model was run on (another backend or version?)"
            )
    return notes
