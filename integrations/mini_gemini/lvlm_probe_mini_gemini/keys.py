"""Names of weights: of the original checkpoints, of the separate encoder checkpoints, and of the native model.

Each function answers with the native name; with ``None`` for a weight that the native model rightly has no place for;
and raises ``KeyError`` for one it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["NameMap", "clip_name", "convnext_name", "original_name"]

NameMap = Callable[[str], "str | None"]

_BLOCK = {
    "conv_dw": "dwconv",
    "norm": "layernorm",
    "mlp.fc1": "pwconv1",
    "mlp.fc2": "pwconv2",
}
_MINING = {"query": "query", "aux": "key", "val": "value"}
_PROJECTOR = {"0": "linear_1", "2": "linear_2"}


def original_name(key: str) -> str | None:
    """A key of an MGM checkpoint."""
    if key == "lm_head.weight":
        return key
    if key.endswith("rotary_emb.inv_freq"):
        return None  # computed from the configuration
    if found := re.fullmatch(r"model\.((?:embed_tokens|layers|norm)\..+)", key):
        return f"model.language_model.{found[1]}"
    if found := re.fullmatch(r"model\.mm_projector\.([02])\.(weight|bias)", key):
        return f"model.multi_modal_projector.{_PROJECTOR[found[1]]}.{found[2]}"
    if found := re.fullmatch(r"model\.vlm_uni_(query|aux|val)_projector\.([01])\.(weight|bias)", key):
        return f"model.patch_mining.{_MINING[found[1]]}.{found[2]}.{found[3]}"
    if key.startswith("model.vision_tower.vision_tower."):
        return clip_name(key.removeprefix("model.vision_tower.vision_tower."))
    if found := re.fullmatch(r"model\.vision_tower_aux\.vision_(stem|stages)\.(.+)", key):
        return _convnext(f"{found[1]}.{found[2]}", key)
    raise KeyError(key)


def clip_name(key: str) -> str | None:
    """A key of a CLIP checkpoint in transformers' names (the whole model, or its vision half)."""
    if key == "logit_scale" or key.startswith(("text_model.", "text_projection.", "visual_projection.")):
        return None  # the text half
    if key.endswith("position_ids"):
        return None  # counted, not learned
    if key.startswith("vision_model."):
        return f"model.vision_tower.{key.removeprefix('vision_model.')}"
    raise KeyError(key)


def convnext_name(key: str) -> str | None:
    """A key of an open_clip checkpoint whose picture half is a ConvNeXt, or of that half alone, in timm's names."""
    if re.match(r"(stem|stages)\.", key):
        return _convnext(key, key)
    if not key.startswith("visual.trunk."):
        return None  # the text half, and the head that joins it
    trunk = key.removeprefix("visual.trunk.")
    return None if trunk.startswith("head.") else _convnext(trunk, key)


def _convnext(name: str, key: str) -> str:
    """timm's names to transformers'."""
    aux = "model.vision_tower_aux"
    if found := re.fullmatch(r"stem\.([01])\.(weight|bias)", name):
        return f"{aux}.embeddings.{('patch_embeddings', 'layernorm')[int(found[1])]}.{found[2]}"
    if found := re.fullmatch(r"stages\.(\d+)\.downsample\.([01])\.(weight|bias)", name):
        return f"{aux}.stages.{found[1]}.downsampling_layer.{found[2]}.{found[3]}"
    if found := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.gamma", name):
        return f"{aux}.stages.{found[1]}.layers.{found[2]}.layer_scale_parameter"
    if found := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(conv_dw|norm|mlp\.fc[12])\.(weight|bias)", name):
        return f"{aux}.stages.{found[1]}.layers.{found[2]}.{_BLOCK[found[3]]}.{found[4]}"
    raise KeyError(key)
