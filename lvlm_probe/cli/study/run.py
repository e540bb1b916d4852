"""``lvlm-probe study run``: do what is not finished of a study."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from lvlm_probe.cli.shared.options import Json, StudyFile, TrustRemoteCode
from lvlm_probe.cli.shared.studies import show_state, study_in
from lvlm_probe.cli.shared.terminal import (
    bar,
    one_line,
    print_json,
    quiet_libraries,
    quoted_path,
    safe,
    say,
    stop,
    stored_path,
)
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import counted
from lvlm_probe.progress import roughly

if TYPE_CHECKING:
    from lvlm_probe.study.run.runner import Told
    from lvlm_probe.study.spec import Study


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
        with _Lines(study, write=_aside if as_json else say) as lines:
            counts = work(study, limit=limit, shard=_shard(shard), retry_failed=retry_failed, tell=lines.tell)
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


class _Lines:
    """What a run says of itself: what is to be done, what the first units took, and a bar or lines for the rest.

    Args:
        study: it.
        write: takes a line.
    """

    def __init__(self, study: Study, *, write: Callable[[str], None]) -> None:
        self._study, self._write = study, write
        self._stack = contextlib.ExitStack()
        self._kind = ""
        self._advance: Callable[[int, int], None] | None = None

    def __enter__(self) -> _Lines:
        study = self._study
        parts = ((study.models, "model"), (study.datasets, "data set"), (study.methods, "method"))
        self._write(
            f"study {one_line(study.name)}: {', '.join(counted(len(part), name) for part, name in parts)}; "
            f"units go to {stored_path(study.out)}"
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tell(self, told: Told) -> None:
        """Take the progress of an engine. Lines are written where no bar is drawn, before it or after it."""
        half = told.total // 2
        kind = told.kind or ("answers" if told.done <= half else "maps")
        done = told.done - (half if kind == "maps" else 0)
        if kind != self._kind:
            self._stack.close()
            self._advance = None
            self._kind = kind
            if kind == "maps":
                self._write(f"all {half} samples were asked; maps are made of those that the filter keeps")
        if self._advance is None and told.made and done < half:
            self._first(told, half - done, half)
        if self._advance is None and done < half and (told.made or not told.kind):
            self._advance = self._stack.enter_context(bar(f"{kind} of {self._study.name}"))
        if self._advance is not None:
            self._advance(done, half)

    def _first(self, told: Told, left: int, half: int) -> None:
        """The cost, by the first units that were made."""
        if told.kind == "answers":
            said = f"an answer takes {told.seconds:.2g} s: {left} of {half} to go, about {roughly(left * told.seconds)}"
            self._write(f"{said}; then at most {half * len(self._study.methods)} maps, which are timed when they begin")
        else:
            each = told.seconds / told.made
            said = f"a map takes {each:.2g} s, judged: at most {left * len(self._study.methods)} to go"
            self._write(f"{said}, about {roughly(left * len(self._study.methods) * each)}")


def _aside(line: str) -> None:
    """A line that is no result."""
    typer.echo(safe(line), err=True)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ProbeError(f"--shard is I/N with I from 0 to N − 1, e.g. 0/4; not {text!r}")
    return int(found[1]), int(found[2])
