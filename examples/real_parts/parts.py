"""Weights of registry packages as unmodified transformers classes: readers of GGUF and ONNX, names of each conversion.

`tower`, `dinov2` and `language_model` return what `build.py` puts together. Nothing here downloads; each takes the file
that it has laid out.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    InternVLVisionConfig,
    InternVLVisionModel,
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


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an integer or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first, and where the next value begins."""
    value, shift, more = 0, 0, True
    while more:
        value |= (data[at] & 127) << shift
        more, at, shift = data[at] >= 128, at + 1, shift + 7
    return value, at


def read_onnx(path: Path) -> tuple[list[tuple[str, str, list[str]]], dict[str, Tensor]]:
    """Return the nodes of an ONNX graph, ``(operator, name, inputs)``, and its float32 initialisers by name.

    Numbers of fields are those of onnx.proto: ``ModelProto.graph`` 7; ``GraphProto.node`` 1, ``initializer`` 5;
    ``NodeProto.input`` 1, ``name`` 3, ``op_type`` 4; ``TensorProto.dims`` 1, ``data_type`` 2, ``name`` 8,
    ``raw_data`` 9.
    """
    (graph,) = (value for number, value in _fields(path.read_bytes()) if number == 7)
    nodes, tensors = [], {}
    for number, value in _fields(graph):
        found: dict[int, list[Any]] = {}
        if number in (1, 5):
            for inner, content in _fields(value):
                found.setdefault(inner, []).append(content)
        if number == 1:
            operator, name = (b"".join(found.get(field, [])).decode() for field in (4, 3))
            nodes.append((operator, name, [one.decode() for one in found.get(1, [])]))
        elif number == 5 and found[2] == [1] and 9 in found:
            shape = [size for one in found.get(1, []) for size in (_packed(one) if isinstance(one, bytes) else [one])]
            values = np.frombuffer(found[9][0], np.float32).copy()
            tensors[found[8][0].decode()] = torch.from_numpy(values).reshape(shape)
    return nodes, tensors


def _packed(data: bytes) -> list[int]:
    at, found = 0, []
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def dinov2_weights(
    nodes: list[tuple[str, str, list[str]]], tensors: Mapping[str, Tensor], layers: int
) -> dict[str, Tensor]:
    """Return an `InternVLVisionModel`'s state from an exported DINOv2 that stands under ``backbone``.

    The export keeps the names of biases and norms. The weight of a linear layer has lost its name and is transposed: it
    is known by the path of the node that multiplies with it.
    """
    weights = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    positions = []
    for operator, name, inputs in nodes:
        path = name.removeprefix("/backbone/")
        if operator == "MatMul" and path != name and inputs[1] in tensors:
            weights[path.removesuffix("/MatMul").replace("/", ".") + ".weight"] = tensors[inputs[1]].T.contiguous()
        elif operator in ("Concat", "Reshape") and path.startswith("embeddings/") and inputs[0] in tensors:
            positions.append(tensors[inputs[0]])  # of the class token, then of the patches
    named = {
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "attention.attention.query.": "attention.q_proj.",
        "attention.attention.key.": "attention.k_proj.",
        "attention.attention.value.": "attention.v_proj.",
        "attention.output.dense.": "attention.projection_layer.",
        "layer_scale1.lambda1": "lambda_1",
        "layer_scale2.lambda1": "lambda_2",
        "mlp.": "mlp.",
    }
    state = {
        "embeddings.cls_token": weights["embeddings.cls_token"],
        "embeddings.position_embeddings": torch.cat(sorted(positions, key=lambda one: one.shape[1]), 1),
    }
    for name, value in weights.items():
        if name.startswith("embeddings.patch_embeddings."):
            state[name] = value
        elif name.startswith("encoder.layer."):
            _, _, number, rest = name.split(".", 3)
            theirs = next(key for key in named if rest.startswith(key))
            if int(number) < layers:
                state[f"encoder.layer.{number}.{named[theirs]}{rest.removeprefix(theirs)}"] = value
    return state


def dinov2(path: Path, layers: int, side: int) -> InternVLVisionModel:
    """Return the first layers of the DINOv2 of an ONNX file, with no norm behind them, float32 in eval mode.

    Args:
        path: the file
        layers: how many
        side: of the square images, pixels
    """
    nodes, tensors = read_onnx(path)
    state = dinov2_weights(nodes, tensors, layers)
    channels = state["embeddings.cls_token"].shape[2]
    positions = state["embeddings.position_embeddings"]
    patch, old = state["embeddings.patch_embeddings.projection.weight"].shape[2], round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, old, old, channels).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side // patch, side // patch), mode="bicubic", align_corners=False)
    state["embeddings.position_embeddings"] = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    config = InternVLVisionConfig(
        hidden_size=channels,
        intermediate_size=state["encoder.layer.0.mlp.fc1.bias"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=channels // 64,
        attention_bias=True,
        image_size=(side, side),
        patch_size=(patch, patch),
        use_mean_pooling=True,  # no norm behind the last layer
    )
    model = InternVLVisionModel(config).eval()
    model.load_state_dict(state)
    return model
