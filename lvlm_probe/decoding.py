"""Token ids to text a person reads: display pieces that join to the answer, special tokens, the end of an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["answer_length", "display_pieces", "eos_token_ids", "folded", "special_flags", "tokenizer_of"]

_REPLACEMENT = "�"


def tokenizer_of(processor: object | None) -> Any:
    """The tokenizer inside a processor, the object itself when it is one, else ``None``."""
    for candidate in (getattr(processor, "tokenizer", None), processor):
        if callable(getattr(candidate, "decode", None)) and hasattr(candidate, "all_special_ids"):
            return candidate
    return None


def display_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; joined, they are the decoded answer.

    A byte-level token that only begins a character adds nothing; the token that completes the character shows it.
    Without a tokenizer a piece is the id in angle brackets.
    """
    ids = [int(token) for token in token_ids]
    if tokenizer is None:
        return [f"<{token}>" for token in ids]
    pieces: list[str] = []
    start, shown = 0, 0  # the window [start, shown) is context already displayed; decoding it again keeps spaces right
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:shown])
        now = _decode(tokenizer, ids[start:end])
        if now.endswith(_REPLACEMENT) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, shown = shown, end
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_flags(tokenizer: Any, token_ids: Sequence[int], also: Iterable[int] = ()) -> list[bool]:
    """Whether each token is a special one: never a word of the answer."""
    special = set(also) | set(getattr(tokenizer, "all_special_ids", ()) or ())
    return [int(token) in special for token in token_ids]


def eos_token_ids(*configs: Any) -> frozenset[int]:
    """End-of-sequence ids that generation stops at; the first config (most specific) that names any wins."""
    for config in configs:
        value = getattr(config, "eos_token_id", None)
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        if value is not None:
            return frozenset([int(value)] if isinstance(value, int) else [int(item) for item in value])
    return frozenset()


def answer_length(token_ids: Sequence[int], *, eos: frozenset[int], pad: int | None, custom_stop: bool) -> int:
    """How many of a row's generated tokens are the answer, its end-of-sequence token included.

    Rows of a batch that finish early are filled up with padding. With a custom stop rule (stop strings) a row can end
    without an end-of-sequence token; if padding uses that very id, the two cannot be told apart and it is left out.
    """
    ids = [int(token) for token in token_ids]
    length = len(ids)
    for index, token in enumerate(ids):
        if token in eos and not (custom_stop and token == pad):
            return index + 1
    if pad is not None and (pad not in eos or custom_stop):
        while length and ids[length - 1] == pad:
            length -= 1
    return length


def folded(prompt: str) -> str:
    """The prompt with runs of one repeated placeholder (hundreds of image tokens) shown once with their number."""

    def fold(match: re.Match[str]) -> str:
        count = len(match[0]) // len(match[1])
        return f"{match[1]}×{count}"

    return re.sub(r"(<[^<>\s]{1,40}>|\[[A-Z_]{2,40}\])\1{2,}", fold, prompt)
