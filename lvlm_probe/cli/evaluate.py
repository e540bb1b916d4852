"""``lvlm-probe evaluate`` and ``lvlm-probe report``: how good are the stored maps, and the page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.evaluate_methods import compare_methods
from lvlm_probe.cli.explain import map_summary, open_replay, show_map
from lvlm_probe.cli.shared.inputs import ReplayModels
from lvlm_probe.cli.shared.maps import MapFile, baseline_from, find_maps, score_one
from lvlm_probe.cli.shared.options import Attn, BaselineOption, Device, Dtype, Json, OptionalModel, TrustRemoteCode
from lvlm_probe.cli.shared.terminal import print_json, say, stage, stop, stored_path
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.trace import Trace

__all__ = ["evaluate", "report", "write_report"]

Maps = Annotated[
    list[Path], typer.Argument(metavar="PATH...", help="Maps, traces (their maps), or directories (all maps in them).")
]


def evaluate(
    paths: Maps,
    model: OptionalModel = None,
    score: Annotated[
        str, typer.Option("--score", help="prob: mean probability of the words; log: log-likelihood.")
    ] = "prob",
    auc: Annotated[
        str, typer.Option("--auc", help="trapezoid, or release: to compare with the paper's release.")
    ] = "trapezoid",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Points on each curve. Default: 50.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="The real processor on real composites; slower.")] = False,
    grid: Annotated[
        int | None,
        typer.Option("--grid", min=1, help="Rank N × N cells instead of each map's own. With --methods: 32."),
    ] = None,
    chance: Annotated[
        int, typer.Option("--chance", min=0, help="Also score this many random maps; the verdict must beat them.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of tie-breaking and random maps.")] = 0,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="Explain the traces by these methods first (commas between, or all), and compare them on one page.",
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option("--words", metavar="TEXT", help="With --methods: explain this word of every answer; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="With --methods: the page; scores as JSON beside it. Default: comparison.html beside the traces.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --methods: replace the page if it exists.")
    ] = False,
    baseline: BaselineOption = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score stored maps by deletion and insertion, and say which not to trust. Stored scores are replaced.

    With --methods, explain every trace by several methods, score all on one grid, print means with 95 % intervals, and
    write the page that compares them. What is finished is kept: the same command again makes only what is missing.

    Example:  lvlm-probe evaluate runs/demo --exact --json
    Example:  lvlm-probe evaluate runs/demo --methods igos++,gradcam,tmm --out compare.html
    """
    options: dict[str, Any] = {"score": score, "auc": auc, "steps": steps, "chance": chance, "seed": seed, "grid": grid}
    options["mode"] = "exact" if exact else "fast"
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "attn": attn, "trust_remote_code": trust_remote_code}
    if methods is not None:
        compare_methods(
            paths,
            methods,
            model=model,
            words=words,
            baseline=baseline,
            out=out,
            overwrite=overwrite,
            as_json=as_json,
            loading=loading,
            options=options,
        )
        return
    if words or out is not None or overwrite:
        raise ProbeError("--words, --out and --overwrite go with --methods: add it, e.g. --methods igos++,gradcam")
    found = find_maps(paths)
    by_trace: dict[tuple[Path, int], tuple[Trace, list[MapFile]]] = {}
    for item in found:
        trace = item.read().trace
        if trace is None:
            raise ProbeError(f"{item.path}: its trace is not beside it any more; put the trace file back")
        by_trace.setdefault((trace.path, trace.row), (trace, []))[1].append(item)
    own_baseline = baseline_from(baseline)
    done: list[MapFile] = []
    models = ReplayModels(model, **loading)
    try:
        for trace, items in by_trace.values():
            replay = open_replay(trace, *models.of(trace))
            if own_baseline is not None:
                replay = replay.over(own_baseline)
            for item in items:
                score_one(replay, item, **options)
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


def report(
    paths: Maps,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", help="Headline of the page.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write stored maps and their scores as one HTML page that needs no network. No model is loaded.

    Example:  lvlm-probe report runs/demo --out report.html
    """
    if out.is_file() and not overwrite:
        raise ProbeError(f"{out} exists; add --overwrite, or name another file with --out")
    found = find_maps(paths)
    page = write_report(found, out, title=title, overwrite=overwrite)
    if as_json:
        print_json({"report": str(page), "maps": [str(item.path) for item in found]})
    else:
        say("report: ", (stored_path(page), "bold"), f"  ({len(found)} map{'' if len(found) == 1 else 's'})")


def write_report(found: list[MapFile], out: Path, *, title: str | None = None, overwrite: bool = False) -> Path:
    """The page of stored maps."""
    from lvlm_probe.pages import report as write

    with stage("writing the report"):
        heats = [item.read() for item in found]
        return write(heats, scores=[item.score() for item in found], out=out, title=title, overwrite=overwrite)
