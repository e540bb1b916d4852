"""Configurations of small Cambrian models: for tests, and to train one from scratch on pictures of your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import CLIPVisionConfig, ConvNextConfig, Dinov2Config, LlamaConfig, Phi3Config, SiglipVisionConfig

from lvlm_probe_cambrian.configuration import TOWERS, CambrianConfig

__all__ = ["small_config", "small_tower"]


def small_tower(kind: str, size: int, *, width: int = 32, layers: int = 2, heads: int = 4, patch: int = 14) -> Any:
    """Configuration of a small vision tower.

    Args:
        kind: one of ``configuration.TOWERS``.
        size: side of its input, pixels; for ConvNeXt a multiple of 32.
        width: channels of a ViT, or of the last stage of a ConvNeXt (a multiple of 8).
        layers: of a ViT; of each stage of a ConvNeXt one.
        patch: side of a ViT's patches, pixels.
    """
    vit: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
    }
    if kind == "siglip_vision_model":
        return SiglipVisionConfig(**vit, intermediate_size=2 * width, hidden_act="gelu", vision_use_head=False)
    if kind == "clip_vision_model":
        return CLIPVisionConfig(**vit, intermediate_size=2 * width)
    if kind == "dinov2":
        return Dinov2Config(**vit, mlp_ratio=2)
    if kind == "convnext":
        widths = [width // 8, width // 4, width // 2, width]
        # A layer scale of 1e-6, the default, takes long to train away.
        return ConvNextConfig(
            hidden_sizes=widths,
            depths=[1, 1, 1, 1],
            image_size=size,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
        )
    raise ValueError(f"a vision tower is one of {', '.join(TOWERS)}, not {kind!r}")


def small_config(
    *,
    vocab_size: int,
    image_token_id: int,
    towers: Sequence[tuple[str, int]] = (
        ("siglip_vision_model", 58),
        ("clip_vision_model", 56),
        ("dinov2", 70),
        ("convnext", 64),
    ),
    tower_grids: Sequence[int] | None = None,
    image_grid: int = 4,
    tower_width: int = 32,
    tower_layers: int = 2,
    vision_hidden_size: int = 32,
    vision_heads: int = 4,
    connector_depth: int = 2,
    decoder: str = "llama",
    hidden_size: int = 48,
    layers: int = 4,
    sampler_layers: Sequence[int] = (0, 2),
    **text: Any,
) -> CambrianConfig:
    """Configuration of a small Cambrian.

    Args:
        vocab_size, image_token_id: of the tokenizer that goes with it.
        towers: kind and input size of each, one to four of any kinds.
        tower_grids: side of each tower's token grid, a multiple of ``image_grid``; by default twice ``image_grid`` for
            a ConvNeXt and ``image_grid`` for the others.
        image_grid: side of the grid of image tokens.
        decoder: ``"llama"`` or ``"phi3"``.
        hidden_size, layers: of the decoder.
        sampler_layers: decoder layers after which image tokens look at the towers once more.
        text: further settings of the decoder's configuration (``eos_token_id``, ``intermediate_size``, …).
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **text,
    }
    grids = list(tower_grids or (image_grid * (2 if kind == "convnext" else 1) for kind, _ in towers))
    parts = {
        f"vision_config_{number}": small_tower(kind, size, width=tower_width, layers=tower_layers)
        for number, (kind, size) in enumerate(towers)
    }
    return CambrianConfig(
        text_config=LlamaConfig(**settings) if decoder == "llama" else Phi3Config(**settings),
        **parts,
        tower_grids=grids,
        image_grid=image_grid,
        vision_hidden_size=vision_hidden_size,
        vision_heads=vision_heads,
        connector_depth=connector_depth,
        sampler_layers=list(sampler_layers),
        image_token_id=image_token_id,
    )
