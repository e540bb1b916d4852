"""Files of answers on the command line: options, formats with a line each, and when a command about them has failed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import columns_from
from lvlm_probe.cli.shared.options import Columns, ImagesDirectory
from lvlm_probe.cli.shared.terminal import note

_SHOWN = 5

REFUSED = 0.1
"""Share of refused rows above which a command has failed: a file with a few broken lines is still that file."""

FORMATS: dict[str, tuple[str, str]] = {
    "plain": (
        "rows of your own: jsonl, json, csv, tsv, parquet, xlsx",
        '{"image": "photo.jpg", "question": "What color is the triangle?", "answer": "The triangle is red."}',
    ),
    "openai": (
        "OpenAI chat completions: request and response, batch output (batch input: --requests)",
        '{"request": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
        '{"url": "photo.jpg"}}, {"type": "text", "text": "What color is the triangle?"}]}]}, '
        '"response": {"choices": [{"message": {"content": "The triangle is red."}}]}}',
    ),
    "vllm": (
        "vLLM: run-batch output, asdict(RequestOutput), outputs[0], choices[0]",
        '{"image": "photo.jpg", "question": "What color is the triangle?", '
        '"outputs": [{"text": " The triangle is red.", "finish_reason": "stop", "stop_reason": null}]}',
    ),
    "sglang": (
        "SGLang: text or output_ids beside meta_info",
        '{"image": "photo.jpg", "question": "What color is the triangle?", "text": "The triangle is red.", '
        '"meta_info": {"finish_reason": {"type": "stop"}}}',
    ),
    "llava": (
        "LLaVA conversations: the last turn of gpt is the answer",
        '{"image": "photo.jpg", "conversations": [{"from": "human", "value": "<image>What color is the triangle?"}, '
        '{"from": "gpt", "value": "The triangle is red."}]}',
    ),
    "lmms-eval": (
        "lmms-eval --log_samples; images by doc_id in --images DIR, or --column image=doc.FIELD",
        '{"doc_id": 0, "doc": {}, "input": "What color is the triangle?", "resps": [["The triangle is red."]]}',
    ),
    "vlmevalkit": (
        "VLMEvalKit xlsx, tsv, csv, json; images by index in --images DIR, or the data set as --requests",
        '{"index": 0, "question": "What color is the triangle?", "answer": "red", '
        '"prediction": "The triangle is red."}',
    ),
}
"""Shape → what is read, and a line that is."""

_Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="A format below, a kind of file (csv, …) or both: csv,llava. Default: by content.",
    ),
]
_Requests = Annotated[
    Path | None,
    typer.Option(
        "--requests", metavar="FILE", help="What was asked, joined by id: batch input, questions, a data set's tsv."
    ),
]
_Fetch = Annotated[bool, typer.Option("--fetch", help="Ask the network for images that are given by URL.")]
_Strict = Annotated[
    bool, typer.Option("--strict", help="Exit code 1 for any refused row; else for more than a tenth of them.")
]


@dataclass(frozen=True)
class AnswerRows:
    """How the rows of a file of answers are read, and when their command has failed."""

    images: ImagesDirectory = None
    column: Columns = None
    format: _Format = None
    requests: _Requests = None
    fetch: _Fetch = False
    strict: _Strict = False

    @property
    def columns(self) -> dict[str, str]:
        """Field → its name in the file. Raises ``ProbeError``."""
        return columns_from(self.column)

    def reading(self) -> dict[str, Any]:
        """Arguments of ``import_answers`` and ``measure``. Raises ``ProbeError``."""
        given = {key: value for key, value in vars(self).items() if key not in ("column", "strict")}
        return {**given, "columns": self.columns}


def formats_help(command: Callable[..., None]) -> str:
    """A command's help from its docstring, and below it the formats with a line each."""
    told = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.__doc__ or ""))
    lines = [f"{name}: {words}\n  {example}" for name, (words, example) in FORMATS.items()]
    return f"{told}\n\n\b\nFormats; each row is told by its content:\n" + "\n".join(lines).replace("[", "\\[")


def tell_refused(sentences: Sequence[str], more: str, reasons: Sequence[tuple[str, int]] = ()) -> None:
    """Warn of the first rows that were refused, and say how many ``more`` there are, and why, by kind."""
    for sentence in sentences[:_SHOWN]:
        note(sentence, kind="warning")
    if len(sentences) > _SHOWN:
        note(f"{len(sentences) - _SHOWN} more {more}")
    if reasons and len(sentences) > 1:
        shown = ", ".join(f"{count} × {kind}" for kind, count in reasons[:6])
        note(f"{len(sentences)} rows refused: {shown}{', …' if len(reasons) > 6 else ''}", kind="warning")


def failures(taken: int, refused: int, differing: Sequence[str], *, strict: bool) -> list[str]:
    """Why a command about a file of answers ends with exit code 1; nothing where it does not.

    Args:
        taken: rows that were taken, now or by an earlier call.
        refused: rows that were not.
        differing: where answers stand whose engine gives other numbers than the model.
        strict: whether a single refused row is too many.
    """
    found = []
    if taken == 0:
        found.append(f"none of the {refused} rows could be taken" if refused else "there are no rows")
    elif refused and (strict or refused > REFUSED * (taken + refused)):
        found.append(f"{refused} of {taken + refused} rows are refused{'' if strict else ', more than a tenth'}")
    if differing:
        shown = ", ".join(differing[:5]) + (", …" if len(differing) > 5 else "")
        found.append(
            f"{len(differing)} of {taken} answers are not this model's: the engine's log-probabilities differ by more "
            f"than 0.1 nats per token, or its prompt has other tokens ({shown}); image, chat template or weights are "
            "others"
        )
    return found
