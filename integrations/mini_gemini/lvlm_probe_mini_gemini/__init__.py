"""Mini-Gemini (MGM and MGM-HD) as a native transformers model, and what ``lvlm_probe`` has to know of it.

Li et al. (2024), *Mini-Gemini: Mining the Potential of Multi-modality Vision Language Models*.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm_probe_mini_gemini.configuration import MiniGeminiConfig
    from lvlm_probe_mini_gemini.modeling import MiniGeminiForConditionalGeneration
    from lvlm_probe_mini_gemini.processing import MiniGeminiImageProcessor, MiniGeminiProcessor

__all__ = [
    "MiniGeminiConfig",
    "MiniGeminiForConditionalGeneration",
    "MiniGeminiImageProcessor",
    "MiniGeminiProcessor",
    "register",
]

_WHERE = {
    "MiniGeminiConfig": "configuration",
    "MiniGeminiForConditionalGeneration": "modeling",
    "MiniGeminiImageProcessor": "processing",
    "MiniGeminiProcessor": "processing",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """What the entry point calls: makes the Auto classes and ``lvlm_probe`` know the family. May be called again."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from lvlm_probe.models.drivers import register_original
    from lvlm_probe.models.families import Family, register_family
    from lvlm_probe_mini_gemini.configuration import MiniGeminiConfig
    from lvlm_probe_mini_gemini.modeling import MiniGeminiForConditionalGeneration, MiniGeminiModel
    from lvlm_probe_mini_gemini.original import MiniGeminiDriver, matches
    from lvlm_probe_mini_gemini.places import token_boxes
    from lvlm_probe_mini_gemini.processing import MiniGeminiImageProcessor, MiniGeminiProcessor

    AutoConfig.register(MiniGeminiConfig.model_type, MiniGeminiConfig, exist_ok=True)
    AutoModel.register(MiniGeminiConfig, MiniGeminiModel, exist_ok=True)
    AutoModelForImageTextToText.register(MiniGeminiConfig, MiniGeminiForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(
        MiniGeminiConfig, image_processor_classes={"pil": MiniGeminiImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(MiniGeminiConfig, MiniGeminiProcessor, exist_ok=True)
    family = Family(
        encoders=("model.vision_tower", "model.vision_tower_aux"),
        mergers=("model.patch_mining", "model.multi_modal_projector"),
        decoder="model.language_model",
        token_boxes=token_boxes,
    )
    register_family(MiniGeminiConfig.model_type, family)
    register_original("mini_gemini", matches=matches, adapt=MiniGeminiDriver)
