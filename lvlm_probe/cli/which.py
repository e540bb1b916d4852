"""``lvlm-probe which``: which image, turn or text of the prompt speaks for the answer, and image or question."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.inputs import ReplayModels, baseline_from, find_trace, output_directory
from lvlm_probe.cli.shared.options import (
    BaselineOption,
    Json,
    KeptIn,
    Loading,
    OptionalModel,
    Row,
    TraceOrDirectory,
    Words,
)
from lvlm_probe.cli.shared.terminal import bar, print_json, say, stage, stop, stored_path
from lvlm_probe.errors import ProbeError


def which(
    path: TraceOrDirectory,
    model: OptionalModel = None,
    parts: Annotated[
        str | None,
        typer.Option(
            "--parts",
            autocompletion=choices("images", "turns", "all", "modalities"),
            help="images, turns (of the conversation), all (both), or modalities: image, question or both together. "
            "Default: images where there are several, else modalities.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="TEXT", help="A text of the prompt as a part, in place of --parts; repeatable."),
    ] = None,
    words: Words = None,
    question: Annotated[
        str | None,
        typer.Option("--question", metavar="TEXT", help="With modalities: the question, where none was recorded."),
    ] = None,
    orders: Annotated[
        int, typer.Option("--orders", min=2, help="Of more than 10 parts: how many random orders are run.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the orders.")] = 0,
    out: KeptIn = None,
    row: Row = None,
    baseline: BaselineOption = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Show how much each image, turn or text of the prompt speaks for the answer, or the image against the question.

    Shares are Shapley values in nats, exact up to 10 parts, which take 2^N passes forward; modalities take four. What
    is found is kept beside the maps of the trace, and lvlm-probe report shows it. Stopped, the same command goes on.

    Example:  lvlm-probe which runs/pages --model path/to/model --words red
    Example:  lvlm-probe which runs/demo --parts modalities
    """
    from lvlm_probe import causal
    from lvlm_probe.cli.shared.maps import label_of
    from lvlm_probe.explainers import selected
    from lvlm_probe.heatmap_store import FOLDER, evidence_path, going_on, keep_evidence

    if parts not in (None, "images", "turns", "all", "modalities"):
        raise ProbeError(f"--parts is images, turns, all or modalities; got {parts!r}")
    if text and parts:
        raise ProbeError("give either --parts or --text")
    trace = find_trace(path, row)
    folder = trace.explanations_dir if out is None else output_directory(out) / FOLDER
    own_baseline = baseline_from(baseline, video=bool(trace.clips))
    replay = ReplayModels(model, loading).replay(trace, own_baseline)
    parts = parts or ("images" if replay.n_images > 1 and not trace.clips else "modalities")
    found: causal.PartShares | causal.Modalities
    kind = "modalities" if parts == "modalities" and not text else "parts"
    label = " ".join(["texts" if text else parts, label_of(selected(replay, words)), baseline or ""]).strip()
    if kind == "modalities":
        with stage("image and question"):
            found = causal.modalities(replay, tokens=words, question=question)
    else:
        asked: dict[str, Any] = {"tokens": words, "orders": orders, "seed": seed}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (
                bar("which parts") as progress,
                going_on(replay, evidence_path(folder, trace, kind, label)) as source,
            ):
                found = causal.which_parts(source, text or parts, progress=progress, **asked)
        except KeyboardInterrupt:
            raise stop("stopped; what was found is kept, and the same command goes on from there") from None
    kept = keep_evidence(folder, trace, kind, label, found.to_dict())
    if as_json:
        more = {}
        if isinstance(found, causal.Modalities):
            more = {name: getattr(found, name) for name in ("image", "question", "together", "verdict")}
        print_json({"trace": str(trace.path), **found.to_dict(), **more})
        return
    say(str(found))
    say(("kept in  ", "dim"), stored_path(kept))
