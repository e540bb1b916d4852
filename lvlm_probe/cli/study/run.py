"""``lvlm-probe study run``: do what is not finished of a study."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import typer

from lvlm_probe.cli.shared.options import Json, StudyFile, TrustRemoteCode
from lvlm_probe.cli.shared.studies import show_state, study_in
from lvlm_probe.cli.shared.terminal import bar, print_json, quiet_libraries, quoted_path, say, stop, stored_path
from lvlm_probe.errors import ProbeError

__all__ = ["run"]


def run(
    file: StudyFile,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Samples per data set, at most.")] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Do every N-th sample, from the I-th (from 0) on.")
    ] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="local, or what a plugin brings (ray).")] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of the cluster, for an engine that has one (ray: auto, or host:port)."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do units again that have failed.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Do what is not finished of a study. Stop it at any time; the same command goes on where it was.

    Example:  lvlm-probe study run study.yaml --limit 20
    """
    quiet_libraries()
    from lvlm_probe.study.results import collect
    from lvlm_probe.study.run.engines import engine_named
    from lvlm_probe.study.tables.export import state

    study = study_in(file, trust_remote_code=trust_remote_code)
    if address is not None:
        study = dataclasses.replace(study, engine_options={**study.engine_options, "address": address})
    work = engine_named(engine or study.engine)
    try:
        with bar(f"study {study.name}") as advance:
            counts = work(
                study,
                limit=limit,
                shard=_shard(shard),
                retry_failed=retry_failed,
                tell=lambda told: advance(told.done, told.total),
            )
    except KeyboardInterrupt:
        raise stop(f"stopped; what is finished is in {stored_path(study.out)}, and the same command goes on") from None
    results = collect(study)
    if as_json:
        print_json({"made": dict(counts), **state(results)})
        return
    say(f"made: {counts['answers']} answers, {counts['maps']} maps ({counts['finished']} answers were there)")
    show_state(results)
    say("next:  ", f"lvlm-probe study table {quoted_path(file)}")
    say("       ", f"lvlm-probe study page {quoted_path(file)} --open")


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ProbeError(f"--shard is I/N with I from 0 to N − 1, e.g. 0/4; not {text!r}")
    return int(found[1]), int(found[2])
