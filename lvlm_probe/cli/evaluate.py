"""``lvlm-probe evaluate``: how good are the stored maps, or, with --methods, several methods on the same answers.

With --methods, every trace is explained by every method, scored on one grid, and shown in a table and on a page. Maps
and scores are stored as ``explain`` stores them, one file each, so an interrupted run goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.inputs import ReplayModels, baseline_from
from lvlm_probe.cli.shared.options import BaselineOption, Comparing, Json, Loading, Maps, OptionalModel
from lvlm_probe.cli.shared.servers import Served
from lvlm_probe.cli.shared.terminal import bar, print_json, stop
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.heatmap_store import MapFile

_TOLERANCE = 0.005
"""Of adaptive sampling: below what separates methods of one rank, for a quarter of the passes."""


@dataclass(frozen=True)
class Judging:
    """How maps are judged."""

    score: Annotated[
        str,
        typer.Option(
            "--score",
            autocompletion=choices("prob", "log"),
            help="prob: mean probability of the words; log: log-likelihood.",
        ),
    ] = "prob"
    auc: Annotated[
        str,
        typer.Option(
            "--auc",
            autocompletion=choices("trapezoid", "release"),
            help="trapezoid, or release: to compare with the paper's release.",
        ),
    ] = "trapezoid"
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Points on each curve. Default: 50.")] = None
    exact: Annotated[bool, typer.Option("--exact", help="The real processor on real composites; slower.")] = False
    grid: Annotated[
        int | None,
        typer.Option("--grid", min=1, help="Rank N × N cells instead of each map's own. With --methods: 32."),
    ] = None
    chance: Annotated[
        int, typer.Option("--chance", min=0, help="Also score this many random maps; the verdict must beat them.")
    ] = 0
    synergy: Annotated[
        bool,
        typer.Option("--synergy", help="Also score what image and question give together (F_syn); 11 passes more."),
    ] = False
    seed: Annotated[int, typer.Option("--seed", help="Of tie-breaking and random maps.")] = 0

    def options(self, *, comparing: Comparing, served: bool) -> dict[str, Any]:
        """Arguments of ``probe.evaluate``. Raises ``ExplainError`` for what it does not know."""
        from lvlm_probe.metrics import CurveRule

        curve = CurveRule(auc=self.auc, seed=self.seed)  # type: ignore[arg-type]  # it says what it knows
        if comparing.methods is not None and not comparing.full and self.steps is None and not curve.release:
            curve = dataclasses.replace(curve, sampling="adaptive", tolerance=_TOLERANCE)
        mode = "exact" if self.exact or served else "fast"  # a server is sent real images
        given = {"score": self.score, "steps": self.steps, "chance": self.chance, "grid": self.grid}
        return {**given, "curve": curve, "mode": mode, **({"synergy": True} if self.synergy else {})}


def evaluate(
    paths: Maps,
    model: OptionalModel = None,
    judging: Judging = Judging(),
    comparing: Comparing = Comparing(),
    baseline: BaselineOption = None,
    loading: Loading = Loading(),
    served: Served = Served(),
    as_json: Json = False,
) -> None:
    """Score stored maps by deletion and insertion, and say which not to trust. Stored scores are replaced.

    With --methods, explain every trace by several methods, quick ones first, score all on one grid, print means with
    95 % intervals, and write the page that compares them. What it will take is said before. What is finished is kept,
    on a page too: the same command again makes only what is missing.

    Example:  lvlm-probe evaluate runs/demo --exact --json
    Example:  lvlm-probe evaluate runs/demo --methods igos++,gradcam,tmm --out compare.html
    Example:  lvlm-probe evaluate runs/served --server http://gpu:8000 --methods rise,greedy
    """
    behind = served.open(model=model, against=comparing.against)
    options = judging.options(comparing=comparing, served=behind is not None)
    models = ReplayModels(model, loading, server=behind)
    if comparing.methods is not None:
        if judging.synergy:
            raise ProbeError("--synergy is of stored maps: leave --methods out")
        from lvlm_probe.cli.shared.comparison import compare_methods

        compare_methods(paths, comparing, models, baseline=baseline, as_json=as_json, options=options)
        return
    if comparing != Comparing():
        raise ProbeError(
            "--words, --against, --search-dtype, --out, --overwrite, --full, --wide and --open go with --methods: add "
            "it, e.g. --methods igos++,gradcam"
        )
    from lvlm_probe.cli.shared.maps import map_summary, show_map
    from lvlm_probe.heatmap_store import by_trace, find_maps, score_one

    found = find_maps(paths)
    of_traces = by_trace(found)
    own_baseline = baseline_from(baseline, video=all(trace.clips for trace, _ in of_traces))
    done: list[MapFile] = []
    try:
        for trace, items in of_traces:
            replay = models.replay(trace, own_baseline)
            for item in items:
                score_one(replay, item, shown=bar, **options)
                done.append(item)
                if not as_json:
                    show_map(item)
    except KeyboardInterrupt:
        raise stop(f"stopped; the scores of {len(done)} of {len(found)} maps are stored beside them") from None
    if as_json:
        print_json([{**map_summary(item), "score": _score_dict(item)} for item in done])


def _score_dict(item: MapFile) -> dict[str, Any] | None:
    score = item.score()
    return None if score is None else score.to_dict()
