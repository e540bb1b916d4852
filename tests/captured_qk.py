"""Queries and keys of a pass, as vllm-lens captures and sends them: taken behind the rotary embedding of the model."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pyarrow
import torch
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_vl import modeling_qwen2_vl

_ROTARY = "apply_rotary_pos_emb"


@contextlib.contextmanager
def capturing() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Queries and keys ``(position, head, channel)`` of every decoder layer that runs in the block."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(rotary: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*args: Any, **kwargs: Any) -> Any:
            query, key = rotary(*args, **kwargs)
            seen.append((query[0].transpose(0, 1).detach(), key[0].transpose(0, 1).detach()))
            return query, key

        return apply

    with contextlib.ExitStack() as stack:
        for module in (modeling_llama, modeling_qwen2_vl):
            stack.enter_context(mock.patch.object(module, _ROTARY, watched(getattr(module, _ROTARY))))
        yield seen


def captures(seen: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """What ``generate()`` of a vLLM with vllm-lens has as ``output.activations``."""
    heads, channels = seen[0][1].shape[1:]
    meta = {
        "scale": channels**-0.5,
        "logits_soft_cap": 0.0,
        "sliding_window": [-1, -1],
        "alibi_slopes": None,
        "sinks": None,
        "use_alibi_sqrt": False,
        "num_kv_heads_local": heads,
        "num_kv_heads_total": heads,
    }
    return {
        "attn_q": torch.stack([query for query, _ in seen]),
        "attn_k": torch.stack([key for _, key in seen]),
        "qk_layers": list(range(len(seen))),
        "qk_meta": [dict(meta) for _ in seen],
    }


def as_sent(found: dict[str, Any]) -> dict[str, Any]:
    """The same as a server sends it."""
    codec = pyarrow.Codec("zstd")
    out: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            data = base64.b64encode(codec.compress(value.numpy().tobytes(), asbytes=True)).decode()
            about = {"dtype": "float32", "original_dtype": "torch.float32", "shape": list(value.shape)}
            out[name] = {"data": data, **about, "compression": "zstd"}
        else:
            out[name] = {"__json__": value}
    return {"activations": out}
