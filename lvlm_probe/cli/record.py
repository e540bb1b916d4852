"""``lvlm-probe record``: ask a model a question about an image or a video and keep the run as a trace file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lvlm_probe.cli.shared.answers import ask, nothing_before, show_answer, trace_summary
from lvlm_probe.cli.shared.inputs import baseline_from, open_shown, output_directory
from lvlm_probe.cli.shared.models import DEMO, load_model
from lvlm_probe.cli.shared.options import Asked, BaselineOption, Json, Loading, MaxNewTokens, Model
from lvlm_probe.cli.shared.terminal import print_json, quoted_path, say, stored_path


def record(
    model: Model,
    asked: Asked = Asked(),
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory for the trace; an existing one is added to.")
    ] = Path("runs"),
    max_new_tokens: MaxNewTokens = 128,
    attention: Annotated[bool, typer.Option(help="Keep decoder attention from answer tokens to image tokens.")] = True,
    baseline: BaselineOption = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Ask a model about an image or a video and keep the run as a trace file, which can be explained at any time.

    Example:  lvlm-probe record --model demo --image scene.png --question "What color is the circle?" --out runs/demo
    Example:  lvlm-probe record --model path/to/model --video clip.mp4 --num-frames 8 --question "What happens?"
    """
    shown = open_shown(asked)
    directory = output_directory(out)
    own_baseline = baseline_from(baseline, video=bool(shown.videos)) or "blur"
    loaded, processor = load_model(model, **vars(loading))
    with nothing_before():
        trace = ask(
            loaded,
            processor,
            shown.images,
            asked.question,
            directory,
            shown=shown,
            prompt=asked.prompt,
            max_new_tokens=max_new_tokens,
            attention=attention,
            baseline=own_baseline,
        )
    if as_json:
        print_json(trace_summary(trace))
        return
    show_answer(trace)
    say("trace: ", (stored_path(trace.path), "bold"))
    named = "" if model == DEMO else f" --model {shlex.quote(model)}"
    say("next:  ", f"lvlm-probe explain {quoted_path(trace.path)}{named}")
