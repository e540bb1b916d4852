"""``lvlm-probe meter``: which words came from the image, from habit, or not from this model."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import baseline_from
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.options import BaselineOption, Json, Loading, OpenPage, given
from lvlm_probe.cli.shared.rows import AnswerRows, failures, formats_help, tell_refused
from lvlm_probe.cli.shared.servers import Served
from lvlm_probe.cli.shared.terminal import bar, note, one_line, open_page, print_json, say, stop, stored_path
from lvlm_probe.errors import ProbeError
from lvlm_probe.escaping import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lvlm_probe.importing.meter import Reading, Unread

_SHOWN = 5
_REQUESTS = 3
"""Requests that an answer takes on a server: its prompt, the answer on the image, and on the baseline."""
_FAIL_ON = {
    "unlikely": "hold words that this model would not have said",
    "habit": "are from habit",
    "unread": "could not be measured",
}
_LIMIT = re.compile(rf"({'|'.join(_FAIL_ON)})(?:=(\d+(?:\.\d+)?) ?%)?")


def meter(
    context: typer.Context,
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
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            min=0.0,
            help="Nats by which a word may be less likely than what the model would rather have said: 3 is 20 times.",
        ),
    ] = 3.0,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="KIND[=SHARE%]",
            help="Exit code 1 where more than SHARE (0 %) of the answers are unlikely, habit or unread. Repeatable.",
        ),
    ] = None,
    baseline: BaselineOption = None,
    rows: AnswerRows = AnswerRows(),
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Answers to look at, at most.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page and the csv.")] = False,
    open_it: OpenPage = False,
    loading: Loading = Loading(),
    served: Served = Served(),
    as_json: Json = False,
) -> None:
    """Tell which words came from the image, which from habit, and which this model would not have said.

    One extra pass per answer, no heatmaps. Writes a page and a csv, the worst words first. Each word is judged by
    itself, so long answers are judged as short ones are. It is unlikely if it is less likely by --threshold than what
    the model would rather have said there; else from the image, if the image makes it likelier by --alpha than a
    blurred one does; else from habit. An answer is unlikely if one of its words is, and from habit if fewer than a
    tenth of its words are from the image.

    In CI, --fail-on unlikely --fail-on habit=20% ends with exit code 1 where a word is unlikely, or more than a fifth
    of the answers are from habit; page and csv are written first. Answers of thousands are measured best on traces:
    `lvlm-probe import` goes on where it was stopped.

    Exit code 1 without --fail-on: of a file of answers more than a tenth were refused (--strict: any). In any case: an
    answer's log-probabilities differ from the model's by more than 0.1 nats per token, so image, chat template or
    weights are others.

    Example:  lvlm-probe meter answers.jsonl --model llava-hf/llava-1.5-7b-hf --out meter.html
    Example:  lvlm-probe meter answers.jsonl --server http://gpu:8000
    """
    from lvlm_probe.importing.meter import write_csv
    from lvlm_probe.pages.prior import write_page
    from lvlm_probe.pages.shell import refuse_existing

    limits = _limits(fail_on or [])
    if not (source.is_file() or source.is_dir()):  # neither a pipe nor a device
        raise ProbeError(f"there is no {source}; give a file of answers or a directory of traces")
    answers = source.is_file() and source.suffix != ".h5"
    if answers and model is None and served.server is None:
        raise ProbeError(
            f"{source} holds answers, which have to go through a model: add --model DIR_OR_ID or --server URL"
        )
    if not answers and (named := given(context, *vars(rows))):
        raise ProbeError(f"{named[0]} is of a file of answers, and {source} holds traces: leave it out")
    table = out.with_suffix(".csv")
    refuse_existing(out, overwrite=True)
    if table.exists() and any(one is not None and table.samefile(one) for one in (source, rows.requests)):
        raise ProbeError(f"the csv beside the page would be {table}, which is read here: name another page with --out")
    for path in (out, table):
        if path.exists() and not overwrite:
            raise ProbeError(f"{path} exists; name another page with --out, or add --overwrite")
    options: dict[str, Any] = {**rows.reading(), "alpha": alpha, "threshold": threshold, "limit": limit}
    options["baseline"] = baseline_from(baseline, video=not answers)
    journal = out.with_suffix(".served.jsonl")  # a run that was killed does not ask again
    behind = served.open(model=model, journal=journal, log_probs_for="the meter")
    loaded = (behind, None) if model is None else load_model(model, **vars(loading))
    total = min(_answers_in(source, rows) if answers else _size(source), limit or 2**62)
    if behind is not None and answers:
        _check_requests(total, served)
    readings, unread, stopped = _measured(source, loaded, total, options)
    write_csv(readings, table, unread=unread)
    write_page(readings, out, unread=unread, overwrite=overwrite)
    if open_it:
        open_page(out)
    failed = _failed(limits, readings, unread)
    if answers:
        differing = [one.source for one in readings if one.differs]
        refused = 0 if limits and not rows.strict else len(unread)  # who names limits names that of unread answers too
        failed += failures(len(readings), refused, differing, strict=rows.strict)
    if as_json:
        print_json({**_summary(readings, unread, out, table), "failed": failed})
    else:
        _tell(readings)
        say("page: ", (stored_path(out), "bold"))
        say("csv:  ", (stored_path(table), "bold"))
    for sentence in failed:
        note(sentence, kind="error")
    if stopped:
        raise stop(
            f"stopped after {len(readings) + len(unread)} of {total}: the page and the csv have these, and the "
            "same command with --overwrite measures all"
        )
    if failed:
        raise typer.Exit(1)


HELP = formats_help(meter)


def _answers_in(source: Path, rows: AnswerRows) -> int:
    """Count the answers of a file, and say how it is read."""
    from lvlm_probe.importing.rows import Source

    read = Source(source, rows.columns, rows.format, rows.requests, rows.images)
    note(f"{source.name} is read as {read.recognised()}")
    return read.count()


def _check_requests(total: int, served: Served) -> None:
    if not served.yes and _REQUESTS * total > served.max_requests:
        raise ProbeError(
            f"{total:,} answers take about {_REQUESTS * total:,} requests, more than --max-requests "
            f"{served.max_requests:,}: add --yes, or --limit"
        )


def _measured(
    source: Path, loaded: tuple[Any, Any], total: int, options: Mapping[str, Any]
) -> tuple[list[Reading], list[Unread], bool]:
    """The answers that could be measured, the worst first, and the others; whether Ctrl-C has left those so far."""
    from lvlm_probe.importing.meter import Reading, Unread, measure, ranked
    from lvlm_probe.importing.refusals import by_kind

    found: list[Reading | Unread] = []
    stopped = False
    try:
        with bar(f"measuring {source.name}") as advance:
            for one in measure(source, *loaded, **options):
                found.append(one)
                advance(len(found), max(total, len(found)))
    except KeyboardInterrupt:
        if not found:
            raise stop("stopped before the first answer was measured: the same command begins again") from None
        stopped = True
    readings = ranked([one for one in found if isinstance(one, Reading)])
    unread = [one for one in found if isinstance(one, Unread)]
    tell_refused(
        [f"{one.source}: {one.reason}" for one in unread],
        "could not be measured; the csv names them",
        by_kind(one.reason for one in unread),
    )
    if not readings:
        raise ProbeError(f"none of the {len(found)} answers in {source} could be measured")
    return readings, unread, stopped


def _limits(given: Sequence[str]) -> dict[str, float]:
    """The largest share of each kind that is let pass. Raises ``ProbeError``."""
    found: dict[str, float] = {}
    for text in given:
        if (match := _LIMIT.fullmatch(text.strip())) is None:
            raise ProbeError(
                f"--fail-on {text!r}: name one of {', '.join(_FAIL_ON)}, and a share if you like: habit=20%"
            )
        if match[1] in found:
            raise ProbeError(f"--fail-on {text!r}: {match[1]} is given twice")
        found[match[1]] = float(match[2] or 0) / 100
    return found


def _failed(limits: Mapping[str, float], readings: Sequence[Reading], unread: Sequence[Unread]) -> list[str]:
    counts = {**_counts(readings), "unread": len(unread)}
    total = len(readings) + len(unread)
    return [
        f"{counts[kind]} of {total} answers ({100 * counts[kind] / total:.1f} %) {_FAIL_ON[kind]}; "
        f"--fail-on lets {100 * share:g} % pass"
        for kind, share in limits.items()
        if counts[kind] > share * total
    ]


def _tell(readings: Sequence[Reading]) -> None:
    from lvlm_probe.importing.meter import worst_words

    counts = _counts(readings)
    kinds = [
        f"{counts['unlikely']} with words that this model would not have said",
        f"{counts['habit']} from habit",
        f"{counts['image']} from the image",
    ]
    kinds += [f"{counts['unknown']} whose probability is no number"] if counts["unknown"] else []
    say((f"{counted(len(readings), 'answer')}: ", "bold"), ", ".join(kinds))
    worst = worst_words(readings)
    several = len({reading.image for reading in readings}) > 1

    def answered(reading: Reading) -> str:
        image = f"{one_line(reading.image, 40)}  " if several and reading.image else ""
        return f"{image}{one_line(reading.question, 60)}  →  {one_line(reading.answer, 60)}"

    for word, reading in worst[:_SHOWN]:
        rather = f", rather {one_line(word.instead, 20)!r}" if word.instead else ""
        say(
            (f"  {word.surprise:5.1f} nats  ", "dim"),
            (f"{one_line(word.text, 30)!r}", "bold"),
            f"{rather}:  {answered(reading)}",
        )
    if len(worst) > _SHOWN:
        say((f"  and {len(worst) - _SHOWN} more such words", "dim"))
    for reading in [reading for reading in readings if reading.origin == "habit"][:_SHOWN]:
        say(
            (f"  {len(reading.from_('image'))} of {reading.figures.words} words from the image:  ", "dim"),
            answered(reading),
        )
    if bound := sum(reading.bound for reading in readings):
        note(
            f"{bound} traces do not hold what the model would rather have said; −log P, the most that a word can be "
            "less likely by, is taken instead: --model makes it exact, one pass each"
        )


def _size(source: Path) -> int:
    """Count the traces, for the progress bar."""
    from lvlm_probe.trace import open_store

    return len(open_store(source).files)  # of one trace each, as a rule


def _counts(readings: Sequence[Reading]) -> dict[str, int]:
    found: Counter[str] = Counter(reading.origin for reading in readings)
    return {name: found[name] for name in ("unlikely", "habit", "image", "unknown")}


def _summary(readings: Sequence[Reading], unread: Sequence[Unread], out: Path, table: Path) -> dict[str, Any]:
    from lvlm_probe.importing.meter import columns_of, worst_words

    return {
        "page": str(out),
        "csv": str(table),
        "counts": _counts(readings),
        "worst_words": [
            {
                "word": word.text,
                "surprise": word.surprise,
                "instead": word.instead,
                "llr": word.llr,
                "source": reading.source,
            }
            for word, reading in worst_words(readings)
        ],
        "answers": [columns_of(reading) for reading in readings],
        "not_measured": [vars(one) for one in unread],
    }
