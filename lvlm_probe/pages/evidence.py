"""Bars of what an answer rests on: parts of the prompt, and image against question, as markup without scripts.

Every text is escaped here. Widths are attributes of SVG, as the pages' policy allows no style on elements.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lvlm_probe.causal import Modalities, PartShares
from lvlm_probe.errors import ExplainError, ReportError

__all__ = ["Evidence", "evidence_from", "evidence_markup", "evidence_of"]

Evidence = PartShares | Modalities
"""What may stand on the page of an answer beside its maps."""

KINDS: dict[str, type[Evidence]] = {"parts": PartShares, "modalities": Modalities}
"""By the name in a stored record."""

_WORDS = 40
"""Words of one table: the chosen ones, and those of the largest parts."""
_WIDE = 240


def evidence_of(found: Iterable[object], trace_ids: Iterable[str]) -> dict[str, list[Evidence]]:
    """Sort evidence by the answer it is of.

    Raises:
        ReportError: something is none, or is of an answer that has no heatmap among these.
    """
    sorted_: dict[str, list[Evidence]] = {trace_id: [] for trace_id in trace_ids}
    for thing in found:
        if not isinstance(thing, Evidence):
            names = "which_parts() and modalities()"
            raise ReportError(f"evidence is what {names} of probe.causal return; got a {type(thing).__name__}")
        if thing.trace_id not in sorted_:
            raise ReportError(f"evidence is of {thing.trace_id!r}, and no heatmap on this page is")
        sorted_[thing.trace_id].append(thing)
    return sorted_


def evidence_from(record: Mapping[str, Any]) -> Evidence:
    """Read a stored record. Raises ``ExplainError`` where it is none of these."""
    kind = KINDS.get(str(record.get("kind")))
    if kind is None:
        raise ExplainError(f"no evidence is of the kind {record.get('kind')!r}")
    return kind.from_dict(record)


def evidence_markup(found: Sequence[Evidence]) -> str:
    """The sections of one answer; nothing where there are none."""
    return "".join(_parts(one) if isinstance(one, PartShares) else _modalities(one) for one in found)


def _parts(found: PartShares) -> str:
    low, high = min(0.0, *found.shares), max(0.0, *found.shares)
    rows = []
    for name, share, error in zip(found.parts, found.shares, found.error, strict=True):
        told = f"{share:+.2f}" + (f" ± {error:.2f}" if error else "")
        rows.append(_row(name, _bar([share], low, high, ["image"]), told))
    texts = any(name.startswith(("turn", "“")) for name in found.parts)
    images = any(name.startswith(("image", "video")) for name in found.parts)
    gone = [f"an image that is not there is its {found.baseline} baseline"] if images else []
    gone += ["a text that is not there is not read: no other token attends to it"] if texts else []
    lead = (
        f"Shapley values of the prompt’s parts for “{found.text}”: {found.total:+.2f} nats in all, shared out so that "
        f"each part has what it adds on average, whichever others are there. {'; '.join(gone).capitalize()}. "
        f"{found.passes} forward passes."
    )
    more = ""
    if len(found.words) > 1:
        head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in found.parts)
        body = "".join(
            f"<tr><th scope=row>{html.escape(word)}</th>{''.join(f'<td>{share:+.2f}</td>' for share in shares)}</tr>"
            for word, shares in list(zip(found.words, found.by_word, strict=True))[:_WORDS]
        )
        more = (
            "<details><summary>Word by word</summary><div class=scroll tabindex=0 role=region aria-label=Shares>"
            f"<table><tr><td></td>{head}</tr>{body}</table></div></details>"
        )
    return _section("Which part of the prompt?", lead, "".join(rows), more)


def _modalities(found: Modalities) -> str:
    triples = list(zip(found.image, found.question, found.together, strict=True))
    order = sorted(range(len(triples)), key=lambda k: (k not in found.chosen, -max(map(abs, triples[k]))))
    shown = sorted(order[:_WORDS])
    values = [value for k in shown for value in triples[k]]
    low, high = min(0.0, *values), max(0.0, *values)
    names = ["image", "question", "together"]
    rows = "".join(
        _row(found.words[k], _bar(triples[k], low, high, names), " · ".join(f"{value:+.2f}" for value in triples[k]),
             marked=k in found.chosen)
        for k in shown
    )  # fmt: skip
    square = '<rect width="1" height="1"/>'
    keys = "".join(f'<span><svg viewBox="0 0 1 1" class="of-{name}">{square}</svg>{name}</span>' for name in names)
    left = len(triples) - len(shown)
    lead = (
        f"{found.verdict} Nats of each word: what the image gives without the question, what the question gives "
        f"without the image ({found.baseline} baseline), and what both give together beyond that; below 0 they say the "
        f"same. "
        f"{f'{left} words with little of it are left out. ' if left else ''}{found.passes} forward passes."
    )
    return _section("Image or question?", lead, rows, "", keys)


def _section(title: str, lead: str, rows: str, more: str, keys: str = "") -> str:
    keys = f'<p class="keys">{keys}</p>' if keys else ""
    return (
        f'<section class="evidence"><h2>{html.escape(title)}</h2><p class="prose">{html.escape(lead)}</p>{keys}'
        f'<table class="bars">{rows}</table>{more}</section>'
    )


def _row(name: str, bar: str, told: str, *, marked: bool = False) -> str:
    shown = f"<mark>{html.escape(name)}</mark>" if marked else html.escape(name)
    return f'<tr><th scope="row" dir="auto">{shown}</th><td>{bar}</td><td class="told">{html.escape(told)}</td></tr>'


def _bar(values: Sequence[float], low: float, high: float, kinds: Sequence[str]) -> str:
    """One bar under the other, from a common zero, on the axis from ``low`` to ``high``."""
    span = (high - low) or 1.0
    zero, thick = _WIDE * (0.0 - low) / span, 8
    rects = []
    for number, (value, kind) in enumerate(zip(values, kinds, strict=True)):
        start, wide = zero + _WIDE * min(value, 0.0) / span, _WIDE * abs(value) / span
        place = f'x="{start:.1f}" y="{number * (thick + 1)}" width="{max(wide, 0.6):.1f}" height="{thick}"'
        rects.append(f'<rect class="of-{kind}" {place}/>')
    tall = len(values) * (thick + 1)
    return (
        f'<svg viewBox="-1 0 {_WIDE + 2} {tall}" height="{tall * 1.4:.0f}" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(rects)}<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{tall}"/></svg>'
    )
