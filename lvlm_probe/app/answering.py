"""An answer that is read while it is generated, and recorded: its text as it grows, and the trace at last."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextStreamer

from lvlm_probe.models.tokenizers import tokenizer_of
from lvlm_probe.recording.answering import record_answer
from lvlm_probe.recording.token_boxes import BoxCache
from lvlm_probe.trace import Trace


class _Growing(TextStreamer):
    """Puts the text so far where it is read."""

    def __init__(self, tokenizer: Any, put: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._put, self._text = put, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        self._put(self._text)


def answer_growing(
    turn: AbstractContextManager[Any],
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    folder: Path,
    *,
    most: int,
    boxes: BoxCache,
    stop: threading.Event,
) -> Iterator[str | Trace]:
    """Yield the text so far, word by word, and the trace when it is written.

    The model runs in a thread of its own, which ends by itself where nobody reads any more.

    Args:
        turn: held while the model runs.
        folder: of the trace.
        most: length of the answer at most, tokens.
        boxes: as for ``record_answer``.
        stop: ends the answer when it is set; so does leaving the iterator.

    Raises:
        OutOfMemory, ProbeError: as ``record_answer``.
    """
    said: queue.SimpleQueue[str | Trace | BaseException] = queue.SimpleQueue()

    def stopped(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), stop.is_set(), dtype=torch.bool, device=ids.device)

    def work() -> None:
        options: dict[str, Any] = {"max_new_tokens": most, "stopping_criteria": StoppingCriteriaList([stopped])}
        if (tokenizer := tokenizer_of(processor)) is not None:
            options["streamer"] = _Growing(tokenizer, said.put)
        try:
            with turn:
                trace = record_answer(model, processor, images, question, folder, generate=options, boxes=boxes)
            said.put(trace)  # when the next one may run
        except BaseException as error:
            said.put(error)

    threading.Thread(target=work, name="lvlm-probe answer", daemon=True).start()
    try:
        while not isinstance(found := said.get(), Trace):
            if isinstance(found, BaseException):
                raise found
            yield found
        yield found
    finally:
        stop.set()
