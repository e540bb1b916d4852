"""Families whose pixels are not one resized picture: padded to a square, two resolutions, or local crops beside it."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_models import clip_config, square, text_config
from zoo import image_processor, member

_SIDE = 56
_SIGLIP = {**clip_config(), "model_type": "siglip_vision_model", "vision_use_head": False}


def _deepseek_vl(ids: dict[str, int]) -> Any:
    config = transformers.DeepseekVLConfig(
        vision_config=dict(_SIGLIP),
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_id=ids["<image>"],
    )
    return transformers.DeepseekVLForConditionalGeneration(config)


member(
    name="deepseek_vl",
    kind="C",
    model=_deepseek_vl,
    processor=lambda tokenizer, backend: transformers.DeepseekVLProcessor(
        image_processor("DeepseekVLImageProcessor", backend, size=square()), tokenizer, num_image_tokens=16
    ),
    tokens=("<image>",),
    named={"image_token": "<image>"},
)


def _deepseek_vl_hybrid(ids: dict[str, int]) -> Any:
    sam = {
        "model_type": "sam_vision_model",
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 2 * _SIDE,
        "patch_size": 7,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "num_pos_feats": 8,
    }
    config = transformers.DeepseekVLHybridConfig(
        vision_config=dict(_SIGLIP),
        high_res_vision_config=sam,
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_id=ids["<image>"],
    )
    model = transformers.DeepseekVLHybridForConditionalGeneration(config)
    model.model.high_res_vision_alpha.data.fill_(0.5)  # a gate, which initialisation leaves shut
    return model


member(
    name="deepseek_vl_hybrid",
    kind="C",
    model=_deepseek_vl_hybrid,
    processor=lambda tokenizer, backend: transformers.DeepseekVLHybridProcessor(
        image_processor("DeepseekVLHybridImageProcessor", backend, size=square(), high_res_size=square(2 * _SIDE)),
        tokenizer,
        num_image_tokens=16,
    ),
    tokens=("<image>",),
    named={"image_token": "<image>"},
    local=False,  # the neck of its high-resolution tower and what follows convolve across patches
)


def _janus(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": 14,
        "mlp_ratio": 2.0,
        "projection_dim": 48,
        "num_image_tokens": 16,
    }
    drawing = {  # of pictures: no part of an answer in words
        "embed_dim": 8,
        "num_embeddings": 32,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": 48,
        "image_token_embed_dim": 48,
    }
    config = transformers.JanusConfig(
        vision_config=vision,
        vq_config=drawing,
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_id=ids["<image>"],
    )
    return transformers.JanusForConditionalGeneration(config)


_JANUS = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
member(
    name="janus",
    kind="C",
    model=_janus,
    processor=lambda tokenizer, backend: transformers.JanusProcessor(
        image_processor("JanusImageProcessor", backend, size=square()), tokenizer, num_image_tokens=16
    ),
    tokens=tuple(_JANUS.values()),
    named=_JANUS,
)


def _aria(ids: dict[str, int]) -> Any:
    # Its processor makes pictures of 490 or 980 pixels and no others: the patches are large instead.
    vision = {**clip_config(image_size=490, patch_size=70), "model_type": "idefics3_vision"}
    vision.pop("projection_dim")
    config = transformers.AriaConfig(
        vision_config=vision,
        text_config=text_config(ids, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        projector_patch_to_query_dict={49: 8},
        image_token_index=ids["<image>"],
    )
    return transformers.AriaForConditionalGeneration(config)


member(
    name="aria",
    kind="C",
    model=_aria,
    processor=lambda tokenizer, backend: transformers.AriaProcessor(
        image_processor("AriaImageProcessor", backend), tokenizer, size_conversion={490: 8}
    ),
    # 980 pixels unless the call says 490, as here: four times less to compute, and an argument to be found again.
    call={"max_image_size": 490},
    tokens=("<image>",),
    named={"image_token": "<image>"},
)

# The model has 144 queries for a view of 12 x 12 and 256 for one of 16 x 16, whatever the size of a patch.
_OCR2 = 96


def _deepseek_ocr2(ids: dict[str, int]) -> Any:
    sam = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _OCR2,
        "patch_size": 2,
        "window_size": 6,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "downsample_channels": [24, 32],
    }
    encoder = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    text = text_config(
        ids,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        # One sparse layer: with two, some of the 433 tokens of two crops change experts within 1e-4 of the mask, and
        # the error of a finite difference falls as that jump does, with 1 over the step.
        mlp_layer_types=["dense", "dense", "sparse"],
    )
    config = transformers.DeepseekOcr2Config(
        vision_config={"sam_config": sam, "encoder_config": encoder},
        text_config=text,
        image_token_id=ids["<image>"],
    )
    return transformers.DeepseekOcr2ForConditionalGeneration(config)


member(
    name="deepseek_ocr2",
    kind="K",
    model=_deepseek_ocr2,
    processor=lambda tokenizer, backend: transformers.DeepseekOcr2Processor(
        image_processor("DeepseekOcr2ImageProcessor", backend, size=square(_OCR2), tile_size=_OCR2),
        tokenizer,
        patch_size=2,
    ),
    tokens=("<image>",),
    named={"image_token": "<image>"},
    size=(60, 42),
    larger=(130, 65),
)

_STEP = ("<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>", "<im_end>")


def _step3p7(ids: dict[str, int]) -> Any:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 7,
        "mlp_ratio": 1.5,
        "max_position_embeddings": 256,
    }
    text = text_config(
        ids,
        head_dim=12,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        mlp_layer_types=["dense", "sparse", "sparse"],
        moe_intermediate_size=32,
        share_expert_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    config = transformers.Step3p7Config(vision_config=vision, text_config=text, image_token_id=ids["<im_patch>"])
    return transformers.Step3p7ForConditionalGeneration(config)


member(
    name="step3p7",
    kind="K",
    model=_step3p7,
    processor=lambda tokenizer, backend: transformers.Step3p7Processor(
        image_processor("Step3p7ImageProcessor", backend, size=square(112), patch_size=56, vision_patch_size=7),
        tokenizer,
    ),
    tokens=_STEP,
    slot="<im_patch>",
    backends=("torchvision",),
    larger=(150, 100),
    local=False,  # two convolutions halve what its tower says, each across patches
)
