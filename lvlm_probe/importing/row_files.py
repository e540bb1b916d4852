"""Files of rows, whatever program wrote them: what kind a file is, by its content, and its rows one by one.

``FILES`` has the kinds. Rows are read lazily, each with its number: of the line in JSON lines, of the item in JSON,
of the row as a spreadsheet counts them (the header is row 1) in tables. What is no row comes as the reason why, and the
next one is read. JSON may be one array, objects one after the other, or one object that holds the list of rows
(``logs``, ``samples``, ``data``, …).
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lvlm_probe.errors import StudyError
from lvlm_probe.extras import require
from lvlm_probe.importing.refusals import BadRow, shortened
from lvlm_probe.process import lock

FILES = {
    "jsonl": "JSON lines",
    "json": "JSON",
    "csv": "comma-separated values",
    "tsv": "tab-separated values",
    "parquet": "parquet",
    "xlsx": "an Excel sheet",
}
"""Kind → what a person calls it."""

TABLES = ("csv", "tsv", "xlsx", "parquet")
"""Kinds whose cells may hold lists as text, and answers as numbers."""

LONGEST_LINE = 2**28
"""Bytes of a line; images of ordinary size in ``data:`` URIs, a dozen of them, fit."""

LARGEST_TEXT = 2**31
"""Bytes of a file of JSON that is no JSON lines: it is held in memory, and JSON lines of any size are not."""

_LISTS = ("logs", "samples", "data", "rows", "results", "responses", "items", "annotations", "instances")
"""Where an object keeps the list of rows."""

_FOREIGN = (
    (b"\x80", "a pickle, which runs what it holds when it is read: write JSON lines instead"),
    (b"\x1f\x8b", "compressed: gunzip it first"),
    (b"\x28\xb5\x2f\xfd", "compressed: unzstd it first"),
    (b"\xd0\xcf\x11\xe0", "an Excel file of before 2007: save it as xlsx or csv"),
    (b"\x89HDF", "HDF5: a trace is read by `meter` under the name of .h5 alone"),
)

_Row = tuple[int, dict[str, Any] | BadRow]


def kind_of(path: str | Path) -> str:
    """The kind of a file by its content, a name of ``FILES``; what nothing speaks for is taken for JSON lines.

    Raises:
        StudyError: there is no such file, or it is of a kind that is not read; the message says what to do.
    """
    path = Path(path)
    if not path.is_file():  # a pipe or a device would be waited for
        raise StudyError(f"{path} cannot be read: there is no such file; give a file of answers")
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise StudyError(f"{path} is UTF-16; save it as UTF-8")
            for mark, what in _FOREIGN:
                if head.startswith(mark):
                    raise StudyError(f"{path} is {what}")
            if head.startswith(b"PAR1"):
                return "parquet"
            if head.startswith(b"PK\x03\x04"):
                return _of_zip(path)
            file.seek(0)
            return _of_text(file)
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error}; give a file of answers") from error


def _of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            if "xl/workbook.xml" in archive.namelist():
                if sum(member.file_size for member in archive.infolist()) > LARGEST_TEXT:
                    raise StudyError(f"{path} is larger than {LARGEST_TEXT >> 30} GB unpacked; save it as csv")
                return "xlsx"
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        pass
    raise StudyError(f"{path} is an archive, and no Excel sheet: unpack it first")


def _of_text(file: BinaryIO) -> str:
    """By the first lines: JSON in each, JSON that goes on over lines, or a header."""
    first = list(itertools.islice((data for data in lines_of(file) if data is None or data.strip()), 5))
    if not first or first[0] is None:
        return "jsonl"
    start = first[0].removeprefix(codecs.BOM_UTF8).lstrip()
    values = [_value(data) for data in first if data is not None]
    if start.startswith((b"{", b"[")):
        whole = values[0]
        if isinstance(whole, list) and (not whole or isinstance(whole[0], dict)):
            return "json"
        if isinstance(whole, dict) and len(first) == 1 and _inner(whole) is not None:
            return "json"
        if start.strip() == b"[":
            return "json"
        if any(isinstance(value, dict) for value in values):
            return "jsonl"
        return "json" if _begins_json(start) and len(first) > 1 and whole is None else "jsonl"
    if values[0] is not None:
        return "jsonl"
    try:
        header = start.decode("utf-8")
    except UnicodeDecodeError:
        return "jsonl"
    if "\t" in header:
        return "tsv"
    return "csv" if "," in header or ";" in header else "jsonl"


def _begins_json(start: bytes) -> bool:
    """Whether an object, or a list of objects, begins here and goes on below: not one that is broken off."""
    inner = start.lstrip(b"[ \t\r\n")
    return inner in (b"", b"{") or inner.startswith(b"{")


def _value(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _inner(content: Mapping[str, Any]) -> list[Any] | None:
    """The rows that an object holds as a list, or as lists by name (one per task)."""
    for name in _LISTS:
        found = content.get(name)
        if isinstance(found, dict) and found and all(isinstance(item, list) for item in found.values()):
            found = list(itertools.chain.from_iterable(found.values()))
        if isinstance(found, list) and found and all(isinstance(item, dict) for item in found[:5]):
            return found
    return None


def rows_in(path: str | Path, kind: str) -> Iterator[_Row]:
    """The rows of a file of a kind, with their numbers. Raises ``StudyError`` where the file cannot be read."""
    path = Path(path)
    try:
        if kind == "jsonl":
            yield from json_lines(path)
        elif kind == "json":
            yield from _json(path)
        elif kind == "parquet":
            yield from _parquet(path)
        elif kind == "xlsx":
            yield from _xlsx(path)
        else:
            yield from csv_rows(path, tabs=kind == "tsv")
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error}; give a file of answers") from error


def count_rows(path: str | Path, kind: str = "jsonl") -> int:
    """How many rows a file has, for telling how far the work is; of a kind that is slow to count, the lines."""
    path = Path(path)
    try:
        if kind == "parquet":
            return int(
                require("pyarrow.parquet", extra="tables", purpose="parquet").ParquetFile(path).metadata.num_rows
            )
        if kind in ("json", "xlsx"):
            return sum(1 for _ in rows_in(path, kind))
        with path.open("rb") as file:
            return sum(1 for data in lines_of(file) if data is None or data.strip()) - (kind in ("csv", "tsv"))
    except Exception:
        return 0  # reading will say what is wrong


def lines_of(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines as bytes; ``None`` for one that is too long to be held."""
    while data := file.readline(LONGEST_LINE + 1):
        if len(data) <= LONGEST_LINE:
            yield data
            continue
        while not data.endswith(b"\n") and (data := file.readline(2**20)):
            pass
        yield None


def parsed(data: bytes) -> dict[str, Any] | BadRow:
    """The object in a line of JSON, or why there is none."""
    try:
        return _object(json.loads(data.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte {data[error.start]:#04x} at {error.start}")
    except RecursionError:
        return BadRow("not JSON that can be read: lists or objects in one another, too deep")
    except ValueError as error:
        return BadRow(f"not JSON: {error}")


def line_at(path: Path, offset: int) -> dict[str, Any] | BadRow:
    """The object in the line that begins at a byte of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return parsed(file.readline(LONGEST_LINE))


def _object(value: Any) -> dict[str, Any] | BadRow:
    return value if isinstance(value, dict) else BadRow(f"a row is an object, not {type(value).__name__}")


def json_lines(path: Path) -> Iterator[_Row]:
    """The objects of JSON lines with their numbers, or why a line holds none. Raises ``OSError``."""
    with path.open("rb") as file:
        for line, data in enumerate(lines_of(file), start=1):
            if data is None:
                yield line, BadRow(f"the line is longer than {LONGEST_LINE} bytes")
            elif data.strip():
                yield line, parsed(data)


def _json(path: Path) -> Iterator[_Row]:
    """Values one after the other, lists opened; behind a broken one it goes on at the next that begins a line."""
    if path.stat().st_size > LARGEST_TEXT:
        raise StudyError(f"{path} is larger than {LARGEST_TEXT >> 30} GB, which JSON is held in; write JSON lines")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not UTF-8: byte {error.start}; save it as UTF-8") from error
    decoder, between, numbers = json.JSONDecoder(), re.compile(r"[\s,\[\]]*"), itertools.count(1)
    at = _end_of(between, text, 0)
    while at < len(text):
        begins = at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield next(numbers), BadRow(f"not JSON: {error}")
            at = _next_object(text, begins)
        else:
            inner = _inner(value) if isinstance(value, dict) else None
            for item in [value] if inner is None else inner:
                yield next(numbers), _object(item)
        at = _end_of(between, text, at)


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _next_object(text: str, broken: int) -> int:
    """Where, below a broken object, one begins that stands as far to the left."""
    margin = text[text.rfind("\n", 0, broken) + 1 : broken]
    indent = len(margin) if not margin.strip() else 0
    found = re.compile(rf"\n[ \t]{{0,{indent}}}(?=\{{)").search(text, broken + 1)
    return len(text) if found is None else found.end()


_LIMIT = lock()


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Cells as long as a line in the block, as they are that hold an image as base64. The limit is one for all who read
    csv in this process, so it is raised for a row at a time, and by one thread."""
    with _LIMIT:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, LONGEST_LINE))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def csv_rows(path: Path, *, tabs: bool, empty: bool = False) -> Iterator[_Row]:
    """The records below a header, by its names; with ``empty`` a cell without anything is ``""``, else left out.

    Raises ``OSError``, and ``StudyError`` where there is no header.
    """
    with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline(2**20)
        commas = "\t" if tabs else ";" if first.count(";") > first.count(",") else ","
        # Strict: a quote that is not closed would take the rows behind it for its text.
        records = csv.reader(itertools.chain([first], file), delimiter=commas, strict=True)
        try:
            with _long_cells():
                names = [name.strip() for name in next(records, [])]
        except csv.Error as error:
            raise StudyError(f"the header of {path} cannot be read as csv: {error}") from error
        if not names:
            raise StudyError(f"{path} has no header: the first line names the columns")
        for number in itertools.count(2):
            try:
                with _long_cells():
                    cells = next(records, None)
            except csv.Error as error:
                yield number, BadRow(f"it cannot be read as csv: {error}; is there a quote that is not closed?")
                continue
            if cells is None:
                return
            if any(cell.strip() for cell in cells):
                row = _record(names, cells)
                if empty and isinstance(row, dict):
                    row = {**dict.fromkeys(filter(None, names), ""), **row}
                yield number, row


def cell_text(value: Any) -> str | None:
    """A cell as a text, ``None`` where a table says by null or NaN that nothing stands in it.

    Whole numbers beside a missing one are read as 3.0.
    """
    if value is None or value != value:
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _record(names: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) > len(names):
        return BadRow(f"it has {len(cells)} cells, and the header {len(names)}: is there a comma that is not quoted?")
    if any("\udc80" <= sign <= "\udcff" for cell in cells for sign in cell[:2000]):
        return BadRow("not UTF-8; save the table as UTF-8")
    return _named(names, cells)


def _named(names: Sequence[str], cells: Sequence[Any]) -> dict[str, Any] | BadRow:
    """The filled cells by the names of their columns, of which two may have one name."""
    row: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=False):
        if not name or cell is None or cell == "":
            continue
        if row.get(name, cell) != cell:
            return BadRow(f"two columns are named {shortened(name, 40)!r}, and they differ: rename one")
        row[name] = cell
    return row


def _parquet(path: Path) -> Iterator[_Row]:
    parquet = require("pyarrow.parquet", extra="tables", purpose="reading parquet")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: cell for name, cell in row.items() if cell is not None}
    except OSError:
        raise
    except Exception as error:  # pyarrow has errors of its own
        raise StudyError(f"{path} is parquet that cannot be read: {shortened(str(error), 200)}") from error


def _xlsx(path: Path) -> Iterator[_Row]:
    openpyxl = require("openpyxl", extra="tables", purpose="reading an Excel sheet (or save it as csv: it)")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        records = book.worksheets[0].iter_rows(values_only=True)
        names = [str(cell).strip() if cell is not None else "" for cell in next(records, ())]
        for number, cells in enumerate(records, start=2):
            row = _named(names, cells)
            if row:
                yield number, row
    except OSError:
        raise
    except Exception as error:  # a broken sheet raises nearly anything
        raise StudyError(f"{path} is an Excel sheet that cannot be read: {shortened(str(error), 200)}") from error
