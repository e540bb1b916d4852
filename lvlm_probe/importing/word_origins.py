"""Where the words of an answer come from: from the image, from habit, or not from this model.

Of each word, over its own tokens t, in nats:

* ``llr`` = Σ_t LLR_t, LLR_t = log P(a_t | I) − log P(a_t | Ĩ): how much likelier the image makes the word than the
  baseline image does (paper, Eq. 6). By the chain rule it is the same however the tokenizer cuts the word;
* ``surprise`` = max_t [max_v log P(v | I) − log P(a_t | I)], not negative: how far the word falls behind what the model
  would rather have said in its place. It is relative, so that a word that is one of many possible ones is no surprise.

A word that the model would not have said is *unlikely* (surprise above ``SURPRISE``); else it is from the image where
its LLR is above alpha (``ALPHA``, the paper's 1); else it is from habit. Punctuation does not count.

Sentences and answers are told by shares of their words, which do not grow with their length: *unlikely* where a word
is, since one word is what a contradiction takes; else from habit where fewer than ``LEAST_FROM_IMAGE`` of the words are
from the image; else from the image.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lvlm_probe.selection import word_llr
from lvlm_probe.words import ALPHA, Word, group_words

SURPRISE = 3.0
"""Nats, a twentieth of the likeliest token's probability: what min-p sampling (Nguyen et al., 2024), with its base of
0.05, never draws. Of the demo model's own words none is above it, of the planted ones nearly all; docs/benchmarks.md
has other thresholds."""

LEAST_FROM_IMAGE = 0.1
"""Share of an answer's words: of the demo model's about a fifth are from the image; on an empty image none is."""

Origin = Literal["unlikely", "habit", "image", "unknown"]
ORIGINS: tuple[Origin, ...] = ("unlikely", "habit", "image", "unknown")
"""In the order in which they deserve a look."""

_ENDS = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？]+|\s*\n\s*")


@dataclass(frozen=True)
class MeteredWord(Word):
    """A word with its numbers; the module's docstring defines them.

    Attributes:
        llr, surprise: nats; NaN where a log-probability is.
        instead: what the model would rather have said where the surprise is largest, one token; empty where that is
            not known.
        origin: ``None`` for punctuation.
    """

    llr: float
    surprise: float
    instead: str
    origin: Origin | None


@dataclass(frozen=True)
class Figures:
    """What some words, of a sentence or of an answer, say together; punctuation left out.

    Attributes:
        words: how many there are.
        image, habit, unlikely: shares of those whose origin is known; NaN where it is of none.
        mean_llr: nats, over the same.
        worst: the word with the largest surprise; ``None`` where it is known of none.
        origin: which of the classes they make together.
    """

    words: int
    image: float
    habit: float
    unlikely: float
    mean_llr: float
    worst: MeteredWord | None
    origin: Origin

    @classmethod
    def of(cls, words: Iterable[MeteredWord]) -> Figures:
        """The figures of these words."""
        counted = [word for word in words if word.origin is not None]
        known = [word for word in counted if word.origin != "unknown"]
        if not known:
            return cls(len(counted), math.nan, math.nan, math.nan, math.nan, None, "unknown")
        share = {name: sum(word.origin == name for word in known) / len(known) for name in ORIGINS}
        ratios = [word.llr for word in known if not math.isnan(word.llr)]
        origin: Origin = "image"
        if share["unlikely"]:
            origin = "unlikely"
        elif share["image"] < LEAST_FROM_IMAGE:
            origin = "habit"
        return cls(
            words=len(counted),
            image=share["image"],
            habit=share["habit"],
            unlikely=share["unlikely"],
            mean_llr=float(np.mean(ratios)) if ratios else math.nan,
            worst=max(known, key=lambda word: word.surprise),
            origin=origin,
        )


def metered(
    pieces: Sequence[str],
    special: Sequence[bool],
    llr: Sequence[float] | np.ndarray,
    surprise: Sequence[float] | np.ndarray,
    instead: Sequence[str] | None = None,
    *,
    alpha: float = ALPHA,
    threshold: float = SURPRISE,
) -> list[MeteredWord]:
    """The words of an answer, each with its numbers.

    Args:
        pieces: display text of the tokens, ``(step,)``.
        special: which are special tokens, ``(step,)``; these belong to no word.
        llr: log-likelihood ratios, ``(step,)``, nats.
        surprise: log P of the likeliest token − log P of the answer's, ``(step,)``, nats.
        instead: display text of the likeliest tokens, ``(step,)``; ``None`` where it is not known.
        alpha: LLR above which a word is from the image, nats.
        threshold: surprise above which the model would not have said a word, nats.
    """
    words = group_words(list(pieces), list(special))
    behind = np.asarray(surprise, dtype=np.float64)
    found: list[MeteredWord] = []
    for word, ratio in zip(words, word_llr(words, llr), strict=True):
        own = behind[word.start : word.stop]
        step = word.start + int(own.argmax())  # NaN counts as the largest
        most = float(behind[step])
        found.append(
            MeteredWord(
                word.text,
                word.start,
                word.stop,
                llr=ratio,
                surprise=most,
                instead=instead[step].strip() if instead is not None and most > 0 else "",
                origin=_origin(word.text, ratio, most, alpha, threshold),
            )
        )
    return found


def sentences(pieces: Sequence[str], words: Sequence[MeteredWord]) -> list[tuple[MeteredWord, ...]]:
    """The words, sentence by sentence; a line break ends one too.

    Args:
        pieces: display text of the tokens, ``(step,)``, special ones empty.
        words: of the answer, in order.
    """
    ends = [found.end() for found in _ENDS.finditer("".join(pieces))]
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).tolist()
    parts: dict[int, list[MeteredWord]] = {}
    for word in words:
        text = "".join(pieces[word.start : word.stop])
        begin = starts[word.start] + len(text) - len(text.lstrip())
        parts.setdefault(bisect.bisect_right(ends, begin), []).append(word)
    return [tuple(part) for part in parts.values() if any(word.origin is not None for word in part)]


def _origin(text: str, llr: float, surprise: float, alpha: float, threshold: float) -> Origin | None:
    if not any(sign.isalnum() for sign in text):
        return None
    if math.isnan(surprise):
        return "unknown"
    if surprise > threshold:
        return "unlikely"
    if math.isnan(llr):
        return "unknown"
    return "image" if llr > alpha else "habit"
