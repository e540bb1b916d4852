"""``lvlm-probe study plan``: what a study will take."""

from __future__ import annotations

from typing import Annotated

import typer

from lvlm_probe.cli.shared.options import Json, StudyFile, TrustRemoteCode
from lvlm_probe.cli.shared.studies import study_in
from lvlm_probe.cli.shared.terminal import print_json, quiet_libraries, say, show, width


def plan(
    file: StudyFile,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the models and measure one sample of each data set on each.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="What there is, weights included: 24GB. Default: what is free."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Samples per data set, at most.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Say what a study will take: its units and passes, and with --measure the memory and hours of every row.

    Example:  lvlm-probe study plan study.yaml --measure --memory 24GB
    """
    quiet_libraries()
    from lvlm_probe.study.forecast import forecast

    study = study_in(file, trust_remote_code=trust_remote_code)
    found = forecast(study, measure=measure, memory=memory, limit=limit)
    if as_json:
        print_json(found.to_dict())
        return
    show(found.table().text(width()))
    for sentence in found.sentences():
        say(sentence)
