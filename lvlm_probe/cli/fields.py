"""``lvlm-probe fields``: the values of an answer, how sure each is, and where on the page it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.inputs import Making, ReplayModels, find_trace
from lvlm_probe.cli.shared.options import Json, Loading, OptionalModel, Row, TraceOrDirectory
from lvlm_probe.cli.shared.terminal import one_line, print_json, say, stored_path
from lvlm_probe.errors import ProbeError


def fields(
    path: TraceOrDirectory,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="PATH", help="Only this field, as it is listed; repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Find where each stands (by the model) and write it."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            autocompletion=choices("json", "hocr", "w3c", "coco", "docling"),
            help="Of --out: json, hocr, w3c, coco, docling. Default: hocr for .hocr and .html, else json.",
        ),
    ] = None,
    keep: Annotated[
        float, typer.Option("--keep", metavar="SHARE", help="Share of the score that a value's region keeps.")
    ] = 0.9,
    model: OptionalModel = None,
    making: Making = Making(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    row: Row = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """List the values of an answer with their probability, of JSON by their path; with --out, where each stands.

    Example:  lvlm-probe fields runs/demo
    Example:  lvlm-probe fields runs/demo --name total --out total.json --model path/to/model
    """
    from lvlm_probe.evidence import export, locate
    from lvlm_probe.evidence import fields as values_of

    trace = find_trace(path, row)
    found = values_of(trace)
    if out is None:
        if kind is not None:
            raise ProbeError("--format says how --out is written: name the file, --out FILE")
        chosen = [one for one in found if not name or one.name in name]
        if as_json:
            print_json([{"name": one.name, "value": one.value, "p": one.p, "llr": one.llr} for one in chosen])
            return
        for one in chosen:
            sure = "" if one.p is None else f"  P {one.p:.2g}"
            told = "" if one.llr is None else f"  {one.llr:+.2f} nats by the image"
            say((one_line(str(one), 300), "bold"), f"{sure}{told}")
        return
    if out.is_file() and not overwrite:
        raise ProbeError(f"{out} exists; add --overwrite, or name another file with --out")

    replay = ReplayModels(model, loading).replay(trace)
    places = locate(replay, found, names=name, keep=keep, **making.recipe().asked)
    files = trace.meta.get("image_files") if isinstance(trace.meta, dict) else None
    named = [str(file) for file in files] if isinstance(files, list) and len(files) == len(trace.images) else None
    export(places, out, format=cast(Any, kind), files=named, overwrite=overwrite)
    if as_json:
        print_json([place.to_dict() for place in places])
        return
    for place in places:
        say(one_line(str(place), 900))
    say((stored_path(out), "dim"))
