"""The native configuration of a published checkpoint, from its ``config.json`` and the shapes of its towers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol

from transformers import CLIPVisionConfig, ConvNextConfig, Dinov2Config, LlamaConfig, Phi3Config, SiglipVisionConfig

from lvlm_probe_cambrian.configuration import CambrianConfig
from lvlm_probe_cambrian.keys import LANGUAGE, Shape
from lvlm_probe_cambrian.sources import ConversionError

__all__ = ["make_config", "text_config", "tower_kind"]

# Heads that shapes do not tell, by kind and channels; 64 channels a head where nothing is said.
_HEADS = {("siglip_vision_model", 1152): 16}
_EXTRA_LARGE = 384  # channels of the first stage of ConvNeXt-XXL


class Source(Protocol):
    """What is needed of a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...


def tower_kind(name: str) -> str:
    """The kind of a tower from the name that published configurations give it.

    Raises:
        ConversionError: none of the four kinds.
    """
    lowered = name.lower()
    for sign, kind in (("convnext", "convnext"), ("siglip", "siglip_vision_model"), ("dinov2", "dinov2")):
        if sign in lowered:
            return kind
    if "clip" in lowered:
        return "clip_vision_model"
    raise ConversionError(f"the vision tower {name!r} is of no kind that is known: SigLIP, CLIP, DINOv2, ConvNeXt")


def make_config(sources: Mapping[str, Source]) -> CambrianConfig:
    """The configuration of the native model.

    Args:
        sources: by source, see ``convert.plan``.

    Raises:
        ConversionError: a tower's checkpoint is missing, or the configuration is not that of a Cambrian model.
    """
    given = dict(sources[LANGUAGE].settings)
    names = given.get("mm_vision_tower_aux_list")
    if not names:
        raise ConversionError("config.json of the checkpoint names no vision towers (mm_vision_tower_aux_list)")
    if given.get("mm_projector_type") != "sva":
        raise ConversionError(
            f"only the spatial vision aggregator is known; this model has {given.get('mm_projector_type')}"
        )
    kinds = [tower_kind(name) for name in names]
    absent = [kind for kind in kinds if kind not in sources]
    if absent or len(set(kinds)) != len(kinds):
        raise ConversionError(
            f"the checkpoint's towers are {', '.join(names)}; no checkpoint was given for: {', '.join(absent) or '–'}"
        )
    text = text_config(given)
    layers = range(int(given.get("num_of_vision_sampler_layers") or 0) if not given.get("connector_only") else 0)
    start, stride = (int(given.get(f"{name}_of_vision_sampler_layers") or 0) for name in ("start", "stride"))
    towers = {
        f"vision_config_{number}": _tower(kind, name, sources[kind])
        for number, (kind, name) in enumerate(zip(kinds, names, strict=True))
    }
    return CambrianConfig(
        text_config=text,
        **towers,
        tower_grids=[_side(count) for count in given["mm_vision_tower_aux_token_len_list"]],
        image_grid=_side(given["image_token_len"]),
        query_grids=[_side(count) for count in given["query_num_list"]],
        vision_hidden_size=int(given["vision_hidden_size"]),
        connector_depth=int(given["connector_depth"]),
        sampler_layers=[start + step * stride for step in layers],
        clip_layer=int(given.get("mm_vision_select_layer", -2)),
        # A token of its own behind the vocabulary: published prompts mark the picture with a negative id.
        image_token_id=int(text.vocab_size),
    )


def text_config(given: Mapping[str, Any]) -> Any:
    """The decoder's configuration."""
    kinds: dict[str, Any] = {"cambrian_llama": LlamaConfig, "cambrian_phi3": Phi3Config}
    kind = kinds.get(str(given.get("model_type")))
    if kind is None:
        raise ConversionError(f"model_type {given.get('model_type')!r} is none of {', '.join(kinds)}")
    known = {field.name for field in dataclasses.fields(kind)}
    kept = {name: value for name, value in given.items() if name in known}
    for name in ("architectures", "dtype", "rope_parameters", "transformers_version", "id2label", "label2id"):
        kept.pop(name, None)
    scaling = given.get("rope_scaling") or {}
    rope = {"rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
    rope |= {name: value for name, value in scaling.items() if name not in ("type", "rope_type")}
    rope["rope_theta"] = float(given.get("rope_theta") or 10000.0)
    return kind(**kept, rope_parameters=rope)


def _side(count: Any) -> int:
    side = round(int(count) ** 0.5)
    if side * side != int(count):
        raise ConversionError(f"{count} tokens of a vision tower are no square grid")
    return side


def _tower(kind: str, name: str, source: Source) -> Any:
    shapes = {_plain(key): shape for key, shape in source.shapes.items()}
    settings = dict(source.settings)
    settings = settings.get("vision_config") or settings
    if kind == "convnext":
        return _convnext(name, shapes, settings)
    stem, layers, table, hidden = {
        "siglip_vision_model": ("patch_embed.proj.weight", r"blocks\.(\d+)\.", "pos_embed", "blocks.0.mlp.fc1.weight"),
        "clip_vision_model": (
            "embeddings.patch_embedding.weight",
            r"encoder\.layers\.(\d+)\.",
            "embeddings.position_embedding.weight",
            "encoder.layers.0.mlp.fc1.weight",
        ),
        "dinov2": (
            "embeddings.patch_embeddings.projection.weight",
            r"encoder\.layer\.(\d+)\.",
            "embeddings.position_embeddings",
            "encoder.layer.0.mlp.fc1.weight",
        ),
    }[kind]
    for key in (stem, table):
        if key not in shapes:
            raise ConversionError(f"the checkpoint for {name} has no {key}: it is not one of {kind}")
    width, patch = shapes[stem][0], shapes[stem][2]
    side = _side(shapes[table][-2] - (kind != "siglip_vision_model"))
    numbers = [int(found[1]) for key in shapes if (found := re.match(layers, key))]
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": int(
            settings.get("num_attention_heads") or _HEADS.get((kind, width), max(1, width // 64))
        ),
        "patch_size": patch,
    }
    wanted = _named_size(name)
    if kind == "dinov2":
        return _dinov2(shapes, common, side, wanted, settings)
    # 384 pixels are 27 patches of 14, and 6 pixels that no patch reads.
    common["image_size"] = wanted if wanted and wanted // patch == side else side * patch
    common["intermediate_size"] = shapes[hidden][0]
    if kind == "siglip_vision_model":
        # timm computes GELU exactly; transformers' default for SigLIP is the approximation by tanh.
        return SiglipVisionConfig(**common, hidden_act="gelu", layer_norm_eps=1e-6, vision_use_head=False)
    act = settings.get("hidden_act", "quick_gelu")
    return CLIPVisionConfig(**common, hidden_act=act, layer_norm_eps=settings.get("layer_norm_eps", 1e-5))


def _dinov2(
    shapes: Mapping[str, Shape], common: dict[str, Any], side: int, wanted: int | None, settings: Mapping[str, Any]
) -> Any:
    width, patch = common["hidden_size"], common["patch_size"]
    gated = "encoder.layer.0.mlp.weights_in.weight" in shapes
    ratio = int(settings.get("mlp_ratio", 4))
    if gated:
        hidden = shapes["encoder.layer.0.mlp.weights_in.weight"][0] // 2
        # Two thirds of ratio × width, rounded up to a multiple of 8.
        fitting = [r for r in range(1, 9) if (int(int(width * r) * 2 / 3) + 7) // 8 * 8 == hidden]
        ratio = fitting[0] if fitting else ratio
    else:
        ratio = shapes["encoder.layer.0.mlp.fc1.weight"][0] // width
    return Dinov2Config(
        **common,
        # Positions are interpolated once, here, to the grid of this input size.
        image_size=wanted or side * patch,
        mlp_ratio=ratio,
        use_swiglu_ffn=gated,
        use_mask_token="embeddings.mask_token" in shapes,
        layer_norm_eps=float(settings.get("layer_norm_eps", 1e-6)),
        qkv_bias="encoder.layer.0.attention.attention.query.bias" in shapes,
    )


def _convnext(name: str, shapes: Mapping[str, Shape], settings: Mapping[str, Any]) -> Any:
    stages: dict[int, int] = {}
    for key in shapes:
        if found := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key):
            stages[int(found[1])] = max(stages.get(int(found[1]), 0), int(found[2]) + 1)
    if not stages or "stem.0.weight" not in shapes:
        raise ConversionError(
            f"the checkpoint for {name} has no stem.0.weight and stages: it is not a ConvNeXt of timm"
        )
    widths = [shapes[f"stages.{stage}.blocks.0.gamma"][0] for stage in sorted(stages)]
    return ConvNextConfig(
        hidden_sizes=widths,
        depths=[stages[stage] for stage in sorted(stages)],
        num_stages=len(stages),
        patch_size=shapes["stem.0.weight"][2],
        image_size=_named_size(name) or 1024,
        layer_norm_eps=float(settings.get("layer_norm_eps") or (1e-5 if widths[0] == _EXTRA_LARGE else 1e-6)),
    )


def _named_size(name: str) -> int | None:
    """Pixels along a side as a tower's name says them: ``…-res378``, ``…-384``, ``…-patch14-336``."""
    found = re.search(r"(?:-res|-)(\d+)$", name)
    return int(found[1]) if found else None


def _plain(key: str) -> str:
    for prefix in ("visual.trunk.", "vision_model.", "dinov2."):
        key = key.removeprefix(prefix)
    return key
