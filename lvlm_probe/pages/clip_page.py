"""The page of a video: frames with the heatmap over them, its mean over time, and play.

Every frame stands on the page as an image, so that a reader without scripts sees them all; ``clip.js`` shows one of
them large, moves through time and takes the heatmap away.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ReportError
from lvlm_probe.heatmap import explained_words
from lvlm_probe.pages.data_uris import data_uri
from lvlm_probe.pages.samples import verdict_of
from lvlm_probe.pages.shell import asset, json_for_script, page_text

if TYPE_CHECKING:
    from lvlm_probe.metrics import Score
    from lvlm_probe.video import ClipHeatmap

__all__ = ["clip_page"]

_SIDE = 480  # pixels of a frame
_SHOWN = 48  # frames of one heatmap
_HIGH, _WIDE = 80.0, 1000.0  # of the curve, in units of its own


def clip_page(heats: Sequence[ClipHeatmap], scores: Sequence[Score | None], title: str) -> str:
    """The text of the page. Raises ``ReportError`` where a heatmap has no frames at hand."""
    parts = [_section(number, *pair) for number, pair in enumerate(zip(heats, scores, strict=True))]
    return page_text(
        "clip.html",
        title,
        asset("page.css") + asset("clip.css"),
        asset("theme.js") + asset("clip.js"),
        body='<body class="clips">',
        sections="\n".join(markup for markup, _ in parts),
        data=json_for_script([plain for _, plain in parts]),
    )


def _section(number: int, heat: ClipHeatmap, score: Score | None) -> tuple[str, dict[str, Any]]:
    """One heatmap as markup, and its frames without it."""
    verdict = verdict_of(heat, score)
    question = None if heat.trace is None else heat.trace.question
    head = (
        f'<p class="label">Question</p><p class="asked" dir="auto">{html.escape(question or "not known")}</p>'
        f'<p class="label">Answer</p><p class="said" dir="auto">{_answer(heat)}</p>'
        f'<p class="verdict {verdict["state"]}"><b>{html.escape(verdict["title"])}</b> '
        f"{html.escape(' '.join(verdict['reasons']))}</p>"
    )
    if heat.values is None:
        return f'<section class="clip">{head}</section>', {"plain": [], "at": []}
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
    passes = heat.provenance.get("passes") or {}
    facts.append(f"{passes.get('forward', 0)} forward and {passes.get('backward', 0)} backward passes")
    if score is not None and score.reason is None:
        facts.append(f"deletion {score.deletion:.2f}, insertion {score.insertion:.2f}")
    hottest = int(curve.argmax())
    most = f"highest {float(curve.max()):.2f} at {html.escape(heat.when(hottest))}"
    start = int(curve[chosen].argmax())
    markup = f"""<section class="clip" data-clip="{number}" aria-label="Heatmap {number + 1}">{head}
<div class="player" hidden><img class="large" alt="">
<div class="controls"><button type="button" class="quiet play">Play</button>
<label>Time <input type="range" class="time" min="0" max="{len(chosen) - 1}" step="1" value="{start}"></label>
<output class="when"></output>
<label><input type="checkbox" class="heat" checked> heatmap</label></div></div>
{_curve(curve, chosen)}
<p class="facts">Mean of the heatmap in each frame, {most}.{told}</p>
<ol class="frames">{strip}</ol>
<p class="facts">{html.escape(" · ".join(facts))}</p></section>"""
    return markup, {"plain": plain, "at": times, "across": [_across(k, len(curve)) for k in chosen]}


def _answer(heat: ClipHeatmap) -> str:
    """The answer with the explained words marked."""
    parts = []
    for before, text, explained in explained_words(heat.selection):
        told = html.escape(text)
        parts.append(html.escape(before) + (f"<mark>{told}</mark>" if explained else told))
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
