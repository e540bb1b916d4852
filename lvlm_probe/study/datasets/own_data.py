"""Readers of a user's own data: a table with columns of any names, or a folder of images."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lvlm_probe.errors import StudyError
from lvlm_probe.importing.row_files import cell_text
from lvlm_probe.study.datasets.files import Row, find_video, first_frame, folder, open_image, rows
from lvlm_probe.study.datasets.open_ended import lettered, strip_choices, strip_instructions, true_choice
from lvlm_probe.study.datasets.registry import Sample, register_dataset, replaced
from lvlm_probe.study.keys import short
from lvlm_probe.trace.video_files import is_video_name

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Field = Literal["id", "question", "image", "video", "answer", "choices", "group", "boxes", "mask"]
FIELDS: tuple[str, ...] = get_args(Field)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@register_dataset(
    "table",
    layout="a csv, tsv, json, jsonl or parquet file, or a hub id, one question per row, about an image or a video; "
    "columns: {image: photo, …} says which is which, and `lvlm-probe study init FILE` writes it for you",
    relax=lambda sample: replaced(sample, strip_instructions(strip_choices(sample.question))),
)
def table(
    source: str,
    *,
    split: str | None = None,
    columns: Mapping[Field, str] | None = None,
    question: str | None = None,
    images: str | None = None,
) -> Iterator[Sample]:
    """One question per row.

    Args:
        columns: Field → column, for fields of another name: id, question, image (a path, or bytes in parquet), video (a
            path, in its place), answer, choices (a list, or text "(a) … (b) …"), group, boxes ([[x0, y0, x1, y1], …] in
            pixels; of a video by the frame of the file from which on they hold) and mask (path of an image, white = the
            region that decides the answer), e.g.
            ``columns: {image: photo, answer: truth}``.
        question: Asked of every row, where there is no such column, e.g. ``question: "What is this?"``.
        images: Directory that paths are relative to, beside the file's own; a path that leads out of both, by itself
            or by a link, is refused, e.g. ``images: photos``.

    Raises:
        StudyError: a column is missing, or what stands in it is no such thing.
    """
    names = {name: name for name in FIELDS} | dict(columns or {})
    path = Path(os.path.expanduser(source))
    base = path if path.is_dir() else path.parent
    beside = (base / images, base) if images else (base,)
    seen: dict[str, int] = {}
    for number, row in enumerate(rows(source, what=f"table {source}", split=split), start=1):
        here = row.where
        index = str(number) if _nothing(row.get(names["id"])) else row.text(names["id"])
        if index in seen:
            raise StudyError(
                f"{here}: the {names['id']} {short(index)} stands in row {seen[index]} too, and results are kept "
                "by it; name a column that tells the rows apart (columns: {id: …})"
            )
        seen[index] = number
        asked = question or row.text(names["question"])
        asked = asked.strip().removeprefix("<image>").lstrip() if asked.lstrip().startswith("<image>") else asked
        if "<image>" in asked:
            raise StudyError(f"{here}: the question holds <image>; the image stands before it: leave the mark out")
        if not asked.strip():
            raise StudyError(f"{here}: there is nothing in column {names['question']!r}")
        video = row.get(names["video"])
        value = video or row.column(names["image"])
        moves = bool(video) or is_video_name(value)
        choices = _choices(row.get(names["choices"]), here)
        annotations: dict[str, Any] = {}
        if row.get(names["boxes"]):
            annotations["region"] = (_boxes_in_time if moves else _boxes)(row[names["boxes"]], here)
        elif row.get(names["mask"]) and not moves:
            mask = open_image(row[names["mask"]], where=here, beside=beside)
            annotations["region"] = _white(mask, here)
        yield Sample(
            id=index,
            question=asked,
            load=partial(first_frame if moves else open_image, value, where=here, beside=beside),
            video=partial(find_video, value, where=here, beside=beside) if moves else None,
            answer=_answer(row, names["answer"], choices),
            choices=tuple(choices.values()),
            group=None if _nothing(row.get(names["group"])) else row.text(names["group"]),
            annotations=annotations,
        )


@register_dataset("images", layout="a directory of images, all asked the same question; folders are groups")
def images(source: str, *, split: str | None = None, question: str = "Describe this image.") -> Iterator[Sample]:
    """One question about every image in a directory, in order of path.

    Args:
        question: Asked about every image, e.g. ``question: "What is this?"``.

    Raises:
        StudyError: there is no such directory, or no image in it.
    """
    path = folder(source, "images")
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise StudyError(f"images: {source} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    for file in found:
        name = file.relative_to(path)
        yield Sample(
            id=name.as_posix(),
            question=question,
            load=partial(open_image, file.absolute(), where=f"images, {name}", beside=(path,)),
            group=name.parent.as_posix() if len(name.parts) > 1 else None,
        )


def _nothing(value: Any) -> bool:
    """Whether a cell is empty; tables say so by null, by NaN or by no text."""
    return cell_text(value) in (None, "")


def _answer(row: Row, name: str, choices: Mapping[str, str]) -> str | tuple[str, ...] | None:
    """The true answer, several where it is a list; ``None`` without one."""
    value = row.get(name)
    if _nothing(value) or value == []:
        return None
    if isinstance(value, bool | Mapping):
        raise StudyError(f"{row.where}: an answer is a text, or a list of texts; got {short(value, 60)}")
    if isinstance(value, list | tuple):
        return tuple(true_choice(str(item), dict(choices)) for item in value)
    found = true_choice(row.text(name), dict(choices))
    if choices and found not in choices.values() and re.fullmatch(r"\d+|\W*[A-Za-z]\W*", found):
        raise StudyError(
            f"{row.where}: the answer {found!r} is none of the choices, {', '.join(choices.values())}, nor the letter "
            "of one"
        )
    return found


def _choices(value: Any, where: str) -> dict[str, str]:
    if value is None or value == "":
        return {}
    if isinstance(value, list | tuple):
        return {chr(ord("a") + place): str(text) for place, text in enumerate(value)}
    found = lettered(str(value))
    if not found:
        raise StudyError(f'{where}: choices are a list, or text like "(a) … (b) …"; got {value!r}')
    return found


def _boxes(value: Any, where: str) -> list[tuple[float, ...]]:
    try:
        given = json.loads(value) if isinstance(value, str) else value
        given = [given] if len(given) == 4 and not hasattr(given[0], "__len__") else given
        found = [tuple(float(edge) for edge in box) for box in given]
        if not found or any(len(box) != 4 or not all(map(math.isfinite, box)) for box in found):
            raise ValueError("not four numbers each")
        if all(0 <= edge <= 1 for box in found for edge in box) and any(edge % 1 for box in found for edge in box):
            raise ValueError("shares of the image")
    except (TypeError, ValueError, LookupError, OverflowError, RecursionError) as error:
        shown = short(value, 200)
        raise StudyError(f"{where}: boxes are [[x0, y0, x1, y1], …] in pixels; got {shown} ({error})") from error
    return found


def _boxes_in_time(value: Any, where: str) -> dict[int, list[tuple[float, ...]]]:
    """Boxes by the frame of the file from which on they hold, in order; none there end those before."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
        starts = sorted((int(frame), boxes) for frame, boxes in given.items())
        if not starts or starts[0][0] < 0 or not any(boxes for _, boxes in starts):
            raise ValueError("no boxes, or frames below 0")
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StudyError(
            f'{where}: boxes of a video are {{"12": [[x0, y0, x1, y1], …], "40": []}}, in pixels, by the frame of the '
            f"file from which on they hold; got {short(value, 200)} ({error})"
        ) from error
    return {frame: _boxes(boxes, where) if boxes else [] for frame, boxes in starts}


def _white(mask: Image.Image, where: str) -> np.ndarray:
    """The region of a mask, ``(row, col)`` bool: what is white, or of two colours (0 and 1) the lighter."""
    import numpy as np

    levels = np.asarray(mask.convert("L"))
    found = np.unique(levels)
    white = levels == found[-1] if len(found) == 2 else levels > 127
    if white.all() or not white.any():
        told = "white all over" if white.all() else "nowhere white"
        raise StudyError(f"{where}: the mask is {told}; white is the region that decides the answer, the rest is black")
    return white
