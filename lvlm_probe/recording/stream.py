"""An answer word by word, while it is generated and recorded.

``generate()`` runs in a thread of its own, in the context and under the settings of the thread that asked. A stopping
criterion, which sees each token as soon as it is chosen, hands it on and does two things more: it has log P(a_t) read
off the logits at once, not at the next step, and it ends the generation when the reader has gone. Nothing else is done
while the model generates. Words are put together by the reader; attention rows are computed for whoever looks at them;
the baseline pass comes when the answer is complete, as without a stream, and with it the log-likelihood ratios.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from transformers import StoppingCriteriaList

from lvlm_probe.errors import ProbeError
from lvlm_probe.models.tokenizers import Spelling, special_among, tokenizer_of
from lvlm_probe.trace import Trace, open_trace
from lvlm_probe.words import Word, complete_words, group_words, spelled

if TYPE_CHECKING:
    import tempfile

    from lvlm_probe.recording.recorder import GenerationRecorder


@dataclass(frozen=True)
class StreamedWord(Word):
    """A word of an answer, or a token of it (``by="token"``), as it was generated; ``str()`` is its text with the white
    space in front.

    Attributes:
        before: white space between the word before and this one.
        token_ids: its tokens.
        log_prob: log P of its tokens, summed, nats; ``None`` where it cannot be read while the model generates.
        llr: their log-likelihood ratios, summed, nats; ``None`` until the baseline pass, which comes when the answer is
            complete: ``Stream.words`` has it then.
        special: whether it is a token that belongs to no word.
    """

    before: str = ""
    token_ids: tuple[int, ...] = ()
    log_prob: float | None = None
    llr: float | None = None
    special: bool = False

    # No field: what it asks belongs to the thread that generates, and goes into no dictionary or file.
    _attention: ClassVar[Any] = None  # (start, stop) → rows

    def reading(self, attention: Callable[[int, int], np.ndarray | None] | None) -> StreamedWord:
        """This word, with what gives the attention of tokens ``[start, stop)``."""
        object.__setattr__(self, "_attention", attention)
        return self

    def __getstate__(self) -> dict[str, Any]:
        rows = self.attention  # a copy has them, as far as they are known now
        return {**self.__dict__, "_attention": None if rows is None else functools.partial(_as_read, rows)}

    @property
    def attention(self) -> np.ndarray | None:
        """Attention to the image, the mean over its tokens and over heads, ``(layer, image_token)`` float32; computed
        when it is asked for. ``None`` where no rows are recorded."""
        return None if self._attention is None else self._attention(self.start, self.stop)

    def __str__(self) -> str:
        return self.before + self.text


class Feed:
    """What the generating thread and the reader of a stream share; a stopping criterion of the ``generate()`` call.

    Attributes:
        tokens: ``(token id, log P or None)`` of each token, and ``None`` when there are no more.
        stop: set when the reader has gone.
        cut: whether that ended the generation.
        recorder: what records the call; ``None`` where it is not recorded, and after it.
        ends: end-of-sequence ids.
        complete: set when all tokens are there.
        ended: set when the call has returned, and its trace is written.
        trace: what was recorded.
        error: what ``generate()`` raised.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self._folder = folder  # where the trace has no directory of its own: it goes with all that may look at it
        self.tokens: queue.SimpleQueue[tuple[int, float | None] | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.cut = False
        self.recorder: GenerationRecorder | None = None
        self.ends: frozenset[int] = frozenset()
        self.complete, self.ended = threading.Event(), threading.Event()
        self.trace: Trace | None = None
        self.error: BaseException | None = None
        self._seen: int | None = None
        self._first = 0

    def begin(self, recorder: GenerationRecorder | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``generate()`` with this criterion among them."""
        self.recorder = recorder
        if recorder is not None:
            self.ends = recorder.stops.eos
        return {**kwargs, "stopping_criteria": StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), self])}

    def __call__(self, ids: torch.Tensor, scores: object = None, **_: Any) -> torch.Tensor:
        """Hand on the tokens that are new in ``ids`` ``(1, position)``; whether to stop, ``(1,)`` bool."""
        try:
            self._hand_on(ids)
        except Exception:  # the answer is the user's, and the trace has these tokens too
            self._seen = ids.shape[1]
        if self.stop.is_set():
            self.cut = True
        return torch.full((len(ids),), self.cut, dtype=torch.bool, device=ids.device)

    def _hand_on(self, ids: torch.Tensor) -> None:
        if self._seen is None:
            # Most calls show prompt and answer. A model that begins with embeddings shows the answer alone.
            start = None if self.recorder is None else self.recorder.beginning
            whole = start is not None and torch.equal(ids[:, : start.shape[1]], start.to(ids.device))
            self._first = self._seen = start.shape[1] if start is not None and whole else ids.shape[1] - 1
        new = ids[0, self._seen :].tolist()
        alone = self.recorder is not None and len(new) == 1
        for token in new:
            step, self._seen = self._seen - self._first, self._seen + 1
            self.tokens.put((token, self.recorder.chosen(step, ids) if alone and self.recorder else None))

    def generated(self) -> None:
        """Say that there are no more tokens."""
        if self.recorder is not None and self.cut:
            self.recorder.cut_by = "the reader of its stream"
        self.complete.set()
        self.tokens.put(None)

    def kept(self, path: Path) -> None:
        """Say where the trace is."""
        self.trace = open_trace(path)
        self.trace.holds = self._folder

    def attention(self, start: int, stop: int) -> np.ndarray | None:
        """``StreamedWord.attention`` of these tokens."""
        if (recorder := self.recorder) is not None:
            if (rows := recorder.attention_so_far(start, stop)) is not None:
                return rows
            if not self.complete.is_set():
                return None
            self.ended.wait()  # they are on their way to the trace
        kept = None if self.trace is None else self.trace.attention
        return None if kept is None else kept.values[start:stop].mean(axis=(0, 2))


class Stream(Iterator[StreamedWord]):
    """The words of an answer as they are generated, from ``Probe.stream``.

    It ends when the trace is written. Closed before (``close()``, leaving its ``with`` block, Ctrl-C in the loop, or
    being dropped) it stops the generation, and the trace holds what was said until then, ``status="stopped"``. What
    ``generate()`` raises is raised by ``next()``.

    Attributes:
        by: what it gives, ``"word"`` or ``"token"``.
    """

    def __init__(
        self,
        generate: Callable[[Feed], object],
        processor: object | None,
        by: Literal["word", "token"],
        folder: tempfile.TemporaryDirectory[str] | None,
    ) -> None:
        self.by = by
        self._feed = feed = Feed(folder)
        self._tokenizer = tokenizer_of(processor)
        self._spelling = Spelling(self._tokenizer)
        self._is_special: Callable[[int], bool] | None = None
        self._special: list[bool] = []
        self._log_probs: list[float | None] = []
        self._ids: list[int] = []
        self._told = 0  # tokens before the end of the words already given
        self._context = 0  # where the last of these words begins: how a text goes on depends on what it goes on from
        self._ready: deque[StreamedWord] = deque()
        self._given: list[StreamedWord] = []
        self._complete: tuple[StreamedWord, ...] | None = None
        self._ended = False  # whether all tokens were taken

        def run() -> None:  # holds no stream: one that is dropped ends this thread
            try:
                generate(feed)
            except BaseException as error:
                feed.error = error
            finally:
                feed.recorder = None  # with the inputs of the call
                feed.ended.set()
                feed.tokens.put(None)

        weakref.finalize(self, feed.stop.set).atexit = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(run,), name="lvlm_probe stream")
        self._thread.start()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamedWord:
        try:
            while not self._ready and not self._ended:
                if (item := self._feed.tokens.get()) is not None:
                    self._take(*item)
                    continue
                self._ended = True
                self._spelling.end()
                if self.by == "word":
                    self._group(group_words)
            if not self._ready:
                self._thread.join()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._ready:
            self._given.append(self._ready.popleft())
            return self._given[-1]
        error, self._feed.error = self._feed.error, None
        if error is not None:
            raise error
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "generating" if self._thread.is_alive() else "ended"
        return f"<Stream {state}: {''.join(map(str, self._given))[:200]!r}>"

    def close(self) -> None:
        """End the generation, if it goes on, and wait for the trace. Calling it again does nothing."""
        self._feed.stop.set()
        self._thread.join()
        self._ended = True
        self._ready.clear()

    @property
    def words(self) -> tuple[StreamedWord, ...]:
        """The words given so far; when the stream has ended, all words of the trace, with log-likelihood ratios."""
        if self._thread.is_alive() or self._feed.trace is None:
            return tuple(self._given)
        if self._complete is None:
            self._complete = self._of_trace(self._feed.trace)
        return self._complete

    @property
    def trace(self) -> Trace:
        """What was recorded, when the stream has ended.

        Raises:
            ProbeError: it has not ended, or nothing was recorded.
        """
        if self._thread.is_alive():
            raise ProbeError("the answer is being generated: read the stream to its end, or close() it, for its trace")
        if self._feed.trace is None:
            raise ProbeError("nothing was recorded of this answer; what generate() raised, or a warning, says why")
        return self._feed.trace

    # ------------------------------------------------------------------ from tokens to words

    def _take(self, token: int, log_prob: float | None) -> None:
        if self._is_special is None:
            self._is_special = special_among(self._tokenizer, self._feed.ends)
        self._spelling.add(token)
        self._ids.append(token)
        self._special.append(self._is_special(token))
        self._log_probs.append(log_prob)
        if self.by == "token":
            step = len(self._ids) - 1
            self._ready.append(self._word(Word(self._spelling.pieces[step], step, step + 1)))
        else:
            self._group(complete_words)

    def _group(self, words_of: Callable[[Sequence[str], Sequence[bool]], list[Word]]) -> None:
        """Put the words that are complete into ``_ready``."""
        pieces, special = self._spelling.pieces[self._context :], self._special[self._context :]
        words = words_of(pieces, special)
        texts, _ = spelled(_without(pieces, special), words)
        for word, (before, _) in zip(words, texts, strict=True):
            if word.start + self._context < self._told:
                continue
            found = replace(word, start=word.start + self._context, stop=word.stop + self._context)
            self._ready.append(self._word(found, before))
            self._told = found.stop
        if words:
            self._context += words[-1].start

    def _word(self, word: Word, before: str = "") -> StreamedWord:
        values = self._log_probs[word.start : word.stop]
        known = [value for value in values if value is not None]
        total = sum(known) if len(known) == len(values) else None
        return self._streamed(word, before, self._ids, self._special, total, None)

    def _streamed(
        self,
        word: Word,
        before: str,
        ids: Sequence[int],
        special: Sequence[bool],
        log_prob: float | None,
        llr: float | None,
    ) -> StreamedWord:
        kind = self.by == "token" and bool(special[word.start])
        rows = None if log_prob is None else self._feed.attention
        span = tuple(ids[word.start : word.stop])
        return StreamedWord(word.text, word.start, word.stop, before, span, log_prob, llr, kind).reading(rows)

    def _of_trace(self, trace: Trace) -> tuple[StreamedWord, ...]:
        """The words, or tokens, of a trace."""
        pieces, special, ids, llr = trace.tokens, trace.special.tolist(), trace.token_ids.tolist(), trace.llr
        words = trace.words
        before = [lead for lead, _ in spelled(_without(pieces, special), words)[0]]
        if self.by == "token":
            words = [Word(piece, step, step + 1) for step, piece in enumerate(pieces)]
            before = [""] * len(words)
        found = []
        for word, lead in zip(words, before, strict=True):
            own = slice(word.start, word.stop)
            ratio = None if llr is None else float(llr[own].sum())
            found.append(self._streamed(word, lead, ids, special, float(trace.log_probs[own].sum()), ratio))
        return tuple(found)


def _as_read(rows: np.ndarray, _start: int, _stop: int) -> np.ndarray:
    return rows


def _without(pieces: Sequence[str], special: Sequence[bool]) -> list[str]:
    return ["" if flag else piece for piece, flag in zip(pieces, special, strict=True)]


def settings_here(device: torch.device) -> Callable[[], contextlib.ExitStack]:
    """What PyTorch keeps for each thread as it is in this one, to be entered in another: autocast, modes of autograd,
    the default device, CUDA's device and stream.

    Args:
        device: where the model is.
    """
    kinds = [(kind, torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type} if torch.is_autocast_enabled(kind)]
    caching, grad = torch.is_autocast_cache_enabled(), torch.is_grad_enabled()
    inference, default = torch.is_inference_mode_enabled(), torch.get_default_device()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter() -> contextlib.ExitStack:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(torch.inference_mode(inference))
            for kind, dtype in kinds:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=caching))
            if default != torch.device("cpu"):
                stack.enter_context(default)
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            return stack.pop_all()

    return enter
