"""``lvlm-probe report``: the page that shows stored maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.options import Json, Maps, OpenPage
from lvlm_probe.cli.shared.terminal import open_page, print_json, say, stored_path
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import counted


def report(
    paths: Maps,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", help="Headline of the page.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
    open_it: OpenPage = False,
    as_json: Json = False,
) -> None:
    """Write stored maps and their scores as one HTML page that needs no network. No model is loaded.

    Example:  lvlm-probe report runs/demo --out report.html
    """
    from lvlm_probe.cli.shared.maps import write_report
    from lvlm_probe.heatmap_store import find_maps

    if out.is_file() and not overwrite:
        raise ProbeError(f"{out} exists; add --overwrite, or name another file with --out")
    found = find_maps(paths)
    page = write_report(found, out, title=title, overwrite=overwrite)
    if open_it:
        open_page(page)
    if as_json:
        print_json({"report": str(page), "maps": [str(item.path) for item in found]})
    else:
        say("report: ", (stored_path(page), "bold"), f"  ({counted(len(found), 'map')})")
