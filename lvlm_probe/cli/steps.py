"""``lvlm-probe steps``: an answer step by step, where the image comes in, and which step decides the conclusion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvlm_probe.cli.shared.inputs import ReplayModels, find_trace, output_directory
from lvlm_probe.cli.shared.options import Json, KeptIn, Loading, OpenPage, OptionalModel, Row, TraceOrDirectory
from lvlm_probe.cli.shared.terminal import bar, open_page, print_json, say, stage, stop, stored_path
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.causal import Steps
    from lvlm_probe.trace import Trace

_SHOWN = 48
"""Steps that get a small map on the page: those of the highest ratios."""


def steps(
    path: TraceOrDirectory,
    model: OptionalModel = None,
    check: Annotated[
        bool, typer.Option("--check", help="Ask the model what the conclusion loses without each step; 2 passes each.")
    ] = False,
    only: Annotated[
        list[int] | None,
        typer.Option("--step", metavar="N", min=1, help="With --check: this step only, from 1; repeatable."),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option("--words", metavar="TEXT", help="With --check: the conclusion. Default: the last step."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write a page: a strip of steps with their attention.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
    open_it: OpenPage = False,
    out: KeptIn = None,
    row: Row = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Show an answer step by step: how much of each the image is responsible for, and which one decides the end.

    Thoughts, sentences, numbered lines and tool calls are steps. Without --check no model is loaded. What is found is
    kept beside the maps of the trace, and lvlm-probe report shows it; a --check that is stopped begins again.

    Example:  lvlm-probe steps runs/demo --page steps.html
    Example:  lvlm-probe steps runs/demo --model demo --check
    """
    from lvlm_probe import causal
    from lvlm_probe.heatmap_store import FOLDER, keep_evidence

    if (only or words) and not check:
        raise ProbeError("--step and --words go with --check")
    if page is not None and page.is_file() and not overwrite:
        raise ProbeError(f"{page} exists; add --overwrite, or name another file with --page")
    trace = find_trace(path, row)
    folder = trace.explanations_dir if out is None else output_directory(out) / FOLDER
    if check:
        replay = ReplayModels(model, loading).replay(trace)
        with bar("checking steps") as progress:
            chosen = None if only is None else [number - 1 for number in only]
            try:
                found = causal.check_steps(replay, steps=chosen, tokens=words, progress=progress)
            except KeyboardInterrupt:
                raise stop(
                    "stopped; nothing was written, and what was kept before is as it was. The same command begins "
                    "again (2 passes for each step; --step N checks one)"
                ) from None
    else:
        found = causal.find_steps(trace)
    kept = keep_evidence(folder, trace, "steps", "checked" if check else "recorded", found.to_dict())
    written = None
    if page is not None or open_it:
        with stage("writing the page"):
            written = _page(trace, found, page or kept.with_suffix(".html"), overwrite=overwrite or page is None)
    if open_it and written is not None:
        open_page(written)
    if as_json:
        more = {"verdict": found.verdict, "sees": found.sees, "decides": found.decides}
        print_json({"trace": str(trace.path), **found.to_dict(), **more, "page": written and str(written)})
        return
    say(str(found))
    say(("kept in  ", "dim"), stored_path(kept))
    if written is not None:
        say("page: ", (stored_path(written), "bold"))


def _page(trace: Trace, found: Steps, out: Path, *, overwrite: bool) -> Path:
    """The strip with the attention of each step, which the trace holds; of many steps, of those with high ratios."""
    from lvlm_probe.explainers import explain
    from lvlm_probe.pages import report

    ranked = sorted(found, key=lambda step: -(step.from_image or 0.0))[:_SHOWN]
    spans = [step.span for step in found if step in ranked]
    whole = explain(trace, method="attention", progress=False)
    heats = [whole, *(explain(trace, method="attention", tokens=span, progress=False) for span in spans)]
    return report(heats, evidence=found, out=out, overwrite=overwrite)
