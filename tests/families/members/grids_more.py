"""Families of kind E that are no descendants of Qwen-VL (``grids``)."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_models import LAYERS, text_config
from zoo import Backend, image_processor, member

from members.grids import PIXELS, QWEN_SLOT, QWEN_TOKENS, grid_processor, rope_text, vision_ids


def _video_llama_3(ids: dict[str, int]) -> Any:
    config = transformers.VideoLlama3Config(
        vision_config={**LAYERS, "patch_size": 14},
        text_config={"model_type": "qwen2", **text_config(ids, hidden_size=64)},
        **vision_ids(ids, "image", "video"),
    )
    return transformers.VideoLlama3ForConditionalGeneration(config)


member(
    name="video_llama_3",
    kind="E",
    model=_video_llama_3,
    processor=grid_processor("VideoLlama3Processor", "VideoLlama3VideoProcessor", "VideoLlama3ImageProcessor"),
    tokens=QWEN_TOKENS,
    slot=QWEN_SLOT,
    larger=(140, 100),
)

_ERNIE_NAMED = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}


def _ernie4_5_vl_moe(ids: dict[str, int]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    text = text_config(
        ids,
        hidden_size=64,
        moe_intermediate_size=[32, 16],
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        rope_parameters=rope,
    )
    config = transformers.Ernie4_5_VLMoeConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
        },
        text_config=text,
        tie_word_embeddings=False,
        **{f"{name}_id": ids[token] for name, token in _ERNIE_NAMED.items()},
    )
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


member(
    name="ernie4_5_vl_moe",
    kind="E",
    model=_ernie4_5_vl_moe,
    processor=grid_processor(
        "Ernie4_5_VLMoeProcessor",
        "Ernie4_5_VLMoeVideoProcessor",
        "Ernie4_5_VLMoeImageProcessor",
        videos={"draw_on_frames": False},  # it draws in a font of its own, without which it cannot be saved
    ),
    tokens=tuple(_ERNIE_NAMED.values()),
    slot="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
    named=_ERNIE_NAMED,
    larger=(140, 100),
)


def _paddleocr_vl(ids: dict[str, int]) -> Any:
    config = transformers.PaddleOCRVLConfig(
        vision_config={**LAYERS, "image_size": 56, "patch_size": 14},
        text_config=rope_text(ids, interleaved=False),
        tie_word_embeddings=False,
        **vision_ids(ids),
    )
    return transformers.PaddleOCRVLForConditionalGeneration(config)


def _paddleocr_vl_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("PaddleOCRVLImageProcessor", backend, size=PIXELS, patch_size=14)
    return transformers.PaddleOCRVLProcessor(images, tokenizer)


member(
    name="paddleocr_vl",
    kind="E",
    model=_paddleocr_vl,
    processor=_paddleocr_vl_processor,
    tokens=QWEN_TOKENS,
    slot=QWEN_SLOT,
    named={"image_token": "<|image_pad|>"},
    larger=(140, 100),
)

_MUSE_TOKENS = (
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|video|>",
    "<|vid_frame_separator|>",
    "<|vid_start|>",
    "<|vid_end|>",
    "<|audio|>",
    "<|soft_audio_start|>",
    "<|soft_audio_end|>",
)


def _muse_config(ids: dict[str, int], **text: Any) -> dict[str, Any]:
    return {
        "vision_config": {
            **LAYERS,
            "patch_size": 14,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
            "max_position_embeddings": 64,
            "layer_types": ["window_attention", "full_attention"],
        },
        # Two heads a key head, a window shorter than any prompt here, and a last layer without positions.
        "text_config": text_config(
            ids,
            hidden_size=64,
            head_dim=16,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **text,
        ),
        "image_token_id": ids["<|patch|>"],
        "video_token_id": ids["<|video|>"],
        "out_hidden_size": 128,
        "projector_hidden_size": 48,
    }


def _muse_glimmer(ids: dict[str, int]) -> Any:
    return transformers.MuseGlimmerForConditionalGeneration(transformers.MuseGlimmerConfig(**_muse_config(ids)))


def _muse_spark(ids: dict[str, int]) -> Any:
    config = transformers.MuseSparkConfig(
        **_muse_config(ids, moe_intermediate_size=32, moe_hidden_size=48, num_local_experts=4, num_experts_per_tok=2),
        audio_config={
            "patch_sizes": [4, 2],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_hidden_layers": 2,
            "out_hidden_size": 64,
        },
        audio_token_id=ids["<|audio|>"],
    )
    return transformers.MuseSparkForConditionalGeneration(config)


def _muse_processor(name: str) -> Any:
    def make(tokenizer: Any, backend: Backend) -> Any:
        parts = {
            "image_processor": image_processor("MuseGlimmerImageProcessor", backend, max_image_tokens=25),
            "video_processor": transformers.MuseGlimmerVideoProcessor(),
            "tokenizer": tokenizer,
        }
        if name == "MuseSparkProcessor":
            parts["feature_extractor"] = transformers.MuseSparkFeatureExtractor()
        return getattr(transformers, name)(**parts)

    return make


member(
    name="muse_glimmer",
    kind="E",
    model=_muse_glimmer,
    processor=_muse_processor("MuseGlimmerProcessor"),
    tokens=_MUSE_TOKENS,
    slot="<|patch|>",
    backends=("torchvision",),
    larger=(140, 100),
)
member(
    name="muse_spark",
    kind="E",
    model=_muse_spark,
    processor=_muse_processor("MuseSparkProcessor"),
    tokens=_MUSE_TOKENS,
    slot="<|patch|>",
    backends=("torchvision",),
    larger=(140, 100),
)

_KIMI_TOKENS = ("<|media_begin|>", "<|media_end|>", "<|media_pad|>", "<|kimi_k25_video_placeholder|>")


def _kimi_k25(ids: dict[str, int]) -> Any:
    text = text_config(
        ids,
        hidden_size=64,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    start, end, image, video = (ids[token] for token in _KIMI_TOKENS)
    config = transformers.Kimi_K25Config(
        vision_config={**LAYERS, "patch_size": 14, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config={"model_type": "deepseek_v3", **text},
        projection_hidden_size=32,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    return transformers.Kimi_K25ForConditionalGeneration(config)


def _kimi_k25_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Kimi_K25ImageProcessor", backend, patch_size=14)
    return transformers.Kimi_K25Processor(images, tokenizer, transformers.Kimi_K25VideoProcessor())


member(
    name="kimi_k25",
    kind="E",
    model=_kimi_k25,
    processor=_kimi_k25_processor,
    tokens=_KIMI_TOKENS,
    slot="<|media_begin|><|media_pad|><|media_end|>",
    backends=("torchvision",),
    larger=(140, 100),
)

_HUNYUAN_NAMED = {"image_token": "<|image|>", "image_start_token": "<|im_start|>", "image_end_token": "<|im_end|>"}


def _hunyuan_vl(ids: dict[str, int]) -> Any:
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "alpha": 1000.0,
        "factor": 1.0,
        "mrope_section": [2, 2, 2, 2],
    }
    config = transformers.HunYuanVLConfig(
        vision_config={
            **LAYERS,
            "patch_size": 16,
            "out_hidden_size": 64,
            "text_hidden_size": 64,
            "max_image_size": 128,
            "min_image_size": 32,
            "img_max_token_num": 64,
        },
        text_config=text_config(ids, hidden_size=64, head_dim=16, rope_parameters=rope),
        image_token_id=ids["<|image|>"],
        im_start_id=ids["<|im_start|>"],
        im_end_id=ids["<|im_end|>"],
        tie_word_embeddings=False,
    )
    return transformers.HunYuanVLForConditionalGeneration(config)


def _hunyuan_vl_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("HunYuanVLImageProcessor", backend, size=PIXELS, patch_size=16)
    return transformers.HunYuanVLProcessor(images, tokenizer)


member(
    name="hunyuan_vl",
    kind="E",
    model=_hunyuan_vl,
    processor=_hunyuan_vl_processor,
    tokens=tuple(_HUNYUAN_NAMED.values()),
    slot="<|im_start|><|image|><|im_end|>",
    named=_HUNYUAN_NAMED,
    larger=(140, 100),
)
