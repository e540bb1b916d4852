"""The language-prior meter: which words came from the image, from habit, or not from this model.

No heatmaps: one extra pass per answer, on the baseline image, tells what the model would have said anyway; the pass
with the image tells what it would rather have said. ``word_origins`` defines the numbers and the classes.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lvlm_probe.errors import ExplainError, ProbeError, StudyError
from lvlm_probe.escaping import csv_cell
from lvlm_probe.files import write_whole
from lvlm_probe.importing.forced_recorder import difference, forced, said_by
from lvlm_probe.importing.rows import AnswerRow, BadRow, Source, read_rows, reason_of
from lvlm_probe.importing.word_origins import ORIGINS, SURPRISE, Figures, MeteredWord, Origin, metered, sentences
from lvlm_probe.models.tokenizers import tokenizer_of, top_pieces
from lvlm_probe.recording.probe import attach
from lvlm_probe.recording.recorder import RecordOptions
from lvlm_probe.replaying import Replay, ReplayLike, replay
from lvlm_probe.replaying.answer_source import LiveTrace
from lvlm_probe.serving import Server
from lvlm_probe.trace import Trace, open_rows, open_store
from lvlm_probe.trace.records import TraceFields
from lvlm_probe.words import ALPHA

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lvlm_probe.recording.probe import Probe

THUMBNAIL = 88
"""Longest side of the image that a reading keeps, pixels."""
_LONGEST_NAME = 1024
"""Characters of an image's source that are looked at for its name."""


@dataclass(frozen=True)
class Reading:
    """What the meter says of one answer.

    Attributes:
        source: file and line, or file and row, of the answer.
        id: its name, where it has one.
        question, answer: as text.
        pieces: display text of the tokens, special ones empty.
        words: of the answer, each with its numbers and its origin.
        alpha, threshold: what the origins were told by, nats.
        mean_log_prob: of the answer's tokens with the image, nats per token.
        bound: the surprise of words is −log P, which it cannot be above: a trace that does not hold what the model
            would rather have said was read without the model.
        baseline: what the image was replaced by.
        elsewhere: the answer was given by another engine than the model that was measured.
        differs: how what that engine gives differs from this model, where it did not run the same; else empty.
        image: name of the image's file, without folders; of several with commas; empty where it came without one.
        thumbnail: the image, small, for showing.
    """

    source: str
    id: str | None
    question: str
    answer: str
    pieces: tuple[str, ...] = field(repr=False)
    words: tuple[MeteredWord, ...] = field(repr=False)
    alpha: float
    threshold: float
    mean_log_prob: float
    bound: bool = False
    baseline: str = ""
    elsewhere: bool = False
    differs: str = ""
    image: str = ""
    thumbnail: Image.Image | None = field(default=None, repr=False, compare=False)

    @functools.cached_property
    def figures(self) -> Figures:
        """Of the whole answer."""
        return Figures.of(self.words)

    @functools.cached_property
    def sentences(self) -> tuple[Figures, ...]:
        """Of each of its sentences."""
        return tuple(map(Figures.of, sentences(self.pieces, self.words)))

    @property
    def origin(self) -> Origin:
        """``"unlikely"``, ``"habit"``, ``"image"``, or ``"unknown"`` where no log-probability is a number."""
        return self.figures.origin

    def from_(self, origin: Origin) -> tuple[MeteredWord, ...]:
        """Its words of one origin; unlikely ones the worst first, others in their order."""
        found = [word for word in self.words if word.origin == origin]
        return tuple(sorted(found, key=lambda word: -word.surprise) if origin == "unlikely" else found)


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
    top_log_probs: Sequence[float] | np.ndarray | None = None,
    top_tokens: Sequence[str] | None = None,
    alpha: float = ALPHA,
    threshold: float = SURPRISE,
    **facts: Any,
) -> Reading:
    """A reading from the numbers of one answer.

    Args:
        pieces: display text of the tokens, ``(step,)``.
        special: which are special tokens, ``(step,)``.
        log_probs: log P(a_t) with the image, ``(step,)``, nats.
        llr: log-likelihood ratios, ``(step,)``, nats.
        top_log_probs: log P of the likeliest token at each step, ``(step,)``, nats. Where it is not known, 0 is taken,
            which it cannot be above.
        top_tokens: display text of these tokens, ``(step,)``.
        alpha: LLR above which a word came from the image, nats.
        threshold: surprise above which the model would not have said a word, nats.
        facts: the further fields of the reading.

    Raises:
        ExplainError: there is no token but special ones.
    """
    ordinary = ~np.asarray(special, dtype=bool)
    if not ordinary.any():
        raise ExplainError("the answer has no tokens besides special ones")
    own = np.asarray(log_probs, dtype=np.float64)
    top = np.zeros_like(own) if top_log_probs is None else np.asarray(top_log_probs, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        behind = np.maximum(top - own, 0.0)  # of two passes, one may round otherwise
    shown = tuple("" if flag else piece for piece, flag in zip(pieces, special, strict=True))
    return Reading(
        answer="".join(shown).strip(),
        pieces=shown,
        words=tuple(metered(pieces, special, llr, behind, top_tokens, alpha=alpha, threshold=threshold)),
        alpha=alpha,
        threshold=threshold,
        mean_log_prob=float(own[ordinary].mean()),
        bound=top_log_probs is None,
        **facts,
    )


def ranked(readings: Sequence[Reading]) -> list[Reading]:
    """Worst first: answers with a word that the model would not have said, the most surprising word first; then those
    from habit, and from the image, by their mean LLR; those it is not known of come last."""

    def key(reading: Reading) -> tuple[int, float]:
        figures = reading.figures
        if figures.origin == "unlikely" and figures.worst is not None:
            return ORIGINS.index("unlikely"), -figures.worst.surprise
        return ORIGINS.index(figures.origin), math.inf if math.isnan(figures.mean_llr) else figures.mean_llr

    return sorted(readings, key=key)


def worst_words(readings: Iterable[Reading]) -> list[tuple[MeteredWord, Reading]]:
    """Every word that the model would not have said, the most surprising first, with the answer it stands in."""
    found = [(word, reading) for reading in readings for word in reading.from_("unlikely")]
    return sorted(found, key=lambda pair: -pair[0].surprise)


def measure(
    source: str | os.PathLike[str],
    model: torch.nn.Module | Server | None = None,
    processor: object | None = None,
    *,
    alpha: float = ALPHA,
    threshold: float = SURPRISE,
    baseline: str | Image.Image | None = None,
    images: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    requests: str | os.PathLike[str] | None = None,
    fetch: bool = False,
    limit: int | None = None,
) -> Iterator[Reading | Unread]:
    """Reads the meter on every answer of a file, or of a directory of traces, lazily.

    A row of a file costs a pass with the image and one with the baseline; a trace costs none if it holds its
    log-likelihood ratios, else the one with the baseline. One of an older format, which does not hold what the model
    would rather have said, costs one more where the model is given; without it −log P is taken (``Reading.bound``).

    Args:
        source: a file as ``import_answers`` takes it, or a directory or file of traces.
        model: the model, or the server that runs it, which takes three requests for a line; of traces that hold their
            ratios none is needed.
        processor: its processor.
        alpha: LLR above which a word came from the image, nats.
        threshold: surprise above which the model would not have said a word, nats.
        baseline: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``, or an image. Given for traces, it is measured
            again; ``None`` takes what a trace was recorded with, else a full blur. It is not strengthened.
        images, columns, format, requests, fetch: as for ``import_answers``.
        limit: answers to look at, at most.

    Raises:
        StudyError: a file of answers without a model; the file cannot be read.
        TraceError: there is no such directory.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".h5":
        return _readings(_traces(path, model, processor, baseline), alpha, threshold, limit)
    if model is None or (processor is None and not isinstance(model, Server)):
        raise StudyError(f"{path} holds answers, which have to go through a model: give the model and its processor")
    rows = Source.of(path, columns=columns, format=format, requests=requests, images=images, fetch=fetch)
    if isinstance(model, Server):
        return _readings(_served_rows(rows, model, baseline or "blur"), alpha, threshold, limit)
    return _readings(_rows(rows, model, processor, baseline or "blur"), alpha, threshold, limit)


_Numbers = tuple[TraceFields, np.ndarray, dict[str, Any]]
"""An answer, its log-likelihood ratios, and further fields of the reading."""
_Answers = Generator[tuple[str, Callable[[], _Numbers]], None, None]
"""Where an answer stands, and what measures it or raises the reason why it cannot be measured."""


def _readings(answers: _Answers, alpha: float, threshold: float, limit: int | None) -> Iterator[Reading | Unread]:
    with contextlib.closing(answers):
        for where, numbers in itertools.islice(answers, limit):
            try:
                yield read_numbers(*numbers(), alpha=alpha, threshold=threshold, source=where)
            except Exception as error:
                yield Unread(where, reason_of(error))


def answer_numbers(
    probe: Probe, row: AnswerRow, images: Sequence[Image.Image], baseline: str | Image.Image = "blur"
) -> _Numbers:
    """An answer that was given elsewhere on an attached model: a pass with its images, and one with the baseline.

    Raises:
        BadRow: the answer does not fit the model.
        ProbeError: the model or its processor cannot be replayed.
    """
    options = RecordOptions(llr=False, attention=False, boxes=False, question=row.question or row.prompt)
    (made,) = forced(probe, row, images, options).rows
    target = probe.attachment
    player = Replay(LiveTrace(made, list(images)), target.model, probe.processor, check_pixels=False).over(baseline)
    facts = {"id": row.id, "question": made.question or "", "elsewhere": True, **_shown(row, images)}
    facts["differs"] = found.sentence if (found := difference(made, row, probe)).serious else ""
    llr = made.log_probs - player.baseline_log_probs.numpy()
    return made, llr, {**facts, "baseline": _named(player.baseline)}


def read_numbers(made: TraceFields, llr: np.ndarray, facts: Mapping[str, Any], **further: Any) -> Reading:
    """The reading of an answer's numbers; further fields, and those of ``read_answer``, by name."""
    facts = {"top_log_probs": made.top_log_probs, "top_tokens": made.top_tokens, **facts, **further}
    return read_answer(made.tokens, made.special.tolist(), made.log_probs, llr, **facts)


def _rows(source: Source, model: torch.nn.Module, processor: object, baseline: str | Image.Image) -> _Answers:
    """Answers of other engines: a pass with the image, and one with the baseline."""

    def numbers(row: AnswerRow | BadRow) -> _Numbers:
        if isinstance(row, BadRow):
            raise row
        return answer_numbers(probe, row, row.open_images(source.places, fetch=source.fetch), baseline)

    with attach(model, processor) as probe:
        for line, row in read_rows(source):
            yield f"{source.path.name}, line {line}", functools.partial(numbers, row)


def _served_rows(source: Source, server: Server, baseline: str | Image.Image) -> _Answers:
    """Answers of other engines, measured on a server."""

    def numbers(row: AnswerRow | BadRow) -> _Numbers:
        if isinstance(row, BadRow):
            raise row
        if row.asked is None or row.answer is None:
            raise BadRow(
                "a server takes images, a question behind them and an answer as texts, and makes the prompt and the "
                "tokens itself"
            )
        system, question = row.asked
        images = row.open_images(source.places, fetch=source.fetch)
        made = server.measured_answer(
            images, question, row.answer, token_ids=row.token_ids, system=system, baseline=baseline
        )
        assert made.baseline_log_probs is not None
        facts = {"id": row.id, "question": row.question, "elsewhere": True, **_shown(row, images)}
        used = _named(made.baseline or {})
        return made, made.log_probs - made.baseline_log_probs, {**facts, "baseline": used}

    for line, row in read_rows(source):
        yield f"{source.path.name}, line {line}", functools.partial(numbers, row)


def _traces(
    path: Path, model: torch.nn.Module | Server | None, processor: object | None, baseline: str | Image.Image | None
) -> _Answers:
    """Recorded answers: a pass with the baseline where it is another than theirs, or they have none."""

    def numbers(trace: Trace | ProbeError) -> _Numbers:
        if isinstance(trace, ProbeError):
            raise trace
        llr, used = _ratios(trace, model, processor, baseline)
        imported = said_by(trace)
        facts = {
            "id": (imported or {}).get("id"),
            "question": trace.question or trace.prompt,
            "thumbnail": _thumbnail(trace),
            "image": _names(trace.meta.get("image_files") or ()),
            "elsewhere": imported is not None,
            "baseline": used,
        }
        if trace.top_log_probs is None and model is not None and not isinstance(model, Server):
            ids, log_probs = replay(trace, model, processor).likeliest
            facts |= {
                "top_log_probs": log_probs.numpy(),
                "top_tokens": top_pieces(tokenizer_of(processor), ids.tolist()),
            }
        return trace, llr, facts

    for file, trace in traces_in(path):
        row = f", row {trace.row}" if isinstance(trace, Trace) and trace.rows > 1 else ""
        yield f"{file.name}{row}", functools.partial(numbers, trace)


def traces_in(path: Path) -> Iterator[tuple[Path, Trace | ProbeError]]:
    """Every trace of a file or a directory; what cannot be read comes as the reason why, and does not end the rest."""
    for file in open_store(path).files:
        try:
            for trace in open_rows(file):
                yield file, trace
        except ProbeError as error:
            yield file, error


def _ratios(
    trace: Trace,
    model: torch.nn.Module | Server | None,
    processor: object | None,
    baseline: str | Image.Image | None,
) -> tuple[np.ndarray, str]:
    """LLR per token, and what the baseline was."""
    if baseline is None and trace.llr is not None:
        return trace.llr, _named(trace.baseline or {})
    if model is None:
        what = "another baseline than it was recorded with" if trace.llr is not None else "its log-likelihood ratios"
        raise StudyError(f"{what} cost one more pass: give the model (--model)")
    player: ReplayLike
    player = replay(trace, model, processor)  # type: ignore[arg-type]  # of either kind
    if baseline is not None:
        player = player.over(baseline)
    return trace.log_probs - player.baseline_log_probs.numpy(), _named(player.baseline)


def _named(baseline: Mapping[str, Any]) -> str:
    kind = str(baseline.get("kind") or "unknown")
    if baseline.get("limit"):
        return f"{kind}, down to the {baseline['limit']}"
    strength = baseline.get("strength")
    return f"{kind} {strength:g}" if isinstance(strength, int | float) else kind


def _thumbnail(trace: Trace) -> Image.Image | None:
    with contextlib.suppress(ProbeError, OSError):
        return _small(trace.image)
    return None


def _shown(row: AnswerRow, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What a person knows the image by."""
    return {"image": _names(row.images), "thumbnail": _small(images[0])}


def _names(sources: Iterable[object]) -> str:
    """Names of files without their folders; images that stand in the row itself, as text, have none."""
    texts = (one for one in sources if isinstance(one, str) and not one.startswith("data:"))
    parts = (re.split(r"[/\\]", re.sub(r"[?#].*", "", one[:_LONGEST_NAME]))[-1] for one in texts)
    return ", ".join(part for part in parts if "." in part)


def _small(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


COLUMNS = (
    "rank", "source", "id", "image", "question", "answer", "origin", "words", "image_share", "habit_share",
    "unlikely_share", "surprise", "worst_word", "instead", "unlikely_words", "words_from_image", "mean_llr",
    "mean_log_prob", "sentences", "sentences_from_habit", "sentences_unlikely", "bound", "baseline", "elsewhere",
    "reason",
)  # fmt: skip
"""Columns of the csv. ``surprise``, ``worst_word`` and ``instead`` are of the most surprising word; ``words`` and
``sentences`` are numbers of them; ``unlikely_words`` has the worst first; ``reason`` says why an answer is not
measured."""


def write_csv(readings: Sequence[Reading], path: str | os.PathLike[str], *, unread: Sequence[Unread] = ()) -> Path:
    """Writes readings, in the order given, and below them what could not be measured, as csv.

    A text that a spreadsheet would compute (``=…``) has an apostrophe before it: see ``csv_cell``.

    Raises:
        StudyError: the file cannot be written.
    """
    path = Path(path)
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="")
    writer.writeheader()
    for rank, reading in enumerate(readings, start=1):
        cells = {"rank": rank, **columns_of(reading)}
        cells = {key: f"{cell:.6g}" if isinstance(cell, float) else cell for key, cell in cells.items()}
        cells |= {"bound": int(reading.bound), "elsewhere": int(reading.elsewhere)}
        for name in ("unlikely_words", "words_from_image"):
            cells[name] = "; ".join(cells[name])
        writer.writerow({name: csv_cell(cell) for name, cell in cells.items()})
    for one in unread:
        writer.writerow({"source": csv_cell(one.source), "reason": csv_cell(one.reason)})
    try:
        write_whole(path, file.getvalue())
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error}") from error
    return path


def columns_of(reading: Reading) -> dict[str, Any]:
    """What the csv and the JSON say of an answer, by the names of the columns; words are lists of texts."""
    figures = reading.figures
    worst = figures.worst
    origins = [sentence.origin for sentence in reading.sentences]
    own = ("source", "id", "image", "question", "answer", "origin", "mean_log_prob", "bound", "baseline", "elsewhere")
    return {
        **{name: getattr(reading, name) for name in own},
        "words": figures.words,
        "image_share": figures.image,
        "habit_share": figures.habit,
        "unlikely_share": figures.unlikely,
        "surprise": math.nan if worst is None else worst.surprise,
        "worst_word": "" if worst is None else worst.text,
        "instead": "" if worst is None else worst.instead,
        "unlikely_words": [word.text for word in reading.from_("unlikely")],
        "words_from_image": [word.text for word in reading.from_("image")],
        "mean_llr": figures.mean_llr,
        "sentences": len(origins),
        "sentences_from_habit": origins.count("habit"),
        "sentences_unlikely": origins.count("unlikely"),
    }
