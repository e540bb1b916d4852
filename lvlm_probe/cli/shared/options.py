"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Attn",
    "BaselineOption",
    "Device",
    "Dtype",
    "Images",
    "Json",
    "MaxNewTokens",
    "OptionalModel",
    "Question",
    "Row",
    "TrustRemoteCode",
]

_MODEL_HELP = "Model directory, hub id, or 'demo' for the embedded one."

Model = Annotated[str, typer.Option("--model", metavar="DIR_OR_ID", help=_MODEL_HELP)]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR_OR_ID", help=f"{_MODEL_HELP} Left out: the trace's own, if you agree."),
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="The picture; repeat it for a prompt with several.")
]
Question = Annotated[str | None, typer.Option("--question", metavar="TEXT", help="What to ask about the picture.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps. Default: cuda if any.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="NAME", help="float32, bfloat16, float16, auto. Default: float32 on the CPU, else auto."
    ),
]
Attn = Annotated[
    str | None,
    typer.Option("--attn", metavar="NAME", help="Attention implementation: sdpa or eager. Default: the model's."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model: only for one you trust.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of the answer, tokens.")]
BaselineOption = Annotated[
    str | None,
    typer.Option(
        "--baseline", metavar="KIND", help="What hides a part: blur, blank, noise, mean, or a picture's path."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
Row = Annotated[int | None, typer.Option("--row", min=0, help="Which row of a batch, counted from 0.")]
