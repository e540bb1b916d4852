"""Families whose decoders attend in ways of their own: sliding windows with shared keys, biases by relative position,
layers without any attention map between those that have one."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_models import LAYERS, text_config
from zoo import Backend, image_processor, member

_SIDE = 56

# ---------------------------------------------------------------------------------------------------- Gemma 4

_GEMMA4 = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _gemma4_text(ids: dict[str, int], **overrides: Any) -> dict[str, Any]:
    return text_config(
        ids,
        num_hidden_layers=4,
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,  # shorter than any prompt here: the window really cuts
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,  # the last two layers have no keys of their own
        use_bidirectional_attention="vision",
        **overrides,
    )


def _gemma4_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "audio_token_id": ids["<|audio|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
    }


def _gemma4(ids: dict[str, int]) -> Any:
    vision = {**LAYERS, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}
    config = transformers.Gemma4Config(
        text_config=_gemma4_text(ids, vocab_size_per_layer_input=640, hidden_size_per_layer_input=8),
        vision_config=vision,
        audio_config=None,
        **_gemma4_ids(ids),
    )
    return transformers.Gemma4ForConditionalGeneration(config)


def _gemma4_unified(ids: dict[str, int]) -> Any:
    config = transformers.Gemma4UnifiedConfig(
        text_config=_gemma4_text(ids),
        vision_config={"patch_size": 4, "mm_embed_dim": 48, "mm_posemb_size": 64, "output_proj_dims": 48},
        audio_config=None,
        **_gemma4_ids(ids),
    )
    return transformers.Gemma4UnifiedForConditionalGeneration(config)


def _gemma4_processor(name: str) -> Any:
    def make(tokenizer: Any, backend: Backend) -> Any:
        return getattr(transformers, f"{name}Processor")(
            feature_extractor=getattr(transformers, f"{name}AudioFeatureExtractor")(),
            # 70 is the least it takes; patches of 4 pixels keep them small.
            image_processor=image_processor(f"{name}ImageProcessor", backend, max_soft_tokens=70, patch_size=4),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, f"{name}VideoProcessor")(),
            image_seq_length=70,
        )

    return make


for _name, _build, _class, _backends in (
    ("gemma4", _gemma4, "Gemma4", ("pil", "torchvision")),
    ("gemma4_unified", _gemma4_unified, "Gemma4Unified", ("torchvision",)),
):
    member(
        name=_name,
        kind="J",
        model=_build,
        processor=_gemma4_processor(_class),
        tokens=(*_GEMMA4.values(), "<|video|>"),
        slot="<|image|>",
        named=_GEMMA4,
        backends=_backends,
        nested=True,
    )

# ---------------------------------------------------------------------------------------------------- Gemma 3n


def _gemma3n(ids: dict[str, int]) -> Any:
    text = text_config(
        ids,
        num_hidden_layers=4,
        head_dim=12,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=600,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    )
    config = transformers.Gemma3nConfig(
        text_config=text,
        # Its own timm tower, a tenth as wide (its last layer stays 2048 wide); 4 x 4 tokens instead of 16 x 16.
        vision_config={
            "architecture": "mobilenetv5_300m_enc",
            "model_args": {"channel_multiplier": 0.1, "msfa_output_resolution": 4},
            "vocab_size": 8,
            "vocab_offset": 600,
        },
        audio_config={
            "vocab_size": 8,
            "vocab_offset": 608,
            "hidden_size": 32,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
        },
        vision_soft_tokens_per_image=16,
        audio_soft_tokens_per_image=4,
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_id=ids["<audio|>"],
        audio_token_id=ids["<|audio|>"],
    )
    return transformers.Gemma3nForConditionalGeneration(config)


def _gemma3n_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("SiglipImageProcessor", backend, size={"height": 64, "width": 64}, do_normalize=False)
    return transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(), images, tokenizer, audio_seq_length=4, image_seq_length=16
    )


member(
    name="gemma3n",
    kind="B",
    model=_gemma3n,
    processor=_gemma3n_processor,
    tokens=tuple(_GEMMA4.values()),
    slot="<|image|>",
    named=_GEMMA4,
    nested=True,
    local=False,  # a convolutional tower: every token sees far beyond its own place
)

# ---------------------------------------------------------------------------------------------------- Inkling

_INKLING = ("<|unused_200054|>", "<|unused_200053|>", "<|content_image|>", "<|content_audio_input|>")


def _inkling_text(ids: dict[str, int], **overrides: Any) -> dict[str, Any]:
    return text_config(
        ids,
        unpadded_vocab_size=600,
        head_dim=12,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=12,
        sliding_window_size=8,
        d_rel=4,
        rel_extent=16,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        **overrides,
    )


def _inkling(ids: dict[str, int]) -> Any:
    config = transformers.InklingConfig(
        text_config=_inkling_text(
            ids,
            n_shared_experts=1,
            mlp_layer_types=["dense", "sparse", "sparse"],
            logits_mup_width_multiplier=1.0,  # it is the width over a base width; 24 here makes logits all but constant
        ),
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "text_hidden_size": 48},
        audio_config={"text_hidden_size": 48, "n_mel_bins": 4, "mel_vocab_size": 8},
        image_token_id=ids["<|unused_200054|>"],
        audio_token_id=ids["<|unused_200053|>"],
        image_bos_token_id=ids["<|content_image|>"],
        audio_bos_token_id=ids["<|content_audio_input|>"],
    )
    return transformers.InklingForConditionalGeneration(config)


def _inkling_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.InklingProcessor(
        transformers.InklingFeatureExtractor(), image_processor("InklingImageProcessor", backend), tokenizer
    )


def _inkling2(ids: dict[str, int]) -> Any:
    text = _inkling_text(ids, n_layers_per_attn_res_block=2)
    text.pop("intermediate_size")  # another name of the experts' own
    vision = {**LAYERS, "posemb_grid_size": 4, "projection_hidden_dim": 48, "text_hidden_size": 48}
    config = transformers.Inkling2Config(
        text_config=text, vision_config=vision, image_token_id=ids["<|unused_200054|>"]
    )
    return transformers.Inkling2ForConditionalGeneration(config)


def _inkling2_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.Inkling2Processor(image_processor("Inkling2ImageProcessor", backend), tokenizer)


for _name, _build, _processor in (
    ("inkling_mm_model", _inkling, _inkling_processor),
    ("inkling2", _inkling2, _inkling2_processor),
):
    member(
        name=_name,
        kind="E",
        model=_build,
        processor=_processor,
        tokens=_INKLING,
        slot="<|content_image|><|unused_200054|>",
        backends=("torchvision",),
        size=(120, 80),
    )

# ---------------------------------------------------------------------------------------------------- Nemotron

_NEMOTRON = ("<image>", "<video>", "<so_embedding>", "<so_start>", "<so_end>", "<img>", "</img>")


def _nemotron(ids: dict[str, int]) -> Any:
    text = text_config(
        ids,
        model_type="nemotron_h",
        layers_block_type=["linear_attention", "full_attention", "mlp", "full_attention"],
        head_dim=12,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=24,
        n_groups=2,
        chunk_size=16,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        n_routed_experts=4,
    )
    text.pop("num_hidden_layers")
    vision = {**LAYERS, "model_type": "radio", "patch_size": 16, "video_temporal_patch_size": 2}
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        force_image_size=64,
        projector_hidden_size=48,
        vision_hidden_size=32,
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        audio_token_id=ids["<so_embedding>"],
    )
    return transformers.NemotronH_Omni_Reasoning_V3(config)


def _nemotron_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.NemotronH_Omni_Reasoning_V3Processor(
        image_processor=image_processor(
            "NemotronH_Omni_Reasoning_V3ImageProcessor", backend, min_num_patches=16, max_num_patches=64
        ),
        video_processor=transformers.NemotronH_Omni_Reasoning_V3VideoProcessor(),
        tokenizer=tokenizer,
        feature_extractor=transformers.ParakeetFeatureExtractor(),
    )


member(
    name="nemotron_h_omni",
    kind="E",
    model=_nemotron,
    processor=_nemotron_processor,
    tokens=_NEMOTRON,
    slot="<image>",
    backends=("torchvision",),
    cached=False,  # in float64 too its cached steps are up to 5e-4 nats from a pass without a cache
)
