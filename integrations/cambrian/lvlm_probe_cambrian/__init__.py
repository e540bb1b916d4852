"""Cambrian-1 for ``lvlm_probe``: a native transformers model with named inputs, a converter of published checkpoints,
and what ``lvlm_probe`` wants to know of it.

Installed, the model opens through ``AutoModelForImageTextToText`` once ``lvlm_probe.load`` or ``register()`` has run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm_probe_cambrian.configuration import CambrianConfig
    from lvlm_probe_cambrian.image_processing import CambrianImageProcessor
    from lvlm_probe_cambrian.modeling import CambrianForConditionalGeneration
    from lvlm_probe_cambrian.processing import CambrianProcessor
    from lvlm_probe_cambrian.shares import LayerShares, encoder_shares

__all__ = [
    "CambrianConfig",
    "CambrianForConditionalGeneration",
    "CambrianImageProcessor",
    "CambrianProcessor",
    "LayerShares",
    "encoder_shares",
    "register",
]

_HOME = {
    "CambrianConfig": "configuration",
    "CambrianForConditionalGeneration": "modeling",
    "CambrianImageProcessor": "image_processing",
    "CambrianProcessor": "processing",
    "LayerShares": "shares",
    "encoder_shares": "shares",
}


def register() -> None:
    """What the entry point calls: tells transformers and ``lvlm_probe`` of the family. Again does nothing."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    from lvlm_probe.models.drivers import register_original
    from lvlm_probe.models.families import Family, register_family
    from lvlm_probe_cambrian.configuration import CambrianConfig
    from lvlm_probe_cambrian.image_processing import CambrianImageProcessor
    from lvlm_probe_cambrian.modeling import CambrianForConditionalGeneration
    from lvlm_probe_cambrian.original import CambrianDriver, matches
    from lvlm_probe_cambrian.places import token_boxes
    from lvlm_probe_cambrian.processing import CambrianProcessor

    AutoConfig.register(CambrianConfig.model_type, CambrianConfig, exist_ok=True)
    AutoModelForImageTextToText.register(CambrianConfig, CambrianForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(CambrianConfig, image_processor_classes={"pil": CambrianImageProcessor}, exist_ok=True)
    AutoProcessor.register(CambrianConfig, CambrianProcessor, exist_ok=True)
    register_family(
        CambrianConfig.model_type,
        Family(
            encoders=("model.vision_towers.?",),
            mergers=("model.connectors", "model.mm_projector"),
            decoder="model.language_model",
            token_boxes=token_boxes,
        ),
    )
    register_original("cambrian", matches=matches, adapt=CambrianDriver)


def __getattr__(name: str) -> Any:
    """Public names, imported when they are asked for: transformers' model classes take seconds."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
