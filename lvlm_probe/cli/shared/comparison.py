"""Several methods on the same answers: explained, scored on one grid, shown as a table, and put on a page.

This is ``lvlm-probe evaluate --methods``. Maps and scores are stored as ``explain`` stores them, one file each, so an
interrupted run goes on with what is missing. This module imports torch; the command imports it when it runs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_probe.cli.shared.inputs import ReplayModels, alternatives, baseline_from
from lvlm_probe.cli.shared.maps import label_of
from lvlm_probe.cli.shared.options import Comparing
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
    tell,
)
from lvlm_probe.errors import ProbeError, TraceError
from lvlm_probe.escaping import counted
from lvlm_probe.explainers import methods as known_methods
from lvlm_probe.explainers import needs_of
from lvlm_probe.explainers.explaining import check_search
from lvlm_probe.heatmap import Heatmap
from lvlm_probe.heatmap_store import (
    FOLDER,
    MapFile,
    MapSettings,
    explain_one,
    is_map,
    map_name,
    not_made,
    read_record,
    score_one,
    write_record,
)
from lvlm_probe.importing.meter import traces_in
from lvlm_probe.metrics import Interval, Score
from lvlm_probe.pages import Comparison, compare
from lvlm_probe.planning import expected as expected_seconds
from lvlm_probe.planning import pace
from lvlm_probe.progress import roughly
from lvlm_probe.replaying import Replay
from lvlm_probe.selection import TokenSelection, select_tokens
from lvlm_probe.trace import Trace
from lvlm_probe.video import ClipHeatmap

_GRID = 32
_LONG = 30.0
"""Seconds from which a method is announced before it runs."""
_PAGE_EVERY = 60.0
"""Seconds, at least, between two pages of what is there so far."""
_PAGE = "comparison.html"
_COLUMNS = ("method", "gain ↑", "deletion ↓", "insertion ↑", "trusted", "maps", "passes", "seconds")
_IMPORTANCE = (0, 1, 4, 2, 3, 5, 6, 7)


def compare_methods(
    paths: Sequence[Path],
    asked: Comparing,
    models: ReplayModels,
    *,
    baseline: str | None,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Explain and score the traces behind ``paths`` by every method that is asked for; print means, write the page.

    Quick methods come first, on all traces. The page is written anew while slow ones go on, so that there is one of
    what is finished whenever the work ends.

    Args:
        asked: the methods, what every map explains, and the page.
        models: what the traces are replayed on.
        baseline: the option of this name.
        as_json: print the comparison for programs.
        options: of ``evaluate``; the grid is 32 where it leaves it open.

    Raises:
        ProbeError: no traces there, an unknown method, or a page that exists. A method that cannot run on a trace is no
            error: its reason stands in its place.
    """
    traces = _traces(paths)
    page = asked.out or (paths[0] if paths[0].is_dir() else paths[0].parent) / _PAGE
    _refuse_finished(page, overwrite=asked.overwrite)
    judging = {**options, "grid": options.get("grid") or _GRID}
    work = _Work(traces, _methods(asked.methods or ""), judging, page)
    selected = {"words": asked.words or None, "against": alternatives(asked.against)}
    own_baseline = baseline_from(baseline, video=all(trace.clips for trace in traces))
    opened = _Opened(models, selected, own_baseline, asked.search_dtype)
    try:
        for again, group in enumerate(work.in_order(opened)):
            for number, trace in enumerate(traces):
                answer = opened.of(trace)
                if not (as_json or again):
                    said = f"trace {number + 1} of {len(traces)}  "
                    say((said, "dim"), one_line(trace.answer, 300))
                for method in group:
                    work.do(number, method, answer)
    except KeyboardInterrupt:
        work.write()
        where = f"; the page so far: {stored_path(page)}" if work.made else ""
        raise stop(
            f"stopped; {work.maps} finished maps are kept beside their traces, and the same command goes on{where}"
        ) from None
    with stage("writing the page"):
        record = work.write(finished=True)
    if asked.open_it:
        open_page(page)
    if as_json:
        print_json(record)
        return
    made = work.comparison
    assert made is not None
    _show(made, wide=asked.wide)
    for method, reason in work.failed.items():
        count = sum(heat.method == method and heat.values is None for heat, _ in work.made.values())
        where = "any trace" if count == len(traces) else f"{count} of {len(traces)} traces"
        note(f"{method} made no map on {where}: {reason}")
    say("page:    ", (stored_path(page), "bold"))
    say("scores:  ", stored_path(page.with_suffix(".json")))


@dataclass(frozen=True)
class _Answer:
    """A trace that is being explained.

    Attributes:
        search_dtype: number format that methods search in.
        shared: what methods that are judged alike share (``evaluate``).
    """

    trace: Trace
    replay: Replay
    selection: TokenSelection
    search_dtype: str | None
    shared: dict[Any, Any]


class _Opened:
    """The answers, one open at a time: a replay holds what it has worked out."""

    def __init__(
        self, models: ReplayModels, selected: Mapping[str, Any], baseline: Any, search_dtype: str | None
    ) -> None:
        self._models, self._selected, self._baseline, self._search_dtype = models, selected, baseline, search_dtype
        self._last: _Answer | None = None

    def of(self, trace: Trace) -> _Answer:
        if self._last is None or self._last.trace is not trace:
            replay = self._models.replay(trace, self._baseline)
            check_search(replay, self._search_dtype)
            selection = select_tokens(replay, **self._selected)
            self._last = _Answer(trace, replay, selection, self._search_dtype, {})
        return self._last


class _Work:
    """The maps of a comparison as they are made, and the page of those that are there."""

    def __init__(self, traces: Sequence[Trace], methods: Sequence[str], judging: Mapping[str, Any], page: Path) -> None:
        self._traces, self._methods, self._judging, self._page = traces, methods, judging, page
        self.made: dict[tuple[int, str], tuple[Heatmap | ClipHeatmap, Score | None]] = {}
        self.failed: dict[str, str] = {}
        self.comparison: Comparison | None = None
        self._expected: dict[str, float | None] = {}
        self._due, self._changed = time.monotonic() + _PAGE_EVERY, False

    @property
    def maps(self) -> int:
        """How many maps there are."""
        return sum(heat.values is not None for heat, _ in self.made.values())

    def in_order(self, opened: _Opened) -> list[list[str]]:
        """The methods, quick ones first, in groups that go over all traces one after the other.

        What all of it will take is told before, from a few timed passes over the first trace.
        """
        first = opened.of(self._traces[0])
        missing = [name for name in self._methods if not _is_finished(first, name, self._judging)]
        if len(missing) < 2 or not isinstance(first.replay, Replay):  # passes of a server are not ours to spend
            return [list(self._methods)]
        try:
            with stage("timing a few passes"):
                found = pace(first.replay)
                searching = found
                if first.search_dtype is not None:
                    searching = pace(first.replay, search_dtype=first.search_dtype)
        except ProbeError:
            return [list(self._methods)]  # whatever is wrong, methods say it themselves
        expected = expected_seconds(first.replay, missing, searching)
        judging = found.of(_points(self._judging), at_once=16) or 0.0
        self._expected = {name: None if one is None else one + judging for name, one in expected.items()}
        known = {name: one for name, one in self._expected.items() if one is not None}
        mean = sum(known.values()) / max(1, len(known))
        # What cannot be told counts as slow.
        slow = [name for name in missing if not known.get(name, math.inf) <= max(mean, 2 * judging)]
        quick = [name for name in self._methods if name not in slow]
        order = {name: known.get(name, math.inf) for name in missing}
        groups = [sorted(group, key=lambda name: order.get(name, 0.0)) for group in (quick, slow)]
        tell(self._forecast([name for name in quick if name in missing], groups[1]))
        return [group for group in groups if group]

    def _forecast(self, quick: Sequence[str], slow: Sequence[str]) -> str:
        def taken(names: Sequence[str]) -> float:
            return len(self._traces) * sum(self._expected[name] or 0.0 for name in names)

        whole = f"about {roughly(taken([*quick, *slow]))} for {counted(len(quick) + len(slow), 'method')}"
        whole += f" on {counted(len(self._traces), 'answer')}, judging included"
        if quick and slow:
            whole += f": {counted(len(quick), 'quick one')} first, {roughly(taken(quick))}, then {', '.join(slow)}"
        unknown = [name for name in slow if self._expected[name] is None]
        return whole + (f" (not counted, as it cannot be told: {', '.join(unknown)})" if unknown else "")

    def do(self, number: int, method: str, answer: _Answer) -> None:
        """Make and judge one map, or find it finished; say what came of it."""
        seconds = self._expected.get(method) or 0.0
        if seconds >= _LONG:
            tell(f"{method}: about {roughly(seconds)}")
        heat, score = _one(answer, method, self._judging)
        self.made[number, method] = heat, score
        self._changed = True
        if heat.values is None:
            self.failed.setdefault(method, str(heat.reason))
        done = f"{len(self.made)} of {len(self._methods) * len(self._traces)}"
        tell(f"{method}: {_in_a_line(heat, score)} ({done})")
        began = time.monotonic()
        if began >= self._due:
            self.write()
            # Drawing all maps anew takes a tenth of the time at most.
            now = time.monotonic()
            self._due = now + max(_PAGE_EVERY, 10 * (now - began))

    def write(self, *, finished: bool = False) -> dict[str, Any] | None:
        """Write the page and the scores of what is there; return the latter, ``None`` where there is nothing."""
        if not self.made or not (self._changed or finished):
            return None
        results = self._page.with_suffix(".json")
        if self.comparison is None:  # a page that a stop leaves without its scores is gone on with, too
            write_record(results, {"finished": False})
        rank = {name: place for place, name in enumerate(self._methods)}
        keys = sorted(self.made, key=lambda key: (key[0], rank[key[1]]))
        title = (
            None if finished else f"Methods side by side, {len(keys)} of {len(rank) * len(self._traces)} maps so far"
        )
        self.comparison = compare(
            [self.made[key][0] for key in keys],
            scores=[self.made[key][1] for key in keys],
            out=self._page,
            overwrite=True,
            title=title,
        )
        begun = [self._traces[number] for number in dict.fromkeys(number for number, _ in keys)]
        record = {"finished": finished, **_record(self.comparison, begun, self._judging)}
        write_record(results, record)
        self._changed = False
        return record


def _refuse_finished(page: Path, *, overwrite: bool) -> None:
    """Raise ``ProbeError`` where a page is in the way; one that was stopped half-way is gone on with."""
    from lvlm_probe.pages.shell import refuse_existing

    refuse_existing(page, overwrite=True)  # a folder, or a name of no page
    results = page.with_suffix(".json")
    there = [file for file in (page, results) if file.exists()]
    if overwrite or not there:
        return
    with contextlib.suppress(ProbeError):
        if (read_record(results) or {}).get("finished") is False:
            return
    raise ProbeError(f"{there[0]} exists; add --overwrite, or name another page with --out")


def _points(judging: Mapping[str, Any]) -> int:
    """Images that it takes to judge a map, about."""
    points = (judging.get("steps") or 50) if judging["curve"].sampling != "adaptive" else 15
    return 2 + 2 * points


def _in_a_line(heat: Heatmap | ClipHeatmap, score: Score | None) -> str:
    if heat.values is None:
        return f"no map, {heat.reason}"
    passes, seconds = heat.provenance.get("passes") or {}, heat.provenance.get("seconds")
    said = ["not judged" if score is None or score.reason else f"gain {score.gain:.3f}"]
    said.append(f"{passes.get('forward', 0)} + {passes.get('backward', 0)} passes")
    said += [] if seconds is None else [f"{seconds:.1f} s"]
    said += [] if heat.coarse is None else [f"only {' × '.join(map(str, heat.values.shape))} cells"]
    return ", ".join(said)


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


def _settings(answer: _Answer, method: str, judging: Mapping[str, Any]) -> MapSettings:
    clips = answer.trace.clips
    image = clips[0].first if clips else 0
    return MapSettings(method, {}, judging["curve"].seed, answer.search_dtype, image, scored=False)


def _judged(answer: _Answer, judging: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a map is judged: one of a video on its own cells."""
    return {**judging, "grid": None} if answer.trace.clips else judging


def _is_finished(answer: _Answer, method: str, judging: Mapping[str, Any]) -> bool:
    """Whether the map is there, judged in this way."""
    selection = answer.selection
    name = map_name(answer.replay, selection, label_of(selection), _settings(answer, method, judging))
    found = MapFile(answer.trace.path.parent / FOLDER / name)
    return found.path.is_file() and is_map(found.path) and found.score_taken_by(_judged(answer, judging)) is not None


def _one(answer: _Answer, method: str, judging: Mapping[str, Any]) -> tuple[Heatmap | ClipHeatmap, Score | None]:
    """One method on one trace, stored; or a heatmap that says why there is none."""
    replay, selection = answer.replay, answer.selection
    folder = answer.trace.path.parent / FOLDER
    shown = functools.partial(bar, timed=False)
    try:
        label, settings = label_of(selection), _settings(answer, method, judging)
        found, _ = explain_one(replay, selection, label, settings, folder, shown=shown)
        heat = found.read()
    except Exception as error:  # whatever is wrong with a method, the others go on
        return not_made(replay, method, selection, error), None
    if heat.values is None:
        return heat, None
    judging = _judged(answer, judging)
    score = found.score_taken_by(judging)
    return heat, score or score_one(replay, found, shown=shown, shared=answer.shared, **judging)


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


def _in_words(judging: Mapping[str, Any]) -> dict[str, Any]:
    """How maps were judged, for programs."""
    curve = vars(judging["curve"])
    left_out = {"tie_orders"} | ({"sampling", "tolerance"} if curve["sampling"] == "full" else set())
    rest = {name: value for name, value in judging.items() if name != "curve"}
    return rest | {name: value for name, value in curve.items() if name not in left_out}


def _record(made: Comparison, traces: Sequence[Trace], judging: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison for programs."""
    return {
        "page": str(made.path),
        "grid": judging["grid"],
        "center_gain": made.center_gain,
        "judged": _in_words(judging),
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
                        "cells": None if heat.values is None else list(heat.values.shape),
                        "passes": heat.provenance.get("passes"),
                        "search": heat.provenance.get("search"),
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
