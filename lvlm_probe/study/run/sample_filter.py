"""The filter of samples, and the judgement of answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unicodedata import category

from lvlm_probe.words import phrase_spans, written_alike

if TYPE_CHECKING:
    from lvlm_probe.study.spec import Study

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGNED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(?<![^\W_])(?:[-−]|\b(?:minus|negative) )(?=\.?\d)"), "_minus"),
    (re.compile(r"(?<=\b[a-z])-(?!\w)"), "_minus"),
    (re.compile(r"(?<=[^\W_])[+#]+(?![^\W_])"), lambda signs: signs[0].replace("+", "_plus").replace("#", "_sharp")),
)
"""Signs that make another number, grade or name of what they stand at (-5, A-, C++, C#), and what stands for them."""
_STRAY = re.compile(r"(?<!\d)[.:]|[.:](?!\d)")


def verdict(study: Study, records: Mapping[str, Mapping[str, Any] | None]) -> str | None:
    """Say why a sample gets no maps, ``None`` when it gets them: every model must have answered, and the answer's
    probability must fall by the filter's ``minimum_drop`` under every one (paper, §4.3).

    Args:
        records: model → the record of its answer.
    """
    rule = study.filter
    which = "drop_normalised" if rule.normalised else "drop"
    for model, record in records.items():
        if record is None:
            return f"{model} has not answered yet"
        if record["status"] != "done":
            return f"{model} failed: {record['reason']}"
        drop = record.get(which)
        if drop is None:
            return f"{model} gives the answer a probability that is no number"
        if not drop >= rule.minimum_drop:
            return f"{model} hardly needs the image (drop {drop:.2f} < {rule.minimum_drop:g})"
    return None


def is_correct(answer: str, truth: str | Sequence[str] | None, choices: Sequence[str] = ()) -> bool | None:
    """Tell whether a free-form answer holds the true one, by rule; ``None`` where no rule can tell.

    Case, punctuation, articles, white space and the commas of thousands do not count, but where they are all there is;
    the signs of -5 and A+ do. With choices: the answer must hold the true choice's text and none of the others', texts
    that are part of the true one left aside. Without: it must be the true answer, or hold it as whole words, whatever
    stands around it. Several true answers (VQA): one of them.
    """
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        return None
    truths = [item for item in ([truth] if isinstance(truth, str) else truth) if item.strip()]
    if not any(_says(answer, item) for item in truths) or not choices:
        return any(_says(answer, item) for item in truths)
    others = [item for item in choices if item.strip() and not any(_says(true, item) for true in truths)]
    return not any(_says(answer, item) for item in others)


def _says(answer: str, part: str) -> bool:
    if not any(sign.isalnum() for sign in part):  # an emoji, a question mark
        return bool(phrase_spans(part, answer))
    return bool(phrase_spans(_plain(part), _plain(answer)))


def _plain(text: str) -> str:
    text = _THOUSANDS.sub("", written_alike(text.casefold()))
    for signs, name in _SIGNED:
        text = signs.sub(name, text)
    kept = (sign if sign.isalnum() or sign in "_%.:" or category(sign)[0] == "M" else " " for sign in text)
    words = _STRAY.sub(" ", "".join(kept)).split()
    told = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(told or words)
