"""Studies at the command line: read, and shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from lvlm_probe.cli.shared.terminal import one_line, say
from lvlm_probe.escaping import counted

if TYPE_CHECKING:
    from lvlm_probe.study.results import Results
    from lvlm_probe.study.spec import Study


def study_in(file: Path, *, trust_remote_code: bool = False) -> Study:
    """Read a study. Raises ``StudyError``."""
    from lvlm_probe.study.spec import read_study

    return dataclasses.replace(read_study(file), trust_remote_code=trust_remote_code)


def show_state(results: Results) -> None:
    """Show how far a study is."""
    from lvlm_probe.study.tables.export import state

    found = state(results)
    for dataset, kept in found["kept"].items():
        dropped = found["dropped"][dataset]
        say((one_line(dataset), "bold"), f": {counted(kept, 'sample')} kept, {dropped} dropped or not answered by all")
    for line in found["answers"]:
        where = f"{one_line(line['model'])} on {one_line(line['dataset'])}"
        say(f"  {where}: {counted(line['done'], 'answer')}, {line['failed']} failed")
    for line in found["maps"]:
        counts = f"{counted(line['done'], 'map')}, {line['empty']} without values, {line['failed']} failed"
        say(f"  {one_line(line['row'])}: {counts}, {line['missing']} to do")
    for reason, count in found["reasons"].items():
        say((f"  {count} × {one_line(reason, 500)}", "dim"))
