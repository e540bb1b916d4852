"""``lvlm-probe study page``: every sample of a study on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.completion import choices
from lvlm_probe.cli.shared.options import OpenPage, StudyFile
from lvlm_probe.cli.shared.studies import study_in
from lvlm_probe.cli.shared.terminal import bar, open_page, say, stored_path


def page(
    file: StudyFile,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE|DIR",
            help="A file .html with everything in it, or a folder. Default: page.html of the study, and the folder "
            "page for more than 300 samples.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            autocompletion=choices("models", "methods", "groups"),
            help="What stands side by side at first: models, methods or groups (sets of samples).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    open_it: OpenPage = False,
) -> None:
    """Write a page of what is finished: every sample with its answers, maps and scores, to sort, filter and compare.

    Example:  lvlm-probe study page study.yaml --by groups
    """
    from lvlm_probe.study.pages import write_page
    from lvlm_probe.study.results import collect

    results = collect(study_in(file))
    with bar("page") as advance:
        # The study's own page is made again as often as one likes, as its tables are.
        made = write_page(results, out, by=by, overwrite=overwrite or out is None, tell=advance)
    say("page: ", (stored_path(made), "bold"))
    if open_it:
        open_page(made)
