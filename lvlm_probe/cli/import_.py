"""``lvlm-probe import``: answers that a serving engine or an API gave, as traces of a local model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import baseline_from, output_directory
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.options import BaselineOption, Json, Loading, Model
from lvlm_probe.cli.shared.rows import AnswerRows, failures, formats_help, tell_refused
from lvlm_probe.cli.shared.terminal import bar, note, print_json, say, stop, stored_path
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    from lvlm_probe.importing import Imported


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Answers, with their images and questions.")],
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory for the traces; an existing one is added to.")
    ] = Path("runs"),
    rows: AnswerRows = AnswerRows(),
    llr: Annotated[bool, typer.Option(help="Log-likelihood ratios: one more pass per row.")] = True,
    attention: Annotated[bool, typer.Option(help="Keep decoder attention from answer tokens to image tokens.")] = True,
    baseline: BaselineOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows to look at, at most.")] = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Make traces of answers that were recorded elsewhere, by replaying them with teacher forcing on a local model.

    Each row of the file is one answer of a serving engine or an API: an image, the question (or the prompt as it was
    sent), and the answer's text or token ids. Of a text the likeliest tokens are taken. With log-probabilities, the
    difference to the model's is stated. Rows that cannot be taken over are listed in rejected.jsonl, with the reason.
    Stop it at any time: the same command goes on where it was.

    Exit code 1: no row was taken, more than a tenth were refused (--strict: any), or an answer's log-probabilities
    differ from the model's by more than 0.1 nats per token: image, chat template or weights are others.

    Example:  lvlm-probe import answers.jsonl --model llava-hf/llava-1.5-7b-hf --out runs/served
    """
    if not file.is_file():
        raise ProbeError(f"there is no file {file}; give a file of answers (lvlm-probe import --help has the formats)")
    directory, own_baseline = output_directory(out), baseline_from(baseline, video=False) or "blur"
    reading = rows.reading()
    loaded, processor = load_model(model, **vars(loading))
    from lvlm_probe.importing import import_answers

    try:
        with bar(f"importing {file.name}") as advance:
            result = import_answers(
                file,
                loaded,
                processor,
                directory,
                **reading,
                llr=llr,
                attention=attention,
                baseline=own_baseline,
                limit=limit,
                tell=advance,
            )
    except KeyboardInterrupt:
        raise stop(f"stopped; what is finished is in {stored_path(directory)}, and the same command goes on") from None
    failed = failures(
        len(result.imported) + len(result.present),
        len(result.rejected),
        [f"line {made.line}" for made in result.differing],
        strict=rows.strict,
    )
    if as_json:
        print_json({**_summary(result), "failed": failed})
    else:
        _tell(result)
    for sentence in failed:
        note(sentence, kind="error")
    if failed:
        raise typer.Exit(1)


HELP = formats_help(import_)


def _summary(result: Imported) -> dict[str, Any]:
    return {
        "directory": str(result.directory),
        "read_as": result.read_as,
        "imported": [vars(made) for made in result.imported],
        "present": list(result.present),
        "rejected": [{"line": line, "reason": reason} for line, reason in result.rejected.items()],
        "reasons": dict(result.reasons),
        "differing": [made.line for made in result.differing],
    }


def _tell(result: Imported) -> None:
    from lvlm_probe.importing import REJECTED

    say((f"read as {result.read_as}", "dim"))
    counts = f", {len(result.present)} were there, {len(result.rejected)} rejected: {stored_path(result.directory)}"
    say((f"{len(result.imported)} imported", "bold"), counts)
    compared = [made for made in result.imported if made.largest_difference is not None]
    if compared:
        worst = max(compared, key=lambda made: made.largest_difference or 0.0)
        mean = sum(made.mean_difference or 0.0 for made in compared) / len(compared)
        say(
            f"log-probabilities given and replayed differ by {mean:.3g} nats on average over {len(compared)} answers, "
            f"{worst.largest_difference:.3g} at most (line {worst.line})"
        )
    refused = [f"line {line}: {reason}" for line, reason in result.rejected.items()]
    tell_refused(refused, f"in {stored_path(result.directory / REJECTED)}", result.reasons)
