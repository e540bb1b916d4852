"""``lvlm-probe study init``: a first file of a study on a table of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.inputs import columns_from
from lvlm_probe.cli.shared.options import Columns
from lvlm_probe.cli.shared.terminal import note, one_line, quiet_libraries, quoted_path, say, stored_path
from lvlm_probe.errors import ProbeError
from lvlm_probe.files import write_whole


def init(
    data: Annotated[Path, typer.Argument(metavar="FILE", help="csv, tsv, json, jsonl or parquet, a question per row.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.yaml", help="The file to write.")] = Path("study.yaml"),
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR_OR_ID", help="Default: the embedded one, to be replaced.")
    ] = None,
    column: Columns = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Look at a table and write a study on it, with comments: which column is what and why, and whether images open.

    Example:  lvlm-probe study init questions.csv --model path/to/model
    """
    quiet_libraries()
    from lvlm_probe.study.spec import read_study
    from lvlm_probe.study.starting import start

    if out.exists() and not overwrite:
        raise ProbeError(f"{stored_path(out)} is there already; name another --out, or add --overwrite")
    made = start(data, out, model=model, columns=columns_from(column))
    write_whole(out, made.text)
    read_study(out)
    for field, name in made.columns.items():
        say(f"  {field:<9}", one_line(name))
    for sentence in made.warnings:
        note(sentence, kind="warning")
    say("study: ", (stored_path(out), "bold"))
    say(f"next:  lvlm-probe study run {quoted_path(out)}")
