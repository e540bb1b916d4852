"""``lvlm-probe frames``: which frames of a video speak for the answer, and whether it needs their order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.inputs import ReplayModels, baseline_from, find_trace
from lvlm_probe.cli.shared.options import BaselineOption, Json, Loading, OptionalModel, Row, Words
from lvlm_probe.cli.shared.terminal import bar, print_json, say, stage
from lvlm_probe.errors import ProbeError


def frames(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace of a video, or a directory: its last trace.")],
    model: OptionalModel = None,
    words: Words = None,
    clip: Annotated[int, typer.Option("--clip", min=0, help="Which video of the prompt.")] = 0,
    segments: Annotated[
        int | None,
        typer.Option("--segments", metavar="N", min=1, help="Stretches of time. Default: one per frame, at most 8."),
    ] = None,
    orders: Annotated[
        int, typer.Option("--orders", min=2, help="Of more than 10 stretches: how many random orders are run.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the orders.")] = 0,
    row: Row = None,
    baseline: BaselineOption = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Show how much each stretch of a video speaks for the answer, and whether it needs motion or the order of frames.

    Shares are Shapley values in nats, exact up to 10 stretches, which take 2^N passes forward. What the answer needs of
    time is kept beside the trace, and lvlm-probe report shows it with the maps.

    Example:  lvlm-probe frames runs/video --model path/to/model --words red
    """
    from lvlm_probe import video
    from lvlm_probe.heatmap_store import write_order

    trace = find_trace(path, row)
    if not trace.clips:
        raise ProbeError(f"{path} holds no video: lvlm-probe explain shows which regions of its image count")
    own_baseline = baseline_from(baseline, video=True)
    replay = ReplayModels(model, loading).replay(trace, own_baseline)
    with bar("which frames") as progress:
        shares = video.which_frames(
            replay, tokens=words, clip=clip, segments=segments, orders=orders, seed=seed, progress=progress
        )
    with stage("motion and order"):
        order = video.order(replay, tokens=words)
    kept = write_order(order, trace)
    if as_json:
        print_json({
            "trace": str(trace.path),
            "text": shares.text,
            "total": shares.total,
            "passes": shares.passes,
            "clip": shares.clip.to_dict(),
            "segments": [
                {"frames": list(ends), "share": share, "error": error}
                for ends, share, error in zip(shares.frames, shares.shares, shares.error, strict=True)
            ],
            "llr": dict(order.llr),
            "needs_order": order.needs_order,
            "needs_motion": order.needs_motion,
            "order": str(kept),
        })  # fmt: skip
        return
    say(str(shares))
    say(str(order))
