"""``lvlm-probe record``: ask a model a question about a picture and keep the run as a trace file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvlm_probe.cli.shared.inputs import open_images, output_directory
from lvlm_probe.cli.shared.maps import baseline_from
from lvlm_probe.cli.shared.models import DEMO, load_model
from lvlm_probe.cli.shared.options import (
    Attn,
    BaselineOption,
    Device,
    Dtype,
    Images,
    Json,
    MaxNewTokens,
    Model,
    Question,
    TrustRemoteCode,
)
from lvlm_probe.cli.shared.terminal import answer_text, note, print_json, quoted_path, say, stage, stop, stored_path
from lvlm_probe.errors import ProbeError
from lvlm_probe.models.prompts import chat_inputs, placed

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lvlm_probe.trace import Trace

__all__ = ["ask", "record", "trace_summary"]


def record(
    model: Model,
    image: Images = None,
    question: Question = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory for the trace; an existing one is added to.")
    ] = Path("runs"),
    max_new_tokens: MaxNewTokens = 128,
    attention: Annotated[bool, typer.Option(help="Keep decoder attention from answer tokens to image tokens.")] = True,
    baseline: BaselineOption = None,
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Ask a model about a picture and keep the run as a trace file, which can be explained at any time.

    Example:  lvlm-probe record --model demo --image scene.png --question "What color is the circle?" --out runs/demo
    """
    pictures = open_images(image or [])
    asked = required_question(question)
    directory = output_directory(out)
    own_baseline = baseline_from(baseline) or "blur"
    loaded, processor = load_model(model, device=device, dtype=dtype, attn=attn, trust_remote_code=trust_remote_code)
    trace = ask(
        loaded,
        processor,
        pictures,
        asked,
        directory,
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


def required_question(question: str | None) -> str:
    """The question, or ``ProbeError``."""
    if question is None or not question.strip():
        raise ProbeError('there is no question: add --question "…"')
    return question


def ask(
    model: torch.nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    directory: Path,
    *,
    max_new_tokens: int = 128,
    attention: bool = True,
    baseline: str | Image.Image = "blur",
) -> Trace:
    """Generates one answer with the probe attached; returns its trace.

    Raises:
        ProbeError: the run was not recorded, or recording went wrong; the message says why.
    """
    from lvlm_probe import attach

    probe = attach(model, processor)
    try:
        with stage("answering and recording"):
            with probe.record(
                directory, images=list(images), attention=attention, baseline=baseline, question=question
            ) as recording:
                inputs = placed(chat_inputs(processor, images, question, note=note), model)
                model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
            if not recording.paths:
                raise ProbeError("nothing was recorded: " + ("; ".join(recording.faults) or "the model saw no picture"))
        trace: Trace = recording.traces[-1]
    except KeyboardInterrupt:
        raise stop("stopped while the model was answering; nothing is left to resume") from None
    finally:
        probe.detach()
    if trace.status == "error":
        raise ProbeError(f"the recording of {trace.path} is faulty: {trace.error}")
    return trace


def show_answer(trace: Trace) -> None:
    """Question and answer, with the words that the picture decides in bold."""
    if trace.question:
        say(("Q  ", "dim"), trace.question)
    llr = trace.llr
    say(("A  ", "dim"), answer_text(trace.words, trace.tokens, None if llr is None else llr.tolist(), ()))


def trace_summary(trace: Trace) -> dict[str, Any]:
    """A trace for programs."""
    llr = trace.llr
    return {
        "trace": str(trace.path),
        "trace_id": trace.trace_id,
        "status": trace.status,
        "question": trace.question,
        "answer": trace.answer,
        "words": [
            {
                "text": word.text,
                "tokens": [word.start, word.stop],
                "log_prob": float(trace.log_probs[word.start : word.stop].sum()),
                "llr": None if llr is None else float(llr[word.start : word.stop].sum()),
            }
            for word in trace.words
        ],
        "notes": list(trace.notes),
        "bytes": trace.nbytes,
    }
