"""The eleven families that the other tests are built on: their builders stand in ``tiny_models``."""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny_models
from zoo import Backend, image_processor, member

_KINDS = {
    "llava": "A",
    "llava_next": "D",
    "llava_onevision": "D",
    "qwen2_vl": "E",
    "qwen2_5_vl": "E",
    "qwen3_vl": "E",
    "gemma3": "B",
    "internvl": "F",
    "idefics3": "G",
    "mllama": "H",
    "paligemma": "B",
}
_LARGER = {
    "llava_next": (150, 100),
    "llava_onevision": (150, 100),
    "internvl": (150, 80),
    "idefics3": (150, 100),
    "mllama": (150, 80),
}


def _processor(name: str, tokenizer: Any, backend: Backend) -> Any:
    made = tiny_models.FAMILIES[name].processor(tokenizer)
    if backend == "torchvision":
        pil = made.image_processor
        settings = {k: v for k, v in pil.to_dict().items() if k not in ("image_processor_type", "processor_class")}
        made.image_processor = image_processor(type(pil).__name__.removesuffix("Pil"), backend, **settings)
    return made


for _name, _kind in _KINDS.items():
    _family = tiny_models.FAMILIES[_name]
    member(
        name=_name,
        kind=_kind,
        model=_family.model,
        processor=partial(_processor, _name),
        tokens=_family.tokens,
        slot=_family.slot,
        named=_family.named,
        larger=_LARGER.get(_name),
        nested=_name in ("gemma3", "idefics3", "mllama", "paligemma"),
    )
