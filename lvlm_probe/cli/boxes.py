"""``lvlm-probe boxes``: the boxes and points that an answer holds, how sure they are, and whether it looks there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.inputs import Making, ReplayModels, find_trace
from lvlm_probe.cli.shared.options import Json, Loading, OptionalModel, Row, TraceOrDirectory
from lvlm_probe.cli.shared.terminal import one_line, print_json, say, stored_path
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.heatmap import Heatmap


def boxes(
    path: TraceOrDirectory,
    convention: Annotated[
        str | None,
        typer.Option(
            "--boxes",
            metavar="KIND",
            autocompletion=choices("1", "100", "999", "1000", "1024", "bins", "cells", "pixels", "model pixels"),
            help="What the numbers are relative to, where the answer does not tell: pixels, 'model pixels', 1000, …",
        ),
    ] = None,
    image_number: Annotated[int, typer.Option("--image-number", min=0, help="The image that they are in.")] = 0,
    draw: Annotated[Path | None, typer.Option("--draw", metavar="FILE", help="Draw them on the image, a PNG.")] = None,
    maps: Annotated[bool, typer.Option("--maps", help="Also map each, and say whether it looks there.")] = False,
    model: OptionalModel = None,
    making: Making = Making(),
    row: Row = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """List the boxes and points that an answer holds, in pixels, with their probability. Only --maps takes a model.

    Example:  lvlm-probe boxes runs/demo --draw boxes.png
    Example:  lvlm-probe boxes runs/demo --boxes pixels --maps --model path/to/model
    """
    from lvlm_probe.evidence import answer_boxes, check_box, draw_boxes

    trace = find_trace(path, row)
    found = answer_boxes(trace, boxes=cast(Any, convention), image=image_number)
    if draw is not None:
        if draw.suffix.lower() != ".png":
            raise ProbeError(f"--draw {draw} is saved as PNG: name it FILE.png")
        draw_boxes(trace.images[image_number], found).save(draw)
    records: list[dict[str, Any]] = [box.to_dict() for box in found]
    said: list[str] = [""] * len(found)
    if maps and found:
        from lvlm_probe.cli.shared.maps import explain_replay
        from lvlm_probe.heatmap_store import MapSettings
        from lvlm_probe.selection import select_tokens

        replay = ReplayModels(model, loading).replay(trace)
        settings = MapSettings(**vars(making.recipe()), image=image_number)
        for number, box in enumerate(found):
            selection = select_tokens(replay, indices=box.tokens)
            (item,) = explain_replay(replay, selection, settings, trace.explanations_dir, word_maps=False)
            heat = cast("Heatmap", item.read(trace))
            records[number]["map"], said[number] = str(item.path), heat.reason or box.fault or ""
            if heat.values is not None and box.fault is None:
                check = check_box(box, heat)
                item.rewrite(check.attached(heat))
                records[number]["verdict"], said[number] = check.verdict, check.sentence
    if as_json:
        print_json(records)
        return
    if not found:
        say("the answer holds no boxes or points")
    for box, sentence in zip(found, said, strict=True):
        say((one_line(str(box), 300), "bold"), f"  ({box.convention})", f"  {one_line(sentence, 600)}" * bool(sentence))
    if draw is not None:
        say((stored_path(draw), "dim"))
