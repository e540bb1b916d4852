"""The embedded default: a tiny vision-language model that is really trained, its processor, and its scenes.

    model, processor = demo.load()
    scene = demo.scenes(1)[0]
    inputs = processor.apply_chat_template(
        scene.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)

The checkpoint is an ordinary one (`path`), so everything that takes a model directory takes this one. ``README.md``
beside this file is its model card. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lvlm_probe.demo.clip_scene import CLIP_KINDS, ClipScene, clips
from lvlm_probe.demo.document_scene import DOCUMENT_KINDS, DocumentScene, documents
from lvlm_probe.demo.scene import HARD_KINDS, KINDS, Scene, scenes

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = [
    "CLIP_KINDS",
    "DOCUMENT_KINDS",
    "HARD_KINDS",
    "KINDS",
    "ClipScene",
    "DocumentScene",
    "Scene",
    "clips",
    "documents",
    "load",
    "path",
    "scenes",
]


def path() -> Path:
    """The checkpoint's folder, as ``from_pretrained`` takes it."""
    return Path(str(resources.files(__name__))) / "checkpoint"


def load() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The demo model, float32 in eval mode on the CPU, and its processor."""
    import torch

    from lvlm_probe.models import loading

    return loading.load(path(), device="cpu", dtype=torch.float32)
