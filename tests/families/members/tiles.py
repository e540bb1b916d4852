"""Families that cut a picture into tiles: anyres grids, and dynamic tiles with a thumbnail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from PIL import Image
from tiny_models import LAYERS, SQUARE_TOWER, clip_config, square, text_config
from zoo import Backend, image_processor, member

_SIDE = 56  # of a tile: 4 x 4 patches of 14 pixels
_SIGLIP = {**SQUARE_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_PINPOINTS = [[56, 112], [112, 56], [112, 112]]
_ONE_TILE = (54, 42)


def _anyres(backend: Backend) -> Any:
    return image_processor(
        "LlavaNextImageProcessor",
        backend,
        size={"shortest_edge": _SIDE},
        crop_size=square(),
        image_grid_pinpoints=_PINPOINTS,
    )


def _llava_next_video(ids: dict[str, int]) -> Any:
    config = transformers.LlavaNextVideoConfig(
        vision_config={"model_type": "clip_vision_model", **clip_config()},
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=_PINPOINTS,
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config)


def _llava_next_video_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(),
        image_processor=_anyres(backend),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


member(
    name="llava_next_video",
    kind="D",
    model=_llava_next_video,
    processor=_llava_next_video_processor,
    tokens=("<image>", "<video>"),
    named={"image_token": "<image>", "video_token": "<video>"},
    size=(110, 48),
    larger=(150, 100),
)


def _granite4_vision(ids: dict[str, int]) -> Any:
    text = text_config(ids, num_hidden_layers=6, attention_multiplier=0.3)
    config = transformers.Granite4VisionConfig(
        vision_config={**_SIGLIP, "hidden_size": 64},  # its Q-Formers have one head per 64 units
        text_config=text,
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        image_token_index=ids["<image>"],
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [2, 1]],
        spatial_target_layers=[2, 3, 4, 5],
    )
    return transformers.Granite4VisionForConditionalGeneration(config)


def _granite4_vision_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.Granite4VisionProcessor(
        _anyres(backend), tokenizer, patch_size=14, vision_feature_select_strategy="full", downsample_rate="1/2"
    )


member(
    name="granite4_vision",
    kind="D",
    model=_granite4_vision,
    processor=_granite4_vision_processor,
    tokens=("<image>",),
    named={"image_token": "<image>"},
    size=(110, 48),
    larger=(150, 100),
)


def _cohere2_text(ids: dict[str, int]) -> dict[str, Any]:
    # The window is shorter than any prompt here: it really cuts.
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return {"model_type": "cohere2", **text_config(ids, sliding_window=8, layer_types=kinds)}


def _aya_vision(ids: dict[str, int]) -> Any:
    config = transformers.AyaVisionConfig(
        vision_config=_SIGLIP, text_config=_cohere2_text(ids), image_token_index=ids["<|IMG_PATCH|>"]
    )
    return transformers.AyaVisionForConditionalGeneration(config)


def _aya_vision_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("GotOcr2ImageProcessor", backend, size=square(), max_patches=4)
    return transformers.AyaVisionProcessor(images, tokenizer, patch_size=14, img_size=_SIDE, downsample_factor=2)


member(
    name="aya_vision",
    kind="F",
    model=_aya_vision,
    processor=_aya_vision_processor,
    tokens=(
        "<image>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE_GLOBAL",
        *(f"TILE_{index}" for index in range(1, 5)),
    ),
    slot="<image>",
    size=_ONE_TILE,
    larger=(150, 80),
)

_COHERE2 = {
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "image_token": "<|IMG_PATCH|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}


def _cohere2_vision(ids: dict[str, int]) -> Any:
    config = transformers.Cohere2VisionConfig(
        vision_config=_SIGLIP,
        text_config=_cohere2_text(ids),
        image_token_id=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=64,
    )
    return transformers.Cohere2VisionForConditionalGeneration(config)


def _cohere2_vision_processor(tokenizer: Any, backend: Backend) -> Any:
    # What its image processor calls patch_size is the number of tokens along a side of a tile.
    images = image_processor("Cohere2VisionImageProcessor", backend, size=square(), patch_size=2, max_patches=6)
    return transformers.Cohere2VisionProcessor(images, tokenizer)


member(
    name="cohere2_vision",
    kind="F",
    model=_cohere2_vision,
    processor=_cohere2_vision_processor,
    tokens=tuple(_COHERE2.values()),
    slot="<|IMG_PATCH|>",
    named=_COHERE2,
    backends=("torchvision",),
    size=_ONE_TILE,
    larger=(150, 80),
)

_INTERNVL = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}


def _qianfan_ocr(ids: dict[str, int]) -> Any:
    config = transformers.QianfanOCRConfig(
        vision_config={**LAYERS, "image_size": [_SIDE, _SIDE], "patch_size": [14, 14]},
        text_config={"model_type": "qwen3", **text_config(ids, head_dim=12)},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    return transformers.QianfanOCRForConditionalGeneration(config)


def _qianfan_ocr_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("GotOcr2ImageProcessor", backend, size=square(), max_patches=4)
    return transformers.QianfanOCRProcessor(images, tokenizer, image_seq_length=4)


member(
    name="qianfan_ocr",
    kind="F",
    model=_qianfan_ocr,
    processor=_qianfan_ocr_processor,
    tokens=("<image>", *_INTERNVL.values()),
    named=_INTERNVL,
    size=_ONE_TILE,
    larger=(150, 80),
)

_GOT_TOKENS = 4  # 64 pixels: 8 x 8 patches, halved twice along each side


def _got_ocr2(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
    }
    config = transformers.GotOcr2Config(
        vision_config=vision,
        text_config={"model_type": "qwen2", **text_config(ids)},
        image_token_index=ids["<imgpad>"],
        image_seq_length=_GOT_TOKENS,
    )
    return transformers.GotOcr2ForConditionalGeneration(config)


def _got_ocr2_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.GotOcr2Processor(image_processor("GotOcr2ImageProcessor", backend, size=square(64)), tokenizer)


# Tiles are asked for in the call: the processor's own default is none, whatever its image processor says.
_GOT_CALL = {"num_image_tokens": _GOT_TOKENS, "crop_to_patches": True, "max_patches": 4}


def _got_ocr2_inputs(_model: Any, processor: Any, images: Sequence[Image.Image], question: str) -> Mapping[str, Any]:
    text = f"<|im_start|>user\n<img><imgpad></img>\n{question}<|im_end|><|im_start|>assistant\n"
    return processor(images=list(images), text=text, return_tensors="pt", **_GOT_CALL)


member(
    name="got_ocr2",
    kind="F",
    model=_got_ocr2,
    processor=_got_ocr2_processor,
    tokens=("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"),
    templated=False,
    size=_ONE_TILE,
    larger=(150, 80),
    prepare=_got_ocr2_inputs,
    call=_GOT_CALL,
    local=False,  # the neck of its tower and its projector convolve across patches
)
