"""Answers recorded elsewhere (a serving engine, an API) as traces: replayed with teacher forcing on a local model.

::

    result = import_answers("answers.jsonl", model, processor, "runs/imported")
    result.imported[0].largest_difference     # to the log-probabilities that the engine gave, nats

The traces are those of a recording, so everything that works on one works on them; they say that the answer was not
generated here. Files are taken as engines and evaluation programs write them: ``row_files`` has the kinds, ``shapes``
the programs. Rows that cannot be taken over are listed in ``rejected.jsonl``, with the reason, and do not stop the
others. Called again, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from lvlm_probe.errors import ProbeError, TraceError
from lvlm_probe.escaping import writable
from lvlm_probe.files import path_of
from lvlm_probe.importing.forced_recorder import MORE_THAN_ROUNDING, difference, forced, said_by
from lvlm_probe.importing.refusals import by_kind
from lvlm_probe.importing.rows import FIELDS, AnswerRow, BadRow, Source, read_rows, reason_of
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.recording.probe import Probe, attach
from lvlm_probe.recording.recorder import RecordOptions
from lvlm_probe.trace import open_rows, write

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FIELDS", "MORE_THAN_ROUNDING", "REJECTED", "Imported", "ImportedAnswer", "import_answers", "said_by"]

REJECTED = "rejected.jsonl"
"""Beside the traces: ``line``, ``id`` and ``reason`` of every row that was not taken over."""

_log = logging.getLogger("lvlm_probe")


@dataclass(frozen=True)
class ImportedAnswer:
    """One row that has become a trace.

    Attributes:
        line: of the row in its file.
        path: of the trace.
        largest_difference, mean_difference: of the given log-probabilities to those of the replay, over the tokens,
            absolute, nats; ``None`` where none were given.
        differs: the engine did not run what was run here: its log-probabilities differ by more than
            ``MORE_THAN_ROUNDING`` on average, or its prompt has other tokens.
    """

    line: int
    path: Path
    largest_difference: float | None
    mean_difference: float | None
    differs: bool = False


@dataclass(frozen=True)
class Imported:
    """What an import has done.

    Attributes:
        directory: where the traces are.
        imported: rows that became traces, in the order of the file.
        present: lines of rows that an earlier call has imported.
        rejected: line → reason.
        differing: answers, those of earlier calls too, that differ from what their engine gives: image, chat template
            or weights are others.
        read_as: the kind of the file and the shape of its rows, in words.
    """

    directory: Path
    imported: tuple[ImportedAnswer, ...]
    present: tuple[int, ...]
    rejected: Mapping[int, str]
    differing: tuple[ImportedAnswer, ...] = ()
    read_as: str = ""

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why rows were rejected, by kind, the commonest first."""
        return by_kind(self.rejected.values())


@naming_arguments
def import_answers(
    source: str | os.PathLike[str],
    model: torch.nn.Module,
    processor: object,
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    requests: str | os.PathLike[str] | None = None,
    fetch: bool = False,
    llr: bool = True,
    attention: bool = True,
    baseline: str | Image.Image = "blur",
    limit: int | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Imported:
    """Make traces of answers that another engine has given, one per row.

    The answer's tokens are appended to the prompt that this processor makes, and go through this model in one
    teacher-forced pass (paper, Eq. 1). Of an answer that is given as text, the likeliest of its tokenisations is taken;
    where log-probabilities are given too, the one nearest to them.

    Args:
        source: a file as OpenAI-compatible servers, vLLM, SGLang, LLaVA, lmms-eval or VLMEvalKit write it, or of rows
            of one's own, with the names of ``FIELDS``: JSON lines, JSON, csv, tsv, parquet, xlsx.
        model: the model that answered, or the one to replay the answers on.
        processor: its processor.
        out: directory for the traces; existing ones stay, and rows that are there already are passed over.
        images: directory that the images' paths are relative to, beside the file's own. A path that leads out of
            both, by itself or by a link, is refused: name the directory here if it is meant.
        columns: field → name, for fields of other names; dots lead into objects.
        format: a kind of file, a shape of rows, or both with a comma between them (``"csv,vlmevalkit"``), where they
            are not to be found out by content.
        requests: a file of what was asked, joined by id: batch input, questions, a data set with its images.
        fetch: ask the network for images that are given by URL.
        llr: also compute log-likelihood ratios (one more pass per row); ``False`` leaves them for later.
        attention: record decoder attention from answer tokens to image tokens.
        baseline: ``"blur"``, ``"blank"``, ``"noise"``, ``"mean"``, or an image.
        limit: rows to look at, at most.
        tell: called with (rows done, rows in all).

    Raises:
        ProbeError: the file cannot be read, the directory cannot be written, or the model cannot be attached to.
        TraceError: the disk does not take a trace.
    """
    if limit is not None and limit < 0:
        raise ProbeError(f"limit is a number of rows; got {limit}")
    options = RecordOptions(llr=llr, attention=attention, boxes=attention, baseline=baseline)
    asked = Source.of(source, columns=columns, format=format, requests=requests, images=images, fetch=fetch)
    directory = path_of(out, "the directory for traces", ProbeError)
    read_as = asked.recognised()  # a file that cannot be read is said before anything is written
    if (directory / REJECTED).exists() and os.path.samefile(directory / REJECTED, asked.path):
        raise ProbeError(f"{asked.path} is written anew by an import into {directory}: give it another name first")
    total = asked.count()
    total = total if limit is None else min(total, limit)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        rejects = _opened_anew(directory / REJECTED)
    except OSError as error:
        raise ProbeError(f"traces cannot be written to {directory}: {error}; name a directory") from error
    imported: list[ImportedAnswer] = []
    present: list[int] = []
    rejected: dict[int, str] = {}
    with rejects, contextlib.closing(_Importer(model, processor, directory, asked)) as importer:
        for number, (line, row) in enumerate(itertools.islice(read_rows(asked), limit), start=1):
            try:
                if isinstance(row, BadRow):
                    raise row
                made = importer.take(row, replace(options, question=row.question))
                if made is None:
                    present.append(line)
                else:
                    imported.append(made)
            except TraceError:
                raise  # the disk takes no more, and would not take the next one either
            except Exception as error:
                _log.debug("line %d of %s is not imported", line, asked.path, exc_info=True)
                rejected[line] = _rejected(rejects, line, row, error)
            if tell is not None:
                tell(number, max(number, total))
    return Imported(directory, tuple(imported), tuple(present), rejected, tuple(importer.differing), read_as)


class _Importer:
    """Takes rows over, one by one, on one model."""

    def __init__(self, model: torch.nn.Module, processor: object, directory: Path, source: Source) -> None:
        self._probe: Probe = attach(model, processor)
        self._directory, self._source = directory, source
        self._known: dict[str, list[ImportedAnswer]] = {}
        self.differing: list[ImportedAnswer] = []
        self._read: set[str] = set()
        self._seen: dict[str, int] = {}

    def close(self) -> None:
        self._probe.detach()

    def take(self, row: AnswerRow, options: RecordOptions) -> ImportedAnswer | None:
        """The trace of a row, written; ``None`` for one that is there. Raises ``BadRow``, or what stopped it.

        Row by row, the directory is ours alone: of two imports into it at once, each row is taken by one.
        """
        with _alone(self._directory):
            return self._take(row, options)

    def _take(self, row: AnswerRow, options: RecordOptions) -> ImportedAnswer | None:
        description = self._probe.attachment.describe_model()
        key = _key(row, str(description["fingerprint"]))
        self._seen[key] = copies = self._seen.get(key, 0) + 1
        self._look()
        if len(there := self._known.get(key, [])) >= copies:
            self.differing += [there[copies - 1]] if there[copies - 1].differs else []
            return None
        images = row.open_images(self._source.places, fetch=self._source.fetch)
        capture = forced(self._probe, row, images, options)
        capture.model = description
        (made,) = capture.rows
        found = difference(made, row, self._probe)
        engine = f", said by {row.engine}" if row.engine else ""
        made.notes.insert(
            0,
            f"the answer was not generated here, but imported from {self._source.path.name}, line {row.line}{engine}; "
            "its log-probabilities come from teacher forcing on this model",
        )
        if found.sentence:
            made.notes.insert(1, found.sentence)
        made.meta["imported"] = {
            "file": self._source.path.name,
            "line": row.line,
            "key": key,
            "id": row.id,
            "engine": row.engine,
            "shape": row.shape,
            "finish_reason": row.finish,
            "largest_difference": found.largest,
            "mean_difference": found.mean,
            "differs": found.serious,
        }
        path = write(capture, self._directory)
        self._read.add(path.name)
        answer = ImportedAnswer(row.line, path, found.largest, found.mean, found.serious)
        self._known.setdefault(key, []).append(answer)
        self.differing += [answer] if answer.differs else []
        return answer

    def _look(self) -> None:
        """Finds the rows that have a trace in the directory, by key; files are read once."""
        for name in sorted(set(os.listdir(self._directory)) - self._read):
            self._read.add(name)
            if not name.endswith(".h5") or name.startswith("."):
                continue
            path = self._directory / name
            with contextlib.suppress(ProbeError):  # a damaged file does not count: its row is imported again
                for trace in open_rows(path):
                    found = said_by(trace)
                    if found is not None:
                        self._known.setdefault(str(found.get("key")), []).append(_of_trace(path, found))


def _rejected(file: TextIO, line: int, row: AnswerRow | BadRow, error: Exception) -> str:
    """Write why a row is not taken over; return it."""
    reason, named = reason_of(error), row.id if isinstance(row, AnswerRow) else None
    file.write(json.dumps({"line": line, "id": named, "reason": reason}, ensure_ascii=False) + "\n")
    file.flush()
    return reason


def _of_trace(path: Path, facts: Mapping[str, Any]) -> ImportedAnswer:
    """The answer of a trace that is there; a trace may come from anybody."""
    line, numbers = facts.get("line"), [facts.get(name) for name in ("largest_difference", "mean_difference")]
    largest, mean = (float(value) if isinstance(value, int | float) else None for value in numbers)
    return ImportedAnswer(line if isinstance(line, int) else 0, path, largest, mean, facts.get("differs") is True)


def _opened_anew(path: Path) -> TextIO:
    """A file to append whole lines to, empty; a link that somebody has planted is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    return open(os.open(path, flags, 0o666), "w", encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the directory against other imports; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _key(row: AnswerRow, fingerprint: str) -> str:
    """What tells that a row has been taken over: its content, wherever it stands in the file, and the model."""
    text = json.dumps(row.content, sort_keys=True, ensure_ascii=False, default=_digest)
    return hashlib.sha256(f"{fingerprint}:{writable(text)}".encode()).hexdigest()[:32]


def _digest(value: object) -> str:
    """What stands for a value of a table that JSON does not have: the bytes of an image, a date."""
    data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace")
    return hashlib.sha256(data).hexdigest()
