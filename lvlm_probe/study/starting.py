"""First file of a study on a table of the user's own: its columns guessed, with the reason beside each."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.escaping import one_line
from lvlm_probe.study.datasets.files import rows
from lvlm_probe.study.datasets.own_data import FIELDS, IMAGE_SUFFIXES
from lvlm_probe.study.datasets.registry import open_dataset
from lvlm_probe.study.keys import nearest
from lvlm_probe.trace.video_files import is_video_name

_LOOKED_AT = 200
"""Rows that columns are guessed from."""
_OPENED = 5
"""Images that are tried."""

_NONE = "(none)"
"""Column of a field that has none, where one of its name is there."""

_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "images", "img", "image_path", "image_file", "picture", "photo", "file", "filename", "path"),
    "video": ("video", "clip", "video_path", "video_file"),
    "mask": ("mask", "mask_path", "segmentation", "seg"),
    "boxes": ("boxes", "bboxes", "bbox", "box", "bounding_box", "region"),
    "choices": ("choices", "options", "candidates"),
    "question": ("question", "prompt", "query", "instruction", "ask", "text", "input"),
    "answer": ("answer", "truth", "ground_truth", "gt", "gt_answer", "label", "target", "true", "caption", "solution"),
    "group": ("group", "category", "type", "task", "subject", "topic", "class"),
    "id": ("id", "idx", "index", "question_id", "sample_id", "uid"),
}
"""Field → usual names of its column, the likeliest first."""


@dataclass(frozen=True)
class Start:
    """A study's file to begin with.

    Attributes:
        text: The file, YAML with comments.
        columns: Field → column.
        warnings: Sentences on what did not work: images that do not open, an answer that is missing.
    """

    text: str
    columns: Mapping[str, str]
    warnings: tuple[str, ...]


def start(data: Path, out: Path, *, model: str | None = None, columns: Mapping[str, str] | None = None) -> Start:
    """Look at a table and write a study on it; nothing is stored.

    Args:
        data: csv, tsv, json, jsonl or parquet, one question per row.
        out: where the file is going to be, which its paths are relative to.
        model: directory or hub id; by default the embedded model, to be replaced.
        columns: field → column that are known; the others are guessed.

    Raises:
        StudyError: it cannot be read, holds no rows, or no column looks like an image or a video.
    """
    if not data.exists():
        raise StudyError(f"there is no file {data}; name a csv, tsv, json, jsonl or parquet file")
    seen = [dict(row) for row in itertools.islice(rows(data, what=f"table {data}"), _LOOKED_AT)]
    if not seen:
        raise StudyError(f"{data} holds no rows")
    found = _guess(seen, columns or {})
    shown = next((field for field in ("image", "video") if field in found), None)
    if shown is None:
        raise StudyError(
            f"no column of {data} looks like an image or a video; it has {', '.join(map(repr, seen[0]))}: say which, "
            "--column image=NAME or video=NAME"
        )
    warnings: list[str] = []
    options: dict[str, Any] = {"columns": {field: name for field, (name, _) in found.items() if field != name}}
    base = data if data.is_dir() else data.parent
    directory = _directory(base, [row.get(found[shown][0]) for row in seen])
    if directory is not None:
        options["images"] = directory
    if "question" not in found:
        options["question"] = f"Describe this {shown}."
    while True:
        try:
            opened, wrong = _opened(data, options)
            break
        except StudyError as error:
            field = next(
                (
                    name
                    for name in ("mask", "boxes", "choices")
                    if found.get(name, (_NONE,))[0] != _NONE and name not in (columns or {})
                ),
                None,
            )
            if field is None:
                raise
            warnings.append(f"column {found[field][0]!r} is not taken for {field}: {error}")
            found[field] = (_NONE, "no column: what stands in the one that looks like it cannot be read")
            options["columns"] = {**options["columns"], field: _NONE}
    warnings += wrong
    if "answer" not in found:
        warnings.append("no column looks like a true answer, so whether answers are right is not counted")
    text = "\n".join(_written(data, out, model, found, options, opened, len(seen))) + "\n"
    taken = {field: name for field, (name, _) in found.items() if name != _NONE}
    return Start(text, taken, tuple(warnings))


def _guess(seen: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Field → column and the reason."""
    names = [name for name in dict.fromkeys(name for row in seen for name in row) if isinstance(name, str)]
    found: dict[str, tuple[str, str]] = {}
    for field, name in given.items():
        if field not in FIELDS:
            raise StudyError(f"there is no field {field!r}; {nearest(field, FIELDS)}")
        if name not in names:
            raise StudyError(f"there is no column {name!r}; {nearest(name, names)}")
        found[field] = (name, "as you said")
    for field in (field for field in _NAMES if field not in found):
        left = [name for name in names if name not in {taken for taken, _ in found.values()}]
        named = [name for known in _NAMES[field] for name in left if name.casefold().replace(" ", "_") == known]
        fitting = [name for name in named if _fits(field, [row.get(name) for row in seen])]
        if fitting:
            found[field] = (fitting[0], "by its name")
        elif field == "image":
            alike = [name for name in left if _fits(field, [row.get(name) for row in seen])]
            found |= {field: (alike[0], "its values are images")} if alike else {}
        elif field == "question":
            asking = [name for name in left if _share("?" in str(row.get(name)) for row in seen) > 0.5]
            found |= {field: (asking[0], "most of its values have a question mark")} if asking else {}
    return {field: found[field] for field in FIELDS if field in found}


def _fits(field: str, values: Sequence[Any]) -> bool:
    """Whether the values of a column are what a field holds."""
    there = [value for value in values if value not in (None, "")]
    if not there:
        return False
    if field == "video":
        return _share(is_video_name(value) for value in there) > 0.5
    if field in ("image", "mask"):
        return _share(_is_image(value) for value in there) > 0.5
    if field == "boxes":
        return _share(str(value).lstrip().startswith(("[", "(")) for value in there) > 0.5
    if field == "id":
        return len({str(value) for value in there}) == len(values)
    return all(isinstance(value, str | int | float | list | tuple) for value in there)


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    return isinstance(value, bytes) or (isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES))


def _share(flags: Iterator[bool]) -> float:
    there = list(flags)
    return sum(there) / len(there)


def _directory(base: Path, values: Sequence[Any]) -> str | None:
    """The folder beside the table that its images lie in, where they do not lie beside it."""
    names = [value for value in values if isinstance(value, str)]
    if not names or any((base / name).is_file() for name in names[:_OPENED]):
        return None
    folders = sorted(path for path in base.iterdir() if path.is_dir())
    return next((path.name for path in folders if any((path / name).is_file() for name in names[:_OPENED])), None)


def _opened(data: Path, options: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Try the first images or videos: a sentence on how many open, and why one did not."""
    samples = list(itertools.islice(open_dataset("table", str(data), **options), _OPENED))
    wrong = []
    for sample in samples:
        try:
            sample.load()
        except ProbeError as error:
            wrong.append(str(error))
    kind = "videos" if any(sample.video for sample in samples) else "images"
    said = f"{len(samples) - len(wrong)} of the first {len(samples)} {kind} open"
    return said, [f"{said}: {wrong[0]}"] if wrong else []


def _written(
    data: Path,
    out: Path,
    model: str | None,
    found: Mapping[str, tuple[str, str]],
    options: Mapping[str, Any],
    opened: str,
    count: int,
) -> Iterator[str]:
    """The lines of the file."""
    name = one_line(data.stem) or "study"
    beside = out.absolute().parent
    source = os.path.relpath(data.absolute(), beside)
    yield f"# A study on {one_line(data.name)}. Every key: lvlm-probe study keys"
    yield f"name: {_quoted(name)}"
    yield f"out: {_quoted(f'runs/{out.stem}')}  # answers, maps and tables go there; the same command goes on with them"
    yield "models:"
    if model is None:
        yield "  demo: {source: demo}  # the embedded model, which knows drawn scenes alone: put yours in its place"
        yield "  # mine: {source: path/to/model, dtype: bfloat16}  # a directory or hub id"
    else:
        there = Path(os.path.expanduser(model))
        place = os.path.relpath(there.absolute(), beside) if there.is_dir() and model != "demo" else model
        yield f"  {_quoted(there.name or model)}: {{source: {_quoted(place)}}}"
    yield "datasets:"
    yield f"  {_quoted(name)}:"
    yield "    reader: table"
    yield f"    source: {_quoted(source)}"
    if options.get("columns"):
        yield "    columns:  # field: column"
    for field, (column, reason) in found.items():
        here = f"      {field}: {_quoted(column)}  # {reason}"
        yield here if field != column else f"    # {field}: the column of that name"
    if "question" in options:
        yield f"    question: {_quoted(options['question'])}  # no column looks like a question: asked of every row"
    if "images" in options:
        yield f"    images: {_quoted(options['images'])}  # folder that the images' paths start from"
    yield f"    # {opened}"
    if "choices" in found:
        yield "    open_ended: true  # choices are left out of the question; false: as it stands"
    more = f"{count} or more" if count >= _LOOKED_AT else str(count)
    yield f"    limit: 10  # a first run; the table has {more} rows, and without a limit all are used"
    yield "methods:"
    yield "  igos++: {}     # a mask that is optimised: the most careful, and the most passes"
    yield "  gradcam: {}    # one pass forward and one backward"
    yield "  random: {}     # what the others have to be better than"
    yield "  center: {}     # and this, a blob in the middle: photographs have their objects there"
    yield "filter:"
    yield "  minimum_drop: 0.3  # maps of answers that lose this share of their probability without the image; 0: all"
    yield f"settings: {{max_new_tokens: 64{', num_frames: 8' if 'video' in found else ''}}}"


def _quoted(text: str) -> str:
    """A text as YAML, which a JSON text is."""
    return json.dumps(text, ensure_ascii=False)
