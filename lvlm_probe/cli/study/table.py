"""``lvlm-probe study table``: the paper's tables of what is finished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.options import StudyFile
from lvlm_probe.cli.shared.studies import study_in
from lvlm_probe.cli.shared.terminal import note, say, show, stored_path, width
from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.files import write_whole

if TYPE_CHECKING:
    from lvlm_probe.study.results import Results

_FORMS = ("text", "markdown", "csv", "latex")
NAMES = ("1", "2", "3", "4", "5", "6", "7", "8", "9", "figure5", "ledger")


def table(
    file: StudyFile,
    number: Annotated[
        str,
        typer.Option(
            "--table",
            metavar="NAME",
            autocompletion=choices(*NAMES, "all"),
            help="1 to 9, figure5, ledger (the paper's numbers beside yours), or all that can be made.",
        ),
    ] = "all",
    form: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=choices(*_FORMS),
            help="What to print: text, markdown, csv or latex. Files are written in all forms, PDF too.",
        ),
    ] = "text",
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", metavar="CSV", help="For figure5: dataset, sample, model, plausible (0 or 1)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the files go. Default: tables/ of the study.")
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option("--document", metavar="FILE.md", help="All tables as one document instead, with what was run."),
    ] = None,
) -> None:
    """Make the paper's tables of what is finished: print them, and write them as Markdown, CSV, LaTeX, PDF and figure.

    In LaTeX (booktabs) and PDF the best of each column is bold, the second underlined; untrusted rows are neither.

    Example:  lvlm-probe study table study.yaml --table 2
    """
    from lvlm_probe.study.results import collect
    from lvlm_probe.study.tables.ledger import any_run, ledger
    from lvlm_probe.study.tables.paper import TABLES, make_table

    if form not in _FORMS:
        raise ProbeError(f"--format is text, markdown, csv or latex; not {form!r}")
    study = study_in(file)
    results = collect(study)
    if document is not None:
        _write_document(results, file, document, annotations)
        return
    directory = out or study.out / "tables"
    names = [*TABLES, "figure5", "ledger"] if number == "all" else [number]
    left: list[str] = []
    for name in names:
        try:
            if name == "ledger" and number == "all" and not any_run(results):
                raise StudyError("no number of the paper was run")
            made = ledger(results) if name == "ledger" else make_table(results, name, annotations=annotations)
        except ProbeError:
            if number != "all":
                raise
            left.append(name)
            continue
        made.write(directory)
        show(made.text(width()) if form == "text" else getattr(made, form)())
    say("tables: ", (stored_path(directory), "bold"))
    if left:
        note(f"no table {', '.join(left)} of this study; --table NAME says why")


def _write_document(results: Results, file: Path, target: Path, annotations: Path | None) -> None:
    from lvlm_probe.study.tables.document import document

    command = f"lvlm-probe study table {file.as_posix()} --document {target.as_posix()}"
    command += "" if annotations is None else f" --annotations {annotations.as_posix()}"
    write_whole(target, document(results, command=command, annotations=annotations))
    say("document: ", (stored_path(target), "bold"))
