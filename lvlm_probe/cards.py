"""Objects as a person sees them: in one line, where a field is an array of thousands, and as HTML in a notebook. And
equal where they hold the same.

Cards hold no script and nothing from elsewhere, every text on them is escaped, and words stand in the order of their
script.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lvlm_probe.escaping import escaped
from lvlm_probe.words import group_words, spelled

_TEXT, _ITEMS = 60, 8
"""Characters of a text, and members of a list, that one line shows."""
_CARD_TEXT, _WORDS = 4000, 2000
"""Characters of a text, and words of an answer, that a card shows."""
_WARM, _COOL, _SCALE, _MOST = "213,94,0", "0,114,178", 6.0, 9.0
"""Colours of words that the image speaks for and against; nats of full colour; nats of an infinite ratio."""


def in_one_line(thing: Any) -> str:
    """A dataclass by its fields: arrays by kind and shape, bytes by number, long texts and lists by their beginning."""
    fields = (f"{item.name}={_brief(getattr(thing, item.name))}" for item in dataclasses.fields(thing) if item.repr)
    return f"{type(thing).__name__}({', '.join(fields)})"


def _brief(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # a heatmap without values has no shape to tell
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str):
        return repr(value if len(value) <= _TEXT else f"{value[:_TEXT]}…")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return in_one_line(value)
    if isinstance(value, Mapping):
        shown = [f"{_brief(key)}: {_brief(item)}" for key, item in list(value.items())[:_ITEMS]]
        return "{" + ", ".join([*shown, *_rest(value)]) + "}"
    if isinstance(value, list | tuple):
        shown = [_brief(item) for item in value[:_ITEMS]]
        inner = ", ".join([*shown, *_rest(value)])
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    return repr(value)


def _rest(value: Collection[Any]) -> list[str]:
    return [f"… ({len(value)} in all)"] if len(value) > _ITEMS else []


def equal(one: Any, other: Any) -> bool:
    """``__eq__`` of a dataclass: whether two are of one class and their fields hold the same, arrays by their values,
    and what is no number beside what is none."""
    if type(one) is not type(other):
        return NotImplemented
    fields = [item.name for item in dataclasses.fields(one) if item.compare]
    return all(_same(getattr(one, name), getattr(other, name)) for name in fields)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if hasattr(one, "dtype") or hasattr(other, "dtype"):
        if type(one) is not type(other) or (one.dtype, tuple(one.shape)) != (other.dtype, tuple(other.shape)):
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


def text_html(text: str) -> str:
    """A text as HTML: escaped, cut where it is very long."""
    cut = text if len(text) <= _CARD_TEXT else f"{text[:_CARD_TEXT]}…"
    return html.escape("\n".join(escaped(line) for line in cut.split("\n"))).replace("\n", "<br>")


def answer_html(
    tokens: Sequence[str],
    special: Sequence[bool],
    *,
    llr: Sequence[float] | None = None,
    marked: Collection[int] = (),
    clickable: bool = False,
) -> str:
    """The words of an answer as HTML: warm the more the image decides them, cool the more it speaks against them.

    Args:
        tokens: display text of the tokens, ``(step,)``.
        special: whether a token is a special one, ``(step,)``; those are not shown.
        llr: log-likelihood ratios in nats, ``(step,)``; what is not finite counts as the scale's end, or as nothing.
        marked: indices of tokens whose words are underlined.
        clickable: each word is a button that holds its number, ``data-word``.
    """
    words = group_words(tokens, special)
    texts, tail = spelled(["" if flag else piece for piece, flag in zip(tokens, special, strict=True)], words)
    chosen = set(marked)
    parts = []
    for number, (word, (lead, text)) in enumerate(zip(words[:_WORDS], texts, strict=False)):
        look = title = ""
        if llr is not None and len(llr):
            ratio = sum(_finite(value) for value in llr[word.start : word.stop])
            strength = 0.45 * min(1.0, abs(ratio) / _SCALE)
            if strength:
                look = f"background:rgba({_WARM if ratio > 0 else _COOL},{strength:.2f});border-radius:3px"
            title = f' title="{ratio:+.2f} nats"'
        if not chosen.isdisjoint(range(word.start, word.stop)):
            look += ";text-decoration:underline"
        begin, end = "<span", "</span>"
        if clickable:
            pressed = str(not chosen.isdisjoint(range(word.start, word.stop))).lower()
            begin, end = f'<button type="button" data-word="{number}" aria-pressed="{pressed}"', "</button>"
        parts.append(f'{text_html(lead)}{begin} style="{look.lstrip(";")}"{title}>{text_html(text)}{end}')
    parts.append(text_html(f" … ({len(words) - _WORDS} more words)" if len(words) > _WORDS else tail))
    return f'<p dir="auto" style="font-size:1.1em;margin:.3em 0">{"".join(parts)}</p>'


def _finite(value: float) -> float:
    return 0.0 if math.isnan(value) else max(-_MOST, min(_MOST, float(value)))


def card(title: str, *parts: str, facts: Iterable[str] = ()) -> str:
    """A card of a title, parts that are HTML, and facts that are text."""
    told = "<br>".join(text_html(fact) for fact in facts if fact)
    return (
        f"<div><strong>{text_html(title)}</strong>{''.join(parts)}"
        + (f"<br><small>{told}</small>" if told else "")
        + "</div>"
    )
