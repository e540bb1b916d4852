"""``lvlm-probe inspect``: what is in a trace, a stored map, or a directory of traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.answers import trace_summary
from lvlm_probe.cli.shared.inputs import rows_of
from lvlm_probe.cli.shared.options import Json, Row
from lvlm_probe.cli.shared.terminal import note, one_line, print_json, say, stored_path
from lvlm_probe.errors import ProbeError

_LISTED = 300
"""Characters of a question or an answer in a list; ``inspect FILE`` and ``--json`` have them whole."""


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A trace, a stored map, or a directory of traces.")],
    row: Row = None,
    last: Annotated[int, typer.Option("--last", min=1, help="How many traces of a directory to list.")] = 20,
    as_json: Json = False,
) -> None:
    """Show what is in a trace as a person wants to read it; list a directory. No model is loaded.

    Example:  lvlm-probe inspect runs/demo
    """
    from lvlm_probe.cli.shared.maps import map_summary, show_map
    from lvlm_probe.heatmap_store import MapFile, is_map

    if path.is_dir():
        if row is not None:
            raise ProbeError(f"--row is of one file: name it, in {path}")
        _list_directory(path, last, as_json)
        return
    if path.suffix == ".h5" and path.is_file() and is_map(path):
        found = MapFile(path)
        if as_json:
            print_json(map_summary(found))
        else:
            show_map(found)
        return
    traces = rows_of(path, row)
    if as_json:
        print_json([trace_summary(trace) for trace in traces] if len(traces) > 1 else trace_summary(traces[0]))
        return
    for number, trace in enumerate(traces):
        if number:
            say("")
        say(trace.describe())


def _list_directory(path: Path, last: int, as_json: bool) -> None:
    from lvlm_probe.trace import open_store

    store = open_store(path)
    shown, broken = [], []
    for file in store.files[-last:]:
        try:
            shown += rows_of(file, None)
        except ProbeError as error:
            broken.append(str(error))
    if as_json:
        print_json({"traces": [trace_summary(trace) for trace in shown], "damaged": broken, "files": len(store.files)})
        return
    if not store.files:
        say(f"{stored_path(path)} holds no traces")
        return
    for trace in shown:
        row = f" row {trace.row}" if trace.rows > 1 else ""
        state = "" if trace.status == "complete" else f"  [{trace.status}]"
        say((one_line(trace.path.name), "bold"), row, (state, "red"))
        asked = ("  Q  ", trace.question) if trace.question else ("  prompt  ", trace.prompt)
        say((asked[0], "dim"), one_line(asked[1], _LISTED))
        say(("  A  ", "dim"), one_line(trace.answer, _LISTED))
    if len(store.files) > last:
        say((f"the last {last} of {len(store.files)} files; --last N shows more", "dim"))
    for sentence in broken:
        note(sentence, kind="warning")
    if orphans := store.orphans():
        note(f"{len(orphans)} unfinished .part files of processes that were killed; open_store(…).clean() deletes them")
