"""The tokens of an answer whose text alone is known.

A text has several tokenisations, and which one a model would have said depends on what stands before it: after
``ASSISTANT:`` a SentencePiece model says ``▁A ▁cat``, where the text alone, its leading space stripped by the engine,
gives ``A ▁cat``. So all plausible ones are offered, and whoever has the model takes the likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lvlm_probe.importing.rows import BadRow

_SPACE = "▁"
"""The sign for a space of SentencePiece models, which is not shown where it comes first."""


def answer_tokens(tokenizer: Any, prompt_ids: Sequence[int], text: str) -> list[list[int]]:
    """The tokenisations of ``text`` after a prompt that decode to it, each once; the most plain one first.

    Engines and scripts strip an answer or do not, and a tokenizer may hide the space that its first token stands for.
    A text without a space before it may so have been said with or without one. With one it was said with one, unless
    nothing that shows the space stands before it (the prompt ends in a special token).

    Args:
        tokenizer: the processor's.
        prompt_ids: the prompt's tokens; the text after its last special token is what the answer is joined to.
        text: the answer.

    Raises:
        BadRow: there is no tokenizer, or no tokenisation that decodes to the text.
    """
    if tokenizer is None:
        raise BadRow("the processor has no tokenizer, so answers need token_ids")
    before = _encode(tokenizer, _tail(tokenizer, prompt_ids))
    bare = text.lstrip()
    candidates: list[list[int]] = []
    for variant in (text, bare, " " + bare):
        for ids in (_after(tokenizer, before, variant), _encode(tokenizer, variant)):
            if ids and ids not in candidates:
                candidates.append(ids)
    said = [_said(tokenizer, before, ids) for ids in candidates]
    pieces = tokenizer.convert_ids_to_tokens([ids[0] for ids in candidates])
    shows = bool(before) or not any(str(piece).startswith(_SPACE) for piece in pieces)
    found = [ids for ids, shown in zip(candidates, said, strict=True) if shown == text]
    if not (found and text != bare and shows):
        found = [ids for ids, shown in zip(candidates, said, strict=True) if shown.lstrip() == bare]
    if not found:  # at its end, too, an engine may have stripped it
        found = [ids for ids, shown in zip(candidates, said, strict=True) if shown.strip() == text.strip()]
    if not found:
        closest = said[-1] if said else ""
        raise BadRow(f"the answer does not tokenise back: {_short(text)} becomes {_short(closest)}; give token_ids")
    return found


def checked_ids(tokenizer: Any, token_ids: Sequence[int], text: str | None, vocabulary: int) -> list[int]:
    """Given token ids, which must be of the model's vocabulary and, where the text is given too, decode to it.

    Raises:
        BadRow: they are and do not.
    """
    beyond = [token for token in token_ids if token >= vocabulary]
    if beyond:
        raise BadRow(f"token {beyond[0]} is outside the model's vocabulary of {vocabulary}: another model's tokens?")
    if text is not None and tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        said = _decode(tokenizer, [token for token in token_ids if token not in special])
        if said.strip() != text.strip() and _decode(tokenizer, token_ids).strip() != text.strip():
            raise BadRow(f"token_ids decode to {_short(said)}, but the answer is {_short(text)}")
    return list(token_ids)


def _tail(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}) or {})
    start = len(prompt_ids)
    while start and int(prompt_ids[start - 1]) not in special:
        start -= 1
    return _decode(tokenizer, [int(token) for token in prompt_ids[start:]])


def _after(tokenizer: Any, before: Sequence[int], text: str) -> list[int]:
    """The tokens that ``text`` adds to the tokens ``before`` it; none where it changes those."""
    joined = _encode(tokenizer, _decode(tokenizer, before) + text)
    return joined[len(before) :] if joined[: len(before)] == list(before) else []


def _said(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that tokens add to those before them."""
    return _decode(tokenizer, [*before, *ids])[len(_decode(tokenizer, before)) :]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)] if text else []


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
