"""What an answer rests on, as markup without scripts: parts of the prompt, image against question, its own steps.

Every text is escaped here. Widths are attributes of SVG, as the pages' policy allows no style on elements.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.causal import Modalities, PartShares, Step, Steps
from lvlm_probe.errors import ExplainError, ProbeError, ReportError
from lvlm_probe.pages.data_uris import data_uri, shrink

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap

Evidence = PartShares | Modalities | Steps
"""What may stand on the page of an answer beside its maps."""

KINDS: dict[str, type[Evidence]] = {"parts": PartShares, "modalities": Modalities, "steps": Steps}
"""By the name in a stored record."""

_WORDS = 40
"""Words of one table: the chosen ones, and those of the largest parts."""
_WIDE = 240
_WIDEST = 600
"""Bars of a curve."""
_SIDE = 220


def evidence_of(found: Iterable[object], trace_ids: Iterable[str]) -> dict[str, list[Evidence]]:
    """Sort evidence by the answer it is of.

    Raises:
        ReportError: something is none, or is of an answer that has no heatmap among these.
    """
    sorted_: dict[str, list[Evidence]] = {trace_id: [] for trace_id in trace_ids}
    for thing in found:
        if not isinstance(thing, Evidence):
            names = "which_parts(), modalities(), find_steps() and check_steps()"
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


def evidence_markup(found: Sequence[Evidence], heats: Sequence[Heatmap] = ()) -> str:
    """The sections of one answer; nothing where there are none.

    Args:
        heats: heatmaps of the answer on the same page; one of a step stands small on its card.
    """
    made = []
    for one in found:
        if isinstance(one, Steps):
            made.append(_steps(one, heats))
        else:
            made.append(_parts(one) if isinstance(one, PartShares) else _modalities(one))
    return "".join(made)


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


def _steps(found: Steps, heats: Sequence[Heatmap]) -> str:
    """A strip of cards, one for each step, under the curve of the ratios of its tokens."""
    top = max((step.from_image for step in found if step.from_image is not None), default=1.0) or 1.0
    cards = "".join(_card(number, step, found, top, heats) for number, step in enumerate(found))
    told = [
        "from image: log-likelihood ratio of the words that come from it, nats" if found.llr else "",
        "looking: share of attention that goes to the image" if any(step.looking is not None for step in found) else "",
        "without, blind: what the conclusion loses when the step is not read, and when it does not see the image"
        if found.conclusion
        else "",
        f"{found.passes} forward passes" if found.passes else "no pass of the model",
    ]
    said = "; ".join(filter(None, told))
    lead = f"{found.verdict} {said[:1].upper()}{said[1:]}."
    return (
        f'<section class="evidence"><h2>Which step decided?</h2><p class="prose">{html.escape(lead)}</p>'
        f"{_ratios(found)}"
        f'<ol class="steps" tabindex="0" aria-label="Steps of the answer">{cards}</ol></section>'
    )


def _card(number: int, step: Step, found: Steps, top: float, heats: Sequence[Heatmap]) -> str:
    marks = [name for name, mine in (("image comes in", found.sees), ("decides", found.decides)) if mine == number]
    facts = []
    if step.from_image is not None:
        facts.append(("from image", f"{step.from_image:+.1f}", step.from_image / top, "image"))
    if step.looking is not None:
        facts.append(("looking", f"{step.looking:.0%}", step.looking, "image"))
    for name, lost in (("without", step.unread), ("blind", step.unseen)):
        if lost is not None:
            facts.append((name, f"{-lost:+.1f}", lost / max(top, abs(lost)), "together" if lost > 0 else "question"))
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td><svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="of-{kind}" width="{100 * min(abs(share), 1):.1f}" height="6"/></svg></td><td>{told}</td></tr>'
        for name, told, share, kind in facts
    )
    small = _thumbnail(step, heats)
    image = (
        f'<button type="button" class="frame" data-tokens="{step.start}-{step.stop}" aria-label="Show the map of step '
        f'{number + 1}"><img src="{small}" alt="Map of this step, small"></button>'
        if small
        else ""
    )
    chips = "".join(f'<span class="chip">{html.escape(name)}</span>' for name in [*marks, step.kind])
    return (
        f'<li class="{"told" if marks else ""}">{image}<p class="which"><b>{number + 1}</b> {chips}</p>'
        f'<p class="text" dir="auto">{html.escape(step.text)}</p><table>{rows}</table></li>'
    )


def _thumbnail(step: Step, heats: Sequence[Heatmap]) -> str:
    mine = [
        heat
        for heat in heats
        if heat.values is not None
        and heat.trace is not None
        and heat.selection.indices
        and all(step.start <= token < step.stop for token in heat.selection.indices)
    ]
    if not mine:
        return ""
    try:
        return data_uri(shrink(max(mine, key=lambda heat: len(heat.selection.indices)).overlay(), _SIDE), quality=76)
    except ProbeError:  # an image that is not at hand any more
        return ""


def _ratios(found: Steps) -> str:
    """The ratio of each token as a bar over the answer, with a line where a step begins."""
    known = np.asarray(found.llr, dtype=np.float64)
    if not len(known) or not np.isfinite(known).any():
        return ""
    known = np.nan_to_num(known, nan=0.0, posinf=0.0, neginf=0.0)
    each = max(1, -(-len(known) // _WIDEST))  # of a long answer the strongest of neighbours
    groups = [known[k : k + each] for k in range(0, len(known), each)]
    values = [float(group[np.abs(group).argmax()]) for group in groups]
    low, high = min(0.0, *values), max(0.0, *values)
    span, tall = (high - low) or 1.0, 60.0
    zero = tall * high / span
    bars = "".join(
        f'<rect class="of-{"image" if value > 0 else "question"}" x="{k}" width="0.9" '
        f'y="{zero - tall * max(value, 0) / span:.1f}" height="{tall * abs(value) / span:.1f}"/>'
        for k, value in enumerate(values)
        if value
    )
    edges = "".join(
        f'<line class="edge" x1="{step.start / each:.1f}" x2="{step.start / each:.1f}" y1="0" y2="{tall:g}"/>'
        for step in found
    )
    return (
        f'<svg class="ratios" viewBox="0 0 {len(values)} {tall:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="Log-likelihood ratio of each token of the answer">{edges}{bars}'
        f'<line x1="0" x2="{len(values)}" y1="{zero:.1f}" y2="{zero:.1f}"/></svg>'
    )
