"""``compare``: several methods on the same answers, side by side on one page, each heatmap with its scores.

One row per answer (and set of explained words), one column per method. All heatmaps of a row explain the same words
against the same baseline and are ranked on one grid, so that a method with a coarse heatmap is judged as one with a
fine one is. A method that cannot run says why in its place; the others go on.

The page is made as the report is (``lvlm_probe.pages``): one file, nothing from the network, every string as text.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ProbeError, ReportError
from lvlm_probe.pages import _refuse, _write
from lvlm_probe.pages.comparison_page import filled
from lvlm_probe.pages.standings import Standing, standings

if TYPE_CHECKING:
    from lvlm_probe.explainers import Tokens
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.metrics import Score
    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection
    from lvlm_probe.trace import Trace

__all__ = ["DEFAULT_METHODS", "Comparison", "Row", "Standing", "compare"]

DEFAULT_METHODS = (
    "igos++",
    "integrated_gradients",
    "input_gradient",
    "gradcam",
    "tmm",
    "iia",
    "relative_attention",
    "tam",
    "random",
)
"""What ``compare`` runs by default: the paper's four (Table 2), the cheap ones besides, and chance."""

GRID = 32
DEFAULT_TITLE = "Methods side by side"


Methods = str | Sequence[str] | Mapping[str, Mapping[str, Any]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One answer, or one set of its words, under every method.

    Attributes:
        heats: One heatmap per method, in the order of ``Comparison.methods``. One that could not be made has no values
            and its reason; ``None`` where none was given.
        scores: Their scores, ``None`` where a heatmap was not judged.
    """

    heats: tuple[Heatmap | None, ...]
    scores: tuple[Score | None, ...]


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` made: the page's path, and everything on it."""

    path: Path
    methods: tuple[str, ...]
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return f"<Comparison of {len(self.methods)} methods on {len(self.rows)} answers: {self.path}>"

    def standings(self) -> list[Standing]:
        """The methods over all rows, highest mean gain first, methods without a score last."""
        return standings(self.methods, self.rows)


def compare(
    sources: Replay | Trace | Heatmap | Iterable[Replay | Trace | Heatmap],
    methods: Methods | None = None,
    *,
    scores: Iterable[Score | None] | None = None,
    labels: Sequence[str] | None = None,
    out: str | os.PathLike[str] = "compare.html",
    title: str | None = None,
    tokens: Tokens | None = None,
    image: int = 0,
    grid: int | Sequence[int] | None = GRID,
    steps: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Explain answers by several methods, judge every heatmap, and write one HTML page with all of them.

    ::

        probe.compare([replay], methods=["igos++", "gradcam", "tmm"], out="compare.html")

    Args:
        sources: One or several replays; or traces, for methods that run on a trace alone (nothing is judged then); or
            heatmaps that are there already, of any number of traces and methods.
        methods: Names; ``"all"``; or labels with parameters, such as ``{"igos++": {}, "two masks": {"method": "igos++",
            "masks": 2}}``, where the label is the method unless ``method`` says another. By default
            ``DEFAULT_METHODS``, and for traces alone those that can run there.
        scores: With heatmaps only: what ``evaluate`` said of each, in the same order; ``None`` for one not judged. Take
            them on one grid, ``evaluate(heat, replay, grid=32)``; the page says which it was.
        labels: With heatmaps only: the column of each, in the same order; by default its method.
        out: The file to write. Missing folders are made.
        title: Headline of the page.
        tokens, image, seed: As for ``explain``; the same for all methods.
        grid, steps: As for ``evaluate``; ``grid=None`` ranks each heatmap's own cells.
        overwrite: Replace ``out`` if it exists.
        progress: Called with (done, total) heatmaps; by default a bar on the terminal, if there is one.

    Returns:
        The comparison: its path, its heatmaps and scores, and its ``standings()``.

    Raises:
        ReportError: Nothing to compare, things that are neither of the three, or mixed; ``out`` exists or cannot be
            written.
        ExplainError: There is no method of that name.
        SelectionError: An answer does not contain the words ``tokens``.
    """
    from lvlm_probe.heatmap import Heatmap

    items: list[Any] = list(sources) if isinstance(sources, Iterable) else [sources]
    path = Path(out)
    _refuse(path, overwrite=overwrite)
    if not items:
        raise ReportError("compare() was given nothing: pass replays, traces or heatmaps")
    ready = [isinstance(item, Heatmap) for item in items]
    if any(ready) and not all(ready):
        raise ReportError("compare() takes replays and traces, or heatmaps, not both in one call")
    if all(ready):
        if methods is not None:
            raise ReportError("heatmaps have been made already: leave methods out, or pass replays")
        columns, rows = _gathered(items, scores, labels)
    else:
        if scores is not None or labels is not None:
            raise ReportError("scores and labels go with heatmaps; replays are judged here")
        columns, rows = _made(items, methods, tokens, image, seed, grid, steps, progress)
    text = filled(columns, rows, standings(columns, rows), title or DEFAULT_TITLE)
    _write(path, text, overwrite=overwrite)
    return Comparison(path, tuple(columns), tuple(rows))


# -------------------------------------------------------------------------------------------------- heatmaps and scores


def _made(
    items: Sequence[Any],
    methods: Methods | None,
    tokens: Tokens | None,
    image: int,
    seed: int,
    grid: int | Sequence[int] | None,
    steps: int | None,
    progress: Progress | None,
) -> tuple[list[str], list[Row]]:
    """Every method on every replay or trace."""
    from lvlm_probe.explainers import selected
    from lvlm_probe.explainers.trace_only import RecordedAnswer
    from lvlm_probe.trace import Trace

    for item in items:
        if not (isinstance(item, Trace) or (hasattr(item, "log_probs") and hasattr(item, "strengthened"))):
            raise ReportError(
                f"compare() takes replays (probe.replay(trace, model, processor)), traces or heatmaps; got a "
                f"{type(item).__name__}"
            )
    chosen = _chosen(methods, live=any(not isinstance(item, Trace) for item in items))
    # Before the work, so that words that are not in an answer are told at once.
    answers: list[Any] = [RecordedAnswer(item) if isinstance(item, Trace) else item for item in items]
    for answer in answers:
        if not 0 <= image < answer.n_images:
            raise ReportError(f"image={image}, but {answer.trace_id} has {answer.n_images} image(s), counted from 0")
    selections = [selected(answer, tokens) for answer in answers]
    rows = []
    with _bar(progress, len(items) * len(chosen)) as advance:
        for item, selection in zip(items, selections, strict=True):
            live = not isinstance(item, Trace)
            if live and selection:
                item = item.strengthened(selection.decided)  # once: all methods explain against one baseline
            heats: list[Heatmap | None] = []
            scores: list[Score | None] = []
            for name, (method, params) in chosen.items():
                heat, score = _one(item, name, method, params, selection, image, seed, grid, steps, live)
                heats.append(heat)
                scores.append(score)
                advance()
            rows.append(Row(tuple(heats), tuple(scores)))
    return list(chosen), rows


def _one(
    item: Any, name: str, method: str, params: Mapping[str, Any], selection: TokenSelection, image: int, seed: int,
    grid: int | Sequence[int] | None, steps: int | None, live: bool,
) -> tuple[Heatmap, Score | None]:  # fmt: skip
    """One method on one answer. Whatever goes wrong in it is told in its place and costs the others nothing."""
    from lvlm_probe.explainers import explain
    from lvlm_probe.metrics import evaluate

    try:
        heat = explain(item, method=method, tokens=selection, image=image, seed=seed, strengthen=False, **params)
    except Exception as error:
        heat = not_made(item, method, selection, error, image=image, params=params)
    if name != heat.method:
        heat = dataclasses.replace(heat, provenance={**heat.provenance, "label": name})
    if not live or heat.values is None:
        return heat, None
    try:
        return heat, evaluate(heat, item, grid=grid, steps=steps, seed=seed)
    except Exception as error:
        return dataclasses.replace(heat, provenance={**heat.provenance, "not_judged": _reason(error)}), None


def not_made(
    item: Replay | Trace,
    method: str,
    selection: TokenSelection,
    error: Exception,
    *,
    image: int = 0,
    params: Mapping[str, Any] | None = None,
) -> Heatmap:
    """In the place of a heatmap that could not be made: one without values, whose reason is the error."""
    from lvlm_probe.heatmap import Heatmap
    from lvlm_probe.trace import Trace

    sizes = [picture.size for picture in item.images] if isinstance(item, Trace) else item.image_sizes
    return Heatmap(
        None,
        sizes[image],
        image,
        selection=selection,
        method=method,
        params=dict(params or {}),
        provenance={"trace_id": item.trace_id, "baseline": dict(item.baseline or {})},
        reason=_reason(error),
        trace=item if isinstance(item, Trace) else item.trace,  # type: ignore[arg-type]
    )


def _reason(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return text if isinstance(error, ProbeError) else f"something unexpected happened, {type(error).__name__}: {text}"


def _chosen(methods: Methods | None, *, live: bool) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Label → method and parameters. Raises ``ExplainError`` for an unknown name."""
    from lvlm_probe.explainers import methods as known
    from lvlm_probe.explainers import needs_of

    if methods is None:
        names = known()
        alone = [name for name in names if not {"passes", "gradients"} & needs_of(name)]
        methods = [name for name in DEFAULT_METHODS if name in names] if live else alone
    elif methods == "all":
        methods = known()
    elif isinstance(methods, str):
        methods = [methods]
    settings = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    chosen: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for label, params in settings.items():
        params = dict(params)
        method = str(params.pop("method", label))
        known()  # plugins register when they are looked for
        needs_of(method)
        chosen[str(label)] = method, params
    if not chosen:
        raise ReportError("compare() was given no methods; leave methods out for a usual set, or name some")
    return chosen


class _bar:
    """Counts heatmaps for a caller, or on the terminal."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __enter__(self) -> Callable[[], None]:
        if self.progress is None:
            from tqdm import tqdm

            # disable=None: nothing where there is no terminal.
            self.shown = tqdm(total=self.total, unit="heatmap", disable=None, leave=False)
        else:
            self.progress(0, self.total)
        return self._advance

    def _advance(self) -> None:
        self.done += 1
        if self.progress is None:
            self.shown.update()
        else:
            self.progress(self.done, self.total)

    def __exit__(self, *error: object) -> None:
        if self.progress is None:
            self.shown.close()


def _gathered(
    heats: Sequence[Heatmap], scores: Iterable[Score | None] | None, labels: Sequence[str] | None
) -> tuple[list[str], list[Row]]:
    """Heatmaps that are there already, in rows of one answer and one set of words."""
    from lvlm_probe.metrics import Score

    given = [None] * len(heats) if scores is None else list(scores)
    names = [heat.method or "no name" for heat in heats] if labels is None else [str(label) for label in labels]
    for things, what in ((given, "scores"), (names, "labels")):
        if len(things) != len(heats):
            raise ReportError(
                f"compare() was given {len(heats)} heatmaps but {len(things)} {what}: pass one each, in the same order"
            )
    for score in given:
        if not (score is None or isinstance(score, Score)):
            raise ReportError(f"scores are what evaluate() returns, or None; got a {type(score).__name__}")
    columns = list(dict.fromkeys(names))
    places: dict[tuple[Any, ...], dict[str, tuple[Heatmap, Score | None]]] = {}
    for number, (heat, score, name) in enumerate(zip(heats, given, names, strict=True)):
        trace_id = heat.provenance.get("trace_id")
        row = places.setdefault((trace_id or f"untraced {number}", heat.image_index, heat.selection.indices), {})
        if name in row:
            raise ReportError(
                f"two heatmaps of the same words are called {name!r}: tell them apart with labels=[…], one per heatmap"
            )
        row[name] = heat, score
    rows = [
        Row(tuple(row[name][0] if name in row else None for name in columns),
            tuple(row[name][1] if name in row else None for name in columns))
        for row in places.values()
    ]  # fmt: skip
    return columns, rows
