"""Weights of registry packages as unmodified transformers classes: a GGUF reader and the names of each conversion.

`tower` and `language_model` return what `build.py` puts together. Nothing here downloads; each takes the file that it
has laid out.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BLOCKS = {0: (1, 4), 1: (1, 2), 3: (32, 20), 8: (32, 34)}
"""Values and bytes of one block of each tensor type: F32, F16, Q4_1, Q8_0."""


def dequantise(data: np.ndarray, kind: int) -> np.ndarray:
    """Return the float32 values of a GGUF tensor.

    Args:
        data: the tensor's bytes, uint8
        kind: 0 F32, 1 F16, 3 Q4_1 (scale and minimum in float16, then 32 nibbles: all low ones, then all high ones),
            8 Q8_0 (scale in float16, then 32 signed bytes)
    """
    if kind not in _BLOCKS:
        raise ValueError(f"GGUF tensor type {kind} is not one of F32, F16, Q4_1 and Q8_0")
    if kind < 2:
        return data.view(np.float32 if kind == 0 else np.float16).astype(np.float32)
    blocks = data.reshape(-1, _BLOCKS[kind][1])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == 8:
        return (scale * blocks[:, 2:].view(np.int8)).reshape(-1)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = blocks[:, 4:]
    return (scale * np.concatenate([nibbles & 15, nibbles >> 4], axis=1) + minimum).reshape(-1)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the float32 tensors of a GGUF file (version 3, little-endian)."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at = 0

    def number(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, length = number("I"), number("Q")
            return [value(inner) for _ in range(length)]
        return number(_SCALARS[kind])

    if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] != 3:
        raise ValueError(f"{path} is not a GGUF file of version 3")
    at = 8
    tensors, keys = number("Q"), number("Q")
    metadata = {text(): value(number("I")) for _ in range(keys)}
    places = [(text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")) for _ in range(tensors)]
    start = -(-at // 32) * 32  # the tensors' bytes are aligned
    found = {}
    for name, shape, kind, offset in places:
        values, size = _BLOCKS.get(kind, (1, 0))
        raw = np.frombuffer(data, np.uint8, int(np.prod(shape)) // values * size, start + offset)
        found[name] = torch.from_numpy(dequantise(raw, kind)).reshape(shape[::-1])
    return metadata, found


def _pairs_apart(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of rotary pairs: (2i, 2i + 1) there, (i, i + half) in transformers."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def llama_weights(tensors: Mapping[str, Tensor], layers: int, heads: int, key_heads: int) -> dict[str, Tensor]:
    """Return a `LlamaForCausalLM`'s state under the names of transformers, from the names of GGUF."""
    named = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors.get("output.weight", tensors["token_embd.weight"]),
    }
    for layer in range(layers):
        for theirs, ours in named.items():
            weight = tensors[f"blk.{layer}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = _pairs_apart(weight, heads if theirs == "attn_q" else key_heads)
            state[f"model.layers.{layer}.{ours}.weight"] = weight
    return state


def language_model(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the model of a GGUF file of the Llama architecture with a byte-level tokenizer, float32 in eval mode."""
    meta, tensors = read_gguf(path)
    shape = {key.removeprefix("llama."): value for key, value in meta.items() if key.startswith("llama.")}
    heads, key_heads = shape["attention.head_count"], shape["attention.head_count_kv"]
    begin, end = meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embedding_length"],
        intermediate_size=shape["feed_forward_length"],
        num_hidden_layers=shape["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=shape["context_length"],
        rms_norm_eps=round(shape["attention.layer_norm_rms_epsilon"], 9),  # was float32 in the file
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope.freq_base"]},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(llama_weights(tensors, config.num_hidden_layers, heads, key_heads))
    return model, _tokenizer(meta)


def _tokenizer(meta: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    words, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    inner = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[tuple(m.split(" ")) for m in merges])
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=words[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=words[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=words[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=words[meta["tokenizer.ggml.unknown_token_id"]],
        clean_up_tokenization_spaces=False,
        model_max_length=meta["llama.context_length"],
        chat_template=meta["tokenizer.chat_template"],
    )


def efficientnet_weights(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an `EfficientNetForImageClassification`'s state from the package's checkpoint.

    A lite network has no squeeze-and-excite gates: theirs are sigmoid(30), which is 1 in float32.

    Args:
        source: the package's checkpoint
        target: the state of the class that it is for; names and shapes of the gates are taken from it
    """
    named = {
        "_conv_stem.": "efficientnet.embeddings.convolution.",
        "_bn0.": "efficientnet.embeddings.batchnorm.",
        "_conv_head.": "efficientnet.encoder.top_conv.",
        "_bn1.": "efficientnet.encoder.top_bn.",
        "_fc.": "classifier.",
    }
    in_block = {
        "_expand_conv.": "expansion.expand_conv.",
        "_bn0.": "expansion.expand_bn.",
        "_depthwise_conv.": "depthwise_conv.depthwise_conv.",
        "_bn1.": "depthwise_conv.depthwise_norm.",
        "_project_conv.": "projection.project_conv.",
        "_bn2.": "projection.project_bn.",
    }
    state = {}
    for name, weight in source.items():
        prefix, table, rest = "", named, name
        if name.startswith("_blocks."):
            _, index, rest = name.split(".", 2)
            prefix, table = f"efficientnet.encoder.blocks.{index}.", in_block
        part, leaf = rest.rsplit(".", 1)
        state[f"{prefix}{table[part + '.']}{leaf}"] = weight
    for name, weight in target.items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(weight, 30.0 if name.endswith("expand.bias") else 0.0)
        elif name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(weight))
    return state


def tower(path: Path) -> EfficientNetForImageClassification:
    """Return EfficientNet-lite0 with its ImageNet classifier, float32 in eval mode."""
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        image_size=224,
        hidden_act="relu6",
        dropout_rate=0.2,
        num_labels=1000,
    )
    model = EfficientNetForImageClassification(config).eval()
    source = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(efficientnet_weights(source, model.state_dict()))
    return model
