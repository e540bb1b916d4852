"""Families whose decoder mixes attention with something else: linear attention, convolutions, an indexer of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tiny_models import text_config
from zoo import Backend, image_processor, member

from members.grids import PIXELS, QWEN_SLOT, QWEN_TOKENS, grid_processor, grid_tower, vision_ids

_MIXED = ["linear_attention", "full_attention", "linear_attention"]
_LINEAR = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def _tower() -> dict[str, Any]:
    return grid_tower(patch_size=16, num_position_embeddings=64)


def _qwen_text(ids: dict[str, int], **overrides: Any) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    settings = {"hidden_size": 64, "head_dim": 16, "rope_parameters": rope, "layer_types": _MIXED, **_LINEAR}
    return text_config(ids, **{**settings, **overrides})


def _qwen(name: str, **text: Any) -> Callable[[dict[str, int]], Any]:
    def make(ids: dict[str, int]) -> Any:
        config = getattr(transformers, f"{name}Config")(
            vision_config=_tower(), text_config=_qwen_text(ids, **text), **vision_ids(ids)
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


_INDEXED = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [3],  # counted from one
    "ple_embed_dim": 16,
    "ple_conv_kernel_size": 2,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,  # shorter than any prompt here: the indexer really chooses
    "indexer_compress_ratio": 2,
}


# None has a processor class; their checkpoints name that of Qwen3-VL.
_SHARED: dict[str, Any] = {
    "kind": "E",
    "processor": grid_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", patch_size=16),
    "tokens": QWEN_TOKENS,
    "slot": QWEN_SLOT,
    "larger": (140, 100),
}
member(name="qwen3_5", model=_qwen("Qwen3_5"), **_SHARED)
member(name="qwen3_5_moe", model=_qwen("Qwen3_5Moe", **_EXPERTS), **_SHARED)
# With the weights of seed 0 it answers with an image token, which no pass over prompt and answer at once can hold.
member(
    name="qwen4_exp",
    model=_qwen("Qwen4Exp", **_EXPERTS, **_INDEXED),
    seed=1,
    **_SHARED,
)


def _lfm2_vl(ids: dict[str, int]) -> Any:
    tower = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "num_patches": 16,
        "vision_use_head": False,
    }
    text = {
        "model_type": "lfm2",
        **text_config(ids, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    }
    config = transformers.Lfm2VlConfig(
        vision_config=tower, text_config=text, image_token_id=ids["<image>"], projector_hidden_size=64
    )
    return transformers.Lfm2VlForConditionalGeneration(config)


def _lfm2_vl_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor(
        "Lfm2VlImageProcessor",
        backend,
        encoder_patch_size=14,
        tile_size=56,
        min_image_tokens=4,
        max_image_tokens=6,
        max_tiles=4,
    )
    return transformers.Lfm2VlProcessor(images, tokenizer)


member(
    name="lfm2_vl",
    kind="J",
    model=_lfm2_vl,
    processor=_lfm2_vl_processor,
    tokens=(
        "<image>",
        "<|image_start|>",
        "<|image_end|>",
        "<|img_thumbnail|>",
        *(f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 5)),
    ),
    slot="<image>",
    named={"image_token": "<image>"},
    backends=("torchvision",),  # its image processor has no PIL twin
    larger=(150, 100),
)


def _lfm3_vl(ids: dict[str, int]) -> Any:
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["conv", "full_attention"],
        "patch_size": 16,
    }
    # The window is shorter than any prompt here: it really cuts.
    kinds = ["conv", "full_attention", "sliding_attention"]
    text = {"model_type": "lfm3", **text_config(ids, head_dim=12, sliding_window=8, layer_types=kinds, conv_L_cache=3)}
    config = transformers.Lfm3VlConfig(
        vision_config=tower, text_config=text, projector_hidden_size=64, **vision_ids(ids)
    )
    return transformers.Lfm3VlForConditionalGeneration(config)


member(
    name="lfm3_vl",
    model=_lfm3_vl,
    **{**_SHARED, "processor": grid_processor("Lfm3VlProcessor", "Qwen3VLVideoProcessor", patch_size=16)},
)

_NOTE_TOKENS = ("<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>", "<|audio_comp_pad|>")


def _dots3_note(ids: dict[str, int]) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
    heads |= {"head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
    text = text_config(
        ids,
        **heads,
        **{f"swa_{name}": value for name, value in heads.items()},
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        sliding_window=8,
        # Shorter than any prompt here: the indexer really chooses. Not 8: means over heads of 0.46 came about, which a
        # trace rounds, in float16, by 1.07e-4, while 1e-4 is allowed.
        index_topk=12,
        index_head_dim=16,
        # Its scores are sums over heads of what a ReLU lets through. With two heads many keys score 0, and which of
        # those top-k takes depends on how many there are: the model would contradict itself from token to token.
        index_n_heads=16,
        mlp_layer_types=["dense", "sparse", "sparse"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_experts_intermediate_size=32,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_local_experts": 4,
        "adapter_in_dim": 32,
        "adapter_out_dim": 48,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "feature_size": 16,
        "downsample_hidden_size": 8,
        "adapter_input_size": 32,
        "adapter_out_dim": 48,
    }
    config = transformers.Dots3NoteConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=ids["<|imgpad|>"],
        video_token_id=ids["<|video_pad|>"],
        audio_token_id=ids["<|audio_comp_pad|>"],
    )
    return transformers.Dots3NoteForConditionalGeneration(config)


def _dots3_note_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.Dots3NoteProcessor(
        image_processor=image_processor(
            "Qwen2VLImageProcessor", backend, size=PIXELS, patch_size=14, temporal_patch_size=1
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=14, temporal_patch_size=1),
        feature_extractor=transformers.Dots3NoteFeatureExtractor(feature_size=16),
    )


member(
    name="dots3_note",
    kind="E",
    model=_dots3_note,
    processor=_dots3_note_processor,
    tokens=_NOTE_TOKENS,
    slot="<|img|><|imgpad|><|endofimg|>",
    larger=(140, 100),
)

_M3_TOKENS = ("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>[")


def _minimax_m3_vl(ids: dict[str, int]) -> Any:
    text = text_config(
        ids,
        head_dim=16,
        rotary_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        # Two blocks of four keys and the one before: the indexer really chooses.
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
        index_local_blocks=1,
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
    }
    config = transformers.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids["]<]image[>["],
        video_token_index=ids["]<]video[>["],
        projector_hidden_size=48,
    )
    return transformers.MiniMaxM3SparseForConditionalGeneration(config)


def _minimax_m3_vl_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.MiniMaxM3VLProcessor(
        image_processor=image_processor("MiniMaxM3VLImageProcessor", backend, size=PIXELS),
        tokenizer=tokenizer,
        video_processor=transformers.MiniMaxM3VLVideoProcessor(),
    )


member(
    name="minimax_m3_vl",
    kind="E",
    model=_minimax_m3_vl,
    processor=_minimax_m3_vl_processor,
    tokens=_M3_TOKENS,
    slot="]<]image[>[",
    backends=("torchvision",),  # its image processor has no PIL twin
    larger=(140, 100),
)
