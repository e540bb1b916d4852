"""Families that crop: the centre of a picture only, or a global view and local crops beside it."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_models import clip_config, square, text_config
from tokenizers import AddedToken, Regex, normalizers
from zoo import Backend, image_processor, member

_SIDE = 56


def _vipllava(ids: dict[str, int]) -> Any:
    config = transformers.VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **clip_config(num_hidden_layers=3)},
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_index=ids["<image>"],
        vision_feature_layer=[-2, -3, 3],
    )
    return transformers.VipLlavaForConditionalGeneration(config)


def _clip(backend: Backend, side: int = _SIDE) -> Any:
    return image_processor("CLIPImageProcessor", backend, size={"shortest_edge": side}, crop_size=square(side))


# It has no processor class; transformers maps it to that of LLaVA.
member(
    name="vipllava",
    kind="A",
    model=_vipllava,
    processor=lambda tokenizer, backend: transformers.LlavaProcessor(
        _clip(backend),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ),
    tokens=("<image>",),
    named={"image_token": "<image>"},
)


def _video_llava(ids: dict[str, int]) -> Any:
    config = transformers.VideoLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **clip_config()},
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
    )
    return transformers.VideoLlavaForConditionalGeneration(config)


def _video_llava_processor(tokenizer: Any, _backend: Backend) -> Any:
    return transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(size={"shortest_edge": _SIDE}, crop_size=square()),
        video_processor=transformers.VideoLlavaVideoProcessor(),
        tokenizer=tokenizer,
        patch_size=14,
    )


member(
    name="video_llava",
    kind="A",
    model=_video_llava,
    processor=_video_llava_processor,
    tokens=("<image>", "<video>"),
    named={"image_token": "<image>", "video_token": "<video>"},
    backends=("pil",),  # its image processor is older than the two backends
)

_FAST = 128  # 2 x 2 tokens: its tower halves a picture six times


def _fast_vlm(ids: dict[str, int]) -> Any:
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": 64,  # of what the tower's last convolution makes of 32
        "model_args": {
            # Branches as they are trained: folded into one convolution, and untrained, each halves the signal.
            "inference_mode": False,
            "layers": (1, 1, 1, 1, 1),
            "embed_dims": (16, 16, 16, 32, 32),
        },
    }
    config = transformers.FastVlmConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **text_config(ids)},
        image_token_index=ids["<image>"],
    )
    return transformers.FastVlmForConditionalGeneration(config)


# It has no processor class; its checkpoints name that of LLaVA.
member(
    name="fast_vlm",
    kind="A",
    model=_fast_vlm,
    processor=lambda tokenizer, backend: transformers.LlavaProcessor(
        _clip(backend, _FAST),
        tokenizer,
        patch_size=64,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    ),
    tokens=("<image>",),
    named={"image_token": "<image>"},
    size=(200, 140),
    local=False,  # a convolutional tower
)

_MOLMO2 = (
    "<|image|>",
    "<|video|>",
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
)


def _molmo2(ids: dict[str, int]) -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 32}
    config = transformers.Molmo2Config(
        vision_config={**heads, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": [_SIDE, _SIDE]},
        adapter_config={**heads, "vision_feature_layer": [1, 0], "intermediate_size": 48, "text_hidden_size": 48},
        text_config={**text_config(ids, head_dim=12), "additional_vocab_size": 8},
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_patch_id=ids["<im_patch>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
    )
    return transformers.Molmo2ForConditionalGeneration(config)


def _molmo2_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.Molmo2Processor(
        image_processor=image_processor(
            "Molmo2ImageProcessor", backend, size=square(), max_crops=6, overlap_margins=[1, 1]
        ),
        video_processor=transformers.Molmo2VideoProcessor(),
        tokenizer=tokenizer,
    )


member(
    name="molmo2",
    kind="K",
    model=_molmo2,
    processor=_molmo2_processor,
    tokens=_MOLMO2,
    slot="<|image|>",
    named={"image_token": "<|image|>", "video_token": "<|video|>"},
    backends=("torchvision",),
    size=(54, 42),
    larger=(120, 80),
)


def _unlimited_ocr(ids: dict[str, int]) -> Any:
    sam = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 128,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "downsample_channels": [24, 32],
    }
    encoder = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    text = text_config(
        ids,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
    )
    config = transformers.UnlimitedOcrConfig(
        vision_config={"sam_config": sam, "encoder_config": encoder},
        text_config=text,
        image_token_id=ids["<image>"],
    )
    return transformers.UnlimitedOcrForConditionalGeneration(config)


def _unlimited_ocr_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("UnlimitedOcrImageProcessor", backend, size=square(128), tile_size=64, max_patches=6)
    return transformers.UnlimitedOcrProcessor(images, tokenizer, patch_size=8)


member(
    name="unlimited_ocr",
    kind="K",
    model=_unlimited_ocr,
    processor=_unlimited_ocr_processor,
    tokens=("<image>",),
    named={"image_token": "<image>"},
    backends=("torchvision",),
    size=(60, 42),
    larger=(150, 100),
    local=False,  # the neck of its tower and what follows convolve across patches
)

_FUYU = ("|SPEAKER|", "|NEWLINE|")


def _fuyu(ids: dict[str, int]) -> Any:
    text = text_config(ids, head_dim=12, hidden_act="relu2", qk_layernorm=True)
    text.pop("num_key_value_heads")
    config = transformers.FuyuConfig(
        text_config={"model_type": "persimmon", **text}, patch_size=14, image_token_id=ids["|SPEAKER|"]
    )
    return transformers.FuyuForCausalLM(config)


def _fuyu_processor(tokenizer: Any, backend: Backend) -> Any:
    # What SentencePiece puts in front of every text, and this processor takes away again. Its image tokens are found
    # after that, as pieces of the vocabulary.
    tokens = [AddedToken(token, normalized=True, special=True) for token in _FUYU]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\A\|SPEAKER\|(?=\|)"), " |SPEAKER|")
    images = image_processor("FuyuImageProcessor", backend, size=square(84), patch_size=square(14))
    return transformers.FuyuProcessor(images, tokenizer)


member(
    name="fuyu",
    kind="C",
    model=_fuyu,
    processor=_fuyu_processor,
    tokens=("<s>", "<0x04>"),
    backends=("torchvision",),  # its processor calls what the PIL one returns, arrays, as if they were tensors
    templated=False,
)
