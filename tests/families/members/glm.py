"""GLM's families of kind E: rotary positions in three axes, a tower that ends in a strided convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tiny_models import text_config
from zoo import Backend, image_processor, member

_TOKENS = (
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
_SLOT = "<|begin_of_image|><|image|><|end_of_image|>"
_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 2 * 140 * 140}  # of two frames: a picture counts as a clip


def _ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
    }


def _text(ids: dict[str, int], **overrides: Any) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
        "partial_rotary_factor": 1.0,
    }
    return text_config(ids, hidden_size=64, head_dim=16, rope_parameters=rope, **overrides)


def _tower() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "out_hidden_size": 64,
    }


def _model(name: str, **text: Any) -> Callable[[dict[str, int]], Any]:
    def make(ids: dict[str, int]) -> Any:
        config = getattr(transformers, f"{name}Config")(
            vision_config=_tower(), text_config=_text(ids, **text), **_ids(ids)
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


def _glm46v(ids: dict[str, int]) -> Any:
    config = transformers.Glm46VConfig(
        vision_config={"model_type": "glm4v_vision", **_tower()},
        text_config={"model_type": "glm4v_text", **_text(ids)},
        **_ids(ids),
    )
    return transformers.Glm46VForConditionalGeneration(config)


def _processor(name: str) -> Callable[[Any, Backend], Any]:
    def make(tokenizer: Any, backend: Backend) -> Any:
        return getattr(transformers, f"{name}Processor")(
            image_processor=image_processor(f"{name}ImageProcessor", backend, size=_PIXELS),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, f"{name}VideoProcessor")(),
        )

    return make


_EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}

_GLM4V = _model("Glm4v")

# Of those without an image processor of their own, GLM-4.5V and GLM-OCR name that of GLM-4V and of GLM-4.6V.
for _name, _builder, _half in (
    ("glm4v", _GLM4V, "Glm4v"),
    ("glm46v", _glm46v, "Glm46V"),
    ("glmga", _glm46v, "Glm46V"),  # the mapping's second name for the class of GLM-4.6V
    ("glm4v_moe", _model("Glm4vMoe", **_EXPERTS), "Glm4v"),
    ("glm_ocr", _model("GlmOcr"), "Glm46V"),
):
    member(
        name=_name,
        kind="E",
        model=_builder,
        processor=_processor(_half),
        tokens=_TOKENS,
        slot=_SLOT,
        larger=(140, 100),
    )


def _glm5_next(ids: dict[str, int]) -> Any:
    text = {
        **text_config(ids, hidden_size=64, num_key_value_heads=4, num_hidden_layers=4),
        **_EXPERTS,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "index_topk": 256,  # longer than any prompt here: which keys are read does not depend on the picture
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_kpool": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    }
    config = transformers.Glm5NextConfig(
        text_config=text, vision_config={**_tower(), "projection_intermediate_size": 48}, **_ids(ids)
    )
    return transformers.Glm5NextForConditionalGeneration(config)


member(
    name="glm5_next",
    kind="E",
    model=_glm5_next,
    processor=_processor("Glm5Next"),
    tokens=_TOKENS,
    slot=_SLOT,
    larger=(140, 100),
)
