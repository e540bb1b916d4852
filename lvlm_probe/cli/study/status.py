"""``lvlm-probe study status``: how far a study is."""

from __future__ import annotations

from lvlm_probe.cli.shared.options import Json, StudyFile
from lvlm_probe.cli.shared.studies import show_state, study_in
from lvlm_probe.cli.shared.terminal import print_json


def status(file: StudyFile, as_json: Json = False) -> None:
    """Show how far a study is, what the filter keeps, and what failed.

    Example:  lvlm-probe study status study.yaml
    """
    from lvlm_probe.study.results import collect
    from lvlm_probe.study.tables.export import state

    results = collect(study_in(file))
    if as_json:
        print_json(state(results))
    else:
        show_state(results)
