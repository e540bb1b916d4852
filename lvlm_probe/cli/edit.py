"""``lvlm-probe edit``: what would the model say without the region that a map marks?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import ReplayModels, baseline_from
from lvlm_probe.cli.shared.options import BaselineOption, Json, Loading, Maps, OptionalModel
from lvlm_probe.cli.shared.terminal import bar, one_line, print_json, say
from lvlm_probe.errors import ProbeError


def edit(
    paths: Maps,
    model: OptionalModel = None,
    remove: Annotated[
        float | None, typer.Option("--remove", metavar="SHARE", help="Take away the map's hottest SHARE of the image.")
    ] = None,
    keep: Annotated[float | None, typer.Option("--keep", metavar="SHARE", help="Keep that share alone.")] = None,
    box: Annotated[
        list[str] | None,
        typer.Option("--box", metavar="L,T,R,B", help="Take away this box instead, in pixels; repeatable."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="TEXT", help="It is flipped when it holds TEXT. Default: its words change."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="By the real processor on real composites; slower.")] = False,
    baseline: BaselineOption = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Ask the model again without the region that a map marks: the smallest that changes the words, or one you name.

    What it says is kept with the map, and a report shows it.

    Example:  lvlm-probe edit runs/demo
    Example:  lvlm-probe edit runs/demo --keep 0.1
    """
    from lvlm_probe import edit as ask_again
    from lvlm_probe.cli.shared.maps import words_of
    from lvlm_probe.heatmap_store import by_trace, find_maps

    if (remove is not None) + (keep is not None) + bool(box) > 1:
        raise ProbeError("--remove, --keep and --box are three ways to say what is shown: give one of them")
    place: dict[str, Any] = {"remove": _boxes(box) if box else remove, "keep": keep}
    found = [item for item in find_maps(paths) if item.read().values is not None]
    if not found:
        raise ProbeError("none of these maps has values, so no region is hot; lvlm-probe report says why")
    of_traces = by_trace(found)
    own_baseline = baseline_from(baseline, video=all(trace.clips for trace, _ in of_traces))
    models = ReplayModels(model, loading)
    done = []
    for trace, items in of_traces:
        replay = models.replay(trace)
        for item in items:
            heat = item.read()
            words = words_of(heat)
            with bar(f"asking again without {one_line(words, 60)}") as progress:
                result = ask_again(
                    replay, heat, **place, until=until, baseline=own_baseline, mode="exact" if exact else "fast",
                    progress=progress,
                )  # fmt: skip
            item.rewrite(result.attached(heat))
            done.append({"map": str(item.path), "words": words, **result.to_dict()})
            if not as_json:
                say((one_line(words, 300), "bold"), f"  {one_line(result.sentence, 600)}")
                for note in result.notes:
                    say(("    ", ""), one_line(note, 600))
                say(("    ", ""), (f"{result.answers} answers, {result.steps} tokens", "dim"))
    if as_json:
        print_json(done)


def _boxes(given: list[str]) -> list[list[float]]:
    """``["10,20,30,40"]`` as boxes. Raises ``ProbeError``."""
    try:
        boxes = [[float(edge) for edge in one.split(",")] for one in given]
    except ValueError as error:
        raise ProbeError(f"--box takes four numbers in pixels, left,top,right,bottom ({error})") from error
    if wrong := [one for one, box in zip(given, boxes, strict=True) if len(box) != 4]:
        raise ProbeError(f"--box {wrong[0]!r}: it takes four numbers in pixels, left,top,right,bottom")
    return boxes
