"""What the user's processor was called with: the original pictures behind the pixel inputs of a ``generate()`` call.

The image processor's ``preprocess`` is watched on the instance. A call is recognised later by its *result*: the
tensors it returned are compared with those that ``generate()`` is given, so it does not matter when, or how often, it
was called.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvlm_probe.images.processor import one_prompt_more

__all__ = ["ProcessorCall", "ProcessorWatch", "describe_call", "flatten_images"]

# Enough for a few prompts prepared ahead; each entry keeps its pictures and tensors alive.
_KEPT = 16


@dataclass(frozen=True)
class ProcessorCall:
    """One call of an image processor.

    Attributes:
        images: the pictures in the order of the call, flattened; ``None`` where one cannot be brought back to a
        picture.
        groups: number of pictures per prompt when the call nested them (``[[a, b], [c]]``), else ``None``.
        kwargs: keyword arguments of the call but ``return_tensors``.
        outputs: the tensors it returned.
    """

    images: list[Image.Image] | None
    groups: tuple[int, ...] | None
    kwargs: dict[str, Any]
    outputs: dict[str, torch.Tensor] = field(repr=False)

    @property
    def structure(self) -> str:
        """``"nested"`` when pictures were given in one list per prompt, else ``"flat"``."""
        return "flat" if self.groups is None else "nested"

    def made(self, inputs: Mapping[str, Any]) -> bool:
        """Whether these model inputs are what this call returned (up to device and dtype)."""
        shared = [name for name in self.outputs if isinstance(inputs.get(name), torch.Tensor)]
        floating = [name for name in shared if self.outputs[name].is_floating_point()]
        if not floating:
            return False
        return all(_same(self.outputs[name], inputs[name]) for name in shared)


def _same(made: torch.Tensor, given: torch.Tensor) -> bool:
    if not one_prompt_more(made, given) and made.shape != given.shape:
        return False
    return torch.equal(made.to(given.dtype).to(given.device).view(given.shape), given)


class ProcessorWatch:
    """The last calls of one image processor. ``observe`` is put in front of its ``preprocess``."""

    def __init__(self) -> None:
        self._calls: deque[ProcessorCall] = deque(maxlen=_KEPT)

    def add(self, images: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Remember one call; results without tensors cannot be recognised later and are dropped."""
        items = dict(result) if isinstance(result, Mapping) or hasattr(result, "keys") else {}
        outputs = {name: tensor for name, value in items.items() if (tensor := _tensor(value)) is not None}
        if outputs:
            pictures, groups = flatten_images(images)
            kept = {name: value for name, value in kwargs.items() if name != "return_tensors"}
            self._calls.append(ProcessorCall(pictures, groups, kept, outputs))

    def find(self, inputs: Mapping[str, Any]) -> ProcessorCall | None:
        """The latest call that made these model inputs."""
        return next((call for call in reversed(list(self._calls)) if call.made(inputs)), None)

    def clear(self) -> None:
        """Let go of all pictures and tensors."""
        self._calls.clear()

    def __len__(self) -> int:
        return len(self._calls)


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


def flatten_images(images: Any) -> tuple[list[Image.Image] | None, tuple[int, ...] | None]:
    """Pictures in order, and their number per prompt when nested; pictures are ``None`` if one cannot be recovered."""
    groups: tuple[int, ...] | None = None
    if not isinstance(images, list | tuple):
        flat: list[Any] = [images]
    elif images and all(isinstance(item, list | tuple) for item in images):
        groups = tuple(len(item) for item in images)
        flat = [picture for item in images for picture in item]
    else:
        flat = list(images)
    pictures = [_picture(item) for item in flat]
    return (None if any(picture is None for picture in pictures) else [p for p in pictures if p is not None]), groups


def _picture(value: Any) -> Image.Image | None:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        if value.ndim == 3 and value.shape[0] == 3 and value.shape[2] != 3:
            value = np.ascontiguousarray(value.transpose(1, 2, 0))
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4)):
            return Image.fromarray(value)
    return None


def describe_call(image_processor: Any, kwargs: Mapping[str, Any], structure: str) -> tuple[dict[str, Any], list[str]]:
    """A processor call as JSON for the trace, and the names of arguments that JSON cannot hold."""
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in kwargs.items():
        try:
            kept[name] = json.loads(json.dumps(_plain(value)))
        except (TypeError, ValueError):
            lost.append(name)
    to_dict = getattr(image_processor, "to_dict", None)
    name = getattr(image_processor, "processor_name", None) or type(image_processor).__name__
    description = {
        "class": name,
        "kwargs": kept,
        "structure": structure,
        "backend": "pil" if name.endswith("Pil") else str(getattr(image_processor, "backend", "") or ""),
        "config": json.loads(json.dumps(to_dict(), default=str)) if callable(to_dict) else {},
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
