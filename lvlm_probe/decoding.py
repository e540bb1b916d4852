"""Token ids to text a person reads: display pieces that join to the answer, special tokens, the end of an answer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

__all__ = [
    "answer_length",
    "decoder_prompt",
    "display_pieces",
    "eos_token_ids",
    "folded",
    "positional",
    "settings_of",
    "special_flags",
    "tokenizer_of",
]

_REPLACEMENT = "�"
_WAITING = 3
"""Tokens that may wait for the end of their character: UTF-8 has at most four bytes, and a token has one or more."""


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
            if (settled := end - _WAITING) > shown:  # no character that began there is completed any more
                pieces[settled - 1] = _decode(tokenizer, ids[start:settled])[len(before) :]
                start, shown = shown, settled
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


def positional(model: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of ``model.generate()`` by their names."""
    names = [name for name in inspect.signature(type(model).generate).parameters if name != "self"]
    return dict(zip(names, args, strict=False))


def settings_of(model: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """``(name, default=None)`` → a setting of one ``generate()`` call: its argument, else what its generation config
    says, else the one of the model, or of the language model inside that a ``generate`` of its own hands over to.
    """
    inner = [module.generation_config for module in model.modules() if hasattr(module, "generation_config")]
    places = [kwargs.get("generation_config"), *inner]

    def setting(name: str, default: Any = None) -> Any:
        for value in (kwargs.get(name), *(getattr(place, name, None) for place in places)):
            if value is not None:
                return value
        return default

    return setting


def decoder_prompt(given: torch.Tensor | None, start: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the decoder's sequence of an encoder-decoder model begins with, ``(batch, position)``: what the user gave,
    behind the start token, which ``generate()`` puts in front unless it is there."""
    if isinstance(start, Sequence):
        start = start[0]
    if start is None:
        raise ValueError("the model has no decoder_start_token_id, so its answer has no known beginning")
    first = torch.full((len(ids), 1), int(start), dtype=torch.long, device=ids.device)
    if given is None:
        return first
    given = given.to(ids.device)
    return given if bool((given[:, 0] == int(start)).all()) else torch.cat([first, given], dim=1)
