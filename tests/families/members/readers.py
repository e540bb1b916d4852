"""Families that take no question: captioners, and readers of pages, lines, charts and formulas. Some begin their answer
with a task that the user names; of others the image is all they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from PIL import Image
from tiny_models import LAYERS, square, text_config
from zoo import Backend, image_processor, member

_SIDE = 56
_STARTS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _special(ids: dict[str, int]) -> dict[str, int]:
    return {name: ids[f"<{name[:3]}>"] for name in _STARTS}


def image_alone(_model: Any, processor: Any, images: Sequence[Image.Image], _question: str) -> Mapping[str, Any]:
    return processor(images=list(images), return_tensors="pt")


def bart_decoder(ids: dict[str, int], **settings: Any) -> dict[str, Any]:
    """A decoder with cross-attention, in the names of the BART family."""
    return {
        "vocab_size": 640,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 256,
        "is_decoder": True,
        "add_cross_attention": True,
        "is_encoder_decoder": False,
        "forced_eos_token_id": None,
        **_special(ids),
        **settings,
    }


def encoder_decoder(encoder: Any, decoder: Any, ids: dict[str, int]) -> Any:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = ids["<bos>"], ids["<pad>"]
    model = transformers.VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = ids["<bos>"]
    return model


def donut(ids: dict[str, int]) -> Any:
    encoder = transformers.DonutSwinConfig(
        image_size=[_SIDE, _SIDE], patch_size=7, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return encoder_decoder(encoder, transformers.MBartConfig(**bart_decoder(ids)), ids)


def donut_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("DonutImageProcessor", backend, size=square(), do_align_long_axis=False)
    return transformers.DonutProcessor(images, tokenizer)


def _donut_inputs(_model: Any, processor: Any, images: Sequence[Image.Image], _question: str) -> Mapping[str, Any]:
    task = processor.tokenizer("<s_docvqa>", add_special_tokens=False, return_tensors="pt").input_ids
    return {**processor(images=list(images), return_tensors="pt"), "decoder_input_ids": task}


member(
    name="vision-encoder-decoder",
    kind="C",
    model=donut,
    processor=donut_processor,
    tokens=("<s_docvqa>",),
    prepare=_donut_inputs,
    local=False,  # patches are merged by a linear layer after attention in shifted windows
)


def _pp_formulanet(ids: dict[str, int]) -> Any:
    text = bart_decoder(ids, decoder_start_token_id=ids["<eos>"])
    del text["is_encoder_decoder"]
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 256,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": 32,
    }
    config = transformers.PPFormulaNetConfig(text_config=text, vision_config=vision, is_encoder_decoder=True)
    model = transformers.PPFormulaNetForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = ids["<eos>"]
    return model


def _pp_formulanet_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("PPFormulaNetImageProcessor", backend, size=square(256), do_crop_margin=False)
    return transformers.PPFormulaNetProcessor(images, tokenizer)


member(
    name="pp_formulanet",
    kind="C",
    model=_pp_formulanet,
    processor=_pp_formulanet_processor,
    backends=("torchvision",),
    prepare=image_alone,
    local=False,  # a neck of convolutions lies behind its layers
)


def _pix2struct(ids: dict[str, int]) -> Any:
    text = {
        "vocab_size": 640,
        "hidden_size": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": ids["<pad>"],
        **_special(ids),
    }
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 768,
        "d_ff": 48,
        "d_kv": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "seq_len": 64,
    }
    config = transformers.Pix2StructConfig(text_config=text, vision_config=vision)
    model = transformers.Pix2StructForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = ids["<pad>"]
    return model


def _pix2struct_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Pix2StructImageProcessor", backend)
    return _few_patches(transformers.Pix2StructProcessor(images, tokenizer))


_FEW_PATCHES = {"max_patches": 24}
"""Of thousands, which such a processor makes of any image by default, whatever was saved of it."""


def _few_patches(processor: Any) -> Any:
    processor.images_kwargs = {**processor.images_kwargs, **_FEW_PATCHES}
    return processor


member(
    name="pix2struct",
    kind="L",
    model=_pix2struct,
    processor=_pix2struct_processor,
    prepare=lambda _model, processor, images, _question: processor(
        images=list(images), return_tensors="pt", **_FEW_PATCHES
    ),
    call=_FEW_PATCHES,
    local=False,  # each picture is normalised by its own statistics, which a light anywhere changes
)

_QUERIES = 4


def _kosmos25(ids: dict[str, int]) -> Any:
    text = {
        "vocab_size": 640,
        "embed_dim": 48,
        "layers": 3,
        "ffn_dim": 64,
        "attention_heads": 4,
        "max_position_embeddings": 512,
        **_special(ids),
    }
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 768,
        "intermediate_size": 48,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_num_patches": 128,
    }
    config = transformers.Kosmos2_5Config(text_config=text, vision_config=vision, latent_query_num=_QUERIES)
    return transformers.Kosmos2_5ForConditionalGeneration(config)


def _kosmos25_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Kosmos2_5ImageProcessor", backend, **_FEW_PATCHES)
    return _few_patches(transformers.Kosmos2_5Processor(images, tokenizer, num_image_tokens=_QUERIES))


member(
    name="kosmos-2.5",
    kind="L",
    model=_kosmos25,
    processor=_kosmos25_processor,
    tokens=("<image>", "</image>", "<s>", "<ocr>"),
    named={"boi_token": "<image>", "eoi_token": "</image>", "image_token": "<s>"},
    prepare=lambda _model, processor, images, _question: processor(
        images=list(images), text=["<ocr>"], return_tensors="pt", **_FEW_PATCHES
    ),
    call=_FEW_PATCHES,
)


def _git(ids: dict[str, int]) -> Any:
    config = transformers.GitConfig(
        vision_config={**LAYERS, "image_size": _SIDE, "patch_size": 14},
        **text_config(ids),
    )
    return transformers.GitForCausalLM(config)


def _git_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("CLIPImageProcessor", backend, size={"shortest_edge": _SIDE}, crop_size=square())
    return transformers.GitProcessor(images, tokenizer)


member(
    name="git",
    kind="A",
    model=_git,
    processor=_git_processor,
    prepare=image_alone,
    attention="its decoder computes attention by code of its own, past transformers' attention interface",
)


def _captioner(ids: dict[str, int]) -> Any:
    text = {
        **LAYERS,
        "vocab_size": 640,
        "encoder_hidden_size": 32,
        "projection_dim": 32,
        "max_position_embeddings": 256,
        "sep_token_id": ids["<eos>"],
        **_special(ids),
    }
    config = transformers.BlipConfig(
        text_config=text, vision_config={**LAYERS, "image_size": _SIDE, "patch_size": 14}, image_text_hidden_size=32
    )
    return transformers.BlipForConditionalGeneration(config)


def _captioner_processor(tokenizer: Any, backend: Backend) -> Any:
    return transformers.BlipProcessor(image_processor("BlipImageProcessor", backend, size=square()), tokenizer)


member(
    name="blip",
    kind="B",
    model=_captioner,
    processor=_captioner_processor,
    prepare=image_alone,
    attention="its decoder computes attention by code of its own, past transformers' attention interface",
)


def _codes(ids: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    """The part of the vocabulary that stands for codes of an image."""
    return {name: ids[name] for name in names}


_CODES = 16
_CHAMELEON = tuple(f"IMGIMG{a}{b}Z" for a in "ABCD" for b in "ABCD")
_EMU = tuple(f"<|visual token {index:06d}|>" for index in range(_CODES))


def _chameleon(ids: dict[str, int]) -> Any:
    config = transformers.ChameleonConfig(
        **text_config(ids, num_key_value_heads=4),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": _CODES,
            "latent_channels": 8,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map=_codes(ids, ("<image>", *_CHAMELEON)),
    )
    return transformers.ChameleonForConditionalGeneration(config)


def _chameleon_processor(tokenizer: Any, backend: Backend) -> Any:
    tokenizer.sep_token = "<sep>"
    images = image_processor("ChameleonImageProcessor", backend, size={"shortest_edge": 32}, crop_size=square(32))
    return transformers.ChameleonProcessor(images, tokenizer, image_seq_length=256, image_token="<image>")


_DISCRETE = "its image tokens are discrete codes, which change by jumps"

member(
    name="chameleon",
    kind="A",
    model=_chameleon,
    processor=_chameleon_processor,
    templated=False,
    prepare=lambda _model, processor, images, question: processor(
        images=list(images), text=f"{question}<image>", return_tensors="pt"
    ),
    tokens=("<image>", "<sep>", "<racm3:break>", "<eoss>", *_CHAMELEON),
    named={"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"},
    discrete=_DISCRETE,
    seed=10,  # of those whose answer changes with the codes
)


def _emu3(ids: dict[str, int]) -> Any:
    config = transformers.Emu3Config(
        text_config=text_config(ids, attention_dropout=0.0),
        vq_config={
            "codebook_size": _CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
        vocabulary_map=_codes(ids, ("<image>", "<|extra_200|>", *_EMU)),
    )
    return transformers.Emu3ForConditionalGeneration(config)


def _emu3_processor(tokenizer: Any, backend: Backend) -> Any:
    images = image_processor("Emu3ImageProcessor", backend, min_pixels=32 * 32, max_pixels=48 * 48)
    return transformers.Emu3Processor(images, tokenizer)


member(
    name="emu3",
    kind="I",
    model=_emu3,
    processor=_emu3_processor,
    tokens=("<image>", "<|extra_200|>", "<|extra_201|>", "<|image start|>", "<|image end|>", "<|image token|>", *_EMU),
    named={
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    },
    backends=("pil",),
    discrete=_DISCRETE,
    seed=8,  # of those in which several codes are told apart
)
