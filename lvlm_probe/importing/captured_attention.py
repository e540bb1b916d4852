"""Attention rows of a served model, from the queries and keys that ``vllm-lens`` captures inside vLLM.

Fused kernels never hold attention weights, but the queries and keys that they are given can be captured, behind their
rotary embedding, together with what the kernel does with them (scale, soft cap, window, sinks). One softmax over them
gives the rows that a recording on the model itself would have read: attention of each position that predicts a token
of the answer, to each image token. With them in a trace, ``attention`` and ``relative_attention`` run on it.

A server answers 200 where ``vllm-lens`` is not installed, and leaves the captures out; numbers come from a stranger.
So all shapes, sizes and positions are checked against the trace before anything is computed.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lvlm_probe.attention.rows import attention_rows
from lvlm_probe.boxes.equal_parts import boxes_in_order
from lvlm_probe.errors import ImageError, ProcessorRefused, ReplayError
from lvlm_probe.extras import require
from lvlm_probe.images import ImagePath
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.recording.attention_points import DECODER_ATTENTION, DECODER_TEXT_MASS
from lvlm_probe.serving import Server, image_token_positions
from lvlm_probe.trace import Trace, open_trace, write
from lvlm_probe.trace.records import FIELDS, Capture, PointRecord, RowCapture

_DTYPES = {
    ("float32", "torch.float32"): torch.float32,
    ("float16", "torch.float16"): torch.float16,
    ("int16", "torch.bfloat16"): torch.bfloat16,
}
"""What a tensor is sent as, and what it was."""
_LARGEST = 4 << 30
"""Bytes of queries or keys: 64 layers of 32,000 positions with 8 heads of 128 in half precision."""


@naming_arguments
def import_attention(
    trace: Trace,
    captured: Server | Mapping[str, Any],
    *,
    processor: Any = None,
    heads: Literal["mean", "all"] = "mean",
    out: str | os.PathLike[str] | None = None,
) -> Trace:
    """Add attention rows of a served model to a trace: a new trace, which is otherwise the same.

    Args:
        trace: of an answer to images, asked through the server or recorded elsewhere.
        captured: the server (vLLM with ``vllm-lens``), which is asked to read prompt and answer once more; or what was
            captured while it did: its reply as JSON, or ``output.activations`` of vLLM's own ``generate``.
        processor: the model's processor, without its weights: says which part of the image each image token stands
            for, where the trace does not.
        heads: keep the ``"mean"`` over the heads, or ``"all"``.
        out: folder of the new trace, by default that of the old one.

    Raises:
        ReplayError: nothing was captured, or not of this prompt and answer; the message says what is missing.
        ImageError: the trace holds no image.
    """
    if not trace.images:
        raise ImageError(f"{trace.path.name} holds no image: there is no attention to it")
    found = captured.captured(trace) if isinstance(captured, Server) else captured
    rows, mass, layers = _rows(_tensors(found), trace, heads)
    row = RowCapture(
        **{name: getattr(trace, name) for name in FIELDS},
        model_kwargs=trace.model_kwargs,
        images=[trace.image_record(k) for k in range(len(trace.images))],
    )
    row.trace_id = f"{trace.trace_id[:100]}-{secrets.token_hex(4)}"
    row.image_positions, row.image_index = _places(trace)
    row.notes = [*row.notes, "attention rows are computed from queries and keys captured inside the engine (vllm-lens)"]
    if row.patch_box is None:
        _place(row, trace, processor)
    axes = ("step", "layer", "head", "image_token")
    reduce = "head_mean" if heads == "mean" else "none"
    columns = rows[..., torch.tensor(row.image_positions)]
    row.points = {
        **{name: trace.point(name) for name in trace.points},
        DECODER_ATTENTION: PointRecord(columns.half(), axes, layers, reduce),
        DECODER_TEXT_MASS: PointRecord(mass - columns.sum(-1), axes[:3], layers, reduce),
    }
    folder = trace.path.parent if out is None else Path(out)
    return open_trace(write(Capture([row], dict(trace.model), trace.created), folder))


def _places(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Where the image tokens are in the prompt, and of which image each is."""
    if len(trace.layout.image_positions):
        return np.asarray(trace.image_positions), np.asarray(trace.image_index)
    found = image_token_positions(trace.input_ids.tolist(), len(trace.images))
    if found is None:
        raise ReplayError(f"the prompt of {trace.path.name} does not show where its images' tokens stand")
    return found


def _place(row: RowCapture, trace: Trace, processor: Any) -> None:
    """Enter boxes of the image tokens, or why there are none."""
    if processor is None:
        row.notes.append("no boxes for the image tokens: give the model's processor, import_attention(…, processor=…)")
        return
    try:
        path = ImagePath.from_processor(processor, list(trace.images))
        places = boxes_in_order(path, len(row.image_positions))
    except (ImageError, ProcessorRefused) as error:
        row.notes.append(f"no boxes for the image tokens: {error}")
        return
    row.patch_box, row.image_index = places.boxes, np.where(places.images < 0, row.image_index, places.images)


# ------------------------------------------------------------------------------------------------------------- captures


def _tensors(found: Mapping[str, Any]) -> dict[str, Any]:
    """Queries, keys, layers and what the kernel does, decoded. Raises ``ReplayError``."""
    inside = found.get("activations", found)
    names = ("attn_q", "attn_k", "qk_layers", "qk_meta")
    missing = [name for name in names if not isinstance(inside, Mapping) or name not in inside]
    if missing:
        raise ReplayError(
            f"no queries and keys were captured (no {', '.join(missing)}): the server runs without vllm-lens, or was "
            "asked without vllm_xargs={'output_qk': 'true'}"
        )
    return {name: _decoded(inside[name], name) for name in names}


def _decoded(value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "__json__" in value:
        return value["__json__"]
    dtype = _DTYPES.get((str(value.get("dtype")), str(value.get("original_dtype"))))
    shape, data = value.get("shape"), value.get("data")
    whole = isinstance(shape, list) and all(isinstance(edge, int) and edge > 0 for edge in shape)
    if dtype is None or not whole or not isinstance(data, str) or value.get("compression") != "zstd":
        raise ReplayError(f"{name} is not sent as vllm-lens does: dtype {value.get('dtype')}, shape {str(shape)[:60]}")
    assert isinstance(shape, list)
    size = math.prod(shape) * dtype.itemsize
    if size > _LARGEST:
        raise ReplayError(
            f"{name} would take {size / 2**30:.1f} GiB: capture fewer layers, vllm_xargs output_qk='[0, 1]'"
        )
    arrow = require("pyarrow", extra="tables", purpose="reading what vllm-lens has compressed")
    try:
        raw = arrow.Codec("zstd").decompress(base64.b64decode(data, validate=True), size, asbytes=True)
    except (binascii.Error, OSError, ValueError) as error:
        raise ReplayError(f"{name} cannot be unpacked: {error}") from error
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def _rows(found: Mapping[str, Any], trace: Trace, heads: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Attention rows ``(step, layer, head, position)`` float32, how much of each row they hold, and the layers."""
    queries, keys = found["attn_q"], found["attn_k"]
    layers, meta = found["qk_layers"], found["qk_meta"]
    prompt, steps = len(trace.input_ids), len(trace.token_ids)
    fits = all(
        isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[:2] == queries.shape[:2]
        for one in (queries, keys)
    )
    if not fits or not all(isinstance(one, list) and len(one) == len(queries) for one in (layers, meta)):
        raise ReplayError("queries and keys are not (layer, position, head, channel) each, or not of the same layers")
    # A closing token is predicted by the last token that was read; one more position may have been.
    if queries.shape[1] not in (prompt + steps - 1, prompt + steps):
        raise ReplayError(
            f"queries and keys of {queries.shape[1]} positions were captured, where prompt and answer have {prompt} "
            f"and {steps}: they are of another prompt or answer"
        )
    asked = torch.arange(prompt - 1, prompt - 1 + steps)
    out, mass = [], []
    for query, key, one in zip(queries, keys, meta, strict=True):
        weights = _layer(query, key, one if isinstance(one, Mapping) else {}, asked)[0].transpose(0, 1)
        weights = weights.mean(1, keepdim=True) if heads == "mean" else weights
        out.append(weights)
        mass.append(weights.sum(-1))
    return torch.stack(out, 1), torch.stack(mass, 1), tuple(map(int, layers))


def _layer(query: torch.Tensor, key: torch.Tensor, meta: Mapping[str, Any], asked: torch.Tensor) -> torch.Tensor:
    """Weights of one layer ``(1, head, step, position)``, by what its kernel was told."""
    scale, local = meta.get("scale"), (meta.get("num_kv_heads_local"), meta.get("num_kv_heads_total"))
    if not isinstance(scale, int | float) or meta.get("use_alibi_sqrt"):
        raise ReplayError(
            "the captured layers do not say how they scale queries and keys, or in a way that is not known"
        )
    if local[0] != local[1] and None not in local:
        raise ReplayError(
            f"{local[0]} of {local[1]} key heads were captured: serve without tensor parallelism to capture all of them"
        )
    ahead = torch.arange(len(key)) - asked[:, None]
    seen, window = ahead <= 0, meta.get("sliding_window")
    if isinstance(window, list | tuple) and window[0] >= 0:
        seen &= ahead >= -window[0]
    slopes, sinks = meta.get("alibi_slopes"), meta.get("sinks")
    return attention_rows(
        query[asked].transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        columns=None,
        rows=torch.arange(len(asked)),
        scaling=float(scale),
        attention_mask=seen[None, None],
        softcap=float(meta["logits_soft_cap"]) if meta.get("logits_soft_cap") else None,
        position_bias=None if slopes is None else torch.as_tensor(slopes)[None, :, None, None] * ahead,
        sinks=None if sinks is None else torch.as_tensor(sinks),
    )
