"""What lists of traces show, without opening every file each time.

A summary is read from a file's header: a few kilobytes, whatever the file holds. Summaries are kept beside the traces
in ``.index.jsonl``, one line a file, so that the next list opens only files that are new. The index is a cache and
nothing else: an entry counts only while the file has the size and the times of change that the entry was made from, a
damaged or missing index is made anew, and a folder that cannot be written goes without. Reading a trace never uses it.

A folder may come from a stranger, and an index could say anything of the traces beside it. So the first line holds a
message authentication code over the rest, under a key that each user has in their own cache folder and that goes into
no file of traces: an index that somebody else wrote is made anew, and what is parsed is what ``Index.save`` wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import TraceError
from lvlm_probe.files import causes, read_small, write_whole
from lvlm_probe.storage.reading import SealedFile, open_sealed
from lvlm_probe.storage.seal import trace_error
from lvlm_probe.trace.records import FIELDS
from lvlm_probe.trace.schema import FORMAT, FORMAT_VERSION, row_count, row_key

if TYPE_CHECKING:
    from lvlm_probe.trace.reader import Trace

INDEX_NAME = ".index.jsonl"
_TEXT = 2000
"""Characters of a question or an answer that are kept."""
_MOST_BYTES = 2**27
_KEY_BYTES = 32


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
    with open_sealed(path, FORMAT, FORMAT_VERSION, hashed=False) as file:
        created = file.text("/", "created", "")
        model = file.text("model", "model_id", "") or file.text("model", "class", "")
        return [_summary(path, file, row, created, model) for row in range(row_count(file))]


def _summary(path: Path, file: SealedFile, row: int, created: str, model: str) -> TraceSummary:
    base = row_key(row)
    file.group(base)
    sizes: dict[str, int] = {}
    FIELDS["special"].check(file, base, sizes)
    FIELDS["image_positions"].check(file, base, sizes)

    def read(name: str) -> Any:
        return FIELDS[name].read(file, base, sizes)

    question = read("question" if file.has(f"{base}/{FIELDS['question'].key}") else "prompt")
    answer = "".join(piece for piece, skipped in zip(read("tokens"), read("special"), strict=True) if not skipped)
    return TraceSummary(
        path=path,
        row=row,
        trace_id=read("trace_id"),
        created=created[:64],
        status=read("status"),
        model=model[:_TEXT],
        question=question[:_TEXT],
        answer=answer[:_TEXT],
        steps=sizes["T"],
        image_tokens=sizes["N"],
        has_llr=file.has(f"{base}/{FIELDS['baseline_log_probs'].key}"),
        points=tuple(file.named(f"{base}/points")),
    )


class Index:
    """The summaries of a directory that are known already."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries: dict[str, tuple[_State, list[TraceSummary]]] = {}
        self._stored = _load(directory / INDEX_NAME)
        self._changed = False

    def summaries(self, path: Path) -> list[TraceSummary]:
        """The summaries of a file of the directory; it is opened only when it is new.

        Raises ``TraceError``, whatever is wrong with the file: one file must not spoil a list.
        """
        state = _state(path)
        stored = self._stored.get(path.name)
        if stored is not None and [*stored[1:3], stored[4]] == list(state):
            rows = [
                TraceSummary(path, **{**dict(zip(_FIELDS, row, strict=True)), "points": tuple(row[-1])})
                for row in stored[3]
            ]
        else:
            try:
                rows = read_summaries(path)
            except TraceError:
                raise
            except MemoryError as error:
                raise trace_error(path, "", *causes(error)) from error
            except Exception as error:
                what = f"it cannot be listed ({type(error).__name__}: {str(error)[:200]})"
                raise trace_error(path, "", what, "the file is damaged or hostile: do not trust it") from error
            self._changed = True
        self._entries[path.name] = state, rows
        return rows

    def save(self) -> None:
        """Keep what was asked for, and nothing else, for the next time; nothing where it cannot be kept."""
        if not self._changed and len(self._entries) == len(self._stored):
            return
        lines = []
        for name, (state, rows) in self._entries.items():
            values = [[getattr(row, field) for field in _FIELDS] for row in rows]
            size, changed, set_at = state
            lines.append(json.dumps([name, size, changed, values, set_at], ensure_ascii=False) + "\n")
        # A lone half of a surrogate pair has no UTF-8; it is read back as json reads bytes.
        text = "".join(lines).encode("utf-8", "surrogatepass")
        with contextlib.suppress(OSError):
            write_whole(self.directory / INDEX_NAME, _head(text) + text)


_State = tuple[int, int, int]
_FIELDS = tuple(field.name for field in dataclasses.fields(TraceSummary) if field.name != "path")
_HEAD = {"kind": "lvlm_probe.index", "version": 1, "fields": list(_FIELDS)}


def _load(path: Path) -> dict[str, list[Any]]:
    """File name → what an index holds about it; nothing where there is no index, or none of this user's making."""
    try:
        data = read_small(path, limit=_MOST_BYTES)
        start = data.find(b"\n", 0, 1000) + 1
        text = memoryview(data)[start:]
        if not hmac.compare_digest(data[:start], _head(text)):
            return {}
        entries = json.loads(b"[" + bytes(text).rstrip(b"\n").replace(b"\n", b",") + b"]")
    except (OSError, ValueError, MemoryError):
        return {}
    return {entry[0]: entry for entry in entries}


def _head(text: bytes | memoryview) -> bytes:
    code = hmac.digest(_key(), text, "sha256").hex()
    return json.dumps({**_HEAD, "code": code}).encode("ascii") + b"\n"


@functools.cache
def _key() -> bytes:
    """This user's key; one for this process alone where none can be kept, and lists are then read anew by each."""
    new = secrets.token_bytes(_KEY_BYTES)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvlm_probe"
        path = folder / "index.key"
        with contextlib.suppress(FileNotFoundError):
            return kept if len(kept := read_small(path, limit=_KEY_BYTES)) == _KEY_BYTES else new
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, new, mode=0o600)
        return read_small(path, limit=_KEY_BYTES)  # of two processes at once, the one that came last
    except (OSError, RuntimeError):  # no home, or none that can be written
        return new


def _state(path: Path) -> _State:
    """Size and times of change; of a file that is gone, nothing, so that reading it says so.

    The last one is set by the system whenever a file is written, moved or unpacked, and by nobody else.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
