"""More families that cut a picture into tiles: dynamic tiles, image splitting, and canvases of tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from PIL import Image
from tiny_models import SQUARE_TOWER, square, text_config
from zoo import Backend, ask, image_processor, member

_SIDE = 56  # of a tile: 4 x 4 patches of 14 pixels
_ONE_TILE = (54, 42)
_SPLIT = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)),
)
_INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def _ovis2(ids: dict[str, int]) -> Any:
    config = transformers.Ovis2Config(
        vision_config={**SQUARE_TOWER, "vocab_size": 64, "hidden_stride": 2},
        text_config={"model_type": "qwen2", **text_config(ids)},
        image_token_id=ids["<IMG_ATOM>"],
        visual_indicator_token_ids=[ids[token] for token in _INDICATORS],
        vocab_size=640,
        hidden_size=48,
    )
    return transformers.Ovis2ForConditionalGeneration(config)


def _ovis2_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Ovis2ImageProcessor", backend, size=square(), crop_to_patches=True, max_patches=4)
    return transformers.Ovis2Processor(images, tokenizer, image_seq_length=4)


member(
    name="ovis2",
    kind="F",
    model=_ovis2,
    processor=_ovis2_processor,
    tokens=("<image>", "<IMG_ATOM>", *_INDICATORS),
    size=_ONE_TILE,
    larger=(150, 80),
)


def _perception_lm(ids: dict[str, int]) -> Any:
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "vit_pe_core_large_patch14_336",
        "model_args": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "img_size": (_SIDE, _SIDE),
            "ref_feat_shape": (4, 4),
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
        },
    }
    config = transformers.PerceptionLMConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **text_config(ids)},
        projector_pooling_ratio=2,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
    )
    return transformers.PerceptionLMForConditionalGeneration(config)


def _perception_lm_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("PerceptionLMImageProcessor", backend, tile_size=_SIDE, max_num_tiles=4)
    return transformers.PerceptionLMProcessor(
        video_processor=transformers.PerceptionLMVideoProcessor(),
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        pooling_ratio=2,
    )


member(
    name="perception_lm",
    kind="F",
    model=_perception_lm,
    processor=_perception_lm_processor,
    tokens=("<|image|>", "<|video|>"),
    slot="<|image|>",
    named={"image_token": "<|image|>", "video_token": "<|video|>"},
    backends=("torchvision",),
    size=_ONE_TILE,
    larger=(180, 50),
)


def _granite_docling(ids: dict[str, int]) -> Any:
    vision = {**SQUARE_TOWER, "out_hidden_size": 48, "scale_factor": 2, "deepstack_visual_indexes": [0]}
    config = transformers.GraniteDoclingConfig(
        vision_config=vision,
        text_config=text_config(ids, attention_multiplier=0.3),
        image_token_id=ids["<image>"],
        pad_token_id=ids["<pad>"],
    )
    return transformers.GraniteDoclingForConditionalGeneration(config)


def _granite_docling_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("GraniteDoclingImageProcessor", backend, size=square(), max_patches=4)
    return transformers.GraniteDoclingProcessor(images, tokenizer, image_seq_len=4)


member(
    name="granite_docling",
    kind="F",
    model=_granite_docling,
    processor=_granite_docling_processor,
    tokens=_SPLIT,
    slot="<image>",
    named={"image_token": "<image>"},
    size=_ONE_TILE,
    larger=(150, 80),
    nested=True,
)


def _smolvlm(ids: dict[str, int]) -> Any:
    config = transformers.SmolVLMConfig(
        vision_config=SQUARE_TOWER,
        text_config={"model_type": "llama", **text_config(ids)},
        image_token_id=ids["<image>"],
        scale_factor=2,
        pad_token_id=ids["<pad>"],
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def _smolvlm_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor(
        "SmolVLMImageProcessor", backend, size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE}
    )
    video = transformers.SmolVLMVideoProcessor()
    return transformers.SmolVLMProcessor(images, tokenizer, video, image_seq_len=4)


member(
    name="smolvlm",
    kind="G",
    model=_smolvlm,
    processor=_smolvlm_processor,
    tokens=(*_SPLIT, "<video>"),
    slot="<image>",
    size=(110, 50),
    larger=(150, 100),
    nested=True,
)

_LLAMA4 = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")


def _llama4(ids: dict[str, int]) -> Any:
    vision = {
        **SQUARE_TOWER,
        "intermediate_size": 128,  # pixel shuffle puts four patches side by side
        "projector_input_dim": 48,
        "projector_output_dim": 48,
        "vision_output_dim": 48,
    }
    text = text_config(
        ids,
        head_dim=12,
        intermediate_size_mlp=64,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        no_rope_layers=[1, 0, 1],
        attention_chunk_size=16,  # shorter than any prompt here: the chunks really cut
    )
    config = transformers.Llama4Config(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<|patch|>"],
        boi_token_index=ids["<|image_start|>"],
        eoi_token_index=ids["<|image_end|>"],
    )
    return transformers.Llama4ForConditionalGeneration(config)


def _llama4_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Llama4ImageProcessor", backend, size=square(), max_patches=4)
    return transformers.Llama4Processor(images, tokenizer, patch_size=14, pixel_shuffle_ratio=0.5)


def _llama4_inputs(model: Any, processor: Any, images: Sequence[Image.Image], question: str) -> Mapping[str, Any]:
    """The processor answers in bfloat16 whatever the model's type, so whoever loads it in another one casts."""
    return ask(processor, images, question).to(model.dtype)


member(
    name="llama4",
    kind="H",
    model=_llama4,
    processor=_llama4_processor,
    tokens=_LLAMA4,
    slot="<|image|>",
    backends=("torchvision",),
    size=_ONE_TILE,
    larger=(150, 80),
    prepare=_llama4_inputs,
)
