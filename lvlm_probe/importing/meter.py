"""The language-prior meter: which answers came from the picture, and which from habit; no heatmaps.

One extra pass per answer, on the baseline picture, tells: what the model would have said anyway keeps its probability.
Beside the ``drop`` of the answer's probability and its ``band`` (``drops``) there are, with LLR_t the log-likelihood
ratio of token t (paper, Eq. 6):

* ``share``: of the words, those with LLR > alpha; a word's LLR is the sum over its tokens. Words are what holds a
  letter or a digit: punctuation does not count;
* ``mean_llr``: of the same words, nats.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.escaping import csv_cell
from lvlm_probe.files import write_whole
from lvlm_probe.importing.drops import BANDS, Band, band_of, drop_of
from lvlm_probe.importing.forced_recorder import difference, forced, said_by
from lvlm_probe.importing.rows import AnswerRow, BadRow, Source, read_rows, reason_of
from lvlm_probe.recording.probe import attach
from lvlm_probe.recording.recorder import RecordOptions
from lvlm_probe.replaying import Replay, replay
from lvlm_probe.replaying.answer_source import LiveTrace
from lvlm_probe.selection import word_llr
from lvlm_probe.trace import Trace, open_store, open_trace
from lvlm_probe.trace.records import TraceFields
from lvlm_probe.words import ALPHA, Word, group_words

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["BANDS", "Reading", "Unread", "band_of", "measure", "ranked", "read_answer", "traces_in", "write_csv"]

THUMBNAIL = 88
"""Longest side of the picture that a reading keeps, pixels."""


@dataclass(frozen=True)
class Reading:
    """What the meter says of one answer; the module's docstring defines the numbers.

    Attributes:
        source: file and line, or file and row, of the answer.
        id: its name, where it has one.
        question, answer: as text.
        pieces: display text of the tokens, special ones empty.
        words: of the answer, with their tokens.
        llr: per word, nats.
        counts: per word, whether it holds a letter or a digit.
        log_prob, baseline_log_prob: of the whole answer, nats.
        share, mean_llr, drop, drop_normalised: NaN where nothing can be said.
        baseline: what the picture was replaced by.
        elsewhere: the answer was given by another engine than the model that was measured.
        differs: how what that engine gives differs from this model, where it did not run the same; else empty.
        picture: small, for showing.
    """

    source: str
    id: str | None
    question: str
    answer: str
    pieces: tuple[str, ...] = field(repr=False)
    words: tuple[Word, ...] = field(repr=False)
    llr: tuple[float, ...] = field(repr=False)
    counts: tuple[bool, ...] = field(repr=False)
    alpha: float
    log_prob: float
    baseline_log_prob: float
    share: float
    mean_llr: float
    drop: float
    drop_normalised: float
    baseline: str = ""
    elsewhere: bool = False
    differs: str = ""
    picture: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def band(self) -> Band:
        """Which of the paper's three classes the joint drop falls into."""
        return band_of(self.drop)

    @property
    def seen(self) -> tuple[str, ...]:
        """The words with LLR > alpha, in order."""
        chosen = zip(self.words, self.llr, self.counts, strict=True)
        return tuple(word.text for word, llr, counts in chosen if counts and llr > self.alpha)


@dataclass(frozen=True)
class Unread:
    """An answer that could not be measured, and why."""

    source: str
    reason: str


def read_answer(
    pieces: Sequence[str],
    special: Sequence[bool],
    log_probs: Sequence[float] | np.ndarray,
    llr: Sequence[float] | np.ndarray,
    *,
    alpha: float = ALPHA,
    **facts: Any,
) -> Reading:
    """A reading from the numbers of one answer.

    Args:
        pieces: display text of the tokens, ``(step,)``.
        special: which are special tokens, ``(step,)``.
        log_probs: log P(a_t) with the picture, ``(step,)``, nats.
        llr: log-likelihood ratios, ``(step,)``, nats.
        alpha: LLR above which a word came from the picture.
        facts: the further fields of the reading.

    Raises:
        ExplainError: there is no token but special ones.
    """
    fallen = drop_of(log_probs, llr, special)
    words = group_words(list(pieces), list(special))
    ratios = word_llr(words, llr)
    counts = [any(sign.isalnum() for sign in word.text) for word in words]
    counted = [ratio for ratio, counts_ in zip(ratios, counts, strict=True) if counts_]
    shown = tuple("" if flag else piece for piece, flag in zip(pieces, special, strict=True))
    return Reading(
        answer="".join(shown).strip(),
        pieces=shown,
        words=tuple(words),
        llr=tuple(ratios),
        counts=tuple(counts),
        alpha=alpha,
        log_prob=fallen.log_prob,
        baseline_log_prob=fallen.baseline_log_prob,
        share=float(np.mean([ratio > alpha for ratio in counted])) if counted else math.nan,
        mean_llr=float(np.mean(counted)) if counted else math.nan,
        drop=fallen.drop,
        drop_normalised=fallen.drop_normalised,
        **facts,
    )


def ranked(readings: Sequence[Reading]) -> list[Reading]:
    """Habit first: in ascending order of the joint drop; those it is not known of come last."""

    def key(reading: Reading) -> float:
        ratio = reading.log_prob - reading.baseline_log_prob  # the drop itself rounds to 1 soon
        return math.inf if math.isnan(ratio) else ratio

    return sorted(readings, key=key)


def measure(
    source: str | os.PathLike[str],
    model: torch.nn.Module | None = None,
    processor: object | None = None,
    *,
    alpha: float = ALPHA,
    baseline: str | Image.Image | None = None,
    images: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    requests: str | os.PathLike[str] | None = None,
    fetch: bool = False,
    limit: int | None = None,
) -> Iterator[Reading | Unread]:
    """Reads the meter on every answer of a file, or of a directory of traces, lazily.

    A row of a file costs a pass with the picture and one with the baseline; a trace costs none if it holds its
    log-likelihood ratios, else the one with the baseline.

    Args:
        source: a file as ``import_answers`` takes it, or a directory or file of traces.
        model: the model; of traces that hold their ratios none is needed.
        processor: its processor.
        alpha: LLR above which a word came from the picture.
        baseline: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``, or a picture. Given for traces, it is measured
            again; ``None`` takes what a trace was recorded with, else a full blur. It is not strengthened.
        images, columns, format, requests, fetch: as for ``import_answers``.
        limit: answers to look at, at most.

    Raises:
        StudyError: a file of answers without a model; the file cannot be read.
        TraceError: there is no such directory.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".h5":
        return _readings(_traces(path, model, processor, baseline), alpha, limit)
    if model is None or processor is None:
        raise StudyError(f"{path} holds answers, which have to go through a model: give the model and its processor")
    rows = Source(
        path,
        columns or {},
        format,
        None if requests is None else Path(requests),
        None if images is None else Path(images),
        fetch,
    )
    return _readings(_rows(rows, model, processor, baseline or "blur"), alpha, limit)


_Numbers = tuple[TraceFields, np.ndarray, dict[str, Any]]
"""An answer, its log-likelihood ratios, and further fields of the reading."""
_Answers = Generator[tuple[str, Callable[[], _Numbers]], None, None]
"""Where an answer stands, and what measures it or raises the reason why it cannot be measured."""


def _readings(answers: _Answers, alpha: float, limit: int | None) -> Iterator[Reading | Unread]:
    with contextlib.closing(answers):
        for where, numbers in itertools.islice(answers, limit):
            try:
                made, llr, facts = numbers()
                special = made.special.tolist()
                yield read_answer(made.tokens, special, made.log_probs, llr, alpha=alpha, source=where, **facts)
            except Exception as error:
                yield Unread(where, reason_of(error))


def _rows(source: Source, model: torch.nn.Module, processor: object, baseline: str | Image.Image) -> _Answers:
    """Answers of other engines: a pass with the image, and one with the baseline."""

    def numbers(row: AnswerRow | BadRow) -> _Numbers:
        if isinstance(row, BadRow):
            raise row
        images = row.open_images(source.places, fetch=source.fetch)
        options = RecordOptions(llr=False, attention=False, boxes=False, question=row.question or row.prompt)
        (made,) = forced(probe, row, images, options).rows
        player = Replay(LiveTrace(made, images), model, processor, check_pixels=False).over(baseline)
        facts = {"id": row.id, "question": made.question or "", "elsewhere": True, "picture": _small(images[0])}
        facts["differs"] = found.sentence if (found := difference(made, row, probe)).serious else ""
        llr = made.log_probs - player.baseline_log_probs.numpy()
        return made, llr, {**facts, "baseline": _named(player.baseline)}

    with attach(model, processor) as probe:
        for line, row in read_rows(source):
            yield f"{source.path.name}, line {line}", functools.partial(numbers, row)


def _traces(
    path: Path, model: torch.nn.Module | None, processor: object | None, baseline: str | Image.Image | None
) -> _Answers:
    """Recorded answers: a pass with the baseline where it is another than theirs, or they have none."""

    def numbers(trace: Trace | ProbeError) -> _Numbers:
        if isinstance(trace, ProbeError):
            raise trace
        llr, used = _ratios(trace, model, processor, baseline)
        imported = said_by(trace)
        facts = {"id": (imported or {}).get("id"), "question": trace.question or "", "picture": _picture(trace)}
        return trace, llr, {**facts, "elsewhere": imported is not None, "baseline": used}

    for file, trace in traces_in(path):
        row = f", row {trace.row}" if isinstance(trace, Trace) and trace.rows > 1 else ""
        yield f"{file.name}{row}", functools.partial(numbers, trace)


def traces_in(path: Path) -> Iterator[tuple[Path, Trace | ProbeError]]:
    """Every trace of a file or a directory; what cannot be read comes as the reason why, and does not end the rest."""
    for file in open_store(path).files:
        try:
            first = open_trace(file)
            yield file, first
            for row in range(1, first.rows):
                yield file, open_trace(file, row=row)
        except ProbeError as error:
            yield file, error


def _ratios(
    trace: Trace, model: torch.nn.Module | None, processor: object | None, baseline: str | Image.Image | None
) -> tuple[np.ndarray, str]:
    """LLR per token, and what the baseline was."""
    if baseline is None and trace.llr is not None:
        return trace.llr, _named(trace.baseline or {})
    if model is None:
        what = "another baseline than it was recorded with" if trace.llr is not None else "its log-likelihood ratios"
        raise StudyError(f"{what} cost one more pass: give the model (--model)")
    player = replay(trace, model, processor)
    if baseline is not None:
        player = player.over(baseline)
    return trace.log_probs - player.baseline_log_probs.numpy(), _named(player.baseline)


def _named(baseline: Mapping[str, Any]) -> str:
    kind = str(baseline.get("kind") or "unknown")
    if baseline.get("limit"):
        return f"{kind}, down to the {baseline['limit']}"
    strength = baseline.get("strength")
    return f"{kind} {strength:g}" if isinstance(strength, int | float) else kind


def _picture(trace: Trace) -> Image.Image | None:
    with contextlib.suppress(ProbeError, OSError):
        return _small(trace.image)
    return None


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


COLUMNS = (
    "rank", "source", "id", "question", "answer", "band", "drop", "drop_normalised", "share", "mean_llr", "words",
    "words_from_picture", "log_prob", "baseline_log_prob", "baseline", "elsewhere", "reason",
)  # fmt: skip
"""Columns of the csv: fields of ``Reading``; ``words`` is their number, ``reason`` why an answer is not measured."""


def write_csv(readings: Sequence[Reading], path: str | os.PathLike[str], *, unread: Sequence[Unread] = ()) -> Path:
    """Writes readings, in the order given, and below them what could not be measured, as csv.

    A question or an answer that a spreadsheet would compute (``=…``) has an apostrophe before it: see ``csv_cell``.

    Raises:
        StudyError: the file cannot be written.
    """
    path = Path(path)
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="")
    writer.writeheader()
    for rank, reading in enumerate(readings, start=1):
        record = {name: getattr(reading, name) for name in COLUMNS if hasattr(reading, name)}
        numbers = {key: f"{value:.6g}" for key, value in record.items() if isinstance(value, float)}
        seen = "; ".join(reading.seen)
        words = {"rank": rank, "words": sum(reading.counts), "words_from_picture": seen}
        cells = {**record, **numbers, **words, "elsewhere": int(reading.elsewhere)}
        writer.writerow({name: csv_cell(cell) for name, cell in cells.items()})
    for one in unread:
        writer.writerow({"source": csv_cell(one.source), "reason": csv_cell(one.reason)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, file.getvalue())
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error}") from error
    return path
