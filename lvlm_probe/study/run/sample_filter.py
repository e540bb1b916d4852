"""The filter of samples, and the judgement of answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unicodedata import category

from lvlm_probe.words import phrase_spans, written_alike

if TYPE_CHECKING:
    from lvlm_probe.study.spec import Study

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
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

    Case, punctuation, articles, white space and the commas of thousands do not count. With choices: the answer must
    hold the true choice's text and none of the others', texts that are part of the true one left aside. Without: it
    must be the true answer, or hold it as whole words, whatever stands around it. Several true answers (VQA): one of
    them.
    """
    if truth is None or (isinstance(truth, str) and not truth.strip()):
        return None
    said = _plain(answer)
    truths = [_plain(item) for item in ([truth] if isinstance(truth, str) else truth)]
    right = any(_holds(said, item) for item in truths if item)
    if not right or not choices:
        return right
    others = [_plain(choice) for choice in choices]
    return not any(_holds(said, item) for item in others if item and not any(_holds(true, item) for true in truths))


def _plain(text: str) -> str:
    text = _THOUSANDS.sub("", written_alike(text.casefold()))
    kept = (sign if sign.isalnum() or sign in "_%.:" or category(sign)[0] == "M" else " " for sign in text)
    words = _STRAY.sub(" ", "".join(kept)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _holds(text: str, part: str) -> bool:
    return bool(phrase_spans(part, text))
