"""Families of kind E: a picture is resized to a multiple of the patch and cut into one flat list of patches.

Most are descendants of Qwen-VL; ``grids_more`` has those that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import transformers
from tiny_models import text_config
from zoo import Backend, ask, image_processor, member

QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 140 * 140}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def rope_text(ids: dict[str, int], *, interleaved: bool = True, **overrides: Any) -> dict[str, Any]:
    """A text config with rotary positions in three axes."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    if interleaved:
        rope["mrope_interleaved"] = True
    return text_config(ids, hidden_size=64, **{"head_dim": 16, "rope_parameters": rope, **overrides})


def grid_tower(**overrides: Any) -> dict[str, Any]:
    """A vision config of the Qwen-VL kind."""
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 64,
        **overrides,
    }


def windows(**overrides: Any) -> dict[str, Any]:
    """A vision config with windowed attention, as Qwen2.5-VL has it."""
    return grid_tower(window_size=56, fullatt_block_indexes=[1], **overrides)


def deepstack(**overrides: Any) -> dict[str, Any]:
    """A vision config whose middle layers feed the decoder too, as Qwen3-VL has it."""
    return grid_tower(**{"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0], **overrides})


def vision_ids(ids: dict[str, int], *names: str) -> dict[str, int]:
    pieces = dict(zip(("vision_start", "vision_end", "image", "video"), QWEN_TOKENS, strict=True))
    return {f"{name}_token_id": ids[pieces[name]] for name in names or pieces}


def grid_processor(
    processor: str,
    video: str,
    pixels: str = "Qwen2VLImageProcessor",
    videos: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Callable[[Any, Backend], Any]:
    """Processors of images, text and videos; ``settings`` are those of the image processor, ``videos`` of the other."""

    def make(tokenizer: Any, backend: Backend) -> Any:
        images = image_processor(pixels, backend, **{"size": PIXELS, "patch_size": 14, **settings})
        return getattr(transformers, processor)(
            image_processor=images, tokenizer=tokenizer, video_processor=getattr(transformers, video)(**videos)
        )

    return make


_OMNI_NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def _omni_processor(name: str, patch_size: int) -> Callable[[Any, Backend], Any]:
    def make(tokenizer: Any, backend: Backend) -> Any:
        return getattr(transformers, name)(
            image_processor=image_processor("Qwen2VLImageProcessor", backend, size=PIXELS, patch_size=patch_size),
            video_processor=transformers.Qwen2VLVideoProcessor(patch_size=patch_size),
            feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16),
            tokenizer=tokenizer,
        )

    return make


def _audio(**overrides: Any) -> dict[str, Any]:
    return {
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 32,
        "max_source_positions": 32,
        "output_dim": 64,
        **overrides,
    }


def _qwen2_5_omni(ids: dict[str, int]) -> Any:
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=_audio(),
        vision_config=windows(),
        text_config=rope_text(ids, interleaved=False),
        audio_token_index=ids["<|audio_pad|>"],
        image_token_index=ids["<|image_pad|>"],
        video_token_index=ids["<|video_pad|>"],
        audio_start_token_id=ids["<|audio_start|>"],
        audio_end_token_id=ids["<|audio_end|>"],
        # Not declared in the config class, but forward reads it and checkpoints have it.
        vision_start_token_id=ids["<|vision_start|>"],
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen3_omni(ids: dict[str, int]) -> Any:
    config = transformers.Qwen3OmniMoeThinkerConfig(
        audio_config=_audio(downsample_hidden_size=8),
        vision_config=deepstack(),
        text_config=rope_text(ids, **EXPERTS),
        audio_token_id=ids["<|audio_pad|>"],
        audio_start_token_id=ids["<|audio_start|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    return transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)


_OMNI_TOKENS = (*QWEN_TOKENS, "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")

member(
    name="qwen2_5_omni_thinker",
    kind="E",
    model=_qwen2_5_omni,
    processor=_omni_processor("Qwen2_5OmniProcessor", 14),
    tokens=_OMNI_TOKENS,
    slot=QWEN_SLOT,
    named=_OMNI_NAMED,
    larger=(140, 100),
)
member(
    name="qwen3_omni_moe_thinker",
    kind="E",
    model=_qwen3_omni,
    processor=_omni_processor("Qwen3OmniMoeProcessor", 16),
    tokens=_OMNI_TOKENS,
    slot=QWEN_SLOT,
    named=_OMNI_NAMED,
    larger=(140, 100),
)


def _qwen3_vl_moe(ids: dict[str, int]) -> Any:
    config = transformers.Qwen3VLMoeConfig(
        vision_config=deepstack(), text_config=rope_text(ids, **EXPERTS), **vision_ids(ids)
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


member(
    name="qwen3_vl_moe",
    kind="E",
    model=_qwen3_vl_moe,
    processor=grid_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", patch_size=16),
    tokens=QWEN_TOKENS,
    slot=QWEN_SLOT,
    larger=(140, 100),
)

_COMPASS_TOKENS = ("<|VISION_START|>", "<|VISION_END|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>")


def _cohere_compass(ids: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = text_config(
        ids,
        hidden_size=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        logit_scale=1.0,
        rope_parameters={"sliding_attention": rope, "full_attention": None},  # no positions in the full layers
    )
    start, end, image, video = (ids[token] for token in _COMPASS_TOKENS)
    config = transformers.CohereCompassConfig(
        vision_config=deepstack(),
        text_config=text,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return transformers.CohereCompassForConditionalGeneration(config)


member(
    name="cohere_compass",
    kind="E",
    model=_cohere_compass,
    processor=grid_processor(
        "CohereCompassProcessor", "CohereCompassVideoProcessor", "CohereCompassImageProcessor", patch_size=16
    ),
    tokens=_COMPASS_TOKENS,
    slot="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
    larger=(140, 100),
)


def _cosmos3_edge(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 16,
        "num_patches": 64,
    }
    config = transformers.Cosmos3EdgeConfig(
        vision_config=vision,
        text_config=rope_text(ids, interleaved=False),
        projector_hidden_size=64,
        **vision_ids(ids),
    )
    return transformers.Cosmos3EdgeForConditionalGeneration(config)


member(
    name="cosmos3_edge",
    kind="E",
    model=_cosmos3_edge,
    processor=grid_processor(
        "Cosmos3EdgeProcessor", "Cosmos3EdgeVideoProcessor", "Cosmos3EdgeImageProcessor", patch_size=16
    ),
    tokens=QWEN_TOKENS,
    slot=QWEN_SLOT,
    # The model demands the kind of each token, which its processor returns only where it is asked to.
    prepare=lambda _model, processor, images, question: ask(processor, images, question, return_mm_token_type_ids=True),
    larger=(140, 100),
)


def _cosmos3_omni(ids: dict[str, int]) -> Any:
    config = transformers.Cosmos3OmniConfig(
        vision_config={"model_type": "qwen3_vl_vision", **deepstack()},
        text_config={"model_type": "qwen3_vl_text", **rope_text(ids)},
        **vision_ids(ids),
    )
    return transformers.Cosmos3OmniForConditionalGeneration(config)


# It has no processor class; its checkpoints name that of Qwen3-VL.
member(
    name="cosmos3_omni",
    kind="E",
    model=_cosmos3_omni,
    processor=grid_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", patch_size=16),
    tokens=QWEN_TOKENS,
    slot=QWEN_SLOT,
    larger=(140, 100),
)


def _exaone4_5(ids: dict[str, int]) -> Any:
    text = text_config(
        ids,
        hidden_size=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    config = transformers.Exaone4_5_Config(
        vision_config=windows(num_key_value_heads=1),
        text_config={"model_type": "exaone4", **text},
        **vision_ids(ids, "image", "video"),
    )
    return transformers.Exaone4_5_ForConditionalGeneration(config)


member(
    name="exaone4_5",
    kind="E",
    model=_exaone4_5,
    processor=grid_processor("Exaone4_5_Processor", "Qwen2VLVideoProcessor"),
    tokens=QWEN_TOKENS,
    slot=QWEN_SLOT,
    larger=(140, 100),
)


def _hyperclovax_vision_v2(ids: dict[str, int]) -> Any:
    config = transformers.HyperCLOVAXVisionV2Config(
        vision_config={"model_type": "qwen2_5_vl_vision", **windows()},
        text_config={"model_type": "hyperclovax", **text_config(ids, hidden_size=64)},
        tie_word_embeddings=False,
        **vision_ids(ids, "image", "video"),
    )
    return transformers.HyperCLOVAXVisionV2ForConditionalGeneration(config)


member(
    name="hyperclovax_vision_v2",
    kind="E",
    model=_hyperclovax_vision_v2,
    processor=grid_processor("HyperCLOVAXVisionV2Processor", "Qwen2VLVideoProcessor"),
    tokens=QWEN_TOKENS,
    slot=QWEN_SLOT,
    larger=(140, 100),
)
