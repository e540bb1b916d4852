"""The page of a video: frames with the heatmap over them, its mean over time, and play.

Every frame stands on the page as an image, so that a reader without scripts sees them all; ``clip.js`` shows one of
them large, moves through time and takes the heatmap away.
"""

from __future__ import annotations

import html
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ReportError
from lvlm_probe.heatmap import explained_words
from lvlm_probe.pages.data_uris import data_uri
from lvlm_probe.pages.evidence import Evidence, evidence_markup
from lvlm_probe.pages.samples import sanity_of, verdict_of
from lvlm_probe.pages.shell import asset, json_for_script, page_text

if TYPE_CHECKING:
    from lvlm_probe.metrics import Score
    from lvlm_probe.video import ClipHeatmap, Order

_SIDE = 480  # pixels of a frame
_SHOWN = 48  # frames of one heatmap
_HIGH, _WIDE = 80.0, 1000.0  # of the curve, in units of its own


def clip_page(
    heats: Sequence[ClipHeatmap],
    scores: Sequence[Score | None],
    title: str,
    *,
    orders: Sequence[Order] = (),
    evidence: Mapping[str, Sequence[Evidence]] = types.MappingProxyType({}),
) -> str:
    """The text of the page: an answer with the maps of its words, one shown at a time; without scripts all of them.

    Raises:
        ReportError: a heatmap has no frames at hand.
    """
    groups: dict[str, list[int]] = {}
    for number, heat in enumerate(heats):
        groups.setdefault(str(heat.provenance.get("trace_id") or f"untraced {number}"), []).append(number)
    panels = [_panel(number, *pair) for number, pair in enumerate(zip(heats, scores, strict=True))]
    sections = []
    for trace_id, members in groups.items():
        mine = [order for order in orders if order.trace_id == trace_id]
        head = _head([heats[number] for number in members], members, mine)
        body = "\n".join(panels[number][0] for number in members) + evidence_markup(evidence.get(trace_id, []))
        sections.append(f'<section class="clip">{head}\n{body}</section>')
    return page_text(
        "clip.html",
        title,
        asset("page.css") + asset("clip.css") + asset("evidence.css"),
        asset("theme.js") + asset("clip.js"),
        body='<body class="clips">',
        sections="\n".join(sections),
        data=json_for_script([plain for _, plain in panels]),
    )


def _head(heats: Sequence[ClipHeatmap], numbers: Sequence[int], orders: Sequence[Order]) -> str:
    """Question, answer, what it needs of time, and where there are several heatmaps a button for each."""
    trace = next((heat.trace for heat in heats if heat.trace is not None), None)
    question = None if trace is None else trace.question
    head = (
        f'<p class="label">Question</p><p class="asked" dir="auto">{html.escape(question or "not known")}</p>'
        f'<p class="label">Answer</p><p class="said" dir="auto">{_answer(heats, numbers)}</p>'
    )
    for order in orders:
        head += f'<p class="needs"><b>{html.escape(order.verdict)}</b> {html.escape(order.reasons)}</p>'
    if len(heats) > 1:
        buttons = "".join(
            f'<button type="button" class="quiet" data-panel="{number}">{html.escape(label)}</button>'
            for number, label in zip(numbers, _labels(heats), strict=True)
        )
        head += f'<p class="choose"><span class="label">Heatmap of</span> {buttons}</p>'
    return head


def _labels(heats: Sequence[ClipHeatmap]) -> list[str]:
    """What tells the heatmaps of one answer apart: their words, and methods and videos where these differ."""
    several = len({heat.method for heat in heats}) > 1, len({heat.clip.first for heat in heats}) > 1
    labels = []
    for heat in heats:
        words = [text for _, text, explained in explained_words(heat.selection) if explained]
        parts = [" ".join(words[:4]) + (" …" if len(words) > 4 else "") or "nothing"]
        parts += [heat.method] * several[0] + [f"video from image {heat.clip.first + 1}"] * several[1]
        labels.append(" · ".join(parts))
    return labels


def _panel(number: int, heat: ClipHeatmap, score: Score | None) -> tuple[str, dict[str, Any]]:
    """One heatmap as markup, and its frames without it."""
    verdict = verdict_of(heat, score)
    words = " ".join(text for _, text, explained in explained_words(heat.selection) if explained)
    head = (
        f'<p class="verdict {verdict["state"]}"><b>{html.escape(verdict["title"])}</b> '
        f"{html.escape(' '.join(verdict['reasons']))}</p>"
    )
    head += "".join(
        f'<p class="facts {line["state"]}"><b>{html.escape(line["title"])}.</b> {html.escape(line["reason"])}</p>'
        for line in sanity_of(heat)
    )
    opening = f'<div class="panel" data-clip="{number}" role="group" aria-label="Heatmap of {html.escape(words)}">'
    if heat.values is None:
        return f"{opening}{head}</div>", {"plain": [], "at": []}
    chosen = heat.clip.spread(_SHOWN)
    try:
        shown = [data_uri(heat.shown(frame, _SIDE)) for frame in chosen]
        plain = [data_uri(heat.shown(frame, _SIDE, alpha=0.0)) for frame in chosen]
    except (IndexError, OSError, ValueError) as error:
        raise ReportError(f"a frame of the video cannot be shown: {error}") from error
    curve = heat.over_time
    times = [heat.when(frame) for frame in chosen]
    strip = "".join(
        f'<li><button type="button" data-frame="{place}" aria-label="Show {html.escape(when)}">'
        f'<img src="{source}" alt="Frame at {html.escape(when)} with the heatmap over it"></button>'
        f"<span>{html.escape(when)}</span></li>"
        for place, (source, when) in enumerate(zip(shown, times, strict=True))
    )
    left = heat.clip.frames - len(chosen)
    told = f" {left} of {heat.clip.frames} frames are left out here." if left else ""
    facts = [heat.method, f"grid {' × '.join(map(str, heat.values.shape))}"]
    facts.append(heat.cost or "0 forward and 0 backward passes")
    if score is not None and score.reason is None:
        facts.append(f"deletion {score.deletion:.2f}, insertion {score.insertion:.2f}")
    hottest = int(curve.argmax())
    most = f"highest {float(curve.max()):.2g} at {html.escape(heat.when(hottest))}"
    start = int(curve[chosen].argmax())
    markup = f"""{opening}{head}
<div class="player" hidden><img class="large" alt="">
<div class="controls"><button type="button" class="quiet play">Play</button>
<label>Time <input type="range" class="time" min="0" max="{len(chosen) - 1}" step="1" value="{start}"></label>
<output class="when"></output>
<label><input type="checkbox" class="heat" checked> heatmap</label></div></div>
{_curve(curve, chosen)}
<p class="facts">Mean of the heatmap in each frame, {most}.{told}</p>
<ol class="frames">{strip}</ol>
<p class="facts">{html.escape(" · ".join(facts))}</p></div>"""
    return markup, {"plain": plain, "at": times, "across": [_across(k, len(curve)) for k in chosen]}


def _answer(heats: Sequence[ClipHeatmap], numbers: Sequence[int]) -> str:
    """The answer with the explained words marked; of several heatmaps a word leads to the one that is most its own."""
    told = [explained_words(heat.selection) for heat in heats]
    sizes = [sum(explained for _, _, explained in words) for words in told]
    parts = []
    for place, (before, text, _) in enumerate(told[0]):
        own = [k for k, words in enumerate(told) if place < len(words) and words[place][2]]
        parts.append(html.escape(before))
        word = html.escape(text)
        if not own:
            parts.append(word)
        elif len(heats) == 1:
            parts.append(f"<mark>{word}</mark>")
        else:
            own.sort(key=lambda k: sizes[k])
            panels = " ".join(str(numbers[k]) for k in own)
            parts.append(f'<button type="button" class="of" data-panels="{panels}"><mark>{word}</mark></button>')
    return "".join(parts).strip() or "not known"


def _across(frame: int, frames: int) -> float:
    return round((frame + 0.5) / frames * _WIDE, 1)


def _curve(curve: np.ndarray, chosen: Sequence[int]) -> str:
    """The mean over time as a line, from 0 to its highest, with a mark that moves."""
    highest = float(curve.max()) or 1.0
    points = [(_across(k, len(curve)), round(_HIGH - float(v) / highest * (_HIGH - 6), 1)) for k, v in enumerate(curve)]
    line = " ".join(f"{x},{y}" for x, y in points)
    dots = "".join(f'<circle cx="{points[k][0]}" cy="{points[k][1]}" r="4"/>' for k in chosen)
    area = f"{points[0][0]},{_HIGH} {line} {points[-1][0]},{_HIGH}"
    return (
        f'<svg class="curve" viewBox="-6 -6 {_WIDE + 12:g} {_HIGH + 12:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="Mean of the heatmap in each frame"><polygon points="{area}"/><polyline points="{line}"/>{dots}'
        f'<line class="now" x1="0" x2="0" y1="-6" y2="{_HIGH:g}" hidden/></svg>'
    )
