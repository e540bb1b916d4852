"""The report page: which part of an image made a model say each word, and whether to trust that.

``samples.py`` gathers what the page draws as plain JSON, ``data_uris.py`` encodes the images, ``shell.py`` fills the
template ``page.html`` with it, with ``page.css`` and five scripts.
"""

from __future__ import annotations

import collections
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ReportError
from lvlm_probe.escaping import counted
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.pages.clip_page import clip_page
from lvlm_probe.pages.evidence import Evidence, evidence_markup, evidence_of
from lvlm_probe.pages.samples import gather
from lvlm_probe.pages.shell import Page, asset, json_for_script, page_text, refuse_existing, write_text

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Score
    from lvlm_probe.video import ClipHeatmap, Order

_SCRIPTS = ("draw.js", "answer.js", "trial.js", "theme.js", "page.js")
_TITLE = "Where the answer came from"
_CLIP_TITLE = "Where and when the answer came from"


@naming_arguments
def report(
    heats: Heatmap | ClipHeatmap | Iterable[Heatmap | ClipHeatmap],
    *,
    scores: Score | Iterable[Score | None] | None = None,
    orders: Order | Iterable[Order] = (),
    evidence: Evidence | Iterable[Evidence] = (),
    out: str | os.PathLike[str],
    title: str | None = None,
    overwrite: bool | None = None,
) -> Page:
    """Write one self-contained HTML page about one or more explained answers.

    Heatmaps of one trace share a sample of the page: its first one is the map on show, the others are reached by their
    words. Heatmaps of several traces make a page with several samples.

    Args:
        heats: The heatmaps, in the order of showing; one or many. Those of videos make a page of their own kind.
        scores: What `evaluate` said of each heatmap, in the same order; ``None`` for one that was not evaluated. The
            page says "not checked" of every map without a score.
        orders: Of videos, what `probe.video.order` found: a line under the answers it is of.
        evidence: What `which_parts`, `modalities`, `find_steps` and `check_steps` of `probe.causal` found: bars, and a
            strip of steps, under the answers they are of.
        out: The file to write. Missing folders are made.
        title: Headline of the page.
        overwrite: Replace ``out`` if it exists; by default only a file that this package wrote, so that a notebook cell
            can run again.

    Returns:
        The path written, which a notebook shows as the page.

    Raises:
        ReportError: no heatmaps, not one score per heatmap, things that are neither, an order or evidence of another
            answer; ``out`` exists or cannot be written.
    """
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Score
    from lvlm_probe.video import ClipHeatmap, Order

    found: list[Any] = [orders] if isinstance(orders, Order) else list(orders)
    heat_list: list[Any] = list(heats) if isinstance(heats, Iterable) else [heats]
    score_list: list[Any] = list(scores) if isinstance(scores, Iterable) else [scores]
    if scores is None:
        score_list = [None] * len(heat_list)
    for thing in heat_list:
        if not isinstance(thing, Heatmap | ClipHeatmap):
            raise ReportError(f"report() shows heatmaps, as explain() returns them; got a {type(thing).__name__}")
    for thing in score_list:
        if not (thing is None or isinstance(thing, Score)):
            raise ReportError(f"scores are what evaluate() returns, or None; got a {type(thing).__name__}")
    if not heat_list:
        raise ReportError("report() was given no heatmaps: pass at least one, report([heat], out=...)")
    if len(score_list) != len(heat_list):
        raise ReportError(
            f"report() was given {len(heat_list)} heatmaps but {len(score_list)} scores: "
            "pass one score per heatmap, in the same order, None where there is none"
        )
    of_clips = [isinstance(thing, ClipHeatmap) for thing in heat_list]
    if any(of_clips) and not all(of_clips):
        raise ReportError(
            "report() was given heatmaps of images and of videos: a page shows one of the two, so write one for each"
        )
    _check_orders(found, heat_list if all(of_clips) else [])
    beside = evidence_of(
        [evidence] if isinstance(evidence, Evidence) else evidence,
        [str(heat.provenance.get("trace_id")) for heat in heat_list],
    )
    path = Path(out)
    refuse_existing(path, overwrite=overwrite)
    if all(of_clips):
        text = clip_page(heat_list, score_list, title or _CLIP_TITLE, orders=found, evidence=beside)
        return write_text(path, text, overwrite=overwrite, said=counted(len(heat_list), "video"))
    samples = gather(heat_list, score_list)
    text = _fill(samples, title or _TITLE, heat_list, beside)
    verdicts = collections.Counter(entry["verdict"]["title"].rstrip(".:") for one in samples for entry in one["maps"])
    said = ", ".join(f"{count} × {title[:1].lower()}{title[1:]}" for title, count in verdicts.most_common())
    return write_text(path, text, overwrite=overwrite, said=said)


def _check_orders(orders: Sequence[Any], heats: Sequence[ClipHeatmap]) -> None:
    from lvlm_probe.video import Order

    shown = {str(heat.provenance.get("trace_id")) for heat in heats}
    for thing in orders:
        if not isinstance(thing, Order):
            raise ReportError(f"orders are what probe.video.order() returns; got a {type(thing).__name__}")
        if thing.trace_id not in shown:
            raise ReportError(
                f"an order is of {thing.trace_id or 'an unknown answer'}, and no heatmap of a video on this page is"
            )


def _fill(
    samples: list[dict[str, Any]], title: str, heats: Sequence[Heatmap], evidence: Mapping[str, Sequence[Evidence]]
) -> str:
    script = "\n".join(asset(name) for name in _SCRIPTS)
    data = json_for_script({"samples": samples})
    summary, sections = _summary(samples), ""
    for number, sample in enumerate(samples):
        if found := evidence.get(sample["id"]):
            own = [heat for heat in heats if heat.provenance.get("trace_id") == sample["id"]]
            sections += f'<template id="evidence-{number}">{evidence_markup(found, own)}</template>'
            summary += evidence_markup(found)
    style = asset("page.css") + (asset("evidence.css") if sections else "")
    return page_text("page.html", title, style, script, summary=summary, evidence=sections, data=data)


def _summary(samples: Sequence[Mapping[str, Any]]) -> str:
    """What a reader without JavaScript gets: each question, answer and verdict, as escaped text."""
    rows = []
    for sample in samples:
        verdict = sample["maps"][0]["verdict"]
        checks = [f"{line['title']}. {line['reason']}" for line in sample["maps"][0]["sanity"]]
        edits = [line["sentence"] for line in sample["maps"][0]["edits"]]
        said = " ".join([verdict["title"], *verdict["reasons"], *checks, *edits])
        rows.append(
            f"<p><b>{html.escape(sample['question'] or 'Question not known')}</b><br>"
            f"{html.escape(sample['answer'] or 'Answer not known')}<br>{html.escape(said)}</p>"
        )
    return "\n".join(rows)
