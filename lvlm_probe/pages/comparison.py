"""``compare``: several methods on the same answers, side by side on one page, each heatmap with its scores.

One row per answer (and set of explained words), one column per method. All heatmaps of a row explain the same words
against the same baseline and are ranked on one grid, so that a method with a coarse heatmap is judged as one with a
fine one is. A method that cannot run says why in its place; the others go on.

The page is made as the report is (``shell.py``): one file, nothing from the network, every string as text.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ReportError
from lvlm_probe.escaping import counted
from lvlm_probe.explainers import Tokens, needs_of, selected
from lvlm_probe.explainers import methods as known_methods
from lvlm_probe.explainers.explaining import Recipe, check_search, target_of
from lvlm_probe.explainers.scores import check_rules, whole_rule
from lvlm_probe.explainers.trace_only import RecordedAnswer
from lvlm_probe.heatmap import Heatmap, figure
from lvlm_probe.heatmap_store import not_made, reason_of
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.metrics import CurveRule, Score, evaluate
from lvlm_probe.metrics.similarity import grid_of
from lvlm_probe.pages.comparison_page import filled
from lvlm_probe.pages.ranking import Row, Standing, center_gain, standings
from lvlm_probe.pages.shell import Page, refuse_existing, write_text
from lvlm_probe.progress import ProgressChoice, show_progress
from lvlm_probe.selection import Against
from lvlm_probe.trace import Trace
from lvlm_probe.video import ClipHeatmap
from lvlm_probe.video.explaining import explain_by

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lvlm_probe.replaying import Replay
    from lvlm_probe.selection import TokenSelection

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
    "center",
)
"""What ``compare`` runs by default: the paper's four (Table 2), the cheap ones besides, and the floors."""

GRID = 32
_TITLE = "Methods side by side"

Methods = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A comparison of methods: the page's path, and everything on it. Wherever a path is wanted, it is the page's."""

    path: Path
    methods: tuple[str, ...]
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str | None:
        return self.path._repr_html_() if isinstance(self.path, Page) else None

    def __repr__(self) -> str:
        return f"<Comparison of {len(self.methods)} methods on {len(self.rows)} answers: {self.path}>"

    def figure(self, path: str | os.PathLike[str] | None = None, **look: Any) -> Figure:
        """A figure for print of all heatmaps with their scores and verdicts: answers below, methods beside each other.

        Args:
            path: where to save it (PDF, SVG, PNG or TIFF); by default nowhere.
            **look: ``width``, ``font_size``, ``columns``, … of ``heatmap.figure``.

        Raises:
            ImageError: a heatmap has no image at hand.
        """
        shown: list[Any] = [
            (dataclasses.replace(heat, provenance={**heat.provenance, "label": name}), score)
            for row in self.rows
            for name, heat, score in zip(self.methods, row.heats, row.scores, strict=True)
            if heat is not None
        ]
        return figure([heat for heat, _ in shown], scores=[score for _, score in shown], out=path, **look)

    @property
    def center_gain(self) -> float | None:
        """Gain of a blob in the middle of the image, mean over the answers; ``None`` where it was not taken."""
        return center_gain(self.rows)

    def standings(self) -> list[Standing]:
        """The methods over all rows, highest mean gain first, methods without a score last."""
        return standings(self.methods, self.rows)


@naming_arguments
def compare(
    sources: Replay | Trace | Heatmap | ClipHeatmap | Iterable[Replay | Trace | Heatmap | ClipHeatmap],
    methods: Methods | None = None,
    *,
    scores: Iterable[Score | None] | None = None,
    labels: Sequence[str] | None = None,
    out: str | os.PathLike[str] = "compare.html",
    title: str | None = None,
    tokens: Tokens | None = None,
    against: Against | None = None,
    image: int = 0,
    grid: int | Sequence[int] | None = GRID,
    steps: int | None = None,
    seed: int = 0,
    search_dtype: str | None = None,
    overwrite: bool | None = None,
    progress: ProgressChoice = None,
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
        tokens, against, image, seed, search_dtype: As for ``explain``; the same for all methods, but for a label that
            has ``search_dtype`` among its parameters. An image that is a frame of a video stands for the video, and
            methods that do not explain by one say so in their place.
        grid, steps: As for ``evaluate``; ``grid=None`` ranks each heatmap's own cells, as videos are ranked anyway.
        overwrite: Replace ``out`` if it exists; by default only a file that this package wrote, so that a notebook cell
            can run again.
        progress: Called with (done, total) heatmaps; by default a bar where a person waits, ``False``
            for none.

    Returns:
        The comparison: its path, its heatmaps and scores, and its ``standings()``.

    Raises:
        ReportError: Nothing to compare, things that are neither of the three, or mixed; ``out`` exists or cannot be
            written.
        ExplainError: There is no method of that name, ``grid``, ``steps`` or ``seed`` is out of its range, or an answer
            cannot be searched in ``search_dtype``.
        SelectionError: An answer does not contain the words ``tokens``.
    """
    items: list[Any] = list(sources) if isinstance(sources, Iterable) else [sources]
    path = Path(out)
    refuse_existing(path, overwrite=overwrite)
    if not items:
        raise ReportError("compare() was given nothing: pass replays, traces or heatmaps")
    ready = [isinstance(item, Heatmap | ClipHeatmap) for item in items]
    if any(ready) and not all(ready):
        raise ReportError("compare() takes replays and traces, or heatmaps, not both in one call")
    if all(ready):
        if methods is not None:
            raise ReportError("heatmaps have been made already: leave methods out, or pass replays")
        columns, rows = _gathered(items, scores, labels)
    else:
        if scores is not None or labels is not None:
            raise ReportError("scores and labels go with heatmaps; replays are judged here")
        check_rules("compare", steps=whole_rule(steps, or_none=True), seed=whole_rule(seed, 0))
        if grid is not None:
            grid = grid_of(grid)
        usual = Recipe(seed=seed, search_dtype=search_dtype)
        columns, rows = _made(items, methods, usual, _Settings(image, grid, steps, tokens, against), progress)
    text = filled(columns, rows, standings(columns, rows), title or _TITLE)
    said = f"{counted(len(columns), 'method')} on {counted(len(rows), 'answer')}"
    return Comparison(write_text(path, text, overwrite=overwrite, said=said), tuple(columns), tuple(rows))


# -------------------------------------------------------------------------------------------------- heatmaps and scores


@dataclass(frozen=True)
class _Settings:
    """Settings that are the same for all methods."""

    image: int
    grid: int | Sequence[int] | None
    steps: int | None
    tokens: Tokens | None
    against: Against | None


def _made(
    items: Sequence[Any], methods: Methods | None, usual: Recipe, settings: _Settings, progress: ProgressChoice
) -> tuple[list[str], list[Row]]:
    """Every method on every replay or trace."""
    for item in items:
        if not (isinstance(item, Trace) or (hasattr(item, "log_probs") and hasattr(item, "strengthened"))):
            raise ReportError(
                f"compare() takes replays (probe.replay(trace, model, processor)), traces or heatmaps; got a "
                f"{type(item).__name__}"
            )
    for item in items:
        check_search(item, usual.search_dtype)
    chosen = _chosen(methods, usual, live=any(not isinstance(item, Trace) for item in items))
    # Before the work, so that words that are not in an answer are told at once.
    answers: list[Any] = [RecordedAnswer(item) if isinstance(item, Trace) else item for item in items]
    image = settings.image
    for answer in answers:
        if not 0 <= image < answer.n_images:
            raise ReportError(f"image={image}, but {answer.trace_id} has {answer.n_images} image(s), counted from 0")
    selections = [selected(answer, settings.tokens, settings.against) for answer in answers]
    rows = []
    total, done = len(items) * len(chosen), 0
    with show_progress(progress, "explaining and judging") as advance:
        if advance is not None:
            advance(0, total)
        for item, selection in zip(items, selections, strict=True):
            if selection and not isinstance(item, Trace):
                item = item.strengthened(selection.decided)  # once: all methods explain against one baseline
            pairs = []
            for name, recipe in chosen.items():
                pairs.append(_one(item, name, recipe, selection, settings))
                done += 1
                if advance is not None:
                    advance(done, total)
            rows.append(Row(*zip(*pairs, strict=True)))
    return list(chosen), rows


def _one(
    item: Any, name: str, recipe: Recipe, selection: TokenSelection, settings: _Settings
) -> tuple[Heatmap | ClipHeatmap, Score | None]:
    """One method on one answer. Whatever goes wrong in it is told in its place and costs the others nothing."""
    target = target_of(item, settings.image)
    try:
        asked: dict[str, Any] = {"tokens": selection, "strengthen": False, "progress": False, **recipe.asked}
        heat = explain_by(item, target=target, **asked)
    except Exception as error:
        heat = not_made(item, recipe.method, selection, error, image=settings.image, params=recipe.params)
    if name != heat.method:
        heat = dataclasses.replace(heat, provenance={**heat.provenance, "label": name})
    if isinstance(item, Trace) or heat.values is None:
        return heat, None
    try:
        grid = settings.grid if isinstance(target, int) else None  # a video is ranked on the heatmap's own cells
        curve = CurveRule(seed=recipe.seed)
        return heat, evaluate(heat, item, grid=grid, steps=settings.steps, curve=curve, progress=False)
    except Exception as error:
        return dataclasses.replace(heat, provenance={**heat.provenance, "not_judged": reason_of(error)}), None


def _chosen(methods: Methods | None, usual: Recipe, *, live: bool) -> dict[str, Recipe]:
    """Label → how its maps are made. Raises ``ExplainError`` for an unknown name."""
    everything = known_methods()  # plugins register when they are looked for
    if methods is None:
        alone = [name for name in everything if not {"passes", "gradients"} & needs_of(name)]
        methods = [name for name in DEFAULT_METHODS if name in everything] if live else alone
    elif methods == "all":
        methods = everything
    elif isinstance(methods, str):
        methods = [methods]
    settings = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    chosen: dict[str, Recipe] = {}
    for label, params in settings.items():
        params = dict(params)
        method = str(params.pop("method", label))
        needs_of(method)
        chosen[str(label)] = dataclasses.replace(usual, method=method, params=params)
    if not chosen:
        raise ReportError("compare() was given no methods; leave methods out for a usual set, or name some")
    return chosen


def _gathered(
    heats: Sequence[Heatmap | ClipHeatmap], scores: Iterable[Score | None] | None, labels: Sequence[str] | None
) -> tuple[list[str], list[Row]]:
    """Heatmaps that are there already, in rows of one answer and one set of words."""
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
    found: dict[tuple[Any, ...], dict[str, tuple[Heatmap | ClipHeatmap, Score | None]]] = {}
    for number, (heat, score, name) in enumerate(zip(heats, given, names, strict=True)):
        trace_id = heat.provenance.get("trace_id")
        words = heat.selection.indices, heat.selection.score
        row = found.setdefault((trace_id or f"untraced {number}", heat.image_index, words), {})
        if name in row:
            raise ReportError(
                f"two heatmaps of the same words are called {name!r}: tell them apart with labels=[…], one per heatmap"
            )
        row[name] = heat, score
    pairs = [[row.get(name, (None, None)) for name in columns] for row in found.values()]
    return columns, [Row(*zip(*row, strict=True)) for row in pairs]
