"""An answer as a server gives it: chat with log-probabilities and token ids, or SGLang's own route."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from lvlm_probe.errors import ReplayError
from lvlm_probe.serving.messages import Prompt, Said, aligned
from lvlm_probe.serving.roads import Untrue, log_prob_in

__all__ = ["generated", "generated_by_sglang", "prompt_alone"]

Post = Callable[[str, dict[str, Any]], Any]
"""Sends a body to a path."""


def generated(post: Post, prompt: Prompt, images: Sequence[str], *, max_tokens: int, **sampling: Any) -> Said:
    """Let the server answer, greedily unless ``sampling`` says otherwise.

    Raises:
        Untrue: the answer comes without log-probabilities or token ids: nothing could be aligned with it.
        ReplayError: the server does not answer.
    """
    body = {
        "temperature": 0,
        **prompt.fields,
        **sampling,
        "messages": prompt.messages(images),
        "max_tokens": max_tokens,
        "logprobs": True,
        "top_logprobs": 1,
        "return_token_ids": True,
    }
    reply = post("/v1/chat/completions", body)
    choice = _first(reply, "choices")
    message, content = choice.get("message"), (choice.get("logprobs") or {}).get("content")
    answer = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not content:
        raise Untrue(
            "the server answers without log-probabilities: it ignores `logprobs` (as `transformers serve` does), and "
            "nothing can be measured through it"
        )
    ids, prompt_ids = choice.get("token_ids"), reply.get("prompt_token_ids")
    if not _is_ids(ids) or not _is_ids(prompt_ids):
        raise Untrue(
            "the server does not return token ids (`return_token_ids`, vLLM 0.10.2 and newer): nothing can be aligned "
            "with its answer exactly"
        )
    if len(ids) != len(content):
        raise Untrue(f"the server names {len(ids)} tokens and gives log-probabilities of {len(content)}")
    if not isinstance(answer, str):
        raise ReplayError("the server's answer has no text: a reasoning or tool parser may have taken it")
    texts = [str(entry.get("token", "")) if isinstance(entry, dict) else "" for entry in content]
    given = [entry.get("logprob") if isinstance(entry, dict) else None for entry in content]
    values = [log_prob_in(value, "its own answer") for value in given]
    finish = str(choice.get("finish_reason"))
    said = said_of(prompt, answer, ids, texts, prompt_ids, values, finish)
    top = [_likeliest(entry, text, value) for entry, text, value in zip(content, texts, values, strict=True)]
    return dataclasses.replace(
        said, top_log_probs=tuple(value for value, _ in top), top_tokens=tuple(text for _, text in top)
    )


def _likeliest(entry: Any, own: str, value: float) -> tuple[float, str]:
    """Log P and text of the likeliest token that an entry of ``logprobs`` lists; at least the token itself."""
    listed = entry.get("top_logprobs") if isinstance(entry, dict) else None
    best = value, own
    for one in listed if isinstance(listed, list) else ():
        if isinstance(one, dict) and (found := log_prob_in(one.get("logprob"), "a likely token")) > best[0]:
            best = found, str(one.get("token") or "")
    return best


def said_of(
    prompt: Prompt,
    answer: str,
    ids: Sequence[int],
    texts: Sequence[str],
    prompt_ids: Sequence[int],
    values: Sequence[float],
    finish: str,
) -> Said:
    """An answer by its tokens. Raises ``ReplayError`` where text and tokens do not belong together."""
    pieces, special, whole = aligned(texts, answer, stopped=finish == "stop")
    if not whole:
        raise ReplayError(
            f"the server's answer {answer[:80]!r} is not what its tokens say, {''.join(texts)[:80]!r}: a reasoning or "
            "tool parser takes a part of it away. Ask with chat_template_kwargs={'enable_thinking': False}, or serve "
            "without the parser"
        )
    return Said(prompt, answer, tuple(ids), tuple(pieces), tuple(special), tuple(prompt_ids), tuple(values), finish)


def prompt_alone(post: Post, prompt: Prompt, images: Sequence[str]) -> tuple[int, ...]:
    """Token ids of the prompt, an image's tokens all there. Costs one request."""
    body = {**prompt.fields, "messages": prompt.messages(images), "max_tokens": 1, "temperature": 0}
    reply = post("/v1/chat/completions", {**body, "return_token_ids": True})
    ids = reply.get("prompt_token_ids") if isinstance(reply, dict) else None
    if not _is_ids(ids):
        raise Untrue("the server does not return the prompt's token ids (`return_token_ids`)")
    return tuple(ids)


def generated_by_sglang(
    post: Post, prompt: Prompt, images: Sequence[str], prompt_ids: Sequence[int], *, max_tokens: int, **sampling: Any
) -> Said:
    """Let an SGLang server answer a prompt that was made here. Raises as ``generated``."""
    body = {
        "input_ids": list(prompt_ids),
        "image_data": list(images),
        "return_logprob": True,
        "return_text_in_logprobs": True,
        "sampling_params": {"temperature": 0, **sampling, "max_new_tokens": max_tokens},
    }
    reply = post("/generate", body)
    meta = reply.get("meta_info") if isinstance(reply, dict) else None
    entries = meta.get("output_token_logprobs") if isinstance(meta, dict) else None
    if not isinstance(entries, list) or not all(isinstance(one, list) and len(one) >= 3 for one in entries):
        raise Untrue("the server answers without log-probabilities (output_token_logprobs)")
    ids = [one[1] for one in entries]
    answer = reply.get("text")
    if not _is_ids(ids) or not isinstance(answer, str):
        raise Untrue("the server names no tokens of its answer")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    finish = str(reason.get("type") if isinstance(reason, dict) else reason)
    values = [log_prob_in(one[0], "its own answer") for one in entries]
    return said_of(prompt, answer, ids, [str(one[2] or "") for one in entries], prompt_ids, values, finish)


def _first(reply: Any, name: str) -> dict[str, Any]:
    found = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        raise Untrue(f"the server's reply has no {name}")
    return found[0]


def _is_ids(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value)
    )
