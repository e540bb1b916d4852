"""Tiny Mini-Geminis with random weights, their processor, and a byte-level tokenizer written out here."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from lvlm_probe_mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
    MiniGeminiImageProcessor,
    MiniGeminiProcessor,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "build", "chat", "inputs", "picture", "settings", "tokenizer"]

KINDS = ("plain", "hd")
_LOW, _PATCH = 28, 7  # 4 × 4 tokens a view
_VOCABULARY = 3 + 256


def tokenizer(vocabulary: int = _VOCABULARY) -> PreTrainedTokenizerFast:
    """One token a byte; the placeholder is the first id after the vocabulary, as in a converted checkpoint."""
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<{number}>" for number in range(vocabulary - len(pieces))]
    raw = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    made.add_tokens(["<image>"], special_tokens=True)
    return made


def settings(kind: str, **more: Any) -> dict[str, Any]:
    """Fields of a configuration: pictures of 64 pixels, HD 128. 64 : 28 is the published ratio of resolutions."""
    text = {
        "model_type": "llama", "vocab_size": _VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    clip = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "patch_size": _PATCH, "image_size": _LOW, "projection_dim": 32,
    }  # fmt: skip
    convnext = {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
    high = {"image_size_aux": 64} if kind == "plain" else {"image_size_aux": 128, "image_grid": 2, "image_global": True}
    return {
        "text_config": text, "vision_config": clip, "vision_aux_config": convnext, "image_token_id": _VOCABULARY,
        **high, **more,
    }  # fmt: skip


@cache
def _weights(kind: str) -> dict[str, torch.Tensor]:
    """Weights whose parts all matter: the library's own initial values leave ConvNeXt's branches at 1e-6."""
    model = MiniGeminiForConditionalGeneration(MiniGeminiConfig(**settings(kind)))
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "layer_scale" in name:
            state[name] = 0.5 + 0.1 * noise
        elif value.ndim > 1:
            state[name] = noise / math.sqrt(value[0].numel())
        elif name.endswith("weight"):
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = 0.1 * noise
    state["lm_head.weight"] *= 2
    return state


def build(kind: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and processor; each call gives new ones."""
    config = MiniGeminiConfig(**settings(kind))
    config._attn_implementation = attention
    model = MiniGeminiForConditionalGeneration(config)
    model.load_state_dict(_weights(kind))
    model.generation_config.eos_token_id = None  # random weights end when they like
    model.generation_config.pad_token_id = 0
    side = config.image_size_aux
    processor = MiniGeminiProcessor(
        MiniGeminiImageProcessor(size={"height": side, "width": side}, image_size_low=_LOW),
        tokenizer(),
        patch_size=_PATCH,
        image_grid=config.image_grid,
        image_global=config.image_global,
    )
    return model.to(dtype).eval(), processor


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Coloured blocks with fine noise on them."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST), np.int16)
    return Image.fromarray((image + random.integers(-20, 20, image.shape)).clip(0, 255).astype(np.uint8))


def chat(question: str, *images: Image.Image) -> list[dict[str, Any]]:
    """One user turn."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def inputs(processor: Any, image: Image.Image, question: str = "What?", **more: Any) -> Any:
    """Inputs of one prompt with one picture."""
    return processor(text=f"<image>\n{question}", images=[image], return_tensors="pt", **more)
