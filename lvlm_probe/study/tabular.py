"""Rows of csv, jsonl, json, parquet files and hub data sets, through the ``datasets`` library, and pictures in them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import StudyError
from lvlm_probe.metrics.extras import require

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["column", "find_file", "folder", "is_local", "open_image", "rows"]

_KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def is_local(source: str) -> bool:
    """Whether a source is a path that exists; otherwise it can only be a hub id."""
    return Path(source).expanduser().exists()


def folder(source: str, what: str) -> Path:
    """A directory that has to be there. Raises ``StudyError``."""
    path = Path(source).expanduser()
    if not path.is_dir():
        raise StudyError(f"{what}: there is no directory {source}; give the directory of a local copy")
    return path


def find_file(directory: Path, *names: str, what: str) -> Path:
    """The first of some files that is there. Raises ``StudyError`` that names them all."""
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise StudyError(f"{what}: {directory} has no {' or '.join(names)}")


def rows(source: str | Path, *, split: str | None = None, config: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a file, of all files of one kind in a directory, or of a hub data set; pictures are not decoded.

    csv and jsonl are read line by line; parquet and hub data sets by the ``datasets`` library.

    Raises:
        StudyError: there is no such file or data set, or it cannot be read.
    """
    path = Path(source).expanduser()
    files = _files(path, split)
    if not files:
        if path.exists():
            raise StudyError(
                f"{source} holds no csv, json, jsonl or parquet file" + (f" of split {split}" if split else "")
            )
        yield from _hub(str(source), split, config)
        return
    for file in files:
        if file.suffix in (".csv", ".tsv"):
            yield from _csv(file)
        elif file.suffix == ".jsonl" or (file.suffix == ".json" and _is_lines(file)):
            yield from _lines(file)
        elif file.suffix == ".json":
            yield from _json(file)
        else:
            yield from _parquet(file)


def column(row: Mapping[str, Any], *names: str, where: str, number: int) -> Any:
    """The value of the first of some columns. Raises ``StudyError`` that names the columns there are."""
    for name in names:
        if name in row:
            return row[name]
    raise StudyError(
        f"{where}, row {number}: there is no column {' or '.join(map(repr, names))}; it has {', '.join(map(repr, row))}"
    )


def open_image(value: Any, *, where: str, beside: Sequence[Path] = ()) -> Image.Image:
    """A picture, RGB: from bytes, from a path (looked for in ``beside``), or one that is open already.

    Raises:
        StudyError: it is missing, or no picture.
    """
    from PIL import Image

    try:
        if isinstance(value, Image.Image):
            return value.convert("RGB")
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | bytearray):
            return Image.open(io.BytesIO(value)).convert("RGB")
        if isinstance(value, str | Path) and str(value):
            for directory in (*beside, Path()):
                if (directory / value).is_file():
                    return Image.open(directory / value).convert("RGB")
            looked = ", ".join(str(directory) for directory in beside) or "the working directory"
            raise StudyError(f"{where}: the picture {value} is missing (looked in {looked})")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise StudyError(f"{where}: the picture cannot be read: {error}") from error
    raise StudyError(f"{where}: there is no picture in this row ({type(value).__name__})")


def _files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        if path.suffix not in _KINDS:
            raise StudyError(
                f"{path}: a data set is a csv, tsv, json, jsonl or parquet file, not {path.suffix or 'this'}"
            )
        return [path]
    if not path.is_dir():
        return []
    found = sorted(file for file in path.rglob("*") if file.suffix in _KINDS and file.is_file())
    for suffix in (".parquet", ".jsonl", ".json", ".csv", ".tsv"):
        chosen = [file for file in found if file.suffix == suffix]
        if chosen and split is not None:
            chosen = [file for file in chosen if split in file.name or split in file.parent.name]
        if chosen:
            return chosen
    return []


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StudyError(f"{file} cannot be read: {error}") from error


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise StudyError(f"{file}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise StudyError(f"{file}, line {number}: a row is an object, not {type(row).__name__}")
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{file} cannot be read: {error}") from error


def _json(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise StudyError(f"{file} is a list of objects, one per question; this is something else")
    yield from content


def _is_lines(file: Path) -> bool:
    with file.open(encoding="utf-8") as lines:
        return lines.read(1) == "{"


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    library = require("datasets", extra="study", purpose="reading parquet")
    try:
        found = library.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from _undecoded(library, found)
    except Exception as error:  # pyarrow has errors of its own
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"{file} cannot be read: {error}") from error


def _hub(source: str, split: str | None, config: str | None) -> Iterator[dict[str, Any]]:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise StudyError(f"{source} is neither here nor a hub id (owner/name)")
    library = require("datasets", extra="study", purpose="reading a data set of the hub")
    try:
        found = library.load_dataset(source, config, split=split or "test", streaming=True)
        yield from _undecoded(library, found)
    except Exception as error:  # every loader script has errors of its own
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"{source} (split {split or 'test'}) cannot be read from the hub: {error}") from error


def _undecoded(library: Any, found: Any) -> Iterator[dict[str, Any]]:
    """Rows whose pictures stay bytes or paths, so that a corrupt one costs its own sample only."""
    for name, feature in (found.features or {}).items():
        if isinstance(feature, library.Image):
            found = found.cast_column(name, library.Image(decode=False))
    yield from found
