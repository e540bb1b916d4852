"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.completion import choices

__all__ = [
    "AgainstOption",
    "Attn",
    "BaselineOption",
    "Columns",
    "Device",
    "Dtype",
    "Fps",
    "Images",
    "ImagesDirectory",
    "Json",
    "KeptIn",
    "Maps",
    "MaxNewTokens",
    "MethodParameters",
    "Model",
    "NumFrames",
    "OpenPage",
    "OptionalModel",
    "Prompt",
    "Question",
    "Row",
    "StudyFile",
    "TraceOrDirectory",
    "TrustRemoteCode",
    "Videos",
    "Words",
]

AgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="TEXT",
        help="Why these words and not TEXT in their place. Repeat it for several, any of which; 'next' is the model's "
        "own second choice.",
    ),
]

_MODEL_HELP = "Model directory, hub id, or 'demo' for the embedded one."

Model = Annotated[str, typer.Option("--model", metavar="DIR_OR_ID", autocompletion=choices("demo"), help=_MODEL_HELP)]
OptionalModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR_OR_ID",
        autocompletion=choices("demo"),
        help=f"{_MODEL_HELP} Left out: the trace's own, if you agree.",
    ),
]
Images = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="The image; repeat it for a prompt with several.")
]
Videos = Annotated[
    list[Path] | None,
    typer.Option("--video", metavar="FILE", help="A video: MP4, WebM, GIF, …; repeat it for a prompt with several."),
]
NumFrames = Annotated[
    int | None,
    typer.Option(
        "--num-frames",
        metavar="N",
        min=1,
        help="How many frames of the video the model is shown. Default: what its processor samples, or 16.",
    ),
]
Fps = Annotated[
    float | None, typer.Option("--fps", metavar="N", help="The same for each second of it, instead of --num-frames.")
]
Question = Annotated[
    str | None, typer.Option("--question", metavar="TEXT", help="What to ask about the image. Captioners take none.")
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="How the question is put, instead of by the chat template or the family's rule: TEXT with {question} and, "
        "for image tokens, {images}. Of a captioner or reader: its task, or how the answer begins.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        autocompletion=choices("cpu", "cuda", "mps"),
        help="cpu, cuda, cuda:1, mps. Default: cuda if any.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=choices("float32", "bfloat16", "float16", "auto"),
        help="float32, bfloat16, float16, auto. Default: float32 on the CPU, else auto.",
    ),
]
Attn = Annotated[
    str | None,
    typer.Option(
        "--attn",
        metavar="NAME",
        autocompletion=choices("sdpa", "eager"),
        help="Attention implementation: sdpa or eager. Default: the model's.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model: only for one you trust.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of the answer, tokens.")]
BaselineOption = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="KIND",
        autocompletion=choices("blur", "blank", "noise", "mean", "first_frame", "middle_frame", "shuffled_frames"),
        help="What hides a part: blur, blank, noise, mean, or an image's path; of a video also first_frame, "
        "middle_frame, shuffled_frames.",
    ),
]
Maps = Annotated[
    list[Path], typer.Argument(metavar="PATH...", help="Maps, traces (their maps), or directories (all maps in them).")
]
TraceOrDirectory = Annotated[
    Path, typer.Argument(metavar="TRACE", help="A trace file, or a directory: its last trace.")
]
KeptIn = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Kept in DIR/explanations (default: beside the trace)."),
]
Words = Annotated[
    list[str] | None,
    typer.Option("--words", metavar="TEXT", help="Of this word or phrase of the answer; repeatable."),
]
MethodParameters = Annotated[
    list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A parameter of the method; repeatable.")
]
OpenPage = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]
Row = Annotated[int | None, typer.Option("--row", min=0, help="Which row of a batch, counted from 0.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="FIELD=NAME", help="For a field of another name, e.g. answer=pred; repeatable."),
]
ImagesDirectory = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", help="What paths of images are relative to. Default: the file's place."),
]
StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY.yaml", help="The study: models, data sets, methods, settings.")
]
