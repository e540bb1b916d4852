"""Answers that were recorded elsewhere, as lines of JSON: what a line holds, and what is wrong with it.

Fields, with the names that serving engines and evaluation scripts use for them:

* ``image`` (``images``, ``image_path``, ``image_file``): a path, a ``data:`` URI, or a list of them;
* ``question``, or ``prompt``: the text as it was sent, chat template and image placeholders included. A prompt with
  neither is taken for a question;
* ``answer`` (``response``, ``output``, ``generated_text``, ``completion``, ``text``): the answer's text;
* ``token_ids`` (``output_token_ids``, ``answer_token_ids``): the answer's tokens, which then need not be guessed;
* ``logprobs`` (``log_probs``, ``output_token_logprobs``): natural logarithms, one per token. Plain numbers, or as the
  engines write them: vLLM's ``[{"4321": {"logprob": -0.1, …}}, …]``, SGLang's ``[[-0.1, 4321, "cat"], …]``, OpenAI's
  ``{"content": [{"token": "cat", "logprob": -0.1}, …]}``;
* ``id``, ``engine``: kept with the trace.

A line may come from anybody. One that is no row, whatever it is, comes as the reason why, and the next line is read. A
path is followed only into the directories that the pictures are said to lie in, links resolved: else a line could have
any picture of this machine put into a trace that is handed on.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.trace.image_files import open_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FIELDS", "AnswerRow", "BadRow", "count_rows", "read_rows", "reason_of", "writable"]

FIELDS: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "image_path", "image_file"),
    "question": ("question",),
    "prompt": ("prompt",),
    "answer": ("answer", "response", "output", "generated_text", "completion", "text"),
    "token_ids": ("token_ids", "output_token_ids", "answer_token_ids"),
    "logprobs": ("logprobs", "log_probs", "output_token_logprobs"),
    "id": ("id", "question_id", "request_id"),
    "engine": ("engine", "model_id"),
}
"""Field → the names it is looked for under, in this order."""

LONGEST_LINE = 2**28
"""Bytes of a line; pictures of ordinary size in ``data:`` URIs, a dozen of them, fit."""

_LARGEST_PICTURES = 2**29
"""Pixels of a row's pictures together: 1.5 GB as RGB."""

_SHOWN = 400
"""Characters of a reason: what stands in a line may be megabytes."""

_HALVES = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """A row that cannot be taken over; the message is the reason, in characters that can be written to a file."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason_of(reason))


@dataclass(frozen=True)
class AnswerRow:
    """One answer that was recorded elsewhere.

    Attributes:
        line: its number in the file, from 1.
        content: the whole object.
        images: paths or ``data:`` URIs, as they are written there.
        question: what was asked; ``None`` where there is a prompt.
        prompt: the text as it was sent.
        answer: its text; ``None`` where there are token ids alone.
        token_ids: its tokens; ``None`` where there is text alone.
        log_probs: natural logarithms, one per token, NaN where one is not given; ``None`` without any.
        id, engine: what the row says of itself.
    """

    line: int
    content: Mapping[str, Any] = field(repr=False)
    images: tuple[str, ...]
    question: str | None
    prompt: str | None
    answer: str | None
    token_ids: tuple[int, ...] | None
    log_probs: tuple[float, ...] | None
    id: str | None = None
    engine: str | None = None

    def open_images(self, directories: Sequence[Path]) -> list[Image.Image]:
        """The pictures, RGB, of ``data:`` URIs or from files in ``directories``. Raises ``BadRow``."""
        opened: list[Image.Image] = []
        pixels = 0
        for text in self.images:
            opened.append(_open(text, directories))
            pixels += opened[-1].width * opened[-1].height
            if pixels > _LARGEST_PICTURES:
                raise BadRow(f"the {len(self.images)} pictures have more than {_LARGEST_PICTURES} pixels together")
        return opened


def read_rows(
    path: str | Path, *, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, AnswerRow | BadRow]]:
    """The rows of a file of JSON lines, lazily; a line that is none comes as the reason why not.

    Args:
        path: the file.
        columns: field → name, for fields of other names than ``FIELDS`` has.

    Raises:
        StudyError: the file cannot be read, or ``columns`` names no field.
    """
    for name in columns or {}:
        if name not in FIELDS:
            raise StudyError(f"columns: there is no field {name!r}; the fields are {', '.join(FIELDS)}")
    names = {**FIELDS, **{name: (column,) for name, column in (columns or {}).items()}}
    if not Path(path).is_file():  # a pipe or a device would be waited for
        raise StudyError(f"{path} cannot be read: there is no such file; give a file of JSON lines")
    try:
        with Path(path).open("rb") as lines:
            if lines.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise StudyError(f"{path} is UTF-16; save it as UTF-8")
            for line, data in enumerate(_lines(lines), start=1):
                if data is None:
                    yield line, BadRow(f"the line is longer than {LONGEST_LINE} bytes")
                elif data.strip():
                    yield line, _row(line, data, names)
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error}; give a file of JSON lines") from error


def reason_of(error: object) -> str:
    """Why a row is not taken over, as a text of bounded length that can be encoded."""
    text = str(error) if isinstance(error, str | BadRow | ProbeError) else f"{type(error).__name__}: {error}"
    return writable(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def writable(text: str) -> str:
    """A text that can be encoded: halves of characters are written as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def count_rows(path: str | os.PathLike[str]) -> int:
    """How many lines of a file are not empty, for telling how far the work is."""
    try:
        with Path(path).open("rb") as lines:
            return sum(1 for data in _lines(lines) if data is None or data.strip())
    except OSError:
        return 0  # reading will say what is wrong


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines as bytes; ``None`` for one that is too long to be held."""
    while data := file.readline(LONGEST_LINE + 1):
        if len(data) <= LONGEST_LINE:
            yield data
            continue
        while not data.endswith(b"\n") and (data := file.readline(2**20)):
            pass
        yield None


def _row(line: int, data: bytes, names: Mapping[str, Sequence[str]]) -> AnswerRow | BadRow:
    try:
        content = json.loads(data.decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise BadRow(f"a row is an object, not {type(content).__name__}")
        found = {
            key: next((content[name] for name in known if content.get(name) is not None), None)
            for key, known in names.items()
        }
        return _parsed(line, content, found)
    except BadRow as reason:
        return reason
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte {data[error.start]:#04x} at {error.start}")
    except RecursionError:
        return BadRow("not JSON that can be read: lists or objects in one another, too deep")
    except ValueError as error:
        return BadRow(f"not JSON: {error}")
    except Exception as error:  # whatever a line is, the next one is read
        return BadRow(f"it cannot be read, {reason_of(error)}")


def _parsed(line: int, content: dict[str, Any], found: dict[str, Any]) -> AnswerRow:
    images = found["image"] if isinstance(found["image"], list) else [found["image"]]
    if not all(isinstance(item, str) and item for item in images):
        raise BadRow(
            f"there is no image: a path, a data: URI or a list of them is needed; the row has {_keys(content)}"
        )
    for name in ("question", "prompt", "answer"):
        if found[name] is None:
            continue
        if not isinstance(found[name], str):
            raise BadRow(f"the {name} is a text, not {type(found[name]).__name__}")
        if half := _HALVES.search(found[name]):
            raise BadRow(f"the {name} holds half of a character (U+{ord(half[0]):04X}), which no tokenizer takes")
    if not (found["question"] or found["prompt"]):
        raise BadRow(f"there is neither question nor prompt; the row has {_keys(content)}")
    ids = found["token_ids"]
    if ids is not None and not (isinstance(ids, list) and ids and all(_is_id(item) for item in ids)):
        raise BadRow("token_ids is a list of whole numbers, and not an empty one")
    values, named = _log_probs(found["logprobs"], ids)
    if ids is not None and named is not None and named != list(ids):
        raise BadRow("token_ids and the tokens of the log-probabilities differ")
    ids = named if ids is None else ids
    if ids is None and not (found["answer"] or "").strip():
        raise BadRow(f"there is neither an answer nor token_ids; the row has {_keys(content)}")
    if ids is not None and values is not None and len(values) != len(ids):
        raise BadRow(f"{len(values)} log-probabilities for {len(ids)} tokens")
    return AnswerRow(
        line=line,
        content=content,
        images=tuple(images),
        question=found["question"],
        prompt=found["prompt"],
        answer=found["answer"],
        token_ids=None if ids is None else tuple(ids),
        log_probs=None if values is None else tuple(values),
        id=_name(found["id"]),
        engine=_name(found["engine"]),
    )


def _log_probs(given: Any, ids: list[int] | None) -> tuple[list[float] | None, list[int] | None]:
    """Numbers, and token ids where the format has them (SGLang's)."""
    if isinstance(given, Mapping):  # OpenAI: chat completions, then completions
        given = given.get("content", given.get("token_logprobs"))
    if given is None:
        return None, None
    if not isinstance(given, list):
        raise BadRow(f"log-probabilities are a list, not {type(given).__name__}")
    values: list[float] = []
    named: list[int] = []
    for step, entry in enumerate(given):
        if isinstance(entry, list) and len(entry) >= 2 and _is_id(entry[1]):
            named.append(entry[1])
            entry = entry[0]
        elif isinstance(entry, Mapping):
            entry = _of_token(entry, step, ids)
        if entry is not None and (isinstance(entry, bool) or not isinstance(entry, int | float)):
            raise BadRow(f"log-probability {step} is no number: {str(entry)[:60]}")
        if entry is not None and entry > 1e-3:
            raise BadRow(f"log-probability {step} is {entry}, above 0: natural logarithms of probabilities are needed")
        try:
            values.append(math.nan if entry is None else float(entry))
        except OverflowError:
            raise BadRow(f"log-probability {step} is too large a number") from None
    return values, named if named and len(named) == len(values) else None


def _of_token(entry: Mapping[str, Any], step: int, ids: list[int] | None) -> Any:
    """The number in one entry of OpenAI's list, or of vLLM's, which has those of the likeliest tokens beside it."""
    if "logprob" in entry:
        return entry["logprob"]
    if ids is None and len(entry) > 1:
        raise BadRow(f"log-probability {step} is given for {len(entry)} tokens; token_ids must say which was chosen")
    key = next(iter(entry), None) if ids is None else str(ids[step]) if step < len(ids) else None
    value = entry.get(str(key))
    if value is None:
        raise BadRow(f"log-probability {step} is not given for the token of the answer ({key})")
    return value["logprob"] if isinstance(value, Mapping) and "logprob" in value else value


def _name(value: Any) -> str | None:
    """What a row says of itself, of bounded length."""
    return None if value is None else reason_of(str(value))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _keys(content: Mapping[str, Any]) -> str:
    keys = [repr(key[:40]) for key in itertools.islice(content, 12)]
    return ", ".join(keys + ["…"] * (len(content) > len(keys))) or "nothing"


def _open(text: str, directories: Sequence[Path]) -> Image.Image:
    if text.startswith("data:"):
        try:
            return open_image(text)
        except ProbeError as error:
            raise BadRow(f"the picture in the data: URI cannot be read: {error}") from error
    text = os.path.expanduser(text)
    found, outside = None, False
    for place in (*(directory / text for directory in directories), Path(text)):
        with suppress(OSError, ValueError):  # a name that is too long, or has a NUL in it
            real = place.resolve(strict=True)
            if not real.is_file():  # neither a directory, a pipe, nor a device
                continue
            if any(real.is_relative_to(directory.resolve()) for directory in directories):
                found = real
                break
            outside = True
    looked = ", ".join(map(str, directories))
    if found is None and outside:
        raise BadRow(f"the picture {text[:200]} lies outside of {looked}; name its directory: images=, --images DIR")
    if found is None:
        raise BadRow(f"the picture {text[:200]} is missing (looked in {looked})")
    try:
        return open_image(found)
    except ProbeError as error:
        raise BadRow(str(error)) from error
