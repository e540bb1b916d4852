"""Options that several commands share, each written once.

Options that always go together are one parameter, whose type is a dataclass of them (``Loading``, ``Asked``). The
command line has each field by itself (``spelled_out``).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lvlm_probe.cli.shared.completion import choices, complete_methods

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
_Images = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="The image; repeat it for a prompt with several.")
]
_Videos = Annotated[
    list[Path] | None,
    typer.Option("--video", metavar="FILE", help="A video: MP4, WebM, GIF, …; repeat it for a prompt with several."),
]
_NumFrames = Annotated[
    int | None,
    typer.Option(
        "--num-frames",
        metavar="N",
        min=1,
        help="How many frames of the video the model is shown. Default: what its processor samples, or 16.",
    ),
]
_Fps = Annotated[
    float | None, typer.Option("--fps", metavar="N", help="The same for each second of it, instead of --num-frames.")
]
_Question = Annotated[
    str | None, typer.Option("--question", metavar="TEXT", help="What to ask about the image. Captioners take none.")
]
_Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="How the question is put, instead of by the chat template or the family's rule: TEXT with {question} and, "
        "for image tokens, {images}. Of a captioner or reader: its task, or how the answer begins.",
    ),
]
_Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        autocompletion=choices("cpu", "cuda", "mps"),
        help="cpu, cuda, cuda:1, mps. Default: cuda if any.",
    ),
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        autocompletion=choices("float32", "bfloat16", "float16", "auto"),
        help="float32, bfloat16, float16, auto. Default: float32 on the CPU, else auto.",
    ),
]
_Attn = Annotated[
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
SearchDtype = Annotated[
    str | None,
    typer.Option(
        "--search-dtype",
        metavar="NAME",
        autocompletion=choices("bfloat16"),
        help="bfloat16: search maps in it, and measure them as ever. Of a float32 model; slower on processors without "
        "bfloat16 instructions.",
    ),
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


@dataclass(frozen=True)
class Loading:
    """How a model is loaded, as ``load_model`` takes it."""

    device: _Device = None
    dtype: _Dtype = None
    attn: _Attn = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class Asked:
    """What a model is asked, and shown."""

    image: _Images = None
    video: _Videos = None
    num_frames: _NumFrames = None
    fps: _Fps = None
    question: _Question = None
    prompt: _Prompt = None


@dataclass(frozen=True)
class Comparing:
    """Methods that are compared on the same answers, and the page of it."""

    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAMES",
            autocompletion=complete_methods,
            help="Explain the traces by these methods first (commas between, or all), and compare them on one page.",
        ),
    ] = None
    words: Annotated[
        list[str] | None,
        typer.Option("--words", metavar="TEXT", help="With --methods: explain this word of every answer; repeatable."),
    ] = None
    against: AgainstOption = None
    search_dtype: SearchDtype = None
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="With --methods: the page; scores as JSON beside it. Default: comparison.html beside the traces.",
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --methods: replace the page if it exists.")] = (
        False
    )
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="With --methods: score all points of the curves. Default: few, areas within 0.005 unless curves turn.",
        ),
    ] = False
    wide: Annotated[bool, typer.Option("--wide", help="With --methods: print every column of the table.")] = False
    open_it: OpenPage = False


def given(context: typer.Context, *names: str) -> list[str]:
    """The options of these parameters that stand on the command line, as they are written there."""
    written = {one.name: one.opts[0] for one in context.command.params}
    said = {name: context.get_parameter_source(name) for name in names}
    return [written[name] for name, source in said.items() if source is not None and source.name == "COMMANDLINE"]


def spelled_out(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that is given the fields of its groups of options, each as a parameter of its own."""
    signature = inspect.signature(command, eval_str=True)
    groups = {name: one for name, one in signature.parameters.items() if dataclasses.is_dataclass(one.annotation)}
    if not groups:
        return command
    spelled: list[inspect.Parameter] = []
    for name, one in signature.parameters.items():
        if name in groups:
            hints = get_type_hints(one.annotation, include_extras=True)
            fields = vars(one.default).items()
            spelled += [one.replace(name=key, annotation=hints[key], default=value) for key, value in fields]
        else:
            spelled.append(one)

    def called(**given: Any) -> None:
        for name, one in groups.items():
            given[name] = one.annotation(**{key: given.pop(key) for key in vars(one.default)})
        command(**given)

    called.__name__, called.__module__, called.__doc__ = command.__name__, command.__module__, command.__doc__
    called.__annotations__ = {one.name: one.annotation for one in spelled}
    called.__signature__ = signature.replace(parameters=spelled)  # type: ignore[attr-defined]
    return called
