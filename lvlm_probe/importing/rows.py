"""Answers that were recorded elsewhere, as rows of a file: what a row holds, and what is wrong with it.

Files and their kinds are in ``row_files``, the places where programs keep question and answer in ``shapes``; here a
row's fields are checked. With the names of a row of one's own:

* ``image`` (``images``, ``image_path``, ``image_file``): a path, a ``data:`` URI, base64, bytes, ``{"bytes", "path"}``,
  an http(s) URL where the network may be asked, or a list of them;
* ``question``, or ``prompt``: the text as it was sent, chat template and image placeholders included. A prompt with
  neither is taken for a question. For models that take no question ``prompt`` is their task, or how the answer begins,
  and neither need be there;
* ``answer`` (``response``, ``output``, ``generated_text``, ``completion``, ``text``): the answer's text;
* ``token_ids`` (``output_token_ids``, ``answer_token_ids``, ``output_ids``): the answer's tokens, which then need not
  be guessed;
* ``logprobs`` (``log_probs``, ``output_token_logprobs``): natural logarithms, one per token. Plain numbers, or as the
  engines write them: vLLM's ``[{"4321": {"logprob": -0.1, …}}, …]``, SGLang's ``[[-0.1, 4321, "cat"], …]``, OpenAI's
  ``{"content": [{"token": "cat", "logprob": -0.1}, …]}``;
* ``id``, ``engine``: kept with the trace.

A row may come from anybody. One that is no row, whatever it is, comes as the reason why, and the next one is read. A
path is followed only into the directories that the images are said to lie in, links resolved: else a row could have
any image of this machine put into a trace that is handed on.
"""

from __future__ import annotations

import ast
import base64
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lvlm_probe.errors import ProbeError, StudyError
from lvlm_probe.files import found_within
from lvlm_probe.importing.refusals import BadRow, reason_of, shortened
from lvlm_probe.importing.row_files import (
    FILES,
    TABLES,
    cell_text,
    count_rows,
    kind_of,
    line_at,
    lines_of,
    parsed,
    rows_in,
)
from lvlm_probe.importing.shapes import FIELDS, IDS, SHAPES, fields_of, is_request, keys_of
from lvlm_probe.kinds import is_whole
from lvlm_probe.trace.image_files import decode_image, open_image

if TYPE_CHECKING:
    from PIL import Image

_LARGEST_IMAGES = 2**29
"""Pixels of a row's images together: 1.5 GB as RGB."""

_NOT_GIVEN = -9998.0
"""At and below this, nats, is what engines write for minus infinity (vLLM: -9999)."""

_NEEDED = ("image", "question", "answer")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class AnswerRow:
    """One answer that was recorded elsewhere.

    Attributes:
        line: its number in the file, from 1.
        content: the whole object.
        images: paths, ``data:`` URIs, base64, URLs or the bytes of files, as they are written there.
        question: what was asked; ``None`` where there is a prompt.
        prompt: the text as it was sent.
        answer: its text; ``None`` where there are token ids alone.
        token_ids: its tokens; ``None`` where there is text alone.
        log_probs: natural logarithms, one per token, NaN where one is not given; ``None`` without any.
        id, engine: what the row says of itself.
        messages: the turns before the answer, as a chat template takes them, without the images; ``None`` where there
            is a question alone.
        template: what the chat template is given besides (``enable_thinking``, tools), by name.
        prompt_ids: the prompt's tokens in the engine.
        finish: why the answer ended, in the engine's word.
        ended: whether it ended by a token of the model's own, which a text does not show.
        scored: tokens and log-probabilities at whose end the answer stands, of an answer that was given to be scored.
        shape: a name of ``SHAPES``.
        notes: sentences on what was decided.
        unasked: why a model that wants a question cannot take the row; empty where there is one.
    """

    line: int
    content: Mapping[str, Any] = field(repr=False)
    images: tuple[str | bytes, ...] = field(repr=False)
    question: str | None
    prompt: str | None
    answer: str | None
    token_ids: tuple[int, ...] | None
    log_probs: tuple[float, ...] | None
    id: str | None = None
    engine: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] | None = None
    finish: str | None = None
    ended: bool = False
    scored: tuple[tuple[int, float], ...] | None = field(default=None, repr=False)
    shape: str = "plain"
    notes: tuple[str, ...] = ()
    unasked: str = ""

    @property
    def asked(self) -> tuple[str | None, str] | None:
        """The system's turn, if any, and the question, where images and then the question are all of the user's turns;
        ``None`` where more was said, or in another order."""
        if self.question is None or self.template:
            return None
        turns = list(self.messages or ())
        system = None
        if turns and turns[0]["role"] == "system":
            system = "\n".join(str(part.get("text", "")) for part in turns.pop(0)["content"])
        if not turns:
            return system, self.question
        kinds = [part["type"] for part in turns[0]["content"]]
        alone = len(turns) == 1 and turns[0]["role"] == "user" and kinds == ["image"] * (len(kinds) - 1) + ["text"]
        return (system, self.question) if alone else None

    def open_images(self, directories: Sequence[Path], *, fetch: bool = False) -> list[Image.Image]:
        """The images, RGB, from the row itself, from files in ``directories``, or with ``fetch`` from the network.

        Raises ``BadRow``.
        """
        opened: list[Image.Image] = []
        pixels = 0
        for source in self.images:
            opened.append(_open(source, directories, fetch))
            pixels += opened[-1].width * opened[-1].height
            if pixels > _LARGEST_IMAGES:
                raise BadRow(f"the {len(self.images)} images have more than {_LARGEST_IMAGES} pixels together")
        return opened


@dataclass(frozen=True)
class Source:
    """A file of answers and how it is read.

    Attributes:
        path: the file.
        columns: field → name, for fields of other names than ``FIELDS`` has; dots lead into objects.
        format: a kind of ``FILES``, a shape of ``SHAPES``, or one of each joined by a comma; ``None``: by content.
        requests: a file of what was asked, joined by id (``IDS``): batch input, questions, a data set with its images.
        images: a directory of images, beside the file's own; without one in a row, that of its id.
        fetch: ask the network for images that are given by URL.
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None
    requests: Path | None = None
    images: Path | None = None
    fetch: bool = False

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        *,
        columns: Mapping[str, str] | None = None,
        format: str | None = None,
        requests: str | os.PathLike[str] | None = None,
        images: str | os.PathLike[str] | None = None,
        fetch: bool = False,
    ) -> Source:
        """The same of paths as texts, and of no columns. Raises ``StudyError``."""
        asked, beside = (None if given is None else Path(given) for given in (requests, images))
        return cls(Path(path), columns or {}, format, asked, beside, fetch)

    def __post_init__(self) -> None:
        """Raises ``StudyError`` for a column of no field, or a format that is not known."""
        for name in self.columns:
            if name not in FIELDS:
                raise StudyError(f"columns: there is no field {name!r}; the fields are {', '.join(FIELDS)}")
        for name in self._named:
            if name not in FILES and name not in SHAPES:
                raise StudyError(f"there is no format {name!r}; choose of {', '.join((*FILES, *SHAPES))}")

    @property
    def _named(self) -> list[str]:
        return [name.strip() for name in (self.format or "").split(",") if name.strip()]

    @functools.cached_property
    def kind(self) -> str:
        """Of the file, a name of ``FILES``. Raises ``StudyError``."""
        found = kind_of(self.path)  # also where it is named: a file that cannot be read is told in any case
        return next((name for name in self._named if name in FILES), found)

    @property
    def shape(self) -> str | None:
        """Of its rows, where one is named."""
        return next((name for name in self._named if name in SHAPES), None)

    @property
    def places(self) -> list[Path]:
        """The directories that images are looked for in."""
        return [*([self.images] if self.images is not None else []), self.path.parent] + (
            [self.requests.parent] if self.requests is not None else []
        )

    def recognised(self) -> str:
        """The kind of the file and the shape of its first row, in words; of rows alone where none can be read."""
        first = next((row for _, row in itertools.islice(read_rows(self), 8) if isinstance(row, AnswerRow)), None)
        return FILES[self.kind] + (f", {SHAPES[first.shape]}" if first is not None else "")

    def count(self) -> int:
        """How many rows there are, for telling how far the work is."""
        return count_rows(self.path, self.kind)


def read_rows(
    source: Source | str | Path, *, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, AnswerRow | BadRow]]:
    """The rows of a file, lazily, with their numbers; one that cannot be taken comes as the reason why not.

    Args:
        source: the file and how it is read; a path alone is read by its content.
        columns: beside a path: field → name, for fields of other names than ``FIELDS`` has.

    Raises:
        StudyError: the file, or that of the requests, cannot be read, or ``columns`` names no field.
    """
    if not isinstance(source, Source):
        source = Source.of(source, columns=columns)
    kind = source.kind
    requests = None if source.requests is None else _Requests(source.requests, kind_of(source.requests))
    own = _Requests(source.path, kind)
    for line, content in rows_in(source.path, kind):
        if isinstance(content, BadRow):
            yield line, content
        elif not is_request(content):
            yield line, _row(line, content, source, kind, requests, own)
        elif not own.answered(content):
            yield line, BadRow("it is a request without its answer: give the file of answers, and this with --requests")


class _Requests:
    """Rows that hold what was asked, found by id. The rows of JSON lines stay in their file: images may be in them."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        self._known: dict[tuple[str, str], int | Mapping[str, Any]] | None = None
        self._answered: set[str] = set()

    def of(self, row: Mapping[str, Any], *, batch: bool = False) -> Mapping[str, Any] | None:
        """The request of an answer: of the same name and id, else of the same id. ``batch``: of batch input alone."""
        known = self._read(batch)
        pairs = [(name, str(row[name])) for name in IDS if isinstance(row.get(name), str | int)]
        found = next((known[pair] for pair in pairs if pair in known), None)
        if found is None and not batch:
            found = next((known["", value] for _, value in pairs if ("", value) in known), None)
        if isinstance(found, int):
            line = line_at(self._path, found)
            return None if isinstance(line, BadRow) else line
        return found

    def answered(self, request: Mapping[str, Any]) -> bool:
        """Whether the file holds the answer to a line of batch input in it."""
        self._read(batch=True)
        return str(request["custom_id"]) in self._answered

    def _read(self, batch: bool) -> dict[tuple[str, str], int | Mapping[str, Any]]:
        if self._known is None:
            self._known = {}
            for offset, row in self._rows():
                if batch and not is_request(row):
                    self._answered.add(str(row.get("custom_id")))
                    continue
                where = row if offset is None else offset
                for name in IDS:
                    if isinstance(row.get(name), str | int):
                        self._known.setdefault((name, str(row[name])), where)
                        self._known.setdefault(("", str(row[name])), where)
        return self._known

    def _rows(self) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
        if self._kind != "jsonl":
            yield from ((None, row) for _, row in rows_in(self._path, self._kind) if not isinstance(row, BadRow))
            return
        with self._path.open("rb") as file:
            offset = 0
            for data in lines_of(file):
                row = BadRow("too long") if data is None else parsed(data)
                if not isinstance(row, BadRow):
                    yield offset, row
                offset = file.tell()


def _row(
    line: int, content: dict[str, Any], source: Source, kind: str, requests: _Requests | None, own: _Requests
) -> AnswerRow | BadRow:
    try:
        request = None if requests is None else requests.of(content)
        if request is None and "custom_id" in content and not isinstance(content.get("request"), Mapping):
            request = own.of(content, batch=True)
        fields = fields_of(content, request=request, columns=source.columns, shape=source.shape)
        if kind in TABLES:
            fields = {name: _of_cell(name, value) for name, value in fields.items()}
        if fields["image"] is None and source.images is not None:
            fields["image"] = _image_by_id(source.images, fields["id"])
        joined = content if request is None else {"answer": content, "request": request}
        hint = _missing_hint(content, request, requests)
        return _checked(line, joined, fields, {name: keys_of(content, name) + hint for name in _NEEDED})
    except BadRow as reason:
        return reason
    except RecursionError:
        return BadRow("lists or objects in one another, too deep")
    except Exception as error:  # whatever a row is, the next one is read
        return BadRow(f"it cannot be read, {reason_of(error)}")


def _missing_hint(content: Mapping[str, Any], request: Mapping[str, Any] | None, requests: _Requests | None) -> str:
    if isinstance(content.get("generated_texts"), list):  # of `vllm bench serve --save-detailed`, in shuffled order
        return (
            "; a benchmark's result does not say which image and question a text answers: ask by `vllm run-batch`, or "
            "keep each request with its reply"
        )
    if request is None and requests is not None:
        return "; the file of requests has none of its id"
    asks = any(name in content for name in ("choices", "outputs", "response", "meta_info", "index", "doc_id"))
    return "; if it stands in another file: --requests FILE, joined by id" if asks and request is None else ""


def _of_cell(name: str, value: Any) -> Any:
    """A cell of a table: lists are written as text, and an answer may look like a number."""
    if isinstance(value, str) and name in ("image", "token_ids", "logprobs") and value.lstrip().startswith(("[", "{")):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value.strip())
    if name in ("answer", "question", "prompt") and isinstance(value, int | float) and not isinstance(value, bool):
        return cell_text(value)
    return value


def _image_by_id(directory: Path, name: Any) -> str | None:
    """The file of a directory that is named as a row's id is."""
    if not isinstance(name, str | int) or not str(name) or re.search(r"[/\\\0]", str(name)) or len(str(name)) > 200:
        return None
    files = (f"{name}{suffix}" for suffix in ("", *_SUFFIXES))
    return next((file for file in files if (directory / file).is_file()), None)


def _checked(line: int, content: Mapping[str, Any], found: dict[str, Any], has: Mapping[str, str]) -> AnswerRow:
    given = found["image"] if isinstance(found["image"], list) else [found["image"]]
    images = [_source_of(item) for item in given]
    if not images or not all(images):
        raise BadRow(
            "there is no image: a path, a data: URI, base64, bytes or a list of them is needed; the row has "
            f"{has['image']}"
        )
    for name in ("question", "prompt", "answer"):
        if found[name] is None:
            continue
        if not isinstance(found[name], str):
            raise BadRow(f"the {name} is a text, not {type(found[name]).__name__}")
        if half := _HALVES.search(found[name]):
            raise BadRow(f"the {name} holds half of a character (U+{ord(half[0]):04X}), which no tokenizer takes")
    asked = found["question"] or found["prompt"] or found["messages"]
    ids = found["token_ids"]
    if ids is not None and not (isinstance(ids, list) and ids and all(_is_id(item) for item in ids)):
        raise BadRow("token_ids is a list of whole numbers, and not an empty one")
    values, named = _log_probs(found["logprobs"], ids)
    if ids is not None and named is not None and named != list(ids):
        raise BadRow("token_ids and the tokens of the log-probabilities differ")
    ids = named if ids is None else ids
    if ids is None and not (found["answer"] or "").strip():
        empty = " (the answer is empty)" if found["answer"] is not None else ""
        raise BadRow(f"there is neither an answer nor token_ids{empty}; the row has {has['answer']}")
    if ids is not None and values is not None and len(values) != len(ids):
        raise BadRow(f"{len(values)} log-probabilities for {len(ids)} tokens")
    if ids is None and found["reasoning"]:
        raise BadRow("the engine has cut the reasoning off the answer; give token_ids (vLLM: return_token_ids: true)")
    prompt_ids = found["prompt_ids"]
    whole = isinstance(prompt_ids, list) and prompt_ids and all(_is_id(item) for item in prompt_ids)
    return AnswerRow(
        line=line,
        content=content,
        images=tuple(image for image in images if image),
        question=found["question"],
        prompt=found["prompt"],
        answer=found["answer"],
        token_ids=None if ids is None else tuple(ids),
        log_probs=None if values is None else tuple(values),
        id=_name(found["id"]),
        engine=_name(found["engine"]),
        messages=None if found["messages"] is None else tuple(found["messages"]),
        template=found["template"] or {},
        prompt_ids=tuple(prompt_ids) if whole else None,
        finish=found["finish"],
        ended=bool(found["ended"]),
        scored=_scored(found["scored"]) if found["scored"] else None,
        shape=found["shape"],
        notes=tuple(found["notes"]),
        unasked="" if asked else f"there is neither question nor prompt; the row has {has['question']}",
    )


def _source_of(value: Any, depth: int = 3) -> str | bytes | None:
    """An image as it is given: text, bytes, or either in an object (``{"bytes", "path"}``, ``{"url"}``, …)."""
    if isinstance(value, bytes | bytearray):
        return bytes(value) or None
    if isinstance(value, Mapping) and depth:
        names = ("bytes", "url", "image_url", "data", "base64", "image", "path", "file_name", "source")
        return next((found for name in names if (found := _source_of(value.get(name), depth - 1))), None)
    return value if isinstance(value, str) and value else None


def _scored(entries: list[Any]) -> tuple[tuple[int, float], ...]:
    """vLLM's ``prompt_logprobs``: of each position the token that stands there, which is its first."""
    found: list[tuple[int, float]] = []
    for entry in entries:
        key = next(iter(entry), None) if isinstance(entry, Mapping) else None
        value = entry[key] if key is not None else None
        number = value.get("logprob") if isinstance(value, Mapping) else value
        known = isinstance(number, int | float) and not isinstance(number, bool)
        token = int(key) if isinstance(key, str | int) and re.fullmatch(r"\d{1,9}", str(key)) else -1
        found.append((token, float(number) if known and number > _NOT_GIVEN else math.nan))  # type: ignore[arg-type,operator]
    return tuple(found)


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
            named += _named_token(entry)
            entry = _of_token(entry, step, ids)
        if entry is not None and (isinstance(entry, bool) or not isinstance(entry, int | float)):
            raise BadRow(f"log-probability {step} is no number: {shortened(entry)}")
        if entry is not None and entry > 1e-3:
            raise BadRow(f"log-probability {step} is {entry}, above 0: natural logarithms of probabilities are needed")
        try:
            value = math.nan if entry is None else float(entry)
            values.append(math.nan if value <= _NOT_GIVEN else value)
        except OverflowError:
            raise BadRow(f"log-probability {step} is too large a number") from None
    return values, named if named and len(named) == len(values) else None


def _named_token(entry: Mapping[str, Any]) -> list[int]:
    """The token's id where vLLM wrote it in place of the token's text (``return_tokens_as_token_ids``)."""
    found = re.fullmatch(r"token_id:(\d{1,9})", entry["token"]) if isinstance(entry.get("token"), str) else None
    return [int(found[1])] if found else []


def _of_token(entry: Mapping[str, Any], step: int, ids: list[int] | None) -> Any:
    """The number in one entry of OpenAI's list, or of vLLM's, which has those of the likeliest tokens beside it."""
    if "logprob" in entry:
        return entry["logprob"]
    if ids is None and len(entry) > 1:
        raise BadRow(f"log-probability {step} is given for {len(entry)} tokens; token_ids must say which was chosen")
    key = next(iter(entry), None) if ids is None else str(ids[step]) if step < len(ids) else None
    value = entry.get(str(key))
    if value is None:
        raise BadRow(f"log-probability {step} is not given for the token of the answer ({shortened(str(key))})")
    return value["logprob"] if isinstance(value, Mapping) and "logprob" in value else value


def _name(value: Any) -> str | None:
    """What a row says of itself, of bounded length."""
    return None if value is None else reason_of(str(value))


def _is_id(value: Any) -> bool:
    return is_whole(value) and int(value) >= 0


def _open(source: str | bytes, directories: Sequence[Path], fetch: bool) -> Image.Image:
    if isinstance(source, bytes):
        try:
            return decode_image(source)
        except ProbeError as error:
            raise BadRow(f"the image in the row cannot be read: {error}") from error
    if source.startswith("data:"):
        try:
            return open_image(source)
        except ProbeError as error:
            raise BadRow(f"the image in the data: URI cannot be read: {error}") from error
    if source.startswith(("http://", "https://")):
        if not fetch:
            raise BadRow(
                f"the image {shortened(source, 120)} lies on the network, which is asked only with --fetch "
                "(fetch=True); nothing was fetched"
            )
        return _given(source)
    return _from_file(source, directories)


def _given(source: Any) -> Image.Image:
    try:
        return open_image(source, fetch=True)
    except ProbeError as error:
        raise BadRow(str(error)) from error


def _from_file(text: str, directories: Sequence[Path]) -> Image.Image:
    path = os.path.expanduser(unquote(text[7:]) if text.startswith("file://") else text)
    found, outside = found_within(path, directories) if len(path) < 4096 else (None, False)
    shown, looked = shortened(text, 200 if _may_be_path(text) else 60), ", ".join(map(str, directories))
    if found is not None:
        return _given(found)
    if outside:
        raise BadRow(f"the image {shown} lies outside of {looked}; name its directory: images=, --images DIR")
    if (data := _of_base64(text)) is not None:
        with suppress(ProbeError):
            return decode_image(data)
    if not _may_be_path(text):
        raise BadRow(f"the image {shown} is missing: it is neither the path of a file nor an image in base64")
    raise BadRow(f"the image {shown} is missing (looked in {looked}; another place: --images DIR)")


def _may_be_path(text: str) -> bool:
    """Whether somebody may have meant a path: file systems take no name of more than 255 bytes."""
    return max(map(len, re.split(r"[/\\]", text[:4096]))) <= 255 or not re.fullmatch(r"[A-Za-z0-9+/=\s]+", text[:4096])


def _of_base64(text: str) -> bytes | None:
    """The bytes of an image file in base64; ``None`` where it is none, or too short for one."""
    if len(text) < 40:
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None
