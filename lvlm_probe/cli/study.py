"""``lvlm-probe study``: whole studies, models × data sets × methods, that stop and resume, and their tables."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.options import Json, TrustRemoteCode
from lvlm_probe.cli.shared.terminal import bar, one_line, print_json, quiet_libraries, say, show, stop, stored_path
from lvlm_probe.errors import ProbeError
from lvlm_probe.files import write_whole

if TYPE_CHECKING:
    from lvlm_probe.study.results import Results
    from lvlm_probe.study.spec import Study

__all__ = ["study_app"]

study_app = typer.Typer(
    help="Whole studies: models × data sets × methods from one YAML file, and the paper's tables of them.",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study: models, data sets, methods, settings.")]


@study_app.command(no_args_is_help=True)
def run(
    file: File,
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

    study = dataclasses.replace(_read(file), trust_remote_code=trust_remote_code)
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
    if as_json:
        print_json({"made": dict(counts), **_state(collect(study))})
        return
    say(f"made: {counts['answers']} answers, {counts['maps']} maps ({counts['finished']} answers were there)")
    _show(collect(study))


@study_app.command(no_args_is_help=True)
def plan(
    file: File,
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

    study = dataclasses.replace(_read(file), trust_remote_code=trust_remote_code)
    found = forecast(study, measure=measure, memory=memory, limit=limit)
    if as_json:
        print_json(found.to_dict())
        return
    show(found.table().pipes())
    for sentence in found.sentences():
        say(sentence)


study_app.command(name="resume", no_args_is_help=True, help="The same as run: goes on where a study was stopped.")(run)


@study_app.command(no_args_is_help=True)
def status(file: File, as_json: Json = False) -> None:
    """How far a study is, what the filter keeps, and what failed.

    Example:  lvlm-probe study status study.yaml
    """
    from lvlm_probe.study.results import collect

    results = collect(_read(file))
    if as_json:
        print_json(_state(results))
    else:
        _show(results)


@study_app.command(no_args_is_help=True)
def table(
    file: File,
    number: Annotated[
        str, typer.Option("--table", metavar="NAME", help="1 to 9, figure5, ledger, or all that can be made.")
    ] = "all",
    form: Annotated[
        str, typer.Option("--format", help="What to print: markdown, csv or latex. Files are written in all forms.")
    ] = "markdown",
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
    """Make the paper's tables of what is finished: print them, and write them as Markdown, CSV, LaTeX and figure.

    Example:  lvlm-probe study table study.yaml --table 2
    """
    from lvlm_probe.study.results import collect
    from lvlm_probe.study.tables.ledger import ledger
    from lvlm_probe.study.tables.paper import TABLES, make_table

    if form not in ("markdown", "csv", "latex"):
        raise ProbeError(f"--format is markdown, csv or latex; not {form!r}")
    study = _read(file)
    results = collect(study)
    if document is not None:
        _write_document(results, file, document, annotations)
        return
    directory = out or study.out / "tables"
    names = [*TABLES, "figure5", "ledger"] if number == "all" else [number]
    for name in names:
        try:
            made = ledger(results) if name == "ledger" else make_table(results, name, annotations=annotations)
        except ProbeError as error:
            if number != "all":
                raise
            say((f"{name}: {error}", "dim"))
            continue
        made.write(directory)
        show(getattr(made, form)())
    say("tables: ", (stored_path(directory), "bold"))


@study_app.command(no_args_is_help=True)
def export(
    file: File,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory to write.")] = Path("study-export"),
) -> None:
    """Write answers and maps as flat csv, the sample ids that were kept, and the study itself, to hand on.

    Example:  lvlm-probe study export study.yaml --out shared/
    """
    from lvlm_probe.study.results import collect
    from lvlm_probe.study.tables.export import export as write

    for path in write(collect(_read(file)), out):
        say(stored_path(path))


@study_app.command(no_args_is_help=True)
def page(
    file: File,
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
        typer.Option("--by", help="What stands side by side at first: models, methods or groups (sets of samples)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a page of what is finished: every sample with its answers, maps and scores, to sort, filter and compare.

    Example:  lvlm-probe study page study.yaml --by groups
    """
    from lvlm_probe.study.pages import write_page
    from lvlm_probe.study.results import collect

    results = collect(_read(file))
    with bar("page") as advance:
        # The study's own page is made again as often as one likes, as its tables are.
        made = write_page(results, out, by=by, overwrite=overwrite or out is None, tell=advance)
    say("page: ", (stored_path(made), "bold"))


def _write_document(results: Results, file: Path, target: Path, annotations: Path | None) -> None:
    from lvlm_probe.study.tables.document import document

    command = f"lvlm-probe study table {file.as_posix()} --document {target.as_posix()}"
    command += "" if annotations is None else f" --annotations {annotations.as_posix()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, document(results, command=command, annotations=annotations))
    say("document: ", (stored_path(target), "bold"))


def _read(file: Path) -> Study:
    from lvlm_probe.study.spec import read_study

    return read_study(file)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ProbeError(f"--shard is I/N with I from 0 to N − 1, e.g. 0/4; not {text!r}")
    return int(found[1]), int(found[2])


def _state(results: Results) -> dict[str, Any]:
    from lvlm_probe.study.tables.export import state

    return state(results)


def _show(results: Results) -> None:
    found = _state(results)
    for dataset, kept in found["kept"].items():
        dropped = found["dropped"][dataset]
        say((one_line(dataset), "bold"), f": {kept} samples kept, {dropped} dropped or not answered by all")
    for line in found["answers"]:
        where = f"{one_line(line['model'])} on {one_line(line['dataset'])}"
        say(f"  {where}: {line['done']} answers, {line['failed']} failed")
    for line in found["maps"]:
        say(f"  {one_line(line['row'])}: {line['done']} maps, {line['empty']} without values, {line['failed']} failed, "
            f"{line['missing']} to do")  # fmt: skip
    for reason, count in found["reasons"].items():
        say((f"  {count} × {one_line(reason, 500)}", "dim"))
