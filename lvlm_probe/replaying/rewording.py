"""Texts in a recorded prompt: which tokens they are, and what takes their place where another question is asked."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from lvlm_probe.errors import ReplayError
from lvlm_probe.models.tokenizers import display_pieces
from lvlm_probe.words import word_cuts


def reword(prompt: torch.Tensor, processor: object | None, question: str, text: str) -> tuple[int, int, torch.Tensor]:
    """Find the question in a prompt, and the tokens of another text.

    Args:
        prompt: ``(P,)`` token ids.
        processor: the processor, or its tokenizer.
        question: the question as it stands in the prompt.
        text: what is asked instead.

    Returns:
        start and stop of the question's tokens, and the ids of ``text``, ``(token,)`` int64.

    Raises:
        ReplayError: there is no tokenizer, or no run of tokens reads as the question.
    """
    tokenizer = _tokenizer(processor)
    if not question.strip():
        raise ReplayError("the answer is not to a question, so there is no other to ask instead")
    start, stop = _span(prompt.tolist(), tokenizer, question.strip())
    first = tokenizer.decode([int(prompt[start])])
    # The space in front of the question may be part of its first token.
    lead = first[: len(first) - len(first.lstrip())]
    ids = tokenizer(lead + text.strip(), add_special_tokens=False)["input_ids"] if text.strip() else []
    if not ids:
        raise ReplayError(f"the tokenizer makes no token of {text!r}")
    return start, stop, torch.tensor(ids, dtype=torch.long)


def positions_of(prompt: torch.Tensor, images: np.ndarray, processor: object | None, text: str) -> np.ndarray:
    """Positions of a text in a prompt, ``(position,)`` int64; the last ones, where it stands there more than once.

    Args:
        prompt: ``(P,)`` token ids.
        images: positions of the image tokens, which belong to no text.
        processor, text: as for ``reword``.

    Raises:
        ReplayError: there is no tokenizer, or no run of tokens reads as the text.
    """
    tokenizer = _tokenizer(processor)
    if not text.strip():
        raise ReplayError("which text of the prompt is meant is not known: name it, as it stands in the prompt")
    written = np.setdiff1d(np.arange(len(prompt)), images)
    start, stop = _span(prompt[torch.from_numpy(written)].tolist(), tokenizer, text.strip())
    return written[start:stop]


def _tokenizer(processor: object | None) -> Any:
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "decode"):
        raise ReplayError("texts of the prompt are found by a tokenizer: replay with the processor")
    return tokenizer


def _span(ids: list[int], tokenizer: Any, question: str) -> tuple[int, int]:
    """The last and shortest run of tokens that reads as ``question`` and is no part of a longer word; white space does
    not count."""
    wanted = _squeezed(question)
    pieces = {token: _squeezed(tokenizer.decode([token])) for token in set(ids)}
    shown = display_pieces(tokenizer, ids)
    ends = [0, *itertools.accumulate(map(len, shown))]
    cuts = word_cuts("".join(shown))
    for start in range(len(ids) - 1, -1, -1):
        if not wanted or not _opens(wanted, pieces[ids[start]]):
            continue
        # No token stands for less than one byte, but there may be blank ones in between.
        for stop in range(start + 1, min(len(ids), start + 2 * len(question.encode())) + 1):
            text = _squeezed(tokenizer.decode(ids[start:stop]))
            if text == wanted and "whole" not in (cuts[ends[start]], cuts[ends[stop]]):
                return start, stop
            if not _opens(wanted, text):
                break
    raise ReplayError(
        f"the prompt holds no run of tokens that reads as {question!r}; give the text as it stands in the prompt "
        f"(of a question: question=...)"
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _opens(wanted: str, text: str) -> bool:
    """Whether ``wanted`` may go on from ``text``, whose last character may be cut between tokens."""
    whole = text.rstrip("\ufffd")
    return bool(text) and wanted.startswith(whole)
