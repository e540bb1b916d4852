"""``lvlm-probe meter``: which answers came from the image, and which from habit."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import baseline_from, columns_from
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.options import (
    Attn,
    BaselineOption,
    Columns,
    Device,
    Dtype,
    ImagesDirectory,
    Json,
    TrustRemoteCode,
)
from lvlm_probe.cli.shared.rows import Fetch, Format, Requests, Strict, failures, formats_help, tell_reasons
from lvlm_probe.cli.shared.terminal import bar, note, one_line, print_json, say, stored_path
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.importing.meter import Reading, Unread

__all__ = ["meter"]

_SHOWN = 5


def meter(
    source: Annotated[
        Path, typer.Argument(metavar="FILE|TRACE_DIR", help="Answers in one of the formats above, or traces.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="DIR_OR_ID", help="Not needed for traces that hold their ratios."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The page; the csv is written beside it.")
    ] = Path("meter.html"),
    alpha: Annotated[float, typer.Option("--alpha", help="LLR above which a word came from the image, nats.")] = 1.0,
    baseline: BaselineOption = None,
    images: ImagesDirectory = None,
    column: Columns = None,
    format: Format = None,
    requests: Requests = None,
    fetch: Fetch = False,
    strict: Strict = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Answers to look at, at most.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page and the csv.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Tell which answers came from the image and which from habit: one extra pass per answer, no heatmaps.

    Writes a csv and a page, habit first. Drop: how much of the answer's probability is lost on a blurred image, of
    the joint one and of the geometric mean over tokens; share: of its words, those with a log-likelihood ratio above
    alpha. Answers of thousands are measured best on traces: `lvlm-probe import` goes on where it was stopped.

    Exit code 1: of a file of answers more than a tenth were refused (--strict: any), or an answer's log-probabilities
    differ from the model's by more than 0.1 nats per token: image, chat template or weights are others.

    Example:  lvlm-probe meter answers.jsonl --model llava-hf/llava-1.5-7b-hf --out meter.html
    """
    if not (source.is_file() or source.is_dir()):  # neither a pipe nor a device
        raise ProbeError(f"there is no {source}; give a file of answers or a directory of traces")
    answers = source.is_file() and source.suffix != ".h5"
    if answers and model is None:
        raise ProbeError(f"{source} holds answers, which have to go through a model: add --model DIR_OR_ID")
    table = out.with_suffix(".csv")
    for path in (out, table):
        if path.exists() and not overwrite:
            raise ProbeError(f"{path} exists; name another page with --out, or add --overwrite")
    columns, own_baseline = columns_from(column), baseline_from(baseline)
    loaded, processor = (
        load_model(model, device=device, dtype=dtype, attn=attn, trust_remote_code=trust_remote_code)
        if model
        else (None, None)
    )
    from lvlm_probe.importing.meter import Reading, Unread, measure, ranked, write_csv
    from lvlm_probe.importing.refusals import counted
    from lvlm_probe.importing.rows import Source
    from lvlm_probe.pages.prior import write_page

    found: list[Reading | Unread] = []
    if answers:
        read = Source(source, columns, format, requests, images)
        note(f"{source.name} is read as {read.recognised()}")
    total = min(read.count() if answers else _size(source), limit or 2**62)
    try:
        with bar(f"measuring {source.name}") as advance:
            for one in measure(
                source,
                loaded,
                processor,
                alpha=alpha,
                baseline=own_baseline,
                images=images,
                columns=columns,
                format=format,
                requests=requests,
                fetch=fetch,
                limit=limit,
            ):
                found.append(one)
                advance(len(found), max(total, len(found)))
    except KeyboardInterrupt:
        note(f"stopped after {len(found)} of {total}; the page shows these")
    readings = ranked([one for one in found if isinstance(one, Reading)])
    unread = [one for one in found if isinstance(one, Unread)]
    for one in unread[:_SHOWN]:
        note(f"{one.source}: {one.reason}", kind="warning")
    if len(unread) > _SHOWN:
        note(f"{len(unread) - _SHOWN} more could not be measured; the csv names them")
    tell_reasons(counted(one.reason for one in unread), len(unread))
    if not readings:
        raise ProbeError(f"none of the {len(found)} answers in {source} could be measured")
    write_csv(readings, table, unread=unread)
    write_page(readings, out, unread=unread, overwrite=overwrite)
    differing = [one.source for one in readings if one.differs]
    failed = failures(len(readings), len(unread), differing, strict=strict) if answers else []
    if as_json:
        print_json({**_summary(readings, unread, out, table), "failed": failed})
    else:
        _tell(readings)
        say("page: ", (stored_path(out), "bold"))
        say("csv:  ", (stored_path(table), "bold"))
    for sentence in failed:
        note(sentence, kind="error")
    if failed:
        raise typer.Exit(1)


HELP = formats_help(meter)


def _tell(readings: list[Reading]) -> None:
    counts = _counts(readings)
    bands = [
        f"{counts['habit']} from habit (drop below 30 %)",
        f"{counts['mixed']} mixed",
        f"{counts['picture']} from the image (above 70 %)",
    ]
    bands += [f"{counts['unknown']} whose probability is no number"] if counts["unknown"] else []
    say((f"{len(readings)} answers: ", "bold"), ", ".join(bands))
    for reading in readings[:_SHOWN]:
        say(
            ("      –    " if math.isnan(reading.drop) else f"  {max(0.0, 100 * reading.drop):5.1f} %  ", "dim"),
            f"{one_line(reading.question, 70)}  →  {one_line(reading.answer, 70)}",
        )


def _size(source: Path) -> int:
    """Count the traces, for the progress bar."""
    from lvlm_probe.trace import open_store

    return len(open_store(source).files)  # of one trace each, as a rule


def _counts(readings: list[Reading]) -> dict[str, int]:
    found: Counter[str] = Counter(reading.band for reading in readings)
    return {name: found[name] for name in ("habit", "mixed", "picture", "unknown")}


def _summary(readings: list[Reading], unread: list[Unread], out: Path, table: Path) -> dict[str, Any]:
    names = (
        "source",
        "id",
        "question",
        "answer",
        "band",
        "drop",
        "drop_normalised",
        "share",
        "mean_llr",
        "baseline",
        "differs",
    )
    return {
        "page": str(out),
        "csv": str(table),
        "counts": _counts(readings),
        "answers": [{name: getattr(reading, name) for name in names} for reading in readings],
        "not_measured": [vars(one) for one in unread],
    }
