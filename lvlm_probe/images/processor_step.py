"""Processors that finish the pixel inputs themselves: their image step stands in for their image processor.

``ProcessorMixin`` calls the image processor and hands its tensors on. Fuyu's processor cuts its patches out of them
first, so that nothing the image processor returns is what the model is fed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

from PIL import Image
from torch import Tensor

from lvlm_probe.images.processor import OWN_CALL, named_outputs

_METHOD = "_process_images"
"""The method of ``ProcessorMixin`` that makes the image inputs of a call."""

_known: MutableMapping[Any, ImageStep | None] = weakref.WeakKeyDictionary()


class ImageStep:
    """The image step of one processor, called as an image processor is."""

    def __init__(self, processor: Any) -> None:
        self._processor = weakref.ref(processor)  # it lives as long as its owner does, not as long as this
        inner = processor.image_processor
        self.settings = vars(inner)  # shared, so that what has been traced of it is known by its settings
        self.backend = getattr(inner, "backend", None)
        self.processor_name = type(processor).__name__

    @property
    def owner(self) -> Any:
        """The processor."""
        return self._processor()

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        return getattr(self.owner, _METHOD)(images, **kwargs)[0]

    def to_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = self.owner.image_processor.to_dict()
        return made


def image_step(processor: object | None) -> ImageStep | None:
    """The image step of a processor that makes pixel inputs of its own; ``None`` of one that only hands on.

    Asked once per processor that has such a step of its own, with a small grey image.
    """
    method = getattr(type(processor), _METHOD, None)
    inner: Any = getattr(processor, "image_processor", None)
    if inner is None or method is None or method.__module__ == "transformers.processing_utils":
        return None
    try:
        if processor not in _known:
            _known[processor] = _found(processor, inner)
        return _known[processor]
    except TypeError:  # neither hashable nor weakly referable
        return None


def image_processor_of(processor: object | None) -> Any:
    """The image processor inside a processor, or the step that stands in for it (``ImageStep``); an image processor
    is its own; ``None`` stays ``None``."""
    if processor is None:
        return None
    step = image_step(processor)
    inner = step if step is not None else getattr(processor, "image_processor", None)
    return inner if inner is not None else processor


def watched_method(processor: object | None) -> tuple[Any, str] | None:
    """Whose method makes the pixel inputs, and its name; ``None`` where there is none to watch."""
    image_processor = image_processor_of(processor)
    if isinstance(image_processor, ImageStep):
        return processor, _METHOD
    return (image_processor, "preprocess") if callable(getattr(image_processor, "preprocess", None)) else None


def _found(processor: Any, inner: Callable[..., Any]) -> ImageStep | None:
    step = ImageStep(processor)
    ours = OWN_CALL.set(True)
    try:
        plain = named_outputs(inner, inner(images=[_grey()], return_tensors="pt"))
        made = named_outputs(inner, step(images=[_grey()], return_tensors="pt"))
    except Exception:  # it needs more than the image; those known to (LFM2-VL) hand on what they are given
        return None
    finally:
        OWN_CALL.reset(ours)
    new = [value for name, value in made.items() if name not in plain and isinstance(value, Tensor)]
    return step if any(value.is_floating_point() for value in new) else None


def _grey() -> Image.Image:
    return Image.new("RGB", (64, 64), (128, 128, 128))
