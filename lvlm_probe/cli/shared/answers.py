"""Answers at the command line: asked and recorded, shown to a person, listed for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.cli.shared.terminal import answer_text, note, say, stage, stop
from lvlm_probe.errors import ProbeError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lvlm_probe.cli.shared.inputs import Shown
    from lvlm_probe.serving import Server
    from lvlm_probe.trace import Trace


def ask(
    model: torch.nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    question: str | None,
    directory: Path,
    *,
    shown: Shown | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    attention: bool = True,
    baseline: str | Image.Image = "blur",
) -> Trace:
    """Generate one answer with the probe attached, and return its trace.

    Args:
        shown: where the images come from, and the videos after them.

    Raises:
        ImageError: a video cannot be read.
        ProbeError: the run was not recorded, or recording went wrong; the message says why.
    """
    from lvlm_probe.recording.answering import record_answer

    options = {"max_new_tokens": max_new_tokens}
    with stage("answering and recording"):
        return record_answer(
            model,
            processor,
            images,
            question or "",
            directory,
            **({} if shown is None else {"videos": shown.videos, **shown.sampling}),
            generate=options,
            prompt=prompt,
            note=note,
            attention=attention,
            baseline=baseline,
            meta=None if shown is None else dict(shown.files),
        )


def ask_server(
    server: Server,
    images: Sequence[Image.Image],
    question: str | None,
    directory: Path,
    *,
    max_new_tokens: int = 128,
    baseline: str | Image.Image = "blur",
) -> Trace:
    """Let a server answer, and return the trace. Raises ``ProbeError``."""
    if question is None or not question.strip():
        raise ProbeError('there is no question: add --question "…"')
    with stage("asking the server"):
        return server.ask(list(images), question, out=directory, max_tokens=max_new_tokens, baseline=baseline)


@contextmanager
def nothing_before() -> Iterator[None]:
    """Ask for the first thing that a command makes: Ctrl-C ends it in a sentence, as there is nothing to keep."""
    try:
        yield
    except KeyboardInterrupt:
        raise stop("stopped while the model was answering; nothing is left to resume") from None


def show_question(trace: Trace) -> None:
    """Show the question, or the prompt where it is not known which part of it is the question."""
    if trace.question:
        say(("Q  ", "dim"), trace.question)
    else:
        say(("prompt  ", "dim"), trace.prompt)


def show_answer(trace: Trace) -> None:
    """Show question and answer, with the words that the image decides in bold."""
    show_question(trace)
    llr = trace.llr
    say(("A  ", "dim"), answer_text(trace.words, trace.tokens, None if llr is None else llr.tolist(), ()))


def trace_summary(trace: Trace) -> dict[str, Any]:
    """Return a trace for programs."""
    llr = trace.llr
    return {
        "trace": str(trace.path),
        "trace_id": trace.trace_id,
        "status": trace.status,
        "question": trace.question,
        "prompt": trace.prompt,
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
