"""An answer as a server gives it: chat with log-probabilities and token ids, or SGLang's own route."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from lvlm_probe.errors import ReplayError
from lvlm_probe.kinds import is_whole
from lvlm_probe.serving.messages import Prompt, Said, aligned
from lvlm_probe.serving.roads import Untrue, continued, log_prob_in, spoken_in

Post = Callable[[str, dict[str, Any]], Any]
"""Sends a body to a path."""
_UNNAMED = -1
"""Stands for the id of a token of which a server says only the text."""


class NoLogProbs(Untrue):
    """An answer that comes without log-probabilities."""


def generated(post: Post, prompt: Prompt, images: Sequence[str], *, max_tokens: int, **sampling: Any) -> Said:
    """Let the server answer, greedily unless ``sampling`` says otherwise.

    Raises:
        NoLogProbs: the answer comes without log-probabilities.
        Untrue: they are not those of its tokens.
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
        raise NoLogProbs(
            "the server answers without log-probabilities: it ignores `logprobs` (as `transformers serve` does)"
        )
    ids, prompt_ids = choice.get("token_ids"), reply.get("prompt_token_ids")
    if not _is_ids(ids) or not _is_ids(prompt_ids):
        ids, prompt_ids = [_UNNAMED] * len(content), []
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


def walked(post: Post, prompt: Prompt, images: Sequence[str], *, max_tokens: int) -> Said:
    """Let a server answer that gives no log-probabilities: once, and once more token by token, which shows where its
    tokens end, and that it continues an answer that was begun as it would have gone on.

    Costs a request per token.

    Raises:
        Untrue: it does not continue its answer.
        ReplayError: it does not answer.
    """
    answer, finish = spoken(post, prompt, images, max_tokens)
    texts: list[str] = []
    pieces: list[str] = []
    at = 0
    while at < len(answer):
        text = spoken_in(post("/v1/chat/completions", continued(prompt, images, answer[:at], ask={})))
        piece = next((one for one in (text, f" {text}") if text and answer.startswith(one, at)), None)
        if piece is None:
            raise Untrue(
                f"the server does not go on with an answer that was begun for it (continue_final_message): after "
                f"{answer[:at][-40:]!r} it says {text[:40]!r}, and said {answer[at : at + 40]!r}"
            )
        texts.append(text)
        pieces.append(piece)
        at += len(piece)
    if not pieces:
        raise ReplayError("the server's answer is empty: there is nothing to explain")
    steps = len(pieces)
    said = Said(prompt, answer, (_UNNAMED,) * steps, tuple(pieces), (False,) * steps, (), finish=finish)
    return dataclasses.replace(said, texts=tuple(texts))


def spoken(post: Post, prompt: Prompt, images: Sequence[str], max_tokens: int) -> tuple[str, str]:
    """A greedy answer's text, and why it stopped. Raises ``Untrue`` where it has none."""
    body = {**prompt.fields, "temperature": 0, "messages": prompt.messages(images), "max_tokens": max_tokens}
    reply = post("/v1/chat/completions", body)
    return spoken_in(reply), str(_first(reply, "choices").get("finish_reason"))


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
    said = Said(prompt, answer, tuple(ids), tuple(pieces), tuple(special), tuple(prompt_ids), tuple(values), finish)
    return said if pieces == list(texts) else dataclasses.replace(said, texts=tuple(texts))


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
    return isinstance(value, list) and bool(value) and all(is_whole(one) and int(one) >= 0 for one in value)
