"""A directory of traces as a sequence, opened one file at a time."""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from lvlm_probe.cards import card, text_html
from lvlm_probe.errors import TraceError
from lvlm_probe.escaping import counted, writable
from lvlm_probe.extras import require
from lvlm_probe.files import DAY, causes, orphans, path_of, remove_orphans
from lvlm_probe.kinds import naming_arguments
from lvlm_probe.storage.reading import open_sealed
from lvlm_probe.storage.seal import trace_error
from lvlm_probe.trace.index import Index, TraceSummary
from lvlm_probe.trace.reader import Trace
from lvlm_probe.trace.schema import FORMAT, FORMAT_VERSION, ROW_LIMIT, validate

_OWN_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z-\d+-[0-9a-f]{8}\.b(?P<rows>[1-9]\d{0,5})\.h5")


@naming_arguments
def open_store(path: str | os.PathLike[str]) -> TraceStore:
    """Opens a directory of traces (or a single trace file) without opening any file in it.

    Raises ``TraceError`` when there is no such directory.
    """
    return TraceStore(path)


_SHOWN = 10
"""Files that a card in a notebook lists, and traces of each."""


@dataclasses.dataclass
class _Entry:
    path: Path
    rows: int | None  # None: the name does not tell


class TraceStore(Sequence[Trace]):
    """The traces of a directory, oldest first: a snapshot of the moment it was opened.

    The names of our files carry their number of traces, so ``len(store)``, ``store[-1]`` and slices of a directory of
    thousands open no file but the one that is read. Other ``*.h5`` names are welcome, are sorted by name among ours,
    and are opened to be counted when a count is needed. Unfinished ``.part`` files and sub-directories
    (``explanations/``) are no traces.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path_of(path, "a directory of traces", TraceError)
        self._names: list[str] = []
        self._entries: list[_Entry] = []
        self.refresh()

    def refresh(self) -> None:
        """Looks at the directory again."""
        if self.path.is_file():
            self._names, self._entries = [self.path.name], [_entry(self.path)]
            return
        try:
            with os.scandir(self.path) as listing:
                names = sorted(item.name for item in listing if item.name.endswith(".h5") and not item.is_dir())
        except FileNotFoundError:
            way_out = "check the path, or record something there first"
            raise trace_error(self.path, "", "there is no such directory", way_out) from None
        except (OSError, ValueError, MemoryError) as error:
            what, way_out = causes(error)
            raise trace_error(self.path, "", f"it cannot be listed: {what}", way_out) from error
        names = [name for name in names if not name.startswith(".")]
        known = dict(zip(self._names, self._entries, strict=True))
        self._names, self._entries = names, [known.get(name) or _entry(self.path / name) for name in names]

    @property
    def files(self) -> tuple[Path, ...]:
        """The trace files, oldest first."""
        return tuple(entry.path for entry in self._entries)

    def __repr__(self) -> str:
        return f"TraceStore({str(self.path)!r}, {counted(len(self._entries), 'file')})"

    def _repr_html_(self) -> str:
        index = Index(self.path if self.path.is_dir() else self.path.parent)
        rows = []
        for entry in reversed(self._entries[-_SHOWN:]):
            try:
                found = index.summaries(entry.path)
            except TraceError as error:
                rows.append(f"<tr><td>{text_html(entry.path.name)}</td><td colspan=3>{text_html(str(error))}</td></tr>")
                continue
            rows += [
                f"<tr><td>{text_html(entry.path.name)}</td><td>{text_html(one.status)}</td>"
                f'<td dir="auto">{text_html(one.question[:200])}</td>'
                f'<td dir="auto">{text_html(one.answer[:200])}</td></tr>'
                for one in found[:_SHOWN]
            ]
        head = "<tr><th>file</th><th>status</th><th>question</th><th>answer</th></tr>"
        count = len(self._entries)
        title = f"Traces in {self.path}: {counted(count, 'file')}{', newest first' * (count > 1)}"
        more = [f"and {count - _SHOWN} older files"] if count > _SHOWN else []
        return card(title, f"<table>{head}{''.join(rows)}</table>" if rows else "", facts=more)

    def __len__(self) -> int:
        return sum(_count(entry) for entry in self._entries)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trace]: ...
    def __getitem__(self, index: int | slice) -> Trace | list[Trace]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        # From the end for negative indices: only the files on the way are counted.
        backwards = index < 0
        left = -index - 1 if backwards else index
        for entry in reversed(self._entries) if backwards else self._entries:
            rows = _count(entry)
            if left < rows:
                return Trace(entry.path, rows - 1 - left if backwards else left)
            left -= rows
        if not self._entries:
            raise IndexError(f"{self.path} holds no traces; record one there first")
        raise IndexError(f"{self.path} holds {len(self)} traces; there is no trace {index}")

    def __iter__(self) -> Iterator[Trace]:
        for entry in self._entries:
            for row in range(_count(entry)):
                yield Trace(entry.path, row)

    def __reversed__(self) -> Iterator[Trace]:
        for entry in reversed(self._entries):
            for row in reversed(range(_count(entry))):
                yield Trace(entry.path, row)

    def find(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        text: str | None = None,
        since: str | datetime.datetime | None = None,
        until: str | datetime.datetime | None = None,
        where: Callable[[TraceSummary], bool] | None = None,
        on_error: Callable[[TraceError], None] | None = None,
    ) -> list[TraceSummary]:
        """Lists the traces that fit, oldest first, as summaries that open no file again that was listed before.

        Summaries are kept in ``.index.jsonl`` in the directory (nothing is kept where it cannot be written).

        Args:
            status: ``"complete"``, ``"stopped"`` or ``"error"``.
            model: part of the model's id or class, in any case.
            text: part of the question or the answer, in any case.
            since, until: first moment, and the first one that does not count any more; ISO-8601, UTC where no zone is
                named.
            where: any other condition.
            on_error: hears of files that cannot be read, and the list goes on without them.

        Raises:
            TraceError: a file cannot be read, and there is no ``on_error``.
            ValueError: a time is not ISO-8601.
        """
        first, end = _moment(since), _moment(until)
        wanted_model, wanted_text = (model or "").casefold(), (text or "").casefold()
        index = Index(self.path if self.path.is_dir() else self.path.parent)
        found: list[TraceSummary] = []
        for entry in self._entries:
            try:
                rows = index.summaries(entry.path)
            except TraceError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            entry.rows = len(rows)
            found += rows
        if self.path.is_dir():
            index.save()

        def fits(summary: TraceSummary) -> bool:
            if status is not None and summary.status != status:
                return False
            if wanted_model and wanted_model not in summary.model.casefold():
                return False
            if wanted_text and wanted_text not in f"{summary.question}\n{summary.answer}".casefold():
                return False
            if first is not None or end is not None:
                try:
                    created = _moment(summary.created)
                except (ValueError, OverflowError):
                    return False
                if created is None or (first and created < first) or (end and created >= end):
                    return False
            return where is None or where(summary)

        return [summary for summary in found if fits(summary)]

    def to_dataset(self, *, on_error: Callable[[TraceError], None] | None = None, **options: Any) -> Any:
        """Make a Hugging Face ``datasets.Dataset`` of the traces, a row each, oldest first.

        Columns: ``trace_id``, ``created``, ``status``, ``model``, ``question``, ``answer``, ``images`` (the original
        files), ``words`` (``text``, ``start``, ``stop``, and, summed over their tokens in nats, ``log_prob`` and
        ``llr``, null where it was not recorded), ``file`` and ``row``. Needs ``pip install 'lvlm-probe[study]'``.

        Args:
            on_error: hears of files that cannot be read, which are left out.
            **options: of ``datasets.Dataset.from_generator``, as ``cache_dir``.

        Raises:
            TraceError: a file cannot be read, and there is no ``on_error``.
            ProbeError: ``datasets`` is not installed.
        """
        datasets = require("datasets", extra="study", purpose="a Hugging Face dataset")
        # Part of what the cached copy is known by: a file that was replaced is read again.
        states = [(str(entry.path), os.stat(entry.path).st_mtime_ns) for entry in self._entries]

        def rows() -> Iterator[dict[str, Any]]:
            for path, _ in states:
                try:
                    for row in range(Trace(path).rows):
                        yield _as_row(Trace(path, row))
                except TraceError as error:
                    if on_error is None:
                        raise
                    on_error(error)

        text, number, count = (datasets.Value(kind) for kind in ("string", "float32", "int32"))
        word = {"text": text, "start": count, "stop": count, "log_prob": number, "llr": number}
        columns = datasets.Features(
            {
                **dict.fromkeys(("trace_id", "created", "status", "model", "question", "answer"), text),
                "images": [datasets.Image()],
                "words": [word],
                "file": text,
                "row": count,
            }
        )
        try:
            return datasets.Dataset.from_generator(rows, features=columns, **options)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, TraceError):
                raise error.__cause__ from None
            raise

    def push_to_hub(self, repo_id: str, *, private: bool = True, **options: Any) -> Any:
        """Upload ``to_dataset()`` to the Hugging Face hub: questions, answers and images go with it.

        Args:
            repo_id: ``"owner/name"``.
            private: only the owner sees it; ``False`` publishes images and texts.
            **options: of ``datasets.Dataset.push_to_hub`` (``token``, ``revision``, …).

        Returns:
            what that returns, the commit.

        Raises:
            TraceError, ProbeError: as ``to_dataset``.
        """
        return self.to_dataset().push_to_hub(repo_id, private=private, **options)

    def orphans(self, *, min_age: float = DAY) -> list[Path]:
        """Lists the ``.part`` files left by processes that were killed, also those in ``explanations/``.

        A file counts when no process with the number in its name runs on this machine *and* nobody has written to it
        for ``min_age`` seconds: on a shared disk the writer may be alive on another machine.
        """
        return orphans(self._folders, min_age=min_age)

    def clean(self, *, min_age: float = DAY) -> list[Path]:
        """Deletes ``orphans(min_age=min_age)`` and returns what it deleted."""
        return remove_orphans(self._folders, min_age=min_age)

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self.path, self.path / "explanations"


def _as_row(trace: Trace) -> dict[str, Any]:
    """A trace as ``to_dataset`` has it."""
    llr = trace.llr

    def total(values: np.ndarray | None, start: int, stop: int) -> float | None:
        found = None if values is None else float(values[start:stop].sum())
        return found if found is not None and np.isfinite(found) else None

    return {
        **{name: writable(str(getattr(trace, name))) for name in ("trace_id", "created", "status", "answer")},
        "model": writable(str(trace.model.get("model_id") or trace.model.get("class") or "")),
        "question": writable(trace.question if trace.question is not None else trace.prompt),
        "images": [
            {"bytes": trace.image_record(number).data, "path": None} for number in range(len(trace.header.image_sizes))
        ],
        "words": [
            {
                "text": writable(word.text), "start": word.start, "stop": word.stop,
                "log_prob": total(trace.log_probs, word.start, word.stop), "llr": total(llr, word.start, word.stop),
            }
            for word in trace.words
        ],
        "file": writable(trace.path.name),
        "row": trace.row,
    }  # fmt: skip


def _moment(time: str | datetime.datetime | None) -> datetime.datetime | None:
    if time is None:
        return None
    moment = datetime.datetime.fromisoformat(time) if isinstance(time, str) else time
    return moment.replace(tzinfo=datetime.UTC) if moment.tzinfo is None else moment


def _entry(path: Path) -> _Entry:
    own = _OWN_NAME.fullmatch(path.name)
    rows = int(own["rows"]) if own else None
    return _Entry(path, rows if rows is None or rows <= ROW_LIMIT else None)


def _count(entry: _Entry) -> int:
    if entry.rows is None:
        with open_sealed(entry.path, FORMAT, FORMAT_VERSION) as file:
            entry.rows = validate(file)
    return entry.rows
