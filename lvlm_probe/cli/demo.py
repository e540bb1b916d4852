"""``lvlm-probe demo``: the whole road on the embedded model, from an image to the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvlm_probe.cli.shared.answers import ask, trace_summary
from lvlm_probe.cli.shared.inputs import open_replay, output_directory
from lvlm_probe.cli.shared.models import DEMO, load_model
from lvlm_probe.cli.shared.options import Json, OpenPage
from lvlm_probe.cli.shared.terminal import open_page, print_json, say, stop, stored_path
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.demo import Scene

RUNS_BARE = True


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory for all files; an existing one is added to.")
    ] = Path("runs/demo"),
    scenes: Annotated[int, typer.Option("--scenes", min=1, max=50, help="How many held-out scenes to explain.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Which scenes.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR/report.html if it exists.")] = False,
    open_it: OpenPage = False,
    as_json: Json = False,
) -> None:
    """Ask the embedded model about an image, explain its answer word by word, score it, and write the page.

    Example:  lvlm-probe demo --out runs/demo
    """
    from lvlm_probe.cli.shared import maps
    from lvlm_probe.heatmap_store import FOLDER, MapFile, MapSettings
    from lvlm_probe.selection import select_tokens

    directory = output_directory(out)
    page = directory / "report.html"
    if page.exists() and not overwrite:
        raise ProbeError(f"{page} exists; add --overwrite, or name another directory with --out")
    started = time.perf_counter()
    drawn = _scenes(scenes, seed)
    model, processor = load_model(DEMO)
    settings = MapSettings()
    results: list[maps.Explained] = []
    made: list[MapFile] = []
    try:
        for number, scene in enumerate(drawn, start=1):
            if scenes > 1 and not as_json:
                say((f"scene {number} of {scenes}", "dim"))
            trace = ask(model, processor, [scene.image], scene.question, directory)
            replay = open_replay(trace, model, processor)
            result = maps.Explained(trace, [])
            results.append(result)
            selection = select_tokens(replay)
            for found in maps.explain_replay(replay, selection, settings, directory / FOLDER, word_maps=True):
                result.maps.append(found)
                made.append(found)
            if not as_json:
                maps.show_explained(result, replay)
    except KeyboardInterrupt:
        raise stop(f"stopped; {len(made)} finished maps are kept in {stored_path(directory / FOLDER)}") from None
    maps.write_report(made, page, overwrite=overwrite)
    if open_it:
        open_page(page)
    if as_json:
        print_json(
            {
                "report": str(page),
                "seconds": round(time.perf_counter() - started, 2),
                "scenes": [
                    {
                        **trace_summary(result.trace),
                        "expected": scene.answer,
                        "maps": [maps.map_summary(found) for found in result.maps],
                    }
                    for result, scene in zip(results, drawn, strict=True)
                ],
            }
        )
        return
    say("")
    say(
        "report: ",
        (stored_path(page), "bold"),
        f"  (--open shows it in the browser; {time.perf_counter() - started:.0f} s)",
    )
    say("traces: ", stored_path(directory), "  (lvlm-probe inspect shows them)")


def _scenes(count: int, seed: int) -> list[Scene]:
    """Held-out scenes of every kind; first those whose words point to the most different places."""
    from lvlm_probe.demo import KINDS, scenes

    drawn = scenes(max(count, len(KINDS)), seed=seed)
    return sorted(drawn, key=lambda scene: -len({mask.tobytes() for mask in scene.word_masks}))[:count]
