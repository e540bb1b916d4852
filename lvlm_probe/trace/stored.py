"""One answer in a trace file: opened for no longer than a read takes, and read field by field."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
from PIL import Image

from lvlm_probe.errors import ImageError, TraceError
from lvlm_probe.files import State, path_of
from lvlm_probe.storage.reading import SealedFile, open_sealed
from lvlm_probe.storage.seal import Seal, trace_error
from lvlm_probe.trace.parts import read_image
from lvlm_probe.trace.records import FIELDS, JSON, MODEL_JSON, MODEL_TEXT, ImageRecord, TraceFields, default_of
from lvlm_probe.trace.schema import FORMAT, FORMAT_VERSION, RowHeader, row_key, validate, validate_row
from lvlm_probe.words import Word, group_words

V = TypeVar("V")


class Images(tuple[Image.Image, ...]):
    """Images of which each is handed out as a copy, that its user may draw on."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return type(self)(found) if isinstance(place, slice) else found.copy()

    def __iter__(self) -> Iterator[Image.Image]:
        return (image.copy() for image in super().__iter__())


def _own(value: Any) -> Any:
    """A copy of what is kept, for a user who may write into it; what nobody can write into as it is."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(_own, value))
    return value.copy() if isinstance(value, Image.Image) else value


class Kept(Generic[V]):
    """An attribute of an answer that is read from its file once; what was kept of it is nobody's to write into."""

    def __init__(self, read: Callable[[Any], V]) -> None:
        self._read, self.__doc__ = read, read.__doc__

    def __set_name__(self, _of: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, answer: None, _of: type | None = None) -> Self: ...
    @overload
    def __get__(self, answer: object, _of: type | None = None) -> V: ...
    def __get__(self, answer: Any, _of: type | None = None) -> Any:
        if answer is None:
            return self
        known: dict[str, Any] = answer.kept
        try:
            found = known[self._name]
        except KeyError:
            found = known[self._name] = self._read(answer)
        return _own(found)


class StoredAnswer(TraceFields):
    """An answer and what belongs to it, as ``Trace`` reads it; see there."""

    def __init__(self, path: str | os.PathLike[str], row: int = 0) -> None:
        self.path = path_of(path, "a file of traces", TraceError)
        self._asked_row = row
        self._known: tuple[Seal, State] | None = None
        self._closed = False
        self.kept: dict[str, Any] = {}
        self.holds: object = None  # a temporary folder that the file lies in, which goes when nobody holds it any more

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets what was read; the trace cannot be read after this."""
        self._closed = True
        self.kept.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._asked_row)

    def __copy__(self) -> Self:
        made = type(self)(self.path, self._asked_row)
        made.holds = self.holds
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StoredAnswer):
            return NotImplemented
        return (self.path, self._asked_row) == (other.path, other._asked_row)

    def __hash__(self) -> int:
        return hash((self.path, self._asked_row))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, row={self._asked_row})"

    @contextlib.contextmanager
    def reading(self, *, full: bool = False) -> Iterator[SealedFile]:
        if self._closed:
            raise trace_error(self.path, "", "this trace is closed", "open it again with open_trace()")
        known = None if full else self._known
        with open_sealed(self.path, FORMAT, FORMAT_VERSION, known=known, full=full) as file:
            assert file.seal is not None
            assert file.state is not None
            self._known = file.seal, file.state
            yield file

    @Kept
    def _checked(self) -> tuple[int, RowHeader, int]:
        with self.reading() as file:
            rows = validate(file)
            row = self._asked_row + rows if self._asked_row < 0 else self._asked_row
            if not 0 <= row < rows:
                what = f"it has {rows} row{'s' * (rows != 1)}, there is no row {self._asked_row}"
                raise trace_error(self.path, "traces", what, f"ask for row 0 to {rows - 1}")
            return row, validate_row(file, row), rows

    @property
    def header(self) -> RowHeader:
        """Sizes and names, known without reading any array."""
        return self._checked[1]

    @property
    def row(self) -> int:
        """Index of this trace in its file, which is its row in the batch unless rows were left out."""
        return self._checked[0]

    @property
    def rows(self) -> int:
        """How many traces the file holds."""
        return self._checked[2]

    @property
    def nbytes(self) -> int:
        """Bytes of this trace's data in the file."""
        return self.header.nbytes

    @Kept
    def created(self) -> str:
        """When recording began: ISO-8601, UTC."""
        with self.reading() as file:
            return file.text("/", "created", "")

    @Kept
    def writer(self) -> str:
        """Program and version that wrote the file."""
        with self.reading() as file:
            return file.text("/", "writer", "")

    @Kept
    def seconds(self) -> dict[str, JSON]:
        """Seconds that the recorded call took, by part."""
        with self.reading() as file:
            value = file.json("seconds") if file.has("seconds") else {}
        return value if isinstance(value, dict) else {}

    @Kept
    def model(self) -> dict[str, JSON]:
        """The model that answered: ids, class, dtype, fingerprint, config, versions."""
        model: dict[str, JSON] = {}
        with self.reading() as file:
            for name in ("more", *MODEL_JSON):
                if file.has(f"model/{name}"):
                    value = file.json(f"model/{name}")
                    model.update(value if name == "more" and isinstance(value, dict) else {name: value})
            model.update({name: file.text("model", name, "") or None for name in MODEL_TEXT})
        return model

    def image_record(self, index: int = 0) -> ImageRecord:
        """Read one original image as an encoded file, checked against its SHA-256; ``ImageError`` if there is none."""
        sizes = self.header.image_sizes
        if not 0 <= index < len(sizes):
            held = f"{len(sizes)} image{'s' * (len(sizes) != 1)}" if sizes else "no image"
            way_out = "pass images= or a processor to the recording so that they are kept"
            raise ImageError(f"{self.path}: the trace holds {held}, there is no image {index}; {way_out}")
        with self.reading() as file:
            return read_image(file, f"{row_key(self.row)}/images/{index:03d}")

    @Kept
    def answer(self) -> str:
        """The answer as text, without special tokens."""
        return "".join(piece for piece, flag in zip(self.tokens, self.special, strict=True) if not flag)

    @Kept
    def words(self) -> list[Word]:
        """The words of the answer as spans of tokens."""
        return group_words(self.tokens, self.special.tolist())

    @property
    def llr(self) -> np.ndarray | None:
        """Log-likelihood ratio ``log P(a_t) - log P~(a_t)``, ``(step,)`` float32; None when deferred. Paper, Eq. 6."""
        if self.baseline_log_probs is None:
            return None
        with np.errstate(invalid="ignore"):  # -inf under both images is no number, and says so as NaN
            return self.log_probs - self.baseline_log_probs


def _reading(name: str) -> Kept[Any]:
    """The attribute of the table's row ``name``: read from the file when it is asked for, once."""
    field = FIELDS[name]

    def read(answer: StoredAnswer) -> Any:
        if field.is_attribute:
            return answer.header.attributes[name]
        base = row_key(answer.row)
        with answer.reading() as file:
            if not field.is_kept(file, base):
                return default_of(name)
            return field.read(file, base, answer.header.sizes)

    read.__doc__ = field.sentence
    attribute = Kept(read)
    attribute.__set_name__(StoredAnswer, name)
    return attribute


for _name in FIELDS:
    setattr(StoredAnswer, _name, _reading(_name))
