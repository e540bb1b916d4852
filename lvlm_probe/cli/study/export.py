"""``lvlm-probe study export``: answers and maps as flat files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.options import StudyFile
from lvlm_probe.cli.shared.studies import study_in
from lvlm_probe.cli.shared.terminal import say, stored_path


def export(
    file: StudyFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write.")] = Path("study-export"),
) -> None:
    """Write answers and maps as flat csv, the sample ids that were kept, and the study itself, to hand on.

    Example:  lvlm-probe study export study.yaml --out shared/
    """
    from lvlm_probe.study.results import collect
    from lvlm_probe.study.tables.export import export as write

    for path in write(collect(study_in(file)), out):
        say(stored_path(path))
