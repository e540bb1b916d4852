"""Several methods on the same answers: explained, scored on one grid, shown as a table, and put on a page.

This is ``lvlm-probe evaluate --methods``. Maps and scores are stored as ``explain`` stores them, one file each, so an
interrupted run goes on with what is missing. This module imports torch; the command imports it when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_probe.cli.shared.inputs import ReplayModels, baseline_from
from lvlm_probe.cli.shared.maps import label_of, open_replay
from lvlm_probe.cli.shared.terminal import (
    bar,
    note,
    one_line,
    open_page,
    print_json,
    say,
    show_table,
    stage,
    stop,
    stored_path,
)
from lvlm_probe.errors import ProbeError, TraceError
from lvlm_probe.explainers import methods as known_methods
from lvlm_probe.explainers import needs_of
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.heatmap_store import FOLDER, MapSettings, explain_one, not_made, score_one, write_record
from lvlm_probe.importing.meter import traces_in
from lvlm_probe.metrics import Interval, Score
from lvlm_probe.pages import Comparison, compare
from lvlm_probe.replaying import Replay
from lvlm_probe.selection import TokenSelection, select_tokens
from lvlm_probe.trace import Trace

__all__ = ["compare_methods"]

_GRID = 32
_PAGE = "comparison.html"
_COLUMNS = ("method", "gain ↑", "deletion ↓", "insertion ↑", "trusted", "maps", "passes", "seconds")
_IMPORTANCE = (0, 1, 4, 2, 3, 5, 6, 7)


def compare_methods(
    paths: Sequence[Path],
    names: str,
    models: ReplayModels,
    *,
    words: list[str] | None,
    baseline: str | None,
    page: Path | None,
    overwrite: bool,
    wide: bool,
    open_it: bool,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Explain and score the traces behind ``paths`` by every method of ``names``; print means, write the page.

    Args:
        names: methods with commas between, or ``"all"``.
        models: what the traces are replayed on.
        wide: print every column, however narrow the terminal.
        open_it: open the page in the browser.
        page: the file to write; by default ``comparison.html`` beside the traces. Scores go beside it as JSON.
        options: of ``evaluate``; the grid is 32 where it leaves it open.

    Raises:
        ProbeError: no traces there, an unknown method, or a page that exists. A method that cannot run on a trace is no
            error: its reason stands in its place.
    """
    traces = _traces(paths)
    page = page or (paths[0] if paths[0].is_dir() else paths[0].parent) / _PAGE
    results = page.with_suffix(".json")
    for file in (page, results):
        if file.exists() and not overwrite:
            raise ProbeError(f"{file} exists; add --overwrite, or name another page with --out")
    methods = _methods(names)
    own_baseline = baseline_from(baseline)
    judging = {**options, "grid": options.get("grid") or _GRID}
    heats: list[Heatmap] = []
    scores: list[Score | None] = []
    failed: dict[str, str] = {}
    try:
        for number, trace in enumerate(traces, start=1):
            replay = open_replay(trace, *models.of(trace))
            if own_baseline is not None:
                replay = replay.over(own_baseline)
            if not as_json:
                say((f"trace {number} of {len(traces)}  ", "dim"), one_line(trace.answer, 300))
            selection = select_tokens(replay, words=words) if words else select_tokens(replay)
            for method in methods:
                heat, score = _one(replay, selection, method, trace, judging)
                heats.append(heat)
                scores.append(score)
                if heat.values is None:
                    failed.setdefault(method, str(heat.reason))
    except KeyboardInterrupt:
        done = sum(heat.values is not None for heat in heats)
        raise stop(
            f"stopped; {done} finished maps are kept beside their traces, and the same command goes on"
        ) from None
    with stage("writing the page"):
        made = compare(heats, scores=scores, out=page, overwrite=overwrite)
        record = _record(made, traces, judging)
        write_record(results, record)
    if open_it:
        open_page(page)
    if as_json:
        print_json(record)
        return
    _show(made, wide=wide)
    for method, reason in failed.items():
        count = sum(heat.method == method and heat.values is None for heat in heats)
        where = "any trace" if count == len(traces) else f"{count} of {len(traces)} traces"
        note(f"{method} made no map on {where}: {reason}")
    say("page:    ", (stored_path(page), "bold"))
    say("scores:  ", stored_path(results))


def _traces(paths: Sequence[Path]) -> list[Trace]:
    found: list[Trace] = []
    for path in paths:
        if not path.exists():
            raise TraceError(f"there is no file or directory {path}")
        here: list[Trace] = []
        for _, trace in traces_in(path):
            if isinstance(trace, ProbeError):
                note(trace, kind="warning")
            else:
                here.append(trace)
        if not here:
            raise TraceError(f"{path} holds no traces; record one: lvlm-probe record --out {path} …")
        known = {(trace.path, trace.row) for trace in found}
        found += [trace for trace in here if (trace.path, trace.row) not in known]
    return found


def _methods(names: str) -> list[str]:
    everything = known_methods()
    if names.strip() == "all":
        return everything
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise ProbeError(f"--methods names none; write all, or some of: {', '.join(everything)}")
    for name in chosen:
        needs_of(name)  # an error that names the closest, before any work
    return chosen


def _one(
    replay: Replay, selection: TokenSelection, method: str, trace: Trace, judging: Mapping[str, Any]
) -> tuple[Heatmap, Score | None]:
    """One method on one trace, stored; or a heatmap that says why there is none."""
    settings = MapSettings(method, {}, seed=int(judging.get("seed") or 0), scored=False)
    folder = trace.path.parent / FOLDER
    try:
        found, _ = explain_one(replay, selection, label_of(selection), settings, folder, shown=bar)
        heat = found.read()
    except Exception as error:  # whatever is wrong with a method, the others go on
        return not_made(replay, method, selection, error), None
    if heat.values is None:
        return heat, None
    return heat, found.score_taken_by(judging) or score_one(replay, found, shown=bar, **judging)


def _show(made: Comparison, *, wide: bool) -> None:
    rows = []
    for one in made.standings():
        cells = [_interval(value) for value in (one.gain, one.deletion, one.insertion)]
        cells += [
            f"{one.trusted} of {one.judged}" if one.judged else "–",
            f"{one.maps} of {len(made.rows)}",
            "–" if one.forward is None else f"{one.forward:.0f} + {one.backward:.0f}",
            "–" if one.seconds is None else f"{one.seconds:.2f}",
        ]
        rows.append([one.method, *cells])
    say("")
    left_out = show_table(_COLUMNS, rows, first=_IMPORTANCE, wide=wide)
    for one in made.standings():
        for reason, count in one.left_out.items():
            note(f"{one.method}: {count} of {one.judged} scores enter no mean: {reason}")
    if len(made.rows) > 1:
        say(("Means over the traces with 95 % bootstrap intervals; gain is insertion − deletion.", "dim"))
    else:
        say(("Gain is insertion − deletion: 0 for a random map, at best close to 1.", "dim"))
    if (middle := made.center_gain) is not None:
        say((f"A blob in the middle of the image, made without looking, has a gain of {middle:.3f}.", "dim"))
    if left_out:
        say((f"Not shown here: {', '.join(left_out)}; --wide shows them.", "dim"))


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    if interval.n == 1:
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _record(made: Comparison, traces: Sequence[Trace], judging: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison for programs."""
    return {
        "page": str(made.path),
        "grid": judging["grid"],
        "center_gain": made.center_gain,
        "judged": dict(judging),
        "methods": [
            {
                "method": one.method,
                **{name: _bounds(getattr(one, name)) for name in ("gain", "deletion", "insertion")},
                "maps": one.maps,
                "judged": one.judged,
                "trusted": one.trusted,
                "left_out": dict(one.left_out),
                "forward": one.forward,
                "backward": one.backward,
                "seconds": one.seconds,
                "reasons": list(one.reasons),
            }
            for one in made.standings()
        ],
        "traces": [
            {
                "trace": trace.path.name,
                "row": trace.row,
                "trace_id": trace.trace_id,
                "answer": trace.answer.strip(),
                "maps": [
                    {
                        "method": method,
                        "tokens": list(heat.selection.indices),
                        "reason": heat.reason,
                        "passes": heat.provenance.get("passes"),
                        "seconds": heat.provenance.get("seconds"),
                        "score": None if score is None else score.to_dict(),
                    }
                    for method, heat, score in zip(made.methods, row.heats, row.scores, strict=True)
                    if heat is not None
                ],
            }
            for trace, row in zip(traces, made.rows, strict=True)
        ],
    }


def _bounds(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    bounds = {"mean": interval.estimate, "low": interval.low, "high": interval.high}
    return {**bounds, "n": interval.n, "left_out": interval.missing}
