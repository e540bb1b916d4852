"""``lvlm-probe import``: answers that a serving engine or an API gave, as traces of a local model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.inputs import baseline_from, columns_from, output_directory
from lvlm_probe.cli.shared.models import load_model
from lvlm_probe.cli.shared.options import (
    Attn,
    BaselineOption,
    Columns,
    Device,
    Dtype,
    ImagesDirectory,
    Json,
    Model,
    TrustRemoteCode,
)
from lvlm_probe.cli.shared.terminal import bar, note, print_json, say, stop, stored_path
from lvlm_probe.errors import ProbeError

__all__ = ["import_"]

_SHOWN = 5


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="image, question or prompt, answer or token_ids.")],
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory for the traces; an existing one is added to.")
    ] = Path("runs"),
    images: ImagesDirectory = None,
    column: Columns = None,
    llr: Annotated[bool, typer.Option(help="Log-likelihood ratios: one more pass per row.")] = True,
    attention: Annotated[bool, typer.Option(help="Keep decoder attention from answer tokens to image tokens.")] = True,
    baseline: BaselineOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows to look at, at most.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make traces of answers that were recorded elsewhere, by replaying them with teacher forcing on a local model.

    Each line of the file is one answer of a serving engine (vLLM, SGLang) or an API: an image, the question (or the
    prompt as it was sent), and the answer's text or token ids; with its log-probabilities, the difference to the
    model's is stated. Rows that cannot be taken over are listed in rejected.jsonl, with the reason. Stop it at any
    time: the same command goes on where it was.

    Example:  lvlm-probe import answers.jsonl --model llava-hf/llava-1.5-7b-hf --out runs/served
    """
    if not file.is_file():
        raise ProbeError(f"there is no file {file}; give a file of JSON lines")
    directory, own_baseline = output_directory(out), baseline_from(baseline) or "blur"
    columns = columns_from(column)
    loaded, processor = load_model(model, device=device, dtype=dtype, attn=attn, trust_remote_code=trust_remote_code)
    from lvlm_probe.importing import REJECTED, import_answers

    try:
        with bar(f"importing {file.name}") as advance:
            result = import_answers(
                file,
                loaded,
                processor,
                directory,
                images=images,
                columns=columns,
                llr=llr,
                attention=attention,
                baseline=own_baseline,
                limit=limit,
                tell=advance,
            )
    except KeyboardInterrupt:
        raise stop(f"stopped; what is finished is in {stored_path(directory)}, and the same command goes on") from None
    if as_json:
        print_json(
            {
                "directory": str(directory),
                "imported": [vars(made) for made in result.imported],
                "present": list(result.present),
                "rejected": [{"line": line, "reason": reason} for line, reason in result.rejected.items()],
            }
        )
        return
    counts = f", {len(result.present)} were there, {len(result.rejected)} rejected: {stored_path(directory)}"
    say((f"{len(result.imported)} imported", "bold"), counts)
    compared = [made for made in result.imported if made.largest_difference is not None]
    if compared:
        worst = max(compared, key=lambda made: made.largest_difference or 0.0)
        mean = sum(made.mean_difference or 0.0 for made in compared) / len(compared)
        say(
            f"log-probabilities given and replayed differ by {mean:.3g} nats on average over {len(compared)} answers, "
            f"{worst.largest_difference:.3g} at most (line {worst.line})"
        )
    for line, reason in list(result.rejected.items())[:_SHOWN]:
        note(f"line {line}: {reason}", kind="warning")
    if len(result.rejected) > _SHOWN:
        note(f"{len(result.rejected) - _SHOWN} more in {stored_path(directory / REJECTED)}")
