"""What lists of traces show, without opening every file each time.

A summary is read from a file's header: a few kilobytes, whatever the file holds. Summaries are kept beside the traces
in ``.index.jsonl``, one line a file, so that the next list opens only files that are new. The index is a cache and
nothing else: an entry counts only while the file has the size and the time of change that the entry was made from, a
damaged or missing index is made anew, and a folder that cannot be written goes without. Reading a trace never uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.format.reading import SealedFile, open_sealed
from lvlm_probe.format.schema import FORMAT, FORMAT_VERSION, ROW_LIMIT, TRACE_ID, row_key
from lvlm_probe.format.seal import check_seal

if TYPE_CHECKING:
    from lvlm_probe.trace.reader import Trace

__all__ = ["INDEX_NAME", "Index", "TraceSummary", "read_summaries"]

INDEX_NAME = ".index.jsonl"
_TEXT = 2000
"""Characters of a question or an answer that are kept."""
_MOST_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class TraceSummary:
    """What is known of a trace from its header. Texts are cut after 2,000 characters."""

    path: Path
    row: int
    trace_id: str
    created: str
    """When recording began: ISO-8601, UTC."""
    status: str
    model: str
    """Id of the model, or its class where it has none."""
    question: str
    answer: str
    steps: int
    """Tokens of the answer."""
    image_tokens: int
    has_llr: bool
    points: tuple[str, ...]

    def open(self) -> Trace:
        """The trace itself; raises ``TraceError`` when the file is damaged."""
        from lvlm_probe.trace.reader import open_trace

        return open_trace(self.path, row=self.row)


def read_summaries(path: Path) -> list[TraceSummary]:
    """Reads the summaries of one file, one per row, without reading its arrays. Raises ``TraceError``.

    Kind, version and length of the file are checked, its hash is not, as that takes reading all of it; opening the
    trace checks that too.
    """
    seal = check_seal(path, FORMAT, FORMAT_VERSION, hashed=False)
    with open_sealed(path, FORMAT, FORMAT_VERSION, seal=seal) as file:
        created = file.text("/", "created", "")
        model = file.text("model", "model_id", "") or file.text("model", "class", "")
        rows = file.integer("traces", "rows", low=1, high=ROW_LIMIT)
        if rows is None:
            raise file.error("traces@rows", "it is missing")
        return [_summary(path, file, row, created, model) for row in range(rows)]


def _summary(path: Path, file: SealedFile, row: int, created: str, model: str) -> TraceSummary:
    base = row_key(row)
    trace_id = file.text(base, "trace_id")
    if TRACE_ID.fullmatch(trace_id) is None:
        raise file.error(f"{base}@trace_id", f"{trace_id[:64]!r} is not a trace id")
    asked = "inputs/question" if file.has(f"{base}/inputs/question") else "inputs/prompt"
    question, pieces = file.json(f"{base}/{asked}"), file.json(f"{base}/output/pieces")
    special = file.array(f"{base}/output/special", dtype="u1", shape=[None])
    if not isinstance(pieces, list) or len(pieces) != len(special):
        raise file.error(f"{base}/output/pieces", "it does not fit the tokens of the answer")
    answer = "".join(str(piece) for piece, skipped in zip(pieces, special, strict=True) if not skipped)
    return TraceSummary(
        path=path,
        row=row,
        trace_id=trace_id,
        created=created,
        status=file.text(base, "status"),
        model=model,
        question=str(question or "")[:_TEXT],
        answer=answer[:_TEXT],
        steps=len(special),
        image_tokens=len(file.checked(f"{base}/layout/image_positions", dtype="i4", shape=[None])),
        has_llr=file.has(f"{base}/output/baseline_log_probs"),
        points=tuple(file.names(f"{base}/points")),
    )


class Index:
    """The summaries of a directory that are known already."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[str, tuple[tuple[int, int], list[TraceSummary]]] = {}
        self._stored = _load(directory / INDEX_NAME)
        self._changed = False

    def summaries(self, path: Path) -> list[TraceSummary]:
        """The summaries of a file of the directory; it is opened only when it is new. Raises ``TraceError``."""
        state = _state(path)
        rows = _restored(path, state, self._stored.get(path.name))
        if rows is None:
            rows = read_summaries(path)
            self._changed = True
        self._entries[path.name] = state, rows
        return rows

    def save(self) -> None:
        """Keep what was asked for, and nothing else, for the next time; without a word where it cannot be kept."""
        if not self._changed and len(self._entries) == len(self._stored):
            return
        lines = [json.dumps(_HEAD)]
        for name, (state, rows) in self._entries.items():
            values = [[getattr(row, field) for field in _FIELDS] for row in rows]
            lines.append(json.dumps([name, *state, values], ensure_ascii=False))
        part = self.directory / f"{INDEX_NAME}.{os.getpid()}-{secrets.token_hex(4)}.part"
        # A lone half of a surrogate pair has no UTF-8.
        text = ("\n".join(lines) + "\n").encode("utf-8", "replace")
        with contextlib.suppress(OSError):
            try:
                part.write_bytes(text)
                os.replace(part, self.directory / INDEX_NAME)
            finally:
                part.unlink(missing_ok=True)


_KINDS = {"int": int, "str": str, "bool": bool, "tuple[str, ...]": list}
_FIELDS = tuple(field.name for field in dataclasses.fields(TraceSummary) if field.name != "path")
_TYPES = tuple(_KINDS[str(field.type)] for field in dataclasses.fields(TraceSummary) if field.name != "path")
_HEAD = {"kind": "lvlm_probe.index", "version": 1, "fields": list(_FIELDS)}


def _load(path: Path) -> dict[str, Any]:
    """File name → what an index holds about it, unchecked; nothing where there is no index that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return {}
        head, *lines = path.read_bytes().rstrip(b"\n").split(b"\n")
        if json.loads(head) != _HEAD:
            return {}
    except (OSError, ValueError, RecursionError):
        return {}
    try:
        entries = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):  # damaged: what can be understood is kept
        entries = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                entries.append(json.loads(line))
    return {entry[0]: entry for entry in entries if type(entry) is list and entry and type(entry[0]) is str}


def _restored(path: Path, state: tuple[int, int], entry: Any) -> list[TraceSummary] | None:
    """The summaries in an entry; ``None`` if it is not this file's, or is nothing that ``save`` has written."""
    if entry is None or len(entry) != 4 or entry[1:3] != list(state) or type(entry[3]) is not list or not entry[3]:
        return None
    found: list[TraceSummary] = []
    for number, row in enumerate(entry[3]):
        if type(row) is not list or tuple(map(type, row)) != _TYPES or row[0] != number:
            return None
        if TRACE_ID.fullmatch(row[1]) is None or not all(type(name) is str for name in row[-1]):
            return None
        values: tuple[Any, ...] = (path, *row[:-1], tuple(row[-1]))
        found.append(TraceSummary(*values))
    return found


def _state(path: Path) -> tuple[int, int]:
    """Size and time of change; of a file that is gone, nothing, so that reading it says so."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
