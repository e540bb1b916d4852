"""Rows of csv, jsonl, json, parquet files and hub data sets, through the ``datasets`` library, and images in them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm_probe.errors import ImageError, StudyError
from lvlm_probe.extras import require
from lvlm_probe.files import found_within
from lvlm_probe.importing.refusals import BadRow
from lvlm_probe.importing.row_files import cell_text, csv_rows, json_lines

if TYPE_CHECKING:
    from PIL import Image

_KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def is_local(source: str) -> bool:
    """Tell whether a source is a path that exists; otherwise it can only be a hub id."""
    return os.path.exists(os.path.expanduser(source))


def folder(source: str, what: str) -> Path:
    """A directory that has to be there. Raises ``StudyError``."""
    path = Path(os.path.expanduser(source))
    if not path.is_dir():
        raise StudyError(f"{what}: there is no directory {source}; give the directory of a local copy")
    return path


def find_file(directory: Path, *names: str, what: str) -> Path:
    """The first of some files that is there. Raises ``StudyError`` that names them all."""
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise StudyError(f"{what}: {directory} has no {' or '.join(names)}")


class Row(dict[str, Any]):
    """One row of a table, by column.

    Args:
        values: of its columns.
        where: which row of what it is, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def column(self, *names: str) -> Any:
        """The value of the first of some columns. Raises ``StudyError`` that names the columns there are."""
        for name in names:
            if name in self:
                return self[name]
        wanted = " or ".join(map(repr, names))
        raise StudyError(f"{self.where}: there is no column {wanted}; it has {', '.join(map(repr, self))}")

    def text(self, *names: str) -> str:
        """The same as text. Raises ``StudyError`` also where nothing stands in it: tables say so by null or NaN."""
        text = cell_text(self.column(*names))
        if text is None:
            raise StudyError(f"{self.where}: there is nothing in column {next(n for n in names if n in self)!r}")
        return text


def rows(source: str | Path, *, what: str, split: str | None = None, config: str | None = None) -> Iterator[Row]:
    """Rows of a file, of all files of one kind in a directory, or of a hub data set; images are not decoded.

    csv and jsonl are read line by line; parquet and hub data sets by the ``datasets`` library.

    Args:
        source: the file, directory or hub id.
        what: the data set, for errors; they number the row.
        split: where there are several.
        config: of a hub data set.

    Raises:
        StudyError: there is no such file or data set, or it cannot be read.
    """
    for number, values in enumerate(_rows(source, split, config), start=1):
        yield Row(values, f"{what}, row {number}")


def _rows(source: str | Path, split: str | None, config: str | None) -> Iterator[dict[str, Any]]:
    path = Path(os.path.expanduser(source))
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


def open_image(value: Any, *, where: str, beside: Sequence[Path] = ()) -> Image.Image:
    """An image, RGB: from bytes, from a path, or one that is open already.

    Args:
        beside: directories that a path is looked for in. It is not followed out of them, links resolved: what a data
            set names may be any image of this machine, and ends up in what is handed on.

    Raises:
        StudyError: it is missing, outside, or no image.
    """
    from PIL import Image

    from lvlm_probe.trace.image_files import open_image, open_image_file

    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, Image.Image | bytes | bytearray):
            return open_image(value)
        if isinstance(value, str | Path) and str(value):
            return open_image_file(_found(value, where, beside or (Path(),)))
    except (ImageError, OSError, ValueError) as error:
        raise StudyError(f"{where}: the image cannot be read: {error}") from error
    raise StudyError(f"{where}: there is no image in this row ({type(value).__name__})")


def find_video(value: Any, *, where: str, beside: Sequence[Path] = ()) -> Path:
    """The file of a video, looked for as images are. Raises ``StudyError``."""
    if isinstance(value, str | Path) and str(value):
        return _found(value, where, beside or (Path(),), what="video")
    raise StudyError(f"{where}: there is no path of a video in this row ({type(value).__name__})")


def first_frame(value: Any, *, where: str, beside: Sequence[Path] = ()) -> Image.Image:
    """The first frame of a video, RGB. Raises ``StudyError``."""
    from PIL import Image

    from lvlm_probe.trace.video_files import read_video

    try:
        frames, _, _ = read_video(find_video(value, where=where, beside=beside), lambda _: [0])
    except ImageError as error:
        raise StudyError(f"{where}: the video cannot be read: {error}") from error
    return Image.fromarray(frames[0])


def _found(value: str | Path, where: str, directories: Sequence[Path], what: str = "image") -> Path:
    found, outside = found_within(value, directories)
    if found is not None:
        return found
    named = str(value)[:200]
    looked = ", ".join(str(directory.absolute()) for directory in directories)
    if outside:
        raise StudyError(f"{where}: the {what} {named} lies outside of {looked}; put it there, or name its directory")
    raise StudyError(f"{where}: the {what} {named} is missing (looked in {looked})")


def read_json(file: Path) -> Any:
    """Return what a JSON file holds. Raises ``StudyError``."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(f"{file} cannot be read: {error}") from error


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
        for number, row in csv_rows(file, tabs=file.suffix == ".tsv", empty=True):
            if isinstance(row, BadRow):
                raise StudyError(f"{file}, row {number}: {row}")
            yield row
    except OSError as error:
        raise StudyError(f"{file} cannot be read: {error}") from error


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for number, row in json_lines(file):
            if isinstance(row, BadRow):
                raise StudyError(f"{file}, line {number}: {row}")
            yield row
    except OSError as error:
        raise StudyError(f"{file} cannot be read: {error}") from error


def _json(file: Path) -> Iterator[dict[str, Any]]:
    content = read_json(file)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise StudyError(f"{file} is a list of objects, one per question; this is something else")
    yield from content


def _is_lines(file: Path) -> bool:
    try:
        with file.open("rb") as lines:
            return lines.read(1) == b"{"
    except OSError as error:
        raise StudyError(f"{file} cannot be read: {error}") from error


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
        found = library.load_dataset(source, config, split=split or "test", streaming=True, **_no_code(library))
        yield from _undecoded(library, found)
    except Exception as error:  # every loader script has errors of its own
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"{source} (split {split or 'test'}) cannot be read from the hub: {error}") from error


def _no_code(library: Any) -> dict[str, bool]:
    """Said to the releases of ``datasets`` that still ran a data set's own script."""
    known = inspect.signature(library.load_dataset).parameters
    return {"trust_remote_code": False} if "trust_remote_code" in known else {}


def _undecoded(library: Any, found: Any) -> Iterator[dict[str, Any]]:
    """Rows whose images stay bytes or paths, so that a corrupt one costs its own sample only."""
    for name, feature in (found.features or {}).items():
        if isinstance(feature, library.Image):
            found = found.cast_column(name, library.Image(decode=False))
    yield from found
