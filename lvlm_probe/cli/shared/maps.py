"""Maps at the command line: made, listed for programs, shown to a person, written as the report page.

This module imports torch; commands import it when they run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.cli.shared.answers import show_question
from lvlm_probe.cli.shared.terminal import answer_text, bar, one_line, say, shows_looks, stage, stored_path
from lvlm_probe.escaping import counted
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.heatmap_store import MapFile, MapSettings, explain_one, orders_of, stored_evidence
from lvlm_probe.metrics import Score
from lvlm_probe.pages import report
from lvlm_probe.pages.evidence import evidence_from
from lvlm_probe.replaying import Replay
from lvlm_probe.replaying.own_scores import Contrast
from lvlm_probe.selection import TokenSelection, word_selections
from lvlm_probe.trace import Trace
from lvlm_probe.video import ClipHeatmap
from lvlm_probe.words import distinct_texts

if TYPE_CHECKING:
    from rich.text import Text


@dataclass
class Explained:
    """A trace and the maps made of it so far."""

    trace: Trace
    maps: list[MapFile]


def explain_replay(
    replay: Replay, selection: TokenSelection, settings: MapSettings, folder: Path, *, word_maps: bool
) -> Iterator[MapFile]:
    """Make the map of the selection, of a contrast also the other way round, and, if wanted, one per word; yield each
    as it is finished."""
    jobs = [(label_of(selection), selection)]
    if isinstance(selection.score, Contrast):
        other = dataclasses.replace(selection, score=selection.score.other_way())
        jobs.append((label_of(other), other))
    if word_maps and selection:
        jobs += [job for job in word_selections(replay, selection) if job[1].indices != selection.indices]
    for label, chosen in jobs:
        yield explain_one(replay, chosen, label, settings, folder, shown=bar)[0]


def label_of(selection: TokenSelection) -> str:
    """Return what a map's file name calls its words."""
    named = selection.rule in ("words", "span", "indices") or selection.score is not None
    return selection.label if named else "answer"


def map_summary(found: MapFile) -> dict[str, Any]:
    """Return a map for programs."""
    heat, score = found.read(), found.score()
    return {
        "map": str(found.path),
        "picture": str(found.overlay_path) if found.overlay_path.is_file() else None,
        "method": heat.method,
        "words": words_of(heat),
        "tokens": list(heat.selection.indices),
        "reason": heat.reason,
        "cells": None if heat.values is None else list(heat.values.shape),
        "passes": heat.provenance.get("passes"),
        "search": heat.provenance.get("search"),
        "rounds": (heat.provenance.get("diagnostics") or {}).get("rounds"),
        "seconds": heat.provenance.get("seconds"),
        "baseline": heat.provenance.get("baseline"),
        "deletion": None if score is None else score.deletion,
        "insertion": None if score is None else score.insertion,
        "center_gain": None if score is None or math.isnan(score.center_gain) else score.center_gain,
        "undefined": None if score is None else score.reason,
        "trusted": None if score is None else score.verdict.trusted,
        "reasons": None if score is None else list(score.verdict.reasons),
    }


def words_of(heat: Heatmap | ClipHeatmap) -> str:
    """Return the words that a map explains; whole words where its trace is at hand, else the bare tokens."""
    if heat.trace is None or heat.selection.score is not None:
        return heat.selection.label
    chosen, words = set(heat.selection.indices), heat.trace.words
    told = zip(words, distinct_texts(words), strict=True)
    return " … ".join(text for word, text in told if chosen.intersection(range(word.start, word.stop)))


def show_explained(explained: Explained, replay: Replay) -> None:
    """Show question, answer, and one line per map with its scores and verdict."""
    trace = explained.trace
    first = explained.maps[0].read()
    show_question(trace)
    ratios = None if replay.llr is None else replay.llr.tolist()  # none of a server that gives less
    answer = answer_text(trace.words, trace.tokens, ratios, first.selection.indices)
    say(("A  ", "dim"), answer)
    if looks := legend(answer):
        say((f"   {looks}", "dim"))
    for found in explained.maps:
        show_map(found)


def legend(answer: Text) -> str:
    """What the looks of the answer mean: of those that it has, where the terminal shows them at all."""
    if not shows_looks():
        return ""
    looks = " ".join(str(span.style) for span in answer.spans)
    said = ["bold: the image makes the word over e times likelier"] if "bold" in looks else []
    return "; ".join([*said, *(["underlined: explained"] if "underline" in looks else [])])


def show_map(found: MapFile) -> None:
    """Show a map in two lines: what it explains and how well, and where it is."""
    heat, score = found.read(), found.score()
    title = one_line(words_of(heat), 300) or "nothing selected"
    if heat.values is None:
        say(("  – ", "yellow"), (title, "bold"), f": no map, {heat.reason}")
        return
    if score is None:
        say(("  · ", "dim"), (title, "bold"), "  not scored")
    else:
        mark, style = ("✓", "green") if score.verdict.trusted else ("✗", "red")
        said = f"  deletion {score.deletion:.3f} (low is good)  insertion {score.insertion:.3f} (high is good)"
        say((f"  {mark} ", style), (title, "bold"), "  no score" if score.reason else said)
        for remark in score.remarks:
            say(("    ", ""), remark)
        if not score.verdict.trusted:
            say(("    ", ""), (str(score.verdict), "red"))
    for doubt in (heat.coarse, heat.uncertainty):
        if doubt is not None:
            say(("    ", ""), doubt)
    for line in _cost_lines(heat, score):
        say(("    ", ""), (line, "dim"))
    say(("    ", ""), (stored_path(found.overlay_path if found.overlay_path.is_file() else found.path), "dim"))


def _cost_lines(heat: Heatmap | ClipHeatmap, score: Score | None) -> Iterator[str]:
    """What the map is compared with, and what it took."""
    if score is not None and math.isfinite(score.center_gain):
        yield f"insertion − deletion {score.gain:.3f}; a blob in the middle of the image has {score.center_gain:.3f}"
    passes, told = heat.provenance.get("passes"), heat.provenance.get("diagnostics") or {}
    if passes and any(passes.values()):
        said = heat.cost
        if "rounds" in told:
            said += f" in {counted(len(told['rounds']), 'round')}"
        if told.get("stopped"):
            said += f": {told['stopped']}"
        yield said


def write_report(found: Sequence[MapFile], out: Path, *, title: str | None = None, overwrite: bool = False) -> Path:
    """Write the page of stored maps."""
    with stage("writing the report"):
        heats, scores = [item.read() for item in found], [item.score() for item in found]
        shown = {heat.provenance.get("trace_id") for heat in heats}
        records = [record for record in stored_evidence(found).values() if record.get("trace_id") in shown]
        evidence = [evidence_from(record) for record in records]
        beside: dict[str, Any] = {"orders": orders_of(heats), "evidence": evidence}
        return report(heats, scores=scores, out=out, title=title, overwrite=overwrite, **beside)
