"""One answer, written down as serving engines and evaluation programs do: the shapes of their files, field by field."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Served", "as_bytes_uri", "batch_input", "batch_output", "chat_request", "chat_response", "request_output"]


@dataclass(frozen=True)
class Served:
    """What an engine knows of an answer.

    Attributes:
        name: of the row.
        image: a PNG file's bytes.
        question, text: as they were sent and said; the text has its leading space, as vLLM gives it.
        ids, log_probs, pieces: of the tokens, the end of the answer included.
        prompt, prompt_ids: as the chat template made them.
    """

    name: str
    image: bytes
    question: str
    text: str
    ids: list[int]
    log_probs: list[float]
    pieces: list[str]
    prompt: str
    prompt_ids: list[int]


def as_bytes_uri(one: Served) -> str:
    return f"data:image/png;base64,{base64.b64encode(one.image).decode()}"


def chat_request(one: Served, url: str | None = None, *, more: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """A body of ``POST /v1/chat/completions``."""
    parts = [
        {"type": "image_url", "image_url": {"url": url or as_bytes_uri(one), "detail": "auto"}},
        {"type": "text", "text": one.question},
    ]
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": parts}, *more],
        "temperature": 0.0,
        "logprobs": True,
    }


def chat_response(one: Served, *, ids: bool = False, logprobs: bool = True, end: bool = True) -> dict[str, Any]:
    """Its reply. ``end``: the log-probabilities count the end of the answer too."""
    count = len(one.ids) - (not end)
    content = [
        {"token": piece, "logprob": value, "bytes": list(piece.encode()), "top_logprobs": []}
        for piece, value in zip(one.pieces[:count], one.log_probs[:count], strict=True)
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": one.text, "refusal": None, "annotations": None, "tool_calls": []},
        "logprobs": {"content": content} if logprobs else None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": one.ids if ids else None,
    }
    return {
        "id": f"chatcmpl-{one.name}",
        "object": "chat.completion",
        "created": 1790000000,
        "model": "demo",
        "choices": [choice],
        "usage": {"prompt_tokens": len(one.prompt_ids), "completion_tokens": len(one.ids)},
        "prompt_logprobs": None,
        "prompt_token_ids": one.prompt_ids if ids else None,
    }


def batch_input(one: Served, url: str | None = None) -> dict[str, Any]:
    body = chat_request(one, url)
    return {"custom_id": one.name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def batch_output(one: Served, **settings: bool) -> dict[str, Any]:
    reply = {"status_code": 200, "request_id": f"batch-{one.name}", "body": chat_response(one, **settings)}
    return {"id": f"vllm-{one.name}", "custom_id": one.name, "response": reply, "error": None}


def request_output(one: Served) -> dict[str, Any]:
    """``dataclasses.asdict`` of vLLM's ``RequestOutput``, through JSON: keys of numbers have become texts."""
    logprobs = [
        {token: {"logprob": value, "rank": 1, "decoded_token": piece}} | ({} if token == 7 else {7: {"logprob": -30.0}})
        for token, value, piece in zip(one.ids, one.log_probs, one.pieces, strict=True)
    ]
    output = {
        "index": 0,
        "text": one.text,
        "token_ids": one.ids,
        "cumulative_logprob": sum(one.log_probs),
        "logprobs": logprobs,
        "finish_reason": "stop",
        "stop_reason": None,
        "lora_request": None,
    }
    whole = {
        "request_id": "0",
        "prompt": one.prompt,
        "prompt_token_ids": one.prompt_ids,
        "prompt_logprobs": None,
        "outputs": [output],
        "finished": True,
        "metrics": None,
    }
    return json.loads(json.dumps(whole))  # type: ignore[no-any-return]
