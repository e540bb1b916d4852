"""Families that generate in a way of their own: encoder-decoder models, and those whose ``generate()`` calls a language
model inside, so that the top-level forward pass never runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from PIL import Image
from tiny_models import LAYERS, square, text_config
from zoo import Backend, image_processor, member

_SIDE = 56


def _special(ids: dict[str, int]) -> dict[str, int]:
    return {"bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"], "pad_token_id": ids["<pad>"]}


def _florence2(ids: dict[str, int]) -> Any:
    text = {
        "model_type": "bart",
        "vocab_size": 640,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 256,
        "decoder_start_token_id": ids["<eos>"],
        "forced_eos_token_id": None,
        "forced_bos_token_id": ids["<bos>"],
        **_special(ids),
    }
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 7,
        "projection_dim": 32,
        "drop_path_rate": 0.1,
        "max_position_embeddings": 20,
    }
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=ids["<image>"])
    model = transformers.Florence2ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = ids["<eos>"]
    model.generation_config.forced_bos_token_id = ids["<bos>"]
    return model


def _florence2_processor(tokenizer: Any, backend: Backend) -> Any:
    # Its checkpoints use CLIP's image processor, without the crop.
    images = image_processor(
        "CLIPImageProcessor", backend, size=square(), do_center_crop=False, crop_size=square(), image_seq_length=50
    )
    return transformers.Florence2Processor(images, tokenizer, num_additional_image_tokens=1)


member(
    name="florence2",
    kind="B",
    model=_florence2,
    processor=_florence2_processor,
    tokens=("<image>",),
    named={"image_token": "<image>"},
    templated=False,
    local=False,  # patches overlap, and its tower convolves across them between attention layers
)


def _t5gemma2(ids: dict[str, int]) -> Any:
    text = text_config(
        ids,
        head_dim=12,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=12,
    )
    vision = {**LAYERS, "model_type": "siglip_vision_model", "image_size": _SIDE, "patch_size": 14}
    encoder = {
        "text_config": dict(text),
        "vision_config": {**vision, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": ids["<start_of_image>"],
        "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
    }
    config = transformers.T5Gemma2Config(
        encoder=encoder, decoder=dict(text), image_token_index=ids["<image_soft_token>"]
    )
    model = transformers.T5Gemma2ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = ids["<bos>"]
    return model


def _gemma3_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Gemma3ImageProcessor", backend, size=square(), image_seq_length=4)
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


# It has no processor class; transformers maps it to that of Gemma 3.
member(
    name="t5gemma2",
    kind="B",
    model=_t5gemma2,
    processor=_gemma3_processor,
    tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    slot="<start_of_image>",
    named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    nested=True,
)

_QUERIES = 4


def _blip(ids: dict[str, int], name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vision_config={**LAYERS, "image_size": _SIDE, "patch_size": 14},
        qformer_config={**LAYERS, "vocab_size": 640, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config={
            "model_type": "opt",
            "vocab_size": 640,
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            **_special(ids),
        },
        num_query_tokens=_QUERIES,
        image_token_index=ids["<image>"],
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _blip_2(ids: dict[str, int]) -> Any:
    return _own_generate(_blip(ids, "Blip2"), ids)


def _instructblip(ids: dict[str, int]) -> Any:
    return _own_generate(_blip(ids, "InstructBlip"), ids)


def _own_generate(model: Any, ids: dict[str, int]) -> Any:
    """``generate()`` is that of the language model inside, which reads its own generation config."""
    inner = model.language_model if hasattr(model, "language_model") else model.text_model
    for name, value in _special(ids).items():
        setattr(inner.generation_config, name, value)
    return model


def _blip_processor(name: str) -> Any:
    def make(tokenizer: Any, backend: Backend) -> Any:
        images = image_processor("BlipImageProcessor", backend, size=square())
        tokenizer.image_token = transformers.AddedToken("<image>", normalized=False, special=True)
        if name == "InstructBlipProcessor":
            return transformers.InstructBlipProcessor(images, tokenizer, tokenizer, num_query_tokens=_QUERIES)
        return transformers.Blip2Processor(images, tokenizer, num_query_tokens=_QUERIES)

    return make


for _name, _build, _class in (
    ("blip-2", _blip_2, "Blip2Processor"),
    ("instructblip", _instructblip, "InstructBlipProcessor"),
):
    member(
        name=_name,
        kind="B",
        model=_build,
        processor=_blip_processor(_class),
        tokens=("<image>",),
        templated=False,
    )

_KOSMOS_IMAGE = ("<image>", "</image>", "<unk>", *(f"<slot_{index}>" for index in range(_QUERIES)))


def _kosmos2(ids: dict[str, int]) -> Any:
    config = transformers.Kosmos2Config(
        vision_config={**LAYERS, "image_size": _SIDE, "patch_size": 14},
        text_config={
            "vocab_size": 2000,
            "embed_dim": 48,
            "layers": 3,
            "ffn_dim": 64,
            "attention_heads": 4,
            "max_position_embeddings": 512,
            **_special(ids),
        },
        latent_query_num=64,  # what its processor reckons with
    )
    return _own_generate(transformers.Kosmos2ForConditionalGeneration(config), ids)


def _kosmos2_processor(tokenizer: Any, backend: Backend) -> Any:
    tokenizer.unk_token = "<unk>"
    images = image_processor("CLIPImageProcessor", backend, size={"shortest_edge": _SIDE}, crop_size=square())
    return transformers.Kosmos2Processor(images, tokenizer, num_patch_index_tokens=16)


member(
    name="kosmos-2",
    kind="A",
    model=_kosmos2,
    processor=_kosmos2_processor,
    tokens=_KOSMOS_IMAGE,
    templated=False,
)


def _idefics(ids: dict[str, int]) -> Any:
    config = transformers.IdeficsConfig(
        vocab_size=640,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        alpha_initializer="ones",  # a gate at its default, zero, lets no picture through
        vision_config={
            "embed_dim": 32,
            "image_size": _SIDE,
            "intermediate_size": 48,
            "patch_size": 14,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        **_special(ids),
    )
    return transformers.IdeficsForVisionText2Text(config)


def _idefics_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("IdeficsImageProcessor", backend, image_size=_SIDE)
    return transformers.IdeficsProcessor(images, tokenizer, image_size=_SIDE)


def _idefics_inputs(_model: Any, processor: Any, images: Sequence[Image.Image], question: str) -> Mapping[str, Any]:
    return processor(text=[[*images, question]], return_tensors="pt")


member(
    name="idefics",
    kind="B",
    model=_idefics,
    processor=_idefics_processor,
    tokens=("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    named={"image_token": "<image>"},
    prepare=_idefics_inputs,
)
