"""From the keys of published checkpoints to those of the native model: what each tensor is made of.

Four kinds of tower checkpoints are read: SigLIP and ConvNeXt as timm and open_clip name them, CLIP and DINOv2 as
transformers 4 named them. A ``Recipe`` says how a tensor is made of one of the source's, so that shapes can be checked
without reading any weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LANGUAGE", "Recipe", "Shape", "interpolated_positions", "recipes"]

Shape = tuple[int, ...]
LANGUAGE = "checkpoint"
"""Name of the source that holds decoder and aggregator; the others are named by the kind of their tower."""


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the native model is made.

    Attributes:
        source: which checkpoint, ``LANGUAGE`` or a tower's.
        key: the tensor's name in it.
        step: ``"as is"``; ``"part"``: one of ``parts`` equal pieces along the first axis; ``"unbatched"``: without its
            first axis; ``"positions"``: DINOv2's positions, interpolated to a grid of side ``part``.
        part, parts: see there.
    """

    source: str
    key: str
    step: str = "as is"
    part: int = 0
    parts: int = 1

    def shape(self, given: Shape) -> Shape:
        """Shape of the tensor it makes of one of shape ``given``."""
        if self.step == "part":
            return (given[0] // self.parts, *given[1:])
        if self.step == "unbatched":
            return given[1:]
        if self.step == "positions":
            return (given[0], self.part**2 + 1, given[2])
        return given

    def make(self, given: Tensor) -> Tensor:
        """The tensor itself."""
        if self.step == "part":
            return given.chunk(self.parts)[self.part].contiguous()
        if self.step == "unbatched":
            return given[0].contiguous()
        if self.step == "positions":
            return interpolated_positions(given, self.part)
        return given


def interpolated_positions(table: Tensor, side: int) -> Tensor:
    """DINOv2's position embeddings ``(1, 1 + n * n, channel)`` for a grid of ``side × side`` patches.

    As transformers 4.37 interpolated them in every forward pass: bicubic, by the scale (side + 0.1) / n. Later releases
    ask for the size instead, which moves the sampling points.
    """
    own = round((table.shape[1] - 1) ** 0.5)
    if own == side:
        return table
    patches = table[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / own
    resized = F.interpolate(patches.float(), scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    if resized.shape[-2:] != (side, side):
        raise ValueError(f"positions on {own} x {own} patches cannot be scaled to {side} x {side}")
    return torch.cat([table[:, :1], resized.to(table.dtype).permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def recipes(
    kind: str, shapes: Mapping[str, Shape], *, tower: int = 0, side: int = 0, layers: Sequence[int] = ()
) -> dict[str, Recipe | None]:
    """The recipes for everything that one checkpoint holds.

    Args:
        kind: ``LANGUAGE``, or the kind of a tower.
        shapes: the checkpoint's tensors.
        tower: the tower's number in the native model.
        side: patches along one side of a DINOv2 tower's input.
        layers: decoder layers that an aggregator follows.

    Returns:
        Native key to recipe. Keys that the native model has no use for by design (pooling heads, text towers) stand
        with their own name and ``None``; what is not known at all stands as ``"unexpected <key>"``.
    """
    read: dict[str, Callable[[str], dict[str, tuple[str, int, int]] | None]] = {
        LANGUAGE: lambda key: _language(key, layers),
        "siglip_vision_model": _siglip,
        "clip_vision_model": _clip,
        "dinov2": lambda key: _dinov2(key, side),
        "convnext": _convnext,
    }
    prefix = "" if kind == LANGUAGE else f"model.vision_towers.{tower}."
    found: dict[str, Recipe | None] = {}
    for key in shapes:
        made = read[kind](key)
        if made is None:
            found[key] = None
        elif not made:
            found[f"unexpected {key}"] = Recipe(kind, key)
        else:
            for name, (step, part, parts) in made.items():
                found[prefix + name] = Recipe(kind, key, step, part, parts)
    return found


Made = dict[str, tuple[str, int, int]] | None
"""Native name to step, part and parts; empty: not known; ``None``: known, and of no use."""

_AS_IS = ("as is", 0, 1)


def _renamed(key: str, rules: list[tuple[str, str]]) -> Made:
    for pattern, name in rules:
        found = re.fullmatch(pattern, key)
        if found:
            return {found.expand(name): _AS_IS}
    return {}


def _unused(key: str, patterns: str) -> bool:
    return re.match(patterns, key) is not None


def _language(key: str, layers: Sequence[int]) -> Made:
    # Old checkpoints hold tables that models compute for themselves.
    if key.endswith(("rotary_emb.inv_freq", "position_ids")):
        return None
    sampler = re.fullmatch(r"model\.vision_sampler_layers\.(\d+)\.(.+)", key)
    if sampler:
        # Published checkpoints count the aggregators, the native model has each in its layer.
        number = int(sampler[1])
        return (
            {f"model.language_model.layers.{layers[number]}.sampler.{sampler[2]}": _AS_IS}
            if number < len(layers)
            else {}
        )
    return _renamed(
        key,
        [
            (r"(lm_head\.weight)", r"\1"),
            (r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
            (r"model\.mm_projector_aux_(\d+)\.(.+)", r"model.tower_projectors.\1.\2"),
            (r"model\.vision_sampler_(\d+)\.(.+)", r"model.connectors.\1.\2"),
            (r"(model\.(?:mm_projector\..+|vision_query|image_newline))", r"\1"),
        ],
    )


def _siglip(key: str) -> Made:
    if _unused(key, r"(visual\.trunk\.)?(attn_pool|head|fc_norm)\.|visual\.head\.|text\.|logit_(scale|bias)$"):
        return None
    key = key.removeprefix("visual.trunk.")
    block = r"blocks\.(\d+)\."
    layer = r"encoder.layers.\1."
    joint = re.fullmatch(block + r"attn\.qkv\.(weight|bias)", key)
    if joint:
        return {
            joint.expand(layer) + f"self_attn.{name}_proj.{joint[2]}": ("part", part, 3)
            for part, name in enumerate("qkv")
        }
    if key == "pos_embed":
        return {"embeddings.position_embedding.weight": ("unbatched", 0, 1)}
    return _renamed(
        key,
        [
            (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embedding.\1"),
            (r"norm\.(weight|bias)", r"post_layernorm.\1"),
            (block + r"norm(\d)\.(weight|bias)", layer + r"layer_norm\2.\3"),
            (block + r"attn\.proj\.(weight|bias)", layer + r"self_attn.out_proj.\2"),
            (block + r"mlp\.(fc\d)\.(weight|bias)", layer + r"mlp.\2.\3"),
        ],
    )


def _clip(key: str) -> Made:
    if _unused(key, r"text_model\.|(text|visual)_projection\.|logit_scale$") or key.endswith("position_ids"):
        return None
    names = r"embeddings|pre_layrnorm|encoder|post_layernorm"
    return _renamed(key, [(rf"(?:vision_model\.)?((?:{names})\..+)", r"\1")])


def _dinov2(key: str, side: int) -> Made:
    if _unused(key, r"classifier\."):
        return None
    key = key.removeprefix("dinov2.")
    layer = r"encoder\.layer\.(\d+)\."
    same = r"encoder.layer.\1."
    joint = re.fullmatch(layer + r"mlp\.weights_in\.(weight|bias)", key)
    if joint:
        return {
            joint.expand(same) + f"mlp.{name}.{joint[2]}": ("part", part, 2)
            for part, name in enumerate(("gate_proj", "up_proj"))
        }
    if key == "embeddings.position_embeddings":
        return {key: ("positions", side, 1)}
    attention = layer + r"attention\."
    return _renamed(
        key,
        [
            (r"(embeddings\.(?:cls_token|mask_token|patch_embeddings\.projection\.(?:weight|bias)))", r"\1"),
            (r"(layernorm\.(?:weight|bias))", r"\1"),
            (attention + r"attention\.query\.(weight|bias)", same + r"attention.q_proj.\2"),
            (attention + r"attention\.key\.(weight|bias)", same + r"attention.k_proj.\2"),
            (attention + r"attention\.value\.(weight|bias)", same + r"attention.v_proj.\2"),
            (attention + r"output\.dense\.(weight|bias)", same + r"attention.o_proj.\2"),
            (layer + r"mlp\.weights_out\.(weight|bias)", same + r"mlp.down_proj.\2"),
            (layer + r"(mlp\.fc\d\.(?:weight|bias)|norm\d\.(?:weight|bias)|layer_scale\d\.lambda1)", same + r"\2"),
        ],
    )


def _convnext(key: str) -> Made:
    if _unused(key, r"(visual\.trunk\.)?(head|norm_pre)\.|visual\.head\.|text\.|logit_scale$") or (
        # The text tower of an open_clip checkpoint lies at its top level.
        _unused(key, r"(transformer|token_embedding|positional_embedding|ln_final|text_projection)\b")
    ):
        return None
    key = key.removeprefix("visual.trunk.")
    block = r"stages\.(\d+)\.blocks\.(\d+)\."
    layer = r"stages.\1.layers.\2."
    return _renamed(
        key,
        [
            (r"stem\.0\.(weight|bias)", r"embeddings.patch_embeddings.\1"),
            (r"stem\.1\.(weight|bias)", r"embeddings.layernorm.\1"),
            (r"stages\.(\d+)\.downsample\.(\d)\.(weight|bias)", r"stages.\1.downsampling_layer.\2.\3"),
            (block + r"gamma", layer + "layer_scale_parameter"),
            (block + r"conv_dw\.(weight|bias)", layer + r"dwconv.\3"),
            (block + r"norm\.(weight|bias)", layer + r"layernorm.\3"),
            (block + r"mlp\.fc1\.(weight|bias)", layer + r"pwconv1.\3"),
            (block + r"mlp\.fc2\.(weight|bias)", layer + r"pwconv2.\3"),
        ],
    )
