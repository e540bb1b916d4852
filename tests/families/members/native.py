"""Families that keep a picture's own shape: Pixtral's towers (kind I) and Idefics2 (kind C)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from PIL import Image
from tiny_models import text_config
from zoo import Backend, ask, image_processor, member


def _pixtral_tower() -> dict[str, Any]:
    return {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 128,
        "patch_size": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def _mistral3(ids: dict[str, int]) -> Any:
    config = transformers.Mistral3Config(
        vision_config=_pixtral_tower(),
        text_config={"model_type": "mistral", **text_config(ids, sliding_window=None, head_dim=12)},
        image_token_index=ids["[IMG]"],
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _lighton_ocr(ids: dict[str, int]) -> Any:
    config = transformers.LightOnOcrConfig(
        vision_config=_pixtral_tower(),
        text_config={"model_type": "qwen3", **text_config(ids, head_dim=12)},
        image_token_id=ids["<|image_pad|>"],
        spatial_merge_size=2,
    )
    return transformers.LightOnOcrForConditionalGeneration(config)


def _pixtral(name: str) -> Any:
    def make(tokenizer: Any, backend: Backend) -> Any:
        # The patch of the image processor is that of the decoder: merged ones, two by two.
        images = image_processor("PixtralImageProcessor", backend, size={"longest_edge": 128}, patch_size=16)
        return getattr(transformers, name)(images, tokenizer, patch_size=8, spatial_merge_size=2)

    return make


member(
    name="mistral3",
    kind="I",
    model=_mistral3,
    processor=_pixtral("PixtralProcessor"),
    tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    slot="[IMG]",
    larger=(150, 100),
)
_LIGHTON = {
    "image_token": "<|image_pad|>",
    "image_break_token": "<|vision_pad|>",
    "image_end_token": "<|vision_end|>",
}
member(
    name="lighton_ocr",
    kind="I",
    model=_lighton_ocr,
    processor=_pixtral("LightOnOcrProcessor"),
    tokens=tuple(_LIGHTON.values()),
    slot="<|image_pad|>",
    named=_LIGHTON,
    larger=(150, 100),
)


def _mistral_large4(ids: dict[str, int]) -> Any:
    text = {
        **text_config(ids, hidden_size=64, num_key_value_heads=4, head_dim=8),
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "index_topk": 256,  # longer than any prompt here: which keys are read does not depend on the picture
        "index_head_dim": 16,
        "index_n_heads": 2,
    }
    config = transformers.MistralLarge4Config(
        vision_config=_pixtral_tower(), text_config=text, image_token_index=ids["[IMG]"]
    )
    return transformers.MistralLarge4ForConditionalGeneration(config)


member(
    name="mistral_large4",
    kind="I",
    model=_mistral_large4,
    processor=_pixtral("PixtralProcessor"),
    tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    slot="[IMG]",
    larger=(150, 100),
)


def _idefics2(ids: dict[str, int]) -> Any:
    config = transformers.Idefics2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        text_config={"model_type": "mistral", **text_config(ids, sliding_window=None, head_dim=12)},
        image_token_id=ids["<image>"],
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def _idefics2_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Idefics2ImageProcessor", backend, size={"shortest_edge": 56, "longest_edge": 112})
    return transformers.Idefics2Processor(images, tokenizer, image_seq_len=8)


def _idefics2_inputs(_model: Any, processor: Any, images: Sequence[Image.Image], question: str) -> Mapping[str, Any]:
    """Four parts and the whole for a picture larger than the tower's: a setting, nothing the processor sees by itself,
    and one that the count of image tokens follows as an attribute of the image processor alone."""
    processor.image_processor.do_image_splitting = max(images[0].size) > 112
    return ask(processor, images, question, nested=True)


member(
    name="idefics2",
    kind="C",
    model=_idefics2,
    processor=_idefics2_processor,
    tokens=("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    slot="<image>",
    named={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
    larger=(150, 100),
    prepare=_idefics2_inputs,
)
